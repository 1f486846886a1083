"""One-step adversarial training on the embeddings: AT (FGM) and FGSM."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..perturbation import fgm_perturbation
from .recipe import PassRecipe


class AT(PassRecipe):
    """Adversarial training with one L2 step on the embeddings, FGM (METHODS 1, AT).

    epsilon, norm, per  the size of delta, as in `fgm_perturbation`; per="all" is the whole batch's
        norm, as in attacks on the table
    clean_weight        of L1 in L = clean_weight * L1 + L2; 0 is the min-max form, with nothing but
        delta taken from the clean pass
    the common options  (`PassRecipe`)

    L1 = CE(F(e; w, u1), y), delta = epsilon * g/||g||, L2 = CE(F(e + delta; w, u2), y). 2 forwards,
    2 backwards. Losses: loss, clean_loss, adversarial_loss. Equivalent to: `BiStage(model,
    embedding, passes=1)`, one pass at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        norm: str = "l2",
        per: str = "sample",
        clean_weight: float = 1.0,
        **options: Any,
    ) -> None:
        self._perturbation: dict[str, Any] = dict(epsilon=epsilon, norm=norm, per=per)
        # raises for a wrong option
        fgm_perturbation(torch.zeros(1, 2, device="cpu"), **self._perturbation, backend="reference")
        clean_weight = checks.number("clean_weight", clean_weight, 0)
        self.clean_weight, self.norm = clean_weight, norm
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.clean_weight:
            losses["clean_loss"], pass_ = self._descend(
                labels, scale, weight=self.clean_weight, watched=True
            )
        else:
            pass_ = self._ascend(labels, scale)
        options: dict[str, Any] = dict(mask=pass_.mask, backend=self.backend, **self._perturbation)
        delta = pass_.ascended(functools.partial(fgm_perturbation, **options))
        losses["adversarial_loss"], _ = self._descend(labels, scale, delta, last=True)
        return {
            "loss": self.clean_weight * losses.get("clean_loss", 0.0) + losses["adversarial_loss"],
            **losses,
        }


class FGSM(AT):
    """Adversarial training with one sign step on the embeddings, FGSM: AT with delta = epsilon *
    sign(g) (METHODS 1, FGSM).

    epsilon  of every element, so that delta's L2 length is epsilon * sqrt(T d): far smaller than
        AT's;  the rest as in `AT`
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.01,
        norm: str = "linf",
        **options: Any,
    ) -> None:
        super().__init__(model, embedding, optimizer, epsilon=epsilon, norm=norm, **options)
