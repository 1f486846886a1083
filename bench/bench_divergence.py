"""Times the UEGR loss and the pairwise divergence, forward and backward, from logits and from
hidden states.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.core import backends

from . import peers, shapes
from .harness import Case, Contestant
from .timer import Step

JS_WEIGHT = 0.01
BRAIN = torch.bfloat16


def cases(quick: bool, device: str) -> list[Case]:
    if quick:
        small = 1000, 16
        found = [
            logits_case(2, *small, device),
            logits_case(2, 2, 16, device),
            logits_case(2, *small, device, BRAIN),
        ]
        return [
            *found,
            divergence_case(*small, device),
            linear_case(2, *small, 32, device),
            linear_divergence_case(*small, 32, device),
        ]
    found = [logits_case(m, c, n, device) for c, n in shapes.ROWS.items() for m in shapes.PASSES]
    found += [
        logits_case(2, c, shapes.ROWS[c], device, dtype)
        for c in (32_000, 128_256)
        for dtype in (BRAIN,)
    ]
    found += [logits_case(2, 32_000, 512, device, in_place=in_place) for in_place in (False, True)]
    found += [
        divergence_case(32_000, shapes.ROWS[32_000], device, dtype)
        for dtype in (torch.float32, BRAIN)
    ]
    sizes = 32_000, shapes.ROWS[32_000], shapes.HIDDEN
    return [*found, linear_case(2, *sizes, device), linear_divergence_case(*sizes, device)]


def pairs(log_p: Tensor) -> Tensor:
    """Returns the mean over rows of the sum over pairs, with torch's functions."""
    total = log_p.new_zeros(())
    for a, b in itertools.combinations(log_p, 2):
        middle = ((a.exp() + b.exp()) / 2).log()
        pair = F.kl_div(middle, a, reduction="batchmean", log_target=True) + F.kl_div(
            middle, b, reduction="batchmean", log_target=True
        )
        total = total + pair / 2
    return total


def widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype == BRAIN else logits


def plain(clean: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """Does what one writes with torch.nn.functional."""
    log_p = widened(adversarial).log_softmax(-1)
    loss = F.cross_entropy(widened(clean), labels) + sum(
        F.nll_loss(log_q, labels) for log_q in log_p
    ) / len(log_p)
    return loss + JS_WEIGHT * pairs(log_p)


def plain_divergence(logits: Tensor) -> Tensor:
    return pairs(widened(logits).log_softmax(-1))


def plain_linear(clean: Tensor, adversarial: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return plain(clean @ weight.mT, adversarial @ weight.mT, labels)


def plain_linear_divergence(hidden: Tensor, weight: Tensor) -> Tensor:
    return plain_divergence(hidden @ weight.mT)


def products(*inputs: Tensor) -> Contestant:
    """Multiplies alone: logits of all hidden states, and from logits the gradients of both."""
    *hidden, weight = inputs
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in hidden])

    def step() -> None:
        logits = rows @ weight.mT
        logits @ weight, logits.mT @ rows

    return Contestant("the matrix products alone", step)


def ours(clean: Tensor, adversarial: Tensor, labels: Tensor, **options) -> Tensor:
    return uk.uegr_loss(clean, adversarial, labels, js_weight=JS_WEIGHT, **options)


def ours_linear(clean: Tensor, adversarial: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return uk.linear_uegr_loss(clean, adversarial, weight, labels, js_weight=JS_WEIGHT)


class _Handed(torch.autograd.Function):
    """Hands logits in given memory on as a linear layer would: without a copy, and free to be
    written over.
    """

    @staticmethod
    def forward(ctx, handle, memory):
        return memory.detach()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros((), device=gradient.device), None


def step_of(loss: Callable[..., Tensor], leaves: list[Tensor], *others: Tensor) -> Step:
    """Returns forward and backward, into fresh gradients of the leaves."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves, *others).backward()

    return run


def parts_of(loss: Callable[..., Tensor], leaves: list[Tensor], *others: Tensor) -> dict[str, Step]:
    """Returns the forward with what it keeps for a backward, and the backward alone, into fresh
    gradients.
    """
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [loss(*leaves, *others)]

    def backward() -> None:
        torch.autograd.grad(kept[0], leaves, retain_graph=True)

    return {"forward": forward, "backward": backward}


def numbers(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator(device).manual_seed(seed), device=device
    ).to(dtype)


def label(n: int, c: int, device: str) -> Tensor:
    return torch.randint(c, (n,), generator=torch.Generator().manual_seed(2)).to(device)


def inputs(m: int, n: int, c: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [numbers((n, c), device, dtype, 0), numbers((m, n, c), device, dtype, 1)]


def logits_case(
    m: int,
    c: int,
    n: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    backend: str = "auto",
) -> Case:
    """Returns a case from logits; on a GPU, forward and backward are timed apart too. backend: of
    ours.
    """
    must_move = 2 * (m + 1) * n * c * dtype.itemsize
    mine = functools.partial(ours, backend=backend)

    def contestants() -> list[Contestant]:
        leaves, labels = inputs(m, n, c, device, dtype), label(n, c, device)
        handle = torch.zeros((), device=device, requires_grad=True)

        def over_the_logits() -> None:
            handed = [_Handed.apply(handle, leaf) for leaf in leaves]
            mine(*handed, labels, inplace_backward=True).backward()

        def copies() -> list[Tensor]:
            return [leaf.clone().requires_grad_() for leaf in leaves]

        def apart(loss: Callable[..., Tensor]) -> dict[str, Step]:
            return parts_of(loss, copies(), labels) if device == "cuda" and not in_place else {}

        first = Contestant(
            "uegr_kernels",
            over_the_logits if in_place else step_of(mine, copies(), labels),
            must_move,
            parts=apart(mine),
        )
        eager = Contestant(
            "eager", step_of(plain, copies(), labels), must_move, rounds=3, parts=apart(plain)
        )
        if m > 2 and c != 32_000:
            fast = Contestant(
                "torch.compile",
                None,
                missing="compiled for m = 2 and for 32,000 classes: each shape takes long",
            )
        else:
            fast = Contestant(
                "torch.compile",
                step_of(peers.compiled(plain), copies(), labels),
                must_move,
                may_fail=True,
            )
        return [first, fast, eager]

    def verify() -> str | None:
        rows = min(n, 8)
        return disagreement(mine, plain, inputs(m, rows, c, device, dtype), label(rows, c, device))

    ending = ", bfloat16" * (dtype == BRAIN) + ", in place" * in_place
    sizes = {"m": m, "N": n, "C": c, "inplace_backward": in_place}
    name = f"UEGR loss, m = {m}, N = {n}, C = {c:,}{ending}"
    return _case(
        name,
        sizes,
        7 * (m + 1) * n * c * max(4, dtype.itemsize),
        verify,
        contestants,
        device,
        dtype,
        backend,
    )


def divergence_case(c: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> Case:
    must_move = 4 * n * c * dtype.itemsize

    def contestants() -> list[Contestant]:
        def step(loss: Callable[[Tensor], Tensor]) -> Step:
            return step_of(loss, [numbers((2, n, c), device, dtype, 1).requires_grad_()])

        return [
            Contestant("uegr_kernels", step(uk.pairwise_js), must_move),
            Contestant(
                "torch.compile", step(peers.compiled(plain_divergence)), must_move, may_fail=True
            ),
            Contestant("eager", step(plain_divergence), must_move, rounds=3),
            peers.library(
                "Liger JSD, one side",
                "liger_kernel",
                lambda: step(peers.liger_jsd()),
                bytes=must_move,
            ),
        ]

    def verify() -> str | None:
        return disagreement(
            uk.pairwise_js, plain_divergence, [numbers((2, min(n, 8), c), device, dtype, 1)]
        )

    name = f"pairwise JS, m = 2, N = {n}, C = {c:,}{', bfloat16' * (dtype == BRAIN)}"
    return _case(name, {"m": 2, "N": n, "C": c}, 60 * n * c, verify, contestants, device, dtype)


def hidden_inputs(m: int, n: int, c: int, h: int, device: str) -> list[Tensor]:
    clean, adversarial = inputs(m, n, h, device, torch.float32)
    return [clean, adversarial, numbers((c, h), device, torch.float32, 3) * h**-0.5]


def linear_case(m: int, c: int, n: int, h: int, device: str) -> Case:
    # weight and hidden states read, their gradients written
    must_move = 8 * (c * h + (m + 1) * n * h)

    def contestants() -> list[Contestant]:
        def step(loss: Callable[..., Tensor]) -> Step:
            return step_of(
                loss,
                [leaf.requires_grad_() for leaf in hidden_inputs(m, n, c, h, device)],
                label(n, c, device),
            )

        return [
            Contestant("uegr_kernels", step(ours_linear), must_move),
            Contestant(
                "torch.compile", step(peers.compiled(plain_linear)), must_move, may_fail=True
            ),
            Contestant("eager", step(plain_linear), must_move, rounds=3),
            products(*hidden_inputs(m, n, c, h, device)),
        ]

    def verify() -> str | None:
        rows = min(n, 8)
        return disagreement(
            ours_linear, plain_linear, hidden_inputs(m, rows, c, h, device), label(rows, c, device)
        )

    sizes = {"m": m, "N": n, "C": c, "H": h}
    memory = 12 * c * h + 28 * (m + 1) * n * c
    return _case(
        f"linear UEGR loss, m = {m}, N = {n}, H = {h}, C = {c:,}",
        sizes,
        memory,
        verify,
        contestants,
        device,
    )


def linear_divergence_case(c: int, n: int, h: int, device: str) -> Case:
    must_move = 8 * (c * h + 2 * n * h)

    def contestants() -> list[Contestant]:
        def step(loss: Callable[..., Tensor]) -> Step:
            return step_of(
                loss, [leaf.requires_grad_() for leaf in hidden_inputs(2, n, c, h, device)[1:]]
            )

        def liger() -> Step:
            return step(peers.liger_linear_jsd())

        return [
            Contestant("uegr_kernels", step(uk.linear_pairwise_js), must_move),
            Contestant(
                "torch.compile",
                step(peers.compiled(plain_linear_divergence)),
                must_move,
                may_fail=True,
            ),
            Contestant("eager", step(plain_linear_divergence), must_move, rounds=3),
            peers.library(
                "Liger fused linear JSD, one side", "liger_kernel", liger, bytes=must_move
            ),
            products(*hidden_inputs(2, n, c, h, device)[1:]),
        ]

    def verify() -> str | None:
        return disagreement(
            uk.linear_pairwise_js,
            plain_linear_divergence,
            hidden_inputs(2, min(n, 8), c, h, device)[1:],
        )

    sizes = {"m": 2, "N": n, "C": c, "H": h}
    memory = 12 * c * h + 60 * n * c
    return _case(
        f"linear JS, m = 2, N = {n}, H = {h}, C = {c:,}", sizes, memory, verify, contestants, device
    )


def _case(
    name: str,
    sizes: dict,
    memory: int,
    verify,
    contestants,
    device: str,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Case:
    facts = {**sizes, "dtype": str(dtype).removeprefix("torch.")}
    facts["backend"] = backends.choose(backend, "divergence.uegr_loss", torch.device(device), dtype)
    return Case(name, facts, memory, verify, contestants, device=device)


def disagreement(
    mine: Callable[..., Tensor], other: Callable[..., Tensor], given: list[Tensor], *labels: Tensor
) -> str | None:
    """Tells what differs between ours and the plain functions in float64 on a few rows: the value,
    and the gradients.
    """
    results = []
    for loss, dtype in ((mine, given[0].dtype), (other, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        value = loss(*leaves, *labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    tolerance = 1e-2 if given[0].dtype == BRAIN else 1e-5
    for i, (found, expected) in enumerate(zip(*results, strict=True)):
        gap = float((found.double() - expected).abs().max() / expected.abs().max())
        if gap > tolerance:
            return f"{f'gradient {i}' if i else 'the loss'} by {gap:.1e} of its largest"
    return None
