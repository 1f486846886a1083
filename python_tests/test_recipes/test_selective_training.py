"""RoAST."""

import pytest
import scipy.stats
import torch
from torch.utils.checkpoint import checkpoint

from .steps import (
    D,
    N,
    Small,
    Steps,
    T,
    assert_same_steps,
    batch,
    build,
    divergence,
    per_token,
    small,
)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("detached", [False, True])
def test_roast(form, detached):
    def restated(model):
        steps = Steps(model, *batch())
        z0 = model.classify(steps.embedded())
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        n = steps.masked(torch.rand(N, T, D, dtype=torch.float64, generator=generator) * 1e-5)
        delta = n + 0.3 * per_token(steps.input_gradient(n))
        h = steps.embedded()
        z1 = model.classify((h.detach() if detached else h) + delta)
        clean, adversarial, between = (
            steps.loss(z0),
            steps.loss(z1),
            divergence(z0, z1, "mean" if form == "paper" else "sum"),
        )
        loss = (clean + adversarial if form == "paper" else clean / 2) + 0.5 * between
        loss.backward()
        losses = {"loss": loss, "clean_loss": clean, "divergence": between}
        return losses | ({"adversarial_loss": adversarial} if form == "paper" else {})

    options = {
        "epsilon": 0.3,
        "kl_weight": 0.5,
        "form": form,
        "detach_embedding": detached,
        "seed": 1,
    }
    assert_same_steps(
        small(), lambda model: build("roast", model, **options).backward(*batch()), restated
    )


def test_roast_masks_once_an_epoch_by_the_rank_of_the_last_one():
    model = small(0.0)
    options = {
        "names": ("lstm.*", "convolution.*"),
        "threshold": 0.6,
        "sharpness": 4.0,
        "seed": 3,
        "backend": "reference",
    }
    recipe = build("roast", model, **options)
    chosen = [p for name, p in model.named_parameters() if name.startswith(("lstm", "convolution"))]
    sums, masks = [], []
    for epoch in range(3):
        sums.append([torch.zeros_like(p) for p in chosen])
        masks.append([])
        for step in range(3):
            model.zero_grad()
            recipe.backward(*batch(10 * epoch + step))
            raw, others = [p.grad.clone() for p in chosen], model.head.weight.grad.clone()
            recipe.before_step()
            # the first batch is skipped
            if step:
                for total, g in zip(sums[-1], raw, strict=True):
                    total += g**2
            assert torch.equal(model.head.weight.grad, others)
            masks[-1].append(
                torch.cat(
                    [(p.grad / g).flatten() for p, g in zip(chosen, raw, strict=True)]
                ).nan_to_num(0)
            )
        recipe.epoch_end()
    # the first epoch is trained whole
    assert torch.equal(masks[0][0], torch.ones_like(masks[0][0]) * (masks[0][0] != 0))
    for epoch in (1, 2):
        saliency = torch.cat([total.flatten() for total in sums[epoch - 1]])
        rank = (
            torch.from_numpy(scipy.stats.rankdata(saliency.numpy(), "min").astype(float) - 1)
            / saliency.numel()
        )
        live = masks[epoch][0] != 0
        torch.testing.assert_close(
            masks[epoch][0][live], 1 + torch.exp(-8.0 * (rank[live] - 0.6)), rtol=1e-5, atol=0
        )
        expected = torch.sigmoid(8.0 * (rank - 0.6)).mean()
        assert live.double().mean() == pytest.approx(expected.item(), abs=0.06)
        for later in masks[epoch][1:]:
            both = (later != 0) & live
            torch.testing.assert_close(later[both], masks[epoch][0][both])
    assert not torch.equal(masks[1][0] != 0, masks[2][0] != 0)


def test_roast_prepared():
    model = small()
    recipe = build("roast", model, names="lstm.*", seed=3)
    recipe.prepare([batch(i) for i in range(2)])
    assert [mask.shape for mask in recipe.masks] == [p.shape for p in model.lstm.parameters()]
    for name in ("roast", "child_tuning_d"):
        with pytest.raises(ValueError, match="batches"):
            build(name, model).prepare([])


def test_roast_does_not_take_a_recomputed_embedding():
    class Recomputes(Small):
        def forward(self, ids, attention_mask=None):
            return checkpoint(super().forward, ids, use_reentrant=False)

    with pytest.raises(RuntimeError, match="leave it out of the checkpointed part"):
        build("roast", Recomputes()).backward(*batch())
