"""Perturbations in Triton: Eq. 2, PGD's step and ball, DropAttack's mask. Norms and scales are
double, as the reference's.

A group of elements has one norm: a sample, a token, a tensor, or all. One that a block holds is a
program's, start to end; longer ones are parts of a fixed size, whose sums of squares are kept and
added up by each program of the next launch, in the parts' order.
"""

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import triton_ops
from ..core.triton_ops import from_bits

WHOLE = 4096  # elements of a group that a program holds
BLOCK = 1024  # of a longer one's at a time
PART, PARTS = 1 << 14, 1024  # elements of a part, at least; parts of a group, about at most
SUMS = tl.constexpr(1024)  # sums of parts at a time
INFINITY = tl.constexpr(float("inf"))

# ---- The formulas


@triton.jit
def direction_factor(squares, epsilon, LINF: tl.constexpr):
    """What a group's g (or sign(g)) is multiplied by: eps/||g||, or eps; 0 where the norm is 0
    or not finite.
    """
    length = tl.sqrt(squares)
    factor = tl.zeros_like(length) + epsilon
    if not LINF:
        factor = factor / length
    return tl.where((length > 0) & (length < INFINITY), factor, 0.0)


@triton.jit
def ball_factor(squares, radius):
    """What a group is multiplied by to lie in the ball: radius/||delta||, or 1."""
    length = tl.sqrt(squares)
    return tl.where(length > radius, radius / length, 1.0)


@triton.jit
def step_along(g, factor, LINF: tl.constexpr):
    """eps * g/||g||, or eps * sign(g). A factor of 0 stops whatever g is."""
    along = g
    if LINF:
        along = (g > 0).to(tl.float64) - (g < 0).to(tl.float64)
    return tl.where(factor > 0, along * factor, 0.0)


@triton.jit
def kept(step, word, limit):
    """b * step; u < p is (word >> 8) < limit = ceil(p * 2^24)."""
    return tl.where((word >> 8).to(tl.int32) < limit, step, 0.0)


@triton.jit
def projected(x, factor, radius, LINF: tl.constexpr):
    """The nearest point of the ball; NaN stays."""
    if LINF:
        return tl.where(x > radius, radius, tl.where(x < -radius, -radius, x))
    else:
        return x * factor


# ---- Elements


@triton.jit
def wide(x, begin, i, end, FULL: tl.constexpr):
    """Elements begin + i of x in double, 0 from `end` on."""
    if FULL:
        return tl.load(x + begin + i).to(tl.float64)
    else:
        return tl.load(x + begin + i, mask=begin + i < end, other=0.0).to(tl.float64)


@triton.jit
def gradient(g, mask, token, begin, i, end, FULL: tl.constexpr):
    """The same of g, 0 where the mask has it, each of whose numbers is for `token` elements."""
    out = wide(g, begin, i, end, FULL)
    if mask is not None:
        if token.dtype == tl.int32:
            within = ((begin % token).to(tl.uint32) + i.to(tl.uint32)) // token.to(tl.uint32)
        else:
            within = (begin % token + i) // token
        real = tl.load(mask + begin // token + within, mask=begin + i < end, other=0)
        out = tl.where(real != 0, out, 0.0)
    return out


@triton.jit
def moved(
    g,
    x,
    factor,
    limit,
    seed,
    step,
    stream,
    begin,
    i,
    end,
    LINF: tl.constexpr,
    RANDOM: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FULL: tl.constexpr,
):
    """x + b * step; without x the step. g: its block in double."""
    out = step_along(g, factor, LINF)
    if RANDOM:
        if IN_ORDER:
            word = triton_ops.words_in_order(begin, seed, step, stream, i.shape[0])
        else:
            word = triton_ops.words(begin + i, seed, step, stream)
        out = kept(out, word, limit)
    if x is not None:
        out = wide(x, begin, i, end, FULL) + out
    return out


@triton.jit
def write(out, begin, i, end, value, FULL: tl.constexpr):
    value = triton_ops.nearest(value, out.dtype.element_ty)
    if FULL:
        tl.store(out + begin + i, value)
    else:
        tl.store(out + begin + i, value, mask=begin + i < end)


@triton.jit
def key(seed_at, seed):
    """The mask's key, beside the tensors or as a number."""
    if seed_at is not None:
        return tl.load(seed_at)
    else:
        return seed


# ---- Kernels and their launches


@triton.jit(do_not_specialize=["token", "epsilon", "radius", "limit", "seed", "step"])
def group_kernel(
    g,
    x,
    out,
    mask,
    token,
    length,
    seed_at,
    seed: tl.int64,
    step: tl.int64,
    limit,
    epsilon: tl.int64,
    radius: tl.int64,
    BLOCK: tl.constexpr,
    LINF: tl.constexpr,
    PROJECTS: tl.constexpr,
    RANDOM: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FULL: tl.constexpr,
):
    """A group from its norm to its step: one visit."""
    begin = tl.program_id(0).to(tl.int64) * length
    end, i, seed = begin + length, tl.arange(0, BLOCK), key(seed_at, seed)
    along = gradient(g, mask, token, begin, i, end, FULL)
    factor = direction_factor(tl.sum(along * along, 0), from_bits(epsilon), LINF)
    value = moved(
        along, x, factor, limit, seed, step, begin * 0, begin, i, end, LINF, RANDOM, IN_ORDER, FULL
    )
    if PROJECTS:
        radius = from_bits(radius)
        value = projected(
            value,
            ball_factor(tl.sum(tl.where(begin + i < end, value * value, 0.0), 0), radius),
            radius,
            LINF,
        )
    write(out, begin, i, end, value, FULL)


@triton.jit
def total(sums, first, count):
    """A group's squares from those of its parts."""
    found = tl.zeros([SUMS], tl.float64)
    for at in range(0, count, SUMS):
        i = at + tl.arange(0, SUMS)
        found += tl.load(sums + first + i, mask=i < count, other=0.0)
    return tl.sum(found, 0)


@triton.jit(
    do_not_specialize=["token", "epsilon", "radius", "limit", "seed", "step", "size", "parts"]
)
def part_kernel(
    items,
    table,
    g,
    x,
    out,
    mask,
    token,
    length,
    size: tl.int64,
    parts: tl.int64,
    squares,
    moved_squares,
    seed_at,
    seed: tl.int64,
    step: tl.int64,
    limit,
    epsilon: tl.int64,
    radius: tl.int64,
    STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINF: tl.constexpr,
    PROJECTS: tl.constexpr,
    RANDOM: tl.constexpr,
    IN_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORAGE: tl.constexpr,
):
    """A part of a group. STAGE 0: the squares of g; 1: those of x + step, for the ball; 2: the
    step.

    The parts of one tensor's groups follow each other; those of many tensors are listed in `items`,
    and `table` has the tensors.
    """
    program = tl.program_id(0).to(tl.int64)
    if items is not None:
        row = table + tl.load(items + 2 * program).to(tl.int64) * 7
        part = tl.load(items + 2 * program + 1).to(tl.int64)
        if ALIGNED:
            g, x = (
                triton_ops.aligned_pointer(tl.load(row), STORAGE),
                triton_ops.aligned_pointer(tl.load(row + 1), STORAGE),
            )
        else:
            g, x = (
                triton_ops.pointer(tl.load(row), STORAGE),
                triton_ops.pointer(tl.load(row + 1), STORAGE),
            )
        begin, end, stream = part * size, tl.load(row + 2), tl.load(row + 3)
        first, parts, number = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6) + part
        out = x
    else:
        number, stream = program, program * 0
        begin = program // parts * length + program % parts * size
        end = (program // parts + 1) * length
        first = program // parts * parts
    end, i, seed = tl.minimum(begin + size, end), tl.arange(0, BLOCK), key(seed_at, seed)
    factor, ball, radius = 0.0, 1.0, from_bits(radius)
    if STAGE > 0:
        factor = direction_factor(total(squares, first, parts), from_bits(epsilon), LINF)
    if PROJECTS and not LINF and STAGE == 2:
        ball = ball_factor(total(moved_squares, first, parts), radius)
    sums = tl.zeros([BLOCK], tl.float64)
    whole = ((end - begin) // BLOCK).to(tl.int32)
    for block in range(whole):
        at = begin + block * BLOCK
        if ALIGNED:
            at = tl.multiple_of(at, 16)
        sums = visit(
            at,
            end,
            i,
            sums,
            g,
            x,
            out,
            mask,
            token,
            factor,
            ball,
            radius,
            limit,
            seed,
            step,
            stream,
            STAGE,
            LINF,
            PROJECTS,
            RANDOM,
            IN_ORDER,
            True,
        )
    if begin + whole * BLOCK < end:
        sums = visit(
            begin + whole * BLOCK,
            end,
            i,
            sums,
            g,
            x,
            out,
            mask,
            token,
            factor,
            ball,
            radius,
            limit,
            seed,
            step,
            stream,
            STAGE,
            LINF,
            PROJECTS,
            RANDOM,
            IN_ORDER,
            False,
        )
    if STAGE == 0:
        tl.store(squares + number, tl.sum(sums, 0))
    if STAGE == 1:
        tl.store(moved_squares + number, tl.sum(sums, 0))


@triton.jit
def visit(
    at,
    end,
    i,
    sums,
    g,
    x,
    out,
    mask,
    token,
    factor,
    ball,
    radius,
    limit,
    seed,
    step,
    stream,
    STAGE: tl.constexpr,
    LINF: tl.constexpr,
    PROJECTS: tl.constexpr,
    RANDOM: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FULL: tl.constexpr,
):
    """A block of a part: adds its squares, or writes it."""
    value = gradient(g, mask, token, at, i, end, FULL)
    if STAGE > 0:
        value = moved(
            value, x, factor, limit, seed, step, stream, at, i, end, LINF, RANDOM, IN_ORDER, FULL
        )
    if STAGE == 2:
        if PROJECTS:
            value = projected(value, ball, radius, LINF)
        write(out, at, i, end, value, FULL)
        return sums
    else:
        return sums + tl.where(at + i < end, value * value, 0.0)


def _part(longest: int) -> int:
    """Elements of a part where the longest group has so many."""
    return max(PART, -(-longest // (PARTS * BLOCK)) * BLOCK)


def _key(seed: Tensor | None) -> tuple[Tensor | None, int]:
    """A seed as the kernels take it: a 0-d tensor beside the others, or on the CPU."""
    if seed is None or seed.is_cuda:
        return seed, 0
    return None, int(seed.item())


def _limit(keep_probability: float) -> int:
    return math.ceil(keep_probability * 2**24)


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
    """out <- x + b * step, on the ball of `radius`."""
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
    seed_at, number = _key(seed)
    x, g, groups = None if x is None else x.contiguous(), grad.contiguous(), n // length
    numbers = (
        seed_at,
        number,
        step,
        _limit(keep_probability),
        triton_ops.bits(epsilon),
        triton_ops.bits(radius or 0.0),
    )
    form = {
        "LINF": norm == "linf",
        "PROJECTS": radius is not None,
        "RANDOM": seed is not None,
        "IN_ORDER": length % 4 == 0 or groups == 1,
    }
    with triton_ops.on(grad):
        if length <= WHOLE:
            block = max(triton.next_power_of_2(length), 4)
            warps = min(max(block // 512, 1), 8)
            group_kernel[(groups,)](
                g,
                x,
                out,
                mask,
                token,
                length,
                *numbers,
                BLOCK=block,
                FULL=block == length,
                num_warps=warps,
                **form,
            )
            return
        size = _part(length)
        parts = triton.cdiv(length, size)
        squares, again = g.new_empty(2, groups * parts, dtype=torch.float64)
        for stage in (0, 1, 2) if radius is not None and norm == "l2" else (0, 2):
            part_kernel[(groups * parts,)](
                None,
                None,
                g,
                x,
                out,
                mask,
                token,
                length,
                size,
                parts,
                squares,
                again,
                *numbers,
                STAGE=stage,
                BLOCK=BLOCK,
                ALIGNED=length % 16 == 0 or groups == 1,
                STORAGE=None,
                num_warps=4,
                **form,
            )


# ---- The operators, as reference.py has them.


def fgm_perturbation_(grad, mask, seed, out, *, epsilon, norm, per, keep_probability, step) -> None:
    """delta = b * eps * g/||g|| (Eq. 2), or b * eps * sign(g)."""
    _check_alike(grad, out, "grad", "out")
    _check_written(out)
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
    """delta + step_size * g/||g|| (or sign(g)), projected on the ball."""
    _check_alike(grad, delta, "grad", "delta")
    _check_alike(grad, out, "grad", "out")
    _check_written(out)
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
    """theta <- theta + b * eps * g/||g||, the norm of each tensor, or over all of them
    `together`. Two launches a kind of tensors.
    """
    if not len(params) == len(grads) == len(streams):
        raise RuntimeError("params, grads and streams must be of one length")
    for theta, g in zip(params, grads, strict=True):
        _check_alike(g, theta, "grads", "params")
    at = [i for i, theta in enumerate(params) if theta.numel()]
    if not at:
        return
    device, longest = params[at[0]].device, max(params[i].numel() for i in at)
    size = _part(sum(params[i].numel() for i in at) if together else longest)
    g = [grads[i].to(params[i].dtype).contiguous() for i in at]
    counts = [triton.cdiv(params[i].numel(), size) for i in at]
    firsts = list(itertools.accumulate(counts, initial=0))[:-1]
    squares = torch.empty(sum(counts), dtype=torch.float64, device=device)
    seed_at, number = _key(seed)
    numbers = (
        seed_at,
        number,
        step,
        _limit(keep_probability),
        triton_ops.bits(epsilon),
        triton_ops.bits(0.0),
    )
    options = {
        "LINF": False,
        "PROJECTS": False,
        "RANDOM": seed is not None,
        "IN_ORDER": True,
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    with triton_ops.on(params[at[0]]):
        for stage in (0, 2):
            for some in _rounds([params[i] for i in at]) if stage else [list(range(len(at)))]:
                for (dtype, aligned), dense, kind in _kinds(some, [params[i] for i in at], g):
                    rows = [
                        x
                        for k, theta in zip(kind, dense, strict=True)
                        for x in (
                            g[k].data_ptr(),
                            theta.data_ptr(),
                            theta.numel(),
                            streams[at[k]],
                            0 if together else firsts[k],
                            len(squares) if together else counts[k],
                            firsts[k],
                        )
                    ]
                    table = triton_ops.to_device(rows, torch.int64, device)
                    items = triton_ops.to_device(
                        triton_ops.pieces([counts[k] for k in kind]), torch.int32, device
                    )
                    part_kernel[(len(items),)](
                        items,
                        table,
                        None,
                        None,
                        None,
                        None,
                        1,
                        1,
                        size,
                        1,
                        squares,
                        squares,
                        *numbers,
                        STAGE=stage,
                        ALIGNED=aligned,
                        STORAGE=triton_ops.DTYPES[dtype],
                        **options,
                    )
                    if stage:
                        for k, theta in zip(kind, dense, strict=True):
                            if theta is not params[at[k]]:
                                params[at[k]].copy_(theta)


def _rounds(params: list[Tensor]) -> list[list[int]]:
    """Positions whose tensors may be written together: one that stands there twice is written
    twice, one after the other.
    """
    rounds: list[tuple[set[int], list[int]]] = []
    for i, theta in enumerate(params):
        free = next((r for r in rounds if theta.data_ptr() not in r[0]), None)
        if free is None:
            free = (set(), [])
            rounds.append(free)
        free[0].add(theta.data_ptr())
        free[1].append(i)
    return [positions for _, positions in rounds]


def _kinds(
    some: list[int], params: list[Tensor], grads: list[Tensor]
) -> list[tuple[tuple[Any, ...], list[Tensor], list[int]]]:
    """(dtype, whether all addresses are multiples of 16 bytes), the parameters, made dense,
    and their positions: what one launch takes.
    """
    kinds: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
    for k in some:
        theta = params[k].contiguous()
        kind = kinds.setdefault(
            (theta.dtype, (theta.data_ptr() | grads[k].data_ptr()) % 16 == 0), ([], [])
        )
        kind[0].append(theta)
        kind[1].append(k)
    return [(key, *value) for key, value in kinds.items()]


def _check_alike(a: Tensor, b: Tensor, a_name: str, b_name: str) -> None:
    """Raises what a kernel would not survive."""
    for x, name in ((a, a_name), (b, b_name)):
        if x.dtype not in triton_ops.DTYPES:
            raise RuntimeError(
                f"{name} is {str(x.dtype).removeprefix('torch.')}; use float32, "
                "bfloat16, float16 or float64"
            )
    if a.shape != b.shape:
        raise RuntimeError(f"{a_name} and {b_name} must have the same shape")


def _check_written(out: Tensor) -> None:
    if triton_ops.expanded(out):
        raise RuntimeError("out is expanded; give a tensor whose elements have memory of their own")


def _check_seed(seed: Tensor | None) -> None:
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise RuntimeError("seed must be an int64")


def _check_mask(mask: Tensor | None, grad: Tensor) -> None:
    if mask is not None and mask.shape != grad.shape[: mask.dim()]:
        raise RuntimeError("mask must have the gradient's first axes")
