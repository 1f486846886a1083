"""RoAST: adversarial embeddings held alike, and a selective update with one mask an epoch."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..passes import Inputs
from ..selective import select_gradients_
from ..selective.options import agreed_seed
from . import options
from .attack import climb, tiny_noise_start
from .consistency import symmetric_divergence
from .recipe import recomputed
from .saliency import SaliencyRecipe


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RoAST(SaliencyRecipe):
    """Trains on perturbed embeddings, with one mask of the gradients an epoch.

    See docs/methods.md, "RoAST".

    epsilon                of every token: delta = epsilon * g / max |g|, from a start U(0, 1) *
        noise in a pass of its own
    kl_weight              lambda
    threshold, sharpness   alpha and beta of p over the rank of the gathered g^2; min_probability  a
        floor of p
    names                  of the parameters that are masked, as in `SaliencyRecipe`
    form                   "paper": CE(z0) + CE(z1) + lambda * (KL + KL)/2, batch means; "code":
        CE(z0)/2 + lambda * (KL + KL)/2, KL summed
    detach_embedding       True: h is the first pass's output and gets no adversarial gradient, as
        in the public code
    seed                   of the masks; None: drawn from torch's default CPU generator;  the common
        options  (`help(uk.recipes.plain)`)

    Give as `embedding` what is to be perturbed: the published form perturbs after LayerNorm and
    dropout. Call `prepare(batches)` for masks in the first epoch, else it is trained whole. 3
    forwards, 2 backwards and 1 that stops at the embedding. An embedding that is recomputed by
    activation checkpointing raises. Losses: loss, clean_loss, adversarial_loss (paper), divergence.
    """

    kept: ClassVar[tuple[str, ...]] = (*SaliencyRecipe.kept, "seed")

    passes: ClassVar[int] = 3
    size_option: ClassVar[str | None] = "epsilon"

    epsilon: float = options.number(0.1)
    kl_weight: float = options.number(0.01)
    noise: float = options.number(1e-5)
    threshold: float = options.number(0.9, -math.inf)
    sharpness: float = options.number(10.0)
    min_probability: float = options.number(0.0, 0, 1)
    form: str = options.choice("paper", ("paper", "code"))
    detach_embedding: bool = options.flag(False)
    seed: int | None = options.integer(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._drawn = self.seed is None
        if self.seed is None:
            self.seed = int(torch.randint(2**62, ()))

    def _input_norm(self) -> str:
        return "max"

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        # first, as in R-Drop
        with self._pass() as clean:
            clean.batch.keeps_output |= self.detach_embedding
            z0 = self._runner.call(clean)
        at = clean.seen if self.detach_embedding else None
        pass_ = self._ascend(labels, scale, tiny_noise_start(self.noise, clean.mask), at=at)
        delta = climb(
            pass_,
            step_size=self.epsilon,
            radius=torch.finfo(torch.float32).max,
            norm="max",
            per="token",
            backend=self.backend,
        )
        with self._runner.without_sync(), self._pass(delta, at=at) as pass_:
            z1 = self._runner.call(pass_)
        if self.form == "paper":
            parts = self._loss_of(z0, labels, [z1])
            term, losses = (
                parts.loss,
                {"clean_loss": parts.clean_loss, "adversarial_loss": parts.adversarial_loss},
            )
        else:
            parts = self._loss_of(z0, labels)
            term, losses = parts.loss / 2, {"clean_loss": parts.clean_loss}
        divergence = symmetric_divergence(
            z0,
            z1,
            labels,
            "mean" if self.form == "paper" else "sum",
            task=self.task,
            ignore_index=self.ignore_index,
        )
        with self._pass(recomputed) as pass_:
            pass_.forward = False
            ((term + self.kl_weight * divergence) * scale).backward()
        of_labels = sum(losses.values()) / (1 if self.form == "paper" else 2)
        return {
            "loss": of_labels + self.kl_weight * divergence.detach(),
            **losses,
            "divergence": divergence.detach(),
        }

    def _gather_step(self, gradients: Sequence[Tensor | None]) -> None:
        if self.batches:
            self._gather(gradients)
        else:
            # the first batch of an epoch is not gathered
            self.batches = 1

    def _mask(self, saliency: list[Tensor]) -> list[Tensor]:
        """Returns Bernoulli(p)/p, p of the rank over all tensors together; fixed by the seed and
        the epoch.
        """
        if self._drawn and self.seed is not None:
            self.seed, self._drawn = agreed_seed(self.seed), False
        holders = [torch.empty_like(s) for s in saliency]
        for holder in holders:
            holder.grad = torch.ones_like(holder)
        select_gradients_(
            holders,
            seed=self.seed or 0,
            step=self.epoch + 1,
            saliency=saliency,
            threshold=self.threshold,
            sharpness=self.sharpness,
            min_probability=self.min_probability,
            normalization="rank",
            direction="salient",
            scope="global",
            backend=self.backend,
        )
        return [holder.grad for holder in holders if holder.grad is not None]
