"""Builds other ways to do the same: steps written plainly, compiled or as others write them, and
libraries that need not be installed.
"""

import functools
import importlib.util
import inspect
import math
import os
import types
from collections.abc import Callable

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.selective import reference

from .harness import Contestant
from .timer import Step

# the compiler's helpers would count as other programs
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

DEFAULTS = {
    name: given.default for name, given in inspect.signature(uk.SelectiveAdamW).parameters.items()
}


def library(name: str, package: str, build: Callable[[], Step], **facts) -> Contestant:
    """Returns a library's contestant, or the reason why there is none; whether it runs here, its
    first step shows.
    """
    if importlib.util.find_spec(package) is None:
        return Contestant(name, None, missing=f"{package} is not installed")
    try:
        return Contestant(name, build(), **facts, may_fail=True)
    except Exception as error:
        return Contestant(name, None, missing=f"{type(error).__name__}: {str(error).strip()[:200]}")


def compiled(function: Callable) -> Callable:
    """Compiles by torch.compile, at the first call: the compiler's import takes seconds, which one
    that is left out need not take.
    """

    @functools.cache
    def made() -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *arguments: made()(*arguments)


def bitsandbytes_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW32bit(params, 1e-5)


def torchao_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    from torchao import optim

    return optim.AdamW8bit(params, 1e-5)


def deepspeed_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops import adam

    on_cpu = params[0].device.type == "cpu"
    return (
        adam.DeepSpeedCPUAdam(params, 1e-5, adamw_mode=True)
        if on_cpu
        else adam.FusedAdam(params, 1e-5, adam_w_mode=True)
    )


def liger_jsd() -> Callable[[Tensor], Tensor]:
    """Computes Liger's divergence between two passes' logits [2, N, C]; the gradient goes to the
    first pass alone.
    """
    from liger_kernel.transformers import LigerJSD

    divergence = LigerJSD()

    def loss(logits: Tensor) -> Tensor:
        student, teacher = logits.float().log_softmax(-1)
        return divergence(student, teacher.detach())

    return loss


def liger_linear_jsd() -> Callable[[Tensor, Tensor], Tensor]:
    """Computes Liger's divergence between two passes' hidden states [2, N, H] through a weight [C,
    H]; the gradient goes through the first pass alone.
    """
    from liger_kernel.transformers import LigerFusedLinearJSD

    divergence = LigerFusedLinearJSD()
    return lambda hidden, weight: divergence(
        hidden[0], weight, hidden[1].detach(), weight.detach(), None
    )


def five_passes(
    params: list[Tensor],
    adamw: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    ranked: bool,
    salient: bool,
) -> Step:
    """Returns a selective step as one builds it around AdamW, each pass over all parameters and
    leaving a tensor for each.

    This is how RoAST's public code is described: score, normalise (there by rank over all
    parameters), probability, a stored mask of Bernoulli draws over p, and AdamW on the masked
    gradient. There the first four run once an epoch; here, as in UEGR, at every step.
    """
    # the same memory; their gradients are the masked ones
    twins = [p.detach() for p in params]
    optimizer = adamw(twins)
    slope = (1 if salient else -1) * 2 * DEFAULTS["sharpness"]

    def step() -> None:
        scores = [p.grad.float().square() for p in params]
        levels = (
            ranks(scores)
            if ranked
            else [(s - s.amin()) / (s.amax() - s.amin()).clamp(min=1e-38) for s in scores]
        )
        probabilities = [torch.sigmoid(slope * (level - DEFAULTS["threshold"])) for level in levels]
        masks = [torch.bernoulli(p) / (p + 1e-12) for p in probabilities]
        for twin, p, mask in zip(twins, params, masks, strict=True):
            twin.grad = (p.grad * mask).to(p.dtype)
        optimizer.step()

    return step


def ranks(scores: list[Tensor]) -> list[Tensor]:
    """Returns each score's place among all, in [0, 1]."""
    flat = torch.cat([s.flatten() for s in scores])
    places = torch.empty_like(flat)
    places[flat.argsort()] = torch.linspace(0, 1, len(flat), device=flat.device)
    return [
        part.view(s.shape)
        for part, s in zip(places.split([s.numel() for s in scores]), scores, strict=True)
    ]


def compiled_reference(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float) -> Step:
    """Runs the reference's own functions under torch.compile on one tensor, with its default
    options; the step's number is a constant.
    """
    selection = types.SimpleNamespace(**DEFAULTS)
    beta1, beta2 = DEFAULTS["betas"]
    line = {
        "lr": lr,
        "weight_decay": DEFAULTS["weight_decay"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": DEFAULTS["eps"],
    }
    layout = reference.Layout(0, 0, math.prod(p.shape), math.prod(p.shape))

    def step(theta: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        selected, factor = reference.select(g, None, None, layout, selection, seed=0, step=1)
        reference.adamw_update_rule(
            theta, torch.where(selected, g * factor, 0), exp_avg, exp_avg_sq, None, step=1, **line
        )

    fast = torch.compile(step, dynamic=False)
    return lambda: fast(p, p.grad, exp_avg, exp_avg_sq)
