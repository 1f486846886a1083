"""The registry, and how every recipe takes its options."""

import contextlib
import fractions
import inspect
import pathlib
import re

import numpy
import pytest
import torch
from torch import nn

import uegr_kernels as uk
from uegr_kernels import recipes
from uegr_kernels.recipes import RECIPES, Recipe
from uegr_kernels.selective.options import FIELDS

from .steps import build, sgd, small


def test_names():
    assert list(recipes.NAMES) == list(RECIPES)
    assert all(getattr(recipes, name) is kind for name, kind in RECIPES.items())
    assert uk.recipes is recipes
    with_attribute = {
        attribute: [name for name, kind in RECIPES.items() if getattr(kind, attribute)]
        for attribute in ("steps_itself", "selects_update", "sets_selection")
    }
    assert with_attribute == {
        "steps_itself": ["free_at"],
        "selects_update": ["r_at_su", "uegr", "child_tuning_f"],
        "sets_selection": ["child_tuning_f"],
    }


def test_what_a_class_says_is_no_option():
    """An instance's option would be another thing under the name. Only the passes of uegr are its
    option too.
    """
    said = {name for name, kind in Recipe.__annotations__.items() if "ClassVar" in str(kind)}
    assert {"passes", "size_option", "kept"} <= said
    assert {name: said & kind.option_names() for name, kind in RECIPES.items()} == {
        name: {"passes"} if name == "uegr" else set() for name in RECIPES
    }
    assert (build("uegr", small(), passes=5).passes, recipes.uegr.passes) == (5, 3)


def test_the_option_that_is_the_size_of_a_perturbation():
    """A user's one epsilon goes to all of these: L2 lengths, where a recipe can have others."""
    sizes = {name: kind.size_option for name, kind in RECIPES.items() if kind.size_option}
    names = "at pgd r_at r_at_su uegr drop_attack drop_attack_k roast".split()
    assert sizes == dict.fromkeys(names, "epsilon") | {"free_lb": "adv_lr"}
    for name, option in sizes.items():
        recipe = build(name, small(), **{option: 0.25}, relative=True)
        assert getattr(recipe, option) == 0.25
        assert getattr(recipe, "norm", "l2") == "l2"


def test_what_each_process_keeps_is_in_the_state():
    kept = {name: kind.kept_by_each_process for name, kind in RECIPES.items()}
    assert {name for name in kept if kept[name]} == {"uegr"}
    assert set(kept["uegr"]) <= build("uegr", small()).state_dict().keys()


METHODS = (pathlib.Path(__file__).parents[2] / "docs" / "methods.md").read_text()
SECTIONS = re.findall(r"^#+ (?:\d+\. )?(.+)$", METHODS, re.MULTILINE)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_docstring(name):
    """One sentence says what it does, a line names sections that docs/methods.md has, and it is
    under 25 lines in all.
    """
    lines = getattr(recipes, name).__doc__.strip().splitlines()
    (cited,) = [line for line in lines if "docs/methods.md" in line]
    sections = re.findall('"([^"]+)"', cited)
    assert lines[0].endswith((".", ")")) and len(lines) < 25
    assert sections and set(sections) <= set(SECTIONS)


def in_help(name):
    """Gives the docstring of a recipe, and those that it points at."""
    doc = getattr(recipes, name).__doc__
    return doc + "".join(map(in_help, re.findall(r"`help\(uk\.recipes\.(\w+)\)`", doc)))


@pytest.mark.parametrize("name", recipes.NAMES)
def test_help_names_every_option(name):
    found = in_help(name)
    options = sorted(getattr(recipes, name).option_names())
    assert [option for option in options if not re.search(rf"\b{option}\b", found)] == []


@pytest.mark.parametrize("name", recipes.NAMES)
def test_wrong_options(name):
    model = small()
    for options, error, text in (
        ({"no_such_option": 1}, TypeError, "no option 'no_such_option'; its options are"),
        ({"task": "ranking"}, ValueError, "task='ranking'"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
        ({"input_range": (0.0, 1.0)}, ValueError, "embedding=None"),
    ):
        with pytest.raises(error, match=text):
            build(name, model, **options)
    with pytest.raises(TypeError, match="optimizer is a float"):
        build(name, model, 0.1)
    with pytest.raises(ValueError, match="not a module of model"):
        getattr(recipes, name)(model, nn.Embedding(2, 2))
    with pytest.raises(ValueError, match="recipe"):
        build(name, model).load_state_dict({"recipe": "other"})
    model = small()
    with contextlib.suppress(TypeError):
        build(name, model, no_such_option=1)
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize(
    "name, options, error, text",
    [
        ("l1", {"weight": -1.0}, ValueError, "weight=-1.0"),
        ("at", {"epsilon": -1.0}, ValueError, "epsilon=-1.0"),
        ("at", {"norm": "l3"}, ValueError, "norm='l3'"),
        ("at", {"clean_weight": "one"}, TypeError, "clean_weight='one'"),
        ("at", {"dropout": 1.5}, ValueError, "dropout=1.5"),
        ("at", {"relative": 1}, TypeError, "relative=1"),
        ("pgd", {"steps": 0}, ValueError, "steps=0"),
        ("pgd", {"step_size": -1.0}, ValueError, "step_size=-1.0"),
        ("pgd", {"random_start": 1}, TypeError, "random_start=1"),
        (
            "pgd",
            {"first_step_from_clean": True, "random_start": True},
            ValueError,
            "first_step_from_clean",
        ),
        ("adv_embed", {"per": "word"}, ValueError, "per='word'"),
        ("free_at", {"steps": 0}, ValueError, "steps=0"),
        ("free_at", {"norm": "max"}, ValueError, "norm='max'"),
        ("free_lb", {"adv_lr": -1.0}, ValueError, "adv_lr=-1.0"),
        ("free_lb", {"same_draw": None}, TypeError, "same_draw=None"),
        ("drop_attack", {"keep_probability": 1.5}, ValueError, "keep_probability=1.5"),
        (
            "drop_attack",
            {"weights": ("lstm.weight_ih",)},
            ValueError,
            "'lstm.weight_ih' matches no trainable parameter",
        ),
        ("drop_attack", {"attack_input": False}, ValueError, "attack_input=False"),
        ("drop_attack_k", {"steps": 0}, ValueError, "steps=0"),
        ("sam", {"rho": -0.1}, ValueError, "rho=-0.1"),
        ("awp", {"gamma": "a"}, TypeError, "gamma='a'"),
        ("awp", {"warmup_epochs": -1}, ValueError, "warmup_epochs=-1"),
        ("child_tuning_f", {"keep_probability": 0.0}, ValueError, "keep_probability"),
        ("child_tuning_f", {"target": "update"}, ValueError, "target='update'"),
        ("child_tuning_d", {"keep_probability": 0.0}, ValueError, "keep_probability=0"),
        ("child_tuning_d", {"names": "*bert*"}, ValueError, "matches no trainable parameter"),
        ("roast", {"form": "book"}, ValueError, "form='book'"),
        ("roast", {"sharpness": -1.0}, ValueError, "sharpness=-1.0"),
        ("roast", {"names": [1]}, TypeError, "1 is a int"),
        ("weight_consolidation", {"kappa": -1.0}, ValueError, "kappa=-1.0"),
        ("weight_consolidation", {"form": "linear"}, ValueError, "form='linear'"),
        ("weight_consolidation", {"names": "head"}, ValueError, "'head' matches no"),
        ("arat", {"layers": ("lstm",)}, ValueError, "names a LSTM"),
        ("arat", {"layers": ("norm",)}, ValueError, "'norm', which is no module"),
        ("arat", {"clean_weight": 1.0}, ValueError, "give both"),
        ("arat", {"split": None}, TypeError, "split=None"),
        ("r_drop", {"alpha": -1.0}, ValueError, "alpha=-1.0"),
        ("r_at", {"reduction": "none"}, ValueError, "reduction='none'"),
        ("r_at_su", {"threshold": None}, TypeError, "threshold"),
        ("uegr", {"threshold": "high"}, TypeError, "threshold"),
        ("uegr", {"normalization": "max"}, ValueError, "normalization='max'"),
        ("uegr", {"seed": 1.0}, TypeError, "seed=1.0"),
    ],
    ids=str,
)
def test_wrong_values(name, options, error, text):
    model = small()
    with pytest.raises(error, match=text):
        build(name, model, sgd(model), **options)
    assert not model.embedding._forward_hooks


def test_an_options_default_is_what_it_is_handed_to_has():
    """Of UEGR and R-AT-SU, which hand theirs on to the forward stage and to the optimizer, and of
    all that hand theirs on to the losses.
    """
    uegr, stage, optimizer, loss, linear, plain = (
        {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
        for kind in (
            recipes.uegr,
            uk.BiStage,
            uk.SelectiveAdamW,
            uk.uegr_loss,
            uk.linear_uegr_loss,
            recipes.plain,
        )
    )
    for kind in (stage, linear, plain):
        handed = kind.keys() & {"js_weight", "label_smoothing", "ignore_index", "task"}
        assert len(handed) >= 3
        assert {name: kind[name] for name in handed} == {name: loss[name] for name in handed}
    own = {"model", "embedding", "optimizer", "adaptive_dropout"}
    selection = {name: optimizer[name] for name in (*FIELDS, "seed")}
    del stage["model"], stage["embedding"]
    assert {name: value for name, value in uegr.items() if name not in own} == stage | selection
    su, at = (inspect.signature(recipe).parameters for recipe in (recipes.r_at_su, recipes.r_at))
    assert {name: su[name].default for name in su.keys() - at.keys()} == selection


@pytest.mark.parametrize("name", ["uegr", "r_at_su"])
def test_an_optimizer_that_selects_keeps_the_options_that_a_recipe_is_not_given(name):
    model = small()
    optimizer = uk.SelectiveAdamW(model.parameters(), sharpness=2.0, threshold=0.5, seed=1)
    build(name, model, optimizer, threshold=0.8).close()
    (group,) = optimizer.param_groups
    assert (group["threshold"], group["sharpness"], group["seed"]) == (0.8, 2.0, 1)


NUMBERS = [
    (name, option)
    for name in uk.recipes.NAMES
    for option, parameter in inspect.signature(getattr(uk.recipes, name)).parameters.items()
    if type(parameter.default) is float
]


@pytest.mark.parametrize("name, option", NUMBERS, ids=lambda value: value)
def test_numbers_are_taken_by_one_rule(name, option):
    """A fraction works as the same float does: what a recipe keeps is a number of Python's."""
    losses = []
    for value in (0.5, fractions.Fraction(1, 2), numpy.float32(0.5)):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 3))
        recipe = getattr(uk.recipes, name)(
            model, embedding, torch.optim.SGD(model.parameters(), lr=0.1), **{option: value}
        )
        losses.append(recipe.backward(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])))
        recipe.before_step()
        recipe.after_step()
        recipe.close()
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], equal_nan=True)
    for bad in ("1", True, 1j, torch.tensor(0.5)):
        with pytest.raises(TypeError, match=f"{option}="):
            getattr(uk.recipes, name)(
                model, embedding, torch.optim.SGD(model.parameters(), lr=0.1), **{option: bad}
            )


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name != "uegr"])
def test_recipes_keep_pythons_numbers(name):
    kind = getattr(recipes, name)
    defaults = {
        option: parameter.default
        for option, parameter in inspect.signature(kind).parameters.items()
        if type(parameter.default) in (int, float, bool)
    }
    model = small()
    given = {option: numpy.array(value)[()] for option, value in defaults.items()}
    recipe = kind(model, model.embedding, sgd(model), **given)
    kept = {option: getattr(recipe, option) for option in defaults}
    assert kept == defaults
    assert {type(value) for value in kept.values()} <= {int, float, bool}
