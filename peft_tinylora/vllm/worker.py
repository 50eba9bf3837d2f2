"""Where the model is: the path of a TinyLoRA -> its factors -> vLLM's own loader of LoRA.

The path of a `LoRARequest` may be the text of an inline adapter, or the folder of a compact one. It is enough to load the
adapter again at any time, in any process on any machine, so nothing is kept on disk, and nothing is missing when vLLM
drops an adapter and needs it once more. vLLM reads a LoRA from files: it is given them in memory, for that moment.

`WorkerLoRAManager` is not public. There is no other place where the factors can be put in: resolvers return paths.
"""

import functools
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

from ..adapter_files import CONFIG_FILE, read_fields
from ..inline import PREFIX, InlineAdapter, inline_adapter_of_folder, parse_inline
from ..served import ServedBase
from .settings import Settings


def load_tinylora(settings: Settings) -> None:
    """Teaches vLLM's LoRA managers to load TinyLoRA; once for a process."""
    if hasattr(WorkerLoRAManager, "tinylora_settings"):
        return
    WorkerLoRAManager.tinylora_settings = settings
    for manager in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        manager.create_lora_manager = _with_base(manager.create_lora_manager)
    WorkerLoRAManager._load_adapter = _with_tinylora(WorkerLoRAManager._load_adapter)


def _with_base(create_lora_manager):
    @functools.wraps(create_lora_manager)
    def create_with_base(self: WorkerLoRAManager, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        # Now, and not with the first request, which the others would have to wait for.
        base = vllm_config.model_config
        self.tinylora_base = ServedBase(base.model, self.tinylora_settings.rank, base.revision, base.trust_remote_code)
        return create_lora_manager(self, model, vllm_config)

    return create_with_base


def _with_tinylora(load_adapter):
    @functools.wraps(load_adapter)
    def load_with_tinylora(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        adapter = _read(lora_request.lora_path, self.tinylora_base, self.tinylora_settings)
        if adapter is None:
            return load_adapter(self, lora_request)
        with self.tinylora_base.lora_folder(adapter) as folder:
            return load_adapter(self, LoRARequest(lora_request.lora_name, lora_request.lora_int_id, str(folder)))

    return load_with_tinylora


def _read(path: str, base: ServedBase, settings: Settings) -> InlineAdapter | None:
    """The adapter of a path; `None` for one that is no TinyLoRA's."""
    if path.startswith(PREFIX):
        return parse_inline(path, settings.most_characters)
    config = Path(path, CONFIG_FILE)
    if config.is_file() and read_fields(config).get("peft_type") == "TINYLORA":
        return inline_adapter_of_folder(path, base.model)
    return None
