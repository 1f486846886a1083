"""What all recipes share: the one interface, and one pass forward and back. A recipe is then
the order of its passes.
"""

import contextlib
import copy
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..bistage import StageOptions
from ..core import checks
from ..divergence import TASKS, LossOptions, LossParts, uegr_loss
from ..passes import (
    InputBatch,
    Inputs,
    Pass,
    Runner,
    buffers_held,
    check_model,
    dropout_rate,
    gradient_norms_held,
    random_state,
    ranks_of,
    replayed,
    why_no_loss,
)
from . import options

T = TypeVar("T")


class Hooked(Protocol):
    """Has hooks on a model until it is closed."""

    def close(self) -> None: ...


@dataclasses.dataclass(eq=False, repr=False)
class Recipe:
    """Trains by a method, with the interface that all have, so that one loop trains with any.

    backward(inputs, labels, *, scale=1.0)  fills .grad; returns the named losses
    prepare(batches)                        before the first step, for methods that look at the data
    before_step(), after_step()             around the optimizer's step; before_step after unscaling
        and clipping
    epoch_end()                             after the last step of an epoch
    state_dict(), load_state_dict(state)    what a resumed run needs besides the model's and the
        optimizer's
    why_not(device)                         what stands against its backend there
    close()                                 takes the hooks off the model

    Weights, modes and hooks are after a call what they were before it, also where an exception
    passes through: a .grad that was None is then None again; one that was there may hold more, and
    wants zero_grad().
    """

    # What a class says of its method, without a model:
    # `backward` steps the optimizer
    steps_itself: ClassVar[bool] = False
    # the update goes to a random selection of elements
    selects_update: ClassVar[bool] = False
    # by options of its own, not the optimizer's
    sets_selection: ClassVar[bool] = False
    # through the model, of a batch with the default options
    passes: ClassVar[int] = 1
    # the option that is the L2 length of a perturbation of the embeddings
    size_option: ClassVar[str | None] = None
    # attributes that a checkpoint carries
    kept: ClassVar[tuple[str, ...]] = ()
    # what of `state_dict` differs between the processes that train one model
    kept_by_each_process: ClassVar[tuple[str, ...]] = ()

    model: nn.Module
    embedding: nn.Module | None
    optimizer: torch.optim.Optimizer | None = None
    backend: str = options.backend()
    # names of the keywords it was built by
    _given: frozenset[str] = dataclasses.field(init=False)
    _runner: Hooked = dataclasses.field(init=False)
    # what the passes are over, while one is
    _taken: InputBatch | None = dataclasses.field(init=False, default=None)

    __signature__ = options.Signature()

    def __new__(cls, *positional: object, **given: object) -> "Recipe":
        named = given.keys() - {"model", "embedding", "optimizer"}
        checks.options(cls.__name__, named, cls.option_names())
        recipe = super().__new__(cls)
        recipe._given = frozenset(given)
        return recipe

    def __post_init__(self) -> None:
        options.check_values(self)
        check_model(self.model)
        if self.optimizer is not None and not (
            hasattr(self.optimizer, "param_groups") and hasattr(self.optimizer, "step")
        ):
            raise TypeError(
                f"optimizer is a {type(self.optimizer).__name__}; pass the torch optimizer "
                "that steps, or None"
            )
        self._settle_options()
        self._runner = self._make_runner()

    @classmethod
    def option_names(cls) -> set[str]:
        """Returns the names of the keywords that the recipe is built with."""
        return options.names_of(cls)

    def why_not(self, device: torch.device) -> str | None:
        """Returns None where the recipe's backend can serve it on a device, else why not and what
        to do.
        """
        return why_no_loss(self.backend, device)

    def _settle_options(self) -> None:
        """Checks what the options say together, before the model has a hook."""

    def _make_runner(self) -> Hooked:
        raise NotImplementedError

    def backward(
        self, inputs: Inputs, labels: Tensor, *, scale: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """Adds scale * the gradient of the method's loss to every parameter's .grad; returns its
        losses.

        inputs  a tensor, a dict for model(**inputs), whose `attention_mask` keeps padding
            unperturbed, or a tuple for model(*inputs)
        labels  [N] int64 or [N, C] probabilities; floats [N] or [N, C] with task="regression"
        scale   positive number, or 0-d tensor (GradScaler's); multiplies the gradient, not what is
            returned

        Returns the losses by name, 0-d, detached and unscaled: "loss", what is minimised, and its
        parts. Under DDP and FSDP the last backward synchronises, and none inside the caller's
        no_sync. Raises as `BiStage.backward`.
        """
        self._check(scale, inputs, labels)
        without = [p for p in self.model.parameters() if p.grad is None]

        def forget_gradients() -> None:
            for p in without:
                p.grad = None

        try:
            with contextlib.ExitStack() as on_error:
                on_error.callback(forget_gradients)
                losses = self._backward(inputs, labels, scale)
                on_error.pop_all()
        finally:
            self._taken = None
        return losses

    def prepare(self, batches: Iterable[tuple[Inputs, Tensor]]) -> None:
        """Does what the method wants with the whole training set, as (inputs, labels), before the
        first step; where it wants nothing, `batches` is left untouched.
        """

    def before_step(self) -> None:
        """Does to the gradients or weights what the method wants ahead of the optimizer's step,
        after unscaling and clipping.
        """

    def after_step(self) -> None:
        """Does what the method wants after the optimizer's step."""

    def epoch_end(self) -> None:
        """Does what the method wants after the last step of an epoch."""

    def state_dict(self) -> dict[str, object]:
        """Returns what a resumed run needs besides the model's and the optimizer's: numbers,
        tensors, lists and dicts of them.
        """
        return {"recipe": type(self).__name__} | self._state()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes over a copy of what `state_dict` gave; raises ValueError for another recipe's,
        before anything has changed.
        """
        names = self._state().keys()
        if state.get("recipe") != type(self).__name__ or state.keys() - {"recipe"} != set(names):
            raise ValueError(
                f"the state is of recipe {state.get('recipe')!r} with "
                f"{sorted(state.keys() - {'recipe'})}, this is {type(self).__name__!r} "
                f"with {sorted(names)}; load it into the recipe that gave it"
            )
        device = device_of(self.model)
        self._load({name: _moved(copy.deepcopy(state[name]), device) for name in names})

    def close(self) -> None:
        """Removes the hooks from the model; the recipe cannot be used afterwards."""
        self._runner.close()

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint carries, by name."""
        return {name: getattr(self, name) for name in self.kept}

    def _load(self, state: dict[str, Any]) -> None:
        """Takes over what `_state` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def _check(self, scale: float | Tensor, inputs: Inputs, labels: Tensor) -> None:
        """Raises what stands against a call now."""

    def _backward(self, inputs: Inputs, labels: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _stepped(self) -> torch.optim.Optimizer:
        """Returns the optimizer, where the method cannot do without."""
        if self.optimizer is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the optimizer; pass it, or set "
                ".optimizer before the first step"
            )
        return self.optimizer


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class PassRecipe(Recipe):
    """Trains by passes through the model, with the options that `help(uk.recipes.plain)` lists.

    model and embedding are as in `BiStage`; embedding=None perturbs the one floating input. The
    model's mode is the caller's in every pass. Build the recipe before `torch.compile`. Raises
    TypeError or ValueError for wrong options, before anything has changed.
    """

    task: str = options.choice(StageOptions.task, TASKS)
    label_smoothing: float = options.number(StageOptions.label_smoothing, 0, 1)
    ignore_index: int = options.integer(StageOptions.ignore_index, -(2**63), bits=63)
    dropout: float | None = options.number(None, 0, 1)
    input_range: tuple[float, float] | None = None
    batch_axis: int | None = None
    relative: bool = options.flag(False)
    _runner: Runner = dataclasses.field(init=False)

    def _settle_options(self) -> None:
        super()._settle_options()
        LossOptions(
            label_smoothing=self.label_smoothing, ignore_index=self.ignore_index, task=self.task
        ).checked()

    def _make_runner(self) -> Runner:
        return Runner(
            self.model,
            self.embedding,
            self.input_range,
            batch_axis=self.batch_axis,
            relative=self.relative,
            norm=self._input_norm(),
        )

    def _input_norm(self) -> str:
        """Returns the norm of the embeddings' perturbation; "": they are not perturbed."""
        return ""

    def _check(self, scale: float | Tensor, inputs: Inputs, labels: Tensor) -> None:
        self._runner.check(scale)
        self._taken = self._runner.take(inputs, labels)

    @property
    def _batch(self) -> InputBatch:
        if self._taken is None:
            raise RuntimeError("no batch is taken: passes run inside of backward()")
        return self._taken

    def _descend(
        self,
        labels: Tensor,
        scale: float | Tensor,
        delta: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        weight: float = 1.0,
        watched: bool = False,
        last: bool = False,
    ) -> tuple[Tensor, Pass]:
        """Runs one pass forward and back: adds scale * weight * the gradient of its loss to .grad;
        returns the loss and what was seen.

        watched  keep the gradient at the embedding;  last  of the step, so that a wrapper
            synchronises
        """
        with (
            contextlib.nullcontext() if last else self._runner.without_sync(),
            self._pass(delta, watched=watched) as pass_,
        ):
            parts = self._loss_of(self._runner.call(pass_), labels)
            (parts.loss * weight * scale).backward()
        return parts.clean_loss, pass_

    def _ascend(
        self,
        labels: Tensor,
        scale: float | Tensor,
        delta: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        at: Tensor | None = None,
    ) -> Pass:
        """Runs one pass forward and back to the embedding alone, for the gradient there: .grad and
        buffers stay as they are.
        """
        with (
            self._runner.without_sync(),
            buffers_held(self.model),
            self._pass(delta, watched=True, at=at) as pass_,
        ):
            parts = self._loss_of(self._runner.call(pass_), labels)
            pass_.keep(*torch.autograd.grad(parts.loss * scale, [pass_.edge], allow_unused=True))
        return pass_

    def _weight_gradients(
        self,
        labels: Tensor,
        scale: float | Tensor,
        weights: Sequence[Tensor],
        delta: Tensor | None = None,
        *,
        ascent: bool,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Returns loss and gradients by `weights` of one pass, beside .grad; an ascent pass leaves
        buffers alone.
        """
        held = buffers_held(self.model) if ascent else contextlib.nullcontext()
        # Asked for the embedding's gradient too, reentrant checkpointing refuses; else it gives its
        # weights none, without a word.
        watched = self._runner.embedding is not None
        with self._runner.without_sync(), held, self._pass(delta, watched=watched) as pass_:
            parts = self._loss_of(self._runner.call(pass_), labels)
            reached: Any = [*weights, pass_.edge] if watched else weights
            found: Sequence[Tensor | None] = torch.autograd.grad(
                parts.loss * scale, reached, allow_unused=True
            )
        gradients = list(found[: len(weights)])
        check_reached(gradients)
        return parts.clean_loss, gradients

    @contextlib.contextmanager
    def _pass(
        self,
        delta: Tensor | Callable[[Tensor], Tensor] | None = None,
        *,
        watched: bool = False,
        at: Tensor | None = None,
    ) -> Iterator[Pass]:
        with (
            dropout_rate(self.model, self.dropout),
            self._runner.filled(Pass(self._batch, delta, watched=watched, at=at)) as pass_,
        ):
            yield pass_

    @contextlib.contextmanager
    def _draws(self, same: bool) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
        """Yields what each pass runs in: with `same`, every pass after the first finds the
        random state that the first found.
        """
        if not same:
            yield contextlib.nullcontext
            return
        states, first = random_state(self.model), True
        with gradient_norms_held(self.model) as hold:

            @contextlib.contextmanager
            def draw() -> Iterator[None]:
                nonlocal first
                if first:
                    first = False
                    yield
                    return
                hold()
                with replayed(states):
                    yield

            yield draw

    def _loss_of(
        self, clean: Tensor, labels: Tensor, others: Sequence[Tensor] | None = None
    ) -> LossParts:
        """Returns the loss of a pass's logits, plus the mean of those of `others`."""
        return uegr_loss(
            clean,
            others,
            labels,
            js_weight=0.0,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            task=self.task,
            return_parts=True,
            backend=self.backend,
        )

    @property
    def _regression(self) -> bool:
        return self.task == "regression"


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def named_parameters(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters whose names match one of the patterns (`*` stands for
    anything); wrappers' prefixes do not count.

    Raises ValueError for a pattern that matches none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    trainable = {
        name: parameter
        for name, parameter in plain_names(model.named_parameters())
        if parameter.requires_grad
    }
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{pattern!r} is a {type(pattern).__name__}; name parameters, such as "
                "'lstm.weight_ih_l0' or '*layer*'"
            )
        if not fnmatch.filter(trainable, pattern):
            raise ValueError(
                f"{pattern!r} matches no trainable parameter; name some of "
                f"{', '.join(trainable)}, with * for anything"
            )
    return {
        name: parameter
        for name, parameter in trainable.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def plain_names(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yields names without what wrappers add to them: DDP in front, torch.compile and activation
    checkpointing anywhere.
    """
    for name, value in named:
        name = ".".join(
            part
            for part in name.split(".")
            if part not in ("_orig_mod", "_checkpoint_wrapped_module")
        )
        while name.startswith("module."):
            name = name.split(".", 1)[1]
        yield name, value


def summed_over_ranks(model: nn.Module, tensors: Sequence[Tensor | None]) -> None:
    """Sums each tensor over the ranks that train the model together, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            if tensor is not None:
                torch.distributed.all_reduce(tensor, group=ranks_of(model))


def write(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Gives weights new values; autocast, which keeps casts of weights until its region ends,
    makes them anew.
    """
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    torch.clear_autocast_cache()


def check_reached(gradients: Sequence[Tensor | None]) -> None:
    """Raises where none of the weights that a method perturbs or masks has a gradient of its
    own.
    """
    if gradients and all(gradient is None for gradient in gradients):
        raise RuntimeError(
            "the loss gives none of the weights to perturb or mask a gradient; name weights that "
            "it depends on, and train whole ones (DDP), not those that FSDP shards"
        )


def check_whole(parameters: Sequence[Tensor], remedy: str) -> None:
    """Raises for sharded parameters, which have no whole tensor to mask."""
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        raise TypeError(
            f"the parameters are sharded (DTensor), and this masks whole ones; {remedy}"
        )


def whole(x: Tensor) -> Tensor:
    """Returns a number that sharded parameters give, on every rank."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def norm_of(tensor: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(
        tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32)
    )
    return length


def recomputed(x: Tensor) -> Tensor:
    """Raises, in the place of a delta while two passes go backward at once: nobody could tell whose
    embedding is computed again.
    """
    raise RuntimeError(
        "the embedding was computed again in the backward of two passes at once; "
        "leave it out of the checkpointed part"
    )


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    return (
        type(value)(_moved(entry, device) for entry in value)
        if isinstance(value, list | tuple)
        else value
    )
