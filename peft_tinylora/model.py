"""TinyLoraModel: PEFT's tuner for TinyLoRA. Finds the modules, plans before it touches anything, wraps them.

The trained vectors live here, in `tinylora_v` (adapter name -> group -> v), once each. Where transformers injects an
adapter straight into its model (`model.add_adapter(config)`), the tuner is thrown away afterwards and the vectors are
registered on that model instead.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from tqdm import tqdm

from . import checkpoint
from .basis import Basis, compute_basis
from .config import TinyLoraConfig, check_peft_fields, conventions_of
from .errors import AdapterFileError, BasisError, ConfigError
from .experts import ParamWrapper
from .layer import Embedding, Linear, TinyLoraLayer
from .merging import TOLERATED_LOSS, MergeReport, Survival
from .projection import draw_projection, seed_of_module
from .targets import Target, expand_all_linear, find_targets
from .tying import group_modules, group_modules_by_ratio
from .vector import new_vector
from .weight import (
    check_parameter,
    check_supported,
    dense_matrix,
    dequantize_model,
    floating_dtype,
    keep_bitsandbytes_differentiable,
    matrix_shape,
    parameter_matrix,
    parameter_shape,
    quantization_backend,
    working_dtype,
)


class ModulePlan(NamedTuple):
    """What one target, a module or a parameter, gets: settled before any module is replaced."""

    groups: tuple[str, ...]  # one, or one for each expert
    r: int
    basis: Basis | None  # None: to be loaded
    make_basis: Callable[[torch.Tensor], Basis]
    projection: torch.Tensor  # (u, r, r), or (experts, u, r, r)
    backend: QuantizationBackend | None  # None: the weight is a floating point one


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
        self.merge_report: MergeReport | None = None  # of the last merge
        self._warned_of_loss = False
        self._plans: dict[str, ModulePlan] = {}
        self._awaiting_file: set[str] = set()
        self._outlived_by_model = isinstance(config, PeftConfig)
        super().__init__(model, config, adapter_name, low_cpu_mem_usage, state_dict)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None and getattr(peft_config, "target_parameters", None):
            if model_config["model_type"] not in self.target_module_mapping:
                return peft_config  # parameters only; a known type of model gets its default modules too, as with LoRA
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        wanted = set(getattr(config, "target_parameters", None) or ())
        for name, other in self.peft_config.items():
            present = set(getattr(other, "target_parameters", None) or ())
            if present and wanted and present != wanted:
                raise ConfigError(
                    f"target_parameters={sorted(wanted)}: adapter {name!r} has {sorted(present)}, and all adapters of "
                    "a model must name the same, or none, because their wrappers are nested."
                )

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
        targets = find_targets(model, config) if state_dict is None else targets_in_state_dict(model, state_dict)
        keep_bitsandbytes_differentiable(model)
        self._plans = self._plan(model, targets, config, adapter_name)
        expand_all_linear(config, model)
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
        self, model: nn.Module, targets: list[Target], config: PeftConfig, adapter_name: str
    ) -> dict[str, ModulePlan]:
        """Everything that can fail, for every target, before the first module is replaced."""
        conventions = conventions_of(config)
        names = [name for target in targets for name in target.names]
        if conventions.from_paper:
            groups = group_modules(names, conventions.tie, conventions.n_tie)
        else:
            groups = group_modules_by_ratio(names, config.weight_tying)
        if not read_from_file(config):
            warn_if_overparametrised(config, groups)

        twin = self._adapter_with_same_settings(adapter_name, config)
        plans = {}
        for index, (key, own_names, parameter_name) in enumerate(targets):
            weight = TargetWeight(model, key, parameter_name)
            r = bounded_rank(config, weight.shape, key)
            make_basis = functools.partial(
                compute_basis, r=r, sigma=conventions.sigma, canonical=conventions.from_paper, name=key
            )
            if twin is not None and weight.adapted is not None and twin in weight.adapted.tinylora_A:
                basis, projection = weight.adapted.copy_of_factors(twin)
            else:
                by_name = [seed_of_module(config.projection_seed, name) for name in own_names]
                seeds = by_name if conventions.from_paper else [config.projection_seed + index]
                draws = torch.stack([draw_projection(config.u, r, seed) for seed in seeds])
                projection = draws if len(weight.shape) == 3 else draws[0]
                basis = None if read_from_file(config) else make_basis(weight.unmerged_matrix())
            own_groups = tuple(str(groups[name]) for name in own_names)
            plans[key] = ModulePlan(own_groups, r, basis, make_basis, projection, weight.backend)
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
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        plan = self._plans[current_key]
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None:
            layer = wrapper_of_parameter(target, parameter_name)
            if layer is None:
                layer = ParamWrapper(target, self.tinylora_v, parameter_name)
                self._replace_module(parent, target_name, layer, target)
        elif isinstance(target, TinyLoraLayer):
            layer = target
        else:
            layer_cls = Embedding if isinstance(base_layer, nn.Embedding) else Linear
            layer = layer_cls(target, self.tinylora_v, plan.backend)
            self._replace_module(parent, target_name, layer, target)
        vectors = self.tinylora_v[adapter_name]
        for group in dict.fromkeys(plan.groups):
            if group not in vectors:
                stored = layer.stored_tensor()
                v = new_vector(config.u, config.init_weights, config.init_v_bound, working_dtype(stored.dtype))
                vectors[group] = v.to(stored.device)
        layer.update_layer(
            adapter_name,
            groups=plan.groups,
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
            stored = layer.stored_tensor().dtype
            for v in layer.vectors(adapter_name) if adapter_name in layer.tinylora_A else []:
                v.data = v.data.to(stored if stored.is_floating_point else torch.float32)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        stochastic_rounding_seed: int | None = None,
    ) -> None:
        """Merge adapters into the base weights, in fp32 and rounded once; `unmerge_adapter` restores them bit for bit.

        `merge_report` says afterwards how much of the update each module kept. Warns, once for each model, if more
        than a tenth was lost.

        Args:
            adapter_names (`list[str]`, *optional*): which to merge, defaults to the active ones.
            safe_merge (`bool`, *optional*, defaults to `False`): refuse where a result is not finite.
            stochastic_rounding_seed (`int`, *optional*): round bf16 weights up or down at random, such that the mean is
                exact, with this seed. Without it, to nearest.

        Raises:
            MergeError: before anything was changed, if a quantized weight cannot be written.
            ValueError: with `safe_merge`, if a merged weight holds NaN or Inf; nothing stays merged.
        """
        self._check_merge_allowed()
        self._merge(adapter_names, safe_merge, stochastic_rounding_seed)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
        stochastic_rounding_seed: int | None = None,
    ) -> nn.Module:
        """The base model with the adapters merged into its weights; see [`merge_adapter`], also for what is raised.

        Args:
            progressbar (`bool`, *optional*, defaults to `False`): whether to show one.
            safe_merge (`bool`, *optional*, defaults to `False`): refuse where a result is not finite.
            adapter_names (`list[str]`, *optional*): which to merge, defaults to the active ones.
            dequantize (`bool`, *optional*, defaults to `False`): whether to turn every quantized linear layer of the
                model, adapted or not, into an `nn.Linear` of the model's dtype, so that the update is not quantized.
            stochastic_rounding_seed (`int`, *optional*): as in [`merge_adapter`].

        Returns:
            `nn.Module`: the base model, changed in place.
        """
        self._check_merge_allowed()
        dtype = floating_dtype(self.model) if dequantize else None
        self._merge(adapter_names, safe_merge, stochastic_rounding_seed, dtype, progressbar)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            model = self._unload_and_optionally_merge(adapter_names=adapter_names)
        if dtype is not None:
            dequantize_model(model, dtype)
        return model

    def _merge(
        self,
        adapter_names: list[str] | None,
        safe_merge: bool,
        stochastic_rounding_seed: int | None,
        dequantize_to: torch.dtype | None = None,
        progressbar: bool = False,
    ) -> None:
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, TinyLoraLayer)}
        for name, layer in layers.items():
            layer.check_mergeable(name, dequantize_to is not None, stochastic_rounding_seed is not None)
        report = MergeReport()
        touched = []
        try:
            for name, layer in tqdm(layers.items(), desc="Merging", disable=not progressbar):
                before = len(layer.merged_adapters)
                generator = None
                if stochastic_rounding_seed is not None:
                    generator = torch.Generator().manual_seed(seed_of_module(stochastic_rounding_seed, name))
                with onload_layer(layer):
                    layer.merge(safe_merge, adapter_names, dequantize_to, generator)
                if len(layer.merged_adapters) > before:
                    touched.append(layer)
                    report[name] = layer.survival
        except Exception:
            for layer in touched:
                layer.unmerge()
            raise
        if report:
            self.merge_report = report
            self._warn_of_loss(report.total)

    def _warn_of_loss(self, total: Survival) -> None:
        # TRL merges and unmerges at every step that it sends to vLLM: once is enough.
        if self._warned_of_loss or total.relative_error <= TOLERATED_LOSS:
            return
        self._warned_of_loss = True
        if not math.isfinite(total.relative_error):
            warnings.warn("Merging gave NaN or Inf: unmerge, and check the adapter.", stacklevel=4)
            return
        quantized = any(
            layer.quantization_backend for layer in self.model.modules() if isinstance(layer, TinyLoraLayer)
        )
        remedy = "use merge_and_unload(dequantize=True)" if quantized else "load the base model in float32 to merge"
        warnings.warn(
            f"Merging lost {min(total.relative_error, 9.99):.0%} of the update to rounding (cosine with the exact one "
            f"{total.cosine:.2f}; `merge_report` has every module). Keep the adapter unmerged, or {remedy}.",
            stacklevel=4,
        )

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


class TargetWeight:
    """The weight of a target, whose module may be adapted already.

    Args:
        model (`nn.Module`): the model.
        key (`str`): name of the module, or of the parameter.
        parameter_name (`str`, *optional*): the last part of `key`, where it names a parameter.

    Raises:
        UnsupportedModuleError: if no basis can be taken from it; names it.
    """

    def __init__(self, model: nn.Module, key: str, parameter_name: str | None) -> None:
        module = model.get_submodule(key if parameter_name is None else key.rpartition(".")[0])
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        self.adapted: TinyLoraLayer | None = None
        self.backend = None
        if parameter_name is None:
            if isinstance(module, TinyLoraLayer):
                self.adapted = module
                self.backend = module.quantization_backend
            else:
                self.backend = quantization_backend(layer, model)
                check_supported(layer, key, self.backend)
            self.shape = matrix_shape(layer)
        else:
            check_parameter(getattr(layer, parameter_name), key)
            self.adapted = wrapper_of_parameter(module, parameter_name)
            self.shape = parameter_shape(layer, parameter_name)
        self._layer, self._parameter_name = layer, parameter_name

    def unmerged_matrix(self) -> torch.Tensor:
        """W (out, in), or (experts, out, in), in fp32 or better."""
        if self.adapted is not None:
            return self.adapted.unmerged_matrix()
        if self._parameter_name is not None:
            return parameter_matrix(self._layer, self._parameter_name)
        return dense_matrix(self._layer, self.backend)


def wrapper_of_parameter(module: nn.Module, parameter_name: str) -> ParamWrapper | None:
    """The wrapper of a parameter among those nested around a module."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None


def targets_in_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> list[Target]:
    """The modules that the keys of an adapter's state dict belong to, in model order.

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
    return [Target(name, [name], None) for name in names]


def settings(config: PeftConfig) -> dict[str, Any]:
    """What of a config decides over the factors."""
    ignored = {"inference_mode", "base_model_name_or_path", "revision", "init_weights", "init_v_bound", "peft_version"}
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def bounded_rank(config: PeftConfig, shape: tuple[int, ...], name: str) -> int:
    """`config.r`; the smallest side of the weight where a config of PEFT's asks for more, as PEFT does.

    Raises:
        BasisError: if `r` of one of this package's configs is larger than that; names the module.
    """
    smallest = min(shape[-2:])
    if config.r <= smallest:
        return config.r
    message = (
        f"r={config.r} is larger than the smallest side of module {name!r}, whose weight is "
        f"{' x '.join(map(str, shape))}"
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
