"""Accuracy under white-box attacks on the embeddings (docs/methods.md, "Analyses")."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..core import checks
from ..passes import InputBatch, Inputs, Pass, Runner
from ..perturbation import NORMS, fgm_perturbation, masked, pgd_step
from .pictures import picture
from .watching import held

# weak, medium, strong
STRENGTHS = (0.01, 0.25, 0.5)
# a label that does not count, as in F.cross_entropy
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Attacked:
    """Holds the accuracy under one strength of an attack.

    epsilon   radius of the ball, as it was given
    relative  its mean share of ||e||, the norm of a sample's embeddings: the attack's own, the
        largest |element| for "linf"
    accuracy  in [0, 1];  drop  from the clean accuracy;  relative_drop  the drop's share of it
    outcomes  of every sample, in the order of the batches: whether it is right (one whose label
              does not count is not)
    predicted  of every sample, likewise: the class, after the first attack that succeeds
    """

    epsilon: float
    relative: float
    accuracy: float
    drop: float
    relative_drop: float
    outcomes: tuple[bool, ...] = ()
    predicted: tuple[int, ...] = ()


def accuracy_under_attack(
    model: nn.Module,
    embedding: nn.Module | None,
    batches: Iterable[tuple[Inputs, Tensor]],
    epsilons: Sequence[float] = STRENGTHS,
    attack: str = "fgm",
    steps: int = 10,
    *,
    norm: str = "l2",
    relative: bool = False,
    restarts: int = 1,
    seed: int = 0,
    input_range: tuple[float, float] | None = None,
    batch_axis: int | None = None,
) -> list[Attacked]:
    """Computes the accuracy without (epsilon 0, first) and with an attack on the embedding's
    output, per sample, in eval mode with true labels.

    batches   pairs (inputs, labels [N] int64, of which -100 does not count); inputs and embedding
        as in `BiStage`
    epsilons  radii; with `relative` multiples of each sample's ||e||_2 over its real tokens
    attack    "fgm": one step | "pgd": `steps` steps of 2.5*epsilon/steps on the ball, from 0 and
              from `restarts` - 1 random points; what counts is right under all
    norm      "l2", or, without `relative`, "linf"
    input_range, batch_axis   as in `BiStage`

    Returns a list of `Attacked`, one more than epsilons. The model, its .grad and the random state
    are left as they were. Raises TypeError or ValueError for a wrong option or label, for an empty
    batch, and where there is none.
    """
    checks.choice("attack", attack, ("fgm", "pgd"))
    steps, restarts = checks.integer("steps", steps, 1), checks.integer("restarts", restarts, 1)
    if not isinstance(epsilons, Iterable):
        raise TypeError(
            f"epsilons={epsilons!r} is a {type(epsilons).__name__}; give a list of radii"
        )
    radii = [0.0, *(checks.number("epsilon", epsilon, 0) for epsilon in epsilons)]
    checks.choice("norm", norm, NORMS)
    outcomes: list[list[bool]] = [[] for _ in radii]
    classes: list[list[int]] = [[] for _ in radii]
    count, shares = 0, [0.0] * len(radii)
    runner = Runner(
        model, embedding, input_range, batch_axis=batch_axis, relative=relative, norm=norm
    )
    generator = torch.Generator().manual_seed(checks.signed_seed(seed))
    try:
        with held(model), torch.enable_grad():
            for inputs, labels in batches:
                batch = runner.take(inputs, labels)
                batch.keeps_output = True
                if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
                    raise ValueError(
                        f"labels are {labels.dtype} of shape {tuple(labels.shape)}; "
                        "give class indices [N]"
                    )
                counted = labels != IGNORED
                logits, clean = _seen(runner, batch, None)
                e = masked(clean.output, clean.mask).flatten(1).float()
                size = torch.linalg.vector_norm(
                    e, 2.0 if norm == "l2" else float("inf"), dim=1, dtype=torch.float64
                )[counted]
                count += int(counted.sum())
                for i, epsilon in enumerate(radii):
                    predicted = logits.argmax(1)
                    survives = (predicted == labels) & counted
                    for delta in (
                        _deltas(runner, clean, epsilon, attack, steps, norm, restarts, generator)
                        if epsilon
                        else ()
                    ):
                        found = _logits(runner, batch, delta).argmax(1)
                        predicted = torch.where(survives, found, predicted)
                        survives &= found == labels
                    outcomes[i] += survives.tolist()
                    classes[i] += predicted.tolist()
                    share = (
                        torch.full_like(size, epsilon)
                        if relative or not epsilon
                        else epsilon / size
                    )
                    shares[i] += float(share.sum())
    finally:
        runner.close()
    if not count:
        raise ValueError("batches holds none with labels that count; give pairs (inputs, labels)")
    right = [sum(each) for each in outcomes]
    clean_accuracy = right[0] / count
    return [
        Attacked(
            epsilon,
            share / count,
            n / count,
            clean_accuracy - n / count,
            1 - n / max(right[0], 1),
            tuple(each),
            tuple(given),
        )
        for epsilon, n, share, each, given in zip(
            radii, right, shares, outcomes, classes, strict=True
        )
    ]


def plot_accuracy_under_attack(
    series: dict[str, list[Attacked]], path: str | pathlib.Path, *, drop: bool = False
) -> pathlib.Path:
    """Draws accuracy, or its drop, over epsilon, a line for each entry (name -> what
    `accuracy_under_attack` returned); returns `path`.
    """
    with picture(path) as axes:
        for name, found in series.items():
            axes.plot(
                [each.epsilon for each in found],
                [each.drop if drop else each.accuracy for each in found],
                label=name,
            )
        axes.set(
            xlabel="epsilon, the size of the perturbation",
            ylabel="accuracy lost" if drop else "accuracy under attack",
            ylim=(None if drop else 0, 1.02),
        )
        axes.legend()
    return pathlib.Path(path)


def _deltas(
    runner: Runner,
    clean: Pass,
    epsilon: float,
    attack: str,
    steps: int,
    norm: str,
    restarts: int,
    generator: torch.Generator,
) -> list[Tensor]:
    step = functools.partial(fgm_perturbation, norm=norm, mask=clean.mask)
    climb = functools.partial(
        pgd_step, step_size=2.5 * epsilon / steps, radius=epsilon, norm=norm, mask=clean.mask
    )
    if attack == "fgm":
        return [clean.ascended(functools.partial(step, epsilon=epsilon))]
    found = []
    for restart in range(restarts):
        delta = torch.zeros_like(clean.gradient)
        if restart:
            noise = torch.randn(delta.shape, generator=generator).to(delta)
            length = epsilon * torch.rand((), generator=generator).item()
            delta = clean.ascended(functools.partial(step, epsilon=length), noise)
        for _ in range(steps):
            _, pass_ = _seen(runner, clean.batch, delta)
            delta = pass_.ascended(functools.partial(climb, pass_.measured(delta)))
        found.append(delta)
    return found


def _seen(runner: Runner, batch: InputBatch, delta: Tensor | None) -> tuple[Tensor, Pass]:
    """Returns logits, and a pass that knows the gradient at the embedding; of a sum over samples,
    so that none depends on its batch.
    """
    with runner.filled(Pass(batch, delta, watched=True)) as pass_:
        logits = runner.call(pass_)
        checks.classes(batch.labels, logits.shape[1], IGNORED)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), batch.labels.long(), ignore_index=IGNORED, reduction="sum"
        )
        pass_.keep(*torch.autograd.grad(loss, [pass_.edge], allow_unused=True))
    return logits.detach(), pass_


def _logits(runner: Runner, batch: InputBatch, delta: Tensor) -> Tensor:
    with torch.no_grad(), runner.filled(Pass(batch, delta, watched=False)) as pass_:
        return runner.call(pass_)
