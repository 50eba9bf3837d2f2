"""Verdicts on the samples of problems -> accuracy, its standard error, and whether two models differ.

A problem is one observation, however many samples it has: its mean. So the standard errors are those of a mean over
problems, "clustered by problem", and two models are compared problem by problem, which takes out how hard the problems
are (Miller, "Adding Error Bars to Evals", arXiv 2411.00640). The confidence intervals are normal, as there; of a few
dozen problems they are a little too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


CONFIDENCE = 0.95
QUANTILE = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True)
class Accuracy:
    """Pass@1.

    Args:
        mean (`float`): 0 to 1, the mean over problems of the mean over samples.
        standard_error (`float`, *optional*): of that mean; `None` for one problem.
    """

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Difference:
    """One model's accuracy minus another's on the same problems.

    Args:
        mean (`float`): -1 to 1.
        low, high (`float`, *optional*): the 95 % confidence interval; `None` for one problem.
        gained, lost (`int`): problems on which the first does better, and worse.
    """

    mean: float
    low: float | None
    high: float | None
    gained: int
    lost: int


def accuracy(verdicts: Sequence[Sequence[bool]]) -> Accuracy:
    """The accuracy of verdicts, a list for each problem with one for each of its samples."""
    mean, error = mean_and_error([fmean(samples) for samples in verdicts])
    return Accuracy(mean, error)


def difference(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> Difference:
    """How much more accurate the first is than the second; the problems are the same, in the same order.

    Raises:
        ValueError: if they are not as many.
    """
    gains = [fmean(ours) - fmean(theirs) for ours, theirs in zip(first, second, strict=True)]
    mean, error = mean_and_error(gains)
    margin = None if error is None else QUANTILE * error
    return Difference(
        mean,
        None if margin is None else mean - margin,
        None if margin is None else mean + margin,
        gained=sum(gain > 0 for gain in gains),
        lost=sum(gain < 0 for gain in gains),
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of values and its standard error; `None` of a single value."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
