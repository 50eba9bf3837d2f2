"""What the README names is there. Its code is run in hub/test_documents.py."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def test_every_file_and_make_target_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    files = set(re.findall(r"\b((?:trl_recipes|peft_tinylora|tests)/[\w/.]+\.(?:py|yaml|jsonl|md))\b", text))
    assert files and all((ROOT / file).exists() for file in files)
