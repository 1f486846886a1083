"""The selective step: neutral options against torch.optim, literals and SciPy for the
selection, every backend against the reference.
"""

import contextlib
import copy
import gc
import inspect
import io
import pickle
import weakref

import hypothesis
import numpy as np
import pytest
import torch
from conftest import compare
from hypothesis import strategies as st

import uegr_kernels as uk
from uegr_kernels.selective import op, reference
from uegr_kernels.selective.options import (
    DIRECTIONS,
    FIELDS,
    NORMALIZATIONS,
    SCOPES,
    STATISTICS,
    TARGETS,
    Selection,
)

OPERATORS = tuple(f"selective.{name}" for name in op.SCHEMAS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEUTRAL = {"normalization": "constant", "keep_probability": 1.0}
# Every gradient's s~ is spread over [0, 1] here, so p runs from 0.007 to 0.993: each option decides
# something.
SPREAD = {"threshold": 0.5, "seed": 7}
OPTIMIZERS = [pytest.param(uk.SelectiveAdamW, id="adamw"), pytest.param(uk.SelectiveSGD, id="sgd")]


def dtype_id(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spread_gradient(
    shape, generator: torch.Generator, dtype=torch.float32, scale: float = 1.0
) -> torch.Tensor:
    """Both signs, squares uniform over [0, scale^2], none of them 0."""
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return ((torch.rand(shape, generator=generator) * 0.999 + 0.001).sqrt() * sign * scale).to(
        dtype
    )


def problem(shapes, dtype=torch.float32, steps: int = 3, seed: int = 0, scale: float = 1.0):
    """Starting values, and the gradients of every step."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return start, [
        [spread_gradient(shape, generator, dtype, scale) for shape in shapes] for _ in range(steps)
    ]


def as_parameters(tensors) -> list[torch.nn.Parameter]:
    """Parameters of the same values and strides."""
    return [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]


def walk(optimizer, params, gradients) -> None:
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()


def trained(cls, backend, start, gradients, **options):
    params = as_parameters(start)
    optimizer = cls(params, backend=backend, **options)
    walk(optimizer, params, gradients)
    return params, optimizer


def states_of(optimizer, p) -> dict:
    return {
        key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)
    }


def same_bits(a, b) -> bool:
    """Equal as torch.equal, NaN equal to NaN, for tensors or for nests of them."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bool(((a == b) | (a != a) & (b != b)).all())
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


@contextlib.contextmanager
def noting_near_ties(monkeypatch, histogram: bool = False):
    """What the reference decides inside this block: a bool tensor by stream of the elements whose u
    and p are so close that a kernel may decide otherwise (SPEC 2: 2^-22 * max(1, sharpness)).

    `histogram`: the reference ranks by the histogram that native kernels share, so that what is
    compared is the rest.
    """
    near: dict[int, torch.Tensor] = {}
    select, normalise = reference.select, reference.normalise

    def noting(g, saliency, statistics, layout, selection, *, seed, step):
        inverse = reference.inverse_probability(g, saliency, statistics, selection)
        indices = layout.indices(g.numel(), g.device)
        u = reference.philox.uniform(
            reference.philox.words(indices, seed=seed, step=step, stream=layout.stream),
            torch.float64,
        ).view(g.shape)
        close = (u - 1 / inverse.double()).abs() < 2.0**-22 * max(1.0, selection.sharpness)
        near[layout.stream] = near.get(layout.stream, torch.zeros_like(close)) | close
        return select(g, saliency, statistics, layout, selection, seed=seed, step=step)

    def by_histogram(g, saliency, statistics, selection):
        if selection.normalization == "rank" and statistics is None:
            n = g.numel()
            statistics = reference.histogram(
                *reference.magnitude(g, saliency), reference.Layout(0, 0, n, n), n
            )
        return normalise(g, saliency, statistics, selection)

    def shared_histogram(parts):
        out = torch.zeros(1, reference.RANK_BINS, dtype=torch.int64)
        for part in parts:
            options = {
                "layout": part.layout,
                "sizes": [],
                "normalization": "rank",
                "grad_scale": part.grad_scale,
            }
            reference.selective_statistics_(part.grads, part.saliencies, [], [], **options, out=out)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(reference, "select", noting)
        if histogram:
            patch.setattr(reference, "normalise", by_histogram)
            patch.setattr(op, "exact_ranks", shared_histogram)
        yield near
    looked_at = sum(t.numel() for t in near.values())
    # the exception must not swallow the rule
    assert sum(int(t.sum()) for t in near.values()) <= 5 + looked_at // 1000


def probability(grad, **options) -> torch.Tensor:
    return uk.selection_probability(grad, backend="reference", **options)


# The neutral option: nothing is selected away, so other people's optimizers are the oracle.

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


def in_dtype(options: dict, dtype) -> dict:
    """Tensor options in the arithmetic's dtype: torch computes with them in their own, kernels
    in the arithmetic's.
    """

    def converted(x):
        return (
            tuple(map(converted, x))
            if isinstance(x, tuple)
            else x.to(reference.compute_dtype(dtype))
            if isinstance(x, torch.Tensor)
            else x
        )

    return {key: converted(value) for key, value in options.items()}


def neutral_against_torch(cls, torch_class, backend, dtype, options, target):
    options = {"lr": 1e-2} | in_dtype(options, dtype)
    steps = 3 if backend == "triton" else 100 if dtype == torch.float32 else 20
    start, gradients = problem(NEUTRAL_SHAPES, dtype, steps=steps)
    params, optimizer = trained(cls, backend, start, gradients, **NEUTRAL, **options, target=target)
    expected = as_parameters(start)
    other = torch_class(expected, foreach=False, **options)
    walk(other, expected, gradients)
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
    walk(torch.optim.AdamW(expected, foreach=False, **options), expected, gradients)
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
        walk(other, wide, [[g.float() for g in grads]])
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
    walk(optimizer, params, gradients[:1])
    before = params[0].detach().clone()
    lr.zero_()
    walk(optimizer, params, gradients[1:])
    assert torch.equal(params[0], before)


# The selection: hand-computed literals, SciPy, the README's figures.

HAND = torch.tensor([1.0, -2.0, 3.0, 5.0])  # s = 1, 4, 9, 25
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
    g = torch.tensor([3.0, -1.0, 0.0, 2.0, -3.0, 0.5, 0.0, 7.0, -2.0])  # ties, one of them at 0
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
    assert steep[0].item() == 2.0**-24  # u's own step
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


# Every backend against the reference.

# The smallest, odd ones, one block and its neighbours, no axis, a transposed one: all of them in
# one call.
AGREEMENT_SHAPES = [(), (0,), (1,), (3,), (5, 41), (1023,), (1024,), (1025,)]
# for interpreted kernels: a tail, and a whole block with a tail of one
SMALL_SHAPES = [(0,), (5, 41), (1025,)]


def agreement_problem(native, dtype):
    return (
        problem(SMALL_SHAPES, dtype, steps=2)
        if native == "triton"
        else problem(AGREEMENT_SHAPES, dtype)
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
    pytest.param({"sharpness": 40.0}, id="sharp"),  # 1/p up to its cap of 2^24
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
    """The table's bounds are for z up to 10."""
    return max(1.0, options.get("sharpness", 5.0) / 5)


def agree(monkeypatch, cls, native, start, gradients, **options) -> None:
    """Both backends over the same steps: parameters and all states, but for elements that came
    near a tie in some step.
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
            else:  # SGD's weight decay feeds the parameter, as rounded, to its buffer
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
@pytest.mark.parametrize("options", SELECTION_CASES)
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
    assert gap <= 4.0 / 2 * share + 1e-6  # no slope of p is steeper than sharpness/2


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


def transposed(t):
    return t.t().contiguous().t()


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
        walk(straight, expected, contiguous)
        p = of_parameter(start[0]).requires_grad_()
        strides = p.stride()
        optimizer = cls([p], **options)
        walk(optimizer, [p], arranged)
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
    walk(optimizer, params, gradients[:1])
    for key, value in states_of(optimizer, params[0]).items():
        if value.dim() == 2:
            optimizer.state[params[0]][key] = transposed(value)
    walk(optimizer, params, gradients[1:])
    compare(params[0], expected[0], "equal")
    for key, value in states_of(straight, expected[0]).items():
        compare(optimizer.state[params[0]][key], value, "equal", name=key)


# Options that only an optimizer has.


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(uk.SelectiveAdamW, {}, id="adamw"),
        pytest.param(
            uk.SelectiveAdamW,
            {"amsgrad": True, "betas": (0.5, 0.6), "statistics": "previous"},
            id="amsgrad previous",
        ),
        pytest.param(uk.SelectiveAdamW, {"target": "update"}, id="adamw update"),
        pytest.param(uk.SelectiveSGD, {"momentum": 0.9, "nesterov": True}, id="sgd"),
    ],
)
def test_bfloat16_states_agree_with_the_reference(monkeypatch, native, dtype, cls, options):
    """Words are the same, so results are, but where the two float32 values lie on two sides of
    a rounding.
    """
    start, gradients = agreement_problem(native, dtype)
    options = SPREAD | {"lr": 0.3, "state_dtype": torch.bfloat16} | options
    with noting_near_ties(monkeypatch) as near:
        expected, other = trained(cls, "reference", start, gradients, **options)
    params, optimizer = trained(cls, native, start, gradients, **options)
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        flipped = near[i].clone()
        for key, value in states_of(other, q).items():
            if value.dtype == torch.bfloat16:
                compare(
                    optimizer.state[p][key],
                    value,
                    "step",
                    name=f"{key} of parameter {i}",
                    ignore=near[i],
                )
                flipped |= optimizer.state[p][key] != value
        compare(p, q, "step", name=f"parameter {i}", ignore=flipped)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_bfloat16_states_are_unbiased(backend, cls):
    n = 10_000
    options = {"lr": 0.1, "backend": backend} | (
        {"momentum": 0.9} if cls is uk.SelectiveSGD else {"amsgrad": True}
    )
    start, gradient = torch.zeros(n), torch.full((n,), 1.2345678)
    exact, straight = trained(cls, start=[start], gradients=[[gradient]], **NEUTRAL, **options)
    for seed in (1, 2):
        rounded, optimizer = trained(
            cls,
            start=[start],
            gradients=[[gradient]],
            **NEUTRAL,
            **options,
            state_dtype=torch.bfloat16,
            seed=seed,
        )
        seen = [
            key
            for key, value in states_of(optimizer, rounded[0]).items()
            if value.dtype == torch.bfloat16
        ]
        assert len(seen) == (1 if cls is uk.SelectiveSGD else 3)
        for key in seen:
            values, mean = (
                optimizer.state[rounded[0]][key].double(),
                straight.state[exact[0]][key].double()[0],
            )
            assert values.unique().numel() == 2  # the two neighbours
            assert abs(values.mean() - mean) <= 5 * values.std() / n**0.5, key
    if cls is uk.SelectiveAdamW:  # low 16 bits of the word for one, high 16 for the other
        a, b = (optimizer.state[rounded[0]][key].double() for key in ("exp_avg", "exp_avg_sq"))
        assert abs(np.corrcoef(a, b)[0, 1]) < 6 / n**0.5


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{}, {"statistics": "previous"}, {"scope": "global"}, {"target": "update"}], ids=str
)
def test_grad_scale_divides_and_found_inf_skips_everything(backend, cls, options):
    start, gradients = problem([(129,), (3, 4)], steps=3)
    options = (
        SPREAD
        | {"lr": 0.1, "fused": True, "backend": backend}
        | ({"momentum": 0.9} if cls is uk.SelectiveSGD else {})
        | options
    )
    expected, straight = trained(cls, start=start, gradients=gradients, **options)
    params = as_parameters(start)
    optimizer = cls(params, **options)
    for k, grads in enumerate(gradients):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**k), torch.tensor(0.0)
        walk(optimizer, params, [[g * 2.0**k for g in grads]])
        before = (
            copy.deepcopy(optimizer.state_dict()["state"]),
            [p.detach().clone() for p in params],
        )
        optimizer.found_inf = torch.tensor(1.0)
        walk(optimizer, params, [[g * float("inf") for g in grads]])
        assert same_bits((optimizer.state_dict()["state"], [p.detach() for p in params]), before)
    assert same_bits(
        [*optimizer.state_dict()["state"].values()], [*straight.state_dict()["state"].values()]
    )
    assert same_bits(params, expected)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_found_inf_at_the_first_step_leaves_the_start(backend, cls):
    start, gradients = problem([(9,)], steps=1)
    options = (
        SPREAD
        | {"lr": 0.1, "fused": True, "statistics": "previous", "backend": backend}
        | ({"momentum": 0.9} if cls is uk.SelectiveSGD else {})
    )
    expected, _ = trained(cls, start=start, gradients=gradients, **options)
    params = as_parameters(start)
    optimizer = cls(params, **options)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    walk(optimizer, params, [[torch.full((9,), float("inf"))]])
    assert torch.equal(params[0], start[0]) and optimizer.state[params[0]]["step"] == 0
    optimizer.found_inf = torch.tensor(0.0)
    walk(optimizer, params, gradients)
    assert torch.equal(params[0], expected[0])


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(backend, fused):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 5, generator=generator), torch.randn(16, 3, generator=generator)
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = uk.SelectiveAdamW(
            model.parameters(), lr=0.1, seed=3, fused=fused, backend=backend
        )
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for k in range(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            if k == 2 and scaled:  # an overflow, then the same batch again
                scaler.scale(loss * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scaled:
            assert scaler.get_scale() == 512.0
        results.append(
            ([p.detach() for p in model.parameters()], [*optimizer.state_dict()["state"].values()])
        )
    assert same_bits(*results)


SELECTIONS = [
    pytest.param({}, id="minmax"),
    pytest.param(
        {"normalization": "range", "direction": "salient", "rescale": False},
        id="range salient not rescaled",
    ),
    pytest.param({"normalization": "rank", "min_probability": 0.2}, id="rank floor"),
    pytest.param({"normalization": "constant", "keep_probability": 0.4}, id="constant"),
]


@pytest.mark.parametrize("options", SELECTIONS)
@pytest.mark.parametrize(
    ("cls", "torch_class", "line"),
    [
        pytest.param(
            uk.SelectiveAdamW,
            torch.optim.AdamW,
            {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True},
            id="adamw",
        ),
        pytest.param(
            uk.SelectiveSGD,
            torch.optim.SGD,
            {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True},
            id="sgd",
        ),
        # An element that the first step did not select has a buffer of 0, which is not a fresh one:
        # dampening applies.
        pytest.param(
            uk.SelectiveSGD,
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
            id="sgd dampening",
        ),
    ],
)
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_target_gradient_is_torchs_step_on_selected_gradients(
    backend, cls, torch_class, line, options, maximize
):
    start, gradients = problem([(31, 7), (), (5,)], steps=4)
    params, optimizer = trained(
        cls, backend, start, gradients, maximize=maximize, **line, **SPREAD, **options
    )
    expected = as_parameters(start)
    other = torch_class(expected, foreach=False, maximize=maximize, **line)
    for k, grads in enumerate(gradients, 1):
        for p, g in zip(expected, grads, strict=True):
            p.grad = g.clone()
        uk.select_gradients_(expected, step=k, backend=backend, **SPREAD, **options)
        other.step()
    operation = "equal" if backend == "reference" else "step"
    for p, q in zip(params, expected, strict=True):
        compare(p, q, operation)
        for key, value in states_of(other, q).items():
            compare(optimizer.state[p][key], value, operation, name=key)


@pytest.mark.parametrize("options", SELECTIONS)
@pytest.mark.parametrize(
    ("cls", "torch_class", "line"),
    [
        pytest.param(
            uk.SelectiveAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}, id="adamw"
        ),
        pytest.param(
            uk.SelectiveSGD,
            torch.optim.SGD,
            {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9},
            id="sgd",
        ),
    ],
)
def test_target_update_is_torchs_step_where_selected(backend, cls, torch_class, line, options):
    """The plain gradient feeds the moments; the step of an element that was not selected is
    skipped, weight decay included.
    """
    start, gradients = problem([(31, 7), (), (5,)], steps=1)
    params, optimizer = trained(
        cls, backend, start, gradients, target="update", **line, **SPREAD, **options
    )
    stepped = as_parameters(start)
    other = torch_class(stepped, foreach=False, **line)
    walk(other, stepped, gradients)
    for i, (p, q) in enumerate(zip(params, stepped, strict=True)):
        for key, value in states_of(other, q).items():
            compare(
                optimizer.state[p][key],
                value,
                "equal" if backend == "reference" else "step",
                name=key,
            )
        arguments = {"threshold": SPREAD["threshold"]} | options
        b = uk.selection_mask(
            gradients[0][i], seed=SPREAD["seed"], step=1, stream=i, backend=backend, **arguments
        )
        assert i != 0 or 0 < b.sum() < b.numel()
        assert torch.equal(p[~b], start[i][~b])
        share = (p - start[i])[b] / (q - start[i])[b]
        expected = (
            1 / uk.selection_probability(gradients[0][i], **arguments, backend=backend)[b]
            if options.get("rescale", True)
            else torch.ones_like(share)
        )
        # differences of nearly equal numbers
        np.testing.assert_allclose(share.detach().numpy(), expected.numpy(), rtol=1e-3)


# plain SGD with lr 1: the parameter moves by -g/p where selected
STEEP = {"threshold": 0.8, "lr": 1.0, "seed": 5, "rescale": True}


def inverse_by_sgd(backend, before, after, gradient) -> torch.Tensor:
    """1/p of the selected elements, NaN elsewhere, as SGD with lr 1 shows it."""
    factor = (before - after) / gradient
    return torch.where(factor == 0, torch.nan, factor).detach()


def assert_inverse(found, probabilities) -> None:
    """`found` (NaN: not selected) is 1/p; at least one element was selected."""
    found, expected = (
        found.double().flatten().numpy(),
        1 / np.asarray(probabilities, dtype=float).ravel(),
    )
    seen = ~np.isnan(found)
    assert seen.any()
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-5)


@pytest.mark.parametrize(
    ("normalization", "first", "second"),
    [
        # s: 1, 4, 9 -> minimum 1, maximum 9; then s: 0.25, 4, 25. s~, clamped: 0, 3/8, 1 twice
        # (minmax); 1/8, 1/2, 1, then 1/32, 1/2, 1.
        pytest.param(
            "minmax",
            [0.9996646499, 0.9859363730, 0.1192029220],
            [0.9996646499, 0.9859363730, 0.1192029220],
            id="minmax",
        ),
        pytest.param(
            "range",
            [0.9988304897, 0.9525741268, 0.1192029220],
            [0.9995417165, 0.9525741268, 0.1192029220],
            id="range",
        ),
    ],
)
def test_previous_statistics_by_hand(backend, normalization, first, second):
    gradients = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 2.0, -5.0])]
    seen = [set(), set()]
    for seed in (0, 4, 5, 6):  # each element is selected by one of them at least
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = uk.SelectiveSGD(
            [p],
            lr=1.0,
            statistics="previous",
            normalization=normalization,
            seed=seed,
            backend=backend,
        )
        for k, (g, expected) in enumerate(zip(gradients, (first, second), strict=True)):
            before, p.grad = p.detach().clone(), g
            if k == 0:
                assert not optimizer.state[p]
            optimizer.step()
            found = inverse_by_sgd(backend, before, p, g)
            selected = (~found.isnan()).nonzero().flatten().tolist()
            seen[k].update(selected)
            for i in selected:
                assert found[i].item() == pytest.approx(1 / expected[i], rel=1e-5)
            state = optimizer.state[p]
            assert (state["saliency_min"].item(), state["saliency_max"].item()) == (
                (1.0, 9.0),
                (0.25, 25.0),
            )[k]
            assert state["saliency_min"].dtype == torch.float32 and state["saliency_min"].dim() == 0
    assert seen[1] == {0, 1, 2}


@pytest.mark.parametrize("normalization", ["minmax", "range"])
@pytest.mark.parametrize(
    "first", [0.0, 2.0, float("nan")], ids=["zeros", "equal", "nothing finite"]
)
def test_kept_statistics_without_a_span_give_saliency_zero(backend, normalization, first):
    """Whatever this step's gradient is: p is 0.99966 for every element."""
    g = torch.tensor([1.0, 3e4, -1e12, 1e30])
    for seed in range(3):
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = uk.SelectiveSGD(
            [p],
            lr=1.0,
            statistics="previous",
            normalization=normalization,
            seed=seed,
            backend=backend,
        )
        p.grad = torch.full((4,), first)
        optimizer.step()
        p.data.zero_()
        p.grad = g
        optimizer.step()
        assert_inverse(torch.where(p == 0, torch.nan, -p.detach() / g), [0.99966465] * 4)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_previous_equals_current_on_the_first_step_and_when_gradients_repeat(backend, cls):
    start, gradients = problem([(50,), (7, 3)], steps=1)
    for scope in ("tensor", "global"):
        options = SPREAD | {"scope": scope, "lr": 0.1, "backend": backend}
        current, _ = trained(cls, start=start, gradients=gradients * 3, **options)
        previous, _ = trained(
            cls, start=start, gradients=gradients * 3, statistics="previous", **options
        )
        for p, q in zip(previous, current, strict=True):
            compare(p, q, "step")


def test_a_step_without_a_gradient_leaves_the_kept_statistics_and_the_count(backend):
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = uk.SelectiveSGD([p, q], lr=1.0, statistics="previous", seed=1, backend=backend)
    p.grad = q.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    p.grad, q.grad = None, torch.tensor([1.0, 2.0, 4.0])
    optimizer.step()
    assert optimizer.state[p]["step"] == 1 and optimizer.state[q]["step"] == 2
    assert optimizer.state[p]["saliency_max"] == 9 and optimizer.state[q]["saliency_max"] == 16


def test_global_scope_spans_groups_and_dtypes_with_the_same_normalization(backend):
    generator = torch.Generator().manual_seed(2)
    scales = {"a": 1.0, "b": 3.0, "c": 0.5, "alone": 50.0, "ranked": 1.0}
    grads = {name: spread_gradient((400,), generator) * scale for name, scale in scales.items()}
    grads["b"], grads["c"] = grads["b"].double(), grads["c"].bfloat16()
    params = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in grads.items()}
    groups = [
        {"params": [params["a"], params["b"]], "scope": "global"},
        {"params": [params["alone"]]},
        {"params": [params["c"]], "scope": "global", "threshold": 0.3},
        {"params": [params["ranked"]], "scope": "global", "normalization": "rank"},
    ]
    optimizer = uk.SelectiveSGD(groups, lr=1.0, threshold=0.5, seed=1, backend=backend)
    for name, p in params.items():
        p.grad = grads[name]
    optimizer.step()
    together = torch.cat([grads[name].double() for name in ("a", "b", "c")])
    expected = {
        "a": probability(together, threshold=0.5)[:400],
        "b": probability(together, threshold=0.5)[400:800],
    }
    expected |= {
        "c": probability(together, threshold=0.3)[800:],
        "alone": probability(grads["alone"], threshold=0.5),
    }
    for name, p in expected.items():
        found = (-params[name].detach().double() / grads[name].double()).numpy()
        np.testing.assert_allclose(
            found[found != 0], 1 / p.numpy()[found != 0], rtol=1e-2 if name == "c" else 1e-5
        )
        assert 100 < (found != 0).sum() < 400
    for name, stream in (("a", 0), ("b", 1), ("alone", 2), ("c", 3), ("ranked", 4)):
        assert optimizer.state[params[name]]["step"] == 1, (name, stream)


def test_global_rank_spans_tensors(backend):
    grads = [
        torch.tensor([1.0, 5.0, 3.0]),
        torch.tensor([2.0, 4.0]),
        torch.tensor([6.0], dtype=torch.float64),
    ]
    ranks = [[0, 4 / 6, 2 / 6], [1 / 6, 3 / 6], [5 / 6]]
    for seed in range(5):
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        uk.select_gradients_(
            params,
            seed=seed,
            step=1,
            scope="global",
            normalization="rank",
            threshold=0.5,
            sharpness=0.5,
            backend=backend,
        )
        for p, g, r in zip(params, grads, ranks, strict=True):
            kept = p.grad != 0
            expected = 1 + np.exp(np.array(r) - 0.5)
            np.testing.assert_allclose(
                (p.grad / g)[kept].numpy(), expected[kept.numpy()], rtol=2e-6
            )


def test_global_previous_uses_kept_values_and_a_first_timers_current_ones(backend):
    p, q, r = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = uk.SelectiveSGD(
        [p, q, r],
        lr=1.0,
        statistics="previous",
        scope="global",
        sharpness=0.5,
        seed=2,
        backend=backend,
    )
    p.grad, r.grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([20.0, 20.0, 30.0])
    optimizer.step()
    before = [t.detach().clone() for t in (p, q)]
    p.grad, q.grad, r.grad = torch.tensor([4.0, 0.5, 2.0]), torch.tensor([1.5, 10.0, 5.0]), None
    # p keeps (1, 9), q comes with (2.25, 100), r has no gradient and no say: (1, 100)
    optimizer.step()
    for t, was, s in (
        (p, before[0], [15 / 99, 0.0, 3 / 99]),
        (q, before[1], [1.25 / 99, 1.0, 24 / 99]),
    ):
        assert_inverse(
            (was - t.detach()) / t.grad + torch.where(was == t, torch.nan, 0.0),
            1 / (1 + np.exp(np.array(s) - 0.8)),
        )
    assert optimizer.state[p]["saliency_max"] == 16 and optimizer.state[q]["saliency_max"] == 100


def test_on_one_tensor_global_equals_tensor(backend):
    for normalization in ("minmax", "range", "rank"):
        for function, arguments in (
            (uk.selection_probability, {}),
            (uk.selection_mask, {"seed": 1, "step": 1}),
        ):
            options = {"normalization": normalization, "backend": backend} | arguments
            assert torch.equal(
                function(HAND, scope="global", **options), function(HAND, scope="tensor", **options)
            )


# Shards: a mask depends on the element's place in the unsharded tensor.


@pytest.mark.parametrize("normalization", ["minmax", "range", "rank", "constant"])
@pytest.mark.parametrize(
    ("part", "layout"),
    [
        pytest.param(np.s_[2:5, :], (70, 105, 105), id="rows"),
        pytest.param(np.s_[:, 10:21], (10, 11, 35), id="columns"),
        pytest.param(np.s_[3:, 33:], (3 * 35 + 33, 2, 35), id="a corner"),
        pytest.param(np.s_[:, 7:8], (7, 1, 35), id="one column"),
    ],
)
def test_a_shards_mask_is_its_part_of_the_whole(backend, normalization, part, layout):
    g = spread_gradient((60, 35), torch.Generator().manual_seed(4))
    if normalization == "constant":
        scope = None
    else:
        scope = (
            torch.zeros(1, reference.RANK_BINS, dtype=torch.int64)
            if normalization == "rank"
            else torch.tensor([[torch.inf, -torch.inf]]).double()
        )
        run = {
            "layout": [6, 0, g.numel(), g.numel()],
            "sizes": [],
            "normalization": normalization,
            "grad_scale": None,
        }
        op.selective_statistics_(backend, [g], [], [], [], **run, out=scope)
    selection = Selection(
        **{"normalization": normalization, "threshold": 0.5, "keep_probability": 0.5}
    )
    whole, shard = g.clone(), g[part].clone()
    common = {"scope_statistics": scope, "step": 3, "seed": -5, "selection": selection}
    op.select_gradients_(backend, [whole], [], layout=[6, 0, g.numel(), g.numel()], **common)
    op.select_gradients_(backend, [shard], [], layout=[6, *layout], **common)
    assert (whole == 0).any() and (whole != 0).any()
    compare(shard, whole[part], "equal")


def test_far_element_indices(native):
    # Tensors of more than 2^33 elements do not fit here; their last shard does.
    selection = Selection(
        **{"normalization": "constant", "keep_probability": 0.5, "rescale": False}
    )
    for layout in ([2, 2**33 + 5, 1000, 1000], [2, 2**40 - 1, 7, 2**34 + 3]):
        results = []
        for backend in ("reference", native):
            g = torch.ones(1000)
            op.select_gradients_(
                backend,
                [g],
                [],
                scope_statistics=None,
                layout=layout,
                step=1,
                seed=9,
                selection=selection,
            )
            results.append(g)
        assert 400 < results[0].sum() < 600
        compare(results[1], results[0], "equal")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_statistics_are_the_references(native, dtype):
    generator = torch.Generator().manual_seed(8)
    grads = [spread_gradient(shape, generator, dtype) for shape in [(), (0,), (3, 333), (1025,)]]
    grads[2][1, 5], grads[2][2, 7] = torch.nan, -torch.inf
    saliencies = [g.abs() for g in grads]
    layout = [x for i, g in enumerate(grads) for x in (i, 0, g.numel(), g.numel())]
    for rows in (1, len(grads)):
        for given in ([], saliencies):
            for normalization, scale in (
                ("minmax", None),
                ("rank", None),
                ("range", torch.tensor(4.0)),
            ):
                if normalization == "rank":
                    start = torch.zeros(rows, reference.RANK_BINS, dtype=torch.int64)
                else:
                    start = torch.tensor([[torch.inf, -torch.inf]]).double().repeat(rows, 1)
                found = []
                for backend in ("reference", native):
                    out = start.clone()
                    options = {
                        "layout": layout,
                        "sizes": [],
                        "normalization": normalization,
                        "grad_scale": scale,
                    }
                    op.selective_statistics_(backend, grads, given, [], [], **options, out=out)
                    found.append(out)
                if given and normalization == "rank" and dtype in (torch.float32, torch.float64):
                    # sqrt may round over a bin's edge
                    assert (found[0].sum(-1) == found[1].sum(-1)).all()
                else:
                    compare(
                        found[1],
                        found[0],
                        "equal",
                        name=f"{normalization}, {rows} rows, saliency {bool(given)}",
                    )


def test_a_large_ranks_histogram_takes_every_kth_element(native):
    n, whole = (2077, [2**21 + 77]) if native == "triton" else (2**21 + 77, [])  # k = 3
    g = spread_gradient((n,), torch.Generator().manual_seed(8), torch.bfloat16)
    found = []
    for backend in ("reference", native):
        # k = 3, and 5 for a shard of a larger one
        for layout, sizes in (([0, 0, n, n], whole), ([0, 1000, n, n], [5 * 2**20])):
            out = torch.zeros(1, reference.RANK_BINS, dtype=torch.int64)
            op.selective_statistics_(
                backend,
                [g],
                [],
                [],
                [],
                layout=layout,
                sizes=sizes,
                normalization="rank",
                grad_scale=None,
                out=out,
            )
            found.append(out)
    assert abs(found[0].sum().item() - n) <= 3 and (found[0] % 3 == 0).all()
    compare(found[2], found[0], "equal")
    compare(found[3], found[1], "equal")


# Statistics of masks.


@pytest.mark.parametrize("normalization", ["minmax", "range", "rank"])
@pytest.mark.parametrize("direction", ["printed", "salient"])
def test_frequencies_match_p(backend, normalization, direction):
    g = spread_gradient((40_000,), torch.Generator().manual_seed(6))
    options = {
        "normalization": normalization,
        "direction": direction,
        "threshold": 0.5,
        "sharpness": 3.0,
        "backend": backend,
    }
    p = uk.selection_probability(g, **options).double().numpy()
    b = uk.selection_mask(g, seed=21, step=1, **options).numpy()
    by_p = np.argsort(p).reshape(50, -1)
    deviations = (b[by_p].sum(1) - p[by_p].sum(1)) ** 2 / (p * (1 - p))[by_p].sum(1)
    # not at the top: test_gpu.py imports this file where there is no SciPy
    stats = pytest.importorskip("scipy.stats")
    assert stats.chi2.isf(1 - 1e-9, 50) < deviations.sum() < stats.chi2.isf(1e-9, 50)


def test_masks_are_uncorrelated_between_steps_streams_seeds_and_neighbours(backend):
    n = 2**16
    g = torch.ones(n)
    options = {"normalization": "constant", "keep_probability": 0.5, "backend": backend}

    def mask(seed=1, step=1, stream=0):
        return (
            uk.selection_mask(g, seed=seed, step=step, stream=stream, **options)
            .numpy()
            .astype(float)
        )

    base, bound = mask(), 6 / n**0.5
    for other in (
        mask(step=2),
        mask(step=2**23),
        mask(stream=1),
        mask(stream=2**32 - 1),
        mask(seed=2),
        mask(seed=1 + 2**32),
        mask(seed=2**64 - 1),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < bound
    for distance in (1, 2, 3, 4, 8, 256, 1024):
        assert abs(np.corrcoef(base[:-distance], base[distance:])[0, 1]) < bound


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"normalization": "minmax"}, id="minmax"),
        pytest.param({"normalization": "range", "direction": "salient"}, id="range salient"),
        pytest.param({"normalization": "rank", "direction": "salient"}, id="rank salient"),
        pytest.param({"normalization": "constant", "keep_probability": 0.2}, id="constant"),
        pytest.param({"normalization": "minmax", "min_probability": 0.3}, id="floor"),
    ],
)
def test_theorem_1_the_mean_of_selected_gradients_is_the_gradient(backend, options):
    values = torch.linspace(-1.0, 1.0, 16)
    rows, seeds = 512, 16
    options = {"threshold": 0.5, "sharpness": 3.0} | options
    total = torch.zeros(16, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(rows, 16))
    for seed in range(seeds):
        p.grad = values.repeat(rows, 1)
        uk.select_gradients_(p, seed=seed, step=1, backend=backend, **options)
        total += p.grad.double().sum(0)
    chance = probability(values.repeat(rows, 1), **options)[0].double()
    n = rows * seeds
    standard_error = values.double().abs() * ((1 - chance) / chance / n).sqrt()
    assert ((total / n - values).abs() <= 5 * standard_error + 1e-6).all()
    assert (standard_error > 0).any()


# Degenerate input.


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
    if options.get("normalization") != "rank":  # a rank counts its elements
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
    walk(torchs, expected, gradients)
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
    walk(TORCHS[cls](expected, foreach=False, **options), expected, gradients)
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
    else:  # inf - lr * inf, as in torch.optim.SGD
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
            walk(optimizer, params, [[g], gradients[0]])
            assert params[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_squares_that_overflow_are_the_largest_float(backend, dtype):
    large = torch.finfo(dtype).max
    g = torch.tensor([1.0, large, -large / 4, 0.0], dtype=dtype)  # s~: 0, 1, 1, 0
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
        cls([alone], seed=1, backend=backend, **options).step()  # no gradient at all
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


# Seeds, steps, streams.


def test_manual_seed_fixes_the_seed_and_every_optimizer_has_its_own():
    def seeds():
        torch.manual_seed(11)
        return [
            cls([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]["seed"]
            for cls in (uk.SelectiveAdamW, uk.SelectiveAdamW, uk.SelectiveSGD)
        ]

    first = seeds()
    assert first == seeds() and len(set(first)) == 3 and all(0 <= s < 2**64 for s in first)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_nothing_is_drawn_where_nothing_is_random_or_a_seed_is_given(cls):
    before = torch.get_rng_state()
    for options, seed in (
        (NEUTRAL, 0),
        ({"seed": 5}, 5),
        ({"seed": 0}, 0),
        ({"seed": -1}, 2**64 - 1),
        ({"seed": 2**64 + 3}, 3),
    ):
        optimizer = cls([torch.nn.Parameter(torch.zeros(2))], **options)
        assert optimizer.param_groups[0]["seed"] == seed
    trained(cls, "auto", [torch.ones(9)], [[torch.ones(9)]], seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    cls([torch.nn.Parameter(torch.zeros(2))], **NEUTRAL, state_dtype=torch.bfloat16)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_group_added_later_shares_the_seed_and_draws_one_if_it_is_the_first_to_need_it():
    p, q, r = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = uk.SelectiveSGD([p], **NEUTRAL)
    assert optimizer.param_groups[0]["seed"] == 0
    optimizer.add_param_group({"params": [q], "keep_probability": 0.5})
    optimizer.add_param_group({"params": [r], "normalization": "minmax"})
    drawn = optimizer.param_groups[1]["seed"]
    assert drawn != 0 and optimizer.param_groups[2]["seed"] == drawn


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_group_added_after_a_load_is_the_uninterrupted_runs(cls):
    optimizer, resumed = (cls([torch.nn.Parameter(torch.zeros(2))]) for _ in range(2))
    resumed.load_state_dict(optimizer.state_dict())
    for o in (optimizer, resumed):
        o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert [group["seed"] for group in resumed.param_groups] == [
        group["seed"] for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("seed", [0, 3, -1, 2**63, 2**64 - 1, 2**64 + 3])
def test_seeds_are_modulo_two_to_the_64(backend, seed):
    g = torch.ones(500)
    options = {"normalization": "constant", "keep_probability": 0.5, "backend": backend}
    mask = uk.selection_mask(g, seed=seed, step=1, **options)
    assert torch.equal(mask, uk.selection_mask(g, seed=seed % 2**64, step=1, **options))
    indices = torch.arange(500)
    u = reference.philox.uniform(
        reference.philox.words(indices, seed=seed % 2**64, step=1, stream=0)
    )
    assert torch.equal(mask, u < 0.5)


def test_a_groups_own_seed(backend):
    p, q, r = (torch.nn.Parameter(torch.zeros(500)) for _ in range(3))
    groups = [{"params": [p], "seed": 0}, {"params": [q], "seed": 2**64 + 3}, {"params": [r]}]
    optimizer = uk.SelectiveSGD(
        groups, lr=1.0, normalization="constant", keep_probability=0.5, seed=9, backend=backend
    )
    assert [group["seed"] for group in optimizer.param_groups] == [0, 3, 9]
    for t in (p, q, r):
        t.grad = torch.ones(500)
    optimizer.step()
    for stream, (t, seed) in enumerate(((p, 0), (q, 3), (r, 9))):
        mask = uk.selection_mask(
            t.grad,
            seed=seed,
            step=1,
            stream=stream,
            normalization="constant",
            keep_probability=0.5,
            backend=backend,
        )
        assert torch.equal(t != 0, mask)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_streams_number_the_parameters_and_steps_count_those_with_a_gradient(backend, cls):
    params = [torch.nn.Parameter(torch.zeros(300)) for _ in range(5)]
    options = {"normalization": "constant", "keep_probability": 0.5}
    optimizer = cls(
        [{"params": params[:2]}, {"params": params[2:4]}],
        lr=1.0,
        seed=13,
        backend=backend,
        **options,
    )
    optimizer.add_param_group({"params": params[4]})
    g = torch.ones(300)
    counts = [0] * 5
    for with_gradient in ({0, 1, 2, 3, 4}, {1, 3}, {0, 3, 4}):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = g if i in with_gradient else None
        optimizer.step()
        for i, p in enumerate(params):
            if i in with_gradient:
                counts[i] += 1
            assert optimizer.state[p]["step"] == counts[i]
            # later AdamW moves every element by its moments
            if counts[i] == 1 and i in with_gradient:
                mask = uk.selection_mask(g, seed=13, step=1, stream=i, backend=backend, **options)
            elif i in with_gradient and cls is uk.SelectiveSGD:
                mask = uk.selection_mask(
                    g, seed=13, step=counts[i], stream=i, backend=backend, **options
                )
            elif i in with_gradient:
                continue
            else:
                mask = torch.zeros(300, dtype=torch.bool)
            assert torch.equal(p != before[i], mask), (i, counts[i])


def test_masks_of_dtypes_and_saliency_share_the_words(backend):
    options = {
        "normalization": "constant",
        "keep_probability": 0.5,
        "seed": 2,
        "step": 1,
        "backend": backend,
    }
    expected = uk.selection_mask(torch.ones(100), **options)
    for dtype in DTYPES:
        assert torch.equal(
            uk.selection_mask(torch.ones(100, dtype=dtype), saliency=torch.ones(100), **options),
            expected,
        )


@pytest.mark.skipif(
    not hasattr(torch.nn.Parameter, "grad_dtype"), reason="this torch has no Parameter.grad_dtype"
)
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("of_parameter", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("of_gradient", DTYPES, ids=dtype_id)
def test_a_gradient_of_another_dtype_is_taken_in_the_parameters_arithmetic(
    backend, cls, of_parameter, of_gradient
):
    """Beside one of the usual kind, in one call."""
    start, gradients = problem([(40,), (3, 5)], torch.bfloat16, steps=2)
    start = [t.to(of_parameter) for t in start]
    given = [[g.to(of_gradient), h.to(of_parameter)] for g, h in gradients]
    for scope in ("tensor", "global"):
        options = SPREAD | {"backend": backend, "scope": scope}
        expected, _ = trained(
            cls, start=start, gradients=[[g.to(of_parameter), h] for g, h in given], **options
        )
        params = as_parameters(start)
        params[0].grad_dtype = of_gradient
        walk(cls(params, **options), params, given)
        for p, q in zip(params, expected, strict=True):
            compare(p, q, "step")


# Determinism, checkpoints, state.

STATEFUL = [
    pytest.param(uk.SelectiveAdamW, {}, id="adamw"),
    pytest.param(
        uk.SelectiveAdamW, {"statistics": "previous", "amsgrad": True}, id="previous amsgrad"
    ),
    pytest.param(
        uk.SelectiveAdamW, {"state_dtype": torch.bfloat16, "target": "update"}, id="bfloat16 update"
    ),
    pytest.param(
        uk.SelectiveAdamW,
        {"state_dtype": torch.bfloat16, "normalization": "rank", "scope": "global"},
        id="bfloat16 global rank",
    ),
    pytest.param(uk.SelectiveSGD, {}, id="sgd"),
    pytest.param(
        uk.SelectiveSGD,
        {"momentum": 0.9, "dampening": 0.3, "statistics": "previous", "scope": "global"},
        id="momentum previous global",
    ),
    pytest.param(
        uk.SelectiveSGD,
        {"momentum": 0.9, "nesterov": True, "state_dtype": torch.bfloat16},
        id="nesterov bfloat16",
    ),
]


def everything(params, optimizer) -> tuple:
    return [p.detach() for p in params], [*optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize(("cls", "options"), STATEFUL)
def test_two_runs_with_one_seed_are_bit_identical_and_another_seed_is_not(backend, cls, options):
    start, gradients = problem([(700,), (3, 5)], steps=3)
    options = {"lr": 0.1, "threshold": 0.5, "backend": backend} | options
    runs = [
        everything(*trained(cls, start=start, gradients=gradients, seed=seed, **options))
        for seed in (5, 5, 6)
    ]
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("cls", "options"), STATEFUL)
def test_a_resumed_run_equals_the_uninterrupted_one(backend, cls, options, dtype):
    start, gradients = problem([(700,), (3, 5)], dtype, steps=5)
    options = {"lr": 0.1, "threshold": 0.5, "backend": backend} | options
    params = as_parameters(start)
    optimizer = cls(params, **options)  # its seed is drawn; the second one's is another
    walk(optimizer, params, gradients[:2])
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    walk(optimizer, params, gradients[2:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = as_parameters(saved["params"])
    second = cls(resumed, **(options | {"lr": 7.0}))
    assert second.param_groups[0]["seed"] != optimizer.param_groups[0]["seed"]
    second.load_state_dict(saved["optimizer"])
    walk(second, resumed, gradients[2:])
    assert same_bits(everything(resumed, second), everything(params, optimizer))
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize(("cls", "options"), STATEFUL)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike(backend, cls, options, copied):
    start, gradients = problem([(70,), (3, 5)], torch.bfloat16, steps=4)
    params = as_parameters(start)
    optimizer = cls(params, lr=0.1, threshold=0.5, fused=True, backend=backend, **options)
    walk(optimizer, params, gradients[:2])
    others, other = copied((params, optimizer))
    assert (
        other.backend == backend
        and other._step_supports_amp_scaling
        and other.param_groups[0]["params"][0] is others[0]
    )
    walk(optimizer, params, gradients[2:])
    walk(other, others, gradients[2:])
    assert same_bits(everything(others, other), everything(params, optimizer))


def test_loading_into_a_fresh_copy_before_any_step_changes_nothing(backend):
    start, gradients = problem([(70,)], steps=2)
    options = {"lr": 0.1, "threshold": 0.5, "momentum": 0.9, "seed": 3, "backend": backend}
    expected, _ = trained(uk.SelectiveSGD, start=start, gradients=gradients, **options)
    params = as_parameters(start)
    optimizer = uk.SelectiveSGD(params, **options)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does when it wraps
    walk(optimizer, params, gradients)
    assert same_bits(params, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "rank"},
        {"statistics": "previous"},
        {"scope": "global"},
        {"normalization": "rank", "scope": "global"},
    ],
    ids=str,
)
# no host's thread computes in a Triton kernel
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_the_number_of_threads_changes_nothing(backend, options):
    size = 40_000 if backend == "reference" else 300_000  # more than one thread's piece
    shapes = [(size,), (517, size // 500), (7,), (100, size // 100)]
    start, gradients = problem(shapes, steps=1)
    start[1], gradients[0][3] = transposed(start[1]), transposed(gradients[0][3])
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs.append(
                everything(
                    *trained(uk.SelectiveAdamW, backend, start, gradients, **SPREAD, **options)
                )
            )
    finally:
        torch.set_num_threads(before)
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_state_keys_and_dtypes(backend, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = {"saliency_min", "saliency_max"}
    for cls, options, keys in (
        (uk.SelectiveAdamW, {}, {"exp_avg", "exp_avg_sq"}),
        (
            uk.SelectiveAdamW,
            {"amsgrad": True, "statistics": "previous"},
            {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} | kept,
        ),
        (uk.SelectiveSGD, {}, set()),
        (uk.SelectiveSGD, {"momentum": 0.5, "statistics": "previous"}, {"momentum_buffer"} | kept),
    ):
        for state_dtype in (None, torch.bfloat16):
            g = torch.ones(4, 3, dtype=dtype)
            params, optimizer = trained(
                cls, backend, [g], [[g]], seed=1, state_dtype=state_dtype, **options
            )
            state = optimizer.state[params[0]]
            assert state.keys() == keys | {"step"}
            assert (
                state["step"].dtype == torch.float32
                and state["step"].shape == ()
                and state["step"].device.type == "cpu"
            )
            for key in keys - kept:
                assert state[key].dtype == (state_dtype or wide) and state[key].shape == g.shape
            for key in keys & kept:
                assert state[key].dtype == wide and state[key].shape == ()


def test_16_bit_parameters_keep_their_float32_moments_through_a_checkpoint(backend):
    for dtype in (torch.bfloat16, torch.float16):
        for options in (
            {"statistics": "previous", "amsgrad": True},
            {"state_dtype": torch.bfloat16},
        ):
            start, gradients = problem([(70,)], dtype, steps=2)
            params, optimizer = trained(
                uk.SelectiveAdamW, backend, start, gradients, seed=1, **options
            )
            others = as_parameters(params)
            other = uk.SelectiveAdamW(others, seed=2, backend=backend, **options)
            other.load_state_dict(optimizer.state_dict())
            assert same_bits(states_of(other, others[0]), states_of(optimizer, params[0]))


@pytest.mark.parametrize(
    ("cls", "torch_class", "options"),
    [
        pytest.param(
            uk.SelectiveAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, id="adamw"
        ),
        pytest.param(
            uk.SelectiveAdamW, torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}, id="amsgrad"
        ),
        pytest.param(uk.SelectiveSGD, torch.optim.SGD, {"lr": 0.1}, id="sgd"),
        pytest.param(
            uk.SelectiveSGD,
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
            id="momentum",
        ),
    ],
)
@pytest.mark.parametrize(
    "ours_first", [True, False], ids=["from ours to torch", "from torch to ours"]
)
def test_checkpoints_go_both_ways(backend, cls, torch_class, options, ours_first):
    start, gradients = problem([(31,), (2, 3)], steps=6)
    expected = as_parameters(start)
    walk(torch_class(expected, foreach=False, **options), expected, gradients)

    def ours(params):
        return cls(params, backend=backend, **NEUTRAL, **(options | {"lr": 3.0}))

    def torchs(params):
        return torch_class(params, foreach=False, **(options | {"lr": 3.0}))

    params = as_parameters(start)
    first = (ours if ours_first else torchs)(params)
    first.param_groups[0]["lr"] = 0.1
    walk(first, params, gradients[:3])
    second = (torchs if ours_first else ours)(params)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    if ours_first:
        second.param_groups[0]["foreach"] = False
    walk(second, params, gradients[3:])
    for p, q in zip(params, expected, strict=True):
        compare(p, q, "equal" if backend == "reference" else "trajectory")
    step = getattr(second.state[params[0]].get("step"), "item", lambda: None)()
    # torch's SGD neither counts nor minds a count
    assert step == {torch.optim.AdamW: 6, torch.optim.SGD: 3}[torch_class]


def test_keys_missing_from_a_loaded_group_keep_their_value():
    start, gradients = problem([(5,), (4,)], steps=1)
    params = as_parameters(start)
    theirs = torch.optim.AdamW([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}])
    walk(theirs, params, gradients)
    groups = [
        {"params": [params[0]], "threshold": 0.1},
        {"params": [params[1]], "normalization": "rank", "direction": "salient"},
    ]
    ours = uk.SelectiveAdamW(groups, seed=77)
    ours.load_state_dict(theirs.state_dict())
    a, b = ours.param_groups
    assert (a["threshold"], a["normalization"], a["seed"], a["lr"]) == (0.1, "minmax", 77, 1e-3)
    assert (b["threshold"], b["normalization"], b["direction"], b["lr"], b["format"]) == (
        0.8,
        "rank",
        "salient",
        0.5,
        1,
    )
    ours.step()


def test_a_newer_format_is_refused_and_nothing_changes():
    start, gradients = problem([(5,)], steps=1)
    _, optimizer = trained(uk.SelectiveAdamW, "auto", start, gradients, seed=1)
    before = copy.deepcopy(optimizer.state_dict())
    newer = copy.deepcopy(before)
    newer["param_groups"][0] |= {"format": 2, "lr": 9.0}
    newer["state"][0]["exp_avg"].add_(1)
    with pytest.raises(ValueError, match=r"format 2.*upgrade uegr-kernels"):
        optimizer.load_state_dict(newer)
    assert same_bits(optimizer.state_dict(), before)


def test_state_that_is_already_there_is_respected(backend):
    start, gradients = problem([(9,)], steps=1)
    params = as_parameters(start)
    optimizer = uk.SelectiveAdamW(params, lr=0.1, backend=backend, **NEUTRAL)
    optimizer.state[params[0]].update(
        step=torch.tensor(4.0), exp_avg=torch.full((9,), 0.5), exp_avg_sq=torch.full((9,), 0.25)
    )
    expected = as_parameters(start)
    other = torch.optim.AdamW(expected, lr=0.1, foreach=False)
    other.state[expected[0]].update(
        step=torch.tensor(4.0), exp_avg=torch.full((9,), 0.5), exp_avg_sq=torch.full((9,), 0.25)
    )
    walk(optimizer, params, gradients)
    walk(other, expected, gradients)
    compare(params[0], expected[0], "equal" if backend == "reference" else "step")


# A drop-in for torch.optim.


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_closure(backend, cls):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1, seed=1, backend=backend)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    assert len(calls) == 1 and (p != 1).any() and optimizer.step(lambda: None) is None


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ],
    ids=["StepLR", "OneCycleLR"],
)
def test_schedulers(backend, scheduler):
    start, gradients = problem([(9,)], steps=6)
    results = []
    for cls, options in (
        (torch.optim.AdamW, {"foreach": False}),
        (uk.SelectiveAdamW, NEUTRAL | {"backend": backend}),
    ):
        params = as_parameters(start)
        optimizer = cls(params, lr=0.1, **options)
        schedule = scheduler(optimizer)
        for grads in gradients:
            walk(optimizer, params, [grads])
            schedule.step()
        results.append(params[0].detach())
    compare(results[1], results[0], "equal" if backend == "reference" else "trajectory")


def test_options_per_group(backend):
    start, gradients = problem([(400,)] * 4, steps=2)
    each = [
        {"threshold": 0.3, "direction": "salient"},
        {"normalization": "rank", "rescale": False, "weight_decay": 0.0},
        {"statistics": "previous", "target": "update", "lr": 0.01, "maximize": True},
        {
            "normalization": "constant",
            "keep_probability": 0.7,
            "amsgrad": True,
            "betas": (0.5, 0.6),
        },
    ]
    params = as_parameters(start)
    optimizer = uk.SelectiveAdamW(
        [{"params": [p]} | options for p, options in zip(params, each, strict=True)],
        lr=0.1,
        seed=4,
        backend=backend,
    )
    walk(optimizer, params, gradients)
    # alone, at its own stream: behind parameters that have no gradient
    for i, options in enumerate(each):
        alone = [torch.nn.Parameter(torch.zeros(1)) for _ in range(i)] + as_parameters(
            start[i : i + 1]
        )
        single = uk.SelectiveAdamW(alone, **({"lr": 0.1, "seed": 4, "backend": backend} | options))
        for grads in gradients:
            alone[i].grad = grads[i]
            single.step()
        assert torch.equal(alone[i], params[i]), options


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_hooks_fire_once(cls):
    # torch wraps `step` once per class; ours must not be wrapped twice
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = cls([p], seed=1)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: fired.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: fired.append("loaded"))
    p.grad = torch.ones(2)
    optimizer.step()
    assert fired == ["before", "after"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == ["before", "after", "loading", "loaded"]
    optimizer.load_state_dict(optimizer.state_dict())  # its own hooks are gone again
    assert fired[4:] == ["loading", "loaded"]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"fused": False},
        {"capturable": True},
    ],
    ids=str,
)
def test_torchs_performance_options_are_taken_and_change_nothing(backend, cls, options):
    start, gradients = problem([(9,), ()], steps=2)
    expected, _ = trained(cls, backend, start, gradients, **SPREAD)
    found, _ = trained(cls, backend, start, gradients, **SPREAD, **options)
    assert same_bits(found, expected)


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = uk.SelectiveAdamW(model.named_parameters(), seed=1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(optimizer.state_dict())


def test_distributed_checkpoint_of_a_fresh_optimizer():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = uk.SelectiveAdamW(model.parameters(), seed=1, statistics="previous")
    found = get_optimizer_state_dict(model, optimizer)
    assert same_bits([p.detach() for p in model.parameters()], before)
    assert found["state"]["weight"].keys() == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "saliency_min",
        "saliency_max",
    }


def through_two_steps(cls, start, gradients, lr, **options) -> torch.Tensor:
    """The parameter after a differentiable step on each gradient."""
    p = start.clone()
    optimizer = cls([p], lr=lr, differentiable=True, **options)
    for g in gradients:
        p.grad = g * 1.0
        optimizer.step()
    return p


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(uk.SelectiveAdamW, {"weight_decay": 0.1}, id="adamw"),
        pytest.param(
            uk.SelectiveAdamW, {"weight_decay": 0.1, "target": "update"}, id="adamw update"
        ),
        pytest.param(uk.SelectiveAdamW, {"amsgrad": True, "betas": (0.5, 0.6)}, id="amsgrad"),
        pytest.param(uk.SelectiveSGD, {"weight_decay": 0.1}, id="sgd"),
        pytest.param(
            uk.SelectiveSGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}, id="nesterov"
        ),
        pytest.param(
            uk.SelectiveSGD,
            {"momentum": 0.9, "dampening": 0.2, "target": "update", "maximize": True},
            id="momentum update",
        ),
    ],
)
def test_differentiable_steps_have_the_gradient_of_finite_differences(cls, options):
    (start,), gradients = problem([(6,)], torch.float64, steps=2)
    leaves = [
        t.clone().requires_grad_()
        for t in (start, gradients[0][0], gradients[1][0], torch.tensor(0.1, dtype=torch.float64))
    ]
    # p does not depend on g
    selection = {"normalization": "constant", "keep_probability": 0.5, "seed": 3}
    assert torch.autograd.gradcheck(
        lambda p, g, h, lr: through_two_steps(cls, p, [g, h], lr, **selection, **options), leaves
    )
    selected = uk.selection_mask(gradients[0][0], step=1, **selection)
    assert 0 < selected.sum() < 6


@pytest.mark.parametrize(
    ("cls", "torch_class", "rtol"),
    # torch takes the powers of beta in float32 where a step is differentiable.
    [
        pytest.param(uk.SelectiveAdamW, torch.optim.AdamW, 1e-4, id="adamw"),
        pytest.param(uk.SelectiveSGD, torch.optim.SGD, 1e-12, id="sgd"),
    ],
)
def test_differentiable_takes_p_and_b_as_constants(cls, torch_class, rtol):
    (start,), gradients = problem([(30,)], torch.float64, steps=2)
    options = {"lr": 0.1, "weight_decay": 0.1}

    def gradients_of(cls, factors, **more):
        leaves = [t.clone().requires_grad_() for t in (start, *(g for (g,) in gradients))]
        selected = [
            g * 1.0 if factor is None else torch.where(factor != 0, g * factor, 0)
            for g, factor in zip(leaves[1:], factors, strict=True)
        ]
        p = through_two_steps(cls, leaves[0], selected, **options, **more)
        return [p.detach(), *torch.autograd.grad((p * torch.linspace(1, 2, 30)).sum(), leaves)]

    factors = []
    for k, (g,) in enumerate(gradients, 1):
        b = uk.selection_mask(g, seed=3, step=k, threshold=0.5, backend="reference")
        factors.append(torch.where(b, 1 / probability(g, threshold=0.5), 0))
    found = gradients_of(cls, [None, None], threshold=0.5, seed=3)
    expected = gradients_of(torch_class, factors)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().sum() > 0
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_differentiable_refuses_a_native_backend(cls):
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"differentiable=True.*backend='cpp'"):
        cls([p], differentiable=True, backend="cpp")


# Errors: what is wrong, its value; and nothing has changed.

BAD_OPTIONS = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": torch.tensor([1.0, 2.0])}, ValueError, "Tensor lr must be 1-element"),
    ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    (
        {"fused": True, "foreach": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together",
    ),
    (
        {"fused": True, "differentiable": True},
        RuntimeError,
        "`fused` does not support `differentiable`",
    ),
    ({"threshold": float("nan")}, ValueError, "threshold=nan"),
    ({"threshold": float("inf")}, ValueError, "threshold=inf"),
    ({"threshold": "high"}, TypeError, "threshold='high' is a str"),
    ({"threshold": True}, TypeError, "threshold=True is a bool"),
    ({"sharpness": -0.5}, ValueError, "sharpness=-0.5"),
    ({"sharpness": None}, TypeError, "sharpness=None is a NoneType"),
    (
        {"normalization": "max"},
        ValueError,
        "normalization='max' .*'minmax' or 'range' or 'rank' or 'constant'",
    ),
    ({"normalization": 0}, ValueError, "normalization=0 .*'minmax'"),
    ({"direction": "up"}, ValueError, "direction='up' .*'printed' or 'salient'"),
    ({"scope": "all"}, ValueError, "scope='all' .*'tensor' or 'global'"),
    ({"statistics": "old"}, ValueError, "statistics='old' .*'current' or 'previous'"),
    ({"target": "theta"}, ValueError, "target='theta' .*'gradient' or 'update'"),
    ({"target": ["update"]}, ValueError, r"target=\['update'\]"),
    ({"rescale": 1}, TypeError, "rescale=1 is a int"),
    ({"min_probability": 1.5}, ValueError, r"min_probability=1.5 .*\[0, 1\]"),
    ({"keep_probability": 0.0}, ValueError, r"keep_probability=0.0 .*\(0, 1\]"),
    (
        {"statistics": "previous", "normalization": "rank"},
        ValueError,
        "statistics='previous'.*normalization='rank'",
    ),
    (
        {"statistics": "previous", "normalization": "constant"},
        ValueError,
        "statistics='previous'.*normalization='constant'",
    ),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype=torch.float16"),
    ({"seed": 1.5}, TypeError, "seed=1.5 is a float"),
    ({"seed": True}, TypeError, "seed=True is a bool"),
    ({"lr": torch.tensor(1)}, TypeError, r"lr=tensor\(1\) is torch.int64"),
    ({"maximize": "yes"}, TypeError, "maximize='yes' is a str; give True or False"),
    ({"differentiable": None}, TypeError, "differentiable=None is a NoneType; give True or False"),
    ({"fused": "yes"}, TypeError, "fused='yes' is a str; give True or False"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend='gpu' .*'auto', 'reference', 'cpp', 'cuda', 'triton'",
    ),
]
ADAMW_ONLY = [
    (
        {"lr": torch.tensor(1.0), "foreach": True},
        ValueError,
        "lr as a Tensor is not supported for capturable=False and foreach=True",
    ),
    ({"betas": 0.9}, TypeError, "betas=0.9 is no pair of numbers"),
    ({"betas": (0.9,)}, TypeError, r"betas=\(0.9,\) is no pair of numbers"),
    ({"amsgrad": "no"}, TypeError, "amsgrad='no' is a str; give True or False"),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
    (
        {"betas": (torch.tensor(0.9), 0.9)},
        ValueError,
        "betas must be either both floats or both Tensors",
    ),
    ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
]
SGD_ONLY = [
    ({"momentum": float("nan")}, ValueError, "Invalid momentum value: nan"),
    ({"dampening": float("nan")}, ValueError, "Invalid dampening value: nan"),
    (
        {"nesterov": "yes", "momentum": 0.5},
        TypeError,
        "nesterov='yes' is a str; give True or False",
    ),
    ({"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5"),
    ({"nesterov": True}, ValueError, "Nesterov momentum requires a momentum and zero dampening"),
    (
        {"nesterov": True, "momentum": 0.5, "dampening": 0.1},
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
    ),
]
CONSTRUCTIONS = [
    pytest.param(cls, *case, id=f"{cls.__name__} {case[0]}")
    for cls, cases in (
        (uk.SelectiveAdamW, BAD_OPTIONS + ADAMW_ONLY),
        (uk.SelectiveSGD, BAD_OPTIONS + SGD_ONLY),
    )
    for case in cases
]


@pytest.mark.parametrize(("cls", "options", "error", "message"), CONSTRUCTIONS)
def test_a_bad_option_is_named_at_construction_and_in_a_later_group(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([torch.nn.Parameter(torch.zeros(2))], **options)
    if "backend" in options or options.get("differentiable"):
        return
    optimizer = cls([torch.nn.Parameter(torch.zeros(2))], seed=3)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]} | options)
    assert len(optimizer.param_groups) == 1


def complex_parameter():
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    return p


def sparse_parameter():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3).to_sparse()
    return p


def fine_parameter():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    return p


# What a group may hold at the step, and the words of the error.
BAD_STEPS = [
    pytest.param(
        sparse_parameter,
        {},
        RuntimeError,
        "parameter 1 has a sparse gradient.*to_dense",
        id="sparse",
    ),
    pytest.param(
        complex_parameter,
        {},
        TypeError,
        "parameter 1 is torch.complex64.*not supported",
        id="complex",
    ),
    pytest.param(fine_parameter, {"sharpness": -1.0}, ValueError, "sharpness=-1.0", id="sharpness"),
    pytest.param(
        fine_parameter,
        {"normalization": "max"},
        ValueError,
        "normalization='max'",
        id="normalization",
    ),
    pytest.param(
        fine_parameter,
        {"target": ["update"]},
        ValueError,
        r"target=\['update'\]",
        id="not hashable",
    ),
    pytest.param(fine_parameter, {"lr": "fast"}, (TypeError, ValueError), "lr.*fast", id="lr"),
    pytest.param(
        fine_parameter,
        {"lr": torch.ones(2)},
        (TypeError, ValueError, RuntimeError),
        "lr",
        id="lr of two elements",
    ),
    pytest.param(fine_parameter, {"seed": "x"}, TypeError, "seed='x' is a str", id="seed"),
    pytest.param(fine_parameter, {"maximize": "yes"}, TypeError, "maximize='yes'", id="maximize"),
    pytest.param(
        fine_parameter,
        {"weight_decay": None},
        (TypeError, ValueError),
        "weight_decay.*None",
        id="weight_decay",
    ),
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(("make", "options", "error", "message"), BAD_STEPS)
def test_a_bad_second_group_changes_nothing(backend, cls, make, options, error, message):
    first, second = fine_parameter(), make()
    optimizer = cls([{"params": [first]}, {"params": [second]}], lr=0.1, seed=1, backend=backend)
    optimizer.param_groups[1].update(options)
    before = first.detach().clone(), second.detach().clone()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    assert not optimizer.state.get(first) and not optimizer.state.get(second)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_state_of_another_shape_is_named_and_changes_nothing(backend, cls):
    first, second = fine_parameter(), fine_parameter()
    options = {"momentum": 0.5} if cls is uk.SelectiveSGD else {}
    optimizer = cls(
        [{"params": [first]}, {"params": [second]}], lr=0.1, seed=1, backend=backend, **options
    )
    optimizer.step()
    key = "momentum_buffer" if cls is uk.SelectiveSGD else "exp_avg_sq"
    optimizer.state[second][key] = torch.zeros(4)
    before = copy.deepcopy((first, optimizer.state[first]))
    with pytest.raises(ValueError, match=rf"parameter 1 has shape \(3,\) but its {key} \(4,\)"):
        optimizer.step()
    assert same_bits(
        (first.detach(), dict(optimizer.state[first])), (before[0].detach(), dict(before[1]))
    )


BAD_STATES = [
    ("step", 3.0, TypeError, "is a float"),
    ("step", None, TypeError, "is a NoneType"),
    ("step", torch.ones(2), ValueError, r"has shape \(2,\); give one value"),
    ("step", torch.tensor(3), TypeError, "is torch.int64"),
    ("moment", 0.5, TypeError, "is a float"),
    ("moment", torch.zeros(3, dtype=torch.complex64), TypeError, "is torch.complex64"),
    ("moment", torch.zeros(3).to_sparse(), (TypeError, RuntimeError), "sparse_coo"),
    ("moment", torch.zeros(1).expand(3), ValueError, "is expanded"),
    ("moment", torch.zeros(3, device="meta"), ValueError, "is on meta"),
    ("saliency_min", 0.5, TypeError, "is a float"),
    ("saliency_min", torch.ones(2), ValueError, r"has shape \(2,\); give one value"),
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    BAD_STATES,
    ids=lambda x: str(x)[:20] if isinstance(x, str) else None,
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    backend, cls, groups, key, value, error, message
):
    if groups == 1 and isinstance(value, torch.Tensor) and value.is_meta:
        pytest.skip("a single call with a meta tensor is a dry run of PyTorch's")
    params = [fine_parameter() for _ in range(3)]
    options = {"momentum": 0.5} if cls is uk.SelectiveSGD else {}
    split = [params] if groups == 1 else [params[:2], params[2:]]
    optimizer = cls(
        [{"params": part} for part in split],
        lr=0.1,
        seed=1,
        backend=backend,
        statistics="previous",
        **options,
    )
    walk(optimizer, params, [[torch.ones(3)] * 3] * 2)
    key = {"moment": "momentum_buffer" if cls is uk.SelectiveSGD else "exp_avg"}.get(key, key)
    before = copy.deepcopy([(p.detach(), dict(optimizer.state[p])) for p in params])
    optimizer.state[params[2]][key] = value
    with pytest.raises(error, match=message):
        optimizer.step()
    del optimizer.state[params[2]][key], before[2][1][key]
    assert same_bits([(p.detach(), dict(optimizer.state[p])) for p in params], before)


def test_sgd_refuses_an_expanded_parameter_before_anything_changes(backend):
    """What is written must not share memory with itself."""
    first, second = fine_parameter(), torch.zeros(1).expand(3).requires_grad_()
    second.grad = torch.ones(3)
    optimizer = uk.SelectiveSGD(
        [{"params": [first]}, {"params": [second]}], lr=0.1, seed=1, backend=backend
    )
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert first.tolist() == [0.0, 0.0, 0.0]


STATELESS_ERRORS = [
    *[(o, e, m) for o, e, m in BAD_OPTIONS if o.keys() <= {*FIELDS, "backend", "seed"}],
    ({"statistics": "previous"}, ValueError, "statistics='previous' needs an optimizer's state"),
    ({"target": "update"}, ValueError, "target='update' needs an optimizer's state"),
    ({"step": -1}, ValueError, r"step=-1 .*\[0, 2\^24\)"),
    ({"step": 2**24}, ValueError, "step=16777216"),
    ({"step": 1.0}, TypeError, "step=1.0 is a float"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [pytest.param(*case, id=str(case[0])) for case in STATELESS_ERRORS],
)
def test_stateless_functions_name_a_bad_option(options, error, message):
    p = fine_parameter()
    with pytest.raises(error, match=message):
        uk.select_gradients_([p], **({"seed": 1, "step": 1} | options))
    assert p.grad.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(error, match=message):
        uk.selection_mask(p.grad, **({"seed": 1, "step": 1} | options))
    if not options.keys() & {"seed", "step"}:
        with pytest.raises(error, match=message):
            uk.selection_probability(p.grad, **options)


BAD_SECOND_GRADIENTS = [
    pytest.param(
        sparse_parameter,
        None,
        RuntimeError,
        r"params\[1\].grad is "
        r"sparse.*to_dense",
        id="sparse",
    ),
    pytest.param(
        complex_parameter,
        None,
        TypeError,
        r"params\[1\].grad is torch.complex64; give "
        r"float32",
        id="complex",
    ),
    pytest.param(
        fine_parameter,
        [torch.ones(3)],
        ValueError,
        "saliency has 1 tensors for 2 parameters",
        id="too few saliencies",
    ),
    pytest.param(
        fine_parameter,
        [torch.ones(3), torch.ones(4)],
        ValueError,
        r"params\[1\].grad has shape "
        r"\(4,\).*\(3,\)",
        id="saliency's shape",
    ),
    pytest.param(
        fine_parameter,
        [torch.ones(3), torch.ones(3).long()],
        TypeError,
        r"saliency of params\[1\].grad",
        id="saliency's dtype",
    ),
]


@pytest.mark.parametrize(("make", "saliency", "error", "message"), BAD_SECOND_GRADIENTS)
def test_select_gradients_names_a_bad_gradient_and_changes_none(
    backend, make, saliency, error, message
):
    params = [fine_parameter(), make()]
    with pytest.raises(error, match=message):
        uk.select_gradients_(
            params,
            seed=1,
            step=1,
            saliency=saliency,
            normalization="constant",
            keep_probability=0.1,
            backend=backend,
        )
    assert params[0].grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("error")  # NumPy warns where a comparison overflows its narrow types
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_numpys_numbers_are_numbers(backend, cls):
    start, gradients = problem([(9, 5)])
    plain = {
        "lr": 0.125,
        "weight_decay": 0.5,
        "threshold": 0.25,
        "sharpness": 2,
        "min_probability": 0.5,
        "seed": 2**63 + 1,
    }
    types = (np.float32, np.float16, np.float32, np.int64, np.float32, np.uint64)
    converted = {key: kind(value) for (key, value), kind in zip(plain.items(), types, strict=True)}
    results = [
        trained(cls, backend, start, gradients, **options)[0][0] for options in (plain, converted)
    ]
    assert same_bits(*results)
    masks = [
        uk.selection_mask(
            gradients[0][0], seed=kind(3), step=kind(1), stream=kind(2), backend=backend
        )
        for kind in (int, np.int64)
    ]
    assert same_bits(*masks)
    flags = {"rescale": False, "maximize": True} | (
        {"nesterov": True, "momentum": 0.5} if cls is uk.SelectiveSGD else {"amsgrad": True}
    )
    numpys = {
        name: np.bool_(value) if isinstance(value, bool) else np.float32(value)
        for name, value in flags.items()
    }
    results = [
        trained(cls, backend, start, gradients, **options, seed=1)[0][0]
        for options in (flags, numpys)
    ]
    assert same_bits(*results)
    for wrong in (
        {"lr": True},
        {"weight_decay": np.bool_(True)},
        {"lr": np.array([0.1])},
        {"threshold": np.bool_(True)},
    ):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*; give a number"):
            cls([torch.nn.Parameter(torch.zeros(2))], **wrong)


def test_select_gradients_names_what_is_no_tensor(backend):
    first, second = fine_parameter(), fine_parameter()
    for params, saliency, message in (
        ([first, 3], None, r"params\[1\] is a int"),
        ([first, ("name", second)], None, r"params\[1\] is a tuple"),
        ([first, second], [torch.ones(3), None], r"saliency\[1\] is None"),
    ):
        with pytest.raises(TypeError, match=message):
            uk.select_gradients_(
                params, seed=1, step=1, saliency=saliency, threshold=-10.0, backend=backend
            )
    assert first.grad.tolist() == second.grad.tolist() == [1.0] * 3


def test_select_gradients_refuses_an_expanded_gradient(backend):
    params = [fine_parameter(), torch.nn.Parameter(torch.zeros(3))]
    params[1].grad = torch.ones(1).expand(3)
    with pytest.raises(ValueError, match=r"params\[1\].grad is expanded.*clone"):
        uk.select_gradients_(
            params, seed=1, step=1, normalization="constant", keep_probability=0.1, backend=backend
        )
    assert params[0].grad.tolist() == [1.0, 1.0, 1.0]


def test_looking_functions_name_a_bad_argument():
    for function, more in (
        (uk.selection_probability, {}),
        (uk.selection_mask, {"seed": 1, "step": 1}),
    ):
        with pytest.raises(TypeError, match="grad is a list"):
            function([1.0], **more)
        with pytest.raises(TypeError, match=r"grad is torch\.int64"):
            function(torch.ones(3).long(), **more)
        with pytest.raises(ValueError, match=r"saliency of grad has shape \(2,\)"):
            function(torch.ones(3), saliency=torch.ones(2), **more)
        with pytest.raises(RuntimeError, match="grad is sparse"):
            function(torch.ones(3).to_sparse(), **more)
    for stream in (-1, 2**32):
        with pytest.raises(ValueError, match=f"stream={stream}"):
            uk.selection_mask(torch.ones(3), seed=1, step=1, stream=stream)


# Memory, operators, random cases.


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
    n, tensors = 1000, 3  # 4 MB each
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
    optimizer.step()  # makes the states
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
    """A line of /proc/self/status in bytes."""
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
    """Positional and keyword arguments for an operator: a dense permuted tensor and a 0-dim one."""
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


@pytest.mark.parametrize("name", op.SCHEMAS)
@pytest.mark.parametrize(
    ("dtype", "normalization"),
    [(torch.float32, "minmax"), (torch.bfloat16, "rank"), (torch.float64, "constant")],
    ids=["minmax", "rank", "constant"],
)
def test_opcheck(name, dtype, normalization):
    args, kwargs = operator_arguments(name, dtype, normalization)
    torch.library.opcheck(getattr(torch.ops.uegr_kernels, name).default, args, kwargs)


@st.composite
def random_cases(draw):
    """A gradient of any shape, values and strides, and a selection."""
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


# Many small parameters: their states lie in one tensor, and a step that finds everything as the
# last one did looks at it once


def replace_state(optimizer, params):
    state = optimizer.state[params[3]]
    key = next(iter(states_of(optimizer, params[3])))
    state[key] = state[key].clone() + 1


def turn_state(optimizer, params):
    state = optimizer.state[params[0]]
    key = next(
        key for key in states_of(optimizer, params[0]) if key != "step" and "saliency" not in key
    )
    state[key] = state[key].as_strided((3, 5), (1, 3))


def replace_dict(optimizer, params):
    optimizer.state[params[3]] = {
        key: value.clone() for key, value in optimizer.state[params[3]].items()
    }


def move_state(optimizer, params):
    for value in states_of(optimizer, params[3]).values():
        value.data = value.data.clone()


def turn_the_state_where_it_lies(optimizer, params):
    state = optimizer.state[params[-5]]
    key = next(
        key for key in states_of(optimizer, params[-5]) if key != "step" and "saliency" not in key
    )
    state[key].data = state[key].as_strided((3, 5), (1, 3))


def forget_state(optimizer, params):
    del optimizer.state[params[3]]


def replace_parameter(optimizer, params):
    new = torch.nn.Parameter(params[3].detach() * 2)
    optimizer.state[new] = optimizer.state.pop(params[3])
    params[3] = optimizer.param_groups[0]["params"][3] = new


def move_parameter(optimizer, params):
    params[3].data = params[3].detach() * 2


def turn_parameter_where_it_lies(optimizer, params):
    params[-5].data = params[-5].detach().as_strided((3, 5), (1, 3))


def widen_parameter(optimizer, params):
    params[3].data = params[3].data.double()
    params[3].grad = None


def skip_one(optimizer, params):
    params[3].requires_grad_(False)


def keep_statistics(optimizer, params):
    optimizer.param_groups[0]["statistics"] = "previous"


def take_global_scope(optimizer, params):
    optimizer.param_groups[0]["scope"] = "global"


def save_and_load(optimizer, params):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def add_a_group(optimizer, params):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


EVENTS = [
    replace_state,
    turn_state,
    replace_dict,
    move_state,
    forget_state,
    replace_parameter,
    move_parameter,
    widen_parameter,
    skip_one,
]
EVENTS += [
    keep_statistics,
    take_global_scope,
    save_and_load,
    add_a_group,
    turn_the_state_where_it_lies,
    turn_parameter_where_it_lies,
]


@pytest.mark.parametrize("count", [3, 70])
def test_a_parameter_that_comes_to_overlap_itself_between_steps_is_refused(native, count):
    params = as_parameters([torch.ones(3, 3)] * count)
    optimizer = uk.SelectiveAdamW(params, seed=1, backend=native)
    walk(optimizer, params, [[torch.ones(3, 3)] * count] * 3)
    params[1].data = params[1].detach().as_strided((3, 3), (1, 1))
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="parameter 1 overlaps itself"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("native", ["cpp"], indirect=True)  # on a GPU nobody looks at a count
@pytest.mark.parametrize("count", [1, 70])
def test_counts_that_float32_cannot_number_are_refused_in_every_step(native, count):
    params = as_parameters([torch.ones(3)] * count)
    optimizer = uk.SelectiveAdamW(params, seed=1, backend=native)
    walk(optimizer, params, [[torch.ones(3)] * count] * 3)
    optimizer.state[params[0]]["step"].fill_(2**24 - 2)
    optimizer.step()
    before = params[0].detach().clone()
    with pytest.raises(
        (RuntimeError, ValueError),
        match="is 1.67772e.07; give the number of steps taken|is 16777215.0; give",
    ):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_nothing_is_left_of_an_optimizer_that_is_gone():
    params = as_parameters([torch.ones(4)] * 70)
    optimizer = uk.SelectiveAdamW(params, seed=1)
    walk(optimizer, params, [[torch.ones(4)] * 70] * 2)
    left = [weakref.ref(value) for p in params for value in optimizer.state[p].values()]
    left += [
        weakref.ref(value._base)
        for value in optimizer.state[params[0]].values()
        if value._base is not None
    ]
    del optimizer
    gc.collect()
    assert not any(each() is not None for each in left)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("statistics", ["current", "previous"])
def test_many_small_parameters_step_as_few_do(native, cls, event, statistics):
    """The same parameters, beside a group that sends every step the long way."""
    # few are many enough where no states are shared
    shapes = [(3, 5), (16,), (), (0, 2), (7,)] * (14 if native == "cpp" else 1)
    start, gradients = problem(shapes, steps=6)
    options = {**SPREAD, "statistics": statistics, "backend": native} | (
        {"momentum": 0.9} if cls is uk.SelectiveSGD else {}
    )
    results = []
    for extra in ([], [{"params": [torch.nn.Parameter(torch.ones(1))]}]):
        params = as_parameters(start)
        optimizer = cls([{"params": params}, *extra], lr=0.1, **options)
        for i, grads in enumerate(gradients):
            if i == 3:
                event(optimizer, params)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype) if p.requires_grad else None
            optimizer.step()
        results.append((params, [states_of(optimizer, p) for p in params]))
    for i, (one, other) in enumerate(zip(*(params for params, _ in results), strict=True)):
        assert same_bits(one, other), f"parameter {i}"
    assert same_bits(*(states for _, states in results))


@pytest.mark.parametrize("statistics", ["current", "previous"])
def test_a_missing_gradient_after_steps_in_global_scope(native, statistics):
    params = as_parameters([torch.ones(4)] * 3)
    optimizer = uk.SelectiveAdamW(
        params, seed=1, scope="global", statistics=statistics, backend=native
    )
    walk(optimizer, params, [[torch.ones(4)] * 3] * 3)
    params[0].grad = None
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 4, 4]
    optimizer.zero_grad()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 4, 4]


# Triton's kernels find a tensor each by a table
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
@pytest.mark.parametrize("statistics", ["current", "previous"])
def test_many_small_parameters_have_states_side_by_side_each_of_its_own_size(native, statistics):
    params = as_parameters([torch.ones(2, 4)] * 70)
    optimizer = uk.SelectiveAdamW(params, seed=1, statistics=statistics, backend=native)
    walk(optimizer, params, [[torch.ones(2, 4)] * 70] * 3)
    for key, value in optimizer.state[params[0]].items():
        values = [optimizer.state[p][key] for p in params]
        addresses = [value.data_ptr() for value in values]
        assert addresses == [addresses[0] + i * value.nbytes for i in range(70)]
        for value in values:
            assert value.untyped_storage().nbytes() == value.nbytes and value.storage_offset() == 0
            file = io.BytesIO()
            torch.save(value, file)
            assert len(file.getvalue()) < 2000
            assert copy.deepcopy(value).untyped_storage().nbytes() == value.nbytes
    assert all(optimizer.state[p]["step"] == 3 for p in params)
    version = optimizer.state[params[5]]["exp_avg"]._version
    walk(optimizer, params, [[torch.ones(2, 4)] * 70])
    assert optimizer.state[params[5]]["exp_avg"]._version > version
    copied = copy.deepcopy(optimizer)
    walk(copied, copied.param_groups[0]["params"], [[torch.ones(2, 4)] * 70])
    assert all(optimizer.state[p]["step"] == 4 for p in params)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_an_update_that_fails_is_never_tried_again(monkeypatch, backend, cls, steps_before):
    """Even where the failure comes after everything was written."""
    params = as_parameters([torch.ones(4), torch.ones(3)])
    optimizer, expected = (
        cls(group, lr=0.1, seed=1, backend=backend) for group in (params, copy.deepcopy(params))
    )
    walk(optimizer, params, [[torch.ones(4), torch.ones(3)]] * steps_before)
    walk(
        expected,
        expected.param_groups[0]["params"],
        [[torch.ones(4), torch.ones(3)]] * (steps_before + 1),
    )
    calls, real = [], getattr(op, optimizer.operator)

    def failing(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(args[0])
        raise RuntimeError("the launch failed")

    monkeypatch.setattr(op, optimizer.operator, failing)
    with pytest.raises(RuntimeError, match="the launch failed"):
        walk(optimizer, params, [[torch.ones(4), torch.ones(3)]])
    monkeypatch.setattr(op, optimizer.operator, real)
    assert len(calls) == 1
    for p, q in zip(params, expected.param_groups[0]["params"], strict=True):
        assert optimizer.state[p]["step"] == steps_before + 1 and torch.equal(p, q)
    walk(optimizer, params, [[torch.ones(4), torch.ones(3)]])
    assert all(optimizer.state[p]["step"] == steps_before + 2 for p in params)


def by_a_dual(tangent):
    return torch.autograd.forward_ad.make_dual(torch.ones(4), tangent)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_step_in_forward_mode_is_refused(cls, differentiable):
    p = as_parameters([torch.ones(4)])[0]
    optimizer = cls([p], lr=0.1, seed=1, differentiable=differentiable)
    with torch.autograd.forward_ad.dual_level():
        p.grad = by_a_dual(torch.ones(4))
        with (
            torch.no_grad(),
            pytest.raises(
                RuntimeError,
                match=rf"the step of {cls.__name__} of uegr_kernels has no "
                r"forward-mode derivative",
            ),
        ):
            optimizer.step()
        assert p.tolist() == [1.0] * 4 and not optimizer.state[p]
        p.grad = torch.ones(4)
        if not differentiable:
            optimizer.step()
            assert optimizer.state[p]["step"] == 1


STATELESS = {
    "selection_probability": lambda x, backend: uk.selection_probability(x, backend=backend),
    "selection_probability of a saliency": lambda x, backend: uk.selection_probability(
        torch.ones(4), saliency=x, backend=backend
    ),
    "selection_mask": lambda x, backend: uk.selection_mask(x, seed=1, step=1, backend=backend) * x,
}


@pytest.mark.parametrize("name", STATELESS)
def test_derivatives_of_the_selection_are_refused(backend, name):
    def run(x):
        return STATELESS[name](x, backend)

    x, said = torch.tensor([1.0, 2.0, 3.0, 4.0]), rf"{name.split(' of ')[0]} of uegr_kernels"
    for forward in (
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.jacfwd(run)(x),
        lambda: torch.func.linearize(run, x),
    ):
        with pytest.raises(RuntimeError, match=f"{said} has no forward-mode derivative"):
            forward()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"{said} has no forward-mode derivative"),
    ):
        run(by_a_dual(torch.ones(4)))
    for backward in (
        lambda: torch.func.grad(lambda x: run(x).sum())(x),
        lambda: torch.func.jacrev(run)(x),
    ):
        with pytest.raises(RuntimeError, match=rf"{said} has no derivative: .*grad\.detach\(\)"):
            backward()
    with pytest.raises(RuntimeError, match=f"{said} does not run under torch.func.vmap"):
        torch.func.vmap(run)(x[None])
    torch.testing.assert_close(torch.func.grad(lambda x: (x * run(x.detach())).sum())(x), run(x))


def test_gradients_with_a_tangent_are_not_selected(backend):
    p = as_parameters([torch.ones(4)])[0]
    with torch.autograd.forward_ad.dual_level():
        p.grad = by_a_dual(torch.ones(4))
        with pytest.raises(
            RuntimeError, match="select_gradients_ of uegr_kernels has no forward-mode derivative"
        ):
            uk.select_gradients_([p], seed=1, step=1, backend=backend)
        assert p.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    ("gradient", "error", "words"),
    [
        pytest.param(torch.ones(4).to_sparse(), RuntimeError, "to_dense", id="sparse"),
        pytest.param("expanded", ValueError, "parameter {} is expanded", id="expanded parameter"),
    ],
)
def test_a_refused_step_after_others_changes_nothing(native, cls, gradient, error, words):
    # few are many enough where no states are shared
    many, bad = (64, 40) if native == "cpp" else (5, 3)
    params = as_parameters([torch.ones(4)] * many)
    optimizer = cls(params, seed=1, lr=0.1, backend=native)
    walk(optimizer, params, [[torch.ones(4)] * many] * 3)
    before = (
        [p.detach().clone() for p in params],
        copy.deepcopy([states_of(optimizer, p) for p in params]),
    )
    if isinstance(gradient, str):
        params[bad].data = torch.ones(1).expand(4)
        before[0][bad] = torch.ones(4)
    else:
        params[bad].grad = gradient
    with pytest.raises(error, match=words.format(bad)):
        optimizer.step()
    assert same_bits(before[0], [p.detach() for p in params])
    assert same_bits(before[1], [states_of(optimizer, p) for p in params])
    params[bad].data, params[bad].grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 4 for p in params)


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


def test_minus_zero_is_a_saliency_of_zero(backend):
    n = 5000 if backend == "triton" else 2**20 + 1  # one more than a rank looks at every element of
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


def test_a_mask_may_be_of_step_zero(backend):
    g = torch.linspace(0, 1, 4000)
    masks = [
        uk.selection_mask(g, seed=1, step=0, threshold=0.3, backend=name)
        for name in (backend, "reference")
    ]
    assert torch.equal(*masks) and not masks[0].all()


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
    options = Selection(
        *(inspect.signature(uk.selection_mask).parameters[name].default for name in FIELDS)
    ).numbers()
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
