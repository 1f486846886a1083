"""Seeds, steps, streams."""

import pytest
import torch
from conftest import compare

import uegr_kernels as uk
from uegr_kernels.selective import reference

from .problems import (
    DTYPES,
    NEUTRAL,
    OPTIMIZERS,
    SPREAD,
    as_parameters,
    dtype_id,
    problem,
    run_steps,
    trained,
)


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
        run_steps(cls(params, **options), params, given)
        for p, q in zip(params, expected, strict=True):
            compare(p, q, "step")


def test_a_mask_may_be_of_step_zero(backend):
    g = torch.linspace(0, 1, 4000)
    masks = [
        uk.selection_mask(g, seed=1, step=0, threshold=0.3, backend=name)
        for name in (backend, "reference")
    ]
    assert torch.equal(*masks) and not masks[0].all()
