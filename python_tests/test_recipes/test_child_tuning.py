"""Child-Tuning-F and -D."""

import copy

import numpy
import pytest
import torch

from .steps import D, Images, Steps, assert_equal, batch, build, sgd, small, state


def test_child_tuning_f_keeps_a_fresh_share_of_every_gradient():
    model = small()
    recipe = build("child_tuning_f", model, sgd(model), keep_probability=0.4)
    kept = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        recipe.backward(*batch())
        whole = torch.cat([p.grad.flatten() for p in model.parameters()])
        recipe.before_step()
        masked = torch.cat([p.grad.flatten() for p in model.parameters()])
        live = whole != 0
        kept.append((masked != 0)[live])
        torch.testing.assert_close(masked[live], torch.where(kept[-1], whole[live] / 0.4, 0))
    assert 0.3 < kept[0].double().mean() < 0.5 and 0.3 < (kept[0] == kept[1]).double().mean() < 0.7


def fisher(model, batches, weights, most):
    """Sums of squared batch gradients, each tensor clipped first."""
    total = [torch.zeros_like(w) for w in weights]
    for inputs, labels in batches:
        steps = Steps(copy.deepcopy(model), inputs, labels)
        twins = [
            dict(steps.model.named_parameters())[name]
            for name, w in model.named_parameters()
            if any(w is each for each in weights)
        ]
        for sum_of, g in zip(
            total,
            torch.autograd.grad(steps.loss(steps.model.classify(steps.embedded())), twins),
            strict=True,
        ):
            sum_of += (g * min(1.0, most / (g.norm().item() + 1e-6))) ** 2 / len(batches)
    return total


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("target", ["gradient", "update"])
def test_child_tuning_d(target, keep):
    model = small()
    twin = copy.deepcopy(model)
    chosen = [twin.lstm.weight_ih_l0, twin.lstm.weight_hh_l0, twin.convolution.weight]
    batches = [batch(i) for i in range(3)]
    make = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = (
        torch.optim.AdamW(model.parameters(), **make),
        torch.optim.AdamW(twin.parameters(), **make),
    )
    options = {
        "names": ("lstm.weight*", "convolution.weight"),
        "keep_probability": keep,
        "target": target,
        "max_grad_norm": 0.05,
    }
    recipe = build("child_tuning_d", model, optimizers[0], **options)
    before = state(model)
    torch.manual_seed(1)
    recipe.prepare(batches)
    assert_equal(state(model), before, rtol=0, atol=0)
    torch.manual_seed(1)
    of_fisher = fisher(twin, batches, chosen, 0.05)
    cut = numpy.percentile(torch.cat([f.flatten() for f in of_fisher]).numpy(), (1 - keep) * 100)
    masks = [f >= cut for f in of_fisher]
    if keep < 1:
        assert sum(mask.sum() for mask in masks) / sum(
            mask.numel() for mask in masks
        ) == pytest.approx(keep, abs=0.01)
    for step in range(2):
        torch.manual_seed(step)
        optimizers[0].zero_grad()
        recipe.backward(*batch(step))
        recipe.before_step()
        optimizers[0].step()
        recipe.after_step()
        torch.manual_seed(step)
        optimizers[1].zero_grad()
        steps = Steps(twin, *batch(step))
        steps.loss(twin.classify(steps.embedded())).backward()
        copies = [w.detach().clone() for w in chosen]
        if target == "gradient":
            for w, mask in zip(chosen, masks, strict=True):
                w.grad *= mask
        optimizers[1].step()
        if target == "update":
            for w, mask, copied in zip(chosen, masks, copies, strict=True):
                w.data = torch.where(mask, w.data, copied)
        # the mask is the run's
        recipe.epoch_end()
    assert_equal(state(model), state(twin), rtol=1e-7, atol=1e-7)


def test_child_tuning_d_keeps_ties_and_makes_its_mask_of_the_first_epoch():
    model = small()
    # most words do not occur
    recipe = build("child_tuning_d", model, names="embedding.weight")
    recipe.backward(*batch())
    gradient = model.embedding.weight.grad.clone()
    recipe.before_step()
    assert torch.equal(model.embedding.weight.grad, gradient)
    recipe.epoch_end()
    (mask,) = recipe.masks
    assert (
        mask[gradient == 0].all() == (0.3 * mask.numel() > (gradient != 0).sum())
        and mask[gradient.abs().argmax() // D].any()
    )
    default = build("child_tuning_d", model)
    # "layer" is in their names
    assert [id(p) for p in default._masked] == [id(p) for p in model.layer_norm.parameters()]
    assert len(build("child_tuning_d", Images())._masked) == len(list(Images().parameters()))
