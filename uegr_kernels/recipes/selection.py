"""The selective update of a recipe: inside the step of a SelectiveAdamW or SelectiveSGD, or on
.grad ahead of any other optimizer's.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..selective import SelectiveAdamW, SelectiveSGD, select_gradients_, selection_probability
from .recipe import check_whole

OPTIONS = tuple(
    inspect.signature(selection_probability).parameters.keys() - {"grad", "saliency", "backend"}
)


class Selection:
    """Selects the gradients of one optimizer's parameters, in its order, once a step.

    options  of the selection, by name;  seed  as in SelectiveAdamW

    A SelectiveAdamW or SelectiveSGD selects inside its own step: it is given the options (and the
    seed), in every group. Raises TypeError or ValueError for a wrong option, before anything has
    changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        options: dict[str, Any],
        seed: int | None,
        backend: str,
    ) -> None:
        seed = check_seed(seed)
        self.model, self.options, self.backend, self.given = model, options, backend, seed
        self.drawn = False  # here, and not agreed on with the other ranks yet
        self.state: dict[str, Any] = {"seed": seed, "step": 0}
        self._bind(optimizer)
        certain = (
            options.get("normalization") == "constant" and options.get("keep_probability", 1.0) == 1
        )
        if seed is None and not self.inside and not certain:
            self.state["seed"], self.drawn = int(torch.randint(-(2**63), 2**63 - 1, ())), True

    def before_step(self, optimizer: Any) -> None:
        if optimizer is not self.optimizer:  # given later
            self._bind(optimizer)
        if self.inside:
            return
        if self.drawn:
            self.state["seed"], self.drawn = agreed(self.state["seed"]), False
        params = self._params()
        check_whole(
            params,
            "pass a SelectiveAdamW or SelectiveSGD as the optimizer, which selects "
            "shards inside its step",
        )
        self.state["step"] += 1
        select_gradients_(
            params,
            seed=self.state["seed"] or 0,
            step=self.state["step"],
            **self.options,
            backend=self.backend,
        )

    def _bind(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        own = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        self.inside = isinstance(own, SelectiveAdamW | SelectiveSGD)
        if not self.inside:
            # raises for a wrong option
            selection_probability(torch.zeros(1, device="cpu"), **self.options, backend="reference")
            return
        # as this does
        type(own)([torch.zeros(1, requires_grad=True, device="cpu")], seed=0, **self.options)
        given = self.options if self.given is None else self.options | {"seed": self.given % 2**64}
        own.defaults.update(given)
        for group in own.param_groups:
            group.update(given)

    def load(self, state: dict[str, Any]) -> None:
        self.state, self.drawn = dict(state), False

    def _params(self) -> list[Tensor]:
        if self.optimizer is None:
            return list(self.model.parameters())
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def agreed(seed: int) -> int:
    """Rank 0's drawn seed, for every rank."""
    seeds = [seed]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seeds, src=0)
    return seeds[0]


def check_seed(seed: int | None) -> int | None:
    return None if seed is None else checks.integer("seed", seed)
