"""The selective step's tables and launches: any number of tensors by a handful of launches."""

import array
import collections
import dataclasses
import itertools
import math
import operator
import typing
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...core import triton_ops
from .kernels import (
    COLUMNS,
    CONSTANTS,
    HEAD,
    LANES,
    NUMBERS,
    PIECE,
    TABLE,
    TABLES,
    Form,
    count_kernel,
    join_kernel,
    keep_kernel,
    prepare_kernel,
    tabulate_kernel,
    update_kernel,
)

SMALLEST_PROBABILITY = 2.0**-24  # the step of u
SAMPLED = 2**20  # a rank over more elements than this takes every k-th
DTYPES = triton_ops.DTYPES | {torch.uint8: tl.int8}  # a mask is written as bytes


class TensorLists(typing.NamedTuple):
    """Holds a call's lists of tensors, empty or of one length: the elementwise ones, the steps,
    the kept extremes; the gradients last.
    """

    theta: Sequence[Tensor]
    moment1: Sequence[Tensor]
    moment2: Sequence[Tensor]
    moment3: Sequence[Tensor]
    s: Sequence[Tensor]
    step: Sequence[Tensor]
    low: Sequence[Tensor]
    high: Sequence[Tensor]
    g: Sequence[Tensor]

    @property
    def elementwise(self) -> tuple[Sequence[Tensor], ...]:
        """Returns those with an element for each of a gradient's, in the order of
        `strided_elements`.
        """
        return *self[:5], self.g

    def of(self, i: int) -> "OneOfEach":
        """Returns the lists' tensors i."""
        return OneOfEach(*(tensors[i] if tensors else None for tensors in self))


class OneOfEach(typing.NamedTuple):
    """Holds a tensor of each list; None: there is no such list."""

    theta: Tensor | None
    moment1: Tensor | None
    moment2: Tensor | None
    moment3: Tensor | None
    s: Tensor | None
    step: Tensor | None
    low: Tensor | None
    high: Tensor | None
    g: Tensor | None

    @property
    def elementwise(self) -> tuple[Tensor | None, ...]:
        return *self[:5], self.g

    def check(self, parameter: int) -> None:
        """Raises what a kernel would not survive."""
        g = typing.cast(Tensor, self.g)
        for name, tensor in zip(ELEMENTS, self[:5], strict=True):
            if tensor is not None and (tensor.shape != g.shape or tensor.device != g.device):
                raise ValueError(
                    f"parameter {parameter}: its {name} has shape {tuple(tensor.shape)} on "
                    f"{tensor.device}, its gradient {tuple(g.shape)} on {g.device}; they must be "
                    "equal"
                )
        for name, tensor in zip(ELEMENTS[:4], self[:4], strict=True):
            if tensor is not None and triton_ops.expanded(tensor):
                raise ValueError(
                    f"parameter {parameter}: its {name} is expanded and cannot be written; call "
                    ".clone() on it first"
                )
        for name, tensor in zip(SCALARS, self[5:8], strict=True):
            if tensor is not None and (tensor.numel() != 1 or tensor.device != g.device):
                raise ValueError(
                    f"parameter {parameter}: its {name} has {tensor.numel()} elements on "
                    f"{tensor.device}; give one element on {g.device}"
                )


ELEMENTS = ("value", "first moment", "second moment", "third moment", "saliency")
SCALARS = ("step", "kept minimum", "kept maximum")


class Round(typing.NamedTuple):
    """Holds the items of a launch of `update_kernel`, and their number."""

    items: Tensor
    number: int


class Family:
    """Holds tensors of like dtypes, by their positions in a call: their rows, the items of each
    round, and room to work in.
    """

    def __init__(
        self,
        form: Form,
        positions: list[int],
        lists: TensorLists,
        layout: list[int],
        sizes: list[int],
        device: torch.device,
    ):
        self.form, self.constexprs = form, triton_ops.constexprs(form)
        self.tensors = len(positions)
        elements = [lists.g[i].numel() for i in positions]
        columns = {
            name: [tensors[i].data_ptr() for i in positions]
            for name, tensors in zip(COLUMNS[:8], lists[:8], strict=True)
            if tensors
        }
        columns |= {
            name: [layout[4 * i + k] for i in positions]
            for k, name in enumerate(("stream", "offset", "run", "stride"))
        }
        columns["run"] = [max(run, 1) for run in columns["run"]]
        columns["every"] = [
            n // SAMPLED | 1 if n > SAMPLED else 1
            for n in ([sizes[i] for i in positions] if sizes else elements)
        ]
        columns |= {"size": elements, "position": positions}
        if form.STRIDED:
            axes = [_axes(lists.of(i).elementwise) for i in positions]
            self.axes = triton_ops.to_device(
                [x for each in axes for x in each], torch.int64, device
            )
            columns["axes"] = [
                self.axes.data_ptr() + 8 * at
                for at in itertools.accumulate(map(len, axes[:-1]), initial=0)
            ]
        table = [columns.get(name, [0] * self.tensors) for name in COLUMNS]
        self.rows = triton_ops.to_device(
            [x for row in zip(*table, strict=True) for x in row], torch.int64, device
        )
        wide = form.DTYPE == tl.float64
        self.bits = torch.empty(
            self.tensors, 2, dtype=torch.int64 if wide else torch.int32, device=device
        )
        self.constants = torch.empty(
            self.tensors,
            CONSTANTS.value,
            dtype=torch.float64 if wide else torch.float32,
            device=device,
        )
        self.counts = torch.empty(self.tensors, dtype=torch.int32, device=device)
        own = form.NORMALIZATION == "rank" and form.SOURCE == "own"
        self.tables = torch.empty(
            min(self.tensors, TABLES.value) if own else 0,
            TABLE.value,
            dtype=torch.float32,
            device=device,
        )
        parts = _rounds(form, elements, lists.g[positions[0]].element_size())
        # 16 bytes from one start to the next
        starts = list(
            itertools.accumulate((len(part) + len(part) % 2 for part in parts), initial=0)
        )
        together = torch.zeros(starts[-1], 2, dtype=torch.int32)
        for part, start in zip(parts, starts, strict=False):
            together[start : start + len(part)] = part
        together = triton_ops.to_device(together, torch.int32, device)
        self.rounds = [
            Round(together[start:], len(part)) for part, start in zip(parts, starts, strict=False)
        ]

    def launch(
        self, call: "Call", head: Tensor, scalars: list[Tensor | None], scope_tables: Tensor
    ) -> None:
        """Launches everything over these tensors, as the kernels' header says; `scalars`: learning
        rate and betas that live on the device.
        """
        form, programs, out = self.form, -(-self.tensors // LANES.value), call.out
        room, rest = (self.bits, self.constants, self.counts), (call.grad_scale, call.found_inf)
        options = {"form": self.constexprs, "num_warps": triton_ops.WARPS}
        prepare_kernel[(programs,)](
            head, self.rows, *room, self.tensors, *scalars, call.found_inf, **options
        )
        if form.NORMALIZATION == "rank" and form.RULE == "statistics":
            for items, n in self.rounds:
                if n and out is not None:
                    count_kernel[(n,)](
                        head, self.rows, items, out, *rest, MANY=len(out) > 1, **options
                    )
            return
        for k, (items, n) in enumerate(self.rounds):
            tables = scope_tables
            if form.NORMALIZATION == "rank" and form.SOURCE == "own":
                tables = self.tables[: self.tensors - k * TABLES.value].zero_()
                counts = tables.view(torch.int32)
                if n:
                    count_kernel[(n,)](head, self.rows, items, counts, *rest, MANY=False, **options)
                tabulate_kernel[(len(tables),)](head, counts, tables, num_warps=16)
            if n:
                gathers = form.SOURCE in ("own", "kept") and form.NORMALIZATION != "rank"
                # two draws an element: with fewer warps sm_100 spills
                warps = triton_ops.WARPS * (2 if form.ROUNDING else 1)
                update_kernel[(n,)](
                    head,
                    self.rows,
                    items,
                    *room,
                    call.scope,
                    tables,
                    *rest,
                    GATHERS=gathers,
                    form=self.constexprs,
                    num_warps=warps,
                )
        if out is not None:
            join_kernel[(1,)](self.rows, self.bits, out, self.tensors, MANY=len(out) > 1, **options)
        elif form.KEPT is not None:
            keep_kernel[(programs,)](self.rows, self.bits, self.tensors, call.found_inf, **options)


def _items(elements: list[int], tensors: range, *, gathers: bool) -> Tensor:
    """Returns the items of a run of tensors. Updates go backwards: what was gathered last is still
    in the cache.
    """
    items = triton_ops.pieces([triton.cdiv(elements[i], PIECE.value) for i in tensors])
    items[:, 0] += tensors.start
    if gathers:
        items[:, 0] = -1 - items[:, 0]
        return items
    return items.flip(0)


def _rounds(form: Form, elements: list[int], width: int) -> list[Tensor]:
    """Returns the items of each round; what a round updates was gathered by those before it."""
    every = range(len(elements))
    if form.NORMALIZATION == "rank":
        own = form.SOURCE == "own"
        groups = (
            [every[i : i + TABLES.value] for i in range(0, len(every), TABLES.value)]
            if own
            else [every]
        )
        return [_items(elements, group, gathers=False) for group in groups]
    updates = [_items(elements, every, gathers=False)] if form.RULE != "statistics" else []
    if form.NORMALIZATION == "constant" or form.SOURCE in ("scope", "scopes"):
        return updates
    if form.SOURCE == "kept" or form.RULE == "statistics":
        return [_items(elements, every, gathers=True), *updates]
    groups = []
    total = 0
    for i, n in enumerate(elements):
        if not groups or total + n * width > triton_ops.GROUP_BYTES:
            groups.append(range(i, i))
            total = 0
        groups[-1] = range(groups[-1].start, i + 1)
        total += n * width
    gathered = [_items(elements, group, gathers=True) for group in groups]
    updated = [_items(elements, group, gathers=False) for group in groups]
    return [
        gathered[0],
        *(
            _interleaved(a, b)
            for a, b in itertools.zip_longest(updated, gathered[1:], fillvalue=gathered[0][:0])
        ),
    ]


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    """Returns both, spread evenly: reading and writing share the machine."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / max(len(part), 1) for part in (a, b)])
    return torch.cat((a, b))[places.argsort(stable=True)]


def _axes(tensors: Sequence[Tensor | None]) -> list[int]:
    """Returns how many axes, then by axis, the innermost first, its size and every list's stride;
    axes that are one in all lists are joined.
    """
    shape = next(t for t in tensors if t is not None).shape
    axes: list[list[int]] = []
    for d in reversed(range(len(shape))):
        strides = [0 if t is None else t.stride(d) for t in tensors]
        if shape[d] == 1:
            continue
        if axes and all(
            outer == axes[-1][0] * inner for outer, inner in zip(strides, axes[-1][1:], strict=True)
        ):
            axes[-1][0] *= shape[d]
        else:
            axes.append([shape[d], *strides])
    return [len(axes), *(x for axis in axes for x in axis)]


class Plan:
    """Holds what a call needs on the device for as long as its tensors stand where they stand."""

    def __init__(
        self,
        moving: tuple[object, ...],
        standing: tuple[object, ...],
        planes: list[int],
        form: Form,
        lists: TensorLists,
        layout: list[int],
        sizes: list[int],
    ):
        self.moving, self.standing, self.planes, self.form = moving, standing, planes, form
        self.device = lists.g[0].device
        families: dict[Form, list[int]] = collections.defaultdict(list)
        for i in range(len(lists.g)):
            each = lists.of(i)
            each.check(layout[4 * i])
            families[_form_of(form, each)].append(i)
        self.families = [
            Family(one, positions, lists, layout, sizes, self.device)
            for one, positions in families.items()
        ]
        self.upload = triton_ops.Upload(HEAD.value + len(lists.g), self.device)
        self.tables = torch.empty(0, TABLE.value, dtype=torch.float32, device=self.device)

    def launch(self, call: "Call", head: Tensor, scalars: list[Tensor | None]) -> None:
        """Launches everything that a call needs."""
        if call.scope is not None and call.selection.normalization == "rank":
            if len(self.tables) != len(call.scope):
                self.tables = torch.empty(
                    len(call.scope), TABLE.value, dtype=torch.float32, device=self.device
                )
            tabulate_kernel[(len(call.scope),)](head, call.scope, self.tables, num_warps=16)
        for family in self.families:
            family.launch(call, head, scalars, self.tables)


def _form_of(form: Form, each: OneOfEach) -> Form:
    """Returns a call's form with what its tensors are."""
    dtypes = OneOfEach(*(None if t is None else DTYPES[t.dtype] for t in each))
    return form._replace(
        THETA=dtypes.theta,
        MOMENT1=dtypes.moment1,
        MOMENT2=dtypes.moment2,
        MOMENT3=dtypes.moment3,
        S=dtypes.s,
        G=dtypes.g,
        STEP=dtypes.step,
        KEPT=dtypes.low,
        STRIDED=not all(t is None or t.is_contiguous() for t in each.elementwise),
        ROUNDING=tl.bfloat16 in (dtypes.moment1, dtypes.moment2, dtypes.moment3),
    )


# Plans of optimizers live as long as their first parameter's step tensor; a few of other calls are
# kept by what they were called with.
PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()
RECENT: collections.OrderedDict[object, Plan] = collections.OrderedDict()
RECENT_PLANS = 16
DTYPE = operator.attrgetter("dtype")
# What captured steps read, for as long as the first parameter, and so the optimizer, lives; and
# what other graphs do, for good.
CAPTURED: WeakIdKeyDictionary = WeakIdKeyDictionary()
CAPTURED_ELSEWHERE: list[tuple[Plan, triton_ops.Upload]] = []


def _moving(lists: TensorLists, planes: list[int]) -> tuple[object, ...]:
    """Returns what may differ while the tensors are the same objects. The gradients' addresses are
    not in it: those every step takes up.

    `planes`: which of the tensors that are written have several axes. One with a single axis would
    be another object, or elsewhere.
    """
    addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in lists[:8]]
    written = [tensors for tensors in lists[:4] if tensors]
    planar = [list(map(tensors.__getitem__, planes)) for tensors in written]
    contiguous = [list(map(Tensor.is_contiguous, tensors)) for tensors in (*planar, lists.g)]
    strides = (
        []
        if all(map(all, contiguous))
        else [t.stride() for tensors in (*written, lists.g) for t in tensors]
    )
    return (
        addresses,
        list(map(Tensor.numel, lists.g)),
        list(map(DTYPE, lists.g)),
        contiguous,
        strides,
    )


def _standing(lists: TensorLists) -> list[object]:
    """Returns what may differ between tensors beside that."""
    strides = [
        (k, i, t.shape, t.stride())
        for k, tensors in enumerate(lists.elementwise)
        for i, t in enumerate(tensors)
        if not t.is_contiguous()
    ]
    return [
        *(list(map(Tensor.numel, tensors)) + list(map(DTYPE, tensors)) for tensors in lists),
        *strides,
    ]


class Selecting(typing.Protocol):
    """Types what a call reads of a selection (options.Selection, which is above this file)."""

    @property
    def normalization(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def sharpness(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def min_probability(self) -> float: ...
    @property
    def keep_probability(self) -> float: ...
    @property
    def random(self) -> bool: ...
    @property
    def rescale(self) -> bool: ...
    @property
    def target(self) -> str: ...


@dataclasses.dataclass
class Call:
    """Holds a call of an operator: its lists and numbers."""

    update_rule: str
    g: list[Tensor]
    selection: Selecting
    layout: list[int]
    seed: int = 0
    step: int = 0
    theta: list[Tensor] = dataclasses.field(default_factory=list)
    moments: list[list[Tensor]] = dataclasses.field(default_factory=list)
    s: list[Tensor] = dataclasses.field(default_factory=list)
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    mins: list[Tensor] = dataclasses.field(default_factory=list)
    maxs: list[Tensor] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    # numbers that are tensors
    tensors: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    nesterov: bool = False
    maximize: bool = False
    scope: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    out: Tensor | None = None

    def run(self, plan: Plan | None) -> Plan | None:
        """Brings what the call needs to the device, then launches; `plan` and result as in
        op.SteppingOperator. Nothing here waits for the device.
        """
        if not self.g:
            return None
        device = self.g[0].device
        with triton_ops.on(self.g[0]):
            captured = triton_ops.capturing(device)
            plan = self.planned(plan, captured)
            upload = plan.upload
            if captured:
                upload = plan.upload.apart()
                (
                    CAPTURED.setdefault(self.theta[0], []) if self.steps else CAPTURED_ELSEWHERE
                ).append((plan, upload))
            away = {
                name: float(value)
                for name, value in self.tensors.items()
                if value is not None and value.device != device
            }
            scalars = [None if name in away else self.tensors.get(name) for name in NUMBERS[:3]]
            numbers = (
                self.numbers
                | away
                | _selection_numbers(self.selection)
                | {"sign": -1.0 if self.maximize else 1.0}
            )
            head = array.array("d", [numbers.get(name, 0.0) for name in NUMBERS]).tobytes()
            upload.write(
                head
                + array.array(
                    "q", [self.seed, self.step, 0, 0, *map(Tensor.data_ptr, self.g)]
                ).tobytes()
            )
            plan.launch(self, upload.target, scalars)
        return None if captured else plan

    def form(self) -> Form:
        """Returns what a family's kernels are compiled for, but for what its tensors are."""
        source = "own"
        if self.selection.normalization == "constant":
            source = ""
        elif self.scope is not None:
            source = "scope" if len(self.scope) == 1 else "scopes"
        elif self.mins and self.update_rule != "statistics":
            source = "kept"
        wide = self.g[0] if not self.steps else self.theta[0]
        return Form(
            RULE=self.update_rule,
            DTYPE=tl.float64 if wide.dtype == torch.float64 else tl.float32,
            NORMALIZATION=self.selection.normalization,
            SOURCE=source,
            RANDOM=self.selection.random,
            RESCALE=self.selection.rescale,
            TO_UPDATE=self.selection.target == "update",
            NESTEROV=self.nesterov,
            THETA=None,
            MOMENT1=None,
            MOMENT2=None,
            MOMENT3=None,
            S=None,
            G=None,
            STEP=None,
            KEPT=None,
            STRIDED=False,
            ROUNDING=False,
        )

    def planned(self, plan: Plan | None, captured: bool) -> Plan:
        """Returns the plan of the call: the one given, one that is kept, or a new one."""
        moment1, moment2, moment3 = (*self.moments, [], [], [])[:3]
        lists = TensorLists(
            theta=self.theta,
            moment1=moment1,
            moment2=moment2,
            moment3=moment3,
            s=self.s,
            step=self.steps,
            low=self.mins,
            high=self.maxs,
            g=self.g,
        )
        form = self.form()
        if plan is not None and plan.form == form and plan.moving == _moving(lists, plan.planes):
            return plan
        planes = [i for i, tensor in enumerate(lists.theta or lists.g) if tensor.dim() > 1]
        moving = _moving(lists, planes)
        standing = _standing(lists), self.layout, self.sizes
        plans, key = (
            (PLANS.setdefault(self.steps[0], {}), form)
            if self.steps
            else (RECENT, (form, tuple(self.layout)))
        )
        plan = plans.pop(key, None)
        if plan is None or plan.moving != moving or plan.standing != standing:
            plan = Plan(moving, standing, planes, form, lists, self.layout, self.sizes)
            # its rows are on the device from the first replay on: no other step may use it
            if captured:
                return plan
        plans[key] = plan
        if len(RECENT) > RECENT_PLANS:
            RECENT.popitem(last=False)
        return plan


def _selection_numbers(selection: Selecting) -> dict[str, float]:
    direction = 1.0 if selection.direction == "printed" else -1.0
    cap = 1 / max(selection.min_probability, SMALLEST_PROBABILITY)
    return {
        "steepness": direction * 2 * selection.sharpness * math.log2(math.e),
        "threshold": selection.threshold,
        "largest": cap,
        "constant": min(1 / selection.keep_probability, cap),
    }


# ---- The operators, as reference.py has them.


def _step(
    update_rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    mins: list[Tensor],
    maxs: list[Tensor],
    *,
    scope_statistics: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    weight_decay: float,
    numbers: dict[str, float],
    tensors: dict[str, Tensor | None],
    plan: Plan | None,
    **call: Any,
) -> Plan | None:
    return Call(
        update_rule,
        grads,
        theta=params,
        moments=moments,
        steps=steps,
        mins=mins,
        maxs=maxs,
        numbers=numbers | {"lr": lr, "weight_decay": weight_decay},
        tensors=tensors | {"lr": lr_tensor},
        scope=scope_statistics,
        **call,
    ).run(plan)


def selective_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    *kept: list[Tensor],
    beta1: float,
    beta2: float,
    beta1_tensor: Tensor | None,
    beta2_tensor: Tensor | None,
    eps: float,
    **options: Any,
) -> Plan | None:
    """Makes AdamW's step on g~ (target "gradient"), or AdamW's step where b ("update")."""
    moments = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    betas = {"beta1": beta1_tensor, "beta2": beta2_tensor}
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return _step("adamw", params, grads, moments, *kept, numbers=numbers, tensors=betas, **options)


def selective_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *kept: list[Tensor],
    momentum: float,
    dampening: float,
    **options: Any,
) -> Plan | None:
    """Makes SGD's step on g~ (target "gradient"), or SGD's step where b ("update")."""
    numbers = {"momentum": momentum, "dampening": dampening}
    return _step(
        "sgd", params, grads, [momentum_buffers], *kept, numbers=numbers, tensors={}, **options
    )


def select_gradients_(
    grads: list[Tensor],
    saliencies: list[Tensor],
    *,
    scope_statistics: Tensor | None,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selecting,
) -> None:
    """Writes b*g/p over g; where every p is 1 nothing is touched."""
    if selection.normalization == "constant" and selection.keep_probability == 1:
        return
    Call(
        "multiply", grads, selection, layout, seed, step, s=saliencies, scope=scope_statistics
    ).run(None)


def selective_statistics_(
    grads: list[Tensor],
    saliencies: list[Tensor],
    mins: list[Tensor],
    maxs: list[Tensor],
    *,
    layout: list[int],
    sizes: list[int],
    normalization: str,
    grad_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Joins (min, max) or the histogram of s into `out`: one row for all tensors, or a row each.
    What is kept stands for its tensor.
    """
    Call(
        "statistics",
        grads,
        Statistics("rank" if normalization == "rank" else "minmax"),
        layout,
        s=saliencies,
        mins=mins,
        maxs=maxs,
        sizes=sizes,
        grad_scale=grad_scale,
        out=out,
    ).run(None)


class Statistics(typing.NamedTuple):
    """Holds what a selection has where nothing is selected."""

    normalization: str
    direction: str = "printed"
    sharpness: float = 0.0
    threshold: float = 0.0
    min_probability: float = 0.0
    keep_probability: float = 1.0
    random: bool = False
    rescale: bool = False
    target: str = "gradient"


def selection_probability_(
    grad: Tensor, saliency: Tensor | None, *, out: Tensor, selection: Selecting
) -> None:
    """Writes p of every element."""
    n, s = grad.numel(), [] if saliency is None else [saliency]
    Call("probability", [grad], selection, [0, 0, n, n], theta=[out], s=s).run(None)


def selection_mask_(
    grad: Tensor,
    saliency: Tensor | None,
    *,
    out: Tensor,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selecting,
) -> None:
    """Writes b of every element."""
    s, out_bytes = [] if saliency is None else [saliency], [out.view(torch.uint8)]
    Call("mask", [grad], selection, layout, seed, step, theta=out_bytes, s=s).run(None)
