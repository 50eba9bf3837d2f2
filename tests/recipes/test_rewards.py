"""rewards.py: every expected value here is written by hand."""

import threading

import pytest

from trl_recipes.answers import strict_answer
from trl_recipes.rewards import exact_match_reward


def reward(completion, gold) -> float:
    return exact_match_reward(["q"], [completion], [gold])[0]


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        # the mark
        ("6 * 12 = 72\n#### 72", "72"),
        ("####72", "72"),
        ("#### 72  ", "72"),
        ("####   72\nThank you for asking.", "72"),
        ("#### 5\nNo, wait.\n#### 72", "72"),
        ("\n\n#### 72\n\n", "72"),
        # numbers that are equal
        ("#### 72.0", "72"),
        ("#### 72", "72.00"),
        ("#### 072", "72"),
        ("#### +72", "72"),
        ("#### -3", "-3"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("#### 0.50", ".5"),
        ("#### 1/2", "0.5"),
        ("#### 2/4", "1/2"),
        ("#### 0.1", "0.10"),
        ("#### 7e1", "70"),  # Minerva's true answers are written so
        # thousands separators, currency signs, trailing period
        ("#### 1,000", "1000"),
        ("#### 1000", "1,000"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $72", "72"),
        (r"#### \$72", "72"),
        ("#### -$72", "-72"),
        ("#### $-72", "-72"),
        ("#### 72 €", "72"),
        ("#### £1,000.", "1000"),
        ("#### 72.", "72"),
        ("#### $72$", "72"),
        # boxes
        (r"so \boxed{72}", "72"),
        (r"\boxed{1} or rather \boxed{72}.", "72"),
        (r"\boxed{ 72 }", "72"),
        (r"\boxed{72} and \boxed{ unfinished", "72"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{\text{red}}", r"\text{red}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1{,}000}", "1000"),
        (r"#### \boxed{72}", "72"),
        (r"\boxed{5}" + "\n#### 72", "72"),
        # the mark alone in its line, and at both ends
        ("#### \n72", "72"),
        ("#### 72 ####", "72"),
        ("#### 72\n####", "72"),
        # gold as it comes
        ("#### 72", 72),
        ("#### 72", 72.0),
        ("#### 2.5", 2.5),
        ("#### 72", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n48+24 = 72\n#### 72"),
        ("#### 1000", "She had $900.\n#### 1,000"),
        ("#### 72", r"Adding up gives \boxed{72}."),
        (r"\boxed{72}", "#### 72"),
        ("#### 72", " 72\n"),
        # text answers
        ("#### Paris", "Paris"),
        ("#### New   York.", "New York"),
    ],
)
def test_right_answers_earn_one(completion, gold):
    assert reward(completion, gold) == 1.0


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        # wrong
        ("#### 71", "72"),
        ("#### -72", "72"),
        ("#### 720", "72"),
        ("#### 72\n#### 5", "72"),
        ("#### 0.3333333333333333", "1/3"),
        ("#### 100000000000000000001", "100000000000000000000"),
        # no answer marked
        ("The answer is 72", "72"),
        ("72", "72"),
        ("", "72"),
        ("## 72", "72"),
        # malformed
        ("####", "72"),
        ("#### 72 or 73", "72"),
        ("#### 72 73", "72"),
        ("#### 7 2", "72"),
        ("#### 7,2", "72"),
        ("#### 10,00", "1000"),
        ("#### 1,0000", "10000"),
        ("#### 1/0", "1"),
        ("#### --72", "72"),
        ("#### nan", "nan0"),
        (r"\boxed{}", "72"),
        (r"\boxed{72", "72"),
        (r"\boxed 72", "72"),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{", r"\frac{1}{2}"),
        # the mark counts before the box
        (r"\boxed{72}" + "\n#### 5", "72"),
    ],
)
def test_everything_else_earns_nothing(completion, gold):
    assert reward(completion, gold) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ([{"role": "assistant", "content": "#### 72"}], 1.0),
        ([{"role": "assistant", "content": "#### 71"}], 0.0),
        ([{"role": "assistant", "content": ""}], 0.0),
        ([{"role": "assistant", "content": None}], 0.0),
        ([{"role": "assistant", "content": "#### 5"}, {"role": "assistant", "content": "#### 72"}], 1.0),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "so\n"}, {"type": "text", "text": "#### 72"}],
                }
            ],
            1.0,
        ),
        ([], 0.0),
    ],
)
def test_of_chat_messages_the_last_one_is_rewarded(completion, expected):
    assert reward(completion, "72") == expected


def test_a_batch_keeps_its_order_and_ignores_what_trl_adds():
    rewards = exact_match_reward(
        prompts=["a", "b", "c"],
        completions=["#### 1", "#### 1", "one"],
        answer=["1", "2", "1"],
        completion_ids=[[1], [2], [3]],
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, 0.0]
    assert all(type(value) is float for value in rewards)


def test_no_completions_is_no_error():
    assert exact_match_reward([], [], []) == []


@pytest.mark.parametrize(("prompts", "completions", "answers"), [(2, 3, 3), (3, 2, 3), (3, 3, 2)])
def test_lengths_must_agree(prompts, completions, answers):
    with pytest.raises(ValueError, match=f"{prompts} prompts, {completions} completions and {answers} answers"):
        exact_match_reward(["q"] * prompts, ["#### 1"] * completions, ["1"] * answers)


def test_a_missing_gold_is_an_error():
    with pytest.raises(ValueError, match="true answer is missing"):
        reward("#### None", None)


@pytest.mark.parametrize("answer", ["9" * 5000, "1e999999999", "1/" + "9" * 5000, r"\boxed{" * 2000])
def test_a_model_cannot_make_the_reward_hang(answer):
    assert reward(f"#### {answer}", "72") == 0.0


def test_latex_is_compared_outside_the_main_thread_too():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(reward(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_extracted_answers_are_not_normalised_yet():
    assert strict_answer(r"x \boxed{\frac{a}{b}} y") == r"\frac{a}{b}"
    assert strict_answer("#### $1,000.") == "$1,000."
    assert strict_answer("no mark") is None
