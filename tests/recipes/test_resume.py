"""A run that is killed at any point and resumed ends as the one that was left alone, to the bit."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from recipes.forks import exit_status, fork
from recipes.killed_runs import Killer, torn_in
from recipes.runs import in_fork
from recipes.tiny_trainers import tiny_trainer
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOTrainer, SFTTrainer

from trl_recipes.arguments import RecipeError
from trl_recipes.checkpoints import checkpoints_in, choose, complaint, tidy
from trl_recipes.methods import finished_in
from trl_recipes.resuming import ResumableGRPOTrainer, ResumableSFTTrainer
from trl_recipes.trainer_setup import trained_numbers


pytestmark = [pytest.mark.recipe, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]
STOCK = {ResumableGRPOTrainer: GRPOTrainer, ResumableSFTTrainer: SFTTrainer}


# --- without kills: each checkpoint of a run, and what transformers and TRL make of it
def logs(trainer: Trainer) -> list[dict]:
    """All that was logged, but how long it took."""
    times = ("time", "second", "runtime", "train_loss")  # the last is the mean over the steps since resuming
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in times)}
        for entry in trainer.state.log_history
    ]


CASES = {
    # 8 problems, 6 to each generation, used twice: 1 generation an epoch, 6 micro-steps, of which 2 make a step
    "completions used again, epochs": (
        ResumableGRPOTrainer,
        {"rows": 8, "max_steps": 7, "steps_per_generation": 3, "num_iterations": 2, "gradient_accumulation_steps": 2}
        | {"lr_scheduler_type": "constant"},  # so that a step too many shows
        [1, 2, 3, 4, 7],
    ),
    "order of problems in the second epoch": (
        ResumableGRPOTrainer,
        {"rows": 4, "max_steps": 5, "logging_steps": 2},
        [2, 3, 5],
    ),
    "examples shuffled, epochs": (
        ResumableSFTTrainer,
        {"rows": 44, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "logging_steps": 2},
        [1, 3, 5, 6],
    ),
    "examples streamed": (ResumableSFTTrainer, {"rows": 40, "max_steps": 4, "streaming": True}, [2]),
    "examples packed": (
        ResumableSFTTrainer,
        {"rows": 20, "packing": True, "max_length": 16, "per_device_train_batch_size": 4, "max_steps": 5},
        [1, 4],
    ),
    "examples of like length together": (
        ResumableSFTTrainer,
        {"rows": 20, "num_train_epochs": 2, "train_sampling_strategy": "group_by_length"},
        [1, 3, 4],
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def whole(request, tiny_model_dir, tmp_path_factory):
    """A run left alone, with a checkpoint of each step: its class, its options, its trainer, the steps to resume from."""
    trainer_class, options, steps = CASES[request.param]
    folder = tmp_path_factory.mktemp("whole")
    trainer = tiny_trainer(tiny_model_dir, folder, trainer_class, **options)
    trainer.train()
    assert len(checkpoints_in(folder)) == trainer.state.max_steps and not torn_in(folder)
    return trainer_class, options, trainer, steps


def test_from_each_checkpoint_the_numbers_and_the_logs_are_those_of_the_run_left_alone(
    whole, tiny_model_dir, tmp_path
):
    trainer_class, options, left_alone, steps = whole
    assert trained_numbers(left_alone.model).all()
    for step in steps:
        folder = tmp_path / str(step)
        trainer = tiny_trainer(tiny_model_dir, folder, trainer_class, **options)
        trainer.train(Path(left_alone.args.output_dir) / f"checkpoint-{step}")
        assert torch.equal(trained_numbers(trainer.model), trained_numbers(left_alone.model)), step
        assert logs(trainer) == logs(left_alone), step
        assert len(checkpoints_in(folder)) == left_alone.state.max_steps - step


STOCK_ENDS_ELSEWHERE = {
    "completions used again, epochs": [1, 7],  # completions that are lost; a step too many
    "order of problems in the second epoch": [3],  # the order of the first
}


@pytest.mark.parametrize("whole", STOCK_ENDS_ELSEWHERE, indirect=True)
def test_with_trls_own_trainer_they_are_not(whole, request, tiny_model_dir, tmp_path):
    """When this fails, a release has mended what resuming.py does: take it out there."""
    trainer_class, options, left_alone, _ = whole
    for step in STOCK_ENDS_ELSEWHERE[request.node.callspec.params["whole"]]:
        trainer = tiny_trainer(tiny_model_dir, tmp_path / str(step), STOCK[trainer_class], **options)
        trainer.train(resume_from_checkpoint=f"{left_alone.args.output_dir}/checkpoint-{step}")
        assert not torch.equal(trained_numbers(trainer.model), trained_numbers(left_alone.model)), step


def test_the_best_checkpoint_is_known_by_its_last_name_and_is_not_deleted(tiny_model_dir, tmp_path):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options |= {"rows": 24, "save_total_limit": 1, "metric_for_best_model": "loss", "learning_rate": 5.0}
    trainer = tiny_trainer(tiny_model_dir, tmp_path, ResumableSFTTrainer, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.name != "checkpoint-4", "the last step is the best: the test shows nothing"
    assert complaint(best) is None
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


# --- refusals
@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory) -> Path:
    """The folder of a run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_trainer(tiny_model_dir, folder, ResumableSFTTrainer, max_steps=2).train()
    return folder


def resuming(base: Path, folder: Path, wanted: str, **options) -> Trainer:
    options = {"max_steps": 2} | options
    return tiny_trainer(base, folder, ResumableSFTTrainer, resume_from_checkpoint=wanted, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"u": 2}, "u=1 there and 2 here"),
        ({"projection_seed": 7}, "projection_seed=42 there and 7 here"),
    ],
)
@pytest.mark.parametrize("by_path", [False, True])
def test_a_checkpoint_of_another_adapter_is_refused_by_name(finished, tiny_model_dir, options, named, by_path):
    wanted = str(finished / "checkpoint-1") if by_path else "true"
    with pytest.raises(RecipeError) as error:
        resuming(tiny_model_dir, finished, wanted, **options).checkpoint_to_resume()
    assert named in str(error.value) and "checkpoint-" in str(error.value)


@pytest.mark.parametrize("by_path", [False, True])
def test_a_checkpoint_of_another_method_is_refused_also_where_its_config_is_the_same(
    finished, tiny_model_dir, by_path
):
    wanted = str(finished / "checkpoint-1") if by_path else "true"
    trainer = resuming(tiny_model_dir, finished, wanted)
    trainer.recipe_settings = {"method": "lora-xs"}
    with pytest.raises(RecipeError, match="holds another adapter: method=None there and 'lora-xs' here"):
        trainer.checkpoint_to_resume()


def test_of_a_run_with_another_reward_none_is_taken_unless_it_is_named(tiny_model_dir, tmp_path):
    trainer = tiny_trainer(tiny_model_dir, tmp_path, ResumableSFTTrainer, max_steps=1)
    trainer.recipe_settings = {"method": "tinylora", "rewards": ["exact_match_reward"]}
    trainer.train()
    other = resuming(tiny_model_dir, tmp_path, "true", max_steps=1)
    other.recipe_settings = {"method": "tinylora", "rewards": ["length"]}
    with pytest.raises(
        RecipeError, match=r"another run: rewards=\['exact_match_reward'\] there and \['length'\] here"
    ):
        other.checkpoint_to_resume()


def test_a_checkpoint_of_another_base_is_refused_by_name(finished, tiny_model_dir, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(tiny_model_dir, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1.5)
    model.save_pretrained(other)
    checkpoint = finished / "checkpoint-1"
    trainer = resuming(other, tmp_path, str(checkpoint))
    with pytest.raises(RecipeError, match="up_proj") as error:
        trainer.train(trainer.checkpoint_to_resume())
    assert str(checkpoint) in str(error.value)
    with pytest.raises(RecipeError, match="base model="):
        resuming(other, finished, "true").checkpoint_to_resume()


def test_of_a_run_with_other_settings_none_is_taken_unless_it_is_named(finished, tiny_model_dir, tmp_path, capsys):
    with pytest.raises(RecipeError, match="checkpoint-2.*another run: learning_rate=0.05 there and 0.1 here"):
        resuming(tiny_model_dir, finished, "true", learning_rate=0.1).checkpoint_to_resume()
    with pytest.raises(RecipeError, match="training rows=100 there and 40 here"):
        resuming(tiny_model_dir, finished, "true", rows=40).checkpoint_to_resume()
    named = str(finished / "checkpoint-1")
    trainer = resuming(tiny_model_dir, tmp_path, named, learning_rate=0.1)
    assert trainer.checkpoint_to_resume() == Path(named)
    assert "learning_rate=0.05 there and 0.1 here" in capsys.readouterr().out
    same = resuming(tiny_model_dir, finished, "true", save_steps=5, logging_steps=7, report_to="none")
    assert same.checkpoint_to_resume() == finished / "checkpoint-2"


def test_one_of_another_number_of_processes_and_saving_in_the_middle_of_a_step_are_refused(
    finished, tiny_model_dir, tmp_path
):
    two = tmp_path / "checkpoint-1"
    shutil.copytree(finished / "checkpoint-1", two)
    file, other = two / "between_steps_0_of_1.pt", two / "between_steps_0_of_2.pt"
    file.rename(other)
    (two / "checkpoint.json").write_text((two / "checkpoint.json").read_text().replace(file.name, other.name))
    with pytest.raises(RecipeError, match="not written by 1 processes"):
        resuming(tiny_model_dir, tmp_path, str(two)).checkpoint_to_resume()
    with pytest.raises(RecipeError, match="enable_jit_checkpoint"):
        resuming(tiny_model_dir, tmp_path, "false", enable_jit_checkpoint=True).checkpoint_to_resume()


def test_in_a_later_pass_over_a_stream_none_is_taken(tiny_model_dir, tmp_path):
    options = {"rows": 24, "max_steps": 5, "streaming": True}  # three steps a pass
    tiny_trainer(tiny_model_dir, tmp_path, ResumableSFTTrainer, **options).train()

    def found(step: int) -> Path:
        return resuming(tiny_model_dir, tmp_path, f"{tmp_path}/checkpoint-{step}", **options).checkpoint_to_resume()

    assert [found(step).name for step in (3, 5)] == ["checkpoint-3", "checkpoint-5"]
    with pytest.raises(RecipeError, match="checkpoint-4 is in a later pass over streamed data"):
        found(4)


def test_an_adapter_without_its_curve_is_not_finished_for_a_run_that_resumes(tmp_path):
    assert not finished_in(tmp_path, None)
    (tmp_path / "adapter_model.safetensors").touch()
    assert finished_in(tmp_path, None) and finished_in(tmp_path, "false")
    (tmp_path / ".reward_curve.png").touch()  # a picture that is being written
    assert not finished_in(tmp_path, "true")
    (tmp_path / "reward_curve.png").touch()
    assert finished_in(tmp_path, "true")


# --- kills
@pytest.mark.parametrize("step", [3, 2], ids=["beside the last one, which goes", "in the place of the last one"])
def test_at_each_file_of_a_checkpoint_a_kill_leaves_a_whole_one(tiny_model_dir, tmp_path, step, record_property):
    before = tmp_path / "before"
    folder = tmp_path / "run"
    trainer = tiny_trainer(tiny_model_dir, folder, ResumableGRPOTrainer, max_steps=2, save_total_limit=1)
    trainer.train()
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"]
    trainer.state.global_step = step
    shutil.copytree(folder, before)

    def save(kill: tuple[str, int] | None) -> int:
        """In a process of its own, from the same state each time."""
        shutil.rmtree(folder)
        shutil.copytree(before, folder)

        def work() -> None:
            torch.set_num_threads(1)  # those of the process that was forked are not there
            killer = Killer(folder, kill)
            killer.install()
            trainer._save_checkpoint(trainer.model, None)
            (tmp_path / "counts.json").write_text(json.dumps(killer.counts))

        return exit_status(fork(work, tmp_path / "log.txt"))

    assert save(None) == 0, (tmp_path / "log.txt").read_text()
    assert [path.name for path in checkpoints_in(folder)] == [f"checkpoint-{step}"] and not torn_in(folder)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["half"] >= 6 and counts["file"] >= 10
    kills = [(place, n) for place in ("half", "file") for n in range(1, counts[place] + 1)]
    for kill in kills:
        assert save(kill) == -9, kill
        assert not torn_in(folder), kill
        assert all(complaint(path) is None for path in checkpoints_in(folder)), kill
        tidy(folder)
        assert choose("true", folder)[0] is not None, kill
        assert not list(folder.glob(".*")), kill
    record_property("faults survived", len(kills))


def recipe_options(recipe: str, base: Path, files: tuple[Path, Path], folder: Path) -> list[str]:
    """A run of 5 steps on the tiny model, with a checkpoint of each."""
    common = {
        **{"config": f"trl_recipes/configs/embedded_{recipe}.yaml", "model_name_or_path": base, "output_dir": folder},
        **{"dataset_name": files[0], "eval_dataset_name": files[1], "max_eval_problems": 8, "seed": 3},
        **{"per_device_train_batch_size": 8, "max_completion_length": 6, "learning_rate": 0.05, "max_steps": 5},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
        **{"overwrite_output_dir": "false", "resume_from_checkpoint": "true"},
    }
    own = {"steps_per_generation": 2, "num_iterations": 2} if recipe == "grpo" else {"completion_column": "answer"}
    return [part for name, value in (common | own).items() for part in (f"--{name}", str(value))]


def run_jobs(jobs: list[dict], folder: Path) -> list[dict]:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    finished = in_fork(str(Path(__file__).with_name("killed_runs.py")), str(file), seconds=3000)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def killed_and_resumed(
    kills: list[tuple[str, str, int | float]], base: Path, files: tuple[Path, Path], folder: Path, processes: int = 1
) -> None:
    """Runs each recipe once left alone, and once for each kill, and compares what they leave."""

    def job(recipe: str, name: str, kill: tuple | None, log: str) -> dict:
        options = recipe_options(recipe, base, files, folder / name)
        log = str(folder / f"{name}-{log}.log")
        return {"recipe": recipe, "options": options, "processes": processes, "kill": kill, "log": log}

    recipes = sorted({recipe for recipe, *_ in kills})
    jobs = [job(recipe, recipe, None, "whole") for recipe in recipes]
    for index, (recipe, *kill) in enumerate(kills):
        jobs += [job(recipe, str(index), kill, "killed"), job(recipe, str(index), None, "resumed")]
    results = run_jobs(jobs, folder)
    for done, result in zip(jobs, results, strict=True):
        expected = -9 if done["kill"] else 0
        assert result["status"] == expected, (done["kill"], Path(done["log"]).read_text()[-3000:])
        assert result["torn"] == [], done["kill"]
    for index, (recipe, *kill) in enumerate(kills):
        assert what_is_left(folder, str(index)) == what_is_left(folder, recipe), (recipe, kill)


def what_is_left(folder: Path, name: str) -> dict:
    """What a run left and said, but for times and its own name."""
    run = folder / name
    log = max(folder.glob(f"{name}-*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()
    result = json.loads(log.splitlines()[-1])
    [curve] = run.glob("*_curve.csv")
    return {
        "files": sorted(path.name for path in run.iterdir()),
        "v": (run / "adapter_model.safetensors").read_bytes(),
        "curve": curve.read_text(),
        "result": {key: value for key, value in result.items() if not key.endswith("seconds")},
        "last checkpoint": (run / "checkpoint-5" / "optimizer.pt").read_bytes(),
    }


def test_recipes_killed_at_chosen_and_at_random_points_and_resumed(
    tiny_model_dir, problem_files, tmp_path, record_property
):
    shares = random.Random(0)
    kills = [
        ("grpo", "generate", 1),  # while the base is scored
        ("grpo", "backward", 2),  # with completions that are used up only two steps later
        ("grpo", "half", 12),  # in the second checkpoint
        ("grpo", "generate", 4),  # while completions are made
        ("grpo", "rename", 11),  # between the adapter's config and its weights
        ("grpo", "generate", 5),  # while the finished adapter is scored
        ("sft", "optimizer", 3),
        *((recipe, "file", shares.random()) for recipe in ("grpo", "sft")),
    ]
    killed_and_resumed(kills, tiny_model_dir, problem_files, tmp_path)
    record_property("faults survived", len(kills))


@pytest.mark.slow
def test_recipes_killed_at_many_random_points_and_resumed(tiny_model_dir, problem_files, tmp_path, record_property):
    shares = random.Random(1)
    places = ("file", "half", "backward", "optimizer", "generate")
    kills = [(shares.choice(("grpo", "sft")), shares.choice(places), shares.random()) for _ in range(40)]
    killed_and_resumed(kills, tiny_model_dir, problem_files, tmp_path)
    record_property("faults survived", len(kills))


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_and_resumed(tiny_model_dir, problem_files, tmp_path, record_property):
    kills = [("grpo", "half", 14), ("grpo", "backward", 4), ("sft", "optimizer", 5), ("sft", "file", 0.5)]
    killed_and_resumed(kills, tiny_model_dir, problem_files, tmp_path, processes=2)
    record_property("faults survived", len(kills))
