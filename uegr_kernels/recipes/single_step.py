"""One-step adversarial training on the embeddings: AT (FGM) and FGSM."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..passes import Inputs
from ..perturbation import NORMS
from . import options
from .attack import StepRecipe


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AT(StepRecipe):
    """Trains on clean embeddings and on ones perturbed by one L2 step, FGM.

    See docs/methods.md, "AT".

    epsilon, norm, per  the size of delta, as in `fgm_perturbation`; per="all" is the whole batch's
        norm, as in attacks on the table
    clean_weight        of L1 in L = clean_weight * L1 + L2; 0 is the min-max form, with nothing but
        delta taken from the clean pass
    the common options  (`help(uk.recipes.plain)`)

    L1 = CE(F(e; w, u1), y), delta = epsilon * g/||g||, L2 = CE(F(e + delta; w, u2), y). 2 forwards,
    2 backwards. Losses: loss, clean_loss, adversarial_loss. Equivalent to: `BiStage(model,
    embedding, passes=1)`, one pass at a time.
    """

    passes: ClassVar[int] = 2
    size_option: ClassVar[str | None] = "epsilon"

    clean_weight: float = options.number(1.0)

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.clean_weight:
            losses["clean_loss"], pass_ = self._descend(
                labels, scale, weight=self.clean_weight, watched=True
            )
        else:
            pass_ = self._ascend(labels, scale)
        delta = self._step(pass_)
        losses["adversarial_loss"], _ = self._descend(labels, scale, delta, last=True)
        return {
            "loss": self.clean_weight * losses.get("clean_loss", 0.0) + losses["adversarial_loss"],
            **losses,
        }


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FGSM(AT):
    """Trains as `AT` does, with one sign step, FGSM: delta = epsilon * sign(g).

    See docs/methods.md, "FGSM".

    epsilon  of every element, so that delta's L2 length is epsilon * sqrt(T d): far smaller than
        AT's
    the rest as in AT  (`help(uk.recipes.at)`)
    """

    size_option: ClassVar[str | None] = None

    epsilon: float = options.number(0.01)
    norm: str = options.choice("linf", NORMS)
