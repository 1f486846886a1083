"""UEGR: the forward stage by BiStage, and the selective update."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..bistage import BiStage
from .recipe import Recipe
from .selection import OPTIONS, Selection


class SelectiveUpdate:
    """What the recipes with a selective update add to a recipe: `_selection`, applied in `before_step` and kept in checkpoints."""

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
    """Bi-stage training (METHODS 1 and 2, UEGR): `BiStage` fills .grad, and the update goes to a random selection of the elements.

    seed     of the selection's masks; None: drawn from torch's default CPU generator
    options  `BiStage`'s (epsilon, passes, js_weight, norm, per, dropout, passes_at_once, task, ...) and the selection's (threshold,
             sharpness, normalization, direction, scope, ...)

    A SelectiveAdamW or SelectiveSGD given as the optimizer selects inside its step, by its own options and those named here; for any
    other optimizer, or none, `before_step` selects .grad. 1 + passes forwards and backwards, counted in batches.
    Losses: loss, clean_loss, adversarial_loss, divergence.
    """

    kept = ("selection",)

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
        super().__init__(model, optimizer)
        selection = {name: options.pop(name) for name in OPTIONS if name in options}
        unknown = options.keys() - inspect.signature(BiStage).parameters.keys()
        if unknown:
            raise TypeError(f"UEGR has no option {min(unknown)!r}; its options are BiStage's, those of the selection, and seed")
        self._runner = BiStage(model, embedding, backend=backend, **options)
        self._select(selection, seed, backend)

    def _backward(self, inputs: Any, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self._runner.backward(inputs, labels, scale=scale)._asdict()
        del result["logits"]
        return result
