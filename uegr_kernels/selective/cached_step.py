"""The cached step: what a step over a single batch found, so that the next one, finding all as it
was, need not look at every tensor in Python.
"""

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..core import memory
from .batch import Batch
from .state import Packed

SHAPE = operator.attrgetter("shape")
LAYOUT = operator.attrgetter("layout")
PLACEMENT = operator.attrgetter("device", "dtype")


@dataclasses.dataclass
class CachedStep:
    """Holds what a step over a single batch found. Every test here runs over all tensors at once,
    in C.
    """

    batch: Batch
    keys: list[Tensor]  # of the optimizer's state, and its values
    values: list[dict[str, Tensor]]
    places: memory.Places  # of the parameters
    sizes: list[int] | None  # elements of the parameters, where all are contiguous
    empty: list[Tensor]  # parameters without an element, which have no address
    placements: list[tuple[torch.device, torch.dtype]]  # and theirs

    @classmethod
    def of(
        cls, batch: Batch, state: Mapping[Tensor, dict[str, Tensor]], places: memory.Places
    ) -> "CachedStep":
        """Remembers a step that was taken."""
        params = batch.params
        contiguous = all(map(Tensor.is_contiguous, params))
        empty = [p for p in params if p.numel() == 0]
        return cls(
            batch=batch,
            keys=list(state.keys()),
            values=list(state.values()),
            places=places,
            sizes=list(map(Tensor.numel, params)) if contiguous else None,
            empty=empty,
            placements=list(map(PLACEMENT, empty)),
        )

    def why_not(
        self,
        groups: Sequence[object],
        state: Mapping[Tensor, dict[str, Tensor]],
        grads: Sequence[Tensor],
        needed: tuple[str, ...],
    ) -> str | None:
        """Tells why the next step must look at every tensor again; None where it need not.

        Changes nothing. What the operator would refuse is left to the longer way, which has the
        words for it.
        """
        params, group = self.batch.params, self.batch.group
        if len(groups) != 1 or groups[0] is not group:
            return "the groups are others"
        for now, then in (
            (group["params"], params),
            (state.keys(), self.keys),
            (state.values(), self.values),
        ):
            if len(now) != len(then) or not all(map(operator.is_, now, then)):
                return "parameters or states were added, taken away or replaced"
        places = self.places
        if places.addresses != list(map(Tensor.data_ptr, params)):
            return "a parameter is elsewhere"
        if self.sizes is None:
            if places.shapes != list(map(SHAPE, params)) or places.strides != list(
                map(Tensor.stride, params)
            ):
                return "a parameter has another shape or strides"
        elif (
            # contiguous ones of as many elements are stepped alike, whatever their shape
            not all(map(Tensor.is_contiguous, params))
            or list(map(Tensor.numel, params)) != self.sizes
        ):
            return "a parameter has another size or strides"
        if set(map(type, grads)) != {Tensor}:
            return "a gradient is missing, or of a class of its own"
        if set(map(LAYOUT, grads)) != {torch.strided} or any(
            map(is_functorch_wrapped_tensor, grads)
        ):
            return "a gradient is sparse, or torch.func's"
        zeros = list(map(Tensor.data_ptr, grads)).count(0)  # the address of freed memory is 0
        if zeros != len(self.empty) or list(map(PLACEMENT, self.empty)) != self.placements:
            return "a gradient has no memory"
        for key in needed:
            if key not in self.batch.state_lists or not all(
                map(operator.contains, self.batch.states, itertools.repeat(key))
            ):
                return f"the state {key!r} is missing"
        return None

    def state_list(self, key: str, packed: Packed | None) -> list[Tensor] | None:
        """Returns the operator's list of a state; None where a tensor is another, or elsewhere."""
        now: list[Tensor] = list(map(operator.itemgetter(key), self.batch.states))
        if packed is not None and packed.stands_for(now):
            return [packed.whole]
        then = self.batch.state_lists[key]
        return now if len(now) == len(then) and all(map(operator.is_, now, then)) else None
