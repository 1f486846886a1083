"""Writes what was measured as a report: one table, one picture, one sentence."""

import dataclasses
import functools
import json
import pathlib
import statistics
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..analysis import expected_calibration_error, ood_auroc
from ..analysis.pictures import COLOURS, SHAPES, figure, styled
from . import measures
from .intervals import Figures, Interval, bootstrap, wilson
from .measures import Outcomes
from .tables import shown

# characters of a name in the picture
LONGEST = 45
REMEDY = "Try a smaller --lr, or a smaller --epsilon."
# the commonest label over the rarest, from which on F1 is reported too
UNEVEN = 1.5


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds one run: its recipe and seed, what it made of the texts, the seconds of steps, its best
    epoch and the score there, and whether loss or score were not finite at some time.

    outcomes  without measures where the model's outputs are not finite
    """

    recipe: str
    seed: int
    outcomes: Outcomes
    seconds: list[float]
    best_epoch: float
    validation: float | None
    diverged: bool

    @property
    def usable(self) -> bool:
        """Returns whether there is a model that answers with numbers."""
        return bool(self.outcomes.predicted)


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds a line of the table: a measure, and for each recipe its figure with its interval.

    unit  "%" (the figures are shares), "" (numbers as they are) or "s" (seconds)
    """

    name: str
    figures: dict[str, Interval]
    unit: str = "%"


def accuracy(predicted: Figures, expected: Figures) -> float:
    """Computes the share of texts whose predicted label is the expected one."""
    return float(np.mean(predicted == expected))


def calibration(right: Figures, confidence: Figures) -> float:
    """Computes the expected calibration error of confidences."""
    return expected_calibration_error(torch.from_numpy(confidence), torch.from_numpy(right))


def auroc(inside: Figures, outside: Figures) -> float:
    """Computes the chance that a text of the task is scored above one of another set."""
    return ood_auroc(torch.from_numpy(inside), torch.from_numpy(outside))


def f1(predicted: Figures, expected: Figures, classes: int) -> float:
    """Computes the mean of all classes' F1, 0 for one that neither occurs nor is predicted."""
    right = np.bincount(expected[predicted == expected].astype(int), minlength=classes)
    among = sum(np.bincount(each.astype(int), minlength=classes) for each in (predicted, expected))
    return float(np.mean(2 * right / np.maximum(among, 1)))


def _pearson(predicted: Figures, expected: Figures) -> float:
    return measures.pearson(predicted.tolist(), expected.tolist())


def rows(results: Sequence[Result], labels: Sequence[str]) -> list[Row]:
    """Returns the table's lines, each figure with a 95 % interval.

    Accuracies of one seed have Wilson's interval, everything else a bootstrap's over texts, with
    several seeds over seeds and texts; a step's cost one over steps, and likewise seeds. F1 stands
    beside accuracies where the test set's classes are uneven, or a shifted set's own are.
    """
    f1_of = functools.partial(f1, classes=len(labels))
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
            if any(_uneven(first.expected[each], len(labels)) for each in _judged_by(name)):
                f1s = {key: bootstrap(f1_of, value, 400) for key, value in arrays.items()}
                found.append(Row(f"F1, {said(name)}", f1s))
        else:
            title = f"correlation, {said(name)}"
            pearsons = {key: bootstrap(_pearson, value, 400) for key, value in arrays.items()}
            found.append(Row(title, pearsons, ""))
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
            found.append(Row(f"AUROC against {name.removeprefix('ood ')}", areas, ""))
    seconds = {
        recipe: bootstrap(
            np.median, [(np.array(each.seconds),) for each in results if each.recipe == recipe], 400
        )
        for recipe in by_recipe
    }
    return [*found, Row("seconds a step", seconds, "s")]


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


def _judged_by(name: str) -> tuple[str, ...]:
    """Returns the measures whose classes decide whether F1 is reported of this one, too."""
    return ("clean", name) if name.startswith("shifted ") else ("clean",)


def _uneven(expected: Sequence[float], classes: int) -> bool:
    counts = np.bincount(np.array(expected, int), minlength=classes)
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
            f"`{base}`: {_said(figure, by_recipe[base], 'clean', labels)} on clean texts, "
            f"{_said(figure, by_recipe[base], hard, labels)} {said(hard)}; what it cost and gained "
            f"is seen beside others: `--compare plain,{'at' if base == 'plain' else base}`."
        )
    lines = []
    for name in names:
        if name == base:
            continue
        pairs = [(a, b) for a in by_recipe[name] for b in by_recipe[base] if a.seed == b.seed]
        if not pairs:
            continue
        gain, price = (_difference(figure, pairs, measure) for measure in (hard, "clean"))
        cost = _cost(by_recipe[name]) / _cost(by_recipe[base])
        mine, its = (_said(figure, by_recipe[each], hard, labels) for each in (name, base))
        lines.append(
            f"{said(hard)[0].upper()}{said(hard)[1:]} `{name}` reaches {mine} and `{base}` {its} "
            f"({_points(gain, labels)}), at the price of {cost:.1f} times the seconds a step and, "
            f"on clean texts, {_points(price, labels)}."
        )
    return " ".join(lines)


def _said(figure: Any, results: Sequence[Result], measure: str, labels: Sequence[str]) -> str:
    mean = statistics.fmean(figure(*_arrays(each.outcomes, measure)) for each in results)
    return f"{100 * mean:.1f} %" if labels else f"a correlation of {mean:.3f}"


def _cost(results: Sequence[Result]) -> float:
    return statistics.fmean(statistics.median(each.seconds) for each in results)


def _points(interval: Interval, labels: Sequence[str]) -> str:
    if not labels:
        value, low, high = (f"{each:+.3f}" for each in interval)
        return f"{value}, 95 %: {low} to {high}"
    value, low, high = (f"{100 * each:+.1f}" for each in interval)
    return f"{value} points, 95 %: {low} to {high}"


def _difference(figure: Any, runs: Sequence[tuple[Result, Result]], measure: str) -> Interval:
    """Returns one recipe's figure over another's, paired by seed and text."""

    def over(p: Figures, q: Figures, expected: Figures) -> float:
        return float(figure(p, expected) - figure(q, expected))

    pairs = []
    for a, b in runs:
        predicted, expected = _arrays(a.outcomes, measure)
        pairs.append((predicted, _arrays(b.outcomes, measure)[0], expected))
    return bootstrap(over, pairs)


def baseline(results: Sequence[Result], usual: int | None) -> float:
    """Computes what one answer for every text gets on the test set: the share of texts that have
    the commonest training label, or, for regression, the correlation of a constant, 0.
    """
    if usual is None:
        return 0.0
    return float(np.mean(np.array(results[0].outcomes.expected["clean"]) == usual))


def warnings_of(
    results: Sequence[Result], table: Sequence[Row], labels: Sequence[str], usual: int | None
) -> list[str]:
    """Returns a line for each training that diverged, and for each recipe that is not shown to have
    learned anything: no better than one answer for every text.
    """
    lines = []
    for each in results:
        if each.usable and each.diverged:
            lines.append(
                f"`{each.recipe}`, seed {each.seed}: training diverged at some time (its loss was "
                f"no finite number); the model is that of epoch {each.best_epoch:g}. {REMEDY}"
            )
        elif not each.usable:
            lines.append(
                f"`{each.recipe}`, seed {each.seed}: training diverged (the model's outputs are no "
                f"finite numbers); nothing is reported of it, and no model is kept. {REMEDY}"
            )
    if not table:
        return lines
    bar = baseline([each for each in results if each.usable], usual)
    what = (
        "a constant prediction has 0"
        if usual is None
        else (f"always answering {shown(labels[usual])} is right on {100 * bar:.1f} %")
    )
    for recipe, found in table[0].figures.items():
        if found.low <= bar:
            lines.append(
                f"`{recipe}` is not shown to have learned anything: {_cell(found, table[0].unit)} "
                f"on clean texts, and {what}. Try more texts or epochs, another --lr, or a smaller "
                "--epsilon."
            )
    return lines


def write(
    folder: pathlib.Path,
    results: Sequence[Result],
    labels: Sequence[str],
    usual: int | None,
    command: str,
    about: str,
) -> dict[str, Any]:
    """Writes report.md, report.json and report.png; returns what report.json holds.

    usual  the number of the commonest training label; None for regression
    """
    good = [result for result in results if result.usable]
    table = rows(good, labels) if good else []
    said_once = sentence(good, labels) if good else "No training gave a model that can be measured."
    warned = warnings_of(results, table, labels, usual)
    recipes = list(dict.fromkeys(result.recipe for result in good))
    seeds = sorted({result.seed for result in results})
    lines = ["# What the model withstands", "", said_once, ""]
    lines += [part for line in warned for part in (f"**{line}**", "")]
    lines += [_intervals_in_words(about, len(seeds), good, labels, usual), ""]
    if table:
        cells = [
            [row.name, *(_cell(row.figures[each], row.unit) for each in recipes)] for row in table
        ]
        lines += [
            *_aligned([["", *recipes], *cells]),
            "",
            "![The same as a picture](report.png)",
            "",
        ]
    # one line in front of which stands nothing would end the block
    lines += ["Made by", "", *(f"    {line}" for line in command.splitlines()), ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    found: dict[str, Any] = {
        "command": command,
        "sentence": said_once,
        "warnings": warned,
        "labels": list(labels),
        "baseline": baseline(good, usual) if good else None,
        "seeds": seeds,
        "measures": [
            {
                "name": row.name,
                "figures": {name: value._asdict() for name, value in row.figures.items()},
            }
            for row in table
        ],
        "seconds_per_step": {
            recipe: _cost([each for each in good if each.recipe == recipe]) for recipe in recipes
        },
        "runs": [dataclasses.asdict(result) for result in results],
    }
    (folder / "report.json").write_text(
        json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    if table:
        draw(folder / "report.png", table, recipes)
    return found


def _intervals_in_words(
    about: str, seeds: int, good: Sequence[Result], labels: Sequence[str], usual: int | None
) -> str:
    """Says what the figures are of."""
    said = [f"{_one_line(about)} {seeds} seed{'s' * (seeds > 1)}."]
    if good:
        said.append(
            "In brackets 95 % intervals: "
            + ("over seeds and texts" if seeds > 1 else "over texts, of one training")
            + f"; of seconds over {'seeds and ' * (seeds > 1)}steps."
        )
    if good and usual is not None:
        said.append(
            f"Attacks perturb the embeddings of {measures.ATTACKED} texts at most, by multiples of "
            f"their norm. Always answering {_one_line(shown(labels[usual]))}, the commonest label, "
            f"is right on {100 * baseline(good, usual):.1f} % of the clean texts."
        )
    elif good:
        said.append("A constant prediction has a correlation of 0.")
    return " ".join(said)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table that stands in columns on a terminal, too."""
    clean = [[_one_line(cell).replace("|", r"\|") for cell in row] for row in cells]
    widths = [max(map(_width, column)) for column in zip(*clean, strict=True)]

    def line(row: Sequence[str]) -> str:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        first, *others = zip(row, gaps, strict=True)
        return f"| {' | '.join([first[0] + first[1], *(gap + cell for cell, gap in others)])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(clean[0]), line(rule), *map(line, clean[1:])]


def _width(text: str) -> int:
    """Returns how many places of a terminal a text takes: two a Chinese character."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _cell(interval: Interval, unit: str) -> str:
    if unit == "%":
        value, low, high = (f"{100 * each:.1f}" for each in interval)
        return f"{value} % ({low}-{high})"
    value, low, high = (f"{each:.3g}" if unit == "s" else f"{each:.3f}" for each in interval)
    return f"{value} ({low} to {high})"


@styled()
def draw(path: pathlib.Path, table: Sequence[Row], recipes: Sequence[str]) -> None:
    """Draws each measure as a line of points, one a recipe, with their intervals."""
    drawn_rows = [row for row in table if row.unit != "s" and not row.name.startswith("calib")]
    drawn = figure(7, 1.2 + 0.14 * len(drawn_rows) * (1 + len(recipes)))
    axes = drawn.subplots()
    percent = any(row.unit == "%" for row in drawn_rows)
    scale = 100 if percent else 1
    for k, recipe in enumerate(recipes):
        ys = [i + 0.7 * ((k + 0.5) / len(recipes) - 0.5) for i in range(len(drawn_rows))]
        found = [row.figures[recipe] for row in drawn_rows]
        values = [scale * each.value for each in found]
        ends = [
            [scale * max(0.0, each.value - each.low) for each in found],
            [scale * max(0.0, each.high - each.value) for each in found],
        ]
        axes.errorbar(values, ys, xerr=ends, linestyle="", label=recipe, **look(k))
    # what the axis says of all of them
    names = [
        _one_line(row.name).removeprefix("" if percent else "correlation, ").replace("$", r"\$")
        for row in drawn_rows
    ]
    axes.set_yticks(
        range(len(names)),
        [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in names],
    )
    axes.invert_yaxis()
    axes.grid(axis="x")
    # under the whole figure: under the axes alone it could be wider than they are
    drawn.supxlabel(
        "percent, with 95 % intervals (AUROC: hundredths)"
        if percent
        else "correlation, with 95 % intervals",
        size=9,
    )
    drawn.legend(loc="outside upper center", ncols=4)
    with warnings.catch_warnings():
        # a name in a script that the font has not is drawn as boxes; the table has it
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawn.savefig(path)


def look(k: int) -> dict[str, str]:
    """Returns colour and shape of the k-th recipe, another pair for each of the first 49."""
    turn = k // len(COLOURS)
    return {"color": COLOURS[k % len(COLOURS)], "marker": SHAPES[(k + turn) % len(SHAPES)]}
