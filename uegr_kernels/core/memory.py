"""Tensors' memory, looked at before it is written: whether it is there, and whether two of them share it."""

import torch
from torch import Tensor

from . import shards


def freed(tensor: Tensor) -> bool:
    """Whether a tensor's storage was given back, in whole or in part (`untyped_storage().resize_`)."""
    tensor = shards.local(tensor)
    if not tensor.numel() or tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.untyped_storage().nbytes() < (tensor.storage_offset() + _reach(tensor)) * tensor.element_size()


def shared(tensors: list[Tensor]) -> tuple[int, int] | None:
    """The positions of two tensors that have an element in common, if any do."""
    spans = [(t.data_ptr(), i) for i, t in enumerate(tensors) if t.numel() and t.device.type != "meta"]
    open_spans: list[tuple[int, int]] = []  # end, position
    for start, i in sorted(spans):
        open_spans = [span for span in open_spans if span[0] > start]
        for _, j in open_spans:
            if tensors[i].device == tensors[j].device and _meet(tensors[j], tensors[i]):
                return j, i
        open_spans.append((start + _reach(tensors[i]) * tensors[i].element_size(), i))
    return None


def _reach(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, both counted."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans overlap, b's starting later, have an element in common. Unlike strides with gaps count as no."""
    if a.stride() != b.stride() or a.dtype != b.dtype:
        return all(_reach(t) == t.numel() for t in (a, b))
    distance, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    axes = sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True)
    return rest != 0 or _reached(distance, axes)


def _reached(distance: int, axes: list[tuple[int, int, int]]) -> bool:
    """Whether a distance is a difference of two indices: an element of one tensor less one of the other along each axis."""
    if not axes:
        return distance == 0
    (stride, n, m), *others = axes
    steps = {distance // stride, -(-distance // stride)} if stride else {0}
    return any(-m < step < n and _reached(distance - step * stride, others) for step in steps)
