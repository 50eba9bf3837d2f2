"""A weight that is elsewhere, in part or in whole -> whole, on one device, while its basis is taken.

Three ways of being elsewhere: a DTensor of FSDP2 or of tensor parallelism, of which each process has a piece; a
parameter of DeepSpeed ZeRO-3, which is empty between uses; and a module whose weights accelerate keeps on the CPU or on
disk. Modules are gathered one at a time, so that no more than one weight is there beside the model.

The trap: gathering is collective. Every process must gather the same modules in the same order, whether its basis cache
had them or not; build.py does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .internals import hook_of_accelerate


@contextmanager
def gathered(layer: nn.Module) -> Iterator[bool]:
    """While this lasts, the parameters of `layer` itself are whole and on a device, or DTensors; see [`whole`].

    Args:
        layer (`nn.Module`): a base layer.

    Yields:
        `bool`: whether they will be gone afterwards.
    """
    with ExitStack() as stack:
        sharded = [parameter for parameter in layer.parameters(recurse=False) if is_zero3(parameter)]
        if sharded:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(sharded))
        is_temporary = is_offloaded(layer)
        if is_temporary:
            hook = hook_of_accelerate(layer)
            hook.pre_forward(layer)
            stack.callback(hook.post_forward, layer, torch.empty(0))
        yield bool(sharded) or is_temporary


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a DTensor, on every process; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_zero3(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed has partitioned a parameter, whose own shape is then empty."""
    return hasattr(parameter, "ds_id")


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate keeps the weights of `layer` elsewhere between uses, with meta tensors in their place."""
    return hook_of_accelerate(layer) is not None and any(
        parameter.is_meta for parameter in layer.parameters(recurse=False)
    )


def device_of(layer: nn.Module, stored: torch.Tensor) -> torch.device:
    """Where `layer` computes: the device of its stored tensor, or the one that accelerate brings that to."""
    return torch.device(hook_of_accelerate(layer).execution_device) if is_offloaded(layer) else stored.device


def stored_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter where it is whole."""
    return getattr(parameter, "ds_shape", parameter.shape)
