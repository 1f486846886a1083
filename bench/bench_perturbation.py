"""The FGM perturbation beside plain PyTorch's functions, eager and compiled."""

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends

from .harness import Case, Contestant

EPSILON = 0.1


def cases(quick: bool) -> list[Case]:
    return [case("FGM, small", (4, 16, 64))] if quick else [case("FGM, a batch of BERT-base's embeddings", (16, 128, 768))]


def plain(grad: Tensor) -> Tensor:
    """What one writes by hand: a norm per sample, safe for zero and for what is not finite."""
    norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
    return torch.where((norm > 0) & norm.isfinite(), EPSILON * grad / norm, 0)


def shortest(grad: Tensor) -> Tensor:
    """The same without the care."""
    return EPSILON * grad / torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)


def ours(grad: Tensor) -> Tensor:
    return uk.fgm_perturbation(grad, EPSILON)


def case(name: str, shape: tuple[int, ...]) -> Case:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    must_move = 8 * grad.numel()

    def contestants() -> list[Contestant]:
        peers = {"eager": plain, "eager, unguarded": shortest, "torch.compile": torch.compile(plain, fullgraph=True, dynamic=False)}
        everyone = {"uegr_kernels": ours} | peers
        return [Contestant(peer, lambda function=function: function(grad), must_move) for peer, function in everyone.items()]

    def verify() -> str | None:
        gap = float((ours(grad) - plain(grad.double())).abs().max())
        return f"the perturbation by {gap:.1e}" if gap > 1e-6 else None

    backend = backends.choose("auto", "perturbation.fgm_perturbation_", torch.device("cpu"), torch.float32)
    return Case(name, {"shape": list(shape), "dtype": "float32", "backend": backend}, 12 * grad.numel(), verify, contestants)
