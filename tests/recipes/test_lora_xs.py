"""lora_xs.py: the update against numpy's SVD; what is trained, and stays so; the LoRA that it is folded into."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from support import make_tiny_llama, run_python_process
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_tinylora import BasisError
from peft_tinylora.weight import dense_matrix, keep_differentiable, quantization_backend
from trl_recipes.arguments import RecipeError
from trl_recipes.lora_xs import fold, install, lora_layers


MODULES = 28  # 4 layers of 7
OUTPUT_AFTER_LOADING = """
    import sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
    assert "peft_tinylora" not in sys.modules
    tokens = torch.load(sys.argv[3])
    torch.save(model(tokens).logits.detach(), sys.argv[4])
"""


def with_lora_xs(base: torch.nn.Module, r: int = 2, targets: str | list[str] = "all-linear") -> PeftModel:
    config = LoraConfig(r=r, lora_alpha=r, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    keep_differentiable(model)
    install(model)
    return model


def set_R(model: PeftModel, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Random R, by the module's name."""
    generator = torch.Generator().manual_seed(5)
    R = {}
    for name, layer in lora_layers(model).items():
        factor = layer.lora_B["default"]
        R[name] = scale * torch.randn(factor.R.shape, generator=generator)
        factor.R.data.copy_(R[name])
    return R


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def update_by_numpy(W: torch.Tensor, R: torch.Tensor) -> np.ndarray:
    """U S R V^T in float64; of each pair of vectors the sign with which the largest entry on the right is positive."""
    r = len(R)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    signs = np.sign(Vh[np.arange(r), np.abs(Vh).argmax(1)])
    return (U * signs * S) @ R.double().numpy() @ (Vh * signs[:, None])


def test_the_update_is_that_of_the_papers_formula(tokens):
    base = make_tiny_llama()
    weights = {name: m.weight.detach().clone() for name, m in base.named_modules() if hasattr(m, "in_features")}
    without = base(tokens).logits
    model = with_lora_xs(base, r=3)
    assert torch.equal(model(tokens).logits, without)  # R starts at zero
    R = set_R(model)
    layers = lora_layers(model)
    assert len(layers) == MODULES
    for name, layer in layers.items():
        expected = update_by_numpy(weights[name], R[name])
        update = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(update, expected, atol=2e-5 * np.abs(expected).max())
    assert (model(tokens).logits - without).abs().max() > 0.1
    with torch.no_grad():
        for name, layer in layers.items():
            layer.get_base_layer().weight += torch.from_numpy(update_by_numpy(weights[name], R[name])).float()
        with model.disable_adapter():
            merged = model(tokens).logits
        for name, layer in layers.items():
            layer.get_base_layer().weight.copy_(weights[name])
    torch.testing.assert_close(model(tokens).logits, merged, rtol=1e-4, atol=1e-4)


def test_R_alone_is_trained_also_after_the_adapter_was_off(tokens):
    """PEFT makes all parameters of a LoRA trainable when adapters are switched on again, as after scoring the base."""
    model = with_lora_xs(make_tiny_llama(), r=2)
    assert sum(p.numel() for p in trained(model).values()) == MODULES * 4
    with model.disable_adapter():
        model(tokens)
    names = trained(model)
    assert len(names) == MODULES and all(name.endswith("lora_B.default.R") for name in names)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if name not in names}
    optimizer = torch.optim.SGD(names.values(), lr=0.1)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in names.values())
    optimizer.step()
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_its_gradient_is_that_of_the_formula():
    """Numerically, in float64."""
    layer = lora_layers(with_lora_xs(make_tiny_llama(), r=3))["model.layers.2.mlp.down_proj"].double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 64, dtype=torch.float64, generator=generator)
    R = torch.randn(3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda R: torch.func.functional_call(layer, {"lora_B.default.R": R}, (x,)), (R,))


def test_folded_it_is_a_lora_that_any_peft_loads(base_folder, tokens, tmp_path):
    model = with_lora_xs(AutoModelForCausalLM.from_pretrained(base_folder), r=2)
    R = set_R(model)
    before = model(tokens).logits
    fold(model)
    folded = model(tokens).logits
    assert R and (folded - before).abs().max() < 1e-4  # one rounding
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens.pt")
    run_python_process(
        OUTPUT_AFTER_LOADING, base_folder, tmp_path / "adapter", tmp_path / "tokens.pt", tmp_path / "logits.pt"
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), folded)


def test_a_checkpoint_gives_back_R_and_the_signs_it_was_trained_with(base_folder, tokens):
    model = with_lora_xs(AutoModelForCausalLM.from_pretrained(base_folder), r=2)
    set_R(model)
    with torch.no_grad():  # as on a machine whose decomposition has other signs
        for layer in lora_layers(model).values():
            layer.lora_A["default"].weight[0] *= -1
            layer.lora_B["default"].US[:, 0] *= -1
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    resumed = with_lora_xs(AutoModelForCausalLM.from_pretrained(base_folder), r=2)
    set_peft_model_state_dict(resumed, state)
    assert torch.equal(resumed(tokens).logits, model(tokens).logits)
    assert len(trained(resumed)) == MODULES


def test_factors_of_a_4_bit_base_are_those_of_its_dequantized_weights(tiny_model_dir):
    pytest.importorskip("bitsandbytes")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=quantized, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = with_lora_xs(base, r=2)
    R = set_R(model)
    for name, layer in lora_layers(model).items():
        W = dense_matrix(layer.get_base_layer(), quantization_backend(layer.get_base_layer(), base))
        expected = update_by_numpy(W, R[name])
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        np.testing.assert_allclose(update.detach().numpy(), expected, atol=1e-4 * np.abs(expected).max())
    model.eval()
    tokens = torch.tensor([[7, 4, 8, 5]])
    model(tokens)  # what packs the weights, if anything
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trained(model).values())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_it_trains_in_mixed_precision_and_with_gradient_checkpointing(tokens):
    model = with_lora_xs(make_tiny_llama(), r=2)
    set_R(model)

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert {p.grad.dtype for p in trained(model).values()} == {torch.float32}
        return torch.cat([p.grad.flatten() for p in trained(model).values()])

    model.train()
    exact = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(), exact, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients()
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.99
    assert not torch.equal(rounded, exact)


def test_merged_into_the_base_it_is_the_same_function(tokens):
    """As TRL does to send the weights to vLLM."""
    model = with_lora_xs(make_tiny_llama(), r=2)
    set_R(model)
    before = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


def test_a_rank_that_a_weight_does_not_have_is_refused_by_name():
    with pytest.raises(BasisError, match=r"r=17 .*model\.layers\.0\.self_attn\.k_proj.*r=16 or less"):
        with_lora_xs(make_tiny_llama(), r=17)


def test_a_layer_that_is_not_linear_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"'model\.embed_tokens' is none: take it out of lora_target_modules"):
        with_lora_xs(make_tiny_llama(), targets=["q_proj", "embed_tokens"])
