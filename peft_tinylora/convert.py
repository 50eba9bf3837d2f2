"""An adapter's folder in one form -> the same adapter in another: compact, or portable for stock PEFT.

Takes either form, and the files of stock PEFT's TinyLoRA. Both ways go over the base model, since a compact file has no
factors and a portable one must be shown to have those of its base.
"""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from torch import nn

from .config import TinyLoraConfig
from .errors import AdapterFileError, ConfigError


FORMS = ("compact", "portable")


def convert_adapter(source: str | Path, target: str | Path, to: str, base_model: nn.Module) -> None:
    """Write an adapter in another form. The function is the same: factors that the base does not determine stay in.

    Args:
        source (`str` or `Path`): folder or Hub id of the adapter.
        target (`str` or `Path`): folder to write to; must not hold an adapter yet.
        to (`str`): `"compact"` or `"portable"`.
        base_model (`nn.Module`): what it was trained on, in the same form; adapters are put into it and taken out again.

    Raises:
        ConfigError: if `to` is none of the two, or the adapter is no TinyLoRA.
        AdapterFileError: if `target` holds an adapter, or `source` does not fit `base_model`; nothing is written.
    """
    if to not in FORMS:
        raise ConfigError(f"to={to!r}: allowed are {', '.join(map(repr, FORMS))}.")
    target = Path(target)
    if (target / "adapter_config.json").exists():
        raise AdapterFileError(f"{target} holds an adapter already: name another folder, or remove it first.")
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, TinyLoraConfig):
        raise ConfigError(f"{source} is a {config.peft_type.value} adapter, and only TinyLoRA has these forms.")
    model = PeftModel.from_pretrained(base_model, folder, config=config)
    try:
        config = model.peft_config["default"]
        config.save_basis = to == "portable"
        partial = target.with_name(f".{target.name}.writing")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        if target.is_dir():
            for file in partial.iterdir():
                file.replace(target / file.name)
            partial.rmdir()
        else:
            partial.replace(target)
    finally:
        model.unload()
