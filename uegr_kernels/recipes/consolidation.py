"""Weight consolidation: weights drawn back to the pre-trained ones, as L2-SP or with RecAdam's
annealing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..passes import Inputs
from . import options
from .baselines import Plain
from .recipe import named_parameters, write


class Anchored(NamedTuple):
    """Holds a weight, where it came from, and the optimizer's group that it is in."""

    weight: Tensor
    origin: Tensor
    group: dict[str, Any]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class WeightConsolidation(Plain):
    """Trains weights that are drawn back to those at construction, w0.

    See docs/methods.md, "Weight consolidation".

    kappa      strength; what counts is lr * kappa * steps, of order 1
    names      of the pre-trained parameters, such as "bert.*"; None: all trainable ones. A new head
        is best left out
    form       "decoupled": w <- w - lr * kappa * (w - w0), with the optimizer's lr, ahead of its
               step; "penalty": L = CE + kappa/2 * ||w - w0||^2; "annealed": RecAdam, w <- w - lam *
               (the optimizer's step) - lr * (1 - lam) * gamma * (w - w0) - lr * weight_decay * w
               with lam = 1/(1 + exp(-k (t - t0))), for AdamW's step number t; lr * gamma must be
               below 1
    k, t0, gamma   of "annealed"
    the common options  (`help(uk.recipes.plain)`)

    "decoupled" and "annealed" need the optimizer. 1 forward, 1 backward. Losses: loss, clean_loss,
    and "penalty" in that form.
    """

    kept: ClassVar[tuple[str, ...]] = ("origin", "steps")

    kappa: float = options.number(10.0)
    names: str | Sequence[str] | None = None
    form: str = options.choice("decoupled", ("decoupled", "penalty", "annealed"))
    k: float = options.number(0.1)
    t0: float = options.number(500)
    gamma: float = options.number(5000.0)
    _weights: list[nn.Parameter] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.origin = [p.detach().clone() for p in self._weights]
        self.steps = 0
        self._before: list[Tensor] = []

    def _settle_options(self) -> None:
        super()._settle_options()
        if self.names is None:
            self._weights = [p for p in self.model.parameters() if p.requires_grad]
        else:
            self._weights = list(named_parameters(self.model, self.names).values())

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        if self.form != "penalty":
            return super()._backward(inputs, labels, scale)
        pairs = zip(self._weights, self.origin, strict=True)
        distances = (_squared_distance(p, p0) for p, p0 in pairs)
        return self._descend_penalised(labels, scale, self.kappa / 2, distances)

    def before_step(self) -> None:
        """Draws the weights back, or keeps them for `after_step`."""
        if self.form == "penalty":
            return
        groups = self._groups()
        gradients = [each.weight.grad for each in groups]
        if not all(bool(grad.isfinite().all()) for grad in gradients if grad is not None):
            # a step that a loss scaler skips
            return
        if self.form == "decoupled":
            for p, p0, group in groups:
                write([p], [p.detach() - (p.detach() - p0) * (group["lr"] * self.kappa)])
        else:
            for group in self._stepped().param_groups:
                if group["lr"] * self.gamma >= 1:
                    raise ValueError(
                        f"lr={float(group['lr'])} times gamma={self.gamma} is 1 or "
                        "more, which diverges; lower one of them"
                    )
            self.steps += 1
            self._before = [each.weight.detach().clone() for each in groups]

    def after_step(self) -> None:
        """Anneals the optimizer's step, where that is the form."""
        if not self._before:
            return
        lam = torch.sigmoid(
            torch.tensor(self.k * (self.steps - self.t0), dtype=torch.float64)
        ).item()
        for (p, p0, group), before in zip(self._groups(), self._before, strict=True):
            decay = (
                group["lr"] * group.get("weight_decay", 0.0) * before
                if group.get("decoupled_weight_decay")
                else 0.0
            )
            step = p.detach() - before + decay
            write(
                [p],
                [
                    before
                    + lam * step
                    - (1 - lam) * self.gamma * group["lr"] * (before - p0)
                    - decay
                ],
            )
        self._before = []

    def _groups(self) -> list[Anchored]:
        """Returns the weights that the optimizer steps."""
        groups = {id(p): group for group in self._stepped().param_groups for p in group["params"]}
        return [
            Anchored(p, p0, groups[id(p)])
            for p, p0 in zip(self._weights, self.origin, strict=True)
            if id(p) in groups
        ]


def _squared_distance(p: Tensor, p0: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return (p.to(wide) - p0.to(wide)).square().sum()
