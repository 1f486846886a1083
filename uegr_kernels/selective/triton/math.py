"""The selective step's formulas in Triton (Eq. 7-9, Algorithm 1), under the names of reference.py
and selective.h.
"""

import math
import typing

import triton
import triton.language as tl

from ...core import triton_ops
from ..options import RANK_SAMPLED, SMALLEST_PROBABILITY, Selection

UNIFORM_UNIT = tl.constexpr(2.0**24)


# ---- On the host


class Curve(typing.NamedTuple):
    """Holds what 1/p (Eq. 9) is made of for all tensors alike, in powers of two."""

    steepness: float
    threshold: float
    largest_inverse: float
    # of normalization "constant"
    constant_inverse: float


def curve(selection: Selection) -> Curve:
    """Works out the curve of 1/p = min(1 + 2^(steepness * (s~ - threshold)), largest)."""
    direction = 1.0 if selection.direction == "printed" else -1.0
    largest_inverse = 1 / max(selection.min_probability, SMALLEST_PROBABILITY)
    return Curve(
        steepness=direction * 2 * selection.sharpness * math.log2(math.e),
        threshold=selection.threshold,
        largest_inverse=largest_inverse,
        constant_inverse=min(1 / selection.keep_probability, largest_inverse),
    )


def rank_stride(size: int) -> int:
    """Returns k, where a rank over so many elements takes every k-th."""
    return size // RANK_SAMPLED | 1 if size > RANK_SAMPLED else 1


# ---- In kernels


class Probability(typing.NamedTuple):
    """Holds what 1/p of the elements of a scope is made of: 1 + 2^z with z = (s - low) * up *
    scale + offset, held in [z_low, z_high].
    """

    low: object
    up: object
    scale: object
    offset: object
    z_low: object
    z_high: object


class AdamW(typing.NamedTuple):
    """Holds the scalars of a tensor's AdamW step."""

    beta2: object
    # 1 - beta1
    complement1: object
    complement2: object
    # 1 - lr * weight_decay
    decay: object
    # lr / (1 - beta1^step)
    step_size: object
    # 1 / sqrt(1 - beta2^step)
    inverse_root: object
    eps: object


class AdamWState(typing.NamedTuple):
    """Holds a block of elements and of their moments, as AdamW leaves them."""

    theta: object
    m: object
    v: object
    v_max: object


class SGD(typing.NamedTuple):
    """Holds the scalars of a tensor's SGD step."""

    lr: object
    momentum: object
    # 1 - dampening
    complement: object
    weight_decay: object


class SGDState(typing.NamedTuple):
    """Holds a block of elements and of their buffer, as SGD leaves them."""

    theta: object
    buffer: object


@triton.jit
def largest(dtype: tl.constexpr):
    """Returns the largest finite float32 or float64."""
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def finite(x):
    """Returns whether x is neither infinite nor NaN."""
    return tl.abs(x) <= largest(x.dtype)


@triton.jit
def square(g):
    """Returns s = g*g (Eq. 7), the largest float where that overflows."""
    return tl.minimum(g * g, largest(g.dtype))


@triton.jit
def divide(x, y):
    """Divides, rounding to nearest as torch does."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def root(x):
    """Returns the square root, in float32 rounded to nearest as torch's is."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def rank_bin(magnitude):
    """Returns the upper 16 bits of the float32 below or at |g|: those of a positive float order as
    it does.
    """
    rounded = magnitude.to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    if magnitude.dtype == tl.float64:
        bits -= (rounded.to(tl.float64) > magnitude).to(tl.int32)
    return bits >> 16


@triton.jit
def probability_of_scope(s_min, s_max, steepness, threshold, form):
    """Works out what Eq. 8 and 9 have for all elements of a scope alike, in float64 and in powers
    of two.

    z = d * 2*sharpness*log2(e) * (s~ - threshold) = (s - low) * up * scale + offset, held in
    [z_low, z_high]: z is monotone in s, so its values at the scope's ends bound it. `s_min` >
    `s_max` says that nothing is finite.
    """
    T: tl.constexpr = form.DTYPE
    most_float = tl.full((), largest(T), tl.float64)
    # a span below has no reciprocal: s is scaled up first
    tiny: tl.constexpr = 2.0**-900 if form.DTYPE == tl.float64 else 2.0**-100
    least, most = tl.minimum(s_min, most_float).to(T), tl.minimum(s_max, most_float).to(T)
    span = most - least
    low = least if form.NORMALIZATION == "minmax" else least * 0
    up = tl.where((span > 0) & (span < tiny), 1 / tiny, 1.0).to(T)
    divisor = tl.where(span > 0, span.to(tl.float64) * up.to(tl.float64), 1.0)
    scale = tl.where(span > 0, steepness / divisor, 0.0)
    scale = tl.minimum(tl.maximum(scale, -most_float), most_float).to(T)
    offset = tl.minimum(tl.maximum(-steepness * threshold, -most_float), most_float).to(T)
    # s~ at the ends: [0, 1] but for "range", which starts at s_min/span and is held in [0, 1] with
    # last step's statistics alone.
    first, last = tl.full((), 0.0, tl.float64), tl.where(span > 0, 1.0, 0.0).to(tl.float64)
    if form.NORMALIZATION == "range" and form.LOW is None:
        wide = tl.where(span > 0, span, 1).to(tl.float64)
        first = tl.where(span > 0, least.to(tl.float64) / wide, 0.0)
        last = tl.where(span > 0, most.to(tl.float64) / wide, 0.0)
    first, last = steepness * (first - threshold), steepness * (last - threshold)
    z_low = tl.maximum(tl.minimum(tl.minimum(first, last), 100.0), -100.0).to(T)
    z_high = tl.maximum(tl.minimum(tl.maximum(first, last), 100.0), -100.0).to(T)
    return Probability(low=low, up=up, scale=scale, offset=offset, z_low=z_low, z_high=z_high)


@triton.jit
def inverse_probability(s, scope, largest_inverse):
    """Returns 1/p = min(1 + exp(z), largest): no division."""
    z = (s - scope.low) * scope.up * scope.scale + scope.offset
    z = tl.maximum(tl.minimum(z, scope.z_high), scope.z_low)
    return tl.minimum(1 + tl.exp2(z), largest_inverse)


@triton.jit
def inverse_of_rank(rank, steepness, threshold, largest_inverse):
    """Returns 1/p of elements of a rank in [0, 1)."""
    z = steepness * (rank - threshold)
    return tl.minimum(1 + tl.exp2(tl.maximum(tl.minimum(z, 100.0), -100.0)), largest_inverse)


@triton.jit
def drawn_factor(g, inverse, word, RESCALE: tl.constexpr):
    """Returns b/p (b without `rescale`): u < p is u * 1/p < 1, without a division. A g that is not
    finite has p = 1.
    """
    drawn = (word >> 8).to(tl.int32).to(g.dtype) * inverse < UNIFORM_UNIT
    factor = tl.where(drawn, inverse if RESCALE else tl.full([1], 1, g.dtype), 0)
    return tl.where(finite(g), factor, 1)


@triton.jit
def round_stochastically(x, low16):
    """Returns a bfloat16 whose mean over a uniform 16-bit word is x: adds the word below the kept
    bits, then cuts.
    """
    x = x.to(tl.float32)
    cut = (x.to(tl.uint32, bitcast=True) + low16) & 0xFFFF0000
    return triton_ops.nearest(tl.where(finite(x), cut.to(tl.float32, bitcast=True), x), tl.bfloat16)


@triton.jit
def moved(theta, stepped, factor):
    """Returns theta moved towards `stepped` by the factor b/p, and not at all where b is 0,
    whatever `stepped` is.

    Between equal infinities there is no way to go.
    """
    stays = (factor == 0) | (stepped == theta)
    return tl.where(stays, theta, theta + factor * (stepped - theta))


@triton.jit
def adamw_update_rule(theta, g, factor, m, v, v_max, rule, form):
    """Makes AdamW's step. Target "gradient": g~ = b*g/p feeds the moments; "update": g does, and
    b/p multiplies the step.

    v and theta are rounded where torch.optim.AdamW rounds them: over many steps it shows. Adding 0
    rounds a product that the compiler would fuse with the next addition.
    """
    fed = g if form.TO_UPDATE else g * factor
    m = m + rule.complement1 * (fed - m)
    v = (v * rule.beta2 + 0.0) + rule.complement2 * fed * fed
    if form.MOMENT3 is not None:
        v_max = tl.maximum(v, v_max)
        denominator = root(v_max) * rule.inverse_root + rule.eps
    else:
        denominator = root(v) * rule.inverse_root + rule.eps
    stepped = (theta * rule.decay + 0.0) - divide(rule.step_size * m, denominator)
    theta = moved(theta, stepped, factor) if form.TO_UPDATE else stepped
    return AdamWState(theta=theta, m=m, v=v, v_max=v_max)


@triton.jit
def sgd_update_rule(theta, g, factor, buffer, rule, form):
    """Makes SGD's step. A buffer starts as -0.0, which no update leaves behind (+ 0): its first
    value is the gradient itself, without dampening.
    """
    fed = g if form.TO_UPDATE else g * factor
    # 0 times an infinite theta would be NaN
    fed = tl.where(rule.weight_decay == 0, fed, fed + rule.weight_decay * theta)
    if form.MOMENT1 is not None:
        bits = (
            buffer.to(tl.int64, bitcast=True)
            if form.DTYPE == tl.float64
            else buffer.to(tl.int32, bitcast=True)
        )
        fresh = (bits < 0) & (buffer == 0)
        buffer = tl.where(fresh, fed, buffer * rule.momentum + rule.complement * fed) + 0.0
        fed = fed + rule.momentum * buffer if form.NESTEROV else buffer
    stepped = theta - (factor * rule.lr if form.TO_UPDATE else rule.lr) * fed
    theta = tl.where(factor == 0, theta, stepped) if form.TO_UPDATE else stepped
    return SGDState(theta=theta, buffer=buffer)
