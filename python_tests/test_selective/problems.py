"""Problems that the tests of the selective step share, optimizers run over them, comparisons."""

import contextlib

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels.selective import op, reference

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
    """Gives both signs, squares uniform over [0, scale^2], none of them 0."""
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return ((torch.rand(shape, generator=generator) * 0.999 + 0.001).sqrt() * sign * scale).to(
        dtype
    )


def problem(shapes, dtype=torch.float32, steps: int = 3, seed: int = 0, scale: float = 1.0):
    """Gives starting values, and the gradients of every step."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return start, [
        [spread_gradient(shape, generator, dtype, scale) for shape in shapes] for _ in range(steps)
    ]


def as_parameters(tensors) -> list[torch.nn.Parameter]:
    """Gives parameters of the same values and strides."""
    return [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]


def run_steps(optimizer, params, gradients) -> None:
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()


def trained(cls, backend, start, gradients, **options):
    params = as_parameters(start)
    optimizer = cls(params, backend=backend, **options)
    run_steps(optimizer, params, gradients)
    return params, optimizer


def states_of(optimizer, p) -> dict:
    return {
        key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)
    }


def same_bits(a, b) -> bool:
    """Tells whether both are equal as torch.equal, NaN equal to NaN, for tensors or for nests of
    them.
    """
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
    """Gives what the reference decides inside this block: a bool tensor by stream of the elements
    whose u and p are so close, 2^-22 * max(1, sharpness), that a kernel may decide otherwise.

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


def in_dtype(options: dict, dtype) -> dict:
    """Puts tensor options in the arithmetic's dtype: torch computes with them in their own, kernels
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


# s = 1, 4, 9, 25
HAND = torch.tensor([1.0, -2.0, 3.0, 5.0])
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


def transposed(t):
    return t.t().contiguous().t()
