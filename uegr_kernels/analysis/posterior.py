"""Computes the covariance of SGD near a minimum, in closed form (docs/methods.md, section 4): what
its noise leaves of a posterior.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import checks
from .pictures import pictures


def sgd_covariance(
    hessian: Tensor,
    noise: Tensor,
    lr: float,
    *,
    momentum: float = 0,
    steps: int | None = None,
    initial: Tensor | None = None,
    keep_probability: float = 1.0,
) -> Tensor:
    """Computes the covariance S [D, D] of theta under theta' = theta - lr*(H theta + xi), float64,
    xi iid with mean 0 and covariance C.

    hessian, noise    H, symmetric, and C [D, D]
    momentum          mu of v' = mu*v + (H theta + xi), theta' = theta - lr*v', as torch.optim.SGD
        without dampening
    steps             S after so many steps from `initial` (None: 0; velocity 0); None: the
        stationary S
    keep_probability  p of selective SGD with rescaling: the noise of S' = A S A + lr^2 [C + (1/p -
        1) diag(C + H S H)]

    Raises ValueError for wrong shapes or options, and for a stationary S that does not exist:
    without momentum it needs 0 < lr*h < 2 for every eigenvalue h, with it 0 < lr*h < 2*(1 + mu).
    """
    h, c = hessian.double(), noise.double()
    d = len(h)
    for name, matrix in (
        ("hessian", h),
        ("noise", c),
        *((("initial", initial),) if initial is not None else ()),
    ):
        if matrix.shape != (d, d):
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}; give [{d}, {d}]")
    if not torch.allclose(h, h.T):
        raise ValueError("hessian is not symmetric; give (H + H.T) / 2")
    lr, momentum = checks.number("lr", lr), checks.number("momentum", momentum, 0, 1)
    keep_probability = checks.number("keep_probability", keep_probability, 0, 1)
    steps = None if steps is None else checks.integer("steps", steps, 0)
    if momentum == 1 or keep_probability == 0:
        raise ValueError(
            f"momentum={momentum}, keep_probability={keep_probability}: give one in "
            "[0, 1) and one in (0, 1]"
        )
    start = torch.zeros_like(h) if initial is None else initial.double()
    values, basis = torch.linalg.eigh(h)
    if keep_probability == 1:
        found = _by_pairs(values, basis.T @ c @ basis, basis.T @ start @ basis, lr, momentum, steps)
        turned: Tensor = basis @ found @ basis.T
        return turned
    if momentum:
        raise ValueError(
            f"momentum={momentum} with keep_probability={keep_probability}: no closed form is "
            "stated; set one of them to its neutral value"
        )
    return _selective(h, c, start, lr, steps, 1 / keep_probability - 1)


def sgd_diagnostic(hessian: Tensor, covariance: Tensor) -> dict[str, float]:
    """Tells what a covariance S says beside a Hessian H: "trace", tr S; "excess_loss", tr(HS)/2,
    the expected loss above the minimum's.

    hessian, covariance  [d, d]

    Raises RuntimeError for shapes that have no product.
    """
    h, s = hessian.double(), covariance.double()
    return {"trace": s.trace().item(), "excess_loss": (h @ s).trace().item() / 2}


def plot_sgd_covariance(
    closed: Mapping[str, Mapping[int, float]],
    simulated: Mapping[str, Mapping[int, float]],
    path: str | pathlib.Path,
) -> pathlib.Path:
    """Draws a figure of S, such as its trace, over steps: closed forms as lines, simulations as
    dots; writes `path` and returns it.

    closed, simulated  name -> {step: value}, a panel for each name of closed
    """
    with pictures(path, len(closed)) as panels:
        for axes, (name, line) in zip(panels, closed.items(), strict=True):
            axes.plot(list(line), list(line.values()), marker="", label="closed form")
            dots = simulated.get(name, {})
            axes.plot(
                list(dots),
                list(dots.values()),
                linestyle="",
                marker="o",
                markersize=4,
                label="simulation",
            )
            axes.set(xlabel="step", ylabel="total variance (tr S)", title=name, ylim=(0, None))
        if panels:
            panels[0].legend()
    return pathlib.Path(path)


def plot_sgd_diagnostic(
    series: Mapping[str, Sequence[Mapping[str, float]]], path: str | pathlib.Path
) -> pathlib.Path:
    """Draws every figure of a run by epoch, a panel each and a line for each run; writes `path` and
    returns it.

    series  name of the run -> its epochs, each {figure: value}, such as `sgd_diagnostic` with what
        else was measured
    """
    figures = list(
        dict.fromkeys(figure for epochs in series.values() for epoch in epochs for figure in epoch)
    )
    with pictures(path, len(figures)) as panels:
        for axes, figure in zip(panels, figures, strict=True):
            for name, epochs in series.items():
                axes.plot(
                    range(1, len(epochs) + 1),
                    [epoch.get(figure, math.nan) for epoch in epochs],
                    label=name,
                )
            axes.set(xlabel="epoch", title=figure)
        if panels:
            panels[0].legend()
    return pathlib.Path(path)


def _by_pairs(
    h: Tensor, c: Tensor, start: Tensor, lr: float, mu: float, steps: int | None
) -> Tensor:
    """Solves by pairs: in H's eigenbasis every pair of directions is a system of its own: P' = M_i
    P M_j^T + Q_ij, of theta and v.
    """
    d = len(h)
    m = torch.stack(
        [
            torch.stack([1 - lr * h, torch.full_like(h, -lr * mu)], -1),
            torch.stack([h, torch.full_like(h, mu)], -1),
        ],
        -2,
    )
    q = torch.tensor([[lr * lr, -lr], [-lr, 1.0]], dtype=torch.float64).flatten() * c[..., None]
    p0 = torch.zeros(d, d, 4, dtype=torch.float64)
    p0[..., 0] = start
    kron = torch.einsum("iab,jcd->ijacbd", m, m).reshape(d, d, 4, 4)
    if steps is None:
        if not mu:
            kron, q = kron[..., :1, :1], q[..., :1]
        if torch.linalg.eigvals(m if mu else m[:, :1, :1]).abs().max() >= 1:
            raise ValueError(
                f"lr={lr}, momentum={mu}: h from {h.min():.3g} to {h.max():.3g} leaves nothing "
                f"stationary; need 0 < lr*h < {2 * (1 + mu):g}"
            )
        stationary: Tensor = torch.linalg.solve(
            torch.eye(kron.shape[-1], dtype=torch.float64) - kron, q[..., None]
        )[..., 0, 0]
        return stationary
    block: Tensor = _affine(kron, q, p0, steps)[..., 0]
    return block


def _selective(
    h: Tensor, c: Tensor, start: Tensor, lr: float, steps: int | None, extra: float
) -> Tensor:
    """Returns S' as a linear map of S's D^2 numbers, diagonal noise included."""
    d = len(h)
    a = torch.eye(d, dtype=torch.float64) - lr * h
    diagonal = torch.eye(d, dtype=torch.float64).flatten()
    kron = torch.kron(a, a) + lr * lr * extra * diagonal[:, None] * torch.kron(h, h)
    q = (lr * lr * (c + extra * torch.diag(c.diagonal()))).flatten()
    if steps is not None:
        return _affine(kron, q, start.flatten(), steps).view(d, d)
    if torch.linalg.eigvals(kron).abs().max() >= 1:
        raise ValueError(
            f"lr={lr}, keep_probability={1 / (1 + extra):g}: no stationary "
            "covariance; need (lr/p)*h below 2 and h above 0"
        )
    stationary: Tensor = torch.linalg.solve(torch.eye(d * d, dtype=torch.float64) - kron, q).view(
        d, d
    )
    return stationary


def _affine(k: Tensor, q: Tensor, x: Tensor, steps: int) -> Tensor:
    """Returns x after `steps` of x' = K x + q, by doubling: also where K has an eigenvalue 1."""
    while steps:
        if steps % 2:
            x = (k @ x[..., None])[..., 0] + q
        q = (k @ q[..., None])[..., 0] + q
        k = k @ k
        steps //= 2
    return x
