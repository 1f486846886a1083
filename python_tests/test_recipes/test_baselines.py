"""Plain training, and with a penalty on the weights."""

import pytest
import torch

from .steps import Steps, assert_equal, assert_same_steps, batch, build, small


@pytest.mark.parametrize("weight", [0.0, 0.01])
@pytest.mark.parametrize("name", ["plain", "l1", "l2"])
def test_plain(name, weight):
    def restated(model):
        steps = Steps(model, *batch())
        loss = steps.loss(model.classify(steps.embedded()))
        penalty = {
            "plain": lambda: 0.0,
            "l1": lambda: weight * sum(p.abs().sum() for p in model.parameters()),
            "l2": lambda: weight / 2 * sum((p**2).sum() for p in model.parameters()),
        }[name]()
        (loss + penalty).backward()
        return {
            "loss": loss + penalty,
            "clean_loss": loss,
            **({} if name == "plain" else {"penalty": penalty}),
        }

    options = {} if name == "plain" else {"weight": weight}
    assert_same_steps(
        small(), lambda model: build(name, model, **options).backward(*batch()), restated
    )


def test_l2_is_sgds_weight_decay():
    model, twin = small(), small()
    for each, decay, name, options in ((model, 0, "l2", {"weight": 0.1}), (twin, 0.1, "plain", {})):
        torch.manual_seed(0)
        build(name, each, **options).backward(*batch())
        torch.optim.SGD(each.parameters(), lr=0.1, weight_decay=decay).step()
    assert_equal(
        dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-9, atol=1e-12
    )


def test_dropout_is_a_switch():
    model = small(dropout=0.5)
    without = [build("plain", model, dropout=0.0).backward(*batch())["loss"] for _ in range(2)]
    assert torch.equal(*without) and model.dropout.p == 0.5
    assert not torch.equal(*[build("plain", model).backward(*batch())["loss"] for _ in range(2)])
