"""Recipes on models that have adaptive dropout."""

import pytest
import torch

import uegr_kernels as uk
from uegr_kernels import recipes
from uegr_kernels.passes import buffers_held

from .steps import Small, batch, build, small, train


@pytest.mark.parametrize("name", recipes.NAMES)
def test_adaptive_dropout(name):
    model = Small(0.3)
    uk.replace_dropout(model)
    losses, _ = train(name, model)
    assert (
        all(loss.isfinite() for each in losses for loss in each.values())
        and model.dropout.pending.isfinite().all()
    )
    assert model.dropout.gradient_norm.max() > 0


def test_ascents_leave_the_norms_alone():
    """Nothing is dropped and next to nothing moved: each descent leaves what the plain loss
    leaves.
    """
    norms = []
    for each, given in (("plain", {}), ("sam", {"rho": 1e-9})):
        model = small(0.0)
        uk.replace_dropout(model)
        recipe = build(each, model, **given)
        for _ in range(2):
            recipe.backward(*batch())
        norms.append((model.dropout.gradient_norm, model.dropout.pending))
    for ascended, plain in zip(norms[1], norms[0], strict=True):
        torch.testing.assert_close(ascended, plain, rtol=1e-6, atol=0)


def test_what_a_held_pass_leaves_is_dropped():
    model = small(0.3)
    uk.replace_dropout(model)
    model(**batch()[0]).sum().backward()
    layer, before = model.dropout, (model.dropout.gradient_norm, model.dropout.pending)
    values = [tensor.clone() for tensor in before]
    with buffers_held(model):
        for step in range(2):
            model(**batch(step)[0]).sum().backward()
        assert layer.gradient_norm.all()
    assert layer.gradient_norm is before[0] and layer.pending is before[1]
    assert all(torch.equal(tensor, value) for tensor, value in zip(before, values, strict=True))


@pytest.mark.parametrize(
    "name, options",
    [("free_lb", {"adv_lr": 0.0, "init_mag": 0.0}), ("sam", {"rho": 0.0})],
    ids=["free_lb", "sam"],
)
def test_the_same_draw_of_adaptive_dropout(name, options):
    """Later passes drop the units that the first one dropped, though there are gradient norms
    in between.
    """
    losses = []
    for each, given in (("plain", {}), (name, options)):
        model = small()
        uk.replace_dropout(model)
        train("plain", model, steps=1)
        torch.manual_seed(6)
        losses.append(build(each, model, **given).backward(*batch())["loss"])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
