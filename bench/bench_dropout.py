"""Times adaptive dropout, forward and backward, beside torch's dropout."""

from collections.abc import Callable

import torch

import uegr_kernels as uk
from uegr_kernels.core import backends

from . import peers, shapes
from .harness import Case, Contestant
from .timer import Step

P = 0.3


def cases(quick: bool, device: str) -> list[Case]:
    batches = (
        {"small": (4, 16, 64)}
        if quick
        else {"BERT-base's inner activations": (*shapes.BERT_BATCH, 3072)}
    )
    return [
        case(name, shape, dtype, device)
        for name, shape in batches.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]


def case(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str = "auto"
) -> Case:
    """Returns a case. backend: of ours."""
    elements = torch.Size(shape).numel()
    # input, output and both gradients; no mask
    must_move = 4 * dtype.itemsize * elements

    def contestants() -> list[Contestant]:
        generator = torch.Generator().manual_seed(0)
        leaf = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        upstream = torch.randn(shape, generator=generator).to(device, dtype)

        def step(dropout: Callable) -> Step:
            def run() -> None:
                leaf.grad = None
                dropout(leaf).backward(upstream)

            return run

        compiled = peers.compiled(torch.nn.Dropout(P))
        return [
            Contestant(
                "uegr_kernels",
                step(uk.AdaptiveDropout(shape[-1], P, backend=backend).to(device)),
                must_move,
            ),
            Contestant("torch", step(torch.nn.Dropout(P)), must_move),
            Contestant("torch.compile", step(compiled), must_move, may_fail=True),
        ]

    def verify() -> str | None:
        """Checks that each element is either dropped or scaled, about the right share is, and the
        gradient goes through the same mask.
        """
        x = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
        y = uk.AdaptiveDropout(shape[-1], P, backend=backend).to(device)(x)
        y.backward(torch.ones_like(y))
        share = float((y == 0).float().mean())
        if not torch.equal(y, x.grad) or not torch.allclose(
            y[y != 0].float(), torch.tensor(1 / (1 - P), device=device), rtol=2**-8
        ):
            return "the gradient and the output have other masks or scales"
        return (
            (f"a share of {share:.3f} was dropped")
            if abs(share - P) > 5 * (P * (1 - P) / elements) ** 0.5
            else None
        )

    chosen = backends.choose(backend, "dropout.adaptive_dropout", torch.device(device), dtype)
    facts = {
        "shape": list(shape),
        "p": P,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": chosen,
    }
    named = f"{name}, {' x '.join(map(str, shape))}{', bfloat16' * (dtype == torch.bfloat16)}"
    return Case(named, facts, 24 * elements, verify, contestants, device=device)
