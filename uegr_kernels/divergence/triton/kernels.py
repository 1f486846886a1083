"""The losses' kernels in Triton: a program takes a few samples at a time and visits their m+1 rows
up to three times.

First for each row's maximum and sum of exponentials, then for the pairs' divergences, then for the
gradients, by blocks of columns. Rows that a program's registers hold are read once; of others each
visit reads all, and what needs no gradient has two. few.py does it for a few passes, many.py for
more, and for such that hold long rows.
"""

import triton
import triton.language as tl

from ...core.triton_ops import from_bits
from . import few, many
from .blocks import (
    ENTRY,
    PARTS,
    Held,
    Losses,
    Rows,
    Samples,
    columns,
    end_of_full,
    over_row,
    over_runs,
    read,
    row_of_pass,
    write,
    write_zeros,
)
from .math import squared, squared_slope

# samples of a loop over all of them
AT_ONCE = tl.constexpr(1024)


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
    clean_form,
):
    """Computes the losses of all samples, and the gradients. For `add_up_kernel`, where neither
    BY_ROW nor ONE_PROGRAM: the parts of rows, and their count. `clean_form`: of the clean logits
    alone, where the others are an AXIS.
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
            if form.AXIS:
                losses = many.classify(samples, gradients, there, keep, 1 / count, js_weight, form)
                if form.FIRST:
                    alone = few.classify(
                        samples, gradients, there, keep, 1 / count, js_weight, clean_form
                    )
                    losses = Losses(
                        clean=alone.clean,
                        adversarial=losses.adversarial,
                        divergence=losses.divergence,
                    )
            else:
                losses = few.classify(samples, gradients, there, keep, 1 / count, js_weight, form)
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
