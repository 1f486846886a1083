"""R-Drop, R-AT and R-AT-SU: two passes held alike by the symmetric Kullback-Leibler divergence."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..passes import Inputs
from . import options
from .attack import StepRecipe
from .recipe import PassRecipe
from .selection import SelectionRecipe


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RDrop(PassRecipe):
    """Trains two passes with a dropout draw each, held alike.

    See docs/methods.md, "R-Drop".

    alpha      weight of the divergence
    reduction  of the divergence: "mean" over the batch, or "sum" over it, as in the public code:
        alpha then grows with the batch
    the common options  (`help(uk.recipes.plain)`)

    L = (CE(z1) + CE(z2))/2 + alpha * (KL(P1||P2) + KL(P2||P1))/2; task="regression": squared
    errors, squared difference of the outputs. 2 forwards and backwards. Losses: loss, clean_loss
    (the mean of both), divergence.
    """

    _of_pair: ClassVar[str] = "clean_loss"

    passes: ClassVar[int] = 2

    alpha: float = options.number(1.0)
    reduction: str = options.choice("mean", ("mean", "sum"))

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        return self._pair(labels, scale, None)

    def _pair(
        self, labels: Tensor, scale: float | Tensor, delta: Tensor | None
    ) -> dict[str, Tensor]:
        """Runs two passes at delta and one backward of both, the last of the step."""
        # The pass that announces the backward to a synchronising wrapper comes first: it may write
        # into buffers that the other's graph has saved.
        with self._pass(delta) as pass_:
            first = self._runner.call(pass_)
        with self._runner.without_sync(), self._pass(delta) as pass_:
            second = self._runner.call(pass_)
        parts = self._loss_of(first.detach(), labels, [first, second])
        divergence = symmetric_divergence(
            first, second, labels, self.reduction, task=self.task, ignore_index=self.ignore_index
        )
        # for a model that recomputes its embedding
        with self._pass(delta) as pass_:
            pass_.forward = False
            ((parts.loss + self.alpha * divergence) * scale).backward()
        loss = parts.adversarial_loss + self.alpha * divergence.detach()
        return {
            "loss": loss,
            self._of_pair: parts.adversarial_loss,
            "divergence": divergence.detach(),
        }


def symmetric_divergence(
    first: Tensor, second: Tensor, labels: Tensor, reduction: str, *, task: str, ignore_index: int
) -> Tensor:
    """Returns (KL(P||Q) + KL(Q||P))/2 of two passes' logits [N, C], over the rows that are not
    ignored; for regression the mean squared difference.

    KL(P||Q) + KL(Q||P) = sum (p - q)(log p - log q), so it is exactly 0 for equal logits; a class
    that both mask with -inf adds nothing.
    """
    if not labels.is_floating_point():
        kept = (labels != ignore_index)[:, None]
        first, second = torch.where(kept, first, 0), torch.where(kept, second, 0)
        rows: Tensor | int = kept.sum()
    else:
        rows = len(labels)
    wide = torch.promote_types(first.dtype, torch.float32)
    if task == "regression":
        total = (first.to(wide) - second.to(wide)).square()
        return total.sum() if reduction == "sum" else total.sum() / (rows * first.shape[-1])
    log_p, log_q = F.log_softmax(first, -1, dtype=wide), F.log_softmax(second, -1, dtype=wide)
    difference = torch.where(log_p == log_q, 0, log_p - log_q)
    total = ((log_p.exp() - log_q.exp()) * difference).sum() / 2
    return total if reduction == "sum" else total / rows


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RAT(StepRecipe, RDrop):
    """Trains as `RDrop` does, on adversarial examples beside a clean pass.

    See docs/methods.md, "R-AT".

    epsilon, norm, per  the size of delta, as in `fgm_perturbation`
    alpha, reduction    of the divergence: its weight, and "mean" over the batch or "sum" over it;
        the common options  (`help(uk.recipes.plain)`)

    L = CE(F(e)) + (CE(z1) + CE(z2))/2 + alpha * (KL(P1||P2) + KL(P2||P1))/2, z_k = F(e + delta; w,
    u_k). 3 forwards and backwards. Losses: loss, clean_loss, adversarial_loss, divergence.
    """

    _of_pair: ClassVar[str] = "adversarial_loss"

    passes: ClassVar[int] = 3
    size_option: ClassVar[str | None] = "epsilon"

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        clean, pass_ = self._descend(labels, scale, watched=True)
        losses = self._pair(labels, scale, self._step(pass_))
        return losses | {"loss": clean + losses["loss"], "clean_loss": clean}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RATSU(SelectionRecipe, RAT):
    """Trains with R-AT's loss and UEGR's selective update.

    See docs/methods.md, "R-AT-SU".

    threshold, sharpness, normalization, direction, scope, statistics, rescale, min_probability,
    keep_probability, target  of the selection, as in SelectiveAdamW;  seed  of its masks
    epsilon, norm, per  the size of delta, as in `fgm_perturbation`
    alpha, reduction    of the divergence: its weight, and "mean" over the batch or "sum" over it;
        the common options  (`help(uk.recipes.plain)`)

    L = CE(F(e)) + (CE(z1) + CE(z2))/2 + alpha * (KL(P1||P2) + KL(P2||P1))/2, as in R-AT. A
    SelectiveAdamW or SelectiveSGD given as the optimizer selects inside its step, by its own
    options and those named here; for any other optimizer, or none, `before_step` selects .grad. 3
    forwards and backwards. Losses: loss, clean_loss, adversarial_loss, divergence.
    """
