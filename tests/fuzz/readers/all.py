"""Every reader, by name."""

import importlib

from fuzz.harness import Reader


# Module -> its readers: of those that need no PyTorch, none is imported with them.
NAMES = {
    "adapter": ("adapter_weights", "adapter_config", "peft_weights", "peft_config", "bank_weights", "bank_config"),
    "inline": ("inline_text", "inline_body", "served", "vllm_settings"),
    "basis": ("basis_file", "basis_published", "checkpoint_index"),
    "sweeps": ("yaml", "sweep", "figures", "results", "curve"),
    "options": ("recipe", "run"),
    "logs": ("answer_log", "checkpoint"),
    "runs": ("between_steps", "rows", "parquet"),
    "answers": ("answers", "latex", "reply"),
    "cards": ("card", "facts", "command"),
}
READERS = [name for names in NAMES.values() for name in names]


def reader_of(name: str) -> Reader:
    """The reader of a name."""
    module = next(module for module, names in NAMES.items() if name in names)
    found = {reader.name: reader for reader in importlib.import_module(f"fuzz.readers.{module}").READERS}
    assert tuple(found) == NAMES[module]
    return found[name]
