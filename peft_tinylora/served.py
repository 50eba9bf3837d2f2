"""A base model whose weights stay in its checkpoint -> its factors; and an inline adapter -> a plain LoRA, in a folder.

For a server, which has the weights in a form of its own, fused, sharded and on a device. The factors are kept once, for
all adapters, and are verified against the checkpoint, one weight at a time, when the server starts.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import fingerprint
from .assignment import requests_of
from .basis import Basis, place_sigma
from .build import Request, build_bases
from .compact import SKETCH_TOLERANCE
from .config import TinyLoraConfig
from .delta import mix
from .errors import AdapterFileError, BasisError, BasisMismatchError, first_line
from .inline import InlineAdapter
from .original import OriginalWeights
from .projection import draw_projection, seed_of_target
from .trouble import remove_stale


# Of all modules of one adapter. A request names u, and P takes modules * u * r * r numbers: 401,408 for the paper's largest,
# u = 512 on Qwen2.5-7B. They are drawn while the server does nothing else.
MOST_PROJECTION_NUMBERS = 2**20
FOLDER = "peft_tinylora-lora-"  # the beginning of the name of a folder with a LoRA


def skeleton(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A base model without its weights: all on the meta device.

    Args:
        name (`str`): id or folder of a causal language model.
        revision (`str`, *optional*): branch, tag or commit.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run the code that a model ships with.

    Raises:
        BasisError: if there is no such model, or none that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise BasisError(f"The base model {name!r} cannot be opened: {first_line(error)}") from error
    model.name_or_path = name
    return model


class ServedBase:
    """The factors of all linear modules of a base model, for the adapters that a server is sent.

    Args:
        name (`str`): id or folder of the base model, with a safetensors checkpoint of float weights.
        r (`int`): rank that adapters must have.
        revision (`str`, *optional*): branch, tag or commit.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run the code that the model ships with.

    Raises:
        BasisError: if there is no such checkpoint, or `r` is too large for a module.
    """

    def __init__(self, name: str, r: int, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.name, self.r = name, r
        self.model = skeleton(name, revision, trust_remote_code)
        config = TinyLoraConfig(r=r, u=1, tie="none", target_modules="all-linear")
        try:
            requests, source = requests_of(self.model, config)
            checkpoint = OriginalWeights(self.model)
            self._bases = build_bases(
                [self._read_from(checkpoint, request) for request in requests], source, sigma="left", canonical=True
            )
        except BasisError as error:
            raise BasisError(
                f"{name} cannot be served with adapters of rank {r}, whose factors are taken from its checkpoint: {error}"
            ) from error
        self._with_sums("left")  # now, and not while the first request waits

    @functools.cache  # noqa: B019 - one object for the life of a server
    def _with_sums(self, sigma: str) -> dict[str, tuple[Basis, fingerprint.Sums]]:
        """The factors of each module with the singular values where `sigma` says, and what sketches are compared with."""
        placed = {name: place_sigma(basis, sigma) for name, basis in self._bases.items()}
        return {name: (basis, fingerprint.sums_of(basis)) for name, basis in placed.items()}

    def _read_from(self, checkpoint: OriginalWeights, request: Request) -> Request:
        layer = self.model.get_submodule(request.key)
        return request._replace(read=functools.partial(checkpoint.read, request.key, layer, request.shape))

    def lora(self, adapter: InlineAdapter) -> dict[str, torch.Tensor]:
        """The factors of a plain LoRA with a scaling of 1, under PEFT's names.

        Args:
            adapter ([`InlineAdapter`]): from a stranger.

        Returns:
            `dict[str, torch.Tensor]`: "base_model.model.NAME.lora_A.weight" (r, in) and "...lora_B.weight" (out, r),
            float32.

        Raises:
            BasisMismatchError: if it was trained on another base; names the module that differs.
            AdapterFileError: if it has another rank, is too large, or was changed.
        """
        if len(adapter.groups) != len(self._bases):
            raise BasisMismatchError(
                f"The adapter is of a base model with {len(adapter.groups)} linear modules, and {self.name} has "
                f"{len(self._bases)}: send it to a server of the base model that it was trained on."
            )
        if adapter.r != self.r:
            raise AdapterFileError(
                f"The adapter has rank {adapter.r}, and this server keeps factors of rank {self.r}: ask its owner to set "
                f"PEFT_TINYLORA_VLLM_RANK={adapter.r}."
            )
        group_of = self.group_of(adapter)
        if fingerprint.digest_of_groups({name: str(group) for name, group in group_of.items()}) != adapter.digest:
            raise BasisMismatchError(
                f"The adapter's modules have other names than those of {self.name}, or read other "
                "numbers: send it to a server of the base model that it was trained on."
            )
        if len(group_of) * adapter.u * adapter.r**2 > MOST_PROJECTION_NUMBERS:
            raise AdapterFileError(
                f"The adapter has u={adapter.u}, which is too large to be served: use a smaller one."
            )
        projections = _projections(tuple(group_of), adapter.projection_seed, adapter.u, adapter.r, adapter.from_paper)
        v, known, tensors = adapter.v.float(), self._with_sums(adapter.sigma), {}
        for (name, group), P, sketch in zip(group_of.items(), projections, adapter.sketches.float(), strict=True):
            basis, sums = known[name]
            signs = sums.signs(sketch)
            distance = sums.distance(sketch, signs)
            if not distance <= SKETCH_TOLERANCE:
                raise BasisMismatchError(
                    f"The adapter was trained on another base model than {self.name}, or on another form of it: module "
                    f"{name!r} differs by {distance:.2g}, allowed is {SKETCH_TOLERANCE:g}."
                )
            if not fingerprint.projection_distance(P, sketch) <= SKETCH_TOLERANCE:
                raise AdapterFileError(
                    f"The projection of module {name!r} is not the one that the adapter was trained with."
                )
            basis = fingerprint.negated(basis, signs)
            B = basis.B @ mix(v[group], P)
            if not B.isfinite().all():
                raise AdapterFileError(
                    f"The update of module {name!r} is not finite: the adapter's numbers are too large."
                )
            tensors[f"base_model.model.{name}.lora_A.weight"] = basis.A.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
        return tensors

    def group_of(self, adapter: InlineAdapter) -> dict[str, int]:
        """The modules that an adapter of this base adapts, in model order -> the row of v that each of them reads."""
        groups = zip(self._bases, adapter.groups, strict=True)
        return {name: group for name, group in groups if group is not None}

    @contextmanager
    def lora_folder(self, adapter: InlineAdapter) -> Iterator[Path]:
        """A folder in memory (tmpfs, where there is one) with an adapter as a plain LoRA, gone afterwards."""
        tensors = self.lora(adapter)
        names = list(self.group_of(adapter))
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        memory = folder_in_memory(4 * size_bytes)
        remove_stale(Path(memory or tempfile.gettempdir()).glob(f"{FOLDER}*"))
        with tempfile.TemporaryDirectory(prefix=FOLDER, dir=memory) as folder:
            LoraConfig(r=adapter.r, lora_alpha=adapter.r, target_modules=names).save_pretrained(folder)
            save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
            yield Path(folder)


def folder_in_memory(free_bytes: int) -> Path | None:
    """Where files are kept in memory, if so much is free there: containers often have 64 MB in all."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= free_bytes else None


@functools.lru_cache(maxsize=4)  # the steps of a training run, say, differ in v alone
def _projections(names: tuple[str, ...], seed: int, u: int, r: int, from_paper: bool) -> tuple[torch.Tensor, ...]:
    """P (u, r, r) of each module."""
    seeds = [seed_of_target(seed, name, index, from_paper) for index, name in enumerate(names)]
    return tuple(draw_projection(u, r, own_seed) for own_seed in seeds)
