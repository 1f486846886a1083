"""Times FGM's perturbation and PGD's step beside plain PyTorch's functions, eager and compiled."""

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
        for make in (case, pgd)
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


def case(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str = "auto"
) -> Case:
    """Returns a case. backend: of ours."""
    elements = torch.Size(shape).numel()
    must_move = 2 * dtype.itemsize * elements

    def ours(grad: Tensor) -> Tensor:
        return uk.fgm_perturbation(grad, EPSILON, backend=backend)

    def given() -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def contestants() -> list[Contestant]:
        grad = given()
        found = [Contestant("uegr_kernels", lambda: ours(grad), must_move)]
        for peer, function in {"eager": plain, "eager, unguarded": shortest}.items():
            found.append(Contestant(peer, lambda function=function: function(grad), must_move))
        compiled = peers.compiled(plain)
        return [
            *found,
            Contestant("torch.compile", lambda: compiled(grad), must_move, may_fail=True),
        ]

    def verify() -> str | None:
        grad = given()
        expected = plain(grad.double())
        gap = float((ours(grad) - expected).abs().max() / expected.abs().max())
        return (
            (f"the perturbation by {gap:.1e} of its largest")
            if gap > (2**-8 if dtype == torch.bfloat16 else 1e-5)
            else None
        )

    chosen = backends.choose(backend, "perturbation.fgm_perturbation_", torch.device(device), dtype)
    facts = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "backend": chosen}
    named = f"FGM, {name}, {' x '.join(map(str, shape))}{', bfloat16' * (dtype == torch.bfloat16)}"
    return Case(named, facts, 20 * elements, verify, contestants, device=device)


def plain_pgd(delta: Tensor, grad: Tensor) -> Tensor:
    """Steps as one writes it by hand, in float32: along the unit gradient of each sample, and back
    into the ball.
    """
    moved = delta.float() + plain(grad.float())
    norm = torch.linalg.vector_norm(moved, dim=(1, 2), keepdim=True)
    return (moved * torch.where(norm > RADIUS, RADIUS / norm, 1)).to(delta.dtype)


def pgd(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """Returns a case of a step of PGD, per sample in the l2 norm."""
    elements = torch.Size(shape).numel()
    must_move = 3 * dtype.itemsize * elements

    def ours(delta: Tensor, grad: Tensor) -> Tensor:
        return uk.pgd_step(delta, grad, step_size=EPSILON, radius=RADIUS)

    def given() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]

    def contestants() -> list[Contestant]:
        tensors, compiled = given(), peers.compiled(plain_pgd)
        return [
            Contestant("uegr_kernels", lambda: ours(*tensors), must_move),
            Contestant("eager", lambda: plain_pgd(*tensors), must_move),
            Contestant("torch.compile", lambda: compiled(*tensors), must_move, may_fail=True),
        ]

    def verify() -> str | None:
        tensors = given()
        expected = plain_pgd(*(t.double() for t in tensors)).double()
        gap = float((ours(*tensors) - expected).abs().max() / expected.abs().max())
        return (
            (f"the step by {gap:.1e} of its largest")
            if gap > (2**-8 if dtype == torch.bfloat16 else 1e-5)
            else None
        )

    chosen = backends.choose("auto", "perturbation.pgd_step_", torch.device(device), dtype)
    facts = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "backend": chosen}
    named = f"PGD, {name}, {' x '.join(map(str, shape))}{', bfloat16' * (dtype == torch.bfloat16)}"
    return Case(named, facts, 20 * elements, verify, contestants, device=device)
