"""UEGR: the forward stage by BiStage, and the selective update."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch_axis import Inputs
from ..bistage import BiStage
from ..core import checks
from .lent_dropout import AdaptedDropouts
from .selection import SelectiveUpdate, selection_of

# what BiStage is built with beside a model and an embedding
STAGE_OPTIONS = inspect.signature(BiStage).parameters.keys() - {"model", "embedding"}


class UEGR(SelectiveUpdate):
    """Trains bi-stage: `BiStage` fills .grad, and the update goes to a random selection.

    See docs/methods.md, "UEGR" and "UEGR in detail".

    adaptive_dropout  True: until `close()` the model's nn.Dropout modules are `AdaptiveDropout` of
                      the same p; their state is in this state_dict, by name, not in the model's
    seed              of the selection's masks; None: drawn from torch's default CPU generator
    options           `BiStage`'s (epsilon, passes, js_weight, norm, per, dropout, passes_at_once,
                      task, ...) and the selection's (threshold, sharpness, normalization, ...)

    A SelectiveAdamW or SelectiveSGD given as the optimizer selects inside its step, by its own
    options and those named here; for any other optimizer, or none, `before_step` selects .grad. 1 +
    passes forwards and backwards, counted in batches. Losses: loss, clean_loss, adversarial_loss,
    divergence.
    """

    passes: ClassVar[int] = 3

    _runner: BiStage

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        adaptive_dropout: bool = True,
        seed: int | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        checks.flag("adaptive_dropout", adaptive_dropout)
        self.seed = None if seed is None else checks.integer("seed", seed)
        self.backend = backend
        self._selected, self._stage_options = selection_of(options)
        self._adapted: AdaptedDropouts | None = None
        super().__init__(model, embedding, optimizer)
        if adaptive_dropout:
            self._adapted = AdaptedDropouts(model, backend)

    @classmethod
    def option_names(cls) -> set[str]:
        """Returns the names of the keywords that the recipe is built with."""
        return super().option_names() | STAGE_OPTIONS | {"adaptive_dropout", "seed"}

    @property
    def adaptive_dropout(self) -> dict[str, Tensor]:
        """Returns the state of each adaptive dropout by its module's name, for checkpoints."""
        return self._adapted.state_dict() if self._adapted is not None else {}

    @adaptive_dropout.setter
    def adaptive_dropout(self, state: dict[str, Tensor]) -> None:
        if self._adapted is not None:
            self._adapted.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes over what `state_dict` gave."""
        reason: str | None = None
        if self._adapted is not None:
            reason = "it was saved with adaptive_dropout=False; build it so"
            if "adaptive_dropout" in state:
                reason = self._adapted.why_not(state["adaptive_dropout"])
        if reason is not None and state.get("recipe") == type(self).__name__:
            raise ValueError(f"the state cannot be loaded: {reason}")
        super().load_state_dict(state)

    def close(self) -> None:
        """Removes the hooks, and gives the model its nn.Dropout back."""
        super().close()
        if self._adapted is not None:
            self._adapted.close()

    def _make_runner(self) -> BiStage:
        return BiStage(self.model, self.embedding, backend=self.backend, **self._stage_options)

    def _names_kept(self) -> tuple[str, ...]:
        return self.kept if self._adapted is None else (*self.kept, "adaptive_dropout")

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self._runner.backward(inputs, labels, scale=scale)._asdict()
        del result["logits"]
        return result
