"""The losses in Triton (Eq. 3-6): a program takes a few samples at a time and visits their m+1 rows
up to three times.

First for each row's maximum and sum of exponentials, then for the pairs' divergences, then for the
gradients, by blocks of columns that registers hold; a row of one block is read once. Logarithms are
to base 2.
"""

import functools
import typing
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import triton_ops
from ..core.triton_ops import from_bits

L2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# What is far enough below a row's maximum that p is 0 while differences stay finite; and from where
# on a row is moved by its maximum first, as this distance would be lost in it.
FAR_BELOW, FAR_OUT = tl.constexpr(1e3), tl.constexpr(1e6)
APART = tl.constexpr(1.0)  # of maxima, from where on rows are moved too
AT_ONCE = tl.constexpr(1024)  # samples of a loop over all of them
FEW = 3  # passes
MOST_THREADS = 256  # with more one has too few registers
COUNTED_BY_EACH = 4096  # labels up to which every program counts those that are not ignored


class Form(typing.NamedTuple):
    """What a kernel is compiled for. A block is R samples and W * V columns, [R, W, V]; a
    thread holds whole runs of V.
    """

    P: int  # passes
    # no more than a program's registers hold together: their addresses are arguments, else in a
    # table
    FEW: bool
    STORAGE: tl.dtype  # of the logits
    FIRST: int  # of those in pairs: 1 with labels, else 0
    R: int
    W: int
    V: int
    ONE: bool  # a row is one block
    TAIL: bool  # the last block of a row is not full
    ALIGNED: bool  # runs of V are 128 bits, dense, and rows end with one
    DENSE: bool  # neighbouring classes are neighbours in memory
    DTYPE: tl.dtype  # of the arithmetic
    EXACT: bool  # the logits have its precision
    REGRESSION: bool
    KIND: str  # of the labels: "none", "indices", "soft"
    SMOOTH: bool
    SUMS: bool  # their cross entropy has more than one term
    NEEDS: int  # of a gradient, a bit for each pass
    MEAN: bool
    BY_ROW: bool
    ALONE: bool  # one program sees all samples, and adds them up


# ---- The formulas


@triton.jit
def exponential(y):
    return tl.exp2(y * L2E)


@triton.jit
def log_ratio(d, EXACT: tl.constexpr):
    """log2(p/M), M = (p + q)/2, of the more probable side, for d = log2(p/q); exactly 0 for 0.

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
        a = u * L2E + u * u * q
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
def start(shape: tl.constexpr, k, passes, c):
    """What log ratios are added to: less the pivot."""
    w = tl.full(shape, -0.0, c.DTYPE)  # -0 + x is x, and costs nothing
    if c.EXACT:
        w -= pick(passes[-1], k)
    return w


@triton.jit
def log_ratios(z, passes, c):
    """For each pass the sum of log2(p/M) over its pairs less its pivot; z: the logits by pass."""
    M: tl.constexpr = len(z)
    gaps = passes[-2]
    w = ()
    for k in tl.static_range(M):
        w = w + (start(z[0].shape, k + c.FIRST, passes, c),)
    for k in tl.static_range(M):
        for l in tl.static_range(k + 1, M):
            rest, ratio = gaps[k * (2 * M - k - 1) // 2 + l - k - 1]
            d = log_distance(z[k], z[l], rest, ratio)
            a = log_ratio(d, c.EXACT)
            w = added(added(w, k, a + tl.minimum(d, 0.0)), l, a - tl.maximum(d, 0.0))
    return w


@triton.jit
def log_ratios_of(k, z, at, FULL: tl.constexpr, samples, passes, c):
    """The same for pass k alone, whose logits are z, in a block of columns; with itself a pass
    has 0.
    """
    i, inside = columns(at, samples[-1], c)
    w = start(z.shape, k, passes, c)
    for l in range(c.FIRST, c.P):
        w += log_ratio_of(k, l, z, read_pass(l, i, inside, FULL, True, samples, c), passes, c)
    return w


@triton.jit
def log_ratio_of(k, l, z, x, passes, c):
    """log2(p/M) of pass k beside pass l, whose logits are x."""
    _, bases, rests, totals, _, _ = passes
    other = shifted(x, pick(bases, l), pick(rests, l))
    d = log_distance(
        z, other, pick(rests, k) - pick(rests, l), log_gap(pick(totals, k), pick(totals, l))
    )
    return log_ratio(d, c.EXACT) + tl.minimum(d, 0.0)


@triton.jit
def pivot(k, likeliest, samples, passes, c):
    """The sum of pass k's log ratios at its most probable class where that holds much of p, or 0.

    There it is nearly the divergence, and only their difference is exact enough.
    """
    z = shifted(read_class(k, likeliest, samples, c), pick(passes[1], k), pick(passes[2], k))
    w = tl.zeros([c.R, 1, 1], c.DTYPE)
    if c.FEW:
        for l in tl.static_range(c.FIRST, c.P):
            if l != k:
                w += log_ratio_of(k, l, z, read_class(l, likeliest, samples, c), passes, c)
    else:
        for l in range(c.FIRST, c.P):
            w += tl.where(
                l == k, 0.0, log_ratio_of(k, l, z, read_class(l, likeliest, samples, c), passes, c)
            )
    return tl.where(pick(passes[3], k) < 4, w, 0.0)


@triton.jit
def pivots_of(likeliest, samples, passes, c):
    """The pivots of the passes; 0 for one that is in no pair."""
    out = ()
    for _ in tl.static_range(c.P):
        out = out + (tl.zeros([c.R, 1, 1], c.DTYPE),)
    if c.FEW:
        for k in tl.static_range(c.FIRST, c.P):
            out = put(out, k, pivot(k, likeliest[k], samples, passes, c))
    else:
        for k in range(c.FIRST, c.P):
            out = put(out, k, pivot(k, pick(likeliest, k), samples, passes, c))
    return out


@triton.jit
def log_gap(total, other):
    """log2 of the ratio of two sums; the difference of two logarithms would have lost digits."""
    return tl.log2(total / other)


@triton.jit
def log_distance(x, y, rest, ratio):
    """log2(p/q), exactly 0 where a row is another one moved; rest, ratio: what their maxima
    and their sums differ by.
    """
    return ((x - y) - rest) * L2E - ratio


@triton.jit
def shifted(x, base, rest):
    """Logits of which differences are taken: finite."""
    return tl.maximum(x - base, rest - FAR_BELOW)


@triton.jit
def added(values, K: tl.constexpr, term):
    """The tuple with a term added to one of its values."""
    out = ()
    for j in tl.static_range(len(values)):
        if j == K:
            out = out + (values[j] + term,)
        else:
            out = out + (values[j],)
    return out


@triton.jit
def plus(values, k, term):
    """The same for a number that only the running kernel knows."""
    out = ()
    for j in tl.static_range(len(values)):
        out = out + (values[j] + tl.where(k == j, term, 0.0),)
    return out


@triton.jit
def put(values, k, value):
    """The tuple with another value k."""
    out = ()
    for j in tl.static_range(len(values)):
        out = out + (tl.where(k == j, value, values[j]),)
    return out


@triton.jit
def pick(values, k):
    """Value k of a tuple."""
    out = values[0]
    for j in tl.static_range(1, len(values)):
        out = tl.where(k == j, values[j], out)
    return out


@triton.jit
def pairs_divergence(divergences, M: tl.constexpr):
    """JS summed over pairs from the sums of the divergences to the pairs' means; a pair's is
    in [0, ln 2], NaN stays.
    """
    most: tl.constexpr = M * (M - 1) / 2 * LN2
    js = divergences * (LN2 / 2)
    js = tl.where(js < 0, 0.0, js)
    return tl.where(js > most, most, js)


@triton.jit
def smoothed(t, smoothing, C):
    """A label's probability of a class, smoothed."""
    return t * (1 - smoothing) + smoothing / C


@triton.jit
def label_term(t, y):
    """t * (x - max) of a class; one with t = 0 adds nothing, not even where x = -inf."""
    return tl.where(t == 0, 0.0, t * y)


@triton.jit
def squared(x, y):
    """Regression: (x - y)^2 in the place of both losses, and its derivative by x."""
    return (x - y) * (x - y)


@triton.jit
def squared_slope(x, y):
    return (x - y) + (x - y)


# ---- Blocks


@triton.jit
def columns(at, C, c):
    """The columns of the block from `at` on, and which of them there are."""
    w, v = tl.arange(0, c.W)[None, :, None], tl.arange(0, c.V)[None, None, :]
    if c.ALIGNED:
        i = at + w * c.V + v
        inside = at + w * c.V < C
    else:  # neighbouring threads have neighbouring columns
        i = at + v * c.W + w
        inside = i < C
    return i, inside


@triton.jit
def read(x, i, inside, stride, FILL: tl.constexpr, FULL: tl.constexpr, AGAIN: tl.constexpr, c):
    """A block of the rows that begin at x, FILL past their end. AGAIN: it will be read once
    more.
    """
    policy: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    offsets = i if c.DENSE else i.to(tl.int64) * stride
    if FULL:
        found = tl.load(x + offsets, eviction_policy=policy)
    else:
        found = tl.load(x + offsets, mask=inside, other=FILL, eviction_policy=policy)
    return found.to(c.DTYPE)


@triton.jit
def write(into, i, inside, stride, there, value, FULL: tl.constexpr, c):
    offsets = i if c.DENSE else i.to(tl.int64) * stride
    value = triton_ops.nearest(value, into.dtype.element_ty)
    if c.R > 1:
        tl.store(into + offsets, value, mask=there & inside, eviction_policy="evict_first")
    elif FULL:
        tl.store(into + offsets, value, eviction_policy="evict_first")
    else:
        tl.store(into + offsets, value, mask=inside, eviction_policy="evict_first")


@triton.jit
def place(rows, k, c):
    """Where the rows of pass k begin, and how far apart its classes are."""
    if c.FEW:
        return rows[0][k], rows[1][k]
    else:
        table, row = rows
        begin, row_stride, stride = (
            tl.load(table + 3 * k),
            tl.load(table + 3 * k + 1),
            tl.load(table + 3 * k + 2),
        )
        if c.ALIGNED:
            return triton_ops.aligned_pointer(begin, c.STORAGE) + row * row_stride * c.V, stride
        else:
            return triton_ops.pointer(begin, c.STORAGE) + row * row_stride, stride


@triton.jit
def read_pass(k, i, inside, FULL: tl.constexpr, AGAIN: tl.constexpr, samples, c):
    row, stride = place(samples[0], k, c)
    return read(row, i, inside, stride, -INFINITY, FULL, AGAIN, c)


@triton.jit
def read_class(k, i, samples, c):
    """Pass k's logits of a class by sample."""
    row, stride = place(samples[0], k, c)
    return tl.load(row + i.to(tl.int64) * stride).to(c.DTYPE)


@triton.jit
def over_runs(x):
    return tl.sum(x, 2, keep_dims=True)


@triton.jit
def over_row(x):
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def zeros(SIZE: tl.constexpr, c):
    """SIZE sums over runs."""
    out = ()
    for _ in tl.static_range(SIZE):
        out = out + (tl.zeros([c.R, c.W, 1], c.DTYPE),)
    return out


# ---- The three visits


@triton.jit
def add_exponentials(x, highest, total):
    """Maxima and sums of exp(x - maximum) of every run, a block later."""
    higher = tl.maximum(highest, tl.max(x, 2, keep_dims=True))
    return higher, total * exponential(highest - higher) + over_runs(exponential(x - higher))


@triton.jit
def class_of(x, top, i):
    """A class whose logit is the row's maximum; the first where none is."""
    return tl.max(tl.max(tl.where(x == top, i, 0), 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def normalizer(row, stride, C, c):
    """A row's maximum, a class that has it, and the sum of exp(x - maximum): NaN where all is
    -inf or something is no logit.
    """
    likeliest = tl.zeros([c.R, 1, 1], tl.int32)
    i, inside = columns(0, C, c)
    if c.ONE:
        x = read(row, i, inside, stride, -INFINITY, not c.TAIL, False, c)
        top = tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)
        total = over_row(exponential(x - top))
        if c.EXACT:
            likeliest = class_of(x, top, i)
    else:
        begin = tl.zeros([c.R, c.W, 1], tl.int32)  # of the block that has a run's maximum
        highest = tl.full(
            [c.R, c.W, 1],
            -1.7976931348623157e308 if c.DTYPE == tl.float64 else -3.4028234e38,
            c.DTYPE,
        )
        total = tl.zeros([c.R, c.W, 1], c.DTYPE)
        end = C // (c.W * c.V) * (c.W * c.V)
        for at in range(0, end, c.W * c.V):
            i, inside = columns(at, C, c)
            before = highest
            highest, total = add_exponentials(
                read(row, i, inside, stride, -INFINITY, True, True, c), highest, total
            )
            begin = tl.where(highest > before, at, begin)
        if c.TAIL:
            i, inside = columns(end, C, c)
            before = highest
            highest, total = add_exponentials(
                read(row, i, inside, stride, -INFINITY, False, True, c), highest, total
            )
            begin = tl.where(highest > before, end, begin)
        top = tl.max(highest, 1, keep_dims=True)
        total = tl.sum(total * exponential(highest - top), 1, keep_dims=True)
        if c.EXACT:
            i = begin + columns(0, C, c)[0]
            likeliest = class_of(read(row, i, i < C, stride, -INFINITY, False, True, c), top, i)
    return top, likeliest, tl.where(total > 0, total, float("nan"))


@triton.jit
def targets(i, inside, soft, soft_stride, smoothing, C, FULL: tl.constexpr, AGAIN: tl.constexpr, c):
    """The probabilities t that soft labels stand for, 0 past the end."""
    t = read(soft, i, inside, soft_stride, 0.0, FULL, AGAIN, c)
    if c.SMOOTH:
        t = smoothed(t, smoothing, C)
        if not FULL:
            t = tl.where(inside, t, 0.0)
    return t


@triton.jit
def less_targets(g, of_t, i, label, smoothing, C, c):
    """g - of_t * t for class indices, without a block of t: one that comes from no memory may
    get a layout that every thread repeats.
    """
    if c.SMOOTH:
        return tl.where(
            i == label,
            g - of_t * smoothed(1.0, smoothing, C),
            g - of_t * smoothed(0.0, smoothing, C),
        )
    else:
        return tl.where(i == label, g - of_t, g)


@triton.jit
def label_terms(t, y, inside, FULL: tl.constexpr):
    """Sums over runs of t * y, y = x - max; of y alone without t, where all classes but the
    label's weigh the same.
    """
    if t is not None:
        return over_runs(label_term(t, y))
    elif FULL:
        return over_runs(y)
    else:
        return over_runs(tl.where(inside, y, 0.0))


@triton.jit
def add_block(at, FULL: tl.constexpr, sums, samples, passes, c):
    """Adds a block to the sums: of soft labels t; by pass of `label_terms`; by pass of e * log
    ratios, e = exp(x - max).
    """
    _, _, soft, soft_stride, smoothing, C = samples
    tops, bases, rests, _, _, _ = passes
    masses, of_labels, of_pairs = sums
    i, inside = columns(at, C, c)
    t = None
    if c.KIND == "soft":
        t = targets(i, inside, soft, soft_stride, smoothing, C, FULL, True, c)
        masses += over_runs(t)
    if c.FEW:
        z = ()
        for k in tl.static_range(c.P):
            if c.SUMS or k >= c.FIRST:
                x = read_pass(k, i, inside, FULL, True, samples, c)
                if c.SUMS:
                    of_labels = added(of_labels, k, label_terms(t, x - tops[k], inside, FULL))
                if k >= c.FIRST:
                    z = z + (shifted(x, bases[k], rests[k]),)
        if c.P - c.FIRST > 1:
            w = log_ratios(z, passes, c)
            for k in tl.static_range(c.FIRST, c.P):
                of_pairs = added(
                    of_pairs, k, over_runs(exponential(z[k - c.FIRST] - rests[k]) * w[k - c.FIRST])
                )
    else:
        for k in range(c.P):
            x = read_pass(k, i, inside, FULL, True, samples, c)
            if c.SUMS:
                of_labels = plus(of_labels, k, label_terms(t, x - pick(tops, k), inside, FULL))
            z = shifted(x, pick(bases, k), pick(rests, k))
            w = log_ratios_of(k, z, at, FULL, samples, passes, c)
            of_pairs = plus(of_pairs, k, over_runs(exponential(z - pick(rests, k)) * w))
    return masses, of_labels, of_pairs


@triton.jit
def write_block(at, FULL: tl.constexpr, factors, into, there, keep, samples, passes, c):
    """Writes a block's gradients: e * (of_e + of_w * log ratios) - of_t * t."""
    _, label, soft, soft_stride, smoothing, C = samples
    _, bases, rests, _, _, _ = passes
    of_e, of_w, of_t = factors
    i, inside = columns(at, C, c)
    if c.KIND == "soft":
        t = targets(i, inside, soft, soft_stride, smoothing, C, FULL, False, c)
    z, w = (), ()
    if c.FEW:
        for k in tl.static_range(c.P):
            z = z + (shifted(read_pass(k, i, inside, FULL, False, samples, c), bases[k], rests[k]),)
        if c.P - c.FIRST > 1:
            w = log_ratios(z[c.FIRST :], passes, c)
    else:  # all of them before a gradient is written, which may be over logits
        for _ in tl.static_range(c.P):
            w = w + (tl.zeros([c.R, c.W, c.V], c.DTYPE),)
        for k in range(c.FIRST, c.P):
            x = shifted(
                read_pass(k, i, inside, FULL, True, samples, c), pick(bases, k), pick(rests, k)
            )
            w = put(w, k - c.FIRST, log_ratios_of(k, x, at, FULL, samples, passes, c))
    for k in tl.static_range(c.P):
        if c.NEEDS >> k & 1:
            if c.FEW:
                x = z[k]
            else:
                x = shifted(read_pass(k, i, inside, FULL, False, samples, c), bases[k], rests[k])
            g = of_e[k]
            if k >= c.FIRST and c.P - c.FIRST > 1:
                g = w[k - c.FIRST] * of_w[k] + g
            g = exponential(x - rests[k]) * g
            if c.KIND == "indices":
                g = less_targets(g, of_t[k], i, label, smoothing, C, c)
            elif c.KIND == "soft":
                g -= t * of_t[k]
            if c.KIND == "indices" and c.R > 1:
                g = tl.where(keep, g, 0.0)
            begin, stride = place(into, k, c)
            write(begin, i, inside, stride, there, g, FULL, c)


@triton.jit
def clear(into, there, C, c):
    """Writes gradients of 0."""
    for at in range(0, C, c.W * c.V):
        i, inside = columns(at, C, c)
        for k in tl.static_range(c.P):
            if c.NEEDS >> k & 1:
                begin, stride = place(into, k, c)
                write(begin, i, inside, stride, there, tl.zeros([c.R, c.W, c.V], c.DTYPE), False, c)


@triton.jit
def classify(samples, into, there, keep, unit, js_weight, c):
    """The losses of some samples, their parts [R, 1, 1], and what `unit` times them has for
    gradients.
    """
    rows, label, _, _, smoothing, C = samples
    BLOCK: tl.constexpr = c.W * c.V
    end = C // BLOCK * BLOCK
    tops, likeliest, totals, bases, rests, gaps = (), (), (), (), (), ()
    if c.FEW:
        for k in tl.static_range(c.P):
            top, class_, total = normalizer(rows[0][k], rows[1][k], C, c)
            tops, likeliest, totals = tops + (top,), likeliest + (class_,), totals + (total,)
    else:
        for _ in tl.static_range(c.P):
            tops, totals = (
                tops + (tl.zeros([c.R, 1, 1], c.DTYPE),),
                totals + (tl.zeros([c.R, 1, 1], c.DTYPE),),
            )
            likeliest = likeliest + (tl.zeros([c.R, 1, 1], tl.int32),)
        for k in range(c.P):
            begin, stride = place(rows, k, c)
            top, class_, total = normalizer(begin, stride, C, c)
            tops, likeliest, totals = (
                put(tops, k, top),
                put(likeliest, k, class_),
                put(totals, k, total),
            )
    highest, lowest = tops[c.P - 1], tops[c.P - 1]
    for k in tl.static_range(c.FIRST, c.P):
        highest, lowest = tl.maximum(highest, tops[k]), tl.minimum(lowest, tops[k])
    for k in tl.static_range(c.P):
        base = tops[k]
        if c.EXACT:  # differences of close rows are exact, of others they lose digits
            base = tl.where((highest - lowest > APART) | (tl.abs(base) > FAR_OUT), base, 0.0)
        bases, rests = bases + (base,), rests + (tops[k] - base,)
    if c.FEW:
        for k in tl.static_range(c.FIRST, c.P):
            for l in tl.static_range(k + 1, c.P):
                gaps = gaps + ((rests[k] - rests[l], log_gap(totals[k], totals[l])),)
    passes = (tops, bases, rests, totals, gaps, ())
    if c.EXACT and c.P - c.FIRST > 1:
        passes = (tops, bases, rests, totals, gaps, pivots_of(likeliest, samples, passes, c))
    pivots = passes[-1]

    sums = (tl.zeros([c.R, c.W, 1], c.DTYPE), zeros(c.P, c), zeros(c.P, c))
    if c.SUMS or c.P - c.FIRST > 1:
        if c.ONE:
            sums = add_block(0, not c.TAIL, sums, samples, passes, c)
        else:  # from the end, which was read last
            if c.TAIL:
                sums = add_block(end, False, sums, samples, passes, c)
            for at in range(0, end, BLOCK):
                sums = add_block(end - BLOCK - at, True, sums, samples, passes, c)
    masses, of_labels, of_pairs = sums

    clean = tl.zeros([c.R, 1, 1], c.DTYPE)
    adversarial, divergences = clean, clean
    mass = over_row(masses) if c.KIND == "soft" else tl.full([c.R, 1, 1], 1.0, c.DTYPE)
    of_e, of_w, of_t = (), (), ()
    for k in tl.static_range(c.P):
        factor = tl.zeros([c.R, 1, 1], c.DTYPE)
        if c.KIND != "none":
            if c.KIND == "soft":
                of_label = over_row(of_labels[k])
            else:
                begin, stride = place(rows, k, c)
                of_label = (
                    tl.load(begin + label.to(tl.int64) * stride, mask=label >= 0, other=0.0).to(
                        c.DTYPE
                    )
                    - tops[k]
                )
                if c.SMOOTH:
                    of_label = label_term(1 - smoothing, of_label) + smoothing / C * over_row(
                        of_labels[k]
                    )
            cross_entropy = mass * tl.log2(totals[k]) * LN2 - of_label
            share = unit
            if k == 0:
                clean = cross_entropy
            else:
                adversarial += cross_entropy / (c.P - 1)
                share = unit / (c.P - 1)
            factor = share * mass
            of_t = of_t + (share,)
        if k >= c.FIRST and c.P - c.FIRST > 1:  # p * (log ratios - KL)/2
            divergence = over_row(of_pairs[k]) / totals[k]
            pair_factor = unit * js_weight * (LN2 / 2)
            factor -= pair_factor * divergence
            divergences += divergence
            if c.EXACT:
                divergences += pivots[k]
            of_w = of_w + (pair_factor / totals[k],)
        else:
            of_w = of_w + (0.0,)
        of_e = of_e + (factor / totals[k],)
    if c.KIND == "indices":
        clean = tl.where(label < 0, float("nan"), clean)  # a label that is no class

    if c.NEEDS:
        factors = (of_e, of_w, of_t)
        # else sums have waited: every thread has a label's logit before a gradient may be written
        # over it
        if c.P - c.FIRST <= 1:
            tl.debug_barrier()
        if c.ONE:
            write_block(0, not c.TAIL, factors, into, there, keep, samples, passes, c)
        else:
            for at in range(0, end, BLOCK):
                write_block(at, True, factors, into, there, keep, samples, passes, c)
            if c.TAIL:
                write_block(end, False, factors, into, there, keep, samples, passes, c)
    return clean, adversarial, pairs_divergence(divergences, c.P - c.FIRST)


@triton.jit
def add_errors(at, FULL: tl.constexpr, sums, samples, into, there, unit, js_weight, c):
    """Regression: adds a block to the sums of the squares, and writes its gradients."""
    rows, _, soft, soft_stride, _, C = samples
    clean, adversarial, divergence = sums
    i, inside = columns(at, C, c)
    if c.KIND != "none":
        t = read(soft, i, inside, soft_stride, 0.0, FULL, False, c)
    z = ()
    for k in tl.static_range(c.P):
        begin, stride = place(rows, k, c)
        z = z + (read(begin, i, inside, stride, 0.0, FULL, False, c),)
    for k in tl.static_range(c.P):
        g = tl.zeros([c.R, c.W, c.V], c.DTYPE)
        if c.KIND != "none":
            if k == 0:
                clean += over_runs(squared(z[k], t))
                g = squared_slope(z[k], t)
            else:
                adversarial += over_runs(squared(z[k], t)) / (c.P - 1)
                g = squared_slope(z[k], t) / (c.P - 1)
        for l in tl.static_range(c.FIRST, c.P):
            if k >= c.FIRST and k != l:
                if k < l:
                    divergence += over_runs(squared(z[k], z[l]))
                g += squared_slope(z[k], z[l]) * js_weight
        if c.NEEDS >> k & 1:
            begin, stride = place(into, k, c)
            write(begin, i, inside, stride, there, g * unit, FULL, c)
    return clean, adversarial, divergence


@triton.jit
def regress(samples, into, there, unit, js_weight, c):
    """The same with means over the classes of squares."""
    C = samples[-1]
    BLOCK: tl.constexpr = c.W * c.V
    end = C // BLOCK * BLOCK
    sums = zeros(3, c)
    unit = unit / C
    if not c.ONE:
        for at in range(0, end, BLOCK):
            sums = add_errors(at, True, sums, samples, into, there, unit, js_weight, c)
    if c.ONE:
        sums = add_errors(0, not c.TAIL, sums, samples, into, there, unit, js_weight, c)
    elif c.TAIL:
        sums = add_errors(end, False, sums, samples, into, there, unit, js_weight, c)
    clean, adversarial, divergence = sums
    return over_row(clean) / C, over_row(adversarial) / C, over_row(divergence) / C


# ---- Kernels and their launches


@triton.jit
def counted(labels, label_stride, count, ignore_index, N, c):
    """What sums are divided by: the samples that are not ignored, or 1. A number: what a block
    of it meets would get its layout.
    """
    if not c.MEAN:  # a branch each, as what stands after a return is compiled too
        return tl.full((), 1, c.DTYPE)
    elif c.KIND != "indices":
        return N.to(c.DTYPE)
    elif count is not None:
        return tl.load(count).to(c.DTYPE)
    else:
        found = tl.zeros([AT_ONCE], tl.int32)
        for at in range(0, N, AT_ONCE):
            n = at + tl.arange(0, AT_ONCE)
            found += (
                tl.load(labels + n.to(tl.int64) * label_stride, mask=n < N, other=ignore_index)
                != ignore_index
            )
        return tl.sum(found, 0).to(c.DTYPE)


@triton.jit
def put_losses(
    loss,
    parts,
    at,
    apart,
    clean,
    adversarial,
    divergence,
    js_weight,
    there,
    WITH_LOSS: tl.constexpr,
):
    """Stores the three parts, `apart` elements apart, and the loss."""
    tl.store(parts + at, clean, mask=there)
    tl.store(parts + apart + at, adversarial, mask=there)
    tl.store(parts + 2 * apart + at, divergence, mask=there)
    if WITH_LOSS:
        tl.store(loss + at, clean + adversarial + js_weight * divergence, mask=there)


@triton.jit(do_not_specialize=["N", "js_weight", "smoothing", "ignore_index"])
def loss_kernel(
    logits,
    row_strides,
    strides,
    gradients,
    gradient_row_strides,
    gradient_strides,
    table,
    labels,
    label_row_stride,
    label_stride,
    count,
    loss,
    parts,
    N,
    C,
    js_weight: tl.int64,
    smoothing: tl.int64,
    ignore_index: tl.int64,
    c,
):
    """The losses of all samples, and the gradients. For `add_up`, where neither BY_ROW nor
    ALONE: the parts of rows, and their count.
    """
    js_weight, smoothing = from_bits(js_weight).to(c.DTYPE), from_bits(smoothing).to(c.DTYPE)
    count = counted(labels, label_row_stride, count, ignore_index, N, c)
    UNIT: tl.constexpr = c.V if c.ALIGNED else 1  # of the row strides
    clean_total = tl.zeros([1, 1, 1], c.DTYPE)
    adversarial_total, divergence_total = clean_total, clean_total
    for tile in range(tl.program_id(0), tl.cdiv(N, c.R), tl.num_programs(0)):
        row = (tl.zeros([c.R, 1, 1], tl.int64) + tile) * c.R + tl.arange(0, c.R)[:, None, None]
        there = row < N
        at = tl.minimum(row, N - 1)  # whatever is read there is not used
        if c.FEW:
            begins, others = (), ()
            for k in tl.static_range(c.P):
                begins = begins + (logits[k] + at * row_strides[k] * UNIT,)
                others = others + (gradients[k] + at * gradient_row_strides[k] * UNIT,)
            rows, into = (begins, strides), (others, gradient_strides)
        else:
            rows, into = (table, at), (table + 3 * c.P, at)
        keep, label, soft = there, None, None
        if c.KIND == "indices":
            label = tl.load(labels + at * label_row_stride)
            keep = there & (label != ignore_index)
            label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
        if c.KIND == "soft":
            soft = labels + at * label_row_stride * UNIT
        samples = (rows, label, soft, label_stride, smoothing, C)
        clean = tl.zeros([c.R, 1, 1], c.DTYPE)
        adversarial, divergence = clean, clean
        if c.REGRESSION:
            clean, adversarial, divergence = regress(samples, into, there, 1 / count, js_weight, c)
        elif c.KIND != "indices" or tl.max(keep.to(tl.int32)) > 0:
            clean, adversarial, divergence = classify(
                samples, into, there, keep, 1 / count, js_weight, c
            )
        else:
            clear(into, there, C, c)
        clean, adversarial = tl.where(keep, clean, 0.0), tl.where(keep, adversarial, 0.0)
        divergence = tl.where(keep, divergence, 0.0)
        if c.ALONE:
            clean_total += tl.sum(clean, 0, keep_dims=True)
            adversarial_total += tl.sum(adversarial, 0, keep_dims=True)
            divergence_total += tl.sum(divergence, 0, keep_dims=True)
        else:
            put_losses(
                loss,
                parts,
                row,
                N.to(tl.int64),
                clean,
                adversarial,
                divergence,
                js_weight,
                there,
                c.BY_ROW,
            )
    here = tl.zeros([1, 1, 1], tl.int64)
    if c.ALONE:
        clean, adversarial, divergence = (
            clean_total / count,
            adversarial_total / count,
            divergence_total / count,
        )
        put_losses(loss, parts, here, 1, clean, adversarial, divergence, js_weight, None, True)
    elif not c.BY_ROW:
        if tl.program_id(0) == 0:
            tl.store(parts + 3 * N.to(tl.int64) + here, count)


@triton.jit(do_not_specialize=["N", "js_weight"])
def add_up_kernel(rows, loss, parts, N, js_weight: tl.int64, DTYPE: tl.constexpr):
    """The loss and its parts from those of all rows."""
    clean = tl.zeros([AT_ONCE], DTYPE)
    adversarial, divergence = clean, clean
    size = N.to(tl.int64)
    for at in range(0, N, AT_ONCE):
        n = at + tl.arange(0, AT_ONCE)
        clean += tl.load(rows + n, mask=n < N, other=0.0)
        adversarial += tl.load(rows + size + n, mask=n < N, other=0.0)
        divergence += tl.load(rows + 2 * size + n, mask=n < N, other=0.0)
    count = tl.load(rows + 3 * size)
    put_losses(
        loss,
        parts,
        0,
        1,
        tl.sum(clean, 0) / count,
        tl.sum(adversarial, 0) / count,
        tl.sum(divergence, 0) / count,
        from_bits(js_weight).to(DTYPE),
        None,
        True,
    )


@triton.jit(do_not_specialize=["N"])
def scale_kernel(
    gradients,
    row_strides,
    strides,
    scaled,
    scaled_row_strides,
    scaled_strides,
    factor,
    factor_stride,
    N,
    C,
    c,
    IN_PLACE: tl.constexpr,
):
    """The gradients times that of the loss, one for all or one for each sample. In place,
    times 1 costs nothing.
    """
    BLOCK: tl.constexpr = c.W * c.V
    blocks = tl.cdiv(C, BLOCK)
    pieces = tl.cdiv(N, c.R).to(tl.int64) * blocks
    if not c.BY_ROW:
        by = tl.load(factor)
        if IN_PLACE:
            pieces = tl.where(by == 1, 0, pieces)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        row = (tl.zeros([c.R, 1, 1], tl.int64) + piece // blocks) * c.R + tl.arange(0, c.R)[
            :, None, None
        ]
        there, row = row < N, tl.minimum(row, N - 1)
        if c.BY_ROW:
            by = tl.load(factor + row * factor_stride)
        at = (piece % blocks).to(tl.int32) * BLOCK
        if at + BLOCK <= C:
            scale_block(
                at,
                True,
                row,
                there,
                gradients,
                row_strides,
                strides,
                scaled,
                scaled_row_strides,
                scaled_strides,
                by,
                C,
                c,
            )
        else:
            scale_block(
                at,
                False,
                row,
                there,
                gradients,
                row_strides,
                strides,
                scaled,
                scaled_row_strides,
                scaled_strides,
                by,
                C,
                c,
            )


@triton.jit
def scale_block(
    at,
    FULL: tl.constexpr,
    row,
    there,
    gradients,
    row_strides,
    strides,
    scaled,
    scaled_row_strides,
    scaled_strides,
    by,
    C,
    c,
):
    UNIT: tl.constexpr = c.V if c.ALIGNED else 1
    i, inside = columns(at, C, c)
    for k in tl.static_range(c.P):
        g = read(
            gradients[k] + row * row_strides[k] * UNIT, i, inside, strides[k], 0.0, FULL, False, c
        )
        write(
            scaled[k] + row * scaled_row_strides[k] * UNIT,
            i,
            inside,
            scaled_strides[k],
            there,
            g * by,
            FULL,
            c,
        )


class Passes(typing.NamedTuple):
    """The passes of a list of tensors [N, C] or [k, N, C], as kernels take them."""

    rows: tuple[Tensor, ...]
    row_strides: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "Passes":
        rows = tuple(row for x in tensors for row in (x.unbind() if x.dim() == 3 else (x,)))
        row_strides, strides = zip(*(row.stride() for row in rows), strict=True)
        return cls(rows, row_strides, strides)

    def some(self, at: int) -> "Passes":
        """Those from `at` on that a program can hold."""
        few = slice(at, at + FEW)
        return Passes(self.rows[few], self.row_strides[few], self.strides[few])

    @property
    def addresses(self) -> list[tuple[int, int, int]]:
        """By pass its address and strides."""
        return [
            (row.data_ptr(), down, along)
            for row, down, along in zip(self.rows, self.row_strides, self.strides, strict=True)
        ]

    @property
    def dense(self) -> bool:
        return self.rows[0].shape[1] == 1 or all(stride == 1 for stride in self.strides)

    def aligned(self, run: int) -> bool:
        """Whether all rows begin with whole runs of so many elements, and end with one, of 16
        bytes or more.
        """
        return (
            self.dense
            and self.rows[0].shape[1] % run == 0
            and all(stride % run == 0 for stride in self.row_strides)
            and all(row.data_ptr() % 16 == 0 for row in self.rows)
        )

    def in_runs(self, run: int) -> "Passes":
        return self._replace(row_strides=tuple(stride // run for stride in self.row_strides))


def _run(passes: int, itemsize: int) -> int:
    """Elements of a pass in a thread, neighbours: 128 bits, or 64 where many passes want
    registers.
    """
    return 16 // itemsize if passes <= FEW or itemsize > 2 else 4


def _registers(few: bool) -> dict[str, int]:
    """What keeps NVIDIA's assembler from spilling a few of many passes' registers to reach a
    round number of them.
    """
    return {} if few or torch.version.hip else {"maxnreg": 255}


@functools.cache
def _block(
    samples: int, classes: int, passes: int, itemsize: int, aligned: bool, lanes: int
) -> tuple[dict[str, Any], int]:
    """The part of a form that says what a block is, and its warps."""
    # a mask is as many scalar registers
    each = _run(passes, itemsize) if aligned else min(_run(passes, itemsize), 128 // lanes)
    block = min(triton.next_power_of_2(classes), MOST_THREADS * each)
    run = min(each, block)
    # several samples in a thread have addresses of their own, by pass
    held = each if passes <= FEW else min(each, 2)
    rows = max(1, min(triton.next_power_of_2(samples), MOST_THREADS * held // block))
    form = {
        "R": rows,
        "W": block // run,
        "V": run,
        "ONE": classes <= block,
        "TAIL": classes % block != 0,
        "ALIGNED": aligned,
    }
    return form, max(rows * block // (lanes * (held if rows > 1 else each)), 1)


@functools.cache
def _form(**options) -> Form:
    """A form of the options given."""
    return Form(**{name: tl.constexpr(options.get(name)) for name in Form._fields})


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """A GPU's processors, and the bytes of its cache."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _programs(form: dict[str, Any], passes: Passes, device: torch.device) -> int:
    """How many programs share the samples. What is visited more than once is to stay in the
    cache until the last visit.
    """
    samples, classes = passes.rows[0].shape
    tiles: int = triton.cdiv(samples, form["R"])
    if device.type == "cpu":  # the interpreter: a few, for their loops to go round
        return max(1, min(tiles, 3))
    if form["ONE"]:
        return max(1, min(tiles, 2**31 - 1))
    processors, cache = _device(device)
    row = len(passes.rows) * classes * passes.rows[0].element_size()
    return max(1, min(tiles, max(processors, cache // 2 // row)))


def _evaluate(
    logits,
    labels,
    gradients,
    *,
    js_weight,
    label_smoothing,
    ignore_index,
    reduction,
    regression,
    needs,
) -> tuple[Tensor, Tensor]:
    """The loss and its parts; writes the gradients of the logits that need them where
    `gradients` (by tensor) says.
    """
    first = logits[0]
    passes, into = Passes.of(logits), Passes.of(gradients)
    (samples, classes), count = passes.rows[0].shape, len(passes.rows)
    kind, label_strides = "none", (0, 0)
    if labels is not None:
        kind, label_strides = (
            ("soft", labels.stride())
            if labels.is_floating_point()
            else ("indices", (labels.stride(0), 0))
        )
    involved = [passes, into] + (
        [Passes((labels,), label_strides[:1], label_strides[1:])] if kind == "soft" else []
    )
    run = _run(count, first.element_size())
    aligned = all(x.aligned(run) for x in involved)
    if aligned:
        passes, into = passes.in_runs(run), into.in_runs(run)
        label_strides = (
            label_strides[0] // run if kind == "soft" else label_strides[0],
            label_strides[1],
        )
    block, warps = _block(
        samples, classes, count, first.element_size(), aligned, triton_ops.lanes()
    )
    programs = _programs(block, passes, first.device)
    wide = first.dtype == torch.float64
    dtype, by_row = torch.float64 if wide else torch.float32, reduction == "none"
    alone = programs == 1 and not by_row
    needed = [
        need
        for x, need in zip(logits, needs, strict=True)
        for _ in range(len(x) if x.dim() == 3 else 1)
    ]
    smooth = kind != "none" and label_smoothing > 0
    form = _form(
        P=count,
        FEW=count <= FEW,
        STORAGE=triton_ops.DTYPES[first.dtype],
        FIRST=int(labels is not None),
        **block,
        DENSE=all(x.dense for x in involved),
        DTYPE=triton_ops.DTYPES[dtype],
        EXACT=first.dtype == dtype,
        REGRESSION=regression,
        KIND=kind,
        SMOOTH=smooth,
        SUMS=smooth or kind == "soft",
        NEEDS=sum(need << k for k, need in enumerate(needed)),
        MEAN=reduction == "mean",
        BY_ROW=by_row,
        ALONE=alone,
    )
    kept = None
    if kind == "indices" and reduction == "mean" and samples > COUNTED_BY_EACH:
        kept = (labels != ignore_index).sum()
    loss = first.new_empty((samples,) if by_row else (), dtype=dtype)
    parts = first.new_empty((3, samples) if by_row else (3,), dtype=dtype)
    rows = parts if by_row or alone else first.new_empty(3 * samples + 1, dtype=dtype)
    weight, smoothing = triton_ops.bits(js_weight), triton_ops.bits(label_smoothing)
    few, table = count <= FEW, None
    if not few:
        table = triton_ops.to_device(
            [x for part in (passes, into) for row in part.addresses for x in row],
            torch.int64,
            first.device,
        )
    with triton_ops.on(first):
        loss_kernel[(programs,)](
            *((*passes, *into) if few else [None] * 6),
            table,
            labels,
            *label_strides,
            kept,
            loss,
            rows,
            samples,
            classes,
            weight,
            smoothing,
            ignore_index,
            form,
            num_warps=warps,
            **_registers(few),
        )
        if not (by_row or alone):
            add_up_kernel[(1,)](
                rows, loss, parts, samples, weight, DTYPE=triton_ops.DTYPES[dtype], num_warps=8
            )
    return loss, parts


def uegr_loss(
    logits: list[Tensor], labels: Tensor | None, *, needs: list[bool], **options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As the reference's."""
    into = [x.new_empty(x.shape) if need else x for x, need in zip(logits, needs, strict=True)]
    loss, parts = _evaluate(logits, labels, into, needs=needs, **options)
    return loss, parts, [x for x, need in zip(into, needs, strict=True) if need]


def uegr_loss_(logits: list[Tensor], labels: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """The same, the gradients over the logits that need one."""
    return _evaluate(logits, labels, logits, **options)


def scale_gradients(gradients: list[Tensor], grad_loss: Tensor, parts: Tensor) -> list[Tensor]:
    """The chain rule, as the reference's."""
    scaled = [g.new_empty(g.shape) for g in gradients]
    _scale(gradients, scaled, grad_loss, in_place=False)
    return scaled


def scale_gradients_(gradients: list[Tensor], grad_loss: Tensor) -> None:
    """The same, in place."""
    _scale(gradients, gradients, grad_loss, in_place=True)


def _scale(
    gradients: list[Tensor], scaled: list[Tensor], factor: Tensor, *, in_place: bool
) -> None:
    if len(gradients) > 1 and any(
        g.shape[-2:] != gradients[0].shape[-2:] or g.dtype != gradients[0].dtype for g in gradients
    ):
        # those of hidden states, weight and bias
        for g, into in zip(gradients, scaled, strict=True):
            _scale([g], [into], factor, in_place=in_place)
        return
    if not gradients or gradients[0].numel() == 0:
        return
    if gradients[0].dim() == 1:
        gradients, scaled = ([x[None] for x in some] for some in (gradients, scaled))
    passes, results = Passes.of(gradients), Passes.of(scaled)
    for at in range(0, len(passes.rows), FEW):
        _scale_passes(passes.some(at), results.some(at), factor, in_place)


def _scale_passes(passes: Passes, into: Passes, factor: Tensor, in_place: bool) -> None:
    first, count = passes.rows[0], len(passes.rows)
    (samples, classes), run = first.shape, _run(count, first.element_size())
    aligned = passes.aligned(run) and into.aligned(run)
    if aligned:
        passes, into = passes.in_runs(run), into.in_runs(run)
    block, warps = _block(
        samples, classes, count, first.element_size(), aligned, triton_ops.lanes()
    )
    by_row = factor.dim() > 0
    form = _form(
        P=count,
        **block,
        DENSE=passes.dense and into.dense,
        DTYPE=triton_ops.DTYPES[factor.dtype],
        BY_ROW=by_row,
    )
    pieces = triton.cdiv(samples, block["R"]) * triton.cdiv(classes, block["W"] * block["V"])
    programs = min(pieces, 3 if first.device.type == "cpu" else 2**16)
    with triton_ops.on(first):
        scale_kernel[(programs,)](
            *passes,
            *into,
            factor,
            factor.stride(0) if by_row else 0,
            samples,
            classes,
            form,
            IN_PLACE=in_place,
            num_warps=warps,
        )
