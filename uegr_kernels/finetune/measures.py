"""Measures a trained classifier: on clean texts, under attacks, on mistyped and foreign ones."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import analysis
from .classifiers import Classifier
from .tables import Data, Example, limited

# of attacks, in norms of a text's embeddings
STRENGTHS = (0.01, 0.02, 0.05)
# of PGD
STEPS = 5
TYPOS = (0.05, 0.1)
# texts of the test set at most
ATTACKED, MISTYPED = 100, 500
BATCH = 32


@dataclasses.dataclass
class Outcomes:
    """Holds what a model made of every text, from which all figures of a report are drawn.

    predicted   for each measure the predicted labels' numbers
    expected    for each measure the labels' numbers
    confidence  for the test set the largest probability, for OOD sets likewise
    """

    predicted: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    expected: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    confidence: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, predicted: Tensor, expected: Sequence[float]) -> None:
        """Adds what was predicted for a measure's texts beside what is right."""
        self.predicted[name], self.expected[name] = predicted.tolist(), list(expected)


def numbers(examples: Sequence[Example], labels: Sequence[str]) -> list[Any]:
    """Returns the examples' labels as class indices, or as floats where there are no classes."""
    if not labels:
        return [float(example.label) for example in examples]
    index = {label: i for i, label in enumerate(labels)}
    return [index[example.label] for example in examples]


def commonest(examples: Sequence[Example], labels: Sequence[str]) -> int | None:
    """Returns the number of the label that most examples have, None where there are no classes."""
    found = collections.Counter(example.label for example in examples)
    return labels.index(max(labels, key=found.__getitem__)) if labels else None


def logits_of(classifier: Classifier, examples: Sequence[Example]) -> Tensor:
    """Returns the model's logits [N, C] on the CPU, in eval mode, without gradients."""
    model = classifier.model
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found: list[Tensor] = []
    order = _by_length(examples)
    try:
        with torch.no_grad():
            for inputs, _ in _batches(classifier, [examples[i] for i in order], None, device):
                output = model(**inputs)
                logits = output if isinstance(output, Tensor) else output.logits
                found.append(logits.float().cpu())
    finally:
        model.train(training)
    return torch.cat(found)[torch.tensor(order).argsort()]


def _by_length(examples: Sequence[Example]) -> list[int]:
    return sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i].texts)))


def _batches(
    classifier: Classifier,
    examples: Sequence[Example],
    labels: Sequence[str] | None,
    device: torch.device,
    size: int = BATCH,
) -> Any:
    """Yields inputs and labels, which are 0 where there are none."""
    rows = classifier.encode([example.texts for example in examples])
    targets = [0] * len(rows) if labels is None else numbers(examples, labels)
    for first in range(0, len(rows), size):
        inputs = classifier.pad(rows[first : first + size])
        yield (
            {name: value.to(device) for name, value in inputs.items()},
            torch.tensor(targets[first : first + size], device=device),
        )


Metric = Callable[[Tensor, Sequence[float]], float]


def metric_of(labels: Sequence[str]) -> Metric:
    """Returns what an epoch is chosen by: accuracy, or for regression the Pearson correlation; less
    than any of them where the model gives numbers that are not finite.
    """
    figure = accuracy if labels else correlation

    def of_finite(logits: Tensor, expected: Sequence[float]) -> float:
        return figure(logits, expected) if logits.isfinite().all() else -math.inf

    return of_finite


def accuracy(logits: Tensor, expected: Sequence[float]) -> float:
    """Computes the share of rows of logits [N, C] whose largest is at the expected label."""
    return (logits.argmax(1) == torch.tensor(expected)).float().mean().item()


def correlation(outputs: Tensor, expected: Sequence[float]) -> float:
    """Computes Pearson's correlation of outputs [N, 1] with what is expected."""
    return pearson(outputs[:, 0].tolist(), expected)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the correlation of two lists, 0 where one of them is constant."""
    both = torch.tensor([x, y], dtype=torch.float64)
    found = torch.corrcoef(both)[0, 1].item() if len(x) > 1 else 0.0
    return found if found == found else 0.0


def measure(classifier: Classifier, data: Data) -> Outcomes:
    """Returns what the model makes of the test set, clean, attacked and mistyped, and of others;
    nothing where its outputs are not finite.

    Attacks perturb the embeddings of 100 texts by multiples of their norm (FGM in one
    step, PGD in five); they are left out for regression, whose loss no attack here climbs. Typos
    are those of `analysis.corrupted`, in 500.
    """
    found = Outcomes()
    logits = logits_of(classifier, data.test)
    if not logits.isfinite().all():
        return found
    _add(found, "clean", logits, data.test, data.labels)
    if data.labels:
        found.confidence["clean"] = logits.softmax(1).amax(1).tolist()
        some = limited(data.test, ATTACKED)
        for attack in ("fgm", "pgd"):
            attacked = predicted_under(classifier, attack, STRENGTHS, some, data.labels)
            for strength, predicted in zip(STRENGTHS, attacked, strict=True):
                found.add(f"{attack} {strength:g}", predicted, numbers(some, data.labels))
    for rate in TYPOS:
        typed = mistyped(limited(data.test, MISTYPED), rate)
        _add(found, f"typos {rate:g}", logits_of(classifier, typed), typed, data.labels)
    for name, examples in data.shifted.items():
        _add(found, f"shifted {name}", logits_of(classifier, examples), examples, data.labels)
    for name, examples in data.ood.items():
        outside = logits_of(classifier, examples).softmax(1).amax(1)
        found.confidence[f"ood {name}"] = outside.tolist()
    return found


def mistyped(examples: Sequence[Example], rate: float) -> list[Example]:
    """Returns the examples with typos in so many of the letters, in each text of a pair."""
    return [
        example._replace(texts=tuple(analysis.corrupted(example.texts, "typos", rate)))
        for example in examples
    ]


def _add(
    found: Outcomes, name: str, logits: Tensor, examples: Sequence[Example], labels: Sequence[str]
) -> None:
    predicted = logits.argmax(1) if labels else logits[:, 0]
    found.add(name, predicted, numbers(examples, labels))


def predicted_under(
    classifier: Classifier,
    attack: str,
    strengths: Sequence[float],
    examples: Sequence[Example],
    labels: Sequence[str],
) -> list[Tensor]:
    """Returns for each strength of an attack, in norms of a text's embeddings, the classes that the
    model gives the examples, [N].
    """
    device = next(classifier.model.parameters()).device
    order = _by_length(examples)
    places = torch.tensor(order).argsort()
    batches = _batches(classifier, [examples[i] for i in order], labels, device, 20)
    seen = analysis.accuracy_under_attack(
        classifier.model, classifier.embedding, batches, strengths, attack, STEPS, relative=True
    )
    return [torch.tensor(one.predicted)[places] for one in seen[1:]]
