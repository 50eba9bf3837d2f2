"""A block of code -> the most bytes of tensors that were alive in it.

On a GPU that is `torch.cuda.max_memory_allocated`. On a CPU it means the same, and is put together from two parts: the
storages alive when the block starts, and PyTorch's profiler, which reports every allocation and release of its CPU
allocator from then on, the scratch inside of operations included. Neither counts what the interpreter, the CUDA
context or the allocator's own rounding takes. The profiler slows the block down: never time what this measures.
"""

import gc
from types import TracebackType
from typing import Any

import torch
from torch.autograd.profiler import profile


class PeakMemory:
    """
    Context manager; `peak_bytes` holds the answer afterwards.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = torch.zeros(1000, 1000).sum()  # 4 MB
        >>> 4_000_000 <= memory.peak_bytes - memory.start_bytes < 4_100_000
        True
    """

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start_bytes = torch.cuda.memory_allocated()
        else:
            self.start_bytes = bytes_alive()
            self.profiler = profile(profile_memory=True)
            self.profiler.__enter__()
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
            return
        self.profiler.__exit__(error_type, error, traceback)
        # The profiler keeps the raw records on this attribute only; the public averages hold sums, no peak.
        kept: Any = self.profiler.kineto_results
        records = [record for record in kept.events() if record.name() == "[memory]"]
        alive = most = 0
        for record in sorted(records, key=lambda record: record.start_ns()):
            alive += record.nbytes()
            most = max(most, alive)
        self.peak_bytes = self.start_bytes + most


def bytes_alive() -> int:
    """Returns the bytes of all CPU storages that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for tensor in (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)):
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu":  # not so of the fake tensors that torch.compile leaves
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
