"""The CUDA and Triton kernels on a GPU (TRITON_INTERPRET=0): what `python -m bench.gpu` runs.

It imports torch, NumPy, pytest and Hypothesis alone, and so do the files that it imports.
"""

import os

import pytest
import torch
from conftest import compare
from test_selective.problems import (
    OPTIMIZERS,
    SPREAD,
    as_parameters,
    noting_near_ties,
    problem,
    states_of,
    trained,
)

import uegr_kernels as uk
from bench import machine
from uegr_kernels.core import backends

SHAPES = [(0,), (5, 41), (1025,), (70_001,), (31, 33)]


@pytest.fixture
def gpu() -> torch.device:
    if machine.no_gpu():
        pytest.skip(f"no GPU: {machine.no_gpu()}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "Triton's kernels are interpreted in this process; run `TRITON_INTERPRET=0 "
            "python -m pytest -k gpu`"
        )
    return torch.device("cuda")


@pytest.fixture(params=("cuda", "triton"))
def kernels(request, gpu) -> str:
    """Gives every backend with kernels for this GPU."""
    reason = backends.why_not(request.param, "selective.selective_adamw_", gpu)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def moved(tensors, device):
    return [t.to(device) for t in tensors]


def case(cls, regime: str, dtype: torch.dtype, **options):
    return pytest.param(cls, options, dtype, id=f"{cls.__name__} {regime}")


# Which regime: what makes a kernel another one (a normalisation, where its statistics come from,
# the target, an update rule's states), and each dtype under both update rules. The CUDA library
# refuses float64.
CASES = [
    case(uk.SelectiveAdamW, "minmax", torch.float32),
    case(uk.SelectiveSGD, "minmax salient", torch.bfloat16, direction="salient"),
    # s over its span, not less the minimum
    case(
        uk.SelectiveAdamW,
        "range salient",
        torch.bfloat16,
        normalization="range",
        direction="salient",
    ),
    # a histogram before the step
    case(uk.SelectiveSGD, "rank", torch.float16, normalization="rank"),
    # no statistics: a single pass over the gradient
    case(
        uk.SelectiveAdamW, "constant", torch.float16, normalization="constant", keep_probability=0.3
    ),
    case(
        uk.SelectiveSGD,
        "constant not rescaled",
        torch.float64,
        normalization="constant",
        keep_probability=0.3,
        rescale=False,
    ),
    # p at its two ends
    case(uk.SelectiveAdamW, "floor", torch.float64, min_probability=0.25),
    case(uk.SelectiveSGD, "sharp", torch.float32, sharpness=40.0),
    # statistics over all tensors
    case(uk.SelectiveAdamW, "global", torch.float32, scope="global"),
    case(
        uk.SelectiveSGD,
        "global range",
        torch.bfloat16,
        scope="global",
        normalization="range",
        direction="salient",
    ),
    # statistics of the step before, which are states
    case(uk.SelectiveAdamW, "previous", torch.bfloat16, statistics="previous"),
    case(
        uk.SelectiveSGD,
        "previous range salient",
        torch.float16,
        statistics="previous",
        normalization="range",
        direction="salient",
    ),
    # the mask is on the step, not on the gradient
    case(uk.SelectiveAdamW, "update", torch.float16, target="update"),
    case(
        uk.SelectiveSGD,
        "update not rescaled",
        torch.float64,
        target="update",
        rescale=False,
        normalization="rank",
    ),
    case(uk.SelectiveSGD, "update with decay", torch.float32, target="update", weight_decay=0.3),
    # the update rules' own options and states
    case(uk.SelectiveAdamW, "maximize", torch.float64, maximize=True),
    case(
        uk.SelectiveAdamW,
        "amsgrad update",
        torch.float32,
        amsgrad=True,
        betas=(0.5, 0.6),
        target="update",
    ),
    case(
        uk.SelectiveSGD,
        "dampening update",
        torch.bfloat16,
        momentum=0.9,
        dampening=0.4,
        weight_decay=0.2,
        target="update",
    ),
]


@pytest.mark.parametrize(("cls", "options", "dtype"), CASES)
def test_gpu_steps_agree_with_the_reference(monkeypatch, gpu, kernels, cls, options, dtype):
    options = SPREAD | {"lr": 0.3} | options
    ranked = options.get("normalization") == "rank"
    start, gradients = problem(SHAPES, dtype)
    if kernels == "cuda" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="float64"):
            trained(
                cls,
                kernels,
                moved(start, gpu),
                [moved(grads, gpu) for grads in gradients],
                **options,
            )
        return
    with noting_near_ties(monkeypatch, histogram=ranked) as near:
        expected, other = trained(cls, "reference", start, gradients, **options)
    params, optimizer = trained(
        cls, kernels, moved(start, gpu), [moved(grads, gpu) for grads in gradients], **options
    )
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        found = {"parameter": (p, q)} | {
            key: (optimizer.state[p][key], value) for key, value in states_of(other, q).items()
        }
        for name, (ours, value) in found.items():
            ignored = near[i] if ours.shape == q.shape else None
            compare(
                ours.cpu(),
                value,
                "rank step" if ranked else "step",
                name=f"{name} of {i}",
                ignore=ignored,
                row=dtype,
            )


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{}, {"statistics": "previous"}, {"normalization": "rank"}], ids=str
)
def test_gpu_replays_between_eager_steps_equal_eager_steps(gpu, kernels, cls, options):
    start, gradients = problem(SHAPES, steps=5)
    gradients = [moved(grads, gpu) for grads in gradients]
    options = (
        SPREAD
        | options
        | {"lr": torch.tensor(0.1, device=gpu), "capturable": True, "backend": kernels}
    )
    expected, _ = trained(cls, start=moved(start, gpu), gradients=gradients, **options)

    params = as_parameters(moved(start, gpu))
    optimizer = cls(params, **options)
    static = [torch.empty_like(g) for g in gradients[0]]

    def step(grads) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    step(gradients[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static)
    for k in range(1, 5):
        if k % 2:
            torch._foreach_copy_(static, gradients[k])
            graph.replay()
        else:
            step(gradients[k])
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        compare(p.detach().cpu(), q.detach().cpu(), "equal", name=f"parameter {i}")


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_gpu_steady_steps_neither_wait_nor_take_more_memory(gpu, kernels, cls):
    start, gradients = problem(SHAPES, steps=4)
    gradients = [moved(grads, gpu) for grads in gradients]
    params, optimizer = trained(
        cls, kernels, moved(start, gpu), gradients[:3], seed=1, capturable=True
    )
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, g in zip(params, gradients[3], strict=True):
            p.grad = g
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_reserved() == reserved


def test_gpu_masks_equal_the_references(gpu, kernels):
    g = torch.randn(1 << 20)
    found, expected = (
        uk.selection_mask(x, seed=3, step=7, backend=b).cpu()
        for x, b in ((g.to(gpu), kernels), (g, "reference"))
    )
    # u and p closer than 2^-22
    assert (found != expected).sum() <= 2


# a warp, a block, clusters, ragged rows
@pytest.mark.parametrize("classes", [10, 1003, 5000, 50_257, 128_256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_losses_agree_with_the_reference(gpu, kernels, classes, dtype):
    clean, adversarial = (
        torch.randn(*shape, 8, classes, device=gpu, dtype=dtype) for shape in ((), (2,))
    )
    labels = torch.randint(classes, (8,), device=gpu)
    found = []
    for backend in (kernels, "reference"):
        x, y = (t.clone().requires_grad_() for t in (clean, adversarial))
        loss = uk.uegr_loss(x, y, labels, js_weight=1.0, label_smoothing=0.1, backend=backend)
        loss.backward()
        found.append((loss.detach(), x.grad, y.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("per", ["sample", "token", "all"])
def test_gpu_perturbations_agree_with_the_reference(gpu, kernels, norm, per):
    g, delta = torch.randn(2, 3, 70, 24, device=gpu)
    mask = torch.rand(3, 70, device=gpu) < 0.9
    for call in (
        lambda b: uk.fgm_perturbation(
            g, 0.1, norm=norm, per=per, mask=mask, keep_probability=0.5, seed=4, backend=b
        ),
        lambda b: uk.pgd_step(
            delta, g, step_size=0.1, radius=0.3, norm=norm, per=per, mask=mask, backend=b
        ),
    ):
        torch.testing.assert_close(call(kernels), call("reference"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("units", [24, 1001])
def test_gpu_dropout_agrees_with_the_reference(gpu, kernels, units):
    found = []
    for backend in (kernels, "reference"):
        dropout = uk.AdaptiveDropout(units, 0.4, backend=backend).to(gpu)
        torch.manual_seed(6)
        x = torch.linspace(-1, 1, 40 * units, device=gpu).view(40, units).requires_grad_()
        for _ in range(2):
            y = dropout(x)
            y.square().sum().backward()
        found.append((y.detach(), x.grad, dropout.gradient_norm, dropout.pending))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gpu_tensors_past_32_bits(gpu, kernels):
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("the GPU has too little memory")
    p = torch.nn.Parameter(torch.zeros(n, device=gpu, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    options = {
        "normalization": "constant",
        "state_dtype": torch.bfloat16,
        "seed": 1,
        "backend": kernels,
    }
    uk.SelectiveAdamW([p], lr=1.0, weight_decay=0.0, **options).step()
    assert (p.detach()[[0, 2**31 - 1, 2**31, n - 1]] == -1).all()


def test_gpu_float64_is_left_to_others(gpu):
    p = torch.nn.Parameter(torch.randn(1000, device=gpu, dtype=torch.float64))
    p.grad = torch.randn_like(p)
    optimizer = uk.SelectiveAdamW([p], seed=1)
    for step in (optimizer.step, torch.compile(optimizer.step)):
        step()
    assert (
        uk.pairwise_js(torch.randn(2, 3, 5, device=gpu, dtype=torch.float64)).dtype == torch.float64
    )
