"""ARAT."""

import collections
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uegr_kernels import recipes

from .steps import (
    CLASSES,
    LR,
    WORDS,
    D,
    N,
    Steps,
    T,
    assert_equal,
    assert_same_steps,
    batch,
    build,
    images,
    sgd,
    small,
    state,
)


class Twice(nn.Module):
    """Has two convolutions with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def features(self, x, norms):
        first = norms[0](self.first(x))
        second = norms[1](self.second(first.relu()))
        return self.head(second.relu().mean((2, 3))), [
            f.relu().mean((2, 3)) for f in (first, second)
        ]

    def forward(self, x):
        return self.features(x, (self.first_norm, self.second_norm))[0]


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_arat(split, predictor, stop_gradient):
    x, labels = images()

    def run(model):
        optimizer = sgd(model)
        options = {
            "split": split,
            "predictor": predictor,
            "stop_gradient": stop_gradient,
            "random_start": False,
        }
        recipe = build(
            "arat",
            model,
            optimizer,
            input_range=(0.0, 1.0),
            invariance_weight=2.0,
            steps=3,
            **options,
        )
        losses = recipe.backward(x, labels)
        assert {id(p) for p in recipe.parameters()} <= {
            id(p) for p in optimizer.param_groups[-1]["params"]
        }
        optimizer.step()
        own = recipe.parameters()
        assert all(p.grad is not None for p in own)
        recipe.after_step()
        assert all(p.grad is None for p in own)
        recipe.close()
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
            id(p) for p in model.parameters()
        ]
        assert len(optimizer.state) <= len(list(model.parameters()))
        return losses | {f"own {i}": p.detach().sum() for i, p in enumerate(own)}

    def restated(model):
        own = [
            nn.Sequential(
                nn.Linear(d, d // 4, bias=False),
                nn.BatchNorm1d(d // 4),
                nn.ReLU(),
                nn.Linear(d // 4, d),
            )
            for d in (4, 8)
        ]
        own = own if predictor else []
        for h in own:
            h.double()
        norms = model.first_norm, model.second_norm
        clean_norms = copy.deepcopy(norms) if split else norms
        delta = torch.zeros_like(x)
        for _ in range(3):
            statistics = copy.deepcopy(model.state_dict())
            delta.requires_grad_()
            (g,) = torch.autograd.grad(
                F.cross_entropy(model((x + delta).clamp(0, 1)), labels), delta
            )
            delta = (delta + 2 / 255 * g.sign()).detach().clamp(-8 / 255, 8 / 255)
            model.load_state_dict(statistics)
        z, f = model.features(x, clean_norms)
        z_adversarial, f_adversarial = model.features((x + delta).clamp(0, 1), norms)
        f = [each.detach() for each in f] if stop_gradient else f
        predicted = (
            [h(each) for h, each in zip(own, f_adversarial, strict=True)] if own else f_adversarial
        )
        invariance = (
            sum(
                1 - F.cosine_similarity(h, each).mean()
                for h, each in zip(predicted, f, strict=True)
            )
            / 2
        )
        clean, adversarial = F.cross_entropy(z, labels), F.cross_entropy(z_adversarial, labels)
        loss = 0.5 * clean + 0.5 * adversarial + 2.0 * invariance
        loss.backward()
        extra = [
            *(p for h in own for p in h.parameters()),
            *(p for norm in clean_norms for p in norm.parameters() if split),
        ]
        torch.optim.SGD([*model.parameters(), *extra], lr=LR).step()
        losses = {
            "loss": loss,
            "clean_loss": clean,
            "adversarial_loss": adversarial,
            "invariance": invariance,
        }
        return losses | {f"own {i}": p.detach().sum() for i, p in enumerate(extra)}

    torch.manual_seed(3)
    model = Twice().double()
    if not predictor:
        assert_same_steps(
            model, run, lambda twin: restated_without_draws(restated, twin), rtol=1e-8, atol=1e-10
        )
    else:
        assert_same_steps(model, run, restated, rtol=1e-8, atol=1e-10)


def restated_without_draws(restated, twin):
    """The restatement builds predictors that are not there; what it draws for them does not
    count.
    """
    before = torch.get_rng_state()
    losses = restated(twin)
    torch.set_rng_state(before)
    return losses


def test_arat_balances_by_the_clean_branchs_accuracy():
    torch.manual_seed(3)
    model = Twice().double()
    recipe = build("arat", model, sgd(model), steps=1, invariance_weight=0.0, balance_rows=6)
    for step in range(4):
        losses = recipe.backward(*images(step))
        torch.testing.assert_close(
            losses["loss"], (losses["clean_loss"] + losses["adversarial_loss"]) / 2
        )
    # of four rows each
    assert len(recipe.recent) == 2
    clean = copy.deepcopy(model)
    clean.first_norm, clean.second_norm = copy.deepcopy(list(recipe.clean_branch))
    clean.eval()
    right = sum((clean(x).argmax(1) == labels).sum().item() for x, labels in map(images, (2, 3)))
    modes, before = [module.training for module in model.modules()], state(model)
    recipe.epoch_end()
    assert recipe.accuracy == right / 8 and [module.training for module in model.modules()] == modes
    assert_equal(state(model), before, rtol=0, atol=0)
    recipe.accuracy = 0.75
    losses = recipe.backward(*images())
    torch.testing.assert_close(
        losses["loss"], 0.25 * losses["clean_loss"] + 0.75 * losses["adversarial_loss"]
    )
    for given, other in zip(model.modules(), clean.modules(), strict=True):
        assert type(given) is type(other)


def test_arat_without_invariance_and_branches_is_at_on_images():
    x, labels = images()
    results = []
    options = {"epsilon": 0.1, "norm": "linf", "input_range": (0.0, 1.0)}
    alone = {
        "invariance_weight": 0.0,
        "split": False,
        "predictor": False,
        "random_start": False,
        "steps": 1,
        "step_size": 0.1,
    }
    for name, more in (
        ("at", {}),
        ("arat", {**alone, "clean_weight": 1.0, "adversarial_weight": 1.0}),
    ):
        torch.manual_seed(3)
        model = Twice().double()
        losses = build(name, model, **options, **more).backward(x, labels)
        results.append((losses["loss"], state(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_equal(results[1][1], results[0][1], rtol=1e-9, atol=1e-12)


def test_arat_leaves_padding_out_of_its_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = (
                nn.Embedding(WORDS, D),
                nn.LayerNorm(D),
                nn.Linear(D, CLASSES),
            )

        def classify(self, x):
            return self.head(self.norm(x).tanh().mean(1))

        def forward(self, ids, attention_mask):
            return self.classify(self.embedding(ids))

    model = Tokens().double()
    inputs, labels = batch()
    steps = Steps(model, inputs, labels)
    e = steps.embedded().detach()
    delta = 0.3 * steps.input_gradient(torch.zeros_like(e)).sign()
    kept = inputs["attention_mask"][..., None]
    of_clean, of_adversarial = (
        (model.norm(x).relu() * kept).sum(1) / kept.sum(1) for x in (e, e + delta)
    )
    expected = 1 - F.cosine_similarity(of_clean, of_adversarial).mean()
    options = {
        "predictor": False,
        "random_start": False,
        "steps": 1,
        "epsilon": 0.3,
        "step_size": 0.3,
    }
    torch.testing.assert_close(
        build("arat", model, layers="norm", **options).backward(inputs, labels)["invariance"],
        expected.detach(),
    )


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("predictor", [True, False])
def test_arat_as_if_ignored_rows_were_not_there(predictor, stop_gradient, random_start):
    torch.manual_seed(3)
    first = nn.Sequential(
        nn.Embedding(WORDS, D), nn.Flatten(), nn.Linear(T * D, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    ).double()
    ids, labels = torch.randint(WORDS, (8, T)), torch.arange(8) % CLASSES
    # those before the others, so that they start at the same noise
    kept = torch.arange(8) < 5
    results = []
    for inputs, targets in ((ids, torch.where(kept, labels, -100)), (ids[kept], labels[kept])):
        model = copy.deepcopy(first)
        torch.manual_seed(4)
        options = {
            "predictor": predictor,
            "stop_gradient": stop_gradient,
            "random_start": random_start,
            "balance_rows": 6,
            "steps": 2,
        }
        recipe = recipes.arat(model, model[0], **options)
        torch.manual_seed(5)
        losses, *_ = [recipe.backward(inputs, targets) for _ in range(3)]
        remembered = len(recipe.recent)
        recipe.epoch_end()
        grads = {
            f"gradient {i}": p.grad
            for i, p in enumerate([*model.parameters(), *recipe.parameters()])
        }
        results.append(
            losses
            | grads
            | {"accuracy": torch.tensor(recipe.accuracy), "remembered": torch.tensor(remembered)}
        )
    assert_equal(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_arat_where_every_row_is_ignored():
    model = nn.Sequential(
        nn.Embedding(WORDS, D), nn.Flatten(), nn.Linear(T * D, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    )
    loss = recipes.arat(model, model[0], steps=1).backward(
        batch()[0]["ids"], torch.full((N,), -100)
    )["loss"]
    assert loss.isnan()


def test_arat_splits_the_norms_it_is_told_to():
    for options, kinds in (
        ({}, [nn.BatchNorm1d]),
        ({"split_layer_norm": True}, [nn.BatchNorm1d, nn.LayerNorm]),
        ({"split": False}, []),
    ):
        model = small()
        recipe = build("arat", model, steps=1, **options)
        assert [type(module) for module in recipe.clean_branch] == kinds
        before = copy.deepcopy(recipe.clean_branch.state_dict())
        recipe.backward(*batch())
        assert all(p.grad is not None for p in recipe.parameters())
        assert all(p.grad is not None for p in model.parameters())
        moved_buffers = [
            name
            for name, value in recipe.clean_branch.state_dict().items()
            if not torch.equal(value, before[name])
        ]
        assert all("running" in name or "tracked" in name for name in moved_buffers) and bool(
            moved_buffers
        ) == bool(kinds)


def test_arat_finds_layers_in_any_model():
    layers = [
        build("arat", model)._layers
        for model in (small(), nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    ]
    assert [type(layer) for layer in layers[0]] == [nn.BatchNorm1d] and [
        layer.out_features for layer in layers[1]
    ] == [3]
    with pytest.raises(ValueError, match="nothing to hold alike"):
        build("arat", nn.Sequential(nn.Flatten()))


def test_arats_state_loads_with_weights_only_whatever_the_inputs_are(tmp_path):
    recipe = build("arat", model := small(), sgd(model), steps=1)
    inputs, labels = batch()
    recipe.backward(collections.UserDict(inputs), labels)
    torch.save(recipe.state_dict(), tmp_path / "recipe.pt")
    kept = torch.load(tmp_path / "recipe.pt", weights_only=True)["recent"]
    assert_equal(kept[0][0], inputs, rtol=0, atol=0)
