"""FreeLB: every pass along an ascending perturbation adds to one update."""

from typing import Any

import torch
from torch import Tensor, nn

from ..passes import attention_mask, check_count
from .attack import climb, in_a_cube
from .recipe import PassRecipe, check_choice, check_flag, check_number


class FreeLB(PassRecipe):
    """Free large-batch adversarial training: K passes along an ascending delta, one update from all of them (METHODS 1, FreeLB).

    steps      K, the passes, each with weight 1/K
    adv_lr     size of a step of delta;  init_mag  delta_0 is U(-1, 1) * init_mag / sqrt(L d) on the L real tokens
    max_norm   radius of the ball; 0: no projection
    norm       "l2"; "max": the gradient is divided by its largest |element|, the ball is |delta| <= max_norm; "linf": its sign is taken
    same_draw  one dropout draw for all passes of a batch
    the common options  (`PassRecipe`)

    K forwards, K backwards, no clean pass. Losses: loss, adversarial_loss (the mean over the passes).
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        steps: int = 3,
        adv_lr: float = 0.1,
        init_mag: float = 0.1,
        max_norm: float = 0.0,
        norm: str = "l2",
        same_draw: bool = True,
        **options: Any,
    ) -> None:
        check_count("steps", steps)
        check_number("adv_lr", adv_lr, 0)
        check_number("init_mag", init_mag, 0)
        check_number("max_norm", max_norm, -float("inf"))
        check_choice("norm", norm, ("l2", "max", "linf"))
        check_flag("same_draw", same_draw)
        self.steps, self.adv_lr, self.init_mag, self.max_norm, self.norm, self.same_draw = (
            steps,
            adv_lr,
            init_mag,
            max_norm,
            norm,
            same_draw,
        )
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        mask, losses = attention_mask(inputs), []
        delta: Any = in_a_cube(self.init_mag, mask) if self.init_mag else None
        radius = self.max_norm if self.max_norm > 0 else torch.finfo(torch.float32).max
        with self._draws(self.same_draw) as draw:
            for step in range(1, self.steps + 1):
                last = step == self.steps
                with draw():
                    loss, walk = self._descend(inputs, labels, scale, delta, weight=1 / self.steps, watched=not last, last=last)
                losses.append(loss)
                if not last:
                    delta = torch.zeros_like(walk.gradient) if walk.delta is None else walk.delta
                    options: dict[str, Any] = dict(step_size=self.adv_lr, radius=radius, norm=self.norm, per="sample", backend=self.backend)
                    delta = climb(delta, walk.gradient, mask, **options)
        mean = torch.stack(losses).mean()
        return {"loss": mean, "adversarial_loss": mean}
