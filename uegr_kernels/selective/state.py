"""The states of parameters: made, packed, checked, loaded."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..core import checks, memory, shards
from ..core.backends import traced
from .batch import Batch

# parameters from which on states share one tensor, and elements a parameter up to which their
# moments do
PACK_MIN_TENSORS, PACK_MAX_ELEMENTS = 64, 4096
# states of one value
SINGLE = ("step", "saliency_min", "saliency_max")


@dataclasses.dataclass(frozen=True)
class Packed:
    """Holds a state of many parameters in one tensor, which an operator takes in the place of its
    parts.

    Each part has a storage of its own over its piece of the memory, and is saved and copied as
    such.
    """

    whole: Tensor
    parts: list[Tensor]
    # of the parts, as long as they lie there
    addresses: list[int]
    # parts of one element each, which have one layout
    single: bool

    def stands_for(self, states: Sequence[Any], some: slice) -> bool:
        """Tells whether the states are these parts, still where and as they were."""
        same = (
            all(map(operator.is_, states, self.parts[some]))
            and list(map(Tensor.data_ptr, states)) == self.addresses[some]
        )
        return same and (self.single or all(map(Tensor.is_contiguous, states)))


class Start(NamedTuple):
    """Names how a state begins."""

    value: float
    dtype: torch.dtype
    device: torch.device | str


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a parameter's states have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def start(key: str, p: Tensor, state_dtype: torch.dtype | None) -> Start:
    """Returns how a parameter's state begins."""
    if key == "step":
        return Start(0.0, torch.float32, p.device if p.is_cuda else "cpu")
    if key.startswith("saliency"):
        # nothing kept yet
        return Start(torch.nan, wide(p.dtype), p.device)
    # -0.0 marks a momentum buffer that has seen nothing; to a moment of AdamW it is 0.
    value = -0.0 if key == "momentum_buffer" else 0.0
    return Start(value, state_dtype or wide(p.dtype), p.device)


# ---- Made


def fresh(key: str, p: Tensor, state_dtype: torch.dtype | None) -> Tensor:
    """Makes a parameter's state."""
    value, dtype, device = start(key, p, state_dtype)
    if key in SINGLE:
        return torch.full((), value, dtype=dtype, device=device)
    return torch.full_like(
        p, value, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
    )


def complete(batch: Batch, needed: tuple[str, ...], *, may_pack: bool) -> dict[str, Packed]:
    """Makes what the parameters' states lack, and lists the states. Returns those it packed.

    may_pack: False where other groups' parameters have states of the same keys.
    """
    params, states = batch.params, batch.states
    found = {}
    for key in needed:
        # what is there (a checkpoint's, a hook's) is left alone
        lacking = [i for i, state in enumerate(states) if key not in state]
        if may_pack and len(lacking) == len(params) and _worth_packing(key, batch):
            found[key] = pack(key, batch)
            batch.state_lists[key] = [found[key].whole]
            continue
        for i in lacking:
            states[i][key] = fresh(key, params[i], batch.group["state_dtype"])
        # one found on the CPU, after a load, moves
        if key == "step" and params[0].is_cuda:
            for state in states:
                state[key] = state[key].to(params[0].device)
        batch.state_lists[key] = [state[key] for state in states]
    return found


# ---- Packed


def _worth_packing(key: str, batch: Batch) -> bool:
    return (
        len(batch.params) >= PACK_MIN_TENSORS
        # the others' operators take a state in a single tensor
        and batch.backend != "reference"
        and not isinstance(batch.params[0], FakeTensor)
        and not traced()
        and not any(map(shards.sharded, batch.params))
        and (
            key in SINGLE
            or all(p.numel() <= PACK_MAX_ELEMENTS and p.is_contiguous() for p in batch.params)
        )
    )


def pack(key: str, batch: Batch) -> Packed:
    """Makes a state of many parameters in one tensor, each with a storage of its own there."""
    params = batch.params
    value, dtype, device = start(key, params[0], batch.group["state_dtype"])
    shapes = [() if key in SINGLE else p.shape for p in params]
    sizes = list(map(math.prod, shapes))
    whole = torch.full((sum(sizes),), value, dtype=dtype, device=device)
    parts = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
    for state, part in zip(batch.states, parts, strict=True):
        # Views, whose version is the whole's. By DLPack they pass for another library's
        # tensors, whose storage ends with them. Of an alias: a tensor that its own storage
        # holds would never end.
        part.data = from_dlpack(to_dlpack(part.detach()))
        state[key] = part
    return Packed(whole, parts, list(map(Tensor.data_ptr, parts)), set(sizes) == {1})


def unpack(packed: Mapping[str, Packed], states: Iterable[dict[str, Tensor]]) -> None:
    """Gives each packed state that is still there a tensor of its own. torch.compile takes views of
    one tensor for one piece of memory.
    """
    parts = {key: {id(part) for part in one.parts} for key, one in packed.items()}
    for state in states:
        for key in parts.keys() & state.keys():
            if id(state[key]) in parts[key]:
                state[key] = state[key].clone()


# ---- Checked


def check_batch(batch: Batch, needed: tuple[str, ...], moments: tuple[str, ...]) -> None:
    """Raises a gradient or a state that does not fit its parameter: every tensor of every call,
    before the first one is stepped.
    """
    for i, (p, grad, state) in enumerate(zip(batch.params, batch.grads, batch.states, strict=True)):
        stream = batch.layout[4 * i]
        if grad.shape != p.shape or 0 in p.stride():
            check_parameter(stream, p, grad)
        memory.check_there(f"parameter {stream}", p)
        memory.check_there(f"parameter {stream}'s gradient", grad)
        for key in needed if state else ():
            if key in state:
                check_state(stream, key, state[key], p, key in moments)


def check_parameter(stream: int, p: Tensor, grad: Tensor) -> None:
    """Raises a parameter and a gradient that cannot be stepped."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"parameter {stream} has a sparse gradient ({grad.layout}), which is not supported; "
            "call .to_dense() on it first"
        )
    if p.dtype not in checks.DTYPES or grad.dtype not in checks.DTYPES:
        raise TypeError(
            f"parameter {stream} is {p.dtype} with a gradient of {grad.dtype}: complex "
            "and integer tensors are not supported"
        )
    if shards.sharded(p) != shards.sharded(grad):
        raise TypeError(
            f"parameter {stream} is a {type(p).__name__} and its gradient a {type(grad).__name__}; "
            "make both DTensors, or neither"
        )
    if grad.shape != p.shape:
        raise _unequal(stream, p, "gradient", grad)
    memory.refuse_expanded(f"parameter {stream}", p, ValueError)


def check_state(stream: int, key: str, value: Tensor, p: Tensor, moment: bool) -> None:
    """Raises a moment that is not as its parameter, or a count or statistic that is not one
    value.
    """
    named = f"parameter {stream}'s state {key!r}"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{named} is a {type(value).__name__}; give a tensor, or delete the parameter's state"
        )
    if value.layout is not torch.strided or value.dtype not in checks.DTYPES:
        raise TypeError(
            f"{named} is {value.dtype}, {value.layout}; give a dense tensor of floating point"
        )
    if value.device != p.device and (key != "step" or value.device.type != "cpu"):
        raise ValueError(
            f"{named} is on {value.device}, the parameter on {p.device}; move it with .to()"
        )
    if moment and value.shape != p.shape:
        raise _unequal(stream, p, key, value)
    if not moment and value.numel() != 1:
        raise ValueError(f"{named} has shape {tuple(value.shape)}; give one value")
    memory.check_there(named, value)
    if key == "step" and value.device.type == "cpu" and not isinstance(value, FakeTensor):
        if not 0 <= value.item() < 2**24 - 1:
            raise ValueError(
                f"{named} is {value.item()}; give the number of steps taken, from 0 to 2^24 - 2"
            )
    if 0 in value.stride():
        memory.refuse_expanded(named, value, ValueError)


def _unequal(stream: int, p: Tensor, name: str, value: Tensor) -> ValueError:
    return ValueError(
        f"parameter {stream} has shape {tuple(p.shape)} but its {name} {tuple(value.shape)}; they "
        "must be equal"
    )


# ---- Loaded


def placed(state: dict[str, Tensor], p: Tensor) -> None:
    """Turns a loaded count of steps into the tensor that a step takes."""
    if "step" in state:
        step = torch.as_tensor(state["step"], dtype=torch.float32)
        state["step"] = step.to(p.device if p.is_cuda else "cpu")


def without_none(state: dict[str, object]) -> None:
    """Drops what is None: torch.optim.SGD keeps such a buffer where it has no momentum."""
    for key in [key for key, value in state.items() if value is None]:
        del state[key]


def restore(
    state: dict[str, Tensor],
    saved: Mapping[str, object],
    p: Tensor,
    state_dtype: torch.dtype | None,
) -> None:
    """Takes a checkpoint's own values again, which the base class has cast to the parameter's
    dtype.
    """
    for key, value in saved.items():
        if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
            if key == "momentum_buffer" and "step" not in saved:
                # torch's: a -0.0 in it has seen a gradient
                value = value + 0.0
            dtype = start(key, p, state_dtype).dtype
            state[key] = value.to(dtype=dtype, device=p.device)
