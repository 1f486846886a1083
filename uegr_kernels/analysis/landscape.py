"""Computes the loss on a plane through a model's weights, along filter-normalised random directions
(Li et al. 2018; DropAttack Fig. 3 and 4).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core import checks
from .pictures import MAP, pictures
from .watching import held, moved


@dataclasses.dataclass(frozen=True)
class LossPlane:
    """Holds values[i, j] = loss(w + a[i] * directions[0] + b[j] * directions[1]), float64."""

    a: Tensor
    b: Tensor
    values: Tensor
    directions: tuple[list[Tensor], list[Tensor]]


def random_directions(model: nn.Module, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Draws two directions from N(0, 1), each filter (row, output channel) as long as the model's
    own; 0 for parameters with one axis or none.

    One seed gives models of one architecture the same draws, each normalised by its own weights.
    Raises TypeError for a seed that is no integer.
    """
    generator = torch.Generator().manual_seed(checks.signed_seed(seed))

    def direction() -> list[Tensor]:
        found = []
        for p in model.parameters():
            d = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            if p.dim() < 2:
                found.append(torch.zeros_like(d))
                continue
            axes = tuple(range(1, p.dim()))
            lengths = [
                torch.linalg.vector_norm(t.detach().float(), dim=axes, keepdim=True) for t in (p, d)
            ]
            found.append(
                d * (lengths[0] / lengths[1].clamp(min=torch.finfo(torch.float32).tiny)).to(p.dtype)
            )
        return found

    return direction(), direction()


def loss_plane(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    directions: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    seed: int = 0,
    span: float = 1.0,
    points: int = 25,
) -> LossPlane:
    """Computes the loss on a grid of points x points over [-span, span]^2 around the weights, in
    eval mode.

    loss        a function of the model that returns a 0-d tensor: a mean over fixed data
    directions  two lists of tensors shaped as model.parameters(); None: `random_directions(model,
        seed)`

    The weights are restored bit for bit, also where `loss` raises. Raises ValueError for a wrong
    option.
    """
    points, span = checks.integer("points", points, 1), checks.number("span", span)
    if not span > 0:
        raise ValueError(f"span={span} is out of range; give a number above 0")
    params = list(model.parameters())
    first, second = (
        list(d) for d in (random_directions(model, seed) if directions is None else directions)
    )
    for d in (first, second):
        if [t.shape for t in d] != [p.shape for p in params]:
            raise ValueError(
                f"directions: {len(d)} tensors for {len(params)} parameters; give one "
                "of its shape for every parameter"
            )
    at = (
        torch.linspace(-span, span, points, dtype=torch.float64)
        if points > 1
        else torch.zeros(1, dtype=torch.float64)
    )
    values = torch.empty(points, points, dtype=torch.float64)
    with held(model), torch.no_grad(), moved(params) as move:
        for i, a in enumerate(at.tolist()):
            for j, b in enumerate(at.tolist()):
                move([a * x + b * y for x, y in zip(first, second, strict=True)])
                values[i, j] = float(loss(model))
    return LossPlane(at, at.clone(), values, (first, second))


def plot_loss_plane(
    plane: LossPlane | dict[str, LossPlane], path: str | pathlib.Path, *, surface: bool = False
) -> pathlib.Path:
    """Draws a plane as contours, or as a surface; several (name -> plane) side by side on one
    scale. Writes `path` and returns it.
    """
    planes = plane if isinstance(plane, dict) else {"loss": plane}
    values = torch.cat([each.values.flatten() for each in planes.values()])
    values = values[values.isfinite()]
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    high = high if high > low else low + 1
    # closer around the minimum
    levels = [low + (high - low) * (i / 15) ** 2 for i in range(1, 16)]
    with pictures(path, len(planes), projection="3d" if surface else None) as panels:
        for axes, (name, each) in zip(panels, planes.items(), strict=True):
            a, b = torch.meshgrid(each.a, each.b, indexing="ij")
            if surface:
                axes.plot_surface(
                    a.numpy(), b.numpy(), each.values.numpy(), cmap=MAP, vmin=low, vmax=high
                )
                axes.set(zlim=(low, high))
            else:
                lines = axes.contour(
                    a.numpy(), b.numpy(), each.values.numpy(), levels=levels, vmin=low, vmax=high
                )
                axes.clabel(lines, fontsize=8)
            axes.set(xlabel="first direction", ylabel="second direction", title=name)
    return pathlib.Path(path)
