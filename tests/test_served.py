"""served.py: an inline adapter on a base that is only a checkpoint gives the LoRA that an export gives, or is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import FP32, TILED, distance, gpt2, load, opt, qwen2
from peft import PeftModel
from quantized import BACKENDS
from safetensors.torch import load_file
from support import make_tiny_llama
from test_inline import ADAPTERS, LINEAR, MOST, adapt, body, encode, save_compact
from test_inline_refused import OF_64
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from peft_tinylora import (
    AdapterFileError,
    BasisMismatchError,
    TinyLoraError,
    basis_cache,
    export_adapter,
    served,
)
from peft_tinylora.inline import InlineAdapter, inline_adapter, inline_adapter_of_folder, parse_inline
from peft_tinylora.projection import draw_projection, seed_of_module
from peft_tinylora.served import ServedBase, skeleton


PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def basis_cache_folder() -> None:
    """One cache for this file, in place of one for each test: finding the factors would take most of the time."""


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def served_base(base_folder) -> Callable[[int], ServedBase]:
    bases = {}
    return lambda r: bases.get(r) or bases.setdefault(r, ServedBase(str(base_folder), r))


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


def exported(model: PeftModel, folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """The tensors of the LoRA that the compact form of an adapter is exported to."""
    export_adapter(save_compact(model, folder, load(base)), folder / "lora", "lora", load(base))
    return load_file(folder / "lora" / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """`tolerance` is of the norm of each tensor."""
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == tensor.shape, name
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name
        assert tensor.any(), name


def assert_same_function(served: ServedBase, model: PeftModel, base: Path, tokens: torch.Tensor) -> None:
    """The LoRA of `model` in plain PEFT, on the base that the server has, and the TinyLoRA itself."""
    text = inline_adapter(model).text()
    with torch.no_grad(), served.lora_folder(parse_inline(text, MOST)) as folder:
        lora = PeftModel.from_pretrained(load(base), folder).eval()
        assert type(lora.base_model).__name__ == "LoraModel"
        assert distance(lora(tokens).logits, model(tokens).logits, load(base)(tokens).logits) < FP32


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_text_gives_the_lora_that_an_export_gives(base_folder, served_base, tmp_path, name: str) -> None:
    model = adapt(load(base_folder), **ADAPTERS[name])
    expected = exported(model, tmp_path, base_folder)
    adapter = inline_adapter(model)
    if name == "bfloat16":  # which it is rounded to on saving alone
        adapter = replace(adapter, v=adapter.v.bfloat16())
    found = served_base(adapter.r).lora(parse_inline(adapter.text(), MOST))
    assert_same(found, expected)
    assert set(found) == {
        f"{PREFIX}{name}.lora_{side}.weight"
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "tinylora_A")
        for side in "AB"
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_lora_in_plain_peft_is_the_same_function(base_folder, served_base, tokens, name: str) -> None:
    model = adapt(load(base_folder), **ADAPTERS[name])
    assert_same_function(served_base(model.peft_config["default"].r), model, base_folder, tokens)


def test_the_update_is_the_formula_of_the_paper(base_folder, served_base) -> None:
    """U S R V^T, in float64 by LAPACK and with each right vector's largest entry positive."""
    adapter = inline_adapter(adapt(load(base_folder), **{**TILED, "u": 3}))
    tensors = served_base(2).lora(adapter)
    for index, (name, module) in enumerate(load(base_folder).model.layers[1].named_modules()):
        if type(module) is not torch.nn.Linear:
            continue
        U, S, Vh = torch.linalg.svd(module.weight.double())
        signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh[:2]])
        name = f"model.layers.1.{name}"
        position = list(tensors).index(f"{PREFIX}{name}.lora_A.weight") // 2
        P = draw_projection(3, 2, seed_of_module(42, name)).double()
        R = torch.einsum("u,urs->rs", adapter.v[position // 4].double(), P)
        expected = (U[:, :2] * S[:2] * signs) @ R @ (signs[:, None] * Vh[:2])
        A, B = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
        assert ((B @ A - expected).norm() / expected.norm()).item() < 1e-5, (index, name)


@pytest.mark.parametrize("fields", [{**LINEAR, "tie": "none", "u": 2}, {**LINEAR, "u": 2, "weight_tying": 0.5}])
@pytest.mark.parametrize("kind", ["opt", "qwen2", "tied llama", "gpt2"])
def test_other_bases_are_served(tmp_path, tokens, kind: str, fields: dict) -> None:
    makers = {"opt": opt, "qwen2": qwen2, "gpt2": gpt2}
    makers["tied llama"] = lambda: make_tiny_llama(num_hidden_layers=2, tie_word_embeddings=True, attention_bias=True)
    base = makers[kind]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    base.save_pretrained(tmp_path / "base")
    model = adapt(load(tmp_path / "base"), **fields)
    serving = ServedBase(str(tmp_path / "base"), 2)
    assert_same(serving.lora(inline_adapter(model)), exported(model, tmp_path, tmp_path / "base"))
    assert_same_function(serving, model, tmp_path / "base", tokens)


def test_a_checkpoint_in_shards_is_read(base_folder, served_base, tmp_path) -> None:
    load(base_folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    adapter = inline_adapter(adapt(load(base_folder), **TILED))
    assert_same(ServedBase(str(tmp_path), 2).lora(adapter), served_base(2).lora(adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_16_bits_is_the_base_in_any_dtype(small_folder, tmp_path, dtype: torch.dtype) -> None:
    load(small_folder, dtype).save_pretrained(tmp_path / "base")
    serving = ServedBase(str(tmp_path / "base"), 2)
    for trained in (dtype, torch.float32):
        adapter = inline_adapter(adapt(load(tmp_path / "base", trained), **TILED))
        found = serving.lora(adapter)
        assert len(found) == 14 and {tensor.dtype for tensor in found.values()} == {torch.float32}
    model = adapt(load(tmp_path / "base"), **TILED)
    assert_same(serving.lora(inline_adapter(model)), exported(model, tmp_path, tmp_path / "base"))


def test_an_adapter_of_a_4bit_base_with_the_original_basis_is_served(tmp_path) -> None:
    make_tiny_llama(**OF_64).save_pretrained(tmp_path)
    quantized = inline_adapter(adapt(BACKENDS["bnb-nf4"](tmp_path), **TILED, basis="full-precision"))
    serving = ServedBase(str(tmp_path), 2)
    assert_same(serving.lora(quantized), serving.lora(inline_adapter(adapt(load(tmp_path), **TILED))))


def test_a_saved_folder_is_served_by_the_names_of_the_served_base(base_folder, served_base, tmp_path) -> None:
    model = adapt(load(base_folder), **TILED)
    model.save_pretrained(tmp_path)
    adapter = inline_adapter_of_folder(tmp_path, served_base(2).model)
    assert_same(served_base(2).lora(adapter), served_base(2).lora(inline_adapter(model)))


def test_a_skeleton_has_no_weights(base_folder) -> None:
    model = skeleton(str(base_folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.name_or_path == str(base_folder)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in make_tiny_llama().named_modules()]


def test_the_folder_is_gone_afterwards(small) -> None:
    serving, adapter = small
    with serving.lora_folder(adapter) as folder:
        assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert folder.stat().st_mode & 0o077 == 0  # nobody else reads or swaps it
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 2, 2, "none")
        assert len(config["target_modules"]) == 7
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), serving.lora_folder(adapter) as folder:
        1 / 0  # noqa: B018
    assert not folder.exists()


def test_two_folders_at_once_are_two(small) -> None:
    serving, adapter = small
    other = adapter.with_vectors(adapter.v * 2)
    with serving.lora_folder(adapter) as one, serving.lora_folder(other) as two:
        assert one != two
        assert_same(load_file(one / "adapter_model.safetensors"), serving.lora(adapter))
        assert_same(load_file(two / "adapter_model.safetensors"), serving.lora(other))


def test_a_refused_adapter_leaves_no_folder(small, tmp_path, monkeypatch) -> None:
    serving, adapter = small
    monkeypatch.setattr(served.tempfile, "TemporaryDirectory", lambda **_: pytest.fail("a folder was made"))
    with pytest.raises(AdapterFileError), serving.lora_folder(replace(adapter, projection_seed=1)):
        pass


def other_base(folder: Path, kind: str) -> ServedBase:
    bases: dict[str, Callable[[], PreTrainedModel]] = {
        "weights with 5% noise": lambda: perturbed(make_tiny_llama(), 0.05),
        "one changed weight": lambda: perturbed(make_tiny_llama(), 0.1, only="model.layers.2.mlp.up_proj.weight"),
        "another seed": lambda: make_tiny_llama(seed=1),
        "other sizes": lambda: make_tiny_llama(hidden_size=48, intermediate_size=80),
        "fewer layers": lambda: make_tiny_llama(num_hidden_layers=3),
        "as many modules with other names": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4
            )
        ),
    }
    bases[kind]().save_pretrained(folder)
    return ServedBase(str(folder), 2)


def perturbed(model: PreTrainedModel, scale: float, only: str = "") -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and only in name:
                weight += scale * weight.std() * torch.randn(weight.shape)
    return model


OTHERS = {
    "weights with 5% noise": r"another base model than .*/other, or on another form of it: module 'model\.layers\..*' differs by .*, allowed is 0\.02",
    "one changed weight": r"module 'model\.layers\.2\.mlp\.up_proj' differs by 0\.\d+, allowed is 0\.02",
    "another seed": r"module 'model\.layers\.0\.self_attn\.q_proj' differs by",
    "other sizes": r"module 'model\.layers\.0\.self_attn\.q_proj' differs by",
    "fewer layers": r"of a base model with 28 linear modules, and .*/other has 21: send it to a server of the base",
    "as many modules with other names": r"modules have other names than those of .*/other, or read other numbers: send it to a server of the base",
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_another_base_refuses_the_adapter(base_folder, served_base, tmp_path, kind: str) -> None:
    adapter = inline_adapter(adapt(load(base_folder), **TILED))
    with pytest.raises(BasisMismatchError, match=OTHERS[kind]):
        other_base(tmp_path / "other", kind).lora(adapter)
    assert len(served_base(2).lora(adapter)) == 56


CHANGED: dict[str, tuple[dict, type[Exception], str]] = {
    "another rank": (
        {"r": 3},
        AdapterFileError,
        "has rank 3, and this server keeps factors of rank 2: ask its owner to set PEFT_TINYLORA_VLLM_RANK=3",
    ),
    "another seed": (
        {"projection_seed": 43},
        AdapterFileError,
        r"projection of module 'model\.layers\.0\.self_attn\.q_proj' is not the one",
    ),
    "seeds as PEFT has them": ({"from_paper": False}, AdapterFileError, "projection of module .* is not the one"),
    "sigma elsewhere": ({"sigma": "split"}, BasisMismatchError, r"module 'model\.layers\.0.* differs by"),
    "another digest": ({"digest": "0" * 16}, BasisMismatchError, "modules have other names than those of"),
    "other groups": ({"groups": (0, 0, 0, 1, 1, 1, 1)}, BasisMismatchError, "modules have other names than those of"),
    "one module fewer": ({"groups": (0,) * 4 + (1,) * 2}, BasisMismatchError, "with 6 linear modules, and .* has 7"),
    "another u": ({"v": torch.ones(2, 2)}, AdapterFileError, "projection of module"),
    "the largest sketches": (
        {"sketches": torch.full((7, 5), 3.3e38).bfloat16()},
        BasisMismatchError,
        "differs by inf, allowed is 0.02",
    ),
    "no sketches": ({"sketches": torch.zeros(7, 5).bfloat16()}, BasisMismatchError, "differs by"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_adapter_is_refused(small, change: str) -> None:
    serving, adapter = small
    fields, error, message = CHANGED[change]
    with pytest.raises(error, match=message) as refused:
        serving.lora(replace(adapter, **fields))
    assert type(refused.value) is error
    assert len(serving.lora(adapter)) == 14


def test_a_sketch_with_one_projection_changed_is_refused_by_name(small) -> None:
    serving, adapter = small
    sketches = adapter.sketches.clone()
    sketches[3, -1] += 1
    with pytest.raises(AdapterFileError, match=r"projection of module 'model\.layers\.0\.self_attn\.o_proj'"):
        serving.lora(replace(adapter, sketches=sketches))


def test_factors_may_differ_by_rounding_and_no_more(small) -> None:
    serving, adapter = small
    sketches = adapter.sketches.float()
    sketches[2, :-1] *= 1.01
    assert len(serving.lora(replace(adapter, sketches=sketches.bfloat16()))) == 14
    sketches[2, :-1] *= 1.05
    with pytest.raises(
        BasisMismatchError, match=r"module 'model\.layers\.0\.self_attn\.v_proj' differs by 0\.0\d+, allowed"
    ):
        serving.lora(replace(adapter, sketches=sketches.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_overflow_are_refused_by_name(small_folder, small, dtype: torch.dtype) -> None:
    serving, _ = small
    adapter = inline_adapter(adapt(load(small_folder), **{**TILED, "u": 8}))
    v = torch.zeros(2, 8)
    v[1] = 1e30
    found = serving.lora(replace(adapter, v=v.to(dtype)))
    assert all(tensor.isfinite().all() for tensor in found.values())
    v[1] = 3e38
    message = r"update of module 'model\.layers\.0\.mlp\.\w+' is not finite: the adapter's numbers are too large"
    with pytest.raises(AdapterFileError, match=message):
        serving.lora(replace(adapter, v=v.to(dtype)))


def test_projections_of_gigabytes_are_not_drawn(small, monkeypatch) -> None:
    serving, adapter = small
    monkeypatch.setattr(served, "draw_projection", lambda *_: pytest.fail("a projection was drawn"))
    u = served.MOST_PROJECTION_NUMBERS // (7 * 4) + 1
    with pytest.raises(AdapterFileError, match=f"has u={u}, which is too large to be served: use a smaller one"):
        serving.lora(replace(adapter, v=torch.zeros(2, u)))


def test_any_changed_bit_of_a_text_gives_a_finite_lora_or_a_refusal(small) -> None:
    serving, adapter = small
    whole, served_all = body(adapter.text()), 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = serving.lora(parse_inline(encode(bytes(changed)), MOST))
        except TinyLoraError:
            continue
        served_all += 1
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert found.keys() == serving.lora(adapter).keys()
    assert served_all > 2 * 23  # the mantissas of v, at least


def negate(path: Path, pairs: slice) -> None:
    """A kept file with some singular pairs of every module negated, which leaves them those of the weights."""
    bases = basis_cache.read(path)
    for basis in bases.values():
        basis.A[pairs] *= -1
        basis.B[:, pairs] *= -1
    basis_cache.write(path, bases, "base", "float")


@pytest.mark.parametrize("pairs", [slice(0, 1), slice(1, 2), slice(0, 2)])
@pytest.mark.parametrize("fields", [TILED, {**TILED, "sigma": "split"}, {**LINEAR, "weight_tying": 1.0}])
def test_signs_are_those_that_the_adapter_was_trained_with(
    small_folder, own_cache, tmp_path, computed, fields: dict, pairs: slice
) -> None:
    model = adapt(load(small_folder), **fields)
    expected = exported(model, tmp_path, small_folder)
    adapter = inline_adapter(model)
    ServedBase(str(small_folder), 2)
    computed.clear()
    for path in own_cache.glob("*/*.safetensors"):
        negate(path, pairs)
    serving = ServedBase(str(small_folder), 2)
    assert computed == []
    assert_same(serving.lora(adapter), expected)
    if "tie" in fields:  # each pair is still the other way round in what the server keeps
        kept = serving._bases["model.layers.0.mlp.up_proj"].A
        assert (kept[pairs].gather(1, kept[pairs].abs().argmax(1, keepdim=True)) < 0).all()
