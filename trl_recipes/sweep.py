"""Run a grid of recipes, choose the best learning rate of each point, and collect the results as one table.

    python trl_recipes/sweep.py --sweeps trl_recipes/sweeps/embedded/grpo_tinylora.yaml --jobs 2
    python trl_recipes/sweep.py --sweeps ... --list          its runs, numbered, and which are done
    python trl_recipes/sweep.py --sweeps ... --tasks 3       one of them, and nothing else

A run is a recipe's own process in a folder of its own, with the config that repeats it. What is done is not run again, and
what was killed goes on from its last checkpoint: start the same command again. On many machines a scheduler's job array
starts `--tasks N`, with one file system for all of them that locks files across them (flock); the command without `--tasks`
then scores benchmarks. Jobs at a time on one machine share its GPUs: CUDA_VISIBLE_DEVICES says which a sweep may use.

    sbatch --array=0-14 --gpus=1 --wrap 'python trl_recipes/sweep.py --sweeps ... --tasks $SLURM_ARRAY_TASK_ID'

sweep files -> runs -> processes -> result.json of each -> results.csv of each sweep, which figures.py draws
"""

import csv
import fcntl
import hashlib
import io
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at import that an optional CPU kernel is missing

from peft_tinylora.versions import check_libraries_of_recipes  # noqa: E402


check_libraries_of_recipes()

from tqdm import tqdm  # noqa: E402
from trl import ModelConfig  # noqa: E402

from trl_recipes.arguments import METHODS, RecipeArguments, TinyLoraArguments, parse, run_script  # noqa: E402
from trl_recipes.errors import RecipeError  # noqa: E402
from trl_recipes.sweep_file import CHOOSE, Run, Sweep, load_sweep  # noqa: E402
from trl_recipes.sweep_run import Failure, Processes, read_result, score, train, write_atomically  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
USAGE = "sweep.py --sweeps FILE.yaml [FILE.yaml ...] [--jobs N] [--list] [--tasks N ...]   (--help lists every option)"
SCORES = ("greedy_before", "greedy_after", "sampled_before", "sampled_after")
COLUMNS = (
    *("sweep", "point", "stage", "learning_rate", "seed", "chosen", "trained_parameters"),
    *(*SCORES, "problems", "seconds", "folder", "configuration"),
)
# What tells the points of the figures apart, by the methods that read it.
OPTIONS = {
    "method": METHODS,
    "lora_r": ("lora", "lora-xs"),
    **{f"tinylora_{name}": ("tinylora",) for name in ("r", "u", "tie", "n_tie", "dtype")},
}


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
    folder = Path(arguments.output_dir).resolve()  # the recipes run in the repository's root
    if arguments.list:
        for number, (sweep, run) in enumerate(numbered(sweeps, folder)):
            done = isinstance(run, Run) and read_result(run, folder / sweep.name / run.folder) is not None
            print(f"{number:>5}  {'done' if done else '    '}  {run}")
        return

    failed = []
    if arguments.tasks is not None:
        tasks = numbered(sweeps, folder)
        for number in arguments.tasks:
            if not 0 <= number < len(tasks):
                raise RecipeError(f"tasks={number}: there are {len(tasks)}, numbered from 0: --list shows them.")
        runs = [tasks[number] for number in dict.fromkeys(arguments.tasks)]
        waiting = next((run for _, run in runs if not isinstance(run, Run)), None)
        if waiting is not None:
            raise RecipeError(f"{waiting}: run those first (with Slurm: --dependency=afterok).")
        failed += run_all(runs, folder, arguments)
    else:
        failed += run_all([(sweep, run) for sweep in sweeps for run in sweep.first_runs()], folder, arguments)
        chosen = [(sweep, chosen_rates(sweep, folder)) for sweep in sweeps]
        failed += run_all([(s, run) for s, rates in chosen for run in known_runs(s, rates)], folder, arguments)
        failed += score_all(sweeps, folder, arguments)
    for sweep in sweeps:
        path, rows = write_results(sweep, folder)
        print(f"{path}: {rows} of {len(numbered([sweep], folder))} runs")
    if failed:
        raise RecipeError(f"{len(failed)} runs failed, and the others are kept: {'; '.join(failed)}")


# --- which runs


def numbered(sweeps: Iterable[Sweep], folder: Path) -> list[tuple[Sweep, Run | str]]:
    """Returns every run in an order that does not depend on what is done; one whose rate is not known yet says so."""
    tasks: list[tuple[Sweep, Run | str]] = []
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
    scores: dict[str, dict[float | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    missing = set()
    for run in sweep.first_runs():
        where = folder / sweep.name / run.folder
        result = read_result(run, where)
        if result is None:
            missing.add(run.point)
        elif result["greedy_after"] is None and len(sweep.rates[run.point]) > 1:
            raise RecipeError(f"{where}: nothing was scored, so no rate can be chosen: set eval_dataset_name.")
        else:
            scores[run.point][run.learning_rate].append(result["greedy_after"] or 0.0)
    best = {}
    for point in sweep.points:
        if point not in missing:
            best[point] = max(scores[point], key=lambda rate: (mean(scores[point][rate]), -(rate or 0)))
    return best


def is_chosen(run: Run, rates: Mapping[str, float | None]) -> bool:
    """Says whether a run has the rate that was chosen for its point."""
    return run.point in rates and run.learning_rate == rates[run.point]


# --- running


def run_all(tasks: list[tuple[Sweep, Run]], folder: Path, arguments: SweepArguments) -> list[str]:
    """Trains what is not done, some at a time, and returns a line for each run that failed."""
    config = None if arguments.accelerate_config is None else Path(arguments.accelerate_config).resolve()
    work = []
    for sweep, run in tasks:
        where = folder / sweep.name / run.folder
        if read_result(run, where) is None:
            work.append((sweep, run, str(run), partial(train, sweep, run, where, config)))
    return do_all(work, folder, arguments.jobs, "runs", len(tasks))


def score_all(sweeps: Iterable[Sweep], folder: Path, arguments: SweepArguments) -> list[str]:
    """Scores the measured runs at the chosen rates on the benchmarks, and returns a line for each that failed."""
    work, every = [], 0
    for sweep in sweeps:
        rates = chosen_rates(sweep, folder)
        runs = [run for run in [*sweep.first_runs(), *known_runs(sweep, rates)] if is_chosen(run, rates)]
        for run, name in product(runs, sweep.evaluate):
            where = folder / sweep.name / run.folder
            if run.stage == CHOOSE or read_result(run, where) is None:
                continue
            every += 1
            if read_result(run, where, f"{name}.json") is None:
                work.append((sweep, run, f"{run} on {name}", partial(score, run, where, name)))
    return do_all(work, folder, arguments.jobs, "benchmarks", every)


def do_all(
    work: Sequence[tuple[Sweep, Run, str, Callable[[Processes], None]]],
    folder: Path,
    jobs: int,
    name: str,
    every: int,
) -> list[str]:
    """Does work, some at a time, writes the tables as it goes, and returns a line for each that failed."""
    failed = []
    with Processes(ROOT) as processes, ThreadPoolExecutor(jobs) as pool:
        bar = tqdm(total=every, initial=every - len(work), desc=name, disable=not work)

        def one(sweep: Sweep, run: Run, what: str, function: Callable[[Processes], None]) -> None:
            started = time.time()
            try:
                function(processes)
            except Failure as failure:
                failed.append(f"{what}: {failure}")
                bar.write(f"FAILED {what}: {failure}")
            else:
                result = read_result(run, folder / sweep.name / run.folder)
                assert result is not None  # or the work was no success
                scores = " -> ".join("?" if result[s] is None else f"{result[s]:.1%}" for s in SCORES[:2])
                bar.write(f"{what}: {result['trained_parameters']} numbers, {scores} ({time.time() - started:.0f} s)")
                write_results(sweep, folder)
            bar.update()

        futures = [pool.submit(one, *task) for task in work]
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


# --- results


def write_results(sweep: Sweep, folder: Path) -> tuple[Path, int]:
    """
    Writes the table of a sweep's finished runs, a row each.

    Returns:
        `Path`, `int`: the table, and how many rows it has.
    """
    path = folder / sweep.name / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".results.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or a process that read before another's run was done would write after it
        rows = rows_of(sweep, folder)
        if rows:
            lines = io.StringIO()
            more = [*(f"option:{name}" for name in OPTIONS), *(f"benchmark:{name}" for name in sweep.evaluate)]
            writer = csv.DictWriter(lines, [*COLUMNS, *more, "reported"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(path, lines.getvalue())
    return path, len(rows)


def rows_of(sweep: Sweep, folder: Path) -> list[dict[str, object]]:
    """Returns a row for each finished run of a sweep."""
    rates = chosen_rates(sweep, folder)
    defaults = {f.name: f.default for kind in (RecipeArguments, TinyLoraArguments, ModelConfig) for f in fields(kind)}
    rows = []
    for run in [*sweep.first_runs(), *known_runs(sweep, rates)]:
        where = folder / sweep.name / run.folder
        result = read_result(run, where)
        if result is None:
            continue
        of_run = {
            "sweep": sweep.name,
            "point": run.point,
            "stage": run.stage,
            "learning_rate": run.options.get("learning_rate"),
            "seed": run.seed,
            "chosen": is_chosen(run, rates),
            "trained_parameters": result["trained_parameters"],
            **{name: result[name] for name in SCORES},
            "problems": result["problems"],
            "seconds": result[f"{sweep.recipe}_seconds"],
            "folder": run.folder,
            "configuration": configuration_of(sweep, run),
        }
        options = {name: run.options.get(name, defaults[name]) for name in OPTIONS}
        of_run |= {f"option:{name}": options[name] for name in OPTIONS if options["method"] in OPTIONS[name]}
        scored = {name: read_result(run, where, f"{name}.json") for name in sweep.evaluate}
        of_run |= {f"benchmark:{name}": found["greedy"] for name, found in scored.items() if found is not None}
        rows.append(of_run | {"reported": sweep.reported.get(run.point)})
    return rows


def configuration_of(sweep: Sweep, run: Run) -> str:
    """Names what a run trains, whatever its rate, seed and sweep: 12 hex digits of a SHA-256."""
    changing = {"learning_rate", *sweep.seeded}
    options = {name: value for name, value in run.options.items() if name not in changing}
    return hashlib.sha256(json.dumps([sweep.recipe, options], sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    try:
        run_script(main)
    except KeyboardInterrupt:
        sys.exit("stopped: start the same command again to go on")
