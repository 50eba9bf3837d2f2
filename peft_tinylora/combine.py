"""Several adapters' v, with weights -> one, as PEFT's `add_weighted_adapter` does for LoRA.

The update is linear in v, so over one basis a weighted sum of adapters is exactly the weighted sum of their v; the
methods that prune or vote before they add (TIES, https://huggingface.co/papers/2306.01708; DARE,
https://huggingface.co/papers/2311.03099) are PEFT's own, with v as the task vector.
"""

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties


PRUNING = {"magnitude_prune": magnitude_prune, "dare_linear": dare_linear}
VOTING = {"ties": ties, "dare_ties": dare_ties}
COMBINATION_TYPES = ("linear", *PRUNING, *VOTING)


def check_combination(combination_type: str, density: float | None, majority_sign_method: str) -> None:
    """Raise `ValueError` for what [`combine`] cannot do: names the argument, its value and what is allowed."""
    if combination_type not in COMBINATION_TYPES:
        allowed = ", ".join(map(repr, COMBINATION_TYPES))
        raise ValueError(
            f"combination_type={combination_type!r}: allowed are {allowed}. Over one basis, 'linear' is exact."
        )
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"density={density!r}: {combination_type!r} keeps this share of the numbers, above 0, up to 1."
        )
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={majority_sign_method!r}: allowed are 'total' and 'frequency'.")


def combine(
    tables: Sequence[torch.Tensor],
    weights: Sequence[float],
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """One v from several.

    Args:
        tables (`Sequence[torch.Tensor]`): all v of each adapter, shape (groups, u).
        weights (`Sequence[float]`): one for each adapter; negative ones subtract.
        combination_type (`str`, *optional*, defaults to `"linear"`): one of `COMBINATION_TYPES`.
        density (`float`, *optional*): share of the numbers that is kept, for all but `"linear"`.
        majority_sign_method (`str`, *optional*, defaults to `"total"`): or `"frequency"`, for those that vote.

    Returns:
        `torch.Tensor`: shape (groups, u), in the dtype of the tables.
    """
    factors = torch.tensor(weights, dtype=tables[0].dtype, device=tables[0].device)
    if combination_type == "linear":
        return task_arithmetic(list(tables), factors)
    if combination_type in PRUNING:
        return PRUNING[combination_type](list(tables), factors, density)
    return VOTING[combination_type](list(tables), factors, density, majority_sign_method)
