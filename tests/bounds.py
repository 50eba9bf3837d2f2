"""What pyproject.toml asks of other libraries, and pip constraints that hold each of them at its lower bound:

    python tests/bounds.py > oldest.txt && pip install -c oldest.txt -e '.[recipes,quantization,dev]'

Only the standard library is imported here, since this is read before anything is installed.
"""

import tomllib
from pathlib import Path


PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
EXTRAS = ("recipes", "quantization", "dev")


def lower_bounds(*extras: str) -> dict[str, str]:
    """Library -> the oldest version allowed, of what the plugin needs and, if extras are named, of those instead."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    needed = [line for extra in extras for line in project["optional-dependencies"][extra]] or project["dependencies"]
    pairs = [line.partition(">=") for line in needed]
    return {name: version.partition(",")[0] for name, _, version in pairs if version}


def all_lower_bounds() -> dict[str, str]:
    """Those of everything that is installed for the tests."""
    return lower_bounds() | lower_bounds(*EXTRAS)


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in all_lower_bounds().items()))
