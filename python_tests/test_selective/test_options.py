"""Options that only an optimizer has."""

import copy

import numpy as np
import pytest
import torch
from conftest import compare

import uegr_kernels as uk

from .problems import (
    DTYPES,
    HAND,
    NEUTRAL,
    OPTIMIZERS,
    SPREAD,
    agreement_problem,
    as_parameters,
    dtype_id,
    noting_near_ties,
    probability,
    problem,
    run_steps,
    same_bits,
    spread_gradient,
    states_of,
    trained,
)


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
            # the two neighbours
            assert values.unique().numel() == 2
            assert abs(values.mean() - mean) <= 5 * values.std() / n**0.5, key
    # low 16 bits of the word for one, high 16 for the other
    if cls is uk.SelectiveAdamW:
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
        run_steps(optimizer, params, [[g * 2.0**k for g in grads]])
        before = (
            copy.deepcopy(optimizer.state_dict()["state"]),
            [p.detach().clone() for p in params],
        )
        optimizer.found_inf = torch.tensor(1.0)
        run_steps(optimizer, params, [[g * float("inf") for g in grads]])
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
    run_steps(optimizer, params, [[torch.full((9,), float("inf"))]])
    assert torch.equal(params[0], start[0]) and optimizer.state[params[0]]["step"] == 0
    optimizer.found_inf = torch.tensor(0.0)
    run_steps(optimizer, params, gradients)
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
            # an overflow, then the same batch again
            if k == 2 and scaled:
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
    run_steps(other, stepped, gradients)
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


def inverse_by_sgd(backend, before, after, gradient) -> torch.Tensor:
    """Returns 1/p of the selected elements, NaN elsewhere: by plain SGD with lr 1 the parameter
    moves by -g/p where selected.
    """
    factor = (before - after) / gradient
    return torch.where(factor == 0, torch.nan, factor).detach()


def assert_inverse(found, probabilities) -> None:
    """Checks that `found` (NaN: not selected) is 1/p; at least one element was selected."""
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
    # each element is selected by one of them at least
    for seed in (0, 4, 5, 6):
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
        found = []
        for scope in ("global", "tensor"):
            p = torch.zeros_like(HAND).requires_grad_()
            p.grad = HAND.clone()
            uk.select_gradients_(
                [p], seed=1, step=1, scope=scope, normalization=normalization, backend=backend
            )
            found.append(p.grad)
        assert torch.equal(*found) and not torch.equal(found[0], HAND)
