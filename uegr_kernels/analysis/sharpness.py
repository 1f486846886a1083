"""Curvature of the loss from Hessian-vector products: the largest eigenvalue and the trace."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .watching import held

Loss = Callable[[nn.Module], Tensor]


def largest_eigenvalue(model: nn.Module, loss: Loss, *, iterations: int = 100, tolerance: float = 1e-4, seed: int = 0) -> float:
    """The largest (most positive) eigenvalue of the loss's Hessian in the trainable parameters, by power iteration, in eval mode.

    loss        a function of the model that returns a 0-d tensor, twice differentiable: plain PyTorch, since the package's losses refuse
                a second backward
    iterations  at most;  tolerance  relative change at which it stops

    Where the eigenvalue of largest size is negative, a second iteration runs on the Hessian shifted by it.
    """
    _check(iterations=iterations)
    with held(model), torch.enable_grad():
        product = _hessian(model, loss)
        found = _power(product, model, iterations, tolerance, seed, 0.0)
        return found if found >= 0 else _power(product, model, iterations, tolerance, seed, found) + found


def hessian_trace(model: nn.Module, loss: Loss, *, samples: int = 100, seed: int = 0) -> tuple[float, float]:
    """Hutchinson's estimate of the Hessian's trace, the mean of v.Hv over random signs v, and its standard error; arguments as above."""
    _check(samples=samples)
    generator = torch.Generator().manual_seed(seed)
    with held(model), torch.enable_grad():
        product = _hessian(model, loss)
        found = []
        for _ in range(samples):
            v = [torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p) for p in _trainable(model)]
            found.append(_dot(v, product(v)))
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), (values.std() / samples**0.5).item() if samples > 1 else float("nan")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _hessian(model: nn.Module, loss: Loss) -> Callable[[list[Tensor]], list[Tensor]]:
    params = _trainable(model)
    gradients = torch.autograd.grad(loss(model), params, create_graph=True, allow_unused=True)
    kept = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(v: list[Tensor]) -> list[Tensor]:
        if not kept:  # a linear loss
            return [torch.zeros_like(p) for p in params]
        found = torch.autograd.grad([gradients[i] for i in kept], params, [v[i] for i in kept], retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if t is None else t for p, t in zip(params, found, strict=True)]

    return product


def _power(
    product: Callable[[list[Tensor]], list[Tensor]], model: nn.Module, iterations: int, tolerance: float, seed: int, shift: float
) -> float:
    """The eigenvalue of largest size of H - shift."""
    generator = torch.Generator().manual_seed(seed)
    v = _unit([torch.randn(p.shape, generator=generator).to(p) for p in _trainable(model)])
    value = 0.0
    for _ in range(iterations):
        w = [h - shift * x for h, x in zip(product(v), v, strict=True)]
        before, value = value, _dot(v, w)
        if _dot(w, w) == 0:
            return 0.0
        v = _unit(w)
        if abs(value - before) <= tolerance * abs(value):
            break
    return value


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def _unit(v: list[Tensor]) -> list[Tensor]:
    length = _dot(v, v) ** 0.5
    return [x / length for x in v]


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
