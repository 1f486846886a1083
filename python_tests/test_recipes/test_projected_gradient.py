"""PGD-K and AdvEmbed."""

import pytest
import torch

from .steps import (
    UNITS,
    D,
    N,
    Small,
    Steps,
    T,
    assert_same_steps,
    ball,
    batch,
    build,
    draw_of,
    per_token,
    small,
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 0.5, "steps": 2, "step_size": 0.4},
        {"norm": "linf", "step_size": 0.04},
        {"clean_weight": 0.0},
        {"clean_weight": 0.5, "same_draw": True},
        {"first_step_from_clean": True},
    ],
    ids=str,
)
def test_pgd(options):
    def restated(model):
        given = {
            "epsilon": 0.1,
            "steps": 3,
            "norm": "l2",
            "clean_weight": 1.0,
            "same_draw": False,
        } | options
        steps, losses, drawn = Steps(model, *batch()), {}, []
        delta = torch.zeros(N, T, D, dtype=torch.float64)
        if given["clean_weight"]:
            with draw_of(drawn, given["same_draw"]):
                losses["clean_loss"], g = steps.clean(given["clean_weight"])
        for step in range(given["steps"]):
            if step or not options.get("first_step_from_clean"):
                with draw_of(drawn, given["same_draw"]):
                    g = steps.input_gradient(delta)
            size = options.get("step_size", 2.5 * given["epsilon"] / given["steps"])
            delta = ball(delta + size * UNITS[given["norm"]](g), given["epsilon"], given["norm"])
        with draw_of(drawn, given["same_draw"]):
            losses["adversarial_loss"] = steps.adversarial(delta)
        return {
            "loss": given["clean_weight"] * losses.get("clean_loss", 0)
            + losses["adversarial_loss"],
            **losses,
        }

    assert_same_steps(
        small(), lambda model: build("pgd", model, **options).backward(*batch()), restated
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("per", ["sample", "token", "all"])
def test_random_start_is_in_the_ball(norm, per):
    seen = []

    class Watching(Small):
        def classify(self, x):
            seen.append(x.detach())
            return super().classify(x)

    model = Watching().double()
    inputs, labels = batch()
    build("pgd", model, random_start=True, epsilon=0.3, norm=norm, per=per, steps=1).backward(
        inputs, labels
    )
    delta = seen[1] - seen[0]
    kinds = {"sample": delta.flatten(1), "token": delta, "all": delta.flatten()}
    sizes = kinds[per].norm(dim=-1) if norm == "l2" else kinds[per].abs().amax(-1)
    real = (
        (inputs["attention_mask"] != 0)
        if per == "token"
        else torch.ones_like(sizes, dtype=torch.bool)
    )
    assert sizes.max() <= 0.3 * (1 + 1e-6) and sizes[real].min() > 0
    assert delta[inputs["attention_mask"] == 0].abs().max() < 1e-12


@pytest.mark.parametrize("start", [1e-5, 0.0])
def test_adv_embed(start):
    def restated(model):
        steps = Steps(model, *batch())
        noise = torch.zeros(N, T, D, dtype=torch.float64)
        clean, g = steps.clean()
        if start:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            noise = steps.masked(
                torch.rand(N, T, D, dtype=torch.float64, generator=generator) * start
            )
            g = steps.input_gradient(noise)
        adversarial = steps.adversarial((noise + 0.1 * per_token(g)).clamp(-0.1, 0.1))
        return {"loss": clean + adversarial, "clean_loss": clean, "adversarial_loss": adversarial}

    assert_same_steps(
        small(), lambda model: build("adv_embed", model, start=start).backward(*batch()), restated
    )
