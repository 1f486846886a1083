"""The selective update, inside the optimizer's step and ahead of it."""

import pytest
import torch

import uegr_kernels as uk

from .steps import LR, assert_equal, batch, build, sgd, small, state


@pytest.mark.parametrize("name", ["uegr", "r_at_su", "child_tuning_f"])
def test_the_update_is_selective(name):
    """The same masks inside SelectiveSGD's step and ahead of torch's SGD, from the same seed."""
    inside, outside = small(), small()
    options = (
        {"keep_probability": 0.4}
        if name == "child_tuning_f"
        else {"threshold": 0.05, "sharpness": 3.0}
    )
    optimizers = uk.SelectiveSGD(inside.parameters(), lr=LR, seed=5), sgd(outside)
    of_inside = build(name, inside, optimizers[0], **options)
    of_outside = build(name, outside, optimizers[1], seed=5, **options)
    assert options.items() <= optimizers[0].param_groups[0].items()
    masked = 0
    for step in range(2):
        for model, recipe, optimizer in (
            (inside, of_inside, optimizers[0]),
            (outside, of_outside, optimizers[1]),
        ):
            torch.manual_seed(step)
            optimizer.zero_grad()
            recipe.backward(*batch(step))
            recipe.before_step()
            masked += model is outside and sum(
                (p.grad == 0).sum() for p in (model.head.weight, model.lstm.weight_ih_l0)
            )
            optimizer.step()
            recipe.after_step()
    assert masked > 0
    assert_equal(
        state(inside) | grads_apart(inside),
        state(outside) | grads_apart(inside),
        rtol=1e-9,
        atol=1e-12,
    )


def grads_apart(model):
    """Names of gradients, which a selective step leaves as they were."""
    return {name: torch.zeros(()) for name in state(model) if name.endswith("gradient")}


def test_selection_with_adamw_defaults_to_a_drawn_seed():
    model = small()
    torch.manual_seed(1)
    first = build("uegr", model, torch.optim.AdamW(model.parameters())).selection["seed"]
    torch.manual_seed(1)
    assert build("uegr", model).selection["seed"] == first != build("uegr", model).selection["seed"]


def test_an_optimizer_given_later_selects_by_itself():
    model = small()
    recipe = build("uegr", model, seed=5, threshold=0.05)
    recipe.optimizer = uk.SelectiveSGD(model.parameters(), lr=LR)
    recipe.backward(*batch())
    before = model.head.weight.grad.clone()
    recipe.before_step()
    assert torch.equal(model.head.weight.grad, before)
    assert (
        recipe.optimizer.param_groups[0]["threshold"],
        recipe.optimizer.param_groups[0]["seed"],
    ) == (0.05, 5)
