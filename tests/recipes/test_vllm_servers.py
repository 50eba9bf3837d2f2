"""vllm_servers.py: the real client and real sockets, against servers on loopback that answer as vLLM 0.32 does, or fail."""

import errno
import itertools
import json
import logging
import math
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_recipes import vllm_servers
from trl_recipes.arguments import RecipeError
from trl_recipes.vllm_servers import Completion, Prompt, VllmServers, split_urls


MODEL = "tinylora:" + "A" * 200 + ":end"
HANG = 20.0  # seconds, which no test lasts


class FakeServer:
    """A completions server: the i-th completion of a prompt is the prompt again and then the token i.

    Args:
        delay (`float`): seconds before each answer.
        faults (`list`): what befalls the next requests, one each: a status with a sentence, seconds in place of the
            delay, "kill", a function that makes another answer of the right one, or None.
        port (`int`): 0 for any that is free.
    """

    def __init__(self, delay: float = 0.0, faults: list | None = None, port: int = 0) -> None:
        self.delay = delay
        self.faults = faults or []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []  # when each request came
        self.most_at_once = self.at_once = 0
        self.killed = threading.Event()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Resets the connections of the requests that are being answered, and refuses new ones."""
        self.killed.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte, after which a connection is closed: no thread waits for ever
    disable_nagle_algorithm = True  # a header and a body are two writes, and the second would wait for 40 ms
    fake: FakeServer

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that went away
            super().handle()

    def do_POST(self) -> None:
        """Answers a completion request, or does what the test wants instead."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.fake.lock:
            self.fake.bodies.append(body)
            self.fake.times.append(time.monotonic())
            self.fake.keys.append(self.headers["Authorization"])
            fault = self.fake.faults.pop(0) if self.fake.faults else None
            self.fake.at_once += 1
            self.fake.most_at_once = max(self.fake.at_once, self.fake.most_at_once)
        if fault == "kill":
            self.fake.kill()
        killed = self.fake.killed.wait(fault if isinstance(fault, float) else self.fake.delay)
        with self.fake.lock:
            self.fake.at_once -= 1
        if killed:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close: a reset
            self.close_connection = True
        elif self.path != "/v1/completions":
            self._send(404, error_body(404, "Not Found"))
        elif isinstance(fault, tuple):
            self._send(fault[0], error_body(*fault))
        else:
            self._send(200, fault(answer_to(body)) if callable(fault) else answer_to(body))

    def do_GET(self) -> None:
        """The list of models: the base, and then the adapters."""
        models = [{"id": name, "object": "model", "created": 1, "owned_by": "vllm"} for name in ("a/base", MODEL)]
        self._send(200, {"object": "list", "data": models})

    def _send(self, status: int, answer: dict | bytes) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def error_body(status: int, sentence: str) -> dict:
    return {"error": {"message": sentence, "type": "BadRequestError", "param": None, "code": status}}


def answer_to(body: dict) -> dict:
    """What vLLM 0.32 sends. Fields without a value are null, the lists of a choice are as long as its tokens."""
    choices = []
    for index in range(body["n"]):
        token_ids = [*body["prompt"], index]
        logprobs = {
            "text_offset": [0] * len(token_ids),
            "token_logprobs": [-0.25 - index] * len(token_ids),
            "tokens": ["x"] * len(token_ids),
            "top_logprobs": [{"x": -0.25 - index}] * len(token_ids),
        }
        choice = {"index": index, "text": "x" * len(token_ids), "finish_reason": "stop", "stop_reason": None}
        choice["logprobs"] = logprobs if body.get("logprobs") is not None else None
        choice["token_ids"] = token_ids if body.get("return_token_ids") else None
        choices.append(choice | {"prompt_logprobs": None, "prompt_token_ids": body["prompt"]})
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
    return answer | {"choices": choices, "usage": usage}


def expected(prompts: list[Prompt]) -> list[list[Completion]]:
    """What [`FakeServer`] answers to each."""
    return [[Completion([*p.token_ids, i], [-0.25 - i] * (len(p.token_ids) + 1)) for i in range(p.n)] for p in prompts]


def make_prompts(count: int, n: int = 1) -> list[Prompt]:
    """Prompts that differ in length, and in their tokens: prompt i has only i."""
    return [Prompt([i] * (1 + i % 3), n) for i in range(count)]


def sent_to(server: FakeServer) -> list[int]:
    """Which of [`make_prompts`]'s a server was sent, in the order they came."""
    return [body["prompt"][0] for body in server.bodies]


def threads_left(seconds: float = 2.0) -> list[threading.Thread]:
    """The client's threads that are alive still after some time, if any."""
    end = time.monotonic() + seconds
    while left := [thread for thread in threading.enumerate() if thread.name.startswith("request to")]:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return left


@pytest.fixture
def start() -> Iterator[Callable[..., FakeServer]]:
    """Starts a [`FakeServer`], which is killed after the test."""
    servers = []

    def start(*args, **kwargs) -> FakeServer:
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        if not server.killed.is_set():
            server.kill()
    assert not threads_left()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(vllm_servers, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(vllm_servers, "LONGEST_PAUSE_SECONDS", 0.4)
    monkeypatch.setattr(vllm_servers, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(vllm_servers, "LATE_SECONDS", 0.3)


@pytest.fixture
def log(caplog) -> Callable[[], list[tuple[str, str]]]:
    """What the module has logged so far: (level, message)."""
    caplog.set_level(logging.INFO, logger=vllm_servers.__name__)
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == vllm_servers.__name__]


def refused_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_all_prompts_come_back_in_order_and_a_fast_server_does_more(start, log):
    fast, slow = start(delay=0.01), start(delay=0.15)
    servers = VllmServers([slow.url, fast.url], slots=2)
    prompts = make_prompts(40, n=3)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert sum(servers.served.values()) == 40
    assert servers.served[fast.url] > 2 * servers.served[slow.url] > 0
    assert (fast.most_at_once, slow.most_at_once) == (2, 2)
    assert log() == []


def test_few_prompts_are_spread_over_the_servers(start):
    servers = [start(delay=0.1), start(delay=0.1)]
    VllmServers([server.url for server in servers]).generate(MODEL, make_prompts(8), max_tokens=8)
    assert [len(server.bodies) for server in servers] == [4, 4]


def test_choices_are_taken_by_their_index(start):
    server = start(faults=[lambda answer: answer | {"choices": answer["choices"][::-1]}])
    prompts = make_prompts(1, n=3)
    assert VllmServers([server.url]).generate(MODEL, prompts, max_tokens=8) == expected(prompts)


def test_the_request_holds_what_was_asked_for(start, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    server = start()
    sampling = {"seed": 11, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    prompts = [Prompt([5, 6, 7], 4), Prompt([8], 1)]
    VllmServers([server.url]).generate(MODEL, prompts, max_tokens=64, **sampling)
    common = {"model": MODEL, "max_tokens": 64, "logprobs": 0, "return_token_ids": True, **sampling}
    assert sorted(server.bodies, key=lambda body: body["prompt"]) == [
        {**common, "prompt": [5, 6, 7], "n": 4},
        {**common, "prompt": [8], "n": 1},
    ]
    assert server.keys == ["Bearer a-key"] * 2


def test_no_prompts_need_no_server():
    assert VllmServers(["http://127.0.0.1:1"]).generate(MODEL, [], max_tokens=8) == []


def test_two_calls_one_after_the_other(start):
    servers = VllmServers([start().url, start().url])
    for count in (5, 7):
        prompts = make_prompts(count)
        assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert sum(servers.served.values()) == 12


def test_no_thread_is_left_after_a_batch(start):
    VllmServers([start().url]).generate(MODEL, make_prompts(20), max_tokens=8)
    assert threads_left() == []


def test_a_server_killed_amid_a_batch_loses_nothing(start, log):
    killed, other = start(delay=0.05, faults=[None] * 6 + ["kill"]), start(delay=0.05)
    servers = VllmServers([killed.url, other.url], slots=4)
    prompts = make_prompts(60)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert 0 < servers.served[killed.url] <= 6
    [(level, message)] = log()  # not one for each of its requests
    assert level == "WARNING"
    assert message.startswith(f"{killed.url} is put aside: no connection (")
    assert message.endswith("Its prompts go back to the queue; it is tried again in 0.1 s, then ever more rarely.")


def test_a_server_that_comes_up_again_is_used_again(start, log):
    other, port = start(delay=0.05), refused_port()
    url = f"http://127.0.0.1:{port}"
    threading.Timer(0.3, start, kwargs={"delay": 0.01, "port": port}).start()
    servers = VllmServers([url, other.url], slots=2)
    prompts = make_prompts(80)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert servers.served[url] > 10
    assert [level for level, _ in log()] == ["WARNING", "INFO"]
    assert log()[1][1] == f"{url} is back."


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_status_that_does_not_blame_the_request_is_tried_again(start, log, status):
    server = start(faults=[(status, "Not now.")] * 3)
    servers = VllmServers([server.url], slots=2)
    prompts = make_prompts(6)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert len(server.bodies) == 9
    assert [level for level, _ in log()] == ["WARNING", "INFO"]
    assert f"is put aside: HTTP {status}: Not now." in log()[0][1]


def test_a_server_put_aside_gets_one_request_at_a_time_and_ever_more_rarely(start):
    failing, other = start(faults=[(500, "Broken.")] * 100), start(delay=0.05)
    VllmServers([failing.url, other.url], slots=2).generate(MODEL, make_prompts(40), max_tokens=8)
    probes = failing.times[2:]  # two came before it was put aside, and the first of these 0.1 s later
    gaps = [after - before for before, after in itertools.pairwise(probes)]
    assert len(gaps) >= 2
    assert all(gap > wanted for gap, wanted in zip(gaps, [0.2, 0.4, 0.4, 0.4], strict=False)), gaps


def test_a_server_put_aside_is_still_so_in_the_next_call(start, monkeypatch):
    monkeypatch.setattr(vllm_servers, "FIRST_PAUSE_SECONDS", 60.0)
    failing, other = start(faults=[(500, "Broken.")]), start()
    servers = VllmServers([failing.url, other.url])
    for _ in range(2):
        servers.generate(MODEL, make_prompts(2), max_tokens=8)
    assert len(failing.bodies) == 1


def test_a_prompt_that_no_server_can_answer_does_not_hold_up_the_others(start):
    server = start(faults=[(500, "This prompt again.")] * 3)
    servers = VllmServers([server.url], slots=1)
    prompts = make_prompts(5)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert sent_to(server) == [0, 1, 2, 3, 4, 0, 1, 2]


def test_a_request_that_hangs_is_sent_to_another_server_too(start):
    hanging, other = start(delay=0.05, faults=[None, HANG]), start(delay=0.05)
    servers = VllmServers([hanging.url, other.url], request_timeout=15, slots=1)
    prompts = make_prompts(8)
    started = time.monotonic()
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert 0.3 < time.monotonic() - started < 5
    assert sent_to(other)[-1] == sent_to(hanging)[1]
    assert len(set(sent_to(other))) == len(other.bodies) == 7
    assert sum(servers.served.values()) == 8
    # Its only slot is still taken: the next batch is not sent into it.
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert len(hanging.bodies) == 2


def test_a_prompt_has_one_copy_which_goes_on_when_the_first_request_fails(start, monkeypatch):
    monkeypatch.setattr(vllm_servers, "FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(vllm_servers, "LATE_SECONDS", 0.6)
    hanging, other = start(faults=[HANG]), start(delay=0.02, faults=[None, None, 1.2])
    servers = VllmServers([other.url, hanging.url], request_timeout=1.5, slots=2)
    prompts = make_prompts(3)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert sent_to(hanging) == [1]
    assert sorted(sent_to(other)) == [0, 1, 2]


def test_a_copy_does_not_go_to_the_same_server(start):
    server = start(faults=[None, 0.6])
    VllmServers([server.url], slots=2).generate(MODEL, make_prompts(2), max_tokens=8)
    assert len(server.bodies) == 2


def test_slow_is_measured_by_the_batch(start, monkeypatch):
    monkeypatch.setattr(vllm_servers, "LATE_SECONDS", 0.0)
    slow, fast = start(delay=0.3), start(delay=0.15)
    VllmServers([slow.url, fast.url], slots=1).generate(MODEL, make_prompts(6), max_tokens=8)
    assert len(slow.bodies) + len(fast.bodies) == 6  # 0.3 s is less than 4 x 0.15 s


def test_a_timeout_puts_a_server_aside(start, log):
    hanging, other = start(faults=[HANG]), start(delay=0.05)
    prompts = make_prompts(20)
    servers = VllmServers([hanging.url, other.url], request_timeout=0.5, slots=1)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert f"{hanging.url} is put aside: no answer in time (ReadTimeout)." in log()[0][1]


def test_all_servers_down(start):
    urls = [f"http://127.0.0.1:{refused_port()}", start(faults=[(503, "Starting.")] * 100).url]
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        VllmServers(urls, patience=0.8).generate(MODEL, make_prompts(20), max_tokens=8)
    assert 0.8 <= time.monotonic() - started < 2
    assert re.sub("for [0-9]+ s", "for N s", str(caught.value)) == (
        f"no vLLM server has answered for N s: {urls[0]} (no connection ([Errno {errno.ECONNREFUSED}] "
        f"Connection refused)), {urls[1]} (HTTP 503: Starting.). Check the URLs and the servers' "
        "logs, and start the recipe again when one is up."
    )


def test_patience_starts_anew_with_each_answer(start):
    answer = [None, (500, "Broken."), (500, "Broken.")]  # pauses of 0.1 s and 0.2 s
    server = start(faults=answer * 5)
    prompts = make_prompts(5)
    servers = VllmServers([server.url], patience=1.0, slots=1)
    started = time.monotonic()
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert time.monotonic() - started > 1.0


def test_patience_is_not_for_a_server_that_is_slow(start):
    prompts = make_prompts(4)
    urls = [f"http://127.0.0.1:{refused_port()}", start(delay=0.6).url]
    assert VllmServers(urls, patience=0.2).generate(MODEL, prompts, max_tokens=8) == expected(prompts)


def test_a_refused_request_ends_the_call_at_once_and_the_next_one_works(start):
    refusing = start(faults=[(400, f"{MODEL} is for another base.\nIt has rank 2.")])
    slow = start(delay=1.0)
    servers = VllmServers([refusing.url, slow.url], slots=2)
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        servers.generate(MODEL, make_prompts(50), max_tokens=8)
    assert time.monotonic() - started < 1.0
    shortened = f"{MODEL[:40]}…{MODEL[-39:]}"
    assert str(caught.value) == (
        f"{refusing.url} refused a request (HTTP 400): {shortened} is for another base. It has rank 2."
    )
    assert threads_left() == []
    assert len(slow.bodies) <= 2
    slow.delay = 0.0
    prompts = make_prompts(6)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)


@pytest.mark.parametrize("status", [401, 404, 422])
def test_other_refusals(start, status):
    server = start(faults=[(status, "No.")])
    with pytest.raises(RecipeError, match=rf"{server.url} refused a request \(HTTP {status}\): No\.") as caught:
        VllmServers([server.url]).generate(MODEL, make_prompts(1), max_tokens=8)
    assert str(caught.value).endswith("Set VLLM_API_KEY to its key.") == (status == 401)


def test_answers_of_a_call_that_ended_are_not_taken_for_the_next(start):
    slow, refusing = start(delay=0.2), start(faults=[(400, "No.")])
    servers = VllmServers([slow.url, refusing.url])
    with pytest.raises(RecipeError):
        servers.generate(MODEL, [Prompt([1], 1), Prompt([2], 1)], max_tokens=8)
    refusing.delay = 0.5  # the answer that the first call did not wait for comes earlier
    prompts = [Prompt([3], 1), Prompt([4], 1)]
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert sum(servers.served.values()) == 2


def test_an_interrupted_call_sends_nothing_more(start):
    server = start(delay=0.2)
    servers = VllmServers([server.url], slots=2)
    interrupt = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        servers.generate(MODEL, make_prompts(50), max_tokens=8)
    assert all(thread.daemon for thread in threads_left(0))
    assert threads_left() == []
    assert len(server.bodies) <= 4
    prompts = make_prompts(3)
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)


def of_choice(**fields) -> Callable[[dict], dict]:
    """Makes an answer whose last choice has other fields."""
    return lambda answer: answer | {"choices": [*answer["choices"][:-1], answer["choices"][-1] | fields]}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda answer: answer | {"choices": answer["choices"][1:]}, "1 completions in the answer instead of 2"),
        (lambda answer: {"object": "list"}, "0 completions in the answer instead of 2"),
        (of_choice(token_ids=None), "no token_ids in the answer: vLLM 0.22 or newer is needed"),
        (of_choice(token_ids=[1, 2, 3]), "2 logprobs for 3 tokens in the answer"),
        (of_choice(logprobs=None), "no logprobs in the answer"),
        (of_choice(finish_reason="abort"), "it broke off a completion, as a server does that is stopped"),
        (lambda answer: json.dumps(answer).encode()[:-9], "the answer is not JSON"),
    ],
    ids=["few choices", "no choices", "no tokens", "lengths", "no logprobs", "aborted", "cut"],
)
def test_a_malformed_answer_is_a_failure_of_the_server(start, log, fault, reason):
    malformed, other = start(faults=[fault]), start()
    prompts = make_prompts(2, n=2)
    assert VllmServers([malformed.url, other.url]).generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert log()[0][1].startswith(f"{malformed.url} is put aside: {reason}.")


def test_an_answer_of_an_old_server_has_no_field_for_token_ids(start, log):
    def without_token_ids(answer: dict) -> dict:
        choices = [{k: v for k, v in choice.items() if k != "token_ids"} for choice in answer["choices"]]
        return answer | {"choices": choices}

    VllmServers([start(faults=[without_token_ids]).url]).generate(MODEL, make_prompts(1), max_tokens=8)
    assert "no token_ids in the answer: vLLM 0.22 or newer is needed" in log()[0][1]


def test_a_logprob_that_is_none_or_nan_is_passed_on(start, log):
    logprobs = {"token_logprobs": [None, float("nan")], "text_offset": [], "tokens": [], "top_logprobs": []}
    server = start(faults=[of_choice(logprobs=logprobs)])
    [[completion]] = VllmServers([server.url]).generate(MODEL, [Prompt([7], 1)], max_tokens=8)
    assert completion.token_ids == [7, 0]
    assert [math.isnan(value) for value in completion.logprobs] == [True, True]
    assert log() == []


def test_the_answer_must_name_the_expected_model(start):
    server = start()
    servers = VllmServers([server.url])
    prompts = make_prompts(2)
    assert servers.generate(MODEL, prompts, max_tokens=8, expected_model=MODEL) == expected(prompts)
    other = MODEL.replace("end", "END")
    with pytest.raises(RecipeError) as caught:
        servers.generate(MODEL, prompts, max_tokens=8, expected_model=other)
    assert str(caught.value) == (
        f"{server.url} answered with another adapter: '{MODEL[:40]}…{MODEL[-39:]}' instead of "
        f"'{other[:40]}…{other[-39:]}'. Check that it reads adapters from the model field, and restart it."
    )


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_a_url_may_end_in_v1_and_slashes(start, ending):
    server = start()
    servers = VllmServers([server.url + ending])
    servers.generate(MODEL, make_prompts(1), max_tokens=8)
    assert servers.served == {server.url: 1}


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "no vLLM server: give the URL of at least one, http://localhost:8000 say."),
        (["localhost:8000"], "'localhost:8000' is not the URL of a vLLM server: write it as http://host:8000."),
        (["ftp://a:1"], "'ftp://a:1' is not the URL of a vLLM server: write it as http://host:8000."),
        (["http://"], "'http://' is not the URL of a vLLM server: write it as http://host:8000."),
        (["http://a:1", "http://a:1/v1/"], "'http://a:1/v1/' names a server a second time: give each server once."),
    ],
)
def test_urls_that_are_refused(urls, message):
    with pytest.raises(RecipeError) as caught:
        VllmServers(urls)
    assert str(caught.value) == message


def test_the_base_is_what_a_server_that_answers_calls_it(start):
    down = f"http://127.0.0.1:{refused_port()}"
    assert VllmServers([down, start().url]).base_model() == "a/base"
    with pytest.raises(RecipeError, match=rf"no vLLM server says which model it has: {down} \(Connection error\.\)"):
        VllmServers([down]).base_model()


def test_urls_of_an_option():
    assert split_urls("http://a:1, http://b:2/v1,") == ["http://a:1", "http://b:2/v1"]
    assert split_urls("") == []


def test_progress_counts_prompts_and_is_off_by_default(start, capsys):
    servers = VllmServers([start().url])
    servers.generate(MODEL, make_prompts(3), max_tokens=8)
    assert capsys.readouterr().err == ""
    servers.generate(MODEL, make_prompts(3), max_tokens=8, progress="rollouts")
    bar = capsys.readouterr().err
    assert "rollouts:" in bar and "/3 [" in bar
