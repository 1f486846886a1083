"""The public perturbations, of embeddings, and of weights for the length of a `with`."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..core import backends, checks, memory
from . import op

CONSTANT = "its result is a constant; give it tensors that are detached, such as grad.detach()"

NORMS, PERS = op.NORMS, op.PERS
# of `pgd_step`
ASCENT_NORMS = (*NORMS, "max")
masked = op.reference.masked


def fgm_perturbation(
    grad: Tensor,
    epsilon: float,
    *,
    norm: str = "l2",
    per: str = "sample",
    mask: Tensor | None = None,
    keep_probability: float | None = None,
    seed: int | None = None,
    step: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Computes delta = epsilon * g/||g||_2 (Eq. 2), which raises the loss most within a ball.

    grad              [B, ..., d]  gradient of the loss by the embeddings; float32, bfloat16,
        float16 or float64
    epsilon           >= 0, in the embeddings' unit
    norm              "l2", or "linf": epsilon * sign(g)
    per               one norm a "sample" (first axis), a "token" (all elements of the last axis),
        or for "all" elements
    mask              [B, T], nonzero where a token is real, of any dtype: multiplies g before the
        norm is taken
    keep_probability  None, or in [0, 1]: the elements with u < keep_probability stay, the rest is
        0; nothing is rescaled (DropAttack)
    seed, step        of that mask (stream 0); seed None: drawn from torch's default generator of
        grad's device, but for None and 1 above

    Returns delta, contiguous, of grad's shape and dtype, detached. A zero gradient gives 0, and so
    does a norm that is not finite, for its sample (token, all). Raises TypeError or ValueError for
    wrong arguments, RuntimeError for a backend that cannot serve the call.

    Equivalent to `reference.fgm_perturbation_(grad, mask, seed, delta, ...)`.
    """
    checks.tensor("grad", grad)
    checks.choice("norm", norm, op.NORMS)
    checks.choice("per", per, op.PERS)
    epsilon, step = checks.number("epsilon", epsilon, 0), checks.integer("step", step, 0, bits=32)
    keep_probability = checks.number(
        "keep_probability", 1.0 if keep_probability is None else keep_probability, 0, 1
    )
    seed = None if seed is None else checks.signed_seed(seed)
    checks.refuse_transforms(
        "fgm_perturbation", [], CONSTANT, constants=[grad] if mask is None else [grad, mask]
    )
    mask = _check_mask(mask, "grad", grad)
    backend = op.fgm_perturbation_.choose(backend, grad.device, grad.dtype)
    key = _key(seed, keep_probability, grad.device)
    delta = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    op.fgm_perturbation_(
        backend,
        grad.detach(),
        mask,
        key,
        delta,
        epsilon=epsilon,
        norm=norm,
        per=per,
        keep_probability=keep_probability,
        step=step,
    )
    return delta


def pgd_step(
    delta: Tensor,
    grad: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: str = "l2",
    per: str = "sample",
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Takes a step of projected gradient ascent: delta + step_size * g/||g||_2, kept in the ball.

    delta      [B, ..., d]  the perturbation so far; float32, bfloat16, float16 or float64
    grad       gradient of the loss by it, of the same shape and dtype
    step_size, radius   >= 0, in the embeddings' unit
    norm       "l2": the ball is ||delta||_2 <= radius; "linf": the step is step_size * sign(g), the
        ball |delta| <= radius; "max": the step is step_size * g/max |g|, the ball that of "linf",
        in plain PyTorch alone
    per        one norm, and one ball, a "sample" (first axis), a "token" (all elements of the last
        axis), or for "all" elements
    mask       [B, T], nonzero where a token is real, of any dtype: multiplies g before the norm is
        taken

    Returns the new delta, contiguous and detached. A gradient that is 0, or whose norm is not
    finite, makes no step. Raises TypeError or ValueError for wrong arguments, RuntimeError for a
    backend that cannot serve the call.

    Equivalent to `reference.pgd_step_(delta, grad, mask, out, ...)`.
    """
    checks.tensor("delta", delta)
    checks.tensor("grad", grad)
    checks.same_shape_and_placement("delta", delta, "grad", grad)
    checks.choice("norm", norm, ASCENT_NORMS)
    checks.choice("per", per, op.PERS)
    step_size = checks.number("step_size", step_size, 0)
    radius = checks.number("radius", radius, 0)
    checks.refuse_transforms(
        "pgd_step", [], CONSTANT, constants=[delta, grad] if mask is None else [delta, grad, mask]
    )
    mask = _check_mask(mask, "grad", grad)
    out = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)
    step: Callable[..., None]
    if norm == "max":
        _check_plain(backend)
        step = op.reference.pgd_step_
    else:
        backend = op.pgd_step_.choose(backend, delta.device, delta.dtype)
        step = functools.partial(op.pgd_step_, backend)
    step(
        delta.detach(),
        grad.detach(),
        mask,
        out,
        step_size=step_size,
        radius=radius,
        norm=norm,
        per=per,
    )
    return out


def perturbed_weights(
    params: Iterable[Tensor],
    epsilon: float,
    *,
    gradients: Sequence[Tensor | None] | None = None,
    per: str = "tensor",
    keep_probability: float = 1.0,
    seed: int | None = None,
    step: int = 0,
    backend: str = "auto",
) -> contextlib.AbstractContextManager[None]:
    """Moves weights to theta + epsilon * g/||g||_2 inside a `with`, and back bit for bit after it.

    params            tensors, on one device; those without a gradient are left alone
    epsilon           >= 0, in the weights' unit
    gradients         g by parameter, None for none; None: their `.grad`, as it is on entering
    per               one norm a "tensor", or over "all" of them
    keep_probability  in [0, 1]: the elements with u < keep_probability move, the others stay;
        nothing is rescaled (DropAttack)
    seed, step        of that mask, whose stream is the parameter's position; seed None: drawn from
                      torch's default generator of the device, if keep_probability is below 1

    Run the backward of the perturbed pass inside: leaving restores saved copies, also after an
    exception. Entering and leaving increase the versions. A gradient that is 0, or whose norm is
    not finite, moves nothing. Raises TypeError or ValueError for wrong arguments, RuntimeError for
    a backend that cannot serve the call, before a weight changes.

    Equivalent to `reference.perturb_weights_(params, gradients, seed, ...)` and copying back.
    """
    if isinstance(params, Tensor):
        raise TypeError("params is a tensor; give a list of tensors, [params]")
    params = list(params)
    for i, param in enumerate(params):
        checks.tensor(f"params[{i}]", param)
        if param.device != params[0].device:
            raise ValueError(
                f"params[{i}] is on {param.device}, params[0] on {params[0].device}; perturb the "
                "devices' parameters one by one"
            )
    checks.choice("per", per, ("tensor", "all"))
    if gradients is not None and len(gradients) != len(params):
        raise ValueError(
            f"gradients hold {len(gradients)} entries for {len(params)} params; give "
            "one each, None for none"
        )
    return _perturbed(
        params,
        gradients,
        None if seed is None else checks.signed_seed(seed),
        backend,
        epsilon=checks.number("epsilon", epsilon, 0),
        keep_probability=checks.number("keep_probability", keep_probability, 0, 1),
        step=checks.integer("step", step, 0, bits=32),
        together=per == "all",
    )


@contextlib.contextmanager
def _perturbed(
    params: list[Tensor],
    gradients: Sequence[Tensor | None] | None,
    seed: int | None,
    backend: str,
    *,
    epsilon: float,
    keep_probability: float,
    step: int,
    together: bool,
) -> Iterator[None]:
    given = {
        i: g
        for i, g in enumerate([param.grad for param in params] if gradients is None else gradients)
        if g is not None
    }
    for i, grad in given.items():
        checks.tensor(f"gradients[{i}]", grad)
        checks.same_shape_and_placement(f"params[{i}]", params[i], f"gradients[{i}]", grad)
    if not given:
        yield
        return
    checks.refuse_transforms("perturbed_weights", params, CONSTANT, constants=list(given.values()))
    streams = list(given)
    # they share memory and versions
    weights = [params[i].detach() for i in streams]
    grads = [grad.detach() for grad in given.values()]
    if not backends.traced():
        # a gradient that is a weight is as it was on entering
        grads = memory.apart_from(grads, weights)
    backend = op.perturb_weights_.choose(backend, weights[0].device, weights[0].dtype)
    key = _key(seed, keep_probability, weights[0].device)
    saved = [weight.clone() for weight in weights]
    try:
        op.perturb_weights_(
            backend,
            weights,
            grads,
            key,
            streams=streams,
            epsilon=epsilon,
            together=together,
            keep_probability=keep_probability,
            step=step,
        )
        # it keeps casts of weights until its region ends
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)
        torch.clear_autocast_cache()


def _check_plain(backend: str) -> None:
    """Raises for a backend other than the reference, which alone has pgd_step's norm "max"."""
    checks.backend(backend)
    if backend not in ("auto", "reference"):
        raise RuntimeError(
            f"backend={backend!r} cannot serve pgd_step with norm='max': its kernels take 'l2' and "
            "'linf'; use backend='auto'"
        )


def _check_mask(mask: Tensor | None, name: str, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    checks.is_tensor("mask", mask, "[B, T]")
    if mask.layout != torch.strided or mask.is_complex():
        raise TypeError(
            f"mask is {mask.dtype}, {mask.layout}; give a dense tensor of bool, integers or floats"
        )
    if mask.dim() != 2 or mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and {name} {tuple(x.shape)}; give "
            "[B, T], its first two axes"
        )
    checks.same_device(name, x, "mask", mask)
    return mask.detach() != 0


def _key(seed: int | None, keep_probability: float, device: torch.device) -> Tensor | None:
    """Returns the random mask's key, None where there is no mask; the only place that draws."""
    if keep_probability == 1:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.tensor(seed, dtype=torch.int64)
