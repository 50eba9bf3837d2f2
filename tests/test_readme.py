"""What the README and the serving page name is there. The README's code is run in hub/test_documents.py."""

import re
import shlex
from pathlib import Path

import pytest
from trl import ModelConfig

from trl_recipes import grpo
from trl_recipes.arguments import parse
from trl_recipes.score_arguments import ScoreArguments


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL 1.16 sets it
def test_the_recipes_take_the_commands_of_the_serving_page(tmp_path) -> None:
    page = (ROOT / "docs/serving.md").read_text().replace("\\\n", " ")
    config = tmp_path / "config.yaml"
    config.write_text("output_dir: outputs/mine\nuse_cpu: true\nbf16: false\n")
    commands = re.findall(r"trl_recipes/(grpo|score)\.py ([^\n]+)", page)
    assert [recipe for recipe, _ in commands] == ["grpo", "grpo", "score"]
    for recipe, command in commands:
        classes = grpo.ARGUMENT_CLASSES if recipe == "grpo" else (ScoreArguments, ModelConfig)
        words = [str(config) if word == "..." or word.endswith(".yaml") else word for word in shlex.split(command)]
        parse(classes, recipe, words)


def test_every_file_and_make_target_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    files = set(re.findall(r"\b((?:trl_recipes|peft_tinylora|tests)/[\w/.]+\.(?:py|yaml|jsonl|md))\b", text))
    assert files and all((ROOT / file).exists() for file in files)
