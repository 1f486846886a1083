"""Times the FGM perturbation beside plain PyTorch's functions, eager and compiled."""

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends

from . import peers, shapes
from .harness import Case, Contestant

EPSILON = 0.1


def cases(quick: bool, device: str) -> list[Case]:
    batches = (
        {"small": (4, 16, 64)}
        if quick
        else {"BERT-base's embeddings": (*shapes.BERT_BATCH, 768), "BERT-large's": (32, 512, 1024)}
    )
    return [
        case(name, shape, dtype, device)
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
