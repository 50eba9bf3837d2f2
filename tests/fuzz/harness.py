"""What every reader of a file, a text or an answer is put through: inputs that nobody meant, within bounds of time and memory.

A reader either takes an input or refuses it by one of the errors that its docstring names, in one line. All else is a
failure: another error, a hang, gigabytes. Readers of adapters, and some others, compare what was taken with what a parser of
the tests' own finds in the bytes; the rest check what must hold of it, or only that it was read. Time is bounded where Python
code runs, since a signal's handler waits for a call into C to return, and memory is looked at afterwards; guided.py bounds both
from outside.
"""

import atexit
import functools
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st


MOST_CPU_SECONDS = 10.0  # for one input; of the processor, so that a busy machine gives no other verdict
MOST_MORE_BYTES = 1_500_000_000  # of resident memory in all inputs of a test together
MOST_CHARACTERS = 2000  # of a refusal


@dataclass(frozen=True)
class Reader:
    """A way into the package.

    Args:
        name (`str`): what guided.py calls it.
        read (`Callable`): reads bytes by the package's own code; fails an assertion where they are taken for what they are not.
        refusals (`tuple`): the errors that may come of it; where it may raise none at all, empty.
        seeds (`Callable`): inputs that are sound, to be changed.
        tokens (`Sequence[bytes]`): what changed inputs get put in.
        found (`Sequence[bytes]`): inputs that were read wrongly once.
        is_slow (`bool`): whether one input takes some hundredths of a second and not thousandths.
    """

    name: str
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    tokens: Sequence[bytes] = ()
    found: Sequence[bytes] = ()
    is_slow: bool = False


class TooSlow(BaseException):
    """An input took too long; no `except Exception` holds it."""


def attempt(reader: Reader, data: bytes) -> str | None:
    """Has an input read once; returns what was said where it was refused."""
    try:
        reader.read(data)
    except reader.refusals as error:
        said = str(error)
        assert said.strip() and len(said.splitlines()) == 1, f"not one line: {said[:500]!r}"
        assert len(said) <= MOST_CHARACTERS, f"{len(said)} characters: {said[:500]!r}"
        return said
    return None


@contextmanager
def bounded() -> Iterator[Callable[[], None]]:
    """Bounds memory for all that is done in it, and time anew from each call of what it gives."""

    def too_slow(*_: object) -> None:
        raise TooSlow(f"more than {MOST_CPU_SECONDS:g} s of the processor for one input")

    before = signal.signal(signal.SIGPROF, too_slow)
    Path("/proc/self/clear_refs").write_text("5")  # most_bytes begins anew, with what is resident now
    at_first = most_bytes()
    try:
        yield lambda: signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS) and None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    more = most_bytes() - at_first
    assert more < MOST_MORE_BYTES, f"{more:,} bytes more than before"


def most_bytes() -> int:
    """The most of resident memory that this process has had."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def fuzz(
    reader: Reader, examples: int, at_random: bool = False, inputs: st.SearchStrategy[bytes] | None = None
) -> int:
    """Has a reader read inputs that once were read wrongly, and changed ones.

    Args:
        reader ([`Reader`]): whose.
        examples (`int`): changed inputs.
        at_random (`bool`): whether they are others each time.
        inputs (`SearchStrategy`, *optional*): where they come from, in place of the reader's seeds.

    Returns:
        `int`: how many inputs were read.
    """
    count = 0
    if inputs is None:
        inputs = changed(reader.seeds(), [*GENERAL_TOKENS, *reader.tokens])
    with bounded() as begin:

        @settings(
            max_examples=examples,
            derandomize=not at_random,
            database=None,
            deadline=None,
            print_blob=True,
            phases=set(Phase)
            - {Phase.explain},  # which would trace every line, and so be too slow for the bound of time
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def read(data: bytes) -> None:
            nonlocal count
            count += 1
            begin()
            attempt(reader, data)

        for data in reader.found:
            read = example(data)(read)
        read()
    return count


GENERAL_TOKENS = (
    *(b"\0", b"\xff" * 8, b"\n", b'"', b"{", b"}", b"[", b"]", b":", b",", b"-1", b"1e999", b"NaN", b"-Infinity", b"null"),
    *(b"true", b"9" * 20, b"9" * 5000, b"[" * 5000, b"../../", b"/etc/passwd", b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"\r"),
    *("\N{ARABIC-INDIC DIGIT THREE}".encode(), "\N{LINE SEPARATOR}".encode(), "\N{SUPERSCRIPT TWO}".encode(), b"\x1b[2J"),
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """A sound input after one to four changes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 16)))
        kind = draw(
            st.sampled_from(("bit", "byte", "put in", "in place", "cut out", "cut off", "twice", "from another"))
        )
        if kind == "bit" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and start < len(data):
            data[start] = draw(st.integers(0, 255))
        elif kind == "put in":
            data[start:start] = draw(st.sampled_from(tokens))
        elif kind == "in place":
            data[start:end] = draw(st.sampled_from(tokens))
        elif kind == "cut out":
            del data[start:end]
        elif kind == "cut off":
            del data[start:]
        elif kind == "twice":
            data[start:start] = data[start:] if draw(st.booleans()) else data[start:end]
        elif kind == "from another":
            data[start:end] = draw(st.sampled_from(seeds))[start : start + draw(st.integers(0, 64))]
    return bytes(data)


def quick_and_long(quick: int, long: int) -> pytest.MarkDecorator:
    """Parametrizes a test by `examples` and `at_random`: a few, always the same ones, and many, which are others each time."""
    return pytest.mark.parametrize(
        ("examples", "at_random"),
        [
            pytest.param(quick, False, id="quick"),
            pytest.param(long, True, id="long", marks=pytest.mark.slow),  # minutes for all readers together
        ],
    )


@functools.cache
def workplace() -> Path:
    """A folder of this process, in memory where that can be had; it is gone when the process ends."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tinylora-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
