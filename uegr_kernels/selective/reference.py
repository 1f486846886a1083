"""The selective step in plain PyTorch: Eq. 7-9 and Algorithm 1, lines 10-13; the specification in
code.

The functions that end with `_` have the operators' arguments (op.py), the options as objects; the
rest is the mathematics.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import philox
from .options import (
    RANK_BINS,
    RANK_SAMPLED,
    SMALLEST_PROBABILITY,
    AdamWOptions,
    Selection,
    SGDOptions,
    StepOptions,
)

Number = float | Tensor
# steps a tensor in place, by its value, its selected gradient, its states and the step's number
UpdateRule = Callable[[Tensor, Tensor, Sequence[Tensor], int], None]


class Layout(NamedTuple):
    """Names a tensor's stream, and where its elements lie in the unsharded tensor: local element l
    has the index offset + (l // run)*stride + l % run.
    """

    stream: int
    offset: int
    run: int
    stride: int

    def indices(self, n: int, device: torch.device) -> Tensor:
        """Returns the indices of n elements."""
        return philox.element_indices(n, (self.offset, self.run, self.stride), device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of arithmetic and moments: float32, for float64 tensors float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitude(g: Tensor, saliency: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns |g|, or the root of a given saliency, 0 where not finite; and which elements are
    finite.
    """
    finite = g.isfinite() if saliency is None else g.isfinite() & saliency.isfinite()
    return torch.where(
        finite, g.abs() if saliency is None else saliency.to(g.dtype).sqrt(), 0
    ), finite


def square(g: Tensor, saliency: Tensor | None) -> Tensor:
    """Returns s = g*g (Eq. 7), the largest float where that overflows; or the given saliency."""
    s = g * g if saliency is None else saliency.to(g.dtype)
    return s.nan_to_num(0).clamp(max=torch.finfo(g.dtype).max)


def bins(magnitudes: Tensor) -> Tensor:
    """Returns the histogram's bin: the upper 16 bits of the float32 below or at the magnitude."""
    rounded = magnitudes.float()
    rounded = torch.where(
        rounded > magnitudes, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded
    )
    return rounded.view(torch.int32).long() >> 16


def rank_stride(size: int) -> int:
    """Returns k, where a rank over so many elements takes every k-th."""
    return size // RANK_SAMPLED | 1 if size > RANK_SAMPLED else 1


def histogram(magnitudes: Tensor, finite: Tensor, layout: Layout, size: int) -> Tensor:
    """Counts by bin, over every k-th element of a large tensor, each counting k times."""
    every = rank_stride(size)
    indices = layout.indices(finite.numel(), finite.device).view(finite.shape)
    taken = finite & (indices % every == 0)
    return torch.bincount(bins(magnitudes[taken]), minlength=RANK_BINS) * every


def extremes(g: Tensor, saliency: Tensor | None) -> Tensor:
    """Returns the minimum and maximum of s over the finite elements, in double; (inf, -inf) where
    there is none, so that max - min is negative.
    """
    s = square(g, saliency)[magnitude(g, saliency)[1]].double()
    return torch.stack((s.amin(), s.amax())) if s.numel() else s.new_tensor((torch.inf, -torch.inf))


def normalise(
    g: Tensor, saliency: Tensor | None, statistics: Tensor | None, selection: Selection
) -> Tensor:
    """Normalises s: s~ (Eq. 8). `statistics`: (min, max) or a histogram; None: this tensor's own,
    the rank then exact.
    """
    s = square(g, saliency)
    if selection.normalization == "rank":
        magnitudes, finite = magnitude(g, saliency)
        if statistics is None:
            ordered = s[finite].sort().values
            return (torch.searchsorted(ordered, s.contiguous()) / max(ordered.numel(), 1)).to(
                s.dtype
            )
        # every finite s of the scope, in order
        if statistics.is_floating_point():
            return (
                torch.searchsorted(statistics, s.double().contiguous()) / max(statistics.numel(), 1)
            ).to(s.dtype)
        below = statistics.cumsum(0) - statistics
        return (below / statistics.sum().clamp(min=1))[bins(magnitudes)].to(s.dtype)
    low, high = (
        (extremes(g, saliency) if statistics is None else statistics)
        .to(s.device, s.dtype)
        .clamp(max=torch.finfo(s.dtype).max)
    )
    span = high - low
    scaled = torch.where(
        span > 0, ((s - low) if selection.normalization == "minmax" else s) / span, 0
    )
    return scaled.clamp(0, 1) if selection.statistics == "previous" else scaled


def finite_saliency(
    grads: list[Tensor], saliencies: list[Tensor], grad_scale: Tensor | None
) -> Tensor:
    """Returns every finite s of the tensors, in double on the CPU: what an exact rank over a wider
    scope needs, once they are in order.
    """
    found = []
    for i, grad in enumerate(grads):
        g = unscaled(grad, grad_scale)
        saliency = saliencies[i] if saliencies else None
        found.append(square(g, saliency)[magnitude(g, saliency)[1]].double().cpu())
    return torch.cat(found)


def inverse_probability(
    g: Tensor, saliency: Tensor | None, statistics: Tensor | None, selection: Selection
) -> Tensor:
    """Computes 1/p = min(1 + exp(z), 1/smallest) with z = d * 2*sharpness*(s~ - threshold) (Eq. 9):
    no division; 1 where not finite.
    """
    if selection.normalization == "constant":
        inverse = torch.full_like(g, 1 / selection.keep_probability)
    else:
        d = 1.0 if selection.direction == "printed" else -1.0
        s = normalise(g, saliency, statistics, selection)
        inverse = 1 + torch.exp(d * 2 * selection.sharpness * (s - selection.threshold))
    inverse = inverse.clamp(max=1 / max(selection.min_probability, SMALLEST_PROBABILITY))
    return torch.where(magnitude(g, saliency)[1], inverse, 1)


def draw(inverse: Tensor, layout: Layout, *, seed: int, step: int) -> Tensor:
    """Draws b: u < p, which is u * (1/p) < 1 without a division."""
    indices = layout.indices(inverse.numel(), inverse.device)
    word = philox.words(indices, seed=seed, step=step, stream=layout.stream).view(inverse.shape)
    return philox.uniform(word, inverse.dtype) * inverse < 1


def select(
    g: Tensor,
    saliency: Tensor | None,
    statistics: Tensor | None,
    layout: Layout,
    selection: Selection,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Returns b, and the factor of a selected element: 1/p, or 1 without `rescale`."""
    inverse = inverse_probability(g, saliency, statistics, selection)
    b = draw(inverse, layout, seed=seed, step=step)
    return b, inverse if selection.rescale else torch.ones_like(inverse)


def round_stochastically(x: Tensor, word: Tensor) -> Tensor:
    """Rounds to bfloat16 whose mean over a uniform 16-bit word is x: add the word below the kept
    bits, then cut.
    """
    x = x.float()
    cut = (x.view(torch.int32) + word.to(torch.int32)) & -65536
    return torch.where(x.isfinite(), cut.view(torch.float32), x).bfloat16()


def adamw_update_rule(
    theta: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: int,
    lr: Number,
    weight_decay: float,
    beta1: Number,
    beta2: Number,
    eps: float,
) -> None:
    """Steps one tensor by AdamW, in torch.optim.AdamW's own operations and order."""
    if weight_decay != 0:
        theta.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    # addcmul_ takes a tensor too, whatever its type says
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # type: ignore[arg-type]
    if max_exp_avg_sq is not None:
        # clones: autograd keeps both
        max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq.clone(), exp_avg_sq.clone()))
    second = exp_avg_sq if max_exp_avg_sq is None else max_exp_avg_sq
    denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    step_size = lr / (1 - beta1**step)
    if isinstance(step_size, Tensor) and step_size.requires_grad:
        theta.addcdiv_(exp_avg.clone(), denominator / -step_size)
    else:
        theta.addcdiv_(
            exp_avg.clone() if exp_avg.requires_grad else exp_avg,
            denominator,
            value=-float(step_size),
        )


def sgd_update_rule(
    theta: Tensor,
    g: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: Number,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> None:
    """Steps one tensor by SGD, in torch.optim.SGD's own operations and order."""
    if weight_decay != 0:
        g = g.add(theta, alpha=weight_decay)
    if momentum_buffer is not None:
        # A buffer starts as -0.0, which no update leaves behind (+ 0.0): its first value is g
        # itself, without dampening.
        fresh = (momentum_buffer == 0) & momentum_buffer.signbit()
        moved = (momentum_buffer * momentum).add(g, alpha=1 - dampening)
        momentum_buffer.copy_(torch.where(fresh, g, moved) + 0.0)
        g = g.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    if isinstance(lr, Tensor) and lr.requires_grad:
        theta.addcmul_(g.clone(), lr, value=-1)
    else:
        theta.add_(g, alpha=-float(lr))


def layouts(layout: list[int]) -> list[Layout]:
    """Takes apart the flat list of every tensor's stream, offset, run and stride."""
    return [Layout(*layout[i : i + 4]) for i in range(0, len(layout), 4)]


def unscaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    """Returns g in the arithmetic's dtype, without the loss scale."""
    g = grad.to(compute_dtype(grad.dtype))
    return g if grad_scale is None else g / grad_scale.to(g.device, g.dtype)


def row(statistics: Tensor | None, i: int) -> Tensor | None:
    """Returns tensor i's row of the scope's statistics: its own, or the one for all; the ordered
    s of a scope (one axis) has no rows.
    """
    return (
        statistics
        if statistics is None or statistics.dim() == 1
        else statistics[min(i, len(statistics) - 1)]
    )


def number(value: float, tensor: Tensor | None) -> Number:
    """Returns an option that may have been given as a tensor of one element."""
    return value if tensor is None else tensor.reshape(())


def step_(
    update_rule: UpdateRule,
    params: list[Tensor],
    grads: list[Tensor],
    moments: Sequence[Sequence[Tensor]],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    common: StepOptions,
) -> None:
    """Steps every tensor (Algorithm 1, lines 10-13); `moments`: by tensor the states that
    `update_rule` takes. Does nothing where `found_inf` is set.
    """
    if common.found_inf is not None and common.found_inf.item():
        return
    selection, seed = common.selection, common.seed
    for i, (param, grad, states, layout) in enumerate(
        zip(params, grads, moments, layouts(common.layout), strict=True)
    ):
        dtype = compute_dtype(param.dtype)
        g = unscaled(grad.to(dtype), common.grad_scale)
        steps[i] += 1
        step = int(steps[i].item())
        # p and b are constants
        with torch.no_grad():
            statistics = row(common.scope_statistics, i)
            if selection.statistics == "previous":
                kept, this = (
                    torch.stack((saliency_mins[i], saliency_maxs[i])).to(g.device),
                    extremes(g, None),
                )
                statistics = (
                    torch.where(kept.isnan(), this.to(kept.dtype), kept)
                    if statistics is None
                    else statistics
                )
                saliency_mins[i].copy_(this[0])
                saliency_maxs[i].copy_(this[1])
            b, factor = select(g, None, statistics, layout, selection, seed=seed, step=step)
            word = None
            if any(m.dtype == torch.bfloat16 for m in states):
                word = philox.words(
                    layout.indices(g.numel(), g.device),
                    seed=seed,
                    step=step,
                    stream=layout.stream,
                    rounding=True,
                ).view(g.shape)
        g = -g if common.maximize else g
        if selection.target == "gradient":
            g = torch.where(b, g * factor, 0)
        theta = param if param.dtype == dtype else param.to(dtype)
        before = theta.clone() if selection.target == "update" else None
        working = [m if m.dtype == dtype else m.to(dtype) for m in states]
        update_rule(theta, g, working, step)
        if before is not None:
            moved = torch.lerp(before, theta.clone(), factor)
            # An infinite difference, or none between infinities, leaves `theta` as it is.
            theta.copy_(torch.where(b, torch.where(moved.isnan(), theta, moved), before))
        if theta is not param:
            param.copy_(theta)
        for k, (m, value) in enumerate(zip(states, working, strict=True)):
            if m is not value:
                m.copy_(
                    value
                    if word is None
                    else round_stochastically(value, word & 0xFFFF if k == 0 else word >> 16)
                )


def selective_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    common: StepOptions,
    own: AdamWOptions,
) -> None:
    """Steps by AdamW on g~ (target "gradient"), or takes AdamW's step where b ("update")."""

    def update_rule(theta: Tensor, g: Tensor, states: Sequence[Tensor], step: int) -> None:
        exp_avg, exp_avg_sq, *largest = states
        adamw_update_rule(
            theta,
            g,
            exp_avg,
            exp_avg_sq,
            largest[0] if largest else None,
            step=step,
            lr=number(common.lr, common.lr_tensor),
            weight_decay=common.weight_decay,
            beta1=number(own.beta1, own.beta1_tensor),
            beta2=number(own.beta2, own.beta2_tensor),
            eps=own.eps,
        )

    used = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs] if max_exp_avg_sqs else [exp_avgs, exp_avg_sqs]
    moments = [*zip(*used, strict=True)]
    step_(update_rule, params, grads, moments, steps, saliency_mins, saliency_maxs, common)


def selective_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    common: StepOptions,
    own: SGDOptions,
) -> None:
    """Steps by SGD on g~ (target "gradient"), or takes SGD's step where b ("update")."""

    def update_rule(theta: Tensor, g: Tensor, states: Sequence[Tensor], step: int) -> None:
        sgd_update_rule(
            theta,
            g,
            states[0] if states else None,
            lr=number(common.lr, common.lr_tensor),
            weight_decay=common.weight_decay,
            momentum=own.momentum,
            dampening=own.dampening,
            nesterov=own.nesterov,
        )

    moments: list[tuple[Tensor, ...]] = [(buffer,) for buffer in momentum_buffers]
    moments = moments or [()] * len(params)
    step_(update_rule, params, grads, moments, steps, saliency_mins, saliency_maxs, common)


def select_gradients_(
    grads: list[Tensor],
    saliencies: list[Tensor],
    *,
    scope_statistics: Tensor | None,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selection,
) -> None:
    """Writes b*g/p (b*g without `rescale`) over g, element by element."""
    for i, (grad, place) in enumerate(zip(grads, layouts(layout), strict=True)):
        g = grad.to(compute_dtype(grad.dtype))
        b, factor = select(
            g,
            saliencies[i] if saliencies else None,
            row(scope_statistics, i),
            place,
            selection,
            seed=seed,
            step=step,
        )
        grad.copy_(torch.where(b, g * factor, 0))


def selective_statistics_(
    grads: list[Tensor],
    saliencies: list[Tensor],
    mins: list[Tensor],
    maxs: list[Tensor],
    *,
    layout: list[int],
    sizes: list[int],
    normalization: str,
    grad_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Joins (min, max) or the histogram of s into `out`: one row for all tensors, or a row
    each. The extremes in `mins` and `maxs`, kept from the previous step, stand for their tensors.
    """
    for i, (grad, place) in enumerate(zip(grads, layouts(layout), strict=True)):
        g = unscaled(grad, grad_scale)
        saliency, into = saliencies[i] if saliencies else None, out[min(i, len(out) - 1)]
        if normalization == "rank":
            into += histogram(*magnitude(g, saliency), place, sizes[i] if sizes else g.numel()).to(
                out.device
            )
        else:
            low, high = extremes(g, saliency).to(out.device)
            if mins:
                kept = torch.stack((mins[i], maxs[i])).to(out)
                low, high = torch.where(kept.isnan(), torch.stack((low, high)), kept)
            into.copy_(torch.stack((torch.minimum(into[0], low), torch.maximum(into[1], high))))


def selection_probability_(
    grad: Tensor, saliency: Tensor | None, *, out: Tensor, selection: Selection
) -> None:
    """Writes p of every element into `out`."""
    out.copy_(1 / inverse_probability(grad.to(out.dtype), saliency, None, selection))


def selection_mask_(
    grad: Tensor,
    saliency: Tensor | None,
    *,
    out: Tensor,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selection,
) -> None:
    """Draws b of every element into `out`."""
    g = grad.to(compute_dtype(grad.dtype))
    out.copy_(select(g, saliency, None, layouts(layout)[0], selection, seed=seed, step=step)[0])
