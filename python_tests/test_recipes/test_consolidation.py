"""Weight consolidation."""

import math

import pytest
import torch

from .steps import Steps, assert_same_steps, batch, build, sgd, small


@pytest.mark.parametrize("form", ["decoupled", "penalty", "annealed"])
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_weight_consolidation(form, strength):
    make = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6}
    options = {
        "kappa": strength,
        "gamma": strength,
        "k": 0.5,
        "t0": 2,
        "form": form,
        "names": ("lstm.*", "embedding.*"),
    }

    def run(model):
        optimizer = torch.optim.AdamW(model.parameters(), **make)
        recipe = build("weight_consolidation", model, optimizer, **options)
        for step in range(3):
            optimizer.zero_grad()
            losses = recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        return {"clean_loss": losses["clean_loss"]}

    def restated(model):
        chosen = [
            p for name, p in model.named_parameters() if name.startswith(("lstm", "embedding"))
        ]
        origin = [p.detach().clone() for p in chosen]
        optimizer = torch.optim.AdamW(model.parameters(), **make)
        for step in range(1, 4):
            optimizer.zero_grad()
            steps = Steps(model, *batch(step - 1))
            loss = steps.loss(model.classify(steps.embedded()))
            penalty = (
                sum(((p - p0) ** 2).sum() for p, p0 in zip(chosen, origin, strict=True))
                * strength
                / 2
            )
            (loss + (penalty if form == "penalty" else 0)).backward()
            before = [p.detach().clone() for p in chosen]
            if form == "decoupled":
                for p, p0 in zip(chosen, origin, strict=True):
                    p.data -= 0.02 * strength * (p.data - p0)
            optimizer.step()
            if form == "annealed":
                lam = 1 / (1 + math.exp(-0.5 * (step - 2)))
                for p, p0, w in zip(chosen, origin, before, strict=True):
                    moments = optimizer.state[p]
                    m, v = (
                        moments["exp_avg"] / (1 - 0.9**step),
                        moments["exp_avg_sq"] / (1 - 0.999**step),
                    )
                    p.data = (
                        w
                        - 0.02 * lam * m / (v.sqrt() + 1e-6)
                        - 0.02 * (1 - lam) * strength * (w - p0)
                        - 0.02 * 0.1 * w
                    )
        return {"clean_loss": loss}

    # The convolution's bias, ahead of BatchNorm, has a gradient of nothing but rounding, which
    # AdamW magnifies.
    assert_same_steps(small(), run, restated, rtol=1e-7, atol=1e-8)


def test_weight_consolidation_needs_a_small_enough_lr():
    model = small()
    with pytest.raises(RuntimeError, match="needs the optimizer"):
        build("weight_consolidation", model).before_step()
    with pytest.raises(ValueError, match="lr=0.1 times gamma=5000"):
        build("weight_consolidation", model, sgd(model), form="annealed").before_step()
