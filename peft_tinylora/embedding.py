"""The layer that stands in for an adapted embedding."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from . import delta
from .layer import TinyLoraLayer
from .product import without_autocast


class Embedding(TinyLoraLayer):
    """An adapted `nn.Embedding`: rows of base + B R A."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids x (...) -> (..., embedding_dim), in the dtype that the base layer returns."""
        base_alone = self._base_alone()
        result = self.base_layer(x, *args, **kwargs)
        if base_alone:
            return result
        dtype = result.dtype
        scale = self._get_embed_scale()  # Gemma's embeddings multiply their rows by a constant
        with without_autocast(x.device.type):
            for name, R in self._mixing_matrices(len(x)):
                self.ensure_basis(name)
                A, B = self.tinylora_A[name], self.tinylora_B[name]
                rows = self.tinylora_dropout[name](F.embedding(x, B))
                update = delta.look_up(rows, A, R) if R.ndim == 2 else delta.look_up_rows(rows, A, R)
                result = result + (update if scale is None else update * scale.to(update))
        return result.to(dtype)

    def _mixing_matrices(self, size: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapters to add, each with its R (r, r), or in a mixed batch with those of the rows (rows, r, r)."""
        names, batch = self._active_here(), self.mixed_batch()
        if batch is None:
            yield from ((name, self.mixing_matrix(name)) for name in names)
        else:
            yield from ((rows.adapter_name, rows.mixing_matrices(self)) for rows in batch.rows(self, size))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT writes the converted factors under names that a LoRA embedding does not read, and the update is lost.
        return False
