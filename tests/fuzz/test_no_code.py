"""No line of the package, the recipes or the benchmarks turns somebody else's bytes into code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("peft_tinylora", "trl_recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "runpy",
    "code",
}
NAMES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "execfile",
}  # as names, not as methods: `model.eval()` is another thing
CALLS = {
    *(
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "yaml.Loader",
        "yaml.UnsafeLoader",
        "yaml.FullLoader",
    ),
    *(
        "os.system",
        "os.popen",
        "pandas.read_pickle",
        "pd.read_pickle",
        "torch.jit.load",
        "torch.hub.load",
        "torch.package",
    ),
    *("np.load", "numpy.load", "pickle.load", "pickle.loads", "torch.serialization.add_safe_globals"),
}
# Files that import what the user himself names on the command line: TRL's own option `reward_funcs`.
MAY_IMPORT = {"trl_recipes/rewards.py"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression that is such a name, else nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def complaints(tree: ast.AST, name: str) -> Iterator[str]:
    """What of a file's syntax tree reads code, or lets somebody read code, where it should not."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from (f"{line}: import {a.name}" for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").partition(".")[0] in MODULES:
                yield f"{line}: from {node.module} import"
            for imported in (f"{node.module}.{alias.name}" for alias in node.names):
                if imported in CALLS or imported == "torch.load":  # whose arguments are looked at by that name only
                    yield f"{line}: {imported}"
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield f"{line}: {node.id}"
        elif isinstance(node, ast.Attribute) and dotted(node) in CALLS:
            yield f"{line}: {dotted(node)}"
        elif isinstance(node, ast.Call):
            yield from complaints_of_call(node, name)
        elif isinstance(node, ast.arguments):
            yield from complaints_of_defaults(node)
        elif isinstance(node, ast.AnnAssign) and dotted(node.target) == "trust_remote_code":
            value = node.value
            default = keyword(value, "default") if isinstance(value, ast.Call) else value
            if not (isinstance(default, ast.Constant) and default.value is False):
                yield f"{line}: trust_remote_code is not False by default"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and is_true(value):
                    yield f"{line}: trust_remote_code: True"


def complaints_of_call(call: ast.Call, name: str) -> Iterator[str]:
    function = dotted(call.func)
    if function == "torch.load" and not is_true(keyword(call, "weights_only")):
        yield f"{call.lineno}: torch.load without weights_only=True"
    if is_true(keyword(call, "trust_remote_code")):
        yield f"{call.lineno}: trust_remote_code=True"
    if is_true(keyword(call, "shell")) or is_true(keyword(call, "allow_pickle")):
        yield f"{call.lineno}: a shell, or a pickle"
    if function.endswith("import_module") and name not in MAY_IMPORT:
        yield f"{call.lineno}: import_module"


def complaints_of_defaults(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True)]
    defaults += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    for argument, default in defaults:
        if argument.arg == "trust_remote_code" and not (isinstance(default, ast.Constant) and default.value is False):
            if default is not None:
                yield f"{argument.lineno}: trust_remote_code is not False by default"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_source_file_runs_nothing_that_it_reads(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert list(complaints(ast.parse(path.read_text(encoding="utf-8")), name)) == []


WRONG = [
    *(
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "from os import system as run",
        "import dill as d",
        "eval('1')",
        "f = exec",
        "compile(s, 'f', 'exec')",
    ),
    *(
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "os.system('ls')",
    ),
    *("f(trust_remote_code=True)", "def f(trust_remote_code=True): pass", "def f(*, trust_remote_code=None): pass"),
    *(
        "trust_remote_code: bool = field(default=True)",
        "options = {'trust_remote_code': True}",
        "run('ls', shell=True)",
    ),
    *("importlib.import_module(name)", "np.load(path)", "pd.read_pickle(path)", "load(path, allow_pickle=True)"),
]


@pytest.mark.parametrize("line", WRONG)
def test_what_it_is_that_is_looked_for(line: str) -> None:
    assert list(complaints(ast.parse(line), "a.py"))


def test_no_config_that_is_shipped_trusts_remote_code_or_sets_variables() -> None:
    files = sorted((ROOT / "trl_recipes").rglob("*.yaml"))
    assert len(files) > 50
    for path in files:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not {"trust_remote_code", "env"} & set(values), path
