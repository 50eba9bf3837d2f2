"""The oldest versions of other libraries that this package works with, and what is said where one is older.

Looked at before anything else here imports them: an old library shows itself as an AttributeError in some file of PEFT
otherwise. These are pyproject.toml's bounds once more (tests/test_versions.py compares them), because a copy of this
folder has no metadata of pip's, and an editable installation has that of the day it was made.
"""

import importlib.metadata
import importlib.util
from collections.abc import Mapping

from packaging.specifiers import SpecifierSet


LIBRARIES = {
    "peft": ">=0.21.0",
    "transformers": ">=5.7.0",
    "torch": ">=2.6",
    "safetensors": ">=0.5.0",
    "huggingface_hub": ">=1.31.0",
}
LIBRARIES_OF_RECIPES = {
    "trl": ">=1.16.0",
    "accelerate": ">=1.10.1",
    "datasets": ">=4.7.0",
    "math-verify": ">=0.8.0",
    "matplotlib": ">=3.10.8",
    "pandas": ">=2.2.2",
    "scipy": ">=1.13",
    "pydantic": ">=2.12",
    "openai": ">=2.25.0",
}


def check_libraries() -> None:
    """Refuse to go on with libraries that are missing or too old for the plugin.

    Raises:
        ImportError: names each library, the version found, the one needed and the command that installs it.
    """
    if wrong := shortcomings(LIBRARIES):
        newer = " ".join(f"'{name}{LIBRARIES[name]}'" for name in wrong)
        raise ImportError(f"peft_tinylora needs {', '.join(wrong.values())}. Run: pip install {newer}")


def check_libraries_of_recipes() -> None:
    """Refuse to go on with libraries that are missing or too old for trl_recipes.

    Raises:
        ImportError: names each library, the version found, the one needed and the command that installs it.
    """
    if wrong := shortcomings(LIBRARIES_OF_RECIPES):
        raise ImportError(
            f"trl_recipes needs {', '.join(wrong.values())}. Run: pip install 'peft-tinylora[recipes]', or in a clone "
            "pip install -e '.[recipes]'"
        )


def shortcomings(needed: Mapping[str, str]) -> dict[str, str]:
    """The libraries that are missing or too old, by name, each with what is needed and what was found."""
    found = {name: _found(name, bound) for name, bound in needed.items()}
    return {name: f"{name}{needed[name]} ({what})" for name, what in found.items() if what is not None}


def _found(name: str, bound: str) -> str | None:
    """What was found in place of a library that will do; `None` if it will do, as pre-releases above the bound do."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # A source tree on PYTHONPATH can be imported and says no version.
        return None if importlib.util.find_spec(name.replace("-", "_")) else "not installed"
    return None if version and SpecifierSet(bound).contains(version, prereleases=True) else f"found {version}"
