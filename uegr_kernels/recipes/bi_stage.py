"""UEGR: the forward stage by BiStage, and the selective update."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..bistage import BiStage, StageOptions
from ..passes import Inputs
from . import options
from .lent_dropout import AdaptedDropouts
from .selection import SelectionRecipe


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class UEGR(StageOptions, SelectionRecipe):
    """Trains bi-stage: `BiStage` fills .grad, and the update goes to a random selection.

    See docs/methods.md, "UEGR" and "UEGR in detail".

    adaptive_dropout  True: until `close()` the model's nn.Dropout modules are `AdaptiveDropout` of
                      the same p; their state is in this state_dict, by name, not in the model's
    epsilon, passes, js_weight, norm, per, label_smoothing, ignore_index, task, passes_at_once,
    dropout, input_range, batch_axis, relative  of the forward stage, as in `BiStage`
    threshold, sharpness, normalization, direction, scope, statistics, rescale, min_probability,
    keep_probability, target  of the selection, as in SelectiveAdamW
    seed              of its masks; None: drawn from torch's default CPU generator
    backend           of the operators

    A SelectiveAdamW or SelectiveSGD given as the optimizer selects inside its step, by its own
    options and those named here; for any other optimizer, or none, `before_step` selects .grad. 1 +
    passes forwards and backwards, counted in batches. Losses: loss, clean_loss, adversarial_loss,
    divergence.
    """

    # The class's, as every recipe's; an instance has the stage's option of that name, which an
    # assignment without a type leaves alone.
    passes = 3  # type: ignore[misc]
    size_option: ClassVar[str | None] = "epsilon"
    kept_by_each_process: ClassVar[tuple[str, ...]] = ("adaptive_dropout",)

    adaptive_dropout: bool = options.flag(True)
    _runner: BiStage = dataclasses.field(init=False)
    _adapted: AdaptedDropouts | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive_dropout:
            self._adapted = AdaptedDropouts(self.model, self.backend)

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
        names = [field.name for field in dataclasses.fields(StageOptions)]
        return BiStage(self.model, self.embedding, **{name: getattr(self, name) for name in names})

    def _state(self) -> dict[str, Any]:
        if self._adapted is None:
            return super()._state()
        return super()._state() | {"adaptive_dropout": self._adapted.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        if self._adapted is not None:
            self._adapted.load_state_dict(state.pop("adaptive_dropout"))
        super()._load(state)

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        result = self._runner.backward(inputs, labels, scale=scale)
        return {
            "loss": result.loss,
            "clean_loss": result.clean_loss,
            "adversarial_loss": result.adversarial_loss,
            "divergence": result.divergence,
        }
