"""The cached step: what a step over a single batch found, so that the next one, finding all as it
was, need not look at every tensor in Python.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..core import checks, memory
from .batch import Batch, Group
from .state import Packed

SHAPE = operator.attrgetter("shape")
LAYOUT = operator.attrgetter("layout")
DEVICE_AND_DTYPE = operator.attrgetter("device", "dtype")
# An option of these types is as good as checked while it is the same object.
IMMUTABLE = frozenset((float, int, bool, str, torch.dtype, type(None)))


class CheckedOptions(NamedTuple):
    """Holds the options of a group that a step checked, but for the learning rate, which schedules
    change.
    """

    read: Callable[[Group], tuple[object, ...]]
    checked: tuple[object, ...]
    # as the user asked for it
    backend: str

    @classmethod
    def of(cls, group: Group, names: Iterable[str], backend: str) -> "CheckedOptions | None":
        """Remembers checked options; None where one can be changed in place."""
        read = operator.itemgetter(*(name for name in names if name != "lr"))
        checked = read(group)
        parts = [
            part for option in checked for part in (option if type(option) is tuple else (option,))
        ]
        return cls(read, checked, backend) if IMMUTABLE.issuperset(map(type, parts)) else None

    def are_of(self, group: Group, backend: str) -> bool:
        """Tells whether the group has these options still, and a learning rate that needs no
        look.
        """
        lr = group["lr"]
        return (
            type(lr) in checks.PLAIN
            and bool(0 <= lr <= checks.LARGEST)
            and backend is self.backend
            and all(map(operator.is_, self.read(group), self.checked))
        )


@dataclasses.dataclass
class CachedStep:
    """Holds what a step over a single batch found. Every test here runs over all tensors at once,
    in C.
    """

    batch: Batch
    # of the optimizer's state, and its values
    keys: list[Tensor]
    values: list[dict[str, Tensor]]
    # of the parameters
    places: memory.Places
    # elements of the parameters, where all are contiguous
    sizes: list[int] | None
    # parameters without an element, which have no address
    empty: list[Tensor]
    # and theirs
    devices_and_dtypes: list[tuple[torch.device, torch.dtype]]
    # that were checked; None where they must be again
    options: CheckedOptions | None

    @classmethod
    def of(
        cls,
        batch: Batch,
        state: Mapping[Tensor, dict[str, Tensor]],
        places: memory.Places,
        options: CheckedOptions | None,
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
            devices_and_dtypes=list(map(DEVICE_AND_DTYPE, empty)),
            options=options,
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
        # the address of freed memory is 0
        zeros = list(map(Tensor.data_ptr, grads)).count(0)
        if (
            zeros != len(self.empty)
            or list(map(DEVICE_AND_DTYPE, self.empty)) != self.devices_and_dtypes
        ):
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
