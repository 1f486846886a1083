"""UEGR: the forward stage by BiStage, and the selective update."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..bistage import BiStage
from ..core import checks
from .lent_dropout import AdaptedDropouts
from .recipe import Recipe
from .selection import OPTIONS, Selection


class SelectiveUpdate:
    """What the recipes with a selective update add to a recipe: `_selection`, applied in
    `before_step` and kept in checkpoints.
    """

    _selection: Selection
    model: nn.Module
    optimizer: Any
    close: Callable[[], None]

    def _select(self, options: dict[str, Any], seed: int | None, backend: str) -> None:
        """Sets the selection up; closes the recipe where an option is wrong."""
        try:
            self._selection = Selection(self.model, self.optimizer, options, seed, backend)
        except BaseException:
            self.close()
            raise

    @property
    def selection(self) -> dict[str, Any]:
        """Seed and step of the masks, for checkpoints."""
        return dict(self._selection.state)

    @selection.setter
    def selection(self, state: dict[str, Any]) -> None:
        self._selection.load(state)

    def before_step(self) -> None:
        """Selects the gradients (Eq. 7-9), but where the optimizer selects inside its step."""
        self._selection.before_step(self.optimizer)


class UEGR(SelectiveUpdate, Recipe):
    """Bi-stage training (METHODS 1 and 2, UEGR): `BiStage` fills .grad, and the update goes to a
    random selection of the elements.

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

    kept: tuple[str, ...] = ("selection",)
    _adapted: AdaptedDropouts | None = None

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: Any = None,
        *,
        adaptive_dropout: bool = True,
        seed: int | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer)
        checks.flag("adaptive_dropout", adaptive_dropout)
        selection = {name: options.pop(name) for name in OPTIONS if name in options}
        unknown = options.keys() - inspect.signature(BiStage).parameters.keys()
        if unknown:
            raise TypeError(
                f"UEGR has no option {min(unknown)!r}; its options are those of BiStage and the "
                "selection, adaptive_dropout and seed"
            )
        self._runner = BiStage(model, embedding, backend=backend, **options)
        self._select(selection, seed, backend)
        if adaptive_dropout:
            self._adapted, self.kept = (
                AdaptedDropouts(model, backend),
                ("selection", "adaptive_dropout"),
            )

    @property
    def adaptive_dropout(self) -> dict[str, Tensor]:
        """The state of each adaptive dropout by its module's name, for checkpoints."""
        return self._adapted.state_dict() if self._adapted is not None else {}

    @adaptive_dropout.setter
    def adaptive_dropout(self, state: dict[str, Tensor]) -> None:
        if self._adapted is not None:
            self._adapted.load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        reason: str | None = None
        if self._adapted is not None:
            reason = "it was saved with adaptive_dropout=False; build it so"
            if "adaptive_dropout" in state:
                reason = self._adapted.why_not(state["adaptive_dropout"])
        if reason is not None and state.get("recipe") == type(self).__name__:
            raise ValueError(f"the state cannot be loaded: {reason}")
        super().load_state_dict(state)

    def close(self) -> None:
        super().close()
        if self._adapted is not None:
            self._adapted.close()

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self._runner.backward(inputs, labels, scale=scale)._asdict()
        del result["logits"]
        return result
