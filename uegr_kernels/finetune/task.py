"""Fine-tunes a classifier on texts of one's own with one recipe or several, and reports on each."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core import checks
from ..models import MODELS
from ..recipes import NAMES, RECIPES
from . import measures, tables
from .classifiers import Classifier, new, source_of
from .data import UserError, UserTypeError, refusals
from .interrupts import Stopped, interrupts_noticed
from .measures import Outcomes
from .tables import Columns, Data, Files

if TYPE_CHECKING:
    from .report import Result
    from .train import Training

SETTINGS, OUTCOMES, CHECKPOINTS = "uegr_finetune.json", "uegr_outcomes.json", "checkpoints"
# the names of a model's files
KEPT = "uegr_model.json"
REPORTS = ("report.md", "report.json", "report.png")
# epochs and learning rate
PRETRAINED, SMALL = (3.0, 5e-5), (10.0, 1e-3)
# in norms of a text's embeddings; bench/evidence tunes over 0.01 to 0.05
EPSILON = 0.02
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
            if isinstance(name, str) and "," in name:
                raise UserError(f"recipe={name!r} is one recipe; several are for compare")
            checks.choice("recipe", name, NAMES)
        if not self.recipes:
            raise UserError("compare names no recipe; give one or several, as plain,uegr")
        text = self.columns.text
        if not 1 <= len(text) <= 2 or (len(text) == 2 and self.columns.separator is not None):
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
        if self.columns.regression and self.files.ood:
            raise UserError(
                f"ood {', '.join(self.files.ood)}: foreign texts are told by the confidence, and a "
                "regression has none; leave it out, or give labelled ones with shifted"
            )
        known = set[str]().union(*(RECIPES[name].option_names() for name in self.recipes))
        for option in self.recipe_options:
            if option not in known:
                raise UserError(
                    f"recipe_options: {' and '.join(self.recipes)} has no option {option!r}; the "
                    f"options are {', '.join(sorted(known))}{checks.near(option, known)}"
                )
        numbers: dict[str, object] = {
            "limit": None if self.limit is None else checks.integer("limit", self.limit, 2),
            "seeds": tuple(checks.integer("seed", seed, 0, bits=32) for seed in self.seeds),
            "epsilon": checks.number("epsilon", self.epsilon, 0),
            "epochs": checks.number("epochs", self.epochs, 0, without=0),
            "lr": checks.number("lr", self.lr, 0),
            "batch": checks.integer("batch", self.batch, 1),
            "length": checks.integer("length", self.length, 2),
        }
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        if self.device is not None:
            checks.choice("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device 'cuda': there is no GPU that torch can use; leave it out")
        for kind in ("recipe_options", "trainer_options"):
            for option, value in getattr(self, kind).items():
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise UserTypeError(
                        f"{kind} {option}={value!r} cannot be kept for --resume ({error}); give "
                        "finite numbers, strings, True, False, None, or lists and dicts of them"
                    ) from None

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
        found["model_content"] = {
            path.name: tables.digest(path) for path in _model_files(self.model)
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
    ValueError (and, for an argument of a wrong type, a TypeError too), for files, models, folders
    and options that cannot be used, before anything is written; `interrupts.Stopped` after Ctrl-C.
    """
    with refusals():
        chosen = _path("model", model)
        usual = SMALL if chosen in MODELS else PRETRAINED
        if compare is None:
            recipes: tuple[str, ...] = (_word("recipe", recipe),)
        else:
            recipes = _names("compare", compare, "recipes")
        task = Task(
            Files(
                _path("train", train),
                None if validation is None else _path("validation", validation),
                None if test is None else _path("test", test),
                {
                    name: _path(f"shifted {name}", path)
                    for name, path in _by_name("shifted", shifted)
                },
                {name: _path(f"ood {name}", path) for name, path in _by_name("ood", ood)},
            ),
            Columns(
                _names("text_column", text_column, "columns"),
                _word("label_column", label_column),
                None if pair_separator is None else _word("pair_separator", pair_separator),
                checks.flag("regression", regression),
            ),
            limit,
            chosen,
            tuple(dict.fromkeys(recipes)),
            _options("recipe_options", recipe_options),
            _options("trainer_options", trainer_options),
            epsilon,
            (seed,) if seeds is None else tuple(range(checks.integer("seeds", seeds, 1))),
            usual[0] if epochs is None else epochs,
            usual[1] if lr is None else lr,
            batch,
            length,
            device,
        )
        overwrite, resume = checks.flag("overwrite", overwrite), checks.flag("resume", resume)
        folder = pathlib.Path(_path("output", output))
    if overwrite and resume:
        raise UserError(
            "overwrite begins anew and resume goes on: give one of --overwrite, --resume"
        )
    said = None if command is None else _word("command", command)
    made_by = said or f"uegr_kernels.finetune.finetune, with the arguments in {SETTINGS}"
    return _train_all(task, folder, made_by, overwrite=overwrite, resume=resume)


def _wrong(name: str, value: object, wanted: str) -> UserTypeError:
    return UserTypeError(f"{name}={value!r} is a {type(value).__name__}; give {wanted}")


def _path(name: str, value: object) -> str:
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(found, str):
        raise _wrong(name, value, "a path, as a string or pathlib.Path")
    if not found or "\0" in found:
        raise UserError(f"{name}={found!r} names no file or folder; give a path")
    return found


def _word(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    return value


def _names(name: str, given: object, what: str) -> tuple[str, ...]:
    """Returns names given as a list, or as one string with commas between them."""
    if isinstance(given, str):
        names = tuple(part.strip() for part in given.split(","))
        if "" in names:
            raise UserError(f"{name}={given!r} has an empty name; write names with one comma each")
        return names
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise _wrong(name, given, f"{what} as a list of strings, or one string with commas")
    return tuple(given)


def _by_name(name: str, given: object) -> list[tuple[str, Any]]:
    """Returns the entries of a dict whose keys are names; None is an empty one."""
    if given is None:
        return []
    if not isinstance(given, Mapping) or not all(isinstance(key, str) and key for key in given):
        raise _wrong(name, given, "a dict whose keys are names")
    return list(given.items())


def _options(name: str, given: object) -> dict[str, object]:
    """Returns the entries of a dict whose keys are names, NumPy's numbers and flags as Python's."""
    return {
        option: checks.plain(value) if checks.is_number(value) or checks.is_flag(value) else value
        for option, value in _by_name(name, given)
    }


def _model_files(model: str) -> list[pathlib.Path]:
    """Returns the files of a model's folder, but for what this command writes beside them."""
    folder = pathlib.Path(model if model in MODELS else source_of(model))
    if model in MODELS or not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and file.name not in (SETTINGS, OUTCOMES, KEPT, *REPORTS)
    )


def _train_all(
    task: Task, folder: pathlib.Path, made_by: str, *, overwrite: bool, resume: bool
) -> dict[str, Any]:
    """Reads the texts, makes every training that is not there, and reports on all of them."""
    from . import report, train

    with refusals():
        train.check_options(task.trainer_options)
    if pathlib.Path(task.model).is_dir() and task.model not in MODELS:
        _check_outside(f"--model {task.model}", task.model, folder, "what is trained goes")
    data = tables.load(task.files, task.columns, task.limit)
    settings = task.settings()
    first = train.is_first_process()
    first_model = _start(task, data, task.seeds[0])
    for recipe in task.recipes:
        with refusals(), _named(task.trainer_options):
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
    try:
        results = _results(task, data, folder, keep=first)
        if not first:
            return {}
        usual = measures.commonest(data.train, data.labels)
        return report.write(folder, results, data.labels, usual, made_by, _about(task, data))
    except KeyboardInterrupt:
        raise Stopped from None


@contextlib.contextmanager
def _named(options: Mapping[str, object]) -> Iterator[None]:
    """Says which options the Trainer was given where it, or what it asks for, refuses them."""
    try:
        yield
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError) as error:
        if not options:
            raise
        given = " ".join(f"{name}={value!r}" for name, value in options.items())
        raise UserError(f"trainer_options {given}: {error}; mend them or leave them out") from error


def _check_outside(what: str, path: Path, folder: pathlib.Path, why: str) -> None:
    """Raises where a path is a folder or lies in it."""
    place = pathlib.Path(path).resolve()
    if folder.resolve() in (place, *place.parents):
        raise UserError(f"{what} is or lies in {folder}, where {why}; move or copy it elsewhere")


def _results(task: Task, data: Data, folder: pathlib.Path, *, keep: bool) -> list["Result"]:
    """Returns what every training gave; makes those that are not there."""
    from . import train

    results = []
    several = len(task.recipes) * len(task.seeds) > 1
    with interrupts_noticed() as stopped:
        for seed in task.seeds:
            for recipe in task.recipes:
                place = folder / recipe / str(seed) if several else folder
                if not (place / OUTCOMES).exists():
                    result = _run(task, data, recipe, seed, place, stopped, keep=keep)
                    if keep:
                        _save(place / OUTCOMES, dataclasses.asdict(result))
                train.wait_for_all()
                results.append(_result(json.loads((place / OUTCOMES).read_text(encoding="utf-8"))))
    return results


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
        outcomes = measures.measure(classifier, data)
        # a model that gives no numbers is of no use
        if outcomes.predicted:
            _keep(classifier, place)
    score = trained.validation if math.isfinite(trained.validation) else None
    return report.Result(
        recipe, seed, outcomes, trained.seconds, trained.best_epoch, score, trained.diverged
    )


def _keep(classifier: Classifier, place: pathlib.Path) -> None:
    """Saves a model, with the names of its files: another one's would be read in their place."""
    aside = place / CHECKPOINTS
    shutil.rmtree(aside, ignore_errors=True)
    classifier.save(aside)
    names = sorted(file.name for file in aside.iterdir())
    _save(place / KEPT, names)
    for name in names:
        (aside / name).replace(place / name)
    aside.rmdir()


def options_of(recipe: str, task: Task) -> dict[str, object]:
    """Returns a recipe's options: those of the task that it has, and the size of its perturbation
    in norms.
    """
    given = {k: v for k, v in task.recipe_options.items() if k in RECIPES[recipe].option_names()}
    size = RECIPES[recipe].size_option
    return given if size is None else {size: task.epsilon, "relative": True} | given


def _prepare(
    folder: pathlib.Path, settings: dict[str, object], *, overwrite: bool, resume: bool
) -> None:
    """Makes the folder, or looks whether what is there may be replaced or gone on with."""
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            what = "a link to nothing" if folder.is_symlink() else "a file"
            raise UserError(f"--output {folder} is {what}; name a folder")
        there = folder.is_dir() and any(folder.iterdir())
        before = _settings_before(folder)
        if resume and before is None:
            raise UserError(f"--resume: {folder} holds no fine-tuning; leave --resume out")
        if resume and before is not None:
            if different := _differences(before, settings):
                raise UserError(
                    f"--resume: {'; '.join(different)}; give what was given then, or --overwrite"
                )
            return
        if there and before is None:
            raise UserError(
                f"--output {folder} holds files that are none of a fine-tuning's; name another "
                "folder"
            )
        if before is not None and not overwrite:
            raise UserError(
                f"--output {folder} holds a fine-tuning; add --resume to go on with it, "
                "--overwrite to replace it, or name another folder"
            )
        if before is not None:
            _clear(folder, before, settings)
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder / SETTINGS, settings)
    except OSError as error:
        raise UserError(
            f"--output {folder}: {error.strerror}; name a folder that can be made and written to"
        ) from None


def _settings_before(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the settings of the fine-tuning that a folder holds; None where it holds none. The
    names in them become folders that are removed, so others than ours are none.
    """
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = (
        isinstance(found, dict)
        and isinstance(found.get("files"), dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in found["files"].values())
        and isinstance(found.get("recipes"), list)
        and all(recipe in NAMES for recipe in found["recipes"])
        and isinstance(found.get("seeds"), list)
        and all(isinstance(seed, int) for seed in found["seeds"])
    )
    return found if whole else None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what a resumed run's arguments have that those before had not, and the other way."""
    found = [
        f"{name} is {now.get(name)!r} now and was {before.get(name)!r}"
        for name in {**before, **now}
        if name not in ("files", "model_content") and now.get(name) != before.get(name)
    ]
    if now["model"] == before.get("model") and now["model_content"] != before.get("model_content"):
        found.append(f"the content of --model {now['model']} has changed")
    for option in {**before["files"], **now["files"]}:
        one, other = before["files"].get(option), now["files"].get(option)
        if one is None or other is None:
            found.append(f"{option} was {'not ' * (one is None)}given then")
        elif one[0] != other[0]:
            found.append(f"{option} is {other[0]} now and was {one[0]}")
        elif one != other:
            found.append(f"the content of {option} {one[0]} has changed")
    return found


def _clear(folder: pathlib.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Removes what an earlier fine-tuning wrote, and leaves alone whatever else is there. Raises
    where a file to read is in it.
    """
    removed = [
        folder / recipe / str(seed) for recipe in before["recipes"] for seed in before["seeds"]
    ]
    for place in (*removed, folder / CHECKPOINTS):
        for option, (path, _) in now["files"].items():
            _check_outside(f"{option} {path}", path, place, "--overwrite removes everything")
    for place in removed:
        shutil.rmtree(place, ignore_errors=True)
    for recipe in before["recipes"]:
        # other things may be there
        with contextlib.suppress(OSError):
            (folder / recipe).rmdir()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (*_kept(folder), KEPT, OUTCOMES, *REPORTS):
        (folder / name).unlink(missing_ok=True)


def _kept(folder: pathlib.Path) -> list[str]:
    """Returns the names of the files of the model that a folder holds; none where it holds none."""
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = found if isinstance(found, list) else []
    # whoever wrote them, nothing outside the folder is removed
    return [
        name
        for name in names
        if isinstance(name, str) and (folder / name).parent == folder and (folder / name).is_file()
    ]


def _save(path: pathlib.Path, content: object) -> None:
    """Writes JSON aside, then moves it: whatever happens, `path` is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)


def _result(found: dict[str, Any]) -> "Result":
    from .report import Result

    return Result(**found | {"outcomes": Outcomes(**found["outcomes"])})


def _about(task: Task, data: Data) -> str:
    return (
        f"{task.model}, {len(data.train):,} texts to train on, {len(data.validation):,} to choose "
        f"the epoch by, {len(data.test):,} to test; epsilon {task.epsilon:g} of a text's norm;"
    )
