"""The cache: hits that are believed and hits that are not, many processes, kills, damage in any byte, and its size."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import IMPORT_PATH, fill_vectors, make_tiny_llama, warm_python
from transformers import LlamaForCausalLM

from peft_tinylora import ConfigError, TinyLoraConfig, basis_cache, build, trouble


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


@pytest.fixture
def base_folder(tmp_path) -> Path:
    """A base model on disk, so that it has a name."""
    make_tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapt(folder: Path, **fields: object) -> PeftModel:
    return get_peft_model(LlamaForCausalLM.from_pretrained(folder), TinyLoraConfig(**{**TILED, **fields}))


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".tinylora_" in name}


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def test_a_second_adapter_is_made_and_loaded_without_computing(base_folder, tokens, tmp_path, computed) -> None:
    first = adapt(base_folder)
    assert len(computed) == 28
    fill_vectors(first, 0.5)
    first.save_pretrained(tmp_path / "adapter")
    computed.clear()
    again = adapt(base_folder, projection_seed=5)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_folder), tmp_path / "adapter")
    assert computed == []
    assert torch.equal(loaded(tokens).logits, first(tokens).logits)
    for name, factor in factors(again).items():
        assert "tinylora_P" in name or torch.equal(factor, factors(first)[name])


def test_a_long_build_shows_its_progress_and_a_short_one_says_nothing(base_folder, monkeypatch, capfd) -> None:
    adapt(base_folder)
    assert "Basis" not in capfd.readouterr().err
    monkeypatch.setattr(build, "SECONDS_UNTIL_PROGRESS", 0)
    adapt(base_folder, r=1)
    said = capfd.readouterr().err
    assert "Basis" in said and "/28" in said


def test_other_settings_have_files_of_their_own(base_folder, basis_cache_folder, computed) -> None:
    adapt(base_folder)
    for fields in ({"r": 1}, {"target_modules": ["q_proj"]}):
        computed.clear()
        adapt(base_folder, **fields)
        assert computed
    assert len(files(basis_cache_folder)) == 3
    computed.clear()
    split = adapt(base_folder, sigma="split")  # the values stand elsewhere, the vectors are the same
    assert computed == []
    plain = get_peft_model(make_tiny_llama(), TinyLoraConfig(**TILED, sigma="split"))
    for name, factor in factors(split).items():
        torch.testing.assert_close(factor, factors(plain)[name])


def test_changed_weights_are_noticed_and_their_basis_replaced(base_folder, computed, caplog) -> None:
    adapt(base_folder)
    base = make_tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 4] += 0.01
        base.model.layers[2].self_attn.q_proj.weight.copy_(torch.randn(32, 32))
    base.save_pretrained(base_folder)
    computed.clear()
    changed = ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
    with caplog.at_level(logging.WARNING):
        model = adapt(base_folder)
    assert computed == changed
    assert "2 of 28 modules have other weights than the kept basis" in caplog.text
    plain = get_peft_model(base, TinyLoraConfig(**TILED))
    assert all(torch.allclose(factor, factors(plain)[name], atol=1e-6) for name, factor in factors(model).items())
    computed.clear()
    adapt(base_folder)
    assert computed == []


def test_a_model_without_a_name_is_not_kept(basis_cache_folder) -> None:
    get_peft_model(make_tiny_llama(), TinyLoraConfig(**TILED))
    assert files(basis_cache_folder) == []


def test_the_cache_can_be_switched_off(base_folder, monkeypatch, computed) -> None:
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", "off")
    adapt(base_folder)
    adapt(base_folder)
    assert len(computed) == 56


def test_damage_in_any_byte_is_detected(base_folder, basis_cache_folder, computed, caplog) -> None:
    adapt(base_folder, target_modules=["k_proj"])
    [path] = files(basis_cache_folder)
    data = path.read_bytes()
    assert basis_cache.is_sound(path)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        assert basis_cache._checked_metadata(bytes(damaged)) is None, position
    for damaged in (data[:-1], data[: len(data) // 2], data[:4], b"", data + b"\0", data * 2):
        path.write_bytes(damaged)
        assert not basis_cache.is_sound(path)
        computed.clear()
        caplog.clear()
        adapt(base_folder, target_modules=["k_proj"])
        assert len(computed) == 4
        assert "is damaged and is not used; it will be written anew" in caplog.text
        assert basis_cache.is_sound(path)


def test_eight_processes_build_one_cache_at_once(base_folder, basis_cache_folder, tokens) -> None:
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from test_basis_cache import TILED, adapt, fill_vectors\n"
        "model = adapt(sys.argv[1]); fill_vectors(model, 0.5)\n"
        "tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))\n"
        "torch.save(model(tokens).logits, sys.argv[2])\n"
    )
    outputs = [base_folder / f"{index}.pt" for index in range(8)]
    running = [subprocess.Popen([*warm_python(), "-c", script, base_folder, output]) for output in outputs]
    assert [process.wait() for process in running] == [0] * 8
    [path] = files(basis_cache_folder)
    assert basis_cache.is_sound(path)
    assert list(path.parent.iterdir()) == [path]
    first, *others = (torch.load(output) for output in outputs)
    assert all(torch.allclose(logits, first, rtol=1e-4, atol=1e-5) for logits in others)


def test_a_killed_writer_leaves_nothing_broken(base_folder, basis_cache_folder, computed) -> None:
    adapt(base_folder)
    [path] = files(basis_cache_folder)
    whole = path.read_bytes()
    script = (  # killed between writing and moving into place
        "import os, signal, sys\n"
        "from peft_tinylora import basis_cache\n"
        "from test_basis_cache import adapt\n"
        "basis_cache.read = lambda path: {}\n"
        "basis_cache.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "adapt(sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, base_folder], env=environment)
    assert done.returncode == -signal.SIGKILL
    [left] = path.parent.glob(".writing-*")
    assert path.read_bytes() == whole
    computed.clear()
    adapt(base_folder)
    assert computed == []
    os.utime(left, (0, time.time() - 2 * trouble.STALE_SECONDS))
    adapt(base_folder, r=1)  # the next to write sweeps it away
    assert not left.exists()


def test_the_least_recently_used_are_removed_and_named(base_folder, basis_cache_folder, monkeypatch, caplog) -> None:
    adapt(base_folder, target_modules=["q_proj"])
    adapt(base_folder, target_modules=["o_proj"])
    first, second = sorted(files(basis_cache_folder), key=lambda path: path.stat().st_mtime)
    os.utime(second, (0, 0))
    adapt(base_folder, target_modules=["q_proj"])  # used again
    monkeypatch.setenv("PEFT_TINYLORA_CACHE_GB", str(2.3 * first.stat().st_size / 1e9))
    with caplog.at_level(logging.WARNING):
        adapt(base_folder, target_modules=["o_proj"], r=1)
    left = files(basis_cache_folder)
    assert first in left and second not in left and len(left) == 2
    assert f"removed {second} from the basis cache to stay under" in caplog.text


@pytest.mark.parametrize("value", ["0", "-1", "nan", "many", "inf"])
def test_a_limit_that_cannot_be_meant_is_refused(monkeypatch, value: str) -> None:
    monkeypatch.setenv("PEFT_TINYLORA_CACHE_GB", value)
    with pytest.raises(ConfigError, match=f"PEFT_TINYLORA_CACHE_GB='{value}': must be a positive number"):
        basis_cache.size_limit_bytes()


def test_a_folder_that_cannot_be_written_costs_a_warning(base_folder, tmp_path, monkeypatch, caplog, computed) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        adapt(base_folder)
    assert len(computed) == 28
    assert "the basis could not be kept in" in caplog.text


def test_a_file_of_another_package_is_not_believed(base_folder, basis_cache_folder, computed) -> None:
    from safetensors.torch import save_file

    adapt(base_folder)
    [path] = files(basis_cache_folder)
    save_file({"model.layers.0.self_attn.q_proj.A": torch.zeros(2, 32)}, path)
    computed.clear()
    adapt(base_folder)
    assert len(computed) == 28


HOSTILE = {
    "no angle": lambda t: t.pop("model.layers.0.self_attn.q_proj.angle"),
    "no factor": lambda t: t.pop("model.layers.0.self_attn.q_proj.B"),
    "angle of another shape": lambda t: t.update({"model.layers.0.self_attn.q_proj.angle": torch.zeros(3)}),
    "factor of another shape": lambda t: t.update({"model.layers.0.self_attn.q_proj.A": torch.zeros(2, 7)}),
    "factors of integers": lambda t: t.update({"model.layers.0.self_attn.q_proj.A": torch.ones(2, 32, dtype=torch.int64)}),
    "NaN": lambda t: t["model.layers.0.self_attn.q_proj.A"].fill_(float("nan")),
    "huge": lambda t: t["model.layers.0.self_attn.q_proj.A"].fill_(1e38),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE)
def test_a_file_that_somebody_made_with_a_right_checksum_is_not_believed(
    base_folder, basis_cache_folder, computed, change: str
) -> None:
    from safetensors.torch import load_file, save

    adapt(base_folder)
    [path] = files(basis_cache_folder)
    tensors = load_file(path)
    HOSTILE[change](tensors)
    path.write_bytes(basis_cache.signed(save(tensors, {"format": "pt", "sha256": "0" * 64})))
    assert basis_cache.is_sound(path)
    computed.clear()
    model = adapt(base_folder)
    assert "model.layers.0.self_attn.q_proj" in computed
    plain = get_peft_model(make_tiny_llama(), TinyLoraConfig(**TILED))
    assert all(torch.allclose(factor, factors(plain)[name], atol=1e-6) for name, factor in factors(model).items())


def test_a_checksum_around_no_safetensors_is_not_believed(base_folder, basis_cache_folder, computed) -> None:
    adapt(base_folder)
    [path] = files(basis_cache_folder)
    header = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"},"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
    path.write_bytes(basis_cache.signed(len(header).to_bytes(8, "little") + header))
    computed.clear()
    adapt(base_folder)
    assert len(computed) == 28


def test_names_say_what_they_are_and_stay_in_the_folder(basis_cache_folder, tmp_path) -> None:
    name = basis_cache.file_name("bnb 4bit nf4", True, [("q", (4, 6), 2)])
    assert name.startswith("r2-bnb-4bit-nf4-")
    assert basis_cache.place("Qwen/Qwen2.5-7B", name) == basis_cache_folder / "Qwen--Qwen2.5-7B" / name
    for hostile in ("../../etc", "/", "..", "a\0b", "x/../../y"):
        place = basis_cache.place(hostile, name)
        assert place.parent.parent == basis_cache_folder and place.parent.name not in ("", ".", "..")
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    assert basis_cache.place(str(tmp_path / "x"), name) != basis_cache.place(str(tmp_path / "y"), name)


def test_list_and_clear(base_folder, basis_cache_folder) -> None:
    adapt(base_folder)
    [entry] = basis_cache.entries()
    assert entry.metadata["base"] == base_folder.name  # not where it is on this machine: the file may be pushed
    assert (entry.metadata["weights"], entry.metadata["r"], entry.metadata["modules"]) == ("float", "2", "28")
    assert basis_cache.clear("another/model") == []
    assert basis_cache.clear(str(base_folder)) == [entry.path]
    assert basis_cache.entries() == []
