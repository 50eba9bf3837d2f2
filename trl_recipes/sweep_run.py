"""One run of a sweep: a recipe's process, its result, and the benchmarks that it is scored on.

In the run's folder, beside what the recipe leaves: run.yaml, the config that repeats it; log.txt; result.json, the last line
of JSON that the recipe prints; and BENCHMARK.json for each benchmark.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import yaml
from trl import ModelConfig

from trl_recipes.arguments import LORA_OPTIONS
from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.sweep_file import Run, Sweep
from trl_recipes.yaml_files import read_yaml


CONFIG, LOG, RESULT, LOCK = "run.yaml", "log.txt", "result.json", ".lock"


def read_result(run: Run, where: Path, name: str = RESULT) -> dict | None:
    """
    Reads a run's result, or that of a benchmark; `None` where there is none.

    Raises:
        RecipeError: if the folder holds a run of another config, or a file of it is damaged; names what differs.
    """
    path = where / CONFIG
    if not path.exists():
        return None
    there = read_yaml(path)
    if not isinstance(there, dict) or not all(isinstance(name, str) for name in there):
        raise RecipeError(f"{path} is no config of a run: remove the folder, and the run is made anew.")
    there.pop("output_dir", None)
    differing = sorted(key for key in there.keys() | run.options.keys() if there.get(key) != run.options.get(key))
    if differing:
        key = differing[0]
        raise RecipeError(
            f"{where} holds a run with {in_one_line(key)}: {shown(there.get(key))}, and the sweep file now says "
            f"{shown(run.options.get(key))}: "
            "remove that folder, or rename the sweep."
        )
    try:
        result = json.loads((where / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where / name} is no JSON ({in_one_line(error)}): remove it, and it is made anew."
        ) from error
    if not isinstance(result, dict):
        raise RecipeError(
            f"{where / name} holds {type(result).__name__} and no result: remove it, and it is made anew."
        )
    return result


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
        self.lock = threading.Lock()  # nothing starts while all are stopped

    def __enter__(self) -> "Processes":
        self.before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def run(self, command: list[str], log: Path, lock: int) -> dict:
        """
        Runs a command to its end, output to `log`.

        Returns:
            `dict`: the last line of JSON; others may follow, of a library that says something as it ends.

        Raises:
            Failure: if it was not started, failed, or printed no such line.
        """
        with log.open("a", encoding="utf-8") as output, self.lock:
            if self.stopped:
                raise Failure("not started")
            begin = output.tell()
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
        printed = log.read_bytes()[begin:].decode(errors="replace")
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        last = lines[-1] if lines else "no output"
        if code:
            raise Failure(f"exit code {code}: {last[:300]} ({log})")
        for line in reversed(lines):
            if line.startswith("{"):
                with suppress(json.JSONDecodeError):
                    return json.loads(line)
        raise Failure(f"it printed no result; its last line: {last[:300]} ({log})")

    def stop(self) -> None:
        """Ends what runs, and lets nothing more start."""
        with self.lock:
            self.stopped = True
            for child in list(self.running):
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(child.pid, signal.SIGTERM)


@contextmanager
def locked(where: Path) -> Iterator[int]:
    """Holds a run's folder, which is made; yields the lock's file descriptor. Raises [`Failure`] where another has it."""
    where.mkdir(parents=True, exist_ok=True)
    with (where / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure("runs elsewhere at this moment") from None
        yield lock.fileno()


def train(sweep: Sweep, run: Run, where: Path, accelerate_config: Path | None, processes: Processes) -> None:
    """
    Runs the recipe of a run in its folder, unless that is done.

    Raises:
        Failure: if it fails, or runs elsewhere at this moment.
    """
    with locked(where) as lock:
        if read_result(run, where) is not None:
            return
        for name in sweep.evaluate:  # of an adapter that is made anew now
            (where / f"{name}.json").unlink(missing_ok=True)
            shutil.rmtree(where / name, ignore_errors=True)
        options = dict(run.options) | {"output_dir": str(where)}
        write_atomically(where / CONFIG, yaml.safe_dump(options, sort_keys=False))
        command = [*launcher(accelerate_config), *recipe_command(sweep, where)]
        result = processes.run(command, where / LOG, lock)
        write_atomically(where / RESULT, json.dumps(result))


def score(run: Run, where: Path, benchmark: str, processes: Processes) -> None:
    """
    Scores what a run left on a benchmark, unless that is done.

    Raises:
        Failure: if it fails, or runs elsewhere at this moment.
    """
    with locked(where) as lock:
        if read_result(run, where, f"{benchmark}.json") is not None:
            return
        command = [*launcher(None), *score_command(run.options, where, benchmark)]
        result = processes.run(command, where / f"{benchmark}.txt", lock)
        write_atomically(where / f"{benchmark}.json", json.dumps(result))


def launcher(accelerate_config: Path | None) -> list[str]:
    """Returns what starts a script: Python, or `accelerate launch` with a file."""
    if accelerate_config is None:
        return [sys.executable, "-W", "ignore"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]


def recipe_command(sweep: Sweep, where: Path) -> list[str]:
    """Returns the recipe and its options; a run that was killed goes on from its last checkpoint."""
    # An adapter without a result is that of a killed run.
    command = [f"trl_recipes/{sweep.recipe}.py", "--config", str(where / CONFIG)]
    command += ["--overwrite_output_dir", "true"]
    return command + (["--resume_from_checkpoint", "true"] if any(where.glob("checkpoint-*")) else [])


def score_command(options: Mapping[str, object], where: Path, benchmark: str) -> list[str]:
    """Returns score.py and its options, for what a run left in its folder: under the prompt that it was trained with."""
    names = {f.name for f in fields(ModelConfig)} - {*LORA_OPTIONS, "use_peft"}
    names |= {"use_cpu", "trust_remote_code", "chat", "prompt_template", "max_completion_length"}
    given = {name: value for name, value in options.items() if name in names and value is not None}
    given |= {"benchmark": benchmark, "controls": False}  # the untrained model is the same for all runs: once, by hand
    given |= {"batch_size": options.get("score_batch_size"), "output_dir": where / benchmark}
    given |= {"model_name_or_path": where} if options.get("method") == "full" else {"adapter": where}
    pairs = ((f"--{name}", str(value)) for name, value in given.items() if value is not None)
    return ["trl_recipes/score.py", *(part for pair in pairs for part in pair)]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
