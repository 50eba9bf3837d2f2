"""TinyLoRA in plain float64 torch, written from the formula alone: nothing of the package under test is called here.

    W' = W + sum over adapters of  U S (sum_i v_i P_i) V^T            (paper, section 4; sigma="left")
    W' = W + sum over adapters of  U sqrt(S) (sum_i v_i P_i) sqrt(S) V^T                (sigma="split")

U, S and V are those of `torch.linalg.svd` in float64, pairs negated so that the entry of V of largest magnitude is
positive. P is drawn from N(0, 1/r) by a generator seeded with the first 8 bytes of SHA-256("seed/module name"), halved.
"""

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


WIDTH, TOKENS, EXPERTS = 64, 24, 3
# In model order; "experts.N.weight" is the N-th matrix of the stack.
MATRICES = ("embed", "first", "conv", "last", *(f"experts.{i}.weight" for i in range(EXPERTS)))


class Experts(nn.Module):
    """Fused experts, of which a token takes the one of its id modulo their number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        outputs = [F.linear(h, self.weight[i]) for i in range(EXPERTS)]
        return torch.stack(outputs)[ids % EXPERTS, torch.arange(len(ids))]


class SmallModel(nn.Module):
    """An embedding tied to the head, two linear layers, a Conv1D and experts; smooth, so that rounding cannot flip it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.conv = Conv1D(WIDTH, 2 * WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.conv.weight, std=0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (N,) -> (N, TOKENS)."""
        h = torch.tanh(self.conv(torch.tanh(self.first(self.embed(ids)))))
        return self.head(torch.tanh(self.last(torch.tanh(self.experts(h, ids)))))


def dense_weights(model: SmallModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every adapted W (out, in) and every bias of a base model in float64, 4-bit weights as bitsandbytes reads them."""

    def read(layer: nn.Module) -> torch.Tensor:
        if hasattr(layer.weight, "quant_state"):
            import bitsandbytes.functional

            return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().double()

    weights = {name: read(model.get_submodule(name)) for name in ("embed", "first", "conv", "last")}
    weights |= {f"experts.{i}.weight": matrix.detach().double() for i, matrix in enumerate(model.experts.weight)}
    return weights, {name: model.get_submodule(name).bias.detach().double() for name in ("first", "conv", "last")}


@dataclass
class Optimizer:
    """SGD with momentum, or AdamW, as their papers have them, on one vector in float64."""

    kind: str
    lr: float
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    steps: int = 0
    m: torch.Tensor | float = 0.0
    s: torch.Tensor | float = 0.0

    def updated(self, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """v after one step with gradient g."""
        if self.kind == "sgd":
            self.m = self.momentum * self.m + g
            return v - self.lr * self.m
        self.steps += 1
        first, second = self.betas
        self.m = first * self.m + (1 - first) * g
        self.s = second * self.s + (1 - second) * g * g
        scale = (self.s / (1 - second**self.steps)).sqrt() + self.eps
        return v * (1 - self.lr * self.weight_decay) - self.lr * self.m / (1 - first**self.steps) / scale

    def as_torch(self, vectors: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of torch with the same settings."""
        if self.kind == "sgd":
            return torch.optim.SGD(vectors, self.lr, momentum=self.momentum)
        return torch.optim.AdamW(vectors, self.lr, self.betas, self.eps, self.weight_decay)


@dataclass
class Adapter:
    """What an adapter is: its settings, and v (groups, u) with one optimizer."""

    r: int
    u: int
    sigma: str
    seed: int
    tie: str
    n_tie: int | None
    groups: tuple[int, ...]  # of MATRICES
    optimizer: Optimizer
    v: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


def factors(W: torch.Tensor, name: str, adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (r, in), B (out, r) and P (u, r, r) of a matrix, in float64."""
    r = adapter.r
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh])
    U, Vh = U * signs, signs[:, None] * Vh
    digest = hashlib.sha256(f"{adapter.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
    P = torch.normal(0.0, r**-0.5, (adapter.u, r, r), generator=generator).double()
    if adapter.sigma == "left":
        return Vh, U * S, P
    return S.sqrt()[:, None] * Vh, U * S.sqrt(), P


class Simulation:
    """The small model and its adapters in float64: outputs, gradients and steps.

    Args:
        base (`SmallModel`): whose weights are read, once.
        adapters (`dict[str, Adapter]`): by name; their v is stepped.
    """

    def __init__(self, base: SmallModel, adapters: dict[str, Adapter]) -> None:
        self.weights, self.biases = dense_weights(base)
        self.head = base.head.weight.detach().double()
        self.adapters = adapters
        self._factors = {
            name: [factors(self.weights[matrix], matrix, adapter) for matrix in MATRICES]
            for name, adapter in adapters.items()
        }

    def outputs(self, ids: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Outputs (N, TOKENS) with these adapters active, each with its v (groups, u)."""
        W = dict(self.weights)
        for name, v in vectors.items():
            groups = self.adapters[name].groups
            for matrix, group, (A, B, P) in zip(MATRICES, groups, self._factors[name], strict=True):
                W[matrix] = W[matrix] + B @ torch.einsum("u,urs->rs", v[group], P) @ A
        h = torch.tanh(W["embed"][ids] @ W["first"].T + self.biases["first"])
        h = torch.tanh(h @ W["conv"].T + self.biases["conv"])
        experts = torch.stack([W[f"experts.{i}.weight"] for i in range(EXPERTS)])[ids % EXPERTS]
        h = torch.tanh((experts @ h[:, :, None])[:, :, 0])
        return torch.tanh(h @ W["last"].T + self.biases["last"]) @ self.head.T

    def step(self, ids: torch.Tensor, targets: torch.Tensor, active: list[str]) -> None:
        """One step of training of the active adapters on the mean squared error."""
        vectors = {name: self.adapters[name].v.requires_grad_() for name in active}
        loss = (self.outputs(ids, vectors) - targets).square().mean()
        gradients = torch.autograd.grad(loss, list(vectors.values()))
        for name, gradient in zip(active, gradients, strict=True):
            adapter = self.adapters[name]
            adapter.v = adapter.optimizer.updated(adapter.v.detach(), gradient)
