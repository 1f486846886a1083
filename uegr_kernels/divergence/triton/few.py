"""The losses of a few passes in Triton: of each a thread holds a block, in a tuple."""

import typing

import triton
import triton.language as tl

from .blocks import (
    INFINITY,
    Factors,
    Held,
    Losses,
    Normalizer,
    Passes,
    Samples,
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
    over_runs,
    read,
    row_of_pass,
    write,
)
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

# passes in pairs of which each pair has code of its own
UNROLLED = tl.constexpr(4)


class Side(typing.NamedTuple):
    """Holds of the passes in pairs, from any of them on, the logits, and what their maxima and
    their sums have in distances.
    """

    z: object
    rests: object
    ratios: object


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
def zeros(SIZE: tl.constexpr, form):
    """Returns SIZE sums over runs."""
    out = ()
    for _ in tl.static_range(SIZE):
        out = out + (tl.zeros([form.ROWS, form.RUNS, 1], form.DTYPE),)
    return out


@triton.jit
def first_ratio(shape: tl.constexpr, k, passes, form):
    """Returns what pass k's log ratios are added to: minus its pivot, or -0."""
    # -0 + x is x, and costs nothing
    w = tl.full(shape, -0.0, form.DTYPE)
    if form.EXACT:
        w -= passes.pivots[k]
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
        to_k, to_l = log_ratios(d, form.EXACT)
        of_k, of_l = add_to_known_item(of_k, j, to_k), add_to_known_item(of_l, j, to_l)
    return of_k, of_l


@triton.jit
def sums_of_log_ratios(z, passes, form):
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
def pivots_of(likeliest, samples, passes, form):
    """Returns for each pass the sum of its log ratios at its most probable class where that holds
    much of p, or 0; lane j is pass FIRST + j.

    There it is nearly the divergence, and only their difference is exact enough.
    """
    M: tl.constexpr = form.PASSES - form.FIRST
    lane = tl.arange(0, 2 if M <= 2 else 4 if M <= 4 else 8)[None, :, None]
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
        w += tl.where(lane == j, 0.0, log_ratios(d, form.EXACT)[0])
    out = ()
    for k in tl.static_range(form.PASSES):
        if k < form.FIRST:
            out = out + (tl.zeros([form.ROWS, 1, 1], form.DTYPE),)
        else:
            pivot = tl.sum(tl.where(lane == k - form.FIRST, w, 0.0), 1, keep_dims=True)
            out = out + (tl.where(passes.totals[k] < 4, pivot, 0.0),)
    return out


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
    for k in tl.static_range(form.PASSES):
        if form.HELD:
            found = held_normalizer(samples.held.logits[k], samples.classes, form)
        else:
            row_ptr, stride = row_of_pass(samples.logits, k, form)
            found = normalizer(row_ptr, stride, samples.classes, form)
        tops, totals = tops + (found.top,), totals + (found.total,)
        likeliest = likeliest + (found.likeliest,)
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
        base = base_of(tops[k], highest, lowest, form)
        bases, rests = bases + (base,), rests + (tops[k] - base,)
        if k >= form.FIRST:
            ratios = ratios + (log_gap(totals[k], totals[form.FIRST]),)
    if form.EXACT and form.PASSES - form.FIRST > 1:
        found = Passes(
            tops=tops, bases=bases, rests=rests, totals=totals, pivots=pivots, ratios=ratios
        )
        pivots = pivots_of(normalizer_of.likeliest, samples, found, form)
    return Passes(tops=tops, bases=bases, rests=rests, totals=totals, pivots=pivots, ratios=ratios)


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
        w = sums_of_log_ratios(z, passes, form)
        for k in tl.static_range(form.FIRST, form.PASSES):
            e = exponential(z[k - form.FIRST] - passes.rests[k])
            of_pairs = add_to_known_item(of_pairs, k, over_runs(e * w[k - form.FIRST]))
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
def logit_of_label(k, samples, passes, form):
    """Reads pass k's logit of the label, less the row's maximum; nothing with soft labels."""
    if form.LABELS == "soft":
        return ()
    else:
        row_ptr, stride = row_of_pass(samples.logits, k, form)
        label = samples.label
        x = tl.load(row_ptr + label.to(tl.int64) * stride, mask=label >= 0, other=0.0)
        return x.to(form.DTYPE) - passes.tops[k]


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
            of_label = logit_of_label(k, samples, passes, form)
            of_labels, total = sums.of_labels[k], passes.totals[k]
            found = cross_entropy(of_label, of_labels, mass, total, samples, form)
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


@triton.jit
def write_block(at, b, FULL: tl.constexpr, factors, gradients, there, keep, samples, passes, form):
    """Writes a block's gradients; `b`: which of the HELD blocks it is, else nothing."""
    i, inside = columns(at, samples.classes, form)
    if form.LABELS == "soft":
        t = targets(b, i, inside, FULL, False, samples, form)
    z, w = (), ()
    for k in tl.static_range(form.PASSES):
        x = read_pass(k, b, i, inside, FULL, False, samples, form)
        z = z + (shifted(x, passes.bases[k], passes.rests[k]),)
    if form.PASSES - form.FIRST > 1:
        w = sums_of_log_ratios(z[form.FIRST :], passes, form)
    for k in tl.static_range(form.PASSES):
        if form.NEEDS >> k & 1:
            g = factors.of_e[k]
            if k >= form.FIRST and form.PASSES - form.FIRST > 1:
                g = w[k - form.FIRST] * factors.of_w[k] + g
            g = exponential(z[k] - passes.rests[k]) * g
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
