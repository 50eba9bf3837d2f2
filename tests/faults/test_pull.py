"""Pulls of which the client, the Hub or the disk breaks off: the folder is there whole or not at all, and nothing piles up."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.conftest import on
from faults.injecting import Ended, Fault, Points, SmallDisk, small_disk
from hub.loopback import Hub
from hub.machine import Machine, contents

from peft_tinylora import trouble


KINDS = {
    "kill": ("file", "rename", "asked", "answered", "time"),
    "term": ("file", "rename", "asked", "answered", "time"),
    "readonly": ("file", "rename"),
    "memory": ("asked",),
}
ROUTES = ("/resolve/", "GET /api/models/user/x", "adapter_model.safetensors", "adapter_config.json", "README.md")
OF_THE_HUB = (500, 503, "drop", "drop after", "cut", "short")


class Pulls:
    """Pulls of `user/x` into a folder, by a machine whose caches are emptied each time."""

    def __init__(self, hub: Hub, user: Machine, home: Path, root: Path) -> None:
        self.hub, self.user, self.home, self.root = hub, user, home, root
        self.target = root / "disk" / "pulled"
        self.new: dict[str, bytes] = {}

    def go(self, fault: Fault | None = None) -> Ended:
        return on(self.user, ["pull", "user/x", self.target], self.target.parent, self.root / "log.txt", fault)

    def begin(self) -> None:
        """A machine that has nothing of the repository."""
        self.hub.faults = {}
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.rmtree(self.home / "hub", ignore_errors=True)

    def whole(self) -> Ended:
        """A pull that nothing befalls."""
        self.hub.faults = {}
        pulled = self.go()
        assert pulled.status == 0, pulled.log
        assert contents(self.target) == self.new
        return pulled

    def broken(self, kind: str, fault: Fault | None = None) -> bool:
        """Pulls with a fault; whether the pull failed, in which case it leaves no folder and says why."""
        pulled = self.go(fault)
        if pulled.status == 0:
            assert contents(self.target) == self.new, fault
            return False
        if kind in ("kill", "term"):
            assert pulled.status == (-9 if kind == "kill" else -15), pulled.log
            assert not self.target.exists() or contents(self.target) == self.new, fault
            return True
        wanted = {
            "memory": "error: out of memory",
            "readonly": f"error: the disk of {self.target.parent} is read-only: make it writable",
            "full": f"error: no space left on the disk of {self.target.parent}",
            "cache": f"no space left on the disk of {self.home}",
            "hub": "error: user/x",
        }
        assert pulled.status == 1 and wanted[kind] in pulled.error, pulled.log
        assert not self.target.exists(), fault
        return True

    def left(self) -> list[Path]:
        """What is beside the folder."""
        return [path for path in self.target.parent.iterdir() if path != self.target]


@pytest.fixture
def pulls(hub, trainer, user, adapter, folder, tmp_path) -> Iterator[Pulls]:
    pulls = Pulls(hub, user, folder / "user", tmp_path)
    pulls.target.parent.mkdir()
    assert trainer.command("push", adapter, "user/x").status == 0
    pulls.new = dict(hub.repositories["user/x"])
    pulls.begin()
    yield pulls
    pulls.begin()


@pytest.fixture
def disk(pulls) -> Iterator[SmallDisk]:
    """The small disk that the folder is on."""
    pulls.target.parent.rmdir()
    with small_disk(pulls.target.parent) as disk:
        yield disk


def test_a_pull_that_is_killed_leaves_no_folder_and_what_it_left_is_swept_away(pulls, record_property) -> None:
    for fault in (Fault("kill", "file", 4), Fault("term", "asked", 3), Fault("kill", "rename", 1)):
        assert pulls.broken(fault.kind, fault) and not pulls.target.exists()
    assert len(pulls.left()) == 3
    for left in pulls.left():
        for path in (*left.rglob("*"), left):
            os.utime(path, (0, time.time() - 2 * trouble.STALE_SECONDS))
    mine = pulls.target.with_name(".pulled.bak")  # somebody's own, however old
    mine.mkdir()
    os.utime(mine, (0, 0))
    pulls.whole()
    assert pulls.left() == [mine]
    record_property("faults survived", 3)


def test_a_pulled_folder_has_the_permissions_of_any_other(pulls) -> None:
    pulls.whole()
    other = pulls.target.with_name("other")
    other.mkdir()
    assert pulls.target.stat().st_mode == other.stat().st_mode


def test_into_a_folder_that_was_there_the_weights_come_last(pulls, record_property) -> None:
    pulls.target.mkdir()
    (pulls.target / "notes.txt").write_text("mine")
    whole = pulls.go()
    assert whole.status == 0 and contents(pulls.target) == pulls.new | {"notes.txt": b"mine"}
    for at in range(1, whole.counts["rename"] + 1):
        shutil.rmtree(pulls.target)
        pulls.target.mkdir()
        assert pulls.go(Fault("kill", "rename", at)).status == -9
        assert not (pulls.target / "adapter_model.safetensors").exists(), at
    again = pulls.go()
    assert again.status == 1 and "name another folder, or remove it first" in again.error
    record_property("faults survived", whole.counts["rename"])


def test_a_full_and_a_read_only_disk_are_named(pulls, disk, record_property) -> None:
    disk.leave(4096)
    assert pulls.broken("full") and pulls.left() == []
    disk.remount("ro")
    assert pulls.broken("readonly")
    disk.remount("rw,size=1g")
    pulls.whole()
    record_property("faults survived", 2)


def test_a_full_disk_of_the_hubs_cache_is_named(pulls, record_property) -> None:
    with small_disk(pulls.home / "hub") as disk:
        disk.leave(4096)
        assert pulls.broken("cache") and pulls.left() == []
        disk.remount("size=1g")
        pulls.whole()
    record_property("faults survived", 1)


@pytest.mark.slow  # two hundred pulls
def test_pulls_that_are_broken_at_random_points(pulls, disk, points: Points, record_property) -> None:
    whole, survived = pulls.whole(), 0
    for turn in range(60):
        pulls.begin()
        if turn % 3 == 0:
            for _ in range(points.randint(1, 4)):
                pulls.hub.faults.setdefault(points.choice(ROUTES), []).append(points.choice(OF_THE_HUB))
            laid = sum(map(len, pulls.hub.faults.values()))
            pulls.broken("hub")
            survived += laid - sum(map(len, pulls.hub.faults.values()))
        elif turn % 3 == 1:
            disk.leave(points.randint(0, 10) * 4096)
            survived += pulls.broken("full")
            disk.remount("size=1g")
        else:
            for _ in range(3):
                fault = points.fault(KINDS, whole)
                survived += pulls.broken(fault.kind, fault)
                shutil.rmtree(pulls.target, ignore_errors=True)
        shutil.rmtree(pulls.target, ignore_errors=True)
        # Of a file that was half downloaded the Hub's client keeps one half at most.
        assert len(list(pulls.home.glob("hub/**/*.incomplete"))) <= len(pulls.new)
        pulls.whole()
    for left in pulls.left():
        for path in (*left.rglob("*"), left):
            os.utime(path, (0, time.time() - 2 * trouble.STALE_SECONDS))
    pulls.begin()
    pulls.whole()
    assert pulls.left() == []
    record_property("faults survived", survived)
