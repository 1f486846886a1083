"""The operators as PyTorch calls them: memory, fakes, layouts, refusals."""

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.selective import reference
from uegr_kernels.selective.options import NORMALIZATIONS, Selection

from . import NAMES
from .problems import OPTIMIZERS, problem, same_bits


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"statistics": "previous"},
        {"scope": "global"},
        {"normalization": "rank"},
        {"normalization": "rank", "scope": "global"},
        {"target": "update"},
    ],
    ids=str,
)
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
# Triton's interpreter is made of temporaries
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_a_step_makes_no_temporary_of_a_parameters_size(native, cls, options, strided):
    # 4 MB each
    n, tensors = 1000, 3
    start = [torch.zeros(n, n) for _ in range(tensors)]
    params = [torch.nn.Parameter(t.t() if strided else t) for t in start]
    for p in params:
        p.grad = torch.randn(n, n)
    optimizer = cls(
        params,
        lr=0.1,
        seed=1,
        backend=native,
        **({"momentum": 0.9} if cls is uk.SelectiveSGD else {}),
        **options,
    )
    torch.set_num_threads(2)
    # makes the states
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        reset_peak()
        resident = memory("VmRSS")
        optimizer.step()
        grown = memory("VmHWM") - resident
    allowed = 2**20 + 64 * tensors + (2**22 if options.get("normalization") == "rank" else 0)
    allocated = sum(
        max(event.nbytes(), 0)
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    assert allocated < allowed, "what torch's allocator gave"
    assert grown < allowed + 2**20, "what the process grew by; the profiler's own records are in it"


def memory(key: str) -> int:
    """Gives a line of /proc/self/status in bytes."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    except (OSError, StopIteration):
        pytest.skip(f"/proc/self/status has no {key} here")


def reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"the peak of this process cannot be reset: {error}")


def operator_arguments(name: str, dtype: torch.dtype, normalization: str) -> tuple[tuple, dict]:
    """Gives positional and keyword arguments for an operator: a dense permuted tensor and a 0-dim
    one.
    """
    generator = torch.Generator().manual_seed(0)

    def tensors(dtype=dtype):
        return [
            torch.rand(4, 6, generator=generator).t().to(dtype),
            torch.rand((), generator=generator).to(dtype),
        ]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout = [0, 0, 24, 24, 1, 0, 1, 1]
    selection = Selection(**{"normalization": normalization, "keep_probability": 0.5}).numbers()
    previous = normalization == "minmax"
    if name in ("selective_adamw_", "selective_sgd_"):
        kept = [
            [torch.full((), torch.nan, dtype=wide) for _ in range(2)] if previous else []
            for _ in range(2)
        ]
        moments = (
            [tensors(wide), tensors(wide), tensors(wide)]
            if name == "selective_adamw_"
            else [tensors(wide)]
        )
        more = {
            "scope_statistics": None,
            "layout": layout,
            "grad_scale": torch.tensor(2.0),
            "found_inf": None,
            "lr": 0.1,
            "lr_tensor": None,
        }
        more |= (
            {"weight_decay": 0.1, "maximize": False, "seed": 3} | selection | {"previous": previous}
        )
        if name == "selective_adamw_":
            more |= {
                "beta1": 0.9,
                "beta2": 0.0,
                "beta1_tensor": None,
                "beta2_tensor": torch.tensor(0.9),
                "eps": 1e-8,
            }
        else:
            more |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
        return (tensors(), tensors(), *moments, [torch.zeros(()) for _ in range(2)], *kept), more
    if name == "select_gradients_":
        return (tensors(), tensors()), {
            "scope_statistics": None,
            "layout": layout,
            "step": 1,
            "seed": 3,
        } | selection
    if name == "selective_statistics_":
        rank = normalization == "rank"
        out = (
            torch.zeros(2, reference.RANK_BINS, dtype=torch.int64)
            if rank
            else torch.zeros(1, 2, dtype=torch.float64)
        )
        number = NORMALIZATIONS.index("rank" if rank else "minmax")
        return (tensors(), [], [], []), {
            "layout": layout,
            "sizes": [],
            "normalization": number,
            "grad_scale": None,
            "out": out,
        }
    if name == "selection_probability_":
        return (tensors()[0], None), {"out": torch.zeros(6, 4, dtype=wide)} | selection
    out = torch.zeros(6, 4, dtype=torch.bool)
    return (tensors()[0], tensors()[0]), {
        "out": out,
        "layout": layout[:4],
        "step": 1,
        "seed": 3,
    } | selection


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "normalization"),
    [(torch.float32, "minmax"), (torch.bfloat16, "rank"), (torch.float64, "constant")],
    ids=["minmax", "rank", "constant"],
)
def test_opcheck(name, dtype, normalization):
    args, kwargs = operator_arguments(name, dtype, normalization)
    torch.library.opcheck(getattr(torch.ops.uegr_kernels, name).default, args, kwargs)


# what the dispatcher finds for CPU tensors
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_the_operators_take_a_single_tensor_for_many_states(native):
    """As the default kernel does, which is the reference."""
    start, (grads,) = problem([(3, 5), (16,), (1,)], steps=1)
    sizes = [g.numel() for g in grads]
    layout = [x for i, n in enumerate(sizes) for x in (i, 0, n, n)]
    options = Selection(
        0.5, 5.0, "minmax", "printed", "tensor", "current", True, 0.0, 1.0, "gradient"
    ).numbers()
    options |= {
        "scope_statistics": None,
        "layout": layout,
        "grad_scale": None,
        "found_inf": None,
        "lr": 0.1,
        "lr_tensor": None,
    }
    options |= {
        "weight_decay": 0.0,
        "maximize": False,
        "seed": 3,
        "momentum": 0.9,
        "dampening": 0.0,
        "nesterov": False,
    }
    operator, results = torch.ops.uegr_kernels.selective_sgd_.default, []
    for apart in (False, True):
        params, buffer, steps = (
            [p.clone() for p in start],
            torch.full((sum(sizes),), -0.0),
            torch.zeros(len(sizes)),
        )
        buffers = (
            [b.view_as(p) for b, p in zip(buffer.split(sizes), start, strict=True)]
            if apart
            else [buffer]
        )
        operator(
            params, grads, buffers, list(steps.unbind()) if apart else [steps], [], [], **options
        )
        results.append([*params, buffer, steps])
        if not apart:
            with pytest.raises(
                RuntimeError,
                match="states has 31 elements in a single tensor; it "
                "must be contiguous and have 32",
            ):
                operator(params, grads, [buffer[:-1]], [steps], [], [], **options)
    assert same_bits(*results)
    assert torch.equal(results[0][-1], torch.ones(3))


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normalization": 4}, "normalization is 4; use 0"),
        ({"layout": [0, -1, 9, 9]}, "layout of tensor 0 is stream 0, offset -1"),
        ({"layout": [2**32, 0, 9, 9]}, "give a stream below 2.32"),
        ({"layout": [0, 2**62, 1, 2**61]}, r"indices in \[0, 2.63\)"),
    ],
    ids=["normalization", "offset", "stream", "overflow"],
)
def test_the_kernel_refuses_numbers_it_cannot_state(native, wrong, message):
    out = torch.zeros(9, dtype=torch.bool)
    options = Selection().numbers()
    options |= {"layout": [0, 0, 9, 9], "step": 1, "seed": 1} | wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.uegr_kernels.selection_mask_.default(torch.ones(9), None, out=out, **options)
    assert not out.any()


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_the_kernel_refuses_memory_that_is_not_there(native):
    g = torch.ones(9)
    g.untyped_storage().resize_(16)
    with pytest.raises(RuntimeError, match="grad.* has no memory: its storage was freed"):
        uk.selection_mask(g, seed=1, step=1, backend=native)
