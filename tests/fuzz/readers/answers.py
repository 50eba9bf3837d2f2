"""What a model wrote (answers.py, equal_answers.py, quantities.py, latex_equality.py) and what its server replied (vllm_requests.py)."""

import importlib
import json
import math

from fuzz.harness import Reader
from openai import DefaultHttpxClient, OpenAI
from recipes.fake_vllm import answer_to

from trl_recipes import equal_answers
from trl_recipes.answers import gold_answer, is_correct, lenient_answer, strict_answer
from trl_recipes.equal_answers import answers_agree
from trl_recipes.errors import RecipeError
from trl_recipes.latex_equality import is_heavy, latex_agrees
from trl_recipes.quantities import read_quantity
from trl_recipes.vllm_requests import Prompt, ServerFailure, ask


HTTPX = importlib.import_module(DefaultHttpxClient.__bases__[0].__module__.partition(".")[0])  # httpx2 since openai 3
TEXTS = [
    rb"So it is \boxed{\frac{1}{2}} apples.",
    b"<think>2 + 2</think>\n#### 1,234.50 dollars\n",
    b"The answer is $x = 3 \\text{ and } 4$. **A:** 5 km/h",
    rb"(1, 2, \sqrt{3}) or 50\% of 2.5 \times 10^{3} m",
    b"twenty-one hours, 12:30 p.m., 1 1/2, 0.\\overline{3}, 10101_2, {1; 2}",
]
MATHS = (
    *(
        rb"\boxed{",
        rb"\frac{",
        b"}",
        b"####",
        b"answer is ",
        rb"\text{",
        b"^{",
        b"9" * 30,
        b"!" * 9,
        b"(((((((",
        b"-" * 9,
        b"1," * 40,
    ),
    *(
        b" " * 300,
        b"\\" * 9,
        b"/0",
        b"e999",
        "\N{MINUS SIGN}".encode(),
        "\N{VULGAR FRACTION ONE HALF}".encode(),
        b"=",
        b"$",
        b"%",
    ),
    *(
        b"and ",
        b"1 000 ",
        b"a" * 300,
        b"9^9^9",
        b"[[",
        b"_{10}",
        "\N{SUPERSCRIPT TWO}".encode(),
        "\N{ARABIC-INDIC DIGIT FIVE}".encode(),
    ),
)


def pair_of(data: bytes) -> tuple[str, str]:
    """A text and the true answer, parted by a zero byte; with itself where there is none."""
    found, _, gold = data.decode("utf-8", errors="surrogateescape").partition("\0")
    return found, gold or found


def read_answer(data: bytes) -> None:
    """Verdicts but those of math_verify, which has a reader of its own: what a text marks is correct by itself."""
    equal_answers.latex_agrees = lambda found, gold: not is_heavy(found) and not is_heavy(gold) and found == gold
    try:
        text, gold = pair_of(data)
        strict, lenient = strict_answer(text), lenient_answer(text)
        assert strict is None or strict == lenient
        for answer in (strict, lenient):
            if answer is not None:
                assert answer in text and answers_agree(answer, answer)
        is_right = is_correct(text, gold)
        assert not is_right or is_correct(text, gold, lenient=True)
        assert isinstance(gold_answer(gold), str)
        answers_agree(text[:500], gold[:500])
        quantity = read_quantity(text[:500])
        assert quantity is None or quantity.agrees(quantity)
    finally:
        equal_answers.latex_agrees = latex_agrees


def read_latex(data: bytes) -> None:
    found, gold = pair_of(data)
    assert isinstance(latex_agrees(found[:500], gold[:500]), bool)


def read_reply(data: bytes) -> None:
    """An answer has as many completions as were asked for, each of tokens and as many numbers."""
    reply = HTTPX.MockTransport(
        lambda request: HTTPX.Response(200, content=data, headers={"content-type": "application/json"})
    )
    with HTTPX.Client(transport=reply) as http:
        client = OpenAI(base_url="http://server/v1", api_key="none", max_retries=0, http_client=http)
        completions = ask(
            client, "http://server", Prompt([5, 6], 2), model="a/b", max_tokens=4, expected_model="a/b", sampling={}
        )
    assert len(completions) == 2
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert all(type(token) is int and token >= 0 for token in completion.token_ids)
        assert all(
            type(value) is float and (math.isnan(value) or -math.inf < value < 0.01) for value in completion.logprobs
        )


REPLY = json.dumps(
    answer_to({"n": 2, "prompt": [5, 6], "model": "a/b", "logprobs": 0, "return_token_ids": True})
).encode()

READERS = [
    Reader("answers", read_answer, (), lambda: [*TEXTS, b"\0".join(TEXTS[:2]), rb"\boxed{3}" + b"\x003"], MATHS),
    Reader(
        "latex", read_latex, (), lambda: [*TEXTS, rb"\frac{1}{2}" + b"\x000.5", b"(1,2)\0[1,2]"], MATHS, is_slow=True
    ),
    Reader(
        "reply",
        read_reply,
        (RecipeError, ServerFailure),
        lambda: [REPLY],
        (
            b'"choices": ',
            b'"token_ids": ',
            b'"logprobs": ',
            b'"index": ',
            b'"token_logprobs": ',
            b"[]",
            b"{}",
            b'"model": "a/b"',
        ),
    ),
]
