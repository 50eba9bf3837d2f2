"""Compact to portable and back, and stock PEFT's files to compact."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import fill_vectors, run_python_process

from peft_tinylora import AdapterFileError, ConfigError, TinyLoraConfig, convert_adapter


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}

# Saves a stock adapter with a random v, and its logits. Arguments: the folder, fields of the config.
STOCK = """
    import sys, torch
    from ast import literal_eval
    from support import make_tiny_llama
    from peft import TinyLoraConfig, get_peft_model
    assert "peft_tinylora" not in sys.modules
    tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    config = TinyLoraConfig(init_weights="uniform", init_v_bound=0.5, **literal_eval(sys.argv[2]))
    model = get_peft_model(make_tiny_llama(), config)
    torch.save(model(tokens).logits.detach(), sys.argv[1] + "/logits.pt")
    model.save_pretrained(sys.argv[1])
"""


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def test_there_and_back_is_the_same_file(tiny_llama, tokens, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "compact")
    convert_adapter(tmp_path / "compact", tmp_path / "portable", "portable", tiny_llama())
    assert len(names(tmp_path / "portable")) == 4 * 28
    convert_adapter(tmp_path / "portable", tmp_path / "again", "compact", tiny_llama())
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("compact", "again")]
    assert files[0] == files[1]
    for name in ("portable", "again"):
        assert torch.equal(
            PeftModel.from_pretrained(tiny_llama(), tmp_path / name)(tokens).logits, model(tokens).logits
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear"},
        {"r": 2, "u": 3, "weight_tying": 0.4, "target_modules": "all-linear", "projection_seed": 7},
        {"r": 2, "u": 4, "target_modules": ["q_proj", "down_proj"], "save_projection": False},
    ],
)
def test_a_file_of_stock_peft_becomes_a_few_bytes_with_the_same_logits(tiny_llama, tokens, tmp_path, fields) -> None:
    (tmp_path / "stock").mkdir()
    run_python_process(STOCK, tmp_path / "stock", fields)
    base = tiny_llama()
    convert_adapter(tmp_path / "stock", tmp_path / "compact", "compact", base)
    assert names(tmp_path / "compact") == {"base_model.tinylora_v"}
    loaded = PeftModel.from_pretrained(base, tmp_path / "compact")  # the same base, which has no adapter left in it
    expected = torch.load(tmp_path / "stock" / "logits.pt")
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == {"base_model.tinylora_v"}
    convert_adapter(tmp_path / "compact", tmp_path / "back", "portable", tiny_llama())
    # PEFT's layout again, with its signs.
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "back"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4)


def test_what_the_base_does_not_determine_stays_in_the_file(tiny_llama, tokens, tmp_path) -> None:
    (tmp_path / "stock").mkdir()
    run_python_process(STOCK, tmp_path / "stock", {"r": 2, "u": 4, "target_modules": ["q_proj"]})
    tensors = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    q = "base_model.model.model.layers.{}.self_attn.q_proj.tinylora_{}"
    tensors[q.format(0, "P")] += 1.0  # not from the seed
    for kind in "AB":  # pairs exchanged: still singular factors of the weight
        tensor = tensors[q.format(1, kind)]
        tensors[q.format(1, kind)] = tensor.flip(0 if kind == "A" else 1).contiguous()
    save_file(tensors, tmp_path / "stock" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="basis is not that of this base model"):
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "stock")
    expected = stock(tokens).logits
    with pytest.warns(UserWarning, match="basis is not that of this base model"):
        convert_adapter(tmp_path / "stock", tmp_path / "compact", "compact", tiny_llama())
    assert names(tmp_path / "compact") == {
        "base_model.tinylora_v", q.format(0, "P"), q.format(1, "A"), q.format(1, "B")
    }  # fmt: skip
    with pytest.warns(UserWarning, match="basis is not that of this base model"):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "compact")
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused_and_nothing_is_written(tiny_llama, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.save_pretrained(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="to='tiny': allowed are 'compact', 'portable'"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", "tiny", tiny_llama())
    with pytest.raises(AdapterFileError, match="holds an adapter already"):
        convert_adapter(tmp_path / "adapter", tmp_path / "adapter", "portable", tiny_llama())
    with pytest.raises(AdapterFileError, match="another basis"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", "portable", tiny_llama(seed=1))
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="is a LORA adapter, and only TinyLoRA has these forms"):
        convert_adapter(tmp_path / "lora", tmp_path / "out", "compact", tiny_llama())
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
