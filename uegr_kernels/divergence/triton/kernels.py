"""The losses' kernels in Triton: a program takes a few samples at a time and visits their m+1 rows
up to three times.

First for each row's maximum and sum of exponentials, then for the pairs' divergences, then for the
gradients, by blocks of columns. Rows that a program's registers hold are read once; of others each
visit reads all, and what needs no gradient has two.

Upper case is what is known when a kernel is compiled: a kernel's options are one argument, `form`.
"""

import typing

import triton
import triton.language as tl

from ...core import triton_ops
from ...core.triton_ops import from_bits
from .math import (
    LN2,
    exponential,
    label_term,
    log_distance,
    log_gap,
    log_ratio,
    pairs_divergence,
    shifted,
    smoothed,
    squared,
    squared_slope,
)

INFINITY = tl.constexpr(float("inf"))
# Of a row's maximum, from where on the row is moved by it first: FAR_BELOW would be lost in it.
FAR_OUT = tl.constexpr(1e6)
# of maxima, from where on rows are moved too
APART = tl.constexpr(1.0)
# passes in pairs of which each pair has code of its own
UNROLLED = tl.constexpr(4)
# samples of a loop over all of them
AT_ONCE = tl.constexpr(1024)


class Form(typing.NamedTuple):
    """Says what a kernel is compiled for. A block is ROWS samples and RUNS * RUN columns, [ROWS,
    RUNS, RUN]; a thread holds whole runs.
    """

    PASSES: int
    # no more than a thread holds a block of each: their addresses are arguments, else in a table
    FEW: bool
    # of the logits
    STORAGE: tl.dtype
    # of those in pairs: 1 with labels, else 0
    FIRST: int
    ROWS: int
    RUNS: int
    RUN: int
    # blocks of a row, where registers hold all rows from one visit to the next; else 0
    HELD: int
    # the last block of a row is not full, and has code of its own
    TAIL: bool
    # it has not: all blocks look where their rows end
    MASKED: bool
    # runs are 128 bits, dense, and rows end with one
    ALIGNED: bool
    # neighbouring classes are neighbours in memory
    DENSE: bool
    # of the arithmetic
    DTYPE: tl.dtype
    # the logits have its precision
    EXACT: bool
    REGRESSION: bool
    # "none", "indices", "soft"
    LABELS: str
    SMOOTH: bool
    # their cross entropy has more than one term
    LABEL_SUMS: bool
    # of a gradient, a bit for each pass
    NEEDS: int
    MEAN: bool
    # a loss each; of scaling: a factor each
    BY_ROW: bool
    # sees all samples, and adds them up
    ONE_PROGRAM: bool
    # of scaling
    IN_PLACE: bool


class Entry(typing.NamedTuple):
    """Holds where a pass is, as the table of many passes has it, in numbers of 64 bits."""

    address: int
    row_stride: int
    stride: int


# of an entry: how many numbers it has, and where these are
ENTRY = tl.constexpr(len(Entry._fields))
ROW_STRIDE = tl.constexpr(Entry._fields.index("row_stride"))
STRIDE = tl.constexpr(Entry._fields.index("stride"))

# What travels together. A field by pass is a tuple of blocks [ROWS, 1, 1].


class Rows(typing.NamedTuple):
    """Holds where the passes' rows of some samples are: a few passes' by pointers and strides,
    more by a table of addresses and strides; and the rows' indices.
    """

    ptrs: object
    row_strides: object
    strides: object
    table_ptr: object
    row: object


class Held(typing.NamedTuple):
    """Holds the blocks of rows that are HELD, as they are in memory: those of each pass, and of
    soft labels.
    """

    logits: object
    soft: object


class Samples(typing.NamedTuple):
    """Holds what is read of some samples: logits, and either labels or pointers to soft ones."""

    logits: Rows
    held: Held
    label: object
    soft_ptr: object
    soft_stride: object
    smoothing: object
    classes: object


class BlockColumns(typing.NamedTuple):
    """Holds the columns of a block, and which of them there are."""

    i: object
    inside: object


class Normalizer(typing.NamedTuple):
    """Holds of a row its maximum, a class that has it, and the sum of exp(x - maximum); of several
    passes' rows, each by pass.
    """

    top: object
    likeliest: object
    total: object


class Passes(typing.NamedTuple):
    """Holds what the first visit found of each pass: its maximum, what its logits are moved by,
    the maximum after that, the sum of exp(x - maximum), the pivot, and log2 of the sum's ratio to
    that of the pairs' first pass.
    """

    tops: object
    bases: object
    rests: object
    totals: object
    pivots: object
    ratios: object


class Side(typing.NamedTuple):
    """Holds of the passes in pairs, from any of them on, the logits, and what their maxima and
    their sums have in distances.
    """

    z: object
    rests: object
    ratios: object


class Sums(typing.NamedTuple):
    """Holds sums over runs: of soft labels t; by pass of `label_terms`; by pass of e * log
    ratios, e = exp(x - max).
    """

    masses: object
    of_labels: object
    of_pairs: object


class Factors(typing.NamedTuple):
    """Holds by pass what a gradient is made of: e * (of_e + of_w * log ratios) - of_t * t."""

    of_e: object
    of_w: object
    of_t: object


class Losses(typing.NamedTuple):
    """Holds the three parts of a loss, which memory has in this order too."""

    clean: object
    adversarial: object
    divergence: object


PARTS = tl.constexpr(len(Losses._fields))

# ---- Tuples as arrays: Triton's have no item that is written, nor one that a number picks.


@triton.jit
def get_item(values, k):
    """Returns value k of a tuple."""
    out = values[0]
    for j in tl.static_range(1, len(values)):
        out = tl.where(k == j, values[j], out)
    return out


@triton.jit
def set_item(values, k, value):
    """Returns the tuple with another value k."""
    out = ()
    for j in tl.static_range(len(values)):
        out = out + (tl.where(k == j, value, values[j]),)
    return out


@triton.jit
def add_to_item(values, k, term):
    """Returns the tuple with a term added to value k."""
    out = ()
    for j in tl.static_range(len(values)):
        out = out + (values[j] + tl.where(k == j, term, 0.0),)
    return out


@triton.jit
def add_to_known_item(values, K: tl.constexpr, term):
    """Returns the tuple with a term added to value K, known when the kernel is compiled."""
    out = ()
    for j in tl.static_range(len(values)):
        if j == K:
            out = out + (values[j] + term,)
        else:
            out = out + (values[j],)
    return out


# ---- Blocks


@triton.jit
def columns(at, classes, form):
    """Returns the columns of the block from `at` on."""
    w, v = tl.arange(0, form.RUNS)[None, :, None], tl.arange(0, form.RUN)[None, None, :]
    if form.ALIGNED:
        i = at + w * form.RUN + v
        inside = at + w * form.RUN < classes
    else:
        # neighbouring threads have neighbouring columns
        i = at + v * form.RUNS + w
        inside = i < classes
    return BlockColumns(i=i, inside=inside)


@triton.jit
def end_of_full(classes, form):
    """Returns where a row's blocks without a tail end."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    if form.MASKED:
        return tl.cdiv(classes, BLOCK) * BLOCK
    else:
        return classes // BLOCK * BLOCK


@triton.jit
def fetch(
    row_ptr, i, inside, stride, FILL: tl.constexpr, FULL: tl.constexpr, AGAIN: tl.constexpr, form
):
    """Reads a block of rows as it is, FILL past their end. AGAIN: it will be read once more."""
    policy: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    offsets = i if form.DENSE else i.to(tl.int64) * stride
    if FULL:
        return tl.load(row_ptr + offsets, eviction_policy=policy)
    else:
        return tl.load(row_ptr + offsets, mask=inside, other=FILL, eviction_policy=policy)


@triton.jit
def read(
    row_ptr, i, inside, stride, FILL: tl.constexpr, FULL: tl.constexpr, AGAIN: tl.constexpr, form
):
    """Reads a block of rows in the arithmetic's dtype."""
    return fetch(row_ptr, i, inside, stride, FILL, FULL, AGAIN, form).to(form.DTYPE)


@triton.jit
def held_blocks(row_ptr, stride, FILL: tl.constexpr, samples, form):
    """Reads the blocks of a row that is HELD, as they are."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    blocks = ()
    for b in tl.static_range(form.HELD):
        i, inside = columns(b * BLOCK, samples.classes, form)
        x = fetch(
            row_ptr, i, inside, stride, FILL, b < form.HELD - form.TAIL - form.MASKED, False, form
        )
        blocks = blocks + (x,)
    return blocks


@triton.jit
def hold(samples, form):
    """Returns the blocks of rows that are HELD, all of which are asked for before one is used."""
    logits, soft = (), ()
    if form.HELD:
        for k in tl.static_range(form.PASSES):
            row_ptr, stride = row_of_pass(samples.logits, k, form)
            logits = logits + (held_blocks(row_ptr, stride, -INFINITY, samples, form),)
        if form.LABELS == "soft":
            soft = held_blocks(samples.soft_ptr, samples.soft_stride, 0.0, samples, form)
    return Held(logits=logits, soft=soft)


@triton.jit
def write(row_ptr, i, inside, stride, there, value, FULL: tl.constexpr, form):
    """Writes a block of the rows that are `there`."""
    offsets = i if form.DENSE else i.to(tl.int64) * stride
    value = triton_ops.nearest(value, row_ptr.dtype.element_ty)
    if form.ROWS > 1:
        tl.store(row_ptr + offsets, value, mask=there & inside, eviction_policy="evict_first")
    elif FULL:
        tl.store(row_ptr + offsets, value, eviction_policy="evict_first")
    else:
        tl.store(row_ptr + offsets, value, mask=inside, eviction_policy="evict_first")


@triton.jit
def row_of_pass(rows, k, form):
    """Returns where the rows of pass k begin, and how far apart its classes are."""
    UNIT: tl.constexpr = form.RUN if form.ALIGNED else 1
    if form.FEW:
        begin, row_stride, stride = rows.ptrs[k], rows.row_strides[k], rows.strides[k]
    else:
        entry_ptr = rows.table_ptr + ENTRY * k
        address = tl.load(entry_ptr)
        row_stride = tl.load(entry_ptr + ROW_STRIDE)
        stride = tl.load(entry_ptr + STRIDE)
        if form.ALIGNED:
            begin = triton_ops.aligned_pointer(address, form.STORAGE)
        else:
            begin = triton_ops.pointer(address, form.STORAGE)
    return begin + rows.row * row_stride * UNIT, stride


@triton.jit
def read_pass(k, b, i, inside, FULL: tl.constexpr, AGAIN: tl.constexpr, samples, form):
    """Returns a block of pass k; `b`: which of the HELD blocks it is, else nothing."""
    if form.HELD:
        return samples.held.logits[k][b].to(form.DTYPE)
    else:
        row_ptr, stride = row_of_pass(samples.logits, k, form)
        return read(row_ptr, i, inside, stride, -INFINITY, FULL, AGAIN, form)


@triton.jit
def read_class(k, i, samples, form):
    """Reads pass k's logits of a class by sample."""
    row_ptr, stride = row_of_pass(samples.logits, k, form)
    return tl.load(row_ptr + i.to(tl.int64) * stride).to(form.DTYPE)


@triton.jit
def over_runs(x):
    """Sums over the elements of each run."""
    return tl.sum(x, 2, keep_dims=True)


@triton.jit
def over_row(x):
    """Sums over each row."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def zeros(SIZE: tl.constexpr, form):
    """Returns SIZE sums over runs."""
    out = ()
    for _ in tl.static_range(SIZE):
        out = out + (tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE),)
    return out


# ---- The pairs


@triton.jit
def first_ratio(shape: tl.constexpr, k, passes, form):
    """Returns what pass k's log ratios are added to: minus its pivot, or -0."""
    # -0 + x is x, and costs nothing
    w = tl.full(shape, -0.0, form.DTYPE)
    if form.EXACT:
        w -= get_item(passes.pivots, k)
    return w


@triton.jit
def rotated(values):
    """Returns the tuple with the first value behind the others."""
    return values[1:] + values[:1]


@triton.jit
def next_side(side):
    """Returns the side in which every pass has the place of the one before it."""
    return Side(z=rotated(side.z), rests=rotated(side.rests), ratios=rotated(side.ratios))


@triton.jit
def add_pairs(COUNT: tl.constexpr, of_k, of_l, k, l, form):
    """Returns the sums of log ratios with those of the first COUNT pairs, pass j of `k` with pass j
    of `l`, added on both sides.
    """
    for j in tl.static_range(COUNT):
        d = log_distance(k.z[j], l.z[j], k.rests[j] - l.rests[j], k.ratios[j] - l.ratios[j])
        a = log_ratio(d, form.EXACT)
        of_k = add_to_known_item(of_k, j, a + tl.minimum(d, 0.0))
        of_l = add_to_known_item(of_l, j, a - tl.maximum(d, 0.0))
    return of_k, of_l


@triton.jit
def log_ratios(z, passes, form):
    """Returns for each pass the sum of log2(p/M) over its pairs less its pivot; z: the logits of
    the passes in pairs.

    Every pass meets the one after it, then the one after that, half of the way round; a loop, as
    compilers take a time that grows with the square of the code.
    """
    M: tl.constexpr = len(z)
    of_k, of_l = (), ()
    for k in tl.static_range(M):
        of_k = of_k + (first_ratio(z[0].shape, k + form.FIRST, passes, form),)
        of_l = of_l + (tl.full(z[0].shape, -0.0, form.DTYPE),)
    own = Side(z=z, rests=passes.rests[form.FIRST :], ratios=passes.ratios)
    other = own
    if M <= UNROLLED:
        for _ in tl.static_range((M - 1) // 2):
            other = next_side(other)
            of_k, of_l = add_pairs(M, of_k, rotated(of_l), own, other, form)
    else:
        for _ in range((M - 1) // 2):
            other = next_side(other)
            of_k, of_l = add_pairs(M, of_k, rotated(of_l), own, other, form)
    if M % 2 == 0:
        other = next_side(other)
        of_k, of_l = add_pairs(M // 2, of_k, rotated(of_l), own, other, form)
    w = ()
    # of_l has been turned so often
    for k in tl.static_range(M):
        w = w + (of_k[k] + of_l[(k + M - M // 2) % M],)
    return w


@triton.jit
def log_ratios_of(k, z, at, FULL: tl.constexpr, samples, passes, form):
    """Returns the sum of log2(p/M) over the pairs of pass k alone, whose logits are z, less its
    pivot, in a block of columns; with itself a pass has 0.
    """
    i, inside = columns(at, samples.classes, form)
    w = first_ratio(z.shape, k, passes, form)
    for l in range(form.FIRST, form.PASSES):
        x = read_pass(l, None, i, inside, FULL, True, samples, form)
        w += log_ratio_of(k, l, z, x, passes, form)
    return w


@triton.jit
def log_ratio_of(k, l, z, x, passes, form):
    """Returns log2(p/M) of pass k beside pass l, whose logits are x."""
    other = shifted(x, get_item(passes.bases, l), get_item(passes.rests, l))
    d = log_distance(
        z,
        other,
        get_item(passes.rests, k) - get_item(passes.rests, l),
        log_gap(get_item(passes.totals, k), get_item(passes.totals, l)),
    )
    return log_ratio(d, form.EXACT) + tl.minimum(d, 0.0)


@triton.jit
def pivot_of(k, likeliest, samples, passes, form):
    """Returns the sum of pass k's log ratios at its most probable class where that holds much of
    p, or 0.

    There it is nearly the divergence, and only their difference is exact enough.
    """
    z = shifted(
        read_class(k, likeliest, samples, form),
        get_item(passes.bases, k),
        get_item(passes.rests, k),
    )
    w = tl.zeros([form.ROWS, 1, 1], form.DTYPE)
    for l in range(form.FIRST, form.PASSES):
        x = read_class(l, likeliest, samples, form)
        w += tl.where(l == k, 0.0, log_ratio_of(k, l, z, x, passes, form))
    return tl.where(get_item(passes.totals, k) < 4, w, 0.0)


@triton.jit
def pivots_together(likeliest, samples, passes, form):
    """Returns what `pivot_of` does, for all passes in pairs at once: lane j is pass FIRST + j."""
    M: tl.constexpr = form.PASSES - form.FIRST
    lane = tl.arange(0, 2 if M <= 2 else 4 if M <= 4 else 8 if M <= 8 else 16)[None, :, None]
    at = likeliest[form.FIRST]
    for j in tl.static_range(1, M):
        at = tl.where(lane == j, likeliest[j + form.FIRST], at)
    z = ()
    for l in tl.static_range(form.FIRST, form.PASSES):
        z = z + (shifted(read_class(l, at, samples, form), passes.bases[l], passes.rests[l]),)
    own, rest, ratio = z[0], passes.rests[form.FIRST], passes.ratios[0]
    for j in tl.static_range(1, M):
        own = tl.where(lane == j, z[j], own)
        rest = tl.where(lane == j, passes.rests[j + form.FIRST], rest)
        ratio = tl.where(lane == j, passes.ratios[j], ratio)
    w = tl.zeros_like(own)
    for j in tl.static_range(M):
        d = log_distance(own, z[j], rest - passes.rests[j + form.FIRST], ratio - passes.ratios[j])
        w += tl.where(lane == j, 0.0, log_ratio(d, form.EXACT) + tl.minimum(d, 0.0))
    out = ()
    for k in tl.static_range(form.PASSES):
        if k < form.FIRST:
            out = out + (tl.zeros([form.ROWS, 1, 1], form.DTYPE),)
        else:
            pivot = tl.sum(tl.where(lane == k - form.FIRST, w, 0.0), 1, keep_dims=True)
            out = out + (tl.where(passes.totals[k] < 4, pivot, 0.0),)
    return out


@triton.jit
def pivots_of(likeliest, samples, passes, form):
    """Returns the pivots of the passes; 0 for one that is in no pair."""
    if form.FEW:
        return pivots_together(likeliest, samples, passes, form)
    else:
        out = ()
        for _ in tl.static_range(form.PASSES):
            out = out + (tl.zeros([form.ROWS, 1, 1], form.DTYPE),)
        for k in range(form.FIRST, form.PASSES):
            pivot = pivot_of(k, get_item(likeliest, k), samples, passes, form)
            out = set_item(out, k, pivot)
        return out


# ---- The first visit: maxima and sums of exponentials


@triton.jit
def add_exponentials(x, highest, total):
    """Returns maxima and sums of exp(x - maximum) of every run, with a block x added."""
    higher = tl.maximum(highest, tl.max(x, 2, keep_dims=True))
    return higher, total * exponential(highest - higher) + over_runs(exponential(x - higher))


@triton.jit
def class_of(x, top, i):
    """Returns a class whose logit is the row's maximum; the first where none is."""
    return tl.max(tl.max(tl.where(x == top, i, 0), 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def held_normalizer(k, samples, form):
    """Returns a row's normalizer, as `normalizer` does, for pass k whose blocks are HELD."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    blocks = samples.held.logits[k]
    highest = blocks[0].to(form.DTYPE)
    for b in tl.static_range(1, form.HELD):
        highest = tl.maximum(highest, blocks[b].to(form.DTYPE))
    top = tl.max(tl.max(highest, 2, keep_dims=True), 1, keep_dims=True)
    total = tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE)
    likeliest = tl.zeros([form.ROWS, form.RUNS, 1], tl.int32)
    for b in tl.static_range(form.HELD):
        x = blocks[b].to(form.DTYPE)
        total += over_runs(exponential(x - top))
        if form.EXACT:
            i = columns(b * BLOCK, samples.classes, form).i
            likeliest = tl.maximum(likeliest, tl.max(tl.where(x == top, i, 0), 2, keep_dims=True))
    total = tl.sum(total, 1, keep_dims=True)
    likeliest = tl.max(likeliest, 1, keep_dims=True)
    total = tl.where(total > 0, total, float("nan"))
    return Normalizer(top=top, likeliest=likeliest, total=total)


@triton.jit
def normalizer(row_ptr, stride, classes, form):
    """Returns a row's normalizer; its total is NaN where all is -inf or something is no logit."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    likeliest = tl.zeros([form.ROWS, 1, 1], tl.int32)
    # of the block that has a run's maximum
    begin = tl.zeros([form.ROWS, form.RUNS, 1], tl.int32)
    highest = tl.full(
        [form.ROWS, form.RUNS, 1],
        -1.7976931348623157e308 if form.DTYPE == tl.float64 else -3.4028234e38,
        form.DTYPE,
    )
    total = tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE)
    end = end_of_full(classes, form)
    for at in range(0, end, BLOCK):
        i, inside = columns(at, classes, form)
        before = highest
        x = read(row_ptr, i, inside, stride, -INFINITY, not form.MASKED, True, form)
        highest, total = add_exponentials(x, highest, total)
        begin = tl.where(highest > before, at, begin)
    if form.TAIL:
        i, inside = columns(end, classes, form)
        before = highest
        x = read(row_ptr, i, inside, stride, -INFINITY, False, True, form)
        highest, total = add_exponentials(x, highest, total)
        begin = tl.where(highest > before, end, begin)
    top = tl.max(highest, 1, keep_dims=True)
    total = tl.sum(total * exponential(highest - top), 1, keep_dims=True)
    if form.EXACT:
        i = begin + columns(0, classes, form).i
        x = read(row_ptr, i, i < classes, stride, -INFINITY, False, True, form)
        likeliest = class_of(x, top, i)
    total = tl.where(total > 0, total, float("nan"))
    return Normalizer(top=top, likeliest=likeliest, total=total)


@triton.jit
def normalizers(samples, form):
    """Returns the passes' normalizers, each of their values by pass."""
    tops, likeliest, totals = (), (), ()
    if form.FEW:
        for k in tl.static_range(form.PASSES):
            if form.HELD:
                found = held_normalizer(k, samples, form)
            else:
                row_ptr, stride = row_of_pass(samples.logits, k, form)
                found = normalizer(row_ptr, stride, samples.classes, form)
            tops, totals = tops + (found.top,), totals + (found.total,)
            likeliest = likeliest + (found.likeliest,)
    else:
        for _ in tl.static_range(form.PASSES):
            tops = tops + (tl.zeros([form.ROWS, 1, 1], form.DTYPE),)
            totals = totals + (tl.zeros([form.ROWS, 1, 1], form.DTYPE),)
            likeliest = likeliest + (tl.zeros([form.ROWS, 1, 1], tl.int32),)
        for k in range(form.PASSES):
            row_ptr, stride = row_of_pass(samples.logits, k, form)
            found = normalizer(row_ptr, stride, samples.classes, form)
            tops, totals = set_item(tops, k, found.top), set_item(totals, k, found.total)
            likeliest = set_item(likeliest, k, found.likeliest)
    return Normalizer(top=tops, likeliest=likeliest, total=totals)


@triton.jit
def normalize(samples, form):
    """Makes the first visit to rows: finds each pass's maximum, sum of exponentials and pivot."""
    normalizer_of = normalizers(samples, form)
    tops, totals = normalizer_of.top, normalizer_of.total
    bases, rests, ratios, pivots = (), (), (), ()
    highest, lowest = tops[form.PASSES - 1], tops[form.PASSES - 1]
    for k in tl.static_range(form.FIRST, form.PASSES):
        highest, lowest = tl.maximum(highest, tops[k]), tl.minimum(lowest, tops[k])
    for k in tl.static_range(form.PASSES):
        base = tops[k]
        # differences of close rows are exact, of others they lose digits
        if form.EXACT:
            base = tl.where((highest - lowest > APART) | (tl.abs(base) > FAR_OUT), base, 0.0)
        bases, rests = bases + (base,), rests + (tops[k] - base,)
        if form.FEW and k >= form.FIRST:
            ratios = ratios + (log_gap(totals[k], totals[form.FIRST]),)
    if form.EXACT and form.PASSES - form.FIRST > 1:
        found = Passes(
            tops=tops, bases=bases, rests=rests, totals=totals, pivots=pivots, ratios=ratios
        )
        pivots = pivots_of(normalizer_of.likeliest, samples, found, form)
    return Passes(tops=tops, bases=bases, rests=rests, totals=totals, pivots=pivots, ratios=ratios)


# ---- The second visit: sums over labels and pairs


@triton.jit
def targets(b, i, inside, FULL: tl.constexpr, AGAIN: tl.constexpr, samples, form):
    """Returns the probabilities t that soft labels stand for, 0 past the end."""
    if form.HELD:
        t = samples.held.soft[b].to(form.DTYPE)
    else:
        t = read(samples.soft_ptr, i, inside, samples.soft_stride, 0.0, FULL, AGAIN, form)
    if form.SMOOTH:
        t = smoothed(t, samples.smoothing, samples.classes)
        if not FULL:
            t = tl.where(inside, t, 0.0)
    return t


@triton.jit
def label_terms(t, y, inside, FULL: tl.constexpr):
    """Returns sums over runs of t * y, y = x - max; of y alone without t, where all classes but
    the label's weigh the same.
    """
    if t is not None:
        return over_runs(label_term(t, y))
    elif FULL:
        return over_runs(y)
    else:
        return over_runs(tl.where(inside, y, 0.0))


@triton.jit
def add_block(at, b, FULL: tl.constexpr, sums, samples, passes, form):
    """Returns the sums over labels and pairs with a block added; `b`: which of the HELD blocks it
    is, else nothing.
    """
    AGAIN: tl.constexpr = form.NEEDS != 0
    masses, of_labels, of_pairs = sums.masses, sums.of_labels, sums.of_pairs
    i, inside = columns(at, samples.classes, form)
    t = None
    if form.LABELS == "soft":
        t = targets(b, i, inside, FULL, AGAIN, samples, form)
        masses += over_runs(t)
    if form.FEW:
        z = ()
        for k in tl.static_range(form.PASSES):
            if form.LABEL_SUMS or k >= form.FIRST:
                x = read_pass(k, b, i, inside, FULL, AGAIN, samples, form)
                if form.LABEL_SUMS:
                    terms = label_terms(t, x - passes.tops[k], inside, FULL)
                    of_labels = add_to_known_item(of_labels, k, terms)
                if k >= form.FIRST:
                    z = z + (shifted(x, passes.bases[k], passes.rests[k]),)
        if form.PASSES - form.FIRST > 1:
            w = log_ratios(z, passes, form)
            for k in tl.static_range(form.FIRST, form.PASSES):
                e = exponential(z[k - form.FIRST] - passes.rests[k])
                of_pairs = add_to_known_item(of_pairs, k, over_runs(e * w[k - form.FIRST]))
    else:
        for k in range(form.PASSES):
            x = read_pass(k, None, i, inside, FULL, True, samples, form)
            if form.LABEL_SUMS:
                terms = label_terms(t, x - get_item(passes.tops, k), inside, FULL)
                of_labels = add_to_item(of_labels, k, terms)
            z = shifted(x, get_item(passes.bases, k), get_item(passes.rests, k))
            w = log_ratios_of(k, z, at, FULL, samples, passes, form)
            e = exponential(z - get_item(passes.rests, k))
            of_pairs = add_to_item(of_pairs, k, over_runs(e * w))
    return Sums(masses=masses, of_labels=of_labels, of_pairs=of_pairs)


@triton.jit
def sum_up(samples, passes, form):
    """Makes the second visit to rows: sums over labels and pairs."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    sums = Sums(
        masses=tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE),
        of_labels=zeros(form.PASSES, form),
        of_pairs=zeros(form.PASSES, form),
    )
    if form.LABEL_SUMS or form.PASSES - form.FIRST > 1:
        if form.HELD:
            for b in tl.static_range(form.HELD):
                sums = add_block(
                    b * BLOCK,
                    b,
                    b < form.HELD - form.TAIL - form.MASKED,
                    sums,
                    samples,
                    passes,
                    form,
                )
        else:
            # from the end, which was read last
            end = end_of_full(samples.classes, form)
            if form.TAIL:
                sums = add_block(end, None, False, sums, samples, passes, form)
            for at in range(0, end, BLOCK):
                sums = add_block(
                    end - BLOCK - at, None, not form.MASKED, sums, samples, passes, form
                )
    return sums


@triton.jit
def cross_entropy(k, mass, sums, samples, passes, form):
    """Returns the cross entropy of pass k; `mass`: the sum of its labels."""
    if form.LABELS == "soft":
        of_label = over_row(sums.of_labels[k])
    else:
        row_ptr, stride = row_of_pass(samples.logits, k, form)
        label = samples.label
        x = tl.load(row_ptr + label.to(tl.int64) * stride, mask=label >= 0, other=0.0)
        of_label = x.to(form.DTYPE) - passes.tops[k]
        if form.SMOOTH:
            others = samples.smoothing / samples.classes * over_row(sums.of_labels[k])
            of_label = label_term(1 - samples.smoothing, of_label) + others
    return mass * tl.log2(passes.totals[k]) * LN2 - of_label


@triton.jit
def losses_of(unit, js_weight, sums, samples, passes, form):
    """Returns the losses, and the factors of the gradients of `unit` times them."""
    clean = tl.zeros([form.ROWS, 1, 1], form.DTYPE)
    adversarial, divergences = clean, clean
    mass = (
        over_row(sums.masses)
        if form.LABELS == "soft"
        else tl.full([form.ROWS, 1, 1], 1.0, form.DTYPE)
    )
    of_e, of_w, of_t = (), (), ()
    for k in tl.static_range(form.PASSES):
        factor = tl.zeros([form.ROWS, 1, 1], form.DTYPE)
        if form.LABELS != "none":
            found = cross_entropy(k, mass, sums, samples, passes, form)
            share = unit
            if k == 0:
                clean = found
            else:
                adversarial += found / (form.PASSES - 1)
                share = unit / (form.PASSES - 1)
            factor = share * mass
            of_t = of_t + (share,)
        # p * (log ratios - KL)/2
        if k >= form.FIRST and form.PASSES - form.FIRST > 1:
            divergence = over_row(sums.of_pairs[k]) / passes.totals[k]
            pair_factor = unit * js_weight * (LN2 / 2)
            factor -= pair_factor * divergence
            divergences += divergence
            if form.EXACT:
                divergences += passes.pivots[k]
            of_w = of_w + (pair_factor / passes.totals[k],)
        else:
            of_w = of_w + (0.0,)
        of_e = of_e + (factor / passes.totals[k],)
    # a label that is no class
    if form.LABELS == "indices":
        clean = tl.where(samples.label < 0, float("nan"), clean)
    divergence = pairs_divergence(divergences, form.PASSES - form.FIRST)
    losses = Losses(clean=clean, adversarial=adversarial, divergence=divergence)
    return losses, Factors(of_e=of_e, of_w=of_w, of_t=of_t)


# ---- The third visit: gradients


@triton.jit
def less_targets(g, of_t, i, samples, form):
    """Returns g - of_t * t for class indices, without a block of t: one that comes from no memory
    may get a layout that every thread repeats.
    """
    if form.SMOOTH:
        return tl.where(
            i == samples.label,
            g - of_t * smoothed(1.0, samples.smoothing, samples.classes),
            g - of_t * smoothed(0.0, samples.smoothing, samples.classes),
        )
    else:
        return tl.where(i == samples.label, g - of_t, g)


@triton.jit
def write_block(at, b, FULL: tl.constexpr, factors, gradients, there, keep, samples, passes, form):
    """Writes a block's gradients; `b`: which of the HELD blocks it is, else nothing."""
    i, inside = columns(at, samples.classes, form)
    if form.LABELS == "soft":
        t = targets(b, i, inside, FULL, False, samples, form)
    z, w = (), ()
    if form.FEW:
        for k in tl.static_range(form.PASSES):
            x = read_pass(k, b, i, inside, FULL, False, samples, form)
            z = z + (shifted(x, passes.bases[k], passes.rests[k]),)
        if form.PASSES - form.FIRST > 1:
            w = log_ratios(z[form.FIRST :], passes, form)
    else:
        # all of them before a gradient is written, which may be over logits
        for _ in tl.static_range(form.PASSES):
            w = w + (tl.zeros([form.ROWS, form.RUNS, form.RUN], form.DTYPE),)
        for k in range(form.FIRST, form.PASSES):
            x = read_pass(k, None, i, inside, FULL, True, samples, form)
            x = shifted(x, get_item(passes.bases, k), get_item(passes.rests, k))
            ratios = log_ratios_of(k, x, at, FULL, samples, passes, form)
            w = set_item(w, k - form.FIRST, ratios)
    for k in tl.static_range(form.PASSES):
        if form.NEEDS >> k & 1:
            if form.FEW:
                x = z[k]
            else:
                x = read_pass(k, None, i, inside, FULL, False, samples, form)
                x = shifted(x, passes.bases[k], passes.rests[k])
            g = factors.of_e[k]
            if k >= form.FIRST and form.PASSES - form.FIRST > 1:
                g = w[k - form.FIRST] * factors.of_w[k] + g
            g = exponential(x - passes.rests[k]) * g
            if form.LABELS == "indices":
                g = less_targets(g, factors.of_t[k], i, samples, form)
            elif form.LABELS == "soft":
                g -= t * factors.of_t[k]
            if form.LABELS == "indices" and form.ROWS > 1:
                g = tl.where(keep, g, 0.0)
            row_ptr, stride = row_of_pass(gradients, k, form)
            write(row_ptr, i, inside, stride, there, g, FULL, form)


@triton.jit
def write_gradients(factors, gradients, there, keep, samples, passes, form):
    """Makes the third visit to rows: writes the gradients."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    # else sums have waited: every thread has a label's logit before a gradient may be written
    # over it
    if form.PASSES - form.FIRST <= 1:
        tl.debug_barrier()
    if form.HELD:
        for b in tl.static_range(form.HELD):
            write_block(
                b * BLOCK,
                b,
                b < form.HELD - form.TAIL - form.MASKED,
                factors,
                gradients,
                there,
                keep,
                samples,
                passes,
                form,
            )
    else:
        end = end_of_full(samples.classes, form)
        for at in range(0, end, BLOCK):
            write_block(
                at, None, not form.MASKED, factors, gradients, there, keep, samples, passes, form
            )
        if form.TAIL:
            write_block(end, None, False, factors, gradients, there, keep, samples, passes, form)


@triton.jit
def write_zeros(gradients, there, classes, form):
    """Writes gradients of 0 for the samples that are `there`."""
    for at in range(0, classes, form.RUNS * form.RUN):
        i, inside = columns(at, classes, form)
        for k in tl.static_range(form.PASSES):
            if form.NEEDS >> k & 1:
                row_ptr, stride = row_of_pass(gradients, k, form)
                zero = tl.zeros([form.ROWS, form.RUNS, form.RUN], form.DTYPE)
                write(row_ptr, i, inside, stride, there, zero, False, form)


# ---- The losses of some samples


@triton.jit
def classify(samples, gradients, there, keep, unit, js_weight, form):
    """Returns the losses of some samples, and writes the gradients of `unit` times them."""
    samples = Samples(
        logits=samples.logits,
        held=hold(samples, form),
        label=samples.label,
        soft_ptr=samples.soft_ptr,
        soft_stride=samples.soft_stride,
        smoothing=samples.smoothing,
        classes=samples.classes,
    )
    passes = normalize(samples, form)
    sums = sum_up(samples, passes, form)
    losses, factors = losses_of(unit, js_weight, sums, samples, passes, form)
    if form.NEEDS:
        write_gradients(factors, gradients, there, keep, samples, passes, form)
    return losses


@triton.jit
def add_errors(at, FULL: tl.constexpr, sums, samples, gradients, there, unit, js_weight, form):
    """Returns the sums of squared errors with a block added, and writes its gradients."""
    clean, adversarial, divergence = sums.clean, sums.adversarial, sums.divergence
    i, inside = columns(at, samples.classes, form)
    if form.LABELS != "none":
        t = read(samples.soft_ptr, i, inside, samples.soft_stride, 0.0, FULL, False, form)
    z = ()
    for k in tl.static_range(form.PASSES):
        row_ptr, stride = row_of_pass(samples.logits, k, form)
        z = z + (read(row_ptr, i, inside, stride, 0.0, FULL, False, form),)
    for k in tl.static_range(form.PASSES):
        g = tl.zeros([form.ROWS, form.RUNS, form.RUN], form.DTYPE)
        if form.LABELS != "none":
            if k == 0:
                clean += over_runs(squared(z[k], t))
                g = squared_slope(z[k], t)
            else:
                adversarial += over_runs(squared(z[k], t)) / (form.PASSES - 1)
                g = squared_slope(z[k], t) / (form.PASSES - 1)
        for l in tl.static_range(form.FIRST, form.PASSES):
            if k >= form.FIRST and k != l:
                if k < l:
                    divergence += over_runs(squared(z[k], z[l]))
                g += squared_slope(z[k], z[l]) * js_weight
        if form.NEEDS >> k & 1:
            row_ptr, stride = row_of_pass(gradients, k, form)
            write(row_ptr, i, inside, stride, there, g * unit, FULL, form)
    return Losses(clean=clean, adversarial=adversarial, divergence=divergence)


@triton.jit
def regress(samples, gradients, there, unit, js_weight, form):
    """Returns the losses of some samples in regression, means of squares over the classes, and
    writes what `unit` times them has for gradients.
    """
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    classes = samples.classes
    end = end_of_full(classes, form)
    zero = tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE)
    sums = Losses(clean=zero, adversarial=zero, divergence=zero)
    unit = unit / classes
    for at in range(0, end, BLOCK):
        sums = add_errors(
            at, not form.MASKED, sums, samples, gradients, there, unit, js_weight, form
        )
    if form.TAIL:
        sums = add_errors(end, False, sums, samples, gradients, there, unit, js_weight, form)
    return Losses(
        clean=over_row(sums.clean) / classes,
        adversarial=over_row(sums.adversarial) / classes,
        divergence=over_row(sums.divergence) / classes,
    )


# ---- Kernels


@triton.jit
def counted(labels_ptr, label_stride, count_ptr, ignore_index, N, form):
    """Returns what sums are divided by: the samples that are not ignored, or 1. A number: what a
    block of it meets would get its layout.
    """
    # a branch each, as what stands after a return is compiled too
    if not form.MEAN:
        return tl.full((), 1, form.DTYPE)
    elif form.LABELS != "indices":
        return N.to(form.DTYPE)
    elif count_ptr is not None:
        return tl.load(count_ptr).to(form.DTYPE)
    else:
        found = tl.zeros([AT_ONCE], tl.int32)
        for at in range(0, N, AT_ONCE):
            n = at + tl.arange(0, AT_ONCE)
            label_ptr = labels_ptr + n.to(tl.int64) * label_stride
            found += tl.load(label_ptr, mask=n < N, other=ignore_index) != ignore_index
        return tl.sum(found, 0).to(form.DTYPE)


@triton.jit
def store_losses(
    loss_ptr, parts_ptr, at, parts_stride, losses, js_weight, there, WITH_LOSS: tl.constexpr
):
    """Stores the three parts, and the loss."""
    tl.store(parts_ptr + at, losses.clean, mask=there)
    tl.store(parts_ptr + parts_stride + at, losses.adversarial, mask=there)
    tl.store(parts_ptr + 2 * parts_stride + at, losses.divergence, mask=there)
    if WITH_LOSS:
        loss = losses.clean + losses.adversarial + js_weight * losses.divergence
        tl.store(loss_ptr + at, loss, mask=there)


@triton.jit(do_not_specialize=["N", "js_weight", "smoothing", "ignore_index"])
def loss_kernel(
    logits_ptrs,
    logits_row_strides,
    logits_strides,
    gradients_ptrs,
    gradients_row_strides,
    gradients_strides,
    table_ptr,
    labels_ptr,
    labels_row_stride,
    labels_stride,
    count_ptr,
    loss_ptr,
    parts_ptr,
    N,
    C,
    js_weight: tl.int64,
    smoothing: tl.int64,
    ignore_index: tl.int64,
    form,
):
    """Computes the losses of all samples, and the gradients. For `add_up_kernel`, where neither
    BY_ROW nor ONE_PROGRAM: the parts of rows, and their count.
    """
    js_weight, smoothing = from_bits(js_weight).to(form.DTYPE), from_bits(smoothing).to(form.DTYPE)
    count = counted(labels_ptr, labels_row_stride, count_ptr, ignore_index, N, form)
    # of the row strides
    UNIT: tl.constexpr = form.RUN if form.ALIGNED else 1
    nothing = tl.zeros([1, 1, 1], form.DTYPE)
    total = Losses(clean=nothing, adversarial=nothing, divergence=nothing)
    # what is the same for all of them would lie in registers throughout, which are few
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(N, form.ROWS), tl.num_programs(0), disable_licm=True
    ):
        row = (tl.zeros([form.ROWS, 1, 1], tl.int64) + tile) * form.ROWS + tl.arange(0, form.ROWS)[
            :, None, None
        ]
        there = row < N
        # whatever is read there is not used
        at = tl.minimum(row, N - 1)
        logits = Rows(
            ptrs=logits_ptrs,
            row_strides=logits_row_strides,
            strides=logits_strides,
            table_ptr=table_ptr,
            row=at,
        )
        gradients = Rows(
            ptrs=gradients_ptrs,
            row_strides=gradients_row_strides,
            strides=gradients_strides,
            table_ptr=None if form.FEW else table_ptr + ENTRY * form.PASSES,
            row=at,
        )
        keep, label, soft_ptr = there, None, None
        if form.LABELS == "indices":
            label = tl.load(labels_ptr + at * labels_row_stride)
            keep = there & (label != ignore_index)
            label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
        if form.LABELS == "soft":
            soft_ptr = labels_ptr + at * labels_row_stride * UNIT
        samples = Samples(
            logits=logits,
            held=Held(logits=(), soft=()),
            label=label,
            soft_ptr=soft_ptr,
            soft_stride=labels_stride,
            smoothing=smoothing,
            classes=C,
        )
        zero = tl.zeros([form.ROWS, 1, 1], form.DTYPE)
        losses = Losses(clean=zero, adversarial=zero, divergence=zero)
        if form.REGRESSION:
            losses = regress(samples, gradients, there, 1 / count, js_weight, form)
        elif form.LABELS != "indices" or tl.max(keep.to(tl.int32)) > 0:
            losses = classify(samples, gradients, there, keep, 1 / count, js_weight, form)
        else:
            write_zeros(gradients, there, C, form)
        losses = Losses(
            clean=tl.where(keep, losses.clean, 0.0),
            adversarial=tl.where(keep, losses.adversarial, 0.0),
            divergence=tl.where(keep, losses.divergence, 0.0),
        )
        if form.ONE_PROGRAM:
            total = Losses(
                clean=total.clean + tl.sum(losses.clean, 0, keep_dims=True),
                adversarial=total.adversarial + tl.sum(losses.adversarial, 0, keep_dims=True),
                divergence=total.divergence + tl.sum(losses.divergence, 0, keep_dims=True),
            )
        else:
            store_losses(
                loss_ptr, parts_ptr, row, N.to(tl.int64), losses, js_weight, there, form.BY_ROW
            )
    here = tl.zeros([1, 1, 1], tl.int64)
    if form.ONE_PROGRAM:
        mean = Losses(
            clean=total.clean / count,
            adversarial=total.adversarial / count,
            divergence=total.divergence / count,
        )
        store_losses(loss_ptr, parts_ptr, here, 1, mean, js_weight, None, True)
    elif not form.BY_ROW:
        if tl.program_id(0) == 0:
            tl.store(parts_ptr + PARTS * N.to(tl.int64) + here, count)


@triton.jit(do_not_specialize=["N", "js_weight"])
def add_up_kernel(rows_ptr, loss_ptr, parts_ptr, N, js_weight: tl.int64, form):
    """Computes the loss and its parts from those of all rows."""
    clean = tl.zeros([AT_ONCE], form.DTYPE)
    adversarial, divergence = clean, clean
    size = N.to(tl.int64)
    for at in range(0, N, AT_ONCE):
        n = at + tl.arange(0, AT_ONCE)
        clean += tl.load(rows_ptr + n, mask=n < N, other=0.0)
        adversarial += tl.load(rows_ptr + size + n, mask=n < N, other=0.0)
        divergence += tl.load(rows_ptr + 2 * size + n, mask=n < N, other=0.0)
    count = tl.load(rows_ptr + PARTS * size)
    mean = Losses(
        clean=tl.sum(clean, 0) / count,
        adversarial=tl.sum(adversarial, 0) / count,
        divergence=tl.sum(divergence, 0) / count,
    )
    weight = from_bits(js_weight).to(form.DTYPE)
    store_losses(loss_ptr, parts_ptr, 0, 1, mean, weight, None, True)


@triton.jit
def scale_block(at, FULL: tl.constexpr, there, gradients, scaled, factor, C, form):
    """Writes a block of the gradients times the factor."""
    # rows, not a whole block
    SOME: tl.constexpr = form.IN_PLACE and form.BY_ROW and form.ROWS > 1
    i, inside = columns(at, C, form)
    if SOME:
        inside = inside & there
    for k in tl.static_range(form.PASSES):
        row_ptr, stride = row_of_pass(gradients, k, form)
        g = read(row_ptr, i, inside, stride, 0.0, FULL and not SOME, False, form)
        row_ptr, stride = row_of_pass(scaled, k, form)
        write(row_ptr, i, inside, stride, there, g * factor, FULL, form)


@triton.jit
def scale_piece(at, there, gradients, scaled, factor, C, form):
    """Writes a block of the gradients times the factor, which may be a row's last."""
    if at + form.RUNS * form.RUN <= C:
        scale_block(at, True, there, gradients, scaled, factor, C, form)
    else:
        scale_block(at, False, there, gradients, scaled, factor, C, form)


@triton.jit(do_not_specialize=["N"])
def scale_kernel(
    gradients_ptrs,
    gradients_row_strides,
    gradients_strides,
    scaled_ptrs,
    scaled_row_strides,
    scaled_strides,
    factor_ptr,
    factor_stride,
    N,
    C,
    form,
):
    """Multiplies the gradients by the loss's own, one for all or one for each sample. In place what
    is times 1 is neither read nor written.
    """
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    blocks = tl.cdiv(C, BLOCK)
    pieces = tl.cdiv(N, form.ROWS).to(tl.int64) * blocks
    if not form.BY_ROW:
        factor = tl.load(factor_ptr)
        if form.IN_PLACE:
            pieces = tl.where(factor == 1, 0, pieces)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        row = (tl.zeros([form.ROWS, 1, 1], tl.int64) + piece // blocks) * form.ROWS + tl.arange(
            0, form.ROWS
        )[:, None, None]
        there, row = row < N, tl.minimum(row, N - 1)
        gradients = Rows(
            ptrs=gradients_ptrs,
            row_strides=gradients_row_strides,
            strides=gradients_strides,
            table_ptr=None,
            row=row,
        )
        scaled = Rows(
            ptrs=scaled_ptrs,
            row_strides=scaled_row_strides,
            strides=scaled_strides,
            table_ptr=None,
            row=row,
        )
        at = (piece % blocks).to(tl.int32) * BLOCK
        if form.BY_ROW:
            factor = tl.load(factor_ptr + row * factor_stride)
        if form.BY_ROW and form.IN_PLACE:
            there = there & (factor != 1)
            if tl.max(there.to(tl.int32)) > 0:
                scale_piece(at, there, gradients, scaled, factor, C, form)
        else:
            scale_piece(at, there, gradients, scaled, factor, C, form)
