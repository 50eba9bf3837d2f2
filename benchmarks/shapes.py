"""A model id -> its transformers config, built offline: no weights, no download.

The numbers are those of the models' own config.json. A test builds each on the meta device and compares the number of
parameters with the published one.
"""

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


QWEN = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
        **QWEN,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=True,
        **QWEN,
    ),
    "Qwen/Qwen2.5-3B-Instruct": Qwen2Config(
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        intermediate_size=11008,
        vocab_size=151936,
        tie_word_embeddings=True,
        **QWEN,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        tie_word_embeddings=False,
        **QWEN,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
}


def shape_of(model_id: str) -> PretrainedConfig:
    """
    Returns the config of a model by its id on the Hub.

    Raises:
        ValueError: if the model's numbers are not written down here.
    """
    if model_id not in CONFIGS:
        raise ValueError(f"no shape for model {model_id!r}: known are {', '.join(CONFIGS)}. Add it to shapes.py.")
    return CONFIGS[model_id]
