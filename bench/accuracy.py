"""Every method on real text: accuracy, accuracy under attack, cost (`python -m bench.accuracy
--data DIR`).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm

import uegr_kernels as uk
from uegr_kernels.models import MODELS

from . import accuracy_report, harness, jobs, machine, training
from .accuracy_report import BASE
from .evidence import pretrained
from .training import DataError, Settings

RESULTS = pathlib.Path(__file__).parent / "results" / "accuracy"
TUNING_SEED = 1000  # the final seeds are 0, 1, ...


@dataclasses.dataclass(frozen=True)
class Method:
    """A recipe with its search space; "lr" and "dropout" belong to every space but where `fixed`
    sets them.

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
EPSILON = (0.01, 0.1, 0.4)  # UEGR VI-A
SELECTION = {"threshold": (0.6, 0.8, 0.95), "sharpness": (1.0, 5.0, 10.0)}  # UEGR VI-A
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
STUDIES = ("main", *accuracy_report.DESCRIBE, "cost")
SIZES = (100, 300, 1000, 3000)
GRID = (0.1, 0.3, 0.5, 0.7)  # rates of the dropout study
# whose tuned points
RESTS_ON = {study: ("uegr",) for study in ("passes", "dropout")} | {
    "size": ("dropout", "drop_attack", "uegr")
}
RESTS_ON |= {"epsilon": (BASE,), "drop_attack": ("drop_attack",), "selection": ("dropout", "sgd")}
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
    """`count` points of the method's space: along each option every value as often as the
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
    """The method with what its parent and `fixed` fix as well."""
    method = METHODS[name]
    parent = METHODS[method.parent] if method.parent else method
    return dataclasses.replace(method, fixed=parent.fixed | method.fixed | (fixed or {}))


def settings_of(method: Method, point: dict[str, Any], start: Settings) -> Settings:
    """The settings of a run of the method at a point of its space."""
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


class Runs:
    """What has been run, in a file of JSON lines; what has not is trained, in `jobs` processes."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.data, self.jobs, self.threads, self.path = (
            options.data,
            options.jobs,
            options.threads,
            options.output / "runs.jsonl",
        )
        self.digests = {name: training.digest(options.data, name) for name in options.sets}
        self.done = {}
        for line in training.whole_lines(self.path):
            # else of other texts by that name
            if line.get("digest", "") in ("", self.digests.get(line["settings"]["data"], "")):
                self.done[key_of(settings_in(line))] = line
        here = harness.environment(command)
        self.about = {
            "command": command,
            "commit": here["commit"],
            "cpu": here["machine"]["cpu"],
            "torch": here["versions"]["torch"],
        }
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.about |= {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "jobs": options.jobs,
        }

    def __getitem__(self, settings: Settings) -> dict[str, Any]:
        found: dict[str, Any] = self.done[key_of(settings)]["result"]
        return found

    def __contains__(self, settings: Settings) -> bool:
        return key_of(settings) in self.done

    def finish(self, wanted: Iterable[Settings], what: str) -> None:
        """Trains what is missing; a line is written as soon as its run ends."""
        missing = list(
            {key_of(settings): settings for settings in wanted if settings not in self}.values()
        )
        if not missing:
            return
        checkpoints = self.path.parent / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        bar = tqdm(
            total=len(missing), desc=what, unit="run", mininterval=1 if sys.stderr.isatty() else 60
        )
        for settings, result in jobs.results(
            figures, [(one, self.data, checkpoints) for one in missing], self.jobs, self.threads
        ):
            self._keep(settings, result)
            bar.set_postfix_str(
                f"{settings.data} {settings.model} {settings.method}", refresh=False
            )
            bar.update()
        bar.close()
        with contextlib.suppress(OSError):  # another command may have runs there
            checkpoints.rmdir()

    def _keep(self, settings: Settings, result: dict[str, Any]) -> None:
        line = {
            "settings": dataclasses.asdict(settings),
            "result": result,
            "digest": self.digests[settings.data],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.done[key_of(settings)] = line | self.about
        with self.path.open("a") as file:
            file.write(json.dumps(line | self.about) + "\n")


def settings_in(line: dict[str, Any]) -> Settings:
    """The settings of a run on file; UEGR's without the option are older, and had plain dropout."""
    settings = Settings(**line["settings"])
    if settings.method == "uegr":
        settings = dataclasses.replace(
            settings, options={"adaptive_dropout": False} | settings.options
        )
    return settings


def key_of(settings: Settings) -> str:
    """What tells a run from others; what is at its default does not count, so that a new
    setting leaves old runs known.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    defaults = dataclasses.asdict(Settings("", "", "", 0))
    return json.dumps(
        {
            name: value
            for name, value in values.items()
            if name == "seed" or list_of(value) != list_of(defaults[name])
        },
        sort_keys=True,
    )


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def figures(settings: Settings, folder: pathlib.Path, checkpoints: pathlib.Path) -> dict[str, Any]:
    """A run in a process of its own; floats to six digits."""
    result, _ = training.run(settings, folder, jobs.checkpoint(checkpoints, key_of(settings)))
    return {key: _rounded(value) for key, value in result.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


# What to run


class Plan:
    """The runs that the options ask for, and the tuning that they rest on."""

    def __init__(self, options: argparse.Namespace, runs: Runs) -> None:
        self.options, self.runs = options, runs
        self.points: dict[tuple[str, str, str], dict[str, Any]] = {}

    def start(self, name: str, model: str, **changes: Any) -> Settings:
        given = self.options
        names = ("epochs", "examples", "length", "attacked", "shifted", "adversarial", "ood")
        sizes = {name: getattr(given, name) for name in names}
        return Settings(name, model, "plain", **{"seed": 0} | sizes | changes)

    def rates(self, model: str) -> dict[str, tuple]:
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
        point = self.points[METHODS[name].parent or name, data, model]
        return settings_of(
            with_parents(name, fixed), point, self.start(data, model, seed=seed, **changes)
        )

    def main(self) -> dict[tuple, Settings]:
        each = self.options
        return {
            (model, data, name, seed): self.settings(name, data, model, seed)
            for model in each.models
            for data in each.sets
            for name in each.methods
            for seed in range(each.seeds)
        }

    def passes(self) -> dict[tuple, Settings]:
        return {
            (m, seed): self.settings(
                "uegr", self.options.sets[0], self.options.models[0], seed, {"passes": m}
            )
            for m in range(2, 6)
            for seed in range(min(3, self.options.seeds))
        }

    def dropout(self) -> dict[tuple, Settings]:
        return {
            (first, second, seed): self.settings(
                "uegr", *self._first(), seed, {"dropout": [first, second]}
            )
            for first in GRID
            for second in GRID
            for seed in range(1)
        }

    def size(self) -> dict[tuple, Settings]:
        rows = len(training.read(self.options.data, self.options.sets[0]).train)
        largest = rows - training.held_of(rows)
        return {
            (name, size, seed): self.settings(name, *self._first(), seed, examples=size)
            for name in ("dropout", "drop_attack", "uegr")
            for size in SIZES
            if size <= largest
            for seed in range(min(3, self.options.seeds))
        }

    def drop_attack(self) -> dict[tuple, Settings]:
        return {
            (epsilon, p, seed): self.settings(
                "drop_attack", *self._first(), seed, {"epsilon": epsilon, "keep_probability": p}
            )
            for epsilon in (0.0, 0.1, 1.0, 5.0)
            for p in (0.3, 0.7, 1.0)
            for seed in range(min(2, self.options.seeds))
        }

    def epsilon(self) -> dict[tuple, Settings]:
        """The attacking methods at one learning rate and one epsilon after the other, their
        other options at their defaults.
        """
        data, model = self._first()
        point = self.points[BASE, data, model]
        return {
            (name, epsilon, seed): settings_of(
                METHODS[name], point | {"epsilon": epsilon}, self.start(data, model, seed=seed)
            )
            for name in ("at", "r_at", "r_at_su", "uegr", "drop_attack")
            for epsilon in (0.0, *EPSILON, 1.0)
            for seed in range(min(3, self.options.seeds))
        }

    def selection(self) -> dict[tuple, Settings]:
        data, model = self._first()
        found = {}
        for kind in ("adamw", "sgd"):
            point = self.points["dropout" if kind == "adamw" else "sgd", data, model]
            for variant in variants():
                method = Method("plain", fixed=variant, optimizer=f"selective_{kind}")
                for seed in range(min(2, self.options.seeds)):
                    found[kind, json.dumps(variant), seed] = settings_of(
                        method, point, self.start(data, model, seed=seed)
                    )
        return found

    def _first(self) -> tuple[str, str]:
        return self.options.sets[0], self.options.models[0]


def variants() -> Iterator[dict[str, Any]]:
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


# The command


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def parser() -> argparse.ArgumentParser:
    def names(known: Iterable[str], **others: str) -> Callable[[str], list[str]]:
        """Some of the known ones, as the papers write them too: R-Drop is r_drop."""
        short = others | {_letters(name): name for name in known}

        def chosen(text: str) -> list[str]:
            found = [
                name
                if name.startswith("hf:") and known is MODELS
                else short.get(_letters(name), "")
                for name in text.split(",")
            ]
            if "" in found and text != "all":
                raise argparse.ArgumentTypeError(
                    f"{text.split(',')[found.index('')]!r} is none of {', '.join(known)}"
                )
            return list(known) if text == "all" else found

        return chosen

    def rates(text: str) -> tuple[float, ...]:
        found = tuple(map(float, text.split(",")))
        if not all(0 < rate < math.inf for rate in found):
            raise argparse.ArgumentTypeError(f"{text} holds what is no positive number")
        return found

    def some(text: str) -> int:
        if int(text) < 0:
            raise argparse.ArgumentTypeError(f"{text} is less than 0")
        return int(text)

    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return int(text)

    top = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description="Trains and evaluates every method on real text.",
    )
    top.add_argument(
        "--data",
        metavar="DIR",
        type=pathlib.Path,
        required=True,
        help="folders NAME/train.tsv.gz, NAME/test.tsv.gz, or GLUE's",
    )
    top.add_argument(
        "--sets",
        metavar="LIST",
        type=lambda text: text.split(","),
        help="names in DIR; default: all that are classifications",
    )
    top.add_argument(
        "--methods",
        metavar="LIST",
        type=names(METHODS, plain=BASE),
        default=[*PAPER, *CONTROLS],
        help=f"all, or some of {','.join(METHODS)}",
    )
    top.add_argument(
        *("--models", "--model"),
        metavar="LIST",
        type=names(MODELS),
        default=list(MODELS),
        help=f"all, or some of {','.join(MODELS)}, hf:PATH",
    )
    top.add_argument(
        "--studies",
        metavar="LIST",
        type=names(STUDIES),
        default=["main"],
        help=f"all, or some of {','.join(STUDIES)}",
    )
    top.add_argument("--seeds", metavar="N", type=count, default=5)
    top.add_argument(
        "--examples",
        metavar="N",
        type=some,
        default=1000,
        help="to train on, drawn anew for every seed; 0: all; default 1000",
    )
    top.add_argument("--epochs", metavar="N", type=count, default=6)
    top.add_argument(
        "--length", metavar="N", type=count, default=64, help="words (tokens) of a text at most"
    )
    top.add_argument(
        "--attacked",
        metavar="N",
        type=some,
        default=200,
        help="test texts under attack; default 200",
    )
    for name, what in (
        ("shifted", "accuracy"),
        ("adversarial", "accuracy"),
        ("ood", "AUROC of telling their texts from the set's own"),
    ):
        top.add_argument(
            f"--{name}",
            metavar="LIST",
            type=lambda text: text.split(","),
            default=[],
            help=f"other sets in DIR: {what}",
        )
    top.add_argument(
        "--trials",
        metavar="N",
        type=count,
        default=6,
        help="runs by which each method is tuned on each set; default 6",
    )
    top.add_argument("--lr", metavar="LIST", type=rates, help="learning rates to tune over")
    top.add_argument("--jobs", metavar="N", type=count, default=1, help="runs at a time")
    top.add_argument(
        "--threads",
        metavar="N",
        type=count,
        default=1,
        help="of a run; more pay for large models on an idle machine",
    )
    top.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=120,
        help="for a busy machine to calm down before the cost is timed",
    )
    top.add_argument(
        "--output",
        metavar="DIR",
        type=pathlib.Path,
        default=RESULTS,
        help="default: bench/results/accuracy",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for wrong arguments or data, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "bench.accuracy", *arguments])
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--model", "--models")
    given, others = which.parse_known_args(arguments)
    if given.model == "minilm":
        return pretrained.main(others)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its workers end with it
    try:
        options = parser().parse_args(arguments)
        there = training.sets_in(options.data)
        if options.sets is None:
            options.sets = [
                name for name in there if training.read(options.data, name).metric != "correlation"
            ]
        if not options.sets:
            raise DataError(
                f"--data {options.data}: only regressions ({', '.join(there)}); name "
                "them with --sets"
            )
        for name in options.sets:
            training.check(options.data, name, [*options.shifted, *options.adversarial])
        if BASE not in options.methods:
            options.methods = [BASE, *options.methods]
        options.output.mkdir(parents=True, exist_ok=True)
        run(options, command)
    except (DataError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. What is finished is kept; go on with\n  {command}", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Runs what is missing of every study, and writes its table and pictures as soon as it is
    whole.
    """
    runs, output = Runs(options, command), options.output
    plan = Plan(options, runs)
    plan.tune(options.methods, options.sets, options.models)
    first_set, first_model = options.sets[:1], options.models[:1]
    sections = {}
    for study in options.studies:
        plan.tune(RESTS_ON.get(study, ()), first_set, first_model)
        points = (
            json.loads((output / "points.json").read_text())
            if (output / "points.json").exists()
            else {}
        )
        points |= {" ".join(key): point for key, point in plan.points.items()}
        (output / "points.json").write_text(json.dumps(points, indent=1) + "\n")
        if study == "cost":
            measure_cost(plan, command, output)
            continue
        wanted = getattr(plan, study)()
        runs.finish(wanted.values(), study)
        found = {key: runs[settings] for key, settings in wanted.items()}
        if study == "main":
            sections[study] = accuracy_report.describe_main(found, output)
            (output / "summary.json").write_text(
                json.dumps(accuracy_report.means(found), indent=1) + "\n"
            )
            main_found = found
        else:
            title, describe = accuracy_report.DESCRIBE[study]
            sections[study] = (
                f"### {title}: {first_set[0]}, {first_model[0]}\n\n{describe(found, output)}"
            )
        (output / f"{study}.md").write_text(
            f"{sections[study]}\n\n{origin(runs, options, command)}\n"
        )
        written = [
            path.read_text().strip()
            for path in (output / f"{each}.md" for each in STUDIES)
            if path.exists()
        ]
        (output / "README.md").write_text(
            "\n\n".join(["# Accuracy, robustness and cost on real text", *written]) + "\n"
        )
    cost = {line["case"]: line for line in harness.read(output / "cost.jsonl")}
    if "main" in sections:
        (output / "summary.md").write_text(
            accuracy_report.summary(main_found, cost)
            + "\n\n"
            + origin(runs, options, command)
            + "\n"
        )
    print("\n\n".join(sections.values()))
    print(f"\nWritten: {output}")


def origin(runs: Runs, options: argparse.Namespace, command: str) -> str:
    """How the figures came about, in a paragraph."""
    commits = sorted({str(line["commit"]) for line in runs.done.values()})
    examples = f"{options.examples:,} texts" if options.examples else "all texts"
    return (
        f"`{command}`: {examples} to train on, drawn anew for each of {options.seeds} seeds and "
        "the same for every method; "
        f"{options.epochs} epochs, batch 16, AdamW with weight decay {training.WEIGHT_DECAY}, "
        f"warm-up {training.WARM_UP}, linear decay; "
        f"{options.trials} tuning runs for every method, model and set on up to "
        f"{training.VALIDATION:,} other texts of the training set, "
        f"by which the best epoch is chosen too; "
        f"{options.attacked} test texts under attack, the whole test set otherwise. "
        f"{runs.about['cpu']}, {runs.about['device']}, torch {runs.about['torch']}; commit "
        f"{', '.join(commits)}."
    )


def measure_cost(plan: Plan, command: str, output: pathlib.Path) -> None:
    """A training step of every method beside the base's, taking turns, on the first set and
    model.
    """
    data, model = plan.options.sets[0], plan.options.models[0]

    def stepping(name: str) -> Callable[[], object]:
        return training.stepper(plan.settings(name, data, model, 0), plan.options.data)

    names = [name for name in plan.options.methods if not METHODS[name].parent and name != BASE]
    path = output / "cost.jsonl"
    if warning := machine.wait_until_quiet(plan.options.wait):
        print(f"warning: {warning}", file=sys.stderr)
    about = harness.environment(command)
    copy = machine.Copy(2**26)
    with tqdm(total=20 * len(names), desc="cost", unit="round") as bar:
        for name in names:
            both = [harness.Contestant(each, stepping(each)) for each in (name, BASE)]
            facts = {"data": data, "model": model}
            case = harness.Case(
                name,
                facts,
                2**30,
                lambda: None,
                lambda both=both: both,
                threads=plan.options.threads,
            )
            line = harness.measure(case, 20, copy, bar.update)
            harness.keep(
                path,
                about | {"warning": warning} | line | line["contestants"][1]["ours_over_this"],
                list(METHODS),
            )


if __name__ == "__main__":
    sys.exit(main())
