"""The selecting operators: their options, schemas, fakes, and the choice of a backend."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core import backends as backends
from ..core import checks, shards
from ..core.operator import Operator, P, R, writes_only
from . import reference

_triton = functools.partial(backends.triton_kernels, __package__)

# To the compiled kernels a normalisation is its position here (csrc/selective/selective.h has the
# same order; a test compares).
NORMALIZATIONS = ("minmax", "range", "rank", "constant")
DIRECTIONS = ("printed", "salient")
SCOPES = ("tensor", "global")
STATISTICS = ("current", "previous")
TARGETS = ("gradient", "update")


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """The ten selection options (SPEC 1), checked here and nowhere else."""

    threshold: float
    sharpness: float
    normalization: str
    direction: str
    scope: str
    statistics: str
    rescale: bool
    min_probability: float
    keep_probability: float
    target: str

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(
                    f"{name}={value!r} is not one of its values; use "
                    f"{' or '.join(map(repr, choices))}"
                )
        for name, (low, high) in RANGES.items():
            object.__setattr__(self, name, checks.number(name, getattr(self, name), low, high))
        if self.keep_probability == 0:
            raise ValueError("keep_probability=0.0 is out of range; give a number in (0, 1]")
        object.__setattr__(self, "rescale", checks.flag("rescale", self.rescale))
        if self.statistics == "previous" and self.normalization in ("rank", "constant"):
            raise ValueError(
                "statistics='previous' keeps a minimum and a maximum, for which "
                f"normalization={self.normalization!r} has no use; "
                "give statistics='current', or normalization='minmax' or 'range'"
            )

    @property
    def random(self) -> bool:
        """Whether an element can go unselected."""
        return self.normalization != "constant" or self.keep_probability != 1

    def arguments(self) -> dict[str, Any]:
        """As the operators take it; the scope is settled above them, by the statistics they
        are handed.
        """
        return {
            "threshold": self.threshold,
            "sharpness": self.sharpness,
            "normalization": NORMALIZATIONS.index(self.normalization),
            "salient": self.direction == "salient",
            "previous": self.statistics == "previous",
            "rescale": self.rescale,
            "min_probability": self.min_probability,
            "keep_probability": self.keep_probability,
            "target_update": self.target == "update",
        }

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "Selection":
        """The inverse of `arguments`."""
        named = {
            name: arguments[name]
            for name in ("threshold", "sharpness", "rescale", "min_probability", "keep_probability")
        }
        return cls(
            normalization=NORMALIZATIONS[arguments["normalization"]],
            direction=DIRECTIONS[arguments["salient"]],
            scope="tensor",
            statistics=STATISTICS[arguments["previous"]],
            target=TARGETS[arguments["target_update"]],
            **named,
        )


CHOICES = {
    "normalization": NORMALIZATIONS,
    "direction": DIRECTIONS,
    "scope": SCOPES,
    "statistics": STATISTICS,
    "target": TARGETS,
}
RANGES = {
    "threshold": (-math.inf, math.inf),
    "sharpness": (0, math.inf),
    "min_probability": (0, 1),
    "keep_probability": (0, 1),
}
FIELDS = tuple(field.name for field in dataclasses.fields(Selection))
# groups are read every step; their options rarely change
make_selection = functools.lru_cache(maxsize=64, typed=True)(Selection)

OPTIONS = (
    "float threshold, float sharpness, int normalization, bool salient, bool previous, bool "
    "rescale, "
    "float min_probability, float keep_probability, bool target_update"
)
# A list of states has a tensor by parameter, or for several of them a single one with their
# elements one after another. layout: per tensor stream, offset, run, stride. scope_statistics: [1
# or T, 2] float64 minimum and maximum of s, or [1 or T, RANK_BINS] int64 counts, over a wider scope
# than the tensor; None: over each tensor.
STEP = (
    "Tensor({}!)[] steps, Tensor({}!)[] saliency_mins, Tensor({}!)[] saliency_maxs, *, Tensor? "
    "scope_statistics, int[] layout, "
    "Tensor? grad_scale, Tensor? found_inf, float lr, Tensor? lr_tensor, float weight_decay, bool "
    "maximize, int seed, "
)
SCHEMAS = {
    "selective_adamw_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, "
    + "Tensor(d!)[] max_exp_avg_sqs, "
    + STEP.format(*"efg")
    + f"float beta1, float beta2, Tensor? beta1_tensor, Tensor? beta2_tensor, float eps, {OPTIONS}",
    "selective_sgd_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    + STEP.format(*"cde")
    + f"float momentum, float dampening, bool nesterov, {OPTIONS}",
    "select_gradients_": "Tensor(a!)[] grads, Tensor[] saliencies, *, Tensor? scope_statistics, "
    "int[] layout, int step, int seed, " + OPTIONS,
    # Joins into `out`: one row for all tensors together, or a row each. Minima and maxima stand for
    # tensors that have them (not NaN). sizes: elements of the unsharded tensors; empty: as they
    # are.
    "selective_statistics_": "Tensor[] grads, Tensor[] saliencies, Tensor[] saliency_mins, "
    "Tensor[] saliency_maxs, *, int[] layout, "
    + "int[] sizes, int normalization, Tensor? grad_scale, Tensor(a!) out",
    "selection_probability_": f"Tensor grad, Tensor? saliency, *, Tensor(a!) out, {OPTIONS}",
    "selection_mask_": "Tensor grad, Tensor? saliency, *, Tensor(a!) out, int[] layout, int step, "
    f"int seed, {OPTIONS}",
}


class SelectingOperator(Operator[P, R]):
    """Takes its options as one `selection`, which the schema has spelled out."""

    def in_numbers(self, options: Mapping[str, Any]) -> dict[str, Any]:
        selection: Selection = options["selection"]
        return {k: v for k, v in options.items() if k != "selection"} | selection.arguments()

    def in_words(self, options: dict[str, Any]) -> dict[str, Any]:
        selection = Selection.of(options)
        spelled = selection.arguments()
        return {k: v for k, v in options.items() if k not in spelled} | {"selection": selection}


class SteppingOperator(SelectingOperator[P, R]):
    """Steps an optimizer's parameters, whose states may come as a single tensor for several."""

    def by_schema(self, function: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        params, grads, *moments, steps, low, high = tensors
        # a mixture is dispatched to the default kernel: the compiled ones never see it
        for i, g in enumerate(grads):
            if g.layout is not torch.strided or g.device != params[i].device:
                raise RuntimeError(
                    f"grads[{i}] is {g.layout} on {g.device}; make it dense, on {params[i].device}"
                )
        for states in (*moments, steps, low, high):
            for state in states:
                if state.layout is not torch.strided:
                    raise RuntimeError(
                        f"a state of shape {tuple(state.shape)} is {state.layout}; make it dense"
                    )
        one = [p.new_empty(()) for p in params[:1]] * len(params)
        moments = [_apart(m, params) for m in moments]
        counts = [_apart(s, one) for s in (steps, low, high)]
        return super().by_schema(function, params, grads, *moments, *counts, **options)

    def _by_triton(self, *tensors: Any, **options: Any) -> Any:
        return super()._by_triton(*tensors, **options, plan=None)


def _apart(states: list[Tensor], alike: list[Tensor]) -> list[Tensor]:
    """Returns a list of states as a tensor by parameter."""
    if len(states) != 1 or len(alike) == 1:
        return states
    sizes = [one.numel() for one in alike]
    if not states[0].is_contiguous() or states[0].numel() != sum(sizes):
        raise RuntimeError(
            f"a list of states has {states[0].numel()} elements in a single tensor; it must be "
            f"contiguous and have {sum(sizes)}"
        )
    return [part.view_as(one) for part, one in zip(states[0].split(sizes), alike, strict=True)]


def _operator(name: str, schema: str) -> Operator[..., Any]:
    kind: type[Operator[..., Any]] = Operator
    if OPTIONS in schema:
        kind = SteppingOperator if "steps" in schema else SelectingOperator
    return kind(
        __package__,
        f"{name}({schema}) -> ()",
        getattr(reference, name),
        fake=writes_only,
        words={"normalization": NORMALIZATIONS},
        no_vmap=None,
    )


OPERATORS = {name: _operator(name, schema) for name, schema in SCHEMAS.items()}


def call(name: str, backend: str, *tensors: Any, **options: Any) -> Any:
    """Runs the operator on a chosen backend ("reference", "cpp", "cuda" or "triton").

    Arguments as in SCHEMAS, with the options as one `selection`, a normalisation by its name. What
    is returned may be the option `plan` of the next call whose tensors, the gradients aside, are
    the same objects: they are not looked at as closely again.
    """
    operator, plan = OPERATORS[name], None
    known = {"plan": options.pop("plan")} if "plan" in options else {}
    if backend == "reference" and not torch.compiler.is_compiling() and not _valueless(tensors[0]):
        operator.reference(*tensors, **options)
        return None
    if backend == "triton" and not backends.traced():
        plan = operator.kernel(backend)(*tensors, **options, **known)
    else:
        # traced: the operator without compiled kernels
        registered = operator.fallback if backend == "reference" else operator.default
        registered(*tensors, **operator.in_numbers(options))
    # Kernels registered outside PyTorch leave the versions alone, and autograd would miss a stale
    # graph.
    torch.autograd.graph.increment_version(operator.written(tensors, options))
    return plan


def _valueless(tensors: Tensor | list[Tensor]) -> bool:
    """Whether there is nothing to compute: on the meta device and among fake tensors, which
    the operators' fakes are for.
    """
    first = tensors if isinstance(tensors, Tensor) else tensors[0] if tensors else None
    return first is not None and (first.is_meta or isinstance(first, FakeTensor))


def choose(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend that serves operator `name`."""
    return OPERATORS[name].choose(backend, device, dtype)


def no_statistics(rows: int, normalization: str, device: torch.device) -> Tensor:
    """Statistics of nothing, for the statistics operator to join others to."""
    sizes, dtype = (
        ((rows, reference.RANK_BINS), torch.int64)
        if normalization == "rank"
        else ((rows, 2), torch.float64)
    )
    return _emptied(torch.empty(sizes, dtype=dtype, device=device))


def _emptied(statistics: Tensor) -> Tensor:
    if not statistics.is_floating_point():
        return statistics.zero_()
    statistics.fill_(torch.inf)[:, 1].neg_()
    return statistics


def scope_statistics(
    parts: list[dict[str, Any]],
    normalization: str,
    *,
    rows: int,
    cut: shards.Cut,
    room: dict[Any, Tensor],
) -> Tensor:
    """The statistics of s over the tensors of all parts together (rows=1), or of each tensor of the
    only part, as the operators take them.

    A part has `grads`, `saliencies`, `layout`, `sizes`, `grad_scale`, a chosen `backend`, and
    `kept`: None, or lists of the minima and maxima that stand for the tensors (NaN: nothing kept
    yet). cut: the processes that hold the rest of the tensors (core.shards). The memory is
    `room`'s, which keeps it.
    """
    home = parts[0]["grads"][0].device
    key = normalization, home, rows, cut
    if key not in room:
        room[key] = no_statistics(rows, normalization, home)
    out = _emptied(room[key])
    for part in parts:
        into = out.to(part["grads"][0].device)
        options = {
            "layout": part["layout"],
            "sizes": part["sizes"],
            "normalization": normalization,
            "grad_scale": part["grad_scale"],
        }
        call(
            "selective_statistics_",
            part["backend"],
            part["grads"],
            part["saliencies"],
            *(part["kept"] or ([], [])),
            **options,
            out=into,
        )
        out = into.to(home)
    shards.join_(out, cut)
    return out


def joint_statistics(
    cuts: dict[shards.Cut, list[dict[str, Any]]], normalization: str, room: dict[Any, Tensor]
) -> Tensor:
    """The statistics over all parts of all cuts together. The reference alone ranks exactly; where
    a compiled kernel or another process takes part, all share its histogram.
    """
    exactly = normalization == "rank" and list(cuts) == [()] and not torch.compiler.is_compiling()
    if exactly and all(
        part["backend"] == "reference" and not _valueless(part["grads"]) for part in cuts[()]
    ):
        return reference.ordered_saliency(cuts[()])
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
