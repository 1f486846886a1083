"""Adaptive dropout that UEGR lends to a model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import uegr_kernels as uk
from uegr_kernels import recipes
from uegr_kernels.models import MODELS

from .steps import (
    CLASSES,
    WORDS,
    D,
    Failing,
    N,
    Small,
    assert_equal,
    batch,
    build,
    sgd,
    small,
    state,
    step_of,
)


class Many(Small):
    """Has dropouts of several kinds and places: one module twice, one that is adaptive already,
    one that is out of the registry.
    """

    def __init__(self):
        super().__init__(0.3)
        self.shared = self.again = nn.Dropout(0.2)
        self.own = uk.AdaptiveDropout(p=0.1)
        self.channels = nn.Dropout1d(0.1)
        self.aside = [self.shared]

    def classify(self, x):
        return super().classify(self.again(self.own(self.aside[0](self.channels(x)))))


def many():
    torch.manual_seed(3)
    return Many().double()


def all_of(model):
    """Gives every module with its place, its class, and what it is made of."""
    named = model.named_modules(remove_duplicate=False)
    return [
        (
            name,
            module,
            type(module),
            {key: value for key, value in vars(module).items() if key != "training"},
        )
        for name, module in named
    ]


def assert_same_modules(model, before):
    after = all_of(model)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    for (*_, now), (_, module, _, was) in zip(after, before, strict=True):
        assert now.keys() == was.keys() or isinstance(module, uk.AdaptiveDropout)


def test_uegr_lends_adaptive_dropout_and_takes_it_back():
    model = many()
    before, keys = all_of(model), model.state_dict().keys()
    recipe = build("uegr", model, sgd(model), seed=0)
    assert (
        not any(type(module) is nn.Dropout for module in model.modules())
        and type(model.channels) is nn.Dropout1d
    )
    assert (
        isinstance(model.dropout, uk.AdaptiveDropout)
        and model.again is model.shared
        and (model.dropout.p, model.shared.p) == (0.3, 0.2)
    )
    for step in range(3):
        step_of(recipe, step)
    assert (
        model.dropout.gradient_norm.all()
        and model.shared.gradient_norm.shape == (D,)
        and model.own.gradient_norm.all()
    )
    assert model.state_dict().keys() == keys and "own._extra_state" in keys
    assert set(recipe.state_dict()["adaptive_dropout"]) == {"dropout", "shared"}
    model.dropout.p = 0.4
    model.eval()
    recipe.close()
    recipe.close()
    assert_same_modules(model, before)
    assert model.dropout.p == 0.4 and not model.dropout.training and not model.shared.training
    with pytest.raises(RuntimeError, match="closed"):
        recipe.backward(*batch())


@pytest.mark.parametrize("wrapped", [False, True])
def test_lent_dropout_is_resumed_exactly(wrapped, tmp_path):
    """Under the names of the plain model, wrapped or not."""

    def train(first, last, start=None):
        model = many()
        recipe = recipes.uegr(
            Through(model) if wrapped else model, model.embedding, sgd(model), seed=0
        )
        if start is not None:
            model.load_state_dict(start["model"])
            recipe.load_state_dict(start["recipe"])
        for step in range(first, last):
            step_of(recipe, step)
        return {"model": copy.deepcopy(model.state_dict()), "recipe": recipe.state_dict()}

    whole = train(0, 5)
    torch.save(train(0, 2), tmp_path / "state.pt")
    again = train(2, 5, torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(again["model"], whole["model"], rtol=0, atol=0)
    assert_equal(
        again["recipe"]["adaptive_dropout"], whole["recipe"]["adaptive_dropout"], rtol=0, atol=0
    )
    assert set(whole["recipe"]["adaptive_dropout"]) == {"dropout", "shared"}


class Through(nn.Module):
    """Wraps a model that is called `module`, as DDP's."""

    def __init__(self, wrapped):
        super().__init__()
        self.module = wrapped

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_names_are_the_plain_models_whatever_wraps_its_parts():
    def wrapped():
        plain = small()
        plain.layer_norm, plain.dropout = (
            checkpoint_wrapper(plain.layer_norm),
            torch.compile(checkpoint_wrapper(plain.dropout)),
        )
        return nn.Sequential(torch.compile(plain)), plain

    outer, model = wrapped()
    recipe = recipes.uegr(outer, model.embedding, seed=0)
    assert list(recipe.state_dict()["adaptive_dropout"]) == ["0.dropout"]
    outer, model = wrapped()
    recipes.child_tuning_d(outer, model.embedding, names="0.layer_norm.weight")


def test_lent_dropout_remembers_that_it_turned_plain():
    class Attending(Small):
        """Drops its attention's probabilities, [N, T, T]."""

        def classify(self, x):
            weights = self.attention((x @ x.transpose(1, 2)).softmax(2))
            return super().classify(weights @ x)

    def attending():
        torch.manual_seed(3)
        model = Attending(0.3)
        model.attention = nn.Dropout(0.2)
        return model.double()

    def short(recipe, width, seed):
        torch.manual_seed(seed)
        inputs, labels = batch(seed)
        recipe.backward({key: value[:, :width] for key, value in inputs.items()}, labels)

    model = attending()
    recipe = build("uegr", model, seed=0)
    short(recipe, 7, 0)
    with pytest.warns(UserWarning, match=r"^attention: the last axis had size 7") as found:
        short(recipe, 5, 1)
        short(recipe, 6, 2)
    assert sum("last axis" in str(each.message) for each in found) == 1
    twin = attending()
    twin.load_state_dict(model.state_dict())
    other = build("uegr", twin, seed=0)
    other.load_state_dict(recipe.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, of in ((recipe, model), (other, twin)):
            of.zero_grad()
            short(each, 7, 3)
    assert_equal(state(twin), state(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"js_weigth": 1.0},
        {"passes": 0},
        {"threshold": "high"},
        {"backend": "rocm"},
        {"adaptive_dropout": 1},
        {"normalization": "max"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_wrong_option_leaves_the_dropouts(options):
    model = many()
    before = all_of(model)
    with pytest.raises((TypeError, ValueError)):
        build("uegr", model, sgd(model), **options)
    assert_same_modules(model, before)


def test_an_exception_in_a_pass_leaves_the_dropouts_to_close():
    torch.manual_seed(3)
    model = Failing(0.3).double()
    vars(model).update(at=2, where="backward", count=0)
    before = all_of(model)
    recipe = build("uegr", model)
    with pytest.raises(KeyError, match="of the model"):
        recipe.backward(*batch())
    vars(model).update(at=0)
    recipe.backward(*batch())
    recipe.close()
    assert_same_modules(model, before)


def test_two_recipes_share_the_dropouts():
    model = many()
    before = all_of(model)
    first, second = build("uegr", model, seed=0), build("uegr", model, seed=0)
    first.backward(*batch())
    first.close()
    second.backward(*batch())
    # folded by the second
    assert second.state_dict()["adaptive_dropout"]["dropout"][0].any()
    second.close()
    first.close()
    assert_same_modules(model, before)


def test_a_dropout_that_does_something_else_stays():
    class Own(nn.Dropout):
        def forward(self, x):
            return x

    class Named(nn.Dropout):
        def set_rate(self, p):
            self.p = p

    model = small()
    model.dropout, model.other = Named(0.2), Own(0.2)
    recipe = build("uegr", model)
    assert isinstance(model.dropout, uk.AdaptiveDropout) and type(model.other) is Own
    model.dropout.set_rate(0.4)
    recipe.backward(*batch())
    assert recipe.state_dict()["adaptive_dropout"]["dropout"].shape == (3, 6)
    assert type(copy.deepcopy(model).dropout) is Named
    recipe.close()
    assert type(model.dropout) is Named and model.dropout.p == 0.4


def test_the_state_of_other_dropouts_is_refused():
    state = build("uegr", many(), seed=0).state_dict()
    model = small()
    recipe = build("uegr", model, seed=1)
    for wrong, message in (
        (state, "of the dropouts .*'dropout', 'shared'.*the model's are .*'dropout'"),
        (
            {key: value for key, value in state.items() if key != "adaptive_dropout"},
            "adaptive_dropout=False; build it so",
        ),
        (state | {"adaptive_dropout": {"dropout": torch.zeros(2)}}, r"a floating tensor \[3, F\]"),
        (state | {"adaptive_dropout": None}, "of the dropouts None"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.load_state_dict(wrong)
        assert recipe.selection["seed"] == 1
    with pytest.raises(ValueError, match="load it into the recipe that gave it"):
        build("uegr", small(), adaptive_dropout=False).load_state_dict(state)


def test_a_copy_of_the_model_in_the_midst():
    """As for an average of the weights: its keys are the plain model's, and in eval mode it is
    the same function.
    """
    model = many()
    recipe = build("uegr", model, sgd(model), seed=0)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for step in range(2):
        step_of(recipe, step)
        average.update_parameters(model)
    plain = many()
    plain.load_state_dict(average.module.state_dict())
    ids = batch()[0]["ids"]
    assert torch.equal(plain.eval()(ids), average.eval()(ids))
    recipe.close()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_copies_and_pickles_in_the_midst(name, tmp_path):
    """They have the model's own modules, which no close() would give back to them, and train on."""
    model = small()
    model.dropout.register_forward_hook(noted)
    recipe = build(name, model, sgd(model))
    step_of(recipe)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), copy.copy(model.dropout), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    assert [
        type(each) for each in (copies[0].dropout, copies[1], copies[2].dropout, copies[3].dropout)
    ] == [nn.Dropout] * 4
    ids = batch()[0]["ids"]
    for each in (copies[0], *copies[2:]):
        assert each.dropout.p == 0.3 and list(each.dropout._forward_hooks.values()) == [noted]
        assert torch.equal(each.eval()(ids), model.eval()(ids))
        step_of(build(name, each.train(), sgd(each)))
    step_of(recipe)
    recipe.close()
    assert vars(model.dropout).keys() == vars(copies[1]).keys()


def noted(module, args, output):
    pass


def test_the_state_after_close_is_the_last():
    recipe = build("uegr", model := many(), sgd(model), seed=0)
    step_of(recipe)
    before = recipe.state_dict()
    for _ in range(2):
        recipe.close()
        after = recipe.state_dict()["adaptive_dropout"]
        assert_equal(after, before["adaptive_dropout"], rtol=0, atol=0)
    assert after["dropout"].any()
    build("uegr", many(), seed=0).load_state_dict(before)


def test_lent_dropout_compiles():
    model = small()
    recipe = build("uegr", model, seed=0)
    model.compile(backend="aot_eager")
    for step in range(3):
        recipe.backward(*batch(step))
    assert model.dropout.gradient_norm.all()
    recipe.close()
    assert type(model.dropout) is nn.Dropout and model(batch()[0]["ids"]).shape == (N, CLASSES)


def test_a_model_compiled_before_is_refused():
    torch._dynamo.reset()
    model = torch.compile(small(), backend="aot_eager")
    model(**batch()[0])
    before = all_of(model)
    recipe = build("uegr", model)
    with pytest.raises(RuntimeError, match="build this before compiling"):
        recipe.backward(*batch())
    recipe.close()
    assert_same_modules(model, before)


@pytest.mark.parametrize("kind", MODELS)
def test_the_models_here_train_with_lent_dropout(kind):
    torch.manual_seed(3)
    model = MODELS[kind](WORDS, CLASSES, dimension=8)
    recipe = build("uegr", model, torch.optim.AdamW(model.parameters(), lr=0.01), seed=0)
    for length in (7, 5, 9, 6):
        ids = torch.randint(1, WORDS, (N, length))
        recipe.optimizer.zero_grad()
        losses = recipe.backward({"ids": ids}, torch.randint(CLASSES, (N,)))
        recipe.before_step()
        recipe.optimizer.step()
        assert losses["loss"].isfinite()
    states = recipe.state_dict()["adaptive_dropout"]
    assert "dropout" in states and all(
        each[0].any() and not each[2].any() for each in states.values()
    )
