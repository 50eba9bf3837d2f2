"""One run of a sweep: a recipe's process, its result, and the benchmarks that it is scored on.

In the run's folder, beside what the recipe leaves: run.yaml, the config that repeats it; log.txt; result.json, the last line
that the recipe prints; and BENCHMARK.json for each benchmark. A run is done when all of them are there.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import yaml
from trl import ModelConfig

from trl_recipes.arguments import LORA_OPTIONS, RecipeError
from trl_recipes.sweep_file import CHOOSE, Run, Sweep


CONFIG, LOG, RESULT, LOCK = "run.yaml", "log.txt", "result.json", ".lock"


def is_done(sweep: Sweep, run: Run, where: Path) -> bool:
    """Says whether a run is finished; raises [`RecipeError`] where its folder holds one of another config."""
    path = where / CONFIG
    if not path.exists():
        return False
    there = yaml.safe_load(path.read_text(encoding="utf-8"))
    there.pop("output_dir")
    differing = sorted(key for key in there.keys() | run.options.keys() if there.get(key) != run.options.get(key))
    if differing:
        key = differing[0]
        raise RecipeError(
            f"{where} holds a run with {key}: {there.get(key)!r}, and the sweep file now says {run.options.get(key)!r}: "
            "remove that folder, or rename the sweep."
        )
    return (where / RESULT).exists() and not missing_benchmarks(sweep, run, where)


def missing_benchmarks(sweep: Sweep, run: Run, where: Path) -> list[str]:
    """Returns the benchmarks that a run has not been scored on yet."""
    return [] if run.stage == CHOOSE else [name for name in sweep.evaluate if not (where / f"{name}.json").exists()]


def read_result(where: Path, name: str = RESULT) -> dict | None:
    """Reads a run's result, or that of a benchmark; `None` where there is none."""
    try:
        return json.loads((where / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


class Failure(Exception):
    """Why a run is not done, in one line."""


class Processes:
    """
    The child processes that run now, so that none is left behind; a context in which SIGTERM raises SystemExit.

    Args:
        root (`Path`): the folder that they run in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def __enter__(self) -> "Processes":
        self.before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def run(self, command: list[str], log: Path, lock: int) -> dict:
        """
        Runs a command to its end, output to `log`.

        Returns:
            `dict`: the JSON of its last line.

        Raises:
            Failure: if it was not started, failed, or its last line is something else.
        """
        if self.stopped:
            raise Failure("not started")
        with log.open("a", encoding="utf-8") as output:
            # The lock goes with the child: it is held as long as that lives, also where this process is killed. A session
            # of its own, so that what `accelerate launch` started ends with it.
            child = subprocess.Popen(
                command,
                cwd=self.root,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,
            )
        self.running.add(child)
        try:
            code = child.wait()
        finally:
            self.running.discard(child)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no output"
        if code:
            raise Failure(f"exit code {code}: {last[:300]} ({log})")
        try:
            return json.loads(last)
        except json.JSONDecodeError:
            raise Failure(f"its last line is no result: {last[:300]} ({log})") from None

    def stop(self) -> None:
        """Ends what runs, and lets nothing more start."""
        self.stopped = True
        for child in list(self.running):
            os.killpg(child.pid, signal.SIGTERM)


def run_one(sweep: Sweep, run: Run, where: Path, accelerate_config: str | None, processes: Processes) -> None:
    """
    Runs what is missing of one run, in its folder.

    Raises:
        Failure: if it fails, or runs elsewhere at this moment.
    """
    where.mkdir(parents=True, exist_ok=True)
    with (where / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure("runs elsewhere at this moment") from None
        if is_done(sweep, run, where):
            return
        if not (where / RESULT).exists():
            options = dict(run.options) | {"output_dir": str(where)}
            write_atomically(where / CONFIG, yaml.safe_dump(options, sort_keys=False))
            command = [*launcher(accelerate_config), *recipe_command(sweep, where)]
            result = processes.run(command, where / LOG, lock.fileno())
            write_atomically(where / RESULT, json.dumps(result))
        for name in missing_benchmarks(sweep, run, where):
            command = [*launcher(None), *score_command(run.options, where, name)]
            result = processes.run(command, where / f"{name}.txt", lock.fileno())
            write_atomically(where / f"{name}.json", json.dumps(result))


def launcher(accelerate_config: str | None) -> list[str]:
    """Returns what starts a script: Python, or `accelerate launch` with a file."""
    if accelerate_config is None:
        return [sys.executable, "-W", "ignore"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate_config]


def recipe_command(sweep: Sweep, where: Path) -> list[str]:
    """Returns the recipe and its options; a run that was killed goes on from its last checkpoint."""
    # An adapter without a result is that of a killed run.
    command = [f"trl_recipes/{sweep.recipe}.py", "--config", str((where / CONFIG).resolve())]
    command += ["--overwrite_output_dir", "true"]
    return command + (["--resume_from_checkpoint", "true"] if any(where.glob("checkpoint-*")) else [])


def score_command(options: Mapping[str, object], where: Path, benchmark: str) -> list[str]:
    """Returns score.py and its options, for what a run left in its folder."""
    of_base = {f.name for f in fields(ModelConfig)} - {*LORA_OPTIONS, "use_peft"} | {"use_cpu", "trust_remote_code"}
    given = {name: value for name, value in options.items() if name in of_base and value is not None}
    given |= {"benchmark": benchmark, "max_completion_length": options.get("max_completion_length")}
    given |= {"batch_size": options.get("score_batch_size"), "output_dir": where / benchmark}
    given |= {"model_name_or_path": where} if options.get("method") == "full" else {"adapter": where}
    pairs = ((f"--{name}", str(value)) for name, value in given.items() if value is not None)
    return ["trl_recipes/score.py", *(part for pair in pairs for part in pair)]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
