"""Run a grid of recipes, choose the best learning rate of each point, and collect the results as one table.

    python trl_recipes/sweep.py --sweeps trl_recipes/sweeps/embedded/grpo_tinylora.yaml --jobs 2
    python trl_recipes/sweep.py --sweeps ... --list          its runs, numbered, and which are done
    python trl_recipes/sweep.py --sweeps ... --tasks 3       one of them, and nothing else

A run is a recipe's own process in a folder of its own, with the config that repeats it. What is done is not run again, and
what was killed goes on from its last checkpoint: start the same command again. On many machines a scheduler's job array
starts `--tasks N`, with one file system for all of them:

    sbatch --array=0-14 --gpus=1 --wrap 'python trl_recipes/sweep.py --sweeps ... --tasks $SLURM_ARRAY_TASK_ID'

sweep files -> runs -> processes -> result.json of each -> results.csv of each sweep, which figures.py draws
"""

import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import mean

import yaml
from tqdm import tqdm
from trl import ModelConfig

from trl_recipes.arguments import RecipeArguments, RecipeError, TinyLoraArguments, parse
from trl_recipes.sweep_file import Run, Sweep, load_sweep


ROOT = Path(__file__).resolve().parents[1]
CONFIG, LOG, RESULT, LOCK = "run.yaml", "log.txt", "result.json", ".lock"
USAGE = "sweep.py --sweeps FILE.yaml [FILE.yaml ...] [--jobs N] [--list] [--tasks N ...]   (--help lists every option)"
SCORES = ("greedy_before", "greedy_after", "sampled_before", "sampled_after")
# What tells the points of the figures apart; a config that does not set one has the recipe's default.
OPTIONS = ("method", "lora_r", *(f"tinylora_{name}" for name in ("r", "u", "tie", "n_tie", "dtype")))


@dataclass
class SweepArguments:
    """What sweep.py reads.

    Args:
        sweeps (`list[str]`):
            Sweep files.
        output_dir (`str`, *optional*, defaults to `"outputs/sweeps"`):
            Where each sweep gets a folder of its name.
        jobs (`int`, *optional*, defaults to `1`):
            Processes at a time on this machine.
        accelerate_config (`str`, *optional*):
            Start each run by `accelerate launch` with this file, on several GPUs, say. Without it: one process.
        tasks (`list[int]`, *optional*):
            Run only these of the numbered runs.
        list (`bool`, *optional*, defaults to `False`):
            Whether to list the runs and start none.
    """

    sweeps: list[str] = field(default_factory=list, metadata={"help": "Sweep files."})
    output_dir: str = field(default="outputs/sweeps", metadata={"help": "Each sweep gets a folder of its name here."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time on this machine."})
    accelerate_config: str | None = field(
        default=None, metadata={"help": "Start each run by `accelerate launch` with this file (None: one process)."}
    )
    tasks: list[int] | None = field(
        default=None, metadata={"help": "Run these of the numbered runs only, for a scheduler's job array."}
    )
    list: bool = field(default=False, metadata={"help": "List the runs and start none."})

    def __post_init__(self):
        if not self.sweeps:
            raise RecipeError("no sweep: set sweeps to one or more sweep files.")
        if self.jobs < 1:
            raise RecipeError(f"jobs={self.jobs}: must be 1 or more.")


def main() -> None:
    """Runs what is not done yet, and writes the tables."""
    [arguments] = parse((SweepArguments,), USAGE)
    sweeps = [load_sweep(Path(path), ROOT) for path in arguments.sweeps]
    names = [sweep.name for sweep in sweeps]
    if len(set(names)) < len(names):
        raise RecipeError(f"two sweeps of one name would share a folder: {', '.join(names)}.")
    folder = Path(arguments.output_dir)
    if arguments.list:
        for number, (sweep, run) in enumerate(numbered(sweeps, folder)):
            where = folder / sweep.name / run.folder if isinstance(run, Run) else None
            done = where is not None and (where / RESULT).exists()
            print(f"{number:>5}  {'done' if done else '    '}  {run}")
        return

    failed = []
    if arguments.tasks is not None:
        tasks = numbered(sweeps, folder)
        for number in arguments.tasks:
            if not 0 <= number < len(tasks):
                raise RecipeError(f"tasks={number}: there are {len(tasks)}, numbered from 0: --list shows them.")
        runs = [tasks[number] for number in arguments.tasks]
        waiting = next((run for _, run in runs if not isinstance(run, Run)), None)
        if waiting is not None:
            raise RecipeError(f"{waiting}: run those first (with Slurm: --dependency=afterok).")
        failed += run_all(runs, folder, arguments)
    else:
        failed += run_all([(sweep, run) for sweep in sweeps for run in sweep.first_runs()], folder, arguments)
        chosen = [(sweep, chosen_rates(sweep, folder)) for sweep in sweeps]
        failed += run_all([(s, run) for s, rates in chosen for run in known_runs(s, rates)], folder, arguments)
    for sweep in sweeps:
        path, rows = write_results(sweep, folder)
        print(f"{path}: {rows} of {len(numbered([sweep], folder))} runs")
    if failed:
        raise RecipeError(f"{len(failed)} runs failed, and the others are kept: {'; '.join(failed)}")


# --- which runs


def numbered(sweeps: Iterable[Sweep], folder: Path) -> list[tuple[Sweep, Run | str]]:
    """Returns every run in an order that does not depend on what is done; one whose rate is not known yet says so."""
    tasks = []
    for sweep in sweeps:
        tasks += [(sweep, run) for run in sweep.first_runs()]
        if sweep.choose is not None:
            rates = chosen_rates(sweep, folder)
            known = {(run.point, run.seed): run for run in known_runs(sweep, rates)}
            for point in sweep.points:
                for seed in sweep.seeds:
                    unknown = f"{sweep.name} {point}, seed {seed}: its rate is chosen by runs that are not all done"
                    tasks.append((sweep, known.get((point, seed), unknown)))
    return tasks


def known_runs(sweep: Sweep, rates: Mapping[str, float | None]) -> list[Run]:
    """Returns the measured runs of the points whose rate is chosen."""
    return [run for run in sweep.last_runs(defaultdict(lambda: None, rates)) if run.point in rates]


def chosen_rates(sweep: Sweep, folder: Path) -> dict[str, float | None]:
    """Returns the rate with the best mean greedy accuracy for each point whose runs are all done; the lower of equals."""
    scores = defaultdict(lambda: defaultdict(list))
    missing = set()
    for run in sweep.first_runs():
        result = read_result(folder / sweep.name / run.folder)
        if result is None:
            missing.add(run.point)
        else:
            scores[run.point][run.learning_rate].append(result["greedy_after"] or 0.0)
    best = {}
    for point in sweep.points:
        if point not in missing:
            best[point] = max(scores[point], key=lambda rate: (mean(scores[point][rate]), -(rate or 0)))
    return best


# --- running


def run_all(tasks: list[tuple[Sweep, Run]], folder: Path, arguments: SweepArguments) -> list[str]:
    """Runs what is not done, some at a time, and returns a line for each that failed."""
    todo = [task for task in tasks if not is_done(task[1], folder / task[0].name / task[1].folder)]
    failed = []
    with Processes() as processes, ThreadPoolExecutor(arguments.jobs) as pool:
        bar = tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="runs", disable=not todo)

        def one(sweep: Sweep, run: Run) -> None:
            started = time.time()
            where = folder / sweep.name / run.folder
            failure = run_one(sweep, run, where, arguments.accelerate_config, processes)
            if failure is None:
                result = read_result(where)
                scores = " -> ".join("?" if result[s] is None else f"{result[s]:.1%}" for s in SCORES[:2])
                bar.write(f"{run}: {result['trained_parameters']} numbers, {scores} ({time.time() - started:.0f} s)")
                write_results(sweep, folder)
            else:
                failed.append(f"{run}: {failure}")
                bar.write(f"FAILED {run}: {failure}")
            bar.update()

        futures = [pool.submit(one, *task) for task in todo]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
        finally:
            bar.close()
    return failed


def is_done(run: Run, where: Path) -> bool:
    """Says whether a run is finished; raises [`RecipeError`] where its folder holds one of another config."""
    path = where / CONFIG
    if not path.exists():
        return False
    there = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    there.pop("output_dir", None)
    differing = sorted(str(key) for key in there.keys() | run.options.keys() if there.get(key) != run.options.get(key))
    if differing:
        key = differing[0]
        raise RecipeError(
            f"{where} holds a run with {key}: {there.get(key)!r}, and the sweep file now says {run.options.get(key)!r}: "
            "remove that folder, or rename the sweep."
        )
    return (where / RESULT).exists()


class Processes:
    """The child processes that run now, so that none is left behind; a context in which SIGTERM raises SystemExit."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def __enter__(self) -> "Processes":
        self.before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def run(self, command: list[str], log: Path, lock: int) -> int | None:
        """Runs a command to its end, output to `log`; returns its exit code, `None` if it was not started."""
        if self.stopped:
            return None
        with log.open("w", encoding="utf-8") as output:
            # The lock goes with the child: it is held as long as that lives, also where this process is killed.
            child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock])
        self.running.add(child)
        try:
            return child.wait()
        finally:
            self.running.discard(child)

    def stop(self) -> None:
        """Ends what runs, and lets nothing more start."""
        self.stopped = True
        for child in list(self.running):
            child.terminate()


def run_one(sweep: Sweep, run: Run, where: Path, accelerate_config: str | None, processes: Processes) -> str | None:
    """Runs one recipe in its folder; returns why it failed, `None` where it did not."""
    where.mkdir(parents=True, exist_ok=True)
    with (where / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "runs elsewhere at this moment"
        if is_done(run, where):
            return None
        options = dict(run.options) | {"output_dir": str(where)}
        write_atomically(where / CONFIG, yaml.safe_dump(options, sort_keys=False))
        log = where / LOG
        more = ["--overwrite_output_dir", "true"]  # an adapter without a result is that of a killed run
        if any(where.glob("checkpoint-*")):
            more += ["--resume_from_checkpoint", "true"]
        recipe = [f"trl_recipes/{sweep.recipe}.py", "--config", str((where / CONFIG).resolve()), *more]
        start = [sys.executable, "-W", "ignore"]
        if accelerate_config is not None:
            start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate_config]
        code = processes.run([*start, *recipe], log, lock.fileno())
        if code is None:
            return "not started"
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no output"
        if code:
            return f"exit code {code}: {last[:300]} ({log})"
        try:
            result = json.loads(last)
        except json.JSONDecodeError:
            return f"its last line is no result: {last[:300]} ({log})"
        write_atomically(where / RESULT, json.dumps(result))
    return None


# --- results


def read_result(where: Path) -> dict | None:
    """Reads a finished run's result; `None` where there is none."""
    try:
        return json.loads((where / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_results(sweep: Sweep, folder: Path) -> tuple[Path, int]:
    """
    Writes the table of a sweep's finished runs, a row each.

    Returns:
        `Path`, `int`: the table, and how many rows it has.
    """
    rates = chosen_rates(sweep, folder)
    defaults = {f.name: f.default for kind in (RecipeArguments, TinyLoraArguments, ModelConfig) for f in fields(kind)}
    rows = []
    for run in [*sweep.first_runs(), *known_runs(sweep, rates)]:
        result = read_result(folder / sweep.name / run.folder)
        if result is None:
            continue
        of_run = {
            "sweep": sweep.name,
            "point": run.point,
            "stage": run.stage,
            "learning_rate": run.options.get("learning_rate"),
            "seed": run.seed,
            "chosen": run.point in rates and run.learning_rate == rates[run.point],
            "trained_parameters": result["trained_parameters"],
            **{name: result[name] for name in SCORES},
            "problems": result["problems"],
            "seconds": result[f"{sweep.recipe}_seconds"],
            "folder": run.folder,
        }
        options = {f"option:{name}": run.options.get(name, defaults.get(name)) for name in OPTIONS}
        rows.append(of_run | options | {"reported": sweep.reported.get(run.point)})
    path = folder / sweep.name / "results.csv"
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = io.StringIO()
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lines.getvalue())
    return path, len(rows)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: start the same command again to go on")
