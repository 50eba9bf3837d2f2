"""The exact update and what a merge left of it -> how much survived, for a module and for a model."""

import math
from dataclasses import dataclass

import torch


PIECE = 1 << 18  # entries of a weight are converted to float64 at once


@dataclass(frozen=True)
class Survival:
    """How much of an update was left after rounding, from sums over the entries of one weight or of many.

    Args:
        update (`float`): sum of squares of the exact update B R A.
        survived (`float`): sum of squares of merged weight - base weight, both as stored.
        product (`float`): sum of their products.
        error (`float`): sum of squares of their difference.
    """

    update: float
    survived: float
    product: float
    error: float

    @property
    def cosine(self) -> float:
        """Cosine between what survived and the exact update; 1.0 where both are zero."""
        if self.update == 0.0 or self.survived == 0.0:
            return float(self.update == self.survived)
        return self.product / math.sqrt(self.update * self.survived)

    @property
    def relative_error(self) -> float:
        """|survived - update| / |update|, which is what was lost: 0 is exact, 1 is as bad as no merge at all."""
        if self.update == 0.0:
            return 0.0 if self.error == 0.0 else math.inf
        return math.sqrt(self.error / self.update)

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.update + other.update,
            self.survived + other.survived,
            self.product + other.product,
            self.error + other.error,
        )


class MergeReport(dict[str, Survival]):
    """What each module of a merge kept of its update: module name -> [`Survival`]. Prints as a table."""

    @property
    def total(self) -> Survival:
        """All modules taken together."""
        return sum(self.values(), start=Survival(0.0, 0.0, 0.0, 0.0))

    def __str__(self) -> str:
        width = max(map(len, [*self, "module"]))
        rows = [*self.items(), ("total", self.total)]
        lines = [f"{name:<{width}}{s.cosine:>10.4f}{s.relative_error:>16.3g}" for name, s in rows]
        return "\n".join([f"{'module':<{width}}{'cosine':>10}{'relative error':>16}", *lines])


def survival(update: torch.Tensor, survived: torch.Tensor) -> Survival:
    """Compare the exact update with what is left of it, two tensors of the same shape and dtype."""

    update, survived = update.flatten(), survived.flatten()

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        # In float64 before they are multiplied: fp32 has no room for the square of 1e-30. In pieces, so as to copy little.
        pieces = zip(a.split(PIECE), b.split(PIECE), strict=True)
        return torch.stack([torch.dot(piece.double(), other.double()) for piece, other in pieces]).sum().item()

    error = survived - update
    return Survival(dot(update, update), dot(survived, survived), dot(update, survived), dot(error, error))
