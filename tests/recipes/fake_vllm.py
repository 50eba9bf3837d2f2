"""A server on loopback that answers completions as vLLM 0.32 does, or fails as it is told to."""

import json
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from trl_recipes.vllm_requests import Completion, Prompt


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
