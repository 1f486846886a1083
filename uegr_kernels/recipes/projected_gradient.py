"""PGD-K and AdvEmbed: projected gradient ascent on the embeddings."""

from typing import Any

from torch import Tensor, nn

from ..core import checks
from .attack import AttackRecipe, Start, tiny_noise, uniform_in_ball


class PGD(AttackRecipe):
    """Adversarial training with K steps of projected gradient ascent on the embeddings, PGD-K
    (METHODS 1, PGD-K).

    epsilon, norm, per     radius, and whose norm, as in `pgd_step`
    steps, step_size       K, and the size of one; None: 2.5 * epsilon / K
    clean_weight           of the clean pass's loss in L; 0: no clean pass
    random_start           start uniformly in the ball, not at 0
    same_draw              the same dropout masks in every pass
    first_step_from_clean  the clean pass's gradient makes the first step and saves a pass; needs a
        clean pass and no random start
    the common options     (`PassRecipe`)

    K + 2 forwards, 2 backwards and K that stop at the embedding; one less of each with
    first_step_from_clean. Losses: loss, clean_loss, adversarial_loss.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        steps: int = 3,
        step_size: float | None = None,
        norm: str = "l2",
        per: str = "sample",
        clean_weight: float = 1.0,
        random_start: bool = False,
        same_draw: bool = False,
        first_step_from_clean: bool = False,
        **options: Any,
    ) -> None:
        clean_weight = checks.number("clean_weight", clean_weight, 0)
        checks.flag("random_start", random_start)
        checks.flag("first_step_from_clean", first_step_from_clean)
        if first_step_from_clean and (random_start or clean_weight == 0):
            raise ValueError(
                "first_step_from_clean=True needs the clean pass's gradient; leave "
                "random_start out, and clean_weight above 0"
            )
        self.clean_weight, self.random_start, self.first_step_from_clean = (
            clean_weight,
            random_start,
            first_step_from_clean,
        )
        steps_options: dict[str, Any] = dict(
            epsilon=epsilon,
            steps=steps,
            step_size=step_size,
            norm=norm,
            per=per,
            same_draw=same_draw,
        )
        super().__init__(model, embedding, optimizer, **steps_options, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        losses, clean = {}, None
        with self._draws(self.same_draw) as draw:
            if self.clean_weight:
                with draw():
                    options: dict[str, Any] = dict(
                        weight=self.clean_weight, watched=self.first_step_from_clean
                    )
                    losses["clean_loss"], clean = self._descend(labels, scale, **options)
            delta = self._attack(labels, scale, draw, clean if self.first_step_from_clean else None)
            with draw():
                losses["adversarial_loss"], _ = self._descend(labels, scale, delta, last=True)
        return {
            "loss": self.clean_weight * losses.get("clean_loss", 0.0) + losses["adversarial_loss"],
            **losses,
        }

    def _start(self, mask: Tensor | None) -> Start | None:
        return (
            uniform_in_ball(self.epsilon, self.norm, self.per, mask) if self.random_start else None
        )


class AdvEmbed(PGD):
    """Adversarial training with one step per token on the embeddings, AdvEmbed (METHODS 1,
    AdvEmbed).

    epsilon, norm, per  0.1, and g divided by its largest |element| of each token; or as in `PGD`
    steps, step_size    1, of epsilon
    start               delta starts as U(0, 1) * start, in a pass of its own; 0: at the clean
        pass's gradient, which makes it `AT`'s cost
    the rest            as in `PGD`

    3 forwards, 2 backwards and 1 that stops at the embedding. Losses: loss, clean_loss,
    adversarial_loss.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        steps: int = 1,
        step_size: float | None = None,
        norm: str = "max",
        per: str = "token",
        start: float = 1e-5,
        clean_weight: float = 1.0,
        same_draw: bool = False,
        **options: Any,
    ) -> None:
        start = checks.number("start", start, 0)
        self.start = start
        options |= dict(
            epsilon=epsilon,
            steps=steps,
            step_size=epsilon if step_size is None else step_size,
            norm=norm,
            per=per,
        )
        from_clean = start == 0 and clean_weight != 0
        super().__init__(
            model,
            embedding,
            optimizer,
            clean_weight=clean_weight,
            same_draw=same_draw,
            first_step_from_clean=from_clean,
            **options,
        )

    def _start(self, mask: Tensor | None) -> Start | None:
        return None if self.start == 0 else tiny_noise(self.start, mask)
