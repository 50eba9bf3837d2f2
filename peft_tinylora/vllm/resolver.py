"""In vLLM's API server: the `model` field of a request -> which adapter to load; refused with a sentence, or remembered.

Names come from the allow-list, so there are only so many. Inline adapters do not: their number, length and rate are
bounded here, because vLLM itself would remember the name of every adapter that it ever saw, list all of them for every
client under /v1/models, and keep a time series of its metrics for each.
"""

import asyncio
import functools
import time
from collections.abc import Iterator

from fastapi import HTTPException
from transformers import PreTrainedModel
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.v1.metrics.stats import LoRARequestStates, SchedulerStats

from ..errors import AdapterFileError, TinyLoraError
from ..inline import PREFIX, inline_adapter_of_folder, name_of, parse_inline
from ..served import skeleton
from .settings import Settings
from .worker import SERVER_FAULT


logger = init_logger("vllm.peft_tinylora")

MOST_REMEMBERED = 256  # inline adapters, so that those in use are not decoded and sent to the engine for each request
MOST_LOADING = 8  # at once: the engine generates nothing while it looks at one


class TinyLoraResolver(LoRAResolver):
    """Name or text -> what vLLM shall load, of which the path is always text.

    Args:
        settings ([`Settings`]): what the server serves.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._skeletons: dict[str, PreTrainedModel] = {}

    def knows(self, lora_name: str) -> bool:
        """Whether a name is on the allow-list or looks like an inline adapter."""
        return lora_name in self.settings.sources or lora_name.startswith(PREFIX)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See [`LoRAResolver`]. vLLM gives the request an id of its own counter.

        Raises:
            TinyLoraError: if the adapter cannot be had; says why and what to do.
        """
        if lora_name in self.settings.sources:
            text = await asyncio.to_thread(self._read, self.settings.sources[lora_name], base_model_name)
            return LoRARequest(lora_name, 1, text)
        if lora_name.startswith(PREFIX):
            if not self.settings.inline:
                raise AdapterFileError(
                    "This server takes no adapters in the request: ask its owner to add `inline` to PEFT_TINYLORA_VLLM, or "
                    f"use one of its own: {', '.join(self.settings.sources)}."
                )
            parse_inline(lora_name, self.settings.most_characters)
            return LoRARequest(name_of(lora_name), 1, lora_name)
        return None

    def _read(self, source: str, base_model_name: str) -> str:
        if base_model_name not in self._skeletons:
            self._skeletons[base_model_name] = skeleton(base_model_name)
        return inline_adapter_of_folder(source, self._skeletons[base_model_name]).text()


class Remembered(dict[str, LoRARequest]):
    """vLLM's `lora_requests`, which it asks whether a name is loaded, with so many inline adapters and none of them listed.

    vLLM looks a name up once to check the request and once more to run it, and lists the values for every client.
    """

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        # To the end: the first is the one that was not asked for longest.
        if found and isinstance(name, str) and name.startswith(PREFIX):
            self[name] = self.pop(name)
        return found

    def remember(self, name: str, request: LoRARequest) -> None:
        """Adds one, and drops the inline one that was not used for longest where there are too many."""
        self[name] = request
        inline = [other for other in self if other.startswith(PREFIX)]
        if len(inline) > MOST_REMEMBERED:
            del self[inline[0]]

    def values(self) -> Iterator[LoRARequest]:  # type: ignore[override]  # vLLM goes through them, no more
        return iter([request for name, request in self.items() if not name.startswith(PREFIX)])


class Adapters:
    """What one API server has asked its engine to load.

    Args:
        resolver ([`TinyLoraResolver`]): where adapters come from.
    """

    def __init__(self, resolver: TinyLoraResolver) -> None:
        self._resolver = resolver
        self._loading: dict[str, asyncio.Task[LoRARequest]] = {}
        self._allowance, self._counted = float(resolver.settings.rate), time.monotonic()

    async def get(self, models: OpenAIServingModels, name: str) -> LoRARequest:
        """The adapter of a name, loaded and remembered.

        Raises:
            HTTPException: with the status and a sentence, if it cannot be served.
        """
        if not isinstance(models.lora_requests, Remembered):
            models.lora_requests = Remembered(models.lora_requests)
        if name in models.lora_requests:
            return models.lora_requests[name]
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(models, name))
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        # One client that leaves must not take the adapter away from others that wait for it.
        return await asyncio.shield(task)

    def _count_new(self) -> None:
        """Raises [`HTTPException`] where there are too many new inline adapters."""
        now, rate = time.monotonic(), self._resolver.settings.rate
        self._allowance = min(float(rate), self._allowance + (now - self._counted) * rate)
        self._counted = now
        if self._allowance < 1 or len(self._loading) > MOST_LOADING:
            raise HTTPException(
                429,
                f"More than {rate} new inline adapters a second, or {MOST_LOADING} at once: try again in a second, or use "
                "fewer adapters.",
            )
        self._allowance -= 1

    async def _load(self, models: OpenAIServingModels, name: str) -> LoRARequest:
        try:
            request = await self._resolver.resolve_lora(models.model_config.model, name)
        except TinyLoraError as error:
            if name.startswith(PREFIX):
                raise HTTPException(400, str(error)) from error
            # What is wrong with an adapter of the owner's is not for strangers.
            logger.error("%s cannot be served: %s", name, error)
            raise HTTPException(
                503, f"The adapter {name[:100]!r} cannot be served now: its owner's log says why."
            ) from error
        assert request is not None  # or [`TinyLoraResolver.knows`] would not have said so
        if name.startswith(PREFIX):
            self._count_new()  # not what is no adapter, which costs nothing and would use up what is allowed
        reasons = await models.engine_client.collective_rpc("tinylora_reason", args=(request.lora_path,))
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason == SERVER_FAULT:
            raise HTTPException(503, "The adapter could not be loaded: the server's log says why.")
        if reason is not None:
            logger.warning("refused %s: %s", request.lora_name, reason)
            raise HTTPException(400, reason)
        request.lora_int_id = models.lora_id_counter.inc(1)
        await models.engine_client.add_lora(request)  # what it raises becomes status 500, as of a dead engine
        models.lora_requests.remember(name, request)
        return request


def serve_names(settings: Settings) -> None:
    """Registers the resolver, and bounds what vLLM's API server remembers of it; once for a process."""
    if LoRAResolverRegistry.resolvers.get("tinylora") is not None:
        return
    resolver = TinyLoraResolver(settings)
    LoRAResolverRegistry.register_resolver("tinylora", resolver)
    adapters = Adapters(resolver)
    stock_resolve, stock_stats = OpenAIServingModels.resolve_lora, LoRARequestStates.update_scheduler_stats

    @functools.wraps(stock_resolve)
    async def resolve_lora(self: OpenAIServingModels, lora_name: str) -> LoRARequest | ErrorResponse:
        if resolver.knows(lora_name):
            return await adapters.get(self, lora_name)
        answer = await stock_resolve(self, lora_name)
        if not isinstance(answer, LoRARequest):
            self.lora_resolver_lock.pop(lora_name, None)  # one for each wrong name that was ever sent
            if set(LoRAResolverRegistry.get_supported_resolvers()) == {"tinylora"}:
                raise HTTPException(404, _unknown(self, lora_name, settings))
        return answer

    @functools.wraps(stock_stats)
    def update_scheduler_stats(self: LoRARequestStates, scheduler_stats: SchedulerStats | None) -> None:
        stock_stats(self, scheduler_stats)
        if scheduler_stats is not None:
            for counts in (scheduler_stats.waiting_lora_adapters, scheduler_stats.running_lora_adapters):
                inline = [name for name in counts if name.startswith(PREFIX)]
                if inline:
                    counts[f"{PREFIX}inline"] = sum(counts.pop(name) for name in inline)

    OpenAIServingModels.resolve_lora = resolve_lora
    LoRARequestStates.update_scheduler_stats = update_scheduler_stats


def _unknown(models: OpenAIServingModels, name: str, settings: Settings) -> str:
    loaded = [request.lora_name for request in models.lora_requests.values()]
    served = [path.name for path in models.base_model_paths] + loaded + list(settings.sources)
    also = ", and adapters in the request" if settings.inline else ""
    return f"This server has no model and no adapter {name[:100]!r}. It has {', '.join(dict.fromkeys(served))}{also}."
