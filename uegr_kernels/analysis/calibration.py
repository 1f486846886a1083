"""What a model's confidence is worth: expected calibration error, and how well it tells another set's texts from its own."""

import pathlib

import torch
from torch import Tensor

from .watching import picture


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): the mean over samples of |accuracy - confidence| of their bin, in [0, 1].

    logits [N, C];  labels [N] int64;  bins  equal bins of the largest probability over (0, 1]
    """
    return sum(abs(right - sure) * share for share, right, sure in _binned(logits, labels, bins))


def plot_calibration(logits: Tensor, labels: Tensor, path: str | pathlib.Path, *, bins: int = 15) -> pathlib.Path:
    """Draws accuracy over confidence (a reliability diagram); writes `path` and returns it."""
    found = [entry for entry in _binned(logits, labels, bins) if entry[0] > 0]
    with picture(path) as axes:
        axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
        axes.plot([sure for _, _, sure in found], [right for _, right, _ in found], marker="o")
        error = calibration_error(logits, labels, bins=bins)
        axes.set(xlabel="confidence", ylabel="accuracy", title=f"expected calibration error {error:.3f}", xlim=(0, 1), ylim=(0, 1))
    return pathlib.Path(path)


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """The chance that a sample of the model's own set is scored above one of another set; 0.5: it cannot tell them apart.

    inside, outside  scores [N], or logits [N, C], whose score is the largest probability (Hendrycks and Gimpel 2017). Ties count a half.
    """
    scores = [(x.double().softmax(1).amax(1) if x.dim() == 2 else x.double()).flatten() for x in (inside, outside)]
    n, m = (len(score) for score in scores)
    if not n or not m:
        raise ValueError(f"inside has {n} samples and outside {m}; give some of each")
    ordered = scores[1].sort().values
    below = torch.searchsorted(ordered, scores[0], right=False).double()
    up_to = torch.searchsorted(ordered, scores[0], right=True).double()
    return ((below + up_to) / 2).mean().item() / m


def _binned(logits: Tensor, labels: Tensor, bins: int) -> list[tuple[float, float, float]]:
    """Share of samples, accuracy and mean confidence by bin."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; give [N, C] and [N], N above 0")
    if bins < 1:
        raise ValueError(f"bins={bins}: give 1 or more")
    sure, guess = logits.double().softmax(1).max(1)
    at = (sure * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for k in range(bins):
        here = at == k
        count = int(here.sum())
        right, mean = ((guess == labels)[here].double().mean().item(), sure[here].mean().item()) if count else (0.0, 0.0)
        found.append((count / len(labels), right, mean))
    return found
