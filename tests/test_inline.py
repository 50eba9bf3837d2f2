"""inline.py: a live adapter, its folder and the text are one; what a text cannot carry; text from a stranger."""

import base64
import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import TILED, gpt2, load, opt, qwen2
from peft import PeftModel, get_peft_model
from support import fill_vectors, make_tiny_llama
from test_compact import rewrite_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from peft_tinylora import AdapterFileError, TinyLoraConfig, export_adapter, inline
from peft_tinylora.inline import (
    InlineAdapter,
    inline_adapter,
    inline_adapter_of_folder,
    linear_modules,
    name_of,
    parse_inline,
)
from peft_tinylora.served import skeleton


MOST = 65536  # what a server takes unless its owner says otherwise


LINEAR = {"r": 2, "u": 1, "target_modules": "all-linear"}


ADAPTERS: dict[str, dict] = {
    "tiled": TILED,
    "structured": {**LINEAR, "tie": "structured", "n_tie": 2},
    "none": {**LINEAR, "tie": "none"},
    "full": {**LINEAR, "tie": "full"},
    "mapping": {**LINEAR, "tie": {"mlp": r".*\.mlp\..*", "attention": r".*\.self_attn\..*"}},
    "mapping in runs": {**LINEAR, "tie": {"all": ".*"}, "n_tie": 5},
    "split": {**TILED, "sigma": "split"},
    "several numbers": {**TILED, "u": 3},
    "rank 3": {**TILED, "r": 3, "u": 2},
    "some modules": {**TILED, "target_modules": ["v_proj", "up_proj"]},
    "some layers": {
        **TILED,
        "u": 2,
        "target_modules": ["o_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1, 3],
    },
    "excluded": {**TILED, "exclude_modules": ["layers.0.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    "a negative seed": {**TILED, "projection_seed": -(2**63)},
    "bfloat16": {**TILED, "save_dtype": "bfloat16"},
    "portable": {**TILED, "save_basis": True},
    "fields of PEFT": {**LINEAR, "weight_tying": 1.0},
    "fields of PEFT, in part": {"r": 2, "u": 2, "weight_tying": 0.4, "target_modules": ["q_proj", "down_proj"]},
    "fields of PEFT, the last seed": {**LINEAR, "projection_seed": 2**63 - 1},
}


NAMES = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def adapt(base: torch.nn.Module, **fields: object) -> PeftModel:
    """A base with an adapter whose v is random."""
    model = get_peft_model(base, TinyLoraConfig(**fields)).eval()
    fill_vectors(model, 0.5)
    return model


def save_compact(model: PeftModel, folder: Path, base: torch.nn.Module) -> Path:
    """The folder of an adapter in the compact form, in which it is saved or, if it is not, into which it is exported."""
    model.save_pretrained(folder / "saved")
    if model.peft_config["default"].is_compact:
        return folder / "saved"
    export_adapter(folder / "saved", folder / "compact", "compact", base)
    return folder / "compact"


def decode(text: str) -> tuple[tuple[int, ...], tuple[int, ...], bytes, bytes]:
    """By the docstring of inline.py alone: head, which row of v each module reads, sketches, v."""
    start, encoded = text.split(".")
    assert start == "tinylora:1" and re.fullmatch(r"[A-Za-z0-9_-]+", encoded)
    data = base64.b64decode(encoded.replace("-", "+").replace("_", "/") + "=" * (-len(encoded) % 4))
    assert data[-8:] == hashlib.sha256(data[:-8]).digest()[:8]
    head = r, _, u, groups, modules, _, _ = struct.unpack("<BBHHHqQ", data[:24])
    rows = struct.unpack(f"<{modules}H", data[24 : 24 + 2 * modules])
    sketches = data[24 + 2 * modules :][: 2 * (2 * r + 1) * (modules - rows.count(0))]
    v = data[24 + 2 * modules + len(sketches) : -8]
    assert len(v) in (2 * groups * u, 4 * groups * u)
    return head, rows, sketches, v


def encode(data: bytes) -> str:
    """Bytes -> text with a checksum that is right."""
    data += hashlib.sha256(data).digest()[:8]
    return "tinylora:1." + base64.urlsafe_b64encode(data).decode().rstrip("=")


def body(text: str) -> bytes:
    """Text -> bytes without the checksum."""
    encoded = text.partition(".")[2]
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[:-8]


def make_small(**fields: object) -> InlineAdapter:
    """r=1 and two groups of 3 numbers, of a base with 4 modules, of which one is not adapted."""
    settings = {
        "r": 1, "sigma": "left", "from_paper": True, "projection_seed": 42, "digest": "0123456789abcdef",
        "groups": (0, None, 1, 0), "sketches": torch.tensor([[1.0, 2.0, -0.5]] * 3).bfloat16(),
        "v": torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]),
    }  # fmt: skip
    return InlineAdapter(**{**settings, **fields})


def assert_same(one: InlineAdapter, other: InlineAdapter) -> None:
    for field in ("r", "u", "sigma", "from_paper", "projection_seed", "digest", "groups"):
        assert getattr(one, field) == getattr(other, field), field
    for field in ("sketches", "v"):
        a, b = getattr(one, field), getattr(other, field)
        assert a.dtype == b.dtype and torch.equal(a, b), field


@pytest.fixture(autouse=True)
def basis_cache_folder() -> None:
    """One cache for this file, in place of one for each test: finding the factors would take most of the time."""


@pytest.fixture
def base(base_folder) -> torch.nn.Module:
    return load(base_folder)


@pytest.fixture(scope="module")
def made(base_folder, tmp_path_factory) -> Callable[[str], tuple[PeftModel, InlineAdapter, Path]]:
    """Name of one of `ADAPTERS` -> the model with it, its inline form, its folder in the compact form."""
    kept = {}

    def make(name: str) -> tuple[PeftModel, InlineAdapter, Path]:
        if name not in kept:
            model = adapt(load(base_folder), **ADAPTERS[name])
            folder = save_compact(model, tmp_path_factory.mktemp("adapter"), load(base_folder))
            kept[name] = model, inline_adapter(model), folder
        return kept[name]

    return make


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_live_adapter_and_its_folder_have_one_text(made, base_folder, name: str) -> None:
    _, live, folder = made(name)
    saved = inline_adapter_of_folder(folder, skeleton(str(base_folder)))
    if name == "bfloat16":  # rounded on saving, not while it is trained
        assert live.v.dtype == torch.float32 and saved.v.dtype == torch.bfloat16
        live = replace(live, v=live.v.bfloat16())
    assert saved.text() == live.text()
    assert_same(saved, live)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_a_text_says_is_read_back(made, name: str) -> None:
    _, adapter, _ = made(name)
    assert_same(parse_inline(adapter.text(), MOST), adapter)
    in_bfloat16 = replace(adapter, v=adapter.v.bfloat16())
    assert_same(parse_inline(in_bfloat16.text(), MOST), in_bfloat16)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_text_says_what_the_model_and_its_fingerprint_say(made, name: str) -> None:
    model, adapter, folder = made(name)
    config = model.peft_config["default"]
    saved = json.loads((folder / "adapter_config.json").read_text())["fingerprint"]
    (r, flags, u, groups, modules, seed, digest), rows, sketches, v = decode(adapter.text())
    assert (r, u, seed) == (config.r, config.u, config.projection_seed)
    of_peft = "PEFT" in name
    assert flags == 2 * (of_peft or name == "split") + 4 * of_peft
    assert digest.to_bytes(8, "little").hex() == saved["groups"]
    assert sketches == base64.b64decode(saved["modules"])
    vectors = model.tinylora_v["default"]
    assert groups == len(vectors) and set(rows) - {0} == set(range(1, groups + 1))
    expected = [number for group in range(groups) for number in vectors[str(group)].tolist()]
    assert v == struct.pack(f"<{groups * u}f", *expected)
    names = [f"model.layers.{index}.{name}" for index in range(4) for name in NAMES]
    assert modules == len(names) == 28
    layers = {n: model.get_base_model().get_submodule(n) for n in names}
    read = [int(layer.groups("default")[0]) + 1 if hasattr(layer, "groups") else 0 for layer in layers.values()]
    assert list(rows) == read


def test_the_bytes_of_a_text_are_these() -> None:
    adapter = make_small(projection_seed=-2)
    expected = bytes.fromhex(
        "01 00 0300 0200 0400 feffffffffffffff 0123456789abcdef"  # r, flags, u, groups, modules, seed, digest
        "0100 0000 0200 0100"  # module -> row of v, counted from 1
        "803f 0040 00bf 803f 0040 00bf 803f 0040 00bf"  # three sketches in bfloat16
        "0000803f 000000c0 0000003f 00000000 00004040 000080bf"  # v
    )
    assert adapter.text() == encode(expected)
    flagged = replace(adapter, v=adapter.v.bfloat16(), sigma="split", from_paper=False)
    bytes_of_v = bytes.fromhex("803f 00c0 003f 0000 4040 80bf")
    assert flagged.text() == encode(b"\x01\x07" + expected[2:-24] + bytes_of_v)
    assert (
        adapter.text()
        == "tinylora:1.AQADAAIABAD-_________wEjRWeJq83vAQAAAAIAAQCAPwBAAL-APwBAAL-APwBAAL8AAIA_AAAAwAAAAD8AAAAAAABAQAAAgL80XyO234hgyQ"
    )


def test_thirteen_numbers_on_qwen_7b_take_3259_characters() -> None:
    """Sizes of modules do not matter, and their number does: 28 layers of 7."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    base = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=28, num_key_value_heads=2, **sizes))
    adapter = inline_adapter(adapt(base, **{**TILED, "n_tie": 16}))
    assert len(adapter.groups) == 196 and adapter.v.shape == (13, 1)
    assert len(adapter.text()) == 3259
    assert len(replace(adapter, v=adapter.v.bfloat16()).text()) == 3225
    assert 2 * adapter.sketches.numel() == 1960  # bytes, of 2436


def test_a_training_run_is_as_before_and_its_next_text_has_its_next_numbers(base, tokens) -> None:
    model = adapt(base, **TILED, save_basis=True, save_dtype="bfloat16")
    config, logits = model.peft_config["default"], model(tokens).logits
    before = dict(config.__dict__)
    first = inline_adapter(model)
    assert model.peft_config["default"] is config and config.__dict__ == before
    assert torch.equal(model(tokens).logits, logits)
    text = first.text()
    with torch.no_grad():
        model.tinylora_v["default"]["3"] += 1
    second = inline_adapter(model)
    assert first.text() == text != second.text()
    assert (second.v - first.v).nonzero().tolist() == [[3, 0]]


def test_a_failure_leaves_the_config_of_the_model(base, monkeypatch) -> None:
    model = adapt(base, **TILED, save_basis=True)
    config = model.peft_config["default"]
    monkeypatch.setattr(inline, "get_peft_model_state_dict", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inline_adapter(model)
    assert model.peft_config["default"] is config and config.save_basis


def test_one_adapter_of_several_is_meant_by_name(base_folder, base) -> None:
    model = adapt(base, **TILED)
    alone = inline_adapter(model).text()
    model.add_adapter("second", TinyLoraConfig(**{**TILED, "r": 1, "target_modules": ["q_proj"]}))
    fill_vectors(model, 0.3, adapter_name="second")
    second = inline_adapter(model, "second")
    assert inline_adapter(model).text() == alone
    only = get_peft_model(load(base_folder), TinyLoraConfig(**{**TILED, "r": 1, "target_modules": ["q_proj"]}))
    fill_vectors(only, 0.3)
    assert second.text() == inline_adapter(only).text()
    assert len(second.groups) == 28 and second.groups.count(None) == 24


@pytest.mark.parametrize("kind", ["llama", "tied llama", "qwen2", "gpt2", "opt"])
def test_modules_are_numbered_alike_on_the_meta_device_and_below_an_adapter(tmp_path, kind: str) -> None:
    makers = {"llama": make_tiny_llama, "qwen2": qwen2, "gpt2": gpt2, "opt": opt}
    makers["tied llama"] = lambda: make_tiny_llama(tie_word_embeddings=True)
    base = makers[kind]()
    base.save_pretrained(tmp_path)
    names = linear_modules(base)
    assert names and names == linear_modules(skeleton(str(tmp_path)))
    assert not any("embed" in name or "head" in name or "wte" in name for name in names)
    adapted = adapt(base, **{**TILED, "target_modules": [names[0], names[-1]]})
    assert linear_modules(adapted.get_base_model()) == names


def test_the_same_adapter_with_other_numbers() -> None:
    adapter, v = make_small(), torch.arange(6.0).view(2, 3)
    other = adapter.with_vectors(v.double().requires_grad_())
    assert_same(other, make_small(v=v))
    assert_same(adapter, make_small())
    in_bfloat16 = make_small(v=adapter.v.bfloat16()).with_vectors(v + 1 / 1024)
    assert in_bfloat16.v.dtype == torch.bfloat16 and in_bfloat16.v[0, 1] == 1
    with pytest.raises(AdapterFileError, match=r"v has shape \(3, 2\), and this adapter's \(2, 3\)\."):
        adapter.with_vectors(torch.zeros(3, 2))


def test_a_name_is_short_and_that_of_one_text() -> None:
    text = make_small().text()
    expected = f"tinylora:1:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    assert name_of(text) == expected != name_of(make_small(projection_seed=43).text())


def test_a_folder_of_another_base_or_with_an_edited_config_is_refused(made, tmp_path) -> None:
    model, _, _ = made("tiled")
    model.save_pretrained(tmp_path / "adapter")
    message = "belongs to another base model, or its config was edited"
    with pytest.raises(AdapterFileError, match=message):
        inline_adapter_of_folder(tmp_path / "adapter", make_tiny_llama(num_hidden_layers=3))
    rewrite_config(tmp_path / "adapter", n_tie=5)
    with pytest.raises(AdapterFileError, match=message):
        inline_adapter_of_folder(tmp_path / "adapter", make_tiny_llama())
    with pytest.raises(AdapterFileError, match="has no adapter_config.json"):
        (tmp_path / "empty").mkdir()
        inline_adapter_of_folder(tmp_path / "empty", make_tiny_llama())


def test_an_adapter_does_not_change_with_the_tensor_that_it_was_made_of() -> None:
    adapter = make_small()
    v = torch.ones(adapter.v.shape)
    changed = adapter.with_vectors(v)
    text = changed.text()
    v.fill_(3)
    assert changed.text() == text
