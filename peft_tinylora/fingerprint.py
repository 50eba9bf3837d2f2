"""Factors of an adapter -> a few numbers in its config; and from those: are these the factors it was trained with?

A compact adapter file has no factors, so the config keeps a sketch of them: for each module 2r + 1 numbers, the rows of A
and the columns of B and P, each summed with fixed random signs. A sketch of other factors of relative distance d differs
by about d times the length of the row. The sketch also settles the signs of singular pairs, where `canonical_signs` may
fall differently on another machine because two entries of a vector are equally large to rounding.

In the config it is text: bfloat16 numbers of all modules in model order, in base64; 2.6 kB for 196 modules and r=2.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from .basis import Basis
from .errors import AdapterFileError


def sketch(basis: Basis, P: torch.Tensor) -> torch.Tensor:
    """The sketch of one module.

    Args:
        basis ([`Basis`]): A (r, in) and B (out, r), or those of experts, which are summed.
        P (`torch.Tensor`): shape (u, r, r), or (experts, u, r, r).

    Returns:
        `torch.Tensor`: shape (2r + 1,), float32, on the CPU.
    """
    return torch.cat([_sums_of_factors(basis), _signed_sums(P.reshape(-1, 1))])


class Sums(NamedTuple):
    """What sketches are compared with: all that depends on the factors alone.

    Args:
        sums (`torch.Tensor`): the first 2r numbers of their sketch, not rounded, float32, on the CPU.
        lengths (`torch.Tensor`): how far apart the sums of unrelated factors are, shape (2r,).
    """

    sums: torch.Tensor
    lengths: torch.Tensor

    def signs(self, saved: torch.Tensor) -> torch.Tensor:
        """-1.0 for each pair that `saved` has negated, shape (r,)."""
        agreement = (self.sums / self.lengths) * (saved[:-1] / self.lengths)  # a product of small ones would underflow
        return torch.where(agreement.view(2, -1).sum(0) < 0, -1.0, 1.0)

    def distance(self, saved: torch.Tensor, signs: torch.Tensor | None = None) -> float:
        """Estimate of the relative distance from the factors that `saved` is a sketch of, once negated by `signs`."""
        sums = self.sums if signs is None else self.sums * signs.repeat(2)
        return ((sums - saved[:-1]) / self.lengths).square().mean().sqrt().item()


def sums_of(basis: Basis) -> Sums:
    """See [`Sums`]."""
    return Sums(_sums_of_factors(basis), _lengths(basis))


def align(basis: Basis, saved: torch.Tensor) -> Basis:
    """`basis` with the pairs negated that `saved` has negated; not for experts, whose sketch is a sum."""
    return basis if basis.A.ndim == 3 else negated(basis, sums_of(basis).signs(saved))


def negated(basis: Basis, signs: torch.Tensor) -> Basis:
    """`basis` with each pair times its sign, shape (r,)."""
    signs = signs.to(basis.A)
    return Basis(basis.A * signs[:, None], basis.B * signs, basis.angle)


def factor_distance(basis: Basis, saved: torch.Tensor) -> float:
    """Estimate of the relative distance of the factors from those that `saved` is a sketch of."""
    return sums_of(basis).distance(saved)


def projection_distance(P: torch.Tensor, saved: torch.Tensor) -> float:
    """Estimate of the relative distance of P from the one that `saved` is a sketch of."""
    return ((_signed_sums(P.reshape(-1, 1)) - saved[-1:]).abs() / P.norm().cpu()).item()


def encode(sketches: Iterable[torch.Tensor]) -> str:
    """Sketches of all modules, in model order -> text."""
    numbers = torch.cat(list(sketches)).bfloat16()
    return base64.b64encode(numbers.view(torch.uint8).numpy().tobytes()).decode()


def decode(text: str, ranks: Iterable[int]) -> list[torch.Tensor]:
    """Text -> the sketch of each module.

    Args:
        text (`str`): from [`encode`].
        ranks (`Iterable[int]`): r of each module, in model order.

    Raises:
        AdapterFileError: if the text is no such sketch, or one of another number of modules.
    """
    sizes = [2 * r + 1 for r in ranks]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise AdapterFileError(f"The fingerprint in adapter_config.json is no base64 ({error}): {_AGAIN}") from error
    if len(data) != 2 * sum(sizes):
        raise AdapterFileError(
            f"The fingerprint in adapter_config.json has {len(data) // 2} numbers, and the {len(sizes)} modules that the "
            f"adapter has on this model need {sum(sizes)}: it belongs to another base model, r or `target_modules`."
        )
    numbers = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float()
    if not numbers.isfinite().all():
        raise AdapterFileError(f"The fingerprint in adapter_config.json holds NaN or Inf: {_AGAIN}")
    return list(numbers.split(sizes))


_AGAIN = "download or save the adapter again."


def digest_of_groups(groups: Mapping[str, str]) -> str:
    """16 hex digits for which v each matrix reads: name -> group."""
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """16 hex digits for the bytes of a tensor and its shape."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype}".encode() + data).hexdigest()[:16]


def _sums_of_factors(basis: Basis) -> torch.Tensor:
    return torch.cat([_signed_sums(basis.A.mT), _signed_sums(basis.B)])


def _lengths(basis: Basis) -> torch.Tensor:
    """How far apart the sums of unrelated factors are: the lengths of what is summed. Shape (2r,), none of them zero."""
    lengths = [columns.cpu().double().flatten(0, -2).norm(dim=0).float() for columns in (basis.A.mT, basis.B)]
    return torch.cat(lengths).clamp_min(torch.finfo(torch.float32).tiny)


def _signed_sums(columns: torch.Tensor) -> torch.Tensor:
    """Sums over all but the last dimension, with signs fixed by position: (..., n, r) -> (r,), float32, on the CPU."""
    rows = columns.cpu().double().flatten(0, -2)  # not every device has float64
    signs = torch.randint(2, (len(rows),), generator=torch.Generator().manual_seed(len(rows)))
    return ((2 * signs - 1).to(rows) @ rows).float()
