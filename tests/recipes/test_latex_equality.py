"""latex_equality.py: the other process is in step whatever happens to it, and what is not the pair's fault is asked again."""

import os
import signal
import threading

import pytest

from trl_recipes import latex_equality
from trl_recipes.latex_equality import _worker, is_heavy, latex_agrees


class Interrupted(Exception):
    pass


def interrupt(*_: object) -> None:
    raise Interrupted


def test_a_pair_that_was_interrupted_leaves_no_answer_behind() -> None:
    """Ctrl-C between the question and the answer: the next verdicts are those of the next pairs."""
    assert latex_agrees("x+1", "1+x")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * (n + 1))
            try:
                latex_agrees(f"x+{n}+y", f"y+x+{n}")
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                break
        else:
            pytest.fail("was never interrupted")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pairs = [("x+2", "7y", False), ("2x", "x+x", True), ("2x", "3y", False), ("x+3", "3+x", True)]
    assert [latex_agrees(found, gold) for found, gold, _ in pairs] == [equal for *_, equal in pairs]


def test_a_worker_that_was_killed_from_outside_is_asked_again() -> None:
    assert latex_agrees("a+1", "1+a")
    process = _worker.process
    os.kill(process.pid, signal.SIGSTOP)  # it gets the pair, and is killed with it
    killer = threading.Timer(0.3, lambda: os.kill(process.pid, signal.SIGKILL))
    killer.start()
    assert latex_agrees("a+2", "2+a")
    killer.join()
    assert _worker.process is not process


def test_no_verdict_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that gives no answer in time: not equal now, and asked again later."""
    assert latex_agrees("b+1", "1+b")
    stopped = _worker.process
    os.kill(stopped.pid, signal.SIGSTOP)
    monkeypatch.setattr(latex_equality, "ANSWER_SECONDS", 0.2)
    assert not latex_agrees("b+2", "2+b")
    assert stopped.poll() is not None  # it is not left behind
    monkeypatch.undo()
    assert latex_agrees("b+2", "2+b")


def test_a_pair_that_ended_the_worker_is_remembered_as_unequal(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = r"\prod_{k=1}^{99}(x+k)^{99} + \int_0^1 \frac{x^{99}}{\sin x + \cos^{7} x} dx"
    assert not latex_agrees(slow, "x^2")
    with monkeypatch.context() as patch:
        patch.setattr(_worker, "agree", lambda *_: pytest.fail("was asked again"))
        assert not latex_agrees(slow, "x^2")
    assert latex_agrees("c+1", "1+c")


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^{9}}}", "9^{9^9}", "((9^9)^9)^9", "2^{101}", "(x+y)^{300}", "x^{-1000}", "1001!", "(10^{9})!", "5!!"]
    + ["999999999999!", "2^{" + "9" * 5000 + "}"],
)
def test_what_asks_for_all_time_is_not_asked(answer: str) -> None:
    assert is_heavy(answer) and not latex_agrees(answer, "x")


@pytest.mark.parametrize(
    "answer", ["e^{x^2}", "2^{100}", "x^{12}", "n!", "(n+1)!", "20!", "x^{n^2}", "10^{-3}x", "a^b^c"]
)
def test_powers_and_factorials_as_they_are_in_answers_are_not_heavy(answer: str) -> None:
    assert not is_heavy(answer)
