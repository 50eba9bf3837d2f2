"""What the owner of a server allows, from environment variables, which vLLM's processes inherit.

PEFT_TINYLORA_VLLM             who may be served, separated by commas: `inline` for adapters in the request, a Hub id, or
                               NAME=FOLDER. Not set: this plugin does nothing.
PEFT_TINYLORA_VLLM_RANK        rank of the factors that are kept, and that adapters must have (2)
PEFT_TINYLORA_VLLM_CHARACTERS  longest inline adapter (65536, some 10,000 numbers in fp32)
PEFT_TINYLORA_VLLM_RATE        inline adapters a second that were not served just before (20)
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError
from ..inline import PREFIX


INLINE = "inline"
VARIABLE = "PEFT_TINYLORA_VLLM"


@dataclass(frozen=True)
class Settings:
    """What a server serves.

    Args:
        sources (`dict[str, str]`): name that requests use -> Hub id or absolute folder.
        inline (`bool`): whether adapters may be in the request.
        rank (`int`): of every adapter.
        most_characters (`int`): longest inline adapter.
        rate (`int`): new inline adapters a second.
    """

    sources: dict[str, str]
    inline: bool
    rank: int = 2
    most_characters: int = 65536
    rate: int = 20


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """The settings; `None` where the plugin is off.

    Raises:
        ConfigError: names the variable, the value and what is allowed.
    """
    entries = [entry.strip() for entry in environment.get(VARIABLE, "").split(",")]
    entries = [entry for entry in entries if entry]
    if not entries:
        return None
    sources: dict[str, str] = {}
    for entry in entries:
        if entry != INLINE:
            name, source = _source(entry)
            if sources.setdefault(name, source) != source:
                raise ConfigError(f"{VARIABLE}: {_shown(name)} stands there twice, with other folders.")
    return Settings(
        sources,
        INLINE in entries,
        rank=_positive(environment, f"{VARIABLE}_RANK", Settings.rank),
        most_characters=_positive(environment, f"{VARIABLE}_CHARACTERS", Settings.most_characters),
        rate=_positive(environment, f"{VARIABLE}_RATE", Settings.rate),
    )


def _source(entry: str) -> tuple[str, str]:
    """`NAME=FOLDER`, or the id of an adapter on the Hub, as (name, source)."""
    name, has_folder, folder = (part.strip() for part in entry.partition("="))
    if has_folder:
        if name == INLINE or name.startswith(PREFIX):
            raise ConfigError(
                f"{VARIABLE}: {_shown(entry)}: {INLINE!r} and {PREFIX!r} stand for adapters in the request."
            )
        if not name or not folder or not os.path.isdir(folder):  # pathlib's raises where a name is too long
            raise ConfigError(
                f"{VARIABLE}: {_shown(entry)} names no folder of this machine: NAME=FOLDER, or a Hub id."
            )
        return name, str(Path(folder).resolve())
    try:
        validate_repo_id(entry)
    except HFValidationError as error:
        raise ConfigError(
            f"{VARIABLE}: {_shown(entry)} is neither `{INLINE}`, nor NAME=FOLDER, nor a Hub id like 'user/name'."
        ) from error
    return entry, entry


def _positive(environment: Mapping[str, str], variable: str, default: int) -> int:
    value = environment.get(variable, str(default))
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise ConfigError(f"{variable}={value[:40]!r}: must be a positive integer of at most 9 digits.")
    return int(value)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
