"""UEGR, whose first stage is BiStage's."""

import pytest
import torch
from torch import nn

import uegr_kernels as uk

from .steps import assert_equal, assert_same_steps, batch, build, sgd, small, state


def test_uegr_without_divergence_and_selection_is_at():
    """lambda = 0, m = 1 and threshold -> infinity (printed)."""
    models = small(), small()
    for name, model, options in (
        ("at", models[0], {"epsilon": 0.5}),
        (
            "uegr",
            models[1],
            {
                "epsilon": 0.5,
                "js_weight": 0.0,
                "passes": 1,
                "threshold": 1e6,
                "seed": 0,
                "adaptive_dropout": False,
            },
        ),
    ):
        optimizer = sgd(model)
        for step in range(2):
            torch.manual_seed(step)
            optimizer.zero_grad()
            recipe = build(name, model, optimizer, **options)
            recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
    assert_equal(state(models[0]), state(models[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True, None])
def test_uegr_is_the_stage(adaptive):
    """By default on the model with adaptive dropout, which it gives back."""
    options = {"epsilon": 0.5, "passes": 3, "js_weight": 0.3, "label_smoothing": 0.1}

    def stage(model):
        plain = model.dropout
        if adaptive is not False:
            uk.replace_dropout(model)
        # the rates differ once a gradient has been seen
        for step in range(3):
            result = uk.BiStage(model, model.embedding, **options).backward(*batch(step))._asdict()
        model.dropout = plain
        del result["logits"]
        return result

    def run(model):
        plain = model.dropout
        recipe = build(
            "uegr",
            model,
            seed=0,
            **options,
            **({} if adaptive is None else {"adaptive_dropout": adaptive}),
        )
        results = [recipe.backward(*batch(step)) for step in range(3)]
        recipe.close()
        assert (
            model.dropout is plain
            and type(plain) is nn.Dropout
            and vars(plain).keys() == vars(nn.Dropout()).keys()
        )
        return results[-1]

    assert_same_steps(small(), run, stage)
