"""UEGR: the forward stage by BiStage, and the selective update."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..bistage import BiStage
from ..passes import Inputs
from . import options
from .lent_dropout import AdaptedDropouts
from .selection import SelectionRecipe


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class UEGR(SelectionRecipe):
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

    passes_of_step: ClassVar[int] = 3

    adaptive_dropout: bool = options.flag(True)
    # `BiStage` checks its own; a test compares the defaults
    epsilon: float = 0.1
    passes: int = 2
    js_weight: float = 0.01
    norm: str = "l2"
    per: str = "sample"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    task: str = "classification"
    passes_at_once: int | None = None
    dropout: Sequence[float] | None = None
    input_range: tuple[float, float] | None = None
    batch_axis: int | None = None
    relative: bool = False
    backend: str = options.backend()
    _runner: BiStage = dataclasses.field(init=False)

    _adapted: AdaptedDropouts | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive_dropout:
            self._adapted = AdaptedDropouts(self.model, self.backend)

    def state_dict(self) -> dict[str, object]:
        """Returns what a resumed run needs: the masks' seed and step, and the state of each
        adaptive dropout by its module's name.
        """
        state = super().state_dict()
        if self._adapted is not None:
            state["adaptive_dropout"] = self._adapted.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes over a copy of what `state_dict` gave; raises ValueError for another recipe's, and
        for one of other dropouts, before anything has changed.
        """
        if self._adapted is None:
            super().load_state_dict(state)
            return
        dropouts = state.get("adaptive_dropout")
        reason: str | None = "it was saved with adaptive_dropout=False; build it so"
        if "adaptive_dropout" in state:
            reason = self._adapted.why_not(dropouts)
        if reason is not None and state.get("recipe") == type(self).__name__:
            raise ValueError(f"the state cannot be loaded: {reason}")
        super().load_state_dict({k: v for k, v in state.items() if k != "adaptive_dropout"})
        self._adapted.load_state_dict(self._taken_over(dropouts))

    def close(self) -> None:
        """Removes the hooks, and gives the model its nn.Dropout back."""
        super().close()
        if self._adapted is not None:
            self._adapted.close()

    def _make_runner(self) -> BiStage:
        return BiStage(
            self.model,
            self.embedding,
            epsilon=self.epsilon,
            passes=self.passes,
            js_weight=self.js_weight,
            norm=self.norm,
            per=self.per,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            task=self.task,
            passes_at_once=self.passes_at_once,
            dropout=self.dropout,
            input_range=self.input_range,
            batch_axis=self.batch_axis,
            relative=self.relative,
            backend=self.backend,
        )

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        result = self._runner.backward(inputs, labels, scale=scale)
        return {
            "loss": result.loss,
            "clean_loss": result.clean_loss,
            "adversarial_loss": result.adversarial_loss,
            "divergence": result.divergence,
        }
