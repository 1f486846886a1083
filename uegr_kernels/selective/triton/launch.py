"""The selective step's tables and launches: any number of tensors by a handful of launches."""

import collections
import itertools
import operator
import struct
import typing
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...core import triton_ops
from ..options import AdamWOptions, Selection, SGDOptions, StepOptions, apart
from .kernels import (
    CONSTANTS,
    HEAD,
    LANES,
    PIECE,
    TABLE,
    TABLES,
    Form,
    StepHead,
    TensorRow,
    count_kernel,
    join_kernel,
    keep_kernel,
    prepare_kernel,
    tabulate_kernel,
    update_kernel,
)
from .math import curve, rank_stride

# StepHead, and its padding up to HEAD
HEAD_FORMAT = struct.Struct("12d2q16x")
# a mask is written as bytes
DTYPES = triton_ops.DTYPES | {torch.uint8: tl.int8}


class TensorLists(typing.NamedTuple):
    """Holds a call's lists of tensors, empty or of one length: the elementwise ones, the steps,
    the kept extremes; the gradients last. A list of states may be a single tensor that has all.
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
    def written(self) -> tuple[Sequence[Tensor], ...]:
        """Returns the elementwise lists that a step writes."""
        return self.theta, self.moment1, self.moment2, self.moment3

    @property
    def elementwise(self) -> tuple[Sequence[Tensor], ...]:
        """Returns the lists with an element for each of a gradient's, in the order of
        `strided_elements`.
        """
        return *self.written, self.s, self.g

    def apart(self) -> "TensorLists":
        """Returns the lists with a tensor for each gradient in every one."""
        shapes, single = [g.shape for g in self.g], [torch.Size()] * len(self.g)
        return self._replace(
            moment1=apart(self.moment1, shapes),
            moment2=apart(self.moment2, shapes),
            moment3=apart(self.moment3, shapes),
            step=apart(self.step, single),
            low=apart(self.low, single),
            high=apart(self.high, single),
        )

    def of(self, i: int) -> "OneOfEach":
        """Returns tensor i of every list."""
        return OneOfEach(*(tensors[i] if tensors else None for tensors in self))


NO_LISTS = TensorLists._make([()] * len(TensorLists._fields))


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
        """Returns the tensors with an element for each of a gradient's, in the lists' order."""
        return self.theta, self.moment1, self.moment2, self.moment3, self.s, self.g

    def check(self, parameter: int) -> None:
        """Raises what a kernel would not survive."""
        g = typing.cast(Tensor, self.g)
        written = {
            "value": self.theta,
            "first moment": self.moment1,
            "second moment": self.moment2,
            "third moment": self.moment3,
        }
        for name, tensor in (*written.items(), ("saliency", self.s)):
            if tensor is not None and (tensor.shape != g.shape or tensor.device != g.device):
                raise ValueError(
                    f"parameter {parameter}: its {name} has shape {tuple(tensor.shape)} on "
                    f"{tensor.device}, its gradient {tuple(g.shape)} on {g.device}; they must be "
                    "equal"
                )
        for name, tensor in written.items():
            if tensor is not None:
                triton_ops.refuse_expanded(f"parameter {parameter}'s {name}", tensor, ValueError)
        for name, tensor in (
            ("step", self.step),
            ("kept minimum", self.low),
            ("kept maximum", self.high),
        ):
            if tensor is not None and (tensor.numel() != 1 or tensor.device != g.device):
                raise ValueError(
                    f"parameter {parameter}: its {name} has {tensor.numel()} elements on "
                    f"{tensor.device}; give one element on {g.device}"
                )


# Nothing of a call, and no list.
NO_FORM = Form(
    RULE="",
    DTYPE=None,
    NORMALIZATION="",
    SOURCE="",
    RANDOM=False,
    RESCALE=False,
    TO_UPDATE=False,
    NESTEROV=False,
    THETA=None,
    MOMENT1=None,
    MOMENT2=None,
    MOMENT3=None,
    S=None,
    G=None,
    STEP=None,
    LOW=None,
    HIGH=None,
    STRIDED=False,
    ROUNDING=False,
)


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
        self.form, self.updating = form, triton_ops.constexprs(form)
        # The small kernels see what they read: where the rest differs they are not compiled again.
        rule = form.RULE if form.RULE in ("adamw", "sgd") else ""
        self.preparing = triton_ops.constexprs(
            NO_FORM._replace(RULE=rule, DTYPE=form.DTYPE, STEP=form.STEP)
        )
        self.counting = triton_ops.constexprs(
            NO_FORM._replace(DTYPE=form.DTYPE, S=form.S, G=form.G, STRIDED=form.STRIDED)
        )
        self.keeping = triton_ops.constexprs(
            NO_FORM._replace(DTYPE=form.DTYPE, S=form.S, LOW=form.LOW, HIGH=form.HIGH)
        )
        self.tensors = len(positions)
        elements = [lists.g[i].numel() for i in positions]

        def addresses(tensors: Sequence[Tensor]) -> list[int]:
            return [tensors[i].data_ptr() if tensors else 0 for i in positions]

        starts = [0] * self.tensors
        if form.STRIDED:
            axes = [_axes(lists.of(i).elementwise) for i in positions]
            self.axes = triton_ops.to_device(
                [x for each in axes for x in each], torch.int64, device
            )
            starts = [
                self.axes.data_ptr() + 8 * at
                for at in itertools.accumulate(map(len, axes[:-1]), initial=0)
            ]
        table = TensorRow(
            theta=addresses(lists.theta),
            moment1=addresses(lists.moment1),
            moment2=addresses(lists.moment2),
            moment3=addresses(lists.moment3),
            saliency=addresses(lists.s),
            step=addresses(lists.step),
            minimum=addresses(lists.low),
            maximum=addresses(lists.high),
            axes=starts,
            size=elements,
            stream=[layout[4 * i] for i in positions],
            offset=[layout[4 * i + 1] for i in positions],
            run=[max(layout[4 * i + 2], 1) for i in positions],
            stride=[layout[4 * i + 3] for i in positions],
            every=list(map(rank_stride, [sizes[i] for i in positions] if sizes else elements)),
            position=positions,
        )
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

    def launch(self, call: "Call", head: Tensor, scope_tables: Tensor) -> None:
        """Launches everything over these tensors, as the kernels' header says."""
        form, programs, out = self.form, -(-self.tensors // LANES.value), call.out
        prepare_kernel[(programs,)](
            head,
            self.rows,
            self.bits,
            self.constants,
            self.counts,
            self.tensors,
            call.rule.lr.tensor,
            call.rule.beta1.tensor,
            call.rule.beta2.tensor,
            call.found_inf,
            form=self.preparing,
            **triton_ops.compile_options(triton_ops.WARPS),
        )

        def count(items: Tensor, n: int, counts: Tensor, *, many: bool) -> None:
            count_kernel[(n,)](
                head,
                self.rows,
                items,
                counts,
                call.grad_scale,
                call.found_inf,
                MANY=many,
                form=self.counting,
                **triton_ops.compile_options(triton_ops.WARPS),
            )

        if form.NORMALIZATION == "rank" and form.RULE == "statistics":
            for items, n in self.rounds:
                if n and out is not None:
                    count(items, n, out, many=len(out) > 1)
            return
        for k, (items, n) in enumerate(self.rounds):
            tables = scope_tables
            if form.NORMALIZATION == "rank" and form.SOURCE == "own":
                tables = self.tables[: self.tensors - k * TABLES.value].zero_()
                counts = tables.view(torch.int32)
                if n:
                    count(items, n, counts, many=False)
                tabulate_kernel[(len(tables),)](
                    head, counts, tables, **triton_ops.compile_options(16)
                )
            if n:
                gathers = form.SOURCE in ("own", "kept") and form.NORMALIZATION != "rank"
                # two draws an element: with fewer warps sm_100 spills; a thread has all that a
                # call of the generator draws for
                twice = form.ROUNDING and triton_ops.lanes() == 32
                warps = triton_ops.WARPS * (2 if twice else 1)
                update_kernel[(n,)](
                    head,
                    self.rows,
                    items,
                    self.bits,
                    self.constants,
                    self.counts,
                    call.scope,
                    tables,
                    call.grad_scale,
                    call.found_inf,
                    GATHERS=gathers,
                    form=self.updating,
                    **triton_ops.compile_options(warps),
                )
        if out is not None:
            join_kernel[(1,)](
                self.rows,
                self.bits,
                out,
                self.tensors,
                MANY=len(out) > 1,
                form=self.keeping,
                **triton_ops.compile_options(triton_ops.WARPS),
            )
        elif form.LOW is not None:
            keep_kernel[(programs,)](
                self.rows,
                self.bits,
                self.tensors,
                call.found_inf,
                form=self.keeping,
                **triton_ops.compile_options(triton_ops.WARPS),
            )


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
    """Returns both rows of items as one, spread evenly: reading and writing share the machine."""
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
        lists = lists.apart()
        self.device = lists.g[0].device
        # gradients without an element, which have no address
        self.empty = sum(g.numel() == 0 for g in lists.g)
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

    def launch(self, call: "Call", head: Tensor) -> None:
        """Launches everything that a call needs."""
        if call.scope is not None and call.selection.normalization == "rank":
            if len(self.tables) != len(call.scope):
                self.tables = torch.empty(
                    len(call.scope), TABLE.value, dtype=torch.float32, device=self.device
                )
            tabulate_kernel[(len(call.scope),)](
                head, call.scope, self.tables, **triton_ops.compile_options(16)
            )
        for family in self.families:
            family.launch(call, head, self.tables)


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
        LOW=dtypes.low,
        HIGH=dtypes.high,
        STRIDED=not all(t is None or t.is_contiguous() for t in each.elementwise),
        ROUNDING=tl.bfloat16 in (dtypes.moment1, dtypes.moment2, dtypes.moment3),
    )


# Plans of optimizers live as long as the first tensor of their steps; a few of other calls are kept
# by what they were called with.
PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()
RECENT: collections.OrderedDict[object, Plan] = collections.OrderedDict()
RECENT_PLANS = 16
DTYPE = operator.attrgetter("dtype")
# What captured steps read, for as long as the first parameter, and so the optimizer, lives; and
# what other graphs do, for good.
CAPTURED: WeakIdKeyDictionary = WeakIdKeyDictionary()
CAPTURED_ELSEWHERE: list[tuple[Plan, triton_ops.Upload]] = []


def _moving(lists: TensorLists, planes: list[int]) -> tuple[object, ...]:
    """Returns what may differ while the tensors are the same objects, and the parameters in the
    same places. The gradients' addresses are not in it: those every step takes up.

    `planes`: which of the tensors that are written have several axes. One with a single axis would
    be another object, or elsewhere; so would packed states, which are contiguous.
    """
    _, *states, _ = lists
    addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in states]
    written = [tensors for tensors in lists.written[1:] if len(tensors) == len(lists.g)]
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
    """Returns what may differ between calls with other tensors, beside `_moving`."""
    strides = [
        (k, i, t.shape, t.stride())
        for k, tensors in enumerate(lists.elementwise)
        for i, t in enumerate(tensors)
        if not t.is_contiguous()
    ]
    return [
        list(map(Tensor.data_ptr, lists.theta)),
        *(list(map(Tensor.numel, tensors)) + list(map(DTYPE, tensors)) for tensors in lists),
        *strides,
    ]


class Scalar(typing.NamedTuple):
    """Holds an option of an update rule: a number of the head, or a tensor that kernels read."""

    value: float
    tensor: Tensor | None

    def on(self, device: torch.device) -> "Scalar":
        """Returns the option for kernels on the device: what lies elsewhere as a number."""
        if self.tensor is None or self.tensor.device == device:
            return self
        return Scalar(float(self.tensor), None)


NO_SCALAR = Scalar(0.0, None)


class Rule(typing.NamedTuple):
    """Holds what is done with the selected gradient, and an update rule's options."""

    # as Form's RULE
    name: str
    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: float
    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool

    @classmethod
    def without_options(cls, name: str) -> "Rule":
        """Makes a rule that updates no parameter."""
        return cls(
            name=name,
            lr=NO_SCALAR,
            beta1=NO_SCALAR,
            beta2=NO_SCALAR,
            eps=0.0,
            weight_decay=0.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def on(self, device: torch.device) -> "Rule":
        """Returns the rule for kernels on the device: options that lie elsewhere as numbers."""
        lr, beta1, beta2 = self.lr.on(device), self.beta1.on(device), self.beta2.on(device)
        return self._replace(lr=lr, beta1=beta1, beta2=beta2)


MULTIPLY, PROBABILITY, MASK, STATISTICS = map(
    Rule.without_options, ("multiply", "probability", "mask", "statistics")
)


class Call(typing.NamedTuple):
    """Holds a call of an operator."""

    rule: Rule
    lists: TensorLists
    layout: list[int]
    # of the unsharded tensors; empty: as they are
    sizes: list[int]
    selection: Selection
    seed: int
    step: int
    scope: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    # of statistics
    out: Tensor | None

    def run(self, plan: Plan | None) -> Plan | None:
        """Brings what the call needs to the device, then launches; `plan` and result as in
        op.SteppingOperator. Nothing here waits for the device.
        """
        lists = self.lists
        if not lists.g:
            return None
        device = lists.g[0].device
        with triton_ops.on(lists.g[0]):
            captured = triton_ops.capturing(device)
            plan = self.planned(plan, captured)
            upload = plan.upload
            if captured:
                upload = plan.upload.apart()
                (
                    CAPTURED.setdefault(lists.theta[0], []) if lists.step else CAPTURED_ELSEWHERE
                ).append((plan, upload))
            call = self._replace(rule=self.rule.on(device))
            upload.write(HEAD_FORMAT.pack(*call.head()) + self.addresses(plan))
            plan.launch(call, upload.target)
        return None if captured else plan

    def addresses(self, plan: Plan) -> bytes:
        """Returns the gradients' addresses, as kernels read them; raises RuntimeError for one whose
        memory was freed.
        """
        found = list(map(Tensor.data_ptr, self.lists.g))
        # the address of freed memory is 0
        if found.count(0) != plan.empty:
            for i, g in enumerate(self.lists.g):
                triton_ops.check_there(f"parameter {self.layout[4 * i]}'s gradient", g)
        return struct.pack(f"{len(found)}q", *found)

    def head(self) -> StepHead:
        """Returns what may change from step to step."""
        rule, shared = self.rule, curve(self.selection)
        return StepHead(
            lr=rule.lr.value,
            beta1=rule.beta1.value,
            beta2=rule.beta2.value,
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            momentum=rule.momentum,
            dampening=rule.dampening,
            sign=-1.0 if rule.maximize else 1.0,
            steepness=shared.steepness,
            threshold=shared.threshold,
            largest_inverse=shared.largest_inverse,
            constant_inverse=shared.constant_inverse,
            seed=self.seed,
            count=self.step,
        )

    def form(self) -> Form:
        """Returns what a family's kernels are compiled for, but for what its tensors are."""
        source = "own"
        if self.selection.normalization == "constant":
            source = ""
        elif self.scope is not None:
            source = "scope" if len(self.scope) == 1 else "scopes"
        elif self.lists.low and self.rule.name != "statistics":
            source = "kept"
        wide = (self.lists.theta if self.lists.step else self.lists.g)[0]
        return NO_FORM._replace(
            RULE=self.rule.name,
            DTYPE=tl.float64 if wide.dtype == torch.float64 else tl.float32,
            NORMALIZATION=self.selection.normalization,
            SOURCE=source,
            RANDOM=self.selection.random,
            RESCALE=self.selection.rescale,
            TO_UPDATE=self.selection.target == "update",
            NESTEROV=self.rule.nesterov,
        )

    def planned(self, plan: Plan | None, captured: bool) -> Plan:
        """Returns the plan of the call: the one given, one that is kept, or a new one."""
        lists, form = self.lists, self.form()
        if plan is not None and plan.form == form and plan.moving == _moving(lists, plan.planes):
            return plan
        planes = [i for i, tensor in enumerate(lists.theta or lists.g) if tensor.dim() > 1]
        moving = _moving(lists, planes)
        standing = _standing(lists), self.layout, self.sizes
        plans, key = (
            (PLANS.setdefault(lists.step[0], {}), form)
            if lists.step
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


# ---- The operators, as reference.py has them.


def _step(rule: Rule, lists: TensorLists, common: StepOptions) -> Plan | None:
    call = Call(
        rule=rule,
        lists=lists,
        layout=common.layout,
        sizes=[],
        selection=common.selection,
        seed=common.seed,
        # each tensor's own
        step=0,
        scope=common.scope_statistics,
        grad_scale=common.grad_scale,
        found_inf=common.found_inf,
        out=None,
    )
    return call.run(common.plan if isinstance(common.plan, Plan) else None)


def selective_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    common: StepOptions,
    own: AdamWOptions,
) -> Plan | None:
    """Makes AdamW's step on g~ (target "gradient"), or AdamW's step where b ("update")."""
    rule = Rule(
        name="adamw",
        lr=Scalar(common.lr, common.lr_tensor),
        beta1=Scalar(own.beta1, own.beta1_tensor),
        beta2=Scalar(own.beta2, own.beta2_tensor),
        eps=own.eps,
        weight_decay=common.weight_decay,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=common.maximize,
    )
    lists = TensorLists(
        theta=params,
        moment1=exp_avgs,
        moment2=exp_avg_sqs,
        moment3=max_exp_avg_sqs,
        s=(),
        step=steps,
        low=saliency_mins,
        high=saliency_maxs,
        g=grads,
    )
    return _step(rule, lists, common)


def selective_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    saliency_mins: list[Tensor],
    saliency_maxs: list[Tensor],
    *,
    common: StepOptions,
    own: SGDOptions,
) -> Plan | None:
    """Makes SGD's step on g~ (target "gradient"), or SGD's step where b ("update")."""
    rule = Rule(
        name="sgd",
        lr=Scalar(common.lr, common.lr_tensor),
        beta1=NO_SCALAR,
        beta2=NO_SCALAR,
        eps=0.0,
        weight_decay=common.weight_decay,
        momentum=own.momentum,
        dampening=own.dampening,
        nesterov=own.nesterov,
        maximize=common.maximize,
    )
    lists = NO_LISTS._replace(
        theta=params,
        moment1=momentum_buffers,
        step=steps,
        low=saliency_mins,
        high=saliency_maxs,
        g=grads,
    )
    return _step(rule, lists, common)


def _select(
    rule: Rule,
    lists: TensorLists,
    layout: list[int],
    seed: int,
    step: int,
    selection: Selection,
    scope: Tensor | None,
) -> None:
    """Does what `rule` says with the selection of every element, without an optimizer."""
    Call(
        rule=rule,
        lists=lists,
        layout=layout,
        sizes=[],
        selection=selection,
        seed=seed,
        step=step,
        scope=scope,
        grad_scale=None,
        found_inf=None,
        out=None,
    ).run(None)


def select_gradients_(
    grads: list[Tensor],
    saliencies: list[Tensor],
    *,
    scope_statistics: Tensor | None,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selection,
) -> None:
    """Writes b*g/p over g; where every p is 1 nothing is touched."""
    if not selection.random:
        return
    lists = NO_LISTS._replace(s=saliencies, g=grads)
    _select(MULTIPLY, lists, layout, seed, step, selection, scope_statistics)


# Statistics are looked at, nothing is selected.
RANK, EXTREMES = Selection(normalization="rank"), Selection(normalization="minmax")


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
        rule=STATISTICS,
        lists=NO_LISTS._replace(s=saliencies, low=mins, high=maxs, g=grads),
        layout=layout,
        sizes=sizes,
        selection=RANK if normalization == "rank" else EXTREMES,
        seed=0,
        step=0,
        scope=None,
        grad_scale=grad_scale,
        found_inf=None,
        out=out,
    ).run(None)


def _looked_at(grad: Tensor, saliency: Tensor | None, out: Tensor) -> TensorLists:
    """Returns the lists of what is written of every element into `out`."""
    return NO_LISTS._replace(theta=[out], s=() if saliency is None else [saliency], g=[grad])


def selection_probability_(
    grad: Tensor, saliency: Tensor | None, *, out: Tensor, selection: Selection
) -> None:
    """Writes p of every element."""
    lists, n = _looked_at(grad, saliency, out), grad.numel()
    _select(PROBABILITY, lists, [0, 0, n, n], 0, 0, selection, None)


def selection_mask_(
    grad: Tensor,
    saliency: Tensor | None,
    *,
    out: Tensor,
    layout: list[int],
    step: int,
    seed: int,
    selection: Selection,
) -> None:
    """Writes b of every element."""
    lists = _looked_at(grad, saliency, out.view(torch.uint8))
    _select(MASK, lists, layout, seed, step, selection, None)
