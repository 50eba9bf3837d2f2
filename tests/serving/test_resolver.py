"""vllm/resolver.py: what an API server remembers, lets through and answers, with an engine that does as it is told."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from fastapi import HTTPException
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from benchmarks.vllm_server import EMBEDDED, ROOT
from peft_tinylora.inline import inline_adapter_of_folder
from peft_tinylora.served import skeleton
from peft_tinylora.vllm.resolver import MOST_LOADING, MOST_REMEMBERED, Adapters, Remembered, TinyLoraResolver
from peft_tinylora.vllm.settings import Settings


ADAPTER = ROOT / "model_cards/embedded_grpo"


class Engine:
    """Answers `tinylora_reason` with these reasons, one for each worker, and remembers what it was asked to load."""

    def __init__(self, *reasons: str | None, delay: float = 0.0) -> None:
        self.reasons, self.delay = list(reasons) or [None], delay
        self.loaded: list[LoRARequest] = []

    async def collective_rpc(self, method: str, args: tuple[str]) -> list[str | None]:
        assert method == "tinylora_reason" and args[0].startswith("tinylora:1.")
        await asyncio.sleep(self.delay)
        return self.reasons

    async def add_lora(self, request: LoRARequest) -> None:
        self.loaded.append(request)


@pytest.fixture(scope="module")
def text() -> Callable[[int], str]:
    """Texts of adapters that differ."""
    adapter = inline_adapter_of_folder(ADAPTER, skeleton(str(EMBEDDED)))
    return lambda number: adapter.with_vectors(adapter.v + 0.01 * number).text()


def models_with(engine: Engine) -> SimpleNamespace:
    return SimpleNamespace(
        lora_requests={},
        engine_client=engine,
        lora_id_counter=AtomicCounter(0),
        model_config=SimpleNamespace(model=str(EMBEDDED)),
    )


def adapters(sources: dict[str, str] | None = None, rate: int = 1000) -> Adapters:
    return Adapters(TinyLoraResolver(Settings(sources or {}, inline=True, rate=rate)))


def together(*waiting: Awaitable) -> list[LoRARequest | HTTPException]:
    async def gather() -> list:
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(gather())


def test_ids_are_small_enough_for_every_runner_of_vllm(text):
    """Its runner for GPUs keeps them as int32."""
    engine = Engine()
    models, own = models_with(engine), adapters({"math": str(ADAPTER)})
    found = together(*(own.get(models, name) for name in (text(0), text(1), "math")))
    ids = [request.lora_int_id for request in found]
    assert len(set(ids)) == 3 and all(0 < number < 2**31 for number in ids)
    assert len({request.lora_name for request in found}) == 3


def test_one_adapter_is_loaded_once_for_all_that_wait_for_it(text):
    engine = Engine(delay=0.05)
    models, own = models_with(engine), adapters()
    found = together(*(own.get(models, text(0)) for _ in range(50)))
    assert len(engine.loaded) == 1 and all(request is engine.loaded[0] for request in found)


def test_only_so_many_are_loaded_at_once(text):
    engine = Engine(delay=0.2)
    models, own = models_with(engine), adapters()
    found = together(*(own.get(models, text(number)) for number in range(20)))
    refused = [error for error in found if isinstance(error, HTTPException)]
    assert len(engine.loaded) <= MOST_LOADING and len(refused) == 20 - len(engine.loaded) > 0
    assert {error.status_code for error in refused} == {429}
    assert isinstance(together(own.get(models, text(19)))[0], LoRARequest)  # and later there is room again


def test_what_is_no_adapter_takes_nothing_of_the_rate(text):
    engine = Engine()
    models, own = models_with(engine), adapters(rate=2)

    async def run() -> None:
        for _ in range(10):
            with pytest.raises(HTTPException) as refused:
                await own.get(models, "tinylora:x")
            assert refused.value.status_code == 400
        for number in range(2):
            await own.get(models, text(number))
        with pytest.raises(HTTPException) as refused:
            await own.get(models, text(2))
        assert refused.value.status_code == 429

    asyncio.run(run())
    assert len(engine.loaded) == 2


@pytest.mark.parametrize(
    "reasons, status, sentence",
    [
        (["of another base"], 400, "of another base"),
        ([None, "left out in the second worker"], 400, "left out in the second worker"),
        ([""], 503, "the server's log says why"),
    ],
)
def test_a_reason_against_an_adapter_is_told_and_it_is_not_loaded(text, reasons, status, sentence):
    engine = Engine(*reasons)
    models = models_with(engine)
    [refused] = together(adapters().get(models, text(0)))
    assert refused.status_code == status and sentence in refused.detail
    assert not engine.loaded and not models.lora_requests


def test_a_client_that_leaves_does_not_take_the_adapter_from_others(text):
    engine = Engine(delay=0.1)
    models, own = models_with(engine), adapters()

    async def run() -> LoRARequest:
        first = asyncio.create_task(own.get(models, text(0)))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(own.get(models, text(0)))
        first.cancel()
        return await second

    assert asyncio.run(run()) is engine.loaded[0]


def test_what_is_wrong_with_an_adapter_of_the_owner_is_not_for_strangers(tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    [refused] = together(adapters({"math": str(folder)}).get(models_with(Engine()), "math"))
    assert refused.status_code == 503 and "secret" not in refused.detail


def test_a_bounded_number_is_remembered_and_none_is_listed():
    remembered = Remembered({"math": LoRARequest("math", 1, "tinylora:1.AA")})
    for number in range(MOST_REMEMBERED):
        remembered.remember(f"tinylora:{number}", LoRARequest(f"{number}", number + 2, "tinylora:1.AA"))
    assert "tinylora:0" in remembered  # asked for again, and so no longer the first to go
    remembered.remember("tinylora:new", LoRARequest("new", 9999, "tinylora:1.AA"))
    assert len(remembered) == MOST_REMEMBERED + 1 and "math" in remembered
    assert "tinylora:0" in remembered and "tinylora:1" not in remembered
    assert [request.lora_name for request in remembered.values()] == ["math"]
