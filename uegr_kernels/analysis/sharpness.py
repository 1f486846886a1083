"""Computes the curvature of the loss from Hessian-vector products: the largest eigenvalue and the
trace.
"""

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core import checks
from .watching import held

Loss = Callable[[nn.Module], Tensor]


def largest_eigenvalue(
    model: nn.Module,
    loss: Loss,
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    which: str = "magnitude",
) -> float:
    """Computes the eigenvalue of largest magnitude, with its sign, of the loss's Hessian in the
    trainable parameters, in eval mode.

    loss        a function of the model that returns a 0-d tensor, twice differentiable: plain
                PyTorch, since the package's losses refuse a second backward
    iterations  Hessian-vector products at most; each keeps a vector of the model's size
    tolerance   largest residual ||Hv - value v||, in multiples of the value, at which it stops
    seed        of the random start
    which       "magnitude"; or "algebraic": the most positive eigenvalue

    By Lanczos' method with full reorthogonalisation (Ghorbani et al. 2019). Where values of both
    signs are as large, the positive one is returned. Warns (UserWarning) where the iterations ended
    above the tolerance, or before the two signs were told apart. Raises ValueError for a wrong
    option.
    """
    iterations, tolerance = (
        checks.integer("iterations", iterations, 1),
        checks.number("tolerance", tolerance, 0),
    )
    seed = checks.signed_seed(seed)
    checks.choice("which", which, ("magnitude", "algebraic"))
    with held(model), torch.enable_grad():
        return _lanczos(
            _hessian(model, loss), _trainable(model), iterations, tolerance, seed, which
        )


def hessian_trace(
    model: nn.Module, loss: Loss, *, samples: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Estimates the trace of the loss's Hessian by Hutchinson's method: the mean of v.Hv over
    `samples` random signs v.

    Returns the estimate and its standard error (NaN for one sample): the trace lies within two of
    them about 19 times in 20.
    model, loss, seed  as in `largest_eigenvalue`
    """
    samples = checks.integer("samples", samples, 1)
    generator = torch.Generator().manual_seed(checks.signed_seed(seed))
    with held(model), torch.enable_grad():
        product = _hessian(model, loss)
        found = []
        for _ in range(samples):
            v = [
                torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p)
                for p in _trainable(model)
            ]
            found.append(_dot(v, product(v)))
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), (values.std() / samples**0.5).item() if samples > 1 else float(
        "nan"
    )


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            "the model has no trainable parameter; set requires_grad where the "
            "curvature is asked for"
        )
    return params


def _hessian(model: nn.Module, loss: Loss) -> Callable[[list[Tensor]], list[Tensor]]:
    params = _trainable(model)
    gradients = torch.autograd.grad(loss(model), params, create_graph=True, allow_unused=True)
    kept = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(v: list[Tensor]) -> list[Tensor]:
        # a linear loss
        if not kept:
            return [torch.zeros_like(p) for p in params]
        found = torch.autograd.grad(
            [gradients[i] for i in kept],
            params,
            [v[i] for i in kept],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(p) if t is None else t for p, t in zip(params, found, strict=True)]

    return product


def _lanczos(
    product: Callable[[list[Tensor]], list[Tensor]],
    params: list[nn.Parameter],
    iterations: int,
    tolerance: float,
    seed: int,
    which: str,
) -> float:
    """Returns the wanted eigenvalue of a symmetric map, from the eigenvalues of its projection on
    the Krylov space of a random vector.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = functools.reduce(torch.promote_types, [p.dtype for p in params], torch.float32)
    device, sizes = params[0].device, [p.numel() for p in params]
    size, epsilon = sum(sizes), torch.finfo(dtype).eps
    q = torch.cat(
        [torch.randn(p.shape, generator=generator).flatten().to(device, dtype) for p in params]
    )
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    value = math.nan
    for _ in range(min(iterations, size)):
        q = q / torch.linalg.vector_norm(q)
        basis.append(q)
        parts = [part.view_as(p).to(p) for part, p in zip(q.split(sizes), params, strict=True)]
        w = torch.cat([part.flatten().to(device, dtype) for part in product(parts)])
        diagonal.append(torch.dot(q, w).item())
        # twice is enough
        for v in [*basis, *basis]:
            w = w - torch.dot(v, w) * v
        length = torch.linalg.vector_norm(w).item()
        if not math.isfinite(length + diagonal[-1]):
            warnings.warn("the Hessian is not finite: largest_eigenvalue is NaN", stacklevel=3)
            return math.nan
        projected = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            projected += torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
        values, vectors = torch.linalg.eigh(projected, UPLO="U")
        low, high = float(values[0]), float(values[-1])
        scale = max(abs(low), abs(high))
        rounding = 10 * size**0.5 * epsilon * scale
        # the space holds all that the start can reach
        whole = length <= rounding or len(basis) == size
        residuals = (vectors[-1].abs() * (0.0 if whole else length)).tolist()
        near = max(tolerance * scale, rounding)
        if which == "algebraic":
            value, settled = high, residuals[-1] <= max(tolerance * abs(high), rounding)
        else:
            value, rest = (high, residuals[-1]) if high >= -low - rounding else (low, residuals[0])
            apart = abs(high + low) > residuals[0] + residuals[-1]
            settled = rest <= near and (whole or apart)
        if settled or whole:
            return value
        beside.append(length)
        q = w
    if which == "magnitude" and not apart:
        value = high
    warnings.warn(
        f"largest_eigenvalue={value:.6g} has not converged in {len(basis)} iterations: eigenvalues "
        f"from {low:.6g} (residual {residuals[0]:.2g}) to {high:.6g} (residual "
        f"{residuals[-1]:.2g}), asked for {near:.2g} and, by magnitude, both signs told apart; "
        "give more iterations, or a larger tolerance",
        stacklevel=3,
    )
    return value


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))
