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

    The percentile interval of `resampled`.
    """
    value = float(np.mean([figure(*arrays) for arrays in seeds]))
    return between(value, resampled(figure, seeds, samples))


def between(value: float, means: Figures) -> Interval:
    """Returns a figure with the percentile interval of what its resamplings gave."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def resampled(
    figure: Callable[..., float], seeds: Sequence[tuple[Figures, ...]], samples: int
) -> Figures:
    """Computes the mean over seeds that a figure has in each of so many resamplings: seeds are
    drawn with replacement and, within each, texts. Arguments as in `bootstrap`.
    """
    draw = np.random.default_rng(0)
    found = []
    for _ in range(samples):
        means = []
        for i in draw.integers(len(seeds), size=len(seeds)):
            rows = {len(array): draw.integers(len(array), size=len(array)) for array in seeds[i]}
            means.append(figure(*(array[rows[len(array)]] for array in seeds[i])))
        found.append(np.mean(means))
    return np.array(found)


def resampled_scores(rows: NDArray[np.int_], samples: int) -> Figures:
    """Computes what `resampled` does of the mean of rows [seeds, texts] of -1, 0 and 1, by other
    draws, for resamplings of many texts by the ten thousand.

    Drawing T texts of a row with replacement draws how many are of each value from a multinomial
    distribution, so no text is drawn by itself.
    """
    draw = np.random.default_rng(0)
    seeds, texts = rows.shape
    shares = np.stack([(rows == value).mean(1) for value in (-1, 0, 1)], axis=1)
    counts = draw.multinomial(texts, shares[draw.integers(seeds, size=(samples, seeds))])
    means: Figures = (counts[..., 2] - counts[..., 0]).mean(1) / texts
    return means
