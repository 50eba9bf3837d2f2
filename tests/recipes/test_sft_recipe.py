"""The recipe as a user runs it: `accelerate launch`, two steps of a tiny model, and what is left behind."""

import json
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, get_peft_model
from recipes.runs import Run, check_v, launch_tiny, logged_v, score_again
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_tinylora  # noqa: F401  registers the tuner
from peft_tinylora.published import relative
from trl_recipes import sft
from trl_recipes.arguments import RecipeError


pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def launch(tiny_model_dir) -> Callable[..., Run]:
    return partial(launch_tiny, "sft", tiny_model_dir)


@pytest.fixture(scope="module")
def solved_file(problem_files, tmp_path_factory) -> str:
    """The training problems, each with a completion that marks its answer."""
    rows = [json.loads(line) for line in problem_files[0].read_text().splitlines()]
    file = tmp_path_factory.mktemp("solved") / "train.jsonl"
    file.write_text("".join(json.dumps(row | {"completion": f" #### {row['answer']}"}) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def run(launch, solved_file, problem_files, tmp_path_factory) -> Run:
    return launch(
        *(tmp_path_factory.mktemp("recipe") / "tiny_sft", "--seed", "3"),
        *("--dataset_name", solved_file, "--eval_dataset_name", str(problem_files[1])),
        *("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"),
    )


def gradient_at_the_start(run: Run, base_folder, solved_file: str) -> torch.Tensor:
    """Of the mean loss over all training examples, in v: shape (4,)."""
    rows = [json.loads(line) for line in open(solved_file)]
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = tokenizer([f"{row['prompt']}{row['completion']} <eos>" for row in rows], return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"].shape[1]] = -100
    config = PeftConfig.from_pretrained(run.folder)
    config.inference_mode = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    model(input_ids=ids, labels=labels).loss.backward()
    return torch.cat([v.grad for v in model.tinylora_v["default"].values()])


def test_the_last_line_of_the_output_is_the_result_as_json(run):
    result = run.result
    assert set(result) == {
        *("method", "trained_parameters", "greedy_before", "greedy_after", "sampled_before", "sampled_after"),
        *("greedy_answers_sha256", "problems", "sft_seconds", "total_seconds", "adapter_bytes", "pushed"),
    }
    assert result["trained_parameters"] == 4  # 2 layers of 7 modules, 4 to a number
    assert result["problems"] == 40
    assert all(0 <= result[f"{decoding}_before"] <= 1 for decoding in ("greedy", "sampled"))
    assert 0 < result["sft_seconds"] < result["total_seconds"]
    assert result["adapter_bytes"] == (run.folder / "adapter_model.safetensors").stat().st_size


def test_the_first_step_makes_the_marked_answers_likelier(run, tiny_model_dir, solved_file):
    """Downhill of all examples. How far two steps of this size get, depends on the tiny model, and that on the machine."""
    first = torch.tensor([float(run.curve[0][f"v_{i}"]) for i in range(4)])
    gradient = gradient_at_the_start(run, tiny_model_dir, solved_file)
    assert gradient.abs().max() > 1e-3
    assert first @ gradient < 0


def test_a_resumed_run_ends_where_the_whole_run_did(launch, solved_file, problem_files, tmp_path, run):
    resumed = launch(
        *(tmp_path, "--seed", "3", "--dataset_name", solved_file, "--eval_dataset_name", str(problem_files[1])),
        *("--resume_from_checkpoint", str(run.folder / "checkpoint-1")),
    )
    assert [row["step"] for row in resumed.curve] == ["2"]
    assert resumed.curve[-1] == run.curve[-1]
    same = ("greedy_before", "greedy_after", "sampled_before", "sampled_after")
    assert [resumed.result[key] for key in same] == [run.result[key] for key in same]


def test_a_run_leaves_its_files_and_nothing_else(run):
    assert {path.name for path in run.folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "loss_curve.csv", "loss_curve.png"),
        *("recipe.yaml", ".card.json", "checkpoint-1", "checkpoint-2"),
    }
    assert (run.folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_v_moved_and_was_saved_in_fp32(run, tiny_model_dir):
    check_v(run, tiny_model_dir)


def test_the_saved_adapter_scores_the_same_in_another_process(run):
    again = score_again(run)
    assert again["greedy"] == run.result["greedy_after"]
    assert again["greedy_answers_sha256"] == run.result["greedy_answers_sha256"]
    assert again["sampled"] == run.result["sampled_after"]
    assert (again["problems"], again["dtype"], again["device"]) == (40, "torch.float32", "cpu")


def test_the_terminal_shows_the_numbers_and_no_warning(run):
    for i in range(4):
        assert f"{float(run.curve[-1][f'v_{i}']):+.5f}" in run.stdout
    assert f"greedy {run.result['greedy_before']:.1%}" in run.stdout
    assert f"loss {float(run.curve[-1]['loss']):.3f}" in run.stdout
    assert "Warning" not in run.stderr


def test_the_card_says_what_was_measured(run):
    card = ModelCard.load(run.folder / "README.md")
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics == {
        "accuracy, greedy": round(run.result["greedy_after"], 4),
        "accuracy, sampled": round(run.result["sampled_after"], 4),
    }
    assert {"tinylora", "sft", "trl"} <= set(card.data.tags)
    assert f"| greedy | {run.result['greedy_before']:.1%} | {run.result['greedy_after']:.1%} |" in card.text
    for part in run.command[run.command.index("trl_recipes/sft.py") :]:
        assert relative(part) in card.text  # without the folders of this machine
    assert "| examples a step | 32 |" in card.text
    assert "`loss_curve.csv`" in card.text


@pytest.mark.parametrize("quantized", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_of_a_quantized_base_answers_the_same_on_one_quantized_anew(
    launch, solved_file, problem_files, tmp_path, quantized
):
    """The adapter gives the same answers on a base quantized anew, in a new process, and v was never rounded."""
    run = launch(
        *(tmp_path, "--dataset_name", solved_file, "--eval_dataset_name", str(problem_files[1])),
        *(f"--{quantized}", "true"),
    )
    logged_v(run, 4)
    assert "MatMul8bitLt" not in run.stderr and "Warning" not in run.stderr
    again = score_again(run)
    for when, decoding in (("greedy", "greedy_after"), ("sampled", "sampled_after")):
        assert again[when] == run.result[decoding]
    assert again["greedy_answers_sha256"] == run.result["greedy_answers_sha256"]


def fail(monkeypatch, *options: str) -> str:
    """Runs `main` in this process and returns its one line of complaint."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--use_cpu", "true", "--bf16", "false", *options])
    with pytest.raises(RecipeError) as error:
        sft.main()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_each_mistake_in_the_options_is_one_line_and_leaves_nothing(
    monkeypatch, tmp_path, tiny_model_dir, problem_files
):
    folder = ("--output_dir", str(tmp_path))
    model = ("--model_name_or_path", str(tiny_model_dir))
    assert "no model: set model_name_or_path" in fail(monkeypatch, *folder)
    assert "no problems to train on" in fail(monkeypatch, *folder, *model)
    files = ("--dataset_name", str(problem_files[0]), "--eval_dataset_name", str(problem_files[1]))
    assert "no column 'question'" in fail(monkeypatch, *folder, *model, *files, "--question_column", "question")
    missing = fail(monkeypatch, *folder, *model, *files, "--completion_column", "solution")
    assert "no column 'solution'" in missing and "set completion_column" in missing
    assert "chat: true needs" in fail(monkeypatch, *folder, *model, *files, "--chat", "true")
    assert "lora_r: LoRA options" in fail(monkeypatch, *folder, *model, *files, "--lora_r", "4")
    evaluated = fail(monkeypatch, *folder, *model, *files[:2], "--eval_strategy", "steps", "--eval_steps", "1")
    assert "eval_strategy needs held-out rows" in evaluated
    assert "tie='loose'" in fail(monkeypatch, *folder, *model, *files, "--tinylora_tie", "loose")
    assert list(tmp_path.iterdir()) == []
