"""The plain baselines: the loss alone, and with an L1 or L2 penalty on the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from .recipe import PassRecipe, whole


class Plain(PassRecipe):
    """Ordinary training, the baseline of every table: L = CE(F(e; w, u), y).

    The common options (`PassRecipe`) alone; dropout=0.0 is the tables' "no dropout".
    1 forward, 1 backward. Losses: loss, clean_loss.
    Equivalent to: `F.cross_entropy(model(inputs), labels).backward()`.
    """

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        loss, _ = self._descend(labels, scale, last=True)
        return {"loss": loss, "clean_loss": loss}


class _Penalised(PassRecipe):
    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        weight: float,
        **options: Any,
    ) -> None:
        weight = checks.number("weight", weight, 0)
        self.weight = weight
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        with self._pass() as pass_:
            parts = self._label_loss(self._runner.call(pass_), labels)
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


class L1(_Penalised):
    """Ordinary training with an L1 penalty on the weights: L = CE + weight * sum |w| (METHODS 6.1).

    weight  >= 0, over all trainable parameters;  the common options (`PassRecipe`)
    1 forward, 1 backward. Losses: loss, clean_loss, penalty (weight * sum |w|).
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        weight: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(model, embedding, optimizer, weight=weight, **options)

    def _penalty(self, p: Tensor) -> Tensor:
        return p.abs().sum(dtype=torch.promote_types(p.dtype, torch.float32))


class L2(_Penalised):
    """Ordinary training with an L2 penalty on the weights: L = CE + weight/2 * sum w^2 (METHODS
    6.1).

    weight  >= 0, over all trainable parameters, as torch.optim.SGD's weight_decay;  the common
        options (`PassRecipe`)
    1 forward, 1 backward. Losses: loss, clean_loss, penalty (weight/2 * sum w^2).
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        weight: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(model, embedding, optimizer, weight=weight, **options)

    def _penalty(self, p: Tensor) -> Tensor:
        return p.square().sum(dtype=torch.promote_types(p.dtype, torch.float32)) / 2
