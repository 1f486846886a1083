"""Makes one training run on real text: a set, a model, a method, and what came of it. `python -m
bench.accuracy` makes many.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import uegr_kernels as uk
from uegr_kernels.analysis.attack import STRENGTHS
from uegr_kernels.finetune.data import UNKNOWN, Texts, UserError, encode, vocabulary, words_of
from uegr_kernels.models import MODELS

from .data import Row, TextSet, labels_of, read, read_test

# Another one where anything changes what training gives: it is part of every run's key.
PROTOCOL = 1

WARM_UP, WEIGHT_DECAY, MOMENTUM = 0.06, 0.01, 0.9
VALIDATION = 1000  # rows of the training set at most, and no more than a fifth of it
DIMENSION = 64  # of our own models' words


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds all that a run's figures depend on, beside the code that its protocol stands for.

    method, options  a recipe and its options;  optimizer  adamw | sgd | selective_adamw |
        selective_sgd, with the options `selection`
    examples  rows to train on, drawn by the seed; 0: all.  length  words of a text at most.
        dropout  of the model; None: its own
    final     evaluate on the test set; else the validation score is all there is
    attacked  rows of the test set under attack
    shifted, adversarial, ood  other sets whose tests the model is scored on: with its own labels,
        or for the AUROC of telling them apart
    """

    data: str
    model: str
    method: str
    seed: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "adamw"
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    lr: float = 1e-3
    dropout: float | None = 0.3
    epochs: int = 6
    examples: int = 1000
    length: int = 64
    batch: int = 16
    final: bool = True
    attacked: int = 200
    shifted: Sequence[str] = ()
    adversarial: Sequence[str] = ()
    ood: Sequence[str] = ()
    protocol: int = PROTOCOL


def held_of(rows: int) -> int:
    """Returns how many of a training set's rows are held out to validate on."""
    return min(VALIDATION, max(1, rows // 5))


def split(data: TextSet, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Returns rows to train on and to validate on: both of the training set, drawn by the seed."""
    rows = data.train.copy()
    random.Random(f"{settings.data} {settings.seed}").shuffle(rows)
    held = held_of(len(rows))
    return rows[held : held + settings.examples] if settings.examples else rows[held:], rows[:held]


# The model and its batches

Batches = Callable[[Sequence[int]], tuple[dict[str, Tensor], Tensor]]
Built = tuple[nn.Module, Callable[[list[Row]], Batches]]


def build(settings: Settings, data: TextSet, train: list[Row], device: torch.device) -> Built:
    """Returns the model, and what turns rows into batches for it."""
    outputs = 1 if data.metric == "correlation" else len(data.labels)
    if settings.model.startswith("hf:"):
        return _transformers(settings, data, outputs, device)

    def words(row: Row) -> tuple[str, ...]:
        return tuple(itertools.chain.from_iterable(map(words_of, row.texts)))[: settings.length]

    index = vocabulary(map(words, train))
    dropout = {} if settings.dropout is None else {"dropout": settings.dropout}
    model = MODELS[settings.model](
        len(index) + UNKNOWN + 1, outputs, dimension=DIMENSION, **dropout
    ).to(device)

    def encoded(rows: list[Row]) -> Batches:
        texts = Texts(encode(map(words, rows), index).to(device), labels_of(rows, data).to(device))
        return lambda chosen: texts.batch(torch.as_tensor(chosen))

    return model, encoded


def _transformers(
    settings: Settings, data: TextSet, outputs: int, device: torch.device
) -> tuple[nn.Module, Callable[[list[Row]], Batches]]:
    path = settings.model.removeprefix("hf:")
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"--models {settings.model} needs transformers: pip install transformers")
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        config = AutoConfig.from_pretrained(path, local_files_only=True, num_labels=outputs)
        for name, value in vars(config).items():  # each family has its own names for them
            if (
                settings.dropout is not None
                and ("dropout" in name or "pdrop" in name)
                and isinstance(value, float)
            ):
                setattr(config, name, settings.dropout)
        model = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, local_files_only=True
        ).to(device)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--models {settings.model}: no checkpoint with its tokenizer in that folder ({error})"
        ) from None

    return model, lambda rows: tokenized(tokenizer, data, rows, settings.length, device)


def tokenized(
    tokenizer: Any, data: TextSet, rows: list[Row], length: int, device: torch.device
) -> Batches:
    """Returns batches of the rows, of texts of at most `length` tokens."""
    columns = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    tokens = tokenizer(*columns, truncation=True, max_length=length)
    labels = labels_of(rows, data)

    def batch(chosen: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        padded = tokenizer.pad(
            {key: [values[i] for i in chosen] for key, values in tokens.items()},
            return_tensors="pt",
        )
        return {key: value.to(device) for key, value in padded.items()}, labels[
            torch.as_tensor(chosen)
        ].to(device)

    return batch


def embedding_of(model: nn.Module) -> nn.Module:
    """Returns the word embedding, which attacks perturb."""
    found: nn.Module = (
        model.embedding if hasattr(model, "embedding") else model.get_input_embeddings()
    )
    return found


# Training


class Start(NamedTuple):
    """Holds what a run starts from: rows to train on and to validate on, the model, and what turns
    rows into batches for it.
    """

    train: list[Row]
    held: list[Row]
    model: nn.Module
    encoded: Callable[[list[Row]], Batches]


def new_start(settings: Settings, data: TextSet, device: torch.device) -> Start:
    """Returns the rows that the seed draws, and a new model."""
    train, held = split(data, settings)
    return Start(train, held, *build(settings, data, train, device))


@dataclasses.dataclass
class Progress:
    """Holds how far a run is after an epoch, beside its model, optimizer, recipe and schedule.

    best, best_epoch, weights  of the best epoch by validation;  seconds, cpu  of each step
    share, largest_inverse     of the selection in the last epoch's last step;  loss  that step's
    """

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    share: float = 1.0
    largest_inverse: float = 1.0
    loss: float = math.nan
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


Watch = Callable[[int, nn.Module, Any], None]


def run(
    settings: Settings,
    folder: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
    device: torch.device | None = None,
    *,
    start: Start | None = None,
    watch: Watch | None = None,
    stepped: Callable[[Any], None] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Trains one model and evaluates it; returns the figures and the model at its best epoch by
    validation.

    checkpoint  where the state after each epoch is kept, and from which the run goes on; removed in
        the end
    start       None: the rows that the seed draws, and a new model
    watch       called after each epoch with its number from 1, the model and the recipe, whose
        .optimizer steps
    stepped     called after each step with the recipe
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = read(folder, settings.data)
    torch.manual_seed(settings.seed)
    train, held, model, encoded = start or new_start(settings, data, device)
    optimizer = make_optimizer(settings, model)
    recipe = make_recipe(settings, data, model, optimizer)
    batches, validation = encoded(train), encoded(held)
    steps = math.ceil(len(train) / settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(_rate, total=steps * settings.epochs)
    )
    parts = {"model": model, "optimizer": optimizer, "recipe": recipe, "schedule": schedule}
    now = Progress()
    if checkpoint and checkpoint.exists():
        now = _load(checkpoint, parts, device)
    elif hasattr(recipe, "prepare"):  # Child-Tuning-D looks at the training set first
        recipe.prepare([batches(rows) for rows in _epoch(len(train), settings, -1)])
    for epoch in range(now.epoch, settings.epochs):
        model.train()
        for i, rows in enumerate(_epoch(len(train), settings, epoch)):
            inputs, labels = batches(rows)
            began, used = time.perf_counter(), time.process_time()
            losses, before = step(settings, recipe, optimizer, inputs, labels, count=i == steps - 1)
            now.seconds.append(time.perf_counter() - began)
            now.cpu.append(time.process_time() - used)
            schedule.step()
            if stepped:
                stepped(recipe)
        now.share, now.largest_inverse = _selected(optimizer, model, before)
        now.loss = float(losses["loss"])
        recipe.epoch_end()
        value = score(*outputs_of(model, validation, len(held)), data.metric)
        if value > now.best:
            now.best, now.best_epoch = value, epoch + 1
            now.weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        now.epoch = epoch + 1
        if watch:
            watch(epoch + 1, model, recipe)
        if checkpoint:
            _save(checkpoint, parts, now)
    recipe.close()
    model.load_state_dict(now.weights)
    result = {
        "validation": now.best,
        "best_epoch": now.best_epoch,
        "steps": steps * settings.epochs,
        "loss": now.loss,
        "seconds_per_step": statistics.median(now.seconds),
        "processor_seconds_per_step": statistics.median(now.cpu),
        "share": now.share,
        "largest_inverse": now.largest_inverse,
    }
    if settings.final:
        result |= evaluate(model, settings, folder, encoded)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return result, model


def _save(path: pathlib.Path, parts: dict[str, Any], now: Progress) -> None:
    """Writes aside, then moves: whatever happens, `path` is a whole checkpoint."""
    whole = vars(now) | {name: part.state_dict() for name, part in parts.items()}
    whole["random"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    path.parent.mkdir(exist_ok=True)  # another command that ends may have taken it away
    torch.save(whole, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _load(path: pathlib.Path, parts: dict[str, Any], device: torch.device) -> Progress:
    saved = torch.load(path, weights_only=True, map_location=device)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"][0].cpu())
    torch.cuda.set_rng_state_all([each.cpu() for each in saved["random"][1:]])
    return Progress(**{field.name: saved[field.name] for field in dataclasses.fields(Progress)})


def stepper(settings: Settings, folder: pathlib.Path) -> Callable[[], object]:
    """Returns a training step of these settings on the first batch of an epoch, to be timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = read(folder, settings.data)
    torch.manual_seed(settings.seed)
    train, _, model, encoded = new_start(settings, data, device)
    optimizer = make_optimizer(settings, model)
    recipe = make_recipe(settings, data, model, optimizer)
    batches = encoded(train)
    if hasattr(recipe, "prepare"):
        recipe.prepare([batches(range(settings.batch))])
    inputs, labels = batches(next(_epoch(len(train), settings, 0)))
    return lambda: step(settings, recipe, optimizer, inputs, labels)


def step(
    settings: Settings,
    recipe: Any,
    optimizer: Any,
    inputs: Any,
    labels: Tensor,
    count: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """Makes one step; returns its losses and, where told to count, how many elements of .grad were
    not 0 before the recipe's mask.
    """
    optimizer.zero_grad()
    losses = recipe.backward(inputs, labels)
    before = _nonzero(recipe.model) if count else 0
    recipe.before_step()
    if not recipe.steps_itself:
        optimizer.step()
    recipe.after_step()
    return losses, before


def make_recipe(
    settings: Settings, data: TextSet, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Any:
    """Returns the recipe of the settings, at work on the model."""
    task = {"task": "regression"} if data.metric == "correlation" else {}
    return getattr(uk.recipes, settings.method)(
        model, embedding_of(model), optimizer, **settings.options, **task
    )


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of the settings, with the names of its parameters."""
    parameters, rule = (
        list(model.named_parameters()),
        {"lr": settings.lr, "weight_decay": WEIGHT_DECAY},
    )
    if settings.optimizer == "selective_adamw":
        return uk.SelectiveAdamW(parameters, **rule, **settings.selection)
    if settings.optimizer == "selective_sgd":
        return uk.SelectiveSGD(parameters, **rule, momentum=MOMENTUM, **settings.selection)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, **rule, momentum=MOMENTUM)
    return torch.optim.AdamW(parameters, **rule, fused=True)


def _rate(step: int, total: int) -> float:
    """Returns the factor of the learning rate: linear up, then down to zero."""
    up = max(1, round(WARM_UP * total))
    return (step + 1) / up if step < up else max(0.0, (total - step) / max(1, total - up))


def _epoch(rows: int, settings: Settings, epoch: int) -> Iterator[list[int]]:
    """Yields the batches of an epoch: they depend on the seed and the epoch alone."""
    order = list(range(rows))
    random.Random(f"{settings.seed} {epoch}").shuffle(order)
    return (order[first : first + settings.batch] for first in range(0, rows, settings.batch))


def _nonzero(model: nn.Module) -> int:
    return sum(int(p.grad.count_nonzero()) for p in model.parameters() if p.grad is not None)


def _selected(
    optimizer: torch.optim.Optimizer, model: nn.Module, before: int
) -> tuple[float, float]:
    """Returns the share of elements that the last step updated, and its largest 1/p; of masked
    gradients what is left of those that were not 0.
    """
    if isinstance(optimizer, uk.SelectiveAdamW | uk.SelectiveSGD):
        report = uk.analysis.selection_report(optimizer)
        return report.selected, report.largest_inverse
    return (_nonzero(model) / before if before else 1.0), 1.0


# Evaluation


def outputs_of(
    model: nn.Module, batches: Batches, rows: int, size: int = 128
) -> tuple[Tensor, Tensor]:
    """Returns logits [N, C] and labels [N] of all rows, in eval mode, on the CPU."""
    model.eval()
    outputs, truth = [], []
    with torch.no_grad():
        for chosen in in_order(rows, size):
            inputs, labels = batches(chosen)
            logits = model(**inputs)
            outputs.append(getattr(logits, "logits", logits).float().cpu())
            truth.append(labels.cpu())
    return torch.cat(outputs), torch.cat(truth)


def score(logits: Tensor, labels: Tensor, metric: str) -> float:
    """Returns the metric of a set, by its name."""
    if metric == "accuracy":
        return float((logits.argmax(1) == labels).float().mean())
    if metric == "matthews":  # Pearson's of two binary variables
        return _finite(
            torch.corrcoef(torch.stack([logits.argmax(1).double(), labels.double()]))[0, 1]
        )
    from scipy.stats import pearsonr, spearmanr

    return _finite(
        (pearsonr(logits[:, 0], labels).statistic + spearmanr(logits[:, 0], labels).statistic) / 2
    )


def _finite(value: Any) -> float:
    """Returns a correlation; 0 where one side is constant."""
    return float(value) if math.isfinite(value) else 0.0


def in_order(rows: int, size: int = 128) -> Iterator[range]:
    """Yields the places of all rows, so many at a time."""
    return (range(first, min(first + size, rows)) for first in range(0, rows, size))


def evaluate(
    model: nn.Module,
    settings: Settings,
    folder: pathlib.Path,
    encoded: Callable[[list[Row]], Batches],
) -> dict[str, Any]:
    """Returns the metric on the test set; for classes also calibration, accuracy under FGM and
    PGD-10 on its first rows, and the other sets.
    """
    data = read(folder, settings.data)
    logits, labels = outputs_of(model, encoded(data.test), len(data.test))
    found: dict[str, Any] = {"test": score(logits, labels, data.metric)}
    if data.metric == "correlation":
        return found
    found["calibration_error"] = uk.analysis.calibration_error(logits, labels)
    for perspective in ("shifted", "adversarial"):
        if names := getattr(settings, perspective):
            tests = [read_test(folder, name) for name in names]
            found[perspective] = statistics.fmean(
                score(*outputs_of(model, encoded(rows), len(rows)), "accuracy") for rows in tests
            )
    if settings.ood:
        others = [
            [row._replace(label=data.labels[0]) for row in read_test(folder, name)]
            for name in settings.ood
        ]
        scores = (
            uk.analysis.ood_auroc(logits, outputs_of(model, encoded(rows), len(rows))[0])
            for rows in others
        )
        found["auroc"] = statistics.fmean(scores)
    if settings.attacked:
        rows = data.test[: settings.attacked]
        batches = encoded(rows)
        for attack in ("fgm", "pgd"):
            seen = uk.analysis.accuracy_under_attack(
                model, embedding_of(model), map(batches, in_order(len(rows))), STRENGTHS, attack
            )
            found["clean"], found[attack] = seen[0].accuracy, [each.accuracy for each in seen[1:]]
        # epsilon over the norm of a text's embeddings
        found["relative"] = [round(each.relative, 5) for each in seen[1:]]
    return found
