"""An adapter's folder in one form -> the same function in another: compact, portable, a plain LoRA, or a merged model.

Takes compact and portable files and those of stock PEFT's TinyLoRA. Every way goes over the base model, since a compact
file has no factors and a portable one must be shown to have those of its base.

As a LoRA, delta W = (B R) A: `lora_A` is A, `lora_B` is B R, and with lora_alpha = r the scaling is 1. Nothing is rounded
but these factors, to `dtype`. PEFT then reads back what was written, so that no module is missed and none is added.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from re import escape
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .adapter_files import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_adapter
from .config import TinyLoraConfig
from .embedding import Embedding
from .errors import AdapterFileError, ConfigError
from .experts import ParamWrapper
from .layer import TinyLoraLayer, layers_of
from .output_folder import written_at_once
from .survival import MergeReport
from .weight import parameter_is_transposed, stores_transposed


FORMS = ("compact", "portable", "lora", "merged")
DTYPES = ("float32", "bfloat16", "float16")
PREFIX = "base_model.model."


def export_adapter(
    source: str | Path,
    target: str | Path,
    to: str,
    base_model: nn.Module,
    dtype: torch.dtype | str | None = None,
    **hub_options: Any,
) -> MergeReport | None:
    """Write an adapter in another form.

    `"compact"` and `"portable"` are this package's files, of the same function to the last bit; factors that the base
    does not determine stay in. `"lora"` is a LoRA adapter of rank r for PEFT and what reads PEFT's files; it is the same
    function up to the rounding of its factors. `"merged"` is a whole model, in which rounding to `dtype` may lose much of
    a small update: the report says how much.

    A tokenizer that the adapter has is written too. A merged model gets that of the base model otherwise.

    Args:
        source (`str` or `Path`): folder or Hub id of the adapter. Of a repository its two files are downloaded,
            and a tokenizer.
        target (`str` or `Path`): folder to write to; must hold neither an adapter nor a model yet.
        to (`str`): `"compact"`, `"portable"`, `"lora"` or `"merged"`.
        base_model (`nn.Module`): what it was trained on, in the same form. The adapter is put into it and taken out
            again, except that `"merged"` consumes it.
        dtype (`torch.dtype` or `str`, *optional*): float32, bfloat16 or float16. Of the factors of a LoRA, by default
            float32; of a merged model, by default that of the base, and for quantized layers that of the model.
        hub_options: `revision`, `subfolder` and `token` of the download.

    Returns:
        [`MergeReport`]: for `"merged"`, how much of the update each module kept: round(W + delta W) - round(W), of the
        base weight W as loaded, against delta W. `None` for the other forms.

    Raises:
        ConfigError: if `to` or `dtype` is none of these, or `base_model` cannot be saved.
        AdapterFileError: if `target` is taken, `source` is no TinyLoRA, is damaged or does not fit `base_model`, or a
            LoRA cannot express it.
        HubError: if `source` cannot be downloaded. After any error, `target` is as it was.
    """
    if to not in FORMS:
        raise ConfigError(f"to={to!r}: allowed are {', '.join(map(repr, FORMS))}.")
    dtype = _checked_dtype(dtype, to)
    if to == "merged" and not isinstance(base_model, PreTrainedModel):
        raise ConfigError(
            f"to='merged': base_model is a {type(base_model).__name__}, and only a model of transformers can be saved. "
            "Call merge_and_unload() and save its state dict."
        )
    for name, content in ((CONFIG_FILE, "an adapter"), ("config.json", "a model")):
        if (Path(target) / name).exists():
            raise AdapterFileError(f"{target} holds {content} already: name another folder, or remove it first.")
    folder = find_adapter(source, **hub_options)
    config, tensors = read_adapter(folder)

    report = None
    with written_at_once(target) as partial:
        if to == "merged":
            model = PeftModel.from_pretrained(base_model, folder, config=config)
            model.merge_and_unload(dequantize=True, dtype=dtype).save_pretrained(partial)
            report = model.merge_report
        elif to == "lora":
            _write_lora(base_model, folder, config, tensors, dtype, partial)
        else:
            with _adapted(base_model, folder, tensors, config) as model:
                config.save_basis = to == "portable"
                model.save_pretrained(partial)
            (partial / "README.md").unlink(missing_ok=True)  # PEFT's template, which says nothing of this adapter
        if not _save_tokenizer(str(source), partial, **hub_options) and to == "merged":
            _save_tokenizer(str(base_model.name_or_path), partial, revision=config.revision)
    return report


def _checked_dtype(dtype: torch.dtype | str | None, to: str) -> torch.dtype | None:
    if dtype is None:
        return torch.float32 if to == "lora" else None
    if to in ("compact", "portable"):
        raise ConfigError(f"dtype={dtype!r} is for 'lora' and 'merged': leave it out, v is stored as it was trained.")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: allowed are {', '.join(map(repr, DTYPES))}.")
    return getattr(torch, name)


@contextmanager
def _adapted(
    base_model: nn.Module, folder: Path, in_file: Iterable[str], config: PeftConfig | None = None
) -> Iterator[PeftModel]:
    """The base model with the adapter of a folder in it; afterwards without, and with the biases that it had."""
    in_file = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in in_file}
    kept = {name: value.clone() for name, value in base_model.state_dict().items() if name in in_file}
    trained, training = {name for name, p in base_model.named_parameters() if p.requires_grad}, base_model.training
    try:
        model = PeftModel.from_pretrained(base_model, folder, config=config)
        try:
            yield model
        finally:
            model.unload()
    finally:
        base_model.load_state_dict(kept, strict=False)
        if isinstance(base_model, PreTrainedModel):
            base_model.tie_weights()  # PEFT leaves the copy of a tied output layer in its place
        base_model.train(training)
        for name, parameter in base_model.named_parameters():
            parameter.requires_grad = name in trained


def _write_lora(
    base_model: nn.Module,
    folder: Path,
    config: TinyLoraConfig,
    in_file: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    partial: Path,
) -> None:
    names = [name for name, _ in base_model.named_modules()]
    with _adapted(base_model, folder, in_file, config) as model:
        layers = layers_of(model.get_base_model())
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            tensors |= {f"{PREFIX}{name}.{key}": factor for key, factor in _factors(name, layer, dtype).items()}
        lora = _lora_config(config, layers, names)
    lora.save_pretrained(partial)
    # The rest is PEFT's own and has the same names for every method: biases, `modules_to_save`, trained tokens.
    others = {key: tensor for key, tensor in in_file.items() if "tinylora_" not in key}
    save_file(tensors | others, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    _check_peft_reads(base_model, partial, tensors, others)


def _factors(name: str, layer: TinyLoraLayer, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """lora_A = A and lora_B = B R of one layer, with the shapes and the names that PEFT gives them.

    The experts of one parameter lie side by side: lora_A (experts * r, in), an expert's r rows together; lora_B
    (out, r * experts), all experts' columns of the same rank together. An embedding's are transposed.
    """
    _check_expressible(name, layer)
    A, B, R = (factor.detach().cpu() for factor in (*layer.basis("default")[:2], layer.mixing_matrix("default")))
    B = B.double() @ R.double()
    if A.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    if isinstance(layer, Embedding):
        factors = {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
    else:
        factors = {"lora_A.weight": A, "lora_B.weight": B}
    factors = {key: factor.to(dtype).contiguous() for key, factor in factors.items()}
    if not all(factor.isfinite().all() for factor in factors.values()):
        raise AdapterFileError(
            f"The update of {name!r} is too large for {dtype}: choose dtype='bfloat16' or 'float32'."
        )
    return factors


def _check_expressible(name: str, layer: TinyLoraLayer) -> None:
    base = layer.get_base_layer()
    if isinstance(layer, Embedding) and base.max_norm is not None:
        reason = "its embedding has max_norm, which PEFT applies to a LoRA's factor too"
    elif (
        isinstance(layer, ParamWrapper)
        and layer.matrix_shape()[0] == 1
        and parameter_is_transposed(base, layer.parameter_name)
    ):
        reason = "it is a transposed parameter of a single expert, whose update PEFT does not transpose"
    else:
        return
    raise AdapterFileError(f"{name!r} cannot be written as a LoRA: {reason}. Keep the adapter as it is, or merge it.")


def _lora_config(config: TinyLoraConfig, layers: dict[str, TinyLoraLayer], names: list[str]) -> LoraConfig:
    """What PEFT's LoRA must be told to adapt the same modules with a scaling of 1."""
    ranks = {layer.weight_names["default"]: layer.r["default"] for layer in layers.values()}
    r = max(ranks.values())
    smaller = {f"^{escape(name)}": rank for name, rank in ranks.items() if rank != r}
    lora = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_parameters=config.target_parameters,
        fan_in_fan_out=any(stores_transposed(layer.get_base_layer()) for layer in layers.values()),
        bias=config.bias.replace("tinylora", "lora"),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    modules = [name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    lora.target_modules = _target_modules(lora, modules, names)
    return lora


def _target_modules(lora: LoraConfig, modules: list[str], names: list[str]) -> list[str] | str:
    """The shortest way to name these modules and no others: last components, full names, or a regular expression."""
    for candidates in (sorted({name.rpartition(".")[2] for name in modules}), modules):
        lora.target_modules = candidates
        if [name for name in names if check_target_module_exists(lora, name)] == modules:
            return candidates
    return "|".join(map(escape, modules))


def _check_peft_reads(
    base_model: nn.Module, folder: Path, tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
) -> None:
    """Load what was written with PEFT's LoRA and compare it, tensor by tensor."""
    try:
        with _adapted(base_model, folder, others) as model:
            found = {key.replace(".default", ""): t for key, t in model.state_dict().items() if ".lora_" in key}
            wrong = sorted(found.keys() ^ tensors.keys()) or [
                key for key, tensor in tensors.items() if not torch.equal(found[key].to("cpu", tensor.dtype), tensor)
            ]
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise AdapterFileError(f"PEFT {peft.__version__} cannot load this adapter as a LoRA: {error}") from error
    if wrong:
        raise AdapterFileError(
            f"PEFT {peft.__version__} does not give {wrong[0]!r} back from a LoRA of this adapter, and neither "
            f"{len(wrong) - 1} others. Keep the adapter as it is, or merge it."
        )


def _save_tokenizer(name: str, folder: Path, **options: Any) -> bool:
    """Save the tokenizer of an adapter or a base model, if it has one."""
    options = {name: value for name, value in options.items() if value is not None}
    try:
        # transformers makes an empty tokenizer for a model that has none.
        if not get_tokenizer_config(name, **options):
            return False
        AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options).save_pretrained(folder)
    except (OSError, ValueError):
        return False  # `name` is no place that a tokenizer can be loaded from
    return True
