"""The losses of many passes in Triton: the passes in pairs are an axis of the blocks, which are
[AXIS, ROWS, RUNS, RUN]. An axis's number is the pass less FIRST; what is past the last pass is 0.

Of a block's runs one element is taken at a time: logits that a program's registers hold leave few
for the pairs.
"""

import triton
import triton.language as tl

from ...core import triton_ops
from .blocks import (
    ENTRY,
    INFINITY,
    ROW_STRIDE,
    STRIDE,
    BlockColumns,
    Factors,
    Losses,
    Normalizer,
    Passes,
    Sums,
    add_exponentials,
    base_of,
    class_of,
    columns,
    cross_entropy,
    end_of_full,
    fetch,
    held_normalizer,
    label_terms,
    less_targets,
    over_row,
    read,
    row_of_pass,
    write,
)
from .few import UNROLLED, Side
from .math import (
    LN2,
    exponential,
    log_distance,
    log_gap,
    log_ratios,
    pairs_divergence,
    shifted,
    smoothed,
)

# ---- Axes as arrays: a thread holds all passes, and whole runs, so that nothing of this is done
# where what is picked is known when the kernel is compiled.


@triton.jit
def numbers(form):
    """Returns the numbers of the axis."""
    return tl.arange(0, form.AXIS)[:, None, None, None]


@triton.jit
def picked(values, here, AT: tl.constexpr):
    """Returns the values that are `here`, one of each along an axis."""
    BITS: tl.constexpr = tl.core.get_int_dtype(values.dtype.primitive_bitwidth, True)
    alone = tl.where(here, values.to(BITS, bitcast=True), 0)
    return tl.sum(alone, AT, keep_dims=True).to(BITS).to(values.dtype, bitcast=True)


@triton.jit
def get_pass(values, k, form):
    """Returns what pass FIRST + k has of the values."""
    return picked(values, numbers(form) == k, 0)


@triton.jit
def get_element(x, n, form):
    """Returns element n of every run."""
    return picked(x, tl.arange(0, form.RUN) == n, -1)


@triton.jit
def set_element(x, n, value, form):
    """Returns the block with other elements n of its runs."""
    return tl.where(tl.arange(0, form.RUN) == n, triton_ops.nearest(value, x.dtype), x)


@triton.jit
def field_of_passes(table_ptr, FIELD: tl.constexpr, form):
    """Returns by pass a field of the table's entries."""
    out = tl.zeros([form.AXIS, 1, 1, 1], tl.int64)
    for k in tl.static_range(form.PASSES - form.FIRST):
        number = tl.load(table_ptr + ENTRY * (form.FIRST + k) + FIELD)
        out = tl.where(numbers(form) == k, number, out)
    return out


@triton.jit
def over_passes(x, form):
    """Sums over the passes."""
    if form.AXIS > form.PASSES - form.FIRST:
        x = tl.where(numbers(form) < form.PASSES - form.FIRST, x, 0.0)
    return tl.sum(x, 0)


# ---- Blocks


@triton.jit
def rows_of_passes(rows, form):
    """Returns where the rows of the passes begin, and how far apart their classes are."""
    address = field_of_passes(rows.table_ptr, 0, form)
    begin = triton_ops.pointer(address, form.STORAGE)
    begin += rows.row[None] * field_of_passes(rows.table_ptr, ROW_STRIDE, form)
    stride = 1 if form.DENSE else field_of_passes(rows.table_ptr, STRIDE, form)
    return begin, stride


@triton.jit
def read_passes(rows, i, inside, FULL: tl.constexpr, AGAIN: tl.constexpr, form):
    """Reads a block of all passes as it is, -inf past the rows' end."""
    M: tl.constexpr = form.PASSES - form.FIRST
    row_ptr, stride = rows_of_passes(rows, form)
    if form.AXIS == M:
        return fetch(row_ptr, i[None], inside[None], stride, -INFINITY, FULL, AGAIN, form)
    else:
        there = numbers(form) < M
        x = fetch(row_ptr, i[None], inside[None] & there, stride, -INFINITY, False, AGAIN, form)
        return tl.where(there, x, 0.0)


@triton.jit
def write_passes(rows, i, inside, there, value, form):
    """Writes a block of the passes that need a gradient, of the rows that are `there`."""
    row_ptr, stride = rows_of_passes(rows, form)
    needed = tl.full([form.AXIS, 1, 1, 1], False, tl.int1)
    for k in tl.static_range(form.PASSES - form.FIRST):
        if form.NEEDS >> (k + form.FIRST) & 1:
            needed = needed | (numbers(form) == k)
    mask = needed & (there & inside)[None]
    write(row_ptr, i[None], mask, stride, there, value, False, form)


@triton.jit
def columns_of_element(at, n, classes, form):
    """Returns the columns of element n of a block's runs."""
    w = tl.arange(0, form.RUNS)[None, :, None]
    i = at + n * form.RUNS + w
    return BlockColumns(i=i, inside=i < classes)


# ---- The first visit


@triton.jit
def pivots_of_passes(likeliest, samples, passes, form):
    """Returns of each pass the sum of its log ratios at its most probable class where that holds
    much of p, or 0.
    """
    w = tl.zeros([form.AXIS, form.ROWS, 1, 1], form.DTYPE)
    for l in range(form.PASSES - form.FIRST):
        row_ptr, stride = row_of_pass(samples.logits, l + form.FIRST, form)
        base, rest = get_pass(passes.bases, l, form), get_pass(passes.rests, l, form)
        # what is past the last pass has no class
        there = numbers(form) < form.PASSES - form.FIRST
        x = tl.load(row_ptr[None] + likeliest.to(tl.int64) * stride, mask=there, other=0.0)
        x = x.to(form.DTYPE)
        other, ratio = shifted(x, base, rest), get_pass(passes.ratios, l, form)
        # its own logit there is its maximum
        d = log_distance(passes.rests, other, passes.rests - rest, passes.ratios - ratio)
        w += tl.where(numbers(form) == l, 0.0, log_ratios(d, form.EXACT)[0])
    return tl.where(passes.totals < 4, w, 0.0)


@triton.jit
def normalizer_of_passes(samples, form):
    """Returns the normalizers of rows that are not held."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    classes = samples.classes
    begin = tl.zeros([form.AXIS, form.ROWS, form.RUNS, 1], tl.int32)
    highest = tl.full(
        [form.AXIS, form.ROWS, form.RUNS, 1],
        -1.7976931348623157e308 if form.DTYPE == tl.float64 else -3.4028234e38,
        form.DTYPE,
    )
    total = tl.zeros([form.AXIS, form.ROWS, form.RUNS, 1], form.DTYPE)
    # Triton 3.6 returns no None
    likeliest = ()
    for at in range(0, end_of_full(classes, form), BLOCK):
        i, inside = columns(at, classes, form)
        x = read_passes(samples.logits, i, inside, not form.MASKED, True, form).to(form.DTYPE)
        before = highest
        highest, total = add_exponentials(x, highest, total)
        begin = tl.where(highest > before, at, begin)
    top = tl.max(highest, -2, keep_dims=True)
    total = tl.sum(total * exponential(highest - top), -2, keep_dims=True)
    if form.EXACT:
        i = begin + columns(0, classes, form).i[None]
        row_ptr, stride = rows_of_passes(samples.logits, form)
        there = (i < classes) & (numbers(form) < form.PASSES - form.FIRST)
        x = read(row_ptr, i, there, stride, -INFINITY, False, True, form)
        likeliest = class_of(x, top, i)
    total = tl.where(total > 0, total, float("nan"))
    return Normalizer(top=top, likeliest=likeliest, total=total)


@triton.jit
def normalize_passes(held, samples, form):
    """Makes the first visit to rows: finds each pass's maximum, sum of exponentials and pivot."""
    if form.HELD:
        found = held_normalizer(held, samples.classes, form)
    else:
        found = normalizer_of_passes(samples, form)
    tops, totals = found.top, found.total
    there = numbers(form) < form.PASSES - form.FIRST
    highest = tl.max(tl.where(there, tops, -INFINITY), 0)[None]
    lowest = tl.min(tl.where(there, tops, INFINITY), 0)[None]
    bases = base_of(tops, highest, lowest, form)
    passes = Passes(
        tops=tops,
        bases=bases,
        rests=tops - bases,
        totals=totals,
        pivots=(),
        ratios=log_gap(totals, get_pass(totals, 0, form)),
    )
    if form.EXACT:
        passes = Passes(
            tops=tops,
            bases=bases,
            rests=passes.rests,
            totals=totals,
            pivots=pivots_of_passes(found.likeliest, samples, passes, form),
            ratios=passes.ratios,
        )
    return passes


# ---- The second visit


@triton.jit
def turned(values, BY: tl.constexpr, form):
    """Returns the values with those of the pass that is so many further in every pass's place."""
    M: tl.constexpr = form.PASSES - form.FIRST
    out = values
    for k in tl.static_range(M):
        other = k + BY if k + BY < M else k + BY - M
        out = tl.where(numbers(form) == k, get_pass(values, other, form), out)
    return out


@triton.jit
def add_pairs(HALF: tl.constexpr, own, other, of_k, of_l, form):
    """Returns the next other passes, and the sums of log ratios with those of each pass beside its
    other one added on both sides; HALF: for the first half of the passes.
    """
    M: tl.constexpr = form.PASSES - form.FIRST
    other = Side(
        z=turned(other.z, 1, form),
        rests=turned(other.rests, 1, form),
        ratios=turned(other.ratios, 1, form),
    )
    d = log_distance(own.z, other.z, own.rests - other.rests, own.ratios - other.ratios)
    to_k, to_l = log_ratios(d, form.EXACT)
    if HALF:
        half = numbers(form) < M // 2
        to_k, to_l = tl.where(half, to_k, 0.0), tl.where(half, to_l, 0.0)
    return other, of_k + to_k, turned(of_l, 1, form) + to_l


@triton.jit
def sums_of_log_ratios(z, passes, form):
    """Returns for each pass the sum of log2(p/M) over its pairs less its pivot.

    Every pass meets the one after it, then the one after that, half of the way round.
    """
    M: tl.constexpr = form.PASSES - form.FIRST
    of_l = tl.full(z.shape, -0.0, form.DTYPE)
    of_k = of_l - passes.pivots if form.EXACT else of_l
    own = Side(z=z, rests=passes.rests, ratios=passes.ratios)
    if M <= UNROLLED:
        other = own
        for _ in tl.static_range((M - 1) // 2):
            other, of_k, of_l = add_pairs(False, own, other, of_k, of_l, form)
        if M % 2 == 0:
            other, of_k, of_l = add_pairs(True, own, other, of_k, of_l, form)
        # of_l has been turned so often
        return of_k + turned(of_l, M - M // 2, form)
    else:
        for l in range(M):
            z_l, rest = get_pass(z, l, form), get_pass(passes.rests, l, form)
            ratio = get_pass(passes.ratios, l, form)
            d = log_distance(z, z_l, passes.rests - rest, passes.ratios - ratio)
            of_k += log_ratios(d, form.EXACT)[0]
        return of_k


@triton.jit
def block_of_targets(at, AGAIN: tl.constexpr, samples, form):
    """Returns a block of soft labels as it is."""
    i, inside = columns(at, samples.classes, form)
    return fetch(samples.soft_ptr, i, inside, samples.soft_stride, 0.0, False, AGAIN, form)


@triton.jit
def targets_of_element(soft, n, inside, samples, form):
    """Returns the probabilities t that soft labels stand for, 0 past the end."""
    t = get_element(soft, n, form).to(form.DTYPE)
    if form.SMOOTH:
        t = tl.where(inside, smoothed(t, samples.smoothing, samples.classes), 0.0)
    return t


@triton.jit
def add_passes(at, x, soft, sums, samples, passes, form):
    """Returns the sums over labels and pairs with a block added."""
    masses, of_labels, of_pairs = sums.masses, sums.of_labels, sums.of_pairs
    for n in range(form.RUN):
        inside = columns_of_element(at, n, samples.classes, form).inside
        y = get_element(x, n, form).to(form.DTYPE)
        if form.LABELS == "soft":
            t = targets_of_element(soft, n, inside, samples, form)
            masses += t
            of_labels += label_terms(t[None], y - passes.tops, inside[None], False)
        elif form.LABEL_SUMS:
            of_labels += label_terms(None, y - passes.tops, inside[None], False)
        z = shifted(y, passes.bases, passes.rests)
        of_pairs += exponential(z - passes.rests) * sums_of_log_ratios(z, passes, form)
    return Sums(masses=masses, of_labels=of_labels, of_pairs=of_pairs)


@triton.jit
def sum_up_passes(held, held_soft, samples, passes, form):
    """Makes the second visit to rows: sums over labels and pairs."""
    AGAIN: tl.constexpr = form.NEEDS >> form.FIRST != 0
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    zero = tl.zeros([form.AXIS, form.ROWS, form.RUNS, 1], form.DTYPE)
    sums = Sums(
        masses=tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE), of_labels=zero, of_pairs=zero
    )
    if form.HELD:
        for b in tl.static_range(form.HELD):
            soft = None
            if form.LABELS == "soft":
                soft = held_soft[b]
            sums = add_passes(b * BLOCK, held[b], soft, sums, samples, passes, form)
    else:
        # from the end, which was read last
        end = end_of_full(samples.classes, form)
        for back in range(0, end, BLOCK):
            at = end - BLOCK - back
            i, inside = columns(at, samples.classes, form)
            x = read_passes(samples.logits, i, inside, not form.MASKED, AGAIN, form)
            soft = None
            if form.LABELS == "soft":
                soft = block_of_targets(at, AGAIN, samples, form)
            sums = add_passes(at, x, soft, sums, samples, passes, form)
    return sums


@triton.jit
def logits_of_label(samples, form):
    """Reads the passes' logits of the label, one after another: their addresses are many."""
    out = tl.zeros([form.AXIS, form.ROWS, 1, 1], form.DTYPE)
    for k in range(form.PASSES - form.FIRST):
        row_ptr, stride = row_of_pass(samples.logits, k + form.FIRST, form)
        at = row_ptr + samples.label.to(tl.int64) * stride
        x = tl.load(at, mask=samples.label >= 0, other=0.0).to(form.DTYPE)
        out = tl.where(numbers(form) == k, x[None], out)
    return out


@triton.jit
def losses_of_passes(unit, js_weight, sums, samples, passes, form):
    """Returns the losses, and the factors of the gradients of `unit` times them."""
    M: tl.constexpr = form.PASSES - form.FIRST
    nothing = tl.zeros([form.ROWS, 1, 1], form.DTYPE)
    adversarial, share = nothing, unit / M
    divergences = over_row(sums.of_pairs) / passes.totals
    pair_factor = unit * js_weight * (LN2 / 2)
    of_e = -pair_factor * divergences
    if form.EXACT:
        divergences += passes.pivots
    if form.LABELS != "none":
        of_label = ()
        mass = tl.full([form.ROWS, 1, 1], 1.0, form.DTYPE)
        if form.LABELS == "soft":
            mass = over_row(sums.masses)
        else:
            of_label = logits_of_label(samples, form) - passes.tops
        found = cross_entropy(of_label, sums.of_labels, mass[None], passes.totals, samples, form)
        adversarial = over_passes(found, form) / M
        of_e += share * mass[None]
    losses = Losses(
        clean=nothing,
        adversarial=adversarial,
        divergence=pairs_divergence(over_passes(divergences, form), M),
    )
    factors = Factors(of_e=of_e / passes.totals, of_w=pair_factor / passes.totals, of_t=share)
    return losses, factors


# ---- The third visit


@triton.jit
def gradients_of_passes(at, x, soft, factors, keep, samples, passes, form):
    """Returns the gradients of a block, in its place."""
    for n in range(form.RUN):
        i, inside = columns_of_element(at, n, samples.classes, form)
        z = shifted(get_element(x, n, form).to(form.DTYPE), passes.bases, passes.rests)
        g = sums_of_log_ratios(z, passes, form) * factors.of_w + factors.of_e
        g = exponential(z - passes.rests) * g
        if form.LABELS == "indices":
            g = less_targets(g, factors.of_t, i[None], samples, form)
            if form.ROWS > 1:
                g = tl.where(keep[None], g, 0.0)
        elif form.LABELS == "soft":
            g -= targets_of_element(soft, n, inside, samples, form)[None] * factors.of_t
        x = set_element(x, n, g, form)
    return x


@triton.jit
def write_gradients_of_passes(
    held, held_soft, factors, gradients, there, keep, samples, passes, form
):
    """Makes the third visit to rows: writes the gradients."""
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    # every thread has a label's logit before a gradient may be written over it
    if form.LABELS == "indices":
        tl.debug_barrier()
    if form.HELD:
        for b in tl.static_range(form.HELD):
            i, inside = columns(b * BLOCK, samples.classes, form)
            soft = None
            if form.LABELS == "soft":
                soft = held_soft[b]
            g = gradients_of_passes(b * BLOCK, held[b], soft, factors, keep, samples, passes, form)
            write_passes(gradients, i, inside, there, g, form)
    else:
        for at in range(0, end_of_full(samples.classes, form), BLOCK):
            i, inside = columns(at, samples.classes, form)
            x = read_passes(samples.logits, i, inside, not form.MASKED, False, form)
            soft = None
            if form.LABELS == "soft":
                soft = block_of_targets(at, False, samples, form)
            g = gradients_of_passes(at, x, soft, factors, keep, samples, passes, form)
            write_passes(gradients, i, inside, there, g, form)


@triton.jit
def classify(samples, gradients, there, keep, unit, js_weight, form):
    """Returns the losses of some samples' adversarial passes, and writes the gradients of `unit`
    times them.
    """
    BLOCK: tl.constexpr = form.RUNS * form.RUN
    held, held_soft = (), ()
    for b in tl.static_range(form.HELD):
        i, inside = columns(b * BLOCK, samples.classes, form)
        x = read_passes(samples.logits, i, inside, b < form.HELD - form.MASKED, False, form)
        held = held + (x,)
        if form.LABELS == "soft":
            held_soft = held_soft + (block_of_targets(b * BLOCK, False, samples, form),)
    passes = normalize_passes(held, samples, form)
    sums = sum_up_passes(held, held_soft, samples, passes, form)
    losses, factors = losses_of_passes(unit, js_weight, sums, samples, passes, form)
    if form.NEEDS >> form.FIRST:
        write_gradients_of_passes(
            held, held_soft, factors, gradients, there, keep, samples, passes, form
        )
    return losses
