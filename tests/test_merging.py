"""merging.py: rounding, what is left of the update, and the warning."""

import math
import warnings

import pytest
import torch
from peft import get_peft_model
from support import fill_vectors, make_tiny_llama

from peft_tinylora import MergeError, TinyLoraConfig, TinyLoraLayer
from peft_tinylora.merging import rounded
from peft_tinylora.survival import MergeReport, Survival, survival


CONFIG = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


def adapted(dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> torch.nn.Module:
    model = get_peft_model(make_tiny_llama().to(dtype), TinyLoraConfig(**CONFIG)).eval()
    fill_vectors(model, scale)
    return model


def test_survival_is_that_of_numpy():
    generator = torch.Generator().manual_seed(0)
    update, survived = torch.randn(2, 30, 20, generator=generator)
    result = survival(update, survived)
    a, b = update.double().flatten().numpy(), survived.double().flatten().numpy()
    assert result.cosine == pytest.approx((a @ b) / math.sqrt((a @ a) * (b @ b)), rel=1e-6)
    assert result.relative_error == pytest.approx(math.sqrt(((a - b) @ (a - b)) / (a @ a)), rel=1e-6)
    halves = survival(update[:15], survived[:15]) + survival(update[15:], survived[15:])
    assert halves.relative_error == pytest.approx(result.relative_error, rel=1e-6)


def test_survival_of_nothing():
    zero, one = torch.zeros(3), torch.ones(3)
    assert (survival(zero, zero).cosine, survival(zero, zero).relative_error) == (1.0, 0.0)
    assert (survival(one, zero).cosine, survival(one, zero).relative_error) == (0.0, 1.0)
    assert survival(zero, one).relative_error == math.inf


def test_a_report_prints_every_module_and_the_total():
    report = MergeReport({"a": Survival(1.0, 1.0, 1.0, 0.0), "layers.b": Survival(1.0, 0.0, 0.0, 1.0)})
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["module", "a", "layers.b", "total"]
    assert lines[1].split()[1:] == ["1.0000", "0"] and lines[2].split()[1:] == ["0.0000", "1"]
    assert report.total.relative_error == pytest.approx(math.sqrt(0.5))


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 2**-10, -(1.0 + 3 * 2**-10), 3.14159e-3, -2.5e10])
    draws = torch.stack([rounded(values, torch.bfloat16, generator).double() for _ in range(4000)])
    nearest = values.to(torch.bfloat16)
    spacing = torch.maximum(
        (nearest.nextafter(nearest * 2) - nearest).abs(), (nearest - nearest.nextafter(nearest * 0)).abs()
    ).double()
    assert ((draws - values.double()).abs() <= spacing).all()
    standard_error = spacing / 2 / math.sqrt(len(draws))
    assert ((draws.mean(0) - values.double()).abs() < 5 * standard_error).all()
    assert all(len(column.unique()) == 2 for column in draws.T)


def test_stochastic_rounding_keeps_what_needs_no_rounding_and_what_is_not_finite():
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, 1.0, -2.5, math.inf, -math.inf])
    assert torch.equal(rounded(exact, torch.bfloat16, generator).float(), exact)
    assert rounded(torch.tensor([math.nan]), torch.bfloat16, generator).isnan().all()


def test_stochastic_rounding_is_repeatable_and_differs_by_seed():
    merged = []
    for seed in (0, 0, 1):
        model = adapted()
        model.merge_adapter(stochastic_rounding_seed=seed)
        merged.append(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight.detach())
    assert torch.equal(merged[0], merged[1]) and not torch.equal(merged[0], merged[2])


def test_stochastic_rounding_keeps_the_direction_of_a_small_update():
    """To nearest, an update below the spacing of bf16 vanishes; at random, its mean over the matrix is kept."""
    # <survived, update> / <update, update> is 1 where nothing is lost on average
    kept = {}
    for seed in (None, 0):
        model = adapted(scale=2e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.merge_adapter(stochastic_rounding_seed=seed)
        total = model.merge_report.total
        kept[seed] = total.product / total.update
    assert kept[0] == pytest.approx(1.0, abs=0.3)
    assert kept[None] < 0.7 * kept[0]


def test_a_float32_base_ignores_stochastic_rounding():
    model = adapted(torch.float32)
    model.merge_adapter(stochastic_rounding_seed=0)
    assert model.merge_report.total.relative_error < 1e-4


def test_a_merge_that_loses_more_than_a_tenth_warns_once_with_figure_and_remedy():
    model = adapted(scale=1e-3)
    with pytest.warns(
        UserWarning, match=r"Merging lost \d+% of the update.*Keep the adapter unmerged, or load the base"
    ):
        model.merge_adapter()
    assert model.merge_report.total.relative_error > 0.1
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()


def test_a_merge_that_loses_little_is_silent():
    model = adapted(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()
    assert 0 < model.merge_report.total.relative_error < 1e-3


def test_nan_is_warned_of_and_refused_by_safe_merge_with_nothing_left_merged(tokens):
    model = adapted(torch.float32)
    expected = model(tokens).logits
    with torch.no_grad():
        model.tinylora_v["default"]["6"].fill_(math.nan)  # the last group: those before it are merged first
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    with pytest.warns(UserWarning, match="NaN or Inf"):
        model.merge_adapter()
    model.unmerge_adapter()
    fill_vectors(model, 0.02)
    assert torch.equal(model(tokens).logits, expected)


def test_the_report_of_merge_and_unload_stays_with_the_peft_model(tokens):
    model = adapted(torch.float32)
    expected = model(tokens).logits
    merged = model.merge_and_unload()
    assert len(model.merge_report) == 28
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=1e-4)


def test_merging_a_second_adapter_starts_from_the_original(tokens):
    model = adapted(torch.float32)
    model.add_adapter("second", TinyLoraConfig(**CONFIG | {"projection_seed": 3}))
    fill_vectors(model, 0.02, adapter_name="second")
    original = {name: p.clone() for name, p in model.named_parameters() if name.endswith("base_layer.weight")}
    model.base_model.set_adapter(["default", "second"])
    expected = model(tokens).logits
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        assert name not in original or torch.equal(parameter, original[name])


def test_a_quantized_weight_is_not_rounded_stochastically(tmp_path):
    from quantized import BACKENDS

    make_tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path)
    model = get_peft_model(BACKENDS["bnb-nf4"](tmp_path), TinyLoraConfig(**CONFIG))
    with pytest.raises(MergeError, match=r"stochastic_rounding_seed is for bfloat16 weights.*bnb 4bit"):
        model.merge_adapter(stochastic_rounding_seed=0)


# --- merged models
def test_merge_and_unmerge_give_the_base_back_to_the_bit(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), TinyLoraConfig(**CONFIG))
    names = [name for name, _ in model.named_parameters() if "base_layer" in name]
    before = {name: model.get_parameter(name).clone() for name in names}
    for cycle in range(5):  # TRL merges and unmerges at each step, while v moves
        fill_vectors(model, 0.2, seed=cycle)
        model.merge_adapter()
        assert any(not torch.equal(model.get_parameter(name), before[name]) for name in names)
        model.unmerge_adapter()
        assert all(torch.equal(model.get_parameter(name), before[name]) for name in names)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_model_is_the_adapted_model(tiny_llama, tokens, safe_merge: bool) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**CONFIG))
    model.add_adapter("second", TinyLoraConfig(**{**CONFIG, "projection_seed": 1}))
    fill_vectors(model, 0.3)
    fill_vectors(model, 0.3, seed=3, adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    expected = model(tokens).logits
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, TinyLoraLayer) for module in merged.modules())
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_merge_rounds_once() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)).bfloat16()
    model = get_peft_model(linear, TinyLoraConfig(u=1, tie="none", target_modules=["0"]))
    fill_vectors(model, 0.3)
    layer = model.base_model.model[0]
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, exact.to(torch.bfloat16))


def test_safe_merge_refuses_nan_and_leaves_the_base(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**CONFIG))
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    fill_vectors(model, float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, weight)


def test_merging_a_tied_embedding_leaves_the_output_layer(tiny_llama, tokens) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied targets
        model = get_peft_model(
            tiny_llama(tie_word_embeddings=True),
            TinyLoraConfig(u=1, tie="full", target_modules=["embed_tokens", "q_proj"]),
        )
        fill_vectors(model, 0.5)
        expected = model(tokens).logits
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_moving_a_merged_model_moves_what_unmerging_puts_back(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**CONFIG))
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.float64


def test_unload_gives_the_base_back(tiny_llama, tokens) -> None:
    base = tiny_llama()
    expected = base(tokens).logits
    keys = list(base.state_dict())
    model = get_peft_model(base, TinyLoraConfig(**CONFIG))
    fill_vectors(model)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == keys
    assert torch.equal(unloaded(tokens).logits, expected)
