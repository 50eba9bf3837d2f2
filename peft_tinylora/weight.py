"""A base layer -> its dense weight W, of shape (out, in), in fp32 or better.

Entry of the data's way: weight -> basis -> v -> delta. Every later step sees W in this one orientation and precision,
whatever the layer stores: `nn.Linear` keeps (out, in), transformers' `Conv1D` keeps (in, out), `nn.Embedding` keeps
(num_embeddings, embedding_dim), of which the rows are looked up rather than multiplied.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModuleError


SUPPORTED_LAYERS = (nn.Linear, Conv1D, nn.Embedding)


def stores_transposed(layer: nn.Module) -> bool:
    """Whether `layer` stores its weight as (in, out), as transformers' `Conv1D` does."""
    return isinstance(layer, Conv1D)


def check_supported(layer: nn.Module, name: str) -> None:
    """Raise unless `layer` has a weight that a basis can be taken from.

    Args:
        layer (`nn.Module`): the base layer, not wrapped by a tuner.
        name (`str`): its name in the model, for the message.

    Raises:
        UnsupportedModuleError: for another type of layer, or for a weight that is not a floating point matrix.
    """
    if not isinstance(layer, SUPPORTED_LAYERS):
        raise UnsupportedModuleError(
            f"Target module {name!r} ({type(layer).__name__}) is not supported. Currently, only the following modules "
            "are supported: `torch.nn.Linear`, `torch.nn.Embedding`, `transformers.pytorch_utils.Conv1D`. Take it out "
            "of `target_modules` or name it in `exclude_modules`."
        )
    if not layer.weight.dtype.is_floating_point:
        raise UnsupportedModuleError(
            f"Target module {name!r} stores its weight as {layer.weight.dtype}: quantized bases are not supported by "
            "this version. Load the base model in float32, bfloat16 or float16."
        )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every storage dtype, except that float64 stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Shape (out, in) of the dense weight W of a supported layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if stores_transposed(layer) else (rows, columns)


def to_matrix(stored: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A tensor in the orientation that `layer` stores -> W (out, in) in [`working_dtype`]."""
    matrix = stored.T if stores_transposed(layer) else stored
    return matrix.to(working_dtype(stored.dtype))


def to_stored(matrix: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A matrix (out, in) -> the orientation that `layer` stores. Keeps the dtype."""
    return matrix.T if stores_transposed(layer) else matrix
