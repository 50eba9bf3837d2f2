r"""A completion and the true answer -> 1.0 or 0.0. Training and scoring use this same function.

The answer of a text is what stands on the line after its last `####` (GSM8K's mark) or, where there is no such mark,
the inside of its last balanced `\boxed{}`. A text with neither has no answer: a model that computes the right number
and does not say which one it is has not solved the problem, and is told so.

Numbers are compared as exact fractions, so that 72, 72.0, $72 and 1,000 / 1000 agree and 0.1 + 0.2 never comes up.
Only LaTeX is handed to `math_verify`.

`load_rewards` loads the reward functions that a user names instead, by the same options as `trl grpo`.
"""

import importlib
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Collection
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from trl_recipes.arguments import GRPOArguments, RecipeError


ANSWER_MARK = "####"
BOX_MARK = r"\boxed{"
CURRENCY_SIGNS = "$£€¥"
# Longer digit strings are no answers, and Python refuses to convert thousands of digits.
NUMBER = re.compile(r"[+-]?([0-9]{1,100}(\.[0-9]{0,100})?|\.[0-9]{1,100})(/[0-9]{1,100})?")
# The names and values of `trl grpo`.
TRL_REWARDS = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}
# What TRL passes to each reward function, beside the dataset's columns.
TRL_ARGUMENTS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(,[0-9]{3})+(?![0-9,])")


def exact_match_reward(
    prompts: list, completions: list, answer: list[str | int | float], **kwargs: object
) -> list[float]:
    r"""
    Rewards each completion with 1.0 where its marked answer equals the true one, else 0.0.

    Args:
        prompts (`list`):
            The prompts, plain strings or lists of chat messages. Only counted.
        completions (`list[str]` or `list[list[dict]]`):
            The completions, plain strings or lists of chat messages (`{"role", "content"}`), of which the last one's
            text is read.
        answer (`list[str | int | float]`):
            The true answers: a bare answer (`"72"`, `72`, `r"\frac{1}{2}"`) or a whole solution that marks it.
        **kwargs:
            What else TRL passes to a reward function. Ignored.

    Returns:
        `list[float]`: one reward a completion.

    Raises:
        ValueError: if the three lists differ in length, or a true answer is missing.

    Example:
        >>> exact_match_reward(["", ""], ["2 + 2 = 4\n#### 4", "it is 4"], ["4", "4"])
        [1.0, 0.0]
    """
    if not len(prompts) == len(completions) == len(answer):
        raise ValueError(
            f"exact_match_reward needs one prompt and one answer a completion, but got {len(prompts)} prompts, "
            f"{len(completions)} completions and {len(answer)} answers."
        )
    return [
        float(is_correct(completion_text(completion), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def load_rewards(arguments: GRPOArguments) -> dict[str, Callable | str]:
    """
    Loads what `reward_funcs` and `reward_model_name_or_path` name, as `trl grpo` does; by default the exact match.

    Returns:
        `dict[str, Callable | str]`: reward functions by name, after the reward model, a string, where one is named.

    Raises:
        RecipeError: if there is no such function.
    """
    model = arguments.reward_model_name_or_path
    rewards = {model: model} if model else {}
    for name in arguments.reward_funcs or []:
        module, _, function = name.rpartition(".")
        if name in TRL_REWARDS:
            rewards[name] = TRL_REWARDS[name]
            continue
        if not module:
            raise RecipeError(f"reward_funcs: {name!r} is none of {', '.join(TRL_REWARDS)}, nor an import path (a.b).")
        sys.path.insert(0, os.getcwd())
        try:
            rewards[name] = vars(importlib.import_module(module))[function]
        except ImportError as error:
            raise RecipeError(f"reward_funcs: cannot import {name!r} from {os.getcwd()}: {error}.") from error
        except KeyError as error:
            raise RecipeError(f"reward_funcs: module {module!r} has no function {function!r}.") from error
    return rewards or {"exact_match_reward": exact_match_reward}


def check_rewards(
    rewards: dict[str, Callable | str], columns: Collection[str], first_prompt: str | list[dict]
) -> None:
    """Raises [`RecipeError`] where a reward function needs a column or chat messages that the dataset lacks."""
    there = {*TRL_ARGUMENTS, *columns}
    for name, reward in rewards.items():
        if isinstance(reward, str):  # a model, which reads the text
            continue
        parameters = inspect.signature(reward).parameters.values()
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        missing = [repr(parameter) for parameter in needed if parameter not in there]
        if missing:
            raise RecipeError(
                f"{name} reads {', '.join(missing)}, and the dataset has {list(columns)}: rename one of these columns, "
                "or choose another reward."
            )
        if reward in (accuracy_reward, reasoning_accuracy_reward, think_format_reward) and isinstance(
            first_prompt, str
        ):
            raise RecipeError(f"{name} reads chat messages, and these prompts are plain strings: set chat: true.")


def is_correct(text: str, gold: str | int | float) -> bool:
    """Says whether the answer that `text` marks equals `gold`, itself a bare answer or a whole solution."""
    found = extract_answer(text)
    return found is not None and answers_agree(found, gold_answer(gold))


def completion_text(completion: str | list[dict]) -> str:
    """Returns the text of a completion: the string itself, or the last message's content (`""` where there is none)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else None
    if isinstance(content, list):  # content in parts, as multimodal chat templates have it
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def gold_answer(gold: str | int | float) -> str:
    """Returns the bare true answer: what a solution marks, or the value itself where it marks nothing."""
    if gold is None:
        raise ValueError("a true answer is missing (None): drop such rows from the dataset.")
    text = str(gold).strip()
    marked = extract_answer(text)
    return text if marked is None else marked


def extract_answer(text: str) -> str | None:
    r"""Returns what follows the last `####` on its line, else the inside of the last balanced `\boxed{}`, else None."""
    if ANSWER_MARK in text:
        line = text.rpartition(ANSWER_MARK)[2].strip(" \t").partition("\n")[0].strip()
        boxed = last_boxed(line)
        return (line if boxed is None else boxed) or None
    return last_boxed(text)


def last_boxed(text: str) -> str | None:
    r"""Returns the inside of the last `\boxed{...}` whose braces balance, None where there is none or it is empty."""
    start = text.rfind(BOX_MARK)
    while start != -1:
        depth = 1
        for end in range(start + len(BOX_MARK), len(text)):
            escaped = text[end - 1] == "\\"
            if text[end] == "{" and not escaped:
                depth += 1
            elif text[end] == "}" and not escaped:
                depth -= 1
            if depth == 0:
                return text[start + len(BOX_MARK) : end].strip() or None
        start = text.rfind(BOX_MARK, 0, start)
    return None


def answers_agree(found: str, gold: str) -> bool:
    """Says whether two bare answers are equal: as text once normalised, as numbers, or as LaTeX."""
    found, gold = normalise(found), normalise(gold)
    if found == gold:
        return True
    found_number, gold_number = as_number(found), as_number(gold)
    if found_number is not None and gold_number is not None:
        return found_number == gold_number
    return "\\" in found + gold and latex_agrees(found, gold)


def normalise(answer: str) -> str:
    """Drops what does not change an answer: thousands separators, currency sign, trailing period, extra spaces."""
    answer = " ".join(answer.replace("\N{MINUS SIGN}", "-").replace(r"\$", "$").replace("{,}", ",").split())
    answer = answer.rstrip(".").strip()
    sign = "-" if answer.startswith("-") else ""
    answer = sign + answer.removeprefix("-").strip(CURRENCY_SIGNS + " ")
    return THOUSANDS.sub(lambda number: number.group().replace(",", ""), answer)


def as_number(answer: str) -> Fraction | None:
    """Reads `-3`, `72.0`, `.5` or `1/2` as an exact fraction; None for anything else."""
    if not NUMBER.fullmatch(answer):
        return None
    numerator, _, denominator = answer.partition("/")
    if not denominator:
        return Fraction(numerator)
    return Fraction(numerator) / int(denominator) if int(denominator) else None


def latex_agrees(found: str, gold: str) -> bool:
    """Asks `math_verify` whether two LaTeX answers are equal."""
    # Its timeouts use signals, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    config = [LatexExtractionConfig()]
    parsed_found, parsed_gold = (
        parse(f"${answer}$", extraction_config=config, parsing_timeout=seconds) for answer in (found, gold)
    )
    return verify(parsed_gold, parsed_found, timeout_seconds=seconds)
