"""The perturbations in plain PyTorch: Eq. 2, PGD's step, weights moved along their gradient; the
specification in code.

Norms and scales are computed in double, so that no norm of float32 elements overflows or vanishes;
results are rounded once. The functions that end with `_` have the operators' arguments (op.py).
"""

import math

import torch
from torch import Tensor

from ..core import philox


def rows(x: Tensor, per: str) -> Tensor:
    """Returns x in double as [groups, elements]: a group has one norm."""
    length = {
        "sample": math.prod(x.shape[1:]),
        "token": x.shape[-1] if x.dim() else 1,
        "all": x.numel(),
    }[per]
    groups = {"sample": x.shape[0] if x.dim() else 1, "token": math.prod(x.shape[:-1]), "all": 1}[
        per
    ]
    return x.to(torch.float64).reshape(groups, length)


def masked(g: Tensor, mask: Tensor | None) -> Tensor:
    """Returns g where the mask, of g's first axes, is not zero, else 0; what padding holds does not
    matter, NaN included.
    """
    return (
        g
        if mask is None
        else torch.where((mask != 0).reshape(*mask.shape, *[1] * (g.dim() - mask.dim())), g, 0)
    )


def norms(g: Tensor) -> Tensor:
    """Computes the L2 norm of each row, [groups, 1]."""
    lengths: Tensor = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    return lengths


def direction(g: Tensor, length: Tensor, norm: str) -> Tensor:
    """Computes g/length or sign(g); 0 where the norm is 0 or not finite.

    No constant is added to the norm: it would shrink small gradients.
    """
    return torch.where(
        (length > 0) & length.isfinite(), g.sign() if norm == "linf" else g / length, 0
    )


def project(delta: Tensor, radius: float, norm: str) -> Tensor:
    """Returns the nearest point of the ball: delta * min(1, radius/||delta||), or every element
    clamped.
    """
    if norm != "l2":
        return delta.clamp(-radius, radius)
    return torch.where(norms(delta) > radius, delta * (radius / norms(delta)), delta)


def kept(
    like: Tensor, seed: Tensor | None, *, keep_probability: float, step: int, stream: int
) -> Tensor | float:
    """Returns 1 where u < keep_probability, else 0, in the shape of `like`; 1 without a seed."""
    if seed is None:
        return 1.0
    word = philox.words(
        philox.element_indices(like.numel(), (0, like.numel(), like.numel()), like.device),
        seed=seed,
        step=step,
        stream=stream,
    )
    return (
        (philox.uniform(word, torch.float64) < keep_probability).to(torch.float64).view(like.shape)
    )


def fgm_perturbation_(
    grad: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    *,
    epsilon: float,
    norm: str,
    per: str,
    keep_probability: float,
    step: int,
) -> None:
    """Writes delta = b * eps * g/||g|| (Eq. 2), or b * eps * sign(g), into `out`."""
    g = rows(masked(grad, mask), per)
    b = kept(grad, seed, keep_probability=keep_probability, step=step, stream=0)
    out.copy_((epsilon * direction(g, norms(g), norm)).view(grad.shape) * b)


def pgd_step_(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    out: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: str,
    per: str,
) -> None:
    """Writes delta + step_size * g/||g|| (or sign(g), or g/max |g|), projected, into `out`."""
    g = rows(masked(grad, mask), per)
    length = g.abs().amax(1, keepdim=True) if norm == "max" and g.numel() else norms(g)
    out.copy_(
        project(rows(delta, per) + step_size * direction(g, length, norm), radius, norm).view(
            delta.shape
        )
    )


def perturb_weights_(
    params: list[Tensor],
    grads: list[Tensor],
    seed: Tensor | None,
    *,
    streams: list[int],
    epsilon: float,
    together: bool,
    keep_probability: float,
    step: int,
) -> None:
    """Moves the weights: theta <- theta + b * eps * g/||g||, the norm of each tensor, or over all
    of them `together`.
    """
    lengths = [norms(rows(g, "all")) for g in grads]
    if together:
        lengths = [norms(torch.cat(lengths, 1))] * len(grads)
    for theta, g, length, stream in zip(params, grads, lengths, streams, strict=True):
        b = kept(g, seed, keep_probability=keep_probability, step=step, stream=stream)
        theta.copy_(
            theta.to(torch.float64)
            + epsilon * direction(rows(g, "all"), length, "l2").view(g.shape) * b
        )
