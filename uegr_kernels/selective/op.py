"""The selecting operators: their schemas, fakes, and the choice of a backend."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core import backends as backends
from . import reference
from .options import (
    NORMALIZATIONS,
    AdamWOptions,
    Selection,
    SelectionNumbers,
    SGDOptions,
    StepOptions,
)

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


# ---- What serves an operator, and how its arguments are handed on


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Holds what serves one operator beside the compiled kernels, and what it writes.

    Both functions take the schema's tensors, and its options as keywords: the selection as one
    object, a normalisation by its name.
    """

    name: str
    written: tuple[int, ...]  # which of the positional arguments, all of them lists
    reference: Callable[..., None]
    triton: Callable[[], Callable[..., object]]  # finds it at first use
    steps: bool  # Triton's takes and returns a plan


def _define(
    name: str, reference: Callable[..., None], triton: Callable[[], Callable[..., object]]
) -> Kernels:
    """Registers an operator: its schema, its kernels and its fake."""
    schema = SCHEMAS[name]
    positional = schema.split("*,")[0].split(", ")
    written = tuple(i for i, text in enumerate(positional) if "!" in text)
    kernels = Kernels(name, written, reference, triton, "steps" in schema)
    backends.define(
        name,
        f"({schema}) -> ()",
        functools.partial(_run_reference, kernels),
        functools.partial(_run_triton, kernels),
    )
    for overload in (name, f"{name}.fallback"):
        torch.library.register_fake(f"uegr_kernels::{overload}", lambda *args, **kwargs: None)
    return kernels


def _run_reference(kernels: Kernels, *tensors: Any, **arguments: Any) -> None:
    """Serves the operator by the reference, as the dispatcher calls it."""
    kernels.reference(*_by_parameter(kernels, tensors), **_worded(arguments))


def _run_triton(kernels: Kernels, *tensors: Any, **arguments: Any) -> None:
    """Serves the operator by Triton, as the dispatcher calls it."""
    options = _worded(arguments)
    if kernels.steps:
        options["plan"] = None
    kernels.triton()(*_by_parameter(kernels, tensors), **options)


def _numbered(options: dict[str, Any]) -> dict[str, Any]:
    """Returns a function's options as the schema's: words as numbers."""
    if "selection" not in options:
        return options | {"normalization": NORMALIZATIONS.index(options["normalization"])}
    selection: Selection = options["selection"]
    others = {name: value for name, value in options.items() if name != "selection"}
    return others | selection.numbers()


def _worded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema's options as a function's, the inverse of `_numbered`."""
    if "salient" not in arguments:
        return arguments | {"normalization": NORMALIZATIONS[arguments["normalization"]]}
    names = SelectionNumbers.__annotations__
    numbers: Any = {name: arguments[name] for name in names}
    others = {name: value for name, value in arguments.items() if name not in names}
    return others | {"selection": Selection.of_numbers(numbers)}


def _by_parameter(kernels: Kernels, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a step's lists of states with a tensor by parameter; other operators' tensors as
    they are.
    """
    if not kernels.steps:
        return tensors
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
    return (
        params,
        grads,
        *(_apart(states, params) for states in moments),
        *(_apart(states, one) for states in (steps, low, high)),
    )


def _apart(states: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Returns a list of states as a tensor by parameter, of the shapes of `like`."""
    if len(states) != 1 or len(like) == 1:
        return states
    sizes = [one.numel() for one in like]
    if not states[0].is_contiguous() or states[0].numel() != sum(sizes):
        raise RuntimeError(
            f"a list of states has {states[0].numel()} elements in a single tensor; it must be "
            f"contiguous and have {sum(sizes)}"
        )
    return [part.view_as(one) for part, one in zip(states[0].split(sizes), like, strict=True)]


def _call(
    kernels: Kernels, backend: str, tensors: tuple[Any, ...], options: dict[str, Any], plan: object
) -> object:
    """Runs an operator on a chosen backend ("reference", "cpp", "cuda" or "triton").

    What is returned may be the `plan` of the next call whose tensors, the gradients aside, are the
    same objects: they are not looked at as closely again.
    """
    if backend == "reference" and not torch.compiler.is_compiling() and not valueless(tensors[0]):
        kernels.reference(*tensors, **options)
        return None
    if backend == "triton" and not backends.traced():
        if kernels.steps:
            plan = kernels.triton()(*tensors, **options, plan=plan)
        else:
            kernels.triton()(*tensors, **options)
    else:
        # traced: the operator without compiled kernels
        overload = "fallback" if backend == "reference" else "default"
        operator = getattr(getattr(torch.ops.uegr_kernels, kernels.name), overload)
        operator(*tensors, **_numbered(options))
        plan = None
    # Kernels registered outside PyTorch leave the versions alone, and autograd would miss a stale
    # graph.
    written = [*itertools.chain.from_iterable(map(tensors.__getitem__, kernels.written))]
    if "out" in options:
        written.append(options["out"])
    torch.autograd.graph.increment_version(written)
    return plan


def valueless(tensors: Tensor | list[Tensor]) -> bool:
    """Tells whether there is nothing to compute: on the meta device and among fake tensors, which
    the operators' fakes are for.
    """
    first = tensors if isinstance(tensors, Tensor) else tensors[0] if tensors else None
    return first is not None and (first.is_meta or isinstance(first, FakeTensor))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Chooses the backend that serves operator `name` (core.backends.choose)."""
    return backends.choose(backend, f"selective.{name}", device, dtype)


# ---- What serves each operator


def _triton() -> ModuleType:
    """Imports the Triton kernels, when they are first asked for."""
    from . import triton

    return triton


def _triton_adamw() -> Callable[..., object]:
    from .triton import selective_adamw_

    return selective_adamw_


def _triton_sgd() -> Callable[..., object]:
    from .triton import selective_sgd_

    return selective_sgd_


def _triton_gradients() -> Callable[..., object]:
    from .triton import select_gradients_

    return select_gradients_


def _triton_statistics() -> Callable[..., object]:
    from .triton import selective_statistics_

    return selective_statistics_


def _triton_probability() -> Callable[..., object]:
    from .triton import selection_probability_

    return selection_probability_


def _triton_mask() -> Callable[..., object]:
    from .triton import selection_mask_

    return selection_mask_


def _split(options: dict[str, Any]) -> tuple[StepOptions, dict[str, Any]]:
    """Takes a step's keywords apart: what both optimizers have, and one's own."""
    names = StepOptions.__dataclass_fields__
    common = StepOptions(**{name: options[name] for name in names})
    return common, {name: value for name, value in options.items() if name not in names}


def _adamw_reference(*tensors: Any, **options: Any) -> None:
    common, own = _split(options)
    reference.selective_adamw_(*tensors, common=common, own=AdamWOptions(**own))


def _sgd_reference(*tensors: Any, **options: Any) -> None:
    common, own = _split(options)
    reference.selective_sgd_(*tensors, common=common, own=SGDOptions(**own))


_ADAMW = _define("selective_adamw_", _adamw_reference, _triton_adamw)
_SGD = _define("selective_sgd_", _sgd_reference, _triton_sgd)
_GRADIENTS = _define("select_gradients_", reference.select_gradients_, _triton_gradients)
_STATISTICS = _define("selective_statistics_", reference.selective_statistics_, _triton_statistics)
_PROBABILITY = _define(
    "selection_probability_", reference.selection_probability_, _triton_probability
)
_MASK = _define("selection_mask_", reference.selection_mask_, _triton_mask)


# ---- The operators, as one calls them in Python


def selective_adamw_(
    backend: str,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    common: StepOptions,
    own: AdamWOptions,
    plan: object,
) -> object:
    """Steps by AdamW; returns a plan, as `_call`."""
    moments = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    tensors = params, grads, *moments, steps, saliency_mins, saliency_maxs
    return _call(_ADAMW, backend, tensors, vars(common) | vars(own), plan)


def selective_sgd_(
    backend: str,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    common: StepOptions,
    own: SGDOptions,
    plan: object,
) -> object:
    """Steps by SGD; returns a plan, as `_call`."""
    tensors = params, grads, momentum_buffers, steps, saliency_mins, saliency_maxs
    return _call(_SGD, backend, tensors, vars(common) | vars(own), plan)


def select_gradients_(
    backend: str,
    grads: list[Tensor],
    saliencies: list[Tensor],
    *,
    scope_statistics: Tensor | None,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selection,
) -> None:
    """Selects gradients in place."""
    options = {
        "scope_statistics": scope_statistics,
        "layout": layout,
        "step": step,
        "seed": seed,
        "selection": selection,
    }
    _call(_GRADIENTS, backend, (grads, saliencies), options, None)


def selective_statistics_(
    backend: str,
    grads: list[Tensor],
    saliencies: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    layout: list[int],
    sizes: list[int],
    normalization: str,
    grad_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Joins the tensors' statistics into `out`."""
    options = {
        "layout": layout,
        "sizes": sizes,
        "normalization": normalization,
        "grad_scale": grad_scale,
        "out": out,
    }
    tensors = grads, saliencies, saliency_mins, saliency_maxs
    _call(_STATISTICS, backend, tensors, options, None)


def selection_probability_(
    backend: str, grad: Tensor, saliency: Tensor | None, *, out: Tensor, selection: Selection
) -> None:
    """Computes p into `out`."""
    _call(_PROBABILITY, backend, (grad, saliency), {"out": out, "selection": selection}, None)


def selection_mask_(
    backend: str,
    grad: Tensor,
    saliency: Tensor | None,
    *,
    out: Tensor,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selection,
) -> None:
    """Draws b into `out`."""
    options = {"out": out, "layout": layout, "step": step, "seed": seed, "selection": selection}
    _call(_MASK, backend, (grad, saliency), options, None)


# ---- Statistics over a wider scope than a tensor


@dataclasses.dataclass
class Part:
    """Holds tensors of one device and dtype, cut alike, whose saliency is looked at together.

    The minima and maxima stand for the tensors that have them (NaN: none kept yet); sizes: of the
    unsharded tensors, or empty.
    """

    backend: str
    grads: list[Tensor]
    saliencies: list[Tensor]
    layout: list[int]
    sizes: list[int]
    grad_scale: Tensor | None
    saliency_mins: list[Tensor]
    saliency_maxs: list[Tensor]

    @classmethod
    def empty(cls, backend: str) -> "Part":
        """Makes one of no tensors yet."""
        return cls(backend, [], [], [], [], None, [], [])


def no_statistics(rows: int, normalization: str, device: torch.device) -> Tensor:
    """Returns statistics of nothing, for the statistics operator to join others to."""
    sizes, dtype = (
        ((rows, reference.RANK_BINS), torch.int64)
        if normalization == "rank"
        else ((rows, 2), torch.float64)
    )
    return emptied(torch.empty(sizes, dtype=dtype, device=device))


def emptied(statistics: Tensor) -> Tensor:
    """Makes statistics those of nothing, in place."""
    if not statistics.is_floating_point():
        return statistics.zero_()
    statistics.fill_(torch.inf)[:, 1].neg_()
    return statistics


def exact_ranks(parts: list[Part]) -> Tensor:
    """Returns every finite s of all parts in order, which the reference takes for statistics."""
    found = [
        reference.finite_saliency(part.grads, part.saliencies, part.grad_scale) for part in parts
    ]
    return torch.cat(found).sort().values
