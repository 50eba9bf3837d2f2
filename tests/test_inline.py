"""inline.py: a live adapter, its folder and the text are one; what a text cannot carry; text from a stranger."""

import base64
import hashlib
import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from exported import TILED, gpt2, load, opt, qwen2
from peft import LoraConfig, PeftModel, get_peft_model
from quantized import BACKENDS
from support import fill_vectors, make_tiny_llama
from test_compact import degenerate, rewrite_config
from test_experts import EXPERTS
from test_experts import make as make_experts
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


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny_llama().save_pretrained(folder)
    return folder


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


OF_64 = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}  # a block of bitsandbytes has 64


def nf4(folder: Path, **fields: object) -> PeftModel:
    make_tiny_llama(**OF_64).save_pretrained(folder)
    return adapt(BACKENDS["bnb-nf4"](folder), **TILED, **fields)


def with_weight(kind: str) -> torch.nn.Module:
    model = make_tiny_llama()
    model.model.layers[1].self_attn.q_proj.weight.data = degenerate(kind)
    return model


Q_PROJ = {**TILED, "target_modules": ["q_proj"]}
TO_LORA = "Serve it as a LoRA: `peft-tinylora export ADAPTER FOLDER --to lora`"
REFUSED: dict[str, tuple[Callable[[Path, Path], PeftModel], str]] = {
    "modules saved whole": (
        lambda base, _: adapt(load(base), **TILED, modules_to_save=["lm_head"]),
        rf"more than v: it has 1 other tensors, such as '.*lm_head\.weight'.*{TO_LORA}",
    ),
    "biases": (
        lambda base, _: adapt(make_tiny_llama(attention_bias=True), **Q_PROJ, bias="all"),
        rf"more than v: it has 16 other tensors, such as '.*bias'.*{TO_LORA}",
    ),
    "tokens": (
        lambda base, _: adapt(load(base), **TILED, trainable_token_indices=[1, 2]),
        rf"more than v: .*embed_tokens.*{TO_LORA}",
    ),
    "factors that the base does not determine": (
        lambda base, _: adapt(with_weight("orthogonal"), **Q_PROJ),
        rf"2 other tensors, such as '.*layers\.1\.self_attn\.q_proj\.tinylora_A'.*{TO_LORA}",
    ),
    "a projection that is not the seed's": (
        lambda base, _: with_other_projection(adapt(load(base), **TILED)),
        rf"1 other tensors, such as '.*layers\.2\.mlp\.up_proj\.tinylora_P'.*{TO_LORA}",
    ),
    "4 bit": (
        lambda _, folder: nf4(folder),
        "basis is that of bnb 4bit nf4 weights, which the checkpoint of the base model does not hold. Train it with "
        "basis='full-precision'.*--tinylora_basis full-precision.*--to lora`",
    ),
    "experts": (
        lambda base, _: adapt(make_experts("mixtral"), **LINEAR, tie="none", target_parameters=EXPERTS),
        rf"adapts 'model\.layers\.0\.mlp\.experts\.0\.down_proj', and a request carries adapters of linear modules.*{TO_LORA}",
    ),
    "an embedding": (
        lambda base, _: adapt(load(base), **{**TILED, "target_modules": ["embed_tokens", "q_proj"]}),
        rf"adapts 'model\.embed_tokens'.*{TO_LORA}",
    ),
    "an output layer": (
        lambda base, _: adapt(load(base), **{**TILED, "target_modules": ["lm_head", "q_proj"]}),
        rf"adapts 'lm_head'.*{TO_LORA}",
    ),
    "a rank above 255": (
        lambda base, _: adapt(
            make_tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=4),
            **{**Q_PROJ, "r": 256},
        ),
        "too large for a request: r=256, u=1, 1 groups, 7 modules",
    ),
    "more numbers than 16 bits count": (
        lambda base, _: adapt(make_tiny_llama(num_hidden_layers=1), **{**TILED, "u": 65536, "target_modules": ["q_proj"]}),
        "too large for a request: r=2, u=65536, 1 groups, 7 modules",
    ),
    "a config of stock PEFT": (
        lambda base, _: get_peft_model(load(base), peft.TinyLoraConfig(r=2, u=1, target_modules=["q_proj"])),
        "adapter 'default' is no TinyLoRA of peft_tinylora",
    ),
    "a LoRA": (
        lambda base, _: get_peft_model(load(base), LoraConfig(target_modules=["q_proj"])),
        "adapter 'default' is no TinyLoRA of peft_tinylora",
    ),
    "a base without weights": (
        lambda base, _: adapt(skeleton(str(base)), **TILED),
        r"factors of module 'model\.layers\.0\.self_attn\.q_proj' cannot be described: .*Load the base model's weights",
    ),
}  # fmt: skip


def with_other_projection(model: PeftModel) -> PeftModel:
    model.get_base_model().model.layers[2].mlp.up_proj.tinylora_P["default"].mul_(1.5)
    return model


@pytest.mark.filterwarnings("ignore:u=65536 numbers are trained:UserWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_request_cannot_carry_is_refused_with_a_remedy(base_folder, tmp_path, what: str) -> None:
    make, message = REFUSED[what]
    model = make(base_folder, tmp_path)
    config = model.peft_config["default"]
    with pytest.raises(AdapterFileError, match=message):
        inline_adapter(model)
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_a_weight_of_small_rank_needs_no_more_than_v(kind: str) -> None:
    adapter = inline_adapter(adapt(with_weight(kind), **Q_PROJ))
    assert_same(parse_inline(adapter.text(), MOST), adapter)


def test_a_4bit_base_with_the_original_basis_has_the_text_of_the_float_base(tmp_path) -> None:
    quantized = inline_adapter(nf4(tmp_path, basis="full-precision"))
    assert quantized.text() == inline_adapter(adapt(load(tmp_path), **TILED)).text()


def test_a_folder_that_holds_more_than_v_is_refused_with_a_remedy(base_folder, tmp_path) -> None:
    model = adapt(load(base_folder), **TILED, save_basis=True)
    model.save_pretrained(tmp_path / "portable")
    with pytest.raises(AdapterFileError, match="holds its frozen factors too.*export .*/portable FOLDER --to compact"):
        inline_adapter_of_folder(tmp_path / "portable", skeleton(str(base_folder)))
    REFUSED["modules saved whole"][0](base_folder, tmp_path).save_pretrained(tmp_path / "whole")
    with pytest.raises(AdapterFileError, match=f"more than v.*{TO_LORA}"):
        inline_adapter_of_folder(tmp_path / "whole", skeleton(str(base_folder)))


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


def test_an_adapter_does_not_change_with_the_tensor_that_it_was_made_of() -> None:
    adapter = make_small()
    v = torch.ones(adapter.v.shape)
    changed = adapter.with_vectors(v)
    text = changed.text()
    v.fill_(3)
    assert changed.text() == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_no_server_takes_are_not_sent(value: float) -> None:
    adapter = make_small()
    with pytest.raises(AdapterFileError, match="v holds NaN or Inf: the training diverged"):
        adapter.with_vectors(torch.full(adapter.v.shape, value, dtype=torch.float64))


def test_an_adapter_that_is_not_there_is_named() -> None:
    model = get_peft_model(
        make_tiny_llama(), TinyLoraConfig(target_modules="all-linear", tie="full", task_type="CAUSAL_LM")
    )
    with pytest.raises(AdapterFileError, match=r"adapter 'nobody' is .* not there, only \['default'\]"):
        inline_adapter(model, "nobody")
