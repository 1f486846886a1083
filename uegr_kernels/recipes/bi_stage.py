"""UEGR: the forward stage by BiStage, and the selective update."""

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..bistage import BiStage
from ..core import checks
from ..passes import Inputs
from ..selective.options import Selection
from .lent_dropout import AdaptedDropouts
from .selection import SelectionRecipe


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

    passes: ClassVar[int] = 3

    _runner: BiStage

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        adaptive_dropout: bool = True,
        # the forward stage's, whose defaults are BiStage's: a test compares
        epsilon: float = 0.1,
        passes: int = 2,
        js_weight: float = 0.01,
        norm: str = "l2",
        per: str = "sample",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        task: str = "classification",
        passes_at_once: int | None = None,
        dropout: Sequence[float] | None = None,
        input_range: tuple[float, float] | None = None,
        batch_axis: int | None = None,
        relative: bool = False,
        threshold: float = Selection.threshold,
        sharpness: float = Selection.sharpness,
        normalization: str = Selection.normalization,
        direction: str = Selection.direction,
        scope: str = Selection.scope,
        statistics: str = Selection.statistics,
        rescale: bool = Selection.rescale,
        min_probability: float = Selection.min_probability,
        keep_probability: float = Selection.keep_probability,
        target: str = Selection.target,
        seed: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._adapts = checks.flag("adaptive_dropout", adaptive_dropout)
        self._adapted: AdaptedDropouts | None = None
        self.backend = backend
        self._stage = functools.partial(
            BiStage,
            epsilon=epsilon,
            passes=passes,
            js_weight=js_weight,
            norm=norm,
            per=per,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            task=task,
            passes_at_once=passes_at_once,
            dropout=dropout,
            input_range=input_range,
            batch_axis=batch_axis,
            relative=relative,
            backend=backend,
        )
        super().__init__(
            model,
            embedding,
            optimizer,
            threshold=threshold,
            sharpness=sharpness,
            normalization=normalization,
            direction=direction,
            scope=scope,
            statistics=statistics,
            rescale=rescale,
            min_probability=min_probability,
            keep_probability=keep_probability,
            target=target,
            seed=seed,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._adapts:
            self._adapted = AdaptedDropouts(self.model, self.backend)

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
        return self._stage(self.model, self.embedding)

    def _names_kept(self) -> tuple[str, ...]:
        return self.kept if self._adapted is None else (*self.kept, "adaptive_dropout")

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        result = self._runner.backward(inputs, labels, scale=scale)
        return {
            "loss": result.loss,
            "clean_loss": result.clean_loss,
            "adversarial_loss": result.adversarial_loss,
            "divergence": result.divergence,
        }
