"""methods.py: baselines beside TinyLoRA, in both recipes: what is trained, saved, resumed and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipes.runs import ROOT, Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_recipes import grpo, sft
from trl_recipes.arguments import RecipeError, parse
from trl_recipes.methods import finished_in, lora_config, peft_config_of, refuse_unread_options, remarks
from trl_recipes.problems import load_rows
from trl_recipes.score import score


pytestmark = [pytest.mark.recipe, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]
RECIPES = {"grpo": grpo, "sft": sft}
METHODS = {
    "lora": ("--lora_r", "1", "--lora_alpha", "1", "--learning_rate", "0.02"),
    "lora-xs": ("--lora_r", "2", "--learning_rate", "0.02"),
    "full": ("--learning_rate", "0.0003"),
}
# Of the tiny model, two layers: q (64, 64), k and v (32, 64), o (64, 64), gate and up (128, 64), down (64, 128).
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
OF_LORA = 2 * sum(rows + columns for rows, columns in SHAPES)
OF_LORA_XS = 2 * 7 * 4
VOCABULARY = 26
# Beside the linear layers: embeddings and output layer, two norms a layer and the last one.
OF_FULL = 2 * sum(rows * columns for rows, columns in SHAPES) + 2 * VOCABULARY * 64 + 5 * 64


@pytest.fixture(scope="module")
def here(tiny_model_dir, problem_files, tmp_path_factory) -> Callable[..., Run]:
    """Runs a recipe in this process, for a few steps of the tiny model."""
    rows = [json.loads(line) for line in problem_files[0].read_text().splitlines()]
    solved = tmp_path_factory.mktemp("solved") / "train.jsonl"
    solved.write_text("".join(json.dumps(row | {"completion": f" #### {row['answer']}"}) + "\n" for row in rows))

    def here(recipe: str, folder: Path, *options: str) -> Run:
        command = [
            *(f"{recipe}.py", "--config", f"trl_recipes/configs/embedded_{recipe}.yaml", "--output_dir", str(folder)),
            *("--overwrite_output_dir", "false", "--model_name_or_path", str(tiny_model_dir), "--max_steps", "4"),
            *("--dataset_name", str(solved if recipe == "sft" else problem_files[0]), "--seed", "3"),
            *("--eval_dataset_name", str(problem_files[1]), "--score_batch_size", "16"),
            *("--per_device_train_batch_size", "32", "--max_completion_length", "6", *options),
        ]
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr("sys.argv", command)
            patch.setattr("builtins.print", lambda *words, **kwargs: printed.append(" ".join(map(str, words))))
            RECIPES[recipe].main()
        return Run(folder, command, "\n".join(printed))

    return here


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Run]:
    """Those that were made so far."""
    return {}


ALL = [(recipe, method) for recipe in ("sft", "grpo") for method in METHODS]


@pytest.fixture(params=ALL, ids="-".join)
def run(request, here, runs, tmp_path_factory) -> Run:
    recipe, method = request.param
    if request.param not in runs:
        runs[request.param] = here(
            *(recipe, tmp_path_factory.mktemp("run") / method, "--method", method, *METHODS[method]),
            *("--save_strategy", "steps", "--save_steps", "2"),
        )
    return runs[request.param]


def recipe_of(run: Run) -> str:
    return run.command[0].removesuffix(".py")


def load(run: Run, tiny_model_dir: Path) -> torch.nn.Module:
    """What a run left, loaded as any program would."""
    if run.result["method"] == "full":
        return AutoModelForCausalLM.from_pretrained(run.folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), run.folder)


def test_as_many_numbers_are_trained_as_the_method_has(run):
    expected = {"lora": OF_LORA, "lora-xs": OF_LORA_XS, "full": OF_FULL}
    assert run.result["trained_parameters"] == expected[run.result["method"]]
    assert f"training {run.result['trained_parameters']} numbers in fp32" in run.stdout


def loss_of_marked_answers(model: torch.nn.Module, folder: Path, rows: list[dict]) -> float:
    """Mean over the completions that SFT learns from, in nats a token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([f"{row['prompt']} #### {row['answer']} <eos>" for row in rows], return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :-3] = -100
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=labels).loss.item()


def test_training_makes_marked_answers_likelier_or_changes_their_loss(run, tiny_model_dir, problem_files):
    """SFT makes the marked answers likelier. So does GRPO's reward, but not for sure in four steps: there, it changes."""
    rows = [json.loads(line) for line in problem_files[0].read_text().splitlines()]
    before = loss_of_marked_answers(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tiny_model_dir, rows)
    after = loss_of_marked_answers(load(run, tiny_model_dir), tiny_model_dir, rows)
    assert after < before - 0.01 if recipe_of(run) == "sft" else abs(after - before) > 1e-5
    assert [row["step"] for row in run.curve] == ["1", "2", "3", "4"]
    assert all(float(row["grad_norm"]) > 0 for row in run.curve)
    assert not [column for column in run.curve[0] if column.startswith("v_")]


def test_what_was_scored_is_what_any_program_loads(run, tiny_model_dir, problem_files):
    folder = run.folder if run.result["method"] == "full" else tiny_model_dir
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    problems = list(load_rows(str(problem_files[1])))
    settings = {"batch_size": 16, "max_completion_length": 6}
    again = score(load(run, tiny_model_dir), tokenizer, problems, **settings)
    assert again.fraction == run.result["greedy_after"]
    assert again.answers_sha256 == run.result["greedy_answers_sha256"]
    base = score(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tokenizer, problems, **settings)
    assert base.fraction == run.result["greedy_before"]


def test_a_run_leaves_its_files_and_nothing_else(run):
    curve = "loss" if recipe_of(run) == "sft" else "reward"
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    if run.result["method"] == "full":
        weights = {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    report = {f"{curve}_curve.csv", f"{curve}_curve.png", "recipe.yaml"}
    assert {path.name for path in run.folder.iterdir()} == weights | report | {"checkpoint-2", "checkpoint-4"}
    is_adapter = "adapter_model.safetensors" in weights
    assert (run.result["adapter_bytes"] is not None) == is_adapter
    [line] = [line for line in run.stdout.splitlines() if line.startswith("score it again")]
    assert (
        f"{'--adapter' if is_adapter else '--model_name_or_path'} {run.folder}" in line
        and "lora" not in line.split(" --dataset ")[1]
    )


@pytest.mark.parametrize(
    "run", [("sft", "lora"), ("sft", "lora-xs"), ("sft", "full"), ("grpo", "lora-xs")], indirect=True, ids="-".join
)
def test_a_resumed_run_ends_where_the_whole_run_did(run, here, tmp_path):
    method = run.result["method"]
    checkpoint = str(run.folder / "checkpoint-2")
    resumed = here(
        recipe_of(run), tmp_path, "--method", method, *METHODS[method], "--resume_from_checkpoint", checkpoint
    )
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    expected, found = load_file(run.folder / name), load_file(tmp_path / name)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert [row["step"] for row in resumed.curve] == ["3", "4"]


@pytest.mark.parametrize("run", [("sft", "lora"), ("sft", "full")], indirect=True, ids="-".join)
def test_a_finished_model_is_kept_and_another_method_leaves_nothing_of_it(here, run, tmp_path):
    kind, other = ("model", "lora") if run.result["method"] == "full" else ("adapter", "full")
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    short = ("--method", other, "--max_steps", "1", "--max_eval_problems", "2", "--learning_rate", "0.001")
    with pytest.raises(RecipeError, match=f"already holds a finished {kind}: choose another output_dir"):
        here(recipe_of(run), folder, *short)
    assert {path.name for path in folder.iterdir()} == {p.name for p in run.folder.iterdir() if p.is_file()}
    here(recipe_of(run), folder, *short, "--overwrite_output_dir", "true")
    assert finished_in(folder, None) == ("adapter" if kind == "model" else "model")
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not (model if kind == "model" else adapter) & {path.name for path in folder.iterdir()}


def test_v_in_bf16_stays_on_its_grid_and_in_fp32_does_not(here, tmp_path):
    options = ("--learning_rate", "0.01", "--save_strategy", "steps", "--save_steps", "2")
    rounded = here("sft", tmp_path / "bf16", *options, "--tinylora_dtype", "bfloat16")
    assert "training 4 numbers in bf16" in rounded.stdout
    assert "small beside v round to nothing" in rounded.stdout
    exact = here("sft", tmp_path / "fp32", *options)

    def steps(run: Run) -> torch.Tensor:
        return torch.tensor([[float(row[f"v_{i}"]) for i in range(4)] for row in run.curve])

    assert torch.equal(steps(rounded).bfloat16().float(), steps(rounded))
    assert not torch.equal(steps(exact).bfloat16().float(), steps(exact))
    assert (steps(rounded)[-1] != 0).all()
    state = torch.load(tmp_path / "bf16" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.bfloat16}  # what the optimizer steps

    # the file: in tinylora_save_dtype, the numbers that were trained
    [v] = load_file(tmp_path / "bf16" / "adapter_model.safetensors").values()
    assert v.dtype == torch.float32 and torch.equal(v.flatten(), steps(rounded)[-1])
    resumed = here(
        *("sft", tmp_path / "resumed", *options, "--tinylora_dtype", "bfloat16", "--tinylora_save_dtype", "bfloat16"),
        *("--resume_from_checkpoint", str(tmp_path / "bf16" / "checkpoint-2")),
    )
    [again] = load_file(tmp_path / "resumed" / "adapter_model.safetensors").values()
    assert again.dtype == torch.bfloat16 and torch.equal(again.float(), v)
    assert resumed.result["greedy_answers_sha256"] == rounded.result["greedy_answers_sha256"]


# --- options
def parsed(recipe: str, *options: str) -> tuple:
    return parse(RECIPES[recipe].ARGUMENT_CLASSES, "", ["--output_dir", "x", "--bf16", "false", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method lora-xs --lora_alpha 8", "^lora_alpha: LoRA-XS has none of these and reads lora_r"),
        ("--method lora-xs --use_dora true", "^use_dora: LoRA-XS"),
        ("--method full --lora_r 8", "^lora_r: LoRA options, and full fine-tuning has no adapter"),
        ("--method full --use_peft true", "^use_peft with method: full"),
        ("--method full --load_in_4bit true", "^method: full on a quantized base.*set method: lora"),
        ("--method full --load_in_8bit true", "^method: full on a quantized base"),
        ("--method lora --lora_r 0", "^lora_r=0: must be 1 or more"),
        ("--method lora-xs --lora_dropout 1", "^lora_dropout=1.0: must be"),
        ("--method lora --push_to_hub true", "^push_to_hub with method: lora.*hf upload"),
        ("--method lora --rollout vllm", "^rollout: vllm with method: lora.*use_vllm"),
        ("--lora_r 8", "^lora_r: LoRA options, and this recipe trains TinyLoRA"),
    ],
)
def test_options_that_a_method_does_not_heed_are_refused_by_name(options, message):
    recipe_args, training_args, model_args, *_ = parsed("grpo", *options.split())
    with pytest.raises(RecipeError, match=message):
        refuse_unread_options(recipe_args, training_args, model_args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method lora_xs", "^method='lora_xs': allowed are 'tinylora', 'lora', 'lora-xs', 'full'"),
        ("--tinylora_dtype float16", "^tinylora_dtype='float16': allowed are 'float32', 'bfloat16'"),
    ],
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(RecipeError, match=message):
        parsed("sft", *options.split())


def test_options_of_a_lora_are_trls():
    *_, model_args, _, _ = parsed("sft", "--lora_r", "8", "--use_rslora", "true", "--model_revision", "v1")
    config = lora_config("lora", model_args)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 32, 0.05, True)
    assert (config.target_modules, config.revision) == ("all-linear", "v1")
    *_, model_args, _, _ = parsed("sft", "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj")
    config = lora_config("lora-xs", model_args)
    assert (config.r, config.lora_alpha, config.use_rslora, config.revision) == (8, 8, False, None)
    assert config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("method", ["tinylora", "lora"])
def test_modules_that_the_model_does_not_have_are_refused_by_name(method, tiny_llama):
    option = f"{method}_target_modules"
    *_, model_args, _, tinylora_args = parsed("sft", f"--{option}", "c_attn")
    with pytest.raises(RecipeError, match=f"^{option}='c_attn': the model has no such module"):
        peft_config_of(method, tinylora_args, model_args, tiny_llama())


def test_what_is_not_read_is_said():
    recipe_args, _, model_args, _, tinylora_args = parsed("grpo", "--method", "lora", "--tinylora_n_tie", "4")
    assert remarks(recipe_args, model_args, tinylora_args) == ["method: lora does not read tinylora_n_tie"]
    recipe_args, _, model_args, _, tinylora_args = parsed("grpo", "--method", "full", "--dtype", "bfloat16")
    [line] = remarks(recipe_args, model_args, tinylora_args)
    assert line.startswith("method: full with dtype: bfloat16")
    recipe_args, _, model_args, _, tinylora_args = parsed("grpo", "--tinylora_n_tie", "4")
    assert remarks(recipe_args, model_args, tinylora_args) == []
