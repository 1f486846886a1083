"""Child-Tuning: gradients of a random part of the elements (F), or of the part that matters to
the task (D).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from . import options
from .baselines import Plain
from .recipe import write
from .saliency import SaliencyRecipe
from .selection import TARGETS, SelectiveUpdate


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ChildTuningF(SelectiveUpdate, Plain):
    """Trains with a random part of the gradient, drawn anew in every step.

    See docs/methods.md, "Child-Tuning-F".

    keep_probability  p_F, in (0, 1]: g * mask(p_F)/p_F for every element of every parameter
    rescale           False: g * mask(p_F)
    target            "gradient": b*g/p feeds the moments | "update": g does, and b/p multiplies the
                      step, for which the optimizer must be a SelectiveAdamW or SelectiveSGD
    seed              of the masks; None: drawn from torch's default CPU generator
    the common options  (`help(uk.recipes.plain)`)

    A SelectiveAdamW or SelectiveSGD given as the optimizer selects inside its step, whose
    normalization becomes "constant"; for any other, `before_step` selects .grad. 1 forward, 1
    backward. Losses: loss, clean_loss.
    """

    sets_selection: ClassVar[bool] = True

    keep_probability: float = options.positive_share(0.3)
    rescale: bool = options.flag(True)
    target: str = options.choice("gradient", TARGETS)
    seed: int | None = options.integer(None)

    def _selection_options(self) -> dict[str, object]:
        return {
            "normalization": "constant",
            "keep_probability": self.keep_probability,
            "rescale": self.rescale,
            "target": self.target,
        }


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class ChildTuningD(SaliencyRecipe, Plain):
    """Trains the elements with the largest Fisher information, the same for the whole run.

    See docs/methods.md, "Child-Tuning-D".

    keep_probability  p_D, the share that is trained, in (0, 1]; ties at the cut are trained
    names             of the parameters that this is about, as in `SaliencyRecipe`; the others are
        always trained
    max_grad_norm     each tensor's gradient is clipped to it before it is squared
    target            "gradient": g * M feeds the optimizer, and weight decay acts on every element;
                      "update": the step of an element that is not trained is undone, decay included
    the common options  (`help(uk.recipes.plain)`)

    Call `prepare(batches)` before training, or the first epoch trains everything and makes the
    mask. 1 forward, 1 backward. Losses: loss, clean_loss.
    """

    keep_probability: float = options.positive_share(0.3)
    max_grad_norm: float = options.number(1.0)
    target: str = options.choice("gradient", TARGETS)
    _before: list[Tensor] = dataclasses.field(init=False, default_factory=list)

    def before_step(self) -> None:
        """Masks the gradients."""
        if self.target == "gradient" or not self.masks:
            super().before_step()
        else:
            self._before = [p.detach().clone() for p in self._masked]

    def after_step(self) -> None:
        """Undoes the step where nothing is to be trained, with target="update"."""
        # nothing to undo without a before_step
        if self._before:
            write(
                self._masked,
                [
                    torch.where(*each)
                    for each in zip(self.masks, self._masked, self._before, strict=True)
                ],
            )
        self._before = []

    def _gather_step(self, gradients: Sequence[Tensor | None]) -> None:
        if not self.masks:
            self._gather(gradients)

    def _square(self, gradient: Tensor) -> Tensor:
        clipped: Tensor = gradient * (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1)
        return clipped.square()

    def _mask(self, saliency: list[Tensor]) -> list[Tensor]:
        """Returns where the saliency is at least its (1 - p_D) percentile over all tensors,
        interpolated linearly.
        """
        together = torch.cat([s.flatten() for s in saliency])
        position = (together.numel() - 1) * (1 - self.keep_probability)
        low, high = (
            together.kthvalue(math.floor(position) + 1).values,
            together.kthvalue(math.ceil(position) + 1).values,
        )
        cut = low + (high - low) * (position - math.floor(position))
        return [s >= cut for s in saliency]
