"""The dropout operators: schemas, fakes and autograd."""

from collections.abc import Callable
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core import backends, checks, native
from ..core.operator import Context, Operator
from . import reference

NO_VMAP = "AdaptiveDropout of uegr_kernels does not run under torch.func.vmap; give the whole batch"


def _load_triton() -> None:
    """Gives the operators their Triton functions."""
    from . import triton

    adaptive_dropout.triton = triton.adaptive_dropout
    adaptive_dropout_backward.triton = triton.adaptive_dropout_backward
    dropout_rates_.triton = triton.dropout_rates_


# key: a 0-d int64 tensor on the input's device, which only kernels read.
adaptive_dropout = Operator(
    __package__,
    "adaptive_dropout(Tensor h, Tensor rates, Tensor key, Tensor pending) -> Tensor",
    reference.adaptive_dropout,
    load_triton=_load_triton,
    fake=lambda h, *_: h.new_empty(h.shape),
    words={},
    no_vmap=NO_VMAP,
)
adaptive_dropout_backward = Operator(
    __package__,
    "adaptive_dropout_backward(Tensor grad, Tensor rates, Tensor key) -> (Tensor, Tensor)",
    reference.adaptive_dropout_backward,
    load_triton=_load_triton,
    fake=lambda g, rates, _: (g.new_empty(g.shape), torch.empty_like(rates)),
    words={},
    no_vmap=NO_VMAP,
)
# fold: the call is outside of a backward (docs/spec.md, 3).
dropout_rates_ = Operator(
    __package__,
    "dropout_rates_(Tensor(a!) gradient_norm, Tensor(b!) pending, *, float p, float max_p, "
    "float momentum, bool fold) -> Tensor",
    reference.dropout_rates_,
    load_triton=_load_triton,
    fake=lambda n, *_, **__: torch.empty_like(n),
    words={},
    no_vmap=NO_VMAP,
)


class _Context(Context, Protocol):
    backend: str
    pending: Tensor


def _setup(ctx: _Context, inputs: tuple[Tensor, ...], output: object) -> None:
    _, rates, key, pending = inputs
    ctx.save_for_backward(rates, key)
    # not saved: other calls and backwards write into it in between
    ctx.pending = pending


def _backward_by(
    kernel: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], ctx: _Context, grad: Tensor
) -> tuple[Tensor | None, ...]:
    gradient, squares = kernel(grad, *ctx.saved_tensors)
    with torch.no_grad():
        reference.add_squares_(ctx.pending, squares.detach())
    return gradient, None, None, None


def _backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_by(adaptive_dropout_backward.registered, ctx, grad)


def _refuse_double_backward(*_: object) -> NoReturn:
    raise RuntimeError(
        "AdaptiveDropout of uegr_kernels has no second derivative; use torch.nn.Dropout where a "
        "gradient is differentiated"
    )


torch.library.register_autograd(
    native.qualified("adaptive_dropout"), _backward, setup_context=_setup
)
torch.library.register_autograd(
    native.qualified("adaptive_dropout_backward"), _refuse_double_backward
)


class _Dropout(torch.autograd.Function):
    """Does what the registered autograd does, for kernels that are called directly."""

    @staticmethod
    def forward(
        ctx: _Context, backend: str, h: Tensor, rates: Tensor, key: Tensor, pending: Tensor
    ) -> Tensor:
        _setup(ctx, (h, rates, key, pending), None)
        ctx.backend = backend
        return adaptive_dropout.kernel(backend)(h, rates, key, pending)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, *_backward(ctx, grad)
        return None, *_backward_by(adaptive_dropout_backward.kernel(ctx.backend), ctx, grad)


def refuse_transforms(h: Tensor) -> None:
    """Raises RuntimeError in forward mode, which has no formula here, and under torch.func."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    checks.refuse_transforms("AdaptiveDropout", [h], "use torch.nn.Dropout, or eval mode")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "AdaptiveDropout of uegr_kernels does not run under torch.func (grad, vjp, hessian), "
            "whose gradients it cannot keep the norms of; use torch.autograd, torch.nn.Dropout, "
            "or eval mode"
        )


def dropped(
    h: Tensor,
    gradient_norm: Tensor,
    pending: Tensor,
    key: Tensor,
    *,
    p: float,
    max_p: float,
    momentum: float,
    fold: bool,
    backend: str,
) -> Tensor:
    """Returns h dropped at the rates that n gives, differentiable; updates n and `pending`.

    The arguments are the operators', the backend a chosen one.
    """
    rates = dropout_rates_(
        backend, gradient_norm, pending, p=p, max_p=max_p, momentum=momentum, fold=fold
    )
    if backend in ("reference", "triton") and not backends.traced():
        applied: Tensor = _Dropout.apply(  # type: ignore[no-untyped-call]
            backend, h, rates, key, pending
        )
        return applied
    return adaptive_dropout.registered(h, rates, key, pending)
