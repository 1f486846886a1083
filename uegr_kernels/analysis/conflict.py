"""Whether two losses pull the weights the same way (ARAT's gradient conflict)."""

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Conflict:
    """cosine  of the two gradients, over all parameters;  opposed  share of the elements with opposite signs."""

    cosine: float
    opposed: float


def gradient_conflict(model: nn.Module, first: Tensor, second: Tensor) -> Conflict:
    """Cosine of the gradients of two losses (0-d, of one model, graphs are kept), and the share of elements with opposite signs.

    A parameter that one of the losses does not depend on counts as 0 there. NaN where a gradient is 0 as a whole.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    pair = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in (first, second)]
    dot, opposite, squares = 0.0, 0, [0.0, 0.0]
    for a, b in zip(*pair, strict=True):
        if a is not None and b is not None:
            dot += (a.double() * b.double()).sum().item()
            opposite += int((a.sign() * b.sign() < 0).sum())
        for i, g in enumerate((a, b)):
            squares[i] += 0.0 if g is None else g.double().square().sum().item()
    length = (squares[0] * squares[1]) ** 0.5
    return Conflict(dot / length if length else float("nan"), opposite / max(1, sum(p.numel() for p in params)))
