"""The tiny hub models that PEFT's TinyLoRA tests load, made here from their architectures.

Enters: a Hub cache folder. Leaves: in it, each model id below as if it had been downloaded, so that
`from_pretrained(id)` with HF_HUB_OFFLINE=1 finds it. Weights are random with a fixed seed; no tokenizer is needed.
The trap: these are not the published weights, so a tolerance that PEFT tuned on those may not hold here. That is why
the harness compares with stock PEFT on the same models.
"""

from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, PretrainedConfig


SEED = 0
REVISION = "0" * 40

_LLAMA_SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT_SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}
_GPT2_SIZES = {"vocab_size": 256, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
_GPT2_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# model id -> model class, model type, config fields
MODELS: dict[str, tuple[str, str, dict]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "opt",
        {
            "vocab_size": 256,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "gpt2", _GPT2_SIZES | _GPT2_TOKENS),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "gpt2", _GPT2_SIZES | _GPT2_TOKENS),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "gptj",
        _GPT2_SIZES | _GPT2_TOKENS | {"rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", _LLAMA_SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "qwen2", _LLAMA_SIZES),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "mistral", _LLAMA_SIZES),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        _LLAMA_SIZES | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 64},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "t5",
        {
            "vocab_size": 256,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "bart",
        {
            "vocab_size": 256,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 128,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "bert", _BERT_SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "roberta", _BERT_SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "deberta", _BERT_SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "deberta-v2", _BERT_SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "bert",
        _BERT_SIZES,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "roberta",
        _BERT_SIZES,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "llama",
        _LLAMA_SIZES,
    ),
}

# model id and revision of an adapter of which only the config is read
LORA_CONFIG = ("peft-internal-testing/tiny-opt-lora-revision", "test")


def fill_hub_cache(cache: Path) -> None:
    """Write every model of `MODELS` that `cache` lacks, in the layout huggingface_hub gives a downloaded one."""
    for model_id, (class_name, model_type, fields) in MODELS.items():
        repo = cache / f"models--{model_id.replace('/', '--')}"
        ref = repo / "refs" / "main"
        if ref.exists():
            continue
        config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
        torch.manual_seed(SEED)
        model = getattr(transformers, class_name)(config)
        model.save_pretrained(repo / "snapshots" / REVISION)
        _name_revision(ref)

    model_id, revision = LORA_CONFIG
    repo = cache / f"models--{model_id.replace('/', '--')}"
    LoraConfig(target_modules=["q_proj", "v_proj"]).save_pretrained(repo / "snapshots" / REVISION)
    _name_revision(repo / "refs" / revision)


def _name_revision(ref: Path) -> None:
    """Make the snapshot findable. Last, so that an interrupted run starts this repository again."""
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(REVISION)
