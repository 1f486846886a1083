"""SAM: the gradient at the worst weights nearby."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..passes import buffers_held
from ..perturbation import perturbed_weights
from .recipe import PassRecipe, check_flag, check_number, norm_of


class SAM(PassRecipe):
    """Sharpness-aware minimisation: the gradient at the worst weights nearby (METHODS 1, AdvWeight: SAM).

    rho        length of the weights' perturbation, over all trainable parameters together
    adaptive   True: ASAM, each element's share grows with its square
    same_draw  both passes with the same dropout masks
    the common options  (`PassRecipe`)

    eps_w = rho * g1/||g1||, L = CE(F(e; w + eps_w)). The clean gradient is not added, the second pass leaves BatchNorm's statistics
    alone, and the weights are restored bit for bit. Under DDP each rank ascends on its own data. 2 forwards, 2 backwards.
    Losses: loss (at the perturbed weights), clean_loss.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        same_draw: bool = True,
        **options: Any,
    ) -> None:
        check_number("rho", rho, 0)
        check_flag("adaptive", adaptive)
        check_flag("same_draw", same_draw)
        self.rho, self.adaptive, self.same_draw = rho, adaptive, same_draw
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        weights = [p for p in self.model.parameters() if p.requires_grad]
        with self._draws(self.same_draw) as draw:
            with draw():
                clean, gradients = self._weight_gradients(inputs, labels, scale, weights, ascent=False)
            length, gradients = _adapted(self.rho, weights, gradients) if self.adaptive else (self.rho, gradients)
            moved = perturbed_weights(weights, length, gradients=gradients, per="all", backend=self.backend)
            with draw(), moved, buffers_held(self.model):
                loss, _ = self._descend(inputs, labels, scale, last=True)
        return {"loss": loss, "clean_loss": clean}


def _adapted(rho: float, weights: Sequence[Tensor], gradients: list[Tensor | None]) -> tuple[float, list[Tensor | None]]:
    """ASAM's rho * w^2 g / || |w| g || as a length and a direction w^2 g, which `perturbed_weights` divides by its norm."""
    scaled = [None if g is None else w.detach() * g for w, g in zip(weights, gradients, strict=True)]
    directions = [None if g is None else w.detach() * g for w, g in zip(weights, scaled, strict=True)]
    sizes = [torch.stack([norm_of(x) for x in xs if x is not None]).norm().item() for xs in (scaled, directions)]
    length = rho * sizes[1] / sizes[0] if 0 < sizes[0] < float("inf") else 0.0
    return (length if length < float("inf") else 0.0), directions
