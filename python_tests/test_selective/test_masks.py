"""Statistics of masks."""

import numpy as np
import pytest
import torch

import uegr_kernels as uk

from .problems import probability, spread_gradient


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
