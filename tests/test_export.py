"""export.py: the other forms, what stays as it was, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from exported import (
    CASES,
    EMBEDDED,
    FP32,
    STOCK,
    TILED,
    distance,
    load,
    save_adapter,
    save_base,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import fill_vectors, make_tiny_llama, run_python_process
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
)

from peft_tinylora import AdapterFileError, ConfigError, TinyLoraConfig, TinyLoraLayer, export, export_adapter
from peft_tinylora.adapter_files import ADAPTER_FILES
from peft_tinylora.weight import keep_differentiable


@pytest.mark.parametrize("to", ["lora", "compact", "portable"])
@pytest.mark.parametrize("kind", ["bias", "tied_tokens", "tied_modules_to_save"])
def test_the_base_model_is_as_it_was_also_its_biases(tmp_path, kind, to) -> None:
    folder = save_base(kind, tmp_path / "base")
    save_adapter(kind, folder, tmp_path / "adapter")
    base, original = load(folder).train(), load(folder).state_dict()
    trained = {name: index % 2 == 0 for index, (name, _) in enumerate(base.named_parameters())}
    for name, parameter in base.named_parameters():
        parameter.requires_grad = trained[name]
    export_adapter(tmp_path / "adapter", tmp_path / "out", to, base)
    assert base.state_dict().keys() == original.keys()
    assert base.training and {name: p.requires_grad for name, p in base.named_parameters()} == trained
    assert all(torch.equal(value, original[name]) for name, value in base.state_dict().items())


@pytest.mark.filterwarnings("ignore:Model with `tie_word:UserWarning", "ignore:Input and output emb:UserWarning")
@pytest.mark.parametrize("kind", ["embedded", *CASES])
@torch.no_grad()
def test_a_merged_model_stands_alone_and_is_the_same_function(tmp_path, tokens, kind) -> None:
    folder = save_base(kind, tmp_path / "base")
    model = save_adapter(kind, folder, tmp_path / "adapter")
    base = load(folder)
    report = export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", base)
    layers = [name for name, layer in model.base_model.model.named_modules() if isinstance(layer, TinyLoraLayer)]
    assert list(report) == layers and report.total.relative_error < 1e-4
    logits = [load(tmp_path / "merged")(tokens).logits, model(tokens).logits, load(folder)(tokens).logits]
    assert distance(*logits) < FP32
    assert distance(base(tokens).logits, *logits[1:]) < FP32  # the base model given is the merged one
    assert (tmp_path / "merged" / "generation_config.json").exists()
    assert (tmp_path / "merged" / "tokenizer.json").exists() == (kind == "embedded")


@pytest.mark.filterwarnings("ignore:Merging lost:UserWarning")
@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.bfloat16, None), (torch.float32, "bfloat16"), (torch.bfloat16, "float16")]
)
@torch.no_grad()
def test_the_report_of_a_rounded_merge_is_that_of_float64(tmp_path, stored, dtype) -> None:
    folder = save_base("llama", tmp_path / "base")
    model = save_adapter("llama", folder, tmp_path / "adapter", stored)
    given = load(folder, stored)
    report = export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", given, dtype=dtype)
    merged_dtype = getattr(torch, dtype or "bfloat16")
    merged, base = load_file(tmp_path / "merged" / "model.safetensors"), load(folder, stored)
    assert {tensor.dtype for tensor in merged.values()} == {merged_dtype}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(merged_dtype)[6:]
    sums = torch.zeros(3, dtype=torch.float64)
    for name in report:
        layer = model.get_base_model().get_submodule(name)
        A, B, P = (getattr(layer, f"tinylora_{kind}")["default"].double() for kind in "ABP")
        delta = B @ torch.einsum("u,urs->rs", layer.vectors("default")[0].double(), P) @ A
        W = base.get_submodule(name).weight
        rounded = (W.double() + delta).float().to(merged_dtype)
        assert (
            rounded != merged[f"{name}.weight"]
        ).double().mean() < 0.002  # a sum close to a tie may go the other way
        survived = merged[f"{name}.weight"].double() - W.to(merged_dtype).double()
        squares = torch.stack([(delta**2).sum(), ((survived - delta) ** 2).sum(), (survived**2).sum()])
        assert report[name].relative_error == pytest.approx((squares[1] / squares[0]).sqrt().item(), rel=1e-3)
        cosine = (survived * delta).sum() / (squares[0] * squares[2]).sqrt()
        assert report[name].cosine == pytest.approx(cosine.item(), abs=1e-5)
        sums += squares
    assert report.total.relative_error == pytest.approx((sums[1] / sums[0]).sqrt().item(), rel=1e-3)
    assert report.total.relative_error > 0.001  # or there was nothing to tell


@pytest.mark.filterwarnings("ignore:Merging lost:UserWarning")
@torch.no_grad()
def test_a_4_bit_base_gives_a_lora_beside_it_or_a_merged_float_model(tmp_path, tokens) -> None:
    from quantized import BACKENDS

    def without_fast_kernel(model: PreTrainedModel) -> PreTrainedModel:
        keep_differentiable(model)  # as the tuner does: bitsandbytes' kernel for inference on a CPU rounds the scales
        return model

    make_tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(tmp_path / "base")
    quantized = BACKENDS["bnb-nf4"]
    base = without_fast_kernel(quantized(tmp_path / "base"))(tokens).logits
    model = get_peft_model(quantized(tmp_path / "base"), TinyLoraConfig(**TILED)).eval()
    fill_vectors(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(tokens).logits
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", quantized(tmp_path / "base"))
    lora = PeftModel.from_pretrained(without_fast_kernel(quantized(tmp_path / "base")), tmp_path / "lora")
    assert distance(lora(tokens).logits, expected, base) < FP32
    report = export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", quantized(tmp_path / "base"))
    assert len(report) == 14 and report.total.relative_error < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert distance(load(tmp_path / "merged")(tokens).logits, expected, base) < FP32
    half = export_adapter(
        tmp_path / "adapter", tmp_path / "half", "merged", quantized(tmp_path / "base"), dtype="bfloat16"
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert 0.001 < half.total.relative_error < 0.2


def test_the_tokenizer_of_the_adapter_comes_before_that_of_the_base(tmp_path) -> None:
    save_adapter("embedded", EMBEDDED, tmp_path / "plain")
    save_adapter("embedded", EMBEDDED, tmp_path / "with_tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    text = "12 + 30 = <think>"
    ids = tokenizer(text)["input_ids"]
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "with_tokenizer")
    changed_ids = tokenizer(text)["input_ids"]
    assert changed_ids != ids
    for name, to, expected in (
        ("plain", "merged", ids),
        ("with_tokenizer", "merged", changed_ids),
        ("with_tokenizer", "lora", changed_ids),
        ("with_tokenizer", "compact", changed_ids),
    ):
        target = tmp_path / f"{name}-{to}"
        export_adapter(tmp_path / name, target, to, load(EMBEDDED))
        assert AutoTokenizer.from_pretrained(target)(text)["input_ids"] == expected


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def test_there_and_back_is_the_same_file(tiny_llama, tokens, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path / "compact")
    export_adapter(tmp_path / "compact", tmp_path / "portable", "portable", tiny_llama())
    assert len(names(tmp_path / "portable")) == 4 * 28
    export_adapter(tmp_path / "portable", tmp_path / "again", "compact", tiny_llama())
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("compact", "again")]
    assert files[0] == files[1]
    for name in ("portable", "again"):
        assert torch.equal(
            PeftModel.from_pretrained(tiny_llama(), tmp_path / name)(tokens).logits, model(tokens).logits
        )
        assert {file.name for file in (tmp_path / name).iterdir()} == set(ADAPTER_FILES)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear"},
        {"r": 2, "u": 3, "weight_tying": 0.4, "target_modules": "all-linear", "projection_seed": 7},
        {"r": 2, "u": 4, "target_modules": ["q_proj", "down_proj"], "save_projection": False},
    ],
)
def test_a_file_of_stock_peft_has_the_same_logits_in_every_form(tiny_llama, tokens, tmp_path, fields) -> None:
    (tmp_path / "stock").mkdir()
    run_python_process(STOCK, tmp_path / "stock", fields)
    base = tiny_llama()
    export_adapter(tmp_path / "stock", tmp_path / "compact", "compact", base)
    assert names(tmp_path / "compact") == {"base_model.tinylora_v"}
    loaded = PeftModel.from_pretrained(base, tmp_path / "compact")  # the same base, which has no adapter left in it
    expected = torch.load(tmp_path / "stock" / "logits.pt")
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == {"base_model.tinylora_v"}
    export_adapter(tmp_path / "compact", tmp_path / "back", "portable", tiny_llama())
    # PEFT's layout again, with its signs.
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "back"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4)
    export_adapter(tmp_path / "stock", tmp_path / "lora", "lora", tiny_llama())
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")(tokens).logits
    assert distance(lora, expected, tiny_llama()(tokens).logits) < FP32


def test_what_the_base_does_not_determine_stays_in_the_file(tiny_llama, tokens, tmp_path) -> None:
    (tmp_path / "stock").mkdir()
    run_python_process(STOCK, tmp_path / "stock", {"r": 2, "u": 4, "target_modules": ["q_proj"]})
    tensors = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    q = "base_model.model.model.layers.{}.self_attn.q_proj.tinylora_{}"
    tensors[q.format(0, "P")] += 1.0  # not from the seed
    for kind in "AB":  # pairs exchanged: still singular factors of the weight
        tensor = tensors[q.format(1, kind)]
        tensors[q.format(1, kind)] = tensor.flip(0 if kind == "A" else 1).contiguous()
    save_file(tensors, tmp_path / "stock" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="basis is not that of this base model"):
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "stock")
    expected = stock(tokens).logits
    with pytest.warns(UserWarning, match="basis is not that of this base model"):
        export_adapter(tmp_path / "stock", tmp_path / "compact", "compact", tiny_llama())
    assert names(tmp_path / "compact") == {
        "base_model.tinylora_v", q.format(0, "P"), q.format(1, "A"), q.format(1, "B")
    }  # fmt: skip
    for to in ("compact", "lora"):
        with pytest.warns(UserWarning, match="basis is not that of this base model"):
            if to == "lora":
                export_adapter(tmp_path / "stock", tmp_path / "lora", "lora", tiny_llama())
            loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / to)
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_hub_is_downloaded_by_its_two_names_with_the_options_given(
    tiny_llama, tmp_path, monkeypatch
) -> None:
    get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).save_pretrained(tmp_path / "adapter")
    asked = []

    def download(repository: str, name: str, **options: object) -> str:
        asked.append((repository, name, *(options[key] for key in ("revision", "subfolder", "token"))))
        return str(tmp_path / "adapter" / name)

    monkeypatch.setattr("peft_tinylora.adapter_files.hf_hub_download", download)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # its tokenizer is asked for too, again and again
    options = {"revision": "v1", "subfolder": "sub", "token": "secret"}
    export_adapter("user/name", tmp_path / "lora", "lora", tiny_llama(), **options)
    assert asked == [("user/name", name, "v1", "sub", "secret") for name in ADAPTER_FILES]


def test_bad_input_is_refused_and_nothing_is_written(tiny_llama, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    model.save_pretrained(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    with pytest.raises(ConfigError, match="to='tiny': allowed are 'compact', 'portable', 'lora', 'merged'"):
        export_adapter(adapter, out, "tiny", tiny_llama())
    with pytest.raises(ConfigError, match="dtype='int8': allowed are 'float32', 'bfloat16', 'float16'"):
        export_adapter(adapter, out, "lora", tiny_llama(), dtype="int8")
    with pytest.raises(ConfigError, match=r"dtype=torch.float16 is for 'lora' and 'merged'"):
        export_adapter(adapter, out, "compact", tiny_llama(), dtype=torch.float16)
    with pytest.raises(ConfigError, match="base_model is a Linear, and only a model of transformers can be saved"):
        export_adapter(adapter, out, "merged", nn.Linear(2, 2))
    with pytest.raises(AdapterFileError, match="holds an adapter already"):
        export_adapter(adapter, adapter, "portable", tiny_llama())
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(AdapterFileError, match="holds a model already"):
        export_adapter(adapter, tmp_path / "model", "merged", tiny_llama())
    for to in export.FORMS:
        with pytest.raises(AdapterFileError, match="another basis"):
            export_adapter(adapter, out, to, tiny_llama(seed=1))
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="not of a TinyLoRA adapter: its peft_type is 'LORA'"):
        export_adapter(tmp_path / "lora", out, "compact", tiny_llama())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "lora", "model"}
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("to", ["lora", "merged", "portable"])
def test_an_interrupted_write_leaves_nothing(tiny_llama, tmp_path, monkeypatch, to) -> None:
    get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).save_pretrained(tmp_path / "adapter")

    def interrupted(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(export, "save_file", interrupted)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
    monkeypatch.setattr("peft.peft_model.safe_save_file", interrupted)
    base = tiny_llama()
    with pytest.raises(OSError, match="no space left"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to, base)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())


def test_a_folder_that_is_there_already_keeps_its_other_files(tiny_llama, tmp_path) -> None:
    get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    export_adapter(tmp_path / "adapter", tmp_path / "out", "portable", tiny_llama())
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"README.md", *ADAPTER_FILES}
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
