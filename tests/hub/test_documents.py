"""Every code block of the README and of the cards in model_cards/, run as it stands, against a Hub on the loopback interface."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub import loopback
from hub.machine import Machine, environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "trl_recipes" / "embedded"
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BRIEFLY = ("--max_steps", "1", "--max_eval_problems", "8")
PLACEHOLDERS = {
    "YOUR_MODEL": "trl_recipes/embedded/model",
    "YOUR_FILE.jsonl": "trl_recipes/embedded/data/grpo_train.jsonl",
    "HELD_OUT.jsonl": "trl_recipes/embedded/data/held_out.jsonl",
    "--question_column question": "--question_column prompt",
}


@pytest.fixture(scope="module")
def hub() -> Iterator[loopback.Hub]:
    """A Hub that has the embedded model under the names of the documents' base models."""
    with loopback.running_hub() as hub:
        base = {path.name: path.read_bytes() for path in (EMBEDDED / "model").iterdir() if path.is_file()}
        hub.repositories = {name: dict(base) for name in ("user/base", "Qwen/Qwen2.5-7B-Instruct")}
        yield hub


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder that looks like a clone, to write `outputs/` into."""
    for name in ("trl_recipes", "model_cards", "peft_tinylora", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def shell(hub, checkout: Path, block: str, *more: str) -> None:
    """Run the lines of a bash block: `make` dry, recipes briefly, on a CPU and in this environment."""
    for line in block.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if not command or command[0] in ("source", "pip"):  # there is an environment already
            continue
        if command[0] == "make":
            command += ["--dry-run", f"PYTHON={sys.executable}"]
        if any(part.endswith(("grpo.py", "sft.py")) for part in command):
            command += [*BRIEFLY, *more]
        if command[0] == "python":
            command[0] = sys.executable
        binaries = Path(sys.executable).parent
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment(hub, checkout / "home", PATH=f"{binaries}{os.pathsep}{os.environ['PATH']}"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_readme_runs_from_top_to_bottom(hub, checkout) -> None:
    text = (ROOT / "README.md").read_text()
    for placeholder, value in PLACEHOLDERS.items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    blocks = BLOCK.findall(text)
    assert {language for language, _ in blocks} == {"bash", "python"} and len(blocks) >= 9
    (checkout / "home").mkdir()
    reader = Machine(hub, checkout / "home")
    reader.script(f"import os\nos.chdir({str(checkout)!r})")
    printed = ""
    for language, block in blocks:
        if language == "python":
            printed += reader.script(block)
        else:
            shell(hub, checkout, block)
    reader.close()
    assert "trainable params: 13 ||" in printed and "one row each: torch.Size([3, 3, 184])" in printed
    assert {"adapter_config.json", "README.md"} <= hub.repositories["user/adapter"].keys()
    assert (checkout / "outputs" / "mine" / "reward_curve.png").exists()


def test_the_cards_are_of_the_three_ways_of_training() -> None:
    assert [card.name for card in CARDS] == ["embedded_grpo", "embedded_grpo_4bit", "embedded_sft"]


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_says_what_is_in_its_folder(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and {"tinylora", "trl"} <= set(card.data.tags)
    [vectors] = load_file(folder / "adapter_model.safetensors").values()
    numbers = re.findall(r"[+-]\d\.\d{6}", card.text.partition("## The trained numbers")[2].partition("## Use")[0])
    assert numbers == [f"{value:+.6f}" for value in vectors.flatten().tolist()] and len(numbers) == 13
    assert f"({(folder / 'adapter_model.safetensors').stat().st_size} bytes)" in card.text
    for name in re.findall(r"\(([\w.]+\.png)\)", card.text):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    table = dict(re.findall(r"\| (greedy|sampled) \| [\d.]+% \| ([\d.]+)% \|", card.text))
    assert {name: f"{100 * results[f'accuracy, {name}']:.1f}" for name in table} == table and len(table) == 2
    listed = (ROOT / "model_cards" / "README.md").read_text()
    assert re.search(rf"\[{folder.name}\].*\| {table['greedy']}% \|.*\| {table['sampled']}% \|", listed)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["tinylora_u"] == 1


@pytest.mark.recipe
@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_every_code_block_of_a_card_runs_and_the_export_answers_as_the_adapter_does(
    hub, checkout, folder: Path
) -> None:
    text = (folder / "README.md").read_text()
    (checkout / "home").mkdir()
    answers = []
    for language, block in BLOCK.findall(text):
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", block],
                cwd=checkout,
                env=environment(hub, checkout / "home"),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            answers.append(done.stdout)
        elif language == "bash":
            shell(hub, checkout, f"{block.rstrip()} --max_problems 8\n" if "score.py" in block else block,
                  "--output_dir", "outputs/again")  # fmt: skip
    assert len(answers) == 2 and answers[0].strip() and answers[0] == answers[1]
    assert json.loads((checkout / "outputs" / "again" / "adapter_config.json").read_text())["u"] == 1
