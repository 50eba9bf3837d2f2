"""docs/troubleshooting.md quotes messages: they are what is really printed, or at least really in the source."""

import ast
import builtins
import functools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
from hub.pages import blocks_of
from provoked import PROVOKED

import peft_tinylora
from peft_tinylora import errors


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = [" ".join(block.text.split()) for block in blocks_of(PAGE) if block.language == "text"]
# Of a quoted message at least so much must be the source's own words, so that no literal fits everything.
LEAST_SHARE = 0.4


def without_accidents(message: str, folder: Path = Path("/home/ada")) -> str:
    """A message without what differs between machines and releases: folders, measured numbers, versions, safetensors' words."""
    message = message.replace(str(folder), "/home/ada").replace(str(ROOT), "/home/ada/peft-tinylora")
    message = message.replace(f"PEFT {peft.__version__}", "PEFT 0.21.2")
    message = re.sub(r"Error while deserializing[^)]*", "...", message)
    return re.sub(r"\d+%|\d\.\d+(?!\.)", "0", message)


def message_of(function: Callable) -> str:
    """What a user sees: the message of the error, or of the one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            function()
        except (peft_tinylora.TinyLoraError, ImportError, NotImplementedError, ValueError, TypeError) as error:
            return " ".join(str(error).split())
    [message] = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return " ".join(message.split())


@functools.cache
def seen(do_wrong: Callable) -> str:
    """The message of a mistake, made in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return without_accidents(message_of(do_wrong), Path(folder))


@pytest.mark.parametrize("do_wrong", PROVOKED, ids=lambda function: function.__name__)
def test_a_quoted_message_is_what_a_user_sees(do_wrong: Callable) -> None:
    assert seen(do_wrong) in [without_accidents(quoted) for quoted in QUOTED]


def literals(tree: ast.AST) -> Iterator[list[str]]:
    """The constant parts of each string of a module, what is filled in lying between them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [""]
            for value in node.values:
                if isinstance(value, ast.Constant):
                    parts[-1] += value.value
                else:
                    parts.append("")
            yield parts
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.split(r"%s|%d|%g", node.value)


def in_the_source() -> list[tuple[re.Pattern, int]]:
    """Patterns of all strings of the source and of what the Makefile prints, with the number of their own characters."""
    found = []
    for package in ("peft_tinylora", "trl_recipes"):
        for file in (ROOT / package).rglob("*.py"):
            found += literals(ast.parse(file.read_text()))
    found += [
        re.split(r"\$\([A-Z_]+\)", said) for said in re.findall(r'echo "([^"]*)"', (ROOT / "Makefile").read_text())
    ]
    patterns = []
    for parts in found:
        constant = [" ".join(part.split()) for part in parts]
        words = [r"\s*".join(map(re.escape, part.split(" "))) for part in constant]
        patterns.append((re.compile(r"\s*.*?\s*".join(words)), sum(map(len, constant))))
    return patterns


def test_every_other_quoted_message_is_in_the_source() -> None:
    patterns = in_the_source()
    assert 50 <= len(QUOTED) == len(set(QUOTED))
    provoked = {seen(do_wrong) for do_wrong in PROVOKED}
    for message in QUOTED:
        if without_accidents(message) not in provoked:
            long_enough = [pattern for pattern, own in patterns if own >= LEAST_SHARE * len(message)]
            assert any(pattern.fullmatch(message) for pattern in long_enough), message


def test_the_classes_in_the_table_are_the_standard_errors_that_it_says() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: \(`(\w+)`\))? \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    named = {name: standard for first, second, standard in rows for name in (first, second) if name}
    public = {name for name in vars(errors) if name.endswith("Error")} - {"TinyLoraError"}
    assert named.keys() == public
    for name, standard in named.items():
        error = getattr(errors, name)
        assert issubclass(error, getattr(builtins, standard)) and issubclass(error, peft_tinylora.TinyLoraError)
