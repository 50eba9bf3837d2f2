"""Many adapters over one basis: as a dictionary, from files, and in mixed batches."""

import copy
import doctest
import importlib
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantized import BACKENDS
from safetensors.torch import load_file, save_file
from support import fill_vectors

from peft_tinylora import AdapterBank, AdapterFileError, BasisMismatchError, ConfigError, TinyLoraConfig
from peft_tinylora.fingerprint import digest_of_tensor


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}
STRUCTURED = {**TILED, "tie": "structured", "n_tie": 2}  # its groups are not made in the order of their numbers


@pytest.fixture
def model(tiny_llama):
    return get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).eval()


def numbers(seed: int, groups: int = 7, u: int = 1) -> torch.Tensor:
    return 0.5 * torch.randn(groups, u, generator=torch.Generator().manual_seed(seed))


def logits_with(model: torch.nn.Module, tokens: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Logits of the model's own adapter, with v (groups, u) in the order of its file."""
    vectors = model.tinylora_v["default"]
    with torch.no_grad():
        for group, value in zip(sorted(vectors, key=int), v, strict=True):
            vectors[group].copy_(value)
        return model(tokens).logits


@pytest.mark.parametrize("config", [TILED, STRUCTURED, {**TILED, "u": 3}])
def test_every_row_of_a_batch_has_an_adapter_of_the_bank(tiny_llama, config: dict) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**config)).eval()
    groups = len(model.tinylora_v["default"])
    bank = AdapterBank(model)
    for seed in range(30):
        bank[f"user {seed}"] = numbers(seed, groups, config["u"])
    tokens = torch.randint(1, 48, (8, 10))
    names = [f"user {seed}" for seed in (29, 0, 7, 7, 3)] + ["__base__", "default", "user 1"]
    fill_vectors(model, 0.4)
    with torch.no_grad():
        mixed = model(tokens, adapter_names=names).logits
        own = model(tokens[6:7]).logits
    with model.disable_adapter():
        assert torch.equal(mixed[5], model(tokens).logits[5])
    torch.testing.assert_close(mixed[6:7], own, rtol=1e-4, atol=1e-5)
    for row in (0, 1, 2, 3, 4, 7):
        expected = logits_with(model, tokens[row : row + 1], bank[names[row]])
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_the_example_of_its_docstring() -> None:
    done = doctest.testmod(importlib.import_module("peft_tinylora.bank"))
    assert done.attempted > 10 and not done.failed


def test_it_is_a_dictionary_of_copies(model) -> None:
    bank = AdapterBank(model)
    bank.update({"a": numbers(1), "b": numbers(2)})
    assert list(bank) == ["a", "b"] and len(bank) == 2 and "a" in bank and "c" not in bank
    bank["mean"] = (bank["a"] + bank["b"]) / 2
    torch.testing.assert_close(bank["mean"], (numbers(1) + numbers(2)) / 2)
    bank["a"].zero_()
    assert torch.equal(bank["a"], numbers(1))
    bank["a"] = numbers(3)
    assert torch.equal(bank.pop("a"), numbers(3)) and "a" not in bank
    with pytest.raises(KeyError, match="'a'"):
        bank["a"]
    with pytest.raises(KeyError, match="'a'"):
        del bank["a"]


def test_rows_are_found_again_whatever_was_added_and_removed(model) -> None:
    bank, expected, generator = AdapterBank(model), {}, torch.Generator().manual_seed(0)
    for step in range(600):
        name = f"user {torch.randint(60, (), generator=generator)}"
        if name in expected and step % 3:
            del bank[name], expected[name]
        else:
            bank[name] = expected[name] = numbers(step)
    assert set(bank) == set(expected)
    assert all(torch.equal(bank[name], v) for name, v in expected.items())
    assert len(bank._held[0]) <= 4 * 60  # what was removed gives its place back


def test_serving_goes_on_while_adapters_come_and_go(model, tokens) -> None:
    bank = AdapterBank(model)
    bank.update({"kept": numbers(0), "replaced": numbers(1)})
    wanted = [logits_with(model, tokens[:1], numbers(seed)) for seed in (0, 1, 2)]
    stop, failures = threading.Event(), []

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            bank[f"user {step % 50}"] = numbers(step)
            bank["replaced"] = numbers(1 + step % 2)
            bank.pop(f"user {(step * 7) % 50}", None)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            with torch.no_grad():
                one, other = model(tokens[[0, 0]], adapter_names=["kept", "replaced"]).logits[:, None]
            is_one_of_both = any(torch.allclose(other, v, rtol=1e-4, atol=1e-5) for v in wanted[1:])
            if not (torch.allclose(one, wanted[0], rtol=1e-4, atol=1e-5) and is_one_of_both):
                failures.append(1)
    finally:
        stop.set()
        writer.join()
    assert not failures


def saved(tiny_llama, folder: Path, seed: int, base_seed: int = 0, **fields: object) -> Path:
    """A folder with an adapter as training leaves it."""
    model = get_peft_model(tiny_llama(base_seed), TinyLoraConfig(**{**TILED, **fields}))
    fill_vectors(model, 0.5, seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", [{}, {"save_dtype": "bfloat16"}])
def test_load_is_the_adapter_that_was_trained(tiny_llama, tokens, tmp_path, model, fields: dict) -> None:
    bank = AdapterBank(model)
    bank.load(saved(tiny_llama, tmp_path / "gsm8k", 5, **fields))
    bank.load(tmp_path / "gsm8k", name="again")
    model.load_adapter(tmp_path / "gsm8k", "by_peft")
    model.set_adapter("by_peft")
    with torch.no_grad():
        expected = model(tokens).logits
        got = model(tokens, adapter_names=["gsm8k", "again", "by_peft"]).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_load_folder_takes_all_or_none(tiny_llama, tmp_path, model) -> None:
    for seed in range(3):
        saved(tiny_llama, tmp_path / f"user{seed}", seed)
    (tmp_path / "notes").mkdir()
    bank = AdapterBank(model)
    assert bank.load_folder(tmp_path) == ["user0", "user1", "user2"] == list(bank)
    saved(tiny_llama, tmp_path / "user2b", 9, base_seed=1)
    other = AdapterBank(get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)))
    with pytest.raises(
        BasisMismatchError,
        match="user2b was trained with another basis or projection than adapter 'default' has: module 'model",
    ):
        other.load_folder(tmp_path)
    assert len(other) == 0
    shutil.rmtree(tmp_path / "user2b")
    broken = saved(tiny_llama, tmp_path / "user3", 9)
    config, v = json.loads((broken / "adapter_config.json").read_text()), torch.full((7, 1), float("nan"))
    config["fingerprint"]["v"] = digest_of_tensor(v)
    (broken / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.tinylora_v": v}, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"bank\['user3'\]: v holds NaN"):
        other.load_folder(tmp_path)
    assert len(other) == 0
    with pytest.raises(AdapterFileError, match="has no folders with an adapter_config.json"):
        other.load_folder(tmp_path / "notes")


OTHERS = {
    "another base": (BasisMismatchError, {"base_seed": 1}, "was trained with another basis or projection than adapter 'default' has: module '.*' differs by"),
    "another seed": (BasisMismatchError, {"projection_seed": 1}, "was trained with another basis or projection than adapter 'default' has: module"),
    "another tying": (AdapterFileError, {"n_tie": 2}, "do not share numbers as those do"),
    "other modules": (AdapterFileError, {"target_modules": ["q_proj", "up_proj"]}, "its modules are not those of"),
    "another rank": (AdapterFileError, {"r": 3}, "The fingerprint in adapter_config.json has"),
    "more numbers": (ValueError, {"u": 2}, "projection"),
    "portable": (AdapterFileError, {"save_basis": True}, "is not in the compact form, .*`peft-tinylora export --to compact`"),
    "modules saved whole": (AdapterFileError, {"modules_to_save": ["lm_head"]}, r"has more than v \(.*lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_adapters_that_do_not_fit_are_refused(tiny_llama, tmp_path, model, other: str) -> None:
    error, fields, message = OTHERS[other]
    if "modules_to_save" in fields:
        fields = {**fields, "target_modules": r".*_proj"}
    folder = saved(tiny_llama, tmp_path / "one", 5, **fields)
    bank = AdapterBank(model)
    with pytest.raises(error, match=message):
        bank.load(folder)
    assert len(bank) == 0


def test_damaged_and_foreign_files_are_refused(tiny_llama, tmp_path, model) -> None:
    bank = AdapterBank(model)
    good = saved(tiny_llama, tmp_path / "good", 5)

    def changed(name: str, change) -> Path:
        folder = shutil.copytree(good, tmp_path / name)
        change(folder)
        return folder

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.tinylora_v"][0, 0] += 1
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def cut(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-3])

    def unprinted(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["fingerprint"] = None
        (folder / "adapter_config.json").write_text(json.dumps(config))

    for name, change, message in [
        ("edited", edit, "are not those that adapter_config.json was saved with"),
        ("cut", cut, "is cut short or damaged"),
        ("unprinted", unprinted, "has no whole `fingerprint`"),
    ]:
        with pytest.raises(AdapterFileError, match=message):
            bank.load(changed(name, change))
    get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="is a LORA adapter"):
        bank.load(tmp_path / "lora")
    assert len(bank) == 0


def test_a_changed_basis_is_compared_again(tiny_llama, tmp_path, model) -> None:
    bank = AdapterBank(model)
    folder = saved(tiny_llama, tmp_path / "one", 5)
    bank.load(folder)
    model.base_model.model.model.layers[1].mlp.up_proj.tinylora_B["default"].mul_(1.5)
    with pytest.raises(
        BasisMismatchError,
        match=r"has other factors or another projection than .* module 'model\.layers\.1\.mlp\.up_proj'",
    ):
        bank.load(folder, name="two")
    with pytest.raises(
        BasisMismatchError, match="has other factors or another projection than when the bank was opened"
    ):
        model(torch.ones(1, 3, dtype=torch.long), adapter_names=["one"])


def test_a_projection_of_nan_is_refused(model, tokens) -> None:
    bank = AdapterBank(model)
    bank["a"] = numbers(1)
    model.base_model.model.model.layers[1].mlp.up_proj.tinylora_P["default"].fill_(float("nan"))
    with pytest.raises(BasisMismatchError, match="differs by .* and nan"):
        model(tokens, adapter_names=["a"] * 3)


def test_bad_values_are_named(tiny_llama, model) -> None:
    bank = AdapterBank(model)
    model.add_adapter("second", TinyLoraConfig(**TILED))
    other = AdapterBank(model, "second")
    other["theirs"] = numbers(0)
    for name, v, message in [
        (
            "a",
            torch.zeros(7),
            r"bank\['a'\]: v is a tensor of shape \(7, 1\), as adapter 'default' has, and not of shape \(7,\)",
        ),
        ("a", torch.zeros(6, 1), r"and not of shape \(6, 1\), torch.float32"),
        ("a", torch.full((7, 1), float("nan")), r"bank\['a'\]: v holds NaN or Inf"),
        ("a", numbers(0).to(torch.complex64), r"and not of shape \(7, 1\), torch.complex64"),
        ("a", torch.full((7, 1), 1e300, dtype=torch.float64), "NaN or Inf, or numbers that torch.float32 cannot hold"),
        ("a", [0.0] * 7, r"and not of type list"),
        (7, numbers(0), r"bank\[7\]: the name of an adapter is a string"),
        ("__base__", numbers(0), "'__base__' is PEFT's name for no adapter"),
        ("second", numbers(0), "'second' is the name of another adapter of the model"),
        ("theirs", numbers(0), "'theirs' is the name of another adapter of the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            bank[name] = v
    assert len(bank) == 0
    with pytest.raises(ConfigError, match="the model has a bank over 'default' already"):
        AdapterBank(model)
    with pytest.raises(ConfigError, match="the model has no TinyLoRA adapter of that name"):
        AdapterBank(model, "third")
    with pytest.raises(ConfigError, match="the model has no TinyLoRA adapter of that name"):
        AdapterBank(get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")))
    with pytest.raises(ConfigError, match=r"trains more than v \(modules_to_save="):
        AdapterBank(
            get_peft_model(
                tiny_llama(), TinyLoraConfig(**{**TILED, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"])
            )
        )


def test_an_adapter_of_the_model_cannot_take_a_name_of_a_bank(model) -> None:
    AdapterBank(model)["ada"] = numbers(0)
    with pytest.raises(ConfigError, match="adapter_name='ada': a bank of the model has an adapter of that name"):
        model.add_adapter("ada", TinyLoraConfig(**TILED))
    assert list(model.peft_config) == ["default"]


def test_banks_over_two_adapters_of_one_basis_go_together(model, tokens) -> None:
    model.add_adapter("second", TinyLoraConfig(**TILED))
    AdapterBank(model)["a"] = numbers(1)
    AdapterBank(model, "second")["b"] = numbers(2)
    with torch.no_grad():
        mixed = model(tokens, adapter_names=["a", "b", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], logits_with(model, tokens[:1], numbers(1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1:2], logits_with(model, tokens[1:2], numbers(2)), rtol=1e-4, atol=1e-5)


def test_a_bank_goes_with_its_adapter(model, tokens) -> None:
    model.add_adapter("second", TinyLoraConfig(**TILED))
    bank = AdapterBank(model, "second")
    bank["a"] = numbers(1)
    twin = copy.deepcopy(model)
    assert list(twin.tinylora_v.adapter_banks["second"]) == ["a"]
    bank["b"] = numbers(2)
    assert list(twin.tinylora_v.adapter_banks["second"]) == ["a"]
    model.delete_adapter("second")
    with pytest.raises(ValueError, match="unknown adapters: 'a'"):
        model(tokens, adapter_names=["a", "default", "default"])
    AdapterBank(model)["a"] = numbers(1)
    model(tokens, adapter_names=["a", "default", "default"])


def test_a_bank_that_grew_in_inference_mode_is_written_to_outside(model, tokens) -> None:
    with torch.inference_mode():
        bank = AdapterBank(model)
        bank.update({f"user {i}": numbers(i) for i in range(20)})
        model(tokens, adapter_names=["user 1", "__base__", "user 2"])
    bank["more"] = numbers(3)
    model(tokens, adapter_names=["user 1", "more", "user 2"])


def test_a_bank_goes_on_after_its_model_was_moved(model, tokens) -> None:
    bank = AdapterBank(model)
    bank["a"] = numbers(1)
    before = model(tokens, adapter_names=["a"] * 3).logits
    after = model.double()(tokens, adapter_names=["a"] * 3).logits
    torch.testing.assert_close(after.float(), before, rtol=1e-3, atol=1e-4)


def test_a_bank_is_not_copied_without_its_model_and_not_used_after_it(model) -> None:
    bank = AdapterBank(model)
    with pytest.raises(TypeError, match=r"copy the model, or take dict\(bank\)"):
        copy.copy(bank)
    model.add_adapter("second", TinyLoraConfig(**TILED))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter 'default', which the bank was over, was deleted"):
        bank["a"] = numbers(0)


def test_unknown_names_say_how_many_are_held(model, tokens) -> None:
    bank = AdapterBank(model)
    bank.update({f"user {i}": numbers(i) for i in range(20)})
    with pytest.raises(ValueError, match=r"unknown adapters: 'user 20'\. The model has 'default', and 20 in banks"):
        model(tokens, adapter_names=["user 1", "user 20", "__base__"])


def test_on_a_4bit_base(tiny_llama, tokens, tmp_path) -> None:
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = BACKENDS["bnb-nf4"](tmp_path)
    model = get_peft_model(base, TinyLoraConfig(**TILED)).eval()
    bank = AdapterBank(model)
    bank.update({"a": numbers(1), "b": numbers(2)})
    with torch.no_grad():
        mixed = model(tokens, adapter_names=["a", "b", "__base__"]).logits
    torch.testing.assert_close(mixed[:1], logits_with(model, tokens[:1], numbers(1)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mixed[1:2], logits_with(model, tokens[1:2], numbers(2)), rtol=1e-3, atol=1e-4)
