"""Tensors of which this process holds a part (DTensor): where the part lies in the whole, and
what the processes tell each other.
"""

import functools
import sys
from math import prod
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

# a mesh and its dimensions over which a tensor is cut, or ()
Cut = tuple["DeviceMesh", tuple[int, ...]] | tuple[()]


def sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Returns whether a tensor is a DTensor. Nobody has one before its module is imported, which
    takes long and is not done here.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor: the memory that an operator reads and writes."""
    return tensor.to_local() if sharded(tensor) else tensor


def match_placement(grad: Tensor, p: Tensor) -> Tensor:
    """Returns a gradient in its parameter's placements."""
    if sharded(p) and sharded(grad) and grad.placements != p.placements:
        return grad.redistribute(p.device_mesh, p.placements)
    return grad


def cut(tensor: Tensor) -> Cut:
    """Returns the mesh, and its dimensions over which the parts of a tensor make up the whole; ()
    where every process has it whole.
    """
    if not sharded(tensor):
        return ()
    dims = tuple(
        dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()
    )
    return (tensor.device_mesh, dims) if dims else ()


def layout(name: str, tensor: "DTensor") -> tuple[int, int, int]:
    """Returns offset, run, stride of a DTensor's part: local element l is element offset + (l //
    run)*stride + l % run of the whole.

    Raises ValueError for a placement that these do not state.
    """
    try:
        return _layout(tensor.shape, tensor.device_mesh, tensor.placements)
    except NotImplementedError:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has placements {tensor.placements}, whose "
            "parts are no evenly spaced runs of the whole; shard it along one dimension, or call "
            "full_tensor() on it"
        ) from None


@functools.cache
def _layout(
    whole: torch.Size, mesh: "DeviceMesh", placements: "tuple[Placement, ...]"
) -> tuple[int, int, int]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(
        placement.is_replicate() or _in_order(dim, mesh, placements, whole)
        for dim, placement in enumerate(placements)
    ):
        raise NotImplementedError
    part, first = compute_local_shape_and_global_offset(whole, mesh, placements)
    cut = [dim for dim, n in enumerate(part) if n != whole[dim]]
    if not cut or 0 in part:
        return 0, prod(part), prod(part)
    last = cut[-1]
    # below the outermost of them, all must be whole for the rows to be evenly spaced
    rows = [dim for dim in range(last) if part[dim] != 1]
    if any(dim in cut for dim in rows[1:]):
        raise NotImplementedError
    below = prod(whole[last + 1 :])
    offset = sum(start * prod(whole[dim + 1 :]) for dim, start in enumerate(first))
    return offset, part[last] * below, whole[last] * below


def _in_order(
    dim: int, mesh: "DeviceMesh", placements: "tuple[Placement, ...]", whole: torch.Size
) -> bool:
    """Returns whether a placement leaves each process one piece of its dimension."""
    from torch.distributed.tensor import Shard

    placement = placements[dim]
    if isinstance(placement, Shard):
        return True
    # FSDP over tensor parallelism: cut by a later mesh dimension first
    factor: int = getattr(placement, "split_factor", 0)
    along: int = getattr(placement, "dim", 0)
    later = [
        other for other in range(dim + 1, len(placements)) if placements[other].is_shard(along)
    ]
    pieces = factor * mesh.size(dim)
    return (
        bool(factor)
        and prod(mesh.size(other) for other in later) == factor
        and whole[along] % pieces == 0
    )


def join_(statistics: Tensor, cut: Cut) -> None:
    """Joins every process's rows of [minimum, maximum], or of counts, in place: one collective
    for each dimension of the mesh that cuts.
    """
    if not cut:
        return
    mesh, dims = cut
    # not always where the parts are: those may be offloaded
    there = statistics.to(mesh.device_type)
    for dim in dims:
        # maxima both: the minimum changes its sign
        if statistics.is_floating_point():
            there[..., 0].neg_()
            torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
            there[..., 0].neg_()
        else:
            torch.distributed.all_reduce(there, torch.distributed.ReduceOp.SUM, mesh.get_group(dim))
    if there is not statistics:
        statistics.copy_(there)
