"""Where the model is: the text of an adapter -> its factors -> vLLM's own loader of LoRA.

The path of a `LoRARequest` is the text of an adapter. It is enough to load the adapter at any time, in any process on any
machine, so nothing is kept on disk, and nothing is missing, or another, when vLLM drops an adapter and needs it once more, in
the middle of a step. vLLM reads a LoRA from files: it is given them in memory, for that moment.

An error in one worker of several leaves vLLM's executor waiting for the others, and an error in the middle of a step ends the
engine. So an adapter is looked at first, by `tinylora_reason`, which raises nothing; what it has passed can be loaded.

None of these classes is public. There is no other place where factors can be put in: resolvers return paths.
"""

import functools
from collections.abc import Callable

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.v1.worker.worker_base import WorkerBase

from ..errors import AdapterFileError, TinyLoraError
from ..inline import PREFIX, parse_inline
from ..served import ServedBase
from .settings import Settings


logger = init_logger("vllm.peft_tinylora")

SERVER_FAULT = ""  # in the place of a reason: the adapter is not to blame


def load_tinylora(settings: Settings) -> None:
    """Teaches vLLM's workers to load TinyLoRA; once for a process."""
    if hasattr(WorkerBase, "tinylora_reason"):
        return
    for manager in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        manager.create_lora_manager = _with_base(manager.create_lora_manager, settings)
    WorkerLoRAManager._load_adapter = _with_tinylora(WorkerLoRAManager._load_adapter)
    WorkerBase.tinylora_reason = tinylora_reason


def tinylora_reason(self: WorkerBase, text: str) -> str | None:
    """Why this worker cannot serve an adapter, [`SERVER_FAULT`] if that is not the adapter's fault, or `None`."""
    try:
        manager, adapter = self.model_runner.lora_manager, parse_inline(text, len(text))
        manager.tinylora_base.lora(adapter)
        is_served = manager._adapter_manager._match_target_modules
        left_out = [name for name in manager.tinylora_base.group_of(adapter) if not is_served(name)]
        if left_out:  # vLLM would leave them out without a word
            raise AdapterFileError(
                f"The adapter adapts {left_out[0]!r} and {len(left_out) - 1} other modules that this server's "
                "--lora-target-modules leave out: ask its owner to add them."
            )
    except TinyLoraError as error:
        return str(error)
    except Exception:
        logger.exception("an adapter could not be looked at")
        return SERVER_FAULT
    return None


def _with_base(create_lora_manager: Callable, settings: Settings) -> Callable:
    @functools.wraps(create_lora_manager)
    def create_with_base(self: WorkerLoRAManager, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        # Now, and not with the first request, which the others would have to wait for.
        base = vllm_config.model_config
        self.tinylora_base = ServedBase(base.model, settings.rank, base.revision, base.trust_remote_code)
        return create_lora_manager(self, model, vllm_config)

    return create_with_base


def _with_tinylora(load_adapter: Callable) -> Callable:
    @functools.wraps(load_adapter)
    def load_with_tinylora(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        text = lora_request.lora_path
        if not text.startswith(PREFIX):
            return load_adapter(self, lora_request)
        with self.tinylora_base.lora_folder(parse_inline(text, len(text))) as folder:
            return load_adapter(self, LoRARequest(lora_request.lora_name, lora_request.lora_int_id, str(folder)))

    return load_with_tinylora
