"""What is private to transformers and TRL is used in two places of trl_recipes, and each name is listed here with its reason."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from trl import GRPOTrainer, SFTTrainer

import trl_recipes
from trl_recipes.resuming import ResumableGRPOTrainer, ResumableSFTTrainer, ResumableTrainer


PACKAGE = Path(trl_recipes.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TRAINER, GRPO, SFT = transformers.Trainer, GRPOTrainer, SFTTrainer
# file -> name -> the classes that have it. What is public instead, there is not: a checkpoint lacks these numbers, no callback
# comes between the last file of a checkpoint and the deletion of older ones, and TRL corrects for its own vLLM only.
PRIVATE = {
    "resuming.py": {
        "_get_output_dir": (TRAINER,),  # where checkpoints are written
        "_save_checkpoint": (TRAINER, GRPO, SFT),  # between writing one and deleting others
        "_tr_loss": (TRAINER,),  # what was not logged yet
        "_globalstep_last_logged": (TRAINER,),
        "_total_train_tokens": (GRPO, SFT),
        "_metrics": (GRPO, SFT),
        "_step": (GRPO,),  # completions that are not used up yet
        "_buffered_inputs": (GRPO,),
    },
    "rollouts.py": {
        "_last_loaded_step": (GRPO,),  # that which TRL's vLLM would be sent after
    },
}


def is_private(name: str) -> bool:
    return name.startswith("_") and name.isidentifier() and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> Iterator[str]:
    """The names with a leading underscore that a file makes: on `self`, in `__init__`, for elsewhere it may be another's."""
    declared = {id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value is None}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in declared:
            yield node.id
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (
                a.attr for a in ast.walk(node) if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Store)
            )


def used_in(tree: ast.AST) -> Iterator[str]:
    """The names with a leading underscore that a file reads or sets, imports, or has as a keyword, or as a string that is
    no part of an f-string or a sum, nor the argument of a string's own method (`removesuffix("_after")`).
    """
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
        if isinstance(node, ast.BinOp):
            parts |= {id(node.left), id(node.right)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and hasattr(str, node.func.attr):
            parts |= {id(argument) for argument in node.args}
    for node in ast.walk(tree):
        names: list[str | None] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            names = [node.value]
        elif isinstance(node, ast.keyword):
            names = [node.arg]
        yield from (name for name in names if name and is_private(name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_names_that_others_keep_private_are_those_listed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    listed = set(PRIVATE.get(path.relative_to(PACKAGE).as_posix(), {}))
    found = set(used_in(tree)) - (set(defined_in(tree)) - listed)
    assert found == listed, "use a public name, or list it above with its reason, in one file; take out what is gone"


@pytest.mark.parametrize(
    "line",
    ["x._version", "self._version = 1", "from peft._a import b", "from peft import _b", "getattr(x, '_b')", "f(_b=1)"],
)
def test_a_private_name_is_seen_however_it_is_written(line: str) -> None:
    tree = ast.parse(line)
    assert set(used_in(tree)) - set(defined_in(tree)) in ({"_version"}, {"_a"}, {"_b"})


def test_what_is_overridden_is_what_is_listed() -> None:
    theirs = {name for base in (TRAINER, GRPO, SFT) for one in base.__mro__ for name in vars(one) if is_private(name)}
    ours = {name for own in (ResumableTrainer, ResumableGRPOTrainer, ResumableSFTTrainer) for name in vars(own)}
    assert ours & theirs - {"_abc_impl"} == {"_get_output_dir", "_save_checkpoint"}


@pytest.mark.parametrize(("name", "owners"), [pair for names in PRIVATE.values() for pair in names.items()])
def test_this_release_still_has_what_is_listed(name: str, owners: tuple[type, ...]) -> None:
    """When this fails, look up in the release notes what it is called now, and what it means."""
    for owner in owners:
        source = inspect.getsource(owner)
        assert f"self.{name}" in source or f"def {name}(" in source, f"{owner.__name__} has no {name}"
