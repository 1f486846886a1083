"""SAM and AWP: the gradient at weights moved against the loss."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..passes import Inputs, buffers_held, synchronises
from ..perturbation import perturbed_weights
from . import options
from .attack import AttackRecipe
from .recipe import PassRecipe, norm_of, summed_over_ranks, write


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SAM(PassRecipe):
    """Trains with the gradient at the worst weights nearby, sharpness-aware minimisation.

    See docs/methods.md, "AdvWeight: SAM".

    rho        length of the weights' perturbation, over all trainable parameters together
    adaptive   True: ASAM, each element's share grows with its square
    same_draw  both passes with the same dropout masks
    the common options  (`help(uk.recipes.plain)`)

    eps_w = rho * g1/||g1||, L = CE(F(e; w + eps_w)). The clean gradient is not added, the second
    pass leaves BatchNorm's statistics alone, and the weights are restored bit for bit. Under DDP
    each rank ascends on its own data. 2 forwards, 2 backwards. Losses: loss (at the perturbed
    weights), clean_loss.
    """

    passes: ClassVar[int] = 2

    rho: float = options.number(0.05)
    adaptive: bool = options.flag(False)
    same_draw: bool = options.flag(True)

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        weights = [p for p in self.model.parameters() if p.requires_grad]
        with self._draws(self.same_draw) as draw:
            with draw():
                clean, gradients = self._weight_gradients(labels, scale, weights, ascent=False)
            length, gradients = (
                _adapted(self.rho, weights, gradients) if self.adaptive else (self.rho, gradients)
            )
            moved = perturbed_weights(
                weights, length, gradients=gradients, per="all", backend=self.backend
            )
            with draw(), moved, buffers_held(self.model):
                loss, _ = self._descend(labels, scale, last=True)
        return {"loss": loss, "clean_loss": clean}


def _adapted(
    rho: float, weights: Sequence[Tensor], gradients: list[Tensor | None]
) -> tuple[float, list[Tensor | None]]:
    """Returns ASAM's rho * w^2 g / || |w| g || as a length and a direction w^2 g, which
    `perturbed_weights` divides by its norm.
    """
    scaled = [
        None if g is None else w.detach() * g for w, g in zip(weights, gradients, strict=True)
    ]
    directions = [
        None if g is None else w.detach() * g for w, g in zip(weights, scaled, strict=True)
    ]
    sizes = [
        torch.stack([norm_of(x) for x in xs if x is not None]).norm().item()
        for xs in (scaled, directions)
    ]
    length = rho * sizes[1] / sizes[0] if 0 < sizes[0] < float("inf") else 0.0
    return (length if length < float("inf") else 0.0), directions


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class AWP(AttackRecipe):
    """Trains by steps taken at weights moved against the loss, adversarial weight perturbation.

    See docs/methods.md, "AdvWeight: AWP".

    gamma          each tensor moves by gamma * its own norm; those of two or more dimensions with
        "weight" in the name
    warmup_epochs  so many epochs without it, counted by `epoch_end`
    steps          K of a PGD attack on the input that training is at; 0: the clean input
    epsilon, step_size, norm, per   of that attack, as in `pgd_step`; step_size None:
        2.5 * epsilon / steps
    same_draw      every pass with the same dropout masks
    the common options  (`help(uk.recipes.plain)`)

    v = gamma * ||w||/||g|| * g, L = CE(F(x_adv; w + v)). `backward` restores w bit for bit;
    `before_step` goes to w + v again, where the optimizer steps (and decays), and `after_step` puts
    that step on w. Under DDP v is of all ranks' data. 2 + K forwards, 2 backwards and K that stop
    at the embedding. Losses: loss (at the perturbed weights).
    """

    kept: ClassVar[tuple[str, ...]] = ("epoch",)

    passes: ClassVar[int] = 2

    gamma: float = options.number(0.01)
    warmup_epochs: int = options.integer(0, 0)
    steps: int = options.integer(0, 0)
    epoch: int = dataclasses.field(init=False, default=0)
    _gradients: list[Tensor | None] = dataclasses.field(init=False, default_factory=list)
    _moved: contextlib.ExitStack | None = dataclasses.field(init=False, default=None)
    _at: list[Tensor] = dataclasses.field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights = [
            p
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.dim() > 1 and "weight" in name
        ]

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        # of a step that left it out
        self.after_step()
        self._gradients = []
        with self._draws(self.same_draw) as draw:
            delta = self._attack(labels, scale, draw)
            if self.gamma and self.epoch >= self.warmup_epochs:
                with draw():
                    _, self._gradients = self._weight_gradients(
                        labels, scale, self._weights, delta, ascent=True
                    )
                # ranks that step at different weights would part
                if synchronises(self.model):
                    summed_over_ranks(self.model, self._gradients)
            with draw(), self._perturbed():
                loss, _ = self._descend(labels, scale, delta, last=True)
        return {"loss": loss}

    def before_step(self) -> None:
        """Goes to w + v of the last `backward`, where the optimizer is to step."""
        self.after_step()
        if self._gradients:
            self._moved = self._perturbed()
            self._at = [weight.detach().clone() for weight in self._weights]

    def after_step(self) -> None:
        """Puts the step taken at w + v on w."""
        if self._moved is None:
            return
        steps = [weight.detach() - at for weight, at in zip(self._weights, self._at, strict=True)]
        self._leave()
        write(
            self._weights,
            [weight.detach() + step for weight, step in zip(self._weights, steps, strict=True)],
        )

    def epoch_end(self) -> None:
        """Counts an epoch, for `warmup_epochs`."""
        self.epoch += 1

    def close(self) -> None:
        """Removes the hooks; weights that are moved come back first."""
        self._leave()
        super().close()

    def _leave(self) -> None:
        moved, self._moved, self._at = self._moved, None, []
        if moved is not None:
            moved.close()

    def _perturbed(self) -> contextlib.ExitStack:
        """Moves the weights to w + v until it is closed; each tensor has an epsilon of its own."""
        if not self._gradients:
            return contextlib.ExitStack()
        # those that were made are undone on an error
        with contextlib.ExitStack() as moves:
            for weight, gradient, length in zip(
                self._weights, self._gradients, _lengths(self._weights), strict=True
            ):
                moved = perturbed_weights(
                    [weight], self.gamma * length, gradients=[gradient], backend=self.backend
                )
                moves.enter_context(moved)
            return moves.pop_all()


def _lengths(tensors: Sequence[Tensor]) -> list[float]:
    """Returns L2 norms, fetched from the device in one go."""
    return torch.stack([norm_of(tensor) for tensor in tensors]).tolist() if tensors else []
