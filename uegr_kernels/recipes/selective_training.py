"""RoAST: adversarial embeddings held alike, and a selective update with one mask an epoch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..divergence import uegr_loss
from ..selective import select_gradients_, selection_probability
from .attack import climb, tiny_noise
from .consistency import symmetric_divergence
from .recipe import recomputed
from .saliency import SaliencyRecipe
from .selection import agreed, check_seed


class RoAST(SaliencyRecipe):
    """Adversarial perturbation and selective training with one mask an epoch (METHODS 1, RoAST).

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
        options  (`PassRecipe`)

    Give as `embedding` what is to be perturbed: the published form perturbs after LayerNorm and
    dropout. Call `prepare(batches)` for masks in the first epoch, else it is trained whole. 3
    forwards, 2 backwards and 1 that stops at the embedding. An embedding that is recomputed by
    activation checkpointing raises. Losses: loss, clean_loss, adversarial_loss (paper), divergence.
    """

    kept = (*SaliencyRecipe.kept, "seed")
    norm = "max"

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        epsilon: float = 0.1,
        kl_weight: float = 0.01,
        noise: float = 1e-5,
        threshold: float = 0.9,
        sharpness: float = 10.0,
        min_probability: float = 0.0,
        names: str | Sequence[str] | None = None,
        form: str = "paper",
        detach_embedding: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        given = (("epsilon", epsilon), ("kl_weight", kl_weight), ("noise", noise))
        epsilon, kl_weight, noise = (checks.number(name, value, 0) for name, value in given)
        checks.choice("form", form, ("paper", "code"))
        checks.flag("detach_embedding", detach_embedding)
        self._selection: dict[str, Any] = dict(
            threshold=threshold, sharpness=sharpness, min_probability=min_probability
        )
        self._selection |= dict(normalization="rank", direction="salient", scope="global")
        # raises for a wrong option
        selection_probability(torch.zeros(1, device="cpu"), **self._selection, backend="reference")
        seed = check_seed(seed)
        self.epsilon, self.kl_weight, self.noise, self.form, self.detach_embedding = (
            epsilon,
            kl_weight,
            noise,
            form,
            detach_embedding,
        )
        super().__init__(model, embedding, optimizer, names=names, **options)
        self._drawn = seed is None
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        with self._pass() as clean:  # first, as in R-Drop
            clean.batch.keeps_output |= self.detach_embedding
            z0 = self._runner.call(clean)
        at = clean.seen if self.detach_embedding else None
        pass_ = self._ascend(labels, scale, tiny_noise(self.noise, clean.mask), at=at)
        delta = climb(
            pass_,
            step_size=self.epsilon,
            radius=float("inf"),
            norm=self.norm,
            per="token",
            backend=self.backend,
        )
        with self._runner.without_sync(), self._pass(delta, at=at) as pass_:
            z1 = self._runner.call(pass_)
        if self.form == "paper":
            parts = uegr_loss(
                z0, [z1], labels, return_parts=True, **self._loss_options, backend=self.backend
            )
            term, losses = (
                parts.loss,
                {"clean_loss": parts.clean_loss, "adversarial_loss": parts.adversarial_loss},
            )
        else:
            parts = self._label_loss(z0, labels)
            term, losses = parts.loss / 2, {"clean_loss": parts.clean_loss}
        divergence = symmetric_divergence(
            z0, z1, labels, "mean" if self.form == "paper" else "sum", **self._loss_options
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
            self.batches = 1  # the first batch of an epoch is not gathered

    def _mask(self, saliency: list[Tensor]) -> list[Tensor]:
        """Bernoulli(p)/p, p of the rank over all tensors together; fixed by the seed and the
        epoch.
        """
        if self._drawn:
            self.seed, self._drawn = agreed(self.seed), False
        holders = [torch.empty_like(s) for s in saliency]
        for holder in holders:
            holder.grad = torch.ones_like(holder)
        options: dict[str, Any] = dict(
            seed=self.seed, step=self.epoch + 1, **self._selection, backend=self.backend
        )
        select_gradients_(holders, saliency=saliency, **options)
        return [holder.grad for holder in holders if holder.grad is not None]
