"""SAM and AWP."""

import copy

import pytest
import torch

from .steps import (
    LR,
    D,
    N,
    Steps,
    T,
    assert_same_steps,
    ball,
    batch,
    build,
    draw_of,
    moved,
    small,
    unit,
)


@pytest.mark.parametrize("same_draw", [True, False])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(adaptive, same_draw):
    def restated(model):
        steps, drawn, weights = Steps(model, *batch()), [], list(model.parameters())
        with draw_of(drawn, same_draw):
            clean = steps.loss(model.classify(steps.embedded()))
            g = torch.autograd.grad(clean, weights)
        statistics = {name: b.clone() for name, b in model.named_buffers()}
        scaled = [w.detach().abs() * x if adaptive else x for w, x in zip(weights, g, strict=True)]
        length = torch.cat([x.flatten() for x in scaled]).norm()
        by = [
            (w.detach().abs() * x if adaptive else x) / length
            for w, x in zip(weights, scaled, strict=True)
        ]
        with draw_of(drawn, same_draw), moved(weights, [0.3 * v for v in by]):
            loss = steps.loss(model.classify(steps.embedded()))
            loss.backward()
        for name, b in model.named_buffers():
            b.data = statistics[name]
        return {"loss": loss, "clean_loss": clean}

    options = {"rho": 0.3, "adaptive": adaptive, "same_draw": same_draw}
    assert_same_steps(
        small(), lambda model: build("sam", model, **options).backward(*batch()), restated
    )


@pytest.mark.parametrize(
    "name, options",
    [("sam", {"rho": 0.0}), ("awp", {"gamma": 0.0}), ("awp", {"warmup_epochs": 1})],
    ids=str,
)
def test_without_a_perturbation_of_weights_it_is_plain_training(name, options):
    def none(model):
        return {"loss": build(name, model, **options).backward(*batch())["loss"]}

    assert_same_steps(
        small(),
        none,
        lambda model: {"loss": build("plain", model).backward(*batch())["loss"]},
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("attack", [0, 2])
def test_awp(attack):
    """Two steps with decay and momentum, which see w + v."""

    def optimizer_of(model):
        return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.1)

    def run(model):
        optimizer = optimizer_of(model)
        recipe = build("awp", model, optimizer, gamma=0.2, steps=attack, epsilon=0.5)
        for step in range(2):
            optimizer.zero_grad()
            losses = recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        return losses

    def restated(model):
        optimizer = optimizer_of(model)
        weights = [p for name, p in model.named_parameters() if p.dim() > 1 and "weight" in name]
        for step in range(2):
            steps = Steps(model, *batch(step))
            delta = torch.zeros(N, T, D, dtype=torch.float64)
            for _ in range(attack):
                delta = ball(
                    delta + 2.5 * 0.5 / attack * unit(steps.input_gradient(delta)), 0.5, "l2"
                )
            statistics = {name: b.clone() for name, b in model.named_buffers()}
            proxy = copy.deepcopy(model)
            state_of_proxy = [
                p for name, p in proxy.named_parameters() if p.dim() > 1 and "weight" in name
            ]
            loss = steps.loss(proxy.classify(proxy.embedding(steps.inputs) + delta))
            g = torch.autograd.grad(loss, state_of_proxy)
            assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
            ascent = [0.01 * x for x in g]
            v = [
                0.2 * w.detach().norm() / (a.norm() + 1e-20) * a
                for w, a in zip(weights, ascent, strict=True)
            ]
            optimizer.zero_grad()
            for w, x in zip(weights, v, strict=True):
                w.data += x
            loss = steps.loss(model.classify(steps.embedded() + delta))
            loss.backward()
            optimizer.step()
            for w, x in zip(weights, v, strict=True):
                w.data -= x
        return {"loss": loss}

    assert_same_steps(small(), run, restated, rtol=1e-8, atol=1e-11)


def test_awp_leaves_the_weights_between_steps():
    """Exact after backward, after a step that was skipped, and after close."""
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    recipe = build("awp", model, gamma=0.5)
    recipe.backward(*batch())
    assert all(map(torch.equal, before, model.parameters()))
    recipe.before_step()
    assert not torch.equal(before[0], model.embedding.weight)
    recipe.after_step()
    assert all(map(torch.equal, before, model.parameters()))
    recipe.before_step()
    recipe.close()
    assert all(map(torch.equal, before, model.parameters()))
