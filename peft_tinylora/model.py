"""TinyLoraModel: PEFT's tuner for TinyLoRA. Wraps the modules that were assigned something, and merges them.

The trained vectors live here, in `tinylora_v` (adapter name -> group -> v), once each. Where transformers injects an
adapter straight into its model (`model.add_adapter(config)`), the tuner is thrown away afterwards and the vectors are
registered on that model instead.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from torch import nn

from . import checkpoint
from .assignment import Assignment, assign, read_from_file
from .combine import Combining
from .config import check_peft_fields, conventions_of
from .embedding import Embedding
from .errors import AdapterFileError, ConfigError
from .experts import ParamWrapper, wrapper_of_parameter
from .layer import TinyLoraLayer, layers_of
from .linear import Linear
from .merging import TOLERATED_LOSS, merge_layers, warn_of_loss
from .mixed import BASE, mixed_batch
from .survival import MergeReport
from .targets import expand_all_linear, find_targets, targets_in_state_dict
from .vector import Vectors, new_vector
from .weight import (
    dequantize_model,
    floating_dtype,
    keep_differentiable,
    working_dtype,
)


class TinyLoraModel(Combining):
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
    tinylora_v: Vectors

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
        self._assignments: dict[str, Assignment] = {}
        self._awaiting_file: set[str] = set()
        self._file_config: PeftConfig | None = None  # of the file that is being loaded
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
        wrapped = next(iter(layers_of(model).values()), None)
        if not self._outlived_by_model:
            # A base that another PeftModel wrapped already keeps its vectors, as it keeps its layers.
            self.tinylora_v = Vectors() if wrapped is None else wrapped.tinylora_v
            return
        if not isinstance(getattr(model, "tinylora_v", None), Vectors):
            model.tinylora_v = Vectors()
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
        if adapter_name == BASE:
            raise ConfigError(f"adapter_name={BASE!r} is PEFT's name for no adapter. Choose another name.")
        if adapter_name not in self.tinylora_v and hasattr(self.tinylora_v, adapter_name):
            raise ConfigError(
                f"adapter_name={adapter_name!r}: torch cannot keep parameters under the name of a module's attribute, "
                "such as 'half', 'train' or 'type'. Choose another name."
            )
        if self.tinylora_v.bank_with(adapter_name) is not None:
            raise ConfigError(f"adapter_name={adapter_name!r}: a bank of the model has an adapter of that name.")
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        has_factors = any(".tinylora_A" in key for key in state_dict or ())  # a compact file has none, or not all
        by_state_dict = has_factors and not getattr(config, "format_version", None)
        state_dict = state_dict if by_state_dict else None
        targets = find_targets(model, config) if state_dict is None else targets_in_state_dict(model, state_dict)
        keep_differentiable(model)
        twin = self._adapter_with_same_settings(adapter_name, config)
        self._assignments = assign(model, targets, config, twin)
        expand_all_linear(config, model)
        others = [(v, v.requires_grad) for vectors in self.tinylora_v.values() for v in vectors.values()]
        for layer in layers_of(model).values():
            layer.forget(adapter_name)  # of an earlier PeftModel around the same base
        self.tinylora_v.forget_adapter(adapter_name)
        self.tinylora_v[adapter_name] = nn.ParameterDict({})
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            del self.tinylora_v[adapter_name]
            raise
        finally:
            self._assignments = {}
        if read_from_file(config):
            self._awaiting_file.add(adapter_name)
        trained = adapter_name in self.active_adapters and not config.inference_mode
        for v in self.tinylora_v[adapter_name].values():
            v.requires_grad = trained
        for v, requires_grad in others:
            v.requires_grad = requires_grad

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
        given = self._assignments[current_key]
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
            layer = layer_cls(target, self.tinylora_v, given.backend)
            self._replace_module(parent, target_name, layer, target)
        vectors = self.tinylora_v[adapter_name]
        for group in dict.fromkeys(given.groups):
            if group not in vectors:
                stored = layer.stored_tensor()
                v = new_vector(config.u, config.init_weights, config.init_v_bound, working_dtype(stored.dtype))
                vectors[group] = v.to(layer.compute_device())
        layer.update_layer(
            adapter_name,
            weight_name=current_key,
            matrix_names=given.matrix_names,
            groups=given.groups,
            basis=given.basis,
            make_basis=given.make_basis,
            r=given.r,
            projection=given.projection,
            dropout=config.tinylora_dropout,
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also moves the new layer's buffers, which fails for those that are about to be loaded.
        setattr(parent, child_name, new_module)

    def _init_tinylora_v(self, config: PeftConfig, adapter_name: str) -> None:
        """Draw the vectors of an adapter from [-init_v_bound, init_v_bound]; PEFT's own tests call this."""
        for v in self.tinylora_v[adapter_name].values():
            nn.init.uniform_(v, -config.init_v_bound, config.init_v_bound)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # v is fp32 from the start and the factors always are. Only PEFT's own configs may ask for a v in the dtype of
        # the base: with this package's, v is never rounded while it trains.
        if autocast_adapter_dtype or conventions_of(self.peft_config[adapter_name]).from_paper:
            return
        for layer in layers_of(self.model).values():
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
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The base model with the adapters merged into its weights; see [`merge_adapter`], also for what is raised.

        Args:
            progressbar (`bool`, *optional*, defaults to `False`): whether to show one.
            safe_merge (`bool`, *optional*, defaults to `False`): refuse where a result is not finite.
            adapter_names (`list[str]`, *optional*): which to merge, defaults to the active ones.
            dequantize (`bool`, *optional*, defaults to `False`): whether to turn every quantized linear layer of the
                model, adapted or not, into an `nn.Linear` of the model's dtype, so that the update is not quantized.
            stochastic_rounding_seed (`int`, *optional*): as in [`merge_adapter`].
            dtype (`torch.dtype`, *optional*): of the whole returned model, dequantized if need be; merged weights are
                rounded to it once. Defaults to what each weight has.

        Returns:
            `nn.Module`: the base model, changed in place.
        """
        self._check_merge_allowed()
        dequantize_to = dtype or (floating_dtype(self.model) if dequantize else None)
        self._merge(adapter_names, safe_merge, stochastic_rounding_seed, dequantize_to, progressbar, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            model = self._unload_and_optionally_merge(adapter_names=adapter_names)
        if dequantize_to is not None:
            dequantize_model(model, dequantize_to)
        for parameter in model.parameters() if dtype is not None else ():
            if parameter.is_floating_point():  # and no buffers: rotary frequencies stay in fp32, as on loading
                parameter.data = parameter.data.to(dtype)
        return model

    def _merge(
        self,
        adapter_names: list[str] | None,
        safe_merge: bool,
        stochastic_rounding_seed: int | None,
        dequantize_to: torch.dtype | None = None,
        progressbar: bool = False,
        round_to: torch.dtype | None = None,
    ) -> None:
        layers = layers_of(self.model)
        report = merge_layers(
            layers, adapter_names, safe_merge, stochastic_rounding_seed, dequantize_to, progressbar, round_to
        )
        if not report:
            return
        self.merge_report = report
        # TRL merges and unmerges at every step that it sends to vLLM: one warning is enough.
        if not self._warned_of_loss and not report.total.relative_error <= TOLERATED_LOSS:
            self._warned_of_loss = True
            quantized = any(layer.quantization_backend for layer in layers.values())
            warn_of_loss(report.total, quantized, has_chosen_dtype=round_to is not None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its vectors; see `BaseTuner.delete_adapter`."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.tinylora_v:
            del self.tinylora_v[adapter_name]
        self.tinylora_v.forget_adapter(adapter_name)
        self._awaiting_file.discard(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is None:
            yield
            return
        options = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        with mixed_batch(self.model, self.tinylora_v, kwargs["adapter_names"], args, options):
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
            file_config = None if tuner is None else tuner._file_config
            tensors = checkpoint.tensors_to_load(model, config, adapter_name, state_dict, file_config)
        except AdapterFileError:
            if tuner is not None and adapter_name in tuner._awaiting_file:
                tuner._forget(adapter_name)
            raise
        if tuner is not None:
            tuner._awaiting_file.discard(adapter_name)
        return tensors

    @contextmanager
    def loading_file(self, adapter_name: str, config: PeftConfig | None) -> Iterator[None]:
        """While a file is loaded into an adapter, its own config is what the file is compared with.

        The adapter may have another one: that of the run that resumes.

        Args:
            adapter_name (`str`): the adapter, which may not be there yet.
            config (`PeftConfig`, *optional*): as it was saved with the file.

        Raises:
            AdapterFileError: for a file that is cut short or damaged; the model is as before.
        """
        self._file_config = config
        try:
            yield
        except SafetensorError as error:
            if adapter_name in self._awaiting_file:
                self._forget(adapter_name)
            raise checkpoint.damaged_file(error) from error
        finally:
            self._file_config = None

    def _forget(self, adapter_name: str) -> None:
        """Take back an adapter whose file was refused, so that the model is as before."""
        if any(not v.is_meta and v.any() for v in self.tinylora_v[adapter_name].values()):
            return  # it was trained before this file was tried
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            self.unload()


def settings(config: PeftConfig) -> dict[str, Any]:
    """What of a config decides over the factors."""
    ignored = {"inference_mode", "base_model_name_or_path", "revision", "init_weights", "init_v_bound", "peft_version"}
    ignored |= {"fingerprint", "format_version", "save_dtype", "save_basis", "peft_tinylora_version", "weight_tying"}
    return {name: value for name, value in config.to_dict().items() if name not in ignored}
