"""Writes what was measured as a report: one table, one picture, one sentence."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..analysis.calibration import expected_error, ood_auroc
from ..analysis.pictures import figure, styled
from . import measures
from .intervals import Figures, Interval, bootstrap, wilson
from .measures import Outcomes

UNEVEN = 1.5  # the commonest label over the rarest, from which on F1 is reported too


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds one run: its recipe and seed, what it made of the texts, and what a step cost."""

    recipe: str
    seed: int
    outcomes: Outcomes
    seconds_per_step: float
    best_epoch: float
    validation: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds a line of the table: a measure, and for each recipe its figure with its interval."""

    name: str
    figures: dict[str, Interval]
    percent: bool = True


def accuracy(predicted: Figures, expected: Figures) -> float:
    """Computes the share of texts whose predicted label is the expected one."""
    return float(np.mean(predicted == expected))


def calibration(right: Figures, confidence: Figures) -> float:
    """Computes the expected calibration error of confidences."""
    return expected_error(torch.from_numpy(confidence), torch.from_numpy(right))


def auroc(inside: Figures, outside: Figures) -> float:
    """Computes the chance that a text of the task is scored above one of another set."""
    return ood_auroc(torch.from_numpy(inside), torch.from_numpy(outside))


def _f1(predicted: Figures, expected: Figures) -> float:
    return measures.f1(predicted.tolist(), expected.tolist())


def _pearson(predicted: Figures, expected: Figures) -> float:
    return measures.pearson(predicted.tolist(), expected.tolist())


def rows(results: Sequence[Result], labels: Sequence[str]) -> list[Row]:
    """Returns the table's lines, each figure with a 95 % interval.

    Accuracies of one seed have Wilson's interval, everything else a bootstrap's over texts, with
    several seeds over seeds and texts.
    """
    by_recipe: dict[str, list[Outcomes]] = {}
    for result in results:
        by_recipe.setdefault(result.recipe, []).append(result.outcomes)
    first = results[0].outcomes
    found = []
    for name in first.predicted:
        arrays = {
            recipe: [_arrays(each, name) for each in outcomes]
            for recipe, outcomes in by_recipe.items()
        }
        if labels:
            found.append(Row(said(name), {key: _accuracy(value) for key, value in arrays.items()}))
            if _uneven(first.expected[name]) and not name.startswith(("fgm", "pgd")):
                f1s = {key: bootstrap(_f1, value, 400) for key, value in arrays.items()}
                found.append(Row(f"F1, {said(name)}", f1s))
        else:
            title = f"correlation, {said(name)}"
            pearsons = {key: bootstrap(_pearson, value, 400) for key, value in arrays.items()}
            found.append(Row(title, pearsons, percent=False))
    if labels:
        errors = {
            recipe: bootstrap(calibration, [_sure(each) for each in outcomes])
            for recipe, outcomes in by_recipe.items()
        }
        found.append(Row("calibration error", errors))
    for name in first.confidence:
        if name.startswith("ood "):
            areas = {
                recipe: bootstrap(auroc, [_scores(each, name) for each in outcomes])
                for recipe, outcomes in by_recipe.items()
            }
            found.append(Row(f"AUROC against {name.removeprefix('ood ')}", areas, percent=False))
    return found


def _arrays(outcomes: Outcomes, name: str) -> tuple[Figures, Figures]:
    return np.array(outcomes.predicted[name], float), np.array(outcomes.expected[name], float)


def _sure(outcomes: Outcomes) -> tuple[Figures, Figures]:
    predicted, expected = _arrays(outcomes, "clean")
    return (predicted == expected).astype(float), np.array(outcomes.confidence["clean"], float)


def _scores(outcomes: Outcomes, name: str) -> tuple[Figures, Figures]:
    inside, outside = outcomes.confidence["clean"], outcomes.confidence[name]
    return np.array(inside, float), np.array(outside, float)


def _accuracy(seeds: Sequence[tuple[Figures, Figures]]) -> Interval:
    if len(seeds) > 1:
        return bootstrap(accuracy, seeds)
    predicted, expected = seeds[0]
    return wilson(int((predicted == expected).sum()), len(expected))


def _uneven(expected: Iterable[float]) -> bool:
    _, counts = np.unique(list(expected), return_counts=True)
    return bool(counts.max() > UNEVEN * counts.min())


def said(name: str) -> str:
    """Returns a measure's name in words."""
    kind, _, rest = name.partition(" ")
    if kind in ("fgm", "pgd"):
        return f"under {kind.upper()} at {rest}"
    if kind == "typos":
        return f"with typos in {100 * float(rest):g} % of the letters"
    return f"on {rest}" if kind == "shifted" else name


def sentence(results: Sequence[Result], labels: Sequence[str]) -> str:
    """Says in one sentence for each recipe what was bought at what price."""
    by_recipe: dict[str, list[Result]] = {}
    for result in results:
        by_recipe.setdefault(result.recipe, []).append(result)
    names = list(by_recipe)
    base = "plain" if "plain" in names else names[0]
    hard = f"pgd {measures.STRENGTHS[1]:g}"
    if hard not in results[0].outcomes.predicted:
        hard = f"typos {measures.TYPOS[1]:g}"
    figure = accuracy if labels else _pearson
    if len(names) == 1:
        return (
            f"{base}: {_said(figure, by_recipe[base], 'clean', labels)} on clean texts, "
            f"{_said(figure, by_recipe[base], hard, labels)} {said(hard)}; what it cost and gained "
            f"is seen beside others: --compare plain,{'at' if base == 'plain' else base}."
        )
    lines = []
    for name in names:
        if name == base:
            continue
        gain, price = (
            _difference(figure, by_recipe[name], by_recipe[base], measure)
            for measure in (hard, "clean")
        )
        cost = statistics.fmean(each.seconds_per_step for each in by_recipe[name])
        cost /= statistics.fmean(each.seconds_per_step for each in by_recipe[base])
        mine, its = (_said(figure, by_recipe[each], hard, labels) for each in (name, base))
        lines.append(
            f"{said(hard)[0].upper()}{said(hard)[1:]} {name} reaches {mine} and {base} {its} "
            f"({_points(gain)}), at the price of {cost:.1f} times the seconds a step and, on clean "
            f"texts, {_points(price)}."
        )
    return " ".join(lines)


def _said(figure: Any, results: Sequence[Result], measure: str, labels: Sequence[str]) -> str:
    mean = statistics.fmean(figure(*_arrays(each.outcomes, measure)) for each in results)
    return f"{mean:.1%}" if labels else f"a correlation of {mean:.3f}"


def _points(interval: Interval) -> str:
    value, low, high = (f"{100 * each:+.1f}" for each in interval)
    return f"{value} points, 95 %: {low} to {high}"


def _difference(
    figure: Any, mine: Sequence[Result], its: Sequence[Result], measure: str
) -> Interval:
    """Returns one recipe's figure over another's, paired by seed and text."""

    def over(p: Figures, q: Figures, expected: Figures) -> float:
        return float(figure(p, expected) - figure(q, expected))

    pairs = []
    for a, b in zip(mine, its, strict=True):
        predicted, expected = _arrays(a.outcomes, measure)
        pairs.append((predicted, _arrays(b.outcomes, measure)[0], expected))
    return bootstrap(over, pairs)


def write(
    folder: pathlib.Path, results: Sequence[Result], labels: Sequence[str], command: str, about: str
) -> dict[str, Any]:
    """Writes report.md, report.json and report.png; returns what report.json holds."""
    table = rows(results, labels)
    said_once = sentence(results, labels)
    recipes = list(dict.fromkeys(result.recipe for result in results))
    seeds = sorted({result.seed for result in results})
    cost = {
        recipe: statistics.fmean(
            result.seconds_per_step for result in results if result.recipe == recipe
        )
        for recipe in recipes
    }
    lines = [
        "# What the model withstands",
        "",
        said_once,
        "",
        f"{about} {len(seeds)} seed{'s' * (len(seeds) > 1)}. In brackets 95 % intervals"
        + (": over seeds and texts." if len(seeds) > 1 else ": over texts, of one training.")
        + f" Attacks perturb the embeddings of {measures.ATTACKED} texts at most, by multiples of "
        "their norm.",
        "",
        "| " + " | ".join(["", *recipes]) + " |",
        "| --- |" + " ---: |" * len(recipes),
    ]
    lines += [
        "| "
        + " | ".join([row.name, *(_cell(row.figures[recipe], row.percent) for recipe in recipes)])
        + " |"
        for row in table
    ]
    lines.append(
        "| seconds a step | " + " | ".join(f"{cost[recipe]:.3f}" for recipe in recipes) + " |"
    )
    lines += ["", "![The same as a picture](report.png)", "", "Made by", "", f"    {command}", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    found: dict[str, Any] = {
        "command": command,
        "sentence": said_once,
        "labels": list(labels),
        "seeds": seeds,
        "measures": [
            {
                "name": row.name,
                "figures": {name: value._asdict() for name, value in row.figures.items()},
            }
            for row in table
        ],
        "seconds_per_step": cost,
        "runs": [dataclasses.asdict(result) for result in results],
    }
    (folder / "report.json").write_text(
        json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    draw(folder / "report.png", table, recipes)
    return found


def _cell(interval: Interval, percent: bool) -> str:
    if percent:
        value, low, high = (f"{100 * each:.1f}" for each in interval)
        return f"{value} % ({low}-{high})"
    value, low, high = (f"{each:.3f}" for each in interval)
    return f"{value} ({low}-{high})"


@styled()
def draw(path: pathlib.Path, table: Sequence[Row], recipes: Sequence[str]) -> None:
    """Draws each measure as a line of points, one a recipe, with their intervals."""
    shown = [row for row in table if not row.name.startswith("calibration")]
    drawn = figure(7, 1.2 + 0.14 * len(shown) * (1 + len(recipes)))
    axes = drawn.subplots()
    for k, recipe in enumerate(recipes):
        ys = [i + 0.7 * ((k + 0.5) / len(recipes) - 0.5) for i in range(len(shown))]
        found = [row.figures[recipe] for row in shown]
        values = [100 * each.value for each in found]
        ends = [
            [100 * max(0.0, each.value - each.low) for each in found],
            [100 * max(0.0, each.high - each.value) for each in found],
        ]
        axes.errorbar(values, ys, xerr=ends, linestyle="", label=recipe)
    axes.set_yticks(range(len(shown)), [row.name.replace("$", r"\$") for row in shown])
    axes.invert_yaxis()
    axes.set(xlabel="percent right, with 95 % intervals (correlations and AUROC: hundredths)")
    axes.xaxis.label.set_size(9)
    axes.grid(axis="x")
    drawn.legend(loc="outside upper center", ncols=4)
    drawn.savefig(path)
