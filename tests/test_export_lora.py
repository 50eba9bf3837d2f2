"""export.py: an adapter as a plain LoRA, in a process that has PEFT alone."""

import json
from pathlib import Path

import pytest
import torch
from exported import (
    ARCHITECTURES,
    BF16,
    BF16_EXPERTS,
    CASES,
    FP32,
    STOCK,
    TILED,
    distance,
    load,
    save_adapter,
    save_base,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support import fill_vectors, run_python_process
from torch import nn

from peft_tinylora import AdapterFileError, TinyLoraConfig, export, export_adapter


# Loads each LoRA with PEFT alone and keeps its logits.
PLAIN_PEFT = """
    import sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    folder = sys.argv[1]
    tokens = torch.load(folder + "/tokens.pt")
    for name, base, lora, dtype in torch.load(folder + "/cases.pt"):
        base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        with torch.no_grad():
            torch.save(PeftModel.from_pretrained(base, lora)(tokens).logits, f"{folder}/{name}.pt")
    assert "peft_tinylora" not in sys.modules
"""


@pytest.fixture(scope="module")
def in_plain_peft(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, Path]]:
    """Case -> logits of the exported LoRA in a process without this package, of the tuner, of the base; the folder."""
    folder = tmp_path_factory.mktemp("plain_peft")
    tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, folder / "tokens.pt")
    expected, cases = {}, []
    for kind in ("embedded", *CASES):
        base = save_base(kind, folder / kind)
        for dtype in (torch.float32, torch.bfloat16) if kind in ARCHITECTURES else (torch.float32,):
            name = f"{kind}-{dtype}"
            with torch.no_grad():
                model = save_adapter(kind, base, folder / f"{name}-tinylora", dtype)
                expected[name] = model(tokens).logits, load(base, dtype)(tokens).logits
            export_adapter(folder / f"{name}-tinylora", folder / f"{name}-lora", "lora", load(base, dtype))
            cases.append((name, str(base), str(folder / f"{name}-lora"), str(dtype).removeprefix("torch.")))
    torch.save(cases, folder / "cases.pt")
    run_python_process(PLAIN_PEFT, folder)
    return {
        name: (torch.load(folder / f"{name}.pt"), *logits, folder / f"{name}-lora")
        for name, logits in expected.items()
    }


@pytest.mark.parametrize("kind", ["embedded", *CASES])
def test_a_lora_in_plain_peft_is_the_same_function_in_float32(in_plain_peft, kind) -> None:
    *logits, folder = in_plain_peft[f"{kind}-torch.float32"]
    assert distance(*logits) < FP32
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_lora_in_plain_peft_is_the_same_function_in_bfloat16(in_plain_peft, kind) -> None:
    *logits, _ = in_plain_peft[f"{kind}-torch.bfloat16"]
    assert distance(*logits) < (BF16_EXPERTS if "target_parameters" in CASES.get(kind, (0, {}))[1] else BF16)


def test_what_other_runtimes_read_is_where_they_look_for_it(in_plain_peft) -> None:
    folder = in_plain_peft["llama-torch.float32"][-1]
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules, "lora_dropout": 0.0}
    expected |= {"rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "inference_mode": True, "use_rslora": False}
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.3.mlp.down_proj.lora_"
    assert len(tensors) == 2 * 28 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors[f"{prefix}A.weight"].shape == (2, 64) and tensors[f"{prefix}B.weight"].shape == (32, 2)


@pytest.mark.parametrize("kind", ["excluded", "some_layers"])
def test_modules_are_named_in_full_where_a_last_component_would_match_others(in_plain_peft, kind) -> None:
    config = json.loads((in_plain_peft[f"{kind}-torch.float32"][-1] / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list) and len(config["target_modules"]) == (26, 4)[kind != "excluded"]
    assert all(name.startswith("model.layers.") for name in config["target_modules"])
    assert config["exclude_modules"] is None and config["layers_to_transform"] is None


def test_modules_are_named_by_a_pattern_where_a_full_name_would_match_others(tmp_path) -> None:
    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.head = nn.Linear(6, 6)
            self.inner = Nested(depth - 1) if depth else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x)).tanh()

    base, x = Nested(1), torch.randn(4, 6)
    expected_base = base(x)
    model = get_peft_model(base, TinyLoraConfig(u=2, tie="none", target_modules="head|none"))
    fill_vectors(model, 1.0)
    expected = model(x)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", base)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"] == "head"
    assert distance(PeftModel.from_pretrained(base, tmp_path / "lora")(x), expected, expected_base) < FP32


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_factors_are_stored_in_the_dtype_asked_for(tmp_path, tokens, dtype) -> None:
    base = save_base("llama", tmp_path / "base")
    expected = save_adapter("llama", base, tmp_path / "adapter")(tokens).logits
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", load(base), dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{str(dtype).removeprefix('torch.')}"}
    exported = PeftModel.from_pretrained(load(base), tmp_path / "lora")(tokens).logits
    assert distance(exported, expected, load(base)(tokens).logits) < (2e-3 if dtype == "float16" else 2e-2)


@pytest.mark.filterwarnings("ignore:r=20 is larger than the smallest side:UserWarning")
def test_ranks_that_differ_keep_a_scaling_of_one(tiny_llama, tokens, tmp_path) -> None:
    (tmp_path / "stock").mkdir()
    run_python_process(STOCK, tmp_path / "stock", {"r": 20, "u": 2, "target_modules": ["q_proj", "k_proj"]})
    export_adapter(tmp_path / "stock", tmp_path / "lora", "lora", tiny_llama())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 20
    assert len(config["rank_pattern"]) == 4 and set(config["rank_pattern"].values()) == {16}  # k_proj has 16 rows
    assert config["rank_pattern"] == config["alpha_pattern"]
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")(tokens).logits
    assert distance(lora, torch.load(tmp_path / "stock" / "logits.pt"), tiny_llama()(tokens).logits) < FP32


def test_what_no_lora_can_express_is_refused_by_name(tmp_path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8, max_norm=1.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.embed(x)

    model = get_peft_model(Model(), TinyLoraConfig(u=2, tie="none", target_modules=["embed"]))
    fill_vectors(model, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    with pytest.raises(AdapterFileError, match="'embed' cannot be written as a LoRA: its embedding has max_norm"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", base)

    class Experts(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(1, 8, 6))

    fields = {"u": 2, "tie": "none", "target_modules": [], "target_parameters": ["up"]}
    model = get_peft_model(nn.Sequential(Experts()), TinyLoraConfig(**fields))
    model.save_pretrained(tmp_path / "expert")
    with pytest.raises(
        AdapterFileError, match="'0' cannot be written as a LoRA: it is a transposed parameter of a sin"
    ):
        export_adapter(tmp_path / "expert", tmp_path / "lora", "lora", model.unload())
    assert not (tmp_path / "lora").exists()


def test_a_dtype_too_small_for_the_update_is_refused_by_name(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        base[0].weight.mul_(1e6)
    model = get_peft_model(base, TinyLoraConfig(u=2, tie="none", target_modules=["0"]))
    fill_vectors(model, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        AdapterFileError, match=r"update of '0' is too large for torch.float16: choose dtype='bfloat16'"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", model.unload(), dtype="float16")


def test_a_lora_that_peft_would_not_read_back_is_refused(tiny_llama, tmp_path, monkeypatch) -> None:
    get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(export, "_target_modules", lambda *_: ["q_proj"])
    with pytest.raises(AdapterFileError, match=r"does not give 'base_model\.model\.model\.layers\.0\..*back"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", tiny_llama())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
