"""served.py: the factors of a base come from its checkpoint and a cache that is not believed; what is no base is refused."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exported import TILED, load, qwen2
from quantized import BACKENDS
from safetensors.torch import load_file, save_file
from support import make_tiny_llama
from test_inline import adapt
from test_inline_refused import OF_64
from test_served import assert_same, exported, perturbed

from peft_tinylora import (
    BasisError,
    BasisMismatchError,
    basis_cache,
    served,
)
from peft_tinylora.inline import InlineAdapter, inline_adapter
from peft_tinylora.served import ServedBase


PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def basis_cache_folder() -> None:
    """One cache for this file, in place of one for each test: finding the factors would take most of the time."""


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> Path:
    """A base of one layer: 7 modules."""
    folder = tmp_path_factory.mktemp("small")
    make_tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(small_folder) -> tuple[ServedBase, InlineAdapter]:
    adapter = inline_adapter(adapt(load(small_folder), **TILED))
    return ServedBase(str(small_folder), 2), adapter


def test_factors_are_computed_once(small_folder, own_cache, computed, small) -> None:
    first = ServedBase(str(small_folder), 2)
    assert len(computed) == 7
    computed.clear()
    second = ServedBase(str(small_folder), 2)
    second.lora(small[1])
    assert computed == []
    assert_same(second.lora(small[1]), first.lora(small[1]), tolerance=0)
    ServedBase(str(small_folder), 1)
    assert len(computed) == 7


def test_what_training_kept_is_what_a_server_uses(small_folder, own_cache, computed) -> None:
    adapt(load(small_folder), **TILED)
    computed.clear()
    ServedBase(str(small_folder), 2)
    assert computed == []


def test_a_damaged_cache_is_not_believed(small_folder, own_cache, computed, small, caplog) -> None:
    ServedBase(str(small_folder), 2)
    [path] = own_cache.glob("*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    computed.clear()
    assert_same(ServedBase(str(small_folder), 2).lora(small[1]), small[0].lora(small[1]))
    assert len(computed) == 7 and "is damaged and is not used" in caplog.text


def test_a_cache_of_other_factors_with_a_right_checksum_is_not_believed(
    small_folder, own_cache, computed, small, caplog
) -> None:
    ServedBase(str(small_folder), 2)
    [path] = own_cache.glob("*/*.safetensors")
    bases = basis_cache.read(path)
    wrong = "model.layers.0.mlp.up_proj"
    bases[wrong] = bases[wrong]._replace(B=bases[wrong].B * 1.001)
    basis_cache.write(path, bases, "base", "float")
    computed.clear()
    assert_same(ServedBase(str(small_folder), 2).lora(small[1]), small[0].lora(small[1]))
    assert computed == [wrong] and "1 of 7 modules have other weights than the kept basis" in caplog.text


def test_a_checkpoint_that_was_replaced_is_noticed(tmp_path, small, own_cache, computed) -> None:
    perturbed(make_tiny_llama(num_hidden_layers=1), 0.3).save_pretrained(tmp_path / "base")
    with pytest.raises(BasisMismatchError):
        ServedBase(str(tmp_path / "base"), 2).lora(small[1])
    make_tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    computed.clear()
    assert_same(ServedBase(str(tmp_path / "base"), 2).lora(small[1]), small[0].lora(small[1]))
    assert len(computed) == 7


@pytest.fixture
def drawn(monkeypatch) -> Iterator[list[tuple[int, int, int]]]:
    """What projections were drawn: (u, r, seed)."""
    served._projections.cache_clear()
    draws, original = [], served.draw_projection
    monkeypatch.setattr(served, "draw_projection", lambda *a: draws.append(a) or original(*a))
    yield draws
    served._projections.cache_clear()


def test_projections_are_drawn_once_for_a_run_and_anew_for_other_settings(small_folder, small, drawn) -> None:
    serving, adapter = small
    expected = {}
    for name, fields in {
        "first": {},
        "another seed": {"projection_seed": 43},
        "another u": {"u": 2},
        "fewer modules": {"target_modules": ["v_proj", "up_proj"]},
        "PEFT": {"tie": None, "n_tie": None, "weight_tying": 1.0},
    }.items():
        expected[name] = inline_adapter(adapt(load(small_folder), **{**TILED, **fields}))
    found = {name: serving.lora(adapter) for name, adapter in expected.items()}
    assert len(drawn) == 7 + 7 + 7 + 2 + 7 and len(set(drawn)) == 28  # fewer modules have the P that they had
    drawn.clear()
    serving.lora(expected["PEFT"].with_vectors(torch.ones(1, 1)))
    for name in [*found][1:] * 2:  # four runs in turn
        serving.lora(expected[name])
    assert drawn == []
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
    updates = [tensors[name] for tensors in found.values()]
    assert all((a - b).norm() > 0.01 * a.norm() for i, a in enumerate(updates) for b in updates[:i])
    for name, adapter in expected.items():
        assert_same(serving.lora(adapter), found[name], tolerance=0)


def test_two_bases_do_not_share_projections_of_other_names(tmp_path, small) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    model = adapt(load(tmp_path / "base"), **TILED)
    small[0].lora(small[1])
    found = ServedBase(str(tmp_path / "base"), 2).lora(inline_adapter(model))
    assert_same(found, exported(model, tmp_path, tmp_path / "base"))


def break_base(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no safetensors":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "a model that is not known":
        (folder / "config.json").write_text('{"model_type": "not_there"}')
    elif kind == "no language model":
        (folder / "config.json").write_text('{"model_type": "vit"}')
    elif kind == "a tensor is missing":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "a tensor of another shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    elif kind == "NaN":
        tensors = load_file(weights)
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = math.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "float8":
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})


BROKEN = {
    "no safetensors": r"has no model\.safetensors and no model\.safetensors\.index\.json\. Convert the checkpoint",
    "no config": "The base model '.*' cannot be opened: ",
    "a model that is not known": "The base model '.*' cannot be opened: .*not_there",
    "no language model": "The base model '.*' cannot be opened: .*ViTConfig",
    "a tensor is missing": r"has no tensor 'model\.layers\.0\.mlp\.up_proj\.weight'",
    "a tensor of another shape": r"'model\.layers\.0\.mlp\.gate_proj\.weight' of .* has shape \(64, 32\), and the module has \(32, 32\)",
    "NaN": r"weight of module 'model\.layers\.0\.mlp\.up_proj' holds NaN or Inf",
    "float8": r"is a quantized checkpoint itself \(it stores 'model\.layers\.0\.self_attn\.q_proj\.weight' as torch\.float8",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_base_without_a_float_checkpoint_is_refused(small_folder, tmp_path, kind: str) -> None:
    shutil.copytree(small_folder, tmp_path / "base")
    break_base(tmp_path / "base", kind)
    with pytest.raises(BasisError, match=BROKEN[kind]) as refused:
        ServedBase(str(tmp_path / "base"), 2)
    assert "\n" not in str(refused.value)


def test_a_quantized_checkpoint_is_refused(tmp_path) -> None:
    make_tiny_llama(**OF_64).save_pretrained(tmp_path / "base")
    BACKENDS["bnb-nf4"](tmp_path / "base").save_pretrained(tmp_path / "nf4")
    with pytest.raises(BasisError, match=r"/nf4 is a quantized checkpoint itself \(it stores .* as torch\.uint8\)"):
        ServedBase(str(tmp_path / "nf4"), 2)


def test_a_base_that_is_not_there_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(BasisError, match="The base model '.*/nothing' cannot be opened: "):
        ServedBase(str(tmp_path / "nothing"), 2)


def test_a_rank_too_large_for_a_module_is_refused(small_folder) -> None:
    with pytest.raises(BasisError, match=r"r=17 is larger than .* 'model\.layers\.0\.self_attn\.k_proj'.* 16 x 32"):
        ServedBase(str(small_folder), 17)
