"""Perturbations in Triton: Eq. 2, PGD's step and ball, DropAttack's mask. Norms and scales are
double, as the reference's.

A group of elements has one norm: a sample, a token, a tensor, or all. One that a block holds is a
program's, start to end; longer ones are parts of a fixed size, whose sums of squares are kept and
added up by each program of the next launch, in the parts' order.

Upper case is what is known when a kernel is compiled: a kernel's options are one argument, `form`.
"""

import functools
import itertools
import math
import typing

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import triton_ops
from ..core.triton_ops import from_bits

# elements of a group that a program holds
WHOLE = 4096
# elements of a longer one at a time
BLOCK = 1024
# elements of a part, at least; parts of a group, about at most
PART, PARTS = 1 << 14, 1024
# sums of parts at a time
SUMS = tl.constexpr(1024)
INFINITY = tl.constexpr(float("inf"))

# ---- The formulas


@triton.jit
def direction_factor(squares, epsilon, LINF: tl.constexpr):
    """Returns what a group's g (or sign(g)) is multiplied by: eps/||g||, or eps; 0 where the norm
    is 0 or not finite.
    """
    factor = tl.zeros_like(squares) + epsilon
    if not LINF:
        factor = factor / tl.sqrt(squares)
    # the root is 0 or infinite where this is: linf needs none
    return tl.where((squares > 0) & (squares < INFINITY), factor, 0.0)


@triton.jit
def ball_factor(squares, radius):
    """Returns what a group is multiplied by to lie in the ball: radius/||delta||, or 1."""
    length = tl.sqrt(squares)
    return tl.where(length > radius, radius / length, 1.0)


@triton.jit
def step_along(g, factor, LINF: tl.constexpr):
    """Returns eps * g/||g||, or eps * sign(g). A factor of 0 stops whatever g is."""
    along = g
    if LINF:
        along = (g > 0).to(tl.float64) - (g < 0).to(tl.float64)
    return tl.where(factor > 0, along * factor, 0.0)


@triton.jit
def kept(step, word, limit):
    """Returns b * step; u < p is (word >> 8) < limit = ceil(p * 2^24)."""
    return tl.where((word >> 8).to(tl.int32) < limit, step, 0.0)


def draw_limit(keep_probability: float) -> int:
    """Returns ceil(p * 2^24), below which the upper 24 bits of a word are kept."""
    return math.ceil(keep_probability * 2**24)


@triton.jit
def projected(x, factor, radius, LINF: tl.constexpr):
    """Returns the nearest point of the ball; NaN stays."""
    if LINF:
        return tl.where(x > radius, radius, tl.where(x < -radius, -radius, x))
    else:
        return x * factor


# ---- Elements


class Form(typing.NamedTuple):
    """Says what a kernel is compiled for."""

    # elements at a time
    BLOCK: int
    # the norm is linf, else l2
    LINF: bool
    # what is written lies on a ball
    PROJECTS: bool
    # a mask is drawn
    RANDOM: bool
    # one call of Philox serves four neighbours
    IN_ORDER: bool
    # of `part_kernel`, 0: adds the squares of g; 1: those of x + step, for the ball; 2: writes
    STAGE: int
    # groups start at multiples of 16 bytes
    ALIGNED: bool
    # dtype of what a table names
    STORAGE: object
    # a group is a whole block
    FULL: bool


class WeightRow(typing.NamedTuple):
    """Holds what `part_kernel` knows of a weight: addresses, and which sums are its group's."""

    gradient: int
    weight: int
    size: int
    stream: int
    # where its group's sums begin
    first: int
    parts_of_group: int
    # where those of its own parts begin
    number: int


# Where they stand in a row; a test compares.
GRADIENT, WEIGHT, SIZE, STREAM, FIRST, PARTS_OF_GROUP, NUMBER = map(tl.constexpr, range(7))
ROW = tl.constexpr(7)


class Pointers(typing.NamedTuple):
    """Holds where a call's tensors are; a number of the mask is for `token` elements of g."""

    g: object
    x: object
    out: object
    mask: object
    token: object


class Step(typing.NamedTuple):
    """Holds how a group moves: by `factor` along g, by `ball` into the ball of a radius."""

    factor: object
    ball: object
    radius: object


class Draw(typing.NamedTuple):
    """Holds what a mask is drawn by; `limit`: ceil(p * 2^24)."""

    seed: object
    step: object
    stream: object
    limit: object


@triton.jit
def read(x_ptr, begin, i, end, FULL: tl.constexpr):
    """Reads elements begin + i of x in double, 0 from `end` on."""
    if FULL:
        return tl.load(x_ptr + begin + i).to(tl.float64)
    else:
        return tl.load(x_ptr + begin + i, mask=begin + i < end, other=0.0).to(tl.float64)


@triton.jit
def read_gradient(ptrs, begin, i, end, FULL: tl.constexpr):
    """Reads elements begin + i of g in double, 0 where the mask has it and from `end` on."""
    out = read(ptrs.g, begin, i, end, FULL)
    if ptrs.mask is not None:
        token = ptrs.token
        if token.dtype == tl.int32:
            within = ((begin % token).to(tl.uint32) + i.to(tl.uint32)) // token.to(tl.uint32)
        else:
            within = (begin % token + i) // token
        mask_ptrs = ptrs.mask + begin // token + within
        real = tl.load(mask_ptrs, mask=begin + i < end, other=0)
        out = tl.where(real != 0, out, 0.0)
    return out


@triton.jit
def moved(g, ptrs, factor, draw, begin, i, end, FULL: tl.constexpr, form):
    """Returns x + b * step; without x the step. g: its block in double."""
    out = step_along(g, factor, form.LINF)
    if form.RANDOM:
        if form.IN_ORDER:
            word = triton_ops.words_in_order(begin, draw.seed, draw.step, draw.stream, i.shape[0])
        else:
            word = triton_ops.words(begin + i, draw.seed, draw.step, draw.stream)
        out = kept(out, word, draw.limit)
    if ptrs.x is not None:
        out = read(ptrs.x, begin, i, end, FULL) + out
    return out


@triton.jit
def write(out_ptr, begin, i, end, value, FULL: tl.constexpr):
    """Writes elements begin + i of out, none from `end` on."""
    value = triton_ops.nearest(value, out_ptr.dtype.element_ty)
    if FULL:
        tl.store(out_ptr + begin + i, value)
    else:
        tl.store(out_ptr + begin + i, value, mask=begin + i < end)


@triton.jit
def key(seed_ptr, seed):
    """Returns the mask's key, beside the tensors or as a number."""
    if seed_ptr is not None:
        return tl.load(seed_ptr)
    else:
        return seed


# ---- Kernels and their launches


@triton.jit(do_not_specialize=["token", "epsilon", "radius", "limit", "seed", "step"])
def group_kernel(
    g_ptr,
    x_ptr,
    out_ptr,
    mask_ptr,
    token,
    length,
    seed_ptr,
    seed: tl.int64,
    step: tl.int64,
    limit,
    epsilon: tl.int64,
    radius: tl.int64,
    form,
):
    """Takes a group from its norm to its step: one visit."""
    begin = tl.program_id(0).to(tl.int64) * length
    end, i = begin + length, tl.arange(0, form.BLOCK)
    ptrs = Pointers(g=g_ptr, x=x_ptr, out=out_ptr, mask=mask_ptr, token=token)
    draw = Draw(seed=key(seed_ptr, seed), step=step, stream=begin * 0, limit=limit)
    along = read_gradient(ptrs, begin, i, end, form.FULL)
    factor = direction_factor(tl.sum(along * along, 0), from_bits(epsilon), form.LINF)
    value = moved(along, ptrs, factor, draw, begin, i, end, form.FULL, form)
    if form.PROJECTS:
        radius = from_bits(radius)
        # what lies outside of the group is 0
        squares = tl.sum(value * value, 0)
        value = projected(value, ball_factor(squares, radius), radius, form.LINF)
    write(ptrs.out, begin, i, end, value, form.FULL)


@triton.jit
def total(sums_ptr, first, count):
    """Returns a group's squares from those of its parts."""
    found = tl.zeros([SUMS], tl.float64)
    for at in range(0, count, SUMS):
        i = at + tl.arange(0, SUMS)
        found += tl.load(sums_ptr + first + i, mask=i < count, other=0.0)
    return tl.sum(found, 0)


@triton.jit(
    do_not_specialize=["token", "epsilon", "radius", "limit", "seed", "step", "size", "parts"]
)
def part_kernel(
    items_ptr,
    table_ptr,
    g_ptr,
    x_ptr,
    out_ptr,
    mask_ptr,
    token,
    length,
    size: tl.int64,
    parts: tl.int64,
    squares_ptr,
    moved_squares_ptr,
    seed_ptr,
    seed: tl.int64,
    step: tl.int64,
    limit,
    epsilon: tl.int64,
    radius: tl.int64,
    form,
):
    """Visits a part of a group, at one of the three stages.

    The parts of one tensor's groups follow each other; those of many tensors are listed in `items`,
    and a table has the tensors.
    """
    BLOCK: tl.constexpr = form.BLOCK
    program = tl.program_id(0).to(tl.int64)
    if items_ptr is not None:
        row_ptr = table_ptr + tl.load(items_ptr + 2 * program).to(tl.int64) * ROW
        part = tl.load(items_ptr + 2 * program + 1).to(tl.int64)
        if form.ALIGNED:
            g_ptr = triton_ops.aligned_pointer(tl.load(row_ptr + GRADIENT), form.STORAGE)
            x_ptr = triton_ops.aligned_pointer(tl.load(row_ptr + WEIGHT), form.STORAGE)
        else:
            g_ptr = triton_ops.pointer(tl.load(row_ptr + GRADIENT), form.STORAGE)
            x_ptr = triton_ops.pointer(tl.load(row_ptr + WEIGHT), form.STORAGE)
        begin, end, stream = part * size, tl.load(row_ptr + SIZE), tl.load(row_ptr + STREAM)
        first, parts = tl.load(row_ptr + FIRST), tl.load(row_ptr + PARTS_OF_GROUP)
        number = tl.load(row_ptr + NUMBER) + part
        out_ptr = x_ptr
    else:
        number, stream = program, program * 0
        begin = program // parts * length + program % parts * size
        end = (program // parts + 1) * length
        first = program // parts * parts
    end, i = tl.minimum(begin + size, end), tl.arange(0, BLOCK)
    ptrs = Pointers(g=g_ptr, x=x_ptr, out=out_ptr, mask=mask_ptr, token=token)
    draw = Draw(seed=key(seed_ptr, seed), step=step, stream=stream, limit=limit)
    factor, ball, radius = 0.0, 1.0, from_bits(radius)
    if form.STAGE > 0:
        squares = total(squares_ptr, first, parts)
        factor = direction_factor(squares, from_bits(epsilon), form.LINF)
    if form.PROJECTS and not form.LINF and form.STAGE == 2:
        ball = ball_factor(total(moved_squares_ptr, first, parts), radius)
    move = Step(factor=factor, ball=ball, radius=radius)
    sums = tl.zeros([BLOCK], tl.float64)
    whole = ((end - begin) // BLOCK).to(tl.int32)
    for block in range(whole):
        at = begin + block * BLOCK
        if form.ALIGNED:
            at = tl.multiple_of(at, 16)
        sums = visit_block(at, end, i, sums, ptrs, move, draw, True, form)
    if begin + whole * BLOCK < end:
        at = begin + whole * BLOCK
        sums = visit_block(at, end, i, sums, ptrs, move, draw, False, form)
    if form.STAGE == 0:
        tl.store(squares_ptr + number, tl.sum(sums, 0))
    if form.STAGE == 1:
        tl.store(moved_squares_ptr + number, tl.sum(sums, 0))


@triton.jit
def visit_block(at, end, i, sums, ptrs, move, draw, FULL: tl.constexpr, form):
    """Adds a block's squares, or writes the block. What lies outside of the group is 0."""
    value = read_gradient(ptrs, at, i, end, FULL)
    if form.STAGE > 0:
        value = moved(value, ptrs, move.factor, draw, at, i, end, FULL, form)
    if form.STAGE == 2:
        if form.PROJECTS:
            value = projected(value, move.ball, move.radius, form.LINF)
        write(ptrs.out, at, i, end, value, FULL)
        return sums
    else:
        return sums + value * value


_constexprs = functools.cache(triton_ops.constexprs)


def _part(longest: int) -> int:
    """Returns the elements of a part where the longest group has so many."""
    return max(PART, -(-longest // (PARTS * BLOCK)) * BLOCK)


class Numbers(typing.NamedTuple):
    """Holds what both kernels take, under their arguments' names. The seed is a 0-d tensor beside
    the others, or a number.
    """

    seed_ptr: Tensor | None
    seed: int
    step: int
    limit: int
    # bits of float64
    epsilon: int
    radius: int

    @classmethod
    def of(
        cls,
        seed: Tensor | None,
        *,
        step: int,
        keep_probability: float,
        epsilon: float,
        radius: float | None,
    ) -> "Numbers":
        there = seed is None or seed.is_cuda
        return cls(
            seed_ptr=seed if there else None,
            seed=0 if seed is None or there else int(seed.item()),
            step=step,
            limit=draw_limit(keep_probability),
            epsilon=triton_ops.bits(epsilon),
            radius=triton_ops.bits(radius or 0.0),
        )


def _move_(
    x: Tensor | None,
    grad: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    *,
    epsilon: float,
    radius: float | None,
    norm: str,
    per: str,
    keep_probability: float,
    step: int,
) -> None:
    """Writes x + b * step, on the ball of `radius`, into out."""
    n, shape = grad.numel(), grad.shape
    if n == 0:
        return
    if not out.is_contiguous():
        dense = torch.empty_like(out, memory_format=torch.contiguous_format)
        _move_(
            x,
            grad,
            mask,
            seed,
            dense,
            epsilon=epsilon,
            radius=radius,
            norm=norm,
            per=per,
            keep_probability=keep_probability,
            step=step,
        )
        out.copy_(dense)
        return
    length = {
        "sample": n // shape[0] if shape else 1,
        "token": shape[-1] if shape else 1,
        "all": n,
    }[per]
    token = 1
    if mask is not None:
        token, mask = n // mask.numel(), (mask != 0).contiguous()
    x, g, groups = None if x is None else x.contiguous(), grad.contiguous(), n // length
    numbers = Numbers.of(
        seed, step=step, keep_probability=keep_probability, epsilon=epsilon, radius=radius
    )
    form = Form(
        BLOCK=BLOCK,
        LINF=norm == "linf",
        PROJECTS=radius is not None,
        RANDOM=seed is not None,
        IN_ORDER=length % 4 == 0 or groups == 1,
        STAGE=0,
        ALIGNED=length % 16 == 0 or groups == 1,
        STORAGE=None,
        FULL=False,
    )
    with triton_ops.on(grad):
        if length <= WHOLE:
            block = max(triton.next_power_of_2(length), 4)
            warps = min(max(block // 512, 1), 8)
            form = form._replace(BLOCK=block, ALIGNED=False, FULL=block == length)
            group_kernel[(groups,)](
                g_ptr=g,
                x_ptr=x,
                out_ptr=out,
                mask_ptr=mask,
                token=token,
                length=length,
                **numbers._asdict(),
                form=_constexprs(form),
                **triton_ops.compile_options(warps),
            )
            return
        size = _part(length)
        parts = triton.cdiv(length, size)
        squares, moved_squares = g.new_empty(2, groups * parts, dtype=torch.float64)
        for stage in (0, 1, 2) if radius is not None and norm == "l2" else (0, 2):
            part_kernel[(groups * parts,)](
                items_ptr=None,
                table_ptr=None,
                g_ptr=g,
                x_ptr=x,
                out_ptr=out,
                mask_ptr=mask,
                token=token,
                length=length,
                size=size,
                parts=parts,
                squares_ptr=squares,
                moved_squares_ptr=moved_squares,
                **numbers._asdict(),
                form=_constexprs(form._replace(STAGE=stage)),
                **triton_ops.compile_options(4),
            )


# ---- The operators, as reference.py has them.


def fgm_perturbation_(grad, mask, seed, out, *, epsilon, norm, per, keep_probability, step) -> None:
    """Writes delta = b * eps * g/||g|| (Eq. 2), or b * eps * sign(g), into out."""
    _check_placement(grad, out, "grad", "out")
    triton_ops.refuse_expanded("out", out, RuntimeError)
    _check_mask(mask, grad)
    _check_seed(seed)
    _move_(
        None,
        grad,
        mask,
        seed,
        out,
        epsilon=epsilon,
        radius=None,
        norm=norm,
        per=per,
        keep_probability=keep_probability,
        step=step,
    )


def pgd_step_(delta, grad, mask, out, *, step_size, radius, norm, per) -> None:
    """Writes delta + step_size * g/||g|| (or sign(g)), projected on the ball, into out."""
    _check_placement(grad, delta, "grad", "delta")
    _check_placement(grad, out, "grad", "out")
    triton_ops.refuse_expanded("out", out, RuntimeError)
    _check_mask(mask, grad)
    _move_(
        delta,
        grad,
        mask,
        None,
        out,
        epsilon=step_size,
        radius=radius,
        norm=norm,
        per=per,
        keep_probability=1.0,
        step=0,
    )


def perturb_weights_(
    params, grads, seed, *, streams, epsilon, together, keep_probability, step
) -> None:
    """Adds b * eps * g/||g|| to theta, the norm of each tensor, or over all of them
    `together`. Two launches a kind of tensors.
    """
    if not len(params) == len(grads) == len(streams):
        raise RuntimeError("params, grads and streams must be of one length")
    for theta, g in zip(params, grads, strict=True):
        _check_placement(g, theta, "grads", "params")
    at = [i for i, theta in enumerate(params) if theta.numel()]
    if not at or epsilon == 0:
        return
    device, longest = params[at[0]].device, max(params[i].numel() for i in at)
    size = _part(sum(params[i].numel() for i in at) if together else longest)
    g = [grads[i].to(params[i].dtype).contiguous() for i in at]
    counts = [triton.cdiv(params[i].numel(), size) for i in at]
    firsts = list(itertools.accumulate(counts, initial=0))[:-1]
    squares = torch.empty(sum(counts), dtype=torch.float64, device=device)
    numbers = Numbers.of(
        seed, step=step, keep_probability=keep_probability, epsilon=epsilon, radius=None
    )
    form = Form(
        BLOCK=BLOCK,
        LINF=False,
        PROJECTS=False,
        RANDOM=seed is not None,
        IN_ORDER=True,
        STAGE=0,
        ALIGNED=False,
        STORAGE=None,
        FULL=False,
    )
    theta = [params[i] for i in at]
    visits = [(0, list(range(len(at)))), *((2, positions) for positions in _rounds(theta))]
    with triton_ops.on(theta[0]):
        for stage, positions in visits:
            for kind in _kinds(positions, theta, g):
                rows = [
                    WeightRow(
                        gradient=g[k].data_ptr(),
                        weight=values.data_ptr(),
                        size=values.numel(),
                        stream=streams[at[k]],
                        first=0 if together else firsts[k],
                        parts_of_group=len(squares) if together else counts[k],
                        number=firsts[k],
                    )
                    for k, values in zip(kind.positions, kind.dense, strict=True)
                ]
                pieces = triton_ops.pieces([counts[k] for k in kind.positions])
                table = [x for row in rows for x in row]
                part_kernel[(len(pieces),)](
                    items_ptr=triton_ops.to_device(pieces, torch.int32, device),
                    table_ptr=triton_ops.to_device(table, torch.int64, device),
                    g_ptr=None,
                    x_ptr=None,
                    out_ptr=None,
                    mask_ptr=None,
                    token=1,
                    length=1,
                    size=size,
                    parts=1,
                    squares_ptr=squares,
                    moved_squares_ptr=squares,
                    **numbers._asdict(),
                    form=_constexprs(
                        form._replace(
                            STAGE=stage, ALIGNED=kind.aligned, STORAGE=triton_ops.DTYPES[kind.dtype]
                        )
                    ),
                    **triton_ops.compile_options(4),
                )
                for k, values in zip(kind.positions, kind.dense, strict=True) if stage else ():
                    if values is not theta[k]:
                        theta[k].copy_(values)


def _rounds(params: list[Tensor]) -> list[list[int]]:
    """Returns positions whose tensors may be written together: one that stands there twice is
    written twice, one after the other.
    """
    # position by address
    rounds: list[dict[int, int]] = []
    for i, theta in enumerate(params):
        address = theta.data_ptr()
        free = next((positions for positions in rounds if address not in positions), None)
        if free is None:
            free = {}
            rounds.append(free)
        free[address] = i
    return [list(positions.values()) for positions in rounds]


class Kind(typing.NamedTuple):
    """Holds the weights that one launch takes."""

    dtype: torch.dtype
    # all addresses are multiples of 16 bytes
    aligned: bool
    positions: list[int]
    # made so where they are not
    dense: list[Tensor]


def _kinds(some: list[int], params: list[Tensor], grads: list[Tensor]) -> list[Kind]:
    """Sorts weights by what they are launched with."""
    kinds: dict[tuple[torch.dtype, bool], Kind] = {}
    for k in some:
        theta = params[k].contiguous()
        aligned = (theta.data_ptr() | grads[k].data_ptr()) % 16 == 0
        kind = kinds.setdefault((theta.dtype, aligned), Kind(theta.dtype, aligned, [], []))
        kind.positions.append(k)
        kind.dense.append(theta)
    return list(kinds.values())


def _check_placement(a: Tensor, b: Tensor, a_name: str, b_name: str) -> None:
    """Raises what a kernel would not survive."""
    for x, name in ((a, a_name), (b, b_name)):
        triton_ops.check_dtype(name, x)
    if a.shape != b.shape:
        raise RuntimeError(f"{a_name} and {b_name} must have the same shape")


def _check_seed(seed: Tensor | None) -> None:
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise RuntimeError("seed must be an int64")


def _check_mask(mask: Tensor | None, grad: Tensor) -> None:
    if mask is not None and mask.shape != grad.shape[: mask.dim()]:
        raise RuntimeError("mask must have the gradient's first axes")
