"""Looks at a model in eval mode and leaves it as it was."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..passes import Inputs


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Sets eval mode; afterwards every module's mode, .grad and the random state are what they
    were.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, gradient in gradients:
            p.grad = gradient


def call(model: nn.Module, inputs: Inputs) -> object:
    """Calls model(**inputs), model(*inputs) or model(inputs)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def pooled(features: Tensor, inputs: Inputs, pooling: str) -> Tensor:
    """Returns [N, T, d] as [N, d]; anything else as [N, -1]."""
    if features.dim() != 3:
        return features.flatten(1)
    if pooling == "first":
        return features[:, 0]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != features.shape[:2]:
        return features.mean(1)
    weight = mask.to(features.dtype)[..., None]
    mean: Tensor = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
    return mean


@contextlib.contextmanager
def moved(params: list[nn.Parameter]) -> Iterator[Callable[[list[Tensor]], None]]:
    """Yields what puts the parameters at their start plus the given tensors; afterwards they
    are the start, bit for bit.
    """
    start = [p.detach().clone() for p in params]

    def put(values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        # it keeps casts of weights until its region ends
        torch.clear_autocast_cache()

    try:
        yield lambda by: put(at + step for at, step in zip(start, by, strict=True))
    finally:
        put(start)
