"""Determinism, checkpoints, state."""

import copy
import io
import pickle

import pytest
import torch
from conftest import compare

import uegr_kernels as uk

from .problems import (
    DTYPES,
    NEUTRAL,
    SPREAD,
    as_parameters,
    dtype_id,
    problem,
    run_steps,
    same_bits,
    states_of,
    trained,
    transposed,
)

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
    # its seed is drawn; the second one's is another
    optimizer = cls(params, **options)
    run_steps(optimizer, params, gradients[:2])
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    run_steps(optimizer, params, gradients[2:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = as_parameters(saved["params"])
    second = cls(resumed, **(options | {"lr": 7.0}))
    assert second.param_groups[0]["seed"] != optimizer.param_groups[0]["seed"]
    second.load_state_dict(saved["optimizer"])
    run_steps(second, resumed, gradients[2:])
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
    run_steps(optimizer, params, gradients[:2])
    others, other = copied((params, optimizer))
    assert (
        other.backend == backend
        and other._step_supports_amp_scaling
        and other.param_groups[0]["params"][0] is others[0]
    )
    run_steps(optimizer, params, gradients[2:])
    run_steps(other, others, gradients[2:])
    assert same_bits(everything(others, other), everything(params, optimizer))


def test_loading_into_a_fresh_copy_before_any_step_changes_nothing(backend):
    start, gradients = problem([(70,)], steps=2)
    options = {"lr": 0.1, "threshold": 0.5, "momentum": 0.9, "seed": 3, "backend": backend}
    expected, _ = trained(uk.SelectiveSGD, start=start, gradients=gradients, **options)
    params = as_parameters(start)
    optimizer = uk.SelectiveSGD(params, **options)
    # as Accelerate does when it wraps
    optimizer.load_state_dict(optimizer.state_dict())
    run_steps(optimizer, params, gradients)
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
    # more than one thread's piece
    size = 40_000 if backend == "reference" else 300_000
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


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_each_kept_extreme_is_read_in_its_own_dtype(backend, scope):
    start, gradients = problem([(70,), (30,)], steps=3)
    options = SPREAD | {"statistics": "previous", "scope": scope}
    params, optimizer = trained(uk.SelectiveAdamW, backend, start, gradients, **options)
    others, other = trained(uk.SelectiveAdamW, backend, start, gradients[:1], **options)
    for p, key in zip(others, ("saliency_min", "saliency_max"), strict=True):
        other.state[p][key] = other.state[p][key].double()
    run_steps(other, others, gradients[1:])
    assert same_bits(others, params)
    for p, q, key in zip(params, others, ("saliency_min", "saliency_max"), strict=True):
        assert other.state[q][key].dtype == torch.float64
        assert other.state[q][key].float() == optimizer.state[p][key]


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
    run_steps(torch_class(expected, foreach=False, **options), expected, gradients)

    def ours(params):
        return cls(params, backend=backend, **NEUTRAL, **(options | {"lr": 3.0}))

    def torchs(params):
        return torch_class(params, foreach=False, **(options | {"lr": 3.0}))

    params = as_parameters(start)
    first = (ours if ours_first else torchs)(params)
    first.param_groups[0]["lr"] = 0.1
    run_steps(first, params, gradients[:3])
    second = (torchs if ours_first else ours)(params)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    if ours_first:
        second.param_groups[0]["foreach"] = False
    run_steps(second, params, gradients[3:])
    for p, q in zip(params, expected, strict=True):
        compare(p, q, "equal" if backend == "reference" else "trajectory")
    step = getattr(second.state[params[0]].get("step"), "item", lambda: None)()
    # torch's SGD neither counts nor minds a count
    assert step == {torch.optim.AdamW: 6, torch.optim.SGD: 3}[torch_class]


def test_keys_missing_from_a_loaded_group_keep_their_value():
    start, gradients = problem([(5,), (4,)], steps=1)
    params = as_parameters(start)
    theirs = torch.optim.AdamW([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}])
    run_steps(theirs, params, gradients)
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
    run_steps(optimizer, params, gradients)
    run_steps(other, expected, gradients)
    compare(params[0], expected[0], "equal" if backend == "reference" else "step")
