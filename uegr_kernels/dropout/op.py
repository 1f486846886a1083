"""The dropout operators: schemas, fakes, autograd, and the choice of a backend."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core import backends as backends
from ..core import checks as checks
from . import reference

_triton = functools.partial(backends.triton_kernels, __package__)

# key: a 0-d int64 tensor on the input's device, which only kernels read. fold: the call is outside
# of a backward (SPEC 3).
SCHEMAS = {
    "adaptive_dropout": "(Tensor h, Tensor rates, Tensor key, Tensor pending) -> Tensor",
    "adaptive_dropout_backward": "(Tensor grad, Tensor rates, Tensor key) -> (Tensor, Tensor)",
    "dropout_rates_": "(Tensor(a!) gradient_norm, Tensor(b!) pending, *, float p, float max_p, "
    "float momentum, bool fold) -> Tensor",
}


def _by_triton(name: str, *tensors: Tensor, **options: Any) -> Any:
    return getattr(_triton(), name)(*tensors, **options)


def kernel(name: str, backend: str) -> Callable[..., Any]:
    """An operator of a backend, by its arguments."""
    compiled = backend not in ("reference", "triton")
    module = (
        torch.ops.uegr_kernels if compiled else reference if backend == "reference" else _triton()
    )
    found: Callable[..., Any] = getattr(module, name).default if compiled else getattr(module, name)
    return found


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    _, rates, key, pending = inputs
    ctx.save_for_backward(rates, key)
    ctx.pending = pending  # not saved: other calls and backwards write into it in between


def _backward_by(kernel: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient, squares = kernel(grad, *ctx.saved_tensors)
    with torch.no_grad():
        reference.add_squares_(ctx.pending, squares.detach())
    return gradient, None, None, None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_by(torch.ops.uegr_kernels.adaptive_dropout_backward.default, ctx, grad)


def _refuse_double_backward(*_: Any) -> NoReturn:
    raise RuntimeError(
        "AdaptiveDropout of uegr_kernels has no second derivative; use "
        "torch.nn.Dropout where a gradient is differentiated"
    )


def _refuse_vmap(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "AdaptiveDropout of uegr_kernels does not run under torch.func.vmap; give the whole batch"
    )


for _name, _schema in SCHEMAS.items():
    backends.define(_name, _schema, getattr(reference, _name), functools.partial(_by_triton, _name))
    torch.library.register_vmap(f"uegr_kernels::{_name}", _refuse_vmap)

torch.library.register_fake("uegr_kernels::adaptive_dropout", lambda h, *_: h.new_empty(h.shape))
torch.library.register_fake(
    "uegr_kernels::adaptive_dropout_backward",
    lambda g, rates, _: (g.new_empty(g.shape), torch.empty_like(rates)),
)
torch.library.register_fake("uegr_kernels::dropout_rates_", lambda n, *_, **__: torch.empty_like(n))
torch.library.register_autograd("uegr_kernels::adaptive_dropout", _backward, setup_context=_setup)
torch.library.register_autograd("uegr_kernels::adaptive_dropout_backward", _refuse_double_backward)


class _Dropout(torch.autograd.Function):
    """What the registered autograd does, for kernels that are called directly."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, h: Tensor, rates: Tensor, key: Tensor, pending: Tensor
    ) -> Any:
        _setup(ctx, (h, rates, key, pending), None)
        ctx.backend = backend
        return kernel("adaptive_dropout", backend)(h, rates, key, pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, *_backward(ctx, grad)
        return None, *_backward_by(kernel("adaptive_dropout_backward", ctx.backend), ctx, grad)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves adaptive dropout (core.backends.choose)."""
    return backends.choose(backend, "dropout.adaptive_dropout", device, dtype)


def refuse_transforms(h: Tensor) -> None:
    """Raises RuntimeError in forward mode, which has no formula here, and under torch.func."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    checks.refuse_transforms("AdaptiveDropout", [h], "use torch.nn.Dropout, or eval mode")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "AdaptiveDropout of uegr_kernels does not run under torch.func (grad, vjp, hessian), "
            "whose "
            "gradients it cannot keep the norms of; use torch.autograd, torch.nn.Dropout, or eval "
            "mode"
        )


def adaptive_dropout(
    h: Tensor, gradient_norm: Tensor, pending: Tensor, key: Tensor, *, backend: str, **options: Any
) -> Tensor:
    """h dropped at the rates that n gives, differentiable; n and `pending` are updated.
    Arguments as in SCHEMAS, a chosen backend.
    """
    traced = backends.traced()
    if backend in ("reference", "triton") and not traced:
        rates = kernel("dropout_rates_", backend)(gradient_norm, pending, **options)
        if backend == "triton":
            torch.autograd.graph.increment_version([gradient_norm, pending])
        applied: Tensor = _Dropout.apply(backend, h, rates, key, pending)  # type: ignore[no-untyped-call]
        return applied
    rates = torch.ops.uegr_kernels.dropout_rates_.default(gradient_norm, pending, **options)
    if not traced:  # kernels registered outside PyTorch leave the versions alone
        torch.autograd.graph.increment_version([gradient_norm, pending])
    dropped: Tensor = torch.ops.uegr_kernels.adaptive_dropout.default(h, rates, key, pending)
    return dropped
