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


def test_the_difference_of_single_answers_is_newcombes() -> None:
    """Both right, gained, lost, neither -> the interval by method 10: of his example, and where nobody solves it twice.

    There the verdicts do not go together, and it is two of Wilson's intervals.
    """

    def wilson(solved: int) -> np.ndarray:
        square, share = 1.959964**2, solved / 30
        middle, margin = share + square / 60, 1.959964 * (share * (1 - share) / 30 + square / 3600) ** 0.5
        return (middle + np.array([-margin, margin])) / (1 + square / 30)

    one, none = wilson(1), wilson(0)
    examples = {
        (36, 12, 2, 0): (0.0569, 0.3404),
        (0, 1, 0, 29): (1 / 30 - np.hypot(1 / 30 - one[0], none[1]), 1 / 30 + np.hypot(one[1] - 1 / 30, 0)),
    }
    for (both, gained, lost, neither), interval in examples.items():
        ours = [[True]] * (both + gained) + [[False]] * (lost + neither)
        theirs = [[True]] * both + [[False]] * gained + [[True]] * lost + [[False]] * neither
        found = difference(ours, theirs)
        assert (found.low, found.high) == pytest.approx(interval, abs=1e-4), (both, gained, lost, neither)
        assert (found.gained, found.lost) == (gained, lost)


def test_the_difference_of_many_is_that_of_a_paired_test() -> None:
    ours, theirs = drawn(1, 4000, 5, 0.6), drawn(2, 4000, 5, 0.5)
    found = difference(ours, theirs)
    gains = np.array(ours).mean(axis=1) - np.array(theirs).mean(axis=1)
    low, high = stats.t.interval(0.95, len(gains) - 1, loc=gains.mean(), scale=stats.sem(gains))
    assert (found.mean, found.low, found.high) == pytest.approx((gains.mean(), low, high), abs=2e-4)
    assert (found.gained, found.lost) == ((gains > 0).sum(), (gains < 0).sum())


@pytest.mark.parametrize(
    ("problems", "quantile"), [(2, 3.1824), (3, 2.7764), (9, 2.2281), (28, 2.0452), (999, 1.9623)]
)
def test_the_difference_of_a_few_has_two_problems_more_and_students_quantile(problems: int, quantile: float) -> None:
    """The quantiles, of one more degree of freedom than problems, are those of printed tables."""
    ours, theirs = drawn(3, problems, 4, 0.6), drawn(4, problems, 4, 0.5)
    found = difference(ours, theirs)
    gains = np.append(np.array(ours).mean(axis=1) - np.array(theirs).mean(axis=1), [0.5, -0.5])
    margin = quantile * gains.std(ddof=1) / len(gains) ** 0.5
    expected = max(gains.mean() - margin, -1), min(gains.mean() + margin, 1)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)


def test_samples_of_a_problem_are_no_problems_of_their_own() -> None:
    """A hundred equal samples say no more than one: the error doesn't shrink."""
    once = [[True], [False], [True], [False]]
    often = [samples * 100 for samples in once]
    assert accuracy(often) == accuracy(once)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("solved", "gain"), [(0.0, 0.07), (0.05, 0.05), (0.1, 0.0), (0.3, 0.1), (0.5, 0.0)])
def test_the_interval_holds_the_truth_as_often_as_it_says(samples: int, solved: float, gain: float) -> None:
    """Of 30 problems, some hard for both: at least 95 % of the intervals, but for what chance makes of 500 of them."""
    hits = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        chance = rng.beta(solved, 1 - solved, size=(30, 1)) if solved else np.zeros((30, 1))
        theirs, ours = (rng.random((30, samples)) < chance for _ in range(2))
        ours |= rng.random((30, samples)) < gain / (1 - solved)
        found = difference(ours.tolist(), theirs.tolist())
        assert found.low < found.mean < found.high or found.mean in (found.low, found.high)
        hits += found.low <= gain <= found.high
    assert hits / 500 >= 0.93


@pytest.mark.parametrize("samples", [1, 4])
def test_no_interval_is_without_width(samples: int) -> None:
    same = difference([[True] * samples] * 30, [[True] * samples] * 30)
    assert -0.15 < same.low < -0.02 and 0.02 < same.high < 0.15
    every = difference([[True] * samples] * 30, [[False] * samples] * 30)
    assert every.mean == 1 and 0.7 < every.low < 0.97 and every.high <= 1


def test_one_problem_has_no_error_and_other_problems_cannot_be_paired() -> None:
    assert accuracy([[True, False]]).standard_error is None
    found = difference([[True]], [[False]])
    assert (found.mean, found.low, found.high, found.gained, found.lost) == (1, None, None, 1, 0)
    with pytest.raises(ValueError, match="shorter"):
        difference([[True], [True]], [[True]])
