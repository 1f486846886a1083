"""R-Drop, R-AT and R-AT-SU."""

import pytest
import torch
from torch.nn import functional as F

from .steps import (
    N,
    Small,
    Steps,
    assert_equal,
    assert_same_steps,
    batch,
    build,
    divergence,
    small,
    state,
    unit,
)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["r_drop", "r_at", "r_at_su"])
def test_r_drop_and_r_at(name, reduction):
    def restated(model):
        steps, losses, delta = Steps(model, *batch()), {}, 0
        if name != "r_drop":
            losses["clean_loss"], g = steps.clean()
            delta = 0.5 * unit(g)
        pair = [model.classify(steps.embedded() + delta) for _ in range(2)]
        of_pair = sum(steps.loss(z) for z in pair) / 2
        losses["clean_loss" if name == "r_drop" else "adversarial_loss"] = of_pair
        losses["divergence"] = divergence(*pair, reduction)
        (of_pair + 2.0 * losses["divergence"]).backward()
        return {
            "loss": losses["clean_loss"]
            + losses.get("adversarial_loss", 0)
            + 2.0 * losses["divergence"],
            **losses,
        }

    options = {"alpha": 2.0, "reduction": reduction} | (
        {} if name == "r_drop" else {"epsilon": 0.5}
    )
    options |= {"seed": 0} if name == "r_at_su" else {}
    assert_same_steps(
        small(), lambda model: build(name, model, **options).backward(*batch()), restated
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_divergence_of_regression_and_of_ignored_rows(reduction):
    def restated(model, task, ignored):
        inputs, labels = batch()
        labels = (
            torch.linspace(-1, 1, N, dtype=torch.float64)[:, None]
            if task == "regression"
            else labels
        )
        steps = Steps(model, inputs, labels, task)
        pair = [model.classify(steps.embedded()) for _ in range(2)]
        loss = (
            sum(
                F.mse_loss(z, labels)
                if task == "regression"
                else F.cross_entropy(z, labels, ignore_index=ignored)
                for z in pair
            )
            / 2
        )
        kept = labels.squeeze() != ignored
        between = (
            divergence(*(z[kept] for z in pair), reduction)
            if task != "regression"
            else F.mse_loss(*pair, reduction=reduction)
        )
        (loss + between).backward()
        return {"loss": loss + between, "clean_loss": loss, "divergence": between}

    inputs, labels = batch()
    values = torch.linspace(-1, 1, N, dtype=torch.float64)
    ignored = int(labels[0])
    assert_same_steps(
        small(classes=1),
        lambda model: build("r_drop", model, task="regression", reduction=reduction).backward(
            inputs, values
        ),
        lambda model: restated(model, "regression", -100),
    )
    assert_same_steps(
        small(),
        lambda model: build("r_drop", model, ignore_index=ignored, reduction=reduction).backward(
            inputs, labels
        ),
        lambda model: restated(model, "classification", ignored),
    )


def test_masked_classes_add_nothing_to_the_divergence():
    class Masked(Small):
        def classify(self, x):
            return torch.cat(
                [super().classify(x), torch.full((len(x), 1), -torch.inf, dtype=x.dtype)], 1
            )

    results = []
    for kind in (Small, Masked):
        torch.manual_seed(3)
        model = kind(0.3).double()
        torch.manual_seed(5)
        results.append((build("r_drop", model).backward(*batch()), state(model)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)
