"""The selective step in Triton: Eq. 7-9 and Algorithm 1, lines 10-13, on any number of tensors by a
handful of launches.

The kernels find tensors by rows of addresses and sizes in device memory. Tensors of like dtypes
make a family, which is launched together:

    prepare     a lane per tensor: advances the step, works out what a tensor's elements share,
        empties its statistics
    walk        a program per item, a piece of 16,384 elements: gathers its gradient's extremes, or
        updates it
    count, tabulate   "rank": the histogram of a gradient, and from it 1/p by bin
    keep        "previous": the gathered extremes into the parameter's state

Where this step's own statistics are needed, a walk updates one group of tensors and gathers the
next one's extremes; a group's gradients fit the second-level cache. In a piece that is whole,
aligned and in natural order the accesses have 128 bits and one call of Philox serves four
neighbours; anything else (tails, views, shards) goes element by element behind a mask.
"""

import array
import collections
import dataclasses
import itertools
import math
import operator
import typing
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..core import triton_ops

SMALLEST_PROBABILITY = 2.0**-24  # the step of u
SAMPLED = 2**20  # a rank over more elements than this takes every k-th
RANK_BINS = tl.constexpr(0x7F80)  # the upper 16 bits of a finite |g|
TABLE = tl.constexpr(0x8000)  # from one table of bins to the next
UNIFORM_UNIT = tl.constexpr(2.0**24)

BLOCK = tl.constexpr(1024)  # elements at a time
# the same behind a mask, where an element has an index, a call of Philox and perhaps offsets of its
# own
TAIL = tl.constexpr(256)
PIECE = tl.constexpr(16 * 1024)  # elements of an item
LANES = tl.constexpr(128)  # tensors a program of `prepare` and `keep` looks at
TABLES = tl.constexpr(4096)  # tables of bins that are alive at a time: 512 MiB at most

# A row by tensor: addresses (0: no such list), then sizes. The elementwise lists stand first but
# for g, whose addresses are in the head.
COLUMNS = (
    "theta",
    "a",
    "b",
    "c",
    "s",
    "step",
    "low",
    "high",
    "axes",
    "size",
    "stream",
    "offset",
    "run",
    "stride",
    "every",
    "position",
)
(
    THETA,
    A,
    B,
    C,
    SALIENCY,
    STEP,
    MINIMUM,
    MAXIMUM,
    AXES,
    SIZE,
    STREAM,
    OFFSET,
    RUN,
    STRIDE,
    EVERY,
    POSITION,
) = map(tl.constexpr, range(16))
ROW = tl.constexpr(16)
# The head is what may change from step to step: float64 numbers, the seed and a step count, then
# the address of every gradient.
NUMBERS = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "momentum",
    "dampening",
    "sign",
    "steepness",
    "threshold",
    "largest",
    "constant",
)
(
    LR,
    BETA1,
    BETA2,
    EPS,
    WEIGHT_DECAY,
    MOMENTUM,
    DAMPENING,
    SIGN,
    STEEPNESS,
    THRESHOLD,
    LARGEST_INVERSE,
    CONSTANT_INVERSE,
    SEED,
    COUNT,
) = map(tl.constexpr, range(14))
HEAD = tl.constexpr(16)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a family's kernels are compiled for: dtypes by list (None: no such list) and the
    options that change the code.
    """

    # "adamw", "sgd", "multiply" (the gradient in place), "probability", "mask", "statistics"
    line: str
    T: tl.dtype  # of the arithmetic
    g: tl.dtype
    theta: tl.dtype | None
    s: tl.dtype | None
    a: tl.dtype | None
    b: tl.dtype | None
    c: tl.dtype | None
    step: tl.dtype | None
    kept: tl.dtype | None
    strided: bool
    normalization: str
    # of the statistics: "own", "kept", "scope" (a row for all), "scopes" (a row each), "" where
    # there are none
    source: str
    random: bool
    rescale: bool
    update: bool  # target
    nesterov: bool

    @property
    def rounding(self) -> bool:
        """Whether a moment is rounded stochastically."""
        return tl.bfloat16 in (self.a, self.b, self.c)


# ---- The mathematics, under the names of reference.py and selective.h.


@triton.jit
def largest(dtype: tl.constexpr):
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def finite(x):
    return tl.abs(x) <= largest(x.dtype)


@triton.jit
def square(g):
    """s = g*g (Eq. 7), the largest float where that overflows."""
    return tl.minimum(g * g, largest(g.dtype))


@triton.jit
def divide(x, y):
    """Rounded to nearest, as torch's."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def rank_bin(magnitude):
    """The upper 16 bits of the float32 below or at |g|: those of a positive float order as it
    does.
    """
    rounded = magnitude.to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    if magnitude.dtype == tl.float64:
        bits -= (rounded.to(tl.float64) > magnitude).to(tl.int32)
    return bits >> 16


@triton.jit
def probability(s_min, s_max, steepness, threshold, kind: tl.constexpr):
    """Eq. 8 and 9 with everything that is the same for all elements of a scope worked out, in
    float64 and in powers of two.

    z = d * 2*sharpness*log2(e) * (s~ - threshold) = (s - low) * up * scale + offset, held in
    [z_low, z_high]: z is monotone in s, so its values at the scope's ends bound it. `s_min` >
    `s_max` says that nothing is finite.
    """
    T: tl.constexpr = kind.T
    most_float = tl.full((), largest(T), tl.float64)
    # a span below has no reciprocal: s is scaled up first
    tiny: tl.constexpr = 2.0**-900 if kind.T == tl.float64 else 2.0**-100
    least, most = tl.minimum(s_min, most_float).to(T), tl.minimum(s_max, most_float).to(T)
    span = most - least
    low = least if kind.normalization == "minmax" else least * 0
    up = tl.where((span > 0) & (span < tiny), 1 / tiny, 1.0).to(T)
    divisor = tl.where(span > 0, span.to(tl.float64) * up.to(tl.float64), 1.0)
    scale = tl.where(span > 0, steepness / divisor, 0.0)
    scale = tl.minimum(tl.maximum(scale, -most_float), most_float).to(T)
    offset = tl.minimum(tl.maximum(-steepness * threshold, -most_float), most_float).to(T)
    # s~ at the ends: [0, 1] but for "range", which starts at s_min/span and is held in [0, 1] with
    # last step's statistics alone.
    first, last = tl.full((), 0.0, tl.float64), tl.where(span > 0, 1.0, 0.0).to(tl.float64)
    if kind.normalization == "range" and kind.kept is None:
        wide = tl.where(span > 0, span, 1).to(tl.float64)
        first = tl.where(span > 0, least.to(tl.float64) / wide, 0.0)
        last = tl.where(span > 0, most.to(tl.float64) / wide, 0.0)
    first, last = steepness * (first - threshold), steepness * (last - threshold)
    z_low = tl.maximum(tl.minimum(tl.minimum(first, last), 100.0), -100.0).to(T)
    z_high = tl.maximum(tl.minimum(tl.maximum(first, last), 100.0), -100.0).to(T)
    return low, up, scale, offset, z_low, z_high


@triton.jit
def inverse_probability(s, scope, largest_inverse):
    """1/p = min(1 + exp(z), largest): no division."""
    low, up, scale, offset, z_low, z_high = scope
    z = (s - low) * up * scale + offset
    return tl.minimum(1 + tl.exp2(tl.maximum(tl.minimum(z, z_high), z_low)), largest_inverse)


@triton.jit
def inverse_of_rank(rank, steepness, threshold, largest_inverse):
    z = steepness * (rank - threshold)
    return tl.minimum(1 + tl.exp2(tl.maximum(tl.minimum(z, 100.0), -100.0)), largest_inverse)


@triton.jit
def drawn_factor(g, inverse, word, RESCALE: tl.constexpr):
    """b/p (b without `rescale`): u < p is u * 1/p < 1, without a division. A g that is not
    finite has p = 1.
    """
    drawn = (word >> 8).to(tl.int32).to(g.dtype) * inverse < UNIFORM_UNIT
    factor = tl.where(drawn, inverse if RESCALE else tl.full([1], 1, g.dtype), 0)
    return tl.where(finite(g), factor, 1)


@triton.jit
def round_stochastically(x, low16):
    """bfloat16 whose mean over a uniform 16-bit word is x: add the word below the kept bits,
    then cut.
    """
    x = x.to(tl.float32)
    cut = (x.to(tl.uint32, bitcast=True) + low16) & 0xFFFF0000
    return triton_ops.nearest(tl.where(finite(x), cut.to(tl.float32, bitcast=True), x), tl.bfloat16)


@triton.jit
def moved(theta, stepped, factor):
    """theta on its way to `stepped`: factor b/p of it, and not at all where b is 0, whatever
    `stepped` is.

    Between equal infinities there is no way to go.
    """
    stays = (factor == 0) | (stepped == theta)
    return tl.where(stays, theta, theta + factor * (stepped - theta))


@triton.jit
def adamw_line(theta, g, factor, m, v, v_max, line, kind: tl.constexpr):
    """target "gradient": g~ = b*g/p feeds the moments; "update": g does, and b/p multiplies the
    step.

    v and theta are rounded where torch.optim.AdamW rounds them: over many steps it shows. Adding 0
    rounds a product that the compiler would fuse with the next addition.
    """
    beta2, complement1, complement2, decay, step_size, inverse_root, eps = line
    fed = g if kind.update else g * factor
    m = m + complement1 * (fed - m)
    v = (v * beta2 + 0.0) + complement2 * fed * fed
    if kind.c is not None:
        v_max = tl.maximum(v, v_max)
        denominator = root(v_max) * inverse_root + eps
    else:
        denominator = root(v) * inverse_root + eps
    stepped = (theta * decay + 0.0) - divide(step_size * m, denominator)
    theta = moved(theta, stepped, factor) if kind.update else stepped
    return theta, m, v, v_max


@triton.jit
def sgd_line(theta, g, factor, buffer, line, kind: tl.constexpr):
    """A buffer starts as -0.0, which no update leaves behind (+ 0): its first value is the
    gradient itself, without dampening.
    """
    lr, momentum, complement, weight_decay = line
    fed = g if kind.update else g * factor
    # 0 times an infinite theta would be NaN
    fed = tl.where(weight_decay == 0, fed, fed + weight_decay * theta)
    if kind.a is not None:
        bits = (
            buffer.to(tl.int64, bitcast=True)
            if kind.T == tl.float64
            else buffer.to(tl.int32, bitcast=True)
        )
        fresh = (bits < 0) & (buffer == 0)
        buffer = tl.where(fresh, fed, buffer * momentum + complement * fed) + 0.0
        fed = fed + momentum * buffer if kind.nesterov else buffer
    stepped = theta - (factor * lr if kind.update else lr) * fed
    theta = tl.where(factor == 0, theta, stepped) if kind.update else stepped
    return theta, buffer


# ---- How elements arrive.


@triton.jit
def number(head, WHICH: tl.constexpr):
    """A float64 of the table's head."""
    return tl.load(head + WHICH).to(tl.float64, bitcast=True)


@triton.jit
def allowed(mask, found_inf):
    """A mask, empty where GradScaler found something that is not finite: then nothing may
    change.
    """
    if found_inf is None:
        return mask
    else:
        return tl.where(mask, tl.load(found_inf), 1) == 0


@triton.jit
def piece_of(row, piece, found_inf):
    """Where a piece starts and ends; at its start where nothing may change."""
    start = piece.to(tl.int64) * PIECE
    end = tl.minimum(start + PIECE, tl.load(row + SIZE))
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0, end, start)
    return start, end


@triton.jit
def fetch(pointers, mask, T: tl.constexpr):
    if mask is None:
        return triton_ops.widened(tl.load(pointers, eviction_policy="evict_first"), T)
    else:
        return triton_ops.widened(tl.load(pointers, mask=mask, other=0), T)


@triton.jit
def put(pointers, value, mask):
    if mask is None:
        tl.store(
            pointers,
            triton_ops.nearest(value, pointers.dtype.element_ty),
            eviction_policy="evict_first",
        )
    else:
        tl.store(pointers, triton_ops.nearest(value, pointers.dtype.element_ty), mask=mask)


@triton.jit
def put_moment(pointers, value, mask, low16):
    if pointers.dtype.element_ty == tl.bfloat16:
        put(pointers, round_stochastically(value, low16), mask)
    else:
        put(pointers, value, mask)


@triton.jit
def gradient(pointers, mask, unscale, kind: tl.constexpr):
    """g in the arithmetic's dtype, without the loss scale; negative to maximize."""
    return fetch(pointers, mask, kind.T) * unscale


@triton.jit
def bits_of(x):
    """Those of |x|: they order as the floats do."""
    return (
        tl.abs(x).to(tl.int64, bitcast=True)
        if x.dtype == tl.float64
        else tl.abs(x).to(tl.int32, bitcast=True)
    )


@triton.jit
def from_bits(bits, T: tl.constexpr):
    return bits.to(T, bitcast=True)


@triton.jit
def empty_low(T: tl.constexpr):
    """Above the bits of any float; 0 is the other end's start."""
    return 0x7FFFFFFFFFFFFFFF if T == tl.float64 else 0x7FFFFFFF


@triton.jit
def widen(low, high, g, s, mask, kind: tl.constexpr):
    """The extremes with those of a block in them."""
    counts = finite(g) & finite(s) if kind.s is not None else finite(g)
    if mask is not None:
        counts = counts & mask
    bits = bits_of(s) if kind.s is not None else bits_of(g)
    return tl.minimum(low, tl.where(counts, bits, empty_low(kind.T))), tl.maximum(
        high, tl.where(counts, bits, 0)
    )


@triton.jit
def update_block(lists, mask, word, lower, low, high, shared, kind: tl.constexpr):
    """A block of elements, from memory to memory. Returns the extremes, widened where the next
    step wants them.
    """
    T: tl.constexpr = kind.T
    theta_p, a_p, b_p, c_p, s_p, g_p = lists
    unscale, scope, largest_inverse, table, line = shared
    g = gradient(g_p, mask, unscale, kind)
    s = fetch(s_p, mask, T) if kind.s is not None else g
    if kind.kept is not None:
        low, high = widen(low, high, g, s, mask, kind)
    if kind.normalization == "constant":
        inverse = tl.zeros_like(g) + largest_inverse
    elif kind.normalization == "rank":
        magnitude = tl.abs(root(s) if kind.s is not None else g)  # the root of -0 is -0
        counted = finite(magnitude)
        inverse = tl.load(
            table + tl.where(counted, rank_bin(magnitude), 0), mask=counted, other=1.0
        ).to(T)
    elif kind.s is not None:
        inverse = tl.where(finite(s), inverse_probability(s, scope, largest_inverse), 1)
    else:
        inverse = inverse_probability(square(g), scope, largest_inverse)
    if kind.line == "probability":
        put(theta_p, tl.where(finite(g), divide(tl.full([1], 1, T), inverse), 1), mask)
    else:
        if kind.random:
            factor = drawn_factor(g, inverse, word, kind.rescale)
        else:
            factor = tl.where(finite(g), inverse if kind.rescale else tl.full([1], 1, T), 1)
        if kind.line == "mask":
            put(theta_p, factor != 0, mask)
        elif kind.line == "multiply":
            put(g_p, g * factor, mask)
        elif kind.line == "sgd":
            theta = fetch(theta_p, mask, T)
            buffer = fetch(a_p, mask, T) if kind.a is not None else theta
            theta, buffer = sgd_line(theta, g, factor, buffer, line, kind)
            put(theta_p, theta, mask)
            if kind.a is not None:
                put_moment(a_p, buffer, mask, lower & 0xFFFF)
        else:
            theta, m, v = fetch(theta_p, mask, T), fetch(a_p, mask, T), fetch(b_p, mask, T)
            v_max = fetch(c_p, mask, T) if kind.c is not None else v
            theta, m, v, v_max = adamw_line(theta, g, factor, m, v, v_max, line, kind)
            put(theta_p, theta, mask)
            put_moment(a_p, m, mask, lower & 0xFFFF)
            put_moment(b_p, v, mask, lower >> 16)
            if kind.c is not None:
                put_moment(c_p, v_max, mask, lower >> 16)
    return low, high


@triton.jit
def base(row, which, dtype: tl.constexpr, other, ALIGNED: tl.constexpr):
    """The pointer to a list's tensor; `other` where there is no such list."""
    if dtype is None:
        return other
    elif ALIGNED:
        return triton_ops.aligned_pointer(tl.load(row + which), dtype)
    else:
        return triton_ops.pointer(tl.load(row + which), dtype)


@triton.jit
def bases(head, row, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to theta, a, b, c, s and g of a tensor; g's stands in the head, among what
    every step may change.
    """
    g = base(head + HEAD, tl.load(row + POSITION), kind.g, None, ALIGNED)
    theta = base(row, THETA, kind.theta, g, ALIGNED)
    a, b, c = (
        base(row, A, kind.a, g, ALIGNED),
        base(row, B, kind.b, g, ALIGNED),
        base(row, C, kind.c, g, ALIGNED),
    )
    return theta, a, b, c, base(row, SALIENCY, kind.s, g, ALIGNED), g


@triton.jit
def elements(pointers, at):
    theta, a, b, c, s, g = pointers
    return theta + at, a + at, b + at, c + at, s + at, g + at


@triton.jit
def strided_elements(pointers, local, row):
    """The same where each list has strides of its own. AXES names a table: how many axes; then
    by axis its size and the lists' strides.
    """
    theta, a, b, c, s, g = elements(pointers, local * 0)
    axes = triton_ops.pointer(tl.load(row + AXES), tl.int64)
    rest = local
    for _ in range(tl.load(axes)):
        at = rest % tl.load(axes + 1)
        rest = rest // tl.load(axes + 1)
        theta, a, b = (
            theta + at * tl.load(axes + 2),
            a + at * tl.load(axes + 3),
            b + at * tl.load(axes + 4),
        )
        c, s, g = c + at * tl.load(axes + 5), s + at * tl.load(axes + 6), g + at * tl.load(axes + 7)
        axes += 7
    return theta, a, b, c, s, g


@triton.jit
def whole_blocks(head, row, start, end, kind: tl.constexpr):
    """How many blocks from `start` on go without masks: all lists aligned, elements in order
    and numbered from a multiple of 4.
    """
    together = tl.load(head + HEAD + tl.load(row + POSITION)) | tl.load(row + OFFSET) * 4
    together = (
        together
        | tl.load(row + THETA)
        | tl.load(row + A)
        | tl.load(row + B)
        | tl.load(row + C)
        | tl.load(row + SALIENCY)
    )
    regular = (together % 16 == 0) & (tl.load(row + RUN) >= tl.load(row + SIZE)) & (end > start)
    if kind.strided:
        regular = regular & False
    return tl.where(regular, (end - start) // BLOCK, 0).to(tl.int32)


@triton.jit
def unscaling(head, grad_scale, T: tl.constexpr):
    """What a gradient is multiplied by: 1/grad_scale, negative to maximize."""
    sign = number(head, SIGN)
    if grad_scale is not None:
        sign = sign / tl.load(grad_scale).to(tl.float64)
    return sign.to(T)


@triton.jit
def kept_extremes(row, kind: tl.constexpr):
    """Minimum and maximum of s of the previous step; NaN where nothing is kept yet."""
    low = tl.load(triton_ops.pointer(tl.load(row + MINIMUM), kind.kept)).to(tl.float64)
    return low, tl.load(triton_ops.pointer(tl.load(row + MAXIMUM), kind.kept)).to(tl.float64)


@triton.jit
def found_extremes(low, high, kind: tl.constexpr):
    """Minimum and maximum of s from the bits of |g| (or of s); infinity and its negative where
    nothing is finite.
    """
    least, most = from_bits(tl.minimum(low, high), kind.T), from_bits(high, kind.T)
    if kind.s is None:
        least, most = square(least), square(most)
    return tl.where(low > high, float("inf"), least.to(tl.float64)), tl.where(
        low > high, float("-inf"), most.to(tl.float64)
    )


@triton.jit
def scope_extremes(row, bits, scope, kind: tl.constexpr):
    """Minimum and maximum of s over the tensor's scope."""
    if kind.source == "scope" or kind.source == "scopes":
        mine = scope + (2 * tl.load(row + POSITION) if kind.source == "scopes" else 0)
        return tl.load(mine), tl.load(mine + 1)
    else:
        low, high = found_extremes(tl.load(bits), tl.load(bits + 1), kind)
        if kind.source == "kept":
            kept_low, kept_high = kept_extremes(row, kind)
            high = tl.where(kept_low == kept_low, kept_high, high)
            low = tl.where(kept_low == kept_low, kept_low, low)
        return low, high


@triton.jit
def line_constants(head, constants, kind: tl.constexpr):
    """The scalars of a tensor's AdamW or SGD line."""
    T: tl.constexpr = kind.T
    if kind.line == "adamw":
        decay, step_size, inverse_root = (
            tl.load(constants),
            tl.load(constants + 1),
            tl.load(constants + 2),
        )
        beta2, complement1, complement2 = (
            tl.load(constants + 3),
            tl.load(constants + 4),
            tl.load(constants + 5),
        )
        return (
            beta2,
            complement1,
            complement2,
            decay,
            step_size,
            inverse_root,
            number(head, EPS).to(T),
        )
    else:
        complement = (1 - number(head, DAMPENING)).to(T)
        return (
            tl.load(constants),
            number(head, MOMENTUM).to(T),
            complement,
            number(head, WEIGHT_DECAY).to(T),
        )


@triton.jit
def no_extremes(bits, WIDTH: tl.constexpr, kind: tl.constexpr):
    return tl.zeros([WIDTH], bits.dtype.element_ty) + empty_low(kind.T), tl.zeros(
        [WIDTH], bits.dtype.element_ty
    )


@triton.jit
def join_extremes(bits, low, high, more_low, more_high):
    tl.atomic_min(bits, tl.minimum(tl.min(low, axis=0), tl.min(more_low, axis=0)), sem="relaxed")
    tl.atomic_max(
        bits + 1, tl.maximum(tl.max(high, axis=0), tl.max(more_high, axis=0)), sem="relaxed"
    )


@triton.jit
def gather(head, row, bits, start, end, unscale, kind: tl.constexpr):
    """The extremes of a piece into its tensor's. With kept ones they are wanted of a
    first-timer only.
    """
    if kind.kept is not None:
        kept_low, _ = kept_extremes(row, kind)
        end = tl.where(kept_low == kept_low, start, end)
    whole = whole_blocks(head, row, start, end, kind)
    low, high = no_extremes(bits, BLOCK, kind)
    if not kind.strided:
        pieces = elements(bases(head, row, kind, True), start)
        for block in range(whole):
            at = block * BLOCK + tl.arange(0, BLOCK)
            g = (
                triton_ops.widened(tl.load(pieces[5] + at, eviction_policy="evict_last"), kind.T)
                * unscale
            )
            s = (
                triton_ops.widened(tl.load(pieces[4] + at, eviction_policy="evict_last"), kind.T)
                if kind.s is not None
                else g
            )
            low, high = widen(low, high, g, s, None, kind)
    more_low, more_high = no_extremes(bits, TAIL, kind)
    pointers = bases(head, row, kind, False)
    for first in range(start + whole * BLOCK, end, TAIL):
        local = first + tl.arange(0, TAIL)
        lists = (
            strided_elements(pointers, local, row) if kind.strided else elements(pointers, local)
        )
        g = gradient(lists[5], local < end, unscale, kind)
        s = fetch(lists[4], local < end, kind.T) if kind.s is not None else g
        more_low, more_high = widen(more_low, more_high, g, s, local < end, kind)
    join_extremes(bits, low, high, more_low, more_high)


@triton.jit
def update(head, row, bits, start, end, step, shared, kind: tl.constexpr):
    """A piece from memory to memory."""
    seed, stream, offset = tl.load(head + SEED), tl.load(row + STREAM), tl.load(row + OFFSET)
    run, stride = tl.load(row + RUN), tl.load(row + STRIDE)
    rounding_seed = seed ^ triton_ops.ROUNDING_KEY
    whole = whole_blocks(head, row, start, end, kind)
    low, high = no_extremes(bits, BLOCK, kind)
    if not kind.strided:
        pieces = elements(bases(head, row, kind, True), start)
        for block in range(whole):
            word, lower = tl.zeros([BLOCK], tl.uint32), tl.zeros([BLOCK], tl.uint32)
            if kind.random:
                word = triton_ops.words_in_order(
                    offset + start + block * BLOCK, seed, step, stream, BLOCK
                )
            if kind.rounding:
                lower = triton_ops.words_in_order(
                    offset + start + block * BLOCK, rounding_seed, step, stream, BLOCK
                )
            lists = elements(pieces, block * BLOCK + tl.arange(0, BLOCK))
            low, high = update_block(lists, None, word, lower, low, high, shared, kind)
    more_low, more_high = no_extremes(bits, TAIL, kind)
    pointers = bases(head, row, kind, False)
    for first in range(start + whole * BLOCK, end, TAIL):
        local = first + tl.arange(0, TAIL)
        word, lower = tl.zeros([TAIL], tl.uint32), tl.zeros([TAIL], tl.uint32)
        indices = triton_ops.element_indices(local, offset, run, stride)
        if kind.random:
            word = triton_ops.words(indices, seed, step, stream)
        if kind.rounding:
            lower = triton_ops.words(indices, rounding_seed, step, stream)
        lists = (
            strided_elements(pointers, local, row) if kind.strided else elements(pointers, local)
        )
        more_low, more_high = update_block(
            lists, local < end, word, lower, more_low, more_high, shared, kind
        )
    if kind.kept is not None:
        join_extremes(bits, low, high, more_low, more_high)


# ---- The kernels.


@triton.jit(do_not_specialize=["tensors"])
def prepare(
    head, rows, bits, constants, counts, tensors, lr, beta1, beta2, found_inf, kind: tl.constexpr
):
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = i < tensors
    tl.store(bits + 2 * i, tl.zeros([LANES], bits.dtype.element_ty) + empty_low(kind.T), mask=there)
    tl.store(bits + 2 * i + 1, 0, mask=there)
    count = tl.zeros([LANES], tl.float64) + tl.load(head + COUNT)
    if kind.step is not None:
        steps = triton_ops.pointer(tl.load(rows + i * ROW + STEP, mask=there, other=0), kind.step)
        count = tl.load(steps, mask=there, other=0).to(tl.float64) + 1
        tl.store(steps, count.to(kind.step), mask=allowed(there, found_inf))
    tl.store(counts + i, count.to(tl.int32), mask=there)
    if kind.line == "adamw" or kind.line == "sgd":
        rate = number(head, LR) if lr is None else tl.load(lr).to(tl.float64)
        if kind.line == "sgd":
            tl.store(constants + 8 * i, tl.zeros([LANES], kind.T) + rate.to(kind.T), mask=there)
        else:
            first = number(head, BETA1) if beta1 is None else tl.load(beta1).to(tl.float64)
            second = number(head, BETA2) if beta2 is None else tl.load(beta2).to(tl.float64)
            # beta^step; 0^step is 0.
            power1 = tl.where(
                first > 0, tl.exp(count * tl.log(tl.where(first > 0, first, 1.0))), 0.0
            )
            power2 = tl.where(
                second > 0, tl.exp(count * tl.log(tl.where(second > 0, second, 1.0))), 0.0
            )
            nothing = count * 0
            tl.store(
                constants + 8 * i,
                (nothing + 1 - rate * number(head, WEIGHT_DECAY)).to(kind.T),
                mask=there,
            )
            tl.store(constants + 8 * i + 1, (rate / (1 - power1)).to(kind.T), mask=there)
            tl.store(constants + 8 * i + 2, (1 / tl.sqrt(1 - power2)).to(kind.T), mask=there)
            tl.store(constants + 8 * i + 3, (nothing + second).to(kind.T), mask=there)
            tl.store(constants + 8 * i + 4, (nothing + 1 - first).to(kind.T), mask=there)
            tl.store(constants + 8 * i + 5, (nothing + 1 - second).to(kind.T), mask=there)


@triton.jit
def change(
    head,
    row,
    bits,
    constants,
    count,
    scope,
    tables,
    table_of,
    grad_scale,
    start,
    end,
    kind: tl.constexpr,
):
    """What a piece's elements share, then the piece."""
    T: tl.constexpr = kind.T
    largest_inverse = number(
        head, CONSTANT_INVERSE if kind.normalization == "constant" else LARGEST_INVERSE
    ).to(T)
    span, table = (), tables
    if kind.normalization == "rank":
        if kind.source == "own":
            table = tables + table_of * TABLE
        elif kind.source == "scopes":
            table = tables + tl.load(row + POSITION) * TABLE
    elif kind.normalization != "constant":
        s_min, s_max = scope_extremes(row, bits, scope, kind)
        span = probability(s_min, s_max, number(head, STEEPNESS), number(head, THRESHOLD), kind)
    shared = (
        unscaling(head, grad_scale, T),
        span,
        largest_inverse,
        table,
        line_constants(head, constants, kind),
    )
    update(head, row, bits, start, end, tl.load(count), shared, kind)


@triton.jit
def walk(
    head,
    rows,
    items,
    bits,
    constants,
    counts,
    scope,
    tables,
    grad_scale,
    found_inf,
    GATHERS: tl.constexpr,
    kind: tl.constexpr,
):
    """An item is a tensor and a piece of it; a tensor below 0 is to be gathered, where GATHERS
    says that there are such items.
    """
    tensor, piece = tl.load(items + 2 * tl.program_id(0)), tl.load(items + 2 * tl.program_id(0) + 1)
    gathers = tensor < 0
    tensor = tl.where(gathers, -1 - tensor, tensor).to(tl.int64)
    row, mine = rows + tensor * ROW, bits + 2 * tensor
    start, end = piece_of(row, piece, found_inf)
    if GATHERS:
        if gathers:
            gather(head, row, mine, start, end, unscaling(head, grad_scale, kind.T), kind)
    if kind.line != "statistics":
        if gathers == 0:
            change(
                head,
                row,
                mine,
                constants + 8 * tensor,
                counts + tensor,
                scope,
                tables,
                tensor % TABLES,
                grad_scale,
                start,
                end,
                kind,
            )


@triton.jit
def count(head, rows, items, out, grad_scale, found_inf, MANY: tl.constexpr, kind: tl.constexpr):
    """A piece's histogram: elements whose index in the unsharded tensor is a multiple of
    `every`. 64-bit counts hold each `every` times.
    """
    WEIGHTED: tl.constexpr = out.dtype.element_ty == tl.int64
    tensor, piece = (
        tl.load(items + 2 * tl.program_id(0)).to(tl.int64),
        tl.load(items + 2 * tl.program_id(0) + 1),
    )
    row = rows + tensor * ROW
    start, end = piece_of(row, piece, found_inf)
    n, every = tl.load(row + SIZE), tl.load(row + EVERY)
    offset, run, stride = tl.load(row + OFFSET), tl.load(row + RUN), tl.load(row + STRIDE)
    if WEIGHTED:
        bins = out + (tl.load(row + POSITION) * RANK_BINS if MANY else 0)
    else:
        bins = out + tensor % TABLES * TABLE
    ordered = run >= n  # then the wanted ones are known; else each index is looked at
    jump = tl.where(ordered, every, 1)
    start += tl.where(ordered, (every - (offset + start) % every) % every, 0)
    pointers = bases(head, row, kind, False)
    unscale = unscaling(head, grad_scale, kind.T)
    for first in range(start, end, jump * TAIL):
        local = first + tl.arange(0, TAIL) * jump
        mask = (local < end) & (triton_ops.element_indices(local, offset, run, stride) % every == 0)
        lists = (
            strided_elements(pointers, local, row) if kind.strided else elements(pointers, local)
        )
        g = gradient(lists[5], mask, unscale, kind)
        magnitude = tl.abs(root(fetch(lists[4], mask, kind.T)) if kind.s is not None else g)
        mask = mask & finite(g) & finite(magnitude)
        tl.atomic_add(
            bins + rank_bin(tl.where(mask, magnitude, 0)),
            every if WEIGHTED else 1,
            mask=mask,
            sem="relaxed",
        )


@triton.jit
def tabulate(head, counts, tables):
    """1/p by bin from counts by bin; 32-bit counts may lie where the table is to be."""
    WIDTH: tl.constexpr = 4096
    OWN: tl.constexpr = counts.dtype.element_ty == tl.int32
    counts += tl.program_id(0).to(tl.int64) * (TABLE if OWN else RANK_BINS)
    tables += tl.program_id(0).to(tl.int64) * TABLE
    steepness, threshold = (
        number(head, STEEPNESS).to(tl.float32),
        number(head, THRESHOLD).to(tl.float32),
    )
    largest_inverse = number(head, LARGEST_INVERSE).to(tl.float32)
    total = tl.full((), 0, tl.int64)
    for first in range(0, RANK_BINS, WIDTH):
        bin = first + tl.arange(0, WIDTH)
        total += tl.sum(tl.load(counts + bin, mask=bin < RANK_BINS, other=0).to(tl.int64), axis=0)
    divisor = tl.maximum(total, 1).to(tl.float64)
    below = tl.full((), 0, tl.int64)
    for first in range(0, RANK_BINS, WIDTH):
        bin = first + tl.arange(0, WIDTH)
        here = tl.load(counts + bin, mask=bin < RANK_BINS, other=0).to(tl.int64)
        rank = (below + tl.cumsum(here, axis=0) - here).to(tl.float64) / divisor
        below += tl.sum(here, axis=0)
        tl.store(
            tables + bin,
            inverse_of_rank(rank.to(tl.float32), steepness, threshold, largest_inverse),
            mask=bin < RANK_BINS,
        )


@triton.jit(do_not_specialize=["tensors"])
def keep(rows, bits, tensors, found_inf, kind: tl.constexpr):
    """The gathered extremes into the parameters' states."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = i < tensors
    low, high = (
        tl.load(bits + 2 * i, mask=there, other=0),
        tl.load(bits + 2 * i + 1, mask=there, other=0),
    )
    low, high = found_extremes(low, high, kind)
    minima = triton_ops.pointer(tl.load(rows + i * ROW + MINIMUM, mask=there, other=0), kind.kept)
    maxima = triton_ops.pointer(tl.load(rows + i * ROW + MAXIMUM, mask=there, other=0), kind.kept)
    there = allowed(there, found_inf)
    tl.store(minima, low.to(kind.kept), mask=there)
    tl.store(maxima, high.to(kind.kept), mask=there)


@triton.jit(do_not_specialize=["tensors"])
def join(rows, bits, out, tensors, MANY: tl.constexpr, kind: tl.constexpr):
    """The gathered extremes, or those kept, into rows of minimum and maximum: one for all
    tensors, or one each.
    """
    least, most = (
        tl.full([LANES], float("inf"), tl.float64),
        tl.full([LANES], float("-inf"), tl.float64),
    )
    for first in range(0, tensors, LANES):
        i = first + tl.arange(0, LANES)
        there = i < tensors
        low, high = (
            tl.load(bits + 2 * i, mask=there, other=1),
            tl.load(bits + 2 * i + 1, mask=there, other=0),
        )
        low, high = found_extremes(low, high, kind)
        if kind.kept is not None:
            minima = triton_ops.pointer(
                tl.load(rows + i * ROW + MINIMUM, mask=there, other=0), kind.kept
            )
            maxima = triton_ops.pointer(
                tl.load(rows + i * ROW + MAXIMUM, mask=there, other=0), kind.kept
            )
            kept_low = tl.load(minima, mask=there, other=float("nan")).to(tl.float64)
            high = tl.where(
                kept_low == kept_low, tl.load(maxima, mask=there, other=0).to(tl.float64), high
            )
            low = tl.where(kept_low == kept_low, kept_low, low)
        if MANY:
            mine = out + 2 * tl.load(rows + i * ROW + POSITION, mask=there, other=0)
            tl.store(mine, tl.minimum(tl.load(mine, mask=there, other=0), low), mask=there)
            tl.store(mine + 1, tl.maximum(tl.load(mine + 1, mask=there, other=0), high), mask=there)
        least, most = tl.minimum(least, low), tl.maximum(most, high)
    if not MANY:
        tl.store(out, tl.minimum(tl.load(out), tl.min(least, axis=0)))
        tl.store(out + 1, tl.maximum(tl.load(out + 1), tl.max(most, axis=0)))


# ---- Tables and launches.

ELEMENTWISE = ("theta", "a", "b", "c", "s", "g")  # in the order of `strided_elements`


class Family:
    """Tensors of like dtypes, by their positions in a call: their rows, the items of each
    walk, and room to work in.
    """

    def __init__(
        self,
        kind: Kind,
        positions: list[int],
        lists: dict[str, list[Tensor]],
        layout: list[int],
        sizes: list[int],
        device: torch.device,
    ):
        self.kind, self.tensors = kind, len(positions)
        elements = [lists["g"][i].numel() for i in positions]
        columns = {
            name: [lists[name][i].data_ptr() for i in positions]
            for name in COLUMNS[:8]
            if lists[name]
        }
        columns |= {
            name: [layout[4 * i + k] for i in positions]
            for k, name in enumerate(("stream", "offset", "run", "stride"))
        }
        columns["run"] = [max(run, 1) for run in columns["run"]]
        columns["every"] = [
            n // SAMPLED | 1 if n > SAMPLED else 1
            for n in ([sizes[i] for i in positions] if sizes else elements)
        ]
        columns |= {"size": elements, "position": positions}
        if kind.strided:
            axes = [
                _axes([lists[name][i] if lists[name] else None for name in ELEMENTWISE])
                for i in positions
            ]
            self.axes = triton_ops.to_device(
                [x for each in axes for x in each], torch.int64, device
            )
            columns["axes"] = [
                self.axes.data_ptr() + 8 * at
                for at in itertools.accumulate(map(len, axes[:-1]), initial=0)
            ]
        table = [columns.get(name, [0] * self.tensors) for name in COLUMNS]
        self.rows = triton_ops.to_device(
            [x for row in zip(*table, strict=True) for x in row], torch.int64, device
        )
        wide = kind.T == tl.float64
        self.bits = torch.empty(
            self.tensors, 2, dtype=torch.int64 if wide else torch.int32, device=device
        )
        self.constants = torch.empty(
            self.tensors, 8, dtype=torch.float64 if wide else torch.float32, device=device
        )
        self.counts = torch.empty(self.tensors, dtype=torch.int32, device=device)
        own = kind.normalization == "rank" and kind.source == "own"
        self.tables = torch.empty(
            min(self.tensors, TABLES.value) if own else 0,
            TABLE.value,
            dtype=torch.float32,
            device=device,
        )
        width = lists["g"][positions[0]].element_size()
        parts = _walks(kind, elements, width)
        # 16 bytes from one start to the next
        ends = list(itertools.accumulate((len(part) + len(part) % 2 for part in parts), initial=0))
        together = torch.zeros(ends[-1], 2, dtype=torch.int32)
        for part, start in zip(parts, ends, strict=False):
            together[start : start + len(part)] = part
        together = triton_ops.to_device(together, torch.int32, device)
        self.walks = [
            (together[start:], len(part)) for part, start in zip(parts, ends, strict=False)
        ]

    def launch(
        self, call: "Call", head: Tensor, pointers: list[Tensor | None], scope_tables: Tensor
    ) -> None:
        """The launches over these tensors, as the header says; `pointers`: learning rate and
        betas that live on the device.
        """
        kind, many, out = self.kind, -(-self.tensors // LANES.value), call.out
        room, rest = (self.bits, self.constants, self.counts), (call.grad_scale, call.found_inf)
        prepare[(many,)](
            head,
            self.rows,
            *room,
            self.tensors,
            *pointers,
            call.found_inf,
            kind=kind,
            num_warps=triton_ops.WARPS,
        )
        if kind.normalization == "rank" and kind.line == "statistics":
            for items, n in self.walks:
                if n:
                    count[(n,)](
                        head,
                        self.rows,
                        items,
                        out,
                        *rest,
                        MANY=len(out) > 1,
                        kind=kind,
                        num_warps=triton_ops.WARPS,
                    )
            return
        for k, (items, n) in enumerate(self.walks):
            tables = scope_tables
            if kind.normalization == "rank" and kind.source == "own":
                tables = self.tables[: self.tensors - k * TABLES.value].zero_()
                if n:
                    count[(n,)](
                        head,
                        self.rows,
                        items,
                        tables.view(torch.int32),
                        *rest,
                        MANY=False,
                        kind=kind,
                        num_warps=triton_ops.WARPS,
                    )
                tabulate[(len(tables),)](head, tables.view(torch.int32), tables, num_warps=16)
            if n:
                gathers = kind.source in ("own", "kept") and kind.normalization != "rank"
                # two draws an element: with fewer warps sm_100 spills
                warps = triton_ops.WARPS * (2 if kind.rounding else 1)
                walk[(n,)](
                    head,
                    self.rows,
                    items,
                    *room,
                    call.scope,
                    tables,
                    *rest,
                    GATHERS=gathers,
                    kind=kind,
                    num_warps=warps,
                )
        if kind.line == "statistics":
            join[(1,)](
                self.rows,
                self.bits,
                out,
                self.tensors,
                MANY=len(out) > 1,
                kind=kind,
                num_warps=triton_ops.WARPS,
            )
        elif kind.kept is not None:
            keep[(many,)](
                self.rows,
                self.bits,
                self.tensors,
                call.found_inf,
                kind=kind,
                num_warps=triton_ops.WARPS,
            )


def _items(elements: list[int], tensors: range, *, gathers: bool) -> Tensor:
    """The items of a run of tensors. Updates go backwards: what was gathered last is still in
    the cache.
    """
    items = triton_ops.pieces([triton.cdiv(elements[i], PIECE.value) for i in tensors])
    items[:, 0] += tensors.start
    if gathers:
        items[:, 0] = -1 - items[:, 0]
        return items
    return items.flip(0)


def _walks(kind: Kind, elements: list[int], width: int) -> list[Tensor]:
    """The items of each walk; what a walk updates was gathered by those before it."""
    every = range(len(elements))
    if kind.normalization == "rank":
        own = kind.source == "own"
        rounds = (
            [every[i : i + TABLES.value] for i in range(0, len(every), TABLES.value)]
            if own
            else [every]
        )
        return [_items(elements, part, gathers=False) for part in rounds]
    updates = [_items(elements, every, gathers=False)] if kind.line != "statistics" else []
    if kind.normalization == "constant" or kind.source in ("scope", "scopes"):
        return updates
    if kind.source == "kept" or kind.line == "statistics":
        return [_items(elements, every, gathers=True), *updates]
    groups: list[range] = []
    total = 0
    for i, n in enumerate(elements):
        if not groups or total + n * width > triton_ops.GROUP_BYTES:
            groups.append(range(i, i))
            total = 0
        groups[-1] = range(groups[-1].start, i + 1)
        total += n * width
    gathered = [_items(elements, group, gathers=True) for group in groups]
    updated = [_items(elements, group, gathers=False) for group in groups]
    return [
        gathered[0],
        *(
            _interleaved(a, b)
            for a, b in itertools.zip_longest(updated, gathered[1:], fillvalue=gathered[0][:0])
        ),
    ]


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    """Both, spread evenly: reading and writing share the machine."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / max(len(part), 1) for part in (a, b)])
    return torch.cat((a, b))[places.argsort(stable=True)]


def _axes(tensors: list[Tensor | None]) -> list[int]:
    """How many axes, then by axis, the innermost first, its size and every list's stride; axes
    that are one in all lists are joined.
    """
    shape = next(t for t in tensors if t is not None).shape
    axes: list[list[int]] = []
    for d in reversed(range(len(shape))):
        strides = [0 if t is None else t.stride(d) for t in tensors]
        if shape[d] == 1:
            continue
        if axes and all(
            outer == axes[-1][0] * inner for outer, inner in zip(strides, axes[-1][1:], strict=True)
        ):
            axes[-1][0] *= shape[d]
        else:
            axes.append([shape[d], *strides])
    return [len(axes), *(x for axis in axes for x in axis)]


class Plan:
    """What a call needs on the device for as long as its tensors stand where they stand."""

    def __init__(
        self,
        moving: tuple[Any, ...],
        standing: tuple[Any, ...],
        planes: list[int],
        kind: Kind,
        lists: dict[str, list[Tensor]],
        layout: list[int],
        sizes: list[int],
    ):
        grads = lists["g"]
        self.moving, self.standing, self.planes, self.kind, self.device = (
            moving,
            standing,
            planes,
            kind,
            grads[0].device,
        )
        families: dict[Kind, list[int]] = collections.defaultdict(list)
        for i in range(len(grads)):
            each: dict[str, Any] = {
                name: tensors[i] if tensors else None for name, tensors in lists.items()
            }
            _check(i, each, layout)
            dtypes: dict[str, Any] = {
                name: None if each[name] is None else DTYPES[each[name].dtype]
                for name in (*ELEMENTWISE, "step")
            }
            kept = None if each["low"] is None else DTYPES[each["low"].dtype]
            strided = not all(
                each[name] is None or each[name].is_contiguous() for name in ELEMENTWISE
            )
            families[dataclasses.replace(kind, kept=kept, strided=strided, **dtypes)].append(i)
        self.families = [
            Family(one, positions, lists, layout, sizes, self.device)
            for one, positions in families.items()
        ]
        self.upload = triton_ops.Upload(HEAD.value + len(grads), self.device)
        self.tables = torch.empty(0, TABLE.value, dtype=torch.float32, device=self.device)

    def launch(self, call: "Call", head: Tensor, pointers: list[Tensor | None]) -> None:
        """All launches of a call."""
        if call.scope is not None and call.selection.normalization == "rank":
            if len(self.tables) != len(call.scope):
                self.tables = torch.empty(
                    len(call.scope), TABLE.value, dtype=torch.float32, device=self.device
                )
            tabulate[(len(call.scope),)](head, call.scope, self.tables, num_warps=16)
        for family in self.families:
            family.launch(call, head, pointers, self.tables)


def _check(i: int, each: dict[str, Any], layout: list[int]) -> None:
    """Raises what a kernel would not survive."""
    for name in ELEMENTWISE:
        if each[name] is not None and (
            each[name].shape != each["g"].shape or each[name].device != each["g"].device
        ):
            found = f"{tuple(each[name].shape)} on {each[name].device}"
            raise ValueError(
                f"parameter {layout[4 * i]}: its {NAMES[name]} has shape {found}, its gradient "
                f"{tuple(each['g'].shape)} "
                f"on {each['g'].device}; they must be equal"
            )
    for name in ("theta", "a", "b", "c"):
        if each[name] is not None and triton_ops.expanded(each[name]):
            raise ValueError(
                f"parameter {layout[4 * i]}: its {NAMES[name]} is expanded and cannot "
                "be written; call .clone() on it first"
            )
    for name in ("step", "low", "high"):
        if each[name] is not None and (
            each[name].numel() != 1 or each[name].device != each["g"].device
        ):
            found = f"{each[name].numel()} elements on {each[name].device}"
            raise ValueError(
                f"parameter {layout[4 * i]}: its {NAMES[name]} has {found}; give one "
                f"element on {each['g'].device}"
            )


NAMES = {
    "theta": "value",
    "a": "first moment",
    "b": "second moment",
    "c": "third moment",
    "s": "saliency",
}
NAMES |= {"step": "step", "low": "kept minimum", "high": "kept maximum"}
DTYPES = triton_ops.DTYPES | {torch.uint8: tl.int8}  # a mask is written as bytes

# Plans of optimizers live as long as their first parameter's step tensor; a few of other calls are
# kept by what they were called with.
PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()
RECENT: collections.OrderedDict[Any, Any] = collections.OrderedDict()
RECENT_PLANS = 16
DTYPE = operator.attrgetter("dtype")
# What captured steps read, for as long as the first parameter, and so the optimizer, lives; and
# what other graphs do, for good.
CAPTURED: WeakIdKeyDictionary = WeakIdKeyDictionary()
CAPTURED_ELSEWHERE: list[Any] = []


def _moving(lists: dict[str, list[Tensor]], planes: list[int]) -> tuple[Any, ...]:
    """What may differ while the tensors are the same objects. The gradients' addresses are not in
    it: those every step takes up.

    `planes`: which of the tensors that are written have several axes. One with a single axis would
    be another object, or elsewhere.
    """
    addresses = [
        list(map(Tensor.data_ptr, tensors)) for name, tensors in lists.items() if name != "g"
    ]
    written = [lists[name] for name in ("theta", "a", "b", "c") if lists[name]]
    planar = [list(map(tensors.__getitem__, planes)) for tensors in written]
    contiguous = [list(map(Tensor.is_contiguous, tensors)) for tensors in (*planar, lists["g"])]
    strides = (
        []
        if all(map(all, contiguous))
        else [t.stride() for tensors in (*written, lists["g"]) for t in tensors]
    )
    return (
        addresses,
        list(map(Tensor.numel, lists["g"])),
        list(map(DTYPE, lists["g"])),
        contiguous,
        strides,
    )


def _standing(lists: dict[str, list[Tensor]]) -> list[Any]:
    """What may differ between tensors beside that."""
    strides = [
        (name, i, t.shape, t.stride())
        for name in ELEMENTWISE
        for i, t in enumerate(lists[name])
        if not t.is_contiguous()
    ]
    return [
        list(map(Tensor.numel, tensors)) + list(map(DTYPE, tensors)) for tensors in lists.values()
    ] + strides


@dataclasses.dataclass
class Call:
    """A call of an operator: its lists and numbers."""

    line: str
    g: list[Tensor]
    selection: Any
    layout: list[int]
    seed: int = 0
    step: int = 0
    theta: list[Tensor] = dataclasses.field(default_factory=list)
    moments: list[list[Tensor]] = dataclasses.field(default_factory=list)
    s: list[Tensor] = dataclasses.field(default_factory=list)
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    sizes: list[int] = dataclasses.field(default_factory=list)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    # numbers that are tensors
    tensors: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    nesterov: bool = False
    maximize: bool = False
    scope: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    out: Any = None  # a tensor, in an operator that has one

    def run(self, plan: "Plan | None") -> "Plan | None":
        """What the call needs on the device, then its launches; `plan` and result as in
        op.call. Nothing here waits for the device.
        """
        if not self.g:
            return None
        device = self.g[0].device
        with triton_ops.on(self.g[0]):
            captured = triton_ops.capturing(device)
            plan = self.planned(plan, captured)
            upload = plan.upload
            if captured:
                upload = plan.upload.apart()
                (
                    CAPTURED.setdefault(self.theta[0], []) if self.steps else CAPTURED_ELSEWHERE
                ).append((plan, upload))
            away = {
                name: float(value)
                for name, value in self.tensors.items()
                if value is not None and value.device != device
            }
            pointers = [None if name in away else self.tensors.get(name) for name in NUMBERS[:3]]
            numbers = (
                self.numbers
                | away
                | _selection_numbers(self.selection)
                | {"sign": -1.0 if self.maximize else 1.0}
            )
            head = array.array("d", [numbers.get(name, 0.0) for name in NUMBERS]).tobytes()
            upload.write(
                head
                + array.array(
                    "q", [self.seed, self.step, 0, 0, *map(Tensor.data_ptr, self.g)]
                ).tobytes()
            )
            plan.launch(self, upload.target, pointers)
        return None if captured else plan

    def kind(self) -> Kind:
        """What a family's kernels are compiled for, but for what its tensors are."""
        source = "own"
        if self.selection.normalization == "constant":
            source = ""
        elif self.scope is not None:
            source = "scope" if len(self.scope) == 1 else "scopes"
        elif self.kept[0] and self.line != "statistics":
            source = "kept"
        wide = self.g[0] if not self.steps else self.theta[0]
        return Kind(
            line=self.line,
            T=tl.float64 if wide.dtype == torch.float64 else tl.float32,
            normalization=self.selection.normalization,
            source=source,
            random=self.selection.random,
            rescale=self.selection.rescale,
            update=self.selection.target == "update",
            nesterov=self.nesterov,
            **dict.fromkeys(
                ("g", "theta", "s", "a", "b", "c", "step", "kept", "strided"),
                typing.cast(Any, None),
            ),
        )

    def planned(self, plan: "Plan | None", captured: bool) -> "Plan":
        """The plan of the call: the one given, one that is kept, or a new one."""
        lists = {
            "theta": self.theta,
            "a": [],
            "b": [],
            "c": [],
            "s": self.s,
            "step": self.steps,
            "low": self.kept[0],
            "high": self.kept[1],
        }
        lists |= {"g": self.g, **dict(zip("abc", self.moments, strict=False))}
        kind = self.kind()
        if plan is not None and plan.kind == kind and plan.moving == _moving(lists, plan.planes):
            return plan
        planes = [i for i, tensor in enumerate(lists["theta"] or lists["g"]) if tensor.dim() > 1]
        moving = _moving(lists, planes)
        standing = _standing(lists), self.layout, self.sizes
        plans, key = (
            (PLANS.setdefault(self.steps[0], {}), kind)
            if self.steps
            else (RECENT, (kind, tuple(self.layout)))
        )
        plan = plans.pop(key, None)
        if plan is None or plan.moving != moving or plan.standing != standing:
            plan = Plan(moving, standing, planes, kind, lists, self.layout, self.sizes)
            # its rows are on the device from the first replay on: no other step may use it
            if captured:
                return plan
        plans[key] = plan
        if len(RECENT) > RECENT_PLANS:
            RECENT.popitem(last=False)
        return plan


def _selection_numbers(selection) -> dict[str, float]:
    direction = 1.0 if selection.direction == "printed" else -1.0
    cap = 1 / max(selection.min_probability, SMALLEST_PROBABILITY)
    return {
        "steepness": direction * 2 * selection.sharpness * math.log2(math.e),
        "threshold": selection.threshold,
        "largest": cap,
        "constant": min(1 / selection.keep_probability, cap),
    }


# ---- The operators, as reference.py has them.


def _step(
    line,
    params,
    grads,
    moments,
    steps,
    mins,
    maxs,
    *,
    scope_statistics,
    lr,
    lr_tensor,
    weight_decay,
    numbers,
    tensors,
    plan,
    **call,
):
    numbers |= {"lr": lr, "weight_decay": weight_decay}
    lists = {"theta": params, "moments": moments, "steps": steps, "kept": (mins, maxs)}
    return Call(
        line,
        grads,
        **lists,
        numbers=numbers,
        tensors=tensors | {"lr": lr_tensor},
        scope=scope_statistics,
        **call,
    ).run(plan)


def selective_adamw_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    *kept,
    beta1,
    beta2,
    beta1_tensor,
    beta2_tensor,
    eps,
    **options,
) -> Plan | None:
    """AdamW on g~ (target "gradient"), or AdamW's step where b ("update")."""
    moments = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    betas = {"beta1": beta1_tensor, "beta2": beta2_tensor}
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    plan: Plan | None = _step(
        "adamw", params, grads, moments, *kept, numbers=numbers, tensors=betas, **options
    )
    return plan


def selective_sgd_(
    params, grads, momentum_buffers, *kept, momentum, dampening, **options
) -> Plan | None:
    """SGD on g~ (target "gradient"), or SGD's step where b ("update")."""
    numbers = {"momentum": momentum, "dampening": dampening}
    plan: Plan | None = _step(
        "sgd", params, grads, [momentum_buffers], *kept, numbers=numbers, tensors={}, **options
    )
    return plan


def select_gradients_(
    grads, saliencies, *, scope_statistics, layout, step, seed, selection
) -> None:
    """g <- b*g/p."""
    Call(
        "multiply", grads, selection, layout, seed, step, s=saliencies, scope=scope_statistics
    ).run(None)


def selective_statistics_(
    grads, saliencies, mins, maxs, *, layout, sizes, normalization, grad_scale, out
) -> None:
    """Joins (min, max) or the histogram of s into `out`: one row for all tensors, or a row
    each. What is kept stands for its tensor.
    """
    selection = Statistics("rank" if normalization == "rank" else "minmax")
    Call(
        "statistics",
        grads,
        selection,
        layout,
        s=saliencies,
        kept=(mins, maxs),
        sizes=sizes,
        grad_scale=grad_scale,
        out=out,
    ).run(None)


class Statistics(typing.NamedTuple):
    """What a selection has where nothing is selected."""

    normalization: str
    direction: str = "printed"
    sharpness: float = 0.0
    threshold: float = 0.0
    min_probability: float = 0.0
    keep_probability: float = 1.0
    random: bool = False
    rescale: bool = False
    target: str = "gradient"


def selection_probability_(grad, saliency, *, out, selection) -> None:
    """p of every element."""
    n = grad.numel()
    Call(
        "probability",
        [grad],
        selection,
        [0, 0, n, n],
        theta=[out],
        s=[] if saliency is None else [saliency],
    ).run(None)


def selection_mask_(grad, saliency, *, out, layout, step, seed, selection) -> None:
    """b of every element."""
    bytes_of = [out.view(torch.uint8)]
    Call(
        "mask",
        [grad],
        selection,
        layout,
        seed,
        step,
        theta=bytes_of,
        s=[] if saliency is None else [saliency],
    ).run(None)
