"""A quantized layer -> the weight it was quantized from, read from the checkpoint of the base model, one at a time.

For `TinyLoraConfig(basis="full-precision")`: an adapter whose basis is that of the original weights fits every form of
its base model, quantized or not.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .errors import BasisError, first_line
from .internals import NONE_IF_MISSING, commit_of
from .weight import FLOATING_DTYPES, stores_transposed, working_dtype


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; raises [`BasisError`] if it is damaged."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise BasisError(f"{path} is cut short or damaged ({first_line(error)}): download it again.") from error


class OriginalWeights:
    """The tensors of a base model's checkpoint, none of them loaded yet.

    Args:
        model (`nn.Module`): the base model; its `name_or_path` says where the checkpoint is.

    Raises:
        BasisError: if there is no safetensors checkpoint; says where it was looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = model.name_or_path if isinstance(model, PreTrainedModel) else ""
        if not self.name:
            raise BasisError(
                "basis='full-precision' needs the checkpoint that the quantized base model was loaded from, and this "
                "model has no name: load it with from_pretrained, or leave `basis` out."
            )
        self._prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        self._file_of = self._find_tensors(commit_of(model))

    def _find_tensors(self, revision: str | None) -> dict[str, Path]:
        def find(file: str) -> Path | None:
            path = cached_file(self.name, file, revision=revision, **NONE_IF_MISSING)
            return None if path is None else Path(path)

        single = find(SAFE_WEIGHTS_NAME)
        if single is not None:
            with opened(single) as tensors:
                return dict.fromkeys(tensors.keys(), single)
        index = find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            raise BasisError(
                f"basis='full-precision': {self.name} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. "
                "Convert the checkpoint to safetensors, or leave `basis` out."
            )
        file_of = self._read_index(index)
        paths = {file: find(file) for file in set(file_of.values())}  # each asks the Hub
        missing = sorted(file for file, path in paths.items() if path is None)
        if missing:
            raise BasisError(
                f"basis='full-precision': {self.name} has no {missing[0]}, which its {SAFE_WEIGHTS_INDEX_NAME} names: "
                "download the checkpoint again."
            )
        return {tensor: path for tensor, file in file_of.items() if (path := paths[file]) is not None}

    def _read_index(self, index: Path) -> dict[str, str]:
        """Tensor -> file, of which each lies beside the index: what a downloaded file names is not followed elsewhere."""
        try:
            file_of = json.loads(index.read_bytes())["weight_map"]
            names = set(file_of.values())
            wrong = [name for name in names if not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise BasisError(
                f"{index} is no index of a checkpoint ({first_line(error)[:200]}): download it again."
            ) from error
        if wrong:
            raise BasisError(f"{index} names {wrong[0][:100]!r}, which is no file beside it: download it again.")
        return file_of

    def read(self, key: str, layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
        """W (out, in) of a module, in fp32 or better, on the CPU.

        Args:
            key (`str`): name of the module in the model.
            layer (`nn.Module`): the quantized layer.
            shape (`tuple[int, int]`): (out, in).

        Raises:
            BasisError: if the checkpoint has no such tensor, or has it quantized or in another shape; names it.
        """
        names = [f"{key}.weight", f"{self._prefix}{key}.weight", f"{key.removeprefix(self._prefix)}.weight"]
        name = next((name for name in names if name in self._file_of), None)
        if name is None:
            raise BasisError(
                f"basis='full-precision': the checkpoint {self.name} has no tensor {names[0]!r}. Leave `basis` out, or "
                "name the module in `exclude_modules`."
            )
        with opened(self._file_of[name]) as tensors:
            weight = tensors.get_tensor(name)
        if weight.dtype not in FLOATING_DTYPES:
            raise BasisError(
                f"basis='full-precision': {self.name} is a quantized checkpoint itself (it stores {name!r} as "
                f"{weight.dtype}). Load the unquantized model with a quantization_config, or leave `basis` out."
            )
        # bitsandbytes' layers say what they stand in for.
        is_transposed = stores_transposed(layer) or getattr(layer, "source_cls", None) is Conv1D
        weight = weight.T if is_transposed else weight
        if tuple(weight.shape) != tuple(shape):
            raise BasisError(
                f"basis='full-precision': {name!r} of {self.name} has shape {tuple(weight.shape)}, and the module has "
                f"{tuple(shape)}: the checkpoint is of another model. Leave `basis` out."
            )
        return weight.to(working_dtype(weight.dtype))
