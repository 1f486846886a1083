"""Errors: what is wrong, its value; and nothing has changed."""

import copy
import functools

import numpy as np
import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.selective.options import FIELDS

from .problems import OPTIMIZERS, as_parameters, problem, run_steps, same_bits, trained

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
        "normalization='max' .*'minmax', 'range', 'rank', 'constant'",
    ),
    ({"normalization": 0}, ValueError, "normalization=0 .*'minmax'"),
    ({"direction": "up"}, ValueError, "direction='up' .*'printed', 'salient'"),
    ({"scope": "all"}, ValueError, "scope='all' .*'tensor', 'global'"),
    ({"statistics": "old"}, ValueError, "statistics='old' .*'current', 'previous'"),
    ({"target": "theta"}, ValueError, "target='theta' .*'gradient', 'update'"),
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
    run_steps(optimizer, params, [[torch.ones(3)] * 3] * 2)
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
    *[
        (o, e, m)
        for o, e, m in BAD_OPTIONS
        if o.keys() <= {*FIELDS, "backend", "seed"} - {"scope", "statistics", "target"}
    ],
    ({"statistics": "current"}, TypeError, "unexpected keyword argument 'statistics'"),
    ({"target": "gradient"}, TypeError, "unexpected keyword argument 'target'"),
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


def test_a_scope_is_for_several_gradients():
    p = fine_parameter()
    with pytest.raises(ValueError, match="scope='all' .*'tensor', 'global'"):
        uk.select_gradients_([p], seed=1, step=1, scope="all")
    for call in (uk.selection_probability, functools.partial(uk.selection_mask, seed=1, step=1)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'scope'"):
            call(p.grad, scope="tensor")


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
        r"saliency\[1\] has shape \(4,\) and params\[1\].grad \(3,\)",
        id="saliency's shape",
    ),
    pytest.param(
        fine_parameter,
        [torch.ones(3), torch.ones(3).long()],
        TypeError,
        r"saliency\[1\] is torch",
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


# NumPy warns where a comparison overflows its narrow types
@pytest.mark.filterwarnings("error")
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
        with pytest.raises(ValueError, match=r"saliency has shape \(2,\)"):
            function(torch.ones(3), saliency=torch.ones(2), **more)
        with pytest.raises(RuntimeError, match="grad is sparse"):
            function(torch.ones(3).to_sparse(), **more)
    for stream in (-1, 2**32):
        with pytest.raises(ValueError, match=f"stream={stream}"):
            uk.selection_mask(torch.ones(3), seed=1, step=1, stream=stream)


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
