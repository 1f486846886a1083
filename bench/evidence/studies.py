"""Says what each study of the methods is made of: its runs, their report, and the methods whose
tuned points it rests on.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import report
from .data import read
from .plan import EPSILON, METHODS, Method, TuningPlan, settings_of
from .report import BASE, Found
from .training import Settings, held_of

SIZES = (100, 300, 1000, 3000)
# rates of the dropout study
GRID = (0.1, 0.3, 0.5, 0.7)
# settings by what tells them apart; the seed stands last
Planned = dict[tuple, Settings]


def main(plan: TuningPlan) -> Planned:
    """Plans every method, on every set and model."""
    each = plan.options
    return {
        (model, data, name, seed): plan.settings(name, data, model, seed)
        for model in each.models
        for data in each.sets
        for name in each.methods
        for seed in range(each.seeds)
    }


def passes(plan: TuningPlan) -> Planned:
    """Plans UEGR with 2 to 5 adversarial passes."""
    return {
        (m, seed): plan.settings(
            "uegr", plan.options.sets[0], plan.options.models[0], seed, {"passes": m}
        )
        for m in range(2, 6)
        for seed in range(min(3, plan.options.seeds))
    }


def dropout(plan: TuningPlan) -> Planned:
    """Plans UEGR with each pair of rates of the grid."""
    return {
        (first, second, seed): plan.settings(
            "uegr", *plan.first(), seed, {"dropout": [first, second]}
        )
        for first in GRID
        for second in GRID
        for seed in range(1)
    }


def size(plan: TuningPlan) -> Planned:
    """Plans three methods on training sets of several sizes."""
    rows = len(read(plan.options.data, plan.options.sets[0]).train)
    largest = rows - held_of(rows)
    return {
        (name, size, seed): plan.settings(name, *plan.first(), seed, examples=size)
        for name in ("dropout", "drop_attack", "uegr")
        for size in SIZES
        if size <= largest
        for seed in range(min(3, plan.options.seeds))
    }


def drop_attack(plan: TuningPlan) -> Planned:
    """Plans DropAttack at several epsilons and shares of attacked elements."""
    return {
        (epsilon, p, seed): plan.settings(
            "drop_attack", *plan.first(), seed, {"epsilon": epsilon, "keep_probability": p}
        )
        for epsilon in (0.0, 0.1, 1.0, 5.0)
        for p in (0.3, 0.7, 1.0)
        for seed in range(min(2, plan.options.seeds))
    }


def epsilon(plan: TuningPlan) -> Planned:
    """Plans the attacking methods at one learning rate and one epsilon after the other, their
    other options at their defaults.
    """
    data, model = plan.first()
    point = plan.points[BASE, data, model]
    return {
        (name, epsilon, seed): settings_of(
            METHODS[name], point | {"epsilon": epsilon}, plan.start(data, model, seed=seed)
        )
        for name in ("at", "r_at", "r_at_su", "uegr", "drop_attack")
        for epsilon in (0.0, *EPSILON, 1.0)
        for seed in range(min(3, plan.options.seeds))
    }


def selection(plan: TuningPlan) -> Planned:
    """Plans plain training under every variant of the selection."""
    data, model = plan.first()
    found = {}
    for kind in ("adamw", "sgd"):
        point = plan.points["dropout" if kind == "adamw" else "sgd", data, model]
        for variant in variants():
            method = Method("plain", fixed=variant, optimizer=f"selective_{kind}")
            for seed in range(min(2, plan.options.seeds)):
                found[kind, json.dumps(variant), seed] = settings_of(
                    method, point, plan.start(data, model, seed=seed)
                )
    return found


def variants() -> Iterator[dict[str, Any]]:
    """Yields the selection options to compare."""
    # nothing is left out: what the others are held against
    yield {"normalization": "constant", "keep_probability": 1.0}
    for rescale in (True, False):
        for target in ("gradient", "update"):
            yield {
                "normalization": "constant",
                "keep_probability": 0.3,
                "target": target,
                "rescale": rescale,
            }
            for normalization in ("minmax", "range", "rank"):
                for direction in ("printed", "salient"):
                    yield {
                        "normalization": normalization,
                        "direction": direction,
                        "target": target,
                        "rescale": rescale,
                    }


class Study(NamedTuple):
    """Holds a study of the first set and model: what tells its runs, and how they are reported."""

    title: str
    runs: Callable[[TuningPlan], Planned]
    describe: Callable[[Found, pathlib.Path], str]
    rests_on: tuple[str, ...]


STUDIES = {
    "passes": Study(
        "The number of adversarial passes (UEGR Table V)", passes, report.passes, ("uegr",)
    ),
    "dropout": Study(
        "Two dropout rates, one for each adversarial pass (UEGR Fig. 3)",
        dropout,
        report.dropout,
        ("uegr",),
    ),
    "size": Study(
        "The size of the training set (DropAttack Table 3)",
        size,
        report.size,
        ("dropout", "drop_attack", "uegr"),
    ),
    "epsilon": Study(
        "Epsilon in training: one learning rate, the other options at their defaults",
        epsilon,
        report.epsilon,
        (BASE,),
    ),
    "selection": Study(
        "Selection variants: the loss alone (no attack), one learning rate for each optimizer",
        selection,
        report.selection,
        ("dropout", "sgd"),
    ),
    "drop_attack": Study(
        "DropAttack's epsilon and p (its Table 10)",
        drop_attack,
        report.drop_attack,
        ("drop_attack",),
    ),
}
NAMES = ("main", *STUDIES, "cost")
