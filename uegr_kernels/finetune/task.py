"""Fine-tunes a classifier on texts of one's own with one recipe or several, and reports on each."""

import contextlib
import dataclasses
import inspect
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core import checks
from ..models import MODELS
from ..recipes.registry import NAMES, RECIPES
from . import measures, tables
from .classifiers import Classifier, new
from .data import UserError
from .interrupts import interrupts_noticed
from .measures import Outcomes
from .tables import Columns, Data, Files

if TYPE_CHECKING:
    from .report import Result
    from .train import Training

SETTINGS, OUTCOMES, CHECKPOINTS = "uegr_finetune.json", "uegr_outcomes.json", "checkpoints"
REPORTS = ("report.md", "report.json", "report.png")
# what the command itself says to the Trainer
OURS = ("output_dir", "metric_for_best_model", "greater_is_better", "load_best_model_at_end")
PRETRAINED, SMALL = (3.0, 5e-5), (10.0, 1e-3)  # epochs and learning rate
EPSILON = 0.02  # in norms of a text's embeddings: what bench/evidence finds of use
Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Task:
    """Holds all that a fine-tuning's result depends on; `finetune` describes each field."""

    files: Files
    columns: Columns
    limit: int | None
    model: str
    recipes: tuple[str, ...]
    recipe_options: dict[str, object]
    trainer_options: dict[str, object]
    epsilon: float
    seeds: tuple[int, ...]
    epochs: float
    lr: float
    batch: int
    length: int
    device: str | None

    def __post_init__(self) -> None:
        for name in self.recipes:
            checks.choice("recipe", name, NAMES)
        text = self.columns.text
        if len(text) > 2 or (len(text) == 2 and self.columns.separator is not None):
            raise UserError(
                f"text_column {','.join(text)}: name one column, or two without pair_separator"
            )
        if len({*text}) < len(text) or self.columns.label in text:
            raise UserError(
                f"text_column {','.join(text)}, label_column {self.columns.label}: one column is "
                "named twice"
            )
        if self.columns.separator == "":
            raise UserError("pair_separator '' parts nothing; give what stands between the texts")
        known = set[str]().union(*(RECIPES[name].option_names() for name in self.recipes))
        for option in self.recipe_options:
            if option not in known:
                raise UserError(
                    f"recipe_options: {' and '.join(self.recipes)} has no option {option!r}; the "
                    f"options are {', '.join(sorted(known))}"
                )
        if self.limit is not None:
            checks.integer("limit", self.limit, 2)
        for seed in self.seeds:
            checks.integer("seed", seed, 0, bits=32)
        checks.number("epsilon", self.epsilon, 0)
        checks.number("epochs", self.epochs, 0, without=0)
        checks.number("lr", self.lr, 0)
        checks.integer("batch", self.batch, 1)
        checks.integer("length", self.length, 2)
        if self.device is not None:
            checks.choice("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device 'cuda': there is no GPU that torch can use; leave it out")
        for option in self.trainer_options.keys() & {*OURS}:
            raise UserError(f"trainer_options {option!r} is set by the command; leave it out")

    def training(self) -> "Training":
        """Returns how each run is trained, but for its recipe and seed."""
        from .train import Training

        return Training(self.epochs, self.lr, self.batch, self.device, self.trainer_options)

    def settings(self) -> dict[str, object]:
        """Returns every argument by its name, and each file's SHA-256, as JSON has them."""
        found = dataclasses.asdict(self)
        found["files"] = {
            option: [path, tables.digest(path)] for option, path in self.files.named().items()
        }
        kept: dict[str, object] = json.loads(json.dumps(found))
        return kept


def finetune(
    train: Path,
    output: Path,
    *,
    validation: Path | None = None,
    test: Path | None = None,
    shifted: Mapping[str, Path] | None = None,
    ood: Mapping[str, Path] | None = None,
    text_column: str | Sequence[str] = "text",
    label_column: str = "label",
    pair_separator: str | None = None,
    regression: bool = False,
    limit: int | None = None,
    model: Path = "minilm",
    recipe: str = "uegr",
    compare: str | Sequence[str] | None = None,
    recipe_options: Mapping[str, object] | None = None,
    trainer_options: Mapping[str, object] | None = None,
    epsilon: float = EPSILON,
    seed: int = 0,
    seeds: int | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch: int = 16,
    length: int = 128,
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a classifier on a file of texts, with one recipe or several, and measures what each
    withstands: `python -m uegr_kernels finetune` as a function, its arguments by the same names.

    train            texts with labels, as .tsv, .csv or .jsonl, each also .gz
    output           folder of the model in Transformers' format (the package's own models in one
                     of theirs); with several recipes or seeds RECIPE/SEED in it; and of report.md,
                     report.json and report.png
    validation       file that the best epoch is chosen by; None: a tenth of train
    test             file to report on; None: a fifth of train
    shifted, ood     further files by a name: labelled texts of other origins; texts that are none
                     of the task's
    text_column      the text's column, or two, "A,B" or (A, B), of a pair
    label_column     the label's column;  regression  True: labels are numbers
    pair_separator   what parts a pair that stands in one column
    limit            texts of each file at most
    model            "minilm", a folder or hub name of Transformers', "textcnn", "bilstm", ...
    recipe           name in `uegr_kernels.recipes`;  compare  several of them in its place, as a
                     list or "plain,at,uegr"
    recipe_options   of every recipe that has them;  trainer_options  of
                     `transformers.TrainingArguments`
    epsilon          size of the perturbation in training, in L2 norms of a text's embeddings
    seed             of weights, batches and masks;  seeds  so many trainings in its place, 0 to N-1
    epochs, lr       times through the texts, the largest learning rate; None: 3 and 5e-5, for the
                     small models, which learn from nothing, 10 and 1e-3
    batch, length    texts a step over all processes, tokens of a text that are read
    device           "cpu" or "cuda"; None: the GPU where there is one, and there in bfloat16
    overwrite        replace a fine-tuning that is there;  resume  go on with it: what is finished
                     stays, what was stopped continues from its checkpoint
    command          what the report names as its maker; None: this function

    Returns what report.json holds; an empty dict in torchrun's other processes. Raises UserError, a
    ValueError, for files, models and folders that cannot be used, before anything is written;
    ValueError and TypeError for options; `train.Stopped` after Ctrl-C.
    """
    usual = SMALL if model in MODELS else PRETRAINED
    task = Task(
        Files(
            os.fspath(train),
            _path(validation),
            _path(test),
            {name: os.fspath(path) for name, path in (shifted or {}).items()},
            {name: os.fspath(path) for name, path in (ood or {}).items()},
        ),
        Columns(
            _names(text_column), label_column, pair_separator, checks.flag("regression", regression)
        ),
        limit,
        os.fspath(model),
        tuple(dict.fromkeys(_names(recipe if compare is None else compare))),
        dict(recipe_options or {}),
        dict(trainer_options or {}),
        epsilon,
        (seed,) if seeds is None else tuple(range(checks.integer("seeds", seeds, 1))),
        usual[0] if epochs is None else epochs,
        usual[1] if lr is None else lr,
        batch,
        length,
        device,
    )
    made_by = command or f"uegr_kernels.finetune.finetune, with the arguments in {SETTINGS}"
    overwrite, resume = checks.flag("overwrite", overwrite), checks.flag("resume", resume)
    return _train_all(task, pathlib.Path(output), made_by, overwrite=overwrite, resume=resume)


def _path(path: Path | None) -> str | None:
    return None if path is None else os.fspath(path)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Returns names given as a list, or as one string with commas between them."""
    return tuple(given.split(",")) if isinstance(given, str) else tuple(given)


def _train_all(
    task: Task, folder: pathlib.Path, made_by: str, *, overwrite: bool, resume: bool
) -> dict[str, Any]:
    """Reads the texts, makes every training that is not there, and reports on all of them."""
    from . import report, train

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
                    result = _run(task, data, recipe, seed, place, stopped, keep=first)
                    if first:
                        _save(place / OUTCOMES, dataclasses.asdict(result))
                train.wait_for_all()
                results.append(_result(json.loads((place / OUTCOMES).read_text(encoding="utf-8"))))
    if not first:
        return {}
    return report.write(folder, results, data.labels, made_by, _about(task, data))


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


def options_of(recipe: str, task: Task) -> dict[str, object]:
    """Returns a recipe's options: those of the task that it has, and the size of its perturbation
    in norms.
    """
    given = {k: v for k, v in task.recipe_options.items() if k in RECIPES[recipe].option_names()}
    size = _size_option(recipe)
    return given if size is None else {size: task.epsilon, "relative": True} | given


def _size_option(recipe: str) -> str | None:
    """Returns the option that is the L2 size of a perturbation of the embeddings."""
    options = inspect.signature(RECIPES[recipe]).parameters
    norm, steps = options.get("norm"), options.get("steps")
    if (norm is not None and norm.default != "l2") or (steps is not None and steps.default == 0):
        return None
    if "epsilon" in options or "options" in options:  # the latter: BiStage's
        return "epsilon"
    return "adv_lr" if "adv_lr" in options else None


def _prepare(
    folder: pathlib.Path, settings: dict[str, object], *, overwrite: bool, resume: bool
) -> None:
    """Makes the folder, or looks whether what is there may be replaced or gone on with."""
    file = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    there = folder.is_dir() and any(folder.iterdir())
    if resume:
        if not file.exists():
            raise UserError(f"--resume: {folder} holds no fine-tuning; leave --resume out")
        different = _differences(json.loads(file.read_text(encoding="utf-8")), settings)
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
    try:
        if there:
            _clear(folder, json.loads(file.read_text(encoding="utf-8")))
        folder.mkdir(parents=True, exist_ok=True)
        _save(file, settings)
    except OSError as error:
        raise UserError(
            f"--output {folder}: {error.strerror}; name a folder that can be made"
        ) from None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what a resumed run's arguments have that those before had not, and the other way."""
    found = [
        f"{name} is {now.get(name)!r} now and was {before.get(name)!r}"
        for name in {**before, **now}
        if name != "files" and now.get(name) != before.get(name)
    ]
    for option in {**before["files"], **now["files"]}:
        one, other = before["files"].get(option), now["files"].get(option)
        if one is None or other is None:
            found.append(f"{option} was {'not ' * (one is None)}given then")
        elif one[0] != other[0]:
            found.append(f"{option} is {other[0]} now and was {one[0]}")
        elif one != other:
            found.append(f"the content of {option} {one[0]} has changed")
    return found


def _clear(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Removes what an earlier fine-tuning wrote, but for a model's files, which the next one
    replaces, and leaves alone whatever else is there.
    """
    for recipe in settings["recipes"]:
        for seed in settings["seeds"]:
            shutil.rmtree(folder / recipe / str(seed), ignore_errors=True)
        with contextlib.suppress(OSError):  # other things may be there
            (folder / recipe).rmdir()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (OUTCOMES, *REPORTS):
        (folder / name).unlink(missing_ok=True)


def _save(path: pathlib.Path, content: object) -> None:
    """Writes JSON aside, then moves it: whatever happens, `path` is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def _result(found: dict[str, Any]) -> "Result":
    from .report import Result

    return Result(**found | {"outcomes": Outcomes(**found["outcomes"])})


def _about(task: Task, data: Data) -> str:
    return (
        f"{task.model}, {len(data.train):,} texts to train on, {len(data.validation):,} to choose "
        f"the epoch by, {len(data.test):,} to test; epsilon {task.epsilon:g} of a text's norm;"
    )
