"""What a step takes at once: a group's tensors of one device and dtype, their layouts and shards,
and the statistics of the scopes that are wider than a tensor.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core import shards
from . import op
from .options import Selection, SelectionEntries

# Room for a scope's statistics, kept from step to step, by what they are statistics of.
Room = dict[tuple[str, torch.device, int, shards.Cut], Tensor]


class GroupOfBoth(SelectionEntries):
    """Types the entries of a group that both optimizers have; the group is torch.optim's."""

    params: list[Tensor]
    lr: float | Tensor
    weight_decay: float
    maximize: bool
    differentiable: bool
    fused: bool | None
    state_dtype: torch.dtype | None
    seed: int


class Group(GroupOfBoth, total=False):
    """Types the entries of a group that SelectiveAdamW or SelectiveSGD has; the group is
    torch.optim's.
    """

    betas: tuple[float | Tensor, float | Tensor]
    eps: float
    amsgrad: bool
    momentum: float
    dampening: float
    nesterov: bool


@dataclasses.dataclass
class Batch:
    """Holds the parameters of a group of one device and dtype that have a gradient, and what their
    step takes.
    """

    group: Group
    selection: Selection
    backend: str
    seed: int
    params: list[Tensor]
    grads: list[Tensor]
    # by parameter: stream, offset, run, stride
    layout: list[int]
    # by parameter, as torch.optim keeps them
    states: list[dict[str, Tensor]]
    # by key of the states: a tensor by parameter, or one for all (state.Packed)
    state_lists: dict[str, list[Tensor]]
    # over a wider scope than each tensor
    statistics: Tensor | None
    # what op returned at the last step
    plan: object
    # of sharded parameters: their cuts, the sizes of the whole, and the DTensors that are written
    cuts: list[shards.Cut]
    sizes: list[int]
    wholes: list[Tensor]

    @classmethod
    def empty(cls, group: Group, selection: Selection, backend: str, seed: int) -> "Batch":
        """Makes a batch of no parameters yet."""
        return cls(group, selection, backend, seed, [], [], [], [], {}, None, None, [], [], [])

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def keeps(self) -> bool:
        """Tells whether minima and maxima are kept from step to step."""
        return "saliency_min" in self.state_lists

    @property
    def steps(self) -> list[Tensor]:
        return self.state_lists["step"]

    @property
    def saliency_mins(self) -> list[Tensor]:
        return self.state_lists.get("saliency_min", [])

    @property
    def saliency_maxs(self) -> list[Tensor]:
        return self.state_lists.get("saliency_max", [])

    def forget_gradients(self) -> None:
        """Leaves out what is not kept from step to step: gradients are the user's to free."""
        self.grads, self.statistics = [], None

    def localise(self) -> None:
        """Puts this process's parts in the place of sharded tensors."""
        if not any(map(shards.sharded, self.params)):
            return
        self.cuts = [shards.cut(p) for p in self.params]
        self.sizes = [p.numel() for p in self.params]
        written = [self.params, *self.state_lists.values()]
        self.wholes = [t for tensors in written for t in tensors if shards.sharded(t)]
        self.grads = [
            shards.local(shards.match_placement(grad, p))
            for p, grad in zip(self.params, self.grads, strict=True)
        ]
        self.params = list(map(shards.local, self.params))
        self.state_lists = {
            key: list(map(shards.local, tensors)) for key, tensors in self.state_lists.items()
        }

    def parts(self, grad_scale: Tensor | None) -> Iterator[tuple[shards.Cut, list[int], op.Part]]:
        """Divides the tensors by how they are cut: yields each cut, the positions of its tensors in
        the batch, and the tensors.
        """
        if not self.cuts:
            everything = list(range(len(self.params)))
            mins, maxs = self.saliency_mins, self.saliency_maxs
            yield (
                (),
                everything,
                op.Part(self.backend, self.grads, [], self.layout, [], grad_scale, mins, maxs),
            )
            return
        for cut in dict.fromkeys(self.cuts):
            chosen = [i for i, other in enumerate(self.cuts) if other == cut]
            part = op.Part(
                backend=self.backend,
                grads=[self.grads[i] for i in chosen],
                saliencies=[],
                layout=[n for i in chosen for n in self.layout[4 * i : 4 * i + 4]],
                sizes=[self.sizes[i] for i in chosen] if cut else [],
                grad_scale=grad_scale,
                saliency_mins=[self.saliency_mins[i] for i in chosen if self.keeps],
                saliency_maxs=[self.saliency_maxs[i] for i in chosen if self.keeps],
            )
            yield cut, chosen, part


def scope_statistics(
    parts: list[op.Part], normalization: str, *, rows: int, cut: shards.Cut, room: Room
) -> Tensor:
    """Takes the statistics of s over the tensors of all parts together (rows=1), or of each tensor
    of the only part, as the operators take them.

    cut: the processes that hold the rest of the tensors (core.shards). The memory is `room`'s,
    which keeps it.
    """
    home = parts[0].grads[0].device
    key = normalization, home, rows, cut
    if key not in room:
        room[key] = op.no_statistics(rows, normalization, home)
    out = op.emptied(room[key])
    for part in parts:
        into = out.to(part.grads[0].device)
        op.selective_statistics_(
            part.backend,
            part.grads,
            part.saliencies,
            part.saliency_mins,
            part.saliency_maxs,
            layout=part.layout,
            sizes=part.sizes,
            normalization=normalization,
            grad_scale=part.grad_scale,
            out=into,
        )
        out = into.to(home)
    shards.join_(out, cut)
    return out


def joint_statistics(
    cuts: dict[shards.Cut, list[op.Part]], normalization: str, room: Room
) -> Tensor:
    """Takes the statistics over all parts of all cuts together. The reference alone ranks exactly;
    where a compiled kernel or another process takes part, all share its histogram.
    """
    exactly = normalization == "rank" and list(cuts) == [()] and not torch.compiler.is_compiling()
    if exactly and all(
        part.backend == "reference" and not op.valueless(part.grads) for part in cuts[()]
    ):
        return op.exact_ranks(cuts[()])
    found = [
        scope_statistics(parts, normalization, rows=1, cut=cut, room=room)
        for cut, parts in cuts.items()
    ]
    if len(found) == 1:
        return found[0]
    rows = torch.cat([row.to(found[0].device) for row in found])
    if normalization == "rank":
        return rows.sum(0, keepdim=True)
    return torch.stack((rows[:, 0].amin(), rows[:, 1].amax()))[None]


class Scopes:
    """Keeps, from step to step, what statistics over more than one process's tensor need."""

    def __init__(self) -> None:
        self.room: Room = {}
        # kept minima of which an earlier step made the whole's, so that none need be asked for
        self.joined: dict[int, Tensor] = {}

    def settle(self, batches: list[Batch], grad_scale: Tensor | None) -> None:
        """Hands the batches the statistics that their operator cannot take alone: over all of a
        "global" scope, or over the whole of tensors that other processes hold parts of.
        """
        scopes: dict[str, dict[shards.Cut, list[op.Part]]] = {}
        members = []
        for batch in batches:
            normalization = batch.selection.normalization
            if normalization == "constant":
                continue
            if batch.selection.scope == "global":
                members.append(batch)
                cuts = scopes.setdefault(normalization, {})
                for cut, chosen, part in batch.parts(grad_scale):
                    cuts.setdefault(self._to_ask(batch, cut, chosen), []).append(part)
            elif any(batch.cuts):
                rows = op.no_statistics(len(batch.params), normalization, batch.device)
                for cut, chosen, part in batch.parts(grad_scale):
                    ask = self._to_ask(batch, cut, chosen)
                    rows[chosen] = scope_statistics(
                        [part], normalization, rows=len(chosen), cut=ask, room={}
                    )
                batch.statistics = rows
        if not members:
            return
        room = {} if torch.compiler.is_compiling() else self.room
        joint = {
            normalization: joint_statistics(cuts, normalization, room)
            for normalization, cuts in scopes.items()
        }
        for batch in members:
            batch.statistics = joint[batch.selection.normalization].to(batch.device)

    def _to_ask(self, batch: Batch, cut: shards.Cut, chosen: list[int]) -> shards.Cut:
        """Returns the processes whose statistics are needed ahead of the update: none where what
        was kept is already that of the whole.
        """
        if not cut or not batch.keeps:
            return cut
        mins = [batch.saliency_mins[i] for i in chosen]
        return () if all(self.joined.get(id(kept)) is kept for kept in mins) else cut

    def join_kept(self, batch: Batch, found_inf: Tensor | None) -> None:
        """Joins the extremes that every process kept of its part of a tensor into the whole's."""
        torch.autograd.graph.increment_version(batch.wholes)
        if not batch.keeps:
            return
        kept = batch.saliency_mins, batch.saliency_maxs
        for cut, chosen, _ in batch.parts(None):
            pairs = torch.stack([torch.stack([values[i] for i in chosen]) for values in kept], 1)
            shards.join_(pairs, cut)
            for values, joined in zip(kept, pairs.unbind(1), strict=True):
                torch._foreach_copy_([values[i] for i in chosen], list(joined.unbind()))
        # else a first step may have kept nothing
        if found_inf is None:
            self.joined |= {id(low): low for low in batch.saliency_mins}
