"""Degenerate input: nothing, one element, equal ones, denormal ones, ones that are not finite."""

import numpy as np
import pytest
import torch
from conftest import compare

import uegr_kernels as uk
from uegr_kernels.selective.options import FIELDS

from .problems import (
    DTYPES,
    NEUTRAL,
    OPTIMIZERS,
    SPREAD,
    as_parameters,
    dtype_id,
    problem,
    run_steps,
    same_bits,
    trained,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [0.0, -2.5], ids=["zero", "equal"])
def test_equal_gradients_have_saliency_zero(backend, dtype, value):
    g = torch.full((1025,), value, dtype=dtype)
    for normalization in ("minmax", "range", "rank"):
        p = uk.selection_probability(g, normalization=normalization, backend=backend)
        np.testing.assert_allclose(p.double().numpy(), 0.99966465, rtol=1e-6)
        params, optimizer = trained(
            uk.SelectiveAdamW,
            backend,
            [torch.ones_like(g)],
            [[g]],
            seed=1,
            normalization=normalization,
        )
        assert params[0].isfinite().all() and optimizer.state[params[0]]["step"] == 1


def test_a_zero_gradient_with_lr_zero_moves_nothing_and_makes_all_state(backend):
    start, gradients = problem([(9,), ()], steps=1)
    for options in ({}, {"statistics": "previous"}, {"normalization": "rank", "scope": "global"}):
        zeros = [[torch.zeros_like(g) for g in gradients[0]]]
        params, optimizer = trained(
            uk.SelectiveAdamW, backend, start, zeros, lr=0.0, seed=1, **options
        )
        assert same_bits([p.detach() for p in params], start)
        assert all({"step", "exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys() for p in params)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "salient"},
        {"normalization": "range"},
        {"normalization": "rank"},
        {"target": "update"},
    ],
    ids=str,
)
def test_one_bad_element_spoils_itself_alone(backend, cls, bad, dtype, options):
    options = SPREAD | {"lr": 0.1, "backend": backend} | options
    start, gradients = problem([(41,)], dtype, steps=2)
    # The oracle: the same steps with the bad element at a value that moves no statistic.
    at, least = 17, gradients[0][0].abs().argmin().item()
    spoiled, harmless = gradients[0][0].clone(), gradients[0][0].clone()
    spoiled[at], harmless[at] = bad, gradients[0][0][least]
    found, _ = trained(cls, start=start, gradients=[[spoiled]], **options)
    assert not found[0][at].isfinite() or (cls is uk.SelectiveAdamW and spoiled[at].isinf())
    others = torch.arange(41) != at
    assert found[0][others].isfinite().all()
    # a rank counts its elements
    if options.get("normalization") != "rank":
        expected, _ = trained(cls, start=start, gradients=[[harmless]], **options)
        compare(found[0][others], expected[0][others], "equal")
    p = uk.selection_probability(
        spoiled,
        **{k: v for k, v in options.items() if k in FIELDS and k != "target"},
        backend=backend,
    )
    without = {k: v for k, v in options.items() if k in FIELDS and k != "target"}
    assert p[at] == 1.0
    compare(
        p[others], uk.selection_probability(spoiled[others], **without, backend=backend), "equal"
    )


def test_a_gradient_that_is_not_finite_passes_the_selection_unchanged(backend):
    g = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 2.0])
    for options in (
        {"normalization": "constant", "keep_probability": 1e-6},
        {"direction": "salient", "sharpness": 100.0},
    ):
        p = torch.nn.Parameter(torch.zeros(5))
        p.grad = g.clone()
        uk.select_gradients_(p, seed=3, step=1, backend=backend, **options)
        assert same_bits(p.grad[1:4], g[1:4])
        assert uk.selection_mask(g, seed=3, step=1, backend=backend, **options)[1:4].all()


TORCHS = {uk.SelectiveAdamW: torch.optim.AdamW, uk.SelectiveSGD: torch.optim.SGD}


@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_nonfinite_second_moment_stops_the_step_as_torchs(backend, target, amsgrad):
    # From 5.8e20 on v overflows, and m does not: theta only decays.
    huge = torch.tensor([1.0, 1e-3, -2.0, 5e20, 7e20, -7e20, 1e21, -1e21, 3e38, 0.0, 1e15])
    start = torch.linspace(-1, 1, len(huge))
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad}
    gradients = [[huge], [huge.sign()], [huge.sign()]]
    found, optimizer = trained(
        uk.SelectiveAdamW, backend, [start], gradients, target=target, **NEUTRAL, **options
    )
    expected = as_parameters([start])
    torchs = torch.optim.AdamW(expected, foreach=False, **options)
    run_steps(torchs, expected, gradients)
    second = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    assert (
        optimizer.state[found[0]][second].isinf().tolist()
        == torchs.state[expected[0]][second].isinf().tolist()
    )
    assert optimizer.state[found[0]][second].isinf().sum() == 5
    assert found[0].isfinite().all()
    compare(found[0], expected[0], "step")
    selected, _ = trained(
        uk.SelectiveAdamW, backend, [start], gradients, target=target, **SPREAD, **options
    )
    assert selected[0].isfinite().all()


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (uk.SelectiveAdamW, {}),
        (uk.SelectiveAdamW, {"amsgrad": True, "maximize": True}),
        (uk.SelectiveAdamW, {"lr": 0.0}),
        (uk.SelectiveSGD, {}),
        (uk.SelectiveSGD, {"momentum": 0.9}),
        (uk.SelectiveSGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
        (uk.SelectiveSGD, {"momentum": 0.5, "dampening": 1.0, "lr": 0.0}),
    ],
)
def test_a_nonfinite_weight_ends_as_torchs(backend, cls, line, target, weight_decay):
    options = {"lr": 0.1, "weight_decay": weight_decay} | line
    start = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, 1.0, -3e38, torch.inf, -torch.inf, 2.0, 0.0]
    )
    bad = torch.tensor([1.0, 1.0, 1.0, torch.inf, 1.0, torch.inf, torch.inf, torch.nan, 0.0])
    gradients = [[bad], [torch.ones_like(bad)], [-torch.ones_like(bad)]]
    found, _ = trained(cls, backend, [start], gradients, target=target, **NEUTRAL, **options)
    expected = as_parameters([start])
    run_steps(TORCHS[cls](expected, foreach=False, **options), expected, gradients)
    compare(found[0], expected[0], "step")
    if weight_decay == 0:
        assert found[0][:2].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_nonfinite_weight_that_is_not_selected_stays(backend, cls, weight_decay):
    start = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0] * 8)
    gradients = [[torch.ones(32)]]
    options = {
        "normalization": "constant",
        "keep_probability": 0.3,
        "seed": 1,
        "lr": 0.1,
        "weight_decay": weight_decay,
    }
    found, _ = trained(cls, backend, [start], gradients, target="update", **options)
    selected = uk.selection_mask(
        gradients[0][0],
        **{k: options[k] for k in ("normalization", "keep_probability", "seed")},
        step=1,
    )
    assert 0 < selected.sum() < 32
    assert same_bits(found[0].detach()[~selected], start[~selected])
    infinite = selected & start.isinf()
    if cls is uk.SelectiveAdamW or weight_decay == 0:
        assert same_bits(found[0].detach()[infinite], start[infinite])
    else:
        # inf - lr * inf, as in torch.optim.SGD
        assert found[0][infinite].isnan().all()


def test_nothing_finite_is_no_error(backend):
    g = torch.full((5,), torch.nan)
    for normalization in ("minmax", "range", "rank"):
        assert (
            uk.selection_probability(g, normalization=normalization, backend=backend).tolist()
            == [1.0] * 5
        )
        for options in (
            ({}, {"scope": "global"})
            if normalization == "rank"
            else ({}, {"statistics": "previous"}, {"scope": "global"})
        ):
            start, gradients = problem([(5,)], steps=2)
            params = as_parameters(start)
            optimizer = uk.SelectiveSGD(
                params, seed=1, normalization=normalization, backend=backend, **options
            )
            run_steps(optimizer, params, [[g], gradients[0]])
            assert params[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_squares_that_overflow_are_the_largest_float(backend, dtype):
    large = torch.finfo(dtype).max
    # s~: 0, 1, 1, 0
    g = torch.tensor([1.0, large, -large / 4, 0.0], dtype=dtype)
    for normalization in ("minmax", "range"):
        p = uk.selection_probability(g, normalization=normalization, backend=backend)
        np.testing.assert_allclose(
            p.double().numpy(), [0.99966465, 0.11920292, 0.11920292, 0.99966465], rtol=1e-5
        )
        equal = uk.selection_probability(
            torch.full((5,), large / 2, dtype=dtype), normalization=normalization, backend=backend
        )
        # all the largest: s~ is 0
        np.testing.assert_allclose(equal.double().numpy(), 0.99966465, rtol=1e-6)
    found, _ = trained(
        uk.SelectiveSGD,
        backend,
        [torch.zeros_like(g)],
        [[g]],
        lr=1e-3,
        seed=1,
        rescale=False,
        statistics="previous",
    )
    assert found[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_denormal_gradients(backend, dtype):
    g = torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=dtype) * torch.finfo(dtype).smallest_normal / 8
    # a rank tells denormals apart where their bins differ
    p = uk.selection_probability(g, normalization="rank", backend=backend)
    if backend == "reference":
        assert p.isfinite().all()
    params, _ = trained(uk.SelectiveAdamW, backend, [torch.ones_like(g)], [[g]] * 3, lr=0.1, seed=1)
    assert params[0].isfinite().all()
    # their squares are 0: nothing is salient
    if dtype in (torch.float32, torch.float64, torch.bfloat16):
        np.testing.assert_allclose(
            uk.selection_probability(g, backend=backend).double().numpy(), 0.99966465, rtol=1e-6
        )


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_empty_tensors_and_no_tensors(backend, cls):
    for options in (
        {},
        {"normalization": "rank"},
        {"statistics": "previous"},
        {"scope": "global"},
        {"scope": "global", "normalization": "rank"},
    ):
        params, optimizer = trained(
            cls,
            backend,
            [torch.zeros(0), torch.zeros(3, 0)],
            [[torch.zeros(0), torch.zeros(3, 0)]] * 2,
            seed=1,
            **options,
        )
        assert optimizer.state[params[0]]["step"] == 2
        alone = torch.nn.Parameter(torch.ones(2))
        # no gradient at all
        cls([alone], seed=1, backend=backend, **options).step()
        assert alone.tolist() == [1.0, 1.0]
    uk.select_gradients_([], seed=1, step=1, backend=backend)
    assert uk.selection_probability(torch.zeros(0, 4), backend=backend).shape == (0, 4)
    assert uk.selection_mask(torch.zeros(0, 4), seed=1, step=1, backend=backend).shape == (0, 4)


def test_one_element(backend):
    g = torch.tensor(3.0)
    for normalization, p in (("minmax", 0.99966465), ("range", 0.99966465), ("rank", 0.99966465)):
        found = uk.selection_probability(g, normalization=normalization, backend=backend)
        assert found.shape == () and found.item() == pytest.approx(p, rel=1e-6)
        assert (
            uk.selection_mask(g, seed=1, step=1, normalization=normalization, backend=backend).shape
            == ()
        )


def test_minus_zero_is_a_saliency_of_zero(backend):
    # one more than a rank looks at every element of
    n = 5000 if backend == "triton" else 2**20 + 1
    g, s = torch.ones(n), torch.zeros(n)
    s[: n // 2] = 1
    options = {
        "normalization": "rank",
        "direction": "salient",
        "threshold": 0.3,
        "backend": backend,
    }
    plus, minus = (
        uk.selection_probability(g, saliency=given, **options)
        for given in (s, s.where(s > 0, -0.0))
    )
    assert torch.equal(plus, minus) and plus[-1] < plus[0]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"statistics": "previous"}, {"rescale": False}], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("at", [0, 301, 599], ids=["first", "middle", "last"])
def test_the_loops_for_finite_gradients_give_the_same_bits(backend, cls, options, bad, at):
    """A gradient that is finite everywhere lets a kernel leave out what guards against the rest."""
    start, gradients = problem([(600,)], steps=2)
    options = SPREAD | {"lr": 0.1, "backend": backend} | options
    for g in gradients:
        # no extreme
        g[0][at] = 0.5
    finite, _ = trained(cls, start=start, gradients=gradients, **options)
    gradients[1][0][at] = bad
    guarded, _ = trained(cls, start=start, gradients=gradients, **options)
    others = torch.arange(600) != at
    assert same_bits(finite[0].detach()[others], guarded[0].detach()[others])
    assert not same_bits(finite[0].detach()[at], guarded[0].detach()[at])


@pytest.mark.parametrize("at", [0, 301, 599], ids=["first", "middle", "last"])
@pytest.mark.parametrize("normalization", ["minmax", "range"])
@pytest.mark.parametrize("value", [1e30, 3e38, 1e-30, 0.0], ids=str)
def test_statistics_handed_in_give_the_same_bits(backend, normalization, value, at):
    """Those of one tensor are its own, but say nothing of this gradient."""
    g = problem([(600,)], steps=1)[1][0][0]
    g[at] = value
    found = []
    for scope in ("tensor", "global"):
        p = torch.nn.Parameter(torch.zeros_like(g))
        p.grad = g.clone()
        options = {"normalization": normalization, "threshold": 0.5, "scope": scope}
        uk.select_gradients_([p], **options, seed=3, step=1, backend=backend)
        found.append(p.grad)
    assert same_bits(*found)
