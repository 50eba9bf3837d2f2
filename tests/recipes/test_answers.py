r"""answers.py and equal_answers.py on what models write: every verdict here was decided by a person, none by the code."""

import json
import threading
import time
from pathlib import Path

import pytest

from trl_recipes.answers import gold_answer, is_correct, lenient_answer, strict_answer
from trl_recipes.equal_answers import answers_agree


RIGHT = [
    # numbers in other digits
    ("18", "18"),
    ("18.0", "18"),
    ("18.", "18"),
    ("018", "18"),
    ("+18", "18"),
    ("-18", "\N{MINUS SIGN}18"),
    ("\N{EN DASH}18", "-18"),
    ("- 18", "-18"),
    (".5", "0.5"),
    ("0.50", "0.5"),
    ("1,234", "1234"),
    ("1,234,567.50", "1234567.5"),
    ("1{,}234", "1234"),
    (r"1\,234", "1234"),
    (r"10\!000", "10000"),
    ("$1,234.50", "1234.5"),
    (r"\$1,234.50", "1234.5"),
    ("$18$", "18"),
    (r"\(18\)", "18"),
    (r"\[18\]", "18"),
    ("**18**", "18"),
    ("**$18**", "18"),
    ("`18`", "18"),
    ("-$18", "-18"),
    ("$-18", "-18"),
    ("two", "2"),
    ("Two", "2"),
    ("twenty-five", "25"),
    ("three apples", "3"),
    ("2 million", "2000000"),
    ("1.5 million dollars", "1,500,000"),
    ("5e3", "5000"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"1.3 \times 10^{-5}", "1.3e-5"),
    (r"6.02\cdot 10^{23}", r"6.02 \times 10^{23}"),
    ("2.5 x 10^3", "2500"),
    ("10^{5}", "100000"),
    ("10^5", "100,000"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    # fractions
    ("1/2", "0.5"),
    ("2/4", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac 1 2", r"\frac{1}{2}"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"),
    (r"\tfrac{3}{4}", "0.75"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{-1}{2}", "-0.5"),
    (r"\frac{1}{-2}", "-1/2"),
    (r"1\frac{1}{2}", "1.5"),
    ("1 1/2", r"\frac{3}{2}"),
    ("3 / 4", "3/4"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"1.1\overline{6}", "7/6"),
    (r"\frac{22}{7}", "22/7"),
    # units on one side, or of one kind on both
    ("18 dollars", "18"),
    ("$18", "18 dollars"),
    ("18 USD", "$18"),
    ("US$18", "18"),
    ("18 €", "18"),
    ("£1,000.", "1000"),
    ("50 cents", "50"),
    ("50 cents", "$0.50"),
    ("72 apples", "72"),
    ("72 apples left", "72"),
    ("72 apples and oranges", "72"),
    ("5 cm", "5"),
    ("5cm", "5"),
    (r"5\text{ cm}", "5"),
    (r"5 \text{ cm}^2", "5"),
    (r"5\,\mathrm{cm}^{2}", r"5\text{ cm}^2"),
    (r"5 \text{ square centimeters}", r"5\text{ cm}^2"),
    ("5 m/s", "5"),
    ("60 miles per hour", "60"),
    ("60 mph", "60"),
    ("60 minutes", "1 hour"),
    ("2 hours", "120 minutes"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90 degrees"),
    ("90\N{DEGREE SIGN}", r"90^\circ"),
    (r"2\pi \text{ cm}", r"2\pi"),
    (r"\frac{\pi}{2}\text{ radians}", r"\frac{\pi}{2}"),
    (r"12\sqrt{3} \text{ square units}", r"12\sqrt{3}"),
    ("She made $18", "18"),
    ("Total = $18", "18"),
    ("The total is 18", "18"),
    ("approximately 18", "18"),
    ("The change is -18", "-18"),
    ("48 + 24 = 72", "72"),
    # percentages
    ("50%", "50"),
    (r"50\%", "50"),
    ("50 percent", "50"),
    ("50%", "0.5"),
    (r"50\%", r"\frac{1}{2}"),
    ("0.5", "50%"),
    ("12.5 %", r"12.5\%"),
    # times
    ("6:30", "6:30"),
    ("6:30 PM", "6:30"),
    ("6:30 p.m.", "6:30 PM"),
    ("06:30", "6:30"),
    # choices and words
    ("(C)", "C"),
    ("C", r"\text{(C)}"),
    (r"\text{(C)}", "C"),
    (r"\textbf{(C)}", "C"),
    ("C.", "C"),
    ("(C) 15", "C"),
    ("C: 15", "C"),
    (r"\textbf{(C)}\ 15", "15"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"\text{even}", "Even"),
    ("yes", "Yes"),
    ("the red car", "red car"),
    ("New   York.", "New York"),
    # algebra
    ("x=5", "5"),
    ("x = 5", "x=5"),
    ("5", "x = 5"),
    ("$x = 5$", "5"),
    (r"x = \frac{1}{2}", "0.5"),
    ("y = 2x + 3", "2x+3"),
    ("f(x) = x + 1", "x+1"),
    ("x^2+1", "1+x^2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("4x(x+1)", "4x^2 + 4x"),
    (r"\frac{x+2}{7}", r"\frac{x}{7} + \frac{2}{7}"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac12\pi", r"\frac{\pi}{2}"),
    (r"\log_2 8", "3"),
    ("6 - 5i", "6-5i"),
    ("1+i", "i + 1"),
    ("1011_2", "1011_{2}"),
    (r"\binom{5}{2}", "10"),
    (r"y=-\frac{1}{2}x+3", "x+2y=6"),
    (r"e^{2}", "e^2"),
    (r"\displaystyle \frac{1}{x}", "x^{-1}"),
    # tuples, sets, intervals, matrices
    (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    ("(3,4)", "(3, 4)"),
    ("(0.5, 2)", r"(\frac{1}{2}, 2)"),
    ("1, 2, 3", "3, 2, 1"),
    ("2 and 3", "3, 2"),
    (r"2 \text{ and } 3", "2,3"),
    ("x = 2 or x = 3", "2, 3"),
    (r"x=2 \text{ or } x=3", "3,2"),
    (r"\{1, 2\}", "2, 1"),
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    (r"\pm 2", "2, -2"),
    ("100, 200, 300", "100,200,300"),
    ("1,000, 2,000", "1000, 2000"),
    ("(1,2), (3,4)", "(3,4), (1,2)"),
    (r"[1, \infty)", r"[1,\infty)"),
    (r"(-\infty, 3]", r"\left(-\infty,3\right]"),
    (r"x \in [1,2]", "[1,2]"),
    ("1 < x < 2", "(1,2)"),
    ("(1,2)", "1 < x < 2"),
    (r"x \ge 3", r"x \geq 3"),
    (r"(1,2) \cup (3,4)", r"(3,4)\cup(1,2)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ("3:4", "3 : 4"),
]

WRONG = [
    ("19", "18"),
    ("-18", "18"),
    ("180", "18"),
    ("7", "77"),
    ("77", "7"),
    ("1.8", "18"),
    ("1,23", "123"),
    ("1.234,5", "1234.5"),  # written as in Germany; in English it is the list 1.234, 5
    ("10,00", "1000"),
    ("1,0000", "10000"),
    ("7 2", "72"),
    ("--72", "72"),
    ("72 or 73", "72"),
    ("72, 73", "72"),
    ("72", "72, 73"),
    ("not 72", "72"),
    ("less than 72", "72"),
    ("at least 72", "72"),
    ("72 million", "72"),
    ("seven", "8"),
    ("twenty-five", "20"),
    ("2e3", "2"),
    (r"2 \times 10^{3}", r"2 \times 10^{4}"),
    ("0.33", "1/3"),
    ("0.3333333333", "1/3"),
    (r"0.333333", r"\frac{1}{3}"),
    ("0.667", r"\frac{2}{3}"),
    ("3.14", r"\pi"),
    ("22/7", r"\pi"),
    ("1/0", "1"),
    (r"\frac{1}{3}", r"\frac{1}{2}"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    (r"1\frac{1}{2}", r"\frac{1}{2}"),
    ("1 1/2", "11/2"),
    (r"-\frac{1}{2}", r"\frac{1}{2}"),
    ("5 cm", "5 m"),
    (r"5 \text{ cm}", r"5 \text{ cm}^2"),
    ("5 dollars", "5 cents"),
    ("60 minutes", "60 hours"),
    ("5 and a half", "5"),
    ("5x", "5"),
    ("5", "5x"),
    ("5i", "5"),
    (r"2\pi", "2"),
    ("xy - 3", "-3"),
    ("pi + 1", "1"),
    ("ab 3", "4"),
    (r"2\sqrt{3}", "2"),
    ("2 pi", "2"),
    ("50%", "5"),
    ("50%", "500"),
    ("0.5", "50"),
    ("50", "0.5"),
    ("6:30", "6:03"),
    ("6:30 AM", "6:30 PM"),
    ("6:30", "630"),
    ("3:4", "4:3"),
    ("(B)", "C"),
    ("B", "(C)"),
    ("(B) 15", "C"),
    ("Evelyn", "Briana"),
    ("even", "neve"),
    ("on", "No"),
    ("even", "odd"),
    ("not even", "even"),
    ("Evelyn", "5"),
    ("5", "Evelyn"),
    ("x=6", "5"),
    ("x=5", "y=5"),
    ("x=5", "x=6"),
    ("x^2", "x^3"),
    ("x+1", "x-1"),
    ("(x+1)^2", "x^2+1"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    (r"\sqrt{2}", "2"),
    ("6+5i", "6-5i"),
    ("1011_2", "1010_2"),
    ("(3,4)", "(4,3)"),
    ("(3,4)", "(3,4,5)"),
    ("(3,4)", "3"),
    ("1, 2", "1, 2, 3"),
    ("1, 2, 2", "1, 2, 3"),
    ("1, 2, 3", "1, 2"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\pm 2", "2"),
    ("2", r"\pm 2"),
    ("[1,2]", "(1,2)"),
    ("[1,2)", "(1,2]"),
    (r"x > 3", r"x \ge 3"),
    (r"x > 3", "3"),
    (r"(1,\infty)", r"(-\infty,1)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("", "5"),
    ("nan", "5"),
    (r"\text{no solution}", "0"),
    (r"\infty", r"-\infty"),
]


@pytest.mark.parametrize(("found", "gold"), RIGHT)
def test_equal_however_they_are_written(found: str, gold: str) -> None:
    assert answers_agree(found, gold)


@pytest.mark.parametrize(("found", "gold"), WRONG)
def test_near_is_not_equal(found: str, gold: str) -> None:
    assert not answers_agree(found, gold)


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
    ("####", None),
    ("#### \n72", None),
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
    ("#### \n72", "72"),
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
