"""inline.py: what a request cannot carry is not made into text, and says what to do instead."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from exported import TILED, load
from peft import LoraConfig, PeftModel, get_peft_model
from quantized import BACKENDS
from support import make_tiny_llama
from test_compact import degenerate
from test_experts import EXPERTS
from test_experts import make as make_experts
from test_inline import LINEAR, MOST, adapt, assert_same, make_small

from peft_tinylora import AdapterFileError, TinyLoraConfig
from peft_tinylora.inline import (
    inline_adapter,
    inline_adapter_of_folder,
    parse_inline,
)
from peft_tinylora.served import skeleton


@pytest.fixture(autouse=True)
def basis_cache_folder() -> None:
    """One cache for this file, in place of one for each test: finding the factors would take most of the time."""


OF_64 = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}  # a block of bitsandbytes has 64


def nf4(folder: Path, **fields: object) -> PeftModel:
    make_tiny_llama(**OF_64).save_pretrained(folder)
    return adapt(BACKENDS["bnb-nf4"](folder), **TILED, **fields)


def with_weight(kind: str) -> torch.nn.Module:
    model = make_tiny_llama()
    model.model.layers[1].self_attn.q_proj.weight.data = degenerate(kind)
    return model


Q_PROJ = {**TILED, "target_modules": ["q_proj"]}


TO_LORA = "Serve it as a LoRA: `peft-tinylora export ADAPTER FOLDER --to lora`"


REFUSED: dict[str, tuple[Callable[[Path, Path], PeftModel], str]] = {
    "modules saved whole": (
        lambda base, _: adapt(load(base), **TILED, modules_to_save=["lm_head"]),
        rf"more than v: it has 1 other tensors, such as '.*lm_head\.weight'.*{TO_LORA}",
    ),
    "biases": (
        lambda base, _: adapt(make_tiny_llama(attention_bias=True), **Q_PROJ, bias="all"),
        rf"more than v: it has 16 other tensors, such as '.*bias'.*{TO_LORA}",
    ),
    "tokens": (
        lambda base, _: adapt(load(base), **TILED, trainable_token_indices=[1, 2]),
        rf"more than v: .*embed_tokens.*{TO_LORA}",
    ),
    "factors that the base does not determine": (
        lambda base, _: adapt(with_weight("orthogonal"), **Q_PROJ),
        rf"2 other tensors, such as '.*layers\.1\.self_attn\.q_proj\.tinylora_A'.*{TO_LORA}",
    ),
    "a projection that is not the seed's": (
        lambda base, _: with_other_projection(adapt(load(base), **TILED)),
        rf"1 other tensors, such as '.*layers\.2\.mlp\.up_proj\.tinylora_P'.*{TO_LORA}",
    ),
    "4 bit": (
        lambda _, folder: nf4(folder),
        "basis is that of bnb 4bit nf4 weights, which the checkpoint of the base model does not hold. Train it with "
        "basis='full-precision'.*--tinylora_basis full-precision.*--to lora`",
    ),
    "experts": (
        lambda base, _: adapt(make_experts("mixtral"), **LINEAR, tie="none", target_parameters=EXPERTS),
        rf"adapts 'model\.layers\.0\.mlp\.experts\.0\.down_proj', and a request carries adapters of linear modules.*{TO_LORA}",
    ),
    "an embedding": (
        lambda base, _: adapt(load(base), **{**TILED, "target_modules": ["embed_tokens", "q_proj"]}),
        rf"adapts 'model\.embed_tokens'.*{TO_LORA}",
    ),
    "an output layer": (
        lambda base, _: adapt(load(base), **{**TILED, "target_modules": ["lm_head", "q_proj"]}),
        rf"adapts 'lm_head'.*{TO_LORA}",
    ),
    "a rank above 255": (
        lambda base, _: adapt(
            make_tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=4),
            **{**Q_PROJ, "r": 256},
        ),
        "too large for a request: r=256, u=1, 1 groups, 7 modules",
    ),
    "more numbers than 16 bits count": (
        lambda base, _: adapt(make_tiny_llama(num_hidden_layers=1), **{**TILED, "u": 65536, "target_modules": ["q_proj"]}),
        "too large for a request: r=2, u=65536, 1 groups, 7 modules",
    ),
    "a config of stock PEFT": (
        lambda base, _: get_peft_model(load(base), peft.TinyLoraConfig(r=2, u=1, target_modules=["q_proj"])),
        "adapter 'default' is no TinyLoRA of peft_tinylora",
    ),
    "a LoRA": (
        lambda base, _: get_peft_model(load(base), LoraConfig(target_modules=["q_proj"])),
        "adapter 'default' is no TinyLoRA of peft_tinylora",
    ),
    "a base without weights": (
        lambda base, _: adapt(skeleton(str(base)), **TILED),
        r"factors of module 'model\.layers\.0\.self_attn\.q_proj' cannot be described: .*Load the base model's weights",
    ),
}  # fmt: skip


def with_other_projection(model: PeftModel) -> PeftModel:
    model.get_base_model().model.layers[2].mlp.up_proj.tinylora_P["default"].mul_(1.5)
    return model


@pytest.mark.filterwarnings("ignore:u=65536 numbers are trained:UserWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_request_cannot_carry_is_refused_with_a_remedy(base_folder, tmp_path, what: str) -> None:
    make, message = REFUSED[what]
    model = make(base_folder, tmp_path)
    config = model.peft_config["default"]
    with pytest.raises(AdapterFileError, match=message):
        inline_adapter(model)
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_a_weight_of_small_rank_needs_no_more_than_v(kind: str) -> None:
    adapter = inline_adapter(adapt(with_weight(kind), **Q_PROJ))
    assert_same(parse_inline(adapter.text(), MOST), adapter)


def test_a_4bit_base_with_the_original_basis_has_the_text_of_the_float_base(tmp_path) -> None:
    quantized = inline_adapter(nf4(tmp_path, basis="full-precision"))
    assert quantized.text() == inline_adapter(adapt(load(tmp_path), **TILED)).text()


def test_a_folder_that_holds_more_than_v_is_refused_with_a_remedy(base_folder, tmp_path) -> None:
    model = adapt(load(base_folder), **TILED, save_basis=True)
    model.save_pretrained(tmp_path / "portable")
    with pytest.raises(AdapterFileError, match="holds its frozen factors too.*export .*/portable FOLDER --to compact"):
        inline_adapter_of_folder(tmp_path / "portable", skeleton(str(base_folder)))
    REFUSED["modules saved whole"][0](base_folder, tmp_path).save_pretrained(tmp_path / "whole")
    with pytest.raises(AdapterFileError, match=f"more than v.*{TO_LORA}"):
        inline_adapter_of_folder(tmp_path / "whole", skeleton(str(base_folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_no_server_takes_are_not_sent(value: float) -> None:
    adapter = make_small()
    with pytest.raises(AdapterFileError, match="v holds NaN or Inf: the training diverged"):
        adapter.with_vectors(torch.full(adapter.v.shape, value, dtype=torch.float64))


def test_an_adapter_that_is_not_there_is_named() -> None:
    model = get_peft_model(
        make_tiny_llama(), TinyLoraConfig(target_modules="all-linear", tie="full", task_type="CAUSAL_LM")
    )
    with pytest.raises(AdapterFileError, match=r"adapter 'nobody' is .* not there, only \['default'\]"):
        inline_adapter(model, "nobody")
