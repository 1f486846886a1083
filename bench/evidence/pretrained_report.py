"""Tells what the runs on a pre-trained model came to, in tables and pictures; a row stands where
all of its seeds do.
"""

import pathlib
import statistics
from typing import Any

from uegr_kernels.analysis.pictures import COLOURS, GREY, styled

from .. import plot
from ..tables import table
from . import intervals
from .intervals import Interval
from .pretrained import (
    FURTHER,
    METHODS,
    MIDDLE,
    STRENGTHS,
    TIERS,
    TYPOS,
    Run,
    TierPlan,
    share_right,
)

QUESTIONS = {
    "Does UEGR buy robustness that longer plain training does not?": (
        "uegr",
        "plain_as_many_passes",
    ),
    "Does the selection matter beyond adversarial training?": ("uegr", "uegr_all_selected"),
    "Does saliency matter beyond a random selection of the same share?": (
        "uegr",
        "uegr_constant_same_share",
    ),
    "Does adaptive dropout matter?": ("uegr", "uegr_plain_dropout"),
}
CHOSEN_FOR = {"clean": "clean accuracy", "pgd": "accuracy under PGD", "both": "both"}
# results of all seeds by (method, kind of point)
Rows = dict[tuple[str, str], list[dict[str, Any]]]


def whole(plan: TierPlan, data: str) -> tuple[Rows, dict[tuple[str, str], list[Run]]]:
    """Returns the rows of a set that are whole, and their runs."""
    found: Rows = {}
    runs: dict[tuple[str, str], list[Run]] = {}
    for names, sets, seeds in TIERS.values():
        for name in names if data in sets else ():
            needed = [run for source in plan.sources(name) for run in plan.tuning(data, source)]
            if not all(run in plan.runs for run in needed):
                continue
            if not all(run in plan.runs for run in plan.share_runs(data, name)):
                continue
            for kind, each in plan.finals(data, name, seeds).items():
                if all(run in plan.runs for run in each):
                    found[name, kind] = [plan.runs[run] for run in each]
                    runs[name, kind] = each
    return found, runs


def picks(data: str) -> dict[str, Any]:
    """Returns what is read off a result as a string of outcomes, by the column's title."""
    columns: dict[str, Any] = {"clean": lambda result: result["clean"]}
    for attack in ("fgm", "pgd"):
        for i, strength in enumerate(STRENGTHS):
            columns[f"{attack.upper()} {strength:g}"] = lambda result, attack=attack, i=i: result[
                attack
            ][i]
    for rate in TYPOS:
        columns[f"{rate:.0%} typos"] = lambda result, key=f"typos {rate:g}": result[key]
    return columns | {name: (lambda result, name=name: result[name]) for name in FURTHER[data]}


def main_titles(data: str) -> list[str]:
    """Returns the titles of the main columns, which the summary and the picture have."""
    return ["clean", f"PGD {STRENGTHS[MIDDLE]:g}", f"{TYPOS[-1]:.0%} typos", *FURTHER[data]]


def points(interval: Interval, scale: float = 100) -> str:
    """Returns a mean and its interval in points."""
    low, middle, high = (
        round(scale * value, 1) + 0.0 for value in (interval.low, interval.mean, interval.high)
    )
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def write(plan: TierPlan, output: pathlib.Path) -> str:
    """Writes README.md, the pictures and, for docs/evidence.md, summary.md into `output`; returns
    what is written and what is missing.
    """
    parts, missing = ["# What each method buys a pre-trained language model"], []
    short = []
    for data in FURTHER:
        rows, runs = whole(plan, data)
        if rows:
            parts += described(data, rows, runs, output)
            short += summarised(data, rows)
        tiers = [tier for tier, (_, sets, _) in TIERS.items() if data in sets]
        for tier in tiers:
            names = [name for name in TIERS[tier][0] if not any(name == row for row, _ in rows)]
            if names:
                missing.append(f"tier {tier}, {data}: {', '.join(names)}")
    go_on = "python -m bench.accuracy --model minilm --data ../shared/data --tiers 1,2,3 --jobs 2"
    if missing:
        parts.append(
            "Not finished yet (`"
            + go_on
            + "` goes on):\n\n"
            + "\n".join(f"- {each}" for each in missing)
        )
    (output / "README.md").write_text("\n\n".join(parts) + "\n")
    (output / "summary.md").write_text(
        "\n\n".join(short or ["No method has all its runs yet."]) + "\n"
    )
    return f"Written: {output / 'README.md'}" + "".join(
        f"\nnot finished: {each}" for each in missing
    )


def described(
    data: str, rows: Rows, runs: dict[tuple[str, str], list[Run]], output: pathlib.Path
) -> list[str]:
    """Returns the parts of the report on a set, and draws its picture."""
    columns = picks(data)
    cells = []
    for (name, kind), results in rows.items():
        run = runs[name, kind][0]
        tuned = "" if run.value is None else f"{METHODS[name].tuned} {run.value:g}"
        accuracies = [
            points(intervals.of_accuracy([pick(result) for result in results]))
            for pick in columns.values()
        ]
        error = points(intervals.of_figures([result["calibration_error"] for result in results]))
        seconds = statistics.median(result["processor_seconds_per_step"] for result in results)
        share = statistics.fmean(result["share"] for result in results)
        inverse = max(result["largest_inverse"] for result in results)
        cost = [
            f"{seconds:.2f}",
            str(results[0]["passes"] * METHODS[name].times),
            f"{share:.2%}",
            f"{inverse:.3g}",
        ]
        cells.append(
            [
                name,
                CHOSEN_FOR[kind] if tuned else "",
                tuned,
                str(len(results)),
                *accuracies,
                error,
                *cost,
            ]
        )
    heads = ["method", "chosen for", "at", "seeds", *columns, "calibration error"]
    heads += ["processor seconds a step", "passes", "selected", "largest 1/p"]
    parts = [
        f"## {data}",
        "Percent of texts that are right, with 95 % intervals (bootstrap over seeds and texts; "
        "with five seeds somewhat too narrow). FGM and PGD: strength in norms of a text's "
        "embeddings. Passes: forwards and backwards for each text of plain training's. Seconds of "
        "one processor, which other work on the machine lengthens less than the clock's.",
        table(heads, cells),
    ]
    if contrasts := _contrasts(rows):
        parts += [
            f"The questions of the plan: difference in points under PGD at {STRENGTHS[MIDDLE]:g}, "
            "at the point chosen under PGD, "
            f"paired by seed and text; p by Holm over the {len(contrasts)} that can be answered so "
            "far.",
            table(["question", "contrast", "difference", "p"], contrasts),
        ]
    picture = _picture(data, rows, output / f"{data}.png")
    return [*parts, f"![{data}]({picture.name})"]


def summarised(data: str, rows: Rows) -> list[str]:
    """Returns the main columns of each method, tuned under PGD, and the questions' answers."""
    columns, titles = picks(data), main_titles(data)
    cells = []
    for name in dict.fromkeys(name for name, _ in rows):
        results = _chosen_under_pgd(rows, name)
        if results is None:
            # only the point chosen for clean accuracy is whole yet
            continue
        accuracies = (
            intervals.of_accuracy([columns[title](result) for result in results])
            for title in titles
        )
        passes = METHODS[name].passes * METHODS[name].times
        share = statistics.fmean(result["share"] for result in results)
        cells.append([name, *map(points, accuracies), str(passes), f"{share:.2%}"])
    seeds = {len(results) for results in rows.values()}
    parts = [
        f"Trained on `{data}`, tuned under PGD; percent right, with 95 % intervals over "
        f"{' or '.join(map(str, sorted(seeds)))} seeds and texts:",
        table(["method", *titles, "passes", "selected"], cells),
    ]
    if contrasts := _contrasts(rows):
        parts += [
            f"The questions: difference in points under PGD at {STRENGTHS[MIDDLE]:g}, paired by "
            "seed and text; p by Holm.",
            table(["question", "contrast", "difference", "p"], contrasts),
        ]
    return parts


def _chosen_under_pgd(rows: Rows, name: str) -> list[dict[str, Any]] | None:
    return rows.get((name, "pgd"), rows.get((name, "both")))


def _contrasts(rows: Rows) -> list[list[str]]:
    found = []
    for question, (name, other) in QUESTIONS.items():
        both = [_chosen_under_pgd(rows, each) for each in (name, other)]
        if all(both):
            mine, its = ([result["pgd"][MIDDLE] for result in results or ()] for results in both)
            found.append((question, f"{name} − {other}", intervals.of_difference(mine, its)))
    corrected = intervals.holm([interval.p for *_, interval in found])
    return [
        [question, contrast, points(interval), "< 0.001" if p < 0.001 else f"{p:.3f}"]
        for (question, contrast, interval), p in zip(found, corrected, strict=True)
    ]


@styled()
def _picture(data: str, rows: Rows, path: pathlib.Path) -> pathlib.Path:
    """Draws a dot with its interval for each method, a panel for each of the main measures."""
    columns, titles = picks(data), main_titles(data)
    figure = plot.figure(3 * len(titles) + 2, 0.33 * len(rows) + 1.6)
    for axes, title in zip(figure.subplots(1, len(titles), sharey=True), titles, strict=True):
        for place, results in enumerate(rows.values()):
            found = intervals.of_accuracy([columns[title](result) for result in results])
            low, middle, high = (100 * value for value in (found.low, found.mean, found.high))
            axes.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=COLOURS[0]
            )
        if (base := _chosen_under_pgd(rows, "plain")) is not None:
            plain = statistics.fmean(share_right(columns[title](result)) for result in base)
            axes.axvline(100 * plain, color=GREY, linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="percent right")
    labels = [name if kind == "both" else f"{name}, for {CHOSEN_FOR[kind]}" for name, kind in rows]
    figure.axes[0].set_yticks(range(len(rows)), labels)
    figure.axes[0].invert_yaxis()
    figure.suptitle(f"all-MiniLM-L6 fine-tuned on 1,000 texts of {data}; dashed: plain fine-tuning")
    figure.savefig(path)
    return path
