"""The UEGR loss, forward and backward, beside plain PyTorch's functions, eager and compiled."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends

from .harness import Case, Contestant

SHAPES = {
    "two passes, 32,000 classes": (2, 512, 32000),
    "four passes, 32,000 classes": (4, 128, 32000),
    "two passes, 2 classes": (2, 16, 2),
}
QUICK = {"two passes, 1,000 classes": (2, 16, 1000), "two passes, 2 classes": (2, 16, 2)}
JS_WEIGHT = 0.01


def cases(quick: bool) -> list[Case]:
    shapes = (QUICK if quick else SHAPES).items()
    return [case(name, *shape, in_place) for name, shape in shapes for in_place in (False, True) if shape[-1] > 2 or not in_place]


def plain(clean: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """What one writes with torch.nn.functional."""
    log_p = adversarial.log_softmax(-1)
    loss = F.cross_entropy(clean, labels) + sum(F.nll_loss(log_q, labels) for log_q in log_p) / len(log_p)
    for a, b in itertools.combinations(log_p, 2):
        middle = ((a.exp() + b.exp()) / 2).log()
        pair = F.kl_div(middle, a, reduction="batchmean", log_target=True) + F.kl_div(middle, b, reduction="batchmean", log_target=True)
        loss = loss + JS_WEIGHT * pair / 2
    return loss


def ours(clean: Tensor, adversarial: Tensor, labels: Tensor, **options) -> Tensor:
    return uk.uegr_loss(clean, adversarial, labels, js_weight=JS_WEIGHT, **options)


class _Handed(torch.autograd.Function):
    """Logits in given memory, as a linear layer would hand them on: without a copy, and free to be written over."""

    @staticmethod
    def forward(ctx, handle, memory):
        return memory.detach()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(()), None


def inputs(m: int, n: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = torch.randn(n, c, generator=generator), torch.randn(m, n, c, generator=generator)
    return clean, adversarial, torch.randint(c, (n,), generator=generator)


def case(name: str, m: int, n: int, c: int, in_place: bool) -> Case:
    must_move = 2 * (m + 1) * n * c * 4

    def contestants() -> list[Contestant]:
        clean, adversarial, labels = inputs(m, n, c)
        handle = torch.zeros((), requires_grad=True)

        def step(loss: Callable) -> Callable[[], object]:
            leaves = clean.clone().requires_grad_(), adversarial.clone().requires_grad_()

            def run() -> None:
                for leaf in leaves:
                    leaf.grad = None
                loss(*leaves, labels).backward()

            return run

        def over_the_logits() -> None:
            ours(_Handed.apply(handle, clean), _Handed.apply(handle, adversarial), labels, inplace_backward=True).backward()

        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        first = Contestant("uegr_kernels", over_the_logits if in_place else step(ours), must_move)
        return [first, Contestant("torch.compile", step(compiled), must_move), Contestant("eager", step(plain), must_move, rounds=9)]

    facts = {"m": m, "N": n, "C": c, "inplace_backward": in_place, "dtype": "float32"}
    facts["backend"] = backends.choose("auto", "divergence.uegr_loss", torch.device("cpu"), torch.float32)
    return Case(name + ", in place" * in_place, facts, 24 * (m + 1) * n * c, lambda: disagreement(m, min(n, 8), c), contestants)


def disagreement(m: int, n: int, c: int) -> str | None:
    """What differs between ours and the plain functions on a few rows in float64."""
    clean, adversarial, labels = inputs(m, n, c)
    results = []
    for loss, dtype in ((ours, torch.float32), (plain, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (clean, adversarial)]
        value = loss(*leaves, labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for name, mine, other in zip(("the loss", "the clean gradient", "the adversarial gradient"), *results, strict=True):
        gap = float((mine.double() - other).abs().max() / other.abs().max())
        if gap > 1e-5:
            return f"{name} by {gap:.1e} of its largest"
    return None
