"""Prompts -> completions of vLLM's OpenAI-compatible servers, any number of them, on any machines.

Each request carries the whole adapter as text in its `model` field, so that the servers hold no state: a prompt may go to
any of them, and to another one if the first is lost. A request has a thread of its own, which sends it and reports how it
ended; all that is decided is decided in the thread that called `generate`, so that there is nothing to lock.
"""

import logging
import os
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from openai import OpenAI, OpenAIError, Timeout
from tqdm import tqdm

from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.vllm_requests import Completion, Prompt, ServerFailure, ask


logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0  # a machine that is gone does not refuse a connection: it says nothing
FIRST_PAUSE_SECONDS = 1.0  # before a server that failed is tried again; doubles each time
LONGEST_PAUSE_SECONDS = 30.0
LATE_SECONDS = 5.0  # a request that is out for less does not go to a second server
LATE_FACTOR = 4.0  # nor does one that is out for less than so many times the median of its batch
POLL_SECONDS = 0.1  # how long at most it goes unseen that a pause is over or a request is late


class VllmServers:
    """
    Servers that share the prompts of a batch. Each gets the next one when it has a slot free, so that a fast one does more.

    A server that fails is put aside: others take its prompts, and it is tried with a single one after 1 s, then after
    pauses that double up to 30 s. At the end of a batch a request that is long overdue goes to a second server as well.

    Args:
        base_urls (`Sequence[str]`):
            As `http://host:8000`, with or without `/v1`. All are sent the key in VLLM_API_KEY, where it is set.
        request_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds after which a request without an answer has failed.
        patience (`float`, *optional*, defaults to `600.0`):
            Seconds without an answer after which `generate` gives up if all servers are put aside. To outlast their restart
            it must be longer than the restart, a pause and a request together.
        slots (`int`, *optional*, defaults to `16`):
            Most requests that a server has at once.

    Attributes:
        served (`dict[str, int]`): answers used so far, by URL without `/v1`.

    Raises:
        RecipeError: if there is no URL, one twice, or one that is not HTTP.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        request_timeout: float = 600.0,
        patience: float = 600.0,
        slots: int = 16,
    ) -> None:
        timeout = Timeout(request_timeout, connect=min(CONNECT_SECONDS, request_timeout))
        key = os.environ.get("VLLM_API_KEY", "none")  # the client insists on one
        self._servers = [
            _Server(url, OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=timeout))
            for url in _normalized(base_urls)
        ]
        self._ended: queue.SimpleQueue[tuple[_Attempt, list[Completion] | Exception]] = queue.SimpleQueue()
        self.patience = patience
        self.slots = slots
        self.served = {server.url: 0 for server in self._servers}

    def generate(
        self,
        model: str,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        expected_model: str | None = None,
        progress: str | None = None,
        **sampling: object,
    ) -> list[list[Completion]]:
        """
        Lets the servers complete all prompts. One call at a time: a second one on the same object must wait.

        Requests that nobody waits for any more, after an error or when a second server was faster, keep their slot until
        they end, at the latest by `request_timeout`.

        Args:
            model (`str`):
                The adapter as text.
            prompts (`Sequence[Prompt]`):
                What to complete.
            max_tokens (`int`):
                Most tokens in a completion.
            expected_model (`str`, *optional*):
                What the answers must name as their model.
            progress (`str`, *optional*):
                Name of the progress bar; without it there is none.
            **sampling:
                Other fields of vLLM's completion request: temperature, top_p, top_k, min_p, repetition_penalty and so on.
                For what is left out a server takes what the base's generation_config.json says.

        Returns:
            `list[list[Completion]]`: for each prompt, in the order given, its n completions.

        Raises:
            RecipeError: if a server refuses a request or answers with another model, at once; if all fail for `patience`.
        """
        ask_server = partial(ask, model=model, max_tokens=max_tokens, expected_model=expected_model, sampling=sampling)
        batch = _Batch(prompts)
        with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:
            while batch.missing:
                while assignment := self._next_assignment(batch):
                    self._send(ask_server, batch, *assignment)
                with suppress(queue.Empty):
                    self._settle(batch, *self._ended.get(timeout=POLL_SECONDS))
                self._check_patience(batch)
                bar.update(len(prompts) - batch.missing - bar.n)
        return [batch.results[index] for index in range(len(prompts))]

    def base_model(self) -> str:
        """What the servers call their base model, for completions without an adapter.

        Raises:
            RecipeError: if none of them says so.
        """
        reasons = []
        for server in self._servers:
            try:
                name = server.client.models.list().data[0].id
                if isinstance(name, str):
                    return name
                reasons.append(f"{server.url} ({shown(name)} is no name)")
            except (OpenAIError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
                reasons.append(f"{server.url} ({in_one_line(error)})")
        raise RecipeError(f"no vLLM server says which model it has: {', '.join(reasons)}. Check the URLs.")

    def _next_assignment(self, batch: "_Batch") -> tuple["_Server", int] | None:
        """Returns the least busy server that can be sent something now, and the index of the prompt."""
        free = [server for server in self._servers if server.is_free(self.slots)]
        for server in sorted(free, key=lambda server: server.in_flight):
            index = batch.next_for(server)
            if index is not None:
                return server, index
        return None

    def _send(self, ask_server: Callable, batch: "_Batch", server: "_Server", index: int) -> None:
        """Sends a prompt in a thread, which ends with its request."""
        attempt = _Attempt(server, index, is_probe=server.is_aside)

        def work() -> None:
            try:
                outcome = ask_server(server.client, server.url, batch.prompts[index])
            except Exception as error:
                outcome = error
            self._ended.put((attempt, outcome))

        threading.Thread(target=work, name=f"request to {server.url}", daemon=True).start()
        batch.out.setdefault(index, []).append(attempt)
        server.in_flight += 1
        server.is_probed = attempt.is_probe

    def _settle(self, batch: "_Batch", attempt: "_Attempt", outcome: list[Completion] | Exception) -> None:
        """Takes note of how a request ended: for its server, and for its prompt where that still waits for it."""
        attempt.server.note(attempt, outcome)
        if attempt not in batch.out.get(attempt.index, ()):  # of an earlier call, or another server was faster
            return
        if isinstance(outcome, ServerFailure):
            batch.put_back(attempt)
        elif isinstance(outcome, Exception):
            raise outcome
        else:
            batch.finish(attempt, outcome)
            self.served[attempt.server.url] += 1

    def _check_patience(self, batch: "_Batch") -> None:
        """Raises [`RecipeError`] if all servers are put aside and the last answer is too long ago."""
        waited = time.monotonic() - batch.last_answer
        if waited < self.patience or not all(server.is_aside for server in self._servers):
            return
        reasons = ", ".join(f"{server.url} ({server.reason})" for server in self._servers)
        raise RecipeError(
            f"no vLLM server has answered for {waited:.0f} s: {reasons}. Check the URLs and the servers' logs, and start "
            "the recipe again when one is up."
        )


@dataclass
class _Server:
    """A server and what is known of it. One that is put aside has a `pause`, in seconds, after which it may be tried again:
    at `retry_at`, of the monotonic clock, unless it `is_probed` already. `reason` is its last failure.
    """

    url: str
    client: OpenAI
    in_flight: int = 0
    pause: float = 0.0
    retry_at: float = 0.0
    is_probed: bool = False
    reason: str = ""

    @property
    def is_aside(self) -> bool:
        return self.pause > 0

    def is_free(self, slots: int) -> bool:
        """Whether it may be sent a request now."""
        may_try = not self.is_aside or (not self.is_probed and time.monotonic() >= self.retry_at)
        return may_try and self.in_flight < slots

    def note(self, attempt: "_Attempt", outcome: list[Completion] | Exception) -> None:
        """Puts it aside or takes it back. While it is aside only the probe counts: the others were sent before."""
        self.in_flight -= 1
        failed = isinstance(outcome, ServerFailure)
        if attempt.is_probe:
            self.is_probed = False
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS) if failed else 0.0
            if not failed:
                logger.info("%s is back.", self.url)
        elif failed and not self.is_aside:
            self.pause = FIRST_PAUSE_SECONDS
            logger.warning(
                "%s is put aside: %s. Its prompts go back to the queue; it is tried again in %g s, then ever more rarely.",
                self.url,
                outcome,
                self.pause,
            )
        else:
            return
        self.retry_at = time.monotonic() + self.pause
        self.reason = str(outcome) if failed else ""


@dataclass(eq=False)
class _Attempt:
    """One request, for the prompt of an index. `started` is of the monotonic clock, in seconds."""

    server: _Server
    index: int
    is_probe: bool
    started: float = field(default_factory=time.monotonic)


class _Batch:
    """The prompts of one call, by index: those that wait, those that are out, and what came back."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.results: dict[int, list[Completion]] = {}
        self.missing = len(prompts)
        self.waiting = deque(range(len(prompts)))
        self.out: dict[int, list[_Attempt]] = {}
        self.durations: list[float] = []  # seconds
        self.last_answer = time.monotonic()

    def next_for(self, server: _Server) -> int | None:
        """Takes a prompt for a server: the next that waits, or else the one that is overdue longest at another server."""
        if self.waiting:
            return self.waiting.popleft()
        if not self.durations:
            return None
        overdue = time.monotonic() - max(LATE_SECONDS, LATE_FACTOR * statistics.median(self.durations))
        alone = [attempts[0] for attempts in self.out.values() if len(attempts) == 1]
        late = [attempt for attempt in alone if attempt.started < overdue and attempt.server is not server]
        return min(late, key=lambda attempt: attempt.started).index if late else None

    def put_back(self, attempt: _Attempt) -> None:
        """Has a prompt wait again, at the end: one that makes every server fail must not hold up the others."""
        self.out[attempt.index].remove(attempt)
        if not self.out[attempt.index]:
            del self.out[attempt.index]
            self.waiting.append(attempt.index)

    def finish(self, attempt: _Attempt, completions: list[Completion]) -> None:
        """Keeps the first answer for a prompt."""
        del self.out[attempt.index]
        self.results[attempt.index] = completions
        self.missing -= 1
        self.last_answer = time.monotonic()
        self.durations.append(self.last_answer - attempt.started)


def split_urls(base_urls: str) -> list[str]:
    """URLs separated by commas, as an option has them."""
    return [url.strip() for url in base_urls.split(",") if url.strip()]


def _normalized(base_urls: Sequence[str]) -> list[str]:
    """Returns the URLs without `/v1` and without a slash at the end."""
    if not base_urls:
        raise RecipeError("no vLLM server: give the URL of at least one, http://localhost:8000 say.")
    urls = []
    for given in base_urls:
        url = given.rstrip("/").removesuffix("/v1").rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"{shown(given)} is not the URL of a vLLM server: write it as http://host:8000.")
        if url in urls:
            raise RecipeError(f"{shown(given)} names a server a second time: give each server once.")
        urls.append(url)
    return urls
