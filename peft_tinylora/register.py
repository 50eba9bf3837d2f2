"""Puts this package's config and tuner behind `PeftType.TINYLORA`, in place of PEFT's own.

PEFT has no entry point for that, so its mappings are changed, by item: other modules of PEFT imported the dictionaries
themselves. `peft.TinyLoraConfig` is left alone; a script that makes one gets this package's tuner all the same.

transformers' own methods (`model.add_adapter`, `model.load_adapter`) need two more changes, since PEFT refuses them
tuners with shared state and they load tensors past PEFT: `peft.inject_adapter_in_model`, a name that transformers
imports at each call, and `load_adapter` itself, after which the loaded tensors are checked. PEFT's own `load_adapter` is
wrapped too: it passes the tensors of a file on without the config beside them, which says what they belong to.

An adapter of the Hub may be anybody's. So what loads one is wrapped once more, to look at the files before PEFT does:
`PeftModel.from_pretrained`, after whose failure the base model is as before, and `PeftConfig.from_json_file`. Pickled
weights are not read, and so `PeftModel.save_pretrained` does not write them.
"""

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from .adapter_files import read_fields
from .checkpoint import check_loaded, damaged_file, unpack_file
from .config import TinyLoraConfig, shortened
from .errors import AdapterFileError, ConfigError, TinyLoraError
from .internals import TRANSFORMERS_MARK, has_transformers_adapters, mark_without_adapters
from .layer import TinyLoraLayer, layers_of
from .model import TinyLoraModel
from .untrusted import check_files, check_names


HUB_OPTIONS = frozenset(inspect.signature(hf_hub_download).parameters)  # of which PEFT takes those of a download

_MAPPED: dict[str, tuple[dict[peft.PeftType, type], type]] = {
    "config": (PEFT_TYPE_TO_CONFIG_MAPPING, TinyLoraConfig),
    "tuner": (PEFT_TYPE_TO_TUNER_MAPPING, TinyLoraModel),
}
_in_place_of: dict[str, Any] = {}


def register() -> None:
    """Take PEFT's TINYLORA over. Does nothing where that was done already."""
    if _in_place_of:
        return
    for key, (mapping, ours) in _MAPPED.items():
        _in_place_of[key], mapping[peft.PeftType.TINYLORA] = mapping[peft.PeftType.TINYLORA], ours
    for key, (owner, name, ours) in _wrapped().items():
        _in_place_of[key] = inspect.getattr_static(owner, name)  # a class method as such
        setattr(owner, name, ours)


def unregister() -> None:
    """Give PEFT's TINYLORA back, for tests that compare the two."""
    if not _in_place_of:
        return
    for key, (mapping, _) in _MAPPED.items():
        mapping[peft.PeftType.TINYLORA] = _in_place_of[key]
    for key, (owner, name, _) in _wrapped().items():
        setattr(owner, name, _in_place_of[key])
    _in_place_of.clear()


def _wrapped() -> dict[str, tuple[Any, str, Any]]:
    """Where a function of PEFT or transformers is, its name, and what takes its place."""
    return {
        "inject": (peft, "inject_adapter_in_model", _inject_adapter_in_model),
        "load": (PreTrainedModel, "load_adapter", _load_adapter),
        "peft_load": (peft.PeftModel, "load_adapter", _load_adapter_of_peft),
        "from_pretrained": (peft.PeftModel, "from_pretrained", classmethod(_from_pretrained)),
        "from_json_file": (PeftConfigMixin, "from_json_file", classmethod(_from_json_file)),
        "save": (peft.PeftModel, "save_pretrained", _save_pretrained),
    }


@functools.wraps(peft.inject_adapter_in_model)
def _inject_adapter_in_model(
    peft_config: peft.PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    # PEFT refuses tuners whose layers share state here, because the tuner that holds the state is thrown away. On a
    # transformers model the shared vectors are registered on the model itself.
    if not (isinstance(peft_config, TinyLoraConfig) and isinstance(model, PreTrainedModel)):
        return _in_place_of["inject"](peft_config, model, adapter_name, low_cpu_mem_usage, state_dict)
    if not peft_config.uses_paper_conventions:
        raise ConfigError(
            "transformers' `add_adapter` and `load_adapter` write and read v under a name that PEFT's layout does not "
            "have: name `tie` in the config, or use `get_peft_model` and `PeftModel.from_pretrained`."
        )
    return TinyLoraModel(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict).model


@functools.wraps(peft.PeftModel.save_pretrained)
def _save_pretrained(self: peft.PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    original = _in_place_of["save"]
    is_safe = (
        inspect.signature(original)
        .bind(self, save_directory, *args, **kwargs)
        .arguments.get("safe_serialization", True)
    )
    if not is_safe and isinstance(self.base_model, TinyLoraModel):
        raise ConfigError("safe_serialization=False would write a pickle, which is not read again: leave it out.")
    return original(self, save_directory, *args, **kwargs)


@functools.wraps(PeftConfigMixin.from_json_file.__func__)
def _from_json_file(cls: type[peft.PeftConfig], path_json_file: str, **kwargs: Any) -> dict[str, Any]:
    read_fields(path_json_file)
    return _in_place_of["from_json_file"].__func__(cls, path_json_file, **kwargs)


@functools.wraps(peft.PeftModel.from_pretrained.__func__)
def _from_pretrained(cls: type[peft.PeftModel], model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> Any:
    original = _in_place_of["from_pretrained"].__func__
    arguments = inspect.signature(original).bind(cls, model, model_id, *args, **kwargs).arguments
    options = _hub_options(arguments.get("kwargs", {}))
    config = arguments.get("config") or _saved_config(model_id, options)
    if not isinstance(config, TinyLoraConfig):
        return original(cls, model, model_id, *args, **kwargs)
    check_names(config, model)
    check_files(model, config, model_id, options, kwargs.get("ignore_mismatched_sizes", False))
    with _as_before_if_it_fails(model, model_id):
        return original(cls, model, model_id, *args, **kwargs)


@functools.wraps(peft.PeftModel.load_adapter)
def _load_adapter_of_peft(self: peft.PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    tuner = self.base_model
    if not isinstance(tuner, TinyLoraModel):
        return _in_place_of["peft_load"](self, model_id, adapter_name, *args, **kwargs)
    options = _hub_options(kwargs)
    config, was_there = _saved_config(model_id, options), adapter_name in self.peft_config
    try:
        with _as_before_if_it_fails(self, model_id), tuner.loading_file(adapter_name, config):
            # One that is there already has its own config, by which the file's modules are not looked for.
            own = self.peft_config[adapter_name] if was_there else config
            if isinstance(own, TinyLoraConfig):
                if not was_there:
                    check_names(own, tuner.model)
                check_files(tuner.model, own, model_id, options, kwargs.get("ignore_mismatched_sizes", False))
            return _in_place_of["peft_load"](self, model_id, adapter_name, *args, **kwargs)
    except Exception:
        if not was_there:
            _forget_second(self, adapter_name)
        raise


def _forget_second(model: peft.PeftModel, adapter_name: str) -> None:
    """Drop what an adapter that could not be added beside others left behind, wherever that failed."""
    if adapter_name in model.peft_config:
        model.delete_adapter(adapter_name)
    for layer in layers_of(model).values():
        layer.forget(adapter_name)
    vectors = model.base_model.tinylora_v
    vectors.forget_adapter(adapter_name)
    if adapter_name in vectors:
        del vectors[adapter_name]


@contextmanager
def _as_before_if_it_fails(model: nn.Module, source: str | Path | None) -> Iterator[None]:
    """After an error in between, take the wrappers that it put into a model out again.

    What PEFT stumbles over in an adapter's files (KeyError, IndexError) becomes an [`AdapterFileError`].
    """
    kept = {id(module) for module in model.modules()}
    before = {*vars(model), *dict(model.named_children())}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception as error:
        _unwrap(model, kept)
        for name in {"peft_config", "tinylora_v", TRANSFORMERS_MARK} - before:
            if name in vars(model) or name in dict(model.named_children()):
                delattr(model, name)
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad
        stumbled = (LookupError, AttributeError, TypeError, NotImplementedError, RecursionError)
        if isinstance(error, stumbled) and not isinstance(error, TinyLoraError):
            raise AdapterFileError(
                f"PEFT cannot load {source} ({type(error).__name__}: {shortened(str(error))}): its config, its weights and "
                "this base model do not fit each other. Nothing was loaded. Load both files as they were saved."
            ) from error
        raise


def _unwrap(model: nn.Module, kept: set[int]) -> None:
    """Put what is inside a tuner's wrapper in its place, but for the wrappers that were there before."""
    for name, child in list(model.named_children()):
        inner = child
        while isinstance(inner, (TinyLoraLayer, AuxiliaryTrainingWrapper)) and id(inner) not in kept:
            inner = inner.base_layer if isinstance(inner, TinyLoraLayer) else inner.original_module
        if inner is not child:
            setattr(model, name, inner)
        _unwrap(inner, kept)


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a download takes."""
    return {name: value for name, value in options.items() if name in HUB_OPTIONS and value is not None}


def _saved_config(model_id: str, options: Mapping[str, Any]) -> peft.PeftConfig | None:
    """The config beside an adapter's file; `None` where there is none to be read, of which PEFT has its own to say."""
    try:
        return peft.PeftConfig.from_pretrained(model_id, **options)
    except TinyLoraError:
        raise
    except (OSError, ValueError):
        return None


@functools.wraps(PreTrainedModel.load_adapter)
def _load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    before = set(self.peft_config) if has_transformers_adapters(self) else set()
    bound = inspect.signature(_in_place_of["load"]).bind(self, *args, **kwargs)
    _unpack_file(self, bound.arguments)
    is_unpacked = isinstance(bound.arguments.get("peft_config"), TinyLoraConfig)
    with _as_before_if_it_fails(self, bound.arguments.get("peft_model_id")) if is_unpacked else nullcontext():
        try:
            with _without_report() if is_unpacked else nullcontext():
                loading_info = _in_place_of["load"](*bound.args, **bound.kwargs)
            for name in _tinylora_adapters(self) - before:
                keys = {*loading_info.missing_keys, *loading_info.unexpected_keys}
                check_loaded(self, self.peft_config[name], name, keys)
        except Exception:
            for name in _tinylora_adapters(self) - before:
                _take_back(self, name)
            raise
    return loading_info


@contextmanager
def _without_report() -> Iterator[None]:
    # It says of the factors, which come from the base model, that they are missing and need training.
    logger, hide = logging.getLogger("transformers.integrations.peft"), lambda record: False
    logger.addFilter(hide)
    try:
        yield
    finally:
        logger.removeFilter(hide)


def _unpack_file(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Give transformers an adapter's tensors as `adapter_state_dict`, with one v for each group, as the model has them.

    The factors of a compact file are taken from the base model afterwards, by `check_loaded`.
    """
    load_config, more = arguments.get("load_config"), arguments.get("kwargs", {})
    folder, options = arguments.get("peft_model_id"), dict(more.get("download_kwargs", {}))
    if load_config is not None:
        folder = folder or load_config.pretrained_model_name_or_path
        options |= load_config.download_kwargs
    options |= arguments.get("adapter_kwargs") or {}
    options["local_files_only"] = arguments.get("local_files_only", False) or options.get("local_files_only", False)
    config, tensors = arguments.get("peft_config"), arguments.get("adapter_state_dict")
    if config is None and folder is not None:
        config = _saved_config(folder, _hub_options(options))
    if not isinstance(config, TinyLoraConfig) or not config.uses_paper_conventions:
        return  # of TinyLoRA, it is refused before its weights are read
    arguments["peft_config"] = config
    if tensors is None:
        ignores_sizes = getattr(load_config, "ignore_mismatched_sizes", False) or more.get("ignore_mismatched_sizes")
        if folder is None:
            raise AdapterFileError(
                "load_adapter(peft_config=...) names no weights: give the adapter's folder or Hub id as `peft_model_id`, or "
                "its tensors as `adapter_state_dict`."
            )
        check_names(config, model)
        path = check_files(model, config, folder, _hub_options(options), bool(ignores_sizes))
        try:
            tensors = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise damaged_file(error) from error
        arguments["peft_model_id"] = (
            None  # or the Hub is asked for it once more, without the token in `adapter_kwargs`
        )
    arguments["adapter_state_dict"] = unpack_file(model, config, tensors)


def _tinylora_adapters(model: PreTrainedModel) -> set[str]:
    configs = model.peft_config if hasattr(model, "peft_config") else {}
    return {name for name, config in configs.items() if isinstance(config, TinyLoraConfig)}


def _take_back(model: PreTrainedModel, adapter_name: str) -> None:
    """Remove an adapter that was not loaded, and the layers that were wrapped for it."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    for name, layer in layers_of(model).items():
        model.set_submodule(name, layer.base_layer)
    del model.tinylora_v, model.peft_config
    mark_without_adapters(model)
