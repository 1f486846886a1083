"""What the losses' kernels are compiled for, and their launches."""

import functools
import typing
from typing import Any

import torch
import triton
from torch import Tensor

from ...core import triton_ops
from ..options import LossOptions
from .blocks import Entry, Form
from .kernels import add_up_kernel, loss_kernel, scale_kernel

# passes of which a thread holds a block each
FEW = 5
# those of which it holds 128 bits each, whatever their dtype
WIDE = 3
# passes of which a row's last block has code of its own
SPLIT = 4
# elements of rows that a program's registers hold
HELD = 16 * 1024
# registers of a thread that hold them, where rows are aligned and where they are not; with more
# some forms spill (compiled)
MOST_ALIGNED, MOST_OTHERS = 72, 60
# Blocks of held rows, times the pairs of passes, that have code each: the time that compiling takes
# grows with the square of it.
MOST_CODE = 12
# with more one has too few registers
MOST_THREADS = 256
# Of passes that are an axis: how long it is where dense or strided rows are held, and the logits of
# a block that a thread holds: of a pass, of all, where other registers are few, and where each has
# an address. With more some forms spill (compiled).
MOST_AXIS, MOST_STRIDED = 8, 4
MOST_RUN, MOST_LOGITS, MOST_CROWDED, MOST_ADDRESSES = 8, 32, 16, 8
# labels up to which every program counts those that are not ignored
COUNTED_BY_EACH = 4096
NO_FORM = Form._make([None] * len(Form._fields))


class PassRows(typing.NamedTuple):
    """Holds the passes of a list of tensors [N, C] or [k, N, C], as kernels take them."""

    tensors: tuple[Tensor, ...]
    row_strides: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "PassRows":
        """Takes the tensors apart into passes."""
        passes = tuple(one for x in tensors for one in (x.unbind() if x.dim() == 3 else (x,)))
        row_strides, strides = zip(*(one.stride() for one in passes), strict=True)
        return cls(tensors=passes, row_strides=row_strides, strides=strides)

    def some(self, at: int) -> "PassRows":
        """Returns the passes from `at` on that a program can hold."""
        few = slice(at, at + WIDE)
        return PassRows(
            tensors=self.tensors[few], row_strides=self.row_strides[few], strides=self.strides[few]
        )

    @property
    def entries(self) -> list[Entry]:
        """Returns each pass's entry in a table."""
        return [
            Entry(address=one.data_ptr(), row_stride=row_stride, stride=stride)
            for one, row_stride, stride in zip(
                self.tensors, self.row_strides, self.strides, strict=True
            )
        ]

    @property
    def dense(self) -> bool:
        """Returns whether the classes of every row are neighbours."""
        return self.tensors[0].shape[1] == 1 or all(stride == 1 for stride in self.strides)

    def aligned(self, run: int) -> bool:
        """Returns whether all rows begin with whole runs of so many elements, and end with one,
        of 16 bytes or more.
        """
        return (
            self.dense
            and self.tensors[0].shape[1] % run == 0
            and all(stride % run == 0 for stride in self.row_strides)
            and all(one.data_ptr() % 16 == 0 for one in self.tensors)
        )

    def in_runs(self, run: int) -> "PassRows":
        """Returns the passes with row strides counted in runs."""
        return self._replace(row_strides=tuple(stride // run for stride in self.row_strides))


class Block(typing.NamedTuple):
    """Holds the part of a form that says what a block is, and a program's warps."""

    AXIS: int
    ROWS: int
    RUNS: int
    RUN: int
    HELD: int
    TAIL: bool
    MASKED: bool
    ALIGNED: bool
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Returns the fields of a block that are a form's."""
        options = self._asdict()
        del options["warps"]
        return options


def _run(passes: int, itemsize: int) -> int:
    """Returns the elements of a pass in a thread, neighbours: 128 bits, or 64 where many passes
    want registers.
    """
    return 16 // itemsize if passes <= WIDE or itemsize > 2 else 4


def _registers(held: bool) -> dict[str, int]:
    """Returns what keeps NVIDIA's assembler from spilling a few registers to reach a round number
    of them, where that buys little: rows that are not held are long, and a processor has a program
    or two for them.
    """
    return {} if held or torch.version.hip else {"maxnreg": 255}


def _block_of_many(
    samples: int, classes: int, passes: int, in_pairs: int, soft: bool, dense: bool, lanes: int
) -> Block:
    axis = triton.next_power_of_2(in_pairs)
    # strided rows have an address for each element
    held = passes * classes <= HELD and (
        axis <= MOST_AXIS if dense else axis <= MOST_STRIDED and not soft
    )
    if held:
        logits = MOST_CROWDED if not dense or (soft and axis == MOST_AXIS) else MOST_LOGITS
    else:
        logits = MOST_LOGITS if dense and axis <= MOST_AXIS else MOST_ADDRESSES
    block = min(
        triton.next_power_of_2(classes), MOST_THREADS * max(1, min(logits // axis, MOST_RUN))
    )
    run = max(block // MOST_THREADS, 1)
    rows = max(1, min(triton.next_power_of_2(samples), MOST_THREADS // block))
    return Block(
        AXIS=axis,
        ROWS=rows,
        RUNS=block // run,
        RUN=run,
        HELD=triton.cdiv(classes, block) if held else 0,
        TAIL=False,
        MASKED=classes % block != 0,
        ALIGNED=False,
        warps=max(rows * block // (lanes * run), 1),
    )


@functools.cache
def _block(
    samples: int,
    classes: int,
    passes: int,
    in_pairs: int,
    soft: bool,
    itemsize: int,
    aligned: bool,
    dense: bool,
    lanes: int,
) -> Block:
    # a mask is as many scalar registers
    each = _run(passes, itemsize) if aligned else min(_run(passes, itemsize), 128 // lanes)
    # an address for each element
    if not dense and passes > WIDE:
        each = min(each, 2)
    block = min(triton.next_power_of_2(classes), MOST_THREADS * each)
    run = min(each, block)
    # several samples in a thread have addresses of their own, by pass
    own = each if passes < WIDE else min(each, 2)
    rows = max(1, min(triton.next_power_of_2(samples), MOST_THREADS * own // block))
    blocks, pairs = triton.cdiv(classes, block), in_pairs * (in_pairs - 1) // 2
    registers = (passes + soft) * blocks * each * itemsize // 4
    held = (
        passes <= FEW
        and passes * classes <= HELD
        and registers <= (MOST_ALIGNED if aligned else MOST_OTHERS)
        and (blocks == 1 or blocks * pairs <= MOST_CODE)
    )
    if in_pairs > 1 and not held:
        many = _block_of_many(samples, classes, passes, in_pairs, soft, dense, lanes)
        if many.HELD or passes > FEW:
            return many
    return Block(
        AXIS=0,
        ROWS=rows,
        RUNS=block // run,
        RUN=run,
        HELD=blocks if held else 0,
        TAIL=classes % block != 0 and passes <= SPLIT,
        MASKED=classes % block != 0 and passes > SPLIT,
        ALIGNED=aligned,
        warps=max(rows * block // (lanes * (own if rows > 1 else each)), 1),
    )


_constexprs = functools.cache(triton_ops.constexprs)


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Returns a GPU's processors, and the bytes of its cache."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _programs(block: Block, passes: PassRows, device: torch.device) -> int:
    """Returns how many programs share the samples. What is visited more than once is to stay in
    the cache until the last visit.
    """
    samples, classes = passes.tensors[0].shape
    tiles: int = triton.cdiv(samples, block.ROWS)
    # the interpreter: a few, for their loops to go round
    if device.type == "cpu":
        return max(1, min(tiles, 3))
    if block.HELD:
        return max(1, min(tiles, 2**31 - 1))
    processors, cache = _device(device)
    row = len(passes.tensors) * classes * passes.tensors[0].element_size()
    return max(1, min(tiles, max(processors, cache // 2 // row)))


def _evaluate(
    logits: list[Tensor],
    labels: Tensor | None,
    gradients: list[Tensor],
    *,
    options: LossOptions,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Computes the loss and its parts; writes the gradients of the logits that need them where
    `gradients` (by tensor) says.
    """
    first = logits[0]
    passes, into = PassRows.of(logits), PassRows.of(gradients)
    (samples, classes), count = passes.tensors[0].shape, len(passes.tensors)
    kind, row_stride, stride = "none", 0, 0
    involved = [passes, into]
    if labels is not None:
        kind, row_stride = "indices", labels.stride(0)
        if labels.is_floating_point():
            kind, stride = "soft", labels.stride(1)
            involved.append(
                PassRows(tensors=(labels,), row_strides=(row_stride,), strides=(stride,))
            )
    run = _run(count, first.element_size())
    aligned = all(x.aligned(run) for x in involved)
    dense = all(x.dense for x in involved)
    block = _block(
        samples,
        classes,
        count,
        count - int(labels is not None) if options.task == "classification" else 0,
        kind == "soft",
        first.element_size(),
        aligned,
        dense,
        triton_ops.lanes(),
    )
    if block.ALIGNED:
        passes, into = passes.in_runs(run), into.in_runs(run)
        row_stride = row_stride // run if kind == "soft" else row_stride
    programs = _programs(block, passes, first.device)
    wide = first.dtype == torch.float64
    dtype, by_row = torch.float64 if wide else torch.float32, options.reduction == "none"
    one_program = programs == 1 and not by_row
    needed = [
        need
        for x, need in zip(logits, needs, strict=True)
        for _ in range(len(x) if x.dim() == 3 else 1)
    ]
    smooth = kind != "none" and options.label_smoothing > 0
    few = count <= FEW and block.AXIS == 0
    form = Form(
        PASSES=count,
        FEW=few,
        STORAGE=triton_ops.DTYPES[first.dtype],
        FIRST=int(labels is not None),
        **block.options,
        DENSE=dense,
        DTYPE=triton_ops.DTYPES[dtype],
        EXACT=first.dtype == dtype,
        REGRESSION=options.task == "regression",
        LABELS=kind,
        SMOOTH=smooth,
        LABEL_SUMS=smooth or kind == "soft",
        NEEDS=sum(need << k for k, need in enumerate(needed)),
        MEAN=options.reduction == "mean",
        BY_ROW=by_row,
        ONE_PROGRAM=one_program,
        IN_PLACE=False,
    )
    clean_form = NO_FORM
    if labels is not None and block.AXIS:
        clean_form = form._replace(PASSES=1, AXIS=0, NEEDS=form.NEEDS & 1)
    kept = None
    if labels is not None and kind == "indices" and options.reduction == "mean":
        if samples > COUNTED_BY_EACH:
            kept = (labels != options.ignore_index).sum()
    loss = first.new_empty((samples,) if by_row else (), dtype=dtype)
    parts = first.new_empty((3, samples) if by_row else (3,), dtype=dtype)
    rows = parts if by_row or one_program else first.new_empty(3 * samples + 1, dtype=dtype)
    weight = triton_ops.bits(options.js_weight)
    table = None
    if not few:
        table = triton_ops.to_device(
            [number for part in (passes, into) for entry in part.entries for number in entry],
            torch.int64,
            first.device,
        )
    with triton_ops.on(first):
        loss_kernel[(programs,)](
            logits_ptrs=passes.tensors if few else None,
            logits_row_strides=passes.row_strides if few else None,
            logits_strides=passes.strides if few else None,
            gradients_ptrs=into.tensors if few else None,
            gradients_row_strides=into.row_strides if few else None,
            gradients_strides=into.strides if few else None,
            table_ptr=table,
            labels_ptr=labels,
            labels_row_stride=row_stride,
            labels_stride=stride,
            count_ptr=kept,
            loss_ptr=loss,
            parts_ptr=rows,
            N=samples,
            C=classes,
            js_weight=weight,
            smoothing=triton_ops.bits(options.label_smoothing),
            ignore_index=options.ignore_index,
            form=_constexprs(form),
            clean_form=_constexprs(clean_form),
            **triton_ops.compile_options(block.warps),
            **_registers(block.HELD > 0),
        )
        if not (by_row or one_program):
            form = NO_FORM._replace(DTYPE=triton_ops.DTYPES[dtype])
            add_up_kernel[(1,)](
                rows_ptr=rows,
                loss_ptr=loss,
                parts_ptr=parts,
                N=samples,
                js_weight=weight,
                form=_constexprs(form),
                **triton_ops.compile_options(8),
            )
    return loss, parts


def uegr_loss(
    logits: list[Tensor], labels: Tensor | None, *, options: LossOptions, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Computes the loss, its parts and the gradients that are needed, as the reference does."""
    into = [x.new_empty(x.shape) if need else x for x, need in zip(logits, needs, strict=True)]
    loss, parts = _evaluate(logits, labels, into, options=options, needs=needs)
    return loss, parts, [x for x, need in zip(into, needs, strict=True) if need]


def uegr_loss_(
    logits: list[Tensor], labels: Tensor | None, *, options: LossOptions, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Computes the loss and its parts, and writes gradients over the logits that need one."""
    return _evaluate(logits, labels, logits, options=options, needs=needs)


def scale_gradients(gradients: list[Tensor], grad_loss: Tensor, parts: Tensor) -> list[Tensor]:
    """Applies the chain rule, as the reference does."""
    scaled = [g.new_empty(g.shape) for g in gradients]
    _scale(gradients, scaled, grad_loss, in_place=False)
    return scaled


def scale_gradients_(gradients: list[Tensor], grad_loss: Tensor) -> None:
    """Applies the chain rule in place; gradients whose factor is 1 are not touched."""
    _scale(gradients, gradients, grad_loss, in_place=True)


def _scale(
    gradients: list[Tensor], scaled: list[Tensor], factor: Tensor, *, in_place: bool
) -> None:
    if len(gradients) > 1 and any(
        g.shape[-2:] != gradients[0].shape[-2:] or g.dtype != gradients[0].dtype for g in gradients
    ):
        # those of hidden states, weight and bias
        for g, into in zip(gradients, scaled, strict=True):
            _scale([g], [into], factor, in_place=in_place)
        return
    if not gradients or gradients[0].numel() == 0:
        return
    if gradients[0].dim() == 1:
        gradients, scaled = ([x[None] for x in some] for some in (gradients, scaled))
    passes, results = PassRows.of(gradients), PassRows.of(scaled)
    for at in range(0, len(passes.tensors), WIDE):
        _scale_passes(passes.some(at), results.some(at), factor, in_place)


def _scale_passes(passes: PassRows, into: PassRows, factor: Tensor, in_place: bool) -> None:
    first, count = passes.tensors[0], len(passes.tensors)
    (samples, classes), run = first.shape, _run(count, first.element_size())
    aligned = passes.aligned(run) and into.aligned(run)
    if aligned:
        passes, into = passes.in_runs(run), into.in_runs(run)
    dense, lanes = passes.dense and into.dense, triton_ops.lanes()
    block = _block(samples, classes, count, 0, False, first.element_size(), aligned, dense, lanes)
    by_row = factor.dim() > 0
    form = NO_FORM._replace(
        PASSES=count,
        FEW=True,
        **block.options,
        DENSE=dense,
        DTYPE=triton_ops.DTYPES[factor.dtype],
        BY_ROW=by_row,
        IN_PLACE=in_place,
    )
    pieces = triton.cdiv(samples, block.ROWS) * triton.cdiv(classes, block.RUNS * block.RUN)
    programs = min(pieces, 3 if first.device.type == "cpu" else 2**16)
    with triton_ops.on(first):
        scale_kernel[(programs,)](
            gradients_ptrs=passes.tensors,
            gradients_row_strides=passes.row_strides,
            gradients_strides=passes.strides,
            scaled_ptrs=into.tensors,
            scaled_row_strides=into.row_strides,
            scaled_strides=into.strides,
            factor_ptr=factor,
            factor_stride=factor.stride(0) if by_row else 0,
            N=samples,
            C=classes,
            form=_constexprs(form),
            **triton_ops.compile_options(block.warps),
        )
