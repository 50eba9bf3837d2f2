"""Fixtures of other folders' tests that these build on, random points, and commands in forks of a user's machine."""

import json
from pathlib import Path

import pytest
from faults.injecting import Ended, Fault, Points
from hub.conftest import adapter, folder, hub, other, running, trainer, user  # noqa: F401
from hub.machine import Machine
from recipes.conftest import problem_files, tiny_model_dir  # noqa: F401


@pytest.fixture
def points() -> Points:
    """Where faults befall the work."""
    return Points()


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
