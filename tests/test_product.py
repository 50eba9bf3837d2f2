"""The fused product and its gradient against the formula, and against what keeps a folded value when v has another."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import fill_vectors
from torch import nn

from peft_tinylora import TinyLoraConfig, delta
from peft_tinylora.product import AddUpdate, Folded


TILED = {"r": 2, "u": 2, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


def folded(dtype: torch.dtype = torch.float32, rows_in: int = 12, rows_out: int = 10) -> tuple[Folded, torch.Tensor]:
    A, B = torch.randn(2, rows_in, dtype=dtype), torch.randn(rows_out, 2, dtype=dtype)
    P, v = torch.randn(3, 2, 2, dtype=dtype), torch.randn(3, dtype=dtype, requires_grad=True)
    return Folded(v.detach()[None], A, B, P, v), v


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_by_finite_differences(in_place: bool) -> None:
    of, v = folded(torch.float64)
    x, y = torch.randn(4, 3, 12, dtype=torch.float64), torch.randn(4, 3, 10, dtype=torch.float64)

    def product(y: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        fresh = Folded(v.detach()[None], of.A.M, of.B, of.P, v)
        return AddUpdate.apply(y * 1.0, x, v, fresh, in_place).tanh()

    assert torch.autograd.gradcheck(product, (y.requires_grad_(), x.requires_grad_(), v))


@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 4, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    of, v = folded()
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = torch.randn(*shape[:-1], 10).to(dtype).requires_grad_()
    got = AddUpdate.apply(y, x, v, of, False)
    g = torch.randn_like(got)
    grads = torch.autograd.grad(got, (y, x, v), g)
    exact_x, exact_y, exact_v = (t.detach().double().requires_grad_() for t in (x, y, v))
    A, B, P = of.A.M.double(), of.B.double(), of.P.double()
    exact = exact_y + delta.multiply(exact_x, A, B, delta.mix(exact_v, P))
    expected = torch.autograd.grad(exact, (exact_y, exact_x, exact_v), g.double())
    tolerance = 4 * torch.finfo(dtype).eps
    for one, other in zip((got, *grads[:2]), (exact, *expected[:2]), strict=True):
        assert one.dtype == dtype
        assert ((one.double() - other).abs() <= tolerance * other.abs().max()).all()
    assert grads[2].dtype == torch.float32  # v's is never rounded to the dtype of the activations
    torch.testing.assert_close(grads[2].double(), expected[2], rtol=1e-4, atol=1e-4)


def test_only_the_thin_product_is_kept_for_backward() -> None:
    of, v = folded(rows_in=500, rows_out=400)
    x, y = torch.randn(64, 500), torch.randn(64, 400)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        AddUpdate.apply(y, x, v, of, False).sum().backward()
    assert kept == [64 * 2]


def test_second_derivative_is_refused_with_the_remedy() -> None:
    of, v = folded()
    out = AddUpdate.apply(torch.randn(5, 10), torch.randn(5, 12), v, of, False).square().sum()
    with pytest.raises(NotImplementedError, match="no second derivative .* use torch.func"):
        torch.autograd.grad(out, v, create_graph=True)


def test_torch_func_differentiates_twice() -> None:
    """The Hessian in v by torch.func against differences of gradients."""
    base = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)).double()
    model = get_peft_model(base, TinyLoraConfig(u=3, tie="full", target_modules=["0", "2"]))
    fill_vectors(model, 0.3)
    [(name, v)] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    x = torch.randn(6, 9, dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: value}, (x,)).square().mean()

    hessian = torch.func.hessian(loss)(v.detach())
    columns = []
    for step in 1e-6 * torch.eye(3, dtype=torch.float64):
        ends = [(v.detach() + sign * step).requires_grad_() for sign in (1, -1)]
        above, below = (torch.autograd.grad(loss(end), end)[0] for end in ends)
        columns.append((above - below) / 2e-6)
    torch.testing.assert_close(hessian, torch.stack(columns), rtol=1e-5, atol=1e-8)


# What changes v without telling: torch's version counter moves only in the first.
WRITES: dict[str, Callable[[nn.Parameter, torch.Tensor], None]] = {
    "in place": lambda v, values: v.detach().copy_(values),
    "through data": lambda v, values: v.data.copy_(values),
    "data replaced": lambda v, values: setattr(v, "data", values.clone()),
    "through numpy": lambda v, values: v.detach().numpy().__setitem__(slice(None), values.numpy()),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_written_v_is_noticed(tiny_llama, tokens, write: str, grad: bool) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fresh = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fill_vectors(fresh, 0.3)
    with torch.set_grad_enabled(grad):
        wanted = fresh(tokens).logits
        fill_vectors(model, 0.3, seed=8)
        model(tokens)
        generator = torch.Generator().manual_seed(7)
        for v in model.tinylora_v["default"].values():
            WRITES[write](v, 0.3 * torch.randn(v.shape, generator=generator))
        assert torch.equal(model(tokens).logits, wanted)


def test_a_written_v_is_noticed_by_a_layer_on_its_own(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    layer = model.base_model.model.model.layers[2].mlp.up_proj
    x = torch.randn(3, 32)
    for scale in (0.5, 1.0):
        for v in model.tinylora_v["default"].values():
            v.data.fill_(scale)
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_written_factors_are_noticed(tiny_llama) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fill_vectors(model)
    layer, x = model.base_model.model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    layer(x)
    for factors in (layer.tinylora_A, layer.tinylora_B, layer.tinylora_P):
        for write in (lambda f: f["default"].mul_(2), lambda f: f.update({"default": f["default"] * 2})):
            write(factors)
            expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def test_factors_are_folded_once_for_each_value_of_v(tiny_llama, tokens, monkeypatch) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    made = []
    original = Folded.__init__
    monkeypatch.setattr(Folded, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(made) == 28
    model(tokens).logits.sum().backward()
    assert len(made) == 28
    fill_vectors(model)
    model(tokens)
    assert len(made) == 56


def test_what_inference_mode_folded_can_be_trained_on(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model)
    with torch.inference_mode():
        model(tokens)
    model(tokens).logits.sum().backward()
    assert all(v.grad.abs().sum() > 0 for v in model.tinylora_v["default"].values())


def test_base_output_that_others_hold_is_left_alone(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fill_vectors(model)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(tokens)
        x, output = seen.pop()
        assert torch.equal(output, nn.functional.linear(x, layer.base_layer.weight))


def test_base_output_that_its_own_backward_needs_is_left_alone() -> None:
    class Activated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sigmoid()  # keeps its output for backward

    model = get_peft_model(nn.Sequential(Activated(8, 6)), TinyLoraConfig(u=1, tie="full", target_modules=["0"], r=2))
    fill_vectors(model)
    layer = model.base_model.model[0]
    x = torch.randn(5, 8, requires_grad=True)
    model(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    W, b = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    update = layer.get_delta_weight("default").detach()
    ((expected @ W.T + b).sigmoid() + expected @ update.T).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_sums_of_several_adapters_are_rounded_once() -> None:
    base = nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16)
    model = get_peft_model(base, TinyLoraConfig(u=1, tie="full", target_modules=["0"]))
    model.add_adapter("second", TinyLoraConfig(u=1, tie="full", target_modules=["0"], projection_seed=1))
    model.base_model.set_adapter(["default", "second"])
    for name in ("default", "second"):
        fill_vectors(model, 0.01, adapter_name=name)
    layer, x = model.base_model.model[0], torch.randn(200, 64).bfloat16()
    update = sum(layer.get_delta_weight(name).double() for name in ("default", "second"))
    nearest = (layer.base_layer(x).double() + x.double() @ update.T).bfloat16()
    assert (model(x) == nearest).float().mean() > 0.99


def test_copies_fold_for_themselves(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fill_vectors(model, 0.3)
    before = model(tokens).logits
    twin = copy.deepcopy(model)
    fill_vectors(twin, 0.3, seed=8)
    assert not torch.allclose(twin(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)


def test_reloading_replaces_what_was_folded(tiny_llama, tokens, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()
    fill_vectors(model, 0.3)
    wanted = model(tokens).logits
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    fill_vectors(other, 0.3, seed=8)
    other(tokens)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other(tokens).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_the_same_in_place_and_not(tiny_llama, tokens, dtype: torch.dtype, monkeypatch) -> None:
    """Of a base layer without a bias the output is no view, and is written to."""
    gradients, used = [], []
    for allowed in (True, False):
        model = get_peft_model(tiny_llama().to(dtype), TinyLoraConfig(**TILED)).train()
        fill_vectors(model, 0.3)
        if not allowed:
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(lambda *_: None)
        apply = AddUpdate.apply
        monkeypatch.setattr(AddUpdate, "apply", lambda *args, apply=apply: used.append(args[-1]) or apply(*args))
        model(tokens).logits.float().square().mean().backward()
        monkeypatch.setattr(AddUpdate, "apply", apply)
        gradients.append(torch.stack([v.grad for v in model.tinylora_v["default"].values()]))
    assert used == [True] * 28 + [False] * 28
    assert torch.equal(*gradients)
