"""Measures what a model's confidence is worth: expected calibration error, and how well it tells
another set's texts from its own.
"""

import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from .pictures import GREY, picture


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Computes the expected calibration error (Guo et al. 2017): the mean over samples of |accuracy
    - confidence| of their bin, in [0, 1].

    logits [N, C];  labels [N] int64;  bins  equal bins of the largest probability over (0, 1]

    Raises ValueError for other shapes, no sample or no bin, TypeError for bins that are no integer.
    """
    return expected_calibration_error(*_sure_and_right(logits, labels), bins=bins)


def expected_calibration_error(confidence: Tensor, right: Tensor, *, bins: int = 15) -> float:
    """Computes `calibration_error` where logits are not at hand, from confidences, in [0, 1].

    confidence [N] floats in [0, 1];  right [N]  1 or 0, or True or False: whether the sample's
        answer was right;  bins  as in `calibration_error`

    Raises ValueError for other shapes, no sample or no bin, TypeError for bins that are no integer.
    """
    if confidence.dim() != 1 or right.shape != confidence.shape or not len(right):
        raise ValueError(
            f"confidence has shape {tuple(confidence.shape)}, right {tuple(right.shape)}; "
            "give [N] and [N], N above 0"
        )
    return sum(abs(r - s) * share for share, r, s in _binned(confidence, right, bins))


def plot_calibration(
    logits: Tensor | dict[str, Tensor], labels: Tensor, path: str | pathlib.Path, *, bins: int = 15
) -> pathlib.Path:
    """Draws accuracy over confidence (a reliability diagram), a line for each entry where
    logits are a dict; writes `path`, returns it.
    """
    series = logits if isinstance(logits, dict) else {"model": logits}
    with picture(path) as axes:
        axes.plot([0, 1], [0, 1], linestyle=":", color=GREY, marker="")
        for name, each in series.items():
            found = [
                entry for entry in _binned(*_sure_and_right(each, labels), bins) if entry.share > 0
            ]
            label = f"{name}: error {calibration_error(each, labels, bins=bins):.3f}"
            axes.plot(
                [entry.confidence for entry in found],
                [entry.accuracy for entry in found],
                label=label,
            )
        axes.set(
            xlabel="confidence of the model", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1)
        )
        axes.legend()
    return pathlib.Path(path)


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """Computes the chance that a sample of the model's own set is scored above one of another set;
    0.5: it cannot tell them apart.

    inside, outside  scores [N], or logits [N, C], whose score is the largest probability (Hendrycks
        and Gimpel 2017). Ties count a half.

    Raises ValueError where one of them has no sample.
    """
    scores = [_scores(x) for x in (inside, outside)]
    n, m = (len(score) for score in scores)
    if not n or not m:
        raise ValueError(f"inside has {n} samples and outside {m}; give some of each")
    ordered = scores[1].sort().values
    below = torch.searchsorted(ordered, scores[0], right=False).double()
    up_to = torch.searchsorted(ordered, scores[0], right=True).double()
    return ((below + up_to) / 2).mean().item() / m


def plot_ood_auroc(
    inside: Tensor, outside: dict[str, Tensor], path: str | pathlib.Path, *, bins: int = 30
) -> pathlib.Path:
    """Draws the histograms of the scores, the model's own set and each other one (name -> as
    in `ood_auroc`); writes `path`, returns it.
    """
    own = _scores(inside)
    others = {name: _scores(x) for name, x in outside.items()}
    everything = torch.cat([own, *others.values()])
    span = (everything.min().item(), everything.max().item())
    with picture(path) as axes:
        axes.hist(
            own.numpy(), bins, range=span, density=True, alpha=0.3, color=GREY, label="its own set"
        )
        for name, scores in others.items():
            label = f"{name}: AUROC {ood_auroc(own, scores):.3f}"
            axes.hist(scores.numpy(), bins, range=span, density=True, histtype="step", label=label)
        axes.set(
            xlabel="largest probability" if inside.dim() == 2 else "score",
            ylabel="density of samples",
        )
        axes.legend()
    return pathlib.Path(path)


def _scores(x: Tensor) -> Tensor:
    return (x.double().softmax(1).amax(1) if x.dim() == 2 else x.double()).flatten().cpu()


def _sure_and_right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest probability of each sample, and whether it is the label's."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; "
            "give [N, C] and [N], N above 0"
        )
    sure, guess = logits.double().softmax(1).max(1)
    return sure, guess == labels


class _Bin(NamedTuple):
    # of the samples
    share: float
    accuracy: float
    # their mean
    confidence: float


def _binned(sure: Tensor, right: Tensor, bins: int) -> list[_Bin]:
    """Returns what lies in each bin of confidence."""
    bins = checks.integer("bins", bins, 1)
    at = (sure * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(at, minlength=bins)
    filled = count.clamp(min=1)
    hits, sums = (
        torch.bincount(at, values.double(), minlength=bins) / filled for values in (right, sure)
    )
    shares = count / len(sure)
    return list(map(_Bin, shares.tolist(), hits.tolist(), sums.tolist()))
