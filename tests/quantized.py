"""Small quantized base models, one for each backend that runs on a CPU: name -> function that loads it from a folder.

Each is a real model of that backend, loaded as a user loads it, except HQQ's, which transformers refuses on a CPU.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig


def _load(folder: Path, config: object, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    ).eval()


def _bitsandbytes(**options: object) -> Callable[..., PreTrainedModel]:
    return lambda folder, dtype=torch.float32: _load(
        folder, BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **options), dtype
    )


def _torchao(make_config: Callable[[], object]) -> Callable[..., PreTrainedModel]:
    return lambda folder, dtype=torch.float32: _load(folder, TorchAoConfig(make_config()), dtype)


def _int8_weight_only() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4_weight_only() -> object:
    # Int4WeightOnlyConfig has no CPU kernel in torchao 0.18; this one stores the same numbers, unpacked.
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def _hqq(folder: Path, dtype: torch.dtype = torch.float32, *, nbits: int) -> PreTrainedModel:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            settings = BaseQuantizeConfig(nbits=nbits, group_size=32)
            model.model.set_submodule(name, HQQLinear(module, settings, compute_dtype=dtype, device="cpu"))
    return model.eval()


def skip_unless_installed(backend: str) -> None:
    """Skip a test of a backend whose library the default environment lacks."""
    library = backend.partition("-")[0]
    if library != "bnb" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed here: make test-backends")


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
BACKENDS: dict[str, Callable[..., PreTrainedModel]] = {
    "bnb-nf4": _bitsandbytes(**NF4),
    "bnb-nf4-double": _bitsandbytes(**NF4, bnb_4bit_use_double_quant=True),
    "bnb-fp4": _bitsandbytes(**FP4),
    "bnb-fp4-double": _bitsandbytes(**FP4, bnb_4bit_use_double_quant=True),
    "bnb-int8": _bitsandbytes(load_in_8bit=True),
    "torchao-int8": _torchao(_int8_weight_only),
    "torchao-int4": _torchao(_int4_weight_only),
    "hqq-4bit": functools.partial(_hqq, nbits=4),
    "hqq-8bit": functools.partial(_hqq, nbits=8),
}
