"""vllm_requests.py: what one request holds, and what its answer must."""

import json
import math
from collections.abc import Callable

import pytest
from recipes.fake_vllm import MODEL, expected, make_prompts

from trl_recipes.arguments import RecipeError
from trl_recipes.vllm_requests import Prompt
from trl_recipes.vllm_servers import VllmServers


def test_choices_are_taken_by_their_index(start):
    server = start(faults=[lambda answer: answer | {"choices": answer["choices"][::-1]}])
    prompts = make_prompts(1, n=3)
    assert VllmServers([server.url]).generate(MODEL, prompts, max_tokens=8) == expected(prompts)


def test_the_request_holds_what_was_asked_for(start, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    server = start()
    sampling = {"seed": 11, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    prompts = [Prompt([5, 6, 7], 4), Prompt([8], 1)]
    VllmServers([server.url]).generate(MODEL, prompts, max_tokens=64, **sampling)
    common = {"model": MODEL, "max_tokens": 64, "logprobs": 0, "return_token_ids": True, **sampling}
    assert sorted(server.bodies, key=lambda body: body["prompt"]) == [
        {**common, "prompt": [5, 6, 7], "n": 4},
        {**common, "prompt": [8], "n": 1},
    ]
    assert server.keys == ["Bearer a-key"] * 2


@pytest.mark.parametrize("status", [401, 404, 422])
def test_a_request_that_is_refused_ends_the_call_and_names_the_status(start, status):
    server = start(faults=[(status, "No.")])
    with pytest.raises(RecipeError, match=rf"{server.url} refused a request \(HTTP {status}\): No\.") as caught:
        VllmServers([server.url]).generate(MODEL, make_prompts(1), max_tokens=8)
    assert str(caught.value).endswith("Set VLLM_API_KEY to its key.") == (status == 401)


def of_choice(**fields) -> Callable[[dict], dict]:
    """Makes an answer whose last choice has other fields."""
    return lambda answer: answer | {"choices": [*answer["choices"][:-1], answer["choices"][-1] | fields]}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda answer: answer | {"choices": answer["choices"][1:]}, "1 completions in the answer instead of 2"),
        (lambda answer: {"object": "list"}, "0 completions in the answer instead of 2"),
        (of_choice(token_ids=None), "no token_ids in the answer: vLLM 0.22 or newer is needed"),
        (of_choice(token_ids=[1, 2, 3]), "2 logprobs for 3 tokens in the answer"),
        (of_choice(logprobs=None), "no logprobs in the answer"),
        (of_choice(finish_reason="abort"), "it broke off a completion, as a server does that is stopped"),
        (lambda answer: json.dumps(answer).encode()[:-9], "the answer is not JSON"),
    ],
    ids=["few choices", "no choices", "no tokens", "lengths", "no logprobs", "aborted", "cut"],
)
def test_a_malformed_answer_is_a_failure_of_the_server(start, log, fault, reason):
    malformed, other = start(faults=[fault]), start()
    prompts = make_prompts(2, n=2)
    assert VllmServers([malformed.url, other.url]).generate(MODEL, prompts, max_tokens=8) == expected(prompts)
    assert log()[0][1].startswith(f"{malformed.url} is put aside: {reason}.")


def test_an_answer_of_an_old_server_has_no_field_for_token_ids(start, log):
    def without_token_ids(answer: dict) -> dict:
        choices = [{k: v for k, v in choice.items() if k != "token_ids"} for choice in answer["choices"]]
        return answer | {"choices": choices}

    VllmServers([start(faults=[without_token_ids]).url]).generate(MODEL, make_prompts(1), max_tokens=8)
    assert "no token_ids in the answer: vLLM 0.22 or newer is needed" in log()[0][1]


def test_a_logprob_that_is_none_or_nan_is_passed_on(start, log):
    logprobs = {"token_logprobs": [None, float("nan")], "text_offset": [], "tokens": [], "top_logprobs": []}
    server = start(faults=[of_choice(logprobs=logprobs)])
    [[completion]] = VllmServers([server.url]).generate(MODEL, [Prompt([7], 1)], max_tokens=8)
    assert completion.token_ids == [7, 0]
    assert [math.isnan(value) for value in completion.logprobs] == [True, True]
    assert log() == []


def test_the_answer_must_name_the_expected_model(start):
    server = start()
    servers = VllmServers([server.url])
    prompts = make_prompts(2)
    assert servers.generate(MODEL, prompts, max_tokens=8, expected_model=MODEL) == expected(prompts)
    other = MODEL.replace("end", "END")
    with pytest.raises(RecipeError) as caught:
        servers.generate(MODEL, prompts, max_tokens=8, expected_model=other)
    assert str(caught.value) == (
        f"{server.url} answered with another adapter: '{MODEL[:40]}…{MODEL[-39:]}' instead of "
        f"'{other[:40]}…{other[-39:]}'. Check that it reads adapters from the model field, and restart it."
    )
