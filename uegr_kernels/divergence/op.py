"""The loss operators: schemas, fakes, autograd, and the losses that they make up."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..core import backends, checks, native
from ..core.operator import Context, Operator, P, R, refuse_vmap, writes_only
from . import reference
from .options import REDUCTIONS, LossNumbers, LossOptions

# Bytes of a chunk's logits, counted in the arithmetic's dtype. The reference keeps many tensors of
# that size, the kernels work in place; a GPU wants larger matrices.
ON_GPU = ("cuda", "triton")
CHUNK_BYTES = {"reference": 9 << 20} | dict.fromkeys(ON_GPU, 512 << 20)
NATIVE_CHUNK_BYTES = 48 << 20

OPTIONS = (
    "float js_weight, float label_smoothing, int ignore_index, int reduction, bool "
    "regression, bool[] needs"
)
NO_VMAP = (
    "the losses of uegr_kernels do not run under torch.func.vmap; give the "
    "whole batch as N rows and reduction='none'"
)

Results = tuple[Tensor, Tensor, list[Tensor]]


class LossOperator(Operator[P, R]):
    """Takes a loss's options as one, `options`, which the schema has spelt out."""

    def in_numbers(self, options: Mapping[str, Any]) -> dict[str, object]:
        """Returns the options as the schema has them."""
        numbers = {**options, **options["options"].numbers()}
        del numbers["options"]
        return numbers

    def in_words(self, options: dict[str, Any]) -> dict[str, object]:
        """Returns the options as the reference has them."""
        # raises for a number that stands for no reduction
        super().in_words(options)
        names = LossNumbers.__annotations__
        loss = LossOptions.of_numbers(**{name: options[name] for name in names})
        others = {name: value for name, value in options.items() if name not in names}
        return others | {"options": loss}


def _fake(
    first: Tensor,
    tensors: Sequence[Tensor | None],
    reduction: str,
    needs: list[bool],
    dtype: torch.dtype,
) -> Results:
    shape = first.shape[-2:-1] if reduction == "none" else ()
    loss, parts = (
        first.new_empty(size, dtype=reference.compute_dtype(dtype)) for size in (shape, (3, *shape))
    )
    gradients = [
        x.new_empty(x.shape)
        for x, need in zip(tensors, needs, strict=True)
        if x is not None and need
    ]
    return loss, parts, gradients


def _fake_loss(
    logits: list[Tensor], labels: Tensor | None, *, options: LossOptions, needs: list[bool]
) -> Results:
    return _fake(logits[0], logits, options.reduction, needs, logits[0].dtype)


def _fake_loss_(
    logits: list[Tensor], labels: Tensor | None, *, options: LossOptions, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return _fake_loss(logits, labels, options=options, needs=needs)[:2]


def _load_triton() -> None:
    """Gives the operators their Triton functions."""
    from . import triton

    uegr_loss.triton = triton.uegr_loss
    uegr_loss_.triton = triton.uegr_loss_
    scale_gradients.triton = triton.scale_gradients
    scale_gradients_.triton = triton.scale_gradients_


# With labels the first pass of the logits is the clean one, which may be all; without, all are
# compared in pairs. Returned: the loss, its three parts, and the gradients by the logits where
# `needs` asks, in order.
uegr_loss = LossOperator(
    __package__,
    f"uegr_loss(Tensor[] logits, Tensor? labels, *, {OPTIONS}) -> (Tensor, Tensor, Tensor[])",
    reference.uegr_loss,
    load_triton=_load_triton,
    fake=_fake_loss,
    words={"reduction": REDUCTIONS},
    no_vmap=NO_VMAP,
)
uegr_loss_ = LossOperator(
    __package__,
    f"uegr_loss_(Tensor(a!)[] logits, Tensor? labels, *, {OPTIONS}) -> (Tensor, Tensor)",
    reference.uegr_loss_,
    load_triton=_load_triton,
    fake=_fake_loss_,
    words={"reduction": REDUCTIONS},
    no_vmap=NO_VMAP,
)
scale_gradients = Operator(
    __package__,
    "scale_gradients(Tensor[] gradients, Tensor grad_loss, Tensor parts) -> Tensor[]",
    reference.scale_gradients,
    load_triton=_load_triton,
    fake=lambda gradients, *_: [torch.empty_like(g) for g in gradients],
    words={},
    no_vmap=NO_VMAP,
)
scale_gradients_ = Operator(
    __package__,
    "scale_gradients_(Tensor(a!)[] gradients, Tensor grad_loss) -> ()",
    reference.scale_gradients_,
    load_triton=_load_triton,
    fake=writes_only,
    words={},
    no_vmap=NO_VMAP,
)


def kernel(operator: Operator[P, R], backend: str) -> Callable[P, R]:
    """Returns an operator's function of a chosen backend, past what register_autograd puts
    before it, which is Python and takes longer than a small loss.
    """
    if backend in ("reference", "triton"):
        return operator.kernel(backend)

    def run(*tensors: P.args, **options: P.kwargs) -> R:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.registered(*tensors, **options)

    return run


def _in_forward(needs: list[bool], reduction: str, row_weights: Tensor | None) -> list[bool]:
    return [need and (reduction != "none" or row_weights is not None) for need in needs]


def _linear_uegr_loss(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    *,
    js_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    regression: bool,
    needs: list[bool],
    chunk_rows: int | None,
    backend: str,
    dtype: torch.dtype,
) -> Results:
    """Runs the reference's chunks with the backend's rows, in the dtype that autocast decided
    above.
    """
    options = LossOptions.of_numbers(
        js_weight=js_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        regression=regression,
    )
    passes = sum(x.shape[0] if x.dim() == 3 else 1 for x in hidden)
    limit = CHUNK_BYTES.get(backend, NATIVE_CHUNK_BYTES)
    chunk_rows = chunk_rows or max(
        1, limit // (passes * weight.shape[0] * reference.compute_dtype(dtype).itemsize)
    )
    with torch.autocast(weight.device.type, enabled=False):
        return reference.linear_uegr_loss(
            kernel(uegr_loss_, backend),
            hidden,
            weight,
            bias,
            labels,
            row_weights,
            options=options,
            needs=_in_forward(needs, options.reduction, row_weights),
            dtype=dtype,
            chunk_rows=chunk_rows,
        )


def _fake_linear(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    *,
    reduction: int,
    needs: list[bool],
    dtype: torch.dtype,
    **_: object,
) -> Results:
    wanted = _in_forward(needs, REDUCTIONS[reduction], row_weights)
    return _fake(hidden[0], [*hidden, weight, bias], REDUCTIONS[reduction], wanted, dtype)


# Composed of the others, with gradients by hidden, weight and bias. row_weights: the gradient by
# the losses of the rows; without it, reduction "none" gives no gradients, as they are not known
# yet.
LINEAR = native.qualified("linear_uegr_loss")
torch.library.define(
    LINEAR,
    "(Tensor[] hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor? row_weights, *, "
    f"{OPTIONS}, ScalarType dtype, int? chunk_rows, str backend) -> (Tensor, Tensor, Tensor[])",
)
torch.library.impl(LINEAR, "CompositeExplicitAutograd", _linear_uegr_loss)
torch.library.register_fake(LINEAR, _fake_linear)
refuse_vmap("linear_uegr_loss", NO_VMAP)
linear_uegr_loss = getattr(torch.ops, native.NAMESPACE).linear_uegr_loss.default


def _is_one(grad_loss: Tensor) -> bool:
    """Returns whether the gradient is known to be 1, as in `loss.backward()`; one can look on the
    CPU only, and not while tracing.
    """
    visible = (
        type(grad_loss) is Tensor
        and not torch.compiler.is_compiling()
        and grad_loss.device.type == "cpu"
        and grad_loss.dim() == 0
    )
    return visible and grad_loss.item() == 1


def _is_last(grad_loss: Tensor) -> bool:
    """Returns whether no other backward can ask for the kept gradients, which may then be scaled
    where they lie and given away.
    """
    plain = type(grad_loss) is Tensor and not backends.traced() and not torch.is_grad_enabled()
    return plain and not torch._C._autograd._get_current_graph_task_keep_graph()


def _hand_out(
    grad_loss: Tensor | None,
    gradients: list[Tensor],
    needs: list[bool],
    parts: Tensor | None,
    backend: str,
) -> list[Tensor | None]:
    """Returns the kept gradients times that of the loss, where needed."""
    if grad_loss is None:
        return [None for _ in needs]
    # is_grads_batched
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_loss):
        gradients = reference.scale_gradients(gradients, grad_loss, grad_loss)
    elif not _is_last(grad_loss):
        gradients = scale_gradients.default(gradients, grad_loss, parts)
    elif not _is_one(grad_loss):
        scale_gradients_(backend, gradients, grad_loss)
    wanted = iter(gradients)
    return [next(wanted) if need else None for need in needs]


class LossKeywords(LossNumbers):
    """Types the keywords of the schema of a loss."""

    needs: list[bool]


class LinearKeywords(LossKeywords):
    """Types the keywords of the schema of `linear_uegr_loss`."""

    dtype: torch.dtype
    chunk_rows: int | None
    backend: str


class _LossContext(Context, Protocol):
    needs: list[bool]


class _LinearContext(Context, Protocol):
    options: LinearKeywords
    is_backward: bool
    by_row: bool


class _DirectContext(_LossContext, Protocol):
    in_place: bool
    spent: bool
    backend: str
    leaves: list[bool]


def _keep(ctx: Context, parts: Tensor, gradients: list[Tensor]) -> None:
    """Keeps the gradients, which have none themselves; a double backward finds its error
    through `parts`.
    """
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(parts, *gradients)


def _setup_loss(
    ctx: _LossContext, inputs: object, keyword_only_inputs: LossKeywords, output: Results
) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = keyword_only_inputs["needs"]
    _keep(ctx, output[1], output[2])


def _backward_loss(ctx: _LossContext, grad_loss: Tensor | None, *_: object) -> tuple[object, ...]:
    parts, *gradients = ctx.saved_tensors
    return _hand_out(grad_loss, gradients, ctx.needs, parts, "auto"), None


def _setup_linear(
    ctx: _LinearContext,
    inputs: tuple[list[Tensor], Tensor, Tensor | None, Tensor | None, Tensor | None],
    keyword_only_inputs: LinearKeywords,
    output: Results,
) -> None:
    hidden, weight, bias, labels, row_weights = inputs
    ctx.set_materialize_grads(False)
    ctx.options, ctx.is_backward = keyword_only_inputs, row_weights is not None
    ctx.by_row = REDUCTIONS[ctx.options["reduction"]] == "none"
    if ctx.by_row:
        ctx.save_for_backward(weight, bias, labels, *hidden)
    else:
        _keep(ctx, output[1], output[2])


def _backward_linear(
    ctx: _LinearContext, grad_loss: Tensor | None, *_: object
) -> tuple[object, ...]:
    if ctx.is_backward:
        _refuse_second_derivative()
    # what a row counts is known only now, so the chunks are visited again
    if ctx.by_row and grad_loss is not None:
        weight, bias, labels, *hidden = ctx.saved_tensors
        gradients = linear_uegr_loss(hidden, weight, bias, labels, grad_loss, **ctx.options)[2]
        wanted = iter(gradients)
        *of_hidden, of_weight, of_bias = (
            next(wanted) if need else None for need in ctx.options["needs"]
        )
    else:
        parts, *gradients = (None,) if ctx.by_row else ctx.saved_tensors
        *of_hidden, of_weight, of_bias = _hand_out(
            grad_loss, gradients, ctx.options["needs"], parts, ctx.options["backend"]
        )
    return of_hidden, of_weight, of_bias, None, None


def _refuse_second_derivative(*_: object) -> NoReturn:
    raise RuntimeError(
        "the losses of uegr_kernels have no second derivative; differentiate a loss "
        "of plain PyTorch twice"
    )


torch.library.register_autograd(
    native.qualified("uegr_loss"), _backward_loss, setup_context=_setup_loss
)
torch.library.register_autograd(LINEAR, _backward_linear, setup_context=_setup_linear)
torch.library.register_autograd(native.qualified("scale_gradients"), _refuse_second_derivative)


class _Loss(torch.autograd.Function):
    """Does what the registered autograd does, for kernels that are called directly: the
    reference, and gradients over the logits.
    """

    @staticmethod
    def forward(
        ctx: _DirectContext,
        labels: Tensor | None,
        backend: str,
        in_place: bool,
        needs: list[bool],
        options: LossOptions,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.in_place, ctx.spent, ctx.backend = needs, in_place, False, backend
        ctx.leaves = [x.is_leaf for x in logits] if in_place else []
        detached = [x.detach() for x in logits]
        if in_place:
            loss, parts = kernel(uegr_loss_, backend)(
                detached, labels, options=options, needs=needs
            )
            gradients = [x for x, need in zip(detached, needs, strict=True) if need]
            torch.autograd.graph.increment_version(gradients)
        else:
            loss, parts, gradients = kernel(uegr_loss, backend)(
                detached, labels, options=options, needs=needs
            )
        ctx.save_for_backward(parts, *gradients)
        return loss, parts

    @staticmethod
    def backward(ctx: _DirectContext, grad_loss: Tensor | None, _: object) -> tuple[object, ...]:
        if ctx.spent:
            raise RuntimeError(
                "inplace_backward=True hands its gradients out once; compute the "
                "loss again, or leave inplace_backward out"
            )
        parts, *gradients = ctx.saved_tensors
        ctx.spent = ctx.in_place and grad_loss is not None and not torch.is_grad_enabled()
        if ctx.spent and grad_loss is not None:
            if not _is_one(grad_loss):
                scale_gradients_(ctx.backend, gradients, grad_loss)
            # a leaf and its .grad must not share memory
            wanted = iter(gradients)
            given = [
                (next(wanted).clone() if leaf else next(wanted)) if need else None
                for need, leaf in zip(ctx.needs, ctx.leaves, strict=True)
            ]
        else:
            given = _hand_out(grad_loss, gradients, ctx.needs, parts, ctx.backend)
        return None, None, None, None, None, *given


class _TransformedLoss(torch.autograd.Function):
    """Computes the loss under torch.func.grad, vjp and jacrev. The gradients are outputs: a
    second derivative asks for theirs, and is refused.
    """

    @staticmethod
    def forward(
        run: Callable[..., Results], labels: Tensor | None, *logits: Tensor
    ) -> tuple[Tensor, ...]:
        loss, parts, gradients = run(list(logits), labels)
        return loss, parts, *gradients

    @staticmethod
    def setup_context(ctx: Context, inputs: object, output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(
        ctx: Context, grad_loss: Tensor | None, _: object, *of_gradients: Tensor | None
    ) -> tuple[object, ...]:
        if any(g is not None for g in of_gradients):
            _refuse_second_derivative()
        parts, *gradients = ctx.saved_tensors
        if grad_loss is None:
            return None, None, *[None for _ in gradients]
        return None, None, *reference.scale_gradients(gradients, grad_loss, parts)


def loss_and_parts(
    logits: list[Tensor],
    labels: Tensor | None,
    options: LossOptions,
    *,
    in_place: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the loss, differentiable, and its parts; logits and labels as `uegr_loss` above."""
    backend = uegr_loss.choose(backend, logits[0].device, logits[0].dtype)
    _check_range(labels, logits[0].shape[-1], options.ignore_index)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in logits]

    def run(options: LossOptions) -> tuple[Tensor, Tensor]:
        traced = backends.traced()
        if traced and backends.transformed():
            every = functools.partial(
                kernel(uegr_loss, backend), options=options, needs=[True] * len(logits)
            )
            loss, parts, *_ = _TransformedLoss.apply(  # type: ignore[no-untyped-call]
                every, labels, *logits
            )
        elif traced and backend != "reference":
            loss, parts, _ = uegr_loss.registered(logits, labels, options=options, needs=needs)
        elif not any(needs):
            loss, parts, _ = kernel(uegr_loss, backend)(
                logits, labels, options=options, needs=needs
            )
        else:
            given = (labels, backend, in_place and not traced, needs, options)
            loss, parts = _Loss.apply(*given, *logits)  # type: ignore[no-untyped-call]
        return loss, parts

    return _divided_last(run, options, logits[0], labels, logits[0].dtype)


def linear_loss_and_parts(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    options: LossOptions,
    *,
    dtype: torch.dtype,
    chunk_rows: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of the logits hidden @ weight.T + bias in `dtype`, which are never whole,
    and its parts.
    """
    # what takes chunks apart is one operator, which torch.func cannot look into: here the logits
    # exist whole
    if backends.transformed():
        with torch.autocast(weight.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            logits = [torch.nn.functional.linear(x.to(dtype), w, b) for x in hidden]
        return loss_and_parts(logits, labels, options, in_place=False, backend=backend)
    needs = [
        x is not None and torch.is_grad_enabled() and x.requires_grad
        for x in (*hidden, weight, bias)
    ]
    chosen = uegr_loss.choose(backend, weight.device, dtype)
    _check_range(labels, len(weight), options.ignore_index)

    def run(options: LossOptions) -> tuple[Tensor, Tensor]:
        loss, parts, _ = linear_uegr_loss(
            hidden,
            weight,
            bias,
            labels,
            None,
            needs=needs,
            dtype=dtype,
            chunk_rows=chunk_rows,
            backend=chosen,
            **options.numbers(),
        )
        return loss, parts

    return _divided_last(run, options, hidden[0], labels, dtype)


def _check_range(labels: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raises for class indices outside [0, classes), where they can be looked at: before a kernel
    writes, and by two numbers where none is ignored.
    """
    if (
        labels is None
        or labels.is_floating_point()
        or labels.device.type != "cpu"
        or type(labels) is not Tensor
        or backends.traced()
        or not labels.numel()
    ):
        return
    low, high = torch.aminmax(labels)
    if low.item() >= 0 and high.item() < classes:
        return
    checks.classes(labels, classes, ignore_index)


def _divided_last(
    run: Callable[[LossOptions], tuple[Tensor, Tensor]],
    options: LossOptions,
    rows: Tensor,
    labels: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Runs a loss, and for float16 divides its sum by N outside: a gradient divided inside would
    vanish before the loss scale lifts it.
    """
    if options.reduction != "mean" or dtype != torch.float16:
        return run(options)
    count = reference.kept_rows(labels, rows, options.ignore_index).sum()
    loss, parts = (
        torch.where(count > 0, total / count.clamp(min=1), torch.nan)
        for total in run(dataclasses.replace(options, reduction="sum"))
    )
    return loss, parts
