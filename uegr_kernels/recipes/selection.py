"""The selective update of a recipe: inside the step of a SelectiveAdamW or SelectiveSGD, or on
.grad ahead of any other optimizer's.
"""

import dataclasses
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn

from ..selective import SelectiveAdamW, SelectiveSGD, select_gradients_
from ..selective.options import FIELDS, WITH_STATE, Selection, agreed_seed
from ..selective.options import TARGETS as TARGETS
from . import options
from .recipe import Recipe, check_whole

DEFAULTS = dataclasses.asdict(Selection())


class MaskState(TypedDict):
    """Names what the masks of a step depend on."""

    seed: int | None
    step: int


class SelectiveUpdate(Recipe):
    """Trains with an update of selected elements: `before_step` applies `_selection`, which
    checkpoints carry.
    """

    selects_update: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("selection",)

    seed: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._selection = GradientSelection(
            self.model, self.optimizer, self._selection_options(), self.seed, self.backend
        )

    @property
    def selection(self) -> MaskState:
        """Returns seed and step of the masks, for checkpoints."""
        return self._selection.state.copy()

    @selection.setter
    def selection(self, state: MaskState) -> None:
        self._selection.load(state)

    def before_step(self) -> None:
        """Selects the gradients (Eq. 7-9), but where the optimizer selects inside its step."""
        self._selection.before_step(self.optimizer)

    def _settle_options(self) -> None:
        super()._settle_options()
        check_selection(self.optimizer, self._selection_options())

    def _selection_options(self) -> dict[str, object]:
        """Returns the selection's options that the recipe sets, by name."""
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SelectionRecipe(SelectiveUpdate):
    """Trains with an update of elements that the selection's options choose; those that a
    SelectiveAdamW or SelectiveSGD has hold where the recipe is not given them.

    threshold, sharpness, normalization, direction, scope, statistics, rescale, min_probability,
    keep_probability, target  as in SelectiveAdamW
    seed  of the masks; None: drawn from torch's default CPU generator
    """

    threshold: float = options.option(Selection.threshold, Selection.checked)
    sharpness: float = options.option(Selection.sharpness, Selection.checked)
    normalization: str = options.option(Selection.normalization, Selection.checked)
    direction: str = options.option(Selection.direction, Selection.checked)
    scope: str = options.option(Selection.scope, Selection.checked)
    statistics: str = options.option(Selection.statistics, Selection.checked)
    rescale: bool = options.option(Selection.rescale, Selection.checked)
    min_probability: float = options.option(Selection.min_probability, Selection.checked)
    keep_probability: float = options.option(Selection.keep_probability, Selection.checked)
    target: str = options.option(Selection.target, Selection.checked)
    seed: int | None = options.integer(None)

    def _selection_options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in FIELDS if name in self._given}


class GradientSelection:
    """Selects the gradients of one optimizer's parameters, in its order, once a step.

    options  of the selection, by name, as `check_selection` lets them pass;  seed  as in
        SelectiveAdamW

    A SelectiveAdamW or SelectiveSGD selects inside its own step: it is given the options (and the
    seed), in every group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        options: dict[str, object],
        seed: int | None,
        backend: str,
    ) -> None:
        self.model, self.options, self.backend, self.given = model, options, backend, seed
        # here, and not agreed on with the other ranks yet
        self.drawn = False
        self.state = MaskState(seed=seed, step=0)
        self._bind(optimizer)
        random = Selection.of_group(DEFAULTS | options).random
        if seed is None and _selecting(optimizer) is None and random:
            self.state["seed"], self.drawn = int(torch.randint(-(2**63), 2**63 - 1, ())), True

    def before_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Selects .grad, where the optimizer does not select inside its step."""
        # given later
        if optimizer is not self.optimizer:
            check_selection(optimizer, self.options)
            self._bind(optimizer)
        if _selecting(optimizer) is not None:
            return
        seed = self.state["seed"]
        if self.drawn and seed is not None:
            seed = self.state["seed"] = agreed_seed(seed)
            self.drawn = False
        params = self._params()
        check_whole(
            params,
            "pass a SelectiveAdamW or SelectiveSGD as the optimizer, which selects "
            "shards inside its step",
        )
        self.state["step"] += 1
        chosen = Selection.of_group(DEFAULTS | self.options)
        select_gradients_(
            params,
            seed=seed or 0,
            step=self.state["step"],
            threshold=chosen.threshold,
            sharpness=chosen.sharpness,
            normalization=chosen.normalization,
            direction=chosen.direction,
            scope=chosen.scope,
            rescale=chosen.rescale,
            min_probability=chosen.min_probability,
            keep_probability=chosen.keep_probability,
            backend=self.backend,
        )

    def load(self, state: MaskState) -> None:
        """Takes over a state as a checkpoint has it."""
        self.state, self.drawn = state.copy(), False

    def _bind(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer
        own = _selecting(optimizer)
        if own is not None:
            given = {} if self.given is None else {"seed": self.given % 2**64}
            own.defaults.update(self.options | given)
            for group in own.param_groups:
                group.update(self.options | given)

    def _params(self) -> list[Tensor]:
        if self.optimizer is None:
            return list(self.model.parameters())
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def check_selection(optimizer: torch.optim.Optimizer | None, options: dict[str, object]) -> None:
    """Raises TypeError or ValueError for an option that the update by this optimizer, or by any
    other ahead of whose step .grad is selected, cannot have.
    """
    chosen, own = Selection.of_group(DEFAULTS | options), _selecting(optimizer)
    if own is not None:
        for group in own.param_groups:
            Selection.of_group(group | options)
        return
    for name in WITH_STATE:
        value, only = getattr(chosen, name), getattr(Selection, name)
        if value != only:
            raise ValueError(
                f"{name}={value!r} needs an optimizer's state; use {name}={only!r}, or "
                "SelectiveAdamW or SelectiveSGD"
            )


def _selecting(optimizer: torch.optim.Optimizer | None) -> SelectiveAdamW | SelectiveSGD | None:
    """Returns the optimizer, or the one inside Accelerate's wrapper, if it selects by itself."""
    own = getattr(optimizer, "optimizer", optimizer)
    return own if isinstance(own, SelectiveAdamW | SelectiveSGD) else None
