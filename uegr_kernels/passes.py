"""How a model is called, by BiStage and by the recipes: inputs, logits, the hook on the embedding, and what is held while a pass runs."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .core import checks
from .dropout import AdaptiveDropout

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, AdaptiveDropout)


class Pass:
    """The slot's content while a pass runs: the hook reads what to perturb and writes what it saw.

    delta     added to the embedding's output, or a function from that output to it; None: nothing is added
    watched   keep the gradient at the embedding's output (perturbed, where there is a delta)
    at        what takes the place of the embedding's output, delta apart; None: the output itself
    """

    def __init__(self, delta: Tensor | Callable[[Tensor], Tensor] | None = None, *, watched: bool, at: Tensor | None = None) -> None:
        self.delta: Any = delta
        self.watched, self.at = watched, at
        self.calls = 0
        self.forward = True  # a recompute in the backward is not a second call
        self.output: Tensor | None = None
        self.gradient: Any = None  # a tensor, once a watched pass went back
        self.edge: Any = None

    def visit(self, x: Tensor) -> Tensor:
        """What the model goes on with where the embedding gave x."""
        self.output = x.detach()
        x = x if self.at is None else self.at
        x = x if self.delta is None else self._perturb(x)
        return self._watch(x) if self.watched else x

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def _watch(self, x: Tensor) -> Tensor:
        """x, or a copy where x is a leaf; its gradient will be kept."""
        with torch.enable_grad():  # a table looked up under no_grad has a g_x too
            x = x if x.requires_grad else x.detach().requires_grad_()
            x = x.clone() if x.is_leaf else x  # the next layer may write into it, and a leaf's .grad may hold earlier batches
        x.register_hook(self._keep)  # unlike retain_grad it means x as it is here, whatever is written into it later
        self.edge = self.edge or torch.autograd.graph.get_gradient_edge(x)
        return x

    def _perturb(self, x: Tensor) -> Tensor:
        """x [k*N, ...] + delta [N, ...], pass after pass."""
        if not isinstance(self.delta, Tensor):
            self.delta = self.delta(x.detach())
        if x.shape[1:] != self.delta.shape[1:] or x.shape[0] % self.delta.shape[0]:
            raise RuntimeError(
                f"the embedding's output is {list(x.shape)} in an adversarial pass and {list(self.delta.shape)} in the clean one; "
                "the model must look up the same tokens in every pass, and inputs must have the batch as their first dimension"
            )
        moved: Tensor = x.unflatten(0, (-1, self.delta.shape[0])) + self.delta.to(x.dtype)
        return moved.flatten(0, 1)


class Runner:
    """Runs passes through a model, with one forward hook on the embedding from here to `close()`; it sleeps while no pass is on.

    model        nn.Module from inputs to logits [N, C]: a tensor, an object with `.logits`, or a tuple whose first item they are
    embedding    nn.Module inside it whose output is perturbed; None: the one floating input itself
    input_range  (low, high) to which the perturbed input is clamped; with embedding=None only

    Raises TypeError or ValueError for wrong arguments.
    """

    def __init__(self, model: nn.Module, embedding: nn.Module | None, input_range: tuple[float, float] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module to train")
        if embedding is not None and all(module is not embedding for module in model.modules()):
            raise ValueError("embedding is not a module of model; pass the one the model calls, such as model.embedding, or None")
        if input_range is not None and embedding is not None:
            raise ValueError(f"input_range={input_range!r} clamps the input itself; leave it out, or pass embedding=None")
        if input_range is not None and not (len(input_range) == 2 and input_range[0] < input_range[1]):
            raise ValueError(f"input_range={input_range!r}; pass (low, high) with low < high")
        self.model, self.embedding, self.input_range = model, embedding, input_range
        self._slot: Pass | None = None
        self.closed = False
        self._hook = None if embedding is None else embedding.register_forward_hook(self._on_embedding)

    def check(self, scale: float | Tensor) -> None:
        """Raises what stands against a call now."""
        if self.closed:
            raise RuntimeError("this is closed: its hook is off the embedding; build a new one")
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are disabled here; call outside torch.no_grad() and torch.inference_mode()")
        if isinstance(scale, Tensor):
            if scale.dim() != 0:
                raise ValueError(f"scale has shape {list(scale.shape)}; pass a 0-d tensor or a number")
        elif not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale!r} turns the perturbation's direction; pass a positive, finite number")

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self.closed = True

    @contextlib.contextmanager
    def filled(self, walk: Pass) -> Iterator[Pass]:
        """The pass is on: its forward, and its backward where that may recompute the embedding."""
        self._slot = walk
        try:
            yield walk
        finally:
            self._slot = None

    def _on_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        walk = self._slot
        if walk is None:
            return None
        walk.calls += walk.forward
        if walk.calls > 1:
            raise RuntimeError("the embedding was called twice in one pass, and delta is for one call; pass a module that is called once")
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(f"the embedding returned {_kind(output)}; pass the module whose output is the floating tensor to perturb")
        return walk.visit(output)

    def call(self, inputs: Any, walk: Pass, repeats: int = 1) -> Tensor:
        """One call of the model on `repeats` copies of the batch; returns logits [repeats*N, C]."""
        rows = walk.delta.shape[0] if isinstance(walk.delta, Tensor) else None

        def repeated(value: Any) -> Any:
            if repeats == 1 or not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
                return value
            return value.repeat(repeats, *[1] * (value.dim() - 1))

        values = {name: repeated(value) for name, value in _items(inputs)}
        if self.embedding is None:
            name = _floating(inputs)
            values[name] = walk.visit(values[name])
            if walk.delta is not None and self.input_range is not None:
                values[name] = values[name].clamp(*self.input_range)
            walk.calls = 1
        output = self.model(**values) if isinstance(inputs, Mapping) else self.model(*values.values())
        walk.forward = False
        if walk.calls == 0:
            raise RuntimeError(
                "the hook on the embedding did not run in this pass: the model does not call the embedding, or was compiled before the "
                "hook was there; pass the module that the model calls, and build this before compiling"
            )
        logits = _logits(output)
        if rows is not None and logits.shape[0] != repeats * rows:
            raise ValueError(
                f"the model gave {logits.shape[0]} rows of logits for {repeats} x {rows} inputs; the batch must be the first dimension of "
                "every input tensor and of the logits"
            )
        return logits

    @contextlib.contextmanager
    def without_sync(self) -> Iterator[None]:
        """DDP's or FSDP's no_sync, or FSDP2's switch turned off and on; nothing for a plain model or inside the caller's no_sync."""
        model: Any = self.model
        if not synchronises(model):
            yield
        elif hasattr(model, "no_sync"):
            with model.no_sync():
                yield
        else:
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)


def gradient_at_embedding(walk: Pass, logits: Tensor) -> Tensor:
    """g_x that a watched pass's backward left."""
    if walk.gradient is None:
        raise RuntimeError("the loss does not depend on the embedding's output; pass the embedding that the logits are computed from")
    if walk.gradient.shape[0] != logits.shape[0]:
        raise ValueError(
            f"the embedding's output has {walk.gradient.shape[0]} rows and the logits {logits.shape[0]}; the batch must be the first "
            "dimension of both"
        )
    gradient: Tensor = walk.gradient
    return gradient


def attention_mask(inputs: Any) -> Tensor | None:
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def check_count(name: str, value: Any, least: int = 1) -> int:
    return checks.integer(name, value, least)


def can_synchronise(model: nn.Module) -> bool:
    return hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync")


def synchronises(model: Any) -> bool:
    """Whether a backward now would exchange gradients: False for plain models and inside the caller's own no_sync."""
    if not can_synchronise(model) or not getattr(model, "require_backward_grad_sync", True):
        return False
    # FSDP2's switch can be set by public means, not read.
    states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] if group]
    return not groups or any(group.reduce_grads for group in groups)


@contextlib.contextmanager
def dropout_rate(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Every dropout layer at this rate; None: at its own."""
    layers = [] if rate is None else [module for module in model.modules() if isinstance(module, DROPOUTS)]
    own = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = rate or 0.0
        yield
    finally:
        for layer, p in zip(layers, own, strict=True):
            layer.p = p


def random_state(model: nn.Module) -> dict[torch.device, Tensor]:
    devices = {torch.device("cpu")} | {parameter.device for parameter in model.parameters()}
    return {device: _get_state(device) for device in devices}


@contextlib.contextmanager
def replayed(states: dict[torch.device, Tensor]) -> Iterator[None]:
    """Runs under an earlier random state and leaves the present one as it was."""
    present = {device: _get_state(device) for device in states}
    try:
        for device, state in states.items():
            _set_state(device, state)
        yield
    finally:
        for device, state in present.items():
            _set_state(device, state)


@contextlib.contextmanager
def gradient_norms_held(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields what takes the gradient norms pending in every AdaptiveDropout out of it, to be put back in the end.

    A pass that runs again after another's backward would fold them in, and drop other units than the first time.
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptiveDropout)]
    held = []

    def hold() -> None:
        for layer in layers:
            held.append((layer, layer.pending.clone()))
            layer.pending.zero_()

    try:
        yield hold
    finally:
        for layer, pending in held:
            layer.pending.add_(pending)


@contextlib.contextmanager
def buffers_held(model: nn.Module) -> Iterator[None]:
    """Whatever a pass writes into buffers (BatchNorm's statistics, AdaptiveDropout's norms) goes into copies that are dropped."""
    owned = [(module, module._buffers) for module in model.modules() if module._buffers]
    try:
        for module, buffers in owned:
            module._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}
        yield
    finally:
        for module, buffers in owned:
            module._buffers = buffers


def _kind(value: Any) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _items(inputs: Any) -> list[tuple[Any, Any]]:
    if isinstance(inputs, Mapping):
        return list(inputs.items())
    return list(enumerate(inputs if isinstance(inputs, tuple | list) else (inputs,)))


def _floating(inputs: Any) -> Any:
    """The name or position of the one floating input."""
    names = [name for name, value in _items(inputs) if name != "attention_mask" and isinstance(value, Tensor) and value.is_floating_point()]
    if len(names) != 1:
        raise ValueError(f"embedding=None perturbs the one floating input, and here are {len(names)}; pass one, or name an embedding")
    return names[0]


def _logits(output: Any) -> Tensor:
    logits = output[0] if isinstance(output, tuple) and output and not hasattr(output, "logits") else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned {_kind(output)}; return logits [N, C], an object with .logits, or a tuple of them first")
    return logits


def _get_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    torch.set_rng_state(state) if device.type == "cpu" else torch.get_device_module(device).set_rng_state(state, device)
