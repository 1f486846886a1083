"""Accuracy under white-box attacks on the embeddings (UEGR Fig. 2b; METHODS 4)."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..passes import Pass, Runner, attention_mask
from ..perturbation import fgm_perturbation, pgd_step
from .watching import held, picture

STRENGTHS = (0.01, 0.25, 0.5)  # weak, medium, strong


@dataclasses.dataclass(frozen=True)
class Attacked:
    """Accuracy under one strength of an attack.

    epsilon   radius of the ball;  relative  its mean share of ||e||, the norm of a sample's embeddings
    accuracy  in [0, 1];  drop  from the clean accuracy;  relative_drop  the drop's share of it
    outcomes  of every sample, in the order of the batches: whether it is right
    """

    epsilon: float
    relative: float
    accuracy: float
    drop: float
    relative_drop: float
    outcomes: tuple[bool, ...] = ()


def accuracy_under_attack(
    model: nn.Module,
    embedding: nn.Module | None,
    batches: Iterable[tuple[Any, Tensor]],
    epsilons: Sequence[float] = STRENGTHS,
    attack: str = "fgm",
    steps: int = 10,
    *,
    norm: str = "l2",
    relative: bool = False,
    restarts: int = 1,
    seed: int = 0,
    input_range: tuple[float, float] | None = None,
) -> list[Attacked]:
    """Accuracy without (epsilon 0, first) and with an attack on the embedding's output, per sample, in eval mode with true labels.

    batches   pairs (inputs, labels [N] int64); inputs and embedding as in `BiStage`
    epsilons  radii; with `relative` multiples of each sample's ||e||
    attack    "fgm": one step | "pgd": `steps` steps of 2.5*epsilon/steps on the ball, from 0 and from `restarts` - 1 random points; what
              counts is right under all
    norm      "l2" or "linf"

    Returns a list of `Attacked`, one more than epsilons. The model, its .grad and the random state are left as they were.
    Raises ValueError for a wrong option, and where there is no batch.
    """
    if attack not in ("fgm", "pgd"):
        raise ValueError(f"attack={attack!r} is not one of its values; use 'fgm' or 'pgd'")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps}, restarts={restarts}: give 1 or more")
    radii = [0.0, *(float(epsilon) for epsilon in epsilons)]
    outcomes: list[list[bool]] = [[] for _ in radii]
    count, shares = 0, [0.0] * len(radii)
    runner = Runner(model, embedding, input_range)
    generator = torch.Generator().manual_seed(seed)
    try:
        with held(model), torch.enable_grad():
            for inputs, labels in batches:
                logits, clean = _seen(runner, inputs, labels, None)
                size = clean.output.flatten(1).norm(dim=1, dtype=torch.float64).float()
                unit = size.clamp(min=torch.finfo(torch.float32).tiny) if relative else torch.ones_like(size)
                unit = unit.view(-1, *[1] * (clean.output.dim() - 1)).to(clean.output.dtype)
                count += len(labels)
                for i, epsilon in enumerate(radii):
                    survives = logits.argmax(1) == labels
                    deltas = (
                        _deltas(runner, inputs, labels, clean.gradient, epsilon, unit, attack, steps, norm, restarts, generator)
                        if epsilon
                        else ()
                    )
                    for delta in deltas:
                        survives &= _logits(runner, inputs, delta).argmax(1) == labels
                    outcomes[i] += survives.tolist()
                    shares[i] += float((epsilon * unit.flatten() / size.to(unit.dtype)).sum())
    finally:
        runner.close()
    if not count:
        raise ValueError("batches holds none; give pairs (inputs, labels)")
    right = [sum(each) for each in outcomes]
    clean_accuracy = right[0] / count
    return [
        Attacked(epsilon, share / count, n / count, clean_accuracy - n / count, 1 - n / max(right[0], 1), tuple(each))
        for epsilon, n, share, each in zip(radii, right, shares, outcomes, strict=True)
    ]


def plot_accuracy_under_attack(series: dict[str, list[Attacked]], path: str | pathlib.Path, *, drop: bool = False) -> pathlib.Path:
    """Draws accuracy, or its drop, over epsilon, a line for each entry (name -> what `accuracy_under_attack` returned); returns `path`."""
    with picture(path) as axes:
        for name, found in series.items():
            axes.plot([each.epsilon for each in found], [each.drop if drop else each.accuracy for each in found], marker="o", label=name)
        axes.set(xlabel="epsilon", ylabel="drop of accuracy" if drop else "accuracy", ylim=(None if drop else 0, 1.02))
        axes.legend()
    return pathlib.Path(path)


def _deltas(runner, inputs, labels, gradient, epsilon, unit, attack, steps, norm, restarts, generator) -> list[Tensor]:  # type: ignore[no-untyped-def]
    mask = attention_mask(inputs)
    if attack == "fgm":
        return [fgm_perturbation(gradient, epsilon, norm=norm, mask=mask) * unit]
    found = []
    for restart in range(restarts):
        delta = torch.zeros_like(gradient)
        if restart:
            noise = torch.randn(gradient.shape, generator=generator).to(gradient)
            delta = fgm_perturbation(noise, epsilon * torch.rand((), generator=generator).item(), norm=norm, mask=mask)
        for _ in range(steps):
            _, walk = _seen(runner, inputs, labels, delta * unit)
            delta = pgd_step(delta, walk.gradient, step_size=2.5 * epsilon / steps, radius=epsilon, norm=norm, mask=mask)
        found.append(delta * unit)
    return found


def _seen(runner: Runner, inputs: Any, labels: Tensor, delta: Tensor | None) -> tuple[Tensor, Any]:
    """Logits, and a pass that knows the gradient at the embedding; a sum over samples, so that none depends on its batch."""
    with runner.filled(Pass(delta, watched=True)) as walk:
        logits = runner.call(inputs, walk)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        (walk.gradient,) = torch.autograd.grad(loss, [walk.edge])
    return logits.detach(), walk


def _logits(runner: Runner, inputs: Any, delta: Tensor) -> Tensor:
    with torch.no_grad(), runner.filled(Pass(delta, watched=False)) as walk:
        return runner.call(inputs, walk)
