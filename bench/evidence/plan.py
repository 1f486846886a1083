"""Says how each method is set up and tuned: its recipe, its search space, its controls, and the
settings of its runs.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import uegr_kernels as uk

from . import training
from .data import digest
from .runs import Call, Runs
from .training import PROTOCOL, Settings

# the final seeds are 0, 1, ...
TUNING_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Method:
    """Holds a recipe with its search space; "lr" and "dropout" belong to every space but where
    `fixed` sets them.

    parent, epochs  a control: its parent's tuned settings with `fixed` on top, for so many times
        the epochs
    """

    recipe: str
    space: dict[str, tuple] = dataclasses.field(default_factory=dict)
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "adamw"
    parent: str = ""
    epochs: float = 1.0


RATES = {"lr": (2e-3, 4e-3, 8e-3), "dropout": (0.3, 0.4, 0.5)}
# None: the checkpoint's own
PRETRAINED_RATES = {"lr": (1e-5, 2e-5, 3e-5, 5e-5), "dropout": (None, 0.1, 0.3)}
# UEGR VI-A
EPSILON = (0.01, 0.1, 0.4)
# UEGR VI-A
SELECTION = {"threshold": (0.6, 0.8, 0.95), "sharpness": (1.0, 5.0, 10.0)}
METHODS = {
    "none": Method("plain", fixed={"dropout": 0.0}),
    "dropout": Method("plain"),
    "at": Method("at", {"epsilon": EPSILON}),
    "r_drop": Method("r_drop", {"alpha": (0.1, 0.5, 1.0, 5.0)}),
    "free_lb": Method(
        "free_lb", {"adv_lr": (0.03, 0.1, 0.3), "init_mag": (0.05, 0.1, 0.4)}, {"steps": 2}
    ),
    "r_at": Method("r_at", {"epsilon": EPSILON, "alpha": (0.1, 0.5, 1.0)}),
    "r_at_su": Method(
        "r_at_su",
        {"epsilon": EPSILON, "alpha": (0.1, 0.5, 1.0), **SELECTION},
        optimizer="selective_adamw",
    ),
    "uegr": Method(
        "uegr",
        {"epsilon": EPSILON, **SELECTION},
        {"js_weight": 0.01, "passes": 2, "adaptive_dropout": True},
        "selective_adamw",
    ),
    "drop_attack": Method(
        "drop_attack", {"epsilon": (0.1, 0.44, 1.0, 5.0), "keep_probability": (0.3, 0.5, 0.7)}
    ),
    "roast": Method(
        "roast", {"epsilon": (0.01, 0.1), "threshold": (0.6, 0.9), "sharpness": (1.0, 5.0, 10.0)}
    ),
    "child_tuning_f": Method(
        "child_tuning_f", {"keep_probability": (0.2, 0.3, 0.4)}, optimizer="selective_adamw"
    ),
    "child_tuning_d": Method("child_tuning_d", {"keep_probability": (0.1, 0.2, 0.3)}),
    "l1": Method("l1", {"weight": (1e-6, 1e-5, 1e-4)}),
    "l2": Method("l2", {"weight": (1e-4, 1e-3, 1e-2)}),
    "fgsm": Method("fgsm", {"epsilon": (0.001, 0.01, 0.05)}),
    "pgd": Method("pgd", {"epsilon": EPSILON}),
    "free_at": Method("free_at", {"epsilon": EPSILON}, {"steps": 3}, epochs=1 / 3),
    "drop_attack_k": Method(
        "drop_attack_k", {"epsilon": (0.1, 0.44, 1.0, 5.0), "keep_probability": (0.3, 0.5, 0.7)}
    ),
    "adv_embed": Method("adv_embed", {"epsilon": EPSILON}),
    "sam": Method("sam", {"rho": (0.01, 0.05, 0.1)}),
    "awp": Method("awp", {"gamma": (0.005, 0.01, 0.05)}),
    "weight_consolidation": Method("weight_consolidation", {"kappa": (0.1, 1.0, 10.0)}),
    "arat": Method(
        "arat",
        {"epsilon": EPSILON, "invariance_weight": (1.0, 10.0, 30.0)},
        {"norm": "l2", "steps": 3},
    ),
    "sgd": Method("plain", {"lr": (0.03, 0.1, 0.3, 1.0)}, optimizer="sgd"),
    # Controls: the same passes without the attack, and plain training for as many passes.
    "dropout_2x": Method("plain", parent="dropout", epochs=2),
    "dropout_3x": Method("plain", parent="dropout", epochs=3),
    "at_epsilon_0": Method("at", parent="at", fixed={"epsilon": 0.0}),
    "r_at_epsilon_0": Method("r_at", parent="r_at", fixed={"epsilon": 0.0}),
    "uegr_epsilon_0": Method(
        "uegr", parent="uegr", fixed={"epsilon": 0.0}, optimizer="selective_adamw"
    ),
    "uegr_all_selected": Method(
        "uegr", parent="uegr", fixed={"normalization": "constant"}, optimizer="selective_adamw"
    ),
    "uegr_plain_dropout": Method(
        "uegr", parent="uegr", fixed={"adaptive_dropout": False}, optimizer="selective_adamw"
    ),
    "drop_attack_epsilon_0": Method("drop_attack", parent="drop_attack", fixed={"epsilon": 0.0}),
}
PAPER = (
    "none dropout at r_drop free_lb r_at r_at_su uegr drop_attack roast child_tuning_f "
    "child_tuning_d"
).split()
CONTROLS = [name for name, method in METHODS.items() if method.parent]
SELECTION_OPTIONS = (
    "threshold",
    "sharpness",
    "normalization",
    "direction",
    "target",
    "rescale",
    "keep_probability",
    "scope",
    "statistics",
)


def trials(name: str, method: Method, count: int, rates: dict[str, tuple]) -> list[dict[str, Any]]:
    """Returns `count` points of the method's space: along each option every value as often as the
    others, in an order that the name draws.
    """
    space = {
        key: values for key, values in (rates | method.space).items() if key not in method.fixed
    }
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in space.items():
        column = [values[i % len(values)] for i in range(count)]
        random.Random(f"{name} {key}").shuffle(column)
        for point, value in zip(found, column, strict=True):
            point[key] = value
    return found


def with_parents(name: str, fixed: dict[str, Any] | None = None) -> Method:
    """Returns the method with what its parent and `fixed` fix as well."""
    method = METHODS[name]
    parent = METHODS[method.parent] if method.parent else method
    return dataclasses.replace(method, fixed=parent.fixed | method.fixed | (fixed or {}))


def settings_of(method: Method, point: dict[str, Any], start: Settings) -> Settings:
    """Returns the settings of a run of the method at a point of its space."""
    values = point | method.fixed
    own = {"lr": values.pop("lr")} if "lr" in values else {}
    # rates by pass are UEGR's option
    if "dropout" in values and not isinstance(values["dropout"], list):
        own["dropout"] = values.pop("dropout")
    selection = {}
    itself = getattr(uk.recipes, method.recipe).sets_selection
    if method.optimizer.startswith("selective") and not itself:
        selection = {key: values.pop(key) for key in SELECTION_OPTIONS if key in values}
    epochs = max(1, math.ceil(start.epochs * method.epochs))
    return dataclasses.replace(
        start,
        method=method.recipe,
        options=values,
        optimizer=method.optimizer,
        selection=selection,
        epochs=epochs,
        **own,
    )


class MethodRuns(Runs[Settings]):
    """Holds the runs of the methods on some sets of a folder."""

    protocol = PROTOCOL

    def __init__(
        self,
        folder: pathlib.Path,
        sets: Sequence[str],
        output: pathlib.Path,
        jobs: int,
        threads: int,
        command: str,
    ) -> None:
        self.folder = folder
        self.digests = {name: digest(folder, name) for name in sets}
        super().__init__(output / "runs.jsonl", jobs, threads, command)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.about |= {"command": command, "device": device, "jobs": jobs}

    def is_ours(self, record: dict[str, Any]) -> bool:
        """Returns whether a record is of these texts, and of no others by their name."""
        own = self.digests.get(record["settings"]["data"], "")
        return record.get("digest", "") in ("", own)

    def settings_in(self, record: dict[str, Any]) -> Settings:
        """Returns the settings of a record: without a protocol they are of the first, and UEGR's
        without the option are older than it and had plain dropout.
        """
        settings = Settings(**{"protocol": 1} | record["settings"])
        if settings.method == "uegr":
            options = {"adaptive_dropout": False} | settings.options
            settings = dataclasses.replace(settings, options=options)
        return settings

    def key_of(self, run: Settings) -> str:
        """Returns what tells a run from others: what is at its default does not count, so that a
        new setting leaves old runs known, but for the seed and the protocol.
        """
        defaults = Settings("", "", "", 0)
        values = {field.name: getattr(run, field.name) for field in dataclasses.fields(Settings)}
        return json.dumps(
            {
                name: value
                for name, value in values.items()
                if name in ("seed", "protocol") or _list(value) != _list(getattr(defaults, name))
            },
            sort_keys=True,
        )

    def call_of(self, run: Settings, checkpoint: pathlib.Path) -> Call:
        """Returns how a run is made."""
        return Call(figures, run, (self.folder, checkpoint))

    def name_of(self, run: Settings) -> str:
        """Returns a few words that name a run."""
        return f"{run.data} {run.model} {run.method}"

    def facts_of(self, run: Settings) -> dict[str, Any]:
        """Returns which texts a run is of."""
        return {"digest": self.digests[run.data]}


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def figures(settings: Settings, folder: pathlib.Path, checkpoint: pathlib.Path) -> dict[str, Any]:
    """Makes a run and returns its figures."""
    return training.run(settings, folder, checkpoint)[0]


class TuningPlan:
    """Tunes the methods, and says with which settings each of their runs is made."""

    def __init__(self, options: argparse.Namespace, runs: MethodRuns) -> None:
        self.options, self.runs = options, runs
        self.points: dict[tuple[str, str, str], dict[str, Any]] = {}

    def start(self, name: str, model: str, **changes: Any) -> Settings:
        """Returns the settings of plain training on a set, at the sizes of the options."""
        given = self.options
        names = ("epochs", "examples", "length", "attacked", "shifted", "adversarial", "ood")
        sizes = {name: getattr(given, name) for name in names}
        return Settings(
            name, model, "plain", **{"seed": 0, "protocol": self.runs.protocol} | sizes | changes
        )

    def rates(self, model: str) -> dict[str, tuple]:
        """Returns the learning rates and dropout rates that are tried for a model."""
        rates = PRETRAINED_RATES if model.startswith("hf:") else RATES
        return rates | ({"lr": self.options.lr} if self.options.lr else {})

    def tune(self, names: Iterable[str], sets: list[str], models: list[str]) -> None:
        """Settles each method's point by the validation score of one run each."""
        tried: dict[tuple[str, str, str], list[tuple[dict, Settings]]] = {}
        for name in dict.fromkeys(METHODS[name].parent or name for name in names):
            for data in sets:
                for model in models:
                    start = self.start(
                        data,
                        model,
                        seed=TUNING_SEED,
                        final=False,
                        attacked=0,
                        shifted=(),
                        adversarial=(),
                        ood=(),
                    )
                    points = trials(name, METHODS[name], self.options.trials, self.rates(model))
                    tried[name, data, model] = [
                        (point, settings_of(METHODS[name], point, start)) for point in points
                    ]
        self.runs.finish((settings for found in tried.values() for _, settings in found), "tuning")
        for key, found in tried.items():
            self.points[key] = max(found, key=lambda pair: self.runs[pair[1]]["validation"])[0]

    def settings(
        self,
        name: str,
        data: str,
        model: str,
        seed: int,
        fixed: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Settings:
        """Returns the settings of a final run at the method's tuned point."""
        point = self.points[METHODS[name].parent or name, data, model]
        return settings_of(
            with_parents(name, fixed), point, self.start(data, model, seed=seed, **changes)
        )

    def first(self) -> tuple[str, str]:
        """Returns the first set and the first model, of which all but the main study are."""
        return self.options.sets[0], self.options.models[0]
