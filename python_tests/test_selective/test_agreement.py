"""Every backend against the reference."""

import hypothesis
import numpy as np
import pytest
import torch
from conftest import compare
from hypothesis import strategies as st

import uegr_kernels as uk
from uegr_kernels.selective import reference
from uegr_kernels.selective.options import DIRECTIONS, NORMALIZATIONS, SCOPES, STATISTICS, TARGETS

from .problems import (
    AGREEMENT_SHAPES,
    DTYPES,
    OPTIMIZERS,
    SMALL_SHAPES,
    SPREAD,
    agreement_problem,
    as_parameters,
    dtype_id,
    in_dtype,
    noting_near_ties,
    problem,
    run_steps,
    spread_gradient,
    states_of,
    trained,
    transposed,
)

# Which regime: each option at a value where it decides something, alone and where two of them meet.
SELECTION_CASES = [
    pytest.param({}, id="minmax"),
    pytest.param({"direction": "salient"}, id="minmax salient"),
    pytest.param({"normalization": "range"}, id="range"),
    pytest.param({"normalization": "range", "direction": "salient"}, id="range salient"),
    pytest.param({"normalization": "rank"}, id="rank"),
    pytest.param(
        {"normalization": "rank", "direction": "salient", "min_probability": 0.1},
        id="rank salient with a floor",
    ),
    pytest.param({"normalization": "constant", "keep_probability": 0.3}, id="constant"),
    pytest.param(
        {"normalization": "constant", "keep_probability": 0.3, "rescale": False},
        id="constant not rescaled",
    ),
    pytest.param({"rescale": False}, id="not rescaled"),
    pytest.param({"min_probability": 0.25}, id="floor"),
    # 1/p up to its cap of 2^24
    pytest.param({"sharpness": 40.0}, id="sharp"),
    pytest.param({"sharpness": 0.0}, id="coin"),
    pytest.param({"scope": "global"}, id="global"),
    pytest.param(
        {"scope": "global", "normalization": "range", "direction": "salient"}, id="global range"
    ),
    pytest.param({"scope": "global", "normalization": "rank"}, id="global rank"),
]
STEP_CASES = [
    *SELECTION_CASES,
    pytest.param({"statistics": "previous"}, id="previous"),
    pytest.param(
        {"statistics": "previous", "normalization": "range", "direction": "salient"},
        id="previous range salient",
    ),
    pytest.param({"statistics": "previous", "scope": "global"}, id="previous global"),
    pytest.param({"target": "update"}, id="update"),
    pytest.param(
        {"target": "update", "rescale": False, "normalization": "rank"}, id="update not rescaled"
    ),
    pytest.param(
        {"target": "update", "statistics": "previous", "scope": "global", "direction": "salient"},
        id="update previous global",
    ),
    pytest.param({"maximize": True}, id="maximize"),
    pytest.param({"weight_decay": 0.3, "target": "update"}, id="update with decay"),
]
ADAMW_CASES = [
    *STEP_CASES,
    pytest.param({"amsgrad": True, "betas": (0.5, 0.6)}, id="amsgrad"),
    pytest.param({"amsgrad": True, "betas": (0.5, 0.6), "target": "update"}, id="amsgrad update"),
    pytest.param(
        {"betas": (torch.tensor(0.7), torch.tensor(0.9)), "lr": torch.tensor(0.5)},
        id="tensor betas and lr",
    ),
]
SGD_CASES = [
    *STEP_CASES,
    pytest.param({"momentum": 0.9}, id="momentum"),
    pytest.param({"momentum": 0.9, "dampening": 0.4}, id="dampening"),
    pytest.param(
        {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2, "target": "update"},
        id="dampening update",
    ),
    pytest.param({"momentum": 0.8, "nesterov": True, "weight_decay": 0.2}, id="nesterov"),
    pytest.param(
        {"momentum": 0.8, "nesterov": True, "target": "update", "statistics": "previous"},
        id="nesterov update previous",
    ),
]


def sharpness_scale(options: dict) -> float:
    """Returns a factor: the table's bounds are for z up to 10."""
    return max(1.0, options.get("sharpness", 5.0) / 5)


def agree(monkeypatch, cls, native, start, gradients, **options) -> None:
    """Compares both backends over the same steps: parameters and all states, but for elements that
    came near a tie in some step.
    """
    options = SPREAD | {"lr": 0.3} | in_dtype(options, start[0].dtype)
    ranked = options.get("normalization") == "rank"
    table = {"operation": "rank step" if ranked else "step", "scale": sharpness_scale(options)}
    with noting_near_ties(monkeypatch, histogram=ranked) as near:
        expected, other = trained(cls, "reference", start, gradients, **options)
    params, optimizer = trained(cls, native, start, gradients, **options)
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert p.stride() == q.stride()
        # Once spoiled, infinity and NaN are the same.
        compare(
            p, q, **table, name=f"parameter {i}", ignore=near[i] | ~p.isfinite() & ~q.isfinite()
        )
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in states_of(other, q).items():
            found = optimizer.state[p][key]
            if key == "step" or key.startswith("saliency"):
                compare(found, value, "equal", name=f"{key} of parameter {i}")
            else:
                # SGD's weight decay feeds the parameter, as rounded, to its buffer
                compare(
                    found,
                    value,
                    **table,
                    name=f"{key} of parameter {i}",
                    ignore=near[i] | ~found.isfinite() & ~value.isfinite(),
                    row=p.dtype,
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", ADAMW_CASES)
def test_adamw_agrees_with_the_reference(monkeypatch, native, dtype, options):
    start, gradients = agreement_problem(native, dtype)
    agree(monkeypatch, uk.SelectiveAdamW, native, start, gradients, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", SGD_CASES)
def test_sgd_agrees_with_the_reference(monkeypatch, native, dtype, options):
    start, gradients = agreement_problem(native, dtype)
    agree(monkeypatch, uk.SelectiveSGD, native, start, gradients, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", SELECTION_CASES)
@pytest.mark.parametrize("with_saliency", [False, True], ids=["", "saliency"])
def test_select_gradients_agrees_with_the_reference(
    monkeypatch, native, dtype, options, with_saliency
):
    start, (grads, others, *_) = agreement_problem(native, dtype)
    saliency = [g.abs() for g in others] if with_saliency else None
    results, ties = [], {}
    for backend in ("reference", native):
        params = as_parameters(start)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        with noting_near_ties(
            monkeypatch, histogram=options.get("normalization") == "rank"
        ) as near:
            uk.select_gradients_(
                params, step=3, **SPREAD, **options, saliency=saliency, backend=backend
            )
        ties |= near
        results.append([p.grad for p in params])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        operation = "rank" if options.get("normalization") == "rank" else "selection"
        compare(
            found,
            expected,
            operation,
            name=f"gradient {i}",
            ignore=ties[i],
            scale=sharpness_scale(options),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options", [case for case in SELECTION_CASES if "scope" not in case.values[0]]
)
def test_probability_and_mask_agree_with_the_reference(monkeypatch, native, dtype, options):
    generator = torch.Generator().manual_seed(3)
    for shape in SMALL_SHAPES if native == "triton" else AGREEMENT_SHAPES:
        g, s = (spread_gradient(shape, generator, dtype) for _ in range(2))
        for saliency in (None, s.abs()):
            arguments = {"saliency": saliency, "threshold": 0.5} | options
            with noting_near_ties(
                monkeypatch, histogram=options.get("normalization") == "rank"
            ) as near:
                expected = uk.selection_probability(g, **arguments, backend="reference")
                mask = uk.selection_mask(
                    g, seed=5, step=2, stream=9, **arguments, backend="reference"
                )
            found = uk.selection_probability(g, **arguments, backend=native)
            compare(
                found,
                expected,
                "rank" if options.get("normalization") == "rank" else "selection",
                name="p",
                scale=sharpness_scale(options),
            )
            compare(
                uk.selection_mask(g, seed=5, step=2, stream=9, **arguments, backend=native),
                mask,
                "equal",
                name="b",
                ignore=near[9],
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_shared_histograms_rank_is_off_by_at_most_the_share_of_the_bin(native, dtype):
    g = spread_gradient((5000,), torch.Generator().manual_seed(1), dtype)
    bins = reference.bins(g.abs()).numpy()
    share = np.bincount(bins).max() / g.numel()
    assert share < 0.05
    options = {"normalization": "rank", "sharpness": 4.0, "threshold": 0.5}
    gap = (
        (
            uk.selection_probability(g, **options, backend=native)
            - uk.selection_probability(g, **options, backend="reference")
        )
        .abs()
        .max()
        .item()
    )
    # no slope of p is steeper than sharpness/2
    assert gap <= 4.0 / 2 * share + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("n", [40_000, 70_001, 2**21 + 77])
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_a_rank_is_the_share_of_the_counted_elements_in_lower_bins(native, n, dtype):
    g = spread_gradient((n,), torch.Generator().manual_seed(2), dtype)
    # among them smaller and larger ones than any that is counted
    g[torch.tensor([1, 2, 4, 5, 7, 8])] = torch.tensor(
        [1e-7, -60000.0, torch.inf, -torch.inf, torch.nan, 0.0], dtype=dtype
    )
    every = n // 2**20 | 1 if n > 2**20 else 1
    finite = g.isfinite()
    bins = reference.bins(g.abs().nan_to_num(0, 0, 0))
    counts = torch.bincount(bins[::every][finite[::every]], minlength=bins.max() + 1).double()
    rank = (counts.cumsum(0) - counts)[bins] / counts.sum()
    found = uk.selection_probability(
        g,
        normalization="rank",
        direction="salient",
        sharpness=4.0,
        threshold=0.5,
        min_probability=0.0,
        backend=native,
    )
    assert (found[~finite] == 1).all()
    logits, expected = found[finite].double().logit(), 2 * 4.0 * (rank[finite] - 0.5)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("normalization", ["minmax", "range"])
@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4], ids=str)
def test_small_and_large_gradients_agree_with_the_reference(
    monkeypatch, native, dtype, normalization, scale
):
    # At 1e-20 a float32 s is denormal: 1/(max - min) overflows. In float16 the gradient itself is 0
    # there, at 1e-4 it is denormal.
    start, gradients = problem([(1025,), (3,)], dtype, steps=2, scale=scale)
    agree(
        monkeypatch,
        uk.SelectiveSGD,
        native,
        start,
        gradients,
        normalization=normalization,
        momentum=0.9,
        lr=1 / scale if scale < 1e5 else 1.0,
    )
    g = gradients[0][0]
    options = {"normalization": normalization, "threshold": 0.5}
    compare(
        uk.selection_probability(g, **options, backend=native),
        uk.selection_probability(g, **options, backend="reference"),
        "selection",
    )


def sliced(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 77.0, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def channels_last(t):
    return t.view(3, 5, 7, 11).contiguous(memory_format=torch.channels_last)


def expanded(t):
    return t[:1].expand(t.shape)


def as_is(t):
    return t


# Strides of the parameter and of its gradient.
LAYOUT_CASES = [
    pytest.param(transposed, transposed, id="both transposed"),
    pytest.param(transposed, as_is, id="parameter transposed"),
    pytest.param(as_is, transposed, id="gradient transposed"),
    pytest.param(sliced, sliced, id="both sliced"),
    pytest.param(sliced, as_is, id="parameter sliced"),
    pytest.param(as_is, sliced, id="gradient sliced"),
    pytest.param(as_is, expanded, id="gradient expanded"),
    pytest.param(sliced, expanded, id="sliced with an expanded gradient"),
    pytest.param(channels_last, lambda t: t.view(3, 5, 7, 11), id="parameter channels last"),
    pytest.param(lambda t: t.view(3, 5, 7, 11), channels_last, id="gradient channels last"),
    pytest.param(channels_last, channels_last, id="both channels last"),
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(("of_parameter", "of_gradient"), LAYOUT_CASES)
def test_strides_change_nothing(backend, cls, of_parameter, of_gradient):
    start, gradients = problem([(15, 77)], steps=3)
    arranged = [[of_gradient(g) for g in grads] for grads in gradients]
    contiguous = [[g.contiguous() for g in grads] for grads in arranged]
    shape = arranged[0][0].shape
    for options in (
        {"weight_decay": 0.1},
        {"normalization": "rank"},
        {"statistics": "previous", "target": "update"},
    ):
        options = SPREAD | options | {"lr": 0.1, "backend": backend}
        expected = as_parameters([start[0].view(shape)])
        straight = cls(expected, **options)
        run_steps(straight, expected, contiguous)
        p = of_parameter(start[0]).requires_grad_()
        strides = p.stride()
        optimizer = cls([p], **options)
        run_steps(optimizer, [p], arranged)
        assert p.stride() == strides
        compare(p, expected[0], "equal", name="parameter")
        for key, value in states_of(straight, expected[0]).items():
            compare(optimizer.state[p][key], value, "equal", name=key)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_memory_between_the_elements_of_a_slice_is_untouched(backend, cls, dtype):
    base = torch.full((9, 70), 77.0, dtype=dtype)
    gradient = torch.full((9, 70), 55.0, dtype=dtype)
    inside = torch.zeros_like(base, dtype=torch.bool)
    inside[2:7, 3:60:2] = True
    p = base[2:7, 3:60:2].requires_grad_()
    p.grad = gradient[2:7, 3:60:2]
    optimizer = cls(
        [p],
        lr=0.5,
        seed=1,
        backend=backend,
        **({"momentum": 0.9} if cls is uk.SelectiveSGD else {}),
    )
    optimizer.step()
    uk.select_gradients_(
        [p], seed=1, step=1, backend=backend, normalization="constant", keep_probability=0.5
    )
    assert (base[~inside] == 77).all() and (gradient[~inside] == 55).all()
    assert (base[inside] != 77).all() and (gradient[inside] != 55).all()


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_gradient_is_left_alone_and_versions_count(backend, cls):
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.arange(5.0)
    before, version, grad_version = p.grad.clone(), p._version, p.grad._version
    cls([p], lr=0.1, seed=1, backend=backend).step()
    assert torch.equal(p.grad, before) and p.grad._version == grad_version and p._version > version
    uk.select_gradients_(p, seed=1, step=1, backend=backend)
    assert p.grad._version > grad_version


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_state_in_other_strides_than_the_parameter(backend, cls):
    start, gradients = problem([(6, 9)], steps=2)
    options = (
        SPREAD
        | {"lr": 0.1, "backend": backend}
        | ({"momentum": 0.9} if cls is uk.SelectiveSGD else {})
    )
    expected, straight = trained(cls, start=start, gradients=gradients, **options)
    params = as_parameters(start)
    optimizer = cls(params, **options)
    run_steps(optimizer, params, gradients[:1])
    for key, value in states_of(optimizer, params[0]).items():
        if value.dim() == 2:
            optimizer.state[params[0]][key] = transposed(value)
    run_steps(optimizer, params, gradients[1:])
    compare(params[0], expected[0], "equal")
    for key, value in states_of(straight, expected[0]).items():
        compare(optimizer.state[params[0]][key], value, "equal", name=key)


@st.composite
def random_cases(draw):
    """Gives a gradient of any shape, values and strides, and a selection."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["spread", "normal", "few values", "with specials", "wide"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grads = []
    for _ in range(2):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "spread":
            g = spread_gradient(shape, generator, torch.float64)
        elif kind == "few values":
            g = torch.randint(-2, 3, shape, generator=generator).double()
        elif kind == "with specials":
            special = torch.tensor(
                [torch.nan, torch.inf, -torch.inf, 0.0, 1e30, 1e-30], dtype=torch.float64
            )
            g = torch.where(
                torch.rand(shape, generator=generator) < 0.2,
                special[torch.randint(0, 6, shape, generator=generator)],
                g,
            )
        elif kind == "wide":
            g = g * 10.0 ** torch.randint(-12, 12, shape, generator=generator)
        order = draw(st.permutations(range(len(shape))))
        back = sorted(range(len(shape)), key=order.__getitem__)
        g = g.to(dtype).permute(order).contiguous().permute(back)
        if shape and draw(st.booleans()):
            g = sliced(g)
        grads.append(g)
    normalization = draw(st.sampled_from(NORMALIZATIONS))
    selection = {
        "threshold": draw(st.floats(-2, 2)),
        "sharpness": draw(st.sampled_from([0.0, 0.5, 5.0, 60.0])),
        "normalization": normalization,
        "direction": draw(st.sampled_from(DIRECTIONS)),
        "scope": draw(st.sampled_from(SCOPES)),
        "rescale": draw(st.booleans()),
        "min_probability": draw(st.sampled_from([0.0, 0.2])),
        "keep_probability": draw(st.floats(0.01, 1)),
        "target": draw(st.sampled_from(TARGETS)),
        "statistics": draw(st.sampled_from(STATISTICS))
        if normalization in ("minmax", "range")
        else "current",
        "seed": draw(st.integers(-(2**63), 2**64)),
    }
    if selection["target"] == "update":
        # 1/p multiplies the rounding of a step that is a difference of parameters
        selection["min_probability"] = 0.2
    return dtype, grads, selection


@hypothesis.settings(max_examples=150)
@hypothesis.given(case=random_cases())
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_random_cases_agree_with_the_reference(native, case):
    random_case_agrees(native, case)


@hypothesis.settings(max_examples=20)
@hypothesis.given(case=random_cases())
@pytest.mark.parametrize("native", ["triton"], indirect=True)
def test_a_few_random_cases_agree_with_the_reference(native, case):
    random_case_agrees(native, case)


def random_case_agrees(native, case):
    dtype, grads, selection = case
    start = [torch.zeros_like(grads[0]), torch.zeros(5, dtype=dtype)]
    gradients = [[g, torch.linspace(-2, 2, 5).to(dtype)] for g in grads]
    with pytest.MonkeyPatch.context() as monkeypatch:
        agree(monkeypatch, uk.SelectiveSGD, native, start, gradients, **selection, lr=1.0)
