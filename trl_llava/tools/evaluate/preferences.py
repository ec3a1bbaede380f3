"""How good scores are at preferring: accuracy, by category, ties, what length explains, calibration. Pure functions.

A pair has a score for its chosen and one for its rejected completion; the gap is the first minus the second.
"""

from collections.abc import Sequence

import numpy as np

from trl_llava.tools.evaluate.results import Measure, Sampled
from trl_llava.tools.evaluate.statistics import Statistic, ratio

FIFTHS = 5


def accuracy(gaps: Sequence[float]) -> Statistic:
    """The share of pairs whose chosen completion scores higher; a tie is not right.

    >>> float(accuracy([1.0, -0.5, 0.0, 2.0])(np.arange(4)))
    0.5
    """
    return ratio([gap > 0 for gap in gaps], [1] * len(gaps))


def macro_average(gaps: Sequence[float], categories: Sequence[str]) -> Statistic:
    """The mean over categories of the accuracy within each, so that a large category counts as much as a small one.

    >>> float(macro_average([1, 1, 1, -1], ["a", "a", "a", "b"])(np.arange(4)))
    0.5
    """
    right, kinds = np.asarray(gaps, float) > 0, np.asarray(categories)

    def statistic(places: np.ndarray) -> float:
        drawn, hits = kinds[places], right[places]
        return float(np.mean([hits[drawn == kind].mean() for kind in np.unique(drawn)]))

    return statistic


def length_correlation(gaps: Sequence[float], length_gaps: Sequence[float]) -> Statistic:
    """How the gap of the scores goes with the gap of the lengths: 1 if the longer completion always scores higher.

    Pearson's correlation over each pair in both orders, which makes both means 0.

    >>> round(float(length_correlation([1.0, -2.0], [3.0, 3.0])(np.arange(2))), 4)
    -0.3162
    """
    x, y = np.asarray(gaps, float), np.asarray(length_gaps, float)

    def statistic(places: np.ndarray) -> float:
        below = np.sqrt((x[places] ** 2).sum() * (y[places] ** 2).sum())
        return float((x[places] * y[places]).sum() / below) if below else float("nan")

    return statistic


def fifths(gaps: Sequence[float]) -> np.ndarray:
    """(n,) in which fifth of the pairs each one is by the size of its gap, 0 the smallest; they are about as large.

    >>> fifths([0.1, -5.0, 0.2, -0.3, 4.0]).tolist()
    [0, 4, 1, 2, 3]
    """
    ranks = np.argsort(np.argsort(np.abs(gaps), kind="stable"), kind="stable")
    return ranks * FIFTHS // len(gaps)


def expected_accuracy(gaps: Sequence[float]) -> np.ndarray:
    """(n,) how often a pair of such a gap should be right, by Bradley and Terry: sigmoid(|gap|).

    >>> expected_accuracy([0.0, -2.0]).round(4).tolist()
    [0.5, 0.8808]
    """
    return 1 / (1 + np.exp(-np.abs(np.asarray(gaps, float))))


def statistics_of(
    gaps: Sequence[float], length_gaps: Sequence[float], categories: Sequence[str] | None, *, scores: bool = True
) -> dict[str, Sampled]:
    """All measures of one reward model; without `scores`, as lengths are none, no calibration and no correlation."""
    count = len(gaps)
    found = {
        "accuracy": Sampled(accuracy(gaps), count),
        "ties": Sampled(ratio([gap == 0 for gap in gaps], [1] * count), count),
    }

    def part(numbers: Sequence[float], inside: Sequence[bool]) -> Sampled:
        return Sampled(ratio(numbers, inside), count, counted=sum(inside))

    if categories is not None:
        found["macro_average"] = Sampled(macro_average(gaps, categories), count)
        for kind in sorted(set(categories)):
            inside = [own == kind for own in categories]
            right = [gap > 0 and own for gap, own in zip(gaps, inside, strict=True)]
            found[f"accuracy_{kind}"] = part(right, inside)
    if scores:
        found["length_correlation"] = Sampled(length_correlation(gaps, length_gaps), count)
        places, expected = fifths(gaps), expected_accuracy(gaps)
        for fifth in range(FIFTHS):
            inside = (places == fifth).tolist()
            right = [gap > 0 and own for gap, own in zip(gaps, inside, strict=True)]
            found[f"right_in_fifth_{fifth + 1}"] = part(right, inside)
            found[f"expected_in_fifth_{fifth + 1}"] = part(np.where(places == fifth, expected, 0).tolist(), inside)
    return found


def measures_of(categories: Sequence[str] | None) -> list[Measure]:
    """What `statistics_of` finds, in the order of the table."""
    kinds = sorted(set(categories or ()))
    numbered = [(fifth, ("smallest", "second", "third", "fourth", "largest")[fifth - 1]) for fifth in range(1, 6)]
    return [
        Measure("accuracy", "pairs whose chosen completion scores higher", "higher"),
        *([Measure("macro_average", "mean of the categories' accuracies", "higher")] if kinds else []),
        *(Measure(f"accuracy_{kind}", f"right, {kind}", "higher") for kind in kinds),
        Measure("ties", "pairs with equal scores", "lower"),
        Measure("length_correlation", "correlation of score gap and length gap"),
        *(
            Measure(f"{what}_in_fifth_{fifth}", f"{what}, {size} fifth of the score gaps")
            for fifth, size in numbered
            for what in ("right", "expected")
        ),
    ]
