"""The models and adapters that are exported, and how far an export is from the tuner."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from support import fill_vectors, make_tiny_llama
from test_experts import EXPERTS
from test_experts import make as make_experts
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_tinylora import TinyLoraConfig


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


EMBEDDED = Path(__file__).parent.parent / "trl_recipes" / "embedded" / "model"


SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


TIED = {"tie_word_embeddings": True}
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
