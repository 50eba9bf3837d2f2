"""paired.py against scipy and numpy."""

import numpy as np
import pytest
from scipy import stats

from trl_recipes.paired import accuracy, difference


def drawn(seed: int, problems: int, samples: int, chance: float) -> list[list[bool]]:
    rng = np.random.default_rng(seed)
    of_problem = rng.beta(2 * chance, 2 * (1 - chance), size=problems)
    return (rng.random((problems, samples)) < of_problem[:, None]).tolist()


@pytest.mark.parametrize("samples", [1, 5])
def test_accuracy_and_its_error_are_those_of_a_mean_over_problems(samples: int) -> None:
    verdicts = drawn(0, 300, samples, 0.4)
    found = accuracy(verdicts)
    of_problem = np.array(verdicts).mean(axis=1)
    assert found.mean == pytest.approx(of_problem.mean())
    assert found.standard_error == pytest.approx(stats.sem(of_problem))
    if samples == 1:
        share = found.mean
        assert found.standard_error == pytest.approx((share * (1 - share) / 299) ** 0.5)


@pytest.mark.parametrize("samples", [1, 5])
def test_the_difference_is_that_of_a_paired_test(samples: int) -> None:
    ours, theirs = drawn(1, 400, samples, 0.6), drawn(2, 400, samples, 0.5)
    found = difference(ours, theirs)
    gains = np.array(ours).mean(axis=1) - np.array(theirs).mean(axis=1)
    low, high = stats.norm.interval(0.95, loc=gains.mean(), scale=stats.sem(gains))
    assert (found.mean, found.low, found.high) == pytest.approx((gains.mean(), low, high))
    assert (found.gained, found.lost) == ((gains > 0).sum(), (gains < 0).sum())


def test_samples_of_a_problem_are_no_problems_of_their_own() -> None:
    """A hundred equal samples say no more than one: the error doesn't shrink."""
    once = [[True], [False], [True], [False]]
    often = [samples * 100 for samples in once]
    assert accuracy(often) == accuracy(once)
    assert difference(often, [[False] * 100] * 4) == difference(once, [[False]] * 4)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Pairs of two models of the same accuracy, answers to one problem alike: 95 % of the intervals hold 0."""
    hits = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        hard = rng.random(200)
        ours, theirs = ([[bool(x)] for x in rng.random(200) > hard] for _ in range(2))
        found = difference(ours, theirs)
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_one_problem_has_no_error_and_other_problems_cannot_be_paired() -> None:
    assert accuracy([[True, False]]).standard_error is None
    found = difference([[True]], [[False]])
    assert (found.mean, found.low, found.high, found.gained, found.lost) == (1, None, None, 1, 0)
    with pytest.raises(ValueError, match="shorter"):
        difference([[True], [True]], [[True]])
