"""Every YAML that the recipes ship is parsed by the real parser, strictly, and what it says is checked."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, ScriptArguments, SFTConfig
from trl.scripts.grpo import GRPOScriptArguments

import trl_recipes
from trl_recipes import grpo, sft
from trl_recipes.arguments import (
    RecipeError,
    parse,
    refuse_lora_options,
    refuse_quantization_options,
)
from trl_recipes.problems import FILE_FORMATS
from trl_recipes.score_arguments import ScoreArguments
from trl_recipes.trainer_setup import refuse_rounding_options, tinylora_config


ROOT = Path(trl_recipes.__file__).parent
RECIPES = {
    "grpo": grpo.ARGUMENT_CLASSES,
    "sft": sft.ARGUMENT_CLASSES,
}  # the recipe's name is in the path of its configs

# transformers 5.23 renamed gradient_checkpointing; TRL 1.16 still sets the old name. Remove when it does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def yaml_files(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])


def parse_config(path: Path, *more: str) -> tuple:
    """Parses a config as its recipe does, on the CPU so that one for a GPU parses anywhere; one of no recipe fails."""
    [recipe] = [name for name in RECIPES if name in str(path.relative_to(path.parents[2]))]
    return parse(RECIPES[recipe], "usage", ["--config", str(path), "--use_cpu", "true", *more])


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "configs" / "grpo" / "some_grpo.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", yaml_files(ROOT / "configs"), ids=lambda path: path.name)
def test_every_config_is_accepted_by_its_recipe(path):
    _, training_args, model_args, _, tinylora_args = parse_config(path)
    refuse_lora_options(model_args)
    refuse_quantization_options(model_args)
    if isinstance(training_args, GRPOConfig):
        refuse_rounding_options(training_args)
    tinylora_config(tinylora_args)


def test_there_are_configs_and_they_are_found_in_folders_too(tmp_path):
    assert {ROOT / "configs" / f"embedded_{recipe}.yaml" for recipe in RECIPES} <= set(yaml_files(ROOT / "configs"))
    nested = tmp_path / "qwen" / "grpo" / "deep.yaml"
    nested.parent.mkdir(parents=True)
    nested.touch()
    assert yaml_files(tmp_path) == [nested]


@pytest.mark.parametrize("path", yaml_files(ROOT / "configs"), ids=lambda path: path.name)
def test_every_local_path_in_a_config_exists(path):
    values = yaml.safe_load(path.read_text())
    for key in ("model_name_or_path", "dataset_name", "eval_dataset_name"):
        name = values.get(key)
        if name is not None and (Path(name).suffix in FILE_FORMATS or name.count("/") > 1):
            assert (ROOT.parent / name).exists(), f"{path.name}: {key} names {name}, which is not there"


def test_an_unknown_key_is_refused(write_config):
    assert parse_config(write_config("learning_rate: 0.5\n"))[1].learning_rate == 0.5
    with pytest.raises(RecipeError, match="learning_rat\\b"):
        parse_config(write_config("learning_rat: 0.5\n"))


def test_the_command_line_wins_and_is_strict(write_config):
    path = write_config("learning_rate: 0.5\ntinylora_u: 3\n")
    _, training_args, _, _, tinylora_args = parse_config(path, "--learning_rate", "0.25")
    assert (training_args.learning_rate, tinylora_args.tinylora_u) == (0.25, 3)
    with pytest.raises(RecipeError, match="learning_rat"):
        parse_config(path, "--learning_rato", "0.25")


def test_a_tie_may_be_a_mapping_in_yaml_and_on_the_command_line(write_config):
    expected = {"attention": ".*attn.*", "mlp": ".*mlp.*"}
    path = write_config("tinylora_tie:\n  attention: .*attn.*\n  mlp: .*mlp.*\n")
    assert parse_config(path)[-1].tinylora_tie == expected
    assert tinylora_config(parse_config(path)[-1]).tie == expected
    given = ("--tinylora_tie", '{"attention": ".*attn.*", "mlp": ".*mlp.*"}')
    assert parse_config(write_config("seed: 1\n"), *given)[-1].tinylora_tie == expected
    with pytest.raises(RecipeError, match="tinylora_tie is no JSON mapping"):
        parse_config(path, "--tinylora_tie", "{attention}")


def test_a_config_can_name_fused_expert_weights(write_config):
    config = tinylora_config(
        parse_config(write_config("tinylora_target_parameters: [mlp.experts.gate_up_proj]\n"))[-1]
    )
    assert list(config.target_parameters) == ["mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tinylora_tie: tield\n", "tie='tield': allowed are"),
        ("tinylora_tie: tiled\n", "n_tie"),
        ("tinylora_u: 0\n", "`u`"),
        ("tinylora_r: 0\n", "`r`"),
        ("tinylora_sigma: right\n", "sigma='right'"),
    ],
)
def test_bad_adapter_values_are_refused_by_name(write_config, text, message):
    with pytest.raises(RecipeError, match=message):
        tinylora_config(parse_config(write_config(text))[-1])


@pytest.mark.parametrize(
    "text",
    ["lora_r: 8\n", "lora_alpha: 8\n", "lora_target_modules: [q_proj]\n", "use_dora: true\n", "use_rslora: true\n"],
)
def test_lora_options_are_refused_by_name(write_config, text):
    with pytest.raises(RecipeError, match=f"^{text.partition(':')[0]}: LoRA options.*use tinylora_"):
        refuse_lora_options(parse_config(write_config(text))[2])


def test_use_peft_and_quantization_options_are_no_lora_options(write_config):
    text = "use_peft: true\nload_in_4bit: true\nuse_bnb_nested_quant: true\nbnb_4bit_quant_type: nf4\n"
    refuse_lora_options(parse_config(write_config(text))[2])


@pytest.mark.parametrize(
    ("recipe", "classes"),
    [
        ("grpo", (GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig)),
        ("sft", (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)),
    ],
)
def test_a_recipe_has_every_option_of_its_trl_script(recipe, classes):
    ours = {f.name: f.type for ours in RECIPES[recipe] for f in fields(ours)}
    theirs = {f.name: f.type for theirs in classes for f in fields(theirs)}
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "load_in_4bit: true\nuse_vllm: true\n",
            "^use_vllm with load_in_4bit: .*packed 4-bit bytes.* use_vllm: false",
        ),
        ("load_in_8bit: true\nuse_vllm: true\n", "^use_vllm with load_in_8bit: .*dtype: bfloat16"),
        ("load_in_4bit: true\ndtype: auto\n", "^load_in_4bit with dtype: auto: set dtype"),
    ],
)
def test_quantized_bases_that_cannot_be_are_refused_by_name(write_config, text, message):
    _, training_args, model_args, _, _ = parse_config(write_config(text))
    with pytest.raises(RecipeError, match=message):
        refuse_quantization_options(model_args, training_args.use_vllm)


def test_two_precisions_are_refused(write_config):
    with pytest.raises(RecipeError, match="can't use 8 bit and 4 bit precision at the same time"):
        parse_config(write_config("load_in_4bit: true\nload_in_8bit: true\n"))


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base_without_bitsandbytes(write_config, monkeypatch, name):
    model_args = parse_config(write_config(f"{name}: true\n"))[2]
    refuse_quantization_options(model_args)
    monkeypatch.setattr("trl_recipes.arguments.is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match=rf"^{name} needs bitsandbytes.*pip install 'peft-tinylora\[quantization\]'"):
        refuse_quantization_options(model_args)
    refuse_quantization_options(parse_config(write_config("seed: 1\n"))[2])  # nobody else needs it


def test_options_that_would_round_v_are_refused(write_config):
    text = "use_transformers_continuous_batching: true\n"
    refuse_rounding_options(parse_config(write_config(text + "bf16: false\n"))[1])
    with pytest.raises(RecipeError, match="casts the adapter to half precision"):
        refuse_rounding_options(parse_config(write_config(text + "bf16: true\n"))[1])


@pytest.mark.parametrize("text", ["- a list\n", "a: b: c\n", "\t\n: x"])
def test_what_is_no_mapping_is_one_line(write_config, text):
    with pytest.raises(RecipeError) as error:
        parse_config(write_config(text))
    assert "\n" not in str(error.value)


def test_a_missing_config_is_named():
    with pytest.raises(RecipeError, match="no config file 'nowhere.yaml'"):
        parse(grpo.ARGUMENT_CLASSES, "usage", ["--config", "nowhere.yaml"])


def test_score_takes_its_own_options():
    [arguments] = parse((ScoreArguments,), "usage", ["--dataset", "test.jsonl", "--adapter", "a", "--sampled"])
    assert (arguments.dataset, arguments.adapter, arguments.sampled, arguments.batch_size) == (
        "test.jsonl",
        "a",
        True,
        64,
    )


def test_the_embedded_configs_train_the_same_numbers():
    names = ("embedded_grpo", "embedded_sft", "embedded_grpo_4bit")
    grpo_args, sft_args, grpo_4bit_args = [parse_config(ROOT / "configs" / f"{name}.yaml") for name in names]
    assert grpo_args[-1] == sft_args[-1] == grpo_4bit_args[-1]
    assert grpo_args[2] == sft_args[2]  # on the same base


def test_the_embedded_4bit_config_differs_by_the_base_alone():
    values = [yaml.safe_load((ROOT / "configs" / f"embedded_grpo{kind}.yaml").read_text()) for kind in ("", "_4bit")]
    different = {key for key in values[0].keys() | values[1].keys() if values[0].get(key) != values[1].get(key)}
    assert different == {"load_in_4bit", "bnb_4bit_quant_type", "output_dir"}


def test_the_embedded_config_is_the_papers_thirteen():
    _, training_args, _, _, tinylora_args = parse_config(ROOT / "configs" / "embedded_grpo.yaml")
    config = tinylora_config(tinylora_args)
    assert (config.r, config.u, config.tie, config.n_tie, config.sigma) == (2, 1, "tiled", 4, "left")
    assert -(-7 * 7 // config.n_tie) * config.u == 13
    assert (training_args.generation_batch_size, training_args.num_generations) == (64, 8)
    assert not training_args.bf16


@pytest.mark.parametrize("path", yaml_files(ROOT / "accelerate_configs"), ids=lambda path: path.name)
def test_every_accelerate_config_is_accepted(path):
    assert load_config_from_file(str(path)).num_processes == (1 if path.stem in ("cpu", "single_gpu") else 2)


def test_accelerate_refuses_an_unknown_key(tmp_path):
    path = tmp_path / "cpu.yaml"
    path.write_text((ROOT / "accelerate_configs" / "cpu.yaml").read_text() + "num_proceses: 1\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(path))
