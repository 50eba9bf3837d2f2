"""A matrix of few rows times activations of any dtype, without rounding the matrix or copying many activations.

A and (B R)^T have r rows and thousands of columns, in float32; activations are often bfloat16, and torch multiplies only
what has one dtype. Converting the activations would read and write them once more than the product does. Instead the
matrix is written as the sum of two bfloat16 ones, which together hold 16 of float32's 24 bits, and the products are
summed in float32 by the matrix multiplication itself. Few numbers are converted: one operation is faster there than
several. So is float16, whose range is too small for the parts.

What is promised: against the same product in float64, `project` and `add_to` err by less than 2^-14 of what is summed
(float32 activations: 2^-20, where nobody allows TF32), and `add_to` and `expand` round their result once, to its dtype.
"""

import functools

import torch


# Numbers of bfloat16 up to which they are converted. Beyond it `add_to` is faster in parts (benchmarks/thin.py). `project`
# on its own would be faster converted up to a million, in a whole model no difference showed, and in parts it needs no copy.
CONVERTED_UP_TO = 1 << 15
# `torch.mm(out_dtype=...)`, a float32 result of bfloat16 factors, is there for NVIDIA GPUs from 2.8 on; remove the
# condition on the release when pyproject.toml asks for it.
MM_TO_FP32 = torch.version.cuda is not None and torch.__version__ >= "2.8"


class Thin:
    """M (r, n), float32 or float64.

    Args:
        M (`torch.Tensor`): contiguous, or products with it are slow.
    """

    def __init__(self, M: torch.Tensor) -> None:
        # The view is made once, and not for each layer and token of decoding.
        self.M, self.MT = M, M.T

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x M^T.

        Args:
            x (`torch.Tensor`): shape (N, n), any floating dtype.

        Returns:
            `torch.Tensor`: shape (N, r), in the dtype of M.
        """
        if x.dtype == self.M.dtype:
            return x.mm(self.MT)
        if not self._in_parts(x):
            return x.to(self.M.dtype).mm(self.MT)
        r = self.M.shape[0]
        parts = self._parts[r:].T
        if MM_TO_FP32 and x.is_cuda:
            products = torch.mm(x, parts, out_dtype=torch.float32)
        else:
            rounded = x @ parts
            # What rounding took, summed in float32 before it is rounded itself.
            rest = torch.addmm(rounded, x, parts, beta=-1)
            products = rounded.float() + rest
        return products[:, :r] + products[:, r:]

    def add_to(self, y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """y += h M, in place.

        Args:
            y (`torch.Tensor`): shape (N, n), any floating dtype.
            h (`torch.Tensor`): shape (N, r), in the dtype of M.
        """
        if y.dtype == self.M.dtype:
            return y.addmm_(h, self.M)
        if not self._in_parts(y):
            return y.add_(h.mm(self.M))
        return y.addmm_(_in_three_parts(h), self._parts)

    def expand(self, h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """h M (N, n) in `dtype`; `h` as in [`add_to`]."""
        if dtype == torch.bfloat16 and self.M.dtype == torch.float32:
            return _in_three_parts(h) @ self._parts
        return (h @ self.M).to(dtype)

    def _in_parts(self, activations: torch.Tensor) -> bool:
        is_bfloat16 = activations.dtype == torch.bfloat16 and self.M.dtype == torch.float32
        return is_bfloat16 and activations.numel() > CONVERTED_UP_TO

    @functools.cached_property
    def _parts(self) -> torch.Tensor:
        """Shape (3r, n): the upper part of M twice, and what is left of it."""
        upper = self.M.bfloat16()
        return torch.cat([upper, upper, (self.M - upper).bfloat16()])


def _in_three_parts(h: torch.Tensor) -> torch.Tensor:
    """Shape (N, 3r), such that times `_parts` it is h M, but for the product of what is left of both."""
    upper = h.bfloat16()
    return torch.cat([upper, (h - upper).bfloat16(), upper], dim=1)
