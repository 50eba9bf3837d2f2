"""The update added to what a base layer returned, as one autograd function that keeps no copy of the activations.

    y + x A^T R^T B^T                x (N, in), y (N, out), R = sum_i v_i P_i
    h = x A^T (N, r)                 all that v's gradient needs of x, and all that is kept
    F = (B R)^T (r, out)             folded once for each value of v

With the gradient g of the result: the base layer's is g itself, that of x gains g B R A, and v_i's is <P_i, (g B)^T h>.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import delta
from .internals import three_versions_of
from .thin import Thin


class Folded:
    """What a module multiplies by for one adapter, as long as v and the factors are as they were.

    Args:
        A (`torch.Tensor`): shape (r, in), float32 or float64.
        B (`torch.Tensor`): shape (out, r).
        P (`torch.Tensor`): shape (u, r, r).
        v (`torch.Tensor`): shape (u,); its value is copied.
        values (`torch.Tensor`, *optional*): what v was taken from; see [`Vectors.values_in_this_pass`].
    """

    def __init__(
        self, A: torch.Tensor, B: torch.Tensor, P: torch.Tensor, v: torch.Tensor, values: torch.Tensor | None = None
    ) -> None:
        self.A, self.B, self.P, self.v, self.values = Thin(A), B, P, v.detach().clone(), values
        # As `version_of`, without calling it three times for each layer and token of decoding.
        self._counts_writes = not any(factor.is_inference() for factor in (A, B, P))
        self._versions = three_versions_of(A, B, P) if self._counts_writes else None

    def has_factors(self, A: torch.Tensor, B: torch.Tensor, P: torch.Tensor) -> bool:
        """Whether these are still the tensors that it was made from, and nobody wrote to them."""
        same = A is self.A.M and B is self.B and P is self.P
        return same and (not self._counts_writes or three_versions_of(A, B, P) == self._versions)

    @functools.cached_property
    def R(self) -> torch.Tensor:
        """Shape (r, r)."""
        return delta.mix(self.v, self.P)

    @functools.cached_property
    def F(self) -> Thin:
        """(B R)^T (r, out)."""
        return Thin(self.R.T @ self.B.T)

    @functools.cached_property
    def BT(self) -> Thin:
        """B^T (r, out)."""
        return Thin(self.B.T.contiguous())

    def add_update(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y += x A^T R^T B^T, in place.

        Args:
            y (`torch.Tensor`): shape (..., out), contiguous.
            x (`torch.Tensor`): shape (..., in).
        """
        x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if x.dtype == y.dtype == self.P.dtype:
            y2.addmm_(x2.mm(self.A.MT), self.F.M)  # as below, without two calls that decoding would feel
        else:
            self.F.add_to(y2, self.A.project(x2))
        return y

    def add_update_of_rows(self, y: torch.Tensor, x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        """As [`add_update`], with an R of its own for each row of a batch: R (rows, r, r), y and x (rows, ..., n)."""
        h = self.A.project(x.reshape(-1, x.shape[-1])).view(len(R), -1, R.shape[-1])
        self.BT.add_to(y.view(-1, y.shape[-1]), (h @ R.mT).flatten(0, 1))
        return y


class AddUpdate(torch.autograd.Function):
    """y, x, v -> y + x A^T R^T B^T; see the module's docstring. Differentiable once, in y, x and v."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        v: torch.Tensor,
        folded: Folded,
        in_place: bool,
    ) -> torch.Tensor:
        h = folded.A.project(x.reshape(-1, x.shape[-1]))
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        folded.F.add_to(y.view(-1, y.shape[-1]), h)
        ctx.save_for_backward(h)
        ctx.folded, ctx.x_shape, ctx.x_dtype = folded, x.shape, x.dtype
        ctx.v_dtype, ctx.v_device = v.dtype, v.device  # of a group over several devices, on one of them
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "TinyLoRA's product has no second derivative by `backward(create_graph=True)`: use torch.func "
                "(`torch.func.hessian`, `torch.func.grad` of `torch.func.grad`), which differentiates the formula itself."
            )
        (h,) = ctx.saved_tensors
        folded = ctx.folded
        with without_autocast(g.device.type):
            gB = folded.BT.project(g.reshape(-1, g.shape[-1]))
            grad_x = grad_v = None
            if ctx.needs_input_grad[1]:
                grad_x = folded.A.expand(gB @ folded.R, ctx.x_dtype).view(ctx.x_shape)
            if ctx.needs_input_grad[2]:
                grad_v = (folded.P.view(len(folded.P), -1) @ (gB.T @ h).view(-1)).to(ctx.v_device, ctx.v_dtype)
        return g, grad_x, grad_v, None, None


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context for the update, of which autocast to bf16 would leave three digits."""
    # Decoding enters this once for each layer and token: where autocast is off anyway, that should cost nothing.
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
