"""A budget of numbers -> u and n_tie, by the paper's advice."""

from typing import Any

from torch import nn

from .config import ConfigError, TinyLoraConfig, check_positive_integer
from .targets import target_names


def plan(model: nn.Module, budget: int, **fields: Any) -> TinyLoraConfig:
    """The config that spends a budget of trained numbers best: u down to 1 first, only then more tying.

    That order is the paper's (section 7: "exhaust the u budget before increasing n_tie"). Spends as much of the
    budget as one u and one n_tie can.

    Args:
        model (`nn.Module`): the base model.
        budget (`int`): the most numbers to train.
        **fields: further fields of [`TinyLoraConfig`], such as `target_modules` (defaults to "all-linear") or `r`.

    Returns:
        [`TinyLoraConfig`] with tie="tiled" and `u` and `n_tie` chosen.

    Raises:
        ConfigError: if `budget` is not a positive integer, `fields` names u, tie, n_tie or weight_tying, or no module
            is targeted.

    Example:
        ```python
        >>> config = plan(model, 13)  # doctest: +SKIP
        >>> config.u, config.n_tie  # Qwen2.5-7B, 196 modules  # doctest: +SKIP
        (1, 16)

        ```
    """
    check_positive_integer("budget", budget)
    chosen_here = sorted(fields.keys() & {"u", "tie", "n_tie", "weight_tying"})
    if chosen_here:
        raise ConfigError(f"plan() chooses {', '.join(chosen_here)} from the budget: do not pass them.")
    if fields.get("target_modules") is None:
        fields["target_modules"] = "all-linear"
    count = len(target_names(model, TinyLoraConfig(tie="none", **fields)))
    if count == 0:
        raise ConfigError(f"target_modules={fields['target_modules']!r}: no module of the model matches.")
    if budget >= count:
        return TinyLoraConfig(tie="tiled", n_tie=1, u=budget // count, **fields)
    return TinyLoraConfig(tie="tiled", n_tie=-(-count // budget), u=1, **fields)
