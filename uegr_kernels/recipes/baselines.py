"""The plain baselines: the loss alone, and with an L1 or L2 penalty on the weights."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from ..passes import Inputs
from . import options
from .recipe import PassRecipe, whole


class Plain(PassRecipe):
    """Trains as usual, the baseline of every table: L = CE(F(e; w, u), y).

    See docs/methods.md, "Plain, L1 and L2".

    task             "classification", or "regression": squared error in place of CE
    label_smoothing  number in [0, 1];  ignore_index  integer: as in `uegr_loss`
    dropout          rate in [0, 1] of every nn.Dropout* and AdaptiveDropout in the recipe's passes,
        0.0 for the tables' "no dropout"; None: the layers' own
    input_range      (low, high), to which the perturbed input is clamped; with embedding=None only
    batch_axis       0 or 1, the batch's in the embedding's output; None: found by N
    relative         True: every length of a perturbation of the embeddings (epsilon, steps, radii,
        random starts) is in multiples of the L2 norm of each sample's (real tokens, no gradient).
        Not with norm="linf", nor where no embedding is perturbed, as here
    backend          of the operators: "auto", "reference", "cpp", "cuda" or "triton"

    These are the common options, which nearly all recipes have. Raises TypeError or ValueError for
    wrong ones, before anything has changed.

    1 forward, 1 backward. Losses: loss, clean_loss.
    Equivalent to: `F.cross_entropy(model(inputs), labels).backward()`.
    """

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        loss, _ = self._descend(labels, scale, last=True)
        return {"loss": loss, "clean_loss": loss}

    def _descend_penalised(
        self, labels: Tensor, scale: float | Tensor, weight: float, penalties: Iterable[Tensor]
    ) -> dict[str, Tensor]:
        """Adds the gradient of the loss and weight * the sum of the penalties, which are computed
        as they are read, after the forward pass; returns the losses.
        """
        with self._pass() as pass_:
            parts = self._loss_of(self._runner.call(pass_), labels)
            of_tensors = [whole(each).to(parts.loss) for each in penalties]
            penalty = weight * sum(of_tensors, torch.zeros_like(parts.loss))
            ((parts.loss + penalty) * scale).backward()
        return {
            "loss": parts.clean_loss + penalty.detach(),
            "clean_loss": parts.clean_loss,
            "penalty": penalty.detach(),
        }


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _Penalised(Plain):
    weight: float = options.number(0.0)

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        weights = (p for p in self.model.parameters() if p.requires_grad)
        return self._descend_penalised(labels, scale, self.weight, map(self._penalty, weights))

    def _penalty(self, p: Tensor) -> Tensor:
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class L1(_Penalised):
    """Trains with an L1 penalty on the weights: L = CE + weight * sum |w|.

    See docs/methods.md, "Plain, L1 and L2".

    weight  >= 0, over all trainable parameters;  the common options  (`help(uk.recipes.plain)`)
    1 forward, 1 backward. Losses: loss, clean_loss, penalty (weight * sum |w|).
    """

    weight: float = options.number(1e-5)

    def _penalty(self, p: Tensor) -> Tensor:
        return p.abs().sum(dtype=torch.promote_types(p.dtype, torch.float32))


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class L2(_Penalised):
    """Trains with an L2 penalty on the weights: L = CE + weight/2 * sum w^2.

    See docs/methods.md, "Plain, L1 and L2".

    weight  >= 0, over all trainable parameters, as torch.optim.SGD's weight_decay;  the common
        options  (`help(uk.recipes.plain)`)
    1 forward, 1 backward. Losses: loss, clean_loss, penalty (weight/2 * sum w^2).
    """

    weight: float = options.number(1e-4)

    def _penalty(self, p: Tensor) -> Tensor:
        return p.square().sum(dtype=torch.promote_types(p.dtype, torch.float32)) / 2
