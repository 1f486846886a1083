"""Adaptive dropout, forward and backward, beside torch's dropout."""

from collections.abc import Callable

import torch

import uegr_kernels as uk
from uegr_kernels.core import backends

from .harness import Case, Contestant

P = 0.3


def cases(quick: bool) -> list[Case]:
    return [case("small", (4, 16, 64))] if quick else [case("BERT-base's inner activations", (16, 128, 3072))]


def case(name: str, shape: tuple[int, ...]) -> Case:
    generator = torch.Generator().manual_seed(0)
    elements = torch.Size(shape).numel()
    must_move = 16 * elements  # input, output and both gradients; no mask

    def contestants() -> list[Contestant]:
        leaf = torch.randn(shape, generator=generator).requires_grad_()
        upstream = torch.randn(shape, generator=generator)

        def step(dropout: Callable) -> Callable[[], object]:
            def run() -> None:
                leaf.grad = None
                dropout(leaf).backward(upstream)

            return run

        plain = torch.nn.Dropout(P)
        everyone = {"uegr_kernels": uk.AdaptiveDropout(shape[-1], P), "torch": plain}
        everyone["torch.compile"] = torch.compile(torch.nn.Dropout(P), fullgraph=True, dynamic=False)
        return [Contestant(peer, step(dropout), must_move) for peer, dropout in everyone.items()]

    def verify() -> str | None:
        """Each element is either dropped or scaled, about the right share is, and the gradient goes through the same mask."""
        x = torch.ones(shape, requires_grad=True)
        y = uk.AdaptiveDropout(shape[-1], P)(x)
        y.backward(torch.ones_like(y))
        share = float((y == 0).float().mean())
        if not torch.equal(y, x.grad) or not torch.allclose(y[y != 0], torch.tensor(1 / (1 - P))):
            return "the gradient and the output have other masks or scales"
        return f"a share of {share:.3f} was dropped" if abs(share - P) > 5 * (P * (1 - P) / elements) ** 0.5 else None

    backend = backends.choose("auto", "dropout.adaptive_dropout", torch.device("cpu"), torch.float32)
    return Case(name, {"shape": list(shape), "p": P, "dtype": "float32", "backend": backend}, 24 * elements, verify, contestants)
