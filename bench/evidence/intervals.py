"""Computes intervals and contrasts of accuracies, with a p of their being 0, and Holm's correction;
what is drawn, and the interval's ends, are the package's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uegr_kernels.finetune.intervals import between, resampled, resampled_scores

SAMPLES = 10_000


class Interval(NamedTuple):
    """Holds a mean with the ends of its interval; p, two-sided, of its being 0."""

    mean: float
    low: float
    high: float
    p: float


def of_accuracy(outcomes: Sequence[str], samples: int = SAMPLES) -> Interval:
    """Returns the interval of the accuracy of several seeds, each a string of a 0 or 1 a text."""
    rows = _scores(outcomes)
    return _interval(rows.mean(), resampled_scores(rows, samples))


def of_difference(mine: Sequence[str], its: Sequence[str], samples: int = SAMPLES) -> Interval:
    """Returns the interval of one method's accuracy over another's, paired by seed and text."""
    rows = _scores(mine) - _scores(its)
    return _interval(rows.mean(), resampled_scores(rows, samples))


def of_figures(values: Sequence[float], samples: int = SAMPLES) -> Interval:
    """Returns the interval of a figure of which there is one a seed: seeds alone are drawn."""
    found = np.asarray(values, dtype=float)
    return _interval(found.mean(), resampled(np.mean, [(found,)], samples))


def _scores(outcomes: Sequence[str]) -> np.ndarray:
    return np.array([[int(each) for each in outcome] for outcome in outcomes])


def _interval(mean: float, means: np.ndarray) -> Interval:
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    return Interval(*between(mean, means), p=min(1.0, 2 * (beyond + 1) / (len(means) + 1)))


def holm(p: Sequence[float]) -> list[float]:
    """Returns Holm's corrected p, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected
