r"""answers.py on what models write: which answer a text marks, which one a reader finds, and that no text is too hostile."""

import json
import threading
import time
from pathlib import Path

import pytest

from trl_recipes.answers import gold_answer, is_correct, lenient_answer, strict_answer
from trl_recipes.equal_answers import answers_agree


STRICT = [
    ("6 * 12 = 72\n#### 72", "72"),
    ("####72", "72"),
    ("####18.", "18."),
    ("#### 18 dollars\nThank you.", "18 dollars"),
    ("#### 5\nNo, wait.\n#### 72", "72"),
    ("#### **72**", "**72**"),
    (r"so \boxed{72}", "72"),
    (r"so \boxed {72}", "72"),
    (r"so \fbox{72}", "72"),
    (r"\boxed{5} and then, in the end, \boxed{72}.", "72"),
    (r"\boxed{72}, which is more than \boxed{", "72"),
    (r"\boxed{5} is the answer, because 3 + 4 is 7.", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"} \boxed{5} {", "5"),
    (r"$$\boxed{x = 5}$$", "x = 5"),
    (r"#### \boxed{72}", "72"),
    ("\\boxed{5}\n#### 72", "72"),
    ("#### Step 3: add them\nThis gives \\boxed{72}.", "72"),  # a heading of Markdown
    ("#### Final Answer:\nJanet makes $18 every day.", "Janet makes $18 every day."),
    ("#### Final Answer\n**18**", "**18**"),
    ("#### **Answer:** 18", "18"),
    ("#### **Final answer**: 18", "18"),
    ("####\n18", "18"),
    ("#### \n\n18", "18"),
    ("#### 18 ####", "18"),
    ("#### 18\n\n####", "18"),
    ("#### 18\n#### Verification\nIt is right.", "18"),
    ("\\boxed{5}\n#### Conclusion\nThat is all.", "5"),
    ("#### 5\n#### 18 or 19", "18 or 19"),  # the last one decides, right or wrong
    ("#### Evelyn", "Evelyn"),
    ("#### eighteen\nThank you.", "eighteen"),
    ("#### Step 1: eggs\n16-3-4=9\n#### Step 2: money\n9*2=18\nThe answer is 18.", None),
    ("#### 3. Calculate the total", None),
    ("#### 3) Calculate\nwell", None),
    ("#### Total:\nnobody knows", None),
    ("####", None),
    (r"\boxed{}", None),
    (r"\boxed{72", None),
    (r"\boxed 72", None),
    ("The answer is 72", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), STRICT)
def test_what_a_text_marks(text: str, answer: str | None) -> None:
    assert strict_answer(text) == answer


LENIENT = [
    *[(text, answer) for text, answer in STRICT if answer is not None],
    ("A: 72", "72"),
    ("Q: How many?\nA: 72 clips", "72"),
    ("A: She sold 48 in April. So 48 + 24 = 72 clips.", "72"),
    ("The answer is 72.", "72"),
    ("The answer is 72. I am sure, by 100%.", "72"),
    ("Thus the answer is: $72.", "72"),
    ("the final answer is **72**", "72"),
    ("Therefore, the correct answer would be 72 clips because 48 + 24 = 72, and 5 is odd", "72"),
    ("The answer is 48 + 24 = 72 clips in all", "72"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42", "42"),
    ("### Final Answer\n\nAnswer = 42", "42"),
    ("Answer:\n$42$", "42"),
    ("The final answer is:\n\n\\[ x = 5 \\]", "5"),
    (r"The answer is $\frac{3}{4}$ of the cake.", "3/4"),
    (r"The answer is \(\frac{3}{4}\).", "3/4"),
    ("The answer is 3/4 of the cake.", "3/4"),
    ("The answer is $18 and not $20.", "18"),
    ("The answer is (B).", "B"),
    ("The answer is Evelyn.", "Evelyn"),
    ("The answer is x^2 + 1.", "x^2+1"),
    ("First I said the answer is 5. No: the answer is 72", "72"),
    ("That is 1,234 in total", "1234"),
    ("It costs $1,234.50.", "1234.5"),
    ("so x = -5", "-5"),
    ("10 - 5 leaves 5", "5"),
    ("10-5", "5"),
    (r"which is \frac{1}{2}", "1/2"),
    ("that makes .5", "0.5"),
    ("that makes 50%", "50"),
    ("#### Step 1: eggs\n16-3-4=9\n#### Step 2: money\n9*2=18\nThe answer is 18.", "18"),
    ("#### 3. Calculate the total\n9*2 = 18", "18"),
    (r"\boxed 72", "72"),
    ("<think>the answer is 5</think>It is 72.", "72"),
]


@pytest.mark.parametrize(("text", "gold"), LENIENT)
def test_what_a_reader_finds(text: str, gold: str) -> None:
    found = lenient_answer(text)
    assert found is not None and answers_agree(found, gold), found


@pytest.mark.parametrize("text", ["", "I do not know.", "The answer is what you make of it, as they say.", "####"])
def test_a_text_without_an_answer_has_none(text: str) -> None:
    assert lenient_answer(text) is None and not is_correct(text, "5", lenient=True)


@pytest.mark.parametrize(("text", "gold"), [("The answer is 71.", "72"), ("#### 71\nor 72", "72"), ("72 or 73", "72")])
def test_leniency_does_not_choose_the_right_one_of_several(text: str, gold: str) -> None:
    assert not is_correct(text, gold, lenient=True)


def test_what_is_right_strictly_is_right_leniently() -> None:
    for text, answer in STRICT:
        if answer is not None:
            assert is_correct(text, answer) and is_correct(text, answer, lenient=True)


HOSTILE = {
    "boxes": r"\boxed{" * 20_000,
    "braces": "{" * 50_000 + r"\boxed{5}" + "}" * 50_000,
    "digits": "#### " + "9" * 100_000,
    "marks": "####" * 50_000,
    "marked lines": "#### Step 1\n" * 20_000,
    "marked words": "#### " + "answer " * 70 + "\n1\n" + "#### words\n" * 10_000 + "x",
    "answers": "the answer is " * 20_000,
    "commas": "#### " + "1," * 50_000,
    "spaces": "#### 7" + " " * 100_000 + "2",
    "a long box": r"\boxed{" + "x+" * 50_000 + "1}",
    "brackets": r"\boxed{" + "(" * 20_000 + "1" + ")" * 20_000 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 50 + "1" + "}" * 50 + "}",
    "a huge power": r"\boxed{9^{9^{9^{9}}}}",
    "a huge factorial": r"\boxed{(10^{9})!}",
    "an exponent": "#### 1e999999999",
    "a denominator": "#### 1/" + "9" * 5000,
    "control characters": "#### \x00\ud800\x1b[2J",
    "math that is none": r"\boxed{\frac{\int}{\sum} \begin{pmatrix} & \\ \end{cases} $$ \left( }",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_a_model_writes_hangs_or_crashes_the_verdict(text: str) -> None:
    started = time.process_time()
    assert not is_correct(text, r"\frac{1}{2}") and not is_correct(text, r"\frac{1}{2}", lenient=True)
    assert time.process_time() - started < 5  # of this process; math_verify has its own


def test_latex_is_compared_after_a_pair_that_ended_the_other_process_and_in_any_thread() -> None:
    assert not answers_agree(r"9^{9^{9^{9}}}", r"\sqrt{2}")
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(answers_agree(rf"\sqrt{{{4 * n}}}", rf"2\sqrt{{{n}}}")))
        for n in (2, 3, 5, 6, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert verdicts == [True] * 5


GSM8K = Path("/work/shared/data/gsm8k")


@pytest.mark.skipif(not GSM8K.exists(), reason=f"needs GSM8K in {GSM8K}")
@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8ks_own_solutions_are_right_in_every_form_that_models_write(split: str) -> None:
    rows = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    solutions = [row["answer"] for row in rows]
    assert len(solutions) == {"train": 7473, "test": 1319}[split]
    assert all(is_correct(solution, solution) for solution in solutions)
    forms = ("{} The answer is {}.", "{}\nA: {}", "{}\n**Answer:** ${}", "{}\nSo it is {} in all")
    for solution in solutions:
        steps, _, number = solution.rpartition("####")
        number = number.strip()
        for form in forms if "answer" not in steps else forms[:3]:  # a few speak of the answer on the way
            assert is_correct(form.format(steps, number), solution, lenient=True), (form, solution)
            assert not is_correct(form.format(steps, number), solution)
        assert is_correct(rf"{steps} \boxed{{{number}}}", solution)
        wrong = "7" + gold_answer(solution)
        assert not is_correct(f"{steps}#### {wrong}", solution) and not is_correct(
            f"A: {wrong}", solution, lenient=True
        )
