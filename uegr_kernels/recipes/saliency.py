"""What the recipes share that mask gradients by squared gradients gathered over an epoch:
Child-Tuning-D and RoAST.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..passes import Inputs, synchronisers
from .recipe import PassRecipe, check_whole, named_parameters, summed_over_ranks


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SaliencyRecipe(PassRecipe):
    """Trains with the gradients of `names` multiplied by masks made of their squares, gathered
    batch by batch.

    names  of the parameters, such as "*layer*"; None: those with "layer" or "transformer.h" in the
           name, or, where there are none, all but the embedding's. The others are always updated
    """

    kept: ClassVar[tuple[str, ...]] = ("squares", "batches", "masks", "epoch")

    names: str | Sequence[str] | None = None
    _masked: list[Tensor] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.names is None:
            self._masked = _encoder(self.model, self.embedding)
        # sums over the batches of an epoch
        self.squares: list[Tensor] = []
        self.batches, self.epoch = 0, 0
        self.masks: list[Tensor] = []

    def _settle_options(self) -> None:
        super()._settle_options()
        if self.names is not None:
            self._masked = list(named_parameters(self.model, self.names).values())

    def prepare(self, batches: Iterable[tuple[Inputs, Tensor]]) -> None:
        """Makes the first masks before training, from one pass over (inputs, labels): the method as
        it is published.

        The model's mode is the caller's; .grad and buffers stay as they are. Without it the first
        epoch is trained whole, and its gradients make the masks.
        """
        try:
            with contextlib.ExitStack() as on_error:
                on_error.callback(self._take_squares, self.squares, self.batches)
                self._take_squares([], 0)
                for inputs, labels in batches:
                    self._check(1.0, inputs, labels)
                    _, gradients = self._weight_gradients(labels, 1.0, self._masked, ascent=True)
                    self._gather(gradients)
                if not self.squares:
                    raise ValueError("batches holds none; give pairs (inputs, labels)")
                on_error.pop_all()
        finally:
            self._taken = None
        if synchronisers(self.model):
            summed_over_ranks(self.model, self.squares)
        self._settle()

    def before_step(self) -> None:
        """Masks the gradients, and gathers their squares for the next masks."""
        self._gather_step([p.grad for p in self._masked])
        # no masks yet in the first epoch
        for p, mask in zip(self._masked, self.masks, strict=False):
            if p.grad is not None:
                p.grad.mul_(mask)

    def epoch_end(self) -> None:
        """Makes the masks of the next epoch."""
        self.epoch += 1
        if self.squares:
            self._settle()

    def _gather_step(self, gradients: Sequence[Tensor | None]) -> None:
        self._gather(gradients)

    def _gather(self, gradients: Sequence[Tensor | None]) -> None:
        check_whole(self._masked, "train with DDP")
        self.squares = self.squares or [_wide(p) for p in self._masked]
        for total, gradient in zip(self.squares, gradients, strict=True):
            if gradient is not None:
                square = self._square(gradient.detach().to(total.dtype))
                # a step that a loss scaler skips must not spoil an epoch's masks
                total.add_(torch.where(square.isfinite(), square, 0))
        self.batches += 1

    def _square(self, gradient: Tensor) -> Tensor:
        return gradient.square()

    def _settle(self) -> None:
        """Makes new masks of `squares`, which then are gathered anew."""
        self.masks = self._mask(self.squares)
        self._take_squares([], 0)

    def _take_squares(self, squares: list[Tensor], batches: int) -> None:
        self.squares, self.batches = squares, batches

    def _mask(self, saliency: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError


def _encoder(model: nn.Module, embedding: nn.Module | None) -> list[Tensor]:
    words = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [p for name, p in trainable if "layer" in name or "transformer.h" in name]
    return [*(layers or (p for _, p in trainable if id(p) not in words))]


def _wide(p: Tensor) -> Tensor:
    return torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
