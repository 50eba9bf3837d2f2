"""The plugin against stock PEFT, which runs in a process of its own without the plugin."""

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support import fill_vectors, run_python_process

from peft_tinylora import TinyLoraConfig


# Saves stock adapters with a random v, and their logits. Argument: {folder: fields of the config}.
MAKE = """
    import sys, torch
    from ast import literal_eval
    from support import make_tiny_llama
    from peft import TinyLoraConfig, get_peft_model
    assert "peft_tinylora" not in sys.modules
    tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
    for folder, fields in literal_eval(sys.argv[1]).items():
        dtype = getattr(torch, fields.pop("base_dtype", "float32"))
        torch.manual_seed(5)
        config = TinyLoraConfig(init_weights="uniform", init_v_bound=0.5, **fields)
        model = get_peft_model(make_tiny_llama().to(dtype), config)
        torch.save(model(tokens).logits.detach(), folder + "/logits.pt")
        model.save_pretrained(folder)
"""

# Loads adapters with stock PEFT and saves their logits, or prints why not. Arguments: their folders.
LOAD = """
    import sys, torch
    from support import make_tiny_llama
    from peft import PeftModel
    assert "peft_tinylora" not in sys.modules
    tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
    for folder in sys.argv[1:]:
        try:
            model = PeftModel.from_pretrained(make_tiny_llama(), folder)
            torch.save(model(tokens).logits.detach(), folder + "/stock_logits.pt")
        except ValueError as error:
            print(error)
"""

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS = {
    "untied": {"r": 2, "u": 4, "target_modules": LINEAR},
    "one v": {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear"},
    "uneven groups": {"r": 2, "u": 3, "weight_tying": 0.4, "target_modules": "all-linear"},
    "seeded projections": {"r": 4, "u": 5, "weight_tying": 0.5, "projection_seed": 7, "save_projection": False, "target_modules": LINEAR},
    "embedding": {"r": 2, "u": 4, "weight_tying": 1.0, "target_modules": ["embed_tokens", "k_proj"]},
    "more rank than a module has": {"r": 20, "u": 4, "weight_tying": 1.0, "target_modules": ["k_proj", "q_proj"]},
    "bf16 base": {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear", "base_dtype": "bfloat16"},
    "layers": {"r": 1, "u": 1, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
}  # fmt: skip


@pytest.fixture(scope="module")
def stock_adapters(tmp_path_factory) -> dict[str, Path]:
    """Name in CONFIGS -> folder of the adapter that stock PEFT made of it, with its logits beside it."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in CONFIGS}
    run_python_process(MAKE, {str(folders[name]): CONFIGS[name] for name in CONFIGS})
    return folders


def effect(logits: torch.Tensor, tokens: torch.Tensor, base: torch.nn.Module) -> float:
    return (logits - base(tokens).logits).abs().max().item()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bf16 base"])
def test_adapter_saved_by_stock_peft_gives_the_same_logits(tiny_llama, tokens, stock_adapters, tmp_path, name) -> None:
    expected = torch.load(stock_adapters[name] / "logits.pt")
    assert effect(expected, tokens, tiny_llama()) > 1e-4
    model = PeftModel.from_pretrained(tiny_llama(), stock_adapters[name])
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=2e-6)
    # and once more, after this package wrote it: in PEFT's layout, with the factors found in the file
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (stock_adapters[name], tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_adapter_saved_by_stock_peft_on_a_bf16_base(tiny_llama, tokens, stock_adapters) -> None:
    model = PeftModel.from_pretrained(tiny_llama().bfloat16(), stock_adapters["bf16 base"])
    expected = torch.load(stock_adapters["bf16 base"] / "logits.pt")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("config_class", [TinyLoraConfig, peft.TinyLoraConfig])
@pytest.mark.parametrize("name", ["untied", "one v", "uneven groups", "layers"])
def test_fresh_adapter_of_peft_fields_is_the_one_that_stock_peft_makes(
    tiny_llama, tokens, stock_adapters, name, config_class
) -> None:
    torch.manual_seed(5)
    model = get_peft_model(tiny_llama(), config_class(init_weights="uniform", init_v_bound=0.5, **CONFIGS[name]))
    expected = torch.load(stock_adapters[name] / "logits.pt")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=2e-6)


def test_stock_peft_loads_what_this_package_saves_with_peft_fields_only(tiny_llama, tokens, tmp_path) -> None:
    models = {}
    for name in ("untied", "one v", "seeded projections"):
        model = get_peft_model(tiny_llama(), TinyLoraConfig(**CONFIGS[name]))
        fill_vectors(model, 0.4)
        model.save_pretrained(tmp_path / name)
        models[name] = model
    tied = TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules=LINEAR)
    get_peft_model(tiny_llama(), tied).save_pretrained(tmp_path / "tied")

    printed = run_python_process(LOAD, *(tmp_path / name for name in (*models, "tied")))
    for name, model in models.items():
        logits = torch.load(tmp_path / name / "stock_logits.pt")
        assert effect(logits, tokens, tiny_llama()) > 0.05
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=2e-6)
    assert "`weight_tying` should be a float between 0.0 and 1.0" in printed
    assert not (tmp_path / "tied" / "stock_logits.pt").exists()


PORTABLE = {
    "tiled": {"u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"},
    "structured, split": {"u": 3, "tie": "structured", "n_tie": 2, "sigma": "split", "target_modules": "all-linear"},
    "mapping": {"u": 2, "tie": {"a": ".*attn.*", "b": ".*mlp.*"}, "target_modules": "all-linear"},
    "excluded": {"u": 1, "tie": "full", "target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "embedding": {"u": 2, "tie": "none", "target_modules": ["embed_tokens", "q_proj"]},
    "layers": {"u": 1, "tie": "full", "target_modules": LINEAR, "layers_to_transform": [0, 2]},
}  # fmt: skip


def test_stock_peft_loads_the_portable_form_with_the_same_logits_and_refuses_the_compact_one(
    tiny_llama, tokens, tmp_path
) -> None:
    models = {}
    for name, fields in PORTABLE.items():
        models[name] = get_peft_model(tiny_llama(), TinyLoraConfig(**fields, save_basis=True))
        fill_vectors(models[name], 0.4)
        models[name].save_pretrained(tmp_path / name)
        get_peft_model(tiny_llama(), TinyLoraConfig(**fields)).save_pretrained(tmp_path / f"{name}, compact")
    plain = TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules="all-linear", save_basis=False)
    get_peft_model(tiny_llama(), plain).save_pretrained(tmp_path / "PEFT's fields, compact")
    folders = sorted(path for path in tmp_path.iterdir())
    printed = run_python_process(LOAD, *folders)
    assert printed.count("`weight_tying` should be a float between 0.0 and 1.0") == len(PORTABLE) + 1
    for name, model in models.items():
        logits = torch.load(tmp_path / name / "stock_logits.pt")
        assert effect(logits, tokens, tiny_llama()) > 0.01
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=2e-6)
        assert torch.equal(
            PeftModel.from_pretrained(tiny_llama(), tmp_path / name)(tokens).logits, model(tokens).logits
        )
    assert not any((folder / "stock_logits.pt").exists() for folder in folders if "compact" in folder.name)


def test_stock_adapter_of_another_base_warns(tiny_llama, stock_adapters) -> None:
    with pytest.warns(UserWarning, match=r"basis is not that of this base model: module 'model\.layers\.0"):
        PeftModel.from_pretrained(tiny_llama(seed=1), stock_adapters["one v"])


def test_a_process_without_the_plugin_has_stock_peft() -> None:
    script = """
        import peft
        print(peft.PEFT_TYPE_TO_CONFIG_MAPPING["TINYLORA"].__module__)
        import peft_tinylora
        print(peft.PEFT_TYPE_TO_CONFIG_MAPPING["TINYLORA"].__module__)
    """
    assert run_python_process(script).split() == ["peft.tuners.tinylora.config", "peft_tinylora.config"]
