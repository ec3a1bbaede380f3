"""Estimates with bootstrap intervals, and paired differences: pure functions of numbers per question.

A statistic takes the indices of a resample, so that whatever can be computed from some of the questions has an
interval: a ratio of sums, an F1, a score that another library aggregates.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""(n,) indices of questions, some of them twice, to a number; NaN where it has none."""

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """The sum of numerators over the sum of denominators; a mean where each denominator is 1, a share of outcomes.

    >>> float(ratio([1, 0, 3], [1, 2, 3])(np.arange(3)))
    0.6666666666666666
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)

    def statistic(places: np.ndarray) -> float:
        total = below[places].sum()
        return above[places].sum() / total if total else float("nan")

    return statistic


def estimate(statistic: Statistic, count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """A statistic of `count` questions, with its percentile bootstrap interval.

    Efron 1979, doi:10.1214/aos/1176344552. Resamples in which the statistic has no value do not count.
    """
    values = [statistic(places) for places in _resampled(count, resamples, seed)]
    return Estimate(float(statistic(np.arange(count))), *_interval(values))


def difference(
    first: Statistic, second: Statistic, count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """`second - first` on the same questions, both drawn together: how hard a question is cancels out."""
    values = [second(places) - first(places) for places in _resampled(count, resamples, seed)]
    everything = np.arange(count)
    return Estimate(float(second(everything) - first(everything)), *_interval(values))


def _resampled(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, count, count) for _ in range(resamples))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
