"""AT and FGSM, on words and on images."""

import pytest
import torch
from torch.nn import functional as F

from .steps import (
    UNITS,
    D,
    Images,
    N,
    Steps,
    T,
    assert_same_steps,
    batch,
    build,
    images,
    small,
    unit,
)


@pytest.mark.parametrize("clean_weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    "name, kind", [("at", "l2"), ("at", "token"), ("at", "all"), ("fgsm", "linf")]
)
def test_at(name, kind, clean_weight):
    def restated(model):
        steps = Steps(model, *batch())
        losses = {}
        if clean_weight:
            losses["clean_loss"], g = steps.clean(clean_weight)
            g = g / clean_weight
        else:
            g = steps.input_gradient(torch.zeros(N, T, D, dtype=torch.float64))
        losses["adversarial_loss"] = steps.adversarial(0.7 * UNITS[kind](g))
        return {
            "loss": clean_weight * losses.get("clean_loss", 0) + losses["adversarial_loss"],
            **losses,
        }

    options = {
        "epsilon": 0.7,
        "clean_weight": clean_weight,
        **({"per": kind} if kind in ("token", "all") else {}),
    }
    assert_same_steps(
        small(), lambda model: build(name, model, **options).backward(*batch()), restated
    )


def test_fgsm_perturbs_by_epsilon():
    model = small()
    assert_same_steps(
        model,
        lambda model: build("fgsm", model).backward(*batch()),
        lambda model: build("at", model, epsilon=0.01, norm="linf").backward(*batch()),
    )


def test_at_on_images():
    x, labels = images()

    def restated(model):
        leaf = x.clone().requires_grad_()
        clean = F.cross_entropy(model(leaf), labels)
        clean.backward()
        adversarial = F.cross_entropy(model((x + 2.0 * unit(leaf.grad)).clamp(0, 1)), labels)
        adversarial.backward()
        return {"loss": clean + adversarial, "clean_loss": clean, "adversarial_loss": adversarial}

    torch.manual_seed(3)
    assert_same_steps(
        Images().double(),
        lambda model: build("at", model, epsilon=2.0, input_range=(0.0, 1.0)).backward(x, labels),
        restated,
    )
