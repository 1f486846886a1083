"""Trains and scores every method on real text: accuracy, accuracy under attack, cost (`python -m
bench.accuracy --data DIR`).
"""

import argparse
import json
import math
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from uegr_kernels.finetune import train
from uegr_kernels.finetune.data import UserError
from uegr_kernels.models import MODELS

from .. import harness, machine
from . import data, pretrained, report, training
from .plan import CONTROLS, METHODS, PAPER, MethodRuns, TuningPlan
from .report import BASE
from .runs import refused, stopped
from .studies import NAMES, STUDIES
from .studies import main as main_study

RESULTS = harness.ROOT / "bench" / "results" / "accuracy"


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""

    def names(known: Iterable[str], **others: str) -> Callable[[str], list[str]]:
        """Returns what chooses some of the known ones, as the papers write them too: R-Drop is
        r_drop.
        """
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
        type=names(NAMES),
        default=["main"],
        help=f"all, or some of {','.join(NAMES)}",
    )
    top.add_argument("--seeds", metavar="N", type=harness.count, default=5)
    top.add_argument(
        "--examples",
        metavar="N",
        type=some,
        default=1000,
        help="to train on, drawn anew for every seed; 0: all; default 1000",
    )
    top.add_argument("--epochs", metavar="N", type=harness.count, default=6)
    top.add_argument(
        "--length",
        metavar="N",
        type=harness.count,
        default=64,
        help="words (tokens) of a text at most",
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
        type=harness.count,
        default=6,
        help="runs by which each method is tuned on each set; default 6",
    )
    top.add_argument("--lr", metavar="LIST", type=rates, help="learning rates to tune over")
    top.add_argument("--jobs", metavar="N", type=harness.count, default=1, help="runs at a time")
    top.add_argument(
        "--threads",
        metavar="N",
        type=harness.count,
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
    # its workers end with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options = parser().parse_args(arguments)
        there = data.sets_in(options.data)
        if options.sets is None:
            options.sets = [
                name for name in there if data.read(options.data, name).metric != "correlation"
            ]
        if not options.sets:
            raise UserError(
                f"--data {options.data}: only regressions ({', '.join(there)}); name "
                "them with --sets"
            )
        for name in options.sets:
            data.check(options.data, name, [*options.shifted, *options.adversarial])
        if BASE not in options.methods:
            options.methods = [BASE, *options.methods]
        options.output.mkdir(parents=True, exist_ok=True)
        run(options, command)
    except (UserError, FileExistsError, NotADirectoryError) as error:
        return refused(error)
    except KeyboardInterrupt:
        return stopped(f"What is finished is kept; go on with\n  {command}")
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Runs what is missing of every study, and writes its table and pictures as soon as it is
    whole.
    """
    output = options.output
    runs = MethodRuns(options.data, options.sets, output, options.jobs, options.threads, command)
    plan = TuningPlan(options, runs)
    plan.tune(options.methods, options.sets, options.models)
    sections: dict[str, str] = {}
    for name in options.studies:
        if name in STUDIES:
            plan.tune(STUDIES[name].rests_on, options.sets[:1], options.models[:1])
        _keep_points(plan, output / "points.json")
        if name == "cost":
            measure_cost(plan, command, output)
            continue
        wanted = STUDIES[name].runs(plan) if name in STUDIES else main_study(plan)
        runs.finish(wanted.values(), name)
        found = {key: runs[settings] for key, settings in wanted.items()}
        if name in STUDIES:
            where = f"{options.sets[0]}, {options.models[0]}"
            title, described = STUDIES[name].title, STUDIES[name].describe(found, output)
            sections[name] = f"### {title}: {where}\n\n{described}"
        else:
            sections[name] = report.main_study(found, output)
            means = json.dumps(report.means(found), indent=1)
            (output / "summary.json").write_text(means + "\n")
            main_found = found
        about = origin(runs, options, command)
        (output / f"{name}.md").write_text(f"{sections[name]}\n\n{about}\n")
        paths = [output / f"{each}.md" for each in NAMES]
        written = [path.read_text().strip() for path in paths if path.exists()]
        (output / "README.md").write_text(
            "\n\n".join(["# Accuracy, robustness and cost on real text", *written]) + "\n"
        )
    if "main" in sections:
        cost = {record["case"]: record for record in harness.read(output / "cost.jsonl")}
        summary = report.summary(main_found, cost)
        (output / "summary.md").write_text(f"{summary}\n\n{origin(runs, options, command)}\n")
    print("\n\n".join(sections.values()))
    print(f"\nWritten: {output}")


def _keep_points(plan: TuningPlan, path: pathlib.Path) -> None:
    """Adds the points that tuning settled on to those on file."""
    points = json.loads(path.read_text()) if path.exists() else {}
    points |= {" ".join(key): point for key, point in plan.points.items()}
    path.write_text(json.dumps(points, indent=1) + "\n")


def origin(runs: MethodRuns, options: argparse.Namespace, command: str) -> str:
    """Tells how the figures came about, in a paragraph."""
    commits = sorted({str(record["commit"]) for record in runs.done.values()})
    examples = f"{options.examples:,} texts" if options.examples else "all texts"
    return (
        f"`{command}`: {examples} to train on, drawn anew for each of {options.seeds} seeds and "
        "the same for every method; "
        f"{options.epochs} epochs, batch 16, AdamW with weight decay {train.WEIGHT_DECAY}, "
        f"warm-up {train.WARM_UP}, linear decay; "
        f"{options.trials} tuning runs for every method, model and set on up to "
        f"{training.VALIDATION:,} other texts of the training set, "
        f"by which the best epoch is chosen too; "
        f"{options.attacked} test texts under attack, the whole test set otherwise. "
        f"{runs.about['cpu']}, {runs.about['device']}, torch {runs.about['torch']}; commit "
        f"{', '.join(commits)}."
    )


def measure_cost(plan: TuningPlan, command: str, output: pathlib.Path) -> None:
    """Times a training step of every method beside the base's, taking turns, on the first set and
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
            record = about | {"warning": warning} | harness.measure(case, 20, copy, bar.update)
            ratio = record["contestants"][1]["ours_over_this"]
            harness.keep(path, record | ratio, list(METHODS))
