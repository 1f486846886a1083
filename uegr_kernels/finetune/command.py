"""Fine-tunes a classifier on texts of one's own: `python -m uegr_kernels finetune`."""

import argparse
import ast
import dataclasses
import inspect
import json
import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import recipes
from . import measures, tables
from .classifiers import INSTALL, Classifier, load, new
from .data import UserError
from .interrupts import interrupts_noticed
from .measures import Outcomes
from .tables import Columns, Data, Files

if TYPE_CHECKING:
    from .report import Result
    from .train import Training

SETTINGS, OUTCOMES, CHECKPOINTS = "settings.json", "outcomes.json", "checkpoints"
EPSILON = 0.02  # in norms of a text's embeddings: what bench/evidence finds of use


@dataclasses.dataclass(frozen=True)
class Task:
    """Holds all that a fine-tuning's result depends on; see `finetune`."""

    files: Files
    columns: Columns
    model: str
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe_options: dict[str, Any]
    trainer_options: dict[str, Any]
    epsilon: float
    epochs: float
    lr: float
    batch: int
    length: int
    limit: int | None
    device: str | None

    def training(self) -> "Training":
        """Returns how each run is trained, but for its recipe and seed."""
        from .train import Training

        return Training(self.epochs, self.lr, self.batch, self.device, self.trainer_options)

    def settings(self) -> dict[str, Any]:
        """Returns every argument by its name, and each file's SHA-256, as JSON has them."""
        found = dataclasses.asdict(self)
        found["files"] = {
            option: [path, tables.digest(path)] for option, path in self.files.named().items()
        }
        kept: dict[str, Any] = json.loads(json.dumps(found))
        return kept


def finetune(
    task: Task,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Trains a classifier with each recipe and seed, and writes what each withstands.

    output     folder of the model in Transformers' format (the package's own models in one of
               theirs); with several recipes or seeds RECIPE/SEED in it; and of report.md,
               report.json and report.png
    overwrite  replace a fine-tuning that is there;  resume  go on with it: what is finished stays,
               what was stopped continues from its checkpoint

    Returns the report. Raises UserError for files, models and folders that cannot be used, before
    anything is written; ValueError and TypeError for options; `train.Stopped` after Ctrl-C.
    """
    from . import report, train

    folder = pathlib.Path(output)
    data = tables.load(task.files, task.columns, task.limit)
    settings = task.settings()
    first = train.is_first_process()
    first_model = _start(task, data, task.seeds[0])
    for recipe in task.recipes:
        train.check(
            first_model,
            recipe,
            options_of(recipe, task),
            (data.train, data.validation),
            data.labels,
            task.training(),
        )
    if first:
        _prepare(folder, settings, overwrite=overwrite, resume=resume)
    results = []
    several = len(task.recipes) * len(task.seeds) > 1
    with interrupts_noticed() as stopped:
        for seed in task.seeds:
            for recipe in task.recipes:
                place = folder / recipe / str(seed) if several else folder
                if not (place / OUTCOMES).exists():
                    say(f"{recipe}, seed {seed}")
                    result = _run(task, data, recipe, seed, place, stopped, keep=first)
                    if first:
                        _save(place / OUTCOMES, dataclasses.asdict(result))
                train.wait_for_all()
                results.append(_result(json.loads((place / OUTCOMES).read_text())))
    if not first:
        return ""
    return report.write(folder, results, data.labels, command, _about(task, data))


def _start(task: Task, data: Data, seed: int) -> Classifier:
    torch.manual_seed(seed)
    texts = [example.texts for example in data.train]
    return new(task.model, texts, data.labels, task.length)


def _run(
    task: Task,
    data: Data,
    recipe: str,
    seed: int,
    place: pathlib.Path,
    stopped: Callable[[], bool],
    *,
    keep: bool,
) -> "Result":
    """Trains with one recipe and seed, saves the model and measures it."""
    from . import report, train

    classifier = _start(task, data, seed)
    trained = train.train(
        classifier,
        recipe,
        options_of(recipe, task),
        (data.train, data.validation),
        data.labels,
        seed,
        task.training(),
        place / CHECKPOINTS,
        stopped,
    )
    outcomes = Outcomes()
    if keep:
        classifier.save(place)
        outcomes = measures.measure(classifier, data)
    return report.Result(
        recipe, seed, outcomes, trained.seconds_per_step, trained.best_epoch, trained.validation
    )


def options_of(recipe: str, task: Task) -> dict[str, Any]:
    """Returns a recipe's options: what was given, and the size of its perturbation in norms."""
    size = _size_option(recipe)
    if size is None:
        return dict(task.recipe_options)
    return {size: task.epsilon, "relative": True} | task.recipe_options


def _size_option(recipe: str) -> str | None:
    """Returns the option that is the L2 size of a perturbation of the embeddings."""
    options = inspect.signature(getattr(recipes, recipe)).parameters
    norm, steps = options.get("norm"), options.get("steps")
    if (norm is not None and norm.default != "l2") or (steps is not None and steps.default == 0):
        return None
    if "epsilon" in options or "options" in options:  # the latter: BiStage's
        return "epsilon"
    return "adv_lr" if "adv_lr" in options else None


def _prepare(
    folder: pathlib.Path, settings: dict[str, Any], *, overwrite: bool, resume: bool
) -> None:
    """Makes the folder, or looks whether what is there may be replaced or gone on with."""
    file = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    there = folder.is_dir() and any(folder.iterdir())
    if resume:
        if not file.exists():
            raise UserError(f"--resume: {folder} holds no fine-tuning; leave --resume out")
        before = json.loads(file.read_text())
        different = [
            f"{name} is {settings.get(name)!r} now and was {before.get(name)!r}"
            for name in {**before, **settings}
            if settings.get(name) != before.get(name)
        ]
        if different:
            raise UserError(
                f"--resume: {'; '.join(different)}; give what was given then, or --overwrite"
            )
        return
    if there and not file.exists():
        raise UserError(
            f"--output {folder} holds files that are none of a fine-tuning's; name another folder"
        )
    if there and not overwrite:
        raise UserError(
            f"--output {folder} holds a fine-tuning; add --resume to go on with it, --overwrite to "
            "replace it, or name another folder"
        )
    if there:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(file, settings)


def _save(path: pathlib.Path, content: Any) -> None:
    """Writes JSON aside, then moves it: whatever happens, `path` is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, ensure_ascii=False) + "\n")
    aside.replace(path)


def _result(found: dict[str, Any]) -> "Result":
    from .report import Result

    return Result(**found | {"outcomes": Outcomes(**found["outcomes"])})


def _about(task: Task, data: Data) -> str:
    return (
        f"{task.model}, {len(data.train):,} texts to train on, {len(data.validation):,} to choose "
        f"the epoch by, {len(data.test):,} to test; epsilon {task.epsilon:g} of a text's norm;"
    )


__all__ = ["Task", "UserError", "finetune", "load", "main"]


# Arguments


def parser() -> argparse.ArgumentParser:
    """Returns the command's arguments."""
    top = argparse.ArgumentParser(
        prog="python -m uegr_kernels finetune",
        description="Fine-tunes a text classifier so that it generalises and withstands attack, "
        "and reports what it withstands.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = top.add_argument
    files = top.add_argument_group("texts", "files .tsv, .csv or .jsonl, each also .gz")
    files.add_argument("--train", metavar="FILE", required=True, help="texts with labels")
    files.add_argument(
        "--validation", metavar="FILE", help="the epoch is chosen by these; else a tenth of --train"
    )
    files.add_argument("--test", metavar="FILE", help="to report on; else a fifth of --train")
    files.add_argument(
        "--shifted",
        metavar="NAME=FILE",
        nargs="+",
        default=[],
        help="labelled texts of other origins, to report on",
    )
    files.add_argument(
        "--ood",
        metavar="NAME=FILE",
        nargs="+",
        default=[],
        help="texts that are none of the task's; labels are not needed",
    )
    files.add_argument(
        "--text-column", metavar="A[,B]", default="text", help="the text's column; two for pairs"
    )
    files.add_argument("--label-column", metavar="L", default="label", help="the label's column")
    files.add_argument("--pair-separator", metavar="S", help="what parts a pair in one column")
    files.add_argument("--regression", action="store_true", help="labels are numbers")
    files.add_argument("--limit", metavar="N", type=_whole(2), help="texts of each file at most")
    add("--model", default="minilm", help="minilm, a folder, a hub name, textcnn, bilstm, ...")
    which = top.add_mutually_exclusive_group()
    which.add_argument("--recipe", default="uegr", help="how to train")
    which.add_argument("--compare", metavar="LIST", help="several recipes: plain,at,uegr")
    add("--recipe-options", metavar="K=V", nargs="+", default=[], help="of every recipe")
    add("--trainer-options", metavar="K=V", nargs="+", default=[], help="of TrainingArguments")
    add("--epsilon", type=float, default=EPSILON, help="perturbation, in norms of a text")
    seeds = top.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="of weights, batches and masks")
    seeds.add_argument("--seeds", metavar="N", type=_whole(1), help="N trainings: 0, 1, ...")
    add("--epochs", type=float, default=3.0, help="times through the texts")
    add("--lr", type=float, default=5e-5, help="the largest learning rate")
    add("--batch", type=_whole(1), default=16, help="texts a step, over all processes")
    add("--length", type=_whole(2), default=128, help="tokens of a text that are read")
    add("--device", choices=("cpu", "cuda"), help="else the GPU where there is one")
    add("--output", metavar="DIR", required=True, help="folder of model and report")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--resume", action="store_true", help="go on with what was stopped")
    return top


def _whole(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return value

    parse.__name__ = "int"  # argparse says "invalid int value"
    return parse


def pairs(option: str, given: Iterable[str]) -> dict[str, str]:
    """Returns NAME=VALUE arguments by name; raises UserError for one without a name or twice."""
    found: dict[str, str] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or not name or not value:
            raise UserError(f"{option} {each}: write NAME=VALUE")
        if name in found:
            raise UserError(f"{option} {each}: {name!r} is given twice")
        found[name] = value
    return found


def values(option: str, given: Iterable[str]) -> dict[str, Any]:
    """Returns K=V arguments by name, each value as Python reads it, else as the string it is."""

    def read(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return {"true": True, "false": False}.get(text, text)

    return {name: read(text) for name, text in pairs(option, given).items()}


def task_of(options: argparse.Namespace) -> Task:
    """Returns the task that the arguments name; raises UserError for a recipe that is none."""
    names = tuple((options.compare or options.recipe).split(","))
    for name in names:
        if name not in recipes.NAMES:
            option = "--compare" if options.compare else "--recipe"
            raise UserError(f"{option} {name}: no such recipe; use {', '.join(recipes.NAMES)}")
    text = tuple(options.text_column.split(","))
    if len(text) > 2 or (len(text) == 2 and options.pair_separator is not None):
        raise UserError(
            f"--text-column {options.text_column}: name one column, or two without --pair-separator"
        )
    return Task(
        Files(
            options.train,
            options.validation,
            options.test,
            pairs("--shifted", options.shifted),
            pairs("--ood", options.ood),
        ),
        Columns(text, options.label_column, options.pair_separator, options.regression),
        options.model,
        tuple(dict.fromkeys(names)),
        tuple(range(options.seeds)) if options.seeds else (options.seed,),
        values("--recipe-options", options.recipe_options),
        values("--trainer-options", options.trainer_options),
        options.epsilon,
        options.epochs,
        options.lr,
        options.batch,
        options.length,
        options.limit,
        options.device,
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, 2 for what the reader can mend, 130 for Ctrl-C."""
    options = parser().parse_args(arguments)
    command = "python -m uegr_kernels finetune " + shlex.join(arguments)
    try:
        from . import train
    except ImportError as error:
        print(f"error: {error.name} is not installed: {INSTALL}", file=sys.stderr)
        return 2
    try:
        text = finetune(
            task_of(options),
            options.output,
            overwrite=options.overwrite,
            resume=options.resume,
            command=command,
            say=lambda text: print(text, file=sys.stderr),
        )
    except (UserError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (train.Stopped, KeyboardInterrupt):
        again = command if options.resume else f"{command} --resume"
        print(f"\nStopped; what is done is kept. Go on with\n  {again}", file=sys.stderr)
        return 130
    print(text)
    return 0
