"""The compact form: how small it is, what is refused, and factors that the base does not determine."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import fill_vectors, make_tiny_llama, run_python_process

from peft_tinylora import AdapterFileError, BasisMismatchError, TinyLoraConfig, TinyLoraLayer, compact


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


def make_thirteen() -> torch.nn.Module:
    """A model of 49 linear modules, of which every 4 share a number: 13."""
    return make_tiny_llama(num_hidden_layers=7)


@pytest.fixture
def saved(tiny_llama, tokens, tmp_path) -> tuple[Path, torch.Tensor]:
    """Folder of a trained adapter, and its logits."""
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(tokens).logits


def rewrite_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite_fingerprint(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["fingerprint"] |= fields
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("dtype", "payload_bytes", "most_file_bytes"), [("float32", 52, 180), ("bfloat16", 26, 160)])
def test_thirteen_numbers_take_26_bytes(
    tokens, tmp_path, dtype: str, payload_bytes: int, most_file_bytes: int
) -> None:
    model = get_peft_model(make_thirteen(), TinyLoraConfig(**TILED, save_dtype=dtype))
    fill_vectors(model, 0.05)
    model.save_pretrained(tmp_path)
    [(name, v)] = load_file(tmp_path / "adapter_model.safetensors").items()
    assert (name, v.shape, str(v.dtype)) == ("base_model.tinylora_v", (13, 1), f"torch.{dtype}")
    assert v.numel() * v.element_size() == payload_bytes
    assert os.path.getsize(tmp_path / "adapter_model.safetensors") <= most_file_bytes
    loaded = PeftModel.from_pretrained(make_thirteen(), tmp_path)
    expected = torch.cat([v.detach() for v in model.tinylora_v["default"].values()]).to(getattr(torch, dtype))
    found = torch.cat([v.detach() for v in loaded.tinylora_v["default"].values()])
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())


def test_the_bytes_of_a_file_are_these(tmp_path) -> None:
    """The golden file of docs/format.md: 13 bfloat16 numbers."""
    model = get_peft_model(make_thirteen(), TinyLoraConfig(**TILED, save_dtype="bfloat16"))
    with torch.no_grad():
        for index, v in enumerate(model.tinylora_v["default"].values()):
            v.fill_(index / 8)
    model.save_pretrained(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = b'{"__metadata__":{"format":"pt"},"base_model.tinylora_v":{"dtype":"BF16","shape":[13,1],"data_offsets":[0,26]}}'
    assert len(data) == 146
    assert data[:8] == (112).to_bytes(8, "little") and data[8:120].rstrip(b" ") == header
    assert data[120:].hex() == "0000003e803ec03e003f203f403f603f803f903fa03fb03fc03f"


def test_a_process_with_other_threads_rebuilds_the_same_function(tokens, saved) -> None:
    folder, logits = saved
    script = """
        import sys, torch
        torch.set_num_threads(int(sys.argv[1]))
        import peft_tinylora
        from peft import PeftModel
        from support import make_tiny_llama
        tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
        torch.save(PeftModel.from_pretrained(make_tiny_llama(), sys.argv[2])(tokens).logits, sys.argv[3])
    """
    for threads in (1, 8):
        run_python_process(script, threads, folder, folder / f"{threads}.pt")
        torch.testing.assert_close(torch.load(folder / f"{threads}.pt"), logits, rtol=1e-4, atol=1e-5)


REFUSED = {
    "another seed": (lambda f: rewrite_config(f, projection_seed=43), "projection of module 'model.layers.0.self_attn.q_proj'.*projection_seed=43"),
    "as many groups in another way": (lambda f: rewrite_config(f, tie="structured"), "`tie`, `n_tie`, `weight_tying` or `target_modules` was edited"),
    "finer groups": (lambda f: rewrite_config(f, n_tie=2), "7 missing"),
    "another sigma": (lambda f: rewrite_config(f, sigma="split"), "another basis than that of this base model"),
    "another u": (lambda f: rewrite_config(f, u=2), r"tinylora_v has shape \(7, 1\), and u=2 asks for \(groups, 2\)"),
    "another r": (lambda f: rewrite_config(f, r=1), "has 140 numbers, and the 28 modules .* need 84"),
    "fewer modules": (lambda f: rewrite_config(f, target_modules=["q_proj"]), "that the adapter does not have|missing"),
    "a newer format": (lambda f: rewrite_config(f, format_version=2), "format_version=2 .*this version reads 1.*pip install -U peft-tinylora"),
    "no fingerprint": (lambda f: rewrite_config(f, fingerprint=None), "no whole `fingerprint`"),
    "fingerprint of another type": (lambda f: rewrite_config(f, fingerprint=[1, 2]), r"fingerprint=\[1, 2\] in adapter_config.json: must be dict"),
    "half a fingerprint": (lambda f: rewrite_fingerprint(f, modules=None), "fingerprint=.* must be dict"),
    "garbled fingerprint": (lambda f: rewrite_fingerprint(f, modules="?"), "is no base64"),
    "other weights by name": (lambda f: rewrite_fingerprint(f, weights="bnb 4bit nf4"), "is that of bnb 4bit nf4 weights.*float here"),
    "v of another save": (lambda f: save_file({"base_model.tinylora_v": torch.ones(7, 1)}, f / "adapter_model.safetensors"), "not those that adapter_config.json was saved with"),
    "v is NaN": (lambda f: save_v(f, torch.full((7, 1), float("nan"))), r"7 with NaN or Inf \(tinylora_v"),
    "a group too many": (lambda f: save_v(f, torch.ones(8, 1)), r"1 that the adapter does not have \(tinylora_v\.7\)"),
    "no tensor": (lambda f: save_file({}, f / "adapter_model.safetensors"), "missing"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-3]), "is cut short or damaged"),
}  # fmt: skip


def save_v(folder: Path, v: torch.Tensor) -> None:
    """Another v, with the digest to go with it."""
    save_file({"base_model.tinylora_v": v}, folder / "adapter_model.safetensors")
    rewrite_fingerprint(folder, v=compact.fingerprint.digest_of_tensor(v))


@pytest.mark.parametrize("change", REFUSED)
def test_a_file_that_does_not_fit_is_refused_and_the_base_is_as_before(tiny_llama, tokens, saved, change) -> None:
    folder, logits = saved
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    mutate, message = REFUSED[change]
    mutate(folder)
    base = tiny_llama()
    before = base(tokens).logits
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    assert torch.equal(base(tokens).logits, before)
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    assert torch.equal(PeftModel.from_pretrained(base, folder)(tokens).logits, logits)


@pytest.mark.parametrize("change", REFUSED)
def test_transformers_own_load_adapter_refuses_the_same(tiny_llama, tokens, saved, change) -> None:
    folder, logits = saved
    base = tiny_llama()
    before = base(tokens).logits
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    REFUSED[change][0](folder)
    with pytest.raises(AdapterFileError):
        base.load_adapter(folder)
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    assert torch.equal(base(tokens).logits, before)
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    base.load_adapter(folder)
    assert torch.equal(base(tokens).logits, logits)


@pytest.mark.parametrize("change", [name for name in REFUSED if name not in ("fewer modules", "no tensor")])
def test_a_second_adapter_is_compared_with_its_own_file(tiny_llama, tokens, saved, tmp_path, change) -> None:
    """Also where the first one has the same settings, whose factors it would share."""
    folder, logits = saved
    first = shutil.copytree(folder, tmp_path / "first")
    REFUSED[change][0](folder)
    model = PeftModel.from_pretrained(tiny_llama(), first)
    with pytest.raises(AdapterFileError, match=REFUSED[change][1]):
        model.load_adapter(folder, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(tokens).logits, logits)


def test_a_second_adapter_of_another_base_is_refused_though_its_settings_are_the_same(tiny_llama, saved, tmp_path):
    other = get_peft_model(tiny_llama(seed=1), TinyLoraConfig(**TILED))
    fill_vectors(other, 0.5)
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(tiny_llama(), saved[0])
    with pytest.raises(BasisMismatchError, match="another basis than that of this base model"):
        model.load_adapter(tmp_path / "other", adapter_name="other")


def test_a_run_that_resumes_reads_the_config_beside_its_checkpoint(tiny_llama, tokens, saved, tmp_path) -> None:
    folder, _ = saved
    run = get_peft_model(tiny_llama(), TinyLoraConfig.from_pretrained(folder))  # settings reused, numbers started anew
    fill_vectors(run, 0.1, seed=3)
    run.save_pretrained(tmp_path / "checkpoint")
    again = get_peft_model(tiny_llama(), TinyLoraConfig.from_pretrained(folder))
    again.load_adapter(tmp_path / "checkpoint", adapter_name="default", is_trainable=True)
    assert torch.equal(again(tokens).logits, run(tokens).logits)
    seeded = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED, projection_seed=5))
    with pytest.raises(AdapterFileError, match="projection_seed=5, r or u is not what it was saved with"):
        seeded.load_adapter(tmp_path / "checkpoint", adapter_name="default", is_trainable=True)
    shutil.copy(folder / "adapter_model.safetensors", tmp_path / "checkpoint")
    with pytest.raises(AdapterFileError, match="not those that adapter_config.json was saved with"):
        again.load_adapter(tmp_path / "checkpoint", adapter_name="default", is_trainable=True)
    assert torch.equal(again(tokens).logits, run(tokens).logits)


def test_another_base_is_refused_unless_it_is_asked_for(tiny_llama, saved) -> None:
    folder, _ = saved
    message = r"module 'model\.layers\.0\.self_attn\.q_proj' differs by .*set basis='unchecked'"
    with pytest.raises(BasisMismatchError, match=message):
        PeftModel.from_pretrained(tiny_llama(seed=1), folder)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(tiny_llama(num_hidden_layers=3), folder)
    config = peft.PeftConfig.from_pretrained(folder)
    config.basis = "unchecked"
    with pytest.warns(
        UserWarning,
        match="another basis than that of this base model: 28 of 28 modules differ, most of all.*The update is another one",
    ):
        PeftModel.from_pretrained(tiny_llama(seed=1), folder, config=config)


def test_a_change_of_one_weight_is_noticed_and_named(tiny_llama, saved) -> None:
    folder, _ = saved
    base = tiny_llama()
    with torch.no_grad():
        weight = base.model.layers[2].mlp.up_proj.weight
        weight += 0.1 * weight.std() * torch.randn_like(weight)
    with pytest.raises(BasisMismatchError, match=r"module 'model\.layers\.2\.mlp\.up_proj' differs by"):
        PeftModel.from_pretrained(base, folder)


def test_same_values_in_bfloat16_are_the_same_base(tiny_llama, tokens, tmp_path) -> None:
    bf16 = tiny_llama().bfloat16()
    model = get_peft_model(bf16, TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path)
    as_float = PeftModel.from_pretrained(tiny_llama().bfloat16().float(), tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, TinyLoraLayer):
            A = as_float.get_submodule(name).tinylora_A["default"]
            torch.testing.assert_close(A, module.tinylora_A["default"], rtol=0, atol=1e-5)


def degenerate(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    u, v = torch.randn(2, 32, generator=generator)
    return {"orthogonal": Q, "zero": torch.zeros(32, 32), "rank one": torch.outer(u, v)}[kind]


@pytest.mark.parametrize(("kind", "is_carried"), [("orthogonal", True), ("zero", False), ("rank one", False)])
def test_factors_that_the_base_does_not_determine_are_in_the_file(
    tiny_llama, tokens, tmp_path, kind, is_carried
) -> None:
    def base() -> torch.nn.Module:
        model = tiny_llama()
        model.model.layers[1].self_attn.q_proj.weight.data = degenerate(kind)
        return model

    model = get_peft_model(base(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "first")
    q = "base_model.model.model.layers.1.self_attn.q_proj.tinylora_"
    carried = load_file(tmp_path / "first" / "adapter_model.safetensors").keys() - {"base_model.tinylora_v"}
    assert carried == ({f"{q}A", f"{q}B"} if is_carried else set())
    loaded = PeftModel.from_pretrained(base(), tmp_path / "first")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path / "second")  # and stay there
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    if is_carried:
        with pytest.raises(BasisMismatchError):
            PeftModel.from_pretrained(tiny_llama(), tmp_path / "first")
        file = tmp_path / "first" / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {f"{q}A": tensors[f"{q}A"].flip(0), f"{q}B": tensors[f"{q}B"].flip(1)}, file)
        with pytest.raises(
            AdapterFileError, match="factors of module 'model.layers.1.self_attn.q_proj' in the adapter"
        ):
            PeftModel.from_pretrained(base(), tmp_path / "first")


def test_a_checkpoint_of_a_trainer_is_small_and_resumes_to_the_bit(tiny_llama, tokens, tmp_path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens.repeat(4, 1)]

    def train(resume: bool) -> torch.Tensor:
        model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, save_steps=2, learning_rate=0.05, use_cpu=True, report_to="none",
            per_device_train_batch_size=3, disable_tqdm=True, logging_steps=100, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True,
        )  # fmt: skip
        data = Dataset.from_list(rows)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        return torch.cat([v.detach() for v in model.tinylora_v["default"].values()])

    whole = train(resume=False)
    checkpoint = tmp_path / "checkpoint-4"
    adapter_bytes = sum(file.stat().st_size for file in checkpoint.glob("adapter_*"))
    assert adapter_bytes < 4000  # v, and the sketch of 28 modules
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert torch.equal(train(resume=True), whole)


def test_loading_into_an_adapter_that_is_there_computes_nothing(tiny_llama, tokens, saved, monkeypatch) -> None:
    from peft_tinylora import build

    folder, logits = saved
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    monkeypatch.setattr(build, "compute_basis", lambda *_: pytest.fail("a basis was computed"))
    model.load_adapter(folder, adapter_name="default")
    assert torch.equal(model(tokens).logits, logits)
    with pytest.raises(pytest.fail.Exception):  # the guard can fail
        PeftModel.from_pretrained(tiny_llama(), folder)


def test_a_base_whose_weights_arrive_later_is_checked_then(tiny_llama, tokens, saved) -> None:
    folder, logits = saved
    for seed in (0, 1):
        with torch.device("meta"):
            empty = type(tiny_llama())(tiny_llama().config)
        model = PeftModel.from_pretrained(empty, folder)
        weights = {key.replace(".weight", ".base_layer.weight") if "_proj" in key else key: tensor
                   for key, tensor in tiny_llama(seed=seed).state_dict().items()}  # fmt: skip
        model.get_base_model().load_state_dict(weights, assign=True, strict=False)
        model.get_base_model().model.rotary_emb = tiny_llama().model.rotary_emb
        v = load_file(folder / "adapter_model.safetensors")["base_model.tinylora_v"]
        for group, numbers in enumerate(v):
            model.tinylora_v["default"][str(group)] = torch.nn.Parameter(numbers)
        if seed == 0:
            torch.testing.assert_close(model(tokens).logits, logits)
        else:
            with pytest.raises(BasisMismatchError):
                model(tokens)


def test_saving_factors_that_were_never_computed_is_refused(tiny_llama, tmp_path) -> None:
    with torch.device("meta"):
        empty = type(tiny_llama())(tiny_llama().config)
    model = get_peft_model(empty, TinyLoraConfig(**TILED))
    with pytest.raises(AdapterFileError, match="cannot be described: its weight is on the meta device"):
        model.save_pretrained(tmp_path)
