"""Algorithm 1's forward stage in one call: Eq. 2 to 6, composed of the operators' own functions."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .core.backends import BACKENDS
from .divergence import uegr_loss
from .dropout import AdaptiveDropout
from .perturbation import fgm_perturbation

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, AdaptiveDropout)


class BiStageResult(NamedTuple):
    """What `BiStage.backward` returns: detached, not multiplied by `scale`, the parts not weighted.

    loss              []      L_train (Eq. 6)
    clean_loss        []      L_st (Eq. 5)
    adversarial_loss  []      L_adv (Eq. 3)
    divergence        []      L_div (Eq. 4), nats, in [0, m(m-1)/2 ln 2]
    logits            [N, C]  of the clean pass
    """

    loss: Tensor
    clean_loss: Tensor
    adversarial_loss: Tensor
    divergence: Tensor
    logits: Tensor


class _Pass:
    """The slot's content while a pass runs: the hook reads `delta` (None in the clean pass) and writes the rest."""

    def __init__(self, delta: Tensor | None) -> None:
        self.delta = delta
        self.calls = 0
        self.forward = True  # a recompute in the backward is not a second call
        self.gradient: Tensor | None = None
        self.edge: Any = None

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def watch(self, x: Tensor) -> Tensor:
        """x, or a copy where x is a leaf; its gradient will be kept."""
        with torch.enable_grad():  # a table looked up under no_grad has a g_x too
            x = x if x.requires_grad else x.detach().requires_grad_()
            x = x.clone() if x.is_leaf else x  # the next layer may write into it, and a leaf's .grad may hold earlier batches
        x.register_hook(self.keep)  # unlike retain_grad it means x as it is here, whatever is written into it later
        self.edge = self.edge or torch.autograd.graph.get_gradient_edge(x)
        return x

    def perturb(self, x: Tensor) -> Tensor:
        """x [k*N, ...] + delta [N, ...], pass after pass."""
        if x.shape[1:] != self.delta.shape[1:] or x.shape[0] % self.delta.shape[0]:
            raise RuntimeError(
                f"the embedding's output is {list(x.shape)} in an adversarial pass and {list(self.delta.shape)} in the clean one; "
                "the model must look up the same tokens in every pass, and inputs must have the batch as their first dimension"
            )
        return (x.unflatten(0, (-1, self.delta.shape[0])) + self.delta.to(x.dtype)).flatten(0, 1)


class BiStage:
    """Algorithm 1's forward stage: L_train = L_st + L_adv + js_weight * L_div over clean and perturbed embeddings (Eq. 2-6).

    model           nn.Module from inputs to logits [N, C]: a tensor, an object with `.logits`, or a tuple whose first item they are
    embedding       nn.Module inside it whose output is perturbed; None: the one floating input itself
    epsilon, norm, per   the size of delta, as in `fgm_perturbation`
    passes          m >= 1 adversarial passes, each with its own dropout mask
    js_weight, label_smoothing, ignore_index, task   as in `uegr_loss`
    passes_at_once  at most so many passes in one call of the model, to save memory; None: all m, as one batch of m*N rows
    dropout         m rates in [0, 1], one per pass, for every nn.Dropout* and AdaptiveDropout; None: the layers' own
    input_range     (low, high) to which the perturbed input is clamped; with embedding=None only

    Inputs are a tensor, a dict for model(**inputs), whose `attention_mask` masks the perturbation, or a tuple for model(*inputs). Tensors
    whose first dimension is N are repeated for the passes. The model's mode is the caller's. Build it before `torch.compile`.
    The embedding's output and the logits are float32, bfloat16, float16 or float64; the losses float32 (float64 for float64).
    Raises TypeError or ValueError for wrong arguments, here and in a call, RuntimeError for a pass in which the embedding was not called
    exactly once, and for a backend that cannot serve the call.
    Equivalent to: `uegr_loss` of the clean logits and those of m passes with `fgm_perturbation` added to the embedding's output.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        *,
        epsilon: float = 0.1,
        passes: int = 2,
        js_weight: float = 0.01,
        norm: str = "l2",
        per: str = "sample",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        task: str = "classification",
        passes_at_once: int | None = None,
        dropout: Sequence[float] | None = None,
        input_range: tuple[float, float] | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module to train")
        if embedding is not None and all(module is not embedding for module in model.modules()):
            raise ValueError("embedding is not a module of model; pass the one the model calls, such as model.embedding, or None")
        _check_count("passes", passes)
        _check_count("passes_at_once", passes if passes_at_once is None else passes_at_once)
        if dropout is not None and (not isinstance(dropout, Sequence) or isinstance(dropout, str)):
            raise TypeError(f"dropout={dropout!r} is not a sequence; pass one rate per pass, such as {[0.3] * passes}")
        if dropout is not None and (len(dropout) != passes or not all(0 <= rate <= 1 for rate in dropout)):
            raise ValueError(f"dropout={dropout!r} with passes={passes}; pass one rate in [0, 1] per pass, such as {[0.3] * passes}")
        if input_range is not None and embedding is not None:
            raise ValueError(f"input_range={input_range!r} clamps the input itself; leave it out, or pass embedding=None")
        if input_range is not None and not (len(input_range) == 2 and input_range[0] < input_range[1]):
            raise ValueError(f"input_range={input_range!r}; pass (low, high) with low < high")
        self.model, self.embedding, self.passes, self.dropout, self.input_range = model, embedding, passes, dropout, input_range
        self.passes_at_once = min(passes_at_once or passes, passes)
        self._perturbation = dict(epsilon=epsilon, norm=norm, per=per, backend=backend)
        self._loss = dict(js_weight=js_weight, label_smoothing=label_smoothing, ignore_index=ignore_index, task=task, backend=backend)
        self._check_options()
        self._slot: _Pass | None = None
        self._closed = False
        self._hook = None if embedding is None else embedding.register_forward_hook(self._on_embedding)

    def backward(self, inputs: Any, labels: Tensor, *, scale: float | Tensor = 1.0) -> BiStageResult:
        """Adds scale * dL_train/dtheta to every parameter's .grad; each of the (1 + m) N rows goes forward and back once.

        inputs  as the class says
        labels  [N] int64 or [N, C] probabilities; floats [N] or [N, C] with task="regression"
        scale   positive number, or 0-d tensor (GradScaler's); multiplies the gradient, not what is returned

        With `passes_at_once` below m every pass runs first without a graph for its logits, then again with the same random state:
        (1 + 2m) N rows forward, one graph alive, the same gradient. Under DDP and FSDP only the last backward synchronises, and none
        inside the caller's no_sync; different rates then cost what passes_at_once=1 does. Raises RuntimeError where the embedding was not
        called, or twice, in a pass.
        Equivalent to: `(scale * stage.loss(inputs, labels)).backward()`.
        """
        self._check_call(scale)
        with self._without_sync():
            with self._filled(_Pass(None)) as walk:
                clean = self._call(inputs, walk)
                # Its adversarial logits being constants, this loss has L_st's gradient.
                half = uegr_loss(clean, clean.detach()[None], labels, return_parts=True, **self._loss)
                (half.loss * scale).backward()
            clean = clean.detach().clone()  # a CUDA graph may write the next call's logits over the old
            delta = self._delta(inputs, walk, clean)
        groups = self._groups()
        # A wrapper that synchronises allows for one backward after each forward, not for several forwards first.
        again = self.passes_at_once < self.passes or (len(groups) > 1 and _can_synchronise(self.model))
        calls, states = [], []
        for group in groups:
            with contextlib.ExitStack() as stack:
                if again:
                    stack.enter_context(self._without_sync())
                    stack.enter_context(torch.no_grad())
                    states.append(_random_state(self.model))
                calls.append(self._adversarial(inputs, delta, group))
        logits = torch.cat([logits.detach() for logits, _ in calls]).unflatten(0, (self.passes, -1)).requires_grad_()
        parts = uegr_loss(clean, logits, labels, return_parts=True, **self._loss)
        (parts.loss * scale).backward()
        # One backward per call, so that a recompute inside it finds that call's delta and dropout rate.
        with _gradient_norms_held(self.model) if again else contextlib.nullcontext() as hold:
            for i, group in enumerate(groups):
                with self._without_sync() if i + 1 < len(groups) else contextlib.nullcontext():
                    if again:
                        hold()
                        with _replayed(states[i]):
                            calls[i] = self._adversarial(inputs, delta, group)
                    (group_logits, walk), calls[i] = calls[i], None  # no graph outlives its backward
                    with self._rate(group), self._filled(walk):
                        group_logits.backward(logits.grad[group.start : group.stop].flatten(0, 1))
        return BiStageResult(*(part.detach() for part in parts), clean)

    def loss(self, inputs: Any, labels: Tensor) -> Tensor:
        """L_train [], differentiable in the parameters, for those who call backward() themselves; delta is data.

        inputs, labels  as in `backward`

        The clean pass is walked back to the embedding once more than in `backward`. All graphs live until the caller's backward(), or,
        with `passes_at_once` below m, are made again in it one by one. A model that recomputes its embedding by activation
        checkpointing, or recomputes dropout layers while `dropout` is set, needs `backward`.
        """
        self._check_call(1.0)
        with self._without_sync(), self._filled(_Pass(None)) as walk:
            clean = self._call(inputs, walk)
            half = uegr_loss(clean, clean.detach()[None], labels, **self._loss)
            (walk.gradient,) = torch.autograd.grad(half, [walk.edge], retain_graph=True, allow_unused=True)
        delta = self._delta(inputs, walk, clean)

        def logits_of(group: range) -> Tensor:
            if self.passes_at_once == self.passes:
                return self._adversarial(inputs, delta, group)[0]
            return checkpoint(self._adversarial, inputs, delta, group, use_reentrant=False)[0]

        logits = torch.cat([logits_of(group) for group in self._groups()]).unflatten(0, (self.passes, -1))
        return uegr_loss(clean, logits, labels, **self._loss)

    def close(self) -> None:
        """Removes the hook from the embedding; the BiStage cannot be used afterwards."""
        if self._hook is not None:
            self._hook.remove()
        self._closed = True

    def _on_embedding(self, module: nn.Module, args: tuple, output: Any) -> Any:
        walk = self._slot
        if walk is None:
            return None
        walk.calls += walk.forward
        if walk.calls > 1:
            raise RuntimeError("the embedding was called twice in one pass, and delta is for one call; pass a module that is called once")
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(f"the embedding returned {_kind(output)}; pass the module whose output is the floating tensor to perturb")
        return walk.watch(output) if walk.delta is None else walk.perturb(output)

    def _adversarial(self, inputs: Any, delta: Tensor, group: range) -> tuple[Tensor, _Pass]:
        """The logits [k*N, C] of k passes in one call, and the slot's content for its backward."""
        with self._rate(group), self._filled(_Pass(delta)) as walk:
            return self._call(inputs, walk, len(group)), walk

    def _call(self, inputs: Any, walk: _Pass, repeats: int = 1) -> Tensor:
        """One call of the model on `repeats` copies of the batch; returns logits [repeats*N, C]."""
        rows = None if walk.delta is None else walk.delta.shape[0]

        def repeated(value: Any) -> Any:
            if repeats == 1 or not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
                return value
            return value.repeat(repeats, *[1] * (value.dim() - 1))

        values = {name: repeated(value) for name, value in _items(inputs)}
        if self.embedding is None:
            name = _floating(inputs)
            values[name] = walk.watch(values[name]) if rows is None else walk.perturb(values[name])
            if rows is not None and self.input_range is not None:
                values[name] = values[name].clamp(*self.input_range)
            walk.calls = 1
        output = self.model(**values) if isinstance(inputs, Mapping) else self.model(*values.values())
        walk.forward = False
        if walk.calls == 0:
            raise RuntimeError(
                "the hook on the embedding did not run in this pass: the model does not call the embedding, or was compiled before the "
                "BiStage was built; pass the module that the model calls, and build the BiStage before compiling"
            )
        logits = _logits(output)
        if rows is not None and logits.shape[0] != repeats * rows:
            raise ValueError(
                f"the model gave {logits.shape[0]} rows of logits for {repeats} x {rows} inputs; the batch must be the first dimension of "
                "every input tensor and of the logits"
            )
        return logits

    def _delta(self, inputs: Any, walk: _Pass, clean: Tensor) -> Tensor:
        """Eq. 2, from the gradient that the clean pass left."""
        if walk.gradient is None:
            raise RuntimeError("the loss does not depend on the embedding's output; pass the embedding that the logits are computed from")
        if walk.gradient.shape[0] != clean.shape[0]:
            raise ValueError(
                f"the embedding's output has {walk.gradient.shape[0]} rows and the logits {clean.shape[0]}; the batch must be the first "
                "dimension of both"
            )
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return fgm_perturbation(walk.gradient, mask=mask, **self._perturbation)

    def _groups(self) -> list[range]:
        """The passes of each call of the model."""
        size = 1 if self.dropout is not None and len(set(self.dropout)) > 1 else self.passes_at_once
        return [range(first, min(first + size, self.passes)) for first in range(0, self.passes, size)]

    @contextlib.contextmanager
    def _filled(self, walk: _Pass) -> Iterator[_Pass]:
        self._slot = walk
        try:
            yield walk
        finally:
            self._slot = None

    @contextlib.contextmanager
    def _rate(self, group: range) -> Iterator[None]:
        """Every dropout layer at the rate of these passes."""
        layers = [] if self.dropout is None else [module for module in self.model.modules() if isinstance(module, DROPOUTS)]
        own = [layer.p for layer in layers]
        try:
            for layer in layers:
                layer.p = self.dropout[group.start]
            yield
        finally:
            for layer, p in zip(layers, own, strict=True):
                layer.p = p

    @contextlib.contextmanager
    def _without_sync(self) -> Iterator[None]:
        """DDP's or FSDP's no_sync, or FSDP2's switch turned off and on; nothing for a plain model or inside the caller's no_sync."""
        if not _synchronises(self.model):
            yield
        elif hasattr(self.model, "no_sync"):
            with self.model.no_sync():
                yield
        else:
            self.model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.model.set_requires_gradient_sync(True)

    def _check_options(self) -> None:
        """Each option is checked by the function it is for, on one row of zeros; a named backend waits for the model's device."""
        named = {"backend": "reference"} if self._loss["backend"] in BACKENDS else {}
        row = torch.zeros(1, 2, device="cpu")
        labels = row if self._loss["task"] == "regression" else torch.zeros(1, dtype=torch.int64, device="cpu")
        fgm_perturbation(row, **{**self._perturbation, **named})
        uegr_loss(row, row.expand(self.passes, 1, 2), labels, **{**self._loss, **named})

    def _check_call(self, scale: float | Tensor) -> None:
        if self._closed:
            raise RuntimeError("this BiStage is closed; build a new one")
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are disabled here; call BiStage outside torch.no_grad() and torch.inference_mode()")
        if isinstance(scale, Tensor):
            if scale.dim() != 0:
                raise ValueError(f"scale has shape {list(scale.shape)}; pass a 0-d tensor or a number")
        elif not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale!r} turns the perturbation's direction; pass a positive, finite number")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not an integer; pass one from 1")
    if value < 1:
        raise ValueError(f"{name}={value} is below 1; pass an integer from 1")


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


def _can_synchronise(model: nn.Module) -> bool:
    return hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync")


def _synchronises(model: nn.Module) -> bool:
    """Whether a backward now would exchange gradients: False for plain models and inside the caller's own no_sync."""
    if not _can_synchronise(model) or not getattr(model, "require_backward_grad_sync", True):
        return False
    # FSDP2's switch can be set by public means, not read.
    states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] if group]
    return not groups or any(group.reduce_grads for group in groups)


def _random_state(model: nn.Module) -> dict[torch.device, Tensor]:
    devices = {torch.device("cpu")} | {parameter.device for parameter in model.parameters()}
    return {device: _get_state(device) for device in devices}


def _get_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    torch.set_rng_state(state) if device.type == "cpu" else torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def _replayed(states: dict[torch.device, Tensor]) -> Iterator[None]:
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
def _gradient_norms_held(model: nn.Module) -> Iterator[Callable[[], None]]:
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
