"""The options of a loss (docs/spec.md, 1): their defaults, checks and numbers, once."""

import dataclasses
from typing import TypedDict

from ..core import checks

# To the compiled kernels a reduction is its position here (csrc/divergence/divergence.h has the
# same order; a test compares).
REDUCTIONS = ("mean", "sum", "none")
TASKS = ("classification", "regression")


class LossNumbers(TypedDict):
    """Names the options as arguments of an operator, words as numbers."""

    js_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: int
    regression: bool


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Holds the options of a loss; help(uegr_loss) says what each does.

    The public signatures name its class attributes, so that every default stands here alone.
    """

    js_weight: float = 0.01
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    task: str = "classification"

    def checked(self) -> "LossOptions":
        """Returns the options with numbers as Python's; raises TypeError or ValueError for a wrong
        one. Apart from building them, as a compiler's trace does so with numbers that have no value
        yet.
        """
        options = LossOptions(
            js_weight=checks.number("js_weight", self.js_weight, 0),
            label_smoothing=checks.number("label_smoothing", self.label_smoothing, 0, 1),
            ignore_index=checks.integer("ignore_index", self.ignore_index, -(2**63), bits=63),
            reduction=checks.choice("reduction", self.reduction, REDUCTIONS),
            task=checks.choice("task", self.task, TASKS),
        )
        if options.task == "regression" and options.label_smoothing != 0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} means nothing for task='regression'; "
                "leave it 0"
            )
        return options

    @classmethod
    def of_numbers(
        cls,
        *,
        js_weight: float,
        label_smoothing: float,
        ignore_index: int,
        reduction: int,
        regression: bool,
    ) -> "LossOptions":
        """Inverts `numbers`."""
        return cls(
            js_weight=js_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=REDUCTIONS[reduction],
            task=TASKS[regression],
        )

    def numbers(self) -> LossNumbers:
        """Returns the options as the operators take them."""
        return {
            "js_weight": self.js_weight,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": REDUCTIONS.index(self.reduction),
            "regression": self.task == "regression",
        }
