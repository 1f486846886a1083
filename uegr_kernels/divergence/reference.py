"""The losses of the forward stage with their gradients, in plain PyTorch: Eq. 3-6; the
specification in code.

A row function takes rows [N, C] and returns a value per row [N] and its gradients [N, C].
`uegr_loss` and what follows have the operators' arguments (op.py).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .options import LossOptions


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of arithmetic and losses: float32, for float64 logits float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy(log_p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Computes -sum t log p, and its gradient p*sum(t) - t by the logits; a class with t = 0 adds
    nothing, not even where log p = -inf.
    """
    return -torch.where(t == 0, 0, t * log_p).sum(-1), log_p.exp() * t.sum(-1, keepdim=True) - t


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes JS(P||Q) (Eq. 4), its gradients p*(a - KL(P||M))/2 with a = log(p/M) by the logits
    of P, and the same of Q.

    With d = log p - log q and r = exp(-|d|) the more probable side has a = ln 2 - log(1 + r), the
    other that minus |d|. ln 2 - log(1 + r) = -log1p((r - 1)/2): no cancellation, and exactly 0 for
    d = 0.
    """
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    a = -torch.log1p(torch.expm1(-d.abs()) / 2)
    # a masked class has no share in its side's KL
    a_p = torch.where(log_p == -math.inf, 0, a + d.clamp(max=0))
    a_q = torch.where(log_q == -math.inf, 0, a - d.clamp(min=0))
    kl_p, kl_q = (p * a_p).sum(-1, keepdim=True), (q * a_q).sum(-1, keepdim=True)
    value = ((kl_p + kl_q) / 2).squeeze(-1).clamp(0, math.log(2))
    return value, a_p.sub_(kl_p).mul_(p).div_(2), a_q.sub_(kl_q).mul_(q).div_(2)


def squared_error(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the mean of (x - y)^2 over the row and its gradient by x; in the place of CE for
    regression.
    """
    return (x - y).square().mean(-1), 2 * (x - y) / x.shape[-1]


def squared_difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the mean of (x - y)^2 between two passes and both gradients; in the place of JS."""
    value, gradient = squared_error(x, y)
    return value, gradient, -gradient


def kept_rows(labels: Tensor | None, like: Tensor, ignore_index: int) -> Tensor:
    """Returns which of the N rows count."""
    if labels is None or labels.is_floating_point():
        return torch.ones(like.shape[-2], dtype=torch.bool, device=like.device)
    return labels != ignore_index


def targets(labels: Tensor, rows: Tensor, keep: Tensor, label_smoothing: float) -> Tensor:
    """Returns [N, C]: the probabilities t that labels stand for, or the values to regress on."""
    if labels.is_floating_point():
        t = labels.to(rows.dtype).reshape(rows.shape)
    else:
        t = torch.zeros_like(rows).scatter_(1, torch.where(keep, labels, 0)[:, None], 1)
    return t * (1 - label_smoothing) + label_smoothing / rows.shape[-1] if label_smoothing else t


def uegr_loss(
    logits: list[Tensor], labels: Tensor | None, *, options: LossOptions, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Computes L_train (Eq. 6); its parts [3] or [3, N]: CE of the clean pass, of the others (Eq.
    3), divergence (Eq. 4); gradients where needed.

    A tensor of logits is one pass [N, C] or several [k, N, C]. With labels the first pass is the
    clean one, which may be all; without, the loss is js_weight * divergence over all passes.
    """
    dtype = compute_dtype(logits[0].dtype)
    rows = [row.to(dtype) for x in logits for row in (x.unbind() if x.dim() == 3 else [x])]
    regression = options.task == "regression"
    rows = rows if regression else [row.log_softmax(-1) for row in rows]
    label_loss, pair_loss = (
        (squared_error, squared_difference) if regression else (cross_entropy, jensen_shannon)
    )
    keep = kept_rows(labels, rows[0], options.ignore_index)
    taken = [x.new_zeros(x.shape, dtype=dtype) for x in logits]
    gradients = [g for x in taken for g in (x.unbind() if x.dim() == 3 else [x])]
    clean, adversarial, divergence = torch.zeros(3, len(keep), dtype=dtype, device=keep.device)
    if labels is not None:
        t = targets(labels, rows[0], keep, options.label_smoothing)
        clean, gradient = label_loss(rows[0], t)
        gradients[0].add_(gradient)
        for row, into in zip(rows[1:], gradients[1:], strict=True):
            value, gradient = label_loss(row, t)
            adversarial = adversarial + value / (len(rows) - 1)
            into.add_(gradient, alpha=1 / (len(rows) - 1))
        del t, gradient
    for k, l in itertools.combinations(range(labels is not None, len(rows)), 2):
        value, *pair = pair_loss(rows[k], rows[l])
        divergence = divergence + value
        for i, gradient in zip((k, l), pair, strict=True):
            gradients[i].add_(gradient, alpha=options.js_weight)
    count = keep.sum() if options.reduction == "mean" else 1
    losses = torch.stack(
        (clean + adversarial + options.js_weight * divergence, clean, adversarial, divergence)
    ).where(keep, 0)
    losses = losses if options.reduction == "none" else losses.sum(-1) / count
    for gradient in taken:
        gradient.div_(count).masked_fill_(~keep[:, None], 0)
    return (
        losses[0].clone(),
        losses[1:].clone(),
        [g.to(x.dtype) for g, x, need in zip(taken, logits, needs, strict=True) if need],
    )


def uegr_loss_(
    logits: list[Tensor], labels: Tensor | None, *, options: LossOptions, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Computes what `uegr_loss` does, and writes the gradients over the logits that need one."""
    loss, parts, gradients = uegr_loss(logits, labels, options=options, needs=needs)
    for x, gradient in zip(
        [x for x, need in zip(logits, needs, strict=True) if need], gradients, strict=True
    ):
        x.copy_(gradient)
    return loss, parts


def scale_gradients(gradients: list[Tensor], grad_loss: Tensor, parts: Tensor) -> list[Tensor]:
    """Applies the chain rule: gradients of the loss times the gradient by the loss, () or [N]."""
    scale = grad_loss if grad_loss.dim() == 0 else grad_loss[:, None]
    return [(gradient.to(scale.dtype) * scale).to(gradient.dtype) for gradient in gradients]


def scale_gradients_(gradients: list[Tensor], grad_loss: Tensor) -> None:
    """Applies the chain rule as `scale_gradients` does, in place."""
    for gradient in gradients:
        gradient.copy_(scale_gradients([gradient], grad_loss, grad_loss)[0])


def linear_uegr_loss(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    *,
    options: LossOptions,
    needs: list[bool],
    dtype: torch.dtype,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Computes `uegr_loss` of the logits hidden @ weight.T + bias in `dtype`, `chunk_rows` of the N
    rows at a time.

    `kernel` is a `uegr_loss_`. Gradients for hidden, weight, bias where needed: of the reduced
    loss, or of sum(row_weights * loss).
    """
    wide, by_row = compute_dtype(dtype), dataclasses.replace(options, reduction="none")
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    *need_hidden, need_weight, need_bias = needs
    need_logits = [need or need_weight or need_bias for need in need_hidden]
    d_hidden = [
        x.new_empty(x.shape) if need else None for x, need in zip(hidden, need_hidden, strict=True)
    ]
    d_weight: Tensor | None = None
    d_bias = b.new_zeros(b.shape, dtype=wide) if b is not None and need_bias else None
    keep, losses = kept_rows(labels, hidden[0], options.ignore_index), []
    count = (
        keep.sum()
        if options.reduction == "mean"
        else torch.ones((), dtype=torch.int64, device=keep.device)
    )
    divisor = count.clamp(min=1)
    # h or the weight's gradient, whichever is smaller
    divides_h = sum(x[..., :chunk_rows, 0].numel() for x in hidden) < len(w)
    buffer = w.new_empty(0)
    for at in range(0, max(len(keep), 1), chunk_rows):
        slices = [x[..., at : at + chunk_rows, :] for x in hidden]
        h = torch.cat([x.reshape(-1, x.shape[-1]) for x in slices]).to(dtype)
        # one for all chunks: they would lie side by side
        buffer = buffer[: len(h)] if at else h.new_empty(len(h), len(w))
        z = torch.mm(h, w.T, out=buffer) if b is None else torch.addmm(b, h, w.T, out=buffer)
        by_input = z.split([x[..., 0].numel() for x in slices])
        of_inputs = [
            part.view(*x.shape[:-1], len(w)) for x, part in zip(slices, by_input, strict=True)
        ]
        loss, parts = kernel(
            of_inputs,
            None if labels is None else labels[at : at + chunk_rows],
            options=by_row,
            needs=need_logits,
        )
        losses.append(torch.cat((loss[None], parts)))
        if row_weights is not None:
            # without rows there is one chunk, of none
            of_row = row_weights[at : at + chunk_rows]
            z.mul_(of_row.repeat(len(z) // max(1, len(of_row)))[:, None])
        # z holds the gradients now; of all inputs in one product, as each copies the weights
        d_h = (z @ w).split(list(map(len, by_input))) if all(need_hidden) else None
        for i, (into, part) in enumerate(zip(d_hidden, by_input, strict=True)):
            if into is not None:
                d_x = part @ w if d_h is None else d_h[i]
                into[..., at : at + chunk_rows, :] = d_x.view(slices[i].shape)
        if need_weight:
            factors = z.T.to(wide), h.to(wide) / divisor if divides_h else h.to(wide)
            d_weight = torch.mm(*factors) if d_weight is None else d_weight.addmm_(*factors)
        if d_bias is not None:
            d_bias += z.sum(0, dtype=wide)
    values = torch.cat(losses, -1)
    values = values if options.reduction == "none" else values.sum(-1) / count
    for g in (*d_hidden, d_bias, None if divides_h else d_weight):
        if g is not None:
            g.div_(divisor)
    gradients = zip((*d_hidden, d_weight, d_bias), (*hidden, weight, bias), strict=True)
    return (
        values[0].clone(),
        values[1:].clone(),
        [g.to(x.dtype) for g, x in gradients if g is not None and x is not None],
    )
