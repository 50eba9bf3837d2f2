"""A prompt -> one request to a vLLM server, and its answer -> completions; or whose fault it is that there are none.

What is known of vLLM's API is here: which fields are sent, what must be in an answer, and which statuses blame the request.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI, OpenAIError

from trl_recipes.errors import RecipeError, in_one_line


BUSY = (408, 429)  # of the statuses 4xx, those that do not blame the request


@dataclass(frozen=True)
class Prompt:
    """What one request asks for.

    Args:
        token_ids (`list[int]`): the prompt.
        n (`int`): completions wanted.
    """

    token_ids: list[int]
    n: int


@dataclass(frozen=True)
class Completion:
    """What a server generated.

    Args:
        token_ids (`list[int]`): the tokens, the end token included where there was one.
        logprobs (`list[float]`): natural log of the probability of each, at least -9999; nan where the server gave none.
            With `--logprobs-mode processed_logprobs` the server takes the distribution that it sampled from. By default it
            takes the model's own, before temperature, penalties and truncation.
    """

    token_ids: list[int]
    logprobs: list[float]


class ServerFailure(Exception):
    """A request that another server may well answer. The message is the reason in a few words."""


def ask(
    client: OpenAI,
    url: str,
    prompt: Prompt,
    *,
    model: str,
    max_tokens: int,
    expected_model: str | None,
    sampling: Mapping[str, object],
) -> list[Completion]:
    """Sends one request and returns its completions.

    Raises:
        ServerFailure: if the server is at fault, or it is not known who is.
        RecipeError: if the request is, or another model answered.
    """
    try:
        answer = client.completions.create(
            model=model,
            prompt=prompt.token_ids,
            n=prompt.n,
            max_tokens=max_tokens,
            logprobs=0,  # that of the token itself, and no likelier ones beside it
            extra_body={**sampling, "return_token_ids": True},
        )
    except APIStatusError as error:
        said = in_one_line(_sentence_of(error).replace(model, short(model)))
        if error.status_code < 500 and error.status_code not in BUSY:
            remedy = " Set VLLM_API_KEY to its key." if error.status_code in (401, 403) else ""
            raise RecipeError(f"{url} refused a request (HTTP {error.status_code}): {said}{remedy}") from error
        raise ServerFailure(f"HTTP {error.status_code}: {short(said)}") from error
    except APITimeoutError as error:
        raise ServerFailure(f"no answer in time ({type(error.__cause__).__name__})") from error
    except APIConnectionError as error:
        raise ServerFailure(f"no connection ({error.__cause__})") from error
    except (OpenAIError, ValueError, RecursionError) as error:
        raise ServerFailure("the answer is not JSON") from error
    try:
        completions = _completions_of(answer, prompt.n)
    except (AttributeError, TypeError) as error:  # the client looks at no types
        raise ServerFailure(f"the answer is not one of vLLM's ({short(str(error))})") from error
    model_there = str(getattr(answer, "model", None))
    if expected_model is not None and model_there != expected_model:
        raise RecipeError(
            f"{url} answered with another adapter: {short(model_there)!r} instead of {short(expected_model)!r}. "
            "Check that it reads adapters from the model field, and restart it."
        )
    return completions


def _completions_of(answer: object, n: int) -> list[Completion]:
    """Returns the n completions of an answer; raises [`ServerFailure`] if it does not hold them whole."""
    choices = getattr(answer, "choices", None) or []
    if len(choices) != n:
        raise ServerFailure(f"{len(choices)} completions in the answer instead of {n}")
    choices = sorted(choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(n)):
        raise ServerFailure(
            f"completions {short(repr([choice.index for choice in choices]))} in the answer instead of 0 to {n - 1}"
        )
    completions = []
    for choice in choices:
        if choice.finish_reason == "abort":  # a server that is stopped sends what it has so far, with status 200
            raise ServerFailure("it broke off a completion, as a server does that is stopped")
        token_ids = getattr(choice, "token_ids", None)
        if token_ids is None:
            raise ServerFailure("no token_ids in the answer: vLLM 0.22 or newer is needed")
        logprobs = choice.logprobs.token_logprobs if choice.logprobs else None
        if logprobs is None:
            raise ServerFailure("no logprobs in the answer")
        if len(logprobs) != len(token_ids):
            raise ServerFailure(f"{len(logprobs)} logprobs for {len(token_ids)} tokens in the answer")
        wrong = [token for token in token_ids if type(token) is not int or token < 0]
        wrong += [value for value in logprobs if value is not None and not _is_log_probability(value)]
        if wrong or not isinstance(token_ids, list):
            raise ServerFailure(f"{short(repr((wrong or [token_ids])[0]))} among the tokens or logprobs in the answer")
        completions.append(Completion(token_ids, [float("nan" if value is None else value) for value in logprobs]))
    return completions


def _is_log_probability(value: object) -> bool:
    """Whether it is NaN or the logarithm of a probability, which rounding may put just above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isnan(value) or -math.inf < value < 0.01


def _sentence_of(error: APIStatusError) -> str:
    """What the server said, in one line: vLLM puts {"message": ...} under "error", which the client takes off."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return " ".join(str(message or error.message).split())


def short(text: str) -> str:
    """Returns at most 80 characters: of a longer text the start and the end, as adapters begin alike."""
    return text if len(text) <= 80 else f"{text[:40]}…{text[-39:]}"
