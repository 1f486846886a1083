"""R-Drop, R-AT and R-AT-SU: two passes held alike by the symmetric Kullback-Leibler divergence."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks
from ..divergence import uegr_loss
from ..perturbation import fgm_perturbation
from .bi_stage import SelectiveUpdate
from .recipe import PassRecipe
from .selection import OPTIONS


class RDrop(PassRecipe):
    """Two passes with a dropout draw each, held alike (METHODS 1, R-Drop).

    alpha      weight of the divergence
    reduction  of the divergence: "mean" over the batch, or "sum" over it, as in the public code:
        alpha then grows with the batch
    the common options  (`PassRecipe`)

    L = (CE(z1) + CE(z2))/2 + alpha * (KL(P1||P2) + KL(P2||P1))/2; task="regression": squared
    errors, squared difference of the outputs. 2 forwards and backwards. Losses: loss, clean_loss
    (the mean of both), divergence.
    """

    _of_pair = "clean_loss"

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        alpha: float = 1.0,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        alpha = checks.number("alpha", alpha, 0)
        checks.choice("reduction", reduction, ("mean", "sum"))
        self.alpha, self.reduction = alpha, reduction
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        return self._pair(labels, scale, None)

    def _pair(
        self, labels: Tensor, scale: float | Tensor, delta: Tensor | None
    ) -> dict[str, Tensor]:
        """Two passes at delta and one backward of both, the last of the step."""
        # the pass that announces the backward to a synchronising wrapper comes first:
        with self._pass(delta) as pass_:
            # it may write into buffers that the other's graph has saved
            first = self._runner.call(pass_)
        with self._runner.without_sync(), self._pass(delta) as pass_:
            second = self._runner.call(pass_)
        parts = uegr_loss(
            first.detach(),
            [first, second],
            labels,
            return_parts=True,
            **self._loss_options,
            backend=self.backend,
        )
        divergence = symmetric_divergence(
            first, second, labels, self.reduction, **self._loss_options
        )
        with self._pass(delta) as pass_:  # for a model that recomputes its embedding
            pass_.forward = False
            ((parts.loss + self.alpha * divergence) * scale).backward()
        loss = parts.adversarial_loss + self.alpha * divergence.detach()
        return {
            "loss": loss,
            self._of_pair: parts.adversarial_loss,
            "divergence": divergence.detach(),
        }


def symmetric_divergence(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    reduction: str,
    *,
    task: str,
    ignore_index: int,
    **unused: Any,
) -> Tensor:
    """(KL(P||Q) + KL(Q||P))/2 of two passes' logits [N, C], over the rows that are not ignored;
    mean squared difference for regression.

    KL(P||Q) + KL(Q||P) = sum (p - q)(log p - log q), so it is exactly 0 for equal logits; a class
    that both mask with -inf adds nothing.
    """
    if not labels.is_floating_point():
        kept = (labels != ignore_index)[:, None]
        first, second = torch.where(kept, first, 0), torch.where(kept, second, 0)
        rows: Any = kept.sum()
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


class RAT(RDrop):
    """R-Drop on adversarial examples: a clean pass, and two perturbed ones held alike (METHODS 1,
    R-AT).

    epsilon, norm, per  the size of delta, as in `fgm_perturbation`
    alpha, reduction    as in `RDrop`;  the common options  (`PassRecipe`)

    L = CE(F(e)) + (CE(z1) + CE(z2))/2 + alpha * (KL(P1||P2) + KL(P2||P1))/2, z_k = F(e + delta; w,
    u_k). 3 forwards and backwards. Losses: loss, clean_loss, adversarial_loss, divergence.
    """

    _of_pair = "adversarial_loss"

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        norm: str = "l2",
        per: str = "sample",
        **options: Any,
    ) -> None:
        self._perturbation: dict[str, Any] = dict(epsilon=epsilon, norm=norm, per=per)
        # raises for a wrong option
        fgm_perturbation(torch.zeros(1, 2, device="cpu"), **self._perturbation, backend="reference")
        self.norm = norm
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        clean, pass_ = self._descend(labels, scale, watched=True)
        options: dict[str, Any] = dict(mask=pass_.mask, backend=self.backend, **self._perturbation)
        delta = pass_.ascended(functools.partial(fgm_perturbation, **options))
        losses = self._pair(labels, scale, delta)
        return losses | {"loss": clean + losses["loss"], "clean_loss": clean}


class RATSU(SelectiveUpdate, RAT):
    """R-AT's loss with UEGR's selective update (METHODS 1, R-AT-SU).

    seed, and the selection's options  as in `UEGR`;  the rest  as in `RAT`
    """

    kept = ("selection",)
    more_options = OPTIONS

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        seed: int | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        selection = {name: options.pop(name) for name in OPTIONS if name in options}
        super().__init__(model, embedding, optimizer, backend=backend, **options)
        self._select(selection, seed, backend)
