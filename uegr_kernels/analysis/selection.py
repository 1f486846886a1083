"""Tells what an optimizer's step selected: the range of s, the histogram of p, the share that was
updated (Eq. 7-9).
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..selective import SelectiveAdamW, SelectiveSGD, selection_mask, selection_probability
from .pictures import figure, styled

OPTIONS = tuple(
    inspect.signature(selection_probability).parameters.keys() - {"grad", "saliency", "backend"}
)
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
# of p, over [0, 1]
BINS = 20


@dataclasses.dataclass(frozen=True)
class ParameterSelection:
    """Holds one parameter's selection in a step.

    name       as in the optimizer's group, else its number;  elements  of the parameter
    s_min, s_max, s_quantiles  of s = g*g over finite elements; the quantiles at QUANTILES
    histogram  counts of p in BINS equal bins over [0, 1]
    selected   the share of elements that were updated
    largest_inverse  the largest 1/p
    """

    name: str
    elements: int
    s_min: float
    s_max: float
    s_quantiles: tuple[float, ...]
    histogram: tuple[int, ...]
    selected: float
    largest_inverse: float


@dataclasses.dataclass(frozen=True)
class SelectionReport:
    """Holds the parameters that had a gradient in the last step, in the optimizer's order; `print`
    it for a table.
    """

    parameters: tuple[ParameterSelection, ...]

    @property
    def selected(self) -> float:
        """Returns the share of all elements that were updated; NaN where there are none."""
        elements = sum(parameter.elements for parameter in self.parameters)
        return (
            sum(parameter.selected * parameter.elements for parameter in self.parameters) / elements
            if elements
            else float("nan")
        )

    @property
    def largest_inverse(self) -> float:
        return max(
            (each.largest_inverse for each in self.parameters if each.elements),
            default=float("nan"),
        )

    def __str__(self) -> str:
        head = (
            "parameter",
            "elements",
            "least s",
            "median s",
            "largest s",
            "selected",
            "largest 1/p",
        )
        rows = [head]
        for each in self.parameters:
            numbers = (
                f"{each.s_min:.3g}",
                f"{each.s_quantiles[QUANTILES.index(0.5)]:.3g}",
                f"{each.s_max:.3g}",
            )
            rows.append(
                (
                    each.name,
                    f"{each.elements:,}",
                    *numbers,
                    f"{each.selected:.2%}",
                    f"{each.largest_inverse:.4g}",
                )
            )
        elements = sum(each.elements for each in self.parameters)
        rows.append(
            (
                "all",
                f"{elements:,}",
                "",
                "",
                "",
                f"{self.selected:.2%}",
                f"{self.largest_inverse:.4g}",
            )
        )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def selection_report(optimizer: object) -> SelectionReport:
    """Tells what the optimizer's last step selected, by parameter; call it after `step()` and
    before `zero_grad()`.

    optimizer  SelectiveAdamW or SelectiveSGD (or what wraps one as `.optimizer`), with the
        gradients of its last step

    The masks are those of the step, drawn again; memory of a few times the largest parameter's is
    used, for scope="global" of all parameters'. With statistics="previous", whose minima and maxima
    the step has replaced, p is of the present ones, and for scope="global" the share is the mean of
    p. Gradients that a GradScaler's fused step left scaled are reported so. Returns a
    `SelectionReport`. Raises TypeError for another optimizer.
    """
    return SelectionReport(tuple(_describe(*found) for found in _selections(optimizer)))


def share_selected(optimizer: object) -> float | None:
    """Computes the share of elements that the optimizer's last step updated, in [0, 1]; call it
    after `step()` and before `zero_grad()`.

    optimizer  as in `selection_report`, or any other

    Returns None for an optimizer that selects nothing, and where no parameter has a gradient.
    Equivalent to: `selection_report(optimizer).selected`.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(own, SelectiveAdamW | SelectiveSGD):
        return None
    chosen = elements = 0.0
    for _, g, p, mask in _selections(own):
        chosen += (p if mask is None else mask).sum(dtype=torch.float64).item()
        elements += g.numel()
    return chosen / elements if elements else None


class _Stepped(NamedTuple):
    name: str
    stream: int
    gradient: Tensor
    # of the selection, as selection_probability takes them
    options: dict[str, Any]
    # equal where gradients have statistics in common
    scope: tuple[str, str]
    seed: int
    step: int


def _selections(optimizer: object) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Yields name, gradient, p and mask of every parameter with a gradient; no mask where only its
    probability is known.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, SelectiveAdamW | SelectiveSGD):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass a SelectiveAdamW or SelectiveSGD"
        )
    found: list[_Stepped] = []
    stream = 0
    for group in optimizer.param_groups:
        options = {name: group[name] for name in OPTIONS}
        scope = group["scope"], group["normalization"]
        for i, p in enumerate(group["params"]):
            step = int(optimizer.state.get(p, {}).get("step", 0))
            if p.grad is not None and step:
                name = (
                    group["param_names"][i]
                    if i < len(group.get("param_names", ()))
                    else str(stream)
                )
                found.append(
                    _Stepped(name, stream, p.grad.detach(), options, scope, group["seed"], step)
                )
            stream += 1
    # by options: p of every parameter of a scope that spans them
    wide: dict[tuple[tuple[str, object], ...], dict[int, Tensor]] = {}
    for name, stream, g, options, scope, seed, step in found:
        if scope[0] == "global" and options["normalization"] != "constant":
            key = tuple(options.items())
            if key not in wide:
                members = {other.stream: other.gradient for other in found if other.scope == scope}
                together = torch.cat(
                    [theirs.flatten().to(g.device, torch.float64) for theirs in members.values()]
                )
                parts = selection_probability(together, **options).split(
                    [theirs.numel() for theirs in members.values()]
                )
                wide[key] = dict(zip(members, parts, strict=True))
            yield name, g, wide[key][stream].view_as(g), None
        else:
            mask = selection_mask(g, seed=seed, step=step, stream=stream, **options)
            yield name, g, selection_probability(g, **options), mask


def _describe(name: str, g: Tensor, p: Tensor, mask: Tensor | None) -> ParameterSelection:
    s = g.double().square().flatten()
    s = s[s.isfinite()]
    quantiles = _quantiles(s) if s.numel() else [float("nan")] * len(QUANTILES)
    return ParameterSelection(
        name=name,
        elements=g.numel(),
        s_min=s.min().item() if s.numel() else float("nan"),
        s_max=s.max().item() if s.numel() else float("nan"),
        s_quantiles=tuple(quantiles),
        histogram=tuple(int(n) for n in torch.histc(p.double().cpu(), BINS, 0, 1)),
        selected=(p if mask is None else mask).double().mean().item() if g.numel() else 0.0,
        largest_inverse=(1 / p.min()).item() if p.numel() else float("nan"),
    )


def _quantiles(s: Tensor) -> list[float]:
    # torch.quantile refuses more than 16 million
    ordered = s.sort().values
    return [ordered[round(q * (ordered.numel() - 1))].item() for q in QUANTILES]


@styled()
def plot_selection_report(report: SelectionReport, path: str | pathlib.Path) -> pathlib.Path:
    """Draws the share selected and the histogram of p of every parameter; writes `path` (PNG,
    or what its ending says) and returns it.
    """
    path = pathlib.Path(path)
    names = [parameter.name for parameter in report.parameters]
    drawn = figure(9, max(2.5, 0.28 * len(names) + 1))
    shares, densities = drawn.subplots(1, 2, sharey=True)
    shares.barh(range(len(names)), [parameter.selected for parameter in report.parameters])
    shares.set(
        yticks=range(len(names)), yticklabels=names, xlabel="share that was selected", xlim=(0, 1)
    )
    shares.invert_yaxis()
    rows = [
        [count / max(1, sum(parameter.histogram)) for count in parameter.histogram]
        for parameter in report.parameters
    ]
    shown = densities.imshow(
        rows or [[0.0]], aspect="auto", extent=(0, 1, len(names) - 0.5, -0.5), vmin=0, vmax=1
    )
    densities.set(xlabel="probability of being selected (p)")
    drawn.colorbar(shown, ax=densities, label="share of its elements")
    drawn.suptitle(
        f"{report.selected:.1%} of all elements selected; largest 1/p {report.largest_inverse:.3g}"
    )
    drawn.savefig(path)
    return path
