"""Makes one training run on real text: a set, a model, a method, and what came of it. `python -m
bench.accuracy` makes many.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import uegr_kernels as uk
from uegr_kernels.analysis.attack import STRENGTHS
from uegr_kernels.finetune import classifiers, measures, train
from uegr_kernels.finetune.classifiers import Classifier
from uegr_kernels.finetune.tables import Example

from .data import Row, TextSet, read, read_test

# Another one where anything changes what training gives: it is part of every run's key. 1 was a
# loop of this folder's own, 2 is the one of `uegr_kernels.finetune`.
PROTOCOL = 2

MOMENTUM = 0.9
PROCESSOR = "processor_seconds_per_step"
# rows of the training set at most, and no more than a fifth of it
VALIDATION = 1000


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


def classes_of(data: TextSet) -> list[str]:
    """Returns the classes of a set, none for regression, as `uegr_kernels.finetune` has them."""
    return [] if data.metric == "correlation" else data.labels


def examples_of(rows: Sequence[Row]) -> list[Example]:
    """Returns rows as `uegr_kernels.finetune` has them."""
    return [Example(row.texts, row.label, 0) for row in rows]


def build(settings: Settings, data: TextSet, train: Sequence[Row]) -> Classifier:
    """Returns a new classifier; our own models take their words from the rows to train on."""
    return classifiers.new(
        settings.model.removeprefix("hf:"),
        [row.texts for row in train],
        classes_of(data),
        settings.length,
        settings.dropout,
    )


def batches_of(classifier: Classifier, data: TextSet, rows: Sequence[Row]) -> Batches:
    """Returns what makes a batch of some of the rows, by their places, on the model's device."""
    encoded = classifier.encode([row.texts for row in rows])
    labels = torch.tensor(measures.numbers(examples_of(rows), classes_of(data)))
    device = next(classifier.model.parameters()).device

    def batch(chosen: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        inputs = classifier.pad([encoded[i] for i in chosen])
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return inputs, labels[torch.as_tensor(chosen)].to(device)

    return batch


# Training


class Start(NamedTuple):
    """Holds what a run starts from: rows to train on and to validate on, and a classifier."""

    train: list[Row]
    held: list[Row]
    classifier: Classifier


def new_start(settings: Settings, data: TextSet) -> Start:
    """Returns the rows that the seed draws, and a new classifier."""
    train, held = split(data, settings)
    return Start(train, held, build(settings, data, train))


Watch = Callable[[int, nn.Module, Any], None]


class _Observer(train.Observer):
    """Notes what a step costs and selects, and calls `watch` and `stepped`."""

    def __init__(
        self, steps: int, watch: Watch | None, stepped: Callable[[Any], None] | None
    ) -> None:
        self.steps, self.watch, self.stepped = steps, watch, stepped
        self.processor: list[float] = []
        self.before = 0
        self.selected: dict[str, float] = {}

    def _ends_epoch(self, steps: int) -> bool:
        return steps % self.steps == 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        # before the recipe's mask
        if self._ends_epoch(state.global_step + 1):
            self.before = _nonzero(model)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._ends_epoch(state.global_step + 1):
            optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
            share, largest_inverse = _selected(optimizer, model, self.before)
            self.selected = {"share": share, "largest_inverse": largest_inverse}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.processor.append(time.process_time() - self.began)
        # a checkpoint carries what is logged
        if self._ends_epoch(state.global_step):
            cost = statistics.median(self.processor)
            self.trainer.log(self.selected | {PROCESSOR: cost})
        if self.stepped:
            self.stepped(self.trainer.recipe)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.watch:
            self.watch(round(state.epoch), model, self.trainer.recipe)


def run(
    settings: Settings,
    folder: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
    *,
    start: Start | None = None,
    watch: Watch | None = None,
    stepped: Callable[[Any], None] | None = None,
) -> tuple[dict[str, Any], Classifier]:
    """Trains one classifier by `uegr_kernels.finetune` and evaluates it; returns the figures, and
    the classifier at its best epoch by validation.

    checkpoint  folder of the state after each epoch, from which the run goes on; removed in the end
    start       None: the rows that the seed draws, and a new classifier
    watch       called after each epoch with its number from 1, the model and the recipe
    stepped     called after each step with the recipe
    """
    data = read(folder, settings.data)
    torch.manual_seed(settings.seed)
    start = start or new_start(settings, data)
    steps = math.ceil(len(start.train) / settings.batch)
    observer = _Observer(steps, watch, stepped)
    with contextlib.ExitStack() as stack:
        place = checkpoint or stack.enter_context(tempfile.TemporaryDirectory())
        trained = train.train(
            start.classifier,
            settings.method,
            settings.options,
            (examples_of(start.train), examples_of(start.held)),
            classes_of(data),
            settings.seed,
            train.Training(
                settings.epochs,
                settings.lr,
                settings.batch,
                optimizer=optimizer_of(settings),
                metric=functools.partial(score, metric=data.metric),
            ),
            pathlib.Path(place) / "checkpoints",
            observers=[observer],
        )
    logged = [each for each in observer.trainer.state.log_history if "share" in each][-1]
    result = {
        "validation": trained.validation,
        "best_epoch": round(trained.best_epoch),
        "steps": steps * settings.epochs,
        "seconds_per_step": trained.seconds_per_step,
        **{name: logged[name] for name in (PROCESSOR, "share", "largest_inverse")},
    }
    if settings.final:
        result |= evaluate(start.classifier, settings, folder)
    if checkpoint:
        checkpoint.rmdir()
    return result, start.classifier


def optimizer_of(settings: Settings) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
    """Returns the class and the options of the settings' optimizer."""
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, object]]] = {
        "selective_adamw": (uk.SelectiveAdamW, {}),
        "selective_sgd": (uk.SelectiveSGD, {"momentum": MOMENTUM}),
        "sgd": (torch.optim.SGD, {"momentum": MOMENTUM}),
        "adamw": (torch.optim.AdamW, {"fused": True}),
    }
    kind, options = kinds[settings.optimizer]
    return kind, {"lr": settings.lr, **options, **settings.selection}


def stepper(settings: Settings, folder: pathlib.Path) -> Callable[[], object]:
    """Returns a training step of these settings on one batch, to be timed."""
    data = read(folder, settings.data)
    torch.manual_seed(settings.seed)
    start = new_start(settings, data)
    kind, options = optimizer_of(settings)
    model = start.classifier.model
    optimizer = kind(model.parameters(), **options)
    task = {} if classes_of(data) else {"task": "regression"}
    recipe = getattr(uk.recipes, settings.method)(
        model, start.classifier.embedding, optimizer, **settings.options, **task
    )
    inputs, labels = batches_of(start.classifier, data, start.train)(range(settings.batch))
    recipe.prepare([(inputs, labels)])

    def step() -> None:
        optimizer.zero_grad()
        recipe.backward(inputs, labels)
        recipe.before_step()
        if not recipe.steps_itself:
            optimizer.step()
        recipe.after_step()

    return step


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


def score(logits: Tensor, expected: Sequence[float], metric: str) -> float:
    """Returns the metric of a set, by its name."""
    if metric == "accuracy":
        return measures.accuracy(logits, expected)
    # Pearson's of two binary variables
    if metric == "matthews":
        return measures.pearson(logits.argmax(1).tolist(), expected)
    from scipy.stats import spearmanr

    rank = spearmanr(logits[:, 0], expected).statistic
    return (measures.correlation(logits, expected) + (rank if math.isfinite(rank) else 0.0)) / 2


def in_order(rows: int, size: int = 128) -> Iterator[range]:
    """Yields the places of all rows, so many at a time."""
    return (range(first, min(first + size, rows)) for first in range(0, rows, size))


def evaluate(classifier: Classifier, settings: Settings, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the metric on the test set; for classes also calibration, accuracy under FGM and
    PGD-10 on its first rows, and the other sets.
    """
    data = read(folder, settings.data)
    labels = classes_of(data)

    def seen(rows: Sequence[Row]) -> tuple[Tensor, list[Any]]:
        examples = examples_of(rows)
        return measures.logits_of(classifier, examples), measures.numbers(examples, labels)

    logits, expected = seen(data.test)
    found: dict[str, Any] = {"test": score(logits, expected, data.metric)}
    if not labels:
        return found
    found["calibration_error"] = uk.analysis.calibration_error(logits, torch.tensor(expected))
    for perspective in ("shifted", "adversarial"):
        if names := getattr(settings, perspective):
            tests = [read_test(folder, name) for name in names]
            found[perspective] = statistics.fmean(measures.accuracy(*seen(rows)) for rows in tests)
    if settings.ood:
        others = [examples_of(read_test(folder, name)) for name in settings.ood]
        found["auroc"] = statistics.fmean(
            uk.analysis.ood_auroc(logits, measures.logits_of(classifier, each)) for each in others
        )
    if settings.attacked:
        rows = data.test[: settings.attacked]
        batches = batches_of(classifier, data, rows)
        for attack in ("fgm", "pgd"):
            under = uk.analysis.accuracy_under_attack(
                classifier.model,
                classifier.embedding,
                map(batches, in_order(len(rows))),
                STRENGTHS,
                attack,
            )
            found["clean"], found[attack] = under[0].accuracy, [each.accuracy for each in under[1:]]
        # epsilon over the norm of a text's embeddings
        found["relative"] = [round(each.relative, 5) for each in under[1:]]
    return found
