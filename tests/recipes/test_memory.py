"""The memory formula, against the models that it is about, the figures in the recipes' YAML, and real training steps."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks import memory, training
from benchmarks.shapes import CONFIGS, shape_of
from benchmarks.training_cell import MODELS, Cell
from peft_tinylora.tying import group_modules


CONFIGS_FOLDER = Path(training.__file__).parents[1] / "trl_recipes" / "configs"
RECIPES = sorted(CONFIGS_FOLDER.glob("*/*/*.yaml"))
GIB = 2**30
SMALL = "a Llama of 22M parameters"


@pytest.fixture(scope="module")
def meta_models() -> dict[str, torch.nn.Module]:
    """Model id -> the model on the meta device."""
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(config) for name, config in CONFIGS.items()}


def linear_names(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]


# --- shapes


@pytest.mark.parametrize(
    ("model_id", "parameters"),
    [  # as published: the sizes of the safetensors files on the Hub
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
    ],
)
def test_a_shape_has_the_published_number_of_parameters(meta_models, model_id, parameters):
    assert sum(p.numel() for p in meta_models[model_id].parameters()) == parameters
    config = shape_of(model_id)
    assert memory.linear_parameters(config) + memory.other_parameters(config) == parameters


@pytest.mark.parametrize("model_id", CONFIGS)
def test_the_linear_modules_of_a_shape(meta_models, model_id):
    model = meta_models[model_id]
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in linear_names(model)]
    assert shapes == memory.linear_shapes(shape_of(model_id)) * shape_of(model_id).num_hidden_layers


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="no shape for model 'gpt2': known are Qwen"):
        shape_of("gpt2")


# --- the recipes' YAML


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}-{path.stem}")
def test_a_config_states_the_memory_and_the_parameters_that_it_has(meta_models, path):
    text = path.read_text()
    recipe = yaml.safe_load(text)
    # memory: what the comment says is what the formula gives, and the GPU that it names has room for it
    expected = memory.expected_bytes(path)
    assert re.search(r"^# Memory: ([\d.]+) GB", text, re.MULTILINE)[1] == f"{expected / 1e9:.1f}"
    config, workload = shape_of(recipe["model_name_or_path"]), memory.workload_of(recipe)
    kept = sum(memory.kept_bytes(config, workload).values()) + memory.CUDA_CONTEXT_BYTES
    most = {"train": 0, "gener": 0}
    for phase, items in memory.phases(config, workload).items():
        most[phase[:5]] = max(most[phase[:5]], kept + sum(items.values()))
    figures = re.search(r"([\d.]+) while (?:generating|scoring), ([\d.]+) while training, of which ([\d.]+) are", text)
    assert list(figures.groups()) == [f"{size / 1e9:.1f}" for size in (most["gener"], most["train"], kept)]
    assert expected < 0.85 * int(re.search(r"one GPU of (\d+) GB\.$", text, re.MULTILINE)[1]) * GIB
    # trained numbers: as in the file's name
    names = linear_names(meta_models[recipe["model_name_or_path"]])
    groups = set(group_modules(names, recipe["tinylora_tie"], recipe["tinylora_n_tie"]).values())
    assert path.stem == f"gsm8k_{len(groups) * recipe['tinylora_u']}_4bit"
    exact = re.search(r"(\d+) gives exactly 13", text)
    n_tie = recipe["tinylora_n_tie"] if exact is None else int(exact[1])
    assert len(set(group_modules(names, "tiled", n_tie).values())) == 13
    # the path names the model; the commands name the path
    assert path.parts[-3] == recipe["model_name_or_path"].partition("/")[2].lower()
    assert text.count(str(path.relative_to(CONFIGS_FOLDER.parents[1]))) == 2


@pytest.mark.parametrize("path", [path for path in RECIPES if "grpo" in path.parts], ids=lambda path: path.parts[-3])
def test_a_grpo_config_is_the_papers_gsm8k(path):
    recipe = yaml.safe_load(path.read_text())
    completions = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    generated = recipe["per_device_train_batch_size"] * recipe["steps_per_generation"]
    assert (completions, recipe["num_generations"], recipe["num_train_epochs"], recipe["beta"]) == (64, 4, 3, 0.0)
    assert recipe["max_completion_length"] == 4096
    assert generated % recipe["num_generations"] == 0
    assert recipe["gradient_accumulation_steps"] % recipe["steps_per_generation"] == 0  # no sample of an older v
    assert recipe["learning_rate"] in (1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps_per_generation": None}, "^the recipe does not set steps_per_generation, which its memory"),
        ({"use_bnb_nested_quant": False}, "set bnb_4bit_quant_type: nf4 and use_bnb_nested_quant: true"),
        ({"bnb_4bit_quant_type": "fp4"}, "set bnb_4bit_quant_type: nf4"),
    ],
)
def test_a_recipe_that_cannot_be_counted_says_why(change, message):
    recipe = yaml.safe_load(next(path for path in RECIPES if "grpo" in path.parts).read_text()) | change
    with pytest.raises(ValueError, match=message):
        memory.workload_of({option: value for option, value in recipe.items() if value is not None})


def test_a_16_bit_base_is_counted_as_one():
    recipe = yaml.safe_load(RECIPES[0].read_text())
    config = shape_of(recipe["model_name_or_path"])
    workload = memory.workload_of(recipe | {"load_in_4bit": False})
    assert memory.kept_bytes(config, workload)["linear weights, bf16"] == 2 * memory.linear_parameters(config)
    assert all("a weight dequantized, bf16" not in items for items in memory.phases(config, workload).values())


def test_the_report_names_every_item_and_the_peak(capsys):
    memory.main([str(RECIPES[0])])
    report = capsys.readouterr().out
    for item in ("linear weights, NF4", "TinyLoRA's A, B and P", "K and V, bf16", "a tile of logits", "CUDA context"):
        assert item in report
    assert f"{memory.expected_bytes(RECIPES[0]) / 1e9:.1f}" in report.splitlines()[-2]


# --- the formula against what is really allocated


@pytest.mark.parametrize("numbers", [64, 4096, 64 * 256 + 2, 96 * 128])
def test_a_quantized_weight_has_the_bytes_that_bitsandbytes_gives_it(numbers):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(numbers), quant_type="nf4", compress_statistics=True)
    tensors = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert memory.quantized_bytes(numbers) == sum(t.numel() * t.element_size() for t in tensors)


def run_cell(**fields: object) -> dict:
    """Measures a cell in a process of its own, as the command does."""
    result = training.measure_row(Cell(adapter="TinyLoRA", timed_steps=1, **fields))
    assert "error" not in result, result
    return result


@pytest.mark.slow  # real trainers, in processes of their own
@pytest.mark.parametrize("base", ["16-bit", "4-bit"])
@pytest.mark.parametrize(
    ("phase", "completions", "micro_batch", "prompt_tokens", "completion_tokens"),
    [
        ("generating, the prompts", 16, 2, 240, 8),
        ("generating, the last token", 16, 1, 16, 240),
        ("training, the loss", 16, 16, 64, 16),
        ("training, a block recomputed", 64, 64, 120, 8),
    ],
)
def test_the_formula_is_within_5_percent_of_a_real_step(
    base, phase, completions, micro_batch, prompt_tokens, completion_tokens
):
    result = run_cell(
        base=base,
        model=SMALL,
        completions=completions,
        micro_batch=micro_batch,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
    workload = memory.Workload(
        bits=int(base.partition("-")[0]),
        r=2,
        micro_batch=micro_batch,
        train_tokens=prompt_tokens + completion_tokens,
        generated=completions,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )
    on_top = memory.phases(MODELS[SMALL], workload, device="cpu")
    assert max(on_top, key=lambda name: sum(on_top[name].values())) == phase
    expected = memory.peak_bytes(MODELS[SMALL], workload, device="cpu")
    assert result["grpo"]["peak_bytes"] == pytest.approx(expected, rel=0.05)
