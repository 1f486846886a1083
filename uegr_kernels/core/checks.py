"""Arguments looked at before anything is done with them: one rule and one sentence for each kind."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(name: str, tensors: list[Tensor], advice: str) -> None:
    """Raises RuntimeError where a tensor has a forward-mode tangent or is under torch.func.vmap, of which a kernel would see nothing.

    Outside of forward mode and torch.func, which is nearly always, this is two looks at flags.
    """
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        _Transformed.apply(name, advice, *tensors)  # type: ignore[no-untyped-call]


def refuse_derivatives(name: str, tensors: list[Tensor], advice: str) -> None:
    """Raises RuntimeError as `refuse_transforms`, and where torch.func.grad, vjp or jacrev asks for the derivative of a constant."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        _Transformed.apply(name, advice, *tensors)  # type: ignore[no-untyped-call]
        if torch._C._are_functorch_transforms_active() and any(map(_tracked, tensors)):
            raise RuntimeError(f"{name} of uegr_kernels has no derivative: {advice}")


def _tracked(tensor: Tensor) -> bool:
    """Whether some level of torch.func differentiates by the tensor."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if tensor.requires_grad:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


class _Transformed(torch.autograd.Function):
    """Computes nothing: PyTorch calls `jvp` where an argument has a tangent and `vmap` where one is batched, at every level of torch.func."""

    @staticmethod
    def forward(name: str, advice: str, *tensors: Tensor) -> Tensor:
        return torch.empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, ctx.advice = inputs[:2]
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"{ctx.name} of uegr_kernels has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors): {ctx.advice}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, advice: str, *_: Any) -> NoReturn:
        raise RuntimeError(f"{name} of uegr_kernels does not run under torch.func.vmap; give the whole batch")
