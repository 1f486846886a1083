"""Adaptive dropout in plain PyTorch: rates from gradient norms, masks from Philox; the
specification in code.

A unit j is an index of the last axis, n_j the moving average of ||dL/dh_j||_2 (h: the output), r_j
= clamp(p * n_j / mean(n), 0, max_p). The functions have the operators' arguments (op.py).
"""

import torch
from torch import Tensor

from ..core import philox


def dropout_rates_(
    gradient_norm: Tensor, pending: Tensor, *, p: float, max_p: float, momentum: float, fold: bool
) -> Tensor:
    """Computes r [F]. With `fold` the root of what backwards left in `pending` goes into n before;
    the first one sets n. No branch on values.
    """
    n = gradient_norm
    if fold:
        new = pending.sqrt()
        moved = torch.where((n == 0).all(), new, momentum * n + (1 - momentum) * new)
        gradient_norm.copy_(torch.where((pending > 0).any(), moved, n))
        pending.zero_()
    return torch.where((n == 0).all(), p, (p * n / n.mean()).clamp(0, max_p)).to(n.dtype)


def kept(like: Tensor, rates: Tensor, key: Tensor) -> Tensor:
    """Returns which elements stay: not u < r_j, u of counter (q, 0, 0) under the call's key."""
    word = philox.words(torch.arange(like.numel(), device=like.device), seed=key, step=0, stream=0)
    return philox.uniform(word, rates.dtype).view(like.shape) >= rates


def adaptive_dropout(h: Tensor, rates: Tensor, key: Tensor, pending: Tensor | None) -> Tensor:
    """Computes h/(1 - r_j) where kept, else 0. `pending` is for the backward, which adds to it."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return torch.where(kept(h, rates, key), wide / (1 - rates), 0).to(h.dtype).contiguous()


def adaptive_dropout_backward(grad: Tensor, rates: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Computes dL/dinput by the same mask, and the squared norm of dL/dh_j over other axes [F]."""
    squares = grad.to(torch.float64).reshape(-1, grad.shape[-1]).square().sum(0)
    return adaptive_dropout(grad, rates, key, None), squares.to(rates.dtype)


def add_squares_(pending: Tensor, squares: Tensor) -> None:
    """Adds squared norms to `pending`; what is not finite is dropped."""
    total = pending + squares
    pending.copy_(torch.where(total.isfinite(), total, pending))
