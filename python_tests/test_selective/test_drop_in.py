"""A drop-in for torch.optim."""

import numpy as np
import pytest
import torch
from conftest import compare

import uegr_kernels as uk

from .problems import (
    NEUTRAL,
    OPTIMIZERS,
    SPREAD,
    as_parameters,
    probability,
    problem,
    run_steps,
    same_bits,
    trained,
)


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
            run_steps(optimizer, params, [grads])
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
    run_steps(optimizer, params, gradients)
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
    # its own hooks are gone again
    optimizer.load_state_dict(optimizer.state_dict())
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
    """Gives the parameter after a differentiable step on each gradient."""
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
