"""Small quantized base models, one for each backend that runs on a CPU: name -> function that loads it from a folder.

Each is a real model of that backend, loaded as a user loads it, except those whose layers are put into the model here:
HQQ's, which transformers refuses on a CPU, and GPTQ's, AWQ's and AQLM's, which take a GPU and hours to quantize well. Their
layers are the real ones, with weights rounded to the nearest; "-hub" are checkpoints of them, loaded by transformers.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    TorchAoConfig,
)


def _load(folder: Path, config: object = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    settings = (
        {} if config is None else {"quantization_config": config}
    )  # None would take the checkpoint for a float one
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=dtype, **settings).eval()


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


def _layer_by_layer(
    folder: Path, dtype: torch.dtype = torch.float32, *, quantize: Callable[..., torch.nn.Module]
) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.model.set_submodule(name, quantize(module, dtype))
    return model.eval()


def _hqq(linear: torch.nn.Linear, dtype: torch.dtype, nbits: int) -> torch.nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=nbits, group_size=32)
    return HQQLinear(linear, settings, compute_dtype=dtype, device="cpu")


GROUP = 32
FOUR_BITS = {"bits": 4, "group_size": GROUP, "desc_act": False, "pack_dtype": torch.int32}


def _to_grid(linear: torch.nn.Linear, dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear layer whose weight is on a grid of 16 values for each 32 columns, its scales and zeros (out, groups)."""
    groups = linear.weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).to(dtype).float()
    zeros = torch.round(-low / scales).clamp(0, 15)
    steps = torch.round(groups / scales[..., None] + zeros[..., None]).clamp(0, 15)
    linear.weight.data = (scales[..., None] * (steps - zeros[..., None])).flatten(1)
    return linear.float(), scales, zeros


def _gptq(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linear, scales, zeros = _to_grid(linear, dtype)
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
    layer = TorchLinear(**FOUR_BITS, **sizes, sym=False, register_buffers=True)
    columns = torch.arange(linear.in_features, dtype=torch.int32) // GROUP
    layer.pack_original(linear, scales, zeros, columns)
    layer.qzero_format(format=2)  # of what `pack_original` writes
    layer.scales = layer.scales.to(dtype)
    layer.post_init()
    return layer


def _awq(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    linear, scales, zeros = _to_grid(linear, torch.float16 if dtype == torch.float32 else dtype)
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
    layer = AwqTorchLinear(**FOUR_BITS, **sizes, sym=False, register_buffers=False)
    layer.pack(linear, scales, zeros)
    if dtype == torch.bfloat16:
        layer.scales = scales.T.contiguous().to(dtype)
    layer.post_init()
    return layer


def _aqlm(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    from aqlm import QuantizedLinear
    from aqlm.utils import pack_int_data

    # One code of 12 bits for each 8 columns of a row: each row's own pieces are the first entries of the codebook.
    layer = QuantizedLinear(linear.in_features, linear.out_features, 8, 1, 1, 12, bias=False, dtype=dtype)
    pieces = linear.weight.data.reshape(-1, 8)
    nearest = torch.cdist(pieces, pieces[:4096]).argmin(1)
    layer.codebooks.data[0, : len(pieces[:4096]), 0] = pieces[:4096].to(dtype)
    layer.scales.data.fill_(1)
    codes = pack_int_data(nearest.reshape(linear.out_features, -1, 1), 12)
    layer.codes.data = codes.clone()  # made in inference mode
    return layer.requires_grad_(False)


HUB = {
    "gptq": (_gptq, {**FOUR_BITS, "sym": False, "format": "gptq_v2"}),
    "awq": (_awq, {**FOUR_BITS, "zero_point": True, "version": "gemm"}),
    "aqlm": (
        _aqlm,
        {
            "in_group_size": 8,
            "out_group_size": 1,
            "num_codebooks": 1,
            "nbits_per_codebook": 12,
            "linear_weights_not_to_quantize": ["lm_head"],
        },
    ),
}


def _hub(folder: Path, dtype: torch.dtype = torch.float32, *, method: str, config: object = None) -> PreTrainedModel:
    """A checkpoint of the model in `folder`, written once, and loaded as any from the Hub."""
    checkpoint = folder / method
    if not checkpoint.exists():
        quantize, settings = HUB[method]
        stored = torch.float32 if method == "aqlm" else torch.float16
        model = _layer_by_layer(folder, stored, quantize=quantize)
        model.config.quantization_config = {
            "quant_method": method,
            **{key: value for key, value in settings.items() if key != "pack_dtype"},
        }
        model.config.save_pretrained(checkpoint)
        state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return _load(checkpoint, config() if config else None, dtype)


def skip_unless_installed(backend: str) -> None:
    """Skip a test of a backend whose library the default environment lacks."""
    library = backend.partition("-")[0]
    library = {"gptq": "gptqmodel", "awq": "gptqmodel"}.get(library, library)
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
    "hqq-4bit": functools.partial(_layer_by_layer, quantize=functools.partial(_hqq, nbits=4)),
    "hqq-8bit": functools.partial(_layer_by_layer, quantize=functools.partial(_hqq, nbits=8)),
    "gptq": functools.partial(_layer_by_layer, quantize=_gptq),
    "awq": functools.partial(_layer_by_layer, quantize=_awq),
    "aqlm": functools.partial(_layer_by_layer, quantize=_aqlm),
    # Where the CPU has AVX512-BF16, the default is a kernel for inference alone, and `train()` says so.
    "gptq-hub": functools.partial(_hub, method="gptq", config=lambda: GPTQConfig(4, backend="auto_trainable")),
    "awq-hub": functools.partial(_hub, method="awq", config=lambda: AwqConfig(backend="auto_trainable")),
    "aqlm-hub": functools.partial(_hub, method="aqlm"),
}
CANNOT_MERGE = (
    "gptq",
    "awq",
    "aqlm",
    "gptq-hub",
    "awq-hub",
    "aqlm-hub",
)  # PEFT cannot quantize a weight again for these
