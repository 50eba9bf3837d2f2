"""Puts this package's config and tuner behind `PeftType.TINYLORA`, in place of PEFT's own.

PEFT has no entry point for that, so its mappings are changed, by item: other modules of PEFT imported the dictionaries
themselves. `peft.TinyLoraConfig` is left alone; a script that makes one gets this package's tuner all the same.
"""

import functools
from typing import Any

import peft
import torch
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import PreTrainedModel

from .config import TinyLoraConfig
from .model import TinyLoraModel


# The first version whose BaseTuner has the hooks for saving and loading that model.py overrides.
OLDEST_PEFT = "0.21.0"

_in_place_of: dict[str, Any] = {}


def register() -> None:
    """Take PEFT's TINYLORA over. Does nothing where that was done already.

    Raises:
        ImportError: if PEFT is older than this package can work with.
    """
    if _in_place_of:
        return
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(
            f"peft_tinylora needs peft>={OLDEST_PEFT}, found {peft.__version__}. Run: pip install -U peft"
        )
    _in_place_of["config"] = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.TINYLORA]
    _in_place_of["tuner"] = PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.TINYLORA]
    _in_place_of["inject"] = peft.inject_adapter_in_model
    PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.TINYLORA] = TinyLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.TINYLORA] = TinyLoraModel
    # transformers' `model.add_adapter` and `load_adapter` import this name from `peft` at each call.
    peft.inject_adapter_in_model = _inject_adapter_in_model


def unregister() -> None:
    """Give PEFT's TINYLORA back, for tests that compare the two."""
    if not _in_place_of:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.TINYLORA] = _in_place_of["config"]
    PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.TINYLORA] = _in_place_of["tuner"]
    peft.inject_adapter_in_model = _in_place_of["inject"]
    _in_place_of.clear()


@functools.wraps(peft.inject_adapter_in_model)
def _inject_adapter_in_model(
    peft_config: peft.PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    # PEFT refuses tuners whose layers share state here, because the tuner that holds the state is thrown away. On a
    # transformers model the shared vectors are registered on the model itself.
    if isinstance(peft_config, TinyLoraConfig) and isinstance(model, PreTrainedModel):
        return TinyLoraModel(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict).model
    return _in_place_of["inject"](peft_config, model, adapter_name, low_cpu_mem_usage, state_dict)
