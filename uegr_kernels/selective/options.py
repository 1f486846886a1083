"""The ten selection options (docs/spec.md, 1): their defaults, checks and numbers, once; the seed
that ranks agree on; and lists of states that an operator takes in one tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from ..core import checks

# To the compiled kernels a normalisation is its position here (csrc/selective/selective.h has the
# same order; a test compares).
NORMALIZATIONS = ("minmax", "range", "rank", "constant")
DIRECTIONS = ("printed", "salient")
SCOPES = ("tensor", "global")
STATISTICS = ("current", "previous")
TARGETS = ("gradient", "update")
# options that mean something to an optimizer only
WITH_STATE = ("statistics", "target")
# the step of u
SMALLEST_PROBABILITY = 2.0**-24
# the upper 16 bits of a finite |g|
RANK_BINS = 0x7F80
# a rank over more elements than this takes every k-th
RANK_SAMPLED = 2**20


class SelectionEntries(TypedDict):
    """Names the ten options, as the groups of an optimizer have them."""

    threshold: float
    sharpness: float
    normalization: str
    direction: str
    scope: str
    statistics: str
    rescale: bool
    min_probability: float
    keep_probability: float
    target: str


class SelectionNumbers(TypedDict):
    """Names the selection's arguments to an operator, words as numbers.

    The scope is not among them: it is settled above the operators, by the statistics that they are
    handed.
    """

    threshold: float
    sharpness: float
    normalization: int
    salient: bool
    previous: bool
    rescale: bool
    min_probability: float
    keep_probability: float
    target_update: bool


@dataclasses.dataclass(frozen=True)
class Selection:
    """Holds the ten selection options, checked when it is built; help(SelectiveAdamW) says what
    each does.

    The public signatures name its class attributes, so that every default stands here alone.
    """

    threshold: float = 0.8
    sharpness: float = 5.0
    normalization: str = "minmax"
    direction: str = "printed"
    scope: str = "tensor"
    statistics: str = "current"
    rescale: bool = True
    min_probability: float = 0.0
    keep_probability: float = 1.0
    target: str = "gradient"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "normalization": NORMALIZATIONS,
        "direction": DIRECTIONS,
        "scope": SCOPES,
        "statistics": STATISTICS,
        "target": TARGETS,
    }
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "threshold": (-math.inf, math.inf),
        "sharpness": (0, math.inf),
        "min_probability": (0, 1),
        "keep_probability": (0, 1),
    }

    def __post_init__(self) -> None:
        for name in (*self.CHOICES, *self.RANGES, "rescale"):
            object.__setattr__(self, name, self.checked(name, getattr(self, name)))
        if self.statistics == "previous" and self.normalization in ("rank", "constant"):
            raise ValueError(
                "statistics='previous' keeps a minimum and a maximum, for which "
                f"normalization={self.normalization!r} has no use; "
                "give statistics='current', or normalization='minmax' or 'range'"
            )

    @classmethod
    def checked(cls, name: str, value: object) -> Any:
        """Returns the value of one option, numbers as Python's."""
        if name in cls.CHOICES:
            return checks.choice(name, value, cls.CHOICES[name])
        if name == "rescale":
            return checks.flag(name, value)
        low, high = cls.RANGES[name]
        without = 0.0 if name == "keep_probability" else None
        return checks.number(name, value, low, high, without=without)

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> "Selection":
        """Reads the options of an optimizer's group; every step does, and they rarely change."""
        options = options_of(group)
        try:
            return _remembered(**options)
        except TypeError:
            # an option that cannot be hashed: the class itself names it
            return cls(**options)

    @classmethod
    def of_numbers(
        cls,
        *,
        threshold: float,
        sharpness: float,
        normalization: int,
        salient: bool,
        previous: bool,
        rescale: bool,
        min_probability: float,
        keep_probability: float,
        target_update: bool,
    ) -> "Selection":
        """Inverts `numbers`, with statistics over each tensor."""
        return cls(
            threshold=threshold,
            sharpness=sharpness,
            normalization=NORMALIZATIONS[normalization],
            direction=DIRECTIONS[salient],
            scope="tensor",
            statistics=STATISTICS[previous],
            rescale=rescale,
            min_probability=min_probability,
            keep_probability=keep_probability,
            target=TARGETS[target_update],
        )

    def numbers(self) -> SelectionNumbers:
        """Returns the options as the operators take them."""
        return {
            "threshold": self.threshold,
            "sharpness": self.sharpness,
            "normalization": NORMALIZATIONS.index(self.normalization),
            "salient": self.direction == "salient",
            "previous": self.statistics == "previous",
            "rescale": self.rescale,
            "min_probability": self.min_probability,
            "keep_probability": self.keep_probability,
            "target_update": self.target == "update",
        }

    @property
    def random(self) -> bool:
        """Tells whether an element can go unselected."""
        return self.normalization != "constant" or self.keep_probability != 1


def options_of(group: Mapping[str, Any]) -> SelectionEntries:
    """Returns the ten options among those of an optimizer's group."""
    return {
        "threshold": group["threshold"],
        "sharpness": group["sharpness"],
        "normalization": group["normalization"],
        "direction": group["direction"],
        "scope": group["scope"],
        "statistics": group["statistics"],
        "rescale": group["rescale"],
        "min_probability": group["min_probability"],
        "keep_probability": group["keep_probability"],
        "target": group["target"],
    }


FIELDS = tuple(field.name for field in dataclasses.fields(Selection))
_remembered = functools.lru_cache(maxsize=64, typed=True)(Selection)


def agreed_seed(drawn: int) -> int:
    """Returns rank 0's drawn seed, on every rank."""
    seeds = [drawn]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seeds, src=0)
    return seeds[0]


@dataclasses.dataclass
class StepOptions:
    """Holds what AdamW's and SGD's operators have in common (op.STEP), the selection as one
    object, and the plan. A learning rate is a number, or a tensor of one element.
    """

    scope_statistics: Tensor | None
    layout: list[int]
    grad_scale: Tensor | None
    found_inf: Tensor | None
    lr: float
    lr_tensor: Tensor | None
    weight_decay: float
    maximize: bool
    seed: int
    selection: Selection
    # what the operator returned at the last step
    plan: object


@dataclasses.dataclass
class AdamWOptions:
    """Holds what AdamW's operator has of its own; the betas are numbers, or tensors of one
    element.
    """

    beta1: float
    beta2: float
    beta1_tensor: Tensor | None
    beta2_tensor: Tensor | None
    eps: float


@dataclasses.dataclass
class SGDOptions:
    """Holds what SGD's operator has of its own."""

    momentum: float
    dampening: float
    nesterov: bool


def apart(tensors: Sequence[Tensor], shapes: list[torch.Size]) -> Sequence[Tensor]:
    """Returns a list of states as a tensor of each shape, where they lie in a single one; else as
    it is.

    Raises RuntimeError for a single tensor of another number of elements, or that is not
    contiguous.
    """
    if len(tensors) != 1 or len(shapes) == 1:
        return tensors
    sizes = list(map(math.prod, shapes))
    if not tensors[0].is_contiguous() or tensors[0].numel() != sum(sizes):
        raise RuntimeError(
            f"a list of states has {tensors[0].numel()} elements in a single tensor; it must be "
            f"contiguous and have {sum(sizes)}"
        )
    return [part.view(to) for part, to in zip(tensors[0].split(sizes), shapes, strict=True)]
