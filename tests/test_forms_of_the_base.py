"""An adapter on other forms of its base: one basis for all of them, or the one that it was trained on and no other."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from support import fill_vectors, make_tiny_llama
from transformers import AutoModelForCausalLM

from peft_tinylora import BasisError, BasisMismatchError, TinyLoraConfig, TinyLoraLayer


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder of a base model whose shapes 4-bit kernels read."""
    make_tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_in_4bit(folder: Path) -> torch.nn.Module:
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})


def delta(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [m.get_delta_weight("default").flatten() for m in model.modules() if isinstance(m, TinyLoraLayer)]
    )


def test_a_full_precision_basis_fits_every_form_of_the_base(folder, tmp_path) -> None:
    model = get_peft_model(load_in_4bit(folder), TinyLoraConfig(**TILED, basis="full-precision"))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), TinyLoraConfig(**TILED))
    fill_vectors(plain, 0.5)
    assert torch.equal(delta(model), delta(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for base in (AutoModelForCausalLM.from_pretrained(folder), load_in_4bit(folder)):
            assert torch.equal(delta(PeftModel.from_pretrained(base, tmp_path / "adapter")), delta(plain))


def test_forms_of_the_base_are_not_exchanged_silently(folder, tmp_path) -> None:
    bases = {"float": lambda: AutoModelForCausalLM.from_pretrained(folder), "4-bit": lambda: load_in_4bit(folder)}
    updates = {}
    for form, load in bases.items():
        model = get_peft_model(load(), TinyLoraConfig(**TILED))
        fill_vectors(model, 0.5)
        model.save_pretrained(tmp_path / form)
        updates[form] = delta(model)
    with pytest.raises(BasisMismatchError, match="that of float weights.*bnb 4bit nf4 here.*basis='full-precision'"):
        PeftModel.from_pretrained(load_in_4bit(folder), tmp_path / "float")
    with pytest.raises(BasisMismatchError, match="that of bnb 4bit nf4 weights.*float here.*basis='unchecked'"):
        PeftModel.from_pretrained(bases["float"](), tmp_path / "4-bit")
    config = peft.PeftConfig.from_pretrained(tmp_path / "float")
    config.basis = "full-precision"
    model = PeftModel.from_pretrained(load_in_4bit(folder), tmp_path / "float", config=config)
    assert torch.equal(delta(model), updates["float"])
    config = peft.PeftConfig.from_pretrained(tmp_path / "4-bit")
    config.basis = "unchecked"
    with pytest.warns(UserWarning, match="The update is another one here"):
        model = PeftModel.from_pretrained(bases["float"](), tmp_path / "4-bit", config=config)
    # The signs are those of training, and the update is near it.
    assert torch.nn.functional.cosine_similarity(delta(model), updates["4-bit"], dim=0) > 0.8


def test_full_precision_from_a_checkpoint_in_several_files(folder, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    settings = TinyLoraConfig(**TILED, basis="full-precision")
    model = get_peft_model(load_in_4bit(tmp_path / "sharded"), settings)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    fill_vectors(plain, 0.5)
    assert torch.equal(delta(model), delta(plain))


def test_full_precision_without_a_checkpoint_says_what_to_do(folder) -> None:
    base = load_in_4bit(folder)
    base.name_or_path = ""
    with pytest.raises(BasisError, match="this model has no name: load it with from_pretrained"):
        get_peft_model(base, TinyLoraConfig(**TILED, basis="full-precision"))
    base = load_in_4bit(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BasisError, match="has no model.safetensors and no model.safetensors.index.json"):
        get_peft_model(base, TinyLoraConfig(**TILED, basis="full-precision"))
    tensors = {"model.embed_tokens.weight": torch.zeros(48, 64)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BasisError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        get_peft_model(base, TinyLoraConfig(**TILED, basis="full-precision"))
