"""Combinations of adapters: the sum against the sum of their updates, the others against PEFT's for a task vector."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from support import fill_vectors

from peft_tinylora import TinyLoraConfig


TILED = {"r": 2, "u": 3, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


@pytest.fixture
def model(tiny_llama):
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED), adapter_name="a")
    model.add_adapter("b", TinyLoraConfig(**TILED))
    for seed, name in enumerate("ab"):
        fill_vectors(model, 0.5, seed=seed, adapter_name=name)
    return model.eval()


def table(model: torch.nn.Module, name: str) -> torch.Tensor:
    vectors = model.tinylora_v[name]
    return torch.stack([vectors[group].detach() for group in sorted(vectors, key=int)])


def test_linear_is_the_sum_of_the_updates(model) -> None:
    model.add_weighted_adapter(["a", "b"], [0.75, -2.0], "c")
    for layer in (model.base_model.model.model.layers[i].self_attn.v_proj for i in range(4)):
        expected = 0.75 * layer.get_delta_weight("a").double() - 2.0 * layer.get_delta_weight("b").double()
        torch.testing.assert_close(layer.get_delta_weight("c").double(), expected, rtol=1e-4, atol=1e-5)
    assert not any(v.requires_grad for v in model.tinylora_v["c"].values())
    assert all(v.requires_grad for v in model.tinylora_v["a"].values())


@pytest.mark.parametrize("combination_type", ["ties", "magnitude_prune"])
def test_the_others_are_those_of_peft(model, combination_type: str) -> None:
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type=combination_type, density=0.5)
    tables, weights = [table(model, name) for name in "ab"], torch.tensor([1.0, 0.5])
    expected = getattr(merge_utils, combination_type)(tables, weights, 0.5)
    assert torch.equal(table(model, "c"), expected)
    assert not torch.equal(expected, tables[0] + 0.5 * tables[1])


@pytest.mark.parametrize("combination_type", ["dare_linear", "dare_ties"])
def test_random_pruning_keeps_its_share(model, combination_type: str) -> None:
    model.add_weighted_adapter(["a"], [1.0], "thinned", combination_type=combination_type, density=0.5)
    model.add_weighted_adapter(["a"], [1.0], "all", combination_type=combination_type, density=1.0)
    kept = table(model, "thinned") != 0
    assert 2 <= kept.sum() <= 19  # of 21; fewer or more are drawn once in 10,000 times
    torch.testing.assert_close(table(model, "thinned"), 2 * table(model, "a") * kept)
    torch.testing.assert_close(table(model, "all"), table(model, "a"))


def test_a_combination_is_used_saved_and_loaded_as_any_adapter(model, tiny_llama, tokens, tmp_path) -> None:
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    wanted = model(tokens).logits
    mixed = model(tokens, adapter_names=["mean"] * 3).logits
    torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mean").eval()
    assert torch.equal(loaded(tokens).logits, wanted)
    assert (tmp_path / "mean" / "adapter_model.safetensors").stat().st_size < 250


def test_factors_are_those_of_the_adapters_and_not_of_another_with_their_settings(model, tiny_llama, tokens) -> None:
    """The first adapter has the same settings as "a" and "b", but factors of its own, as from a file."""
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED), adapter_name="first")
    model.add_adapter("a", TinyLoraConfig(**TILED))
    for layer in (module for module in model.modules() if hasattr(module, "tinylora_B")):
        layer.tinylora_B["first"].mul_(3)
    fill_vectors(model, 0.5, adapter_name="a")
    model.eval().set_adapter("a")
    wanted = model(tokens).logits
    model.add_weighted_adapter(["a"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(model(tokens).logits, wanted)


MISTAKES = {
    "unknown adapter": ({"adapters": ["a", "x"]}, r"adapters=\['a', 'x'\].* which has 'a', 'b'"),
    "no adapters": ({"adapters": [], "weights": []}, "for each of one or more adapters"),
    "weights missing": ({"weights": [1.0]}, r"weights=\[1.0\]: a finite weight is needed for each"),
    "NaN": ({"weights": [1.0, float("nan")]}, "a finite weight is needed for each"),
    "name taken": ({"adapter_name": "b"}, "adapter_name='b': the model has an adapter of that name"),
    "svd": ({"combination_type": "svd"}, "combination_type='svd': allowed are 'linear', .* 'linear' is exact"),
    "no density": (
        {"combination_type": "ties"},
        "density=None: 'ties' keeps this share of the numbers, above 0, up to 1",
    ),
    "density zero": ({"combination_type": "dare_linear", "density": 0}, "density=0: 'dare_linear' keeps this share"),
    "density too large": ({"combination_type": "ties", "density": 2}, "density=2: 'ties' keeps this share"),
    "vote": ({"majority_sign_method": "all"}, "majority_sign_method='all': allowed are 'total' and 'frequency'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_add_nothing(model, mistake: str) -> None:
    fields, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "c", **fields})
    assert set(model.peft_config) == set(model.tinylora_v) == {"a", "b"}


def test_adapters_over_different_bases_are_refused(model) -> None:
    model.add_adapter("c", TinyLoraConfig(**{**TILED, "projection_seed": 1}))
    with pytest.raises(ValueError, match="'c' has another basis than 'a', so that no v is their sum"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "d")
    assert "d" not in model.peft_config


def test_adapters_that_train_more_than_v_are_refused(tiny_llama) -> None:
    config = TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="one of them trains more than v"):
        model.add_weighted_adapter(["default"], [1.0], "c")
