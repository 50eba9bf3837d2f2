"""Verdicts on the samples of problems -> accuracy, its standard error, and whether two models differ.

A problem is one observation, however many samples it has: its mean. So the standard errors are those of a mean over
problems, "clustered by problem", and two models are compared problem by problem, which takes out how hard the problems
are (Miller, "Adding Error Bars to Evals", arXiv 2411.00640).

His normal intervals are too narrow for a few dozen problems, and have no width where no verdict differs. Here they are, of
one answer a problem, the score interval for paired proportions (Newcombe, "Improved confidence intervals for the difference
between binomial proportions based on paired data", Statistics in Medicine 17, 1998, method 10); of several, Student's with
two more problems, one gained and one lost by as much as chance makes of so many samples (after the pseudo-observations of
Agresti and Min, Statistics in Medicine 24, 2005).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev


CONFIDENCE = 0.95


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
    samples = max(len(each) for each in (*first, *second))
    low = high = None
    if len(gains) > 1 and samples == 1:
        low, high = score_interval([ours[0] for ours in first], [theirs[0] for theirs in second])
    elif len(gains) > 1:
        low, high = students_interval(gains, samples**-0.5)
    return Difference(
        fmean(gains), low, high, gained=sum(gain > 0 for gain in gains), lost=sum(gain < 0 for gain in gains)
    )


def score_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """Newcombe's method 10: Wilson's intervals of both accuracies, put together by how the verdicts go with each other."""
    pairs, n = list(zip(first, second, strict=True)), len(first)
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    ours, theirs = (both + gained) / n, (both + lost) / n
    (our_low, our_high), (their_low, their_high) = wilson_interval(ours, n), wilson_interval(theirs, n)
    spread = sqrt((both + gained) * (lost + neither) * (both + lost) * (gained + neither))
    product = both * neither - gained * lost
    together = (max(product - n / 2, 0) if product > 0 else product) / spread if spread else 0.0

    def distance(one: float, other: float) -> float:
        return sqrt(max(one**2 - 2 * together * one * other + other**2, 0))

    gain = ours - theirs
    return (
        gain - distance(ours - our_low, their_high - theirs),
        gain + distance(our_high - ours, theirs - their_low),
    )


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The score interval of one proportion."""
    from scipy.stats import binomtest  # 0.3 s, for which the start of a recipe need not wait

    interval = binomtest(round(share * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return interval.low, interval.high


def students_interval(gains: Sequence[float], more: float) -> tuple[float, float]:
    """Student's interval of a mean, with two more values, `more` and its negative, so that equal ones have a width too."""
    from scipy.stats import t

    mean, error = mean_and_error([*gains, more, -more])
    margin = t.ppf(0.5 + CONFIDENCE / 2, len(gains) + 1) * error
    return max(mean - margin, -1.0), min(mean + margin, 1.0)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of values and its standard error; `None` of a single value."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
