"""FreeLB and FreeAT."""

import copy

import pytest
import torch
from torch.nn import functional as F

from .steps import (
    Images,
    N,
    Steps,
    assert_equal,
    assert_same_steps,
    ball,
    batch,
    build,
    cube,
    draw_of,
    images,
    sgd,
    small,
    state,
    unit,
)


@pytest.mark.parametrize("max_norm", [0.0, 0.12])
@pytest.mark.parametrize("same_draw", [True, False])
@pytest.mark.parametrize("norm", ["l2", "max"])
def test_free_lb(max_norm, same_draw, norm):
    def restated(model):
        steps, drawn, losses = Steps(model, *batch()), [], []
        delta = cube(steps, 0.1)
        for _ in range(3):
            with draw_of(drawn, same_draw):
                delta.requires_grad_()
                loss = steps.loss(model.classify(steps.embedded() + delta))
                (loss / 3).backward()
            losses.append(loss)
            g = steps.masked(delta.grad)
            g = unit(g) if norm == "l2" else g / g.abs().amax((1, 2), keepdim=True)
            delta = (delta + 0.1 * g).detach()
            delta = ball(delta, max_norm, norm) if max_norm else delta
        return {"loss": sum(losses) / 3, "adversarial_loss": sum(losses) / 3}

    options = {"max_norm": max_norm, "same_draw": same_draw, "norm": norm}
    assert_same_steps(
        small(), lambda model: build("free_lb", model, **options).backward(*batch()), restated
    )


def test_one_pass_of_free_lb_without_a_start_is_plain_training():
    def free(model):
        return {
            "loss": build("free_lb", model, steps=1, init_mag=0.0, max_norm=0.0).backward(*batch())[
                "loss"
            ]
        }

    assert_same_steps(
        small(),
        free,
        lambda model: {"loss": build("plain", model).backward(*batch())["loss"]},
        rtol=0,
        atol=0,
    )


def test_free_at_on_text():
    def restated(model):
        steps, optimizer, losses = Steps(model, *batch()), sgd(model), []
        delta = cube(steps, 0.2)
        for _ in range(3):
            delta.requires_grad_()
            loss = steps.loss(model.classify(steps.embedded() + delta))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            delta = ball((delta + 0.2 * unit(steps.masked(delta.grad))).detach(), 0.2, "l2")
        return {"loss": sum(losses) / 3, "adversarial_loss": sum(losses) / 3}

    for scale in (1.0, torch.tensor(4.0)):
        assert_same_steps(
            small(),
            lambda model, scale=scale: build("free_at", model, sgd(model), epsilon=0.2).backward(
                *batch(), scale=scale
            ),
            restated,
        )


def test_free_at_on_images_keeps_delta_between_batches():
    """The last batch is shorter, the next one longer again."""
    x, labels = images()
    torch.manual_seed(3)
    model = Images().double()
    twin = copy.deepcopy(model)
    recipe, optimizer = build("free_at", model, sgd(model), input_range=(0.0, 1.0)), sgd(twin)
    noise, radius = torch.zeros_like(x), 4 / 255
    for rows in (N, 2, N):
        recipe.backward(x[:rows], labels[:rows])
        for _ in range(4):
            delta = noise[:rows].clone().requires_grad_()
            F.cross_entropy(twin((x[:rows] + delta).clamp(0, 1)), labels[:rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            noise[:rows] = (delta + radius * delta.grad.sign()).detach().clamp(-radius, radius)
        torch.testing.assert_close(recipe.delta, noise)
    assert_equal(state(model), state(twin), rtol=1e-9, atol=1e-12)


def test_free_at_needs_its_optimizer():
    model = small()
    recipe = build("free_at", model)
    with pytest.raises(RuntimeError, match="needs the optimizer"):
        recipe.backward(*batch())


def test_free_at_skips_updates_that_overflow():
    model = small()
    model.head.bias.data[0] = torch.inf
    before = state(model)
    build("free_at", model, sgd(model)).backward(*batch(), scale=torch.tensor(2.0))
    assert_equal(
        {k: v for k, v in state(model).items() if "batch_norm" not in k},
        {k: v for k, v in before.items() if "batch_norm" not in k},
    )
