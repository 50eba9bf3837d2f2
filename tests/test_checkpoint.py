"""Saving and loading: round trips, and files that do not fit."""

import copy
import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import fill_vectors

from peft_tinylora import AdapterFileError, BasisMismatchError, ConfigError, TinyLoraConfig, TinyLoraLayer, build


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


@pytest.fixture(params=["compact", "portable"])
def saved(request, tiny_llama, tokens, tmp_path) -> tuple[Path, torch.Tensor]:
    """Folder of a trained adapter in either form, and its logits."""
    return save_adapter(tmp_path, tiny_llama, tokens, save_basis=request.param == "portable")


@pytest.fixture
def portable(tiny_llama, tokens, tmp_path) -> tuple[Path, torch.Tensor]:
    """Folder of a trained adapter with its factors, and its logits."""
    return save_adapter(tmp_path, tiny_llama, tokens, save_basis=True)


def save_adapter(tmp_path: Path, tiny_llama, tokens: torch.Tensor, save_basis: bool) -> tuple[Path, torch.Tensor]:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED, save_basis=save_basis))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(tokens).logits


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_round_trip_is_exact(tiny_llama, tokens, saved, low_cpu_mem_usage: bool, is_trainable: bool) -> None:
    folder, logits = saved
    model = PeftModel.from_pretrained(
        tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    )
    assert torch.equal(model(tokens).logits, logits)
    assert [v.requires_grad for v in model.tinylora_v["default"].values()] == [is_trainable] * 7
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" for v in model.tinylora_v["default"].values())


def test_round_trip_under_another_name(tiny_llama, tokens, saved) -> None:
    folder, logits = saved
    model = get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"]))
    model.load_adapter(folder, adapter_name="other")
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert torch.equal(model(tokens).logits, logits)


def test_auto_class_loads_the_base_and_the_adapter(tiny_llama, tokens, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, TinyLoraConfig(**TILED, task_type="CAUSAL_LM"))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_modules_to_save_and_tokens_come_back(tiny_llama, tokens, tmp_path) -> None:
    fields = {"modules_to_save": ["lm_head"], "trainable_token_indices": [2, 3], "bias": "tinylora_only"}
    model = get_peft_model(
        tiny_llama(attention_bias=True), TinyLoraConfig(**{**TILED, "target_modules": ["q_proj"]}, **fields)
    )
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_no_pickle_is_written_because_none_is_read(tiny_llama, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    with pytest.raises(ConfigError, match="safe_serialization=False would write a pickle, which is not read again"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()


def test_loading_a_portable_file_computes_no_basis(tiny_llama, tokens, portable, monkeypatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a basis was computed")

    monkeypatch.setattr(build, "compute_basis", forbidden)
    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    folder, logits = portable
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    model.load_adapter(folder, adapter_name="again")
    assert torch.equal(model(tokens).logits, logits)
    with pytest.raises(AssertionError, match="a basis was computed"):  # the guard can fail
        get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))


@pytest.mark.parametrize("tying", [{"tie": "tiled", "n_tie": 2}, {"tie": "structured", "n_tie": 2}, {"tie": "none"}])
@pytest.mark.parametrize("save_basis", [False, True])
def test_finer_tying_comes_back(tiny_llama, tokens, tmp_path, tying: dict, save_basis: bool) -> None:
    settings = {"r": 2, "u": 3, "target_modules": "all-linear", **tying}
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**settings, save_basis=save_basis))
    fill_vectors(model, 0.5)
    assert len(model.tinylora_v["default"]) > 2
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("save_projection", [False, True])
def test_a_config_of_pefts_own_fields_has_its_projection_in_the_file_if_asked(
    tiny_llama, tokens, tmp_path, save_projection: bool
) -> None:
    config = peft.TinyLoraConfig(r=2, u=4, target_modules=["q_proj", "v_proj"], save_projection=save_projection)
    model = get_peft_model(tiny_llama(), config)
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any("tinylora_P" in key for key in keys) is save_projection
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("use", ["forward", "merge", "save", "move"])
def test_a_config_from_a_file_without_its_tensors_starts_afresh(tiny_llama, tokens, saved, tmp_path, use) -> None:
    folder, _ = saved
    model = get_peft_model(tiny_llama(), TinyLoraConfig.from_pretrained(folder))
    fresh = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    fill_vectors(fresh, 0.5)
    if use == "merge":
        model, fresh = model.merge_and_unload(), fresh.merge_and_unload()
    elif use == "save":
        model.save_pretrained(tmp_path / "again")
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    elif use == "move":
        model.double().float()
    assert torch.equal(model(tokens).logits, fresh(tokens).logits)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_A"
V0 = "base_model.tinylora_v.0"
CHANGES = {
    "v missing": (lambda t: t.pop(V0), r"1 missing \(tinylora_v\.0\)"),
    "B missing": (lambda t: t.pop(A0[:-1] + "B"), r"1 missing \(model\.layers\.0\.self_attn\.q_proj\.tinylora_B\)"),
    "A missing": (lambda t: t.pop(A0), r"1 missing \(model\.layers\.0\.self_attn\.q_proj\.tinylora_A\)"),
    "P missing": (lambda t: t.pop(A0[:-1] + "P"), r"1 missing \(model\.layers\.0\.self_attn\.q_proj\.tinylora_P\)"),
    "all missing": (lambda t: t.clear(), r"112 missing \("),
    "extra v": (lambda t: t.update({V0[:-1] + "28": torch.zeros(1)}), r"1 that the adapter does not have \(tinylora_v\.28\)"),
    "extra tensor": (lambda t: t.update({"lora_A": torch.zeros(1)}), r"1 that the adapter does not have \(lora_A\)"),
    "v too long": (
        lambda t: t.update({V0: torch.zeros(2)}),
        r"1 of the wrong shape \(tinylora_v\.0: \(2,\) instead of \(1,\)\)",
    ),
    "A transposed": (lambda t: t.update({A0: t[A0].T.contiguous()}), r"tinylora_A: \(32, 2\) instead of \(2, 32\)"),
    "v is NaN": (lambda t: t[V0].fill_(float("nan")), r"1 with NaN or Inf \(tinylora_v\.0\)"),
    "A is Inf": (lambda t: t[A0].fill_(float("inf")), r"1 with NaN or Inf \(model\.layers\.0"),
    "A is another's": (lambda t: t[A0].normal_(), r"basis is not that of this base model: module 'model\.layers\.0\.self_attn\.q_proj'"),
    "a sign flipped": (lambda t: t[A0][1].neg_(), r"residual 1\.\d+, allowed is 0\.01"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_does_not_fit_is_refused_and_the_base_is_as_before(
    tiny_llama, tokens, portable, change: str
) -> None:
    folder, _ = portable
    mutate, message = CHANGES[change]
    rewrite(folder, mutate)
    base = tiny_llama()
    before = base(tokens).logits
    keys = list(base.state_dict())
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert list(base.state_dict()) == keys
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    assert torch.equal(base(tokens).logits, before)

    model = get_peft_model(base, TinyLoraConfig(**TILED, projection_seed=5))
    fill_vectors(model, 0.5)
    before, keys = model(tokens).logits, list(model.state_dict())
    with pytest.raises(AdapterFileError, match=message):
        model.load_adapter(folder, adapter_name="other")
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("change", CHANGES)
def test_transformers_own_load_adapter_refuses_the_same_files(tiny_llama, tokens, portable, change: str) -> None:
    folder, logits = portable
    whole = (folder / "adapter_model.safetensors").read_bytes()
    rewrite(folder, CHANGES[change][0])
    base = tiny_llama()
    before = base(tokens).logits
    with pytest.raises((AdapterFileError, RuntimeError)):  # a wrong shape is transformers' own RuntimeError
        base.load_adapter(folder)
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    assert torch.equal(base(tokens).logits, before)
    (folder / "adapter_model.safetensors").write_bytes(whole)
    base.load_adapter(folder)
    assert torch.equal(base(tokens).logits, logits)
    assert not any(parameter.requires_grad for name, parameter in base.named_parameters() if "tinylora" in name)


def test_transformers_own_load_adapter_refuses_another_base_and_pefts_layout(tiny_llama, saved, tmp_path) -> None:
    folder, _ = saved
    with pytest.raises(BasisMismatchError):
        tiny_llama(seed=1).load_adapter(folder)
    get_peft_model(tiny_llama(), TinyLoraConfig(u=2, weight_tying=1.0, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "plain"
    )
    with pytest.raises(ConfigError, match="name `tie` in the config, or use `get_peft_model`"):
        tiny_llama().load_adapter(tmp_path / "plain")


def test_transformers_own_load_adapter_asks_for_weights_where_it_was_given_a_config_alone(tiny_llama) -> None:
    base = tiny_llama()
    with pytest.raises(AdapterFileError, match="names no weights: .* `peft_model_id`, or its tensors as"):
        base.load_adapter(peft_config=TinyLoraConfig(r=2, u=1, tie="full", target_modules="all-linear"))
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())


def test_wrapping_a_base_again_trains_the_new_adapter(tiny_llama, tokens, saved) -> None:
    folder, logits = saved
    base = tiny_llama()
    fill_vectors(get_peft_model(base, TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"])), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of it
        model = get_peft_model(base, TinyLoraConfig(**TILED))
        assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
        fill_vectors(model, 0.5)
        assert torch.equal(model(tokens).logits, logits)
        assert torch.equal(PeftModel.from_pretrained(base, folder)(tokens).logits, logits)


def test_injecting_by_the_names_of_a_state_dict_keeps_the_groups(tiny_llama, tokens, tmp_path) -> None:
    deep = {"num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 16}  # "layers.10" sorts before "layers.2"
    model = get_peft_model(tiny_llama(**deep), TinyLoraConfig(**TILED, save_basis=True))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    config = TinyLoraConfig.from_pretrained(tmp_path)
    injected = peft.inject_adapter_in_model(config, tiny_llama(**deep), state_dict=tensors)
    set_peft_model_state_dict(injected, tensors)
    assert torch.equal(injected(tokens).logits, model(tokens).logits)
    strange = {key.replace("layers.11", "layers.99"): tensor for key, tensor in tensors.items()}
    with pytest.raises(AdapterFileError, match=r"names 7 modules that the model lacks, such as 'model\.layers\.99"):
        peft.inject_adapter_in_model(config, tiny_llama(**deep), state_dict=strange)


@pytest.mark.parametrize("name", ["0", "q_proj", "layers", "tinylora_A", "default2"])
def test_adapter_names_that_occur_in_keys(tiny_llama, tokens, tmp_path, name: str) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.add_adapter(name, TinyLoraConfig(**TILED, projection_seed=1))
    fill_vectors(model, 0.5)
    fill_vectors(model, 0.5, seed=2, adapter_name=name)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        model.set_adapter(adapter)
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), folder)(tokens).logits, model(tokens).logits)


def test_saving_from_a_state_dict_of_the_trained_parameters_only(tiny_llama, tokens, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path, state_dict=trained)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(tokens).logits, model(tokens).logits)


def test_nan_beside_the_adapters_own_tensors_is_refused(tiny_llama, tmp_path) -> None:
    fields = {**TILED, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    get_peft_model(tiny_llama(), TinyLoraConfig(**fields)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t["base_model.model.lm_head.weight"].fill_(float("nan")))
    with pytest.raises(AdapterFileError, match=r"1 with NaN or Inf \(base_model\.model\.lm_head"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_rank_one_weight_and_a_steep_spectrum_load_onto_their_own_base(tmp_path) -> None:
    U, _, Vh = torch.linalg.svd(torch.randn(12, 12))
    for name, S in {"rank one": [3.0] + [0.0] * 11, "steep": [1.0, 1e-3] + [1e-4] * 10}.items():
        base = torch.nn.Sequential(torch.nn.Linear(12, 12))
        base[0].weight.data = (U * torch.tensor(S)) @ Vh
        model = get_peft_model(
            copy.deepcopy(base), TinyLoraConfig(u=1, tie="none", target_modules=["0"], save_basis=True)
        )
        model.save_pretrained(tmp_path / name)
        for dtype in (torch.float32, torch.bfloat16):
            PeftModel.from_pretrained(copy.deepcopy(base).to(dtype), tmp_path / name)


def test_file_that_does_not_fit_leaves_an_adapter_that_is_there(tiny_llama, tokens, portable) -> None:
    folder, logits = portable
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    rewrite(folder, lambda t: t[V0].fill_(float("nan")))
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, adapter_name="default")
    assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize(
    "fields",
    [{"n_tie": 8}, {"tie": "full", "n_tie": None}, {"r": 1}, {"u": 2},
     {"save_projection": False}, {"target_modules": ["q_proj"]}],
)  # fmt: skip
def test_config_edited_after_saving_is_refused(tiny_llama, portable, fields: dict) -> None:
    folder, _ = portable
    rewrite_config(folder, **fields)
    with pytest.raises(AdapterFileError, match=r"does not fit its config|`tie` or `n_tie` was edited"):
        PeftModel.from_pretrained(tiny_llama(), folder)


def test_another_base_is_refused(tiny_llama, portable) -> None:
    folder, _ = portable
    with pytest.raises(BasisMismatchError, match=r"module 'model\.layers\.0\.self_attn\.q_proj' has residual"):
        PeftModel.from_pretrained(tiny_llama(seed=1), folder)
    for layers in (3, 5):
        with pytest.raises(AdapterFileError, match="missing|does not have"):
            PeftModel.from_pretrained(tiny_llama(num_hidden_layers=layers), folder)
    changed = tiny_llama()
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.05 * weight.std() * torch.randn_like(weight)
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(changed, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_low_precision_is_accepted(tiny_llama, tokens, portable, dtype: torch.dtype) -> None:
    folder, logits = portable
    model = PeftModel.from_pretrained(tiny_llama().to(dtype), folder)
    torch.testing.assert_close(model(tokens).logits.float(), logits, rtol=0.05, atol=0.05)


def test_base_that_is_merged_at_the_moment_is_recognised(tiny_llama, tokens, saved) -> None:
    folder, logits = saved
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    fill_vectors(model, 3.0)
    model.merge_adapter()
    model.load_adapter(folder, adapter_name="other")
    model.unmerge_adapter()
    model.set_adapter("other")
    assert torch.equal(model(tokens).logits, logits)


def test_truncated_and_empty_files_are_refused_and_can_be_tried_again(tiny_llama, tokens, saved) -> None:
    folder, logits = saved
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    base = tiny_llama()
    for content in (whole[: len(whole) // 2], whole[:4], b""):
        path.write_bytes(content)
        with pytest.raises(Exception, match=re.compile("header|safetensor|incomplete|small|EOF", re.IGNORECASE)):
            PeftModel.from_pretrained(base, folder)
        assert torch.equal(base(tokens).logits, tiny_llama()(tokens).logits)
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the base was wrapped before
        assert torch.equal(PeftModel.from_pretrained(base, folder)(tokens).logits, logits)


def test_trainer_checkpoint_resumes_to_the_bit(tiny_llama, tokens, tmp_path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens.repeat(4, 1)]

    def train(folder: Path, resume: bool) -> torch.Tensor:
        model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=3, learning_rate=0.05, use_cpu=True, report_to="none",
            per_device_train_batch_size=3, disable_tqdm=True, logging_steps=100,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return torch.cat([v.detach() for v in model.tinylora_v["default"].values()])

    whole = train(tmp_path, resume=False)
    assert whole.abs().min() > 0
    assert torch.equal(train(tmp_path, resume=True), whole)
