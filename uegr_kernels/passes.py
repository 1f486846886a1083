"""Passes through a model, for BiStage and the recipes: the hook on the embedding, the logits, and
what is held while a pass runs.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .batch_axis import BatchAxis
from .batch_axis import InputBatch as InputBatch
from .batch_axis import Inputs as Inputs
from .core import checks
from .core.backends import DTYPES, why_not
from .dropout import AdaptiveDropout
from .perturbation import masked

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, AdaptiveDropout)


class Pass:
    """Holds what the hook needs while a pass runs: what to perturb, and what it saw.

    batch     that the pass is over
    delta     added to the embedding's output, or a function from that output to it; None: nothing
        is added
    watched   keep the gradient at the embedding's output (perturbed, where there is a delta)
    at        what takes the place of the embedding's output, delta apart, as another pass has
        `seen` it; None: the output itself

    delta, output, gradient and unit have the batch first, whatever the model's order is.
    """

    # the embedding's output, in the model's order
    seen: Tensor
    # where a watched pass's gradient arrives
    edge: GradientEdge

    def __init__(
        self,
        batch: InputBatch,
        delta: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        watched: bool,
        at: Tensor | None = None,
    ) -> None:
        self.batch = batch
        self.delta = delta
        self.watched, self.at = watched, at
        self.calls, self.repeats = 0, 1
        # a recompute in the backward is not a second call
        self.forward = True
        self.differentiable = False
        # what the embedding was called with
        self.given: list[Tensor] = []
        # the gradient as `seen` is, once a watched pass went back
        self._gradient: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """Returns what the embedding gave [N, ...]."""
        return self.batch.first(self.seen)

    @property
    def gradient(self) -> Tensor:
        """Returns g_x that a watched pass's backward left [N, ...]."""
        if self._gradient is None:
            raise RuntimeError(
                "the loss does not depend on the embedding's output; pass the "
                "embedding that the logits are computed from"
            )
        return self.batch.first(self._gradient)

    @property
    def unit(self) -> Tensor | None:
        """Returns what lengths are multiples of: the L2 norm of each sample's real tokens [N, 1,
        ...]; None: of 1.
        """
        if not self.batch.relative:
            return None
        x = masked(self.batch.first(self.seen if self.at is None else self.at), self.mask)
        lengths: Tensor = torch.linalg.vector_norm(
            x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        return lengths.view(-1, *[1] * (x.dim() - 1))

    @property
    def mask(self) -> Tensor | None:
        """Returns [N, T], nonzero where a token is real."""
        return self.batch.mask

    def ascended(self, step: Callable[[Tensor], Tensor], g: Tensor | None = None) -> Tensor:
        """Returns a perturbation: step(g), in multiples of `unit`; g None: g_x."""
        g, unit = self.gradient if g is None else g, self.unit
        return step(g) if unit is None else (step(g.to(unit.dtype)) * unit).to(g.dtype)

    def measured(self, delta: Tensor) -> Tensor:
        """Returns delta in multiples of `unit`."""
        unit = self.unit
        return delta if unit is None else delta.to(unit.dtype) / torch.where(unit > 0, unit, 1)

    def visit(self, x: Tensor) -> Tensor:
        """Returns what the model goes on with where the embedding gave x."""
        self.seen = x.detach().clone() if self.batch.keeps_output else x.detach()
        x = x if self.at is None else self.at
        x = x if self.delta is None else self._perturb(x, self.delta)
        return self._watch(x) if self.watched else self._reached(x) if self.differentiable else x

    def keep(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def _watch(self, x: Tensor) -> Tensor:
        """Returns x, or a copy where x is a leaf; its gradient will be kept."""
        x = self._reached(x)
        with torch.enable_grad():
            # the next layer may write into it, and a leaf's .grad may hold earlier batches
            x = x.clone() if x.is_leaf else x
        # unlike retain_grad it means x as it is here, whatever is written into it later
        x.register_hook(self.keep)
        if self.forward:
            self.edge = get_gradient_edge(x)
        return x

    def _reached(self, x: Tensor) -> Tensor:
        """Returns x where a gradient reaches it, else a copy that one does: reentrant checkpointing
        keeps no graph without.
        """
        if x.requires_grad:
            return x
        # a table looked up under no_grad has a g_x too
        with torch.enable_grad():
            return x.detach().requires_grad_().clone()

    def _perturb(self, x: Tensor, delta: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """Returns x [k*N, ...] + delta [N, ...], pass after pass, in the model's order."""
        x = self.batch.first(x)
        if not isinstance(delta, Tensor):
            start, unit = delta(x.detach()), self.unit
            delta = self.delta = start if unit is None else (start * unit).to(start.dtype)
        if x.shape[1:] != delta.shape[1:] or x.shape[0] != self.repeats * len(delta):
            raise RuntimeError(
                f"the embedding's output is {list(x.shape)}, batch first, in an adversarial pass "
                f"of {self.repeats} x {len(delta)} rows and {list(delta.shape)} in the clean one; "
                "the model must look up the same tokens in every pass, and inputs must have the "
                "batch as their first dimension, or be what the embedding is called with "
                "(batch_axis=1)"
            )
        moved: Tensor = x.unflatten(0, (self.repeats, -1)) + delta.to(x.dtype)
        return self.batch.first(moved.flatten(0, 1))


class Runner:
    """Runs passes through a model, with one forward hook on the embedding from here to `close()`;
    it sleeps while no pass is on.

    model        nn.Module from inputs to logits [N, C]: a tensor, an object with `.logits`, a dict
                 with "logits", or a tuple whose first item they are
    embedding    nn.Module inside it whose output is perturbed; None: the one floating input itself
    input_range  (low, high) to which the perturbed input is clamped; with embedding=None only
    batch_axis   of the embedding's output that is the batch, 0 or 1; None: found batch by batch
    relative     lengths in multiples of the L2 norm of a sample's embeddings;  norm  that the
        perturbations have; "": there are none

    Raises TypeError or ValueError for wrong arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None,
        input_range: tuple[float, float] | None = None,
        *,
        batch_axis: int | None = None,
        relative: bool = False,
        norm: str = "",
    ) -> None:
        check_model(model)
        if embedding is not None and all(module is not embedding for module in model.modules()):
            raise ValueError(
                "embedding is not a module of model; pass the one the model calls, "
                "such as model.embedding, or None"
            )
        if input_range is not None and embedding is not None:
            raise ValueError(
                f"input_range={input_range!r} clamps the input itself; leave it out, "
                "or pass embedding=None"
            )
        if input_range is not None:
            ends = tuple(input_range) if isinstance(input_range, Iterable) else ()
            if not (len(ends) == 2 and all(map(checks.is_number, ends)) and ends[0] < ends[1]):
                raise ValueError(f"input_range={input_range!r}; pass (low, high) with low < high")
        axes = BatchAxis(batch_axis)
        relative = checks.flag("relative", relative)
        if relative and norm in ("", "linf"):
            why = (
                ("has no say where no embedding is perturbed")
                if not norm
                else f"measures L2 norms, and norm={norm!r} has none"
            )
            raise ValueError(
                f"relative=True {why}; leave it out" + (", or pass norm='l2'" if norm else "")
            )
        if any(
            isinstance(m, nn.parallel.DistributedDataParallel) and m.static_graph
            for m in model.modules()
        ):
            raise ValueError(
                "static_graph=True makes DDP expect one forward and one backward a "
                "step; wrap the model without static_graph"
            )
        self.model, self.embedding, self.input_range = model, embedding, input_range
        self.axes, self.relative, self.perturbs = axes, relative, bool(norm)
        self._slot: Pass | None = None
        self.closed = False
        self._hook = (
            None
            if embedding is None
            else embedding.register_forward_hook(self._on_embedding, with_kwargs=True)
        )

    def check(self, scale: float | Tensor) -> None:
        """Raises what stands against a call now."""
        if self.closed:
            raise RuntimeError("this is closed: its hook is off the embedding; build a new one")
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "gradients are disabled here; call outside torch.no_grad() and "
                "torch.inference_mode()"
            )
        if isinstance(scale, Tensor):
            if scale.dim() != 0:
                raise ValueError(
                    f"scale has shape {list(scale.shape)}; pass a 0-d tensor or a number"
                )
        elif checks.number("scale", scale) <= 0:
            raise ValueError(
                f"scale={scale!r} turns the perturbation's direction; pass a "
                "positive, finite number"
            )

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self.closed = True

    @contextlib.contextmanager
    def filled(self, pass_: Pass) -> Iterator[Pass]:
        """Turns the pass on inside a `with`: for its forward, and for its backward where that may
        recompute the embedding.
        """
        self._slot = pass_
        try:
            yield pass_
        finally:
            self._slot = None

    def _on_embedding(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> Tensor | None:
        pass_ = self._slot
        if pass_ is None:
            return None
        pass_.calls += pass_.forward
        if pass_.calls > 1:
            raise RuntimeError(
                "the embedding was called twice in one pass, and delta is for one call; pass a "
                "module that is called once"
                + self._of_encoder(" of its own, with the decoder's weight if they are to share it")
            )
        if not isinstance(output, Tensor) or output.dtype not in DTYPES:
            raise TypeError(
                f"the embedding returned {_kind(output)}; pass the module whose output "
                "is the floating tensor to perturb"
            )
        pass_.given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if (
            pass_.repeats > 1
            and isinstance(module, nn.EmbeddingBag)
            and all(value.dim() == 1 for value in pass_.given)
        ):
            raise ValueError(
                "bags that begin at offsets cannot be repeated: copies of the offsets "
                "are no offsets of copies"
            )
        if pass_.batch.axis is None and pass_.delta is not None:
            self.axes.settle(pass_.batch, output, pass_.given)
        return pass_.visit(output)

    def _of_encoder(self, more: str = "") -> str:
        """Returns words on which embedding to pass, for a Transformers model that has two."""
        config = getattr(getattr(self.model, "module", self.model), "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            return ""
        return (
            ". This model is an encoder-decoder: pass the encoder's embedding, "
            f"model.get_encoder().get_input_embeddings(){more}"
        )

    def take(self, inputs: Inputs, labels: Tensor) -> InputBatch:
        """Returns the batch for the passes to come; raises what is wrong with it by itself."""
        checks.labels(labels)
        if labels.dim() == 0:
            raise ValueError(
                "labels have shape (); give one a row: class indices [N], or floats [N] or [N, C]"
            )
        batch = InputBatch(inputs, labels, relative=self.relative)
        lengths = [
            value.shape[0]
            for value in batch.inputs.values()
            if isinstance(value, Tensor) and value.shape
        ]
        if not batch.rows or (lengths and not any(lengths)):
            raise ValueError(
                f"the batch is empty (labels have shape {tuple(labels.shape)}); leave it out"
            )
        return batch

    def call(self, pass_: Pass, repeats: int = 1) -> Tensor:
        """Calls the model once on `repeats` copies of the batch; returns logits [repeats*N, C]."""
        batch, pass_.repeats = pass_.batch, repeats
        pass_.differentiable = torch.is_grad_enabled() and (
            self.perturbs or self.embedding is not None
        )
        values = batch.inputs
        if repeats > 1:
            values = {name: batch.repeated(name, value, repeats) for name, value in values.items()}
        if self.embedding is None:
            name, x = _floating(values)
            pass_.given = [x]
            if batch.axis is None and pass_.delta is not None:
                self.axes.settle(batch, x, pass_.given)
            x = pass_.visit(x)
            if pass_.delta is not None and self.input_range is not None:
                x = x.clamp(*self.input_range)
            values = values | {name: x}
            pass_.calls = 1
        with _told_of_copies(repeats):
            output = self.model(**values) if batch.by_name else self.model(*values.values())
            pass_.forward = False
            if pass_.calls == 0:
                raise RuntimeError(
                    "the hook on the embedding did not run in this pass: the model does not call "
                    "the embedding, or was compiled before the hook was there; pass the module "
                    "that the model calls, and build this before compiling" + self._of_encoder()
                )
            logits = _logits(output)
            _check_logits(logits, batch, repeats)
        if batch.axis is None and pass_.watched and self.perturbs:
            self.axes.settle(batch, pass_.seen, pass_.given)
        return logits

    @contextlib.contextmanager
    def without_sync(self) -> Iterator[None]:
        """Holds the wrappers' synchronisation back inside a `with`, by DDP's or FSDP's no_sync or
        FSDP2's switch; does nothing for a plain model or inside the caller's no_sync.
        """
        with contextlib.ExitStack() as stack:
            for part in filter(_exchanges, synchronisers(self.model)):
                stack.enter_context(
                    part.no_sync() if hasattr(part, "no_sync") else _switched_off(part)
                )
            yield


@contextlib.contextmanager
def _told_of_copies(repeats: int) -> Iterator[None]:
    """Has an error, which goes on, say that the call was on copies of the batch, and what to do."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # a note would do, from Python 3.11
        if repeats > 1:
            remedy = "passes_at_once=1 calls the model on the batch as it is"
            error.args = (f"{error}\n(in a call on {repeats} copies of the batch; {remedy})",)
        raise


def check_model(model: object) -> None:
    """Raises TypeError for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the nn.Module to train")


def why_no_loss(backend: str, device: torch.device) -> str | None:
    """Returns None where the backend can serve the loss, which every step has, of a model on a
    device; else why not and what to do.
    """
    return None if backend == "auto" else why_not(backend, "divergence.uegr_loss", device)


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def synchronisers(model: Any) -> list[Any]:
    """Returns the outermost of DDP's and FSDP's wrappers: the model itself, or those inside it;
    none where one process trains.
    """
    if hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync"):
        return [model]
    return [part for child in model.children() for part in synchronisers(child)]


def synchronises(model: nn.Module) -> bool:
    """Tells whether a backward now would exchange gradients: False for plain models and inside the
    caller's own no_sync.
    """
    return any(map(_exchanges, synchronisers(model)))


def ranks_of(model: nn.Module) -> "torch.distributed.ProcessGroup | None":
    """Returns the process group that trains the model together; None: the default one."""
    return next((getattr(part, "process_group", None) for part in synchronisers(model)), None)


def _exchanges(part: Any) -> bool:
    """Tells whether a wrapper's backward now would exchange gradients."""
    if not getattr(part, "require_backward_grad_sync", True):
        return False
    # FSDP2's switch can be set by public means, not read.
    states = [
        module._get_fsdp_state() for module in part.modules() if hasattr(module, "_get_fsdp_state")
    ]
    groups = [
        group
        for state in states
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        if group
    ]
    return not groups or any(group.reduce_grads for group in groups)


@contextlib.contextmanager
def dropout_rate(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Sets every dropout layer to this rate inside a `with`; None: leaves their own."""
    layers = (
        []
        if rate is None
        else [module for module in model.modules() if isinstance(module, DROPOUTS)]
    )
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
    """Yields what takes the gradient norms pending in every AdaptiveDropout out of it, to be put
    back in the end.

    A pass that runs again after another's backward would fold them in, and drop other units than
    the first time.
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
            # the layer had its size by then
            if len(pending):
                layer.pending.add_(pending)


@contextlib.contextmanager
def buffers_held(model: nn.Module) -> Iterator[None]:
    """Gives buffers and AdaptiveDropout's norms copies inside a `with`, which are dropped with what
    passes write into them.
    """
    owned = [(module, module._buffers) for module in model.modules() if module._buffers]
    layers = [module for module in model.modules() if isinstance(module, AdaptiveDropout)]
    norms = [(layer, layer.gradient_norm, layer.pending) for layer in layers]
    try:
        for module, buffers in owned:
            module._buffers = {
                name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()
            }
        for layer, norm, pending in norms:
            layer.gradient_norm, layer.pending = norm.clone(), pending.clone()
        yield
    finally:
        for module, buffers in owned:
            module._buffers = buffers
        for layer, norm, pending in norms:
            layer.gradient_norm, layer.pending = norm, pending


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _floating(inputs: dict[str, object]) -> tuple[str, Tensor]:
    """Returns the one floating input, after its name or position."""
    found = [
        (name, value)
        for name, value in inputs.items()
        if name != "attention_mask" and isinstance(value, Tensor) and value.is_floating_point()
    ]
    if len(found) != 1:
        raise ValueError(
            f"embedding=None perturbs the one floating input, and here are {len(found)}; pass one, "
            "or name an embedding"
        )
    return found[0]


def _logits(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = (
            output[0]
            if isinstance(output, tuple) and output and not hasattr(output, "logits")
            else getattr(output, "logits", output)
        )
    if not isinstance(logits, Tensor):
        keys = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"the model returned {_kind(output)}{keys}; return logits [N, C], an object with "
            ".logits, a dict with 'logits', or a tuple of them first"
        )
    return logits


def _check_logits(logits: Tensor, batch: InputBatch, repeats: int) -> None:
    """Raises, in words of the model and the labels, for logits that no loss here can take."""
    shape = logits.shape
    if len(shape) != 2 or not shape[1]:
        tokens = (
            ("; a label for every token (token classification) is none of the tasks here")
            if len(shape) == 3
            else ""
        )
        raise ValueError(
            f"the model gave logits of shape {list(shape)}; these methods take [N, "
            f"C], one row a sample{tokens}"
        )
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"the model gave logits of {logits.dtype}; return float32, bfloat16, float16 or float64"
        )
    if shape[0] != repeats * batch.rows:
        times = f"{repeats} x " if repeats > 1 else ""
        raise ValueError(
            f"the model gave {shape[0]} rows of logits for {times}{batch.rows} labels of shape "
            f"{tuple(batch.labels.shape)}; "
            "the batch must be the first dimension of the logits, the labels and every input "
            "tensor (the second of time-first inputs)"
        )
    checks.labels_with(batch.labels, "the logits", logits.device)


def _get_state(device: torch.device) -> Tensor:
    return (
        torch.get_rng_state()
        if device.type == "cpu"
        else torch.get_device_module(device).get_rng_state(device)
    )


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
