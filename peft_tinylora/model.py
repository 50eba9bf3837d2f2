"""TinyLoraModel: PEFT's tuner for TinyLoRA. Finds the modules, plans before it touches anything, wraps them.

The trained vectors live here, in `tinylora_v` (adapter name -> group -> v), once each. Where transformers injects an
adapter straight into its model (`model.add_adapter(config)`), the tuner is thrown away afterwards and the vectors are
registered on that model instead.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING
from torch import nn

from . import checkpoint
from .basis import Basis, compute_basis
from .config import TinyLoraConfig, check_peft_fields, conventions_of
from .errors import AdapterFileError, BasisError
from .layer import Embedding, Linear, TinyLoraLayer
from .projection import draw_projection, seed_of_module
from .targets import target_names
from .tying import group_modules, group_modules_by_ratio
from .vector import new_vector
from .weight import check_supported, matrix_shape, to_matrix, working_dtype


class ModulePlan(NamedTuple):
    """What one target module gets, settled before any module is replaced."""

    group: str
    r: int
    basis: Basis | None  # None: to be loaded
    make_basis: Callable[[torch.Tensor], Basis]
    projection: torch.Tensor  # (u, r, r)


class TinyLoraModel(BaseTuner):
    """A model with TinyLoRA adapters, made by `get_peft_model` and `PeftModel.from_pretrained`.

    Args:
        model (`nn.Module`): the base model; its modules are wrapped in place.
        config (`PeftConfig` or `dict[str, PeftConfig]`): the adapter's config. Given bare, and not in a dictionary by
            adapter name as PEFT does, the vectors are registered on `model`, which outlives this tuner.
        adapter_name (`str`): name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): leave v on the meta device, to be loaded.
        state_dict (`dict`, *optional*): adapt the modules that its keys name rather than those of `target_modules`.

    Raises:
        ConfigError, UnsupportedModuleError, BasisError: before anything was changed.
    """

    prefix = "tinylora_"
    tuner_layer_cls = TinyLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING
    # PEFT then refuses `inject_adapter_in_model` for arbitrary modules, which would lose the vectors. The exception,
    # transformers' models, is made in register.py.
    uses_shared_state = True

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self._plans: dict[str, ModulePlan] = {}
        self._awaiting_file: set[str] = set()
        self._outlived_by_model = isinstance(config, PeftConfig)
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, state_dict)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        wrapped = next((module for module in model.modules() if isinstance(module, TinyLoraLayer)), None)
        if not self._outlived_by_model:
            # A base that another PeftModel wrapped already keeps its vectors, as it keeps its layers.
            self.tinylora_v = nn.ModuleDict({}) if wrapped is None else wrapped.tinylora_v
            return
        if not isinstance(getattr(model, "tinylora_v", None), nn.ModuleDict):
            model.tinylora_v = nn.ModuleDict({})
        self.__dict__["tinylora_v"] = model.tinylora_v  # registered on the model, only referred to here

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Plan the adapter, wrap its target modules, and leave the trainability of other adapters as it was."""
        config = self.peft_config[adapter_name]
        check_peft_fields(config)
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        names = target_names(model, config) if state_dict is None else names_in_state_dict(model, state_dict)
        self._plans = self._plan(model, names, config, adapter_name)
        others = [(v, v.requires_grad) for vectors in self.tinylora_v.values() for v in vectors.values()]
        for layer in (module for module in model.modules() if isinstance(module, TinyLoraLayer)):
            layer.forget(adapter_name)  # of an earlier PeftModel around the same base
        self.tinylora_v[adapter_name] = nn.ParameterDict({})
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            del self.tinylora_v[adapter_name]
            raise
        finally:
            self._plans = {}
        if read_from_file(config):
            self._awaiting_file.add(adapter_name)
        trained = adapter_name in self.active_adapters and not config.inference_mode
        for v in self.tinylora_v[adapter_name].values():
            v.requires_grad = trained
        for v, requires_grad in others:
            v.requires_grad = requires_grad

    def _plan(
        self, model: nn.Module, names: list[str], config: PeftConfig, adapter_name: str
    ) -> dict[str, ModulePlan]:
        """Everything that can fail, for every module, before the first one is replaced."""
        conventions = conventions_of(config)
        if conventions.from_paper:
            groups = group_modules(names, conventions.tie, conventions.n_tie)
        else:
            groups = group_modules_by_ratio(names, config.weight_tying)
        if not read_from_file(config):
            warn_if_overparametrised(config, groups)

        twin = self._adapter_with_same_settings(adapter_name, config)
        plans = {}
        for index, name in enumerate(names):
            module = model.get_submodule(name)
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            check_supported(layer, name)
            r = bounded_rank(config, layer, name)
            make_basis = functools.partial(
                compute_basis, r=r, sigma=conventions.sigma, canonical=conventions.from_paper, name=name
            )
            if twin is not None and isinstance(module, TinyLoraLayer) and twin in module.tinylora_A:
                basis, projection = module.copy_of_factors(twin)
            else:
                by_name = seed_of_module(config.projection_seed, name)
                seed = by_name if conventions.from_paper else config.projection_seed + index
                projection = draw_projection(config.u, r, seed)
                basis = None if read_from_file(config) else make_basis(unmerged_matrix(module))
            plans[name] = ModulePlan(str(groups[name]), r, basis, make_basis, projection)
        return plans

    def _adapter_with_same_settings(self, adapter_name: str, config: PeftConfig) -> str | None:
        """Name of an adapter whose factors a new one must have too, even if they came from a file.

        TRL adds its reference policy as a second adapter with the first one's config and copies parameters only.
        """
        for name, other in self.peft_config.items():
            if name != adapter_name and (other is config or settings(other) == settings(config)):
                return name
        return None

    def _create_and_replace(
        self,
        config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        plan = self._plans[current_key]
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        vectors = self.tinylora_v[adapter_name]
        if plan.group not in vectors:
            dtype = working_dtype(base_layer.weight.dtype)
            v = new_vector(config.u, config.init_weights, config.init_v_bound, dtype)
            vectors[plan.group] = v.to(base_layer.weight.device)
        if isinstance(target, TinyLoraLayer):
            layer = target
        else:
            layer_cls = Embedding if isinstance(base_layer, nn.Embedding) else Linear
            layer = layer_cls(target, self.tinylora_v)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(
            adapter_name,
            group=plan.group,
            basis=plan.basis,
            make_basis=plan.make_basis,
            r=plan.r,
            projection=plan.projection,
            dropout=config.tinylora_dropout,
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also moves the new layer's buffers, which fails for those that are about to be loaded.
        setattr(parent, child_name, new_module)

    def _init_tinylora_v(self, config: PeftConfig, adapter_name: str) -> None:
        """Draw the vectors of an adapter from [-init_v_bound, init_v_bound]."""
        for v in self.tinylora_v[adapter_name].values():
            nn.init.uniform_(v, -config.init_v_bound, config.init_v_bound)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # v is fp32 from the start and the factors always are. Only PEFT's own configs may ask for a v in the dtype of
        # the base: with this package's, v is never rounded while it trains.
        if autocast_adapter_dtype or conventions_of(self.peft_config[adapter_name]).from_paper:
            return
        for layer in (module for module in self.model.modules() if isinstance(module, TinyLoraLayer)):
            group = layer._tinylora_v_key.get(adapter_name)
            if group is not None:
                v = self.tinylora_v[adapter_name][group]
                v.data = v.data.to(layer.get_base_layer().weight.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its vectors; see `BaseTuner.delete_adapter`."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.tinylora_v:
            del self.tinylora_v[adapter_name]
        self._awaiting_file.discard(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "TinyLoRA does not support `adapter_names` (another adapter for each row of a batch) in this version. "
                "Run one batch for each adapter, with `model.set_adapter(name)`."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return checkpoint.tensors_to_save(model, config, adapter_name, own, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner = getattr(model, "base_model", None)
        tuner = tuner if isinstance(tuner, cls) else None
        try:
            tensors = checkpoint.tensors_to_load(model, config, adapter_name, state_dict)
        except AdapterFileError:
            if tuner is not None and adapter_name in tuner._awaiting_file:
                tuner._forget(adapter_name)
            raise
        if tuner is not None:
            tuner._awaiting_file.discard(adapter_name)
        return tensors

    def _forget(self, adapter_name: str) -> None:
        """Take back an adapter whose file was refused, so that the model is as before."""
        if any(not v.is_meta and v.any() for v in self.tinylora_v[adapter_name].values()):
            return  # it was trained before this file was tried
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            self.unload()


def read_from_file(config: PeftConfig) -> bool:
    """Whether a config was read from an adapter's folder, so that its factors are about to be loaded."""
    return isinstance(config, TinyLoraConfig) and config._from_file


def unmerged_matrix(module: nn.Module) -> torch.Tensor:
    """W (out, in) of a module, adapted already or not, in fp32 or better."""
    if isinstance(module, TinyLoraLayer):
        return module.unmerged_matrix()
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return to_matrix(layer.weight.detach(), layer)


def names_in_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Names of the modules that the keys of an adapter's state dict belong to, in model order.

    Raises:
        AdapterFileError: if the model has no such module; names it.
    """
    wanted = {key.rpartition(".tinylora_")[0] for key in state_dict} - {""}  # "" is that of the vectors
    names = [name for name, _ in model.named_modules() if name in wanted]
    unknown = sorted(wanted - set(names))
    if unknown:
        raise AdapterFileError(
            f"The state dict names {len(unknown)} modules that the model lacks, such as {unknown[0]!r}."
        )
    return names


def settings(config: PeftConfig) -> dict[str, Any]:
    """What of a config decides over the factors."""
    ignored = {"inference_mode", "base_model_name_or_path", "revision", "init_weights", "init_v_bound", "peft_version"}
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def bounded_rank(config: PeftConfig, layer: nn.Module, name: str) -> int:
    """`config.r`; the smallest side of the weight where a config of PEFT's asks for more, as PEFT does.

    Raises:
        BasisError: if `r` of one of this package's configs is larger than that; names the module.
    """
    smallest = min(matrix_shape(layer))
    if config.r <= smallest:
        return config.r
    message = (
        f"r={config.r} is larger than the smallest side of module {name!r}, whose weight is "
        f"{' x '.join(map(str, matrix_shape(layer)))}"
    )
    from_peft = not isinstance(config, TinyLoraConfig) or (config._from_file and not config.uses_paper_conventions)
    if not from_peft:
        raise BasisError(f"{message}. Use r={smallest} or less, or name the module in `exclude_modules`.")
    if not config.inference_mode:
        warnings.warn(f"{message}: this module gets rank {smallest}.", stacklevel=2)
    return smallest


def warn_if_overparametrised(config: PeftConfig, groups: dict[str, int]) -> None:
    """Warn where even the v that most modules read has more numbers than the R of all of them have entries."""
    members = max(Counter(groups.values()).values(), default=1)
    most = config.r**2 * members
    if config.u > most:
        warnings.warn(
            f"u={config.u} numbers are trained for {members} module(s) with r={config.r}, which can tell only "
            f"{most} of them apart; the rest change nothing but the step size. Use u={most} or less.",
            stacklevel=2,
        )
