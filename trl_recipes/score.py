"""The fraction of problems that a model solves: greedy, or sampled at temperature 1.

As a library, `score(model, tokenizer, problems)`; the recipes call it before and after training, both ways. As a script
it reloads a saved adapter, or any model, in a new process, scores it beside its controls (variants.py) and prints JSON:

    python trl_recipes/score.py --adapter outputs/embedded_grpo --benchmark embedded
    python trl_recipes/score.py --adapter DIR --benchmark math500 --chat true --samples 4 --output_dir outputs/math500

Greedy answers come back exactly if the batches do: padding shifts positions and sums by a rounding error, and one token
that flips can flip an answer. So problems are taken in order, `batch_size` at a time, padded on the left to the longest
of their batch, with the model in the dtype that it was loaded in, with dropout off and outside autocast. The same
batch size, dtype, device and number of threads give the same answers; the script prints all of them.
"""

import gc
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported
# bitsandbytes warns at import that an optional CPU kernel is missing, and on 8-bit bases that inputs are cast.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from peft_tinylora.versions import check_libraries_of_recipes  # noqa: E402


check_libraries_of_recipes()

import torch  # noqa: E402
from peft import PeftConfig, PeftModel  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from trl import ModelConfig  # noqa: E402

from trl_recipes.answer_log import AnswerLog  # noqa: E402
from trl_recipes.arguments import (  # noqa: E402
    LORA_OPTIONS,
    parse,
    refuse_lora_options,
    refuse_quantization_options,
    run_script,
)
from trl_recipes.benchmark_sets import BENCHMARKS, fill_in_benchmark, load_benchmark_rows  # noqa: E402
from trl_recipes.errors import RecipeError  # noqa: E402
from trl_recipes.evaluation import (  # noqa: E402
    GREEDY,
    SAMPLED,
    Plan,
    answer_all,
    evaluate,
    greedy_completions,
    summarize,
)
from trl_recipes.evaluation_report import check_card_can_be_updated, update_card, write_report  # noqa: E402
from trl_recipes.problems import load_rows, to_problems  # noqa: E402
from trl_recipes.rewards import exact_match_reward  # noqa: E402
from trl_recipes.score_arguments import ScoreArguments, command_options  # noqa: E402
from trl_recipes.trainer_setup import hide_known_noise, load_tokenizer, quantization_of  # noqa: E402
from trl_recipes.variants import (  # noqa: E402
    BASE,
    MODEL,
    Sampling,
    Variant,
    asks_model,
    check_base_model,
    load_for_scoring,
    refuse_options_of_a_loaded_model,
    variants_of_model,
    variants_on_servers,
)


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
        return digest_of(self.completions)


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
    variant = Variant(MODEL, asks_model(model, tokenizer, max_completion_length), nullcontext, batch_size)
    log, decoding = AnswerLog(None, {}), SAMPLED if sampled else GREEDY
    answer_all(variant, decoding, 1, problems, Plan(), log, sampled_seed=seed, progress=progress)
    return scored(problems, [answer.completion for answer in log.answers.values()])


def digest_of(what: object) -> str:
    """First 16 hex digits of the SHA-256 of something as JSON."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def scored(problems: list[dict], completions: list[str]) -> Score:
    """Rewards completions of problems as in training."""
    rewards = exact_match_reward(
        [problem["prompt"] for problem in problems], completions, [problem["answer"] for problem in problems]
    )
    return Score(sum(rewards) / len(rewards), rewards, completions)


def main() -> None:
    """Scores a model, or a saved adapter on its base beside its controls, and prints the result as JSON."""
    hide_known_noise()
    arguments, model_args = parse(
        (ScoreArguments, ModelConfig), "score.py --adapter DIR --benchmark NAME|--dataset FILE [--help]"
    )
    refuse_lora_options(model_args)
    refuse_quantization_options(model_args)
    check_card_can_be_updated(arguments)
    check_base_model(arguments)
    if arguments.benchmark is not None:
        fill_in_benchmark(arguments)
    if arguments.dataset is None:
        raise RecipeError("no problems: set benchmark, or dataset to a dataset id or a JSON, JSONL or Parquet file.")
    if arguments.vllm_server_base_url is not None:
        refuse_options_of_a_loaded_model(arguments, model_args)
    if model_args.model_name_or_path is None and arguments.adapter is not None:
        model_args.model_name_or_path = PeftConfig.from_pretrained(arguments.adapter).base_model_name_or_path

    tokenizer = load_tokenizer(model_args, arguments.trust_remote_code)
    problems = load_problems(arguments, tokenizer)
    if arguments.vllm_server_base_url is not None:
        run = {"servers": arguments.vllm_server_base_url}
        variants = variants_on_servers(arguments, model_args, tokenizer)
    else:
        model = load_for_scoring(arguments, model_args)
        run = {"batch_size": arguments.batch_size, "dtype": str(model.dtype), "device": model.device.type}
        run |= {"threads": torch.get_num_threads()}
        variants = variants_of_model(model, tokenizer, arguments)

    sampling = Sampling(arguments.temperature, arguments.top_p)
    plan = Plan(arguments.sampled, arguments.samples, sampling, arguments.seed)
    settings = {
        "model": model_args.model_name_or_path,
        "model_revision": model_args.model_revision,
        "quantization": quantization_of(model_args),
        "attn_implementation": model_args.attn_implementation,
        "base_model": arguments.base_model,
        "adapter": arguments.adapter,
        "adapter_sha256": digest_of_adapter(arguments.adapter),
        "basis": arguments.basis,
        "problems_sha256": digest_of(problems),
        "max_completion_length": arguments.longest,
    }
    settings |= {"samples": arguments.samples, "temperature": sampling.temperature, "top_p": sampling.top_p}
    if arguments.vllm_server_base_url is None:
        settings |= {"seed": arguments.seed} | run
    folder = None if arguments.output_dir is None else Path(arguments.output_dir)
    log = AnswerLog(folder, settings)
    evaluate(variants, problems, plan, log)
    names = [variant.name for variant in variants]
    if arguments.base_model is not None:
        del variants, model  # before the other is loaded: the memory may hold one of them
        gc.collect()
        base_args = replace(model_args, model_name_or_path=arguments.base_model, model_revision="main")
        ask = asks_model(load_for_scoring(arguments, base_args), tokenizer, arguments.longest)
        evaluate([Variant(BASE, ask, nullcontext, arguments.batch_size)], problems, plan, log)
        names.append(BASE)

    summary = summarize(names, problems, plan, log)
    asked = summary["variants"][names[0]]
    result = {
        "model": model_args.model_name_or_path,
        "adapter": arguments.adapter,
        "base_model": arguments.base_model,
        "benchmark": arguments.benchmark,
        "dataset": arguments.dataset,
        "problems": len(problems),
        "greedy": asked["greedy"]["strict"]["mean"],
        "greedy_answers_sha256": digest_of(greedy_completions(names[0], len(problems), log)),
    }
    if arguments.sampled:
        result["sampled"] = asked["sampled"]["strict"]["mean"]
    result |= {"max_completion_length": arguments.longest} | run
    if arguments.samples:
        result |= {name: settings[name] for name in ("samples", "temperature", "top_p", "seed") if name in settings}
    result |= summary
    print(json.dumps(result), flush=True)
    if folder is not None:
        write_report(folder, result)
    if arguments.update_card:
        update_card(arguments, result, options_of(arguments, model_args))


def load_problems(arguments: ScoreArguments, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Loads the problems, and says on stderr what of them may not be meant."""
    if arguments.benchmark is None:
        rows = load_rows(cast(str, arguments.dataset), arguments.dataset_config, arguments.dataset_split)
    else:
        rows = load_benchmark_rows(arguments)
        expected = BENCHMARKS[arguments.benchmark].problems
        if len(rows) != expected:
            print(
                f"note: {arguments.dataset} has {len(rows)} problems, {arguments.benchmark} {expected}.",
                file=sys.stderr,
            )
        if tokenizer.chat_template is not None and not arguments.chat:
            print("note: the tokenizer has a chat template, which chat: true would use.", file=sys.stderr)
    problems = to_problems(rows, arguments, tokenizer.chat_template is not None)
    problems = list(problems.take(min(arguments.max_problems or len(problems), len(problems))))
    if not problems:
        raise RecipeError(f"{arguments.dataset} has no problems: check dataset and dataset_split.")
    return problems


def digest_of_adapter(adapter: str | None) -> str | None:
    """Tells the adapter in a folder from another one that is trained into the same folder; `None` of an id."""
    files = [] if adapter is None else sorted(Path(adapter).glob("adapter_*"))
    return digest_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files]) if files else None


def options_of(arguments: ScoreArguments, model_args: ModelConfig) -> str:
    """Returns the options that measure the same again, without those that say where to put it."""
    left_out = ["adapter", "output_dir", "update_card", "vllm_server_base_url", "model_name_or_path", "use_peft"]
    if arguments.vllm_server_base_url is not None:  # which draw with their own
        left_out.append("seed")
    shown = {f.name: vars(arguments)[f.name] for f in fields(ScoreArguments) if f.name not in left_out}
    shown["max_completion_length"] = arguments.longest
    shown |= {name: value for name, value in vars(model_args).items() if name not in (*left_out, *LORA_OPTIONS)}
    defaults: dict[str, object] = {}
    if arguments.benchmark is not None:
        known = BENCHMARKS[arguments.benchmark]
        defaults |= {"question_column": known.question, "answer_column": known.answer}
        defaults |= {"prompt_template": known.prompt_template, "max_completion_length": known.max_completion_length}
        if shown["dataset"] == known.dataset:
            defaults |= {"dataset": known.dataset, "dataset_config": known.config, "dataset_split": known.split}
    return command_options(shown, defaults)


if __name__ == "__main__":
    run_script(main)
