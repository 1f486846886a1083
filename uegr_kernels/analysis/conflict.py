"""Measures whether two losses pull the weights the same way (ARAT's gradient conflict)."""

import dataclasses
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .pictures import GREY, pictures


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Holds how far two gradients agree.

    cosine   of the two, over all parameters
    opposed  the share of the elements with opposite signs
    """

    cosine: float
    opposed: float


Gradients = Sequence[Tensor | None]


def gradient_conflict(
    model: nn.Module, first: Tensor | Gradients, second: Tensor | Gradients
) -> Conflict:
    """Computes the cosine of the gradients of two losses of one model, and the share of elements
    with opposite signs.

    first, second  0-d losses, whose graphs are kept, or their gradients: a tensor or None for each
        trainable parameter, in order

    A parameter that one of the losses does not depend on counts as 0 there. NaN where a gradient is
    0 as a whole. Raises ValueError for gradients that are not one for each parameter, of its shape
    or None; RuntimeError for a loss without a graph.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    pair: list[Gradients] = []
    for of in (first, second):
        gradients = (
            torch.autograd.grad(of, params, retain_graph=True, allow_unused=True)
            if isinstance(of, Tensor)
            else of
        )
        fits = (g is None or g.shape == p.shape for p, g in zip(params, gradients, strict=False))
        if len(gradients) != len(params) or not all(fits):
            raise ValueError(
                f"{len(gradients)} gradients for {len(params)} trainable parameters; "
                "give one of its shape, or None, for each"
            )
        pair.append(gradients)
    dot, opposite, squares = 0.0, 0, [0.0, 0.0]
    for a, b in zip(*pair, strict=True):
        if a is not None and b is not None:
            dot += (a.double() * b.double()).sum().item()
            opposite += int((a.sign() * b.sign() < 0).sum())
        for i, g in enumerate((a, b)):
            squares[i] += 0.0 if g is None else g.double().square().sum().item()
    length = (squares[0] * squares[1]) ** 0.5
    return Conflict(
        dot / length if length else float("nan"), opposite / max(1, sum(p.numel() for p in params))
    )


def plot_gradient_conflict(
    series: dict[str, Sequence[Conflict]], path: str | pathlib.Path
) -> pathlib.Path:
    """Draws cosine and opposed share, epoch by epoch (or step), a line for each entry; writes
    `path` and returns it.
    """
    with pictures(path, 2) as (cosines, shares):
        for name, found in series.items():
            at = range(1, len(found) + 1)
            cosines.plot(at, [each.cosine for each in found], label=name)
            shares.plot(at, [each.opposed for each in found], label=name)
        cosines.axhline(0, color=GREY, linewidth=0.8)
        cosines.set(xlabel="epoch", ylabel="cosine of the two gradients")
        shares.set(xlabel="epoch", ylabel="share of opposite signs", ylim=(0, None))
        cosines.legend()
    return pathlib.Path(path)
