"""Algorithm 1's forward stage in one call: Eq. 2 to 6, composed of the operators' own functions."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batch_axis import InputBatch, Inputs
from .core import checks
from .divergence import LossOptions, uegr_loss
from .passes import (
    Pass,
    Runner,
    dropout_rate,
    gradient_norms_held,
    random_state,
    replayed,
    synchronisers,
)
from .perturbation import NORMS, PERS, fgm_perturbation


class BiStageResult(NamedTuple):
    """Holds what `BiStage.backward` returns: detached, not multiplied by `scale`, not weighted.

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


class _PerturbationKeywords(TypedDict):
    epsilon: float
    norm: str
    per: str
    backend: str


class _LossKeywords(TypedDict):
    js_weight: float
    label_smoothing: float
    ignore_index: int
    task: str
    backend: str


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class StageOptions:
    """Holds the options of `BiStage`, which `uk.recipes.uegr` hands on to it."""

    epsilon: float = 0.1
    passes: int = 2
    js_weight: float = LossOptions.js_weight
    norm: str = "l2"
    per: str = "sample"
    label_smoothing: float = LossOptions.label_smoothing
    ignore_index: int = LossOptions.ignore_index
    task: str = LossOptions.task
    passes_at_once: int | None = None
    dropout: Sequence[float] | None = None
    input_range: tuple[float, float] | None = None
    batch_axis: int | None = None
    relative: bool = False
    backend: str = "auto"


@dataclasses.dataclass(eq=False, repr=False)
class BiStage(StageOptions):
    """Computes L_train = L_st + L_adv + js_weight * L_div, Algorithm 1's first stage (Eq. 2-6).

    model           nn.Module from inputs to logits [N, C] (or what has them as `.logits`,
                    ["logits"] or first item)
    embedding       nn.Module in it whose output is perturbed; None: the one floating input itself
    epsilon, norm, per   the size of delta, as in `fgm_perturbation`
    passes          m >= 1 adversarial passes, each with its own dropout mask
    js_weight, label_smoothing, ignore_index, task   as in `uegr_loss`
    passes_at_once  at most so many in one call of the model, to save memory; None: all m
    dropout         m rates in [0, 1], one per pass, for every dropout layer; None: the layers' own
    input_range     (low, high) to which the perturbed input is clamped; with embedding=None only
    batch_axis      of the embedding's output: 0, or 1 for time-first models; None: found by N
    relative        True: epsilon in multiples of the L2 norm of each sample's embeddings ("l2")

    Inputs are a tensor, a dict for model(**inputs), whose `attention_mask` [N, T] masks delta, or a
    tuple for model(*inputs). Tensors whose first dimension is N are repeated for the passes, for
    time-first models those whose second is. The model's mode is the caller's. Build it before
    `torch.compile`. Embeddings and logits: float32, bfloat16, float16 or float64; losses float32
    (float64 for float64). Raises TypeError or ValueError for wrong arguments, RuntimeError for a
    pass in which the embedding was not called exactly once, or a backend that cannot serve.

    Equivalent to `uegr_loss` of the clean logits and of m passes with `fgm_perturbation` added.
    """

    model: nn.Module
    embedding: nn.Module | None

    def __post_init__(self) -> None:
        self.passes = passes = checks.integer("passes", self.passes, 1)
        at_once = checks.integer("passes_at_once", self._at_once, 1)
        dropout = self.dropout
        if dropout is not None and (not isinstance(dropout, Sequence) or isinstance(dropout, str)):
            raise TypeError(
                f"dropout={dropout!r} is not a sequence; pass one rate per pass, such "
                f"as {[0.3] * passes}"
            )
        if dropout is not None and (
            len(dropout) != passes
            or not all(checks.is_number(rate) and 0 <= rate <= 1 for rate in dropout)
        ):
            raise ValueError(
                f"dropout={dropout!r} with passes={passes}; pass one rate in [0, 1] "
                f"per pass, such as {[0.3] * passes}"
            )
        if dropout is not None:
            self.dropout = [float(rate) for rate in dropout]
        self.passes_at_once = min(at_once, passes)
        checks.choice("norm", self.norm, NORMS)
        checks.choice("per", self.per, PERS)
        self.epsilon = checks.number("epsilon", self.epsilon, 0)
        loss = LossOptions(
            js_weight=self.js_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            task=self.task,
        ).checked()
        self.js_weight, self.label_smoothing = loss.js_weight, loss.label_smoothing
        self.ignore_index = loss.ignore_index
        checks.backend(self.backend)
        self._runner = Runner(
            self.model,
            self.embedding,
            self.input_range,
            batch_axis=self.batch_axis,
            relative=self.relative,
            norm=self.norm,
        )

    @property
    def _at_once(self) -> int:
        return self.passes if self.passes_at_once is None else self.passes_at_once

    @property
    def _perturbation(self) -> _PerturbationKeywords:
        return {
            "epsilon": self.epsilon,
            "norm": self.norm,
            "per": self.per,
            "backend": self.backend,
        }

    @property
    def _loss(self) -> _LossKeywords:
        return {
            "js_weight": self.js_weight,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "task": self.task,
            "backend": self.backend,
        }

    def backward(
        self, inputs: Inputs, labels: Tensor, *, scale: float | Tensor = 1.0
    ) -> BiStageResult:
        """Adds scale * dL_train/dtheta to every parameter's .grad; each row goes back once.

        inputs  as the class says
        labels  [N] int64 or [N, C] probabilities; floats [N] or [N, C] with task="regression"
        scale   positive number, or 0-d tensor (GradScaler's); multiplies the gradient, not what is
            returned

        With `passes_at_once` below m every pass runs first without a graph for its logits, then
        again with the same random state: (1 + 2m) N rows forward, one graph alive, the same
        gradient. Under DDP and FSDP only the last backward synchronises, and none inside the
        caller's no_sync; different rates then cost what passes_at_once=1 does. Raises RuntimeError
        where the embedding was not called, or twice, in a pass. Equivalent to: `(scale *
        stage.loss(inputs, labels)).backward()`.
        """
        self._runner.check(scale)
        batch = self._runner.take(inputs, labels)
        with self._runner.without_sync():
            with self._runner.filled(Pass(batch, watched=True)) as pass_:
                clean = self._runner.call(pass_)
                (uegr_loss(clean, None, labels, **self._loss) * scale).backward()
            # a CUDA graph may write the next call's logits over the old
            clean = clean.detach().clone()
            delta = self._delta(pass_)
        groups = self._groups()
        # A wrapper that synchronises allows for one backward after each forward, not for several
        # forwards first.
        again = self._at_once < self.passes or (len(groups) > 1 and bool(synchronisers(self.model)))
        # logits and the slot's content of each
        calls: list[tuple[Tensor, Pass]] = []
        states = []
        for group in groups:
            with contextlib.ExitStack() as stack:
                if again:
                    stack.enter_context(self._runner.without_sync())
                    stack.enter_context(torch.no_grad())
                    states.append(random_state(self.model))
                calls.append(self._adversarial(batch, delta, group))
        logits = (
            torch.cat([logits.detach() for logits, _ in calls])
            .unflatten(0, (self.passes, -1))
            .requires_grad_()
        )
        parts = uegr_loss(clean, logits, labels, return_parts=True, **self._loss)
        (parts.loss * scale).backward()
        # One backward per call, so that a recompute inside it finds that call's delta and dropout
        # rate.
        with (
            gradient_norms_held(self.model)
            if again
            else contextlib.nullcontext(lambda: None) as hold
        ):
            for i, group in enumerate(groups):
                with (
                    self._runner.without_sync() if i + 1 < len(groups) else contextlib.nullcontext()
                ):
                    if again:
                        hold()
                        with replayed(states[i]):
                            group_logits, pass_ = self._adversarial(batch, delta, group)
                    else:
                        # no graph outlives its backward
                        group_logits, pass_ = calls.pop(0)
                    with self._rate(group), self._runner.filled(pass_):
                        group_logits.backward(logits.grad[group.start : group.stop].flatten(0, 1))
        return BiStageResult(
            parts.loss.detach(), parts.clean_loss, parts.adversarial_loss, parts.divergence, clean
        )

    def loss(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """Returns L_train [], differentiable in the parameters, for a backward() of one's own.

        inputs, labels  as in `backward`

        delta is data. The clean pass runs back to the embedding once more than in `backward`.
        All graphs live until the caller's backward(), or, with `passes_at_once` below m, are made
        again in it one by one. A model that recomputes its embedding by activation checkpointing,
        or recomputes dropout layers while `dropout` is set, needs `backward`.
        """
        self._runner.check(1.0)
        batch = self._runner.take(inputs, labels)
        with self._runner.without_sync(), self._runner.filled(Pass(batch, watched=True)) as pass_:
            clean = self._runner.call(pass_)
            alone = uegr_loss(clean, None, labels, **self._loss)
            pass_.keep(
                *torch.autograd.grad(alone, [pass_.edge], retain_graph=True, allow_unused=True)
            )
        delta = self._delta(pass_)

        def logits_of(group: range) -> Tensor:
            if self._at_once == self.passes:
                return self._adversarial(batch, delta, group)[0]
            again: tuple[Tensor, Pass] = checkpoint(
                self._adversarial, batch, delta, group, use_reentrant=False
            )
            return again[0]

        logits = torch.cat([logits_of(group) for group in self._groups()]).unflatten(
            0, (self.passes, -1)
        )
        loss: Tensor = uegr_loss(clean, logits, labels, **self._loss)
        return loss

    def __repr__(self) -> str:
        embedding = None if self.embedding is None else type(self.embedding).__name__
        options = {
            **self._perturbation,
            **self._loss,
            "passes": self.passes,
            "passes_at_once": self.passes_at_once,
            "dropout": self.dropout,
            "input_range": self.input_range,
            "batch_axis": self._runner.axes.asked,
            "relative": self._runner.relative,
        }
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return (
            f"BiStage({type(self.model).__name__}, {embedding}, "
            f"{words}{', closed' if self._runner.closed else ''})"
        )

    def close(self) -> None:
        """Removes the hook from the embedding; the BiStage cannot be used afterwards."""
        self._runner.close()

    def _adversarial(self, batch: InputBatch, delta: Tensor, group: range) -> tuple[Tensor, Pass]:
        """Returns the logits [k*N, C] of k passes in one call, and the pass that its backward
        needs.
        """
        with self._rate(group), self._runner.filled(Pass(batch, delta, watched=False)) as pass_:
            return self._runner.call(pass_, len(group)), pass_

    def _delta(self, pass_: Pass) -> Tensor:
        """Returns Eq. 2's delta, from the gradient that the clean pass left."""
        return pass_.ascended(lambda g: fgm_perturbation(g, mask=pass_.mask, **self._perturbation))

    def _groups(self) -> list[range]:
        """Returns the passes of each call of the model."""
        size = 1 if self.dropout is not None and len(set(self.dropout)) > 1 else self._at_once
        return [
            range(first, min(first + size, self.passes)) for first in range(0, self.passes, size)
        ]

    def _rate(self, group: range) -> contextlib.AbstractContextManager[None]:
        """Sets every dropout layer to the rate of these passes inside a `with`."""
        return dropout_rate(self.model, None if self.dropout is None else self.dropout[group.start])
