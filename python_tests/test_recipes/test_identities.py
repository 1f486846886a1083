"""Options at which two methods are one (docs/methods.md, "Costs and identities")."""

import pytest
import torch

import uegr_kernels as uk

from .steps import assert_equal, divergence, run, small, state, train


def test_without_a_perturbation():
    """eps = 0 turns AT into 2x CE, R-AT into CE + R-Drop, UEGR into CE + R-Drop with JS."""
    _, plain = run("plain", small(0.0))
    _, at = run("at", small(0.0), epsilon=0.0)
    assert_equal(at, {key: 2 * g for key, g in plain.items()}, rtol=1e-9, atol=1e-12)
    _, r_drop = run("r_drop", small(0.0))
    _, r_at = run("r_at", small(0.0), epsilon=0.0)
    assert_equal(r_at, {key: g + plain[key] for key, g in r_drop.items()}, rtol=1e-9, atol=1e-12)
    _, uegr = run("uegr", small(0.0), epsilon=0.0, seed=0)
    assert_equal(uegr, r_at, rtol=1e-9, atol=1e-12)
    with_dropout, _ = run("uegr", small(0.3), epsilon=0.0, seed=0, js_weight=1.0)
    assert 0 < with_dropout["divergence"] < torch.log(torch.tensor(2.0))


@pytest.mark.parametrize(
    "name, options",
    [
        ("child_tuning_f", {"keep_probability": 1.0}),
        ("child_tuning_d", {"keep_probability": 1.0}),
        ("weight_consolidation", {"kappa": 0.0}),
    ],
)
def test_with_everything_kept_it_is_plain_adamw(name, options):
    results = []
    for each, given in ((name, options), ("plain", {})):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(6)
        train(each, model, optimizer=optimizer, **given)
        results.append(state(model))
    assert_equal(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["r_drop", "r_at", "uegr"])
def test_without_dropout_nothing_diverges(name):
    losses, _ = run(name, small(0.0), **({"seed": 0} if name == "uegr" else {}))
    assert losses["divergence"].abs() < 1e-12


def test_jensen_shannon_is_at_most_half_the_symmetric_divergence():
    logits = 3 * torch.randn(2, 50, 4, dtype=torch.float64)
    assert (uk.pairwise_js(logits, reduction="sum") <= divergence(*logits, "sum") / 2).all()
