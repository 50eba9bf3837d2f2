"""vLLM's plugin: adapters by name and in the request. On where PEFT_TINYLORA_VLLM is set; see settings.py.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. What it changes:

    resolver.py   in the API server: name or text -> what vLLM shall load; how many are remembered
    worker.py     where the model is: text -> factors -> vLLM's own loader of LoRA
"""

import logging
import os

from .settings import VARIABLE, read_settings


logger = logging.getLogger("vllm.peft_tinylora")  # below vLLM's own, so that it is shown as theirs are


def register() -> None:
    """Turns serving on, if the environment says so. May be called again.

    Raises:
        ConfigError: for a variable with a value that cannot be meant. The server then does not start.
        RuntimeError: for a vLLM that this was not written for.
    """
    settings = read_settings()
    if settings is None:
        return
    try:
        from .resolver import serve_names
        from .worker import load_tinylora
    except ImportError as error:
        raise RuntimeError(
            f"peft_tinylora serves with vLLM 0.32, and this one is another ({error}): install that, or unset {VARIABLE}."
        ) from error
    load_tinylora(settings)
    serve_names(settings)
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() not in ("1", "true"):
        logger.warning(
            "%s is set, and vLLM asks no plugin for adapters: set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 too.", VARIABLE
        )
