"""Times FGM's perturbation and PGD's step beside plain PyTorch's functions, eager and compiled."""

from collections.abc import Callable

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends

from . import peers, shapes
from .harness import Case, Contestant

EPSILON = 0.1
# of PGD, whose step is EPSILON
RADIUS = 1.0


def cases(quick: bool, device: str) -> list[Case]:
    batches = (
        {"small": (4, 16, 64)}
        if quick
        else {"BERT-base's embeddings": (*shapes.BERT_BATCH, 768), "BERT-large's": (32, 512, 1024)}
    )
    return [
        make(name, shape, dtype, device)
        for make in (fgm, pgd)
        for name, shape in batches.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]


def plain(grad: Tensor) -> Tensor:
    """Does what one writes by hand: a norm per sample, safe for zero and for what is not finite."""
    norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
    return torch.where((norm > 0) & norm.isfinite(), EPSILON * grad / norm, 0)


def shortest(grad: Tensor) -> Tensor:
    """Perturbs without the care that `plain` takes."""
    return EPSILON * grad / torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)


def plain_pgd(delta: Tensor, grad: Tensor) -> Tensor:
    """Steps as one writes it by hand, in float32: along the unit gradient of each sample, and back
    into the ball.
    """
    moved = delta.float() + plain(grad.float())
    norm = torch.linalg.vector_norm(moved, dim=(1, 2), keepdim=True)
    return (moved * torch.where(norm > RADIUS, RADIUS / norm, 1)).to(delta.dtype)


def fgm(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str = "auto"
) -> Case:
    """Returns a case of FGM's perturbation, per sample in the l2 norm. backend: of ours."""

    def ours(grad: Tensor) -> Tensor:
        return uk.fgm_perturbation(grad, EPSILON, backend=backend)

    by_hand = {"eager": plain, "eager, unguarded": shortest}
    return _case(
        f"FGM, {name}", "fgm_perturbation_", ours, by_hand, 1, shape, dtype, device, backend
    )


def pgd(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str = "auto"
) -> Case:
    """Returns a case of a step of PGD, per sample in the l2 norm. backend: of ours."""

    def ours(delta: Tensor, grad: Tensor) -> Tensor:
        return uk.pgd_step(delta, grad, step_size=EPSILON, radius=RADIUS, backend=backend)

    by_hand = {"eager": plain_pgd}
    return _case(f"PGD, {name}", "pgd_step_", ours, by_hand, 2, shape, dtype, device, backend)


def _case(
    name: str,
    operator: str,
    ours: Callable[..., Tensor],
    by_hand: dict[str, Callable[..., Tensor]],
    inputs: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    backend: str,
) -> Case:
    """Returns a case of a function of so many tensors. by_hand: in plain PyTorch; its "eager" is
    compiled too, and in double what ours is compared with.
    """
    elements = torch.Size(shape).numel()
    must_move = (inputs + 1) * dtype.itemsize * elements

    def given() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(inputs)]

    def contestants() -> list[Contestant]:
        tensors, compiled = given(), peers.compiled(by_hand["eager"])
        found = [
            Contestant(peer, lambda function=function: function(*tensors), must_move)
            for peer, function in {"uegr_kernels": ours, **by_hand}.items()
        ]
        return [
            *found,
            Contestant("torch.compile", lambda: compiled(*tensors), must_move, may_fail=True),
        ]

    def verify() -> str | None:
        tensors = given()
        expected = by_hand["eager"](*(each.double() for each in tensors))
        gap = float((ours(*tensors) - expected).abs().max() / expected.abs().max())
        enough = gap <= (2**-8 if dtype == torch.bfloat16 else 1e-5)
        return None if enough else f"the result by {gap:.1e} of its largest"

    chosen = backends.choose(backend, f"perturbation.{operator}", torch.device(device), dtype)
    facts = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "backend": chosen}
    named = f"{name}, {' x '.join(map(str, shape))}{', bfloat16' * (dtype == torch.bfloat16)}"
    return Case(named, facts, 20 * elements, verify, contestants, device=device)
