"""The linear layer: what changes of v and the factors it notices, what it may write to, and what else follows it."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import fill_vectors
from torch import nn

from peft_tinylora import TinyLoraConfig, linear
from peft_tinylora.product import AddUpdate, Folded


TILED = {"r": 2, "u": 2, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


# What changes v without telling: torch's version counter moves only in the first.
WRITES: dict[str, Callable[[nn.Parameter, torch.Tensor], None]] = {
    "in place": lambda v, values: v.detach().copy_(values),
    "through data": lambda v, values: v.data.copy_(values),
    "data replaced": lambda v, values: setattr(v, "data", values.clone()),
    "through numpy": lambda v, values: v.detach().numpy().__setitem__(slice(None), values.numpy()),
}


@pytest.fixture(params=["on a CPU", "as on an accelerator"])
def _device(request, monkeypatch) -> None:
    """The two ways in which a changed v is found: at each layer, and once in a pass where comparing waits for a device."""
    if request.param == "as on an accelerator":
        monkeypatch.setattr(linear, "is_compared_at_once", lambda v: False)


@pytest.mark.usefixtures("_device")
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


class Reversed(nn.Module):
    """Runs its modules in the reverse of the order in which they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.embed = nn.Linear(8, 5), nn.Linear(8, 8), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)).tanh())


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("fused", [True, False])  # a fused optimizer leaves the version of v as it was
def test_training_reads_v_as_it_is_whatever_the_order_of_the_modules(fused: bool) -> None:
    config = TinyLoraConfig(u=2, tie="full", target_modules=["head", "body", "embed"])
    torch.manual_seed(0)
    model = get_peft_model(Reversed(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    x = torch.randn(7, 6)
    for _ in range(5):
        for _ in range(2):  # gradient accumulation: the second pass has the first one's v
            torch.manual_seed(0)
            fresh = get_peft_model(Reversed(), config)
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(model(x), fresh(x), rtol=1e-6, atol=1e-7)
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.tinylora_v["default"]["0"].abs().max() > 0.1


@pytest.mark.usefixtures("_device")
def test_a_second_adapter_with_earlier_modules(tiny_llama, tokens) -> None:
    def make() -> PeftModel:
        model = get_peft_model(tiny_llama(), TinyLoraConfig(**{**TILED, "target_modules": ["down_proj"]}))
        model.add_adapter("b", TinyLoraConfig(**{**TILED, "target_modules": ["q_proj", "down_proj"]}))
        model.set_adapter("b")
        return model

    model = make()
    for seed in range(3):
        fill_vectors(model, 0.5, seed=seed, adapter_name="b")
        fresh = make()
        fill_vectors(fresh, 0.5, seed=seed, adapter_name="b")
        for _ in range(2):
            assert torch.equal(model(tokens).logits, fresh(tokens).logits)


@pytest.mark.usefixtures("_device")
def test_what_is_folded_in_the_middle_of_a_pass_is_not_kept_for_another_v(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**{**TILED, "n_tie": 28})).eval()
    fill_vectors(model, 0.5, seed=1)
    wanted = copy.deepcopy(model)(tokens).logits
    attention, x = model.base_model.model.model.layers[0].self_attn, torch.randn(2, 32)
    attention.q_proj(x)
    fill_vectors(model, 0.5, seed=2)
    attention.k_proj(x)
    fill_vectors(model, 0.5, seed=1)
    for _ in range(3):
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


def test_base_output_that_a_subclass_or_a_global_hook_holds_is_left_alone() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(x)
            return self.kept

    for module in (Keeping(8, 6, bias=False), nn.Linear(8, 6, bias=False)):
        model = get_peft_model(nn.Sequential(module), TinyLoraConfig(u=1, tie="full", target_modules=["0"]))
        fill_vectors(model)
        kept = []
        watching = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, kept=kept: kept.append(output) if isinstance(module, nn.Linear) else None
        )
        try:
            for grad in (True, False):
                x = torch.randn(3, 8)
                with torch.set_grad_enabled(grad):
                    model(x)
                assert torch.equal(kept[-1], x @ module.weight.T)
                assert not isinstance(module, Keeping) or torch.equal(module.kept, x @ module.weight.T)
        finally:
            watching.remove()


def test_a_patched_forward_that_keeps_its_output_for_backward() -> None:
    module = nn.Linear(8, 6, bias=False)
    module.forward = lambda x: nn.functional.linear(x, module.weight).sigmoid()
    model = get_peft_model(nn.Sequential(module), TinyLoraConfig(u=1, tie="full", target_modules=["0"]))
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()


def test_dropout_that_was_left_on_acts_in_eval_mode() -> None:
    config = TinyLoraConfig(u=1, tie="full", target_modules=["0"], tinylora_dropout=0.5)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 6)), config).eval()
    fill_vectors(model)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), model(x))
    for module in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        module.train()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert not torch.equal(model(x), model(x))


def test_what_else_follows_a_computation() -> None:
    """Batched gradients, forward mode, fake tensors and tracing, each against what eager mode gives."""
    from torch._subclasses import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.fx.experimental.proxy_tensor import make_fx

    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), TinyLoraConfig(u=3, tie="full", target_modules=["0"]))
    fill_vectors(model)
    x, [v] = torch.randn(4, 6), [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    directions = torch.randn(7, *out.shape)
    one_by_one = torch.stack([torch.autograd.grad(out, v, g, retain_graph=True)[0] for g in directions])
    [batched] = torch.autograd.grad(out, v, directions, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, one_by_one)

    name = next(name for name, p in model.named_parameters() if p is v)
    tangent = torch.randn(3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual = torch.func.functional_call(model, {name: forward_ad.make_dual(v.detach(), tangent)}, (x,))
            moved = forward_ad.unpack_dual(dual).tangent
        jacobian = torch.autograd.functional.jacobian(lambda v: torch.func.functional_call(model, {name: v}, (x,)), v)
        torch.testing.assert_close(moved, jacobian @ tangent, rtol=1e-4, atol=1e-5)

    for _ in range(2):
        torch.testing.assert_close(make_fx(model)(x)(x), out)
    torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), out)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for _ in range(2):
            assert model(mode.from_tensor(x)).shape == out.shape


def test_moving_a_model_drops_what_was_folded(tiny_llama, tokens) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model(tokens)
    layers = [module for module in model.modules() if isinstance(module, linear.Linear)]
    assert all(layer._folded for layer in layers)
    assert not any(layer._folded for layer in copy.deepcopy(model).modules() if isinstance(layer, linear.Linear))
    model.double()
    assert not any(layer._folded for layer in layers)


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
