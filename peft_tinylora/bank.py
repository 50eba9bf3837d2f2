"""Thousands of adapters over one basis, each of them a row of one table.

Adapters trained with the same config on the same base model have the same factors and projections; v is all that one has
and another has not. So 10,000 of them are 10,000 rows beside a model that holds one, and a batch in which every row has
another adapter costs what a batch of one adapter costs (mixed.py).
"""

import json
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from . import compact
from .adapter_files import check_weights, find_weights
from .checkpoint import damaged_file
from .config import TinyLoraConfig, conventions_of
from .errors import AdapterFileError, BasisMismatchError, ConfigError
from .experts import ParamWrapper
from .layer import FactorState, is_same_state, layers_of
from .mixed import BASE


class AdapterBank(MutableMapping[str, torch.Tensor]):
    """Name -> v (groups, u) of adapters over the basis of one adapter of a model; used by name in `adapter_names`.

    A dictionary: adapters are added, replaced and removed while the model serves, from any thread, and a batch that is
    being computed keeps those that it began with. What is read from it is a copy, so that adapters add up as tensors do.

    Args:
        model (`PeftModel`): with the adapter in it.
        adapter_name (`str`, *optional*, defaults to `"default"`): the adapter whose factors and projections are meant.

    Raises:
        ConfigError: if the model has no such TinyLoRA adapter, or a bank over it, or if the adapter is more than v.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_tinylora import AdapterBank, TinyLoraConfig
        >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=48)
        >>> config = TinyLoraConfig(u=1, tie="tiled", n_tie=7, target_modules="all-linear")
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), config).eval()
        >>> bank = AdapterBank(model)
        >>> bank["ada"], bank["bob"] = torch.tensor([[0.1], [0.0]]), torch.tensor([[0.0], [0.2]])
        >>> bank["both"] = (bank["ada"] + bank["bob"]) / 2
        >>> tokens = torch.tensor([[1, 2, 3]] * 3)
        >>> model(tokens, adapter_names=["ada", "both", "__base__"]).logits.shape
        torch.Size([3, 3, 48])
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        config = getattr(model, "peft_config", {}).get(adapter_name)
        if not isinstance(config, TinyLoraConfig):
            raise ConfigError(
                f"AdapterBank(adapter_name={adapter_name!r}): the model has no TinyLoRA adapter of that name."
            )
        if config.modules_to_save or config.bias != "none":
            raise ConfigError(
                f"AdapterBank: adapter {adapter_name!r} trains more than v (modules_to_save={config.modules_to_save!r}, "
                f"bias={config.bias!r}), and a bank holds v alone."
            )
        self._layers = {
            layer.weight_names[adapter_name]: layer
            for layer in layers_of(model).values()
            if adapter_name in layer.tinylora_A
        }
        experts = [name for name, layer in self._layers.items() if isinstance(layer, ParamWrapper)]
        if experts:
            raise ConfigError(f"AdapterBank: {experts[0]!r} belongs to experts, which cannot compute a mixed batch.")
        self.adapter_name = adapter_name
        self._determining = _determining(config)
        self._vectors = next(iter(self._layers.values())).tinylora_v
        if adapter_name in self._vectors.adapter_banks:
            raise ConfigError(f"AdapterBank: the model has a bank over {adapter_name!r} already; add to that.")
        table = self._vectors.vectors_of(adapter_name)
        # Rows are written once and not used again, so that who reads needs no lock. Pairs of what belongs together.
        self._held: tuple[torch.Tensor, dict[str, int]] = _new_table(8, table.shape, table.dtype), {}
        self._next_row = 0
        self._writing = threading.Lock()
        self._sketches = compact.sketches_of(self._layers, adapter_name)
        self._state = self._state_of_factors()
        self._accepted: set[tuple[str, str]] = set()  # fingerprints of factors that were found to be these
        self._vectors.adapter_banks[adapter_name] = self

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of v, shape (groups, u), on the CPU."""
        table, row_of = self._held
        return table[row_of[name]].clone()

    def __setitem__(self, name: str, v: torch.Tensor) -> None:
        """Add an adapter, or put another in its place.

        Args:
            name (`str`): not that of an adapter of the model.
            v (`torch.Tensor`): shape (groups, u), groups in the order of the adapter's file.

        Raises:
            ValueError: if the name is taken by the model or another bank, or v has another shape or is not finite.
        """
        self._store({name: self._checked(name, v)})

    def _checked(self, name: str, v: torch.Tensor) -> torch.Tensor:
        """v as the table holds it; raises as [`__setitem__`]."""
        table = self._held[0]
        self._check_name(name)
        if not isinstance(v, torch.Tensor) or v.is_complex() or v.shape != table.shape[1:]:
            found = f"shape {tuple(v.shape)}, {v.dtype}" if isinstance(v, torch.Tensor) else f"type {type(v).__name__}"
            raise ValueError(
                f"bank[{name!r}]: v is a tensor of shape {tuple(table.shape[1:])}, as adapter {self.adapter_name!r} has, "
                f"and not of {found}."
            )
        v = v.detach().to(table)
        if not v.isfinite().all():
            raise ValueError(f"bank[{name!r}]: v holds NaN or Inf, or numbers that {table.dtype} cannot hold.")
        return v

    def _store(self, vectors: Mapping[str, torch.Tensor]) -> None:
        with self._writing:
            for name, v in vectors.items():
                table, row_of = self._held
                if self._next_row == len(table):
                    rows = list(row_of.values())
                    larger = _new_table(max(8, 2 * len(rows)), table.shape[1:], table.dtype)
                    larger[: len(rows)] = table[rows]
                    table, row_of = larger, {held: row for row, held in enumerate(row_of)}
                    self._next_row = len(rows)
                    self._held = table, row_of
                table[self._next_row] = v
                row_of[name] = self._next_row
                self._next_row += 1

    def __delitem__(self, name: str) -> None:
        with self._writing:
            del self._held[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held[1]))

    def __len__(self) -> int:
        return len(self._held[1])

    def __contains__(self, name: object) -> bool:
        return name in self._held[1]

    def load(self, source: str | Path, name: str | None = None, **options: Any) -> None:
        """Add the adapter of a compact file.

        Args:
            source (`str` or `Path`): its folder, or its id on the Hub.
            name (`str`, *optional*): defaults to the folder's own name, or the id.
            **options: `revision`, `subfolder`, `token` and what else `hf_hub_download` takes.

        Raises:
            BasisMismatchError: if it was trained with another basis; names the module.
            AdapterFileError: if it is no compact file, or is damaged. Nothing was added.
        """
        self[name or _name_of(source)] = self._read(source, **options)

    def load_folder(self, folder: str | Path) -> list[str]:
        """Add the adapter of every folder in `folder`, all or none; returns their names, which are those of the folders.

        Raises:
            AdapterFileError: if there is none, and as [`load`].
        """
        sources = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
        if not sources:
            raise AdapterFileError(f"{folder} has no folders with an adapter_config.json in them.")
        return self._load_all({source.name: source for source in sources})

    def load_collection(self, slug: str, token: str | bool | None = None) -> list[str]:
        """Add every model of a collection on the Hub, all or none; returns their names, which are their ids.

        Args:
            slug (`str`): such as "user/gsm8k-adapters-64f9a55bb3115b4f513ec026".
            token (`str` or `bool`, *optional*): for private ones; defaults to the one that is stored.
        """
        items = HfApi(library_name="peft_tinylora", token=token).get_collection(slug).items
        sources = {item.item_id: item.item_id for item in items if item.item_type == "model"}
        if not sources:
            raise AdapterFileError(f"The collection {slug} has no models in it.")
        return self._load_all(sources, token=token)

    def _load_all(self, sources: Mapping[str, str | Path], **options: Any) -> list[str]:
        for name in sources:
            self._check_name(name)
        progress = tqdm(sources.items(), desc="Adapters", unit="adapter", disable=len(sources) < 20, leave=False)
        self._store({name: self._checked(name, self._read(source, **options)) for name, source in progress})
        return list(sources)

    def _read(self, source: str | Path, **options: Any) -> torch.Tensor:
        """v of a compact file; what is wrong with one of many names it."""
        try:
            return self._read_checked(source, **options)
        except json.JSONDecodeError as error:
            raise AdapterFileError(
                f"{source}: its adapter_config.json is no JSON ({error}): save or download it again."
            ) from error
        except AdapterFileError as error:
            if str(source) in str(error):
                raise
            raise type(error)(f"{source}: {error}") from error

    def _read_checked(self, source: str | Path, **options: Any) -> torch.Tensor:
        config = PeftConfig.from_pretrained(str(source), **options)
        if not isinstance(config, TinyLoraConfig):
            raise AdapterFileError(f"{source} is a {config.peft_type.value} adapter, and a bank holds TinyLoRA.")
        path = find_weights(source, **options)
        try:
            check_weights(path, config)
            tensors = load_file(path)
        except SafetensorError as error:
            raise damaged_file(error) from error
        key = f"base_model.{compact.VECTORS}"
        others = [name for name in tensors if "tinylora_" not in name]
        if key not in tensors or others:
            reason = f"has more than v ({others[0][:100]})" if others else "is not in the compact form"
            raise AdapterFileError(
                f"{source} {reason}, and a bank holds v alone: write it anew by `peft-tinylora export --to compact`, or "
                "load it by model.load_adapter(...)."
            )
        saved = compact.fingerprint_of(config)
        vectors = compact.unpack_vectors(config, tensors[key], saved)
        self._check_basis(source, saved)
        for name, there, here in zip(
            ("r", "projection_seed", "sigma"), _determining(config), self._determining, strict=True
        ):
            if there != here:  # edited, as the fingerprint beside it is that of this basis
                raise AdapterFileError(
                    f"{source}: {name}={there} in adapter_config.json, and its fingerprint is of {here}: the config was edited. "
                    "Nothing was added. Load the file with the config it was saved with."
                )
        return torch.stack(list(vectors.values()))

    def _check_basis(self, source: str | Path, saved: dict[str, str]) -> None:
        # Adapters that were saved on one machine have the same fingerprint of their factors: one comparison is enough.
        self.check_factors()
        of_factors = saved["groups"], saved["modules"]
        if of_factors not in self._accepted:
            compact.check_same_basis(str(source), saved, self.adapter_name, self._layers)
            self._accepted.add(of_factors)

    def check_factors(self) -> None:
        """Raise [`BasisMismatchError`] if the adapter's factors are not those that the bank was made over."""
        state = self._state_of_factors()
        if all(map(is_same_state, self._state, state)):
            return
        for (name, layer), sketch in zip(self._layers.items(), self._sketches, strict=True):
            P = layer.tinylora_P[self.adapter_name]
            distances = compact.distances(layer.basis(self.adapter_name), P, sketch)
            if not compact.are_within_tolerance(distances):
                raise BasisMismatchError(
                    f"Adapter {self.adapter_name!r} has other factors or another projection than when the bank was opened "
                    f"over it: module {name!r} differs by {distances[0]:.2g} and {distances[1]:.2g}. Load it again as it "
                    "was."
                )
        self._state = state  # they were moved to another device, say

    def _state_of_factors(self) -> list[FactorState]:
        return [layer.state_of_factors(self.adapter_name) for layer in self._layers.values()]

    def _check_name(self, name: str) -> None:
        if self._vectors.adapter_banks.get(self.adapter_name) is not self:
            raise ValueError(f"bank[{name!r}]: adapter {self.adapter_name!r}, which the bank was over, was deleted.")
        if not isinstance(name, str):
            raise ValueError(f"bank[{name!r}]: the name of an adapter is a string.")
        other = self._vectors.bank_with(name)
        if name == BASE or name in self._vectors or other not in (None, self):
            holder = "PEFT's name for no adapter" if name == BASE else "the name of another adapter of the model"
            raise ValueError(f"bank[{name!r}]: {name!r} is {holder}. Choose another name.")

    def __copy__(self) -> None:
        raise TypeError("A bank belongs to its model: copy the model, or take dict(bank).")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_writing"}  # a lock cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _writing=threading.Lock())


def _determining(config: TinyLoraConfig) -> tuple[int, int, str]:
    """What in a config decides over the factors and the projection of each module."""
    return config.r, config.projection_seed, conventions_of(config).sigma


@torch.inference_mode(False)  # a server may be in it, and what is made in it could not be written to outside
def _new_table(rows: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, *shape, dtype=torch.promote_types(dtype, torch.float32))


def _name_of(source: str | Path) -> str:
    path = Path(source)
    return path.resolve().name if path.is_dir() else str(source)
