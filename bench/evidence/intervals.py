"""Computes intervals and contrasts of accuracies: bootstrap over seeds and, within them, texts;
Holm's correction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SAMPLES, LEVEL = 10_000, 0.95


class Interval(NamedTuple):
    """Holds a mean with the ends of its interval; p, two-sided, of its being 0."""

    mean: float
    low: float
    high: float
    p: float


def of_accuracy(outcomes: Sequence[str], samples: int = SAMPLES) -> Interval:
    """Returns the interval of the accuracy of several seeds, each a string of a 0 or 1 a text."""
    return _bootstrap(np.array([[int(each) for each in outcome] for outcome in outcomes]), samples)


def of_difference(mine: Sequence[str], its: Sequence[str], samples: int = SAMPLES) -> Interval:
    """Returns the interval of one method's accuracy over another's, paired by seed and text."""
    first, second = (
        np.array([[int(each) for each in one] for one in many]) for many in (mine, its)
    )
    return _bootstrap(first - second, samples)


def of_figures(values: Sequence[float], samples: int = SAMPLES) -> Interval:
    """Returns the interval of a figure of which there is one a seed: seeds alone are drawn."""
    draw = np.random.default_rng(0)
    found = np.asarray(values, dtype=float)
    means = found[draw.integers(len(found), size=(samples, len(found)))].mean(1)
    return _interval(found.mean(), means)


def _bootstrap(rows: np.ndarray, samples: int) -> Interval:
    """Returns the interval of the mean of rows [seeds, texts] of -1, 0 or 1.

    Drawing T texts of a row with replacement draws how many are of each value from a multinomial
    distribution, so no text is drawn by itself.
    """
    draw = np.random.default_rng(0)
    seeds, texts = rows.shape
    shares = np.stack([(rows == value).mean(1) for value in (-1, 0, 1)], axis=1)
    counts = draw.multinomial(texts, shares[draw.integers(seeds, size=(samples, seeds))])
    return _interval(rows.mean(), (counts[..., 2] - counts[..., 0]).mean(1) / texts)


def _interval(mean: float, means: np.ndarray) -> Interval:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    return Interval(
        float(mean), float(low), float(high), min(1.0, 2 * (beyond + 1) / (len(means) + 1))
    )


def holm(p: Sequence[float]) -> list[float]:
    """Returns Holm's corrected p, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected
