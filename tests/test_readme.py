"""The README's own code, run as it stands."""

import re
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def test_the_python_of_the_readme_runs_and_trains_thirteen_numbers(tmp_path) -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    shutil.copytree(ROOT / "trl_recipes" / "embedded" / "model", tmp_path / "trl_recipes" / "embedded" / "model")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainable params: 13 ||" in done.stdout
    assert done.stdout.count("one row each:") == 1
    assert (tmp_path / "outputs" / "readme_adapter" / "adapter_model.safetensors").exists()


def test_every_file_and_make_target_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    files = set(re.findall(r"\b((?:trl_recipes|peft_tinylora|tests)/[\w/.]+\.(?:py|yaml|jsonl|md))\b", text))
    assert files and all((ROOT / file).exists() for file in files)
