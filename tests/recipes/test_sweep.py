"""Sweeps: what runs, what is not run again, what is chosen, and what a kill costs. The recipe is one that takes no time."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from recipes.forks import exit_status, fork
from recipes.runs import ROOT

from trl_recipes import sweep as sweep_script
from trl_recipes.arguments import RecipeError


# Solves a share of the problems that its options say; counts its starts.
RECIPE = """
    import json, os, sys, time
    from pathlib import Path
    import yaml
    options = yaml.safe_load(Path(sys.argv[2]).read_text())
    folder = Path(options["output_dir"])
    with (folder / "starts").open("a") as file:
        file.write(" ".join(sys.argv[3:]) + "\\n")
    time.sleep(options.get("seconds", 0))
    if options.get("fails") and not Path(options["mended"]).exists():
        (folder / "checkpoint-3").mkdir(exist_ok=True)
        sys.exit("out of memory")
    score = options["u"] / 10 - abs(options["learning_rate"] - options["best"]) + options["seed"] / 1000
    print("a line before it")
    print(json.dumps({"trained_parameters": options["u"], "greedy_before": 0.1, "greedy_after": score, "sampled_before": 0.1,
                      "sampled_after": score / 2, "problems": 8, "grpo_seconds": 1.0}))
"""


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository of that recipe alone."""
    (tmp_path / "trl_recipes").mkdir()
    (tmp_path / "trl_recipes" / "grpo.py").write_text(textwrap.dedent(RECIPE))
    (tmp_path / "config.yaml").write_text("learning_rate: 0.0\nbest: 0.2\nu: 1\n")
    monkeypatch.setattr(sweep_script, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_sweep(root: Path, **values: object) -> None:
    plain = {"reproduces": "x", "recipe": "grpo", "config": "config.yaml", "seeds": [0, 1]}
    (root / "sizes.yaml").write_text(yaml.safe_dump(plain | {"points": {"1": {"u": 1}, "4": {"u": 4}}} | values))


def run_sweep(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--sweeps", "sizes.yaml", "--output_dir", "out", *options])
    sweep_script.main()


def results(root: Path) -> list[dict[str, str]]:
    with (root / "out" / "sizes" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def starts(root: Path) -> dict[str, list[str]]:
    """Folder of a run -> the options of each of its starts."""
    return {
        str(path.parent.relative_to(root / "out" / "sizes")): path.read_text().splitlines()
        for path in sorted((root / "out").rglob("starts"))
    }


def test_the_best_rate_over_the_seeds_is_chosen_for_each_point(root, monkeypatch) -> None:
    write_sweep(root, learning_rates=[0.1, 0.2, 0.4], points={"1": {"u": 1}, "4": {"u": 4, "best": 0.4}})
    run_sweep(monkeypatch, "--jobs", "2")
    rows = results(root)
    assert len(rows) == 12 and {row["stage"] for row in rows} == {"measure"}
    chosen = [(row["point"], row["learning_rate"], row["seed"]) for row in rows if row["chosen"] == "True"]
    assert chosen == [("1", "0.2", "0"), ("1", "0.2", "1"), ("4", "0.4", "0"), ("4", "0.4", "1")]
    row = next(row for row in rows if row["point"] == "4" and row["chosen"] == "True" and row["seed"] == "1")
    assert float(row["greedy_after"]) == pytest.approx(0.401) and row["trained_parameters"] == "4"
    folder = root / "out" / "sizes" / row["folder"]
    assert json.loads((folder / "result.json").read_text())["greedy_after"] == float(row["greedy_after"])
    assert yaml.safe_load((folder / "run.yaml").read_text())["learning_rate"] == 0.4


def test_of_equal_rates_the_lower_is_chosen(root, monkeypatch) -> None:
    write_sweep(root, learning_rates=[0.375, 0.125], points={"1": {"u": 1, "best": 0.25}})
    run_sweep(monkeypatch)
    assert {row["learning_rate"] for row in results(root) if row["chosen"] == "True"} == {"0.125"}


def test_choosing_first_measures_the_chosen_rate_only(root, monkeypatch) -> None:
    write_sweep(root, learning_rates=[0.1, 0.2], choose={"seeds": [9], "options": {"best": 0.1}})
    run_sweep(monkeypatch)
    rows = results(root)
    assert [row["seed"] for row in rows if row["stage"] == "choose"] == ["9"] * 4
    assert {(row["learning_rate"], row["chosen"]) for row in rows if row["stage"] == "measure"} == {("0.1", "True")}
    assert sum(row["stage"] == "measure" for row in rows) == 4


def test_what_is_done_is_not_run_again_and_what_failed_goes_on_from_its_checkpoint(root, monkeypatch) -> None:
    mended = root / "mended"
    write_sweep(root, points={"1": {"u": 1}, "4": {"u": 4, "fails": True, "mended": str(mended)}})
    with pytest.raises(
        RecipeError, match=r"2 runs failed, and the others are kept: sizes 4, seed . *: exit code 1: out of memory"
    ):
        run_sweep(monkeypatch)
    assert [row["point"] for row in results(root)] == ["1", "1"]
    mended.touch()
    run_sweep(monkeypatch)
    fresh = "--overwrite_output_dir true"
    assert starts(root) == {
        "1/measure_seed_0": [fresh],
        "1/measure_seed_1": [fresh],
        "4/measure_seed_0": [fresh, f"{fresh} --resume_from_checkpoint true"],
        "4/measure_seed_1": [fresh, f"{fresh} --resume_from_checkpoint true"],
    }
    assert [row["point"] for row in results(root)] == ["1", "1", "4", "4"]


def test_a_run_of_other_options_in_the_same_folder_is_refused_by_the_option(root, monkeypatch) -> None:
    write_sweep(root)
    run_sweep(monkeypatch)
    write_sweep(root, options={"best": 0.3})
    with pytest.raises(RecipeError, match=r"holds a run with best: 0.2, and the sweep file now says 0.3: remove"):
        run_sweep(monkeypatch)


def test_tasks_of_a_job_array_are_all_runs_and_the_same_numbers_at_any_time(root, monkeypatch, capsys) -> None:
    write_sweep(root, learning_rates=[0.1, 0.2], choose={"seeds": [9]})
    with pytest.raises(
        RecipeError, match="sizes 1, seed 0: its rate is chosen by runs that are not all done: run those first"
    ):
        run_sweep(monkeypatch, "--tasks", "4")
    for number in (3, 2, 1, 0, 7, 6, 5, 4):
        run_sweep(monkeypatch, "--tasks", str(number))
    assert len(results(root)) == 8 and all(len(lines) == 1 for lines in starts(root).values())
    capsys.readouterr()
    run_sweep(monkeypatch, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(" done " in line for line in lines)
    assert lines[0].endswith("sizes 1 at 0.1, seed 9 (choosing)") and lines[7].endswith("sizes 4 at 0.2, seed 1")
    with pytest.raises(RecipeError, match="tasks=8: there are 8, numbered from 0"):
        run_sweep(monkeypatch, "--tasks", "8")


def test_a_run_that_prints_no_result_fails(root, monkeypatch) -> None:
    write_sweep(root, points={"1": {"u": 1}}, seeds=[0])
    (root / "trl_recipes" / "grpo.py").write_text("print('all went well')")
    with pytest.raises(RecipeError, match="it printed no result; its last line: all went well"):
        run_sweep(monkeypatch)
    assert not list((root / "out").rglob("result.json"))


# sweep.py, with the repository as its first argument.
SWEEP_OF_A_ROOT = [
    *(sys.executable, "-W", "ignore", "-c"),
    "import sys; from pathlib import Path; from trl_recipes import sweep; sweep.ROOT = Path(sys.argv.pop(1)); sweep.main()",
]
SCORER = """
    import json, sys
    from pathlib import Path
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    with (Path(options["--output_dir"]).parent / "scored").open("a") as file:
        file.write(json.dumps(options) + "\\n")
    if not Path("mended").exists() and options["--benchmark"] == "aime24":
        sys.exit("no such set")
    print(json.dumps({"greedy": 0.25}))
"""


def test_measured_runs_are_scored_on_the_benchmarks_and_a_failure_there_costs_no_training(root, monkeypatch) -> None:
    (root / "trl_recipes" / "score.py").write_text(textwrap.dedent(SCORER))
    options = {
        "dtype": "bfloat16",
        "load_in_4bit": True,
        "prompt_template": "{question}!",
        "score_batch_size": 8,
        "max_completion_length": 77,
    }
    points = {"1": {"u": 1}, "9": {"u": 9, "method": "full"}}
    choose = {"seeds": [9]}
    write_sweep(root, options=options, points=points, seeds=[0], evaluate=["math500", "aime24"], choose=choose)
    with pytest.raises(RecipeError, match="2 runs failed.*exit code 1: no such set"):
        run_sweep(monkeypatch)
    (root / "mended").touch()
    run_sweep(monkeypatch)
    assert {name: len(lines) for name, lines in starts(root).items()} == {
        f"{point}/{stage}": 1 for point in "19" for stage in ("choose_seed_9", "measure_seed_0")
    }
    measured = [row for row in results(root) if row["stage"] == "measure"]
    assert [(row["benchmark:math500"], row["benchmark:aime24"]) for row in measured] == [("0.25", "0.25")] * 2
    where = Path("out") / "sizes" / "1" / "measure_seed_0"
    scored = [json.loads(line) for line in (root / where / "scored").read_text().splitlines()]
    assert [options["--benchmark"] for options in scored] == ["math500", "aime24", "aime24"]
    assert scored[0] == {
        "--adapter": str(root / where),
        "--benchmark": "math500",
        "--controls": "False",
        "--output_dir": str(root / where / "math500"),
        "--prompt_template": "{question}!",
        "--dtype": "bfloat16",
        "--load_in_4bit": "True",
        "--max_completion_length": "77",
        "--batch_size": "8",
    }
    full = json.loads((root / "out" / "sizes" / "9" / "measure_seed_0" / "scored").read_text().splitlines()[0])
    assert (
        full["--model_name_or_path"] == str(root / "out" / "sizes" / "9" / "measure_seed_0")
        and "--adapter" not in full
    )


def test_what_a_library_says_as_it_ends_does_not_hide_the_result(root, monkeypatch) -> None:
    write_sweep(root, points={"1": {"u": 1}}, seeds=[0])
    with (root / "trl_recipes" / "grpo.py").open("a") as recipe:
        recipe.write(
            'print("{torn", file=sys.stderr)\nprint("[W] destroy_process_group() was not called", file=sys.stderr)\n'
        )
    run_sweep(monkeypatch)
    assert len(results(root)) == 1


def test_what_was_done_with_other_options_chooses_nothing(root, monkeypatch) -> None:
    write_sweep(root, learning_rates=[0.1, 0.2], choose={"seeds": [9]}, points={"1": {"u": 1}})
    run_sweep(monkeypatch, "--tasks", "0", "1")
    write_sweep(root, learning_rates=[0.1, 0.2], choose={"seeds": [9]}, points={"1": {"u": 1}}, options={"best": 0.3})
    with pytest.raises(RecipeError, match="holds a run with best: 0.2"):
        run_sweep(monkeypatch, "--tasks", "2")


def test_a_sweep_may_be_started_from_elsewhere(root, monkeypatch, tmp_path_factory) -> None:
    write_sweep(root, points={"1": {"u": 1}}, seeds=[0])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--sweeps", str(root / "sizes.yaml"), "--output_dir", "out"])
    sweep_script.main()
    assert not (root / "out").exists()
    assert {path.name for path in (elsewhere / "out/sizes/1/measure_seed_0").iterdir()} == {
        *("starts", "run.yaml", "log.txt", "result.json", ".lock")
    }


def test_where_nothing_is_scored_no_rate_is_chosen(root, monkeypatch) -> None:
    recipe = root / "trl_recipes" / "grpo.py"
    recipe.write_text(recipe.read_text().replace('"greedy_after": score', '"greedy_after": None'))
    write_sweep(root, learning_rates=[0.1, 0.2])
    with pytest.raises(RecipeError, match="nothing was scored, so no rate can be chosen: set eval_dataset_name"):
        run_sweep(monkeypatch)


def start_sweep(monkeypatch) -> int:
    """Starts a sweep of that repository in a process of its own, and returns its id."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background does not have
        run_sweep(monkeypatch)

    return fork(work)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_sweep_goes_on_and_no_run_is_there_twice_at_once(root, monkeypatch, how: signal.Signals) -> None:
    write_sweep(root, options={"seconds": 1.5}, points={"1": {"u": 1}}, seeds=[0, 1])
    process = start_sweep(monkeypatch)
    wait_for(lambda: starts(root))
    os.kill(process, how)
    assert exit_status(process, 30) != 0
    if how is signal.SIGKILL:  # its child lives on, and holds the run
        with pytest.raises(RecipeError, match="1 runs failed.*seed 0: runs elsewhere at this moment"):
            run_sweep(monkeypatch)
        lock = root / "out" / "sizes" / "1" / "measure_seed_0"
        wait_for(lambda: not is_locked(lock / ".lock"))
    run_sweep(monkeypatch)
    assert [row["seed"] for row in results(root)] == ["0", "1"]
    assert {name: len(lines) for name, lines in starts(root).items()} == {"1/measure_seed_0": 2, "1/measure_seed_1": 1}


def slurm_answers() -> bool:
    """Whether there is a Slurm, and its controller runs."""
    if shutil.which("scontrol") is None:
        return False
    return "is UP" in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_slurms_job_arrays_run_a_sweep_whose_rates_are_chosen_first(root) -> None:
    if not slurm_answers():
        pytest.skip("needs a Slurm that runs")
    write_sweep(root, learning_rates=[0.1, 0.2], choose={"seeds": [9]})
    python = " ".join(map(shlex.quote, [*SWEEP_OF_A_ROOT, str(root), "--sweeps", "sizes.yaml", "--output_dir", "out"]))

    def submit(tasks: str, *options: str) -> str:
        command = ["sbatch", "--parsable", f"--array={tasks}", "--output=/dev/null", *options]
        command += ["--wrap", f"{python} --tasks $SLURM_ARRAY_TASK_ID"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=root, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    first = submit("0-3")
    submit("4-7", f"--dependency=afterok:{first}", "--wait")
    rows = results(root)
    assert len(rows) == 8 and all(len(lines) == 1 for lines in starts(root).values())
    assert {row["learning_rate"] for row in rows if row["stage"] == "measure"} == {"0.2"}


def is_locked(path: Path) -> bool:
    import fcntl

    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
