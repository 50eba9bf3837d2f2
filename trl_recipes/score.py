"""The fraction of problems that a model solves: greedy, or sampled at temperature 1.

As a library, `score(model, tokenizer, problems)`; the recipes call it before and after training, both ways. As a script
it reloads a saved adapter in a new process and prints JSON; `score_options` says with which:

    python trl_recipes/score.py --adapter outputs/embedded_grpo --dataset trl_recipes/embedded/data/held_out.jsonl

Greedy answers come back exactly if the batches do: padding shifts positions and sums by a rounding error, and one token
that flips can flip an answer. So problems are taken in order, `batch_size` at a time, padded on the left to the longest
of their batch, with the model in the dtype that it was loaded in, with dropout off and outside autocast. The same
batch size, dtype, device and number of threads give the same answers; the script prints all of them.
"""

import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported
# bitsandbytes warns at import that an optional CPU kernel is missing, and on 8-bit bases that inputs are cast.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import PeftConfig, PeftModel  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig  # noqa: E402

from peft_tinylora import TinyLoraError  # noqa: E402
from peft_tinylora.inline import PREFIX, inline_adapter_of_folder, name_of  # noqa: E402
from peft_tinylora.served import skeleton  # noqa: E402
from trl_recipes.arguments import (  # noqa: E402
    LORA_OPTIONS,
    ProblemArguments,
    RecipeArguments,
    RecipeError,
    ScoreArguments,
    parse,
    refuse_lora_options,
    refuse_quantization_options,
)
from trl_recipes.problems import load_rows, to_problems  # noqa: E402
from trl_recipes.rewards import exact_match_reward  # noqa: E402
from trl_recipes.trainer_setup import hide_known_noise, load_model, load_tokenizer  # noqa: E402
from trl_recipes.vllm_requests import Prompt  # noqa: E402
from trl_recipes.vllm_servers import VllmServers, split_urls  # noqa: E402


@dataclass(frozen=True)
class Score:
    """What `score` measured.

    Args:
        fraction (`float`): share of problems solved, 0 to 1.
        rewards (`list[float]`): 1.0 or 0.0 for each problem, in the order given.
        completions (`list[str]`): what the model answered, in the same order.
    """

    fraction: float
    rewards: list[float]
    completions: list[str]

    @property
    def answers_sha256(self) -> str:
        """First 16 hex digits of the SHA-256 of all answers: equal in two runs where every answer is."""
        return hashlib.sha256(json.dumps(self.completions).encode()).hexdigest()[:16]


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterable[dict],
    *,
    batch_size: int = 64,
    max_completion_length: int = 512,
    sampled: bool = False,
    seed: int = 0,
    progress: str | None = None,
) -> Score:
    """
    Lets the model answer each problem once and scores the answers with the training reward.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, on the device where it shall run. Left as it was found.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, which must pad on the left.
        problems (`Iterable[dict]`):
            `{"prompt": str or list of messages, "answer": str}`.
        batch_size (`int`, *optional*, defaults to `64`):
            Problems generated at once.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Most tokens in an answer.
        sampled (`bool`, *optional*, defaults to `False`):
            Whether to sample at temperature 1 from the full distribution instead of taking the likeliest token.
        seed (`int`, *optional*, defaults to `0`):
            Torch seed of the samples. The global random state is left untouched.
        progress (`str`, *optional*):
            Name of the progress bar; without it there is none.

    Returns:
        [`Score`]: the fraction solved, and each problem's reward and answer.

    Raises:
        ValueError: if there is no problem, or the tokenizer pads on the right.
    """
    problems = list(problems)
    if not problems:
        raise ValueError("score needs at least one problem, and got none.")
    if tokenizer.padding_side != "left":
        raise ValueError(f"generation needs padding_side='left', and this tokenizer has {tokenizer.padding_side!r}.")
    config = generation_config(model, tokenizer, max_completion_length, sampled)
    completions = []
    starts = range(0, len(problems), batch_size)
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
            prompts = [problem["prompt"] for problem in problems[start : start + batch_size]]
            inputs = encode(tokenizer, prompts).to(model.device)
            output = model.generate(**inputs, generation_config=config)
            new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
            ended = [cut_at_end(tokens, config.eos_token_id) for tokens in new_tokens]
            completions += tokenizer.batch_decode(ended, skip_special_tokens=True)
    return scored(problems, completions)


def score_on_servers(
    servers: VllmServers,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterable[dict],
    *,
    max_completion_length: int = 512,
    sampled: bool = False,
    progress: str | None = None,
) -> Score:
    """
    As [`score`], with the answers of vLLM servers.

    Args:
        servers ([`VllmServers`]):
            Who answers.
        model (`str`):
            What they shall answer with: an adapter's text or name, or the base model's name.
        tokenizer, problems, max_completion_length, sampled, progress:
            As in [`score`]. Samples are other ones each time.

    Raises:
        ValueError: if there is no problem.
        RecipeError: if the servers refuse, or none answers.
    """
    problems = list(problems)
    if not problems:
        raise ValueError("score needs at least one problem, and got none.")
    inputs = [encode(tokenizer, [problem["prompt"]])["input_ids"][0].tolist() for problem in problems]
    answers = servers.generate(
        model,
        [Prompt(ids, 1) for ids in inputs],
        max_tokens=max_completion_length,
        expected_model=name_of(model) if model.startswith(PREFIX) else model,
        progress=progress,
        temperature=1.0 if sampled else 0.0,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        repetition_penalty=1.0,
    )
    completions = tokenizer.batch_decode([answer[0].token_ids for answer in answers], skip_special_tokens=True)
    return scored(problems, completions)


def scored(problems: list[dict], completions: list[str]) -> Score:
    """Rewards completions of problems as in training."""
    rewards = exact_match_reward(
        [problem["prompt"] for problem in problems], completions, [problem["answer"] for problem in problems]
    )
    return Score(sum(rewards) / len(rewards), rewards, completions)


def score_both_ways(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset | None,
    recipe_args: RecipeArguments,
    max_completion_length: int,
) -> tuple[dict[str, float], str] | tuple[None, None]:
    """Returns the share of problems solved (0 to 1), "greedy" and "sampled" at temperature 1, and the greedy answers'
    `answers_sha256`; None and None without problems.
    """
    if problems is None:
        return None, None
    scores = {
        decoding: score(
            model,
            tokenizer,
            problems,
            batch_size=recipe_args.score_batch_size,
            max_completion_length=max_completion_length,
            sampled=decoding == "sampled",
            progress=decoding if PartialState().is_main_process else None,
        )
        for decoding in ("greedy", "sampled")
    }
    return {decoding: scored.fraction for decoding, scored in scores.items()}, scores["greedy"].answers_sha256


def score_options(
    recipe_args: RecipeArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    max_completion_length: int,
) -> str | None:
    """Returns the options that measure the held-out accuracy of a saved adapter again; None after a mixture."""
    dataset = recipe_args.eval_dataset_name or recipe_args.dataset_name
    if dataset is None:  # the held-out part was split off at random
        return None
    options = {
        "dataset": dataset,
        "dataset_config": None if recipe_args.eval_dataset_name else recipe_args.dataset_config,
        "dataset_split": recipe_args.dataset_test_split,
        "batch_size": recipe_args.score_batch_size,
        "max_completion_length": max_completion_length,
        "max_problems": recipe_args.max_eval_problems,
        "use_cpu": training_args.use_cpu,
        "trust_remote_code": training_args.trust_remote_code,
        "sampled": True,
    }
    options |= {f.name: vars(recipe_args)[f.name] for f in fields(ProblemArguments)}
    of_training = ("model_name_or_path", "use_peft", *LORA_OPTIONS)
    options |= {name: value for name, value in vars(model_args).items() if name not in of_training}
    defaults = {f.name: f.default for f in (*fields(ScoreArguments), *fields(ModelConfig))}
    given = [(name, str(value)) for name, value in options.items() if value != defaults[name]]
    return shlex.join(part for name, value in given for part in (f"--{name}", value))


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list) -> dict[str, torch.Tensor]:
    """Tokenizes prompts as TRL does in training, padded on the left: input_ids and attention_mask (batch, tokens)."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def generation_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, sampled: bool
) -> GenerationConfig:
    """Builds a config that leaves nothing to the model's own, whose values (Qwen's repetition penalty, say) fill gaps."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        temperature=1.0,
        top_p=1.0,
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


def main() -> None:
    """Scores a base model, or a saved adapter on it, and prints the result as JSON."""
    hide_known_noise()
    arguments, model_args = parse((ScoreArguments, ModelConfig), "score.py --adapter DIR --dataset FILE [--help]")
    refuse_lora_options(model_args)
    refuse_quantization_options(model_args)
    if arguments.dataset is None:
        raise RecipeError("no problems: set dataset to a dataset id or a JSON, JSONL or Parquet file.")
    if model_args.model_name_or_path is None and arguments.adapter is not None:
        model_args.model_name_or_path = PeftConfig.from_pretrained(arguments.adapter).base_model_name_or_path

    tokenizer = load_tokenizer(model_args, arguments.trust_remote_code)
    rows = load_rows(arguments.dataset, arguments.dataset_config, arguments.dataset_split)
    problems = to_problems(rows, arguments, tokenizer.chat_template is not None)
    problems = problems.take(min(arguments.max_problems or len(problems), len(problems)))

    settings = {"max_completion_length": arguments.max_completion_length}
    if arguments.vllm_server_base_url is not None:
        refuse_options_of_a_loaded_model(arguments, model_args)
        run = {"servers": arguments.vllm_server_base_url}
        ask = partial(score_on_servers, *servers_and_name(arguments, model_args), tokenizer, problems, **settings)
    else:
        model = load_for_scoring(arguments, model_args)
        settings["batch_size"] = arguments.batch_size
        run = {"dtype": str(model.dtype), "device": model.device.type, "threads": torch.get_num_threads()}
        ask = partial(score, model, tokenizer, problems, **settings)
    greedy = ask(progress="greedy")
    result = {
        "model": model_args.model_name_or_path,
        "adapter": arguments.adapter,
        "dataset": arguments.dataset,
        "problems": len(problems),
        "greedy": greedy.fraction,
        "greedy_answers_sha256": greedy.answers_sha256,
    }
    if arguments.sampled:
        result["sampled"] = ask(sampled=True, progress="sampled").fraction
    result |= settings | run
    print(json.dumps(result), flush=True)


def load_for_scoring(arguments: ScoreArguments, model_args: ModelConfig) -> PreTrainedModel | PeftModel:
    """Loads the base, and the adapter onto it, on the device where it shall run."""
    model = load_model(model_args, arguments.trust_remote_code)
    if arguments.adapter is not None:
        config = PeftConfig.from_pretrained(arguments.adapter)
        if arguments.basis is not None:
            config.basis = arguments.basis
        model = PeftModel.from_pretrained(model, arguments.adapter, config=config)
    device = "cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu"
    # A quantized model was put there while loading.
    return model if model_args.load_in_4bit or model_args.load_in_8bit else model.to(device)


def refuse_options_of_a_loaded_model(arguments: ScoreArguments, model_args: ModelConfig) -> None:
    """Raises [`RecipeError`] for options that servers, which have their own weights, would not heed."""
    given = {
        "basis": arguments.basis,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
    }
    names = [name for name, value in given.items() if value]
    if names:
        raise RecipeError(
            f"{', '.join(names)} with vllm_server_base_url: the servers have their own weights: leave it out."
        )


def servers_and_name(arguments: ScoreArguments, model_args: ModelConfig) -> tuple[VllmServers, str]:
    """Returns the servers, and what they shall answer with: the adapter as text, or their base model's name."""
    servers = VllmServers(split_urls(arguments.vllm_server_base_url))
    if arguments.adapter is None:
        return servers, servers.base_model()
    base = skeleton(model_args.model_name_or_path, model_args.model_revision, arguments.trust_remote_code)
    return servers, inline_adapter_of_folder(arguments.adapter, base).text()


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, TinyLoraError) as error:
        sys.exit(f"error: {error}")
