"""Several adapters' v, with weights -> one, as PEFT's `add_weighted_adapter` does for LoRA.

The update is linear in v, so over one basis a weighted sum of adapters is exactly the weighted sum of their v; the
methods that prune or vote before they add (TIES, https://huggingface.co/papers/2306.01708; DARE,
https://huggingface.co/papers/2311.03099) are PEFT's own, with v as the task vector.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from .layer import TinyLoraLayer, layers_of
from .mixed import have_same_basis
from .vector import Vectors


PRUNING = {"magnitude_prune": magnitude_prune, "dare_linear": dare_linear}
VOTING = {"ties": ties, "dare_ties": dare_ties}
COMBINATION_TYPES = ("linear", *PRUNING, *VOTING)


class Combining(BaseTuner):
    """The part of the tuner that makes one adapter of several."""

    @torch.inference_mode(False)  # a server may be in it, and what is made in it could not be trained
    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a combination of others over the same basis; frozen, as with LoRA.

        Args:
            adapters (`list[str]`): names of the adapters.
            weights (`list[float]`): one for each; negative ones subtract.
            adapter_name (`str`): name of the new adapter.
            combination_type, density, majority_sign_method: as in [`combine`].

        Raises:
            ValueError: if an argument cannot be meant, or the adapters differ in more than v; nothing is added.
        """
        _check_combination(combination_type, density, majority_sign_method)
        layers = list(layers_of(self.model).values())
        _check_adapters(self.peft_config, self.tinylora_v, layers, adapters, weights, adapter_name)
        tables = [self.tinylora_v.vectors_of(name) for name in adapters]
        combined = combine(tables, weights, combination_type, density, majority_sign_method)
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._awaiting_file.discard(adapter_name)
        for layer in (layer for layer in layers if adapter_name in layer.tinylora_A):
            basis, layer.tinylora_P[adapter_name] = layer.copy_of_factors(adapters[0])  # maybe those of a file
            layer.set_basis(adapter_name, basis)
        for group, v in zip(self.tinylora_v.groups_of(adapter_name), combined, strict=True):
            self.tinylora_v[adapter_name][group].copy_(v).requires_grad_(False)


def _check_combination(combination_type: str, density: float | None, majority_sign_method: str) -> None:
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


def _check_adapters(
    configs: Mapping[str, PeftConfig],
    vectors: Vectors,
    layers: Sequence[TinyLoraLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
) -> None:
    """Raise `ValueError` if adapters of a model cannot be combined to one under that name.

    Args:
        configs (`Mapping[str, PeftConfig]`): of the adapters that the model has.
        vectors ([`Vectors`]), layers (`Sequence[TinyLoraLayer]`): the model's.
        adapters (`Sequence[str]`), weights (`Sequence[float]`), adapter_name (`str`): as in `add_weighted_adapter`.
    """
    unknown = [name for name in adapters if name not in configs]
    if unknown or not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"adapters={adapters}, weights={weights}: a finite weight is needed for each of one or more adapters of the "
            f"model, which has {', '.join(map(repr, configs))}."
        )
    if adapter_name in configs:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has an adapter of that name. Delete it first.")
    if any(configs[name].modules_to_save or configs[name].bias != "none" for name in adapters):
        raise ValueError(f"adapters={adapters}: one of them trains more than v, which cannot be combined.")
    others = [name for name in adapters if not have_same_basis(layers, vectors, adapters[0], name)]
    if others:
        raise ValueError(
            f"adapters={adapters}: {others[0]!r} has another basis than {adapters[0]!r}, so that no v is their sum. "
            "Convert them by peft.save_as_lora and combine those with combination_type='cat'."
        )


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
