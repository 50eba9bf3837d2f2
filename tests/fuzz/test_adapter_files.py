"""Whole adapters on disk, each changed in one place: loaded for what an independent parser reads in it, or refused."""

import json
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from fuzz.harness import bounded
from fuzz.readers.adapter import (
    FORMS,
    ON_A_BASE,
    Files,
    V,
    load_into_bank,
    load_onto_base,
    read_as_files,
    sound_files,
    with_pefts_own,
)
from safetensors.torch import load, save

from peft_tinylora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from peft_tinylora.errors import TinyLoraError


READ, LOAD, BANK = "read_adapter", "PeftModel.from_pretrained", "AdapterBank.load"
WAYS = {READ: read_as_files, LOAD: with_pefts_own(load_onto_base), BANK: with_pefts_own(load_into_bank)}


def tried(way: str, adapters: Iterator[Files]) -> tuple[int, int]:
    """How many adapters were tried by a way, and how many of them loaded."""
    count = loaded = 0
    with bounded() as begin:
        for files in adapters:
            begin()
            count += 1
            try:
                WAYS[way](files)
            except ON_A_BASE as error:
                assert len(str(error).splitlines()) == 1
                continue
            loaded += 1
    return count, loaded


def cut_short(form: str, name: str, lengths: list[int]) -> Iterator[Files]:
    files = sound_files(form)
    for length in lengths:
        yield files | {name: files[name][:length]}


def flipped(form: str, name: str, places: list[int]) -> Iterator[Files]:
    """Adapters one of whose files has one bit changed."""
    files = sound_files(form)
    for place in places:
        data = bytearray(files[name])
        data[place // 8] ^= 1 << place % 8
        yield files | {name: bytes(data)}


@pytest.mark.parametrize("form", FORMS)
def test_sound_files_load_by_every_way(form: str) -> None:
    for way in WAYS if form != "portable" else (READ, LOAD):
        assert tried(way, iter([sound_files(form)])) == (1, 1)


def every(step: int, end: int, quick: int | None) -> list[int]:
    """Each so manieth number below the end, without those that the quick case has tried."""
    return [number for number in range(0, end, step) if quick is None or number % quick]


@pytest.mark.parametrize(
    ("name", "way", "step", "quick"),
    [
        (WEIGHTS_FILE, READ, 1, None),
        (WEIGHTS_FILE, BANK, 1, None),
        (WEIGHTS_FILE, LOAD, 23, None),
        pytest.param(WEIGHTS_FILE, LOAD, 1, 23, marks=pytest.mark.slow),  # half a minute
        (CONFIG_FILE, READ, 7, None),
        (CONFIG_FILE, LOAD, 301, None),
        pytest.param(CONFIG_FILE, READ, 1, 7, marks=pytest.mark.slow),
        pytest.param(CONFIG_FILE, LOAD, 17, 301, marks=pytest.mark.slow),
    ],
)
def test_a_file_cut_short_anywhere_is_refused(
    name: str, way: str, step: int, quick: int | None, record_property
) -> None:
    lengths = every(step, len(sound_files("compact")[name]), quick)
    assert tried(way, cut_short("compact", name, lengths)) == (len(lengths), 0)
    record_property("files tried", len(lengths))


@pytest.mark.parametrize(
    ("way", "step", "quick"),
    [
        (READ, 3, None),
        (LOAD, 71, None),
        pytest.param(BANK, 1, None, marks=pytest.mark.slow),
        pytest.param(LOAD, 3, 71, marks=pytest.mark.slow),
    ],
)
def test_one_changed_bit_of_the_weights_is_noticed(way: str, step: int, quick: int | None, record_property) -> None:
    places = every(step, 8 * len(sound_files("compact")[WEIGHTS_FILE]), quick)
    count, loaded = tried(way, flipped("compact", WEIGHTS_FILE, places))
    assert loaded < count / 5  # in the header's blanks, say; what loaded was compared with the parser
    record_property("files tried", count)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(
    ("form", "first", "end"),
    [("compact", 0, 20), ("portable", 0, 20), pytest.param("portable", 20, 500, marks=pytest.mark.slow)],
)
def test_one_changed_bit_anywhere_loads_as_it_says_or_is_refused(
    form: str, name: str, first: int, end: int, record_property
) -> None:
    bits = range(8 * len(sound_files(form)[name]))
    if (form, name) == ("compact", WEIGHTS_FILE):  # the others are tried above
        bits = [bit for bit in bits if bit % 3 and bit % 71]
    places = random.Random(0).sample(bits, 500)[first:end]
    record_property("files tried", tried(LOAD, flipped(form, name, places))[0])


def config(**values: object) -> Callable[[Files], Files]:
    return lambda files: files | {CONFIG_FILE: json.dumps(json.loads(files[CONFIG_FILE]) | values).encode()}


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Files], Files]:
    return lambda files: files | {WEIGHTS_FILE: save({V: change(load(files[WEIGHTS_FILE])[V]).contiguous()})}


CHANGED: dict[str, Callable[[Files], Files]] = {
    "another dtype": weights(lambda v: v.half()),
    "a wider dtype": weights(lambda v: v.double()),
    "the same bytes as integers": weights(lambda v: v.view(torch.int32)),
    "NaN": weights(lambda v: v.index_fill(1, torch.tensor([0]), float("nan"))),
    "Inf": weights(lambda v: v.index_fill(0, torch.tensor([1]), float("inf"))),
    "another sign of zero": weights(lambda v: -v),
    "transposed": weights(lambda v: v.T),
    "flat": weights(lambda v: v.flatten()),
    "a group less": weights(lambda v: v[:-1]),
    "a group more": weights(lambda v: torch.cat([v, v[:1]])),
    "groups exchanged": weights(lambda v: v.flip(0)),
    "another r": config(r=1),
    "a larger r": config(r=3),
    "r of another type": config(r=2.0),
    "r true": config(r=True),
    "another u": config(u=2),
    "another seed": config(projection_seed=43),
    "another tying": config(n_tie=3),
    "no tying": config(tie="none", n_tie=None),
    "fewer modules": config(target_modules=["q_proj"]),
    "other singular values": config(sigma="split"),
    "no fingerprint": config(fingerprint=None),
    "a fingerprint in part": config(fingerprint={"v": ""}),
    "a numeric version": config(format_version=1.5),
    "r of a trillion": config(r=10**12),
    "n_tie of a trillion": config(n_tie=10**12),
    "n_tie of many digits": config(n_tie=10**4000),
    "another task": config(task_type="CATSAL_LM"),
    "a bias": config(bias="all", fingerprint={}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_exchanged_is_refused_with_one_line(way: str, record_property) -> None:
    ways = [name for name in CHANGED if name not in MEANT.get(way, ())]
    for name in ways:
        with pytest.raises(TinyLoraError) as refused:
            WAYS[way](CHANGED[name](sound_files("compact")))
        assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 1000, name
    record_property("files tried", len(ways))


# What only the base can tell, beside which a file alone means something.
NEED_THE_BASE = ("another r", "a larger r", "another seed", "another tying", "no tying", "fewer modules", "other singular values", "n_tie of a trillion", "n_tie of many digits")  # fmt: skip
# A bank has its own modules and tying, and the fingerprint says that v is for these.
OF_THE_BANK = ("another tying", "no tying", "fewer modules", "n_tie of a trillion", "n_tie of many digits")
MEANT = {READ: NEED_THE_BASE, BANK: OF_THE_BANK}
