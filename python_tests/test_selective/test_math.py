"""The neutral option against torch.optim, and the selection against literals, SciPy and what
docs/choose.md says of settings.
"""

import numpy as np
import pytest
import torch
from conftest import compare

import uegr_kernels as uk
from uegr_kernels.selective import reference
from uegr_kernels.selective.options import Selection

from .problems import (
    DTYPES,
    HAND,
    NEUTRAL,
    OPTIMIZERS,
    as_parameters,
    dtype_id,
    in_dtype,
    probability,
    problem,
    run_steps,
    states_of,
    trained,
)

# What torch.optim.AdamW and SGD both have, at values that matter.
ADAMW_OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"weight_decay": 0.0}, id="no decay"),
    pytest.param({"weight_decay": 0.3, "betas": (0.6, 0.95), "eps": 1e-3}, id="decay, betas, eps"),
    # quick averages, so that the maximum is not the last
    pytest.param({"amsgrad": True, "betas": (0.5, 0.6)}, id="amsgrad"),
    pytest.param({"maximize": True, "weight_decay": 0.1}, id="maximize"),
    pytest.param({"lr": torch.tensor(0.02)}, id="tensor lr"),
    pytest.param({"lr": torch.tensor([[0.02]])}, id="tensor lr of two axes"),
    pytest.param({"betas": (torch.tensor(0.8), torch.tensor([0.99]))}, id="tensor betas"),
]
SGD_OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"weight_decay": 0.1}, id="decay"),
    pytest.param({"momentum": 0.9}, id="momentum"),
    pytest.param({"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}, id="dampening"),
    pytest.param({"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, id="nesterov"),
    pytest.param({"momentum": 0.8, "maximize": True, "weight_decay": 0.1}, id="maximize"),
    pytest.param({"lr": torch.tensor(0.02), "momentum": 0.5}, id="tensor lr"),
]
NEUTRAL_SHAPES = [(31, 33), (7,), (), (0,), (1,)]


def neutral_against_torch(cls, torch_class, backend, dtype, options, target):
    options = {"lr": 1e-2} | in_dtype(options, dtype)
    steps = 3 if backend == "triton" else 100 if dtype == torch.float32 else 20
    start, gradients = problem(NEUTRAL_SHAPES, dtype, steps=steps)
    params, optimizer = trained(cls, backend, start, gradients, **NEUTRAL, **options, target=target)
    expected = as_parameters(start)
    other = torch_class(expected, foreach=False, **options)
    run_steps(other, expected, gradients)
    operation = "equal" if backend == "reference" and target == "gradient" else "trajectory"
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        # A hundred steps may add up to next to nothing, and no larger element is there to compare
        # with.
        scale = 1.0 if q.numel() > 1 else 10.0
        compare(p, q, operation, name=f"parameter {i}", scale=scale)
        for key, value in states_of(other, q).items():
            compare(
                optimizer.state[p][key],
                value,
                "equal" if key == "step" else operation,
                name=f"{key} of parameter {i}",
                scale=scale,
            )


@pytest.mark.parametrize("options", ADAMW_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_neutral_equals_torch_adamw(backend, dtype, options):
    neutral_against_torch(uk.SelectiveAdamW, torch.optim.AdamW, backend, dtype, options, "gradient")


@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("options", [{}, {"lr": 3e-4, "maximize": True}, {"lr": 1e-2}], ids=str)
def test_roundings_of_a_hundred_steps_are_torchs(backend, options, target):
    """Steps of a few units in the parameter's last place, all rounded to the same side."""
    start, gradients = problem([(200,)] * 3, steps=100)
    start = [torch.ones(200), start[1], start[2] * 0.02]
    params, _ = trained(
        uk.SelectiveAdamW, backend, start, gradients, **NEUTRAL, **options, target=target
    )
    expected = as_parameters(start)
    run_steps(torch.optim.AdamW(expected, foreach=False, **options), expected, gradients)
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        compare(p, q, "trajectory", name=f"parameter {i}")


@pytest.mark.parametrize("options", SGD_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_neutral_equals_torch_sgd(backend, dtype, options):
    neutral_against_torch(uk.SelectiveSGD, torch.optim.SGD, backend, dtype, options, "gradient")


@pytest.mark.parametrize(
    ("cls", "torch_class"),
    [(uk.SelectiveAdamW, torch.optim.AdamW), (uk.SelectiveSGD, torch.optim.SGD)],
    ids=["adamw", "sgd"],
)
def test_neutral_with_target_update_equals_torch(backend, cls, torch_class):
    neutral_against_torch(cls, torch_class, backend, torch.float32, {"weight_decay": 0.1}, "update")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(
    ("cls", "torch_class", "options"),
    [
        pytest.param(
            uk.SelectiveAdamW, torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}, id="adamw"
        ),
        pytest.param(
            uk.SelectiveSGD,
            torch.optim.SGD,
            {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
            id="sgd",
        ),
    ],
)
def test_neutral_16_bit_equals_a_float32_optimizer_rounded_after_each_step(
    backend, dtype, cls, torch_class, options
):
    start, gradients = problem(NEUTRAL_SHAPES, dtype, steps=3 if backend == "triton" else 20)
    params, optimizer = trained(cls, backend, start, gradients, **NEUTRAL, **options)
    wide = as_parameters([t.float() for t in start])
    other = torch_class(wide, foreach=False, **options)
    for grads in gradients:
        run_steps(other, wide, [[g.float() for g in grads]])
        for q in wide:
            q.data.copy_(q.data.to(dtype))
    operation = "equal" if backend == "reference" else "trajectory"
    for i, (p, q) in enumerate(zip(params, wide, strict=True)):
        assert p.dtype == dtype
        compare(p, q.to(dtype), operation, name=f"parameter {i}")
        for key, value in states_of(other, q).items():
            # A parameter that rounds to the other side changes what weight decay feeds SGD's
            # buffer, by one bit of 16.
            compare(
                optimizer.state[p][key],
                value,
                "equal" if key == "step" else operation,
                name=key,
                row=dtype,
            )


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_lr_tensor_changed_in_place_between_steps_is_seen(backend, cls):
    start, gradients = problem([(9,)], steps=2)
    lr = torch.tensor(0.1)
    params = as_parameters(start)
    optimizer = cls(params, lr=lr, backend=backend, **NEUTRAL)
    run_steps(optimizer, params, gradients[:1])
    before = params[0].detach().clone()
    lr.zero_()
    run_steps(optimizer, params, gradients[1:])
    assert torch.equal(params[0], before)


# s~ by hand, and p = 1/(1 + exp(d*10*(s~ - 0.8))) worked out in 64 bits.
HAND_LITERALS = [
    pytest.param(
        "minmax",
        "printed",
        [0, 1 / 8, 1 / 3, 1],
        [0.9996646499, 0.9988304897, 0.9906840407, 0.1192029220],
        id="minmax-printed",
    ),
    pytest.param(
        "minmax",
        "salient",
        [0, 1 / 8, 1 / 3, 1],
        [0.0003353501305, 0.001169510265, 0.009315959345, 0.880797078],
        id="minmax-salient",
    ),
    pytest.param(
        "range",
        "printed",
        [1 / 24, 1 / 6, 3 / 8, 25 / 24],
        [0.9994913966, 0.9982270454, 0.985936373, 0.08191057716],
        id="range-printed",
    ),
    pytest.param(
        "range",
        "salient",
        [1 / 24, 1 / 6, 3 / 8, 25 / 24],
        [0.0005086033765, 0.001772954595, 0.01406362704, 0.9180894228],
        id="range-salient",
    ),
    pytest.param(
        "rank",
        "printed",
        [0, 0.25, 0.5, 0.75],
        [0.9996646499, 0.9959298623, 0.9525741268, 0.6224593312],
        id="rank-printed",
    ),
    pytest.param(
        "rank",
        "salient",
        [0, 0.25, 0.5, 0.75],
        [0.0003353501305, 0.004070137716, 0.04742587318, 0.3775406688],
        id="rank-salient",
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("normalization", "direction", "s", "p"), HAND_LITERALS)
def test_probability_by_hand(backend, dtype, normalization, direction, s, p):
    options = {"normalization": normalization, "direction": direction}
    found = uk.selection_probability(HAND.to(dtype), **options, backend=backend)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the literals have ten digits, float32's exp six
    np.testing.assert_allclose(found.double().numpy(), p, rtol=4e-6)
    selection = Selection(**options)
    np.testing.assert_allclose(
        reference.normalise(HAND, None, None, selection).numpy(), s, rtol=1e-6
    )


def test_rank_is_scipys(backend):
    # ties, one of them at 0
    g = torch.tensor([3.0, -1.0, 0.0, 2.0, -3.0, 0.5, 0.0, 7.0, -2.0])
    stats = pytest.importorskip("scipy.stats")
    ranks = (stats.rankdata((g.double() ** 2).numpy(), method="min") - 1) / g.numel()
    expected = 1 / (1 + np.exp(4 * (ranks - 0.5)))
    found = uk.selection_probability(
        g, normalization="rank", threshold=0.5, sharpness=2.0, backend=backend
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)


def test_rank_counts_finite_elements_only(backend):
    g = torch.tensor([3.0, float("nan"), 1.0, float("inf"), 2.0])
    found = uk.selection_probability(g, normalization="rank", backend=backend)
    finite = uk.selection_probability(g[[0, 2, 4]], normalization="rank", backend=backend)
    assert torch.equal(found[[0, 2, 4]], finite) and found[[1, 3]].tolist() == [1.0, 1.0]


def test_rank_of_equal_values_is_one_value(backend):
    found = uk.selection_probability(
        torch.full((100,), -2.5), normalization="rank", backend=backend
    )
    np.testing.assert_allclose(found.numpy(), 0.9996646499, rtol=4e-6)


def test_constant_probability_is_keep_probability(backend):
    found = uk.selection_probability(
        HAND, normalization="constant", keep_probability=0.375, backend=backend
    )
    np.testing.assert_allclose(found.numpy(), 0.375, rtol=1e-7)


def test_min_probability_is_a_floor(backend):
    options = {"direction": "salient", "backend": backend}
    found = uk.selection_probability(HAND, min_probability=0.005, **options)
    np.testing.assert_allclose(
        found.numpy(), [0.005, 0.005, 0.009315959345, 0.880797078], rtol=4e-6
    )
    steep = uk.selection_probability(HAND, sharpness=1000.0, **options)
    # u's own step
    assert steep[0].item() == 2.0**-24
    constant = uk.selection_probability(
        HAND, normalization="constant", keep_probability=0.1, min_probability=0.25, backend=backend
    )
    np.testing.assert_allclose(constant.numpy(), 0.25, rtol=1e-7)


def test_sharpness_zero_is_a_coin(backend):
    for normalization in ("minmax", "range", "rank"):
        assert (
            uk.selection_probability(
                HAND, sharpness=0.0, normalization=normalization, backend=backend
            ).tolist()
            == [0.5] * 4
        )


def test_readme_figures(backend):
    # most of its squares are next to nothing beside the largest
    heavy = torch.distributions.StudentT(3.0).sample((50_000,))
    p = uk.selection_probability(heavy, backend=backend)
    assert abs(p.max().item() - 0.9997) < 5e-5 and p.median().item() > 0.999
    line_11 = uk.selection_mask(heavy, threshold=0.08, seed=1, step=1, backend=backend)
    assert (
        abs(uk.selection_probability(heavy, threshold=0.08, backend=backend).max().item() - 0.69)
        < 1e-4
    )
    assert abs(line_11.float().mean().item() - 0.69) < 0.01
    roast = uk.selection_mask(
        heavy, normalization="rank", direction="salient", seed=1, step=1, backend=backend
    )
    assert abs(roast.float().mean().item() - 0.2127) < 0.005
    assert heavy[roast].abs().median() > 2 * heavy.abs().median()


def test_saliency_takes_the_place_of_the_squared_gradient(backend):
    for normalization in ("minmax", "range", "rank"):
        options = {"normalization": normalization, "backend": backend}
        given = uk.selection_probability(torch.randn(4), saliency=HAND**2, **options)
        compare(given, uk.selection_probability(HAND, **options), "selection")
    g = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for p in g:
        p.grad = torch.ones(4)
    uk.select_gradients_(g, seed=1, step=1, saliency=[HAND**2, HAND.flip(0) ** 2], backend=backend)
    for p, s in zip(g, (HAND, HAND.flip(0)), strict=True):
        kept = p.grad != 0
        np.testing.assert_allclose(
            p.grad[kept].numpy(), 1 / probability(s)[kept].numpy(), rtol=4e-6
        )


def test_a_saliency_that_is_not_finite_is_selected_and_counts_nowhere(backend):
    for bad in (float("nan"), float("inf")):
        for normalization in ("minmax", "range", "rank"):
            saliency = torch.cat((HAND**2, torch.tensor([bad])))
            p = uk.selection_probability(
                torch.ones(5), saliency=saliency, normalization=normalization, backend=backend
            )
            expected = uk.selection_probability(
                torch.ones(4), saliency=HAND**2, normalization=normalization, backend=backend
            )
            assert torch.equal(p[:4], expected) and p[4].item() == 1.0
