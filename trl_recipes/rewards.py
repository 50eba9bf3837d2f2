"""A completion and the true answer -> 1.0 or 0.0. Training and scoring use this same function.

Which part of a completion is its answer, and when two answers are equal, is said in answers.py and equal_answers.py.

`load_rewards` loads the reward functions that a user names instead, by the same options as `trl grpo`.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection

from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from trl_recipes.answers import is_correct
from trl_recipes.arguments import GRPOArguments
from trl_recipes.errors import RecipeError, in_one_line, shown


# The names and values of `trl grpo`.
TRL_REWARDS: dict[str, Callable] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}
# What TRL passes to each reward function, beside the dataset's columns.
TRL_ARGUMENTS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


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
        ValueError: if the three lists differ in length.
        RecipeError: if a true answer is missing.

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
    rewards: dict[str, Callable | str] = {model: model} if model else {}
    for name in arguments.reward_funcs or []:
        module, _, function = name.rpartition(".")
        if name in TRL_REWARDS:
            rewards[name] = TRL_REWARDS[name]
            continue
        if not module:
            raise RecipeError(
                f"reward_funcs: {shown(name)} is none of {', '.join(TRL_REWARDS)}, nor an import path (a.b)."
            )
        sys.path.insert(0, os.getcwd())
        try:
            rewards[name] = vars(importlib.import_module(module))[function]
        except ImportError as error:
            raise RecipeError(
                f"reward_funcs: cannot import {shown(name)} from {os.getcwd()}: {in_one_line(error)}."
            ) from error
        except KeyError as error:
            raise RecipeError(f"reward_funcs: module {shown(module)} has no function {shown(function)}.") from error
    if not rewards:
        rewards["exact_match_reward"] = exact_match_reward
    return rewards


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


def completion_text(completion: str | list[dict]) -> str:
    """Returns the text of a completion: the string itself, or the last message's content (`""` where there is none)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else None
    if isinstance(content, list):  # content in parts, as multimodal chat templates have it
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""
