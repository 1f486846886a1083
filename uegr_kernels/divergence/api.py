"""The public losses of UEGR's forward stage, from logits or from hidden states."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..core import backends, checks, memory
from . import op
from .options import REDUCTIONS
from .options import TASKS as TASKS
from .options import LossOptions as LossOptions

REVERSE_MODE = (
    "differentiate by logits, hidden states and weights with backward(), torch.func.grad, vjp or "
    "jacrev, and give labels.detach(); or use a loss of plain PyTorch"
)


class LossParts(typing.NamedTuple):
    """Holds L_train, and detached and unweighted what it consists of: () each, or [N] with
    reduction="none".
    """

    loss: Tensor
    clean_loss: Tensor
    adversarial_loss: Tensor
    divergence: Tensor


def pairwise_js(
    logits: Tensor | Sequence[Tensor],
    *,
    reduction: str = LossOptions.reduction,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Computes the Jensen-Shannon divergence of m passes' softmaxes, summed over pairs (Eq. 4).

    logits            [m, N, C], or a sequence of m >= 2 tensors [N, C]; float32, bfloat16, float16
        or float64; -inf masks a class
    reduction         "mean" over the N rows, "sum" over them, or "none"
    inplace_backward  True: the gradient is written over the logits in this call, whose values are
                      undefined afterwards. They must come from an operation that does not save its
                      output (a linear layer). One backward only; under torch.compile no effect
    backend           "auto", "reference", "cpp", "cuda" or "triton"

    Returns () or, for "none", [N], float32 (float64 for float64 logits), in nats, in [0, m(m-1)/2
    ln 2]; NaN for a row that is all -inf. Raises TypeError or ValueError for wrong arguments,
    RuntimeError for a backend that cannot serve the call and for overlapping logits with
    inplace_backward. It has no second derivative and does not run under torch.func.vmap.

    Equivalent to `reference.uegr_loss([logits], None, options=LossOptions(js_weight=1), ...)[0]`.
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    in_place = checks.flag("inplace_backward", inplace_backward)
    logits = _passes("logits", logits)
    checks.refuse_transforms("pairwise_js", logits, REVERSE_MODE)
    _check_pairs("logits", logits, "[m, N, C]")
    _check_same_rows(_named("logits", logits))
    if in_place and not backends.traced():
        _check_apart(logits)
    return op.loss_and_parts(
        logits, None, ONLY_PAIRS[reduction], in_place=in_place, backend=backend
    )[0]


@overload
def uegr_loss(
    clean_logits: Tensor,
    adversarial_logits: Tensor | Sequence[Tensor] | None,
    labels: Tensor,
    *,
    js_weight: float = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    task: str = ...,
    return_parts: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def uegr_loss(
    clean_logits: Tensor,
    adversarial_logits: Tensor | Sequence[Tensor] | None,
    labels: Tensor,
    *,
    js_weight: float = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    task: str = ...,
    return_parts: Literal[True],
    inplace_backward: bool = ...,
    backend: str = ...,
) -> LossParts: ...
def uegr_loss(
    clean_logits: Tensor,
    adversarial_logits: Tensor | Sequence[Tensor] | None,
    labels: Tensor,
    *,
    js_weight: float = LossOptions.js_weight,
    label_smoothing: float = LossOptions.label_smoothing,
    ignore_index: int = LossOptions.ignore_index,
    reduction: str = LossOptions.reduction,
    task: str = LossOptions.task,
    return_parts: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | LossParts:
    """Computes CE(clean) + mean CE(adversarial passes) + js_weight * JS of their pairs (Eq. 2-6).

    clean_logits        [N, C]  float32, bfloat16, float16 or float64; -inf masks a class
    adversarial_logits  [m, N, C], or a sequence of m tensors [N, C], of the same dtype; None: no
        adversarial passes, the loss is that of the clean logits alone
    labels              [N] class indices, or [N, C] probabilities; for regression floats [N] (with
        C = 1) or [N, C]; they get no gradient
    js_weight           lambda, >= 0
    label_smoothing     in [0, 1], as in torch.nn.functional.cross_entropy
    ignore_index        rows with this label add 0 everywhere and do not count in the mean; with
        class indices only
    reduction           "mean" over the rows that are not ignored (NaN where all are), "sum", or
        "none"
    task                "classification", or "regression": squared error for CE, squared difference
        for JS, both means over C
    return_parts        True: returns LossParts (loss, clean_loss, adversarial_loss, divergence),
        the last three detached and unweighted
    inplace_backward, backend   as for `pairwise_js`

    Returns () or, for "none", [N], float32 (float64 for float64 logits), in nats, >= 0; inf where a
    label lies on a logit of -inf. Raises as `pairwise_js` does, ValueError also for labels outside
    [0, C) on the CPU.

    Equivalent to `reference.uegr_loss([clean_logits, adversarial_logits], labels, ...)[0]`.
    """
    options = LossOptions(
        js_weight=js_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        task=task,
    ).checked()
    in_place = checks.flag("inplace_backward", inplace_backward)
    with_parts = checks.flag("return_parts", return_parts)
    checks.axes("clean_logits", clean_logits, "[N, C]", 2)
    logits = [clean_logits]
    if adversarial_logits is not None:
        logits += _passes("adversarial_logits", adversarial_logits)
    _check_same_rows({"clean_logits": clean_logits, **_named("adversarial_logits", logits[1:])})
    labels = _check_labels("uegr_loss", labels, logits, clean_logits.shape[-1], options)
    if in_place and not backends.traced():
        _check_apart(logits)
    loss, parts = op.loss_and_parts(logits, labels, options, in_place=in_place, backend=backend)
    return _with_parts(loss, parts) if with_parts else loss


def linear_pairwise_js(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = LossOptions.reduction,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes `pairwise_js` of F.linear(hidden, weight, bias), which never exists whole (Eq. 4).

    hidden      [m, N, H]  float32, bfloat16, float16 or float64
    weight      [C, H]     the classifier's
    bias        [C] or None
    chunk_rows  of the N rows at a time, all passes of them; None: as many as keep the extra memory
        near 100 MB
    reduction, backend   as for `pairwise_js`

    Under autocast the operands are cast as F.linear casts them. The gradients are computed with the
    loss, for `reduction="none"` in the backward, from the logits once more. The weight's is summed
    in float32 for 16-bit operands. Returns and raises as `pairwise_js`.

    Equivalent to `reference.linear_uegr_loss(reference.uegr_loss_, [hidden], weight, bias, None,
    ...)[0]`.
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    chunk_rows = _check_chunk(chunk_rows)
    _check_stacked("hidden", hidden, "[m, N, H]")
    _check_pairs("hidden", [hidden], "[m, N, H]")
    dtype = _check_linear({"hidden": hidden}, weight, bias)
    checks.refuse_transforms(
        "linear_pairwise_js", [hidden, weight, *([] if bias is None else [bias])], REVERSE_MODE
    )
    return op.linear_loss_and_parts(
        [hidden],
        weight,
        bias,
        None,
        ONLY_PAIRS[reduction],
        dtype=dtype,
        chunk_rows=chunk_rows,
        backend=backend,
    )[0]


@overload
def linear_uegr_loss(
    clean_hidden: Tensor,
    adversarial_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    js_weight: float = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    task: str = ...,
    return_parts: Literal[False] = ...,
    inplace_backward: bool = ...,
    chunk_rows: int | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def linear_uegr_loss(
    clean_hidden: Tensor,
    adversarial_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    *,
    js_weight: float = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    task: str = ...,
    return_parts: Literal[True],
    inplace_backward: bool = ...,
    chunk_rows: int | None = ...,
    backend: str = ...,
) -> LossParts: ...
def linear_uegr_loss(
    clean_hidden: Tensor,
    adversarial_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    js_weight: float = LossOptions.js_weight,
    label_smoothing: float = LossOptions.label_smoothing,
    ignore_index: int = LossOptions.ignore_index,
    reduction: str = LossOptions.reduction,
    task: str = LossOptions.task,
    return_parts: bool = False,
    inplace_backward: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor | LossParts:
    """Computes `uegr_loss` of F.linear(hidden, weight, bias), which never exists whole (Eq. 2-6).

    clean_hidden        [N, H]     float32, bfloat16, float16 or float64
    adversarial_hidden  [m, N, H]  of the same dtype; None: no adversarial passes
    weight, bias        [C, H] and [C] or None, the classifier's
    labels              [N] class indices or [N, C] probabilities; for regression floats
    js_weight           lambda, >= 0;  label_smoothing  in [0, 1];  ignore_index  label of rows to
        leave out, as all three in `uegr_loss`
    reduction           "mean" over the rows that are not ignored, "sum", or "none"
    task                "classification", or "regression": squared errors and differences
    return_parts        True: returns LossParts (loss, clean_loss, adversarial_loss, divergence)
    inplace_backward    no effect: these logits are nobody else's
    chunk_rows          of the N rows at a time, all passes of them; None: near 100 MB of them
    backend             "auto", "reference", "cpp", "cuda" or "triton"

    Returns () or, for "none", [N], float32 (float64 for float64), in nats, >= 0. Gradients and
    autocast as for `linear_pairwise_js`. Raises TypeError or ValueError for wrong arguments,
    RuntimeError for a backend that cannot serve the call.

    Equivalent to `reference.linear_uegr_loss(reference.uegr_loss_, [clean_hidden,
    adversarial_hidden], weight, bias, labels, ...)[0]`.
    """
    options = LossOptions(
        js_weight=js_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        task=task,
    ).checked()
    chunk_rows = _check_chunk(chunk_rows)
    checks.flag("inplace_backward", inplace_backward)
    with_parts = checks.flag("return_parts", return_parts)
    checks.axes("clean_hidden", clean_hidden, "[N, H]", 2)
    named = {"clean_hidden": clean_hidden}
    if adversarial_hidden is not None:
        _check_stacked("adversarial_hidden", adversarial_hidden, "[m, N, H]")
        named["adversarial_hidden"] = adversarial_hidden
    dtype = _check_linear(named, weight, bias)
    hidden = list(named.values())
    tensors = [*hidden, weight] if bias is None else [*hidden, weight, bias]
    labels = _check_labels("linear_uegr_loss", labels, tensors, len(weight), options)
    loss, parts = op.linear_loss_and_parts(
        hidden, weight, bias, labels, options, dtype=dtype, chunk_rows=chunk_rows, backend=backend
    )
    return _with_parts(loss, parts) if with_parts else loss


class _LossModule(nn.Module):
    """Calls a loss function with the keywords that it was built with."""

    function: Callable[..., object]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = {
            name: p.default
            for name, p in inspect.signature(type(self).function).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        }
        checks.options(type(self).__name__, options, known)
        self._check(known | options)
        self.options = options

    def _check(self, options: dict[str, object]) -> None:
        """Raises what is wrong with a value. The backend waits for the tensors' device."""
        checks.choice("reduction", options["reduction"], REDUCTIONS)
        checks.flag("inplace_backward", options["inplace_backward"])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class PairwiseJSLoss(_LossModule):
    """Computes the Jensen-Shannon divergence of m passes' softmaxes, summed over pairs (Eq. 4).

    reduction         "mean" over the N rows, "sum" over them, or "none"
    inplace_backward  True: the gradient is written over the logits, as in `pairwise_js`
    backend           "auto", "reference", "cpp", "cuda" or "triton"

    It is called with the logits, [m, N, C] or a sequence of m >= 2 tensors [N, C], and returns ()
    or, for "none", [N], in nats. Raises TypeError or ValueError for wrong keywords when it is
    built, for wrong logits and a wrong backend when it is called; RuntimeError as `pairwise_js`.

    Equivalent to `pairwise_js(logits, **keywords)`.
    """

    function = staticmethod(pairwise_js)

    def forward(self, logits: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes `pairwise_js` of the logits."""
        return pairwise_js(logits, **self.options)


class UEGRLoss(_LossModule):
    """Computes CE(clean) + mean CE(adversarial passes) + js_weight * JS of their pairs (Eq. 2-6).

    js_weight         lambda, >= 0
    label_smoothing   in [0, 1];  ignore_index  label of rows to leave out
    reduction         "mean" over the rows that are not ignored, "sum", or "none"
    task              "classification", or "regression": squared errors and differences
    return_parts      True: returns LossParts (loss, clean_loss, adversarial_loss, divergence)
    inplace_backward  True: the gradient is written over the logits, as in `pairwise_js`
    backend           "auto", "reference", "cpp", "cuda" or "triton"

    It is called with clean logits [N, C], adversarial ones [m, N, C] (or a sequence of m tensors
    [N, C], or None) and labels [N] or [N, C], and returns () or, for "none", [N], in nats. Raises
    TypeError or ValueError for wrong keywords when it is built, for wrong tensors and a wrong
    backend when it is called; RuntimeError as `uegr_loss`.

    Equivalent to `uegr_loss(clean_logits, adversarial_logits, labels, **keywords)`.
    """

    function = staticmethod(uegr_loss)

    def forward(
        self,
        clean_logits: Tensor,
        adversarial_logits: Tensor | Sequence[Tensor] | None,
        labels: Tensor,
    ) -> Tensor | LossParts:
        """Computes `uegr_loss` of the logits and labels."""
        loss: Tensor | LossParts = uegr_loss(
            clean_logits, adversarial_logits, labels, **self.options
        )
        return loss

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        checks.flag("return_parts", options["return_parts"])
        names = [field.name for field in dataclasses.fields(LossOptions)]
        LossOptions(**{name: options[name] for name in names}).checked()


# What uegr_loss is without labels, by reduction.
ONLY_PAIRS = {
    reduction: LossOptions(js_weight=1.0, reduction=reduction) for reduction in REDUCTIONS
}


def _with_parts(loss: Tensor, parts: Tensor) -> LossParts:
    # a copy: the backward keeps parts, which nobody may change
    return LossParts(loss, *parts.detach().clone().unbind())


def _shape(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name if len(tensors) == 1 else f"{name}[{i}]": x for i, x in enumerate(tensors)}


def _check_chunk(chunk_rows: int | None) -> int | None:
    return None if chunk_rows is None else checks.integer("chunk_rows", chunk_rows, 1, bits=63)


def _check_stacked(name: str, x: Tensor, shape: str) -> None:
    """Raises for what is no tensor of at least one pass."""
    checks.axes(name, x, shape, 3)
    if len(x) < 1:
        raise ValueError(f"{name} of shape {tuple(x.shape)} holds no pass; give at least one")


def _check_pairs(name: str, tensors: Sequence[Tensor], shape: str) -> None:
    """Raises where there is one pass alone."""
    if sum(len(x) if x.dim() == 3 else 1 for x in tensors) < 2:
        raise ValueError(
            f"{name}: one pass alone (shape {_shape(tensors)}) has no pair; give {shape} with "
            "m >= 2"
        )


def _passes(name: str, logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Returns the passes as the operators take them: a stacked tensor as one element, in place."""
    if isinstance(logits, Tensor) or not isinstance(logits, Sequence):
        _check_stacked(name, logits, "[m, N, C], or a sequence of m tensors [N, C]")
        return [logits]
    if len(logits) < 1:
        raise ValueError(f"{name} is an empty sequence; give at least one tensor [N, C]")
    for i, x in enumerate(logits):
        checks.axes(f"{name}[{i}]", x, "[N, C]", 2)
    return list(logits)


def _check_same_rows(tensors: dict[str, Tensor]) -> None:
    """Raises where the last two axes, the dtype or the device differ from the first one's."""
    (first, x), *others = tensors.items()
    for name, y in others:
        if y.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"{name} has rows {tuple(y.shape[-2:])} and {first} {tuple(x.shape[-2:])}; give "
                "the same N and C"
            )
        checks.same_placement(first, x, name, y)


def _check_apart(logits: list[Tensor]) -> None:
    """Raises where two elements share memory, which the gradient could not be written over."""
    remedy = (
        "inplace_backward=True could not write their gradients over them; give .contiguous() "
        "copies, or leave inplace_backward out"
    )
    for x in logits:
        if memory.overlaps_itself(x):
            raise RuntimeError(
                f"logits of shape {tuple(x.shape)} and strides {x.stride()} overlap "
                f"themselves: {remedy}"
            )
    if memory.shared(logits) is not None:
        raise RuntimeError(f"two of the logits share memory: {remedy}")


def _check_labels(
    loss: str, labels: Tensor, tensors: list[Tensor], classes: int, options: LossOptions
) -> Tensor:
    """Returns the labels as the operators take them: int64 [N], or floating [N, C]; the first of
    the loss's other tensors has their rows.
    """
    rows, ignore_index, regression = tensors[0], options.ignore_index, options.task == "regression"
    checks.labels(labels)
    if labels.layout != torch.strided or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels are {labels.dtype}, {labels.layout}; give dense class indices "
            "(int64) or floats"
        )
    checks.labels_with(labels, "the other arguments", rows.device)
    checks.refuse_transforms(loss, tensors, REVERSE_MODE, constants=[labels])
    n, labels = rows.shape[0], labels.detach()
    if labels.is_floating_point():
        if labels.dim() == 1 and not regression:
            raise TypeError(
                f"labels [N] are {labels.dtype}; give int64 class indices, "
                "probabilities [N, C], or task='regression'"
            )
        if labels.shape != (n, classes) and not (labels.shape == (n,) and classes == 1):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; give [N, C] = {(n, classes)}, or [N] "
                "where C is 1"
            )
        if not regression and ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} means nothing for labels [N, C]; leave "
                "it negative, or give class indices"
            )
        return labels.reshape(n, classes)
    if regression:
        raise TypeError(
            f"labels are {labels.dtype}; task='regression' takes floats, give labels.float()"
        )
    if labels.shape != (n,):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; give class indices [N] = "
            f"({n},), or probabilities [N, C] as floats"
        )
    return labels.long()


def _check_linear(hidden: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Returns the dtype of the logits: autocast's where it would cast F.linear's operands, else the
    operands' own, which then must agree.
    """
    checks.axes("weight", weight, "[C, H]", 2)
    if bias is not None:
        checks.axes("bias", bias, "[C]", 1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; give [C] = ({weight.shape[0]},) as weight has"
            )
    first, x = next(iter(hidden.items()))
    if len(weight) < 1:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} has no class; give [C, H] with C >= 1"
        )
    for name, y in hidden.items():
        if y.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name} has H = {y.shape[-1]}, weight of shape {tuple(weight.shape)} "
                f"{weight.shape[1]}; give the same H"
            )
        if y.shape[-2] != x.shape[-2]:
            raise ValueError(
                f"{name} has {y.shape[-2]} rows and {first} {x.shape[-2]}; give the same N"
            )
    tensors = hidden | {"weight": weight} | ({} if bias is None else {"bias": bias})
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and all(
        y.dtype != torch.float64 for y in tensors.values()
    )
    for name, y in tensors.items():
        checks.same_placement(first, x, name, y.to(x.dtype) if cast else y)
    return torch.get_autocast_dtype(kind) if cast else x.dtype
