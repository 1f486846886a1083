"""The batch that passes are over, and along which axis of the embedding's output it lies."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .core import checks

# for model(inputs), model(**inputs) and model(*inputs)
Inputs = Tensor | Mapping[str, object] | Sequence[object]


class InputBatch:
    """Holds what the passes of one batch share: how many rows it has, and along which axes they
    lie.

    inputs, labels  by name, or by position in digits where not `by_name`;  rows  N, one label each
    mask            the inputs' `attention_mask`, where that is a tensor
    axis            of the embedding's output that is the batch; None: not found yet
        (`BatchAxis.settle`)
    inputs_axis     of the inputs that is the batch;  length  of the embedding's output along its
        other axis
    relative        perturbations are measured in multiples of the L2 norm of a sample's embeddings
    keeps_output    what the embedding gave is read after the pass, in which the model may write
        into it
    """

    def __init__(self, inputs: Inputs, labels: Tensor, *, relative: bool) -> None:
        self.labels, self.relative, self.keeps_output = labels, relative, relative
        self.by_name = isinstance(inputs, Mapping)
        self.inputs: dict[str, object]
        if isinstance(inputs, Mapping):
            self.inputs = dict(inputs)
        else:
            values = inputs if isinstance(inputs, tuple | list) else (inputs,)
            self.inputs = {str(i): value for i, value in enumerate(values)}
        mask = self.inputs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) else None
        self.rows = labels.shape[0]
        self.axis: int | None = None
        self.inputs_axis, self.length = 0, -1

    def first(self, x: Tensor) -> Tensor:
        """Returns the embedding's output, or what has its axes, with the batch first; what is so
        already, as the model has it.
        """
        return x.transpose(0, 1) if self.axis == 1 else x

    def repeated(self, name: str, value: object, repeats: int) -> object:
        """Returns one input, of so many copies of the batch; a value without the batch's rows is
        passed on.
        """
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        second = (
            self.inputs_axis == 1
            and value.dim() > 1
            and value.shape[1] == self.rows
            and name != "attention_mask"
        )
        if second and (value.shape[0] == self.length or value.shape[0] != self.rows):
            return value.repeat(1, repeats, *[1] * (value.dim() - 2))
        return (
            value.repeat(repeats, *[1] * (value.dim() - 1))
            if value.shape[0] == self.rows
            else value
        )


class Axes(NamedTuple):
    """Names the axes, 0 or 1, along which a batch lies.

    output  of the embedding's output;  inputs  of the inputs
    """

    output: int
    inputs: int


class BatchAxis:
    """Finds the axes of batch after batch, and remembers those of one that left no doubt.

    asked  axis of the embedding's output, 0 or 1; None: found by its shape, and where that leaves
           a choice by what the embedding was called with

    Raises TypeError or ValueError for another value.
    """

    def __init__(self, asked: int | None) -> None:
        if asked is not None:
            asked = checks.integer("batch_axis", asked)
        if asked not in (None, 0, 1):
            raise ValueError(f"batch_axis={asked} is not one of its values; pass 0, 1 or None")
        self.asked = asked
        self._known: Axes | None = None

    def settle(self, batch: InputBatch, x: Tensor, given: list[Tensor]) -> None:
        """Finds the batch's axes from the embedding's output x and what it was called with;
        checks the mask.
        """
        shape, n, asked = list(x.shape), batch.rows, self.asked
        # of [N, d] the second is no batch
        fits = [axis for axis in (0, 1) if x.dim() > 2 * axis and shape[axis] == n]
        if not fits or asked not in (None, *fits):
            raise ValueError(
                f"the embedding's output is {shape} and the labels are for {n} rows, which "
                + ("its first two axes are not" if not fits else f"axis batch_axis={asked} is not")
                + "; give one label a row, and an embedding whose output has the batch as its "
                "first axis, or as its second (batch_axis=1)"
            )
        if len(fits) == 1:
            batch.length = shape[1 - fits[0]] if x.dim() > 2 else -1
            turned = (batch.length, n) in [value.shape[:2] for value in _tensors(batch.inputs)]
            self._known = axes = Axes(fits[0], int(batch.length >= 0 and turned))
        else:
            batch.length = n
            axes = self._chosen(batch, shape, given)
        batch.axis, batch.inputs_axis = axes
        _check_mask(batch, x)

    def _chosen(self, batch: InputBatch, shape: list[int], given: list[Tensor]) -> Axes:
        """Returns the axes where either of the output's first two can be the batch."""
        as_inputs = None if self._known else _as_inputs(given, batch.inputs)
        if self.asked is not None:
            axis = self.asked
        elif self._known is not None:
            axis = self._known.output
        # For one text of one word the axes differ only in where copies go; a pass's delta tells if
        # that guess was wrong.
        elif as_inputs is None and batch.rows > 1:
            raise ValueError(
                f"the embedding's output is {shape} for {batch.rows} rows: either of its first two "
                "axes can be the batch; pass batch_axis=0, or batch_axis=1 for a model that looks "
                "words up time-first"
            )
        else:
            axis = int(as_inputs is False)
        if self._known is not None and self._known.output == axis:
            return self._known
        if as_inputs is None:
            return Axes(axis, 0)
        return Axes(axis, axis if as_inputs else 1 - axis)


def _check_mask(batch: InputBatch, x: Tensor) -> None:
    """Raises ValueError for a mask that is not [N, T] of the embedding's output x."""
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != batch.first(x).shape[:2] or mask.dim() != 2:
        its = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {its}, and the embedding's output, batch first, "
            f"{tuple(batch.first(x).shape)}; give [N, T], "
            "nonzero where a token is real"
        )
    if mask.device != x.device:
        raise ValueError(
            f"attention_mask is on {mask.device} and the embedding's output on "
            f"{x.device}; move it with .to()"
        )


def _tensors(inputs: dict[str, object]) -> list[Tensor]:
    """Returns the inputs that can have a batch and a length."""
    return [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at values
def _as_inputs(given: list[Tensor], inputs: dict[str, object]) -> bool | None:
    """Tells whether what a module was called with has its first two axes in the order of the
    inputs; None: nobody can tell.
    """
    found = set()
    for x in given:
        for value in _tensors(inputs):
            if x is value:
                return True
            if x.dim() > 1 and x.shape[:2] != (1, 1):
                if x.is_set_to(value):
                    return True
                if x.transpose(0, 1).is_set_to(value):
                    return False
                straight, turned = _same_rows(x, value), _same_rows(x.transpose(0, 1), value)
                if straight != turned:
                    found.add(straight)
    return found.pop() if len(found) == 1 else None


def _same_rows(x: Tensor, y: Tensor) -> bool:
    """Tells whether the rows of one begin as those of the other do, whatever shape they have."""
    x, y = x.flatten(1), y.to(x.device).flatten(1)
    shared = min(x.shape[1], y.shape[1])
    return len(x) == len(y) and bool((x[:, :shared] == y[:, :shared]).all())
