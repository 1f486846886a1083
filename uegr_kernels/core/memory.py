"""The tests of memory before it is written: whether it is there, and whether tensors share it."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import shards


def check_there(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a tensor whose storage was given back, in whole or in part
    (`untyped_storage().resize_`).
    """
    part = shards.local(tensor)
    if (
        not part.numel()
        or part.device.type == "meta"
        or isinstance(part, torch._subclasses.FakeTensor)
    ):
        return
    if (
        part.untyped_storage().nbytes()
        < (part.storage_offset() + _reach(part)) * part.element_size()
    ):
        raise RuntimeError(
            f"{name} of shape {tuple(tensor.shape)} has no memory: its storage was "
            "freed; restore it before the step"
        )


class Places(NamedTuple):
    """Holds where tensors lie, in their order."""

    # 0 of fake tensors
    addresses: list[int]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]


def places(tensors: list[Tensor]) -> Places:
    """Returns where tensors lie."""
    return Places(
        [t.data_ptr() for t in tensors], [t.shape for t in tensors], [t.stride() for t in tensors]
    )


def expanded(tensor: Tensor) -> bool:
    """Returns whether a stride of 0 has indices name the same element."""
    return any(
        stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)
    )


def refuse_expanded(name: str, tensor: Tensor, error: type[Exception]) -> None:
    """Raises the error for an expanded tensor, which is to be written."""
    if expanded(tensor):
        raise error(
            f"{name} is expanded: its elements share memory and cannot be written; call .clone() "
            "on it first"
        )


def refuse_overlap(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that is to be written and has two indices for one element."""
    refuse_expanded(name, tensor, ValueError)
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name} overlaps itself: two of its indices name one element; call .clone() on it "
            "first"
        )


def overlaps_itself(tensor: Tensor) -> bool:
    """Returns whether two of a tensor's indices name one element."""
    if not tensor.numel() or expanded(tensor):
        return tensor.numel() > 0
    reach = 1
    for stride, n in sorted(
        (stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
    ):
        if stride < reach:
            return int(_marked([tensor], [0]).sum()) < tensor.numel()
        reach += (n - 1) * stride
    return False


def shared(tensors: list[Tensor]) -> tuple[int, int] | None:
    """Returns the positions of two tensors that have an element in common, if any do."""
    spans = [
        (address, i)
        for i, address in enumerate(places(tensors).addresses)
        if address and tensors[i].numel()
    ]
    # end, position
    open_spans: list[tuple[int, int]] = []
    for start, i in sorted(spans):
        open_spans = [span for span in open_spans if span[0] > start]
        for _, j in open_spans:
            if tensors[i].device == tensors[j].device and _meet(tensors[j], tensors[i]):
                return j, i
        open_spans.append((start + _reach(tensors[i]) * tensors[i].element_size(), i))
    return None


def apart_from(tensors: list[Tensor], written: list[Tensor]) -> list[Tensor]:
    """Returns tensors that a write into others does not change: copies of those that lie in the
    storage of one.
    """
    storages = {each.untyped_storage().data_ptr() for each in written}
    return [t.clone() if t.untyped_storage().data_ptr() in storages else t for t in tensors]


def _reach(tensor: Tensor) -> int:
    """Returns how many elements lie from a tensor's first to its last, both counted."""
    return 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _meet(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors whose spans overlap, b's starting later, have an element in
    common.
    """
    distance, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    if rest or a.element_size() != b.element_size():
        return True
    if a.stride() != b.stride():
        return bool(_marked([a, b], [0, distance]).gt(1).any())
    axes = sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True)
    return _reached(distance, axes)


def _marked(tensors: list[Tensor], starts: list[int]) -> Tensor:
    """Counts how many of the tensors have an element at each place of their common span."""
    marks = torch.zeros(
        max(start + _reach(t) for t, start in zip(tensors, starts, strict=True)), dtype=torch.uint8
    )
    for t, start in zip(tensors, starts, strict=True):
        places = torch.arange(len(marks)).as_strided(t.shape, t.stride(), start).flatten()
        marks[places] += 1
    return marks


def _reached(distance: int, axes: list[tuple[int, int, int]]) -> bool:
    """Returns whether a distance is a difference of two indices: an element of one tensor less one
    of the other along each axis.
    """
    if not axes:
        return distance == 0
    (stride, n, m), *others = axes
    steps = {distance // stride, -(-distance // stride)} if stride else {0}
    return any(-m < step < n and _reached(distance - step * stride, others) for step in steps)
