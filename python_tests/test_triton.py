"""What is Triton's own: the generator in its language, tables and launches, and what the
compilers make of the kernels.
"""

import importlib
import struct
import weakref

import pytest
import torch
from test_core import WORD_CASES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import uegr_kernels as uk
from bench.triton_code import TARGETS, kernels
from uegr_kernels.core import philox

triton = pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from uegr_kernels.core import triton_ops  # noqa: E402


@triton.jit
def words_kernel(out, numbers, BLOCK: tl.constexpr, IN_ORDER: tl.constexpr):
    first, offset, run, stride = (
        tl.load(numbers),
        tl.load(numbers + 1),
        tl.load(numbers + 2),
        tl.load(numbers + 3),
    )
    stream, step, seed = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    if IN_ORDER:
        word = triton_ops.words_in_order(offset + first, seed, step, stream, BLOCK)
    else:
        word = triton_ops.words(
            triton_ops.element_indices(first + tl.arange(0, BLOCK), offset, run, stride),
            seed,
            step,
            stream,
        )
    tl.store(out + tl.arange(0, BLOCK), word.to(tl.int32, bitcast=True))


def triton_words(first, n, layout, step, seed, in_order) -> list[int]:
    """Gives the words of local elements [first, first + n), by one call for four neighbours or by a
    call each.
    """
    out = torch.zeros(max(triton.next_power_of_2(n), 4), dtype=torch.int32)
    stream, offset, run, stride = layout
    words_kernel[(1,)](
        out,
        torch.tensor([first, offset, run, stride, stream, step, seed]),
        BLOCK=len(out),
        IN_ORDER=in_order,
    )
    return (out[:n].long() & 0xFFFFFFFF).tolist()


@pytest.mark.parametrize("seed", [5, -(2**63) + 11])
@pytest.mark.parametrize(("layout", "begin", "n"), WORD_CASES)
def test_words_are_the_references(layout, begin, n, seed):
    _, offset, run, _ = layout
    expected = philox.words(
        philox.element_indices(begin + n, layout[1:])[begin:],
        seed=seed,
        step=2**24 - 1,
        stream=layout[0],
    )
    for in_order in (False, True)[: 2 if run >= begin + n and offset % 4 == 0 else 1]:
        assert triton_words(begin, n, layout, 2**24 - 1, seed, in_order) == expected.tolist()


def test_words_have_the_known_answers():
    for in_order in (False, True):
        assert triton_words(0, 4, (0, 0, 4, 4), 0, 0, in_order) == [
            0x6627E8D5,
            0xE169C58D,
            0xBC57AC4C,
            0x9B00DBD8,
        ]


# Tables on the way to the device, with events in the place of CUDA's.


class FakeEvent:
    done = False

    def query(self) -> bool:
        return self.done


def numbers(*values: int) -> bytes:
    return struct.pack(f"{len(values)}q", *values)


def test_pinned_memory_is_not_written_while_a_copy_of_it_is_in_flight(monkeypatch):
    events = []

    def mark(device, event):
        events.append(FakeEvent())
        return events[-1]

    monkeypatch.setattr(triton_ops, "mark", mark)
    upload = triton_ops.Upload(2, torch.device("cpu"))
    upload.write(numbers(1, 2))
    upload.write(numbers(1, 2))
    assert len(upload.sources) == 1, "what is there already is not copied again"
    upload.write(numbers(3, 4))
    assert [source.tolist() for source, _ in upload.sources] == [
        [1, 2],
        [3, 4],
    ] and upload.target.tolist() == [3, 4]
    events[0].done = True
    upload.write(numbers(5, 6))
    assert [source.tolist() for source, _ in upload.sources] == [[3, 4], [5, 6]], (
        "the oldest free one is taken, and no other"
    )


def test_what_a_capture_copies_is_written_by_nobody_else(monkeypatch):
    """Steps, one of them under capture; replaying it, that is its copy and its launches again,
    sees its own gradients.
    """
    launch = importlib.import_module("uegr_kernels.selective.triton").launch
    p = torch.nn.Parameter(torch.zeros(3))
    static, others = (
        torch.tensor([1.0, -1.0, 2.0]),
        [torch.full((3,), value) for value in (3.0, 4.0)],
    )
    optimizer = uk.SelectiveSGD(
        [p], lr=1.0, seed=1, normalization="constant", capturable=True, backend="triton"
    )

    def step(grad: torch.Tensor) -> None:
        p.grad = grad
        optimizer.step()

    step(others[0])
    copies, launches = [], []
    with monkeypatch.context() as patch:
        launch_plan = launch.Plan.launch
        patch.setattr(triton_ops, "capturing", lambda device: True)
        patch.setattr(
            launch.Plan,
            "launch",
            lambda plan, *rest: (launches.append((plan, *rest)), launch_plan(plan, *rest)),
        )
        step(static)
        copies = [
            (upload.target, source)
            for _, upload in launch.CAPTURED[p]
            for source, _ in upload.sources
        ]
    assert len(copies) == 1 and p.tolist() == [-4.0, -2.0, -5.0]
    step(others[1])
    static.fill_(10.0)
    for target, source in copies:
        target.copy_(source)
    for plan, *rest in launches:
        plan.launch(*rest)
    assert p.tolist() == [-18.0, -16.0, -19.0]


def test_a_steady_step_makes_its_table_again_only_where_something_moved():
    launch = importlib.import_module("uegr_kernels.selective.triton").launch
    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = uk.SelectiveAdamW([p], seed=1, backend="triton")
    p.grad = torch.ones(5)
    optimizer.step()

    def plan():
        return next(iter(launch.PLANS[optimizer.state[p]["step"]].values()))

    first = plan()
    copied = first.upload.content
    optimizer.step()
    assert plan() is first and first.upload.content is copied
    p.grad = torch.ones(5)
    optimizer.step()
    assert plan() is first and first.upload.content != copied, (
        "a gradient that moved changes the table's head alone"
    )
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()
    optimizer.step()
    assert plan() is not first


def test_a_plan_made_under_capture_serves_no_other_step(monkeypatch):
    """Its rows are on the device from the first replay on, not before."""
    launch = importlib.import_module("uegr_kernels.selective.triton").launch
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = uk.SelectiveSGD([p], lr=1.0, seed=1, capturable=True, backend="triton")
    p.grad = torch.ones(3)
    with monkeypatch.context() as patch:
        patch.setattr(triton_ops, "capturing", lambda device: True)
        optimizer.step()
    ((captured, _),) = launch.CAPTURED[p]
    p.grad = torch.ones(3)
    optimizer.step()
    (plan,) = launch.PLANS[optimizer.state[p]["step"]].values()
    assert plan is not captured


@pytest.fixture
def launched_kernels(monkeypatch) -> list[str]:
    """Gives the names of kernels in the order of their launches, which do nothing."""
    names: list[str] = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *args, **kwargs: names.append(self.fn.__name__)
    )
    return names


STEADY = [
    pytest.param(options, id=str(options))
    for options in (
        {},
        {"statistics": "previous"},
        {"normalization": "rank"},
        {"scope": "global"},
        {"scope": "global", "normalization": "rank"},
        {"scope": "global", "statistics": "previous"},
    )
]


def steady(count: int, **options):
    """Gives parameters, and what steps them with gradients that moved."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(count)]
    optimizer = uk.SelectiveAdamW(params, seed=1, capturable=True, backend="triton", **options)

    def step(gradients: list[torch.Tensor] | None = None) -> None:
        for p, gradient in zip(params, gradients or [torch.ones(3) for _ in params], strict=True):
            p.grad = gradient
        optimizer.step()

    return params, step


@pytest.mark.parametrize("options", STEADY)
def test_a_steps_launches_are_as_many_for_500_tensors_as_for_5(launched_kernels, options):
    found = []
    for count in (5, 500):
        _, step = steady(count, **options)
        step()
        launched_kernels.clear()
        step()
        found.append(list(launched_kernels))
    assert found[0] == found[1] and 0 < len(found[0]) <= 6


def test_perturbed_weights_launches_are_as_many_for_500_tensors_as_for_5(launched_kernels):
    found = []
    for count in (5, 500):
        weights = [torch.zeros(3) for _ in range(count)]
        launched_kernels.clear()
        with uk.perturbed_weights(
            weights, 0.1, gradients=weights, keep_probability=0.5, seed=1, backend="triton"
        ):
            found.append(list(launched_kernels))
    assert found == [["part_kernel"] * 2] * 2


class Allocations(TorchDispatchMode):
    """Counts operators that give fresh memory."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        fresh = [
            t
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        self.names += [str(function)] if fresh else []
        return result


@pytest.mark.parametrize("options", STEADY)
def test_a_steady_step_allocates_nothing(launched_kernels, options):
    params, step = steady(5, **options)
    for _ in range(3):
        step()
    gradients = [torch.ones(3) for _ in params]
    with Allocations() as allocations:
        step(gradients)
    assert allocations.names == []


def test_gradients_are_freed_when_the_user_drops_them():
    params, step = steady(2)
    gradients = []
    for _ in range(3):
        step()
        gradients.append(weakref.ref(params[0].grad))
        params[0].grad = None
    assert [gradient() for gradient in gradients] == [None] * 3


# What is compiled ahead of time: statements that launch every kernel, in the variants that are most
# likely to spill.
PARAMETER = (
    "p = torch.nn.Parameter(torch.zeros(2048, dtype=torch.{})); p.grad = torch.zeros_like(p); "
)
ADAMW = "uk.SelectiveAdamW([p], seed=1, {}).step()"
SGD = "uk.SelectiveSGD([p], seed=1, {}).step()"
STEP = PARAMETER.format("float32") + ADAMW.format("")
PREVIOUS_STEP = PARAMETER.format("float32") + ADAMW.format("statistics='previous'")
STATEMENTS = {
    "step": STEP,
    "previous": PREVIOUS_STEP,
    "bfloat16": PARAMETER.format("bfloat16")
    + ADAMW.format(
        "state_dtype=torch.bfloat16, amsgrad=True, target='update', "
        "statistics='previous', capturable=True"
    ),
    "float64": PARAMETER.format("float64") + ADAMW.format("amsgrad=True, lr=torch.tensor(0.1)"),
    "strided rank": "p = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.float16).t()); p.grad = "
    "torch.zeros_like(p); " + SGD.format("momentum=0.9, nesterov=True, normalization='rank'"),
    "global": PARAMETER.format("float32") + SGD.format("scope='global', statistics='previous'"),
    "global rank": PARAMETER.format("float32")
    + SGD.format("scope='global', normalization='rank', momentum=0.9, rescale=False"),
    "gradients": PARAMETER.format("float32") + "uk.select_gradients_(p, seed=1, step=1, "
    "saliency=[p.grad.abs()])",
    "probability": PARAMETER.format("bfloat16") + "uk.selection_probability(p.grad, "
    "normalization='range')",
    "mask": PARAMETER.format("float32") + "uk.selection_mask(p.grad, seed=1, step=1, "
    "normalization='constant', keep_probability=0.5)",
}


def launched(name: str, target: str):
    return kernels(*STATEMENTS.values())[STATEMENTS[name], target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", STATEMENTS)
def test_nothing_is_spilled(name, target):
    found = launched(name, target)
    assert found
    for kernel in found:
        assert kernel.spilled == 0, (
            f"{kernel.name}: {kernel.spilled} spilled with {kernel.registers} registers"
        )
        assert kernel.count(r"(LDL|STL|scratch).*") == 0, (
            f"{kernel.name} uses local memory: {kernel.memory}"
        )


@pytest.mark.parametrize(
    ("module", "table"),
    [
        ("selective.triton.kernels", "TensorRow"),
        ("selective.triton.kernels", "StepHead"),
        ("perturbation.triton", "WeightRow"),
    ],
)
def test_kernels_read_a_table_where_its_fields_stand(module, table):
    kernels = importlib.import_module(f"uegr_kernels.{module}")
    fields = getattr(kernels, table)._fields
    assert [getattr(kernels, name.upper()).value for name in fields] == list(range(len(fields)))


def test_every_kernel_is_compiled():
    functions = {
        name: value
        for name, value in vars(
            importlib.import_module("uegr_kernels.selective.triton").kernels
        ).items()
        if isinstance(value, triton.KernelInterface)
    }
    every = {
        name for name, value in functions.items() if "program_id" in value.fn.__code__.co_names
    } | {"join_kernel"}
    assert every == {name for name in functions if name.endswith("_kernel")}
    assert every == {kernel.name for name in STATEMENTS for kernel in launched(name, "sm_90")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["step", "previous"])
def test_the_whole_blocks_of_a_float32_step_are_read_and_written_by_128_bits(name, target):
    update = next(kernel for kernel in launched(name, target) if kernel.name == "update_kernel")
    threads = 256 if target.startswith("gfx9") else 128
    # 128-bit accesses of a thread to a list's block
    each = 1024 // 4 // threads
    loads, stores = update.wide
    # parameter, moments, gradient; the gradient of what is gathered
    assert loads >= 5 * each
    assert stores == 3 * each
    # Only unmasked accesses say how long the cache is to keep them.
    assert update.count(r"(LDG|STG)\..*\.E[FL]\b(?!.*\b128\b).*") == 0, (
        f"narrow accesses in whole blocks: {update.memory}"
    )
