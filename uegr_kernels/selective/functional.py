"""The selection by itself: of gradients in place, its probabilities and its masks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks, memory, shards
from . import op
from .batch import joint_statistics
from .options import Selection

CONSTANT = "p and b are constants; give tensors that are detached, such as grad.detach()"


def select_gradients_(
    params: Tensor | Sequence[Tensor],
    *,
    seed: int,
    step: int,
    saliency: Sequence[Tensor] | None = None,
    threshold: float = Selection.threshold,
    sharpness: float = Selection.sharpness,
    normalization: str = Selection.normalization,
    direction: str = Selection.direction,
    scope: str = Selection.scope,
    rescale: bool = Selection.rescale,
    min_probability: float = Selection.min_probability,
    keep_probability: float = Selection.keep_probability,
    backend: str = "auto",
) -> None:
    """Selects the gradients in place, g <- b*g/p (Eq. 7-9), for any other optimizer to step with.

    params  tensors whose .grad is selected; one without a gradient is passed over. A parameter's
        stream is its position
    seed, step  integers: the mask depends on them, the stream and the element alone; step from 1,
        below 2^24
    saliency  a tensor s >= 0 for every parameter, of its shape, in the place of g*g (an accumulated
        Fisher estimate); None: g*g
    threshold, sharpness  where p is 1/2, in units of s~, and how steep p is there (>= 0)
    normalization  "minmax" | "range" (Eq. 8 to the letter) | "rank" (share of smaller s; native
        backends: by bins of |g|'s upper 16 bits, and by samples above 2^20 elements) | "constant"
    direction  "printed": p falls with saliency, as Eq. 9 is printed | "salient": p rises
    scope  "tensor" | "global": statistics over one tensor, or over all of the call
    rescale  divide by p;  min_probability  floor of p, at least 2^-24;  keep_probability  p of
        "constant", in (0, 1]
    backend  "auto" | "reference" | "cpp" | "cuda" | "triton"

    Raises, before anything has changed: ValueError for a bad option, shape or overlapping gradient,
    TypeError for a dtype, RuntimeError for a sparse gradient. Equivalent to
    `selective.reference.select_gradients_`.
    """
    selection = Selection(
        threshold=threshold,
        sharpness=sharpness,
        normalization=normalization,
        direction=direction,
        scope=scope,
        rescale=rescale,
        min_probability=min_probability,
        keep_probability=keep_probability,
    )
    params = [params] if isinstance(params, Tensor) else list(params)
    seed, step = checks.signed_seed(seed), checks.integer("step", step, 0, bits=24)
    if saliency is not None and len(saliency) != len(params):
        raise ValueError(
            f"saliency has {len(saliency)} tensors for {len(params)} parameters; give "
            "one for every parameter"
        )
    parts: dict[tuple[torch.device, torch.dtype], op.Part] = {}
    for stream, p in enumerate(params):
        checks.is_tensor(f"params[{stream}]", p)
        if p.grad is None:
            continue
        s = None if saliency is None else saliency[stream]
        if s is None and saliency is not None:
            raise TypeError(
                f"saliency[{stream}] is None; give a tensor for every parameter that has a gradient"
            )
        named = f"params[{stream}].grad"
        _check_gradient("select_gradients_", named, p.grad)
        if s is not None:
            _check_saliency("select_gradients_", f"saliency[{stream}]", s, named, p.grad)
        memory.refuse_expanded(named, p.grad, ValueError)
        key = p.grad.device, p.grad.dtype
        if key not in parts:
            parts[key] = op.Part.empty(op.select_gradients_.choose(backend, *key))
        parts[key].grads.append(p.grad)
        if s is not None:
            parts[key].saliencies.append(s)
        parts[key].layout += (stream, 0, p.numel(), p.numel())
    if not parts:
        return
    shared = None
    with torch.no_grad():
        if selection.scope == "global" and selection.normalization != "constant":
            shared = joint_statistics({(): list(parts.values())}, selection.normalization, {})
        for (device, _), part in parts.items():
            op.select_gradients_(
                part.backend,
                part.grads,
                part.saliencies,
                scope_statistics=None if shared is None else shared.to(device),
                layout=part.layout,
                step=step,
                seed=seed,
                selection=selection,
            )


def selection_probability(
    grad: Tensor,
    *,
    saliency: Tensor | None = None,
    threshold: float = Selection.threshold,
    sharpness: float = Selection.sharpness,
    normalization: str = Selection.normalization,
    direction: str = Selection.direction,
    rescale: bool = Selection.rescale,
    min_probability: float = Selection.min_probability,
    keep_probability: float = Selection.keep_probability,
    backend: str = "auto",
) -> Tensor:
    """Computes the probability p with which each element of a gradient is selected (Eq. 7-9).

    grad  any shape; float32, bfloat16, float16, float64;  saliency  s >= 0 of the same shape in the
        place of g*g
    threshold, sharpness  where p is 1/2, in units of s~, and how steep p is there (>= 0)
    normalization  "minmax" | "range" (Eq. 8 to the letter) | "rank" (share of smaller s; native
        backends: by bins of |g|'s upper 16 bits, and by samples above 2^20 elements) | "constant"
    direction  "printed": p falls with saliency, as Eq. 9 is printed | "salient": p rises
    min_probability  floor of p, at least 2^-24;  keep_probability  p of "constant", in (0, 1]
    rescale  of the gradient, not of p: no effect here
    backend  "auto" | "reference" | "cpp" | "cuda" | "triton"

    Returns p in [2^-24, 1], of grad's shape, float32 (float64 for float64); 1 where grad is not
    finite. Raises ValueError for a bad option or shape, TypeError for a dtype, RuntimeError for a
    sparse gradient. Equivalent to `selective.reference.selection_probability_`.
    """
    selection = Selection(
        threshold=threshold,
        sharpness=sharpness,
        normalization=normalization,
        direction=direction,
        rescale=rescale,
        min_probability=min_probability,
        keep_probability=keep_probability,
    )
    _check_gradient("selection_probability", "grad", grad)
    if saliency is not None:
        _check_saliency("selection_probability", "saliency", saliency, "grad", grad)
    chosen = op.selection_probability_.choose(backend, grad.device, grad.dtype)
    with torch.no_grad():
        out = torch.empty(
            grad.shape,
            dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32,
            device=grad.device,
        )
        op.selection_probability_(chosen, grad.detach(), saliency, out=out, selection=selection)
    return out


def selection_mask(
    grad: Tensor,
    *,
    seed: int,
    step: int,
    stream: int = 0,
    saliency: Tensor | None = None,
    threshold: float = Selection.threshold,
    sharpness: float = Selection.sharpness,
    normalization: str = Selection.normalization,
    direction: str = Selection.direction,
    rescale: bool = Selection.rescale,
    min_probability: float = Selection.min_probability,
    keep_probability: float = Selection.keep_probability,
    backend: str = "auto",
) -> Tensor:
    """Draws which elements of a gradient are selected, b ~ Bernoulli(p) (Eq. 9), from Philox.

    grad  any shape; float32, bfloat16, float16, float64;  saliency  s >= 0 of the same shape in the
        place of g*g
    seed  any integer, modulo 2^64;  step  from 1, below 2^24;  stream  the parameter's number, in
        [0, 2^32)
    threshold, sharpness  where p is 1/2, in units of s~, and how steep p is there (>= 0)
    normalization  "minmax" | "range" (Eq. 8 to the letter) | "rank" (share of smaller s; native
        backends: by bins of |g|'s upper 16 bits, and by samples above 2^20 elements) | "constant"
    direction  "printed": p falls with saliency, as Eq. 9 is printed | "salient": p rises
    min_probability  floor of p, at least 2^-24;  keep_probability  p of "constant", in (0, 1]
    rescale  of the gradient, not of the mask: no effect here
    backend  "auto" | "reference" | "cpp" | "cuda" | "triton"

    Returns a bool tensor of grad's shape. Raises ValueError for a bad option or shape, TypeError
    for a dtype, RuntimeError for a sparse gradient. Equivalent to
    `selective.reference.selection_mask_`.
    """
    selection = Selection(
        threshold=threshold,
        sharpness=sharpness,
        normalization=normalization,
        direction=direction,
        rescale=rescale,
        min_probability=min_probability,
        keep_probability=keep_probability,
    )
    _check_gradient("selection_mask", "grad", grad)
    if saliency is not None:
        _check_saliency("selection_mask", "saliency", saliency, "grad", grad)
    seed, step = checks.signed_seed(seed), checks.integer("step", step, 0, bits=24)
    stream = checks.integer("stream", stream, 0, bits=32)
    chosen = op.selection_mask_.choose(backend, grad.device, grad.dtype)
    with torch.no_grad():
        out = torch.empty(grad.shape, dtype=torch.bool, device=grad.device)
        layout = [stream, 0, grad.numel(), grad.numel()]
        op.selection_mask_(
            chosen,
            grad.detach(),
            saliency,
            out=out,
            layout=layout,
            step=step,
            seed=seed,
            selection=selection,
        )
    return out


def _check_gradient(function: str, name: str, grad: Tensor) -> None:
    checks.is_tensor(name, grad)
    if shards.sharded(grad):
        raise TypeError(
            f"{name} is a DTensor, whose parts this function does not join; use an "
            "optimizer, or call full_tensor() on it"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name} is sparse ({grad.layout}), which is not supported; call .to_dense() on it "
            "first"
        )
    checks.floating(name, grad)
    checks.refuse_transforms(function, [], CONSTANT, constants=[grad])


def _check_saliency(
    function: str, name: str, saliency: Tensor, grad_name: str, grad: Tensor
) -> None:
    checks.tensor(name, saliency)
    checks.same_shape(grad_name, grad, name, saliency)
    checks.same_device(grad_name, grad, name, saliency)
    checks.refuse_transforms(function, [], CONSTANT, constants=[saliency])
