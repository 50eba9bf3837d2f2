"""Pushes of which the client or the Hub breaks off: the repository has the old adapter or the new one, and all of it."""

import itertools
from pathlib import Path

import pytest
from faults.conftest import on
from faults.injecting import Ended, Fault, Points
from hub.loopback import Hub
from hub.machine import ADAPTER, REPORT, Machine, contents


KINDS = {
    "kill": ("asked", "answered", "time"),
    "term": ("asked", "answered", "time"),
    "memory": ("asked",),
}
# Part of a request -> what the Hub may do in its place, once or more often.
ROUTES = ("/api/repos/create", "/preupload/", "/objects/batch", "PUT /", "/verify", "/commit/", "/paths-info/", "GET /api/models/user/x")  # fmt: skip
OF_THE_HUB = (500, 502, 503, 504, (429, {"Retry-After": "1"}), "drop", "drop after")


class Pushes:
    """Pushes of an adapter to `user/x`, which holds nothing, or another adapter."""

    def __init__(self, hub: Hub, trainer: Machine, adapter: Path, log: Path) -> None:
        self.hub, self.trainer, self.adapter, self.log = hub, trainer, adapter, log
        self.before = contents(adapter)

    def go(self, fault: Fault | None = None) -> Ended:
        return on(self.trainer, ["push", self.adapter, "user/x"], self.adapter, self.log, fault)

    def files(self) -> dict[str, bytes]:
        return dict(self.hub.repositories.get("user/x", {}))

    def broken(self, fault: Fault | None, old: dict[str, bytes], new: dict[str, bytes]) -> bool:
        """Pushes with a fault, or with those that were laid for the Hub; whether the push failed."""
        pushed = self.go(fault)
        assert self.files() in (old, new), (fault, self.files().keys())
        assert contents(self.adapter) == self.before, fault
        if pushed.status == 0:
            assert self.files() == new
        elif fault is None:
            assert pushed.status == 1 and pushed.error.startswith("error: user/x: "), pushed.log
            assert "to push it again: peft-tinylora push" in pushed.error
        elif fault.kind == "memory":
            assert pushed.status == 1 and pushed.error.startswith("error: out of memory"), pushed.log
        else:
            assert pushed.status == (-9 if fault.kind == "kill" else -15), pushed.log
        return pushed.status != 0

    def whole(self) -> Ended:
        """A push that nothing befalls."""
        self.hub.faults = {}
        pushed = self.go()
        assert pushed.status == 0, pushed.log
        return pushed


@pytest.fixture
def pushes(hub, trainer, adapter, tmp_path) -> Pushes:
    return Pushes(hub, trainer, adapter, tmp_path / "log.txt")


def test_a_push_that_is_killed_leaves_the_old_adapter_or_the_new_one(pushes, hub, record_property) -> None:
    pushes.whole()
    new = pushes.files()
    assert new.keys() == ADAPTER | REPORT
    hub.repositories["user/x"].clear()
    whole = pushes.whole()  # the weights are there by now, and are not sent again
    points = (2, whole.counts["asked"] // 2, whole.counts["asked"])
    for at in points:
        hub.repositories["user/x"].clear()
        assert pushes.broken(Fault("kill", "asked", at), {}, new)
    pushes.whole()
    assert pushes.files() == new
    record_property("faults survived", len(points))


@pytest.mark.slow  # two hundred pushes
def test_pushes_that_are_broken_at_random_points(pushes, hub, trainer, other, points: Points, record_property):
    whole = pushes.whole()
    new = pushes.files()
    assert trainer.command("push", other, "user/y").status == 0
    another = dict(hub.repositories["user/y"])
    survived = 0
    for turn in range(60):
        old = points.choice(({}, another))
        hub.repositories.pop("user/x", None)
        if old:
            hub.create("user/x", False)
            hub.repositories["user/x"] = dict(old)
        if turn % 2:
            faults = itertools.chain.from_iterable(
                [(points.choice(ROUTES), points.choice(OF_THE_HUB))] * points.randint(1, 6) for _ in range(2)
            )
            hub.faults = {}
            for route, fault in faults:
                hub.faults.setdefault(route, []).append(fault)
            laid = sum(map(len, hub.faults.values()))
            pushes.broken(None, old, new)
            survived += laid - sum(map(len, hub.faults.values()))
        else:
            hub.faults, start = {}, old
            for _ in range(2):
                survived += pushes.broken(points.fault(KINDS, whole), start, new)
                start = pushes.files()
        pushes.whole()
        assert pushes.files() == new
    record_property("faults survived", survived)
