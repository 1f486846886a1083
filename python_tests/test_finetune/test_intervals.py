"""Intervals against SciPy's, and figures against known answers."""

import numpy as np
import pytest
from scipy import stats

import uegr_kernels as uk
from uegr_kernels.finetune import measures, report
from uegr_kernels.finetune.intervals import bootstrap, resampled, resampled_scores, wilson


@pytest.mark.parametrize("right,texts", [(0, 10), (3, 10), (10, 10), (87, 100), (1500, 1821)])
def test_wilson(right, texts):
    expected = stats.binomtest(right, texts).proportion_ci(method="wilson")
    found = wilson(right, texts)
    assert found.value == right / texts
    np.testing.assert_allclose(found[1:], (expected.low, expected.high), rtol=1e-9, atol=1e-12)


def test_bootstrap_of_one_seed():
    values = np.random.default_rng(1).normal(size=80)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=2).confidence_interval
    found = bootstrap(lambda x: float(x.mean()), [(values,)])
    np.testing.assert_allclose(found[1:], (expected.low, expected.high), atol=0.03)
    assert found.value == pytest.approx(values.mean())


def test_bootstrap_draws_seeds_too():
    # within a seed nothing varies
    seeds = [(np.full(50, value),) for value in (0.0, 1.0)]
    assert bootstrap(lambda x: float(x.mean()), seeds) == (0.5, 0.0, 1.0)


def test_bootstrap_draws_paired_arrays_together():
    x = np.random.default_rng(0).normal(size=40)
    assert bootstrap(lambda a, b: float((a - b).mean()), [(x, x - 1)]) == pytest.approx((1, 1, 1))


def test_both_ways_to_resample_have_one_distribution():
    draw = np.random.default_rng(0)
    rows = np.stack([draw.choice((-1, 0, 1), 60, p=p) for p in ((0.2, 0.3, 0.5), (0.4, 0.5, 0.1))])
    each = resampled(np.mean, [(row,) for row in rows], 4000), resampled_scores(rows, 4000)
    ends = [np.quantile(means, (0.025, 0.25, 0.5, 0.75, 0.975)) for means in each]
    np.testing.assert_allclose(*ends, atol=0.04)
    assert stats.ks_2samp(*each).statistic < 0.04


def test_figures():
    import torch

    expected = np.array([0, 0, 0, 1, 1, 2.0])
    predicted = np.array([0, 0, 1, 1, 0, 2.0])
    # by hand: F1 of the classes 2/3, 1/2, 1
    assert report.f1(predicted, expected, 3) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # a class that is predicted and does not occur, and one that neither does: 0 for both
    predicted[5] = 3
    assert report.f1(predicted, expected, 5) == pytest.approx((2 / 3 + 1 / 2 + 0 + 0 + 0) / 5)
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 3
    sure = logits.softmax(1).amax(1).double().numpy()
    right = (logits.argmax(1) == labels).double().numpy()
    assert report.calibration(right, sure) == pytest.approx(
        uk.analysis.calibration_error(logits, labels), abs=1e-6
    )
    assert report.auroc(sure[:80], sure[80:]) == pytest.approx(
        uk.analysis.ood_auroc(torch.tensor(sure[:80]), torch.tensor(sure[80:])), abs=1e-9
    )
    u = stats.mannwhitneyu(sure[:80], sure[80:]).statistic
    assert report.auroc(sure[:80], sure[80:]) == pytest.approx(u / (80 * 120))
    x, y = right[:50].tolist(), sure[:50].tolist()
    assert measures.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
