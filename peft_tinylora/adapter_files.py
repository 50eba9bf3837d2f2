"""An adapter's two files, in a folder or on the Hub -> its config and tensors, checked as far as that goes without a model.

Only `adapter_config.json` and `adapter_model.safetensors` are ever asked for: no pickle is read, and no name that stands
in a downloaded file becomes a path. What only the base model can tell (the basis, the modules) is checked on loading.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
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
from .config import TinyLoraConfig
from .errors import AdapterFileError, ConfigError, HubError


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
MOST_CONFIG_BYTES = 100_000_000  # a fingerprint takes 14 bytes a module; more than this is no config


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
                raise AdapterFileError(missing_file(folder, name, has_pickle=(folder / "adapter_model.bin").exists()))
        return folder
    paths = []
    for name in ADAPTER_FILES:
        with explained(source, revision):
            try:
                path = hf_hub_download(
                    str(source),
                    name,
                    subfolder=subfolder,
                    revision=revision,
                    token=token,
                    library_name="peft_tinylora",
                )
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as error:
                raise AdapterFileError(missing_file(source, name, has_pickle=bool(paths))) from error
        paths.append(Path(path))
    return paths[0].parent


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
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} is cut short, damaged or no safetensors file ({error}): save or download it again."
        ) from error
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken or not any("tinylora_v" in name for name in tensors):
        what = f"holds NaN or Inf in {broken[0]}" if broken else "holds no trained numbers (tinylora_v)"
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} {what}: save or download it again.")
    packed = packed_vectors(tensors)
    if packed is not None:
        compact.unpack_vectors(config, packed, compact.fingerprint_of(config))
    return config, tensors


def read_config(folder: Path) -> TinyLoraConfig:
    """The config of an adapter, read by PEFT once it is known to be one of TinyLoRA; raises as [`read_adapter`]."""
    path = folder / CONFIG_FILE
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise AdapterFileError(f"{path} takes {path.stat().st_size} bytes, and is no adapter's config.")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no JSON ({error}): save or download it again.") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != PeftType.TINYLORA.value:
        raise AdapterFileError(f"{path} is not of a TinyLoRA adapter: its peft_type is {str(kind)[:40]!r}.")
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, TinyLoraConfig):
        raise ConfigError("peft_tinylora is not registered: call peft_tinylora.register() first.")
    return config


def packed_vectors(tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The one tensor (groups, u) of a compact file; `None` for a portable one."""
    names = (f"base_model.{compact.VECTORS}", f"base_model.model.{compact.VECTORS}")
    return next((tensors[name] for name in names if name in tensors), None)


def missing_file(source: str | Path, name: str, has_pickle: bool) -> str:
    """What to say where an adapter's file is not there."""
    if name == WEIGHTS_FILE and has_pickle:
        return (
            f"{source} has no {WEIGHTS_FILE}. Weights that are pickled (adapter_model.bin) are not read, because a "
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
    if status is not None:
        said = (error.server_message or "").strip().splitlines()
        return f"the Hub answered {status}{': ' + said[0] if said else ''}."
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached ({type(error).__name__}: {first_line(error)})."
    return " ".join(str(error).split())  # of this package, of the disk, or what the Hub has against a card


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
