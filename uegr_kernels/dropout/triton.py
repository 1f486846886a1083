"""Adaptive dropout in Triton: the mask is drawn again in the backward, which gathers the squares of
every unit's gradient.

A program takes a tile: some rows of some units (a unit: an index of the last axis). Squares are
added in double, by part of the rows and then over the parts, in a fixed order.

Upper case is what is known when a kernel is compiled: a kernel's options are one argument, `form`.
"""

import functools
import typing

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import triton_ops
from ..core.triton_ops import from_bits

# units of a tile, at most
UNITS = 256
# elements of a tile at a time
ROWS = 4096
# units, or parts, of a loop over all of them
AT_ONCE = tl.constexpr(1024)
# parts of the rows, at most
PARTS = 256

# ---- The formulas


@triton.jit
def keep_scale(rate, dtype: tl.constexpr):
    """Returns what kept elements of a unit are multiplied by, 1/(1 - r), the difference taken in
    the rate's own type.
    """
    return 1 / (1 - rate).to(dtype)


@triton.jit
def dropped(h, word, rate, scale):
    """Returns h/(1 - r) where kept, 0 where u < r, whatever h is."""
    return tl.where(triton_ops.uniform(word, rate.dtype) >= rate, h * scale, 0.0)


@triton.jit
def moved_norm(n, squares, momentum, first):
    """Returns n after new squares of norms: momentum * n + (1 - momentum) * root; the first one
    sets n.
    """
    root = tl.sqrt(squares)
    return tl.where(first, root, momentum.to(n.dtype) * n + (1 - momentum).to(n.dtype) * root)


@triton.jit
def dropout_rate(n, mean, p, max_p):
    """Returns r = clamp(p * n / mean(n), 0, max_p); NaN stays."""
    rate, most = p.to(n.dtype) * n / mean, max_p.to(n.dtype)
    return tl.where(rate < 0, 0.0, tl.where(rate > most, most, rate))


# ---- Kernels and their launches


class Form(typing.NamedTuple):
    """Says what a kernel is compiled for. A tile is ROWS rows, or parts, of UNITS units."""

    ROWS: int
    UNITS: int
    # dtype of the arithmetic
    DTYPE: object
    # one call of Philox serves four neighbours
    IN_ORDER: bool
    # squares are summed
    SQUARES: bool
    # what is pending goes into n
    FOLD: bool


NO_FORM = Form._make([None] * len(Form._fields))


@triton.jit
def words_of_tile(row, unit, units, key, form):
    """Returns the words of a tile's elements, [rows, units]."""
    step = key * 0
    if form.IN_ORDER:
        R: tl.constexpr = row.shape[0]
        U: tl.constexpr = unit.shape[1]
        quarter = tl.min(unit, 1, keep_dims=True) // 4 + tl.arange(0, U // 4)[None, :]
        a, b, c, d = triton_ops.four_words(row * (units // 4) + quarter, key, step, step)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [R, U])
    else:
        return triton_ops.words(row * units + unit, key, step, step)


@triton.jit(do_not_specialize=["rows", "size"])
def drop_kernel(
    h_ptr, rates_ptr, rates_stride, key_ptr, out_ptr, squares_ptr, rows, units, size, form
):
    """Drops `size` rows of some units; with SQUARES sums their squares, [parts, units]."""
    ROWS: tl.constexpr = form.ROWS
    UNITS: tl.constexpr = form.UNITS
    key = tl.load(key_ptr)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    rate_ptrs = rates_ptr + unit.to(tl.int64) * rates_stride
    rate = tl.load(rate_ptrs, mask=unit < units, other=0.0)
    scale = keep_scale(rate, form.DTYPE)
    first = tl.program_id(1).to(tl.int64) * size
    sums = tl.zeros([ROWS, UNITS], tl.float64)
    for at in range(first, tl.minimum(first + size, rows), ROWS):
        row = at + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (unit < units)
        i = row * units + unit
        value = tl.load(h_ptr + i, mask=there, other=0.0)
        word = words_of_tile(row, unit, units, key, form)
        result = dropped(value.to(form.DTYPE), word, rate, scale)
        tl.store(out_ptr + i, triton_ops.nearest(result, out_ptr.dtype.element_ty), mask=there)
        if form.SQUARES:
            sums += value.to(tl.float64) * value.to(tl.float64)
    if form.SQUARES:
        tl.store(
            squares_ptr + tl.program_id(1).to(tl.int64) * units + unit,
            tl.sum(sums, 0, keep_dims=True),
            mask=unit < units,
        )


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(squares_ptr, out_ptr, parts, units, form):
    """Sums squares over the parts."""
    unit = tl.program_id(0) * form.UNITS + tl.arange(0, form.UNITS)[None, :]
    sums = tl.zeros([form.ROWS, form.UNITS], tl.float64)
    for at in range(0, parts, form.ROWS):
        part = at + tl.arange(0, form.ROWS)[:, None]
        sums += tl.load(
            squares_ptr + part.to(tl.int64) * units + unit,
            mask=(part < parts) & (unit < units),
            other=0.0,
        )
    total = tl.sum(sums, 0, keep_dims=True).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + unit, total, mask=unit < units)


@triton.jit(do_not_specialize=["p", "max_p", "momentum"])
def rates_kernel(
    norm_ptr,
    norm_stride,
    pending_ptr,
    pending_stride,
    rates_ptr,
    units,
    p: tl.int64,
    max_p: tl.int64,
    momentum: tl.int64,
    form,
):
    """Computes in one program n, with what is pending, and then the rates that n gives."""
    p, max_p, momentum = from_bits(p), from_bits(max_p), from_bits(momentum)
    new, seen = tl.zeros([AT_ONCE], tl.int32), tl.zeros([AT_ONCE], tl.int32)
    for at in range(0, units, AT_ONCE):
        j = (at + tl.arange(0, AT_ONCE)).to(tl.int64)
        n = tl.load(norm_ptr + j * norm_stride, mask=j < units, other=0.0)
        seen |= (n != 0).to(tl.int32)
        if form.FOLD:
            squares = tl.load(pending_ptr + j * pending_stride, mask=j < units, other=0.0)
            new |= (squares > 0).to(tl.int32)
    first, folds = tl.max(seen, 0) == 0, tl.max(new, 0) > 0
    total, seen = tl.zeros([AT_ONCE], tl.float64), tl.zeros([AT_ONCE], tl.int32)
    for at in range(0, units, AT_ONCE):
        j = (at + tl.arange(0, AT_ONCE)).to(tl.int64)
        n = tl.load(norm_ptr + j * norm_stride, mask=j < units, other=0.0)
        if form.FOLD:
            squares = tl.load(pending_ptr + j * pending_stride, mask=j < units, other=0.0)
            n = tl.where(folds, moved_norm(n, squares, momentum, first), n)
            tl.store(norm_ptr + j * norm_stride, n, mask=j < units)
            tl.store(pending_ptr + j * pending_stride, tl.zeros_like(squares), mask=j < units)
        total += n.to(tl.float64)
        seen |= (n != 0).to(tl.int32)
    mean, first = tl.sum(total, 0) / units, tl.max(seen, 0) == 0
    # each thread finds what it has written itself
    for at in range(0, units, AT_ONCE):
        j = (at + tl.arange(0, AT_ONCE)).to(tl.int64)
        n = tl.load(norm_ptr + j * norm_stride, mask=j < units, other=0.0)
        rate = tl.where(first, p.to(n.dtype), dropout_rate(n, mean.to(n.dtype), p, max_p))
        tl.store(rates_ptr + j, rate, mask=j < units)


_constexprs = functools.cache(triton_ops.constexprs)


def _drop(h: Tensor, name: str, rates: Tensor, key: Tensor, *, squares: Tensor | None) -> Tensor:
    """Returns h dropped; adds the squares of every unit's elements to `squares`, zeros."""
    triton_ops.check_dtype(name, h)
    if rates.dtype not in (torch.float32, torch.float64):
        raise RuntimeError("rates must be float32 or float64")
    if h.dim() == 0 or rates.shape != h.shape[-1:]:
        raise RuntimeError(f"rates must have one number for each index of {name}'s last axis")
    if key.dtype != torch.int64 or key.numel() != 1:
        raise RuntimeError("key must be an int64")
    out = h.new_empty(h.shape)
    with_squares = squares is not None
    if h.numel() == 0:
        return out
    h, units = h.contiguous(), h.shape[-1]
    rows, in_order = h.numel() // units, units % 4 == 0
    tile = max(min(triton.next_power_of_2(units), UNITS), 4)
    at_once = max(min(ROWS // tile, triton.next_power_of_2(rows)) // (2 if with_squares else 1), 1)
    parts = min(triton.cdiv(rows, at_once), PARTS) if with_squares else triton.cdiv(rows, at_once)
    parts = min(parts, 2**16 - 1)
    size = triton.cdiv(triton.cdiv(rows, parts), at_once) * at_once
    parts = triton.cdiv(rows, size)
    dtype = torch.float64 if torch.float64 in (h.dtype, rates.dtype) else torch.float32
    sums = h.new_empty(parts, units, dtype=torch.float64) if with_squares else None
    form = NO_FORM._replace(
        ROWS=at_once,
        UNITS=tile,
        DTYPE=triton_ops.DTYPES[dtype],
        IN_ORDER=in_order,
        SQUARES=with_squares,
    )
    with triton_ops.on(h):
        drop_kernel[(triton.cdiv(units, tile), parts)](
            h_ptr=h,
            rates_ptr=rates,
            rates_stride=rates.stride(0),
            key_ptr=key,
            out_ptr=out,
            squares_ptr=sums,
            rows=rows,
            units=units,
            size=size,
            form=_constexprs(form),
            **triton_ops.compile_options(8 if at_once * tile >= 2048 else 1),
        )
        if with_squares:
            form = NO_FORM._replace(ROWS=16, UNITS=32)
            add_parts_kernel[(triton.cdiv(units, form.UNITS),)](
                squares_ptr=sums,
                out_ptr=squares,
                parts=parts,
                units=units,
                form=_constexprs(form),
                **triton_ops.compile_options(2),
            )
    return out


# ---- The operators, as reference.py has them.


def adaptive_dropout(h: Tensor, rates: Tensor, key: Tensor, pending: Tensor | None) -> Tensor:
    """Returns h/(1 - r_j) where kept, else 0. `pending` is for the backward."""
    return _drop(h, "h", rates, key, squares=None)


def adaptive_dropout_backward(grad: Tensor, rates: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dL/dinput by the same mask, and the squared norm of dL/dh_j over all other axes
    [F].
    """
    squares = torch.zeros_like(rates, memory_format=torch.contiguous_format)
    return _drop(grad, "grad", rates, key, squares=squares), squares


def dropout_rates_(
    gradient_norm: Tensor, pending: Tensor, *, p: float, max_p: float, momentum: float, fold: bool
) -> Tensor:
    """Returns r [F]. With `fold` the root of what backwards left in `pending` goes into n before;
    the first one sets n.
    """
    if gradient_norm.dtype not in (torch.float32, torch.float64):
        raise RuntimeError("gradient_norm must be float32 or float64")
    if (
        gradient_norm.dim() != 1
        or pending.shape != gradient_norm.shape
        or pending.dtype != gradient_norm.dtype
    ):
        raise RuntimeError(
            "gradient_norm and pending must have one axis of the same size, and the same dtype"
        )
    for x, name in ((gradient_norm, "gradient_norm"), (pending, "pending")):
        triton_ops.refuse_expanded(name, x, RuntimeError)
    rates = gradient_norm.new_empty(gradient_norm.shape)
    if len(rates):
        with triton_ops.on(rates):
            rates_kernel[(1,)](
                norm_ptr=gradient_norm,
                norm_stride=gradient_norm.stride(0),
                pending_ptr=pending,
                pending_stride=pending.stride(0),
                rates_ptr=rates,
                units=len(rates),
                p=triton_ops.bits(p),
                max_p=triton_ops.bits(max_p),
                momentum=triton_ops.bits(momentum),
                form=_constexprs(NO_FORM._replace(FOLD=fold)),
                **triton_ops.compile_options(4),
            )
    return rates
