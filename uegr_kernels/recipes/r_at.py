"""R-AT: R-Drop on adversarial examples; and with the selective update."""

from typing import Any

import torch
from torch import Tensor, nn

from ..passes import attention_mask
from ..perturbation import fgm_perturbation
from .r_drop import RDrop
from .selection import OPTIONS
from .uegr import SelectiveUpdate


class RAT(RDrop):
    """R-Drop on adversarial examples: a clean pass, and two perturbed ones held alike (METHODS 1, R-AT).

    epsilon, norm, per  the size of delta, as in `fgm_perturbation`
    alpha, reduction    as in `RDrop`;  the common options  (`PassRecipe`)

    L = CE(F(e)) + (CE(z1) + CE(z2))/2 + alpha * (KL(P1||P2) + KL(P2||P1))/2, z_k = F(e + delta; w, u_k). 3 forwards and backwards.
    Losses: loss, clean_loss, adversarial_loss, divergence.
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
        fgm_perturbation(torch.zeros(1, 2, device="cpu"), **self._perturbation, backend="reference")  # raises for a wrong option
        super().__init__(model, embedding, optimizer, **options)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        clean, walk = self._descend(inputs, labels, scale, watched=True)
        delta = fgm_perturbation(walk.gradient, mask=attention_mask(inputs), **self._perturbation, backend=self.backend)
        losses = self._pair(inputs, labels, scale, delta)
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
