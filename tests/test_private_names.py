"""What is private to PEFT, transformers, accelerate and torch is used in internals.py alone; exceptions are listed here."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

import peft_tinylora
from peft_tinylora import TinyLoraModel
from peft_tinylora.embedding import Embedding
from peft_tinylora.experts import ParamWrapper
from peft_tinylora.linear import Linear


PACKAGE = Path(peft_tinylora.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
INTERNALS = ("internals.py", "vllm/worker.py")

# Methods with a leading underscore that PEFT's base classes, and nn.Module, call for others to override.
HOOKS = {
    "_apply",
    "_cast_adapter_dtype",
    "_check_new_adapter_config",
    "_create_and_replace",
    "_get_adapter_state_dict",
    "_get_available_adapters",
    "_move_adapter_to_device_of_base_layer",
    "_pre_injection_hook",
    "_prepare_adapter_config",
    "_remap_adapter_state_dict_for_load",
    "_replace_module",
}
# One that `PeftModel` calls where a tuner has it.
HOOKS_OF_MODEL = {"_enable_peft_forward_hooks"}
# What a subclass gets from PEFT's base classes and calls or sets on itself.
INHERITED = {
    "_active_adapter",
    "_check_merge_allowed",
    "_disable_adapters",
    "_get_embed_scale",
    "_unload_and_optionally_merge",
}
# nn.Module's own dictionaries, past its `__getattr__`, which each layer would go through for each token of decoding.
PAST_GETATTR = {"_buffers", "_modules", "_parameters"}
WHERE_TOKENS_PASS = ("layer.py", "linear.py", "vector.py")


def is_private(name: str) -> bool:
    return name.startswith("_") and name.isidentifier() and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> Iterator[str]:
    """The names with a leading underscore that a file makes itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def used_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what a file takes by a name with a leading underscore, also by `getattr` and in keywords."""
    for node in ast.walk(tree):
        names: list[str | None] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value.islower() else []  # no suffix of an environment variable
        elif isinstance(node, ast.keyword):
            names = [node.arg]
        yield from ((getattr(node, "lineno", 0), name) for name in names if name and is_private(name))


TREES = {path: ast.parse(path.read_text()) for path in FILES}
OWN = (
    {name for tree in TREES.values() for name in defined_in(tree) if is_private(name)}
    - HOOKS
    - HOOKS_OF_MODEL
    - INHERITED
)
# Documented by Python: the underscore keeps `NamedTuple._replace` apart from fields, and argparse tells the other to be the
# type of what `add_subparsers` returns.
PUBLIC = {"_replace", "_SubParsersAction"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_names_that_others_keep_private_are_used_in_one_module(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    if place in INTERNALS:
        return
    allowed = (
        OWN | HOOKS | HOOKS_OF_MODEL | INHERITED | PUBLIC | (PAST_GETATTR if place in WHERE_TOKENS_PASS else set())
    )
    found = [f"{place}:{line}: {name}" for line, name in used_in(TREES[path]) if name not in allowed]
    assert not found, (
        f"{', '.join(found)} is not public, and a release may move it: use a public name, or put it into "
        "peft_tinylora/internals.py with what it is for and what to watch."
    )


@pytest.mark.parametrize(
    "line", ["x._version", "from peft._a import b", "from peft import _b", "getattr(x, '_b')", "f(_b=1)"]
)
def test_a_private_name_is_seen_however_it_is_written(line: str) -> None:
    assert [name for _, name in used_in(ast.parse(line))] in (["_version"], ["_a"], ["_b"])


def test_the_hooks_that_are_overridden_are_those_listed() -> None:
    overridden = set()
    for own in (TinyLoraModel, Linear, Embedding, ParamWrapper):
        ours = {name for part in own.__mro__ if part.__module__.startswith("peft_tinylora") for name in vars(part)}
        for base in {BaseTuner, BaseTunerLayer, nn.Module} & {*own.__mro__}:
            overridden |= {name for name in ours if is_private(name) and inspect.isroutine(vars(base).get(name))}
    assert overridden == HOOKS
    assert all(f'"{name}"' in inspect.getsource(PeftModel) for name in HOOKS_OF_MODEL)


def test_what_is_inherited_is_there() -> None:
    model_or_layer = vars(BaseTuner) | vars(BaseTunerLayer)
    assert {name for name in INHERITED if name in model_or_layer} == INHERITED
