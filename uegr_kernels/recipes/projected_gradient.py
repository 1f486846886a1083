"""PGD-K and AdvEmbed: projected gradient ascent on the embeddings."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from ..passes import Inputs
from ..perturbation import ASCENT_NORMS, PERS
from . import options
from .attack import AttackRecipe, Start, tiny_noise_start, uniform_ball_start


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class PGD(AttackRecipe):
    """Trains on embeddings perturbed by K steps of projected gradient ascent, PGD-K.

    See docs/methods.md, "PGD-K".

    epsilon, norm, per     radius, and whose norm, as in `pgd_step`
    steps, step_size       K, and the size of one; None: 2.5 * epsilon / K
    clean_weight           of the clean pass's loss in L; 0: no clean pass
    random_start           start uniformly in the ball, not at 0
    same_draw              the same dropout masks in every pass
    first_step_from_clean  the clean pass's gradient makes the first step and saves a pass; needs a
        clean pass and no random start
    the common options     (`help(uk.recipes.plain)`)

    K + 2 forwards, 2 backwards and K that stop at the embedding; one less of each with
    first_step_from_clean. Losses: loss, clean_loss, adversarial_loss.
    """

    passes: ClassVar[int] = 5
    size_option: ClassVar[str | None] = "epsilon"

    clean_weight: float = options.number(1.0)
    random_start: bool = options.flag(False)
    first_step_from_clean: bool = options.flag(False)

    def _settle_options(self) -> None:
        super()._settle_options()
        if self.first_step_from_clean and (self.random_start or self.clean_weight == 0):
            raise ValueError(
                "first_step_from_clean=True needs the clean pass's gradient; leave "
                "random_start out, and clean_weight above 0"
            )

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses, clean = {}, None
        with self._draws(self.same_draw) as draw:
            if self.clean_weight:
                with draw():
                    losses["clean_loss"], clean = self._descend(
                        labels, scale, weight=self.clean_weight, watched=self.first_step_from_clean
                    )
            delta = self._attack(labels, scale, draw, clean if self.first_step_from_clean else None)
            with draw():
                losses["adversarial_loss"], _ = self._descend(labels, scale, delta, last=True)
        return {
            "loss": self.clean_weight * losses.get("clean_loss", 0.0) + losses["adversarial_loss"],
            **losses,
        }

    def _start(self, mask: Tensor | None) -> Start | None:
        if not self.random_start:
            return None
        return uniform_ball_start(self.epsilon, self.norm, self.per, mask)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AdvEmbed(PGD):
    """Trains as `PGD` does, with one step per token on the embeddings, AdvEmbed.

    See docs/methods.md, "AdvEmbed".

    epsilon, norm, per  the ball, as in `pgd_step`: g divided by its largest |element| of each token
    steps, step_size    1, of epsilon
    start               delta starts as U(0, 1) * start, in a pass of its own; 0: at the clean
        pass's gradient, which makes it `AT`'s cost
    clean_weight        of the clean loss;  same_draw  every pass with the same dropout masks
    the common options  (`help(uk.recipes.plain)`); `start` decides what random_start and
        first_step_from_clean do in PGD

    3 forwards, 2 backwards and 1 that stops at the embedding. Losses: loss, clean_loss,
    adversarial_loss.
    """

    passes: ClassVar[int] = 3
    size_option: ClassVar[str | None] = None

    steps: int = options.integer(1, 1)
    norm: str = options.choice("max", ASCENT_NORMS)
    per: str = options.choice("token", PERS)
    start: float = options.number(1e-5)
    first_step_from_clean: bool = dataclasses.field(init=False, default=False)

    def _settle_options(self) -> None:
        self.first_step_from_clean = self.start == 0 and self.clean_weight != 0
        super()._settle_options()

    def _default_step_size(self) -> float:
        return self.epsilon

    def _start(self, mask: Tensor | None) -> Start | None:
        return None if self.start == 0 else tiny_noise_start(self.start, mask)
