"""A recipe's YAML -> the memory that it is expected to need on one GPU, item by item.

    python -m benchmarks.memory trl_recipes/configs/*/*/*.yaml

Bytes are counted from the model's shape alone (shapes.py): what is there all the time, and what comes on top in each
phase, all sequences being as long as the recipe allows. The expected peak is that of the largest phase. Not counted:
fragmentation of PyTorch's allocator, and what TRL keeps beside (ids, rewards).

How far off it is: on an H200, a step of a 4-bit 7B took 6,514 MB (GRPO; expected 7,047, +8.2%) and 6,413 MB (SFT; expected
6,447, +0.5%; results/training_gpu.md). On a CPU, one step of TRL's GRPO on a random Llama of 22M parameters, the
workload chosen so that each phase in turn is the largest; peak of all tensors (peak.py) in MB, expected and measured:

    largest phase                   16-bit base                 4-bit base
    generating, the prompts         193.0 / 192.7   +0.2%       162.0 / 160.1   +1.2%
    generating, the last token       76.3 /  76.6   -0.4%        45.2 /  44.0   +2.8%
    training, the loss              148.3 / 152.8   -2.9%       115.7 / 120.2   -3.8%
    training, a block recomputed    467.4 / 463.4   +0.9%       436.3 / 430.7   +1.3%

(2026-11-24, torch 2.13.0, TRL 1.16.0; again with `pytest -m slow tests/recipes/test_memory.py`, which allows 5%.)
A CPU computes the loss by other code than a GPU, and knows no CUDA context: there the figure shows less.

How the phases come about (TRL 1.16, transformers 5.23, gradient checkpointing, bf16 autocast, SDPA):
- Generation keeps K and V of all `steps_per_generation * per_device_train_batch_size` sequences. Each new token is
  joined by `torch.cat`, which has a layer's K twice for a moment.
- The loss never forms the logits of a sequence: TRL projects tiles of 4,096 tokens by 32,768 words
  (trl/kernels/chunked_logprob.py).
- The backward pass keeps the input of each block, and recomputes one block at a time. It is at its largest while the
  update of `up_proj` is added in fp32.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PretrainedConfig

from benchmarks.shapes import shape_of


PROMPT_TOKENS = 512  # assumed: longer than any question of GSM8K with template and chat markup
CUDA_CONTEXT_BYTES = 700_000_000  # assumed: CUDA context, its kernels, and the workspaces of cuBLAS
NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # bitsandbytes: weights to an absmax, and absmax to one of theirs
BF16, FP32 = 2, 4
LOGIT_TILE = (4096, 32768)  # tokens, words

# Of a block's recomputation, alive when the update of `up_proj` is added: bytes for each token, times ...
BLOCK_BYTES_PER_INTERMEDIATE = BF16 * 3 + FP32 * 2  # gate, its activation, up_proj's output; the update, the sum
BLOCK_BYTES_PER_HIDDEN = 32  # the norms' fp32 copies 16, q, k, v and attention 8, residual, gradient, block's input 8
PREFILL_BYTES_PER_INTERMEDIATE = BF16 * 2 + FP32 * 2  # as above, but the gate is gone once it was activated
PREFILL_BYTES_PER_HIDDEN = 12
HEAD_BYTES_PER_HIDDEN = 16  # final norm in fp32, its output, the scored rows of it, their gradient in fp32 and bf16
MASK_BYTES = 1 + BF16  # of sequences of unequal length: bool, and what SDPA makes of it
LOGIT_BYTES = BF16 + 4 * FP32  # of the next token: logits, in fp32, their copy, probabilities, the sampler's


@dataclass(frozen=True)
class Workload:
    """
    What a recipe asks for.

    Args:
        bits (`int`): 4 (NF4 with double quantization) or 16 (bfloat16).
        r (`int`): frozen rank of TinyLoRA.
        micro_batch (`int`): sequences in a forward pass of training.
        train_tokens (`int`): of each of them, at most.
        generated (`int`): sequences generated at once, in training or scoring.
        prompt_tokens (`int`): of each of them, at most.
        completion_tokens (`int`): likewise.
    """

    bits: int
    r: int
    micro_batch: int
    train_tokens: int
    generated: int
    prompt_tokens: int
    completion_tokens: int


def workload_of(recipe: dict) -> Workload:
    """
    Reads what a recipe's YAML says, GRPO where it has `num_generations` and else SFT.

    Raises:
        ValueError: if an option that memory depends on is not set, or a base is quantized in another way.
    """
    needed = ["per_device_train_batch_size", "score_batch_size", "max_completion_length", "load_in_4bit", "tinylora_r"]
    is_grpo = "num_generations" in recipe
    needed += ["steps_per_generation"] if is_grpo else ["max_length"]
    missing = [option for option in needed if option not in recipe]
    if missing:
        raise ValueError(f"the recipe does not set {', '.join(missing)}, which its memory depends on: set them.")
    if recipe["load_in_4bit"] and not (
        recipe.get("use_bnb_nested_quant") and recipe.get("bnb_4bit_quant_type") == "nf4"
    ):
        raise ValueError(
            "4-bit bases are counted as NF4 with double quantization: set bnb_4bit_quant_type: nf4 and "
            "use_bnb_nested_quant: true."
        )
    micro_batch, completion_tokens = recipe["per_device_train_batch_size"], recipe["max_completion_length"]
    rollouts = micro_batch * recipe["steps_per_generation"] if is_grpo else 0
    return Workload(
        bits=4 if recipe["load_in_4bit"] else 16,
        r=recipe["tinylora_r"],
        micro_batch=micro_batch,
        train_tokens=PROMPT_TOKENS + completion_tokens if is_grpo else recipe["max_length"],
        generated=max(recipe["score_batch_size"], rollouts),
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=completion_tokens,
    )


def linear_shapes(config: PretrainedConfig) -> list[tuple[int, int]]:
    """(out, in) of the seven linear modules of a block, in model order: q, k, v, o, gate, up, down."""
    hidden, intermediate, attention = config.hidden_size, config.intermediate_size, query_width(config)
    key_value = attention // config.num_attention_heads * config.num_key_value_heads
    return [
        (attention, hidden),
        (key_value, hidden),
        (key_value, hidden),
        (hidden, attention),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ]


def query_width(config: PretrainedConfig) -> int:
    """Numbers that all query heads have together for a token."""
    head_dim = config.hidden_size // config.num_attention_heads if config.model_type == "qwen2" else config.head_dim
    return head_dim * config.num_attention_heads


def linear_parameters(config: PretrainedConfig) -> int:
    """Numbers in the linear weights of all blocks, which are what is quantized."""
    return config.num_hidden_layers * sum(out * inner for out, inner in linear_shapes(config))


def other_parameters(config: PretrainedConfig) -> int:
    """Numbers in embeddings, lm_head where it is not tied, norms, and the biases that Qwen2 has on q, k and v."""
    tables = 1 if config.tie_word_embeddings else 2
    biases = sum(out for out, _ in linear_shapes(config)[:3]) if config.model_type == "qwen2" else 0
    norms_and_biases = config.num_hidden_layers * (2 * config.hidden_size + biases) + config.hidden_size
    return tables * config.vocab_size * config.hidden_size + norms_and_biases


def quantized_bytes(numbers: int) -> int:
    """Bytes of a weight in NF4 with double quantization, with its two absmax levels and their tables."""
    blocks = -(-numbers // NF4_BLOCK)
    tables = FP32 * (16 + 256 + 1)  # of NF4, of the 8-bit absmax, and the absmax's offset
    return -(-numbers // 2) + blocks + FP32 * -(-blocks // ABSMAX_BLOCK) + tables


def kept_bytes(config: PretrainedConfig, workload: Workload) -> dict[str, int]:
    """Item -> bytes that are there all the time."""
    layers, shapes = config.num_hidden_layers, linear_shapes(config)
    if workload.bits == 4:
        linear = {"linear weights, NF4": layers * sum(quantized_bytes(out * inner) for out, inner in shapes)}
    else:
        linear = {"linear weights, bf16": BF16 * linear_parameters(config)}
    factors = layers * sum(workload.r * (out + inner) for out, inner in shapes)
    # v, its gradient and Adam's two moments are a few numbers; P is one (u, r, r) a module.
    return linear | {
        "embeddings, head, norms, biases, bf16": BF16 * other_parameters(config),
        "TinyLoRA's A, B and P, fp32": FP32 * (factors + 7 * layers * workload.r**2),
    }


def phases(config: PretrainedConfig, workload: Workload, device: str = "cuda") -> dict[str, dict[str, int]]:
    """
    Phase -> item -> bytes that come on top of [`kept_bytes`] when the phase is at its largest.

    Args:
        config ([`~transformers.PretrainedConfig`]): shape of the model.
        workload ([`Workload`]): what the recipe asks for.
        device (`str`, *optional*, defaults to `"cuda"`): on a CPU, adding an fp32 update to a bf16 output makes an
            fp32 copy of that first.
    """
    layers, hidden, intermediate = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    key_value = linear_shapes(config)[1][0]
    cast = FP32 * intermediate if device == "cpu" else 0
    largest = max(out * inner for out, inner in linear_shapes(config))
    scratch = {"a weight dequantized, bf16": BF16 * largest} if workload.bits == 4 else {}

    generated, prompt = workload.generated, workload.prompt_tokens
    prompts, length = generated * prompt, prompt + workload.completion_tokens
    cache_bytes_a_token = BF16 * 2 * key_value * layers
    prefill = PREFILL_BYTES_PER_INTERMEDIATE * intermediate + PREFILL_BYTES_PER_HIDDEN * hidden + cast
    tokens = workload.micro_batch * workload.train_tokens
    block = BLOCK_BYTES_PER_INTERMEDIATE * intermediate + BLOCK_BYTES_PER_HIDDEN * hidden + cast
    inputs = {"inputs of all blocks, bf16": BF16 * hidden * layers * tokens}
    return {
        "generating, the prompts": {
            "K and V of the prompts, bf16": prompts * cache_bytes_a_token,
            "activations of a block": prompts * prefill,
            "attention mask": MASK_BYTES * generated * prompt**2,
        }
        | scratch,
        "generating, the last token": {
            "K and V, bf16": generated * length * cache_bytes_a_token,
            "a layer's K once more": generated * length * BF16 * key_value,
            "logits of the next token": generated * config.vocab_size * LOGIT_BYTES,
        }
        | scratch,
        "training, the loss": inputs
        | {
            "final states and their gradient": tokens * HEAD_BYTES_PER_HIDDEN * hidden,
            "a tile of logits, bf16": BF16 * min(tokens, LOGIT_TILE[0]) * LOGIT_TILE[1],
        },
        "training, a block recomputed": inputs
        | {
            "activations of a block": tokens * block,
            "attention mask": MASK_BYTES * workload.micro_batch * workload.train_tokens**2,
        }
        | scratch,
    }


def peak_bytes(config: PretrainedConfig, workload: Workload, device: str = "cuda") -> int:
    """Expected peak, without the CUDA context: what is always there, and the largest phase."""
    on_top = max(sum(items.values()) for items in phases(config, workload, device).values())
    return sum(kept_bytes(config, workload).values()) + on_top


def expected_bytes(path: Path) -> int:
    """Expected peak of a recipe on one GPU, with the CUDA context."""
    recipe = yaml.safe_load(path.read_text())
    return peak_bytes(shape_of(recipe["model_name_or_path"]), workload_of(recipe)) + CUDA_CONTEXT_BYTES


def report(path: Path) -> str:
    """The items of a recipe as a table, in GB (1e9 bytes)."""
    recipe = yaml.safe_load(path.read_text())
    config, workload = shape_of(recipe["model_name_or_path"]), workload_of(recipe)

    def block(title: str, items: dict[str, int]) -> list[str]:
        rows = [f"    {name:<40}{size / 1e9:>8.3f}" for name, size in items.items()]
        return [f"  {title:<42}{sum(items.values()) / 1e9:>8.3f}", *rows]

    lines = [f"{path}: {workload}"]
    lines += block("always there", kept_bytes(config, workload) | {"CUDA context, assumed": CUDA_CONTEXT_BYTES})
    for phase, items in phases(config, workload).items():
        lines += block(phase, items)
    lines.append(f"  expected peak, GB (1e9 bytes)             {expected_bytes(path) / 1e9:>8.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the report of each YAML named on the command line."""
    for name in sys.argv[1:] if argv is None else argv:
        print(report(Path(name)), end="\n\n")


if __name__ == "__main__":
    main()
