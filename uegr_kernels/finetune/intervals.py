"""Computes 95 % intervals of what was measured on texts, with one seed or several."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SAMPLES, LEVEL = 2000, 0.95
# of the normal distribution, at LEVEL
Z = 1.959963984540054

Figures = NDArray[np.float64]


class Interval(NamedTuple):
    """Holds a figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(right: int, texts: int) -> Interval:
    """Computes Wilson's score interval of a share, `right` of `texts`."""
    share, z2 = right / texts, Z * Z
    middle = (share + z2 / (2 * texts)) / (1 + z2 / texts)
    half = Z / (1 + z2 / texts) * math.sqrt(share * (1 - share) / texts + z2 / (4 * texts * texts))
    # the ends are exact at 0 and 1, where rounding would leave a little
    low, high = (0.0 if right == 0 else middle - half), (1.0 if right == texts else middle + half)
    return Interval(share, low, high)


def bootstrap(
    figure: Callable[..., float], seeds: Sequence[tuple[Figures, ...]], samples: int = SAMPLES
) -> Interval:
    """Computes a figure's mean over seeds, and its interval by a bootstrap over seeds and texts.

    figure  of arrays that have an entry for each text
    seeds   those arrays, for each seed; arrays of one length are drawn together, by the same texts

    Seeds are drawn with replacement and, within each, texts. The percentile interval.
    """
    draw = np.random.default_rng(0)
    value = float(np.mean([figure(*arrays) for arrays in seeds]))
    found = []
    for _ in range(samples):
        means = []
        for i in draw.integers(len(seeds), size=len(seeds)):
            rows = {len(array): draw.integers(len(array), size=len(array)) for array in seeds[i]}
            means.append(figure(*(array[rows[len(array)]] for array in seeds[i])))
        found.append(np.mean(means))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
