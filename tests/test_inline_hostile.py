"""inline.py: text from a stranger is numbers that can be meant, or refused with one line, and never takes memory first."""

import re
import struct
import tracemalloc

import pytest
import torch
from test_inline import MOST, body, encode, make_small

from peft_tinylora import AdapterFileError, inline
from peft_tinylora.inline import (
    InlineAdapter,
    parse_inline,
)


def assert_meant(adapter: InlineAdapter) -> None:
    """What a text that was accepted must hold, whatever it says."""
    assert 1 <= adapter.r <= 255 and adapter.sigma in ("left", "split") and isinstance(adapter.from_paper, bool)
    assert re.fullmatch("[0-9a-f]{16}", adapter.digest) and -(2**63) <= adapter.projection_seed < 2**63
    adapted = [group for group in adapter.groups if group is not None]
    assert sorted(set(adapted)) == list(range(len(adapter.v)))
    assert adapter.sketches.shape == (len(adapted), 2 * adapter.r + 1) and adapter.sketches.dtype == torch.bfloat16
    assert adapter.v.dtype in (torch.float32, torch.bfloat16) and adapter.u >= 1
    assert adapter.v.isfinite().all() and adapter.sketches.isfinite().all()


def test_any_changed_byte_gives_numbers_or_a_refusal() -> None:
    accepted = 0
    for whole in (body(make_small().text()), body(make_small(v=make_small().v.bfloat16()).text())):
        for index in range(len(whole)):
            for change in range(1, 256):
                changed = bytearray(whole)
                changed[index] ^= change
                text = encode(bytes(changed))
                try:
                    adapter = parse_inline(text, MOST)
                except AdapterFileError:
                    continue
                accepted += 1
                assert_meant(adapter)
                assert adapter.text() == text  # nothing that it says was dropped
    assert accepted > 10_000  # seeds, digests and numbers, most of all


def test_any_changed_character_is_refused() -> None:
    text = make_small().text()
    for index in range(len(text) - 1):  # the last one has bits that no byte has
        changed = text[:index] + ("A" if text[index] != "A" else "B") + text[index + 1 :]
        with pytest.raises(AdapterFileError):
            parse_inline(changed, MOST)


def test_a_text_cut_short_anywhere_is_refused() -> None:
    adapter = make_small()
    text, whole = adapter.text(), body(adapter.text())
    for end in range(len(text)):
        with pytest.raises(AdapterFileError):
            parse_inline(text[:end], MOST)
    for end in range(len(whole)):
        with pytest.raises(AdapterFileError, match="too few|cannot be meant|has .* bytes|groups, and its"):
            parse_inline(encode(whole[:end]), MOST)
    for more in (b"\0", b"\0" * 4, whole):
        with pytest.raises(
            AdapterFileError, match=rf"has {len(whole + more)} bytes, and r=1, u=3, 2 groups and 3 mod"
        ):
            parse_inline(encode(whole + more), MOST)


def test_random_bytes_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        size = int(torch.randint(200, (), generator=generator))
        noise = bytes(torch.randint(256, (size,), generator=generator, dtype=torch.uint8).tolist())
        small = bytes([1 + size % 3, size % 8, 1, 0, 1, 0, size % 5, 0]) + noise  # a head that could be meant
        for data in (noise, small):
            try:
                assert_meant(parse_inline(encode(data), MOST))
            except AdapterFileError:
                continue


def hand_made(
    head: tuple = (1, 0, 3, 2, 4), rows: tuple = (1, 0, 2, 1), sketches: bytes | None = None, v: bytes | None = None
) -> str:
    sketches = struct.pack("<9H", *[0x3F80] * 9) if sketches is None else sketches
    v = struct.pack("<6f", *range(6)) if v is None else v
    return encode(
        struct.pack("<BBHHHq8s", *head, 42, b"12345678") + struct.pack(f"<{len(rows)}H", *rows) + sketches + v
    )


AGAIN = r"Make it again with peft_tinylora\.inline_adapter"


GOOD = make_small().text()


HOSTILE = {
    "no prefix": (GOOD.removeprefix("tinylora:"), "is no inline adapter, which is like"),
    "a name": ("tinylora:gsm8k", "'tinylora:gsm8k' is no inline adapter"),
    "prefix alone": ("tinylora:", "'tinylora:' is no inline adapter"),
    "upper case": (GOOD.replace("tinylora", "TinyLoRA"), "is no inline adapter"),
    "space before": (f" {GOOD}", "is no inline adapter"),
    "a long name": ("x" * 10**4, "'x{40}' is no inline adapter"),
    "empty": ("", "'' is no inline adapter"),
    "a newer version": (GOOD.replace(":1.", ":2."), "has format version '2', and this peft_tinylora reads 1: use the same"),
    "another spelling of the version": (GOOD.replace(":1.", ":01."), "has format version '01'"),
    "no version": (GOOD.replace(":1.", ":."), "has format version ''"),
    "a long version": (f"tinylora:{'9' * 10**4}.AAAA", "has format version '9{20}', and"),
    "nothing but a version": ("tinylora:1.", f"holds 0 bytes, which are too few. {AGAIN}"),
    "not ASCII": (f"{GOOD}é", "is no base64url"),
    "a surrogate": (f"{GOOD[:40]}\udcff{GOOD[41:]}", "is no base64url"),
    "a digit of another script": (f"{GOOD[:40]}٣{GOOD[41:]}", "is no base64url"),
    "a newline at the end": (f"{GOOD}\n", "is no base64url"),
    "a newline inside": (f"{GOOD[:40]}\n{GOOD[40:]}", "is no base64url"),
    "a space": (f"{GOOD[:40]} {GOOD[40:]}", "is no base64url"),
    "a tab": (f"{GOOD}\t", "is no base64url"),
    "a zero byte": (f"{GOOD}\0", "is no base64url"),
    "padding inside": (f"{GOOD[:40]}={GOOD[41:]}", "is no base64url"),
    "padding alone": ("tinylora:1.====", "is no base64url"),
    "one character more": (f"{GOOD}AAA", "is no base64url|checksum is wrong"),
    "a path": ("tinylora:1.../../etc/passwd", "is no base64url"),
    "another checksum": (GOOD[:-4] + ("AAAA" if GOOD[-4:] != "AAAA" else "BBBB"), f"checksum is wrong. {AGAIN}"),
    "two in one": (GOOD + GOOD, "is no base64url"),
    "rank 0": (hand_made((0, 0, 3, 2, 4)), "cannot be meant: r=0, u=3, 2 groups, 4 modules, flags 0"),
    "no numbers": (hand_made((1, 0, 0, 2, 4), v=b""), "cannot be meant: r=1, u=0"),
    "no groups": (hand_made((1, 0, 3, 0, 4), (0, 0, 0, 0), b"", b""), "cannot be meant: .*0 groups"),
    "no modules": (hand_made((1, 0, 3, 2, 0), ()), "cannot be meant: .*0 modules"),
    "a flag that is not there": (hand_made((1, 8, 3, 2, 4)), "cannot be meant: .*flags 8"),
    "all flags": (hand_made((1, 255, 3, 2, 4)), "cannot be meant: .*flags 255"),
    "a group that is not read": (hand_made(rows=(1, 0, 1, 1)), r"has 2 groups, and its 4 modules read 1 of them up to number 0"),
    "no group that is read": (hand_made(rows=(0, 0, 0, 0), sketches=b""), "read 0 of them up to number -1"),
    "a group that is not there": (hand_made(rows=(1, 0, 2, 3)), "read 3 of them up to number 2: each must be read, and no other"),
    "the last group of all": (hand_made(rows=(1, 0, 65535, 1)), "read 2 of them up to number 65534"),
    "a group is left out": (hand_made(rows=(1, 0, 3, 1)), "read 2 of them up to number 2"),
    "one adapted module more": (hand_made(rows=(1, 1, 2, 1)), "has 74 bytes, and r=1, u=3, 2 groups and 4 modules ask for 80"),
    "v in half the bytes": (hand_made((1, 1, 3, 2, 4)), "has 74 bytes, and .* ask for 62"),
    "NaN in v": (hand_made(v=struct.pack("<6f", 0, 0, float("nan"), 0, 0, 0)), f"holds NaN or Inf. {AGAIN}"),
    "Inf in v": (hand_made(v=struct.pack("<6f", 0, 0, 0, 0, 0, float("-inf"))), "holds NaN or Inf"),
    "NaN in v in bfloat16": (hand_made((1, 1, 3, 2, 4), v=struct.pack("<6H", 0, 0, 0, 0, 0, 0x7FC0)), "holds NaN or Inf"),
    "NaN in a sketch": (hand_made(sketches=struct.pack("<9H", *[0] * 8, 0xFFFF)), "holds NaN or Inf"),
    "Inf in a sketch": (hand_made(sketches=struct.pack("<9H", 0x7F80, *[0] * 8)), "holds NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_text_from_a_stranger_is_refused_with_one_line(what: str) -> None:
    text, message = HOSTILE[what]
    with pytest.raises(AdapterFileError, match=message) as refused:
        parse_inline(text, MOST)
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


def test_what_the_hostile_ones_differ_from_is_accepted() -> None:
    assert_meant(parse_inline(hand_made(), MOST))
    assert_meant(parse_inline(GOOD, len(GOOD)))


def test_a_text_that_is_too_long_is_refused_unread(monkeypatch) -> None:
    monkeypatch.setattr(inline.base64, "b64decode", lambda *_, **__: pytest.fail("was decoded"))
    message = (
        f"has {len(GOOD)} characters, and this server takes {len(GOOD) - 1} at most: .*PEFT_TINYLORA_VLLM_CHARACTERS"
    )
    with pytest.raises(AdapterFileError, match=message):
        parse_inline(GOOD, len(GOOD) - 1)


HUGE = {
    "rank": (255, 0, 3, 2, 4),
    "numbers": (1, 0, 65535, 2, 4),
    "groups": (1, 0, 3, 65535, 4),
    "modules": (1, 0, 3, 2, 65535),
    "all": (255, 0, 65535, 65535, 65535),
}


@pytest.mark.parametrize("what", HUGE)
def test_sizes_that_the_text_does_not_hold_allocate_nothing(monkeypatch, what: str) -> None:
    monkeypatch.setattr(inline, "_tensor", lambda *_: pytest.fail("a tensor was made"))
    text = hand_made(HUGE[what])
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError):
            parse_inline(text, MOST)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000  # bytes; 65,535 groups are counted
    finally:
        tracemalloc.stop()


def test_the_longest_text_takes_a_few_times_its_memory() -> None:
    """As many modules as a text of that length can name: 24,000 of them not adapted."""
    modules = 24_000
    text = hand_made((1, 0, 3, 2, modules), (1, 2, 1, *[0] * (modules - 3)))
    tracemalloc.start()
    try:
        adapter = parse_inline(text, MOST)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert adapter.groups[:4] == (0, 1, 0, None) and len(adapter.groups) == modules


def test_an_adapter_has_one_text_only() -> None:
    """Other spellings of the same bytes would be other adapters to a server's cache, and names."""
    encoded = GOOD.partition(".")[2]
    spare = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = {f"{GOOD}{'=' * padding}" for padding in (1, 2, 3)}
    if len(encoded) % 4:
        others |= {GOOD[:-1] + last for last in spare} - {GOOD}
    others.add(GOOD.replace("-", "+").replace("_", "/"))
    for other in others - {GOOD}:
        with pytest.raises(AdapterFileError):
            parse_inline(other, MOST)
