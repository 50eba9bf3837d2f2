"""An adapter's two files, in a folder or on the Hub -> its config and tensors, checked as far as that goes without a model.

Only `adapter_config.json` and `adapter_model.safetensors` are ever asked for: no pickle is read, and no name that stands
in a downloaded file becomes a path. What only the base model can tell (the basis, the modules) is checked on loading.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig, PeftType

from . import compact
from .config import TinyLoraConfig, shortened
from .errors import AdapterFileError, ConfigError, HubError, first_line
from .trouble import disk_trouble


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
FLOATING = ("F64", "F32", "F16", "BF16")  # what v may be stored in, by safetensors' names
MOST_CONFIG_BYTES = 30_000_000  # a fingerprint takes 14 bytes a module at r=2, 350 at r=64


def find_adapter(
    source: str | Path, revision: str | None = None, subfolder: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder that holds an adapter's two files; those of the Hub are downloaded into the Hub's own cache.

    Args:
        source (`str` or `Path`): folder, or id on the Hub.
        revision (`str`, *optional*): branch, tag or commit, of a source on the Hub.
        subfolder (`str`, *optional*): where in the source the adapter is.
        token (`str` or `bool`, *optional*): for a private repository; defaults to the one that is stored.

    Raises:
        AdapterFileError: if a file is missing; names it.
        HubError: if the Hub refuses or cannot be reached; says why and what to do.
    """
    if Path(source).is_dir():
        folder = Path(source, subfolder or "")
        for name in ADAPTER_FILES:
            if not (folder / name).is_file():
                raise AdapterFileError(missing_file(folder, name))
        return folder
    options = {"revision": revision, "subfolder": subfolder, "token": token}
    _download(source, CONFIG_FILE, **options)
    return _download(source, WEIGHTS_FILE, **options).parent


def find_weights(source: str | Path, **options: Any) -> Path:
    """The file of an adapter's weights where PEFT would find it, but never a pickle, which PEFT would read.

    Args:
        source (`str` or `Path`): folder, or id on the Hub.
        **options: `revision`, `subfolder`, `token`, `local_files_only` and what else `hf_hub_download` takes.

    Raises:
        AdapterFileError, HubError: as [`find_adapter`].
    """
    folder = Path(source, options.get("subfolder") or "")
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    if (folder / PICKLE_FILE).exists() or (folder / CONFIG_FILE).is_file():
        raise AdapterFileError(missing_file(folder, WEIGHTS_FILE))
    return _download(source, WEIGHTS_FILE, **options)


def _download(source: str | Path, name: str, **options: Any) -> Path:
    with explained(source, options.get("revision")):
        try:
            return Path(hf_hub_download(str(source), name, **{"library_name": "peft_tinylora", **options}))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise AdapterFileError(missing_file(source, name)) from error


def read_adapter(folder: Path) -> tuple[TinyLoraConfig, dict[str, torch.Tensor]]:
    """The config of an adapter and the tensors of its file, under the names that they have there.

    Args:
        folder (`Path`): from [`find_adapter`].

    Raises:
        AdapterFileError: if a file is damaged, of another kind of adapter, or they are not of the same save.
        ConfigError: if a field of the config has a value that cannot be meant; names it.
    """
    config = read_config(folder)
    try:
        check_weights(folder / WEIGHTS_FILE, config)
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} is cut short, damaged or no safetensors file ({first_line(error)[:200]}): save or "
            "download it again."
        ) from error
    packed = packed_vectors(tensors)
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if broken or (packed is None and not any(f".{compact.VECTORS}." in name for name in tensors)):
        what = f"holds NaN or Inf in {shortened(broken[0])}" if broken else "holds no trained numbers (tinylora_v)"
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} {what}: save or download it again.")
    if packed is not None:
        compact.unpack_vectors(config, packed, compact.fingerprint_of(config))
    return config, tensors


def read_config(folder: Path) -> TinyLoraConfig:
    """The config of an adapter, read by PEFT once it is known to be one of TinyLoRA; raises as [`read_adapter`]."""
    path = folder / CONFIG_FILE
    kind = read_fields(path).get("peft_type")
    if kind != PeftType.TINYLORA.value:
        raise AdapterFileError(f"{path} is not of a TinyLoRA adapter: its peft_type is {str(kind)[:40]!r}.")
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, TinyLoraConfig):
        raise ConfigError("peft_tinylora is not registered: call peft_tinylora.register() first.")
    return config


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, of whatever kind of adapter.

    Raises:
        AdapterFileError: if it is no JSON object, or too large or too deeply nested for one that describes an adapter.
    """
    size = Path(path).stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise AdapterFileError(
            f"{path} takes {size} bytes, and a config at most {MOST_CONFIG_BYTES}: ask for the one that the adapter was "
            "saved with."
        )
    try:
        fields = json.loads(Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no JSON ({first_line(error)}): save or download it again.") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(
            f"{path} holds a {type(fields).__name__} and not the fields of a config: save or download it again."
        )
    return fields


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises `ValueError` where two of its fields have one name, of which other readers take another one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shortened(next(name for name in names if names.count(name) > 1))} stands there twice")
    return fields


def check_weights(path: Path, config: TinyLoraConfig) -> dict[str, tuple[int, ...]]:
    """Check v by the header of its file, before P, or anything else, is made of the size that the config says.

    Returns:
        `dict[str, tuple[int, ...]]`: the shape of every tensor in the file.

    Raises:
        AdapterFileError: if v is not of the shape that `config.u` says, or holds no numbers; names it.
        SafetensorError: if the file is damaged.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
        for name, shape in ((name, shape) for name, shape in shapes.items() if compact.VECTORS in name):
            dtype = found[name].get_dtype()
            if name.endswith(compact.VECTORS):
                compact.check_shape(config, shape)
            elif shape != (config.u,):
                short = name.removeprefix("base_model.model.").removeprefix("base_model.")[:80]
                raise AdapterFileError(
                    f"The adapter file does not fit its config, u={config.u}; tensors: 1 of the wrong shape ({short}: "
                    f"{shape} instead of ({config.u},)). Nothing was loaded. Load it with the config it was saved with."
                )
            if dtype not in FLOATING or 0 in shape:
                raise AdapterFileError(
                    f"{path}: {shortened(name)} of type {dtype} and shape {shape} holds no trained numbers: save or "
                    "download it again."
                )
    return shapes


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any floating dtype has no NaN and no Inf."""
    try:
        return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())
    except NotImplementedError:
        return True  # of 4 bits, which have neither


def packed_vectors(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The one tensor (groups, u) of a compact file; `None` for a portable one."""
    names = (f"base_model.{compact.VECTORS}", f"base_model.model.{compact.VECTORS}")
    return next((tensors[name] for name in names if name in tensors), None)


def missing_file(source: str | Path, name: str) -> str:
    """What to say where an adapter's file is not there."""
    if name == WEIGHTS_FILE:
        return (
            f"{source} has no {WEIGHTS_FILE}. Weights that are pickled ({PICKLE_FILE}) are not read, because a "
            "pickle can run code: ask for them as safetensors."
        )
    return f"{source} has no {name}: an adapter is a folder, or a repository on the Hub, with {' and '.join(ADAPTER_FILES)}."


@contextmanager
def explained(repository: str | Path, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into a [`HubError`] of one line that says what to do."""
    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        raise HubError(f"{repository}: {reason_of(error, revision)}") from error


def reason_of(error: Exception, revision: str | None = None) -> str:
    """Why the Hub's client failed, and what to do, in one line and without the request."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return "no folder of this machine, and no id of the Hub, which is like 'user/name'."
    if isinstance(error, GatedRepoError):
        return "its owner wants to be asked for access: do so on its page, then `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return "no folder of this machine, and no such repository on the Hub, or a private one: check the name, or `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}: check its branches, tags and commits."
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub cannot be reached, and the Hub's cache on this machine does not have it: go online once."
    if status == 401:
        return "the Hub does not know the token (401): `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "the token may not do this (403): use one with write access to it, or another name."
    if status == 429:
        return "the Hub asks to wait (429): try again in some minutes."
    if isinstance(error, HfHubHTTPError):
        said = (error.server_message or "").strip().splitlines()
        return f"the Hub answered {status}{': ' + said[0] if said else ''}."
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached ({type(error).__name__}: {first_line(error)})."
    trouble = disk_trouble(error, HF_HUB_CACHE)
    if trouble is not None:
        return f"{trouble} (the Hub's cache: HF_HOME)."
    return " ".join(str(error).split())  # of this package, of the disk, or what the Hub has against a card
