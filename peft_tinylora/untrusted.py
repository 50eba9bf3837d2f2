"""An adapter's files, which may be anybody's -> do they ask for no more than a load may cost?

Sizes are looked at before anything of that size is made, and regular expressions are tried where they can be stopped.
"""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .adapter_files import check_weights, find_weights
from .checkpoint import damaged_file
from .config import TinyLoraConfig, shortened
from .errors import AdapterFileError
from .gather import stored_shape


MOST_NAMES = 1000  # in a list of the config, or as many as the model has modules: PEFT compares each with each
MOST_PATTERN_CHARACTERS = 1_000_000
MOST_PATTERN_SECONDS = 3

# Reads [[., ., match or fullmatch, pattern], ...] and [name, ...]; says which pattern it is at, and what is wrong with it.
TRY_PATTERNS = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for index, (*_, how, pattern) in enumerate(patterns):
    print(index, flush=True)
    try:
        found = getattr(re.compile(pattern), how)
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(f"is no regular expression ({str(error)[:80]})")
    for name in names:
        found(name)
"""


def check_files(
    model: nn.Module,
    config: TinyLoraConfig,
    source: str,
    options: Mapping[str, Any],
    ignore_mismatched_sizes: bool = False,
) -> Path:
    """The file of an adapter's weights, once it is known to fit its config and to change no more than it holds."""
    path = find_weights(source, **options)
    try:
        in_file = check_weights(path, config)
    except SafetensorError as error:
        raise damaged_file(error) from error
    names = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or []:  # PEFT copies each of them, which may be the whole model
        copied = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        copied = [name for name in copied if any(True for _ in model.get_submodule(name).parameters())]
        if copied and not any(f"{name}." in key for name in copied for key in in_file):
            raise AdapterFileError(
                f"modules_to_save={shortened(config.modules_to_save)} in adapter_config.json: the adapter file has no "
                f"tensor of {shortened(wanted)}. Nothing was loaded. Load the file with the config it was saved with."
            )
    if not ignore_mismatched_sizes:
        _check_shapes(model, in_file)
    return path


def _check_shapes(model: nn.Module, in_file: Mapping[str, tuple[int, ...]]) -> None:
    # Of a state dict that does not fit, torch loads what does before it says so, and the base model would be changed.
    tensors = (*model.named_parameters(), *model.named_buffers())
    shapes = {name: tuple(stored_shape(tensor)) for name, tensor in tensors}
    for key, shape in in_file.items():
        name = key.removeprefix("base_model.model.")
        if shapes.get(name, shape) != shape:
            raise AdapterFileError(
                f"The adapter file does not fit this base model: {name} has shape {shape} in it and {shapes[name]} in the "
                "model. Nothing was loaded. Load it onto the base model that adapter_config.json names."
            )


def check_names(config: TinyLoraConfig, model: nn.Module) -> None:
    """Check that names and patterns of a config that was read from a file can be looked for in a model within seconds.

    Python's `re` cannot be told to give up, and a short pattern with nested repeats can take it longer than anybody waits. So
    patterns are tried by a process of its own, as PEFT will use them.

    Args:
        config ([`TinyLoraConfig`]): the adapter's.
        model (`nn.Module`): before the adapter is put into it.

    Raises:
        AdapterFileError: if a list is far longer than the model, or a pattern is no regular expression, or takes too long;
            names the field.
    """
    if not config.is_from_file:
        return
    names = [name for name, _ in model.named_modules()]
    most = max(MOST_NAMES, len(names))
    for field in (
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "modules_to_save",
        "layers_pattern",
        "tie",
    ):
        value = getattr(config, field)
        if not isinstance(value, (str, type(None))) and len(value) > most:
            raise AdapterFileError(
                f"{field} in adapter_config.json has {len(value)} entries, and this model has {len(names)} modules. Nothing "
                "was loaded. Load the file with the config it was saved with."
            )
    # A plain name is matched at once.
    patterns = [row for row in _patterns(config) if not re.fullmatch(r"[\w.\\-]{0,200}", row[1])]
    for field, pattern, _, _ in patterns:
        if len(pattern) > MOST_PATTERN_CHARACTERS:
            raise AdapterFileError(
                f"{field}={shortened(pattern)} in adapter_config.json has {len(pattern)} characters, and at most "
                f"{MOST_PATTERN_CHARACTERS} are tried. Name the modules in a list."
            )
    if not patterns:
        return
    command = [spawn.get_executable(), "-I", "-S", "-c", TRY_PATTERNS]
    work = json.dumps([patterns, names])
    try:
        done = subprocess.run(
            command, input=work, capture_output=True, text=True, timeout=MOST_PATTERN_SECONDS, check=False
        )
        said, reached = done.stderr.strip(), done.stdout
        problem = said.splitlines()[-1] if done.returncode else None
    except subprocess.TimeoutExpired as error:
        problem = f"takes more than {MOST_PATTERN_SECONDS} s to be matched with the names of this model's modules"
        reached = (error.stdout or b"").decode()
    if problem is not None:
        field, pattern, _, _ = patterns[int((reached.split() or ["0"])[-1])]
        raise AdapterFileError(
            f"{field}={shortened(pattern)} in adapter_config.json {problem}. Nothing was loaded. Name the modules in a "
            "list, or with a simpler pattern."
        )


def _patterns(config: TinyLoraConfig) -> Iterator[tuple[str, str, str, str]]:
    """Field, pattern, method of `re` and what that gets, of all that is matched with the names of modules."""
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str):
            yield field, pattern, "fullmatch", pattern
    if isinstance(config.tie, dict):
        for pattern in config.tie.values():
            yield "tie", pattern, "fullmatch", pattern
    # PEFT puts these two into patterns of its own.
    layers = config.layers_pattern or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", pattern, "match", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
    for pattern in config.modules_to_save or []:
        yield "modules_to_save", pattern, "match", rf"(^|.*\.){pattern}($|\..*)"
