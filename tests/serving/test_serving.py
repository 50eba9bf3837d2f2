"""What a real vLLM server answers with an adapter in the request, of a folder, of the Hub, and exported as a LoRA."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from recipes.runs import ROOT

from benchmarks.vllm_server import EMBEDDED, START_SECONDS, Server


pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tinylora.inline import InlineAdapter, inline_adapter_of_folder, name_of
from peft_tinylora.served import skeleton
from trl_recipes.vllm_requests import Prompt
from trl_recipes.vllm_servers import VllmServers


ADAPTER = ROOT / "model_cards/embedded_grpo"
PROBLEMS = 256
TIE = 1e-3  # of two logits, in nats: fp32 sums in another order differ by about 1e-5


@pytest.fixture(scope="module")
def adapter() -> InlineAdapter:
    return inline_adapter_of_folder(ADAPTER, skeleton(str(EMBEDDED)))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Held-out problems as token ids."""
    lines = (ROOT / "trl_recipes/embedded/data/held_out.jsonl").read_text().splitlines()[:PROBLEMS]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]


@pytest.fixture(scope="module")
def with_transformers() -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), ADAPTER).eval()


def greedy_on(server: Server, model: str, prompts: list[list[int]]) -> list[list[int]]:
    answers = VllmServers([server.url]).generate(
        model,
        [Prompt(ids, 1) for ids in prompts],
        max_tokens=40,
        expected_model=name_of(model) if model.startswith("tinylora:") else model,
        temperature=0.0,
    )
    return [answer[0].token_ids for answer in answers]


@torch.no_grad()
def differences(model: torch.nn.Module, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """For each answer that is not the model's own greedy one, how far the first other token is from the likeliest, in nats."""
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        below = logits.max(dim=-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        other = (below > 0).nonzero()
        if len(other):
            gaps.append(below[other[0, 0]].item())
        else:
            assert len(answer) == 40 or answer[-1] == model.generation_config.eos_token_id
    return gaps


@pytest.mark.parametrize("way", ["inline", "folder", "user/adapter", "exported"])
def test_greedy_answers_are_those_of_transformers(way, server, adapter, prompts, with_transformers):
    answers = greedy_on(server, adapter.text() if way == "inline" else way, prompts)
    gaps = differences(with_transformers, prompts, answers)
    print(f"{way}: {len(prompts) - len(gaps)} of {len(prompts)} answers are equal, the others by a tie of {gaps}")
    assert len(prompts) >= 200
    assert all(gap < TIE for gap in gaps)
    # The control: the adapter matters, so that equal answers say something.
    with with_transformers.disable_adapter():
        assert len(differences(with_transformers, prompts[:64], answers[:64])) > 32


def test_a_zero_adapter_answers_as_the_base_does(server, adapter, prompts, with_transformers):
    zero = adapter.with_vectors(torch.zeros_like(adapter.v)).text()
    with with_transformers.disable_adapter():
        for name in (zero, server.name):
            assert all(gap < TIE for gap in differences(with_transformers, prompts, greedy_on(server, name, prompts)))


def test_a_thousand_adapters_leave_nothing_behind(server, adapter):
    def serve(number: int) -> None:
        v = adapter.v + 0.001 * torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(number))
        status, answer = server.complete(adapter.with_vectors(v).text(), max_tokens=2)
        assert status == 200, answer

    for number in range(300):  # more than are remembered, so that what is kept for them is there
        serve(number)
    series = server.get("/metrics").count("\n")
    memory, folders = [server.memory_mb()], on_disk()
    for number in range(300, 1300):
        serve(number)
        if number % 250 == 49:
            memory.append(server.memory_mb())
    print(f"memory in MB before and after each 250 of 1,000 adapters: {[round(mb) for mb in memory]}")
    assert on_disk() <= folders
    assert memory[-1] - memory[1] < 20  # 750 adapters; the factors of one are 0.2 MB, its text 1 kB
    assert server.get("/metrics").count("\n") <= series + 20
    listed = [card["id"] for card in json.loads(server.get("/v1/models"))["data"]]
    assert not [name for name in listed if name.startswith("tinylora:")]


def on_disk() -> set[str]:
    return {path.name for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("peft_tinylora-*")}


def test_all_clients_of_one_new_adapter_get_it(server, adapter):
    text = adapter.with_vectors(adapter.v * 0.5).text()
    answers = VllmServers([server.url], slots=32).generate(
        text, [Prompt([5, 6, 7], 1)] * 64, max_tokens=4, expected_model=name_of(text), temperature=0.0
    )
    assert len({tuple(answer[0].token_ids) for answer in answers}) == 1


def test_adapters_are_mixed_in_one_batch(server, adapter, prompts):
    texts = [adapter.with_vectors(adapter.v * scale).text() for scale in (0.0, 0.5, 1.0, 2.0, -1.0, 3.0)]
    alone = [greedy_on(server, text, prompts[:16]) for text in texts]
    assert len({str(answers) for answers in alone}) > 3  # two may come to the same answers
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: greedy_on(server, text, prompts[:16]), texts))
    assert together == alone


def test_chat_takes_an_adapter_too(server, adapter, prompts):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    problem = tokenizer.decode(prompts[0], skip_special_tokens=True)
    status, answer = server.post(
        "/v1/chat/completions",
        model=adapter.text(),
        messages=[{"role": "user", "content": problem}],
        max_tokens=40,
        temperature=0,
    )
    assert status == 200, answer
    [expected] = greedy_on(server, adapter.text(), prompts[:1])
    said = answer["choices"][0]["message"]["content"]
    assert said.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_an_adapter_by_name_outlives_its_folder_and_its_place_in_the_engine(start, adapter, tmp_path):
    """vLLM loads it again in the middle of a step, where an error would end the engine."""
    folder = shutil.copytree(ADAPTER, tmp_path / "adapter")
    server = start("--max-loras", "1", "--max-cpu-loras", "1", PEFT_TINYLORA_VLLM=f"inline,math={folder}").wait()
    first = server.complete("math")[1]["choices"][0]["text"]
    shutil.rmtree(folder)
    for number in range(3):
        assert server.complete(adapter.with_vectors(adapter.v * number).text())[0] == 200
        status, answer = server.complete("math")
        assert status == 200 and answer["choices"][0]["text"] == first
    server.kill()


def test_modules_that_the_server_leaves_out_are_not_left_out_silently(start, adapter):
    server = start("--lora-target-modules", "q_proj", "v_proj").wait()
    status, answer = server.complete(adapter.text())
    assert status == 400 and "--lora-target-modules leave out" in answer["error"]["message"], answer
    server.kill()


def bad(adapter: InlineAdapter) -> dict[str, tuple[str, str]]:
    """Model field, and part of the sentence that refuses it."""
    text = adapter.text()
    rows = torch.cat([adapter.v, adapter.v])
    return {
        "no base64": ("tinylora:1.!!!", "no base64url"),
        "base64 of nothing": ("tinylora:1.", "too few"),
        "cut short": (text[:-8], "cut short"),
        "other version": (text.replace(":1.", ":2.", 1), "format version"),
        "too long": ("tinylora:1." + "A" * 70_000, "70011 characters"),
        "another base": (replace(adapter, sketches=adapter.sketches.roll(1, 0)).text(), "another base model"),
        "other modules": (replace(adapter, digest="00" * 8).text(), "other names"),
        "fewer modules": (
            replace(adapter, groups=adapter.groups[1:], sketches=adapter.sketches[1:]).text(),
            "48 linear",
        ),
        "another seed": (replace(adapter, projection_seed=1).text(), "projection"),
        "too many groups": (replace(adapter, v=rows).text(), "26 groups"),
        "too much u": (replace(adapter, v=torch.zeros(13, 900)).text(), "projection"),
        "another rank": (
            replace(adapter, r=3, sketches=torch.zeros(49, 7, dtype=torch.bfloat16)).text(),
            "PEFT_TINYLORA_VLLM_RANK=3",
        ),
        "not finite": (replace(adapter, v=adapter.v * torch.inf).text(), "NaN or Inf"),
        "too large": (replace(adapter, v=adapter.v.sign() * 3e38).text(), "not finite"),
        "a Hub id that is not allowed": ("stranger/adapter", "has no model and no adapter 'stranger/adapter'"),
        "a path": ("/etc", "has no model"),
        "a path in the text": ("tinylora:1.../../etc/passwd", "base64url"),
        "not ASCII": ("tinylora:1.ä", "base64url"),
    }


@pytest.mark.parametrize(
    "case",
    list(bad(InlineAdapter(2, "left", True, 0, "00" * 8, (0,), torch.zeros(1, 5).bfloat16(), torch.zeros(1, 1)))),
)
def test_what_cannot_be_served_is_refused_and_the_server_goes_on(case, server, adapter):
    name, sentence = bad(adapter)[case]
    status, answer = server.complete(name)
    assert 400 <= status < 500, answer
    assert sentence in answer["error"]["message"], answer
    assert "Traceback" not in str(answer) and "Worker" not in str(answer)
    assert server.complete(adapter.text())[0] == 200


def engine_of(server: Server) -> int:
    """The process that holds the model; the one that answers HTTP started it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    [engine] = [child for child in children if "EngineCore" in "".join(child.cmdline())]
    return engine.pid


@pytest.mark.parametrize("lost", ["server and engine", "engine", "server, told to stop"])
def test_a_server_that_is_lost_amid_requests_and_started_again_gives_every_answer(
    lost, start, adapter, prompts, with_transformers, record_property
):
    seed = random.SystemRandom().randrange(2**32)
    after = random.Random(seed).randint(1, PROBLEMS * 3 // 4)
    print(f"lost after {after} answers (seed {seed})")
    first = start().wait()
    client = VllmServers([first.url], patience=START_SECONDS)
    text = adapter.text()
    requests = [Prompt(ids, 1) for ids in prompts]
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(
            client.generate, text, requests, max_tokens=40, expected_model=name_of(text), temperature=0.0
        )
        while client.served[first.url] < after:
            time.sleep(0.002)
        if lost == "engine":
            os.kill(engine_of(first), signal.SIGKILL)
            first.process.wait(60)  # no server stays that cannot answer
        elif lost == "server, told to stop":
            first.process.terminate()
            with suppress(subprocess.TimeoutExpired):  # vLLM waits for its clients without end, until it is killed
                first.process.wait(10)
        first.kill()
        assert not answers.done()
        again = start(port=first.port).wait()
        got = [answer[0].token_ids for answer in answers.result(START_SECONDS)]
    assert all(gap < TIE for gap in differences(with_transformers, prompts, got))
    again.kill()
    record_property("faults survived", 1)


def test_more_new_adapters_than_allowed_have_to_wait(start, adapter):
    strict = start(PEFT_TINYLORA_VLLM_RATE="2", PEFT_TINYLORA_VLLM="inline").wait()
    answers = [strict.complete(adapter.with_vectors(adapter.v * n).text(), max_tokens=1) for n in (1, 2, 3, 4, 5)]
    refused = [answer for status, answer in answers if status == 429]
    assert refused and "2 new inline adapters a second" in refused[0]["error"]["message"]
    assert strict.complete(adapter.text(), max_tokens=1)[0] == 200  # known already
    time.sleep(1)
    for _ in range(10):  # what is no adapter takes nothing of what is allowed
        assert strict.complete("tinylora:x")[0] == 400
    assert strict.complete(adapter.with_vectors(adapter.v * 9).text(), max_tokens=1)[0] == 200
    strict.kill()


def test_vllm_takes_the_commands_of_the_serving_page():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    page = (ROOT / "docs/serving.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"vllm serve BASE ([^\n]+)", page)
    assert len(commands) == 2
    for command in commands:
        options = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["--model", str(EMBEDDED), *shlex.split(command)]
        )
        assert options.enable_lora and options.max_lora_rank == 8


def test_without_the_variable_nothing_is_served(start, adapter):
    off = start(PEFT_TINYLORA_VLLM="").wait()
    assert off.complete(off.name)[0] == 200
    status, answer = off.complete(adapter.text())
    assert status == 404 and "does not exist" in answer["error"]["message"]
    assert "tinylora" not in re.sub("(?i)peft_tinylora_vllm|tinylora:1[^`]*", "", off.log.read_text())
    off.kill()


def test_only_names_of_the_list_are_served_where_inline_is_not_on_it(start, adapter):
    named = start(PEFT_TINYLORA_VLLM=f"math={ADAPTER}").wait()
    assert named.complete("math")[0] == 200
    status, answer = named.complete(adapter.text())
    assert status == 400 and "no adapters in the request" in answer["error"]["message"]
    assert "math" in json.loads(named.get("/v1/models"))["data"][1]["id"]
    named.kill()
