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

from ..core import checks, memory
from .batch import Batch, Group
from .state import Packed

SHAPE = operator.attrgetter("shape")
GRADIENT = operator.attrgetter("grad")
DEVICE_AND_DTYPE = operator.attrgetter("device", "dtype")
# Parameters whose tensors are looked at together: so many stay in a second-level cache from one
# test to the next.
AT_A_TIME = 512
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
    """Holds what a step over a single batch found. Every test here runs over many tensors at once,
    in C.
    """

    batch: Batch
    # of the optimizer's state, and its values
    keys: list[Tensor]
    values: list[dict[str, Tensor]]
    # the states that the batch has in a single tensor, by key
    packed: dict[str, Packed]
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
        packed: Mapping[str, Packed],
        places: memory.Places,
        options: CheckedOptions | None,
    ) -> "CachedStep":
        """Remembers a step that was taken. States that stand packed are the batch's as such from
        then on.
        """
        params = batch.params
        standing = {
            key: packed[key]
            for key in packed.keys() & batch.state_lists.keys()
            if packed[key].stands_for([state[key] for state in batch.states], slice(None))
        }
        batch.state_lists |= {key: [one.whole] for key, one in standing.items()}
        contiguous = all(map(Tensor.is_contiguous, params))
        empty = [p for p in params if p.numel() == 0]
        return cls(
            batch=batch,
            keys=list(state.keys()),
            values=list(state.values()),
            packed=standing,
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
        needed: tuple[str, ...],
        grads: list[Tensor],
    ) -> str | None:
        """Tells why the next step must look at every tensor again; None where it need not, with
        the gradients in `grads`, which comes empty.

        Changes nothing else. What changed under a tensor's `.data`, other than its place, the
        operator refuses.
        """
        group = self.batch.group
        if len(groups) != 1 or groups[0] is not group:
            return "the groups are others"
        if len(group["params"]) != len(self.batch.params) or len(state) != len(self.keys):
            return "parameters or states were added or taken away"
        if not self.batch.state_lists.keys() >= {*needed}:
            return "the step needs other states"
        keys, values = iter(state.keys()), iter(state.values())
        # the address of freed memory is 0; Triton's launches look at the addresses they take up
        look_for_zeros, zeros = self.batch.backend != "triton", 0
        # a parameter without elements may be listed twice, and has one state
        for first in range(0, max(len(self.keys), len(self.batch.params)), AT_A_TIME):
            some = slice(first, first + AT_A_TIME)
            params = self.batch.params[some]
            if not (
                _same(group["params"][some], params)
                and _same(itertools.islice(keys, AT_A_TIME), self.keys[some])
                and _same(itertools.islice(values, AT_A_TIME), self.values[some])
            ):
                return "a parameter or its states were replaced"
            reason = self._why_not_places(params, some) or self._why_not_states(needed, some)
            if reason is not None:
                return reason
            found = list(map(GRADIENT, params))
            if not {Tensor}.issuperset(map(type, found)):
                return "a gradient is missing, or of a class of its own"
            if not all(map(torch._C._has_storage, found)):
                return "a gradient is sparse, or torch.func's"
            if look_for_zeros:
                zeros += list(map(Tensor.data_ptr, found)).count(0)
            grads += found
        if look_for_zeros and zeros != len(self.empty):
            return "a gradient has no memory"
        if list(map(DEVICE_AND_DTYPE, self.empty)) != self.devices_and_dtypes:
            return "a parameter without elements is elsewhere, or of another dtype"
        return None

    def _why_not_places(self, params: list[Tensor], some: slice) -> str | None:
        places = self.places
        if places.addresses[some] != list(map(Tensor.data_ptr, params)):
            return "a parameter is elsewhere"
        if self.sizes is None:
            if places.shapes[some] != list(map(SHAPE, params)) or places.strides[some] != list(
                map(Tensor.stride, params)
            ):
                return "a parameter has another shape or strides"
        elif (
            # contiguous ones of as many elements are stepped alike, whatever their shape
            not all(map(Tensor.is_contiguous, params))
            or list(map(Tensor.numel, params)) != self.sizes[some]
        ):
            return "a parameter has another size or strides"
        return None

    def _why_not_states(self, needed: tuple[str, ...], some: slice) -> str | None:
        states = self.batch.states[some]
        for key in needed:
            # None where it is missing
            now = list(map(dict[str, Tensor].get, states, itertools.repeat(key)))
            packed = self.packed.get(key)
            if not (
                packed.stands_for(now, some)
                if packed
                else _same(now, self.batch.state_lists[key][some])
            ):
                return f"a state {key!r} is missing, another, or elsewhere"
        return None


def _same(now: Iterable[object], then: Sequence[object]) -> bool:
    """Tells whether objects are those of then, of which there are as many."""
    return all(map(operator.is_, then, now))
