"""An adapter as a plain LoRA, merged, compact or portable: the same function each time, and nothing left after an error."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import fill_vectors, make_tiny_llama, run_python_process
from test_experts import EXPERTS
from test_experts import make as make_experts
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_tinylora import AdapterFileError, ConfigError, TinyLoraConfig, TinyLoraLayer, export, export_adapter
from peft_tinylora.adapter_files import ADAPTER_FILES
from peft_tinylora.weight import keep_differentiable


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}
EMBEDDED = Path(__file__).parent.parent / "trl_recipes" / "embedded" / "model"
SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TIED = {"tie_word_embeddings": True}


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **SMALL))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(intermediate_size=64, num_key_value_heads=2, **SMALL))


def llama(**fields: object) -> Callable[[], PreTrainedModel]:
    return lambda: make_tiny_llama(attention_bias=True, **fields)


# Model, and what its adapter has beside r, u and "all-linear".
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict]] = {
    "gpt2": (gpt2, {}),
    "opt": (opt, {}),
    "qwen2": (qwen2, {}),
    "llama": (llama(), {}),
    "mixtral": (lambda: make_experts("mixtral"), {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gpt_oss": (lambda: make_experts("gpt_oss"), {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "qwen2_moe": (
        lambda: make_experts("qwen2_moe"),
        {"target_modules": ["shared_expert.up_proj"], "target_parameters": EXPERTS},
    ),
    "tied_embedding": (llama(**TIED), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_embedding_and_head": (llama(**TIED), {"target_modules": ["embed_tokens", "lm_head"]}),
    "modules_to_save": (llama(), {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "tied_modules_to_save": (llama(**TIED), {"modules_to_save": ["lm_head"]}),
    "tokens": (llama(), {"trainable_token_indices": [1, 2, 3]}),
    "tied_tokens": (llama(**TIED), {"trainable_token_indices": [1, 2, 3]}),
    "bias": (llama(), {"bias": "all"}),
    "own_bias": (llama(mlp_bias=True), {"bias": "tinylora_only", "target_modules": ["q_proj"]}),
    "excluded": (llama(), {"exclude_modules": ["layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]}),
    "some_layers": (llama(), {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]}),
}
ARCHITECTURES = ["embedded", *list(CASES)[:7]]
# |exported - tuner| / |tuner - base|, norms of all logits. In fp32, rounding of products gives up to 2e-5; in bf16, a logit
# may round the other way. PEFT adds a LoRA of fused experts to the bf16 weight, and so loses of it what does not fit.
FP32, BF16, BF16_EXPERTS = 1e-4, 0.02, 0.2

# Loads each LoRA with PEFT alone and keeps its logits.
PLAIN_PEFT = """
    import sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    folder = sys.argv[1]
    tokens = torch.load(folder + "/tokens.pt")
    for name, base, lora, dtype in torch.load(folder + "/cases.pt"):
        base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        with torch.no_grad():
            torch.save(PeftModel.from_pretrained(base, lora)(tokens).logits, f"{folder}/{name}.pt")
    assert "peft_tinylora" not in sys.modules
"""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_base(kind: str, folder: Path) -> Path:
    """A random model whose adapter has an effect on the logits; returns its folder."""
    if kind == "embedded":
        return EMBEDDED
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = CASES[kind][0]()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def save_adapter(kind: str, base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapter in which all that is trained is random."""
    fields = {"r": 2, "u": 2, "tie": "none", "target_modules": "all-linear"} | CASES.get(kind, (None, {}))[1]
    model = get_peft_model(load(base, dtype), TinyLoraConfig(**fields)).eval()
    fill_vectors(model, 0.1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "tinylora" not in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def distance(exported: torch.Tensor, tuner: torch.Tensor, base: torch.Tensor) -> float:
    """How far the exported logits are from the tuner's, in parts of the adapter's effect, which must be there."""
    effect = (tuner.double() - base.double()).norm()
    assert effect > 0.01 * base.double().norm()
    return ((exported.double() - tuner.double()).norm() / effect).item()


@pytest.fixture(scope="module")
def in_plain_peft(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, Path]]:
    """Case -> logits of the exported LoRA in a process without this package, of the tuner, of the base; the folder."""
    folder = tmp_path_factory.mktemp("plain_peft")
    tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, folder / "tokens.pt")
    expected, cases = {}, []
    for kind in ("embedded", *CASES):
        base = save_base(kind, folder / kind)
        for dtype in (torch.float32, torch.bfloat16) if kind in ARCHITECTURES else (torch.float32,):
            name = f"{kind}-{dtype}"
            with torch.no_grad():
                model = save_adapter(kind, base, folder / f"{name}-tinylora", dtype)
                expected[name] = model(tokens).logits, load(base, dtype)(tokens).logits
            export_adapter(folder / f"{name}-tinylora", folder / f"{name}-lora", "lora", load(base, dtype))
            cases.append((name, str(base), str(folder / f"{name}-lora"), str(dtype).removeprefix("torch.")))
    torch.save(cases, folder / "cases.pt")
    run_python_process(PLAIN_PEFT, folder)
    return {
        name: (torch.load(folder / f"{name}.pt"), *logits, folder / f"{name}-lora")
        for name, logits in expected.items()
    }


@pytest.mark.parametrize("kind", ["embedded", *CASES])
def test_a_lora_in_plain_peft_is_the_same_function_in_float32(in_plain_peft, kind) -> None:
    *logits, folder = in_plain_peft[f"{kind}-torch.float32"]
    assert distance(*logits) < FP32
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_lora_in_plain_peft_is_the_same_function_in_bfloat16(in_plain_peft, kind) -> None:
    *logits, _ = in_plain_peft[f"{kind}-torch.bfloat16"]
    assert distance(*logits) < (BF16_EXPERTS if "target_parameters" in CASES.get(kind, (0, {}))[1] else BF16)


def test_what_other_runtimes_read_is_where_they_look_for_it(in_plain_peft) -> None:
    folder = in_plain_peft["llama-torch.float32"][-1]
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules, "lora_dropout": 0.0}
    expected |= {"rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "inference_mode": True, "use_rslora": False}
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.3.mlp.down_proj.lora_"
    assert len(tensors) == 2 * 28 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors[f"{prefix}A.weight"].shape == (2, 64) and tensors[f"{prefix}B.weight"].shape == (32, 2)


@pytest.mark.parametrize("kind", ["excluded", "some_layers"])
def test_modules_are_named_in_full_where_a_last_component_would_match_others(in_plain_peft, kind) -> None:
    config = json.loads((in_plain_peft[f"{kind}-torch.float32"][-1] / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list) and len(config["target_modules"]) == (26, 4)[kind != "excluded"]
    assert all(name.startswith("model.layers.") for name in config["target_modules"])
    assert config["exclude_modules"] is None and config["layers_to_transform"] is None


def test_modules_are_named_by_a_pattern_where_a_full_name_would_match_others(tmp_path) -> None:
    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.head = nn.Linear(6, 6)
            self.inner = Nested(depth - 1) if depth else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x)).tanh()

    base, x = Nested(1), torch.randn(4, 6)
    expected_base = base(x)
    model = get_peft_model(base, TinyLoraConfig(u=2, tie="none", target_modules="head|none"))
    fill_vectors(model, 1.0)
    expected = model(x)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", base)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"] == "head"
    assert distance(PeftModel.from_pretrained(base, tmp_path / "lora")(x), expected, expected_base) < FP32


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_factors_are_stored_in_the_dtype_asked_for(tmp_path, tokens, dtype) -> None:
    base = save_base("llama", tmp_path / "base")
    expected = save_adapter("llama", base, tmp_path / "adapter")(tokens).logits
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", load(base), dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{str(dtype).removeprefix('torch.')}"}
    exported = PeftModel.from_pretrained(load(base), tmp_path / "lora")(tokens).logits
    assert distance(exported, expected, load(base)(tokens).logits) < (2e-3 if dtype == "float16" else 2e-2)


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


# Saves a stock adapter with a random v, and its logits. Arguments: the folder, fields of the config.
STOCK = """
    import sys, torch
    from ast import literal_eval
    from support import make_tiny_llama
    from peft import TinyLoraConfig, get_peft_model
    assert "peft_tinylora" not in sys.modules
    tokens = torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    config = TinyLoraConfig(init_weights="uniform", init_v_bound=0.5, **literal_eval(sys.argv[2]))
    model = get_peft_model(make_tiny_llama(), config)
    torch.save(model(tokens).logits.detach(), sys.argv[1] + "/logits.pt")
    model.save_pretrained(sys.argv[1])
"""


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


@pytest.mark.filterwarnings("ignore:r=20 is larger than the smallest side:UserWarning")
def test_ranks_that_differ_keep_a_scaling_of_one(tiny_llama, tokens, tmp_path) -> None:
    (tmp_path / "stock").mkdir()
    run_python_process(STOCK, tmp_path / "stock", {"r": 20, "u": 2, "target_modules": ["q_proj", "k_proj"]})
    export_adapter(tmp_path / "stock", tmp_path / "lora", "lora", tiny_llama())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 20
    assert len(config["rank_pattern"]) == 4 and set(config["rank_pattern"].values()) == {16}  # k_proj has 16 rows
    assert config["rank_pattern"] == config["alpha_pattern"]
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")(tokens).logits
    assert distance(lora, torch.load(tmp_path / "stock" / "logits.pt"), tiny_llama()(tokens).logits) < FP32


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


def test_what_no_lora_can_express_is_refused_by_name(tmp_path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8, max_norm=1.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.embed(x)

    model = get_peft_model(Model(), TinyLoraConfig(u=2, tie="none", target_modules=["embed"]))
    fill_vectors(model, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    with pytest.raises(AdapterFileError, match="'embed' cannot be written as a LoRA: its embedding has max_norm"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", base)

    class Experts(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(1, 8, 6))

    fields = {"u": 2, "tie": "none", "target_modules": [], "target_parameters": ["up"]}
    model = get_peft_model(nn.Sequential(Experts()), TinyLoraConfig(**fields))
    model.save_pretrained(tmp_path / "expert")
    with pytest.raises(
        AdapterFileError, match="'0' cannot be written as a LoRA: it is a transposed parameter of a sin"
    ):
        export_adapter(tmp_path / "expert", tmp_path / "lora", "lora", model.unload())
    assert not (tmp_path / "lora").exists()


def test_a_dtype_too_small_for_the_update_is_refused_by_name(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        base[0].weight.mul_(1e6)
    model = get_peft_model(base, TinyLoraConfig(u=2, tie="none", target_modules=["0"]))
    fill_vectors(model, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        AdapterFileError, match=r"update of '0' is too large for torch.float16: choose dtype='bfloat16'"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", model.unload(), dtype="float16")


def test_a_lora_that_peft_would_not_read_back_is_refused(tiny_llama, tmp_path, monkeypatch) -> None:
    get_peft_model(tiny_llama(), TinyLoraConfig(**TILED)).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(export, "_target_modules", lambda *_: ["q_proj"])
    with pytest.raises(AdapterFileError, match=r"does not give 'base_model\.model\.model\.layers\.0\..*back"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", tiny_llama())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
