"""`peft-tinylora basis build`, broken at any point: the cache's file is there whole or not at all, and building goes on."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults.injecting import Ended, Fault, Points, SmallDisk, command, ended, small_disk
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_tinylora import TinyLoraConfig, basis_cache, build, trouble


KINDS = {
    "kill": ("file", "rename", "module", "time"),
    "term": ("file", "rename", "module", "time"),
    "readonly": ("file", "rename"),
    "memory": ("module",),
}
MODULES = 28


class Bases:
    """A cache, which a base model's basis is built into by forks of this process, and kept after every module."""

    def __init__(self, base: Path, root: Path) -> None:
        self.base, self.root, self.cache = base, root, root / "disk" / "cache"

    def build(self, fault: Fault | None = None) -> Ended:
        """Builds the basis; a place "module" comes before each that is computed."""
        places = [(build, "compute_basis", "module", "before")]
        work = command(["basis", "build", self.base])
        return ended(work, self.cache, self.root / "log.txt", fault, places)

    def kept(self) -> int:
        """How many modules are kept, in a file that is whole."""
        found = list(self.cache.glob("*/*.safetensors"))
        assert len(found) < 2 and all(basis_cache.is_sound(file) for file in found)
        return len(basis_cache.read(found[0])) if found else 0

    def broken(self, fault: Fault) -> bool:
        """Builds with a fault; whether it befell, in which case all that was kept is kept still, and the end is clear."""
        before = self.kept()
        self.survived(fault.kind, built := self.build(fault))
        assert self.kept() >= before, fault
        return built.status != 0

    def survived(self, kind: str, built: Ended) -> None:
        if built.status == 0:
            assert self.kept() == MODULES, built.log
        elif kind in ("kill", "term"):
            assert built.status == (-9 if kind == "kill" else -15), built.log
        elif kind == "memory":
            assert built.error.startswith("error: out of memory (CUDA out of memory. Tried"), built.error
        else:
            assert built.error.startswith(f"error: the basis was not kept in {self.cache}"), built.error
            assert "PEFT_TINYLORA_CACHE" in built.error, built.error

    def clear(self) -> None:
        for file in self.cache.glob("*/*.safetensors"):
            file.unlink()


@pytest.fixture
def bases(base_folder, tmp_path, monkeypatch) -> Bases:
    bases = Bases(base_folder, tmp_path)
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", str(bases.cache))
    monkeypatch.setattr(build, "SECONDS_BETWEEN_WRITES", 0.0)
    return bases


@pytest.fixture
def disk(bases) -> Iterator[SmallDisk]:
    """The small disk that the cache is on."""
    with small_disk(bases.root / "disk") as disk:
        yield disk


def test_a_build_that_is_killed_goes_on_after_the_modules_that_are_kept(bases, record_property) -> None:
    assert bases.broken(Fault("kill", "module", 11))
    assert bases.kept() == 10
    assert bases.broken(Fault("memory", "module", 6))
    assert bases.kept() == 15
    assert bases.broken(Fault("readonly", "rename", 1))  # when there is a file to remove already
    last = bases.build()
    assert last.status == 0 and last.counts["module"] == MODULES - 15
    assert "have other weights" not in last.log
    record_property("faults survived", 3)


def test_what_killed_builds_left_is_swept_away_once_it_is_old(bases, record_property) -> None:
    assert bases.broken(Fault("kill", "rename", 3))
    [left] = bases.cache.glob("*/.writing-*")
    os.utime(left, (0, time.time() - 2 * trouble.STALE_SECONDS))
    assert bases.build().status == 0 and not left.exists()
    record_property("faults survived", 1)


def test_a_full_and_a_read_only_disk_are_named_and_cost_training_a_warning_only(
    bases, disk, record_property, caplog
) -> None:
    disk.leave(4096)
    bases.survived("full", full := bases.build())
    assert full.status == 1 and f"no space left on the disk of {bases.cache}" in full.log
    disk.remount("ro")
    bases.survived("readonly", readonly := bases.build())
    assert readonly.status == 1 and "is read-only: make it writable" in readonly.log
    base = LlamaForCausalLM.from_pretrained(bases.base)
    get_peft_model(base, TinyLoraConfig(r=2, u=1, tie="tiled", n_tie=4, target_modules="all-linear"))
    assert "the basis could not be kept in" in caplog.text and "is read-only" in caplog.text
    disk.remount("rw,size=1g")
    assert bases.build().status == 0
    record_property("faults survived", 3)


@pytest.mark.slow  # a hundred and fifty builds
def test_builds_that_are_broken_at_random_points(bases, disk, points: Points, record_property) -> None:
    whole = bases.build()
    assert whole.status == 0 and whole.counts["module"] == MODULES
    [file] = bases.cache.glob("*/*.safetensors")
    content, survived = basis_cache.read(file), 0
    for _ in range(40):
        bases.clear()
        for _ in range(3):
            survived += bases.broken(points.fault(KINDS, whole))
        disk.leave(points.randint(0, 10) * 4096)
        built = bases.build()
        bases.survived("full", built)
        survived += built.status != 0
        disk.remount("size=1g")
        assert bases.build().status == 0
        for name, basis in basis_cache.read(file).items():  # not by its bytes: safetensors' metadata have any order
            assert torch.equal(basis.A, content[name].A) and torch.equal(basis.B, content[name].B), name
    left = list(bases.cache.glob("*/.writing-*"))
    assert len(left) <= survived
    for path in left:
        os.utime(path, (0, time.time() - 2 * trouble.STALE_SECONDS))
    bases.clear()
    assert bases.build().status == 0 and list(bases.cache.glob("*/*")) == [file]
    record_property("faults survived", survived)
