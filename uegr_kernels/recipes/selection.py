"""The selective update of a recipe: inside the step of a SelectiveAdamW or SelectiveSGD, or on .grad ahead of any other optimizer's."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..selective import SelectiveAdamW, SelectiveSGD, select_gradients_, selection_probability

OPTIONS = tuple(inspect.signature(selection_probability).parameters.keys() - {"grad", "saliency", "backend"})


class Selection:
    """Selects the gradients of one optimizer's parameters, in its order, once a step.

    options  of the selection, by name;  seed  as in SelectiveAdamW

    A SelectiveAdamW or SelectiveSGD selects inside its own step: it is given the options (and the seed), in every group.
    Raises TypeError or ValueError for a wrong option, before anything has changed.
    """

    def __init__(self, model: nn.Module, optimizer: Any, options: dict[str, Any], seed: int | None, backend: str) -> None:
        own = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        self.inside = isinstance(own, SelectiveAdamW | SelectiveSGD)
        self.model, self.options, self.backend, self.drawn = model, options, backend, False
        check_seed(seed)
        self.state = {"seed": seed, "step": 0}
        if self.inside:
            type(own)([torch.zeros(1, requires_grad=True, device="cpu")], seed=0, **options)  # raises for a wrong option
            given = options if seed is None else options | {"seed": seed % 2**64}
            own.defaults.update(given)
            for group in own.param_groups:
                group.update(given)
            return
        selection_probability(torch.zeros(1, device="cpu"), **options, backend="reference")
        certain = options.get("normalization") == "constant" and options.get("keep_probability", 1.0) == 1
        if seed is None and not certain:
            self.state["seed"], self.drawn = int(torch.randint(-(2**63), 2**63 - 1, ())), True

    def before_step(self, optimizer: Any) -> None:
        if self.inside:
            return
        if self.drawn:
            self.state["seed"], self.drawn = agreed(self.state["seed"]), False
        self.state["step"] += 1
        seed = self.state["seed"] or 0
        select_gradients_(self._params(optimizer), seed=seed, step=self.state["step"], **self.options, backend=self.backend)

    def load(self, state: dict[str, Any]) -> None:
        self.state, self.drawn = dict(state), False

    def _params(self, optimizer: Any) -> list[Tensor]:
        if optimizer is None:
            return list(self.model.parameters())
        return [p for group in optimizer.param_groups for p in group["params"]]


def agreed(seed: int) -> int:
    """Rank 0's drawn seed, for every rank."""
    seeds = [seed]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seeds, src=0)
    return seeds[0]


def check_seed(seed: int | None) -> None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed={seed!r} is a {type(seed).__name__}; give an integer, or None to draw one")
