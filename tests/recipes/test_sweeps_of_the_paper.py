"""The sweeps of the paper: what each point trains, counted on the model's shape, against the numbers that the paper has."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

import trl_recipes
from benchmarks.shapes import shape_of
from peft_tinylora.targets import target_names
from peft_tinylora.tying import group_modules
from trl_recipes import grpo, rollouts, sft
from trl_recipes.arguments import RecipeError, parse, refuse_quantization_options
from trl_recipes.methods import peft_config_of, refuse_unread_options
from trl_recipes.problems import build_prompt
from trl_recipes.sweep_file import Sweep, load_sweep
from trl_recipes.trainer_setup import count_trained, refuse_rounding_options


ROOT = Path(trl_recipes.__file__).parents[1]
FOLDER = ROOT / "trl_recipes" / "sweeps" / "paper"
FIGURES = FOLDER / "figures.yaml"
FILES = sorted(path for path in FOLDER.glob("[!_]*.yaml") if path != FIGURES)
SWEEPS = {path.stem: load_sweep(path, ROOT) for path in FILES}
RECIPES = {"grpo": grpo.ARGUMENT_CLASSES, "sft": sft.ARGUMENT_CLASSES}
RATES = [1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4]  # the paper, section 5.1

# What the points train that are not named after it, from the axes of the paper's figures (shared/paper.md).
COUNTS = {
    "figure_4_tiled": [8, 16, 32, 63, 126, 252] * 2,
    "figure_4_structured": [14, 21, 35, 63, 126] * 2,
    "figure_7_qwen2.5-3b": [252, 1008, 4032, 16128] * 4,
    "figure_7_llama-3.2-3b": [196, 784, 3136, 12544] * 4,
    "figure_8_qwen2.5-3b": [252, 1008, 4032, 16128, 32, 128, 512, 2048, 4, 16, 64, 256, 1, 4, 16, 64],
    "figure_8_llama-3.2-3b": [196, 784, 3136, 12544, 25, 100, 400, 1600, 4, 16, 64, 256, 1, 4, 16, 64],
    "table_2_full": [3_085_938_688, 7_615_616_512, 7_615_616_512],
}
# Grids that meet: the points of figure 8 that are figure 4's too.
TWICE = {
    ("figure_8_qwen2.5-3b", "tinylora_n_tie=1,tinylora_u=1"),
    ("figure_8_qwen2.5-3b", "tinylora_n_tie=8,tinylora_u=1"),
}

# transformers 5.23 renamed gradient_checkpointing; TRL 1.16 still sets the old name. Remove when it does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def shape(model_id: str):
    """The config of a model: of benchmarks/shapes.py, or of a model that only the paper has."""
    if model_id == "Qwen/Qwen2.5-Math-7B":
        return shape_of("Qwen/Qwen2.5-7B-Instruct")
    if model_id == "Qwen/Qwen3-8B":
        return Qwen3Config(
            hidden_size=4096,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=12288,
            vocab_size=151936,
            tie_word_embeddings=False,
        )
    return shape_of(model_id)


@pytest.fixture(scope="module")
def meta_model():
    """Model id -> the model on the meta device, made once."""
    models = {}

    def get(model_id: str) -> torch.nn.Module:
        if model_id not in models:
            with torch.device("meta"):
                models[model_id] = AutoModelForCausalLM.from_config(shape(model_id))
        return models[model_id]

    return get


def parse_run(sweep: Sweep, options: dict, folder: Path) -> tuple:
    """The arguments of a run by its recipe's own parser, on the CPU so that it parses anywhere."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(dict(options)))
    return parse(RECIPES[sweep.recipe], "usage", ["--config", str(path), "--use_cpu", "true"])


def trained(arguments: tuple, model: torch.nn.Module) -> int:
    """Counts what a run trains, on a model without weights."""
    recipe_args, _, model_args, _, tinylora_args = arguments
    if recipe_args.method == "full":
        return sum(p.numel() for p in model.parameters())
    config = peft_config_of(recipe_args.method, tinylora_args, model_args, model)
    names = target_names(model, config)
    if recipe_args.method == "tinylora":
        return len(set(group_modules(names, config.tie, config.n_tie).values())) * config.u
    if recipe_args.method == "lora-xs":
        return len(names) * config.r**2
    return config.r * sum(sum(model.get_submodule(name).weight.shape) for name in names)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_is_accepted_and_trains_what_the_paper_counts(name, meta_model, tmp_path, monkeypatch):
    sweep = SWEEPS[name]
    first = {run.point: run for run in sweep.first_runs()}
    counts = COUNTS.get(name) or [int(point) for point in sweep.points]
    found = []
    for point in sweep.points:
        arguments = recipe_args, training_args, model_args, _, tinylora_args = parse_run(
            sweep, first[point].options, tmp_path
        )
        refuse_unread_options(recipe_args, training_args, model_args)
        refuse_quantization_options(model_args, getattr(training_args, "use_vllm", False))
        if sweep.recipe == "grpo":
            refuse_rounding_options(training_args)
            monkeypatch.setattr(rollouts, "ColocatedVllm", lambda *args: None)
            rollouts.make_rollouts(recipe_args, training_args, model_args, tinylora_args)
        found.append(trained(arguments, meta_model(model_args.model_name_or_path)))
    assert found == counts


def test_pefts_own_lora_has_as_many_parameters_as_are_counted_here(meta_model, tmp_path):
    sweep = SWEEPS["figure_3_qwen2.5-0.5b_lora"]
    arguments = parse_run(sweep, sweep.first_runs()[-1].options, tmp_path)
    model = copy.deepcopy(meta_model(arguments[2].model_name_or_path))
    adapted = get_peft_model(model, peft_config_of("lora", arguments[-1], arguments[2], model), low_cpu_mem_usage=True)
    assert count_trained(adapted) == trained(arguments, meta_model(arguments[2].model_name_or_path)) == 2_199_552


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_the_papers_protocol(name, tmp_path):
    sweep = SWEEPS[name]
    runs = [(run.point, run.learning_rate, run.stage) for run in sweep.first_runs()]
    assert runs == [(point, rate, "measure") for point in sweep.points for rate in RATES for _ in range(3)]
    assert sweep.left_open
    assert any("rates" in line or "Learning rate" in line for line in sweep.left_open)
    assert all(0 < share < 1 for share in sweep.reported.values())
    recipe_args, training_args, model_args, *_ = parse_run(sweep, sweep.first_runs()[0].options, tmp_path)
    assert not (model_args.load_in_4bit or model_args.load_in_8bit)
    assert training_args.num_train_epochs == 3
    if sweep.recipe == "sft":
        assert (recipe_args.dataset_name, recipe_args.completion_column) == ("openai/gsm8k", None)
        return
    completions = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    found = (completions, training_args.num_generations, training_args.max_completion_length, training_args.beta)
    assert found == ((256, 8, 3072, 0.001) if "table_2" in name else (64, 4, 4096, 0.0))
    assert training_args.generation_batch_size == completions  # none of an older policy
    assert training_args.vllm_importance_sampling_mode == "token_truncate"
    assert training_args.temperature == 1.0
    assert sweep.evaluate == (
        ["gsm8k", "math500", "minerva", "olympiadbench", "aime24", "amc23"] if "table_2" in name else []
    )


def test_the_prompt_of_math_is_simplerls(tmp_path):
    sweep = SWEEPS["table_2_qwen2.5-7b"]
    arguments = parse_run(sweep, sweep.first_runs()[0].options, tmp_path)[0]
    assert build_prompt("What is $\\frac{1}{2}$?", arguments.prompt_template, arguments.chat) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is $\\frac{1}{2}$?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_no_run_is_there_twice_but_where_two_grids_meet():
    seen, twice = {}, set()
    for name, sweep in SWEEPS.items():
        for point, own in sweep.points.items():
            options = {"tinylora_dtype": "float32", **sweep.config, **own}
            if options["tinylora_n_tie"] == 1:
                options["tinylora_tie"] = "tiled"  # nothing is shared, whatever the way
            key = (sweep.recipe, yaml.safe_dump(options))
            if key in seen:
                twice.add((name, point))
            seen[key] = (name, point)
    assert twice == TWICE


def test_what_sweeps_share_is_no_sweep():
    shared = sorted(FOLDER.glob("_*.yaml"))
    assert shared
    for path in shared:
        with pytest.raises(RecipeError, match="reproduces is missing"):
            load_sweep(path, ROOT)


def test_the_readme_has_every_sweep_with_its_points_and_runs():
    rows = {}
    for line in (FOLDER.parent / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[1].startswith("`"):
            rows[cells[1].strip("`")] = (int(cells[2]), int(cells[3]))
    assert rows == {name: (len(sweep.points), len(sweep.first_runs())) for name, sweep in SWEEPS.items()}


def sweeps_named(value: object) -> set[str]:
    """Every sweep that a file of figures names, at any depth."""
    if isinstance(value, list):
        return set().union(*map(sweeps_named, value))
    if not isinstance(value, dict):
        return set()
    return {*value.get("sweeps", []), *sweeps_named(list(value.values()))}


def test_the_figures_show_every_sweep_of_a_figure():
    figures = yaml.safe_load(FIGURES.read_text())
    assert list(figures) == [f"figure_{number}" for number in range(1, 10)]
    of_no_figure = {"table_2_qwen2.5-math-7b", "table_2_full", "text_qwen3-8b"}
    assert sweeps_named(figures) == SWEEPS.keys() - of_no_figure
