"""experts.py: fused expert weights of the three kinds that transformers has, in each way that it multiplies by them."""

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support import fill_vectors
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from peft_tinylora import (
    BasisMismatchError,
    ConfigError,
    TinyLoraConfig,
    TinyLoraLayer,
    UnsupportedModuleError,
    plan,
)
from peft_tinylora.experts import AdaptedWeight, ParamWrapper


SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SHAPE)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, **SHAPE)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            num_local_experts=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **SHAPE
        )
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(kind: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same random model at each call."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.set_experts_implementation(implementation)
    return model.to(dtype)


def config(**fields: object) -> TinyLoraConfig:
    settings = {"r": 2, "u": 2, "tie": "tiled", "n_tie": 3, "target_modules": [], "target_parameters": EXPERTS}
    return TinyLoraConfig(**settings | fields)


def adapt(model: PreTrainedModel, **fields: object) -> PeftModel:
    return get_peft_model(model, config(**fields)).eval()


def wrappers(model: torch.nn.Module) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def delta_in_float64(wrapper: ParamWrapper, stored: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Each expert's U S R V^T, as the parameter stores it."""
    deltas = []
    for expert, matrix in enumerate(stored.double().numpy()):
        U, S, Vh = np.linalg.svd(matrix.T if transposed else matrix)
        signs = np.sign(Vh[np.arange(2), np.abs(Vh[:2]).argmax(axis=1)])
        U, S, Vh = U[:, :2] * signs, S[:2], Vh[:2] * signs[:, None]
        v = wrapper.vectors("default")[expert].detach().double().numpy()
        P = wrapper.tinylora_P["default"][expert].double().numpy()
        delta = U * S @ np.einsum("u,urs->rs", v, P) @ Vh
        deltas.append(delta.T if transposed else delta)
    return torch.from_numpy(np.stack(deltas))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_update_is_that_of_float64(kind, implementation, tokens):
    model = adapt(make(kind, implementation))
    fill_vectors(model, 0.3)
    other = make(kind, implementation)
    for name, wrapper in model.base_model.model.named_modules():
        if isinstance(wrapper, ParamWrapper):
            experts = other.get_submodule(name.replace(".base_layer", ""))
            stored = getattr(experts, wrapper.parameter_name)
            stored += delta_in_float64(wrapper, stored, transposed=kind == "gpt_oss").float()
    torch.testing.assert_close(model(tokens).logits, other(tokens).logits, atol=5e-4, rtol=1e-3)
    assert (model(tokens).logits - make(kind, implementation)(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_no_op_at_zero_to_the_bit(kind, implementation, dtype, tokens):
    expected = make(kind, implementation, dtype)(tokens).logits
    assert torch.equal(adapt(make(kind, implementation, dtype))(tokens).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_gradient_is_that_of_finite_differences(implementation, tokens):
    model = adapt(make("mixtral", implementation), u=1)
    fill_vectors(model, 0.1)
    # Routing is not continuous: fixed positions only, and a smooth loss.
    loss_of = lambda: model(tokens).logits.double().logsumexp(-1).mean()  # noqa: E731
    loss_of().backward()
    step = 2e-3
    for group, v in model.tinylora_v["default"].items():
        with torch.no_grad():
            v += step
            above = loss_of()
            v -= 2 * step
            below = loss_of()
            v += step
        assert v.grad.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=0.03, abs=1e-4), group


def test_every_expert_has_its_own_basis_and_counts_as_a_module_in_tying():
    model = adapt(make("mixtral"), tie="tiled", n_tie=4)
    assert len(model.tinylora_v["default"]) == 4  # 2 layers x 2 parameters x 4 experts, 4 to a v
    for wrapper in wrappers(model):
        A = wrapper.tinylora_A["default"]
        assert A.shape == (4, 2, wrapper.in_features)
        assert torch.linalg.matrix_rank(A.reshape(8, -1)) == 8
    assert [w.groups("default") for w in wrappers(model)] == [
        ("1",) * 4,
        ("0",) * 4,
        ("3",) * 4,
        ("2",) * 4,
    ]  # outer wrappers first: gate_up_proj is group 0 and the inner one's order is the parameter's own

    # by type: 8 down_proj and 8 gate_up_proj, 3 to a v
    assert len(adapt(make("mixtral"), tie="structured", n_tie=3).tinylora_v["default"]) == 6
    pattern = {"even": r".*experts\.[02]\..*", "odd": r".*experts\.[13]\..*"}
    by_expert = adapt(make("mixtral"), tie=pattern, n_tie=None)
    assert [w.groups("default") for w in wrappers(by_expert)] == [("0", "1", "0", "1")] * 4
    assert plan(make("mixtral"), 3, target_modules=[], target_parameters=EXPERTS).n_tie == 6


def test_linear_modules_and_experts_share_v_in_model_order():
    model = adapt(make("mixtral"), target_modules=["o_proj"], tie="tiled", n_tie=9)
    assert len(model.tinylora_v["default"]) == 2  # a layer is o_proj and 8 expert matrices
    groups = [module.groups("default") for module in model.modules() if isinstance(module, TinyLoraLayer)]
    assert groups == [("0",), ("0",) * 4, ("0",) * 4, ("1",), ("1",) * 4, ("1",) * 4]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_save_load_merge_and_unmerge(kind, tokens, tmp_path):
    model = adapt(make(kind), target_modules=["q_proj"])
    fill_vectors(model, 0.3)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert list(keys) == ["base_model.tinylora_v"]
    again = PeftModel.from_pretrained(make(kind), tmp_path).eval()
    assert torch.equal(again(tokens).logits, expected)

    before = {name: parameter.clone() for name, parameter in again.named_parameters()}
    again.merge_adapter()
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-4, rtol=1e-3)
    assert len(again.merge_report) == 6
    again.unmerge_adapter()
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.named_parameters())
    merged = again.merge_and_unload()
    assert not wrappers(merged)
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=1e-3)


def test_another_base_is_refused(tmp_path):
    adapt(make("mixtral")).save_pretrained(tmp_path)
    other = make("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[2].normal_()
    with pytest.raises(BasisMismatchError, match=r"layers\.1\.mlp\.experts"):
        PeftModel.from_pretrained(other, tmp_path)


@torch.no_grad()
def test_a_second_adapter_and_disabling(tokens):
    model = adapt(make("mixtral"))
    fill_vectors(model, 0.3)
    first = model(tokens).logits
    model.add_adapter("second", config(projection_seed=3))
    assert len(wrappers(model)) == 4
    model.set_adapter("second")
    fill_vectors(model, 0.3, adapter_name="second")
    second = model(tokens).logits
    assert not torch.allclose(first, second, atol=1e-2)
    model.base_model.set_adapter(["default", "second"])
    both = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, both, atol=1e-4, rtol=1e-3)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, make("mixtral")(tokens).logits)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, first)
    with pytest.raises(ConfigError, match="all adapters of a model must name the same"):
        model.add_adapter("third", config(target_parameters=EXPERTS[:1]))


@torch.no_grad()
def test_an_update_below_the_spacing_of_bf16_is_not_lost():
    """Added to the weight it would vanish; beside it, the product in fp32 keeps it."""
    W = torch.ones(1, 8, 8, dtype=torch.bfloat16)
    left, right = torch.full((1, 8, 1), 1e-3), torch.ones(1, 1, 8)
    assert torch.equal((W + (left @ right).to(torch.bfloat16)), W)
    x = torch.tensor([[1.0, -1.0] * 4], dtype=torch.bfloat16)
    x[0, 0] = 2.0  # the base gives 1, the update 1e-3 * 1
    base_free = AdaptedWeight(torch.zeros_like(W), left, right)
    assert torch.nn.functional.linear(x, base_free[0]).float().mean().item() == pytest.approx(1e-3, rel=0.01)


def test_a_router_is_a_matrix_like_any_other(tokens):
    model = adapt(make("mixtral"), target_parameters=["mlp.gate.weight"], u=1, tie="none", n_tie=None)
    assert wrappers(model)[0].tinylora_A["default"].shape == (2, 32)
    fill_vectors(model, 0.5)
    merged = adapt(make("mixtral"), target_parameters=["mlp.gate.weight"], u=1, tie="none", n_tie=None)
    fill_vectors(merged, 0.5)
    expected = model(tokens).logits
    torch.testing.assert_close(merged.merge_and_unload()(tokens).logits, expected, atol=1e-4, rtol=1e-3)


# transformers 5.23 renamed it, and 5.7 does not know the new name.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_training_lowers_the_loss_with_gradient_checkpointing(tokens):
    model = adapt(make("mixtral")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


def test_what_is_no_matrix_is_refused_by_name():
    with pytest.raises(UnsupportedModuleError, match=r"input_layernorm\.weight' has shape \(32,\): only matrices"):
        adapt(make("mixtral"), target_parameters=["input_layernorm.weight"])
    with pytest.raises(ValueError, match="target_parameters"):
        adapt(make("mixtral"), target_parameters=["mlp.experts.no_such"])


def test_quantized_experts_are_refused_by_name():
    model = make("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModuleError, match=r"layers\.0\.mlp\.experts\.down_proj.*float8"):
        adapt(model)


def test_another_product_is_refused_with_a_remedy():
    weight = AdaptedWeight(torch.ones(2, 4, 4), torch.ones(2, 4, 1), torch.ones(2, 1, 4))
    with pytest.raises(UnsupportedModuleError, match="'einsum'.*experts_implementation='eager'"):
        torch.einsum("eij,bj->ebi", weight, torch.ones(3, 4))
    with pytest.raises(UnsupportedModuleError, match="transpose"):
        weight.transpose(0, 1)


def test_a_parameter_is_its_own_again_after_an_error(tokens):
    model = adapt(make("mixtral"))
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()

    class Interrupted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("interrupted")

    experts.act_fn = Interrupted()
    with pytest.raises(RuntimeError, match="interrupted"):
        model(tokens)
    assert isinstance(experts.gate_up_proj, torch.nn.Parameter)


def test_no_warning_of_a_tuner_that_lacks_parameters():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapt(make("mixtral"))
