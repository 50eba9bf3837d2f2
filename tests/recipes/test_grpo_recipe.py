"""The recipe as a user runs it: `accelerate launch`, two steps of a tiny model, and what is left behind."""

import json
import sys
from collections.abc import Callable
from functools import partial

import pytest
from huggingface_hub import ModelCard
from recipes.runs import Run, check_v, in_new_process, launch_tiny, logged_v, score_again
from support import warm_python

import peft_tinylora  # registers the tuner
from peft_tinylora.published import relative
from trl_recipes import grpo
from trl_recipes.arguments import RecipeError


pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def launch(tiny_model_dir) -> Callable[..., Run]:
    return partial(launch_tiny, "grpo", tiny_model_dir)


@pytest.fixture(scope="module")
def run(launch, problem_files, tmp_path_factory) -> Run:
    train, held_out = map(str, problem_files)
    folder = tmp_path_factory.mktemp("recipe") / "tiny_grpo"
    return launch(
        *(folder, "--dataset_name", train, "--eval_dataset_name", held_out, "--seed", "3"),
        *("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"),
        is_new=True,
    )


def test_the_last_line_of_the_output_is_the_result_as_json(run):
    result = run.result
    assert set(result) == {
        *("method", "trained_parameters", "greedy_before", "greedy_after", "sampled_before", "sampled_after"),
        *("greedy_answers_sha256", "problems", "grpo_seconds", "total_seconds", "adapter_bytes", "pushed"),
    }
    assert result["trained_parameters"] == 4  # 2 layers of 7 modules, 4 to a number
    assert result["problems"] == 40
    assert all(0 <= result[f"{decoding}_before"] <= 1 for decoding in ("greedy", "sampled"))
    assert 0 < result["grpo_seconds"] < result["total_seconds"]
    assert result["adapter_bytes"] == (run.folder / "adapter_model.safetensors").stat().st_size


def test_a_resumed_run_ends_where_the_whole_run_did(launch, problem_files, tmp_path, monkeypatch, run):
    train, held_out = map(str, problem_files)
    monkeypatch.setenv("TINYLORA_DEMO_START", "1000000000")
    resumed = launch(
        *(tmp_path, "--dataset_name", train, "--eval_dataset_name", held_out, "--seed", "3"),
        *("--resume_from_checkpoint", str(run.folder / "checkpoint-1")),
    )
    assert [row["step"] for row in resumed.curve] == ["2"]
    assert resumed.curve[-1] == run.curve[-1]
    same = ("greedy_before", "greedy_after", "sampled_before", "sampled_after")
    assert [resumed.result[key] for key in same] == [run.result[key] for key in same]
    assert resumed.result["total_seconds"] > 5e8  # the clock that make started


def test_a_run_leaves_its_files_and_nothing_else(run):
    assert {path.name for path in run.folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "reward_curve.csv", "reward_curve.png"),
        *("recipe.yaml", ".card.json", "checkpoint-1", "checkpoint-2"),
    }
    assert (run.folder / "reward_curve.png").read_bytes().startswith(b"\x89PNG")


def test_v_moved_and_was_saved_in_fp32(run, tiny_model_dir):
    rows = run.curve
    assert any(float(row["reward_std"]) > 0 for row in rows), "the tiny model earns nothing: the test shows nothing"
    check_v(run, tiny_model_dir)


def test_the_saved_adapter_scores_the_same_in_a_new_process(run):
    again = score_again(run, is_new=True)
    assert again["greedy"] == run.result["greedy_after"]
    assert again["greedy_answers_sha256"] == run.result["greedy_answers_sha256"]
    assert again["sampled"] == run.result["sampled_after"]
    assert (again["problems"], again["dtype"], again["device"]) == (40, "torch.float32", "cpu")


def test_the_terminal_shows_the_numbers_and_how_to_try_them(run, problem_files):
    rows = run.curve
    for i in range(4):
        assert f"{float(rows[-1][f'v_{i}']):+.5f}" in run.stdout
    assert f"greedy {run.result['greedy_before']:.1%}" in run.stdout
    assert "Warning" not in run.stderr
    code = run.stdout.split("try it:\n\n")[1].rpartition("{")[0]
    finished = in_new_process(*warm_python(), "-c", code)
    assert finished.returncode == 0, finished.stderr
    question = json.loads(problem_files[1].read_text().splitlines()[0])["prompt"]
    assert finished.stdout.startswith(question)
    assert len(finished.stdout.strip()) > len(question)


def test_the_card_says_what_was_measured(run):
    card = ModelCard.load(run.folder / "README.md")
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics == {
        "accuracy, greedy": round(run.result["greedy_after"], 4),
        "accuracy, sampled": round(run.result["sampled_after"], 4),
    }
    assert card.data.library_name == "peft"
    assert {"tinylora", "grpo", "trl"} <= set(card.data.tags)
    metadata = card.content.split("---")[1]
    assert "base_model" not in metadata and "datasets" not in metadata and "/" not in metadata.replace("text-gen", "")
    assert f"| greedy | {run.result['greedy_before']:.1%} | {run.result['greedy_after']:.1%} |" in card.text
    for i in range(4):
        assert f"{float(run.curve[-1][f'v_{i}']):+.6f}" in card.text
    for part in run.command[run.command.index("trl_recipes/grpo.py") :]:
        assert relative(part) in card.text  # without the folders of this machine
    assert "| learning rate | 0.05, linear |" in card.text
    assert peft_tinylora.__version__ in card.text
    [line] = [line for line in run.stdout.splitlines() if line.startswith("score it again: ")]
    assert line.removeprefix("score it again: ") in card.text


def test_an_adapter_of_a_4bit_base_answers_the_same_on_one_quantized_anew(launch, problem_files, tmp_path):
    """The adapter gives the same answers on a base quantized anew, in a new process, and v was never rounded."""
    run = launch(
        *(tmp_path, "--dataset_name", str(problem_files[0]), "--eval_dataset_name", str(problem_files[1])),
        *("--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", "true"),
    )
    logged_v(run, 4)
    assert "bitsandbytes" not in run.stderr and "Warning" not in run.stderr
    again = score_again(run)
    for when, decoding in (("greedy", "greedy_after"), ("sampled", "sampled_after")):
        assert again[when] == run.result[decoding]
    assert again["greedy_answers_sha256"] == run.result["greedy_answers_sha256"]


def fail(monkeypatch, *options: str) -> str:
    """Runs `main` in this process and returns its one line of complaint."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--use_cpu", "true", "--bf16", "false", *options])
    with pytest.raises(RecipeError) as error:
        grpo.main()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_each_mistake_in_the_options_is_one_line_and_leaves_nothing(
    monkeypatch, tmp_path, tiny_model_dir, problem_files
):
    folder = ("--output_dir", str(tmp_path))
    model = ("--model_name_or_path", str(tiny_model_dir))
    assert "no model: set model_name_or_path" in fail(monkeypatch, *folder)
    assert "cannot load the tokenizer of './nowhere' (no such folder" in fail(
        monkeypatch, *folder, "--model_name_or_path", "./nowhere"
    )
    assert "no problems to train on" in fail(monkeypatch, *folder, *model)
    assert "no dataset file 'nowhere.jsonl'" in fail(monkeypatch, *folder, *model, "--dataset_name", "nowhere.jsonl")
    files = ("--dataset_name", str(problem_files[0]), "--eval_dataset_name", str(problem_files[1]))
    assert "no column 'question'" in fail(monkeypatch, *folder, *model, *files, "--question_column", "question")
    assert "chat: true needs" in fail(monkeypatch, *folder, *model, *files, "--chat", "true")
    assert "lora_r: LoRA options" in fail(monkeypatch, *folder, *model, *files, "--lora_r", "4")
    assert "tie='loose'" in fail(monkeypatch, *folder, *model, *files, "--tinylora_tie", "loose")
    assert list(tmp_path.iterdir()) == []
