"""equal_answers.py on the pairs of equal_answers.jsonl, each of whose verdicts was decided by a person, none by the code."""

import json
from pathlib import Path

import pytest

from trl_recipes.equal_answers import answers_agree


PAIRS = [json.loads(line) for line in Path(__file__).with_name("equal_answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("found", "gold"), [(pair["found"], pair["gold"]) for pair in PAIRS if pair["equal"]])
def test_answers_are_equal_however_they_are_written(found: str, gold: str) -> None:
    assert answers_agree(found, gold)


@pytest.mark.parametrize(("found", "gold"), [(pair["found"], pair["gold"]) for pair in PAIRS if not pair["equal"]])
def test_what_is_near_the_true_answer_is_not_equal_to_it(found: str, gold: str) -> None:
    assert not answers_agree(found, gold)
