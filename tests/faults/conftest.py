"""Fixtures of other folders' tests that these build on, random points, and commands in forks of a user's machine."""

import json
from pathlib import Path

import pytest
from faults.injecting import Ended, Fault, Points
from hub.conftest import folder, hub, running, trainer, user  # noqa: F401
from hub.machine import EMBEDDED, Machine
from peft import get_peft_model
from recipes.conftest import problem_files, tiny_model_dir  # noqa: F401
from support import fill_vectors
from transformers import AutoModelForCausalLM

from peft_tinylora import TinyLoraConfig
from peft_tinylora.card import Facts, write_card
from peft_tinylora.describe import describe


@pytest.fixture
def points() -> Points:
    """Where faults befall the work."""
    return Points()


def saved(path: Path, seed: int) -> Path:
    """An adapter of the embedded model as a recipe leaves it."""
    config = TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(EMBEDDED), config)
    fill_vectors(model, scale=0.3, seed=seed)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(path, save_embedding_layers=False)  # PEFT would ask the Hub for the base's vocabulary
    write_card(path, describe(path), str(path), Facts())
    (path / "recipe.yaml").write_text(f"seed: {seed}\n")
    (path / "reward_curve.csv").write_text("step,reward\n1,0.5\n")
    (path / "reward_curve.png").write_bytes(b"\x89PNG")
    return path


@pytest.fixture(scope="module")
def adapter(folder) -> Path:  # noqa: F811
    return saved(folder / "trained", seed=0)


@pytest.fixture(scope="module")
def other(folder) -> Path:  # noqa: F811
    return saved(folder / "other", seed=1)


def on(machine: Machine, arguments: list[object], where: Path, log: Path, fault: Fault | None = None) -> Ended:
    """Runs `peft-tinylora ARGUMENTS` in a fork of a machine's process; see [`faults.injecting.ended`].

    Args:
        machine (`Machine`): whose environment and caches it has.
        arguments (`list`): of the command.
        where (`Path`): the folder in which files are counted.
        log (`Path`): where its output goes.
        fault ([`Fault`], *optional*): what befalls it.
    """
    given = (str(where), str(log), None if fault is None else tuple(fault), [str(each) for each in arguments])
    printed = machine.script(
        "import json\nfrom pathlib import Path\nfrom faults.injecting import Fault, command, ended\n"
        f"where, log, fault, arguments = {given!r}\n"
        "fault = None if fault is None else Fault(*fault)\n"
        "print(json.dumps(ended(command(arguments), Path(where), Path(log), fault)))"
    )
    return Ended(*json.loads(printed))
