"""Libraries that are too old or missing are refused before they are imported; what the suite passed with is counted."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import packaging
import pytest
from bounds import all_lower_bounds, lower_bounds
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from peft_tinylora import versions
from peft_tinylora.versions import LIBRARIES, LIBRARIES_OF_RECIPES, check_libraries, check_libraries_of_recipes


ROOT = Path(__file__).resolve().parents[1]
MAIN_BRANCHES = ("peft", "trl", "transformers", "accelerate")  # of the weekly workflow
# Asked for with the rest, and of no use to any test.
TOOLS = {"mypy", "pandas-stubs", "pre-commit", "ruff", "types-pyyaml"}
TESTED = {canonicalize_name(name) for name in all_lower_bounds()} - TOOLS
ENVIRONMENT = os.environ.get("TINYLORA_VERSIONS")  # set by `make test-versions` once the suite has passed


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a library of some version before the installed ones, as far as pip's metadata go."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, version: str) -> Path:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return tmp_path

    return install


def import_alone(*options: str, path: str) -> subprocess.CompletedProcess:
    """`import peft_tinylora` in a process of its own, with folders before all others on its path."""
    return subprocess.run(
        [sys.executable, *options, "-c", "import peft_tinylora"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_the_bounds_are_those_of_pyproject() -> None:
    assert {name: f">={version}" for name, version in lower_bounds().items()} == LIBRARIES
    assert {name: f">={version}" for name, version in lower_bounds("recipes").items()} == LIBRARIES_OF_RECIPES


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("peft", "0.20.0"),
        ("peft", "0.21.0.dev0"),  # not yet what the bound asks for
        ("transformers", "4.57.6"),
        ("torch", "2.5.1+cpu"),
        ("huggingface_hub", "0.36.2"),
    ],
)
def test_an_old_library_is_refused_in_one_line(installed, name: str, version: str) -> None:
    installed(name, version)
    bound = LIBRARIES[name]
    line = f"peft_tinylora needs {name}{bound} (found {version}). Run: pip install '{name}{bound}'"
    with pytest.raises(ImportError, match=f"^{re.escape(line)}$"):
        check_libraries()


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("peft", "0.22.0.dev0"),
        ("transformers", "5.24.0.dev0"),
        ("transformers", "6.0.0rc1"),
        ("torch", "2.6.0+cu124"),
        ("torch", "2.16.0.dev20261120+cpu"),
        ("torch", "2.7.0a0+7c8ec84dab.nv25.03"),  # as NVIDIA's containers have it
    ],
)
def test_a_newer_or_unreleased_library_is_taken(installed, name: str, version: str) -> None:
    installed(name, version)
    assert importlib.metadata.version(name) == version
    check_libraries()


def test_the_check_comes_before_anything_heavy(installed) -> None:
    installed("peft", "0.20.0")
    folder = installed("transformers", "4.57.6")
    (folder / "peft.py").write_text("raise AttributeError('obscure')")
    finished = import_alone(path=f"{folder}{os.pathsep}{ROOT}")
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == (
        "ImportError: peft_tinylora needs peft>=0.21.0 (found 0.20.0), transformers>=5.7.0 (found 4.57.6). "
        "Run: pip install 'peft>=0.21.0' 'transformers>=5.7.0'"
    )


def test_missing_libraries_are_named(tmp_path) -> None:
    # A copy of the package without pip's metadata, beside `packaging` and nothing else.
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    (tmp_path / "peft_tinylora").symlink_to(ROOT / "peft_tinylora")
    finished = import_alone("-S", path=str(tmp_path))
    needed = ", ".join(f"{name}{bound} (not installed)" for name, bound in LIBRARIES.items())
    assert f"ImportError: peft_tinylora needs {needed}. Run: pip install 'peft" in finished.stderr


def test_a_source_tree_on_the_path_has_no_version_and_is_taken(tmp_path, monkeypatch) -> None:
    (tmp_path / "source_tree").mkdir()
    (tmp_path / "source_tree" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "LIBRARIES", {"source-tree": ">=3"})
    check_libraries()


def test_recipes_name_their_extra(installed, monkeypatch) -> None:
    installed("trl", "1.15.0")
    monkeypatch.setitem(LIBRARIES_OF_RECIPES, "never-installed", ">=1")
    line = "trl_recipes needs trl>=1.16.0 (found 1.15.0), never-installed>=1 (not installed). Run: pip install "
    with pytest.raises(ImportError, match=f"^{re.escape(line)}'peft-tinylora\\[recipes\\]', .*"):
        check_libraries_of_recipes()


@pytest.mark.parametrize("recipe", ["grpo.py", "sft.py", "score.py", "sweep.py", "figures.py"])
def test_recipes_look_before_they_import(recipe: str) -> None:
    before, _, after = (ROOT / "trl_recipes" / recipe).read_text().partition("\ncheck_libraries_of_recipes()")
    theirs = re.compile(
        r"^(import|from) (accelerate|datasets|matplotlib|openai|pandas|torch|transformers|trl)\b", re.M
    )
    assert theirs.search(after) and not theirs.search(before)


@pytest.mark.skipif(ENVIRONMENT != "oldest", reason="`make test-versions VERSIONS=oldest` runs it")
def test_the_suite_passed_with_oldest(record_property) -> None:
    for name, version in all_lower_bounds().items():
        found = Version(importlib.metadata.version(name))
        assert Version(found.public) == Version(version), f"{name} {found}"  # whatever the build
    record_property("versions tested", len(TESTED))


@pytest.mark.skipif(ENVIRONMENT != "newest", reason="`make test-versions VERSIONS=newest` runs it")
def test_the_suite_passed_with_newest(record_property) -> None:
    pip = [sys.executable, "-m", "pip"]
    # Of an index that does not answer, nothing would be outdated.
    subprocess.run([*pip, "index", "versions", "trl"], check=True)
    listed = subprocess.run(
        [*pip, "list", "--outdated", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    newest = {canonicalize_name(row["name"]): row["latest_version"] for row in json.loads(listed.stdout)}
    outdated = {canonicalize_name(name) for name in all_lower_bounds()} & set(newest)
    held_back = {name for name in outdated if is_forbidden(name, newest[name])}
    assert not outdated - held_back, {name: newest[name] for name in outdated - held_back}
    record_property("versions tested", len(TESTED - held_back))


def is_forbidden(name: str, version: str) -> bool:
    """Whether some installed library asks for an older version than this one."""
    lines = [line for library in importlib.metadata.distributions() for line in library.requires or []]
    requirements = [Requirement(line) for line in lines if canonicalize_name(Requirement(line).name) == name]
    in_force = [r.specifier for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return any(not specifier.contains(version, prereleases=True) for specifier in in_force)


@pytest.mark.skipif(ENVIRONMENT != "main", reason="`make test-versions VERSIONS=main` runs it")
def test_the_suite_passed_with_main(record_property) -> None:
    for name in MAIN_BRANCHES:
        origin = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "{}")
        assert origin.get("url") == f"https://github.com/huggingface/{name}" and origin["vcs_info"]["commit_id"]
    record_property("versions tested", len(MAIN_BRANCHES))
