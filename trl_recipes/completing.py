"""Prompts -> completions of a loaded model, one batch at a time: tokens in, tokens out, and nothing left to chance."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def complete(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list, config: GenerationConfig
) -> list[str]:
    """Lets a model complete a batch of prompts: strings, or lists of chat messages."""
    inputs = encode(tokenizer, prompts).to(model.device)
    # transformers 5.23 types `generate` for a protocol that its own models miss, and PEFT's models pass it on untyped.
    output = cast(Any, model).generate(**inputs, generation_config=config)
    new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    ended = [cut_at_end(tokens, config.eos_token_id) for tokens in new_tokens]
    return tokenizer.batch_decode(ended, skip_special_tokens=True)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list) -> BatchEncoding:
    """Tokenizes prompts as TRL does in training, padded on the left: input_ids and attention_mask (batch, tokens)."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    encoded = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return cast(BatchEncoding, encoded)  # as return_dict asks for


def generation_config(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    sampled: bool,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    """Builds a config that leaves nothing to the model's own, whose values (Qwen's repetition penalty, say) fill gaps."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        temperature=temperature,
        top_p=top_p,
        top_k=0 if sampled else 50,  # 50 is what transformers calls unset; greedy decoding does not read it
        repetition_penalty=1.0,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, *(token for token in ends if token != tokenizer.eos_token_id)],
        disable_compile=True,
    )


def cut_at_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Returns the tokens before the first end token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turns dropout off while scoring, and puts the model back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
