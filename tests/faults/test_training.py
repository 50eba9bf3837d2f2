"""Recipes that something ends in the middle, and that go on: with the same numbers to the bit, from whole checkpoints."""

import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState
from faults.injecting import Ended, Fault, Points, SmallDisk, ended, small_disk
from recipes.killed_runs import torn_in
from recipes.runs import ROOT
from support import free_port

from trl_recipes import grpo, sft  # noqa: F401 - once, and not in each fork
from trl_recipes.checkpoints import checkpoints_in, complaint
from trl_recipes.ending import STOPPED


pytestmark = pytest.mark.recipe

PLACES = ("file", "half", "backward", "optimizer", "generate", "time")
KINDS = {
    "kill": PLACES,
    "term": ("backward", "optimizer", "generate", "file", "time"),
    "memory": ("backward", "generate"),
    "readonly": ("file",),
}
STEPS = 4


class Runs:
    """Runs of the recipes in folders of one name each, beside a run of each recipe that was left alone."""

    def __init__(self, base: Path, files: tuple[Path, Path], root: Path) -> None:
        self.base, self.files, self.root = base, files, root
        self.whole: dict[str, Ended] = {}

    def folder(self, name: str) -> Path:
        return self.root / name / "run"

    def go(self, recipe: str, name: str, fault: Fault | None = None, processes: int = 1, **options: object) -> Ended:
        """Starts a recipe, or goes on with it; a fault befalls the last of several processes, and the first one's end is told."""
        own = {"steps_per_generation": 2, "num_iterations": 2} if recipe == "grpo" else {"completion_column": "answer"}
        given = {
            **{"config": f"trl_recipes/configs/embedded_{recipe}.yaml", "model_name_or_path": self.base},
            **{"dataset_name": self.files[0], "eval_dataset_name": self.files[1], "max_eval_problems": 4, "seed": 3},
            **{"max_completion_length": 6},
            **{"output_dir": self.folder(name), "per_device_train_batch_size": 8, "learning_rate": 0.05},
            **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
            **{"overwrite_output_dir": "false", "resume_from_checkpoint": "true"},
        } | own
        line = [part for option, value in (given | options).items() for part in (f"--{option}", str(value))]
        port = free_port()

        def work(rank: int) -> None:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            PartialState._reset_state()  # of other tests in this process
            AcceleratorState._reset_state()
            os.chdir(ROOT)
            sys.argv = [f"trl_recipes/{recipe}.py", *line]
            runpy.run_path(sys.argv[0], run_name="__main__")

        def one(rank: int) -> Ended:
            log = self.root / (f"{name}.log" if rank == 0 else f"{name}-{rank}.log")
            return ended(partial(work, rank), self.folder(name), log, fault if rank == processes - 1 else None)

        if processes == 1:
            return one(0)
        with ThreadPoolExecutor(processes) as pool:
            first, *others = pool.map(one, range(processes))
        assert all(other.status == first.status for other in others), [other.log for other in others]
        return first

    def left_alone(self, recipe: str) -> Ended:
        if recipe not in self.whole:
            self.whole[recipe] = self.go(recipe, f"whole-{recipe}")
            assert self.whole[recipe].status == 0, self.whole[recipe].log
        return self.whole[recipe]

    def left(self, name: str) -> dict[str, object]:
        """What a finished run left, but for times and its own name."""
        run = self.folder(name)
        [curve] = run.glob("*_curve.csv")
        last = checkpoints_in(run)[-1]
        return {
            "files": sorted(path.name for path in run.iterdir()),
            "v": (run / "adapter_model.safetensors").read_bytes(),
            "curve": curve.read_text(),
            "last checkpoint": (last.name, (last / "optimizer.pt").read_bytes()),
        }

    def survived(self, name: str, fault: object, broken: Ended) -> None:
        """A broken run has left nothing that is torn, and has said what there is to say."""
        assert not torn_in(self.folder(name)), fault
        assert all(complaint(path) is None for path in checkpoints_in(self.folder(name))), fault
        kind = fault.kind if isinstance(fault, Fault) else "full"
        if kind == "kill":
            assert broken.status == -9, (fault, broken.log)
        elif kind == "term":
            assert broken.status in (-15, STOPPED), (fault, broken.log)
            if broken.status == STOPPED:
                step = checkpoints_in(self.folder(name))[-1].name.rpartition("-")[2]
                assert broken.error.startswith(f"stopped by SIGTERM after step {step} of {STEPS}, which is saved"), (
                    fault
                )
        else:
            assert broken.status == 1, (fault, broken.log)
            wanted = {
                "memory": "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): lower "
                "per_device_train_batch_size=8 and raise gradient_accumulation_steps=1",
                "readonly": "is read-only: make it writable",
                "full": "error: no space left on the disk of ",
            }
            assert wanted[kind] in broken.error, (fault, broken.error)
            assert str(self.folder(name).parent) in broken.error or kind == "memory", (fault, broken.error)
            whole = checkpoints_in(self.folder(name))
            assert (f"resume_from_checkpoint='{whole[-1]}'" if whole else "start again") in broken.error, fault

    def is_finished(self, name: str) -> bool:
        """Whether its last file is there: what comes then is printed only."""
        return any(self.folder(name).glob("[!.]*_curve.png"))

    def as_left_alone(self, recipe: str, name: str, fault: object) -> None:
        """A run that was broken, and goes on to its end, leaves what the one does that was left alone."""
        if not self.is_finished(name):
            resumed = self.go(recipe, name)
            assert resumed.status == 0, (fault, resumed.log)
        assert self.left(name) == self.left(f"whole-{recipe}"), fault


@pytest.fixture(scope="module")
def runs(tiny_model_dir, problem_files, tmp_path_factory) -> Runs:
    return Runs(tiny_model_dir, problem_files, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def disk(runs) -> Iterator[SmallDisk]:
    """A small disk for the run of this name."""
    with small_disk(runs.root / "full") as disk:
        yield disk


def filled(runs: Runs, recipe: str, disk: SmallDisk, share: float) -> bool:
    """Whether a run fills its disk, which has room for a share of what a whole one takes; then it goes on."""
    runs.left_alone(recipe)
    whole = runs.folder(f"whole-{recipe}")
    shutil.rmtree(runs.folder("full"), ignore_errors=True)
    pages = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    disk.leave(int(share * pages) * 4096)
    broken = runs.go(recipe, "full")
    disk.remount("size=1g")
    fault = f"full at {share} of {pages} pages"
    if broken.status:
        runs.survived("full", fault, broken)
    runs.as_left_alone(recipe, "full", fault)
    return broken.status != 0


def test_a_run_that_is_ended_in_its_middle_says_so_and_goes_on(runs, record_property) -> None:
    faults = [
        Fault("term", "backward", 2),
        Fault("memory", "backward", 3),
        Fault("readonly", "file", 30),
        Fault("kill", "rename", 7),  # the last checkpoint is in its place, and the oldest not gone yet
    ]
    for index, fault in enumerate(faults):
        runs.left_alone("sft")
        broken = runs.go("sft", str(index), fault)
        runs.survived(str(index), fault, broken)
        assert checkpoints_in(runs.folder(str(index))), fault
        runs.as_left_alone("sft", str(index), fault)
    record_property("faults survived", len(faults))


def test_a_full_disk_is_named_and_leaves_the_checkpoints_whole(runs, disk, record_property) -> None:
    assert filled(runs, "sft", disk, 0.6)
    record_property("faults survived", 1)


def test_a_disk_that_is_read_only_from_the_start_is_named(runs, disk, record_property) -> None:
    disk.remount("ro")
    broken = runs.go("sft", "full")
    disk.remount("rw")
    runs.survived("full", Fault("readonly", "file", 0), broken)
    record_property("faults survived", 1)


def test_after_want_of_memory_a_run_goes_on_with_smaller_batches(runs, record_property) -> None:
    smaller = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for recipe in ("grpo", "sft"):
        broken = runs.go(recipe, f"smaller-{recipe}", Fault("memory", "backward", 2))
        assert broken.status == 1, broken.log
        named = broken.error.rpartition("resume_from_checkpoint=")[2].strip(".'")
        more = smaller | ({"steps_per_generation": 4} if recipe == "grpo" else {})
        resumed = runs.go(recipe, f"smaller-{recipe}", resume_from_checkpoint=named, **more)
        assert resumed.status == 0, resumed.log
        assert [path.name for path in checkpoints_in(runs.folder(f"smaller-{recipe}"))][-1] == f"checkpoint-{STEPS}"
    record_property("faults survived", 2)


@pytest.mark.slow  # four runs of two processes
def test_of_two_processes_one_is_asked_to_stop_and_both_stop_after_the_same_step(runs, record_property) -> None:
    for recipe, when in (("sft", 2), ("grpo", 3)):
        assert runs.go(recipe, f"two-{recipe}", processes=2).status == 0
        fault = Fault("term", "backward", when)
        broken = runs.go(recipe, "asked", fault, processes=2)
        assert broken.status == STOPPED, broken.log
        runs.survived("asked", fault, broken)
        resumed = runs.go(recipe, "asked", processes=2)
        assert resumed.status == 0, resumed.log
        assert runs.left("asked") == runs.left(f"two-{recipe}")
        shutil.rmtree(runs.folder("asked"))
    record_property("faults survived", 2)


@pytest.mark.slow  # a hundred and fifty runs
def test_runs_that_are_broken_at_random_points_again_and_again(runs, points: Points, record_property) -> None:
    survived = 0
    for chain in range(50):
        recipe, name = points.choice(("grpo", "sft")), f"chain-{chain}"
        whole, faults = runs.left_alone(recipe), []
        for _ in range(3):
            faults.append(points.fault(KINDS, whole))
            broken = runs.go(recipe, name, faults[-1])
            if broken.status == 0:  # it came to its end before
                break
            runs.survived(name, faults[-1], broken)
            survived += 1
            if runs.is_finished(name):
                break
        runs.as_left_alone(recipe, name, faults)
        shutil.rmtree(runs.root / name)
    record_property("faults survived", survived)


@pytest.mark.slow
def test_disks_that_are_full_at_random_points(runs, disk, points: Points, record_property) -> None:
    shares = [points.random() * 1.2 for _ in range(20)]
    broken = [filled(runs, points.choice(("grpo", "sft")), disk, share) for share in shares]
    assert sum(broken) > 10
    record_property("faults survived", sum(broken))
