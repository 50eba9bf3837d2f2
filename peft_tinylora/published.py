"""A setting, a command or a path -> the same as it may be published: without secrets, and without paths of this machine."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import get_token


# Names of what must not be published, but not those of a tokenizer's special tokens.
SECRET = re.compile(
    r"(^|_)(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(token|key|pat|secret|password)$",
    re.IGNORECASE,
)
OF_A_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user and password before the host
A_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
HIDDEN = "HIDDEN"


def relative(name: str) -> str:
    """Returns an id as it is, and a path without the folders above the working directory (or its last part)."""
    path = Path(name)
    if not path.exists():
        return name
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def command_line(processes: int) -> str:
    """Rebuilds the command that started this process, from `sys.argv`, for publishing: without tokens and paths."""
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    options = [None, *sys.argv[:-1]]
    shown = [
        HIDDEN if option and option.startswith("--") and is_secret(option) else published(argument)
        for option, argument in zip(options, sys.argv, strict=True)
    ]
    return f"{launcher} {shlex.join(shown)}"


def published(value: Any) -> Any:
    """A setting as it may be published: without what is a secret by its name or its look, and paths of this machine.

    Args:
        value: a string, which may be JSON or `name=value`, or what YAML knows.
    """
    if isinstance(value, dict):
        return {name: published(part) for name, part in value.items() if not is_secret(name)}
    if isinstance(value, list):
        return [published(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        try:
            return json.dumps(published(json.loads(value)))
        except ValueError:
            return HIDDEN if any(map(is_secret, re.findall(r"\w+", value))) else value
    name, equals, _ = value.partition("=")
    if equals and is_secret(name):
        return f"{name}={HIDDEN}"
    token = get_token()
    value = A_TOKEN.sub(HIDDEN, value.replace(token, HIDDEN) if token else value)
    value = OF_A_URL.sub(HIDDEN, value)
    return relative(value) if Path(value).is_absolute() else value


def is_secret(name: str) -> bool:
    """Whether an option or a variable of this name holds what must not be published."""
    return SECRET.search(str(name).lstrip("-")) is not None
