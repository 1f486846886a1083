"""The selecting operators: their schemas, fakes, and the choice of a backend."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core import backends
from ..core.operator import Operator, P, R, writes_only
from . import reference
from .options import (
    NORMALIZATIONS,
    RANK_BINS,
    AdamWOptions,
    Selection,
    SelectionNumbers,
    SGDOptions,
    StepOptions,
    apart,
)

OPTIONS = (
    "float threshold, float sharpness, int normalization, bool salient, bool previous, "
    "bool rescale, float min_probability, float keep_probability, bool target_update"
)
# A list of states has a tensor by parameter, or for several of them a single one with their
# elements one after another. layout: per tensor stream, offset, run, stride. scope_statistics: [1
# or T, 2] float64 minimum and maximum of s, or [1 or T, RANK_BINS] int64 counts, over a wider scope
# than the tensor; None: over each tensor.
STEP = (
    "Tensor({}!)[] steps, Tensor({}!)[] saliency_mins, Tensor({}!)[] saliency_maxs, "
    "Tensor? scope_statistics, int[] layout, Tensor? grad_scale, Tensor? found_inf, "
    "float lr, Tensor? lr_tensor, float weight_decay, bool maximize, int seed, "
)


class SelectiveOperator(Operator[P, R]):
    """Calls the reference as plain Python wherever tensors have values, torch.func included."""

    def __call__(self, backend: str, /, *tensors: P.args, **options: P.kwargs) -> R:
        if (
            backend == "reference"
            and not torch.compiler.is_compiling()
            and not valueless(tensors[0])
        ):
            return self.reference(*tensors, **options)
        if backend == "triton" and not backends.traced():
            result = self.kernel(backend)(*tensors, **options)
        else:
            # traced: the operator without compiled kernels
            registered = self.fallback if backend == "reference" else self.default
            result = self.call(registered, tensors, options)
        # Kernels registered outside PyTorch leave the versions alone, and autograd would miss a
        # stale graph.
        torch.autograd.graph.increment_version(self.written(tensors, options))
        return result


class SelectingOperator(SelectiveOperator[P, R]):
    """Takes its options as one `selection`, which the schema has spelt out."""

    def in_numbers(self, options: Mapping[str, Any]) -> dict[str, object]:
        """Returns the options as the schema has them, the `selection` spelt out in numbers."""
        numbers = {**options, **options["selection"].numbers()}
        del numbers["selection"]
        return numbers

    def in_words(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the options as the reference has them, with one `selection`."""
        names = SelectionNumbers.__annotations__
        selection = Selection.of_numbers(**{name: options[name] for name in names})
        others = {name: value for name, value in options.items() if name not in names}
        return others | {"selection": selection}


class SteppingOperator(SelectingOperator[P, object]):
    """Steps an optimizer's parameters, whose states may come as a single tensor for several.

    Takes its options as two objects, `common` and `own`, which the schema has spelt out. Returns
    None, or the plan of the next call whose tensors, the gradients aside, are the same objects, and
    the parameters in the same places: they are not looked at as closely again.
    """

    def __init__(
        self, schema: str, reference: Callable[P, None], own: type[AdamWOptions] | type[SGDOptions]
    ) -> None:
        self.own = own
        super().__init__(
            __package__,
            schema,
            reference,
            load_triton=_load_triton,
            fake=writes_only,
            words={},
            no_vmap=None,
        )
        # The schema has them by position: PyTorch takes long over two dozen keywords.
        names = [argument.name for argument in self.default._schema.arguments]
        self.option_names = names[names.index("scope_statistics") :]

    def call(
        self,
        overload: Callable[..., object],
        tensors: tuple[object, ...],
        options: Mapping[str, object],
    ) -> object:
        """Calls an overload with the step's option objects, every argument by its position."""
        numbers = self.in_numbers(options)
        return overload(*tensors, *[numbers[name] for name in self.option_names])

    def in_numbers(self, options: Mapping[str, Any]) -> dict[str, object]:
        """Returns the step's option objects as the schema's keywords, words as numbers."""
        # the schema's keywords are the names of the fields
        common, own = options["common"], options["own"]
        numbers = {**vars(common), **vars(own), **common.selection.numbers()}
        del numbers["selection"], numbers["plan"]
        return numbers

    def in_words(self, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the schema's keywords as the step's option objects."""
        words, names = super().in_words(options) | {"plan": None}, StepOptions.__dataclass_fields__
        common = {name: words.pop(name) for name in names}
        return {"common": StepOptions(**common), "own": self.own(**words)}

    def by_schema(self, function: Callable[..., R], *arguments: Any, **options: Any) -> R:
        """Calls a function with a tensor by parameter in every list of states; by keyword comes no
        option.
        """
        count = len(self.option_names)
        params, grads, *moments, steps, low, high = arguments[:-count]
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
        shapes, single = [p.shape for p in params], [torch.Size()] * len(params)
        moments = [apart(states, shapes) for states in moments]
        scalars = [apart(states, single) for states in (steps, low, high)]
        options |= zip(self.option_names, arguments[-count:], strict=True)
        return super().by_schema(function, params, grads, *moments, *scalars, **options)


def valueless(tensors: object) -> bool:
    """Tells whether there is nothing to compute: on the meta device and among fake tensors, which
    the operators' fakes are for.
    """
    first = tensors[0] if isinstance(tensors, list) and tensors else tensors
    return isinstance(first, FakeTensor) or (isinstance(first, Tensor) and first.is_meta)


def _load_triton() -> None:
    """Gives the operators their Triton functions."""
    from . import triton

    selective_adamw_.triton = triton.selective_adamw_
    selective_sgd_.triton = triton.selective_sgd_
    select_gradients_.triton = triton.select_gradients_
    selective_statistics_.triton = triton.selective_statistics_
    selection_probability_.triton = triton.selection_probability_
    selection_mask_.triton = triton.selection_mask_


selective_adamw_ = SteppingOperator(
    "selective_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
    + STEP.format(*"efg")
    + "float beta1, float beta2, Tensor? beta1_tensor, Tensor? beta2_tensor, float eps, "
    f"{OPTIONS}) -> ()",
    reference.selective_adamw_,
    AdamWOptions,
)
selective_sgd_ = SteppingOperator(
    "selective_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    + STEP.format(*"cde")
    + f"float momentum, float dampening, bool nesterov, {OPTIONS}) -> ()",
    reference.selective_sgd_,
    SGDOptions,
)
select_gradients_ = SelectingOperator(
    __package__,
    "select_gradients_(Tensor(a!)[] grads, Tensor[] saliencies, *, Tensor? scope_statistics, "
    f"int[] layout, int step, int seed, {OPTIONS}) -> ()",
    reference.select_gradients_,
    load_triton=_load_triton,
    fake=writes_only,
    words={},
    no_vmap=None,
)
# Joins into `out`: one row for all tensors together, or a row each. Minima and maxima stand for
# tensors that have them (not NaN). sizes: elements of the unsharded tensors; empty: as they are.
selective_statistics_ = SelectiveOperator(
    __package__,
    "selective_statistics_(Tensor[] grads, Tensor[] saliencies, Tensor[] saliency_mins, "
    "Tensor[] saliency_maxs, *, int[] layout, int[] sizes, int normalization, Tensor? grad_scale, "
    "Tensor(a!) out) -> ()",
    reference.selective_statistics_,
    load_triton=_load_triton,
    fake=writes_only,
    words={"normalization": NORMALIZATIONS},
    no_vmap=None,
)
selection_probability_ = SelectingOperator(
    __package__,
    f"selection_probability_(Tensor grad, Tensor? saliency, *, Tensor(a!) out, {OPTIONS}) -> ()",
    reference.selection_probability_,
    load_triton=_load_triton,
    fake=writes_only,
    words={},
    no_vmap=None,
)
selection_mask_ = SelectingOperator(
    __package__,
    "selection_mask_(Tensor grad, Tensor? saliency, *, Tensor(a!) out, int[] layout, int step, "
    f"int seed, {OPTIONS}) -> ()",
    reference.selection_mask_,
    load_triton=_load_triton,
    fake=writes_only,
    words={},
    no_vmap=None,
)


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
        """Makes a part of no tensors yet."""
        return cls(backend, [], [], [], [], None, [], [])


def no_statistics(rows: int, normalization: str, device: torch.device) -> Tensor:
    """Returns statistics of nothing, for the statistics operator to join others to."""
    sizes, dtype = (
        ((rows, RANK_BINS), torch.int64) if normalization == "rank" else ((rows, 2), torch.float64)
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
