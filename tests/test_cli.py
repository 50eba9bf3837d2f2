"""The command line: what it prints, and its exit status."""

import re

import pytest
import torch
from peft import get_peft_model
from support import fill_vectors, make_tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_tinylora import TinyLoraConfig, basis_cache
from peft_tinylora.cli import main
from peft_tinylora.inline import inline_adapter_of_folder


@pytest.fixture
def base(tmp_path) -> str:
    """Folder of a base model."""
    make_tiny_llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_build_list_verify_clear(base, capsys) -> None:
    assert main(["basis", "verify", base]) == 1
    assert "no sound basis of" in capsys.readouterr().err
    assert main(["basis", "build", base]) == 0
    assert "28 modules in" in capsys.readouterr().out
    assert main(["basis", "build", base, "--r", "1", "--target-modules", "q_proj", "v_proj"]) == 0
    assert "8 modules in" in capsys.readouterr().out
    assert main(["basis", "list"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  base\n") == 2 and "2 files" in printed and "of at most 2000 MB" in printed
    assert main(["basis", "verify"]) == 0
    assert "2 files, 0 damaged" in capsys.readouterr().out
    assert main(["basis", "verify", base]) == 0
    assert "28 modules, 0 with another basis" in capsys.readouterr().out
    assert main(["basis", "clear", base]) == 0
    assert "2 files removed" in capsys.readouterr().out
    assert basis_cache.entries() == []


def test_what_the_command_builds_is_what_an_adapter_finds(base, monkeypatch) -> None:
    from peft_tinylora import build

    assert main(["basis", "build", base]) == 0
    monkeypatch.setattr(build, "compute_basis", lambda *_: pytest.fail("a basis was computed"))
    config = TinyLoraConfig(tie="tiled", n_tie=4, target_modules="all-linear")
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config)


def test_damage_and_other_weights_are_found(base, capsys) -> None:
    assert main(["basis", "build", base]) == 0
    changed = make_tiny_llama()
    changed.model.layers[1].mlp.up_proj.weight.data += 0.01
    changed.save_pretrained(base)
    assert main(["basis", "verify", base]) == 1
    assert "not of these weights: model.layers.1.mlp.up_proj" in capsys.readouterr().out
    [entry] = basis_cache.entries()
    entry.path.write_bytes(entry.path.read_bytes()[:-1])
    assert main(["basis", "verify"]) == 1
    assert f"damaged: {entry.path}" in capsys.readouterr().out
    assert main(["basis", "list"]) == 0
    assert f"damaged: {entry.path}" in capsys.readouterr().out


@pytest.fixture
def adapter(base, tmp_path) -> str:
    """Folder of an adapter of that base."""
    config = TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_export_there_and_back_is_the_same_file_and_nothing_is_overwritten(adapter, tmp_path, capsys) -> None:
    assert main(["export", adapter, str(tmp_path / "portable"), "--to", "portable"]) == 0
    assert "bytes" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "portable"), str(tmp_path / "again"), "--to", "compact"]) == 0
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert main(["export", adapter, str(tmp_path / "again"), "--to", "portable"]) == 1
    assert "holds an adapter already" in capsys.readouterr().err


def test_a_merged_export_says_what_rounding_cost(adapter, tmp_path, capsys) -> None:
    assert main(["export", adapter, str(tmp_path / "merged"), "--to", "merged", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "cosine  relative error" in printed and "model.safetensors" in printed
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16


def test_export_loads_the_base_in_the_form_that_the_adapter_was_trained_on(tmp_path, capsys) -> None:
    make_tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=form)
    model = get_peft_model(base, TinyLoraConfig(tie="full", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "lora"), "--to", "lora"]) == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    # and not another one that is asked for
    wrong = ["export", str(tmp_path / "adapter"), str(tmp_path / "no"), "--to", "lora", "--load-in-8bit"]
    assert main(wrong) == 1
    assert "bnb 4bit fp4" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "fields", [{"tie": "tiled", "n_tie": 4}, {"tie": "structured", "n_tie": 2}, {"weight_tying": 0.5}]
)
@pytest.mark.parametrize("save_basis", [False, True])
def test_inspect_says_the_same_of_an_adapter_with_and_without_its_factors(
    base, tmp_path, capsys, fields: dict, save_basis: bool
) -> None:
    config = TinyLoraConfig(
        u=2, target_modules="all-linear", save_basis=save_basis, modules_to_save=["norm"], **fields
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    numbers = [f"{value:+.6f}" for v in model.tinylora_v["default"].values() for value in v.tolist()]
    assert re.findall(r"[+-]\d\.\d{6}", printed) == numbers
    assert f"{len(numbers) // 2} groups of u=2" in printed and "28: down_proj" in printed
    assert ("in the file" if save_basis else "kept in") in printed
    assert f"{base} (float weights)" in printed
    assert "model.norm" in printed
    basis_cache.clear()
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert ("in the file" if save_basis else "computed from the base model") in capsys.readouterr().out


def test_inline_prints_the_text_of_an_adapter(adapter, base, tmp_path, capsys) -> None:
    expected = inline_adapter_of_folder(adapter, LlamaForCausalLM.from_pretrained(base)).text()
    for options in ([], ["--base", base]):
        assert main(["inline", adapter, *options]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    other = tmp_path / "other"
    make_tiny_llama(num_hidden_layers=1).save_pretrained(other)
    assert main(["inline", adapter, "--base", str(other)]) == 1
    assert "another base model" in capsys.readouterr().err


def test_errors_are_one_line(base, monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", "off")
    for arguments in (
        ["basis", "build", base],
        ["basis", "build", str(tmp_path / "empty")],
        ["basis", "build", base, "--r", "99"],
        ["inspect", base],
        ["push", base, "user/x"],
        ["export", base, str(tmp_path / "out"), "--to", "lora"],
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and len(error) > 20
    with pytest.raises(SystemExit):
        main(["basis"])
