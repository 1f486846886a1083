"""The plain baselines: the loss alone, and with an L1 or L2 penalty on the weights."""

import dataclasses

import torch
from torch import Tensor

from ..passes import Inputs
from . import options
from .recipe import PassRecipe, whole


class Plain(PassRecipe):
    """Trains as usual, the baseline of every table: L = CE(F(e; w, u), y).

    See docs/methods.md, "Plain, L1 and L2".

    The common options (`PassRecipe`) alone; dropout=0.0 is the tables' "no dropout".
    1 forward, 1 backward. Losses: loss, clean_loss.
    Equivalent to: `F.cross_entropy(model(inputs), labels).backward()`.
    """

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        loss, _ = self._descend(labels, scale, last=True)
        return {"loss": loss, "clean_loss": loss}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _Penalised(PassRecipe):
    weight: float = options.number(0.0)

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        with self._pass() as pass_:
            parts = self._loss_of(self._runner.call(pass_), labels)
            of_tensors = [
                whole(self._penalty(p)).to(parts.loss)
                for p in self.model.parameters()
                if p.requires_grad
            ]
            penalty = self.weight * sum(of_tensors, torch.zeros_like(parts.loss))
            ((parts.loss + penalty) * scale).backward()
        return {
            "loss": parts.clean_loss + penalty.detach(),
            "clean_loss": parts.clean_loss,
            "penalty": penalty.detach(),
        }

    def _penalty(self, p: Tensor) -> Tensor:
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class L1(_Penalised):
    """Trains with an L1 penalty on the weights: L = CE + weight * sum |w|.

    See docs/methods.md, "Plain, L1 and L2".

    weight  >= 0, over all trainable parameters;  the common options (`PassRecipe`)
    1 forward, 1 backward. Losses: loss, clean_loss, penalty (weight * sum |w|).
    """

    weight: float = options.number(1e-5)

    def _penalty(self, p: Tensor) -> Tensor:
        return p.abs().sum(dtype=torch.promote_types(p.dtype, torch.float32))


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class L2(_Penalised):
    """Trains with an L2 penalty on the weights: L = CE + weight/2 * sum w^2.

    See docs/methods.md, "Plain, L1 and L2".

    weight  >= 0, over all trainable parameters, as torch.optim.SGD's weight_decay;  the common
        options (`PassRecipe`)
    1 forward, 1 backward. Losses: loss, clean_loss, penalty (weight/2 * sum w^2).
    """

    weight: float = options.number(1e-4)

    def _penalty(self, p: Tensor) -> Tensor:
        return p.square().sum(dtype=torch.promote_types(p.dtype, torch.float32)) / 2
