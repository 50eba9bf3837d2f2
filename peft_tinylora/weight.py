"""A base layer, quantized or not -> its dense weight W, of shape (out, in), in fp32 or better.

Entry of the data's way: weight -> basis -> v -> delta. Every later step sees W in this one orientation and precision,
whatever the layer stores: `nn.Linear` keeps (out, in), transformers' `Conv1D` keeps (in, out), `nn.Embedding` keeps
(num_embeddings, embedding_dim), of which the rows are looked up rather than multiplied, and a quantized layer keeps
packed integers that PEFT's quantization backends read.

The one trap: on CPUs, bitsandbytes (with AVX512-BF16) and gptqmodel rewrite a 4-bit weight at the first evaluation
forward, and from then on no gradient flows through the layer, without an error; see [`keep_differentiable`].
"""

import copy
from itertools import chain
from typing import Any

import peft
import torch
from packaging.version import Version
from peft.utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModuleError
from .gather import gathered, stored_shape, whole


PLAIN_LAYERS = (nn.Linear, Conv1D, nn.Embedding)
FLOATING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The part of an identity matrix that a layer without a dequantization of its own is asked at once.
IDENTITY_ROWS = 1024


def quantization_backend(layer: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for a quantized layer.

    Args:
        layer (`nn.Module`): the base layer.
        model (`nn.Module`): the model that it is in, whose `hf_quantizer` says how torchao quantized it.

    Returns:
        `QuantizationBackend`, or `None` for a layer that is not quantized.
    """
    # Asking PEFT about a plain layer would import every quantization library there is.
    if isinstance(layer, PLAIN_LAYERS) and type(layer.weight) in (nn.Parameter, torch.Tensor):
        return None
    arguments = get_quantization_kwargs(model)
    backend = resolve_quantization_backend(layer, **{"get_apply_tensor_subclass": _no_torchao_config, **arguments})
    if not arguments and backend is not None and backend.backend_name == "torchao":
        backend.supports_merge = False
    return backend


def _no_torchao_config() -> None:
    raise UnsupportedModuleError(
        "torchao's config is not known, for the model was not loaded with transformers' TorchAoConfig: its weights "
        "cannot be quantized again. Leave the adapter unmerged, or use merge_and_unload(dequantize=True)."
    )


def check_supported(layer: nn.Module, name: str, backend: QuantizationBackend | None) -> None:
    """Raise unless `layer` has a weight that a basis can be taken from.

    Args:
        layer (`nn.Module`): the base layer, not wrapped by a tuner.
        name (`str`): its name in the model, for the message.
        backend (`QuantizationBackend`, *optional*): what reads it, if it is quantized.

    Raises:
        UnsupportedModuleError: for another type of layer, or for a weight that is not a floating point matrix and that
            no backend reads.
    """
    if backend is not None:
        _check_only_multiplies(layer, name, backend)
        _check_passes_gradients(layer, name, backend)
        _check_bitsandbytes_reads(layer, name, backend)
        return
    if not isinstance(layer, PLAIN_LAYERS):
        raise UnsupportedModuleError(
            f"Target module {name!r} ({type(layer).__name__}) is not supported. Currently, only the following modules "
            "are supported: `torch.nn.Linear`, `torch.nn.Embedding`, `transformers.pytorch_utils.Conv1D`, and the "
            f"quantized linear layers that PEFT {peft.__version__} knows. Take it out of `target_modules` or name it "
            "in `exclude_modules`."
        )
    check_floating(layer.weight, name)


def check_parameter(parameter: torch.Tensor, name: str) -> None:
    """Raise [`UnsupportedModuleError`] unless a parameter is a floating point matrix, or one for each expert."""
    shape = tuple(stored_shape(parameter))
    if len(shape) not in (2, 3):
        raise UnsupportedModuleError(
            f"Target parameter {name!r} has shape {shape}: only matrices (out, in) and stacks of them (experts, out, in) "
            "can be adapted. Take it out of `target_parameters`."
        )
    check_floating(parameter, name)


def check_floating(weight: torch.Tensor, name: str) -> None:
    """Raise [`UnsupportedModuleError`] for a dtype that a basis cannot be taken from; names the module."""
    if weight.dtype not in FLOATING_DTYPES:
        raise UnsupportedModuleError(
            f"Target module {name!r} stores its weight as {weight.dtype}, of which no singular vectors can be taken: "
            "load the base model in bfloat16, or quantize it with bitsandbytes (load_in_4bit) or another backend that "
            "PEFT knows."
        )


def _check_only_multiplies(layer: nn.Module, name: str, backend: QuantizationBackend) -> None:
    if backend.backend_name == "te" and type(layer).__name__ != "Linear":
        raise UnsupportedModuleError(
            f"Target module {name!r} ({type(layer).__name__} of TransformerEngine) normalizes its input before it "
            "multiplies, so that no update of a weight can be added beside it. Take it out of `target_modules` or name "
            "it in `exclude_modules`."
        )


def _check_passes_gradients(layer: nn.Module, name: str, backend: QuantizationBackend) -> None:
    if _gptqmodel_mode(layer) == "inference":
        raise UnsupportedModuleError(
            f"Target module {name!r}: gptqmodel has packed this weight for inference on this CPU (its first forward in "
            "evaluation mode does), and gradients no longer pass it. Load the base model anew and add the adapter "
            "before the first forward."
        )
    # Measured with neural_compressor_pt 3.10 on a CPU: of an output gradient of 1e-3, all of the input's is zero.
    if backend.backend_name == "inc":
        raise UnsupportedModuleError(
            f"Target module {name!r} is quantized by Intel Neural Compressor, whose fp8 layers round small gradients to "
            "zero: what lies below them would not be trained. Quantize the base model with bitsandbytes (load_in_4bit)."
        )


def _gptqmodel_mode(module: nn.Module) -> str | None:
    """What a layer of gptqmodel decided at its first forward on a CPU: "inference", "train", "undecided", or `None`."""
    if not type(module).__module__.startswith("gptqmodel.") or not hasattr(module, "linear_mode"):
        return None
    mode: Any = module.linear_mode
    return getattr(mode, "value", mode) or "undecided"


def _check_bitsandbytes_reads(layer: nn.Module, name: str, backend: QuantizationBackend) -> None:
    weight: Any = layer.weight
    if backend.backend_name != "bnb 4bit" or weight.device.type != "cpu":
        return
    import bitsandbytes

    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedModuleError(
            f"Target module {name!r}: bitsandbytes has packed this 4-bit weight for inference on this CPU (its first "
            "forward in evaluation mode does), and gradients no longer pass it. Load the base model anew and add the "
            "adapter before the first forward."
        )
    # Measured on x86 with 0.49.0 to 0.50.2; 0.48.2 is right. Remove when a release reads such rows.
    if Version(bitsandbytes.__version__) >= Version("0.49") and layer.in_features % state.blocksize:
        raise UnsupportedModuleError(
            f"Target module {name!r}: on a CPU, bitsandbytes {bitsandbytes.__version__} misreads 4-bit weights whose "
            f"rows ({layer.in_features}) are no multiple of its block size ({state.blocksize}). Use a GPU, "
            "load_in_8bit, or a base model with other shapes."
        )


def keep_differentiable(model: nn.Module) -> None:
    """Switch off what breaks training on a 4-bit base on a CPU: bitsandbytes 0.49 to 0.50.2 and gptqmodel 7.7.0.

    There, the first forward in evaluation mode packs the weight and leaves an operator without a gradient (bitsandbytes
    with AVX512-BF16, rounding the scales to bf16 for good): the generation of the first GRPO step would cut off every
    layer below.
    """
    module: Any  # of another library
    for module in model.modules():
        # By name, so that a model without 4-bit layers does not import bitsandbytes.
        if type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4"):
            module.support_avx512bf16_for_cpu = False
        elif _gptqmodel_mode(module) == "undecided":
            module.linear_mode = "train"


def stores_transposed(layer: nn.Module) -> bool:
    """Whether `layer` stores its weight as (in, out), as transformers' `Conv1D` does."""
    return isinstance(layer, Conv1D)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every storage dtype, except that float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_tensor(layer: nn.Module) -> torch.Tensor:
    """A tensor on the device of `layer`: its weight, or what a quantized layer keeps in its place."""
    if isinstance(layer, PLAIN_LAYERS):
        return layer.weight
    return next(chain(layer.parameters(), layer.buffers()))


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Shape (out, in) of the dense weight W of a supported layer."""
    if isinstance(layer, nn.Linear) or not isinstance(layer, PLAIN_LAYERS):
        linear: Any = layer
        return linear.out_features, linear.in_features  # a quantized weight has another shape
    rows, columns = stored_shape(layer.weight)
    return (columns, rows) if stores_transposed(layer) else (rows, columns)


def dense_matrix(layer: nn.Module, backend: QuantizationBackend | None) -> torch.Tensor:
    """The weight W (out, in) that `layer` multiplies by, whole, in [`working_dtype`].

    Args:
        layer (`nn.Module`): a supported base layer. Where its weight is elsewhere, it is gathered; see gather.py.
        backend (`QuantizationBackend`, *optional*): what reads it, if it is quantized.
    """
    with gathered(layer) as is_temporary:
        W = _dense_matrix(layer, backend)
        return W.clone() if is_temporary else W


def _dense_matrix(layer: nn.Module, backend: QuantizationBackend | None) -> torch.Tensor:
    if backend is None:
        return whole(to_matrix(stored_tensor(layer).detach(), layer))
    if backend.supports_merge or backend.backend_name == "torchao":
        return backend.get_base_weight(layer).detach().to(torch.float32)
    return _by_identity(layer)


@torch.no_grad()
def _by_identity(layer: Any) -> torch.Tensor:
    """W of a layer that only computes: what it makes of the identity matrix, in the precision that it stores scales in."""
    # A copy, because the first forward of some kernels packs or casts what the layer stores; in training mode, because
    # kernels for inference alone round more; without the bias, because adding it rounds.
    layer = copy.deepcopy(layer)
    layer.training = True  # not by `train()`, which gptqmodel's kernels for inference refuse
    layer.bias = None
    stored = next((t for t in chain(layer.parameters(), layer.buffers()) if t.is_floating_point()), None)
    dtype, device = (torch.float16, stored_tensor(layer).device) if stored is None else (stored.dtype, stored.device)
    blocks = []
    for start in range(0, layer.in_features, IDENTITY_ROWS):
        count = min(IDENTITY_ROWS, layer.in_features - start)
        rows = torch.zeros(count, layer.in_features, dtype=dtype, device=device)
        rows[:, start : start + count].fill_diagonal_(1)
        blocks.append(layer(rows).float())
    return torch.cat(blocks).T


def to_matrix(stored: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A tensor in the orientation that `layer` stores -> W (out, in) in [`working_dtype`]."""
    matrix = stored.T if stores_transposed(layer) else stored
    return matrix.to(working_dtype(stored.dtype))


def to_stored(matrix: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A matrix (out, in) -> the orientation that `layer` stores. Keeps the dtype."""
    return matrix.T if stores_transposed(layer) else matrix


def parameter_is_transposed(module: nn.Module, parameter_name: str) -> bool:
    """Whether a parameter of fused experts is stored as (experts, in, out), which its module says, as in gpt-oss."""
    return len(stored_shape(getattr(module, parameter_name))) == 3 and getattr(module, "is_transposed", False)


def parameter_shape(module: nn.Module, parameter_name: str) -> tuple[int, ...]:
    """Shape (out, in) or (experts, out, in) of a parameter."""
    *experts, rows, columns = stored_shape(getattr(module, parameter_name))
    return (*experts, columns, rows) if parameter_is_transposed(module, parameter_name) else (*experts, rows, columns)


def parameter_matrix(module: nn.Module, parameter_name: str) -> torch.Tensor:
    """W (out, in) or (experts, out, in) of a parameter, in [`working_dtype`]."""
    with gathered(module) as is_temporary:
        stored = getattr(module, parameter_name).detach()
        matrix = stored.mT if parameter_is_transposed(module, parameter_name) else stored
        W = whole(matrix.to(working_dtype(stored.dtype)))
        return W.clone() if is_temporary else W


def floating_linear(layer: Any, W: torch.Tensor) -> nn.Linear:
    """An `nn.Linear` that multiplies by `W` (out, in), with the bias of a quantized linear layer."""
    out_features, in_features = W.shape
    linear = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(W.dtype), requires_grad=False)
    return linear.train(layer.training)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that `model` computes in; float32 for a module that is not transformers'."""
    return model.dtype if isinstance(model, PreTrainedModel) else torch.float32


def dequantize_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized linear layer of `model` in place by an `nn.Linear` of the weights that it multiplied by.

    Args:
        model (`nn.Module`): without adapters. A transformers model is no longer marked as quantized afterwards.
        dtype (`torch.dtype`): of the new weights, rounded once from fp32.
    """
    for name, module in list(model.named_modules()):
        backend = quantization_backend(module, model) if hasattr(module, "in_features") else None
        if backend is not None:
            model.set_submodule(name, floating_linear(module, dense_matrix(module, backend).to(dtype)))
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
