"""Trains one classifier with one recipe, over UEGRTrainer; can be stopped and gone on with."""

import dataclasses
import enum
import json
import math
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..core import checks
from ..integrations.transformers import UEGRTrainer
from . import measures
from .classifiers import Classifier, Pretrained
from .data import UserError, UserTypeError
from .interrupts import Stopped as Stopped
from .tables import Example

# in the log, which checkpoints carry
SCORE, COST, TIMES = "eval_score", "seconds_per_step", "seconds"
# steps at most whose times are kept
TIMED = 200
# the latter of all steps
WEIGHT_DECAY, WARM_UP = 0.01, 0.06
# Options that the Trainer divides by, or trains nothing with.
POSITIVE = (
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
)
# Options that the command itself gives the Trainer, and what to do instead.
OURS = {
    "output_dir": "use --output",
    "seed": "use --seed",
    "data_seed": "use --seed",
    "use_cpu": "use --device",
    "resume_from_checkpoint": "use --resume",
    "push_to_hub": "leave it out, and upload the folder when it is done",
    "hub_token": "leave it out, and upload the folder when it is done",
    **dict.fromkeys(
        "load_best_model_at_end metric_for_best_model greater_is_better eval_delay save_only_model "
        "save_total_limit remove_unused_columns".split(),
        "leave it out",
    ),
}
# Options that leave a process with a part of the model.
SHARDING = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")


@dataclasses.dataclass(frozen=True)
class Training:
    """Holds the settings of a run, but for its recipe and seed.

    epochs, lr, batch  times through the data, the largest learning rate, examples a step
    trainer_options    further arguments of transformers.TrainingArguments, which win
    optimizer          its class and options; None: UEGRTrainer's choice for the recipe
    metric             (logits [N, C], labels) -> what the best epoch has most of; None: the task's
    """

    epochs: float
    lr: float
    batch: int
    device: str | None = None
    trainer_options: dict[str, object] = dataclasses.field(default_factory=dict)
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, object]] | None = None
    metric: measures.Metric | None = None


class Encoded(Dataset[dict[str, object]]):
    """Holds encoded examples with their labels as numbers."""

    def __init__(
        self, classifier: Classifier, examples: Sequence[Example], labels: Sequence[str]
    ) -> None:
        self.rows = classifier.encode([example.texts for example in examples])
        self.labels = measures.numbers(examples, labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {**self.rows[i], "labels": self.labels[i]}


@dataclasses.dataclass(frozen=True)
class Trained:
    """Says how a run went: its best epoch by validation, the score there, a step's median cost, the
    times of some of the steps, and whether loss or score were not finite at some time.
    """

    best_epoch: float
    validation: float
    seconds_per_step: float
    seconds: list[float]
    diverged: bool


def train(
    classifier: Classifier,
    recipe: str,
    recipe_options: dict[str, object],
    data: tuple[Sequence[Example], Sequence[Example]],
    labels: list[str],
    seed: int,
    setup: Training,
    folder: pathlib.Path,
    stopped: Callable[[], bool] = lambda: False,
    observers: "Sequence[Observer]" = (),
) -> Trained:
    """Trains the classifier's model in place, and leaves it at its best epoch by validation.

    data     examples to train on, and those that the epoch is chosen by
    labels   the classes in order; none for regression
    folder   where checkpoints lie while the run lasts; one that is there already is gone on from,
             and the run then equals the one that was not interrupted
    stopped  asked after each step; where it says yes a checkpoint is written
    observers  are told of every step and epoch, before the recipe is

    Raises Stopped after that, ValueError and TypeError for options that recipe or Trainer refuse.
    """
    watch = _Watch(stopped, f"{recipe}, seed {seed}")
    trainer = _trainer(
        classifier, recipe, recipe_options, data, labels, seed, setup, folder, [watch, *observers]
    )
    last = _last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=last)
    if watch.stopping:
        raise Stopped
    log = trainer.state.log_history
    times = [entry[TIMES] for entry in log if TIMES in entry]
    cost = [entry[COST] for entry in log if COST in entry][-1]
    best = max((entry for entry in log if SCORE in entry), key=lambda entry: entry[SCORE])
    wait_for_all()
    if is_first_process():
        shutil.rmtree(folder, ignore_errors=True)
    return Trained(
        best_epoch=best["epoch"],
        validation=best[SCORE],
        seconds_per_step=cost,
        seconds=times[-1] if times else [cost],
        diverged=not all(
            math.isfinite(entry[name]) for entry in log for name in ("loss", SCORE) if name in entry
        ),
    )


def _last_whole_checkpoint(folder: pathlib.Path) -> str | None:
    """Returns the last checkpoint's folder; removes those that a killed process left unfinished:
    the Trainer's own state is the last of a checkpoint's files.
    """
    if is_first_process():
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                json.loads((checkpoint / "trainer_state.json").read_text())
            except (OSError, ValueError):
                shutil.rmtree(checkpoint)
    wait_for_all()
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return found


def check(
    classifier: Classifier,
    recipe: str,
    recipe_options: dict[str, object],
    data: tuple[Sequence[Example], Sequence[Example]],
    labels: list[str],
    setup: Training,
) -> None:
    """Raises what `train` would raise for its options, and writes nothing that stays."""
    few = data[0][:2], data[1][:1]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(
            classifier, recipe, recipe_options, few, labels, 0, setup, pathlib.Path(folder), []
        )
        trainer.get_train_dataloader()
        trainer.create_optimizer_and_scheduler(1)


def check_options(options: Mapping[str, object]) -> None:
    """Raises for options of TrainingArguments that it does not have, that the command sets itself,
    or of another type: the Trainer itself would notice many of them in the middle of a training.
    """
    hints = typing.get_type_hints(TrainingArguments)
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name, value in options.items():
        given = f"trainer_options {name}={value!r}"
        if name in OURS:
            raise UserError(f"trainer_options {name!r} is set by the command; {OURS[name]}")
        if name not in known:
            raise UserError(
                f"{given}: transformers.TrainingArguments has no such option"
                + (checks.near(name, known) or "; its documentation lists them")
            )
        if name in SHARDING and value:
            raise UserError(
                f"{given}: the command trains whole models, one on each of torchrun's processes "
                "(DDP); leave it out, or shard with UEGRTrainer, which takes FSDP"
            )
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else ""
            raise UserTypeError(
                f"{given} is a {type(value).__name__}; give a {kind or hints[name]}"
            )
        if name in POSITIVE:
            checks.number(f"trainer_options {name}", value, 0, without=0)
    both = [options.get(f"{what}_strategy", "epoch") for what in ("eval", "save")]
    if both[0] != both[1] or both[0] not in ("epoch", "steps"):
        raise UserError(
            f"trainer_options eval_strategy={both[0]!r}, save_strategy={both[1]!r}: the best "
            "checkpoint is kept by its score; give 'steps' for both, or leave both out"
        )


def _fits(value: object, hint: Any) -> bool:
    """Returns whether a value is of an annotated type; of those that are not told apart, yes."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if not isinstance(kind, type):
        return True
    # each has its words
    if issubclass(kind, enum.Enum):
        return isinstance(value, str)
    if kind is bool:
        return checks.is_flag(value)
    if kind is int:
        return checks.is_integer(value)
    if kind is float:
        return checks.is_number(value)
    return isinstance(value, kind)


def _trainer(
    classifier: Classifier,
    recipe: str,
    recipe_options: dict[str, object],
    data: tuple[Sequence[Example], Sequence[Example]],
    labels: list[str],
    seed: int,
    setup: Training,
    folder: pathlib.Path,
    observers: "Sequence[Observer]",
) -> "_Trainer":
    options: dict[str, object] = {
        "output_dir": str(folder),
        "num_train_epochs": setup.epochs,
        "learning_rate": setup.lr,
        "per_device_train_batch_size": _per_process(setup.batch),
        "weight_decay": WEIGHT_DECAY,
        "warmup_steps": WARM_UP,
        "seed": seed,
        "data_seed": seed,
        "bf16": _bfloat16(setup.device),
        "use_cpu": setup.device == "cpu",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        # with 1 the Trainer ends, also where it is stopped, by removing all but the best
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": SCORE,
        "greater_is_better": True,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = _Trainer(
        model=classifier.model,
        args=TrainingArguments(**options | setup.trainer_options),
        train_dataset=Encoded(classifier, data[0], labels),
        eval_dataset=Encoded(classifier, data[1], labels),
        data_collator=_Collator(classifier),
        recipe=recipe,
        recipe_options=recipe_options | ({} if labels else {"task": "regression"}),
        embedding=None if isinstance(classifier, Pretrained) else classifier.embedding,
        callbacks=list(observers),
        optimizer_cls_and_kwargs=setup.optimizer,
    )
    for observer in observers:
        observer.trainer = trainer
    # the bar says it
    trainer.remove_callback(PrinterCallback)
    expected = measures.numbers(data[1], labels)
    metric = setup.metric or measures.metric_of(labels)
    trainer.score = lambda: metric(measures.logits_of(classifier, data[1]), expected)
    return trainer


class _Trainer(UEGRTrainer):
    """Evaluates by the task's metric alone, as the report does."""

    score: Callable[[], float]
    control: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = {SCORE: self.score(), "epoch": self.state.epoch}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


class _Collator:
    """Pads a batch's examples."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [{key: row[key] for key in row if key != "labels"} for row in rows]
        labels = torch.tensor([row["labels"] for row in rows])
        return {**self.classifier.pad(texts), "labels": labels}


class Observer(TrainerCallback):  # type: ignore[misc]
    """Takes note of the steps and epochs of the trainer that it is given to."""

    trainer: _Trainer


class _Watch(Observer):
    """Shows a bar, times steps, and stops training between two of them, with a checkpoint."""

    def __init__(self, stopped: Callable[[], bool], title: str) -> None:
        self.stopped, self.stopping, self.title = stopped, False, title
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not is_first_process(),
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.bar.update()
        if _any_process(self.stopped(), args.device) and state.global_step < state.max_steps:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", SCORE) if name in logs}
        self.bar.set_postfix(shown, refresh=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds:
            self.trainer.log({COST: statistics.median(self.seconds)})
            state.log_history = [entry for entry in state.log_history if TIMES not in entry]
            some = self.seconds[:: -(-len(self.seconds) // TIMED)]
            state.log_history.append({"step": state.global_step, TIMES: some})
        if self.stopping and abs(state.epoch - round(state.epoch)) > 1e-6:
            # a score within an epoch would count among the epochs' when the run is gone on with
            control.should_evaluate = False

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.close()


def quiet() -> None:
    """Has Transformers say what goes wrong alone: the command has a bar of its own, and that a head
    is new is what fine-tuning means.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def processes() -> int:
    """Returns how many processes torchrun or Accelerate has started to train one model."""
    return int(get_int_from_env(["WORLD_SIZE"], 1))


def is_first_process() -> bool:
    """Returns whether this process is the one that writes."""
    return int(get_int_from_env(["RANK"], 0)) == 0


def wait_for_all() -> None:
    """Returns when every process is here; they have met before, in training."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _any_process(said: bool, device: torch.device) -> bool:
    """Returns whether one of the processes says so: they stop together, after the same step."""
    if not torch.distributed.is_initialized():
        return said
    flag = torch.tensor(int(said), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _per_process(batch: int) -> int:
    if batch % processes():
        raise UserError(
            f"--batch {batch} is no multiple of the {processes()} processes; make it one"
        )
    return batch // processes()


def _bfloat16(device: str | None) -> bool:
    return device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
