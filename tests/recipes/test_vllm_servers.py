"""vllm_servers.py: the real client and real sockets, against servers on loopback that answer as vLLM 0.32 does, or fail."""

import errno
import itertools
import re
import signal
import threading
import time

import pytest
from recipes.fake_vllm import HANG, MODEL, expected, make_prompts, sent_to, threads_left
from support import free_port

from trl_recipes import vllm_servers
from trl_recipes.arguments import RecipeError
from trl_recipes.vllm_requests import Prompt
from trl_recipes.vllm_servers import VllmServers, split_urls


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


def test_no_prompts_need_no_server():
    assert VllmServers(["http://127.0.0.1:1"]).generate(MODEL, [], max_tokens=8) == []


def test_a_second_call_on_the_same_servers_is_answered_as_the_first(start):
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
    other, port = start(delay=0.05), free_port()
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


def test_where_no_server_answers_each_reason_is_named_once_patience_is_over(start):
    urls = [f"http://127.0.0.1:{free_port()}", start(faults=[(503, "Starting.")] * 100).url]
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
    urls = [f"http://127.0.0.1:{free_port()}", start(delay=0.6).url]
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


def test_answers_of_a_call_that_ended_are_not_taken_for_the_next(start):
    slow, refusing = start(delay=0.2), start(faults=[(400, "No.")])
    servers = VllmServers([slow.url, refusing.url])
    with pytest.raises(RecipeError):
        servers.generate(MODEL, [Prompt([1], 1), Prompt([2], 1)], max_tokens=8)
    refusing.delay = 0.5  # the answer that the first call did not wait for comes earlier
    prompts = [Prompt([3], 1), Prompt([4], 1)]
    assert servers.generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert sum(servers.served.values()) == 2


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal: a shell starts what runs in its background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_sends_nothing_more(start, ctrl_c):
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
    down = f"http://127.0.0.1:{free_port()}"
    assert VllmServers([down, start().url]).base_model() == "a/base"
    with pytest.raises(RecipeError, match=rf"no vLLM server says which model it has: {down} \(Connection error\.\)"):
        VllmServers([down]).base_model()


def test_an_option_has_urls_separated_by_commas():
    assert split_urls("http://a:1, http://b:2/v1,") == ["http://a:1", "http://b:2/v1"]
    assert split_urls("") == []


def test_progress_counts_prompts_and_is_off_by_default(start, capsys):
    servers = VllmServers([start().url])
    servers.generate(MODEL, make_prompts(3), max_tokens=8)
    assert capsys.readouterr().err == ""
    servers.generate(MODEL, make_prompts(3), max_tokens=8, progress="rollouts")
    bar = capsys.readouterr().err
    assert "rollouts:" in bar and "/3 [" in bar
