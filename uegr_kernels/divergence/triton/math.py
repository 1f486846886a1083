"""The losses' formulas in Triton (Eq. 3-6), under the names of reference.py and divergence.h.
Logarithms are to base 2.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Far enough below a row's maximum that p is 0 while differences stay finite.
FAR_BELOW = tl.constexpr(1e3)


@triton.jit
def exponential(y):
    """Returns exp(y), by a power of two."""
    return tl.exp2(y * LOG2_E)


@triton.jit
def log_ratio(d, EXACT: tl.constexpr):
    """Returns log2(p/M), M = (p + q)/2, of the more probable side, for d = log2(p/q); exactly 0
    for 0.

    With r = 2^-|d| it is 1 - log2(1 + r) = -log2(1 - u), u = (1 - r)/2 <= 1/2, by a minimax
    polynomial. Near 0, where u has lost digits that count (EXACT), it is |d|/2 - log2(cosh(d
    ln(2)/2)), a series.
    """
    x = tl.abs(d)
    u = 0.5 - 0.5 * tl.exp2(-x)
    if d.dtype == tl.float64:
        a = -tl.log2(1 - u)
        near = x < 0.125
    else:
        q = u * 1.7159963 - 1.5667391
        q = q * u + 1.1329161
        q = q * u + 0.057179432
        q = q * u + 0.39175475
        q = q * u + 0.47895148
        q = q * u + 0.7213884
        a = u * LOG2_E + u * u * q
        near = x < 1
    if EXACT:
        s = x * x
        q = 2.025753708351697e-06 - s * 7.888016657160765e-08
        q = 5.5556492276785174e-05 - s * q
        q = 0.0017345033957756743 - s * q
        q = 0.08664339756999316 - s * q
        a = tl.where(near, 0.5 * x - s * q, a)
    return a


@triton.jit
def log_ratios(d, EXACT: tl.constexpr):
    """Returns log2(p/M) and log2(q/M), M = (p + q)/2, for d = log2(p/q)."""
    a = log_ratio(d, EXACT)
    return a + tl.minimum(d, 0.0), a - tl.maximum(d, 0.0)


@triton.jit
def log_gap(total, other):
    """Returns log2 of the ratio of two sums; the difference of two logarithms would have lost
    digits.
    """
    return tl.log2(total / other)


@triton.jit
def log_distance(x, y, rest, ratio):
    """Returns log2(p/q), exactly 0 where a row is another one moved; rest, ratio: what their
    maxima and their sums differ by.
    """
    return ((x - y) - rest) * LOG2_E - ratio


@triton.jit
def shifted(x, base, rest):
    """Returns logits of which differences are taken: finite."""
    return tl.maximum(x - base, rest - FAR_BELOW)


@triton.jit
def pairs_divergence(divergences, PASSES: tl.constexpr):
    """Returns JS summed over pairs from the sums of the divergences to the pairs' means; a
    pair's is in [0, ln 2], NaN stays.
    """
    most: tl.constexpr = PASSES * (PASSES - 1) / 2 * LN2
    js = divergences * (LN2 / 2)
    js = tl.where(js < 0, 0.0, js)
    return tl.where(js > most, most, js)


@triton.jit
def smoothed(t, smoothing, classes):
    """Returns a label's probability of a class, smoothed."""
    return t * (1 - smoothing) + smoothing / classes


@triton.jit
def label_term(t, y):
    """Returns t * (x - max) of a class; one with t = 0 adds nothing, not even where x = -inf."""
    return tl.where(t == 0, 0.0, t * y)


@triton.jit
def squared(x, y):
    """Returns (x - y)^2, which regression has in the place of both losses."""
    return (x - y) * (x - y)


@triton.jit
def squared_slope(x, y):
    """Returns the derivative of (x - y)^2 by x."""
    return (x - y) + (x - y)
