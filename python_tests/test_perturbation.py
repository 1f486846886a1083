"""The perturbations: literals, PyTorch's norms, Philox masks, exact restoring; compilers, bad
input.
"""

import functools
import math
import pathlib
import re
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uegr_kernels.core import philox
from uegr_kernels.perturbation import fgm_perturbation, op, perturbed_weights, pgd_step

OPERATORS = (
    "perturbation.fgm_perturbation_",
    "perturbation.pgd_step_",
    "perturbation.perturb_weights_",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A result is rounded once from (nearly) exact arithmetic; compiled kernels may scale in float32
# first.
RELATIVE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def gradient(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    ).to(dtype)


def mask_of(shape, keep_probability, seed, step=0, stream=0):
    """Gives the mask docs/spec.md promises, by a generator whose known answers test_core.py has."""
    indices = torch.arange(math.prod(shape))
    return (
        philox.uniform(philox.words(indices, seed=seed, step=step, stream=stream), torch.float64)
        < keep_probability
    ).view(shape)


def test_literals(backend):
    g = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    assert fgm_perturbation(g, 10.0, backend=backend).tolist() == [
        [6.0, 8.0],
        [0.0, -10.0],
        [0.0, 0.0],
    ]
    assert fgm_perturbation(g, 0.5, norm="linf", backend=backend).tolist() == [
        [0.5, 0.5],
        [0.0, -0.5],
        [0.0, 0.0],
    ]
    # 6/5 of (3, 4)/5 has length 1.2, the ball 1: (0.6, 0.8).
    stepped = pgd_step(
        torch.zeros(1, 2, dtype=torch.float64),
        g[:1].double(),
        step_size=1.2,
        radius=1.0,
        backend=backend,
    )
    torch.testing.assert_close(stepped, torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    stepped = pgd_step(
        torch.tensor([[0.25, 0.75]]), g[:1], step_size=0.5, radius=1.0, norm="linf", backend=backend
    )
    assert stepped.tolist() == [[0.75, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("per", "axes"), [("sample", (1, 2)), ("token", (2,)), ("all", (0, 1, 2))])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fgm_has_its_norm_and_direction(backend, dtype, per, axes, norm):
    g = gradient(3, 5, 7, dtype=dtype)
    delta = fgm_perturbation(g, 0.3, norm=norm, per=per, backend=backend)
    assert delta.dtype == dtype and delta.is_contiguous() and not delta.requires_grad
    if norm == "linf":
        assert torch.equal(delta, torch.full_like(g, 0.3).copysign(g))
        return
    wide = g.double()
    expected = (
        torch.nn.functional.normalize(wide.reshape(-1, math.prod(g.shape[a] for a in axes))).view(
            g.shape
        )
        * 0.3
    )
    torch.testing.assert_close(
        delta.double(),
        expected,
        rtol=RELATIVE[dtype],
        atol=1e-12 if dtype == torch.float64 else 1e-7,
    )


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e20, 1e37])
def test_no_gradient_is_too_small_or_too_large(backend, scale):
    g = torch.full((2, 4), scale)
    torch.testing.assert_close(
        fgm_perturbation(g, 1.0, backend=backend), torch.full((2, 4), 0.5), rtol=1e-5, atol=0
    )
    # its norm overflows float16
    half = torch.full((1, 40000), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(
        fgm_perturbation(half, 2.0, backend=backend), torch.full_like(half, 0.01)
    )


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_norm_that_is_not_finite_gives_zero_for_its_group(backend, bad, norm):
    g = gradient(3, 4, 5)
    good = {
        per: fgm_perturbation(g, 0.3, norm=norm, per=per, backend=backend)
        for per in ("sample", "token")
    }
    g[1, 2, 3] = bad
    by_sample = fgm_perturbation(g, 0.3, norm=norm, backend=backend)
    assert by_sample[1].count_nonzero() == 0 and torch.equal(by_sample[::2], good["sample"][::2])
    by_token = fgm_perturbation(g, 0.3, norm=norm, per="token", backend=backend)
    assert by_token[1, 2].count_nonzero() == 0 and torch.equal(
        by_token[1, :2], good["token"][1, :2]
    )
    assert fgm_perturbation(g, 0.3, norm=norm, per="all", backend=backend).count_nonzero() == 0
    delta = gradient(3, 4, 5, seed=1)
    assert torch.equal(
        pgd_step(delta, g, step_size=1.0, radius=1e3, norm=norm, backend=backend)[1], delta[1]
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mask_comes_before_the_norm(backend, dtype):
    g, mask = gradient(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    # padding may hold anything
    g[0, 3] = torch.nan
    shown = (mask * 2).to(dtype)
    expected = fgm_perturbation(g.nan_to_num() * mask[..., None], 0.5, backend=backend)
    assert torch.equal(fgm_perturbation(g, 0.5, mask=shown, backend=backend), expected)
    delta = gradient(2, 4, 3, seed=1)
    stepped = pgd_step(delta, g, step_size=0.5, radius=100.0, mask=shown, backend=backend)
    assert torch.equal(stepped[mask == 0], delta[mask == 0])
    torch.testing.assert_close(stepped - delta, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_probability", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    ("seed", "step"), [(1, 0), (-5, 3), (2**64 - 5, 3), (12345678901234567890, 2**31)]
)
def test_random_mask_is_the_packages_philox(backend, keep_probability, seed, step):
    g = gradient(3, 5, 7)
    whole = fgm_perturbation(g, 0.5, backend=backend)
    part = fgm_perturbation(
        g, 0.5, keep_probability=keep_probability, seed=seed, step=step, backend=backend
    )
    # after the norm, not rescaled
    assert torch.equal(part, whole * mask_of(g.shape, keep_probability, seed, step))


def test_random_mask_literal(backend):
    # Philox4x32-10 of key (0, 0), counter (0, 0, 0, 0): Random123's known answer 6627e8d5 e169c58d
    # bc57ac4c 9b00dbd8.
    # 0.399, 0.881, 0.736, 0.605
    u = [0x6627E8 * 2.0**-24, 0xE169C5 * 2.0**-24, 0xBC57AC * 2.0**-24, 0x9B00DB * 2.0**-24]
    for p in (0.39, 0.4, 0.7, u[2], math.nextafter(u[2], 1), 0.9):
        kept = fgm_perturbation(torch.ones(1, 4), 2.0, keep_probability=p, seed=0, backend=backend)
        assert kept.tolist() == [[float(x < p) for x in u]]


def test_a_seed_is_drawn_only_for_a_mask(backend):
    g = gradient(3, 5, 7)
    state = torch.get_rng_state()
    for options in (
        {},
        {"keep_probability": 1},
        {"keep_probability": 1.0},
        {"keep_probability": 0.5, "seed": 3},
    ):
        fgm_perturbation(g, 0.5, backend=backend, **options)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (
        fgm_perturbation(g, 0.5, keep_probability=0.5, backend=backend) for _ in range(2)
    )
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(fgm_perturbation(g, 0.5, keep_probability=0.5, backend=backend), first)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    per=st.sampled_from(["sample", "token", "all"]),
    norm=st.sampled_from(["l2", "linf"]),
    layout=st.sampled_from(["dense", "permuted", "sliced", "expanded"]),
)
def test_any_shape_and_strides(shape, per, norm, layout):
    dense = gradient(*shape)
    g = {
        "dense": lambda: dense,
        "permuted": lambda: (
            dense.permute(*range(dense.dim())[::-1]).contiguous().permute(*range(dense.dim())[::-1])
        ),
        "sliced": lambda: torch.stack((dense, dense), -1)[..., 1],
        "expanded": lambda: dense[:1].expand(shape),
    }[layout]()
    delta = fgm_perturbation(g, 0.5, norm=norm, per=per, keep_probability=0.5, seed=7)
    assert delta.shape == g.shape and delta.is_contiguous()
    assert torch.equal(
        delta,
        fgm_perturbation(g.contiguous(), 0.5, norm=norm, per=per, keep_probability=0.5, seed=7),
    )
    stepped = pgd_step(g, g, step_size=2.0, radius=0.5, norm=norm, per=per)
    assert stepped.shape == g.shape
    if norm == "l2":
        assert per != "all" or stepped.norm() <= 0.5 * (1 + 1e-6)
    else:
        assert (stepped.abs() <= 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("per", "axes"), [("sample", (1, 2)), ("token", (2,)), ("all", (0, 1, 2))])
def test_pgd_stays_in_the_ball_and_moves_inside_it(backend, dtype, per, axes):
    delta, g = gradient(3, 5, 7, dtype=dtype, seed=1), gradient(3, 5, 7, dtype=dtype)
    free = pgd_step(delta, g, step_size=0.5, radius=1e4, per=per, backend=backend)
    expected = delta.double() + fgm_perturbation(g.double(), 0.5, per=per, backend=backend)
    torch.testing.assert_close(free.double(), expected, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])
    bound = pgd_step(delta, g, step_size=0.5, radius=0.25, per=per, backend=backend)
    lengths = torch.linalg.vector_norm(bound.double(), dim=axes)
    torch.testing.assert_close(
        lengths, torch.full_like(lengths, 0.25), rtol=max(RELATIVE[dtype], 1e-6), atol=0
    )
    torch.testing.assert_close(
        torch.linalg.vector_norm(expected, dim=axes, keepdim=True) * bound,
        expected * 0.25,
        rtol=2 * RELATIVE[dtype],
        atol=1e-2 * RELATIVE[dtype] + 1e-7,
        check_dtype=False,
    )


@pytest.mark.parametrize(("per", "axes"), [("sample", (1, 2)), ("token", (2,)), ("all", (0, 1, 2))])
def test_pgd_steps_by_the_gradient_over_its_largest_element(per, axes):
    delta, g = gradient(3, 5, 7, seed=1) / 10, gradient(3, 5, 7)
    g[1] = 0.0 if per != "all" else g[1]
    mask = torch.arange(5).expand(3, 5) < 4
    masked = torch.where(mask[..., None], g, 0)
    largest = masked.abs().amax(axes, keepdim=True)
    expected = (delta + 0.2 * torch.where(largest > 0, masked / largest, 0)).clamp(-0.25, 0.25)
    options = {"step_size": 0.2, "radius": 0.25, "norm": "max", "per": per}
    torch.testing.assert_close(pgd_step(delta, g, mask=mask, **options), expected)
    with pytest.raises(RuntimeError, match="backend='cpp' cannot serve pgd_step with norm='max'"):
        pgd_step(delta, g, backend="cpp", **options)
    with pytest.raises(ValueError, match="norm='max' is not one of its values"):
        fgm_perturbation(g, 0.1, norm="max")


def parameters(dtype=torch.float32):
    torch.manual_seed(3)
    params = [
        torch.nn.Parameter(torch.randn(shape, dtype=dtype))
        for shape in ((4, 5), (5,), (), (3, 2), (0, 3))
    ]
    for i, param in enumerate(params):
        # params[1] has no gradient
        if i != 1:
            param.grad = gradient(*param.shape, dtype=dtype, seed=i)
    return params


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per", ["tensor", "all"])
def test_weights_move_along_their_gradient_and_come_back(backend, dtype, per):
    params = parameters(dtype)
    with torch.no_grad():
        params[0][0, 0], params[0][0, 1] = torch.nan, -0.0
    before, versions = [p.detach().clone() for p in params], [p._version for p in params]
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in params]
    if per == "all":
        units = torch.nn.functional.normalize(torch.cat(grads), dim=0).split(
            [len(g) for g in grads]
        )
    else:
        units = [torch.nn.functional.normalize(g, dim=0) for g in grads]
    with perturbed_weights(params, 0.3, per=per, backend=backend) as nothing:
        assert nothing is None
        for p, unit, old in zip(params, units, before, strict=True):
            expected = torch.add(old.double(), unit.view(p.shape), alpha=0.3)
            torch.testing.assert_close(
                p.detach().double(),
                expected,
                rtol=RELATIVE[dtype],
                atol=RELATIVE[dtype],
                equal_nan=True,
            )
        inside = [p._version for p in params]
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        bits = (
            (p.detach().contiguous().view(torch.uint8), old.view(torch.uint8))
            if p.dim()
            else (p.detach(), old)
        )
        assert torch.equal(*bits)
        assert (p._version > inside[i] > versions[i]) if i != 1 else (p._version == versions[i])


def test_weights_come_back_after_an_exception(backend):
    params = parameters()
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyboardInterrupt), perturbed_weights(params, 0.3, backend=backend):
        assert not torch.equal(params[0], before[0])
        with torch.no_grad():
            # a step inside is undone too
            params[0].zero_()
        raise KeyboardInterrupt
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_weights_gradients_given(backend):
    params, before = parameters(), [p.detach().clone() for p in parameters()]
    with perturbed_weights(
        params, 1.0, gradients=[None, torch.ones(5), None, None, None], backend=backend
    ):
        torch.testing.assert_close(params[1].detach(), before[1] + 5**-0.5)
        assert torch.equal(params[0], before[0])
    with (
        perturbed_weights([], 1.0, backend=backend),
        perturbed_weights([torch.zeros(3)], 1.0, backend=backend),
    ):
        # nothing to move
        pass


def test_weights_mask_has_the_parameters_position_as_stream(backend):
    params, before = parameters(), [p.detach().clone() for p in parameters()]
    state = torch.get_rng_state()
    with perturbed_weights(params, 0.5, backend=backend):
        whole = [p.detach().clone() for p in params]
    with perturbed_weights(params, 0.5, keep_probability=0.5, seed=11, step=2, backend=backend):
        for i, p in enumerate(params):
            if i != 1:
                assert torch.equal(
                    p, torch.where(mask_of(p.shape, 0.5, 11, 2, stream=i), whole[i], before[i])
                )
    assert torch.equal(torch.get_rng_state(), state)
    with perturbed_weights(params, 0.5, keep_probability=0.5, backend=backend):
        assert not torch.equal(torch.get_rng_state(), state)


def test_autocast_sees_the_weights_inside_and_outside(backend):
    """Its casts of weights are kept until the region ends."""
    layer = torch.nn.Linear(3, 2)
    x = torch.ones(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x).detach()
        with perturbed_weights([layer.weight], 2.0, gradients=[torch.ones(2, 3)], backend=backend):
            inside = layer(x).detach()
        after = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        with perturbed_weights([layer.weight], 2.0, gradients=[torch.ones(2, 3)], backend=backend):
            expected = layer(x).detach()
    assert (
        torch.equal(before, after)
        and torch.equal(inside, expected)
        and not torch.equal(inside, before)
    )


def test_weights_backward_inside(backend):
    layer, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    layer(x).square().sum().backward()
    reference = torch.func.functional_call
    moved = {n: (p + 0.1 * p.grad / p.grad.norm()).detach() for n, p in layer.named_parameters()}
    inputs = x.clone().requires_grad_()
    with perturbed_weights(layer.parameters(), 0.1, backend=backend):
        got = torch.autograd.grad(layer(inputs).square().sum(), inputs)[0]
        stale = layer(inputs).square().sum()
    torch.testing.assert_close(
        got, torch.autograd.grad(reference(layer, moved, inputs).square().sum(), inputs)[0]
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# Shapes: whole blocks, ends of blocks, groups of several pieces (16,384 elements each); the last
# one has too few groups for threads. Triton's are smaller: its interpreter takes the time of the
# programs, one for each group that is not longer than 4,096.
SHAPES = {
    "cpp": [(), (0,), (1,), (1023,), (2, 0, 3), (3, 1025), (3, 4, 256), (4, 130, 129), (1, 40_001)],
    "triton": [(), (0,), (33,), (2, 0, 3), (2, 3, 64), (2, 3, 1367), (1, 17_001)],
}


def laid_out(x, layout):
    if layout == "sliced":
        return torch.stack((x, x), -1)[..., 1]
    return (
        x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "transposed" and x.dim()
        else x.contiguous()
    )


def alone_and_apart(backend, run):
    """run() with one thread, two and four: equal, bit for bit. The interpreter has one."""
    results = []
    for threads in (1, 2, 4)[: 3 if backend == "cpp" else 1]:
        torch.set_num_threads(threads)
        results.append(run())
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "sliced", "transposed"])
def test_native_agrees_with_the_reference_from_any_number_of_threads(native, dtype, layout):
    tolerance = {"rtol": 2 * RELATIVE[dtype], "atol": 1e-15 if dtype == torch.float64 else 1e-7}
    # Triton gets dense copies
    for shape in SHAPES[native] if native == "cpp" or layout == "dense" else SHAPES[native][4:5]:
        g, delta = (laid_out(gradient(*shape, dtype=dtype, seed=seed), layout) for seed in (0, 1))
        mask = (torch.rand(shape[:2]) < 0.7).to(torch.int32) if len(shape) > 1 else None
        for norm in ("l2", "linf"):
            for per in ("sample", "token", "all"):
                options = {"norm": norm, "per": per, "mask": mask}
                drawn = options | {"keep_probability": 0.6, "seed": 5, "step": 2**32 - 1}

                def run(backend, g=g, delta=delta, options=options, drawn=drawn):
                    stepped = pgd_step(
                        delta, g, step_size=0.3, radius=2.0, backend=backend, **options
                    )
                    plain = fgm_perturbation(
                        g, 0.3, norm=options["norm"], per=options["per"], backend=backend
                    )
                    return fgm_perturbation(g, 0.3, backend=backend, **drawn), stepped, plain

                found, expected = (
                    alone_and_apart(native, lambda run=run: run(native)),
                    run("reference"),
                )
                assert torch.equal(found[0] == 0, expected[0] == 0)
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("together", [False, True], ids=["tensor", "all"])
def test_native_weights_agree_with_the_reference_from_any_number_of_threads(native, together):
    shapes = [(300, 70), (0,), (), (1025,), (40_000,), (7, 900)]
    dtypes = (*DTYPES, torch.float32, torch.bfloat16)

    def run(backend):
        params = [
            laid_out(gradient(*s, dtype=d, seed=1), "transposed")
            for s, d in zip(shapes, dtypes, strict=True)
        ]
        # the same memory twice
        params.append(params[3])
        grads = [gradient(*p.shape, dtype=p.dtype, seed=i) for i, p in enumerate(params)]
        with perturbed_weights(
            params,
            0.3,
            gradients=grads,
            per="all" if together else "tensor",
            keep_probability=0.5,
            seed=9,
            backend=backend,
        ):
            return [p.clone() for p in params]

    for a, b in zip(alone_and_apart(native, lambda: run(native)), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * RELATIVE[b.dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("step_size", [1e-35, 0.5, 1e31, 1e38])
def test_steps_of_16_bits_agree_at_the_borders_of_a_float(native, dtype, norm, step_size):
    largest = torch.finfo(dtype).max
    delta = torch.tensor([0.0, 1.0, largest, -largest], dtype=dtype).repeat_interleave(3)
    g = torch.tensor([1.0, -1.0, torch.finfo(dtype).tiny], dtype=dtype).repeat(4)
    # a whole block, and samples of their own
    for shape in ((12, 256), (12, 1)):
        x, along = (tensor[:, None].expand(shape).contiguous() for tensor in (delta, g))
        for radius in (1e-35, 1.0, 1e31, 1e38):
            found, expected = (
                pgd_step(x, along, step_size=step_size, radius=radius, norm=norm, backend=backend)
                for backend in (native, "reference")
            )
            torch.testing.assert_close(found, expected, rtol=2 * RELATIVE[dtype], atol=0)


@pytest.mark.parametrize("native", ["cpp"], indirect=True)
def test_large_results_lie_in_large_pages_where_the_host_leaves_them(native, monkeypatch):
    policy = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not policy.exists() or "[madvise]" not in policy.read_text():
        pytest.skip("large pages are not for who asks for them here")
    # what is written already has its pages
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    balloons = pathlib.Path("/sys/bus/virtio/drivers/virtio_balloon").glob("*/features")
    handed_back = any(features.read_text()[5] == "1" for features in balloons)
    delta = fgm_perturbation(torch.ones(16, 1 << 20), 1.0, backend=native)
    large = 0
    for mapping in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", pathlib.Path("/proc/self/smaps").read_text(), flags=re.M
    )[1:]:
        first, last = (int(x, 16) for x in mapping.split(maxsplit=1)[0].split("-"))
        if first < delta.data_ptr() + delta.nbytes and delta.data_ptr() < last:
            large += int(re.search(r"^AnonHugePages: +(\d+) kB", mapping, re.M)[1])
    assert large == 0 if handed_back else large > delta.nbytes >> 11


@pytest.fixture
def bindings():
    return pytest.importorskip(
        "uegr_kernels._bindings",
        reason="uegr_kernels._bindings is not built; run `python setup.py build_ext --inplace`",
    )


def test_numbers_that_two_languages_spell_are_the_same(bindings):
    assert {name: i for i, name in enumerate(op.NORMS)} == bindings.NORMS
    assert {name: i for i, name in enumerate(op.PERS)} == bindings.PERS


def test_compiled_factors(bindings):
    squares, norms = [0.0, 25.0, math.inf, math.nan, 1e-300], bindings.NORMS
    assert bindings.direction_factor(squares, 10.0, norms["l2"]).tolist() == [
        0.0,
        2.0,
        0.0,
        0.0,
        pytest.approx(1e151),
    ]
    assert bindings.direction_factor(squares, 10.0, norms["linf"]).tolist() == [
        0.0,
        10.0,
        0.0,
        0.0,
        10.0,
    ]
    assert bindings.ball_factor(squares, 2.5).tolist() == [1.0, 0.5, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "p", [-1.0, 0.0, 2.0**-25, 2.0**-24, 0.3, 0.5, 1 - 2.0**-25, 1.0, 2.0, math.nan]
)
def test_compiled_comparison_of_u_is_exact(bindings, p):
    words = torch.tensor(
        [
            0,
            255,
            256,
            511,
            512,
            *((int(0.3 * 2**24) + i) * 256 for i in range(-2, 3)),
            2**31 - 1,
            2**31,
            2**32 - 257,
            2**32 - 1,
        ]
    )
    expected = ~(philox.uniform(words, torch.float64) >= p)
    assert bindings.uniform_below(words.numpy().astype("uint32"), p).tolist() == expected.tolist()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(backend, compiler):
    def run(g, mask):
        delta = fgm_perturbation(
            g * 2, 0.5, mask=mask, keep_probability=0.5, seed=5, backend=backend
        )
        return (
            pgd_step(delta, g, step_size=0.1, radius=0.4, norm="linf", per="token", backend=backend)
            + 1
        )

    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=True)
    for n in (3, 4):
        g, mask = gradient(n, 5, 7), torch.ones(n, 5)
        torch.testing.assert_close(compiled(g, mask), run(g, mask))


def test_compiled_draws_a_key(backend):
    compiled = torch.compile(
        lambda g: fgm_perturbation(g, 0.5, keep_probability=0.5, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    g = gradient(3, 5, 7)
    assert not torch.equal(compiled(g), compiled(g))
    torch.manual_seed(1)
    first = compiled(g)
    torch.manual_seed(1)
    assert torch.equal(compiled(g), first) and 0 < (first == 0).sum() < first.numel()


@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize("per", [0, 1, 2])
def test_opcheck(norm, per):
    operators, g, mask, seed = (
        torch.ops.uegr_kernels,
        gradient(5, 4, 3).permute(2, 1, 0),
        torch.ones(3, 4),
        torch.tensor(5),
    )
    options = {"norm": norm, "per": per}
    fgm = options | {"epsilon": 0.5, "keep_probability": 0.5, "step": 1}
    torch.library.opcheck(
        operators.fgm_perturbation_.default, (g, mask, seed, torch.zeros_like(g)), fgm
    )
    pgd = options | {"step_size": 0.5, "radius": 1.0}
    torch.library.opcheck(operators.pgd_step_.default, (g, g, None, torch.zeros_like(g)), pgd)
    weights = {
        "streams": [0, 3],
        "epsilon": 0.5,
        "together": per == 2,
        "keep_probability": 0.5,
        "step": 1,
    }
    torch.library.opcheck(
        operators.perturb_weights_.default,
        ([g.clone(), torch.zeros(3)], [g, torch.ones(3)], seed),
        weights,
    )


def entered(param, grad, backend):
    with perturbed_weights([param], 0.5, gradients=[grad], backend=backend):
        return param * 1


CONSTANTS = {
    "fgm_perturbation": lambda x, backend: fgm_perturbation(x, 0.5, backend=backend),
    "pgd_step": lambda x, backend: pgd_step(
        torch.zeros(2, 3, 4), x, step_size=1.0, radius=1.0, backend=backend
    ),
    "perturbed_weights": lambda x, backend: entered(torch.ones(2, 3, 4), x, backend),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_derivatives_of_constants_are_refused(backend, name):
    def run(x):
        return CONSTANTS[name](x, backend)

    g, tangent = gradient(2, 3, 4), torch.ones(2, 3, 4)
    with pytest.raises(
        RuntimeError, match=f"{name} of uegr_kernels does not run under torch.func.vmap"
    ):
        torch.func.vmap(run)(g[None])
    for forward in (
        lambda: torch.func.jvp(run, (g,), (tangent,)),
        lambda: torch.func.jacfwd(run)(g),
        lambda: torch.func.linearize(run, g),
    ):
        with pytest.raises(
            RuntimeError,
            match=rf"{name} of uegr_kernels has no forward-mode "
            r"derivative .*grad\.detach\(\)",
        ):
            forward()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"{name} of uegr_kernels has no forward-mode"),
    ):
        run(torch.autograd.forward_ad.make_dual(g, tangent))
    for backward in (
        lambda: torch.func.grad(lambda x: run(x).sum())(g),
        lambda: torch.func.vjp(run, g),
    ):
        with pytest.raises(
            RuntimeError,
            match=rf"{name} of uegr_kernels has no derivative: "
            r".*grad\.detach\(\)",
        ):
            backward()
    expected = torch.func.grad(lambda x: (x * run(g)).sum())(g)
    torch.testing.assert_close(torch.func.grad(lambda x: (x * run(x.detach())).sum())(g), expected)
    torch.testing.assert_close(
        torch.func.jvp(lambda x: (x * run(x.detach())).sum(), (g,), (tangent,))[1], expected.sum()
    )


# NumPy warns where a comparison overflows its narrow types
@pytest.mark.filterwarnings("error")
def test_numpys_numbers_are_taken(backend):
    g = gradient(2, 3, 4)
    plain = {"epsilon": 0.5, "keep_probability": 0.25, "seed": 3, "step": 2}
    numpys = dict(
        zip(plain, (np.float32(0.5), np.float16(0.25), np.uint64(3), np.int32(2)), strict=True)
    )
    expected = fgm_perturbation(g, **plain, backend=backend)
    for name, value in numpys.items():
        assert torch.equal(fgm_perturbation(g, **plain | {name: value}, backend=backend), expected)
    moved = pgd_step(g, g, step_size=np.float32(0.5), radius=np.int64(1), backend=backend)
    assert torch.equal(moved, pgd_step(g, g, step_size=0.5, radius=1, backend=backend))
    found = []
    for options in (plain, numpys):
        with perturbed_weights(
            [weight := gradient(5)], gradients=[gradient(5)], **options, backend=backend
        ):
            found.append(weight.clone())
    assert torch.equal(*found)


# One piece of a GPU's kernels, and several.
@pytest.mark.parametrize("n", [64, 20_000])
@pytest.mark.parametrize("chosen", [(0, 0), (0, 1), (0, 1, 0)], ids=str)
def test_gradients_that_are_weights_are_those_on_entering(backend, n, chosen):
    w = gradient(n) / n**0.5
    both = [w, 2 * w]
    moved = {}
    for i in chosen:
        moved[i] = moved.get(i, both[i]) + 0.5 * w / w.norm()
    params = [both[i] for i in chosen]
    with perturbed_weights(params, 0.5, gradients=[w] * len(params), backend=backend):
        for i, expected in moved.items():
            torch.testing.assert_close(both[i], expected)


G = torch.zeros(2, 4, 3)
P = torch.zeros(3, requires_grad=True)


def enter(*arguments, **options):
    with perturbed_weights(*arguments, **options):
        raise AssertionError("entered")


WRONG_CALLS = {
    "out shape": (
        lambda o: o.fgm_perturbation_(G, None, None, G[1:].clone(), **FGM),
        "grad and out must have the same shape",
    ),
    "out expanded": (
        lambda o: o.fgm_perturbation_(G, None, None, G[:1].expand(2, 4, 3), **FGM),
        "out is expanded",
    ),
    "mask": (
        lambda o: o.fgm_perturbation_(G, torch.ones(4), None, G.clone(), **FGM),
        "mask must have the gradient's first axes",
    ),
    "seed": (
        lambda o: o.fgm_perturbation_(G, None, torch.ones(()), G.clone(), **FGM),
        "seed must be an int64",
    ),
    "norm": (
        lambda o: o.fgm_perturbation_(G, None, None, G.clone(), **FGM | {"norm": 2}),
        "norm is 2",
    ),
    "per": (
        lambda o: o.fgm_perturbation_(G, None, None, G.clone(), **FGM | {"per": -1}),
        "per is -1",
    ),
    "bool": (lambda o: o.fgm_perturbation_(G.bool(), None, None, G.clone(), **FGM), "grad is bool"),
    "delta": (
        lambda o: o.pgd_step_(G[0], G, None, G.clone(), step_size=1.0, radius=1.0, norm=0, per=0),
        "grad and delta must have",
    ),
    "streams": (
        lambda o: o.perturb_weights_([G.clone()], [G], None, streams=[], **WEIGHTS),
        "must be of one length",
    ),
    "weights": (
        lambda o: o.perturb_weights_([G + 1, G[0] + 1], [G, G], None, streams=[0, 1], **WEIGHTS),
        "grads and params must have",
    ),
}
FGM = {"epsilon": 1.0, "norm": 0, "per": 0, "keep_probability": 1.0, "step": 0}
WEIGHTS = {"epsilon": 1.0, "together": False, "keep_probability": 1.0, "step": 0}


def by_schema(operator, native):
    """Gives a backend's function by the schema's arguments, in which words are numbers."""
    if native == "cpp":
        return operator.default
    return functools.partial(operator.by_schema, operator.kernel(native))


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_native_operators_check_their_arguments(native, case):
    call, message = WRONG_CALLS[case]
    operators = (op.fgm_perturbation_, op.pgd_step_, op.perturb_weights_)
    with pytest.raises(RuntimeError, match=message):
        call(types.SimpleNamespace(**{each.name: by_schema(each, native) for each in operators}))


BAD_INPUT = {
    "no tensor": (lambda: fgm_perturbation([1.0], 0.1), TypeError, "grad is a list"),
    "integers": (lambda: fgm_perturbation(G.long(), 0.1), TypeError, "grad is torch.int64"),
    "complex": (
        lambda: fgm_perturbation(G.to(torch.complex64), 0.1),
        TypeError,
        "grad is torch.complex64",
    ),
    "sparse": (lambda: fgm_perturbation(G.to_sparse(), 0.1), TypeError, "grad is sparse"),
    "negative": (lambda: fgm_perturbation(G, -0.1), ValueError, "epsilon=-0.1 is out of range"),
    "nan": (lambda: fgm_perturbation(G, math.nan), ValueError, "epsilon=nan is out of range"),
    "text": (lambda: fgm_perturbation(G, "0.1"), TypeError, "epsilon='0.1' is a str"),
    "norm": (
        lambda: fgm_perturbation(G, 0.1, norm="l1"),
        ValueError,
        "norm='l1' is not one of its values; use 'l2', 'linf'",
    ),
    "per": (
        lambda: fgm_perturbation(G, 0.1, per="batch"),
        ValueError,
        "per='batch' is not one of its values",
    ),
    "mask shape": (
        lambda: fgm_perturbation(G, 0.1, mask=torch.ones(2, 3)),
        ValueError,
        r"mask has shape \(2, 3\) and grad \(2, 4, 3\)",
    ),
    "mask axes": (
        lambda: fgm_perturbation(G, 0.1, mask=torch.ones(2)),
        ValueError,
        r"mask has shape \(2,\)",
    ),
    "mask type": (lambda: fgm_perturbation(G, 0.1, mask=[1]), TypeError, "mask is a list"),
    "mask elsewhere": (
        lambda: fgm_perturbation(G, 0.1, mask=torch.ones(2, 4, device="meta")),
        ValueError,
        "mask is on meta",
    ),
    "probability": (
        lambda: fgm_perturbation(G, 0.1, keep_probability=1.5),
        ValueError,
        "keep_probability=1.5 is out of range",
    ),
    "seed": (
        lambda: fgm_perturbation(G, 0.1, keep_probability=0.5, seed=0.5),
        TypeError,
        "seed=0.5 is a float",
    ),
    "step": (lambda: fgm_perturbation(G, 0.1, step=-1), ValueError, "step=-1 is out of range"),
    "backend": (
        lambda: fgm_perturbation(G, 0.1, backend="rocm"),
        ValueError,
        "backend='rocm' is not a backend",
    ),
    "absent backend": (
        lambda: fgm_perturbation(G, 0.1, backend="cuda"),
        RuntimeError,
        "backend='cuda' cannot serve perturbation.fgm",
    ),
    "shapes": (
        lambda: pgd_step(G, G[:1], step_size=1, radius=1),
        ValueError,
        r"grad has shape \(1, 4, 3\) and delta \(2, 4, 3\)",
    ),
    "dtypes": (
        lambda: pgd_step(G, G.double(), step_size=1, radius=1),
        TypeError,
        "grad is torch.float64 and delta torch.float32",
    ),
    "radius": (
        lambda: pgd_step(G, G, step_size=1, radius=-1),
        ValueError,
        "radius=-1 is out of range",
    ),
    "one tensor": (lambda: perturbed_weights(P, 0.1), TypeError, "params is a tensor"),
    "weights per": (
        lambda: perturbed_weights([P], 0.1, per="sample"),
        ValueError,
        "per='sample' is not one of its values; use 'tensor'",
    ),
    "too few": (
        lambda: perturbed_weights([P], 0.1, gradients=[]),
        ValueError,
        "gradients hold 0 entries for 1 params",
    ),
    "weights shape": (
        lambda: enter([P], 0.1, gradients=[G]),
        ValueError,
        r"gradients\[0\] has shape \(2, 4, 3\) and params\[0\] \(3,\)",
    ),
    "weights sparse": (
        lambda: enter([P], 0.1, gradients=[P.detach().to_sparse()]),
        TypeError,
        r"gradients\[0\] is sparse",
    ),
    "weights epsilon": (
        lambda: perturbed_weights([P], -1),
        ValueError,
        "epsilon=-1 is out of range",
    ),
    "weights probability": (
        lambda: perturbed_weights([P], 1, keep_probability=None),
        TypeError,
        "keep_probability=None is a NoneType",
    ),
    "weights backend": (
        lambda: enter([P], 1, gradients=[P.detach()], backend="cuda"),
        RuntimeError,
        "backend='cuda' cannot serve",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()
