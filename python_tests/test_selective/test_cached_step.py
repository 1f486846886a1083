"""Many small parameters: their states lie in one tensor, and a step that finds everything as the
last one did looks at it once.
"""

import copy
import functools
import gc
import importlib
import io
import pathlib
import sys
import weakref

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.selective import op, reference

from .problems import OPTIMIZERS, SPREAD, as_parameters, problem, run_steps, same_bits, states_of


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
    run_steps(optimizer, params, [[torch.ones(3, 3)] * count] * 3)
    params[1].data = params[1].detach().as_strided((3, 3), (1, 1))
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="parameter 1 overlaps itself"):
        optimizer.step()
    assert torch.equal(params[0], before)


# on a GPU nobody looks at a count
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
@pytest.mark.parametrize("count", [1, 70])
def test_counts_that_float32_cannot_number_are_refused_in_every_step(native, count):
    params = as_parameters([torch.ones(3)] * count)
    optimizer = uk.SelectiveAdamW(params, seed=1, backend=native)
    run_steps(optimizer, params, [[torch.ones(3)] * count] * 3)
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
    run_steps(optimizer, params, [[torch.ones(4)] * 70] * 2)
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
    shapes = [(3, 5), (16,), (), (0, 2), (7,)] * 14
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


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_states_of_one_value_lie_side_by_side_whatever_the_parameters_sizes(native, scope):
    shapes = [*[(3, 5)] * 69, (5000,)]
    start, gradients = problem(shapes, steps=3)
    results = []
    for extra in ([], [{"params": [torch.nn.Parameter(torch.ones(1))]}]):
        params = as_parameters(start)
        optimizer = uk.SelectiveAdamW(
            [{"params": params}, *extra],
            statistics="previous",
            scope=scope,
            backend=native,
            **SPREAD,
        )
        run_steps(optimizer, params, gradients)
        together = {
            key: len({p.data_ptr() // 4 - i for i, p in enumerate(values)}) == 1
            for key in ("step", "saliency_min", "saliency_max", "exp_avg")
            for values in [[optimizer.state[p][key] for p in params]]
        }
        assert together == {
            "step": not extra,
            "saliency_min": not extra,
            "saliency_max": not extra,
            "exp_avg": False,
        }
        results.append((params, [states_of(optimizer, p) for p in params]))
    assert same_bits(*results)


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
@pytest.mark.parametrize("statistics", ["current", "previous"])
@pytest.mark.parametrize("largest", [(3, 5), (5000,)], ids=str)
def test_a_step_compiled_after_others_has_each_parameters_own_states(native, largest, statistics):
    """The compiler takes views of one tensor for one piece of memory."""
    start, gradients = problem([largest, *[(3, 5)] * 69], steps=6)
    results = []
    for compiles in (False, True):
        params = as_parameters(start)
        optimizer = uk.SelectiveAdamW(params, statistics=statistics, backend=native, **SPREAD)
        compiled = torch.compile(optimizer.step, backend="aot_eager")
        for i, grads in enumerate(gradients):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            (compiled if compiles and i in (2, 3, 5) else optimizer.step)()
        results.append((params, [states_of(optimizer, p) for p in params]))
    assert same_bits(*results)


@pytest.mark.parametrize("statistics", ["current", "previous"])
def test_a_missing_gradient_after_steps_in_global_scope(native, statistics):
    params = as_parameters([torch.ones(4)] * 3)
    optimizer = uk.SelectiveAdamW(
        params, seed=1, scope="global", statistics=statistics, backend=native
    )
    run_steps(optimizer, params, [[torch.ones(4)] * 3] * 3)
    params[0].grad = None
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 4, 4]
    optimizer.zero_grad()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 4, 4]


@pytest.mark.parametrize("statistics", ["current", "previous"])
def test_many_small_parameters_have_states_side_by_side_each_of_its_own_size(native, statistics):
    params = as_parameters([torch.ones(2, 4)] * 70)
    optimizer = uk.SelectiveAdamW(params, seed=1, statistics=statistics, backend=native)
    run_steps(optimizer, params, [[torch.ones(2, 4)] * 70] * 3)
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
    run_steps(optimizer, params, [[torch.ones(2, 4)] * 70])
    assert optimizer.state[params[5]]["exp_avg"]._version > version
    copied = copy.deepcopy(optimizer)
    run_steps(copied, copied.param_groups[0]["params"], [[torch.ones(2, 4)] * 70])
    assert all(optimizer.state[p]["step"] == 4 for p in params)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_an_update_that_fails_is_never_tried_again(monkeypatch, backend, cls, steps_before):
    """Even where the failure comes after everything was written."""
    params = as_parameters([torch.ones(4), torch.ones(3)])
    optimizer, expected = (
        cls(group, lr=0.1, seed=1, backend=backend) for group in (params, copy.deepcopy(params))
    )
    run_steps(optimizer, params, [[torch.ones(4), torch.ones(3)]] * steps_before)
    run_steps(
        expected,
        expected.param_groups[0]["params"],
        [[torch.ones(4), torch.ones(3)]] * (steps_before + 1),
    )
    calls, real = [], getattr(op, optimizer.operator.name)

    def failing(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(args[0])
        raise RuntimeError("the launch failed")

    monkeypatch.setattr(op, optimizer.operator.name, failing)
    with pytest.raises(RuntimeError, match="the launch failed"):
        run_steps(optimizer, params, [[torch.ones(4), torch.ones(3)]])
    monkeypatch.setattr(op, optimizer.operator.name, real)
    assert len(calls) == 1
    for p, q in zip(params, expected.param_groups[0]["params"], strict=True):
        assert optimizer.state[p]["step"] == steps_before + 1 and torch.equal(p, q)
    run_steps(optimizer, params, [[torch.ones(4), torch.ones(3)]])
    assert all(optimizer.state[p]["step"] == steps_before + 2 for p in params)


# Where a launch of the backend's own fails midway: the tensors that were reached have taken the
# step, once, and the others are as they were.


class Failing:
    """Stands for what a backend launches, and raises in the place of one of its launches."""

    def __init__(self, real, number: int):
        self.real, self.number, self.launches = real, number, 0

    def launch(self, real, *arguments, **options):
        self.launches += 1
        if self.launches == self.number:
            raise RuntimeError("the launch failed")
        return real(*arguments, **options)

    def __call__(self, *arguments, **options):
        return self.launch(self.real, *arguments, **options)

    # of a Triton kernel
    def __getitem__(self, grid):
        return functools.partial(self.launch, self.real[grid])


def fail_midway(patch, backend, operator) -> tuple[Failing, int, int]:
    """Has a launch of a step over `midway` fail. Returns it, and how many tensors are reached
    before it and by it.
    """
    # tensors follow one another
    if backend == "reference":
        owner, name = reference, f"{operator.name.split('_')[1]}_update_rule"
        number, reached, failed = 2, 1, 1
    elif backend == "triton":
        # a strided tensor has launches of its own: statistics, then update
        owner, name = (
            importlib.import_module("uegr_kernels.selective.triton").launch,
            "update_kernel",
        )
        number, reached, failed = 4, 1, 1
    else:
        # tensors of another dtype are another call
        owner, name = operator, "default"
        number, reached, failed = 2, 2, 1
    failing = Failing(getattr(owner, name), number)
    patch.setattr(owner, name, failing)
    return failing, reached, failed


def midway():
    """Returns parameters and gradients: a dense tensor, a strided one, and one in float64."""
    start = [torch.ones(4), torch.full((5, 3), 2.0).t(), torch.full((3,), 3.0).double()]
    gradients = [torch.linspace(-1, 2, t.numel()).to(t.dtype).view(t.shape) for t in start]
    gradients[1] = gradients[1].t().contiguous().t()
    return as_parameters(start), gradients


def everything_of(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[p.detach().clone(), copy.deepcopy(states_of(optimizer, p))] for p in params]


def without_counts(everything):
    """Returns all but the step counts: Triton has advanced a family's before it updates it."""
    return [
        [p, {key: value for key, value in states.items() if key != "step"}]
        for p, states in everything
    ]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("statistics", ["current", "previous"])
@pytest.mark.parametrize("steps_before", [1, 3])
def test_a_launch_that_fails_midway_is_raised_once_and_the_step_taken_once(
    monkeypatch, backend, cls, statistics, steps_before
):
    options = {**SPREAD, "lr": 0.1, "statistics": statistics, "backend": backend}
    if cls is uk.SelectiveSGD:
        options["momentum"] = 0.5
    (params, gradients), (others, _) = midway(), midway()
    optimizer, expected = cls(params, **options), cls(others, **options)
    for one, group in ((optimizer, params), (expected, others)):
        run_steps(one, group, [gradients] * steps_before)
    before = everything_of(optimizer)
    with monkeypatch.context() as patch:
        failing, reached, failed = fail_midway(patch, backend, optimizer.operator)
        with pytest.raises(RuntimeError, match="the launch failed"):
            run_steps(optimizer, params, [gradients])
    assert failing.launches == failing.number, "nothing is launched after the failure"
    missing = [None] * (len(params) - reached)
    run_steps(expected, others, [[*gradients[:reached], *missing]])
    assert same_bits(everything_of(optimizer)[:reached], everything_of(expected)[:reached])
    rest = everything_of(optimizer)[reached:]
    assert same_bits(without_counts(rest)[:failed], without_counts(before[reached:])[:failed])
    assert same_bits(rest[failed:], before[reached + failed :])
    # and it goes on from there
    run_steps(optimizer, params, [gradients])
    run_steps(expected, others, [gradients])
    assert same_bits(everything_of(optimizer)[:reached], everything_of(expected)[:reached])


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"statistics": "previous"}, {"scope": "global"}], ids=str)
@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_a_cached_steps_calls_in_python_are_as_many_for_many_tensors_as_for_few(
    native, cls, options
):
    package, counts = str(pathlib.Path(uk.__file__).parent), []
    # looked at 256 at a time
    for count in (100, 256, 768):
        params = as_parameters([torch.ones(4)] * count)
        optimizer = cls(params, seed=1, backend=native, **options)
        run_steps(optimizer, params, [[torch.ones(4)] * count] * 3)
        calls = []

        def note(frame, event, _, calls=calls):
            if event == "call" and frame.f_code.co_filename.startswith(package):
                calls.append(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        counts.append(calls)
    assert counts[0] == counts[1] and len(counts[0]) < 75
    assert {*counts[2]} == {*counts[0]} and len(counts[2]) - len(counts[0]) <= 2 * 20


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
    run_steps(optimizer, params, [[torch.ones(4)] * many] * 3)
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


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_options_that_changed_are_checked_again(native):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = uk.SelectiveAdamW([p], betas=[0.9, 0.99], seed=1, backend=native)
    group, before = optimizer.param_groups[0], None
    for _ in range(3):
        optimizer.step()
    for name, wrong, right in [
        ("lr", -1.0, 1e-3),
        ("lr", True, 1e-3),
        ("lr", float("inf"), 1e-3),
        ("eps", -1.0, 1e-8),
        ("threshold", float("nan"), 0.8),
        ("seed", "one", 1),
        ("betas", [0.9, 1.5], (0.9, 0.99)),
    ]:
        group[name], before = wrong, p.detach().clone()
        with pytest.raises((ValueError, TypeError)):
            optimizer.step()
        assert torch.equal(p, before), name
        group[name] = right
        optimizer.step()
        assert not torch.equal(p, before), name
    group["betas"] = [0.9, 0.99]
    for _ in range(2):
        optimizer.step()
    # the same list
    group["betas"][1] = 1.5
    with pytest.raises(ValueError, match="index 1"):
        optimizer.step()
    group["betas"] = (0.9, 0.99)
    optimizer.step()
    optimizer.backend = "cuda"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_without_elements_may_be_listed_twice_among_many(native):
    empty = torch.nn.Parameter(torch.ones(0, 3))
    # one more than the cached step looks at at a time, with as many states as it does
    params = [empty, empty, *(torch.nn.Parameter(torch.ones(4, 3)) for _ in range(511))]
    optimizer = uk.SelectiveAdamW(params, 0.1, seed=1, normalization="constant")
    for _ in range(4):
        before = params[-1].detach().clone()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert (params[-1] != before).any()


def test_a_gradient_freed_after_many_steps_is_refused_and_nothing_changes(native):
    # the address of one without elements is that of freed memory
    params = as_parameters([torch.ones(0, 3), torch.ones(4, 3), torch.ones(5)])
    optimizer = uk.SelectiveAdamW(params, 0.1, seed=1, backend=native)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    before = [p.detach().clone() for p in params]
    storage = params[1].grad.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 1's gradient of shape \(4, 3\) has no mem"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [int(optimizer.state[p]["step"]) for p in params] == [3] * 3
    storage.resize_(size)
    params[1].grad.fill_(1.0)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4] * 3
