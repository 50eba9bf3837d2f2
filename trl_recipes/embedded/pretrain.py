"""Pre-train the embedded model from nothing and write it, its tokenizer and the three problem files.

    python -m trl_recipes.embedded.pretrain --output_dir trl_recipes/embedded

Steps: tokenizer -> model -> documents -> training -> files -> accuracy. The model is a Llama of 7 decoder layers, so
49 linear modules, so 13 groups of 4 (the last of 1). Documents come from `task.draw_document`, fresh at every step;
their loss is taken on the solution, and at a small weight on the problem. At the default settings it is meant for
2 CPU cores and at most 30 minutes; it prints how long it took. A seed and a thread count fix the result on one
machine; another machine may round differently.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_recipes.embedded import task


PART_SIZE = 16  # documents computed at a time; the gradient is the whole batch's
TYPICAL_LENGTH = 16  # tokens of a solution, to scale the loss

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids, in_prompt, in_solution: each (documents, length)


@dataclass
class Settings:
    """What `main` runs with; every field is a command-line option of the same name."""

    output_dir: str = str(Path(__file__).parent)
    seed: int = 0
    threads: int = 2
    lessons_steps: int = 700
    habits_steps: int = 450
    batch_size: int = 64
    lessons_learning_rate: float = 3e-3
    habits_learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    prompt_weight: float = 0.05
    hidden_size: int = 128
    intermediate_size: int = 256
    grpo_problems: int = 4096
    held_out_problems: int = 1024


def parse_settings() -> Settings:
    """Reads the command line; every field of [`Settings`] is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return Settings(**vars(parser.parse_args()))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and single digits whose decoded text equals what was encoded."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *task.vocabulary()]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(task.TOKEN_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # tokens carry their own spaces
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """A Llama of 7 layers with random weights."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def draw_batch(
    tokenizer: PreTrainedTokenizerFast,
    mixture: task.Mixture,
    rng: random.Random,
    batch_size: int,
) -> list[Part]:
    """Draw one batch as parts of documents of similar length, each padded on the right: little is padded that way."""
    documents = [task.draw_document(rng, mixture) for _ in range(batch_size)]
    prompts = tokenizer([prompt for prompt, _ in documents])["input_ids"]
    solutions = tokenizer([solution for _, solution in documents], add_special_tokens=False)["input_ids"]
    pairs = [(p, s + [tokenizer.eos_token_id]) for p, s in zip(prompts, solutions, strict=True)]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    parts = []
    for first in range(0, batch_size, PART_SIZE):
        part = pairs[first : first + PART_SIZE]
        length = max(len(p) + len(s) for p, s in part)
        ids = torch.full((len(part), length), tokenizer.pad_token_id)
        in_prompt = torch.zeros((len(part), length), dtype=torch.bool)
        in_solution = torch.zeros((len(part), length), dtype=torch.bool)
        for row, (p, s) in enumerate(part):
            ids[row, : len(p) + len(s)] = torch.tensor(p + s)
            in_prompt[row, : len(p)] = True
            in_solution[row, len(p) : len(p) + len(s)] = True
        parts.append((ids, in_prompt, in_solution))
    return parts


def part_loss(model: LlamaForCausalLM, part: Part, prompt_weight: float) -> torch.Tensor:
    """Sum of the cross-entropies of the solutions' tokens, plus `prompt_weight` times that of the prompts' tokens."""
    ids, in_prompt, in_solution = part
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # causal and padded right: no mask is needed
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * (in_solution[:, 1:] + prompt_weight * in_prompt[:, 1:])).sum()


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 in 100 of the full rate."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: LlamaForCausalLM,
    draw: Callable[[], list[Part]],
    steps: int,
    learning_rate: float,
    settings: Settings,
) -> None:
    """Train in place for `steps` batches, with an optimizer and a schedule of its own."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, settings.warmup_steps)
    )
    model.train()
    progress = tqdm(range(steps), mininterval=10)
    for step in progress:
        loss = 0.0
        for part in draw():
            # A fixed divisor: a mean over each batch's tokens would weigh the short habits up.
            part_of_loss = part_loss(model, part, settings.prompt_weight) / (settings.batch_size * TYPICAL_LENGTH)
            part_of_loss.backward()
            loss += part_of_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    do_sample: bool,
    heading: str = "",
    batch_size: int = 256,
) -> float:
    """Share of problems whose completion marks the right answer, greedy or sampled at temperature 1."""
    model.eval()
    right = 0
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        inputs = tokenizer([heading + row["prompt"] for row in part], return_tensors="pt", padding=True)
        sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
        # transformers 5.23 types `generate` for a protocol that Llama's class misses.
        output = cast(Any, model).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=48,
            do_sample=do_sample,
            **sampling,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(task.answer_of(text) == row["answer"] for text, row in zip(texts, part, strict=True))
    return right / len(rows)


def main() -> None:
    """Writes the data, pre-trains the model, measures it, and saves it."""
    settings = parse_settings()
    print(f"settings: {json.dumps(vars(settings))}")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    output = Path(settings.output_dir)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, settings)
    print(f"model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")

    started = time.perf_counter()
    for name, mixture, steps, learning_rate in (
        ("lessons", task.LESSONS, settings.lessons_steps, settings.lessons_learning_rate),
        ("habits", task.HABITS, settings.habits_steps, settings.habits_learning_rate),
    ):
        print(f"pre-training on {name} documents")
        rng = random.Random(f"{settings.seed} {name}")
        train(model, partial(draw_batch, tokenizer, mixture, rng, settings.batch_size), steps, learning_rate, settings)
    minutes = (time.perf_counter() - started) / 60
    print(f"pre-training took {minutes:.1f} minutes with {settings.threads} threads")

    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    (output / "data").mkdir(exist_ok=True)
    rows = task.draw_rows(random.Random(f"{settings.seed} grpo"), "grpo", settings.grpo_problems)
    write_rows(output / "data" / "grpo_train.jsonl", rows)
    # Two sets that training never sees: one to choose settings by, the other for the figures that are reported.
    count = settings.held_out_problems
    rows = task.draw_rows(random.Random(f"{settings.seed} held_out"), "held_out", 2 * count)
    tuning, held_out = rows[:count], rows[count:]
    write_rows(output / "data" / "tuning.jsonl", tuning)
    write_rows(output / "data" / "held_out.jsonl", held_out)
    print(f"wrote {output / 'model'} and {output / 'data'}")

    for heading in ("", "Source: textbook\n", "Source: forum\n"):
        greedy = accuracy(model, tokenizer, held_out, do_sample=False, heading=heading)
        sampled = accuracy(model, tokenizer, held_out, do_sample=True, heading=heading)
        source = heading.strip() or "no source"
        print(f"held-out accuracy, {source}: greedy {greedy:.3f}, sampled {sampled:.3f} ({count} problems)")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
