"""Runs every method on a pre-trained language model: `python -m bench.accuracy --model minilm`;
plan.md says what is asked.

A run's key is all of its settings, the protocol's number among them.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import uegr_kernels as uk
from uegr_kernels.finetune import measures
from uegr_kernels.finetune.classifiers import Classifier, Pretrained, source_of
from uegr_kernels.finetune.data import UserError
from uegr_kernels.finetune.measures import STRENGTHS, TYPOS
from uegr_kernels.finetune.tables import Example

from .. import harness
from . import data as sets
from . import training
from .data import Row
from .runs import Call, Runs, refused, stopped

# Changes so far of what a model is scored on, and how; with training's protocol it makes a run's.
SCORING = 0
PROTOCOL = training.PROTOCOL + SCORING
RESULTS = harness.ROOT / "bench" / "results" / "pretrained"
# the final seeds are 0, 1, ...
TUNING_SEED = 1000
# of the norm of a text's embeddings; of the weights
EPSILON, RHO = (0.01, 0.025, 0.05), (0.01, 0.05, 0.1)
# of the strengths of attacks, the one by which epsilon is chosen
MIDDLE = 1
# sets that a model of this one is scored on too, with the tokens of a text at most
FURTHER = {
    "sst2": {"advglue-sst2": 64, "cad-imdb-original": 256, "cad-imdb": 256},
    "nli": {"cad-nli": 64, "advglue-nli": 64},
}


@dataclasses.dataclass(frozen=True)
class Method:
    """Holds a recipe with what is fixed, and the name and values of the one option that is tuned.

    of        a control: the points of that method
    share_of  its keep_probability is the share that this method selected in its tuning run
    """

    recipe: str
    tuned: str = ""
    values: tuple[float, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    # None: torch's AdamW
    selection: dict[str, Any] | None = None
    of: str = ""
    share_of: str = ""
    # the epochs
    times: int = 1

    @property
    def passes(self) -> int:
        """Returns the forwards and backwards of a step."""
        return uk.recipes.RECIPES[self.recipe].passes


def _uegr(**changes: Any) -> Method:
    common = {
        "tuned": "epsilon",
        "values": EPSILON,
        "options": RELATIVE,
        "selection": {},
        "of": "uegr",
    }
    return Method("uegr", **common | changes)


RELATIVE = {"relative": True}
RANK = {"normalization": "rank", "direction": "salient"}
METHODS = {
    "plain": Method("plain"),
    "plain_as_many_passes": Method("plain", of="plain", times=3),
    "at": Method("at", "epsilon", EPSILON, RELATIVE),
    "r_at_su": Method("r_at_su", "epsilon", EPSILON, RELATIVE, {}),
    "uegr": _uegr(of=""),
    "uegr_all_selected": _uegr(selection={"normalization": "constant"}),
    "uegr_constant_same_share": _uegr(selection={"normalization": "constant"}, share_of="uegr"),
    "uegr_plain_dropout": _uegr(options=RELATIVE | {"adaptive_dropout": False}),
    "free_lb": Method("free_lb", "adv_lr", EPSILON, RELATIVE),
    "r_drop": Method("r_drop"),
    "r_at": Method("r_at", "epsilon", EPSILON, RELATIVE),
    "roast": Method("roast", "epsilon", EPSILON, RELATIVE),
    "drop_attack": Method("drop_attack", "epsilon", EPSILON, RELATIVE),
    "child_tuning_f": Method("child_tuning_f", selection={}),
    "child_tuning_d": Method("child_tuning_d"),
    "sam": Method("sam", "rho", RHO),
    "uegr_rank_salient": _uegr(selection=RANK),
    "uegr_static_mask": _uegr(
        selection={"normalization": "constant"}, share_of="uegr_rank_salient"
    ),
}
# one mask for the whole run
STATIC = "uegr_static_mask"
TIERS = {
    1: (tuple(METHODS)[:8], ("sst2",), 5),
    2: (tuple(METHODS)[:8], ("nli",), 5),
    3: (tuple(METHODS)[8:], ("sst2", "nli"), 3),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds all that a run's outcomes depend on, beside the code that its protocol stands for.

    value   of the option that is tuned, or None
    share   keep_probability of a control that selects at random, or None
    final   on the test sets; else a tuning run, on the texts held out of the training set
    """

    data: str
    method: str
    seed: int
    value: float | None = None
    share: float | None = None
    final: bool = True
    model: str = "minilm"
    examples: int = 1000
    held: int = 400
    epochs: int = 2
    batch: int = 16
    lr: float = 5e-5
    length: int = 64
    attacked: int = 100
    mistyped: int = 500
    # texts of each test set; 0: all
    tested: int = 0
    protocol: int = PROTOCOL

    @property
    def key(self) -> str:
        """Returns what tells a run from others."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def settings(self) -> training.Settings:
        """Returns how it is trained."""
        method = METHODS[self.method]
        options = dict(method.options) | ({} if self.value is None else {method.tuned: self.value})
        selection = dict(method.selection or {})
        if self.share is not None:
            selection["keep_probability"] = self.share
        optimizer = "adamw" if method.selection is None else "selective_adamw"
        # the recipe masks .grad ahead of torch's AdamW
        if self.method == STATIC:
            options, selection, optimizer = options | selection, {}, "adamw"
        return training.Settings(
            data=self.data,
            model=f"hf:{source_of(self.model)}",
            method=method.recipe,
            seed=self.seed,
            options=options,
            optimizer=optimizer,
            selection=selection,
            lr=self.lr,
            dropout=None,
            epochs=self.epochs * method.times,
            examples=self.examples,
            length=self.length,
            batch=self.batch,
            final=False,
            attacked=0,
        )


# One run


def outcomes(run: Run, folder: pathlib.Path, checkpoint: pathlib.Path) -> dict[str, Any]:
    """Trains the model of a run and returns its figures; what each text came to is a string of
    0 and 1.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings, data = run.settings, sets.read(folder, run.data)
    torch.manual_seed(run.seed)
    start = training.new_start(settings, data)
    start = start._replace(held=start.held[: run.held])
    watch = _one_mask if run.method == STATIC else None
    figures, classifier = training.run(settings, folder, checkpoint, start=start, stepped=watch)
    found = {
        key: figures[key]
        for key in ("validation", "best_epoch", "steps", "processor_seconds_per_step")
    }
    found |= {key: figures[key] for key in ("share", "largest_inverse")} | {
        "passes": METHODS[run.method].passes
    }
    attacked = functools.partial(_right_under, classifier, data.labels)
    if not run.final:
        middle = STRENGTHS[MIDDLE : MIDDLE + 1]
        return found | {"pgd": attacked("pgd", middle, start.held[: run.attacked])}

    def clean(examples: Sequence[Example], length: int = run.length) -> tuple[Tensor, Tensor]:
        reader = Pretrained(classifier.model, classifier.tokenizer, length)
        expected = measures.numbers(examples, data.labels)
        return measures.logits_of(reader, examples), torch.tensor(expected)

    def right(logits: Tensor, expected: Tensor) -> str:
        return digits(logits.argmax(1) == expected)

    test = training.examples_of(data.test)
    logits, expected = clean(test[: run.tested or None])
    error = uk.analysis.calibration_error(logits, expected)
    found |= {"clean": right(logits, expected), "calibration_error": error}
    for attack in ("fgm", "pgd"):
        found[attack] = attacked(attack, STRENGTHS, data.test[: run.attacked])
    for rate in TYPOS:
        found[f"typos {rate:g}"] = right(*clean(measures.mistyped(test[: run.mistyped], rate)))
    for name, length in FURTHER.get(run.data, {}).items():
        rows = sets.read_test(folder, name)[: run.tested or None]
        found[name] = right(*clean(training.examples_of(rows), length))
    return found


def _right_under(
    classifier: Classifier,
    labels: list[str],
    attack: str,
    strengths: Sequence[float],
    rows: Sequence[Row],
) -> list[str]:
    """Returns for each strength which texts are right, as a string of 0 and 1."""
    examples = training.examples_of(rows)
    found = measures.predicted_under(classifier, attack, strengths, examples, labels)
    expected = torch.tensor(measures.numbers(examples, labels))
    return [digits(each == expected) for each in found]


def _one_mask(recipe: Any) -> None:
    """Makes the next step draw the first one's mask."""
    recipe.selection = recipe.selection | {"step": 0}


def digits(right: Tensor) -> str:
    """Returns which texts are right as a string of 0 and 1."""
    return "".join("01"[int(each)] for each in right)


def share_right(outcome: str) -> float:
    """Returns the accuracy of a string of 0 and 1."""
    return outcome.count("1") / len(outcome)


# Many


class PretrainedRuns(Runs[Run]):
    """Holds the runs on the pre-trained model, in a folder."""

    def __init__(
        self,
        folder: pathlib.Path,
        output: pathlib.Path,
        jobs: int,
        command: str,
        protocol: int = PROTOCOL,
    ) -> None:
        self.folder, self.protocol = folder, protocol
        super().__init__(output / "runs.jsonl", jobs, 1, command)

    def settings_in(self, record: dict[str, Any]) -> Run:
        """Returns the run that a record is of."""
        return Run(**record["settings"])

    def key_of(self, run: Run) -> str:
        """Returns what tells a run from others: all of its settings."""
        return run.key

    def call_of(self, run: Run, checkpoint: pathlib.Path) -> Call:
        """Returns how a run is made."""
        return Call(outcomes, run, (self.folder, checkpoint))

    def name_of(self, run: Run) -> str:
        """Returns a few words that name a run."""
        return f"{run.data} {run.method} {run.seed}"


class TierPlan:
    """Says which runs a tier is made of: the tuning first, then the final runs at the points that
    it chose.
    """

    def __init__(self, runs: PretrainedRuns, changes: dict[str, Any]) -> None:
        self.runs, self.changes = runs, changes

    def tuning(self, data: str, name: str) -> list[Run]:
        """Returns the tuning runs of a method that has points of its own."""
        values = METHODS[name].values
        return [
            Run(data, name, TUNING_SEED, value, final=False, **self.changes) for value in values
        ]

    def sources(self, name: str) -> list[str]:
        """Returns the methods whose tuning runs a method rests on."""
        source = METHODS[name].of or name
        return [source] if METHODS[source].values else []

    def points(self, data: str, name: str) -> dict[str, float | None]:
        """Returns the values chosen for clean accuracy and for accuracy under PGD, by their
        names, "clean" and "pgd".
        """
        if not self.sources(name):
            return {"clean": None, "pgd": None}
        tried = self.tuning(data, *self.sources(name))
        scores: dict[str, Callable[[Run], float]] = {
            "clean": lambda run: float(self.runs[run]["validation"]),
            "pgd": lambda run: share_right(self.runs[run]["pgd"][0]),
        }
        return {kind: max(tried, key=score).value for kind, score in scores.items()}

    def share_runs(self, data: str, name: str) -> list[Run]:
        """Returns the tuning runs whose shares a control selects at random, at its points."""
        whose = METHODS[name].share_of
        values = dict.fromkeys(self.points(data, name).values()) if whose else ()
        return [
            Run(data, whose, TUNING_SEED, value, final=False, **self.changes) for value in values
        ]

    def finals(self, data: str, name: str, seeds: int) -> dict[str, list[Run]]:
        """Returns the runs at a method's points: "clean", "pgd", or "both" where they are one."""
        points = self.points(data, name)
        shares = {run.value: self.runs[run]["share"] for run in self.share_runs(data, name)}
        kinds = {"both": points["pgd"]} if points["clean"] == points["pgd"] else points
        return {
            kind: [
                Run(data, name, seed, value, shares.get(value), **self.changes)
                for seed in range(seeds)
            ]
            for kind, value in kinds.items()
        }

    def finish(self, tier: int, only: Sequence[str] | None = None) -> None:
        """Makes what is missing of a tier, or of some of its methods."""
        names, sets, seeds = TIERS[tier]
        names = [name for name in names if only is None or name in only]
        for data in sets:
            sources = dict.fromkeys(source for name in names for source in self.sources(name))
            self.runs.finish(
                (run for source in sources for run in self.tuning(data, source)), f"tuning, {data}"
            )
            self.runs.finish(
                (run for name in names for run in self.share_runs(data, name)), f"shares, {data}"
            )
            wanted = [runs for name in names for runs in self.finals(data, name, seeds).values()]
            by_seed = (
                [run for group in zip(*wanted, strict=True) for run in group] if wanted else []
            )
            self.runs.finish(by_seed, f"tier {tier}, {data}")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for wrong arguments or data, 130 for Ctrl-C."""
    from . import pretrained_report

    top = argparse.ArgumentParser(
        prog="python -m bench.accuracy --model minilm",
        description="Every method on a pre-trained model.",
    )
    top.add_argument(
        "--data",
        metavar="DIR",
        type=pathlib.Path,
        required=True,
        help="folders NAME/train.tsv.gz, NAME/test.tsv.gz",
    )
    top.add_argument(
        "--tiers", metavar="LIST", default="1", help="of 1,2,3 (bench/evidence/plan.md); default 1"
    )
    top.add_argument(
        "--methods", metavar="LIST", help=f"some of {','.join(METHODS)}; default: all of the tiers"
    )
    top.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="runs at a time, of one thread each"
    )
    top.add_argument(
        "--output",
        metavar="DIR",
        type=pathlib.Path,
        default=RESULTS,
        help="default: bench/results/pretrained",
    )
    top.add_argument(
        "--report", action="store_true", help="write the tables from what is there, and run nothing"
    )
    top.add_argument(
        "--protocol",
        metavar="N",
        type=int,
        choices=range(1, PROTOCOL + 1),
        help="with --report: of runs that were made by an older protocol",
    )
    options = top.parse_args(arguments)
    command = " ".join(["python -m bench.accuracy --model minilm", *arguments])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tiers = [int(tier) for tier in options.tiers.split(",")]
        only = options.methods.split(",") if options.methods else None
        if strange := [tier for tier in tiers if tier not in TIERS]:
            raise UserError(f"--tiers {strange[0]}: there are {', '.join(map(str, TIERS))}")
        if strange_names := [name for name in only or () if name not in METHODS]:
            raise UserError(f"--methods {strange_names[0]}: there are {', '.join(METHODS)}")
        source_of("minilm")
        options.output.mkdir(parents=True, exist_ok=True)
        if options.protocol is not None and not options.report:
            raise UserError("--protocol goes with --report: runs are made by the newest alone")
        protocol = PROTOCOL if options.protocol is None else options.protocol
        runs = PretrainedRuns(options.data, options.output, options.jobs, command, protocol)
        for tier in [] if options.report else tiers:
            for data in TIERS[tier][1]:
                sets.check(options.data, data, FURTHER[data])
            TierPlan(runs, {}).finish(tier, only)
        print(pretrained_report.write(TierPlan(runs, {"protocol": protocol}), options.output))
    except (UserError, ValueError) as error:
        return refused(error)
    except KeyboardInterrupt:
        return stopped(f"What is finished is kept; go on with\n  {command}")
    return 0
