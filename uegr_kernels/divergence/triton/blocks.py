"""What the losses' kernels in Triton are compiled for, and how they read and write blocks of rows.

Upper case is what is known when a kernel is compiled: a kernel's options are one argument, `form`.
"""

import typing

import triton
import triton.language as tl

from ...core import triton_ops
from .math import LN2, exponential, label_term, smoothed

INFINITY = tl.constexpr(float("inf"))


class Form(typing.NamedTuple):
    """Says what a kernel is compiled for. A block is ROWS samples and RUNS * RUN columns, [ROWS,
    RUNS, RUN]; a thread holds whole runs.
    """

    PASSES: int
    # their addresses are arguments, else in a table
    FEW: bool
    # how long the axis is that the passes in pairs are of a block, a power of 2; 0: they are blocks
    # of a tuple
    AXIS: int
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
# Of a row's maximum, from where on the row is moved by it first: FAR_BELOW would be lost in it.
FAR_OUT = tl.constexpr(1e6)
# of maxima, from where on rows are moved too
APART = tl.constexpr(1.0)


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
def over_runs(x):
    """Sums over the elements of each run."""
    return tl.sum(x, -1, keep_dims=True)


@triton.jit
def over_row(x):
    """Sums over each row."""
    return tl.sum(tl.sum(x, -1, keep_dims=True), -2, keep_dims=True)


@triton.jit
def add_exponentials(x, highest, total):
    """Returns maxima and sums of exp(x - maximum) of every run, with a block x added."""
    higher = tl.maximum(highest, tl.max(x, -1, keep_dims=True))
    return higher, total * exponential(highest - higher) + over_runs(exponential(x - higher))


@triton.jit
def class_of(x, top, i):
    """Returns a class whose logit is the row's maximum; the first where none is."""
    return tl.max(tl.max(tl.where(x == top, i, 0), -1, keep_dims=True), -2, keep_dims=True)


@triton.jit
def held_normalizer(blocks, classes, form):
    """Returns the normalizer of rows that are HELD; its total is NaN where all is -inf or something
    is no logit.
    """
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    highest = tl.max(blocks[0].to(form.DTYPE), -1, keep_dims=True)
    for b in tl.static_range(1, form.HELD):
        highest = tl.maximum(highest, tl.max(blocks[b].to(form.DTYPE), -1, keep_dims=True))
    top = tl.max(highest, -2, keep_dims=True)
    total = tl.zeros(highest.shape, form.DTYPE)
    likeliest = tl.zeros(highest.shape, tl.int32)
    for b in tl.static_range(form.HELD):
        x = blocks[b].to(form.DTYPE)
        total += over_runs(exponential(x - top))
        if form.EXACT:
            i = columns(b * BLOCK, classes, form).i
            likeliest = tl.maximum(likeliest, tl.max(tl.where(x == top, i, 0), -1, keep_dims=True))
    total = tl.sum(total, -2, keep_dims=True)
    likeliest = tl.max(likeliest, -2, keep_dims=True)
    total = tl.where(total > 0, total, float("nan"))
    return Normalizer(top=top, likeliest=likeliest, total=total)


@triton.jit
def base_of(top, highest, lowest, form):
    """Returns what a row is moved by; highest, lowest: of the maxima of the passes in pairs.

    Differences of close rows are exact, of others they lose digits.
    """
    if form.EXACT:
        return tl.where((highest - lowest > APART) | (tl.abs(top) > FAR_OUT), top, 0.0)
    else:
        return top


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
def cross_entropy(of_label, of_labels, mass, total, samples, form):
    """Returns the cross entropy of passes from their label's logit less the maximum, the sums
    over runs of `label_terms`, and the sum of the labels; soft labels have no `of_label`.
    """
    if form.LABELS == "soft":
        of_label = over_row(of_labels)
    elif form.SMOOTH:
        others = samples.smoothing / samples.classes * over_row(of_labels)
        of_label = label_term(1 - samples.smoothing, of_label) + others
    return mass * tl.log2(total) * LN2 - of_label


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
def write_zeros(gradients, there, classes, form):
    """Writes gradients of 0 for the samples that are `there`."""
    for at in range(0, classes, form.RUNS * form.RUN):
        i, inside = columns(at, classes, form)
        for k in tl.static_range(form.PASSES):
            if form.NEEDS >> k & 1:
                row_ptr, stride = row_of_pass(gradients, k, form)
                zero = tl.zeros([form.ROWS, form.RUNS, form.RUN], form.DTYPE)
                write(row_ptr, i, inside, stride, there, zero, False, form)
