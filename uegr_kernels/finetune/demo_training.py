"""Trains the two models that the demo compares, so that a run which is stopped goes on exactly."""

import contextlib
import dataclasses
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import SelectiveAdamW, recipes
from ..analysis import accuracy_under_attack
from ..analysis.selection import share_selected
from ..models import MODELS, TextClassifier
from ..recipes.recipe import Recipe
from .data import Data, Texts, UserError
from .interrupts import interrupts_noticed

ARMS = ("AdamW", "UEGR")
ATTACKS = (0.25, 0.5, 1.0)  # L2 per text; a word vector has length 1 at the start
LEARNING_RATE, BATCH = 1e-3, 32
SAVE_EVERY, SHARE_EVERY = 50, 25  # steps


class Stopped(Exception):
    """Signals that Ctrl-C was pressed, noticed between two steps."""


class Settings(NamedTuple):
    """Holds how both models are trained; `epsilon` and `passes` are UEGR's."""

    model: str
    steps: int
    seed: int
    epsilon: float
    passes: int


@dataclasses.dataclass
class Arm:
    """Holds how far a training is: after every step that is saved, all that its rest depends on.

    losses, seconds  of each step;  shares  selected, every SHARE_EVERY steps
    accuracy         on the test texts, clean and under ATTACKS; empty until it has been taken
    """

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    shares: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
    model: dict[str, Tensor] | None = None
    optimizer: dict[str, object] | None = None
    recipe: dict[str, object] | None = None
    random: Tensor | None = None

    def saved(self) -> dict[str, object]:
        """Returns what a checkpoint holds of it."""
        return {name: value for name, value in vars(self).items() if value is not None}


def train(
    name: str,
    data: Data,
    settings: Settings,
    arm: Arm,
    save: Callable[[], None],
    stop: Callable[[], None],
) -> TextClassifier:
    """Trains one model from where `arm` stands, and returns it.

    name  of ARMS;  save  called when `arm` is to be kept;  stop  raises Stopped where it is asked
    """
    from tqdm import tqdm

    torch.manual_seed(settings.seed)
    model: TextClassifier = MODELS[settings.model](data.words, len(data.classes))
    optimizer: torch.optim.Optimizer
    recipe: Recipe | None = None
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    else:
        optimizer = SelectiveAdamW(model.parameters(), lr=LEARNING_RATE)
        recipe = recipes.uegr(  # type: ignore[attr-defined]
            model, model.embedding, optimizer, epsilon=settings.epsilon, passes=settings.passes
        )
    if arm.step:
        model.load_state_dict(arm.model or {})
        optimizer.load_state_dict(arm.optimizer or {})
        if recipe is not None:
            recipe.load_state_dict(arm.recipe or {})
        if arm.random is not None:
            torch.set_rng_state(arm.random)

    def keep() -> None:
        arm.model, arm.optimizer = model.state_dict(), optimizer.state_dict()
        arm.recipe = None if recipe is None else recipe.state_dict()
        arm.random = torch.get_rng_state()
        save()

    with tqdm(
        total=settings.steps, initial=arm.step, desc=f"{name:<5}", unit="step", mininterval=0.5
    ) as bar:
        while arm.step < settings.steps:
            inputs, labels = data.train.batch(
                rows_of_step(arm.step, len(data.train.labels), settings.seed)
            )
            model.train()
            started = time.perf_counter()
            optimizer.zero_grad()
            if recipe is None:
                loss = F.cross_entropy(model(**inputs), labels)
                loss.backward()
            else:
                loss = recipe.backward(inputs, labels)["clean_loss"]
            optimizer.step()
            arm.seconds.append(time.perf_counter() - started)
            share = share_selected(optimizer) if arm.step % SHARE_EVERY == 0 else None
            if share is not None:
                arm.shares.append(share)
            arm.losses.append(loss.item())
            arm.step += 1
            bar.update()
            bar.set_postfix(loss=f"{statistics.fmean(arm.losses[-20:]):.3f}", refresh=False)
            if arm.step % SAVE_EVERY == 0 or arm.step == settings.steps:
                keep()
            try:
                stop()
            except Stopped:
                keep()
                raise
    if recipe is not None:
        recipe.close()
    return model


def steps_of(data: Data, epochs: int, most: int | None) -> int:
    """Returns the steps of so many epochs, `most` of them at most."""
    steps = epochs * math.ceil(len(data.train.labels) / BATCH)
    return min(steps, most or steps)


def rows_of_step(step: int, rows: int, seed: int) -> Tensor:
    """Returns the rows of a step's batch, which depend on the seed and the step alone, so that
    a resumed run finds the same.
    """
    epoch, batch = divmod(step, math.ceil(rows / BATCH))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)[batch * BATCH : (batch + 1) * BATCH]


def evaluate(model: TextClassifier, texts: Texts, stop: Callable[[], None]) -> list[float]:
    """Returns the accuracy, and that under FGM on the embedded words at each of ATTACKS."""

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for first in range(0, len(texts.labels), 128):
            stop()
            yield texts.batch(slice(first, first + 128))

    seen = accuracy_under_attack(model, model.embedding, batches(), ATTACKS)
    return [each.accuracy for each in seen]


# Stopping and going on


@contextlib.contextmanager
def stops_on_interrupt() -> Iterator[Callable[[], None]]:
    """Yields what raises Stopped once Ctrl-C was pressed."""
    with interrupts_noticed() as pressed:

        def stop() -> None:
            if pressed():
                raise Stopped

        yield stop


def save_checkpoint(path: pathlib.Path, checkpoint: dict[str, object]) -> None:
    """Writes a checkpoint aside and moves it: whatever happens, `path` is a whole one."""
    aside = path.with_suffix(".tmp")
    torch.save(checkpoint, aside)
    os.replace(aside, path)


def load_checkpoint(path: pathlib.Path, settings: dict[str, object]) -> dict[str, Arm]:
    """Returns the arms of a checkpoint; raises UserError where it is none of these settings."""
    try:
        checkpoint = torch.load(path, weights_only=True)
        saved = checkpoint["settings"]
        arms = {name: Arm(**checkpoint["arms"][name]) for name in ARMS}
    except FileNotFoundError:
        raise UserError(
            f"there is no {path} to resume from; leave --resume out to start anew"
        ) from None
    except Exception:  # whatever a file that is no checkpoint makes torch.load raise
        raise UserError(
            f"{path} is not a checkpoint of this demo; leave --resume out to start anew"
        ) from None
    different = [
        f"{name} is {value!r} here and {saved.get(name)!r} there"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if different:
        raise UserError(
            f"{path} belongs to another run: {'; '.join(different)}. Resume with its settings, or "
            "leave --resume out to start anew"
        )
    return arms
