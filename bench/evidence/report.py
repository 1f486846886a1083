"""Tells what `python -m bench.accuracy` found, in tables and pictures."""

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from uegr_kernels.analysis.attack import STRENGTHS
from uegr_kernels.analysis.pictures import COLOURS, GREY, plain_logarithmic, styled

from .. import plot
from ..tables import table

# figures of a study's runs, by what tells them apart; the seed stands last
Found = dict[tuple, dict[str, Any]]
Pick = Callable[[dict[str, Any]], float]
# the same sentences: in means over sets the two count as one
TWINS = {"sst2": "mr"}
# what every method is tested against
BASE = "dropout"
# a method, and itself without a part
SAME_POINT = (
    *(
        ("at", "at_epsilon_0"),
        ("r_at", "r_at_epsilon_0"),
        ("uegr", "uegr_epsilon_0"),
        ("uegr", "uegr_all_selected"),
    ),
    ("uegr", "uegr_plain_dropout"),
    ("drop_attack", "drop_attack_epsilon_0"),
)
# a method, and one that is tuned by itself: plain training for as many passes, or a simpler method
OWN_POINTS = (
    *(
        ("at", "dropout_2x"),
        ("r_drop", "dropout_2x"),
        ("free_lb", "dropout_2x"),
        ("drop_attack", "dropout_2x"),
    ),
    *(
        ("r_at", "dropout_3x"),
        ("r_at_su", "dropout_3x"),
        ("uegr", "dropout_3x"),
        ("roast", "dropout_3x"),
    ),
    *(("r_at_su", "r_at"), ("uegr", "r_at_su"), ("uegr", "at")),
)
# of STRENGTHS
MEDIUM = 1


def accuracy(result: dict[str, Any]) -> float:
    """Returns the metric on the test set."""
    return float(result["test"])


def under(attack: str, i: int) -> Pick:
    """Returns what reads off the accuracy under an attack, NaN where there was none."""
    return lambda result: float(result[attack][i]) if attack in result else math.nan


def figure_of(key: str) -> Pick:
    """Returns what reads off one figure."""
    return lambda result: float(result[key])


PGD = under("pgd", MEDIUM)
ATTACKS = {
    f"{attack.upper()} {e:g}": under(attack, i)
    for attack in ("fgm", "pgd")
    for i, e in enumerate(STRENGTHS)
}
COLUMNS = {"clean": accuracy} | ATTACKS
HEADLINES = {"clean": accuracy, f"PGD-10 at {STRENGTHS[MEDIUM]:g}": PGD}
USUAL = {
    "clean": accuracy,
    f"FGM {STRENGTHS[MEDIUM]:g}": under("fgm", MEDIUM),
    f"PGD {STRENGTHS[MEDIUM]:g}": PGD,
}


def mean_and_deviation(values: list[float], scale: float = 100) -> str:
    """Returns mean and standard deviation, accuracies in points; "-" where there is no figure."""
    if any(map(math.isnan, values)):
        return "-"
    # no -0.0
    middle = round(statistics.fmean(values) * scale, 1) + 0.0
    return f"{middle:.1f}" + (f" ± {deviation(values) * scale:.1f}" if len(values) > 1 else "")


def deviation(values: list[float]) -> float:
    """Returns the standard deviation; 0 where there are not two figures."""
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else 0.0


def over_sets(values: dict[str, float]) -> float:
    """Returns the mean over sets, twins counted as one."""
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        groups.setdefault(TWINS.get(name, name), []).append(value)
    return statistics.fmean(map(statistics.fmean, groups.values()))


def by_point(found: Found) -> dict[tuple, list[dict[str, Any]]]:
    """Groups a study's results by all but their seed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for key, result in found.items():
        groups.setdefault(key[:-1], []).append(result)
    return groups


# The main study


class Main:
    """Holds the main study's results, by model, set, method and seed."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.models, self.sets, self.methods, self.seeds = (
            list(dict.fromkeys(key[i] for key in found)) for i in range(4)
        )

    def values(self, model: str, data: str, name: str, pick: Pick) -> list[float]:
        """Returns a figure of each seed on one set."""
        return [pick(self.found[model, data, name, seed]) for seed in self.seeds]

    def everywhere(self, model: str, name: str, pick: Pick) -> list[float]:
        """Returns a figure of each set and seed."""
        return [value for data in self.sets for value in self.values(model, data, name, pick)]

    def by_seed(self, model: str, name: str, pick: Pick) -> list[float]:
        """Returns each seed's mean over sets."""
        return [
            over_sets({data: pick(self.found[model, data, name, seed]) for data in self.sets})
            for seed in self.seeds
        ]

    def against(self, model: str, name: str, other: str, pick: Pick) -> tuple[list[float], float]:
        """Returns the differences by seed of the mean over sets, and the p of a paired t-test
        (two-sided; NaN where all are equal).
        """
        from scipy.stats import ttest_rel

        mine, its = self.by_seed(model, name, pick), self.by_seed(model, other, pick)
        gaps = [a - b for a, b in zip(mine, its, strict=True)]
        return gaps, float(ttest_rel(mine, its).pvalue) if len(set(gaps)) > 1 else math.nan


def _gap(main: Main, model: str, name: str, other: str, pick: Pick) -> list[str]:
    """Returns two cells: the difference, and its p."""
    gaps, p = main.against(model, name, other, pick)
    return [
        mean_and_deviation(gaps),
        "-" if math.isnan(p) else "< 0.001" if p < 0.0005 else f"{p:.3f}",
    ]


def main_study(found: Found, output: pathlib.Path) -> str:
    """Returns the main study's tables, and draws a picture for each model."""
    main, parts = Main(found), []
    medium = STRENGTHS[MEDIUM]
    for model in main.models:
        heads = [
            "method",
            *COLUMNS,
            f"clean − {BASE}",
            "p",
            f"PGD {medium:g} − {BASE}",
            "p",
            "ms a step",
            "selected",
        ]
        rows = []
        for name in main.methods:
            cells = [
                mean_and_deviation(main.by_seed(model, name, pick)) for pick in COLUMNS.values()
            ]
            for pick in (accuracy, PGD):
                cells += ["", ""] if name == BASE else _gap(main, model, name, BASE, pick)
            milliseconds = (
                statistics.median(main.everywhere(model, name, figure_of("seconds_per_step")))
                * 1000
            )
            rows.append(
                [
                    name,
                    *cells,
                    f"{milliseconds:.1f}",
                    f"{statistics.fmean(main.everywhere(model, name, figure_of('share'))):.2%}",
                ]
            )
        heads_of_pairs = ["method", "against", "clean", "p", f"PGD {medium:g}", "p"]
        same, own = (
            table(
                heads_of_pairs,
                [
                    [*pair, *_gap(main, model, *pair, accuracy), *_gap(main, model, *pair, PGD)]
                    for pair in pairs
                ],
            )
            for pairs in (
                [pair for pair in found if set(pair) <= set(main.methods)]
                for found in (SAME_POINT, OWN_POINTS)
            )
        )
        sets = [
            [
                name,
                *(
                    mean_and_deviation(main.values(model, data, name, accuracy))
                    for data in main.sets
                ),
            ]
            for name in main.methods
        ]
        attacked = [
            [name, *(mean_and_deviation(main.values(model, data, name, PGD)) for data in main.sets)]
            for name in main.methods
        ]
        picture = _main_picture(main, model, output / f"main-{model.replace('/', '-')}.png")
        relative = [
            result["relative"][MEDIUM]
            for key, result in found.items()
            if key[0] == model and "relative" in result
        ]
        parts += [
            f"### {model}: mean over {', '.join(main.sets)} and its standard deviation over "
            f"{len(main.seeds)} seeds, in points",
            table(heads, rows),
            f"![{model}]({picture.name})",
            f"The medium strength is {statistics.fmean(relative or [0]):.1%} of the norm of a "
            "text's embeddings. ms a step: median, with other runs beside it. selected: in the "
            "last step of the last epoch. p: paired t-test over seeds, two-sided, uncorrected for "
            "the number of rows: without any effect one in twenty has p < 0.05.",
            "A method against itself without its attack, or without its selection: same point, so "
            "the difference is that part's.",
            same,
            "A method against another that is tuned by itself (learning rate and dropout too), or "
            "against plain training for as many passes at the learning rate tuned for one:",
            own,
            "Clean, by set:",
            table(["method", *main.sets], sets),
            f"PGD {medium:g}, by set:",
            table(["method", *main.sets], attacked),
            *_perspectives(main, model),
        ]
    return "\n\n".join(parts)


PERSPECTIVES = {
    "in-distribution": accuracy,
    "shifted": figure_of("shifted"),
    "adversarial sets": figure_of("adversarial"),
    "1 − calibration error": lambda result: 1 - result["calibration_error"],
    "OOD AUROC": figure_of("auroc"),
}


def _perspectives(main: Main, model: str) -> list[str]:
    """Returns UEGR Table III's metric where the sets were given: (s − s_base) / (1 − s_base) of
    each perspective, and their mean.
    """
    if not all(
        {"shifted", "adversarial", "calibration_error", "auroc"} <= result.keys()
        for key, result in main.found.items()
        if key[0] == model
    ):
        return []
    bases = {
        title: statistics.fmean(main.by_seed(model, BASE, pick))
        for title, pick in PERSPECTIVES.items()
    }
    rows = []
    for name in main.methods:
        gains = [
            [
                (value - bases[title]) / (1 - bases[title]) if bases[title] < 1 else math.nan
                for value in main.by_seed(model, name, pick)
            ]
            for title, pick in PERSPECTIVES.items()
        ]
        rows.append(
            [
                name,
                *map(mean_and_deviation, gains),
                mean_and_deviation([statistics.fmean(each) for each in zip(*gains, strict=True)]),
            ]
        )
    return [
        f"Robustness relative to {BASE}, in percent of what is missing to perfection:",
        table(["method", *PERSPECTIVES, "mean"], rows),
    ]


@styled()
def _main_picture(main: Main, model: str, path: pathlib.Path) -> pathlib.Path:
    """Draws clean accuracy and accuracy under the medium PGD attack, each against the base, with
    the standard deviation over seeds.
    """
    figure = plot.figure(9, 0.3 * len(main.methods) + 1.5)
    for axes, (title, pick) in zip(
        figure.subplots(1, 2, sharey=True), HEADLINES.items(), strict=True
    ):
        for i, name in enumerate(main.methods):
            gaps = [100 * gap for gap in main.against(model, name, BASE, pick)[0]]
            error = deviation(gaps)
            control = name.endswith(("_epsilon_0", "x", "_all_selected", "_plain_dropout"))
            colour = GREY if control else COLOURS[0]
            axes.barh(
                i, statistics.fmean(gaps), xerr=error, color=colour, error_kw={"elinewidth": 1}
            )
        axes.set_yticks(range(len(main.methods)), main.methods)
        axes.grid(axis="x")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=f"points above {BASE}")
    axes.invert_yaxis()
    figure.suptitle(f"{model}, mean over {', '.join(main.sets)} and seeds; grey: controls")
    figure.savefig(path)
    return path


def means(found: Found) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over seeds of every figure, by model, set and method."""
    rows = []
    for (model, data, name), results in by_point(found).items():
        picks = (
            {"test": accuracy}
            | {key: figure_of(key) for key in ("validation", "seconds_per_step", "share")}
            | ATTACKS
        )
        values = {title: [pick(result) for result in results] for title, pick in picks.items()}
        values = {title: each for title, each in values.items() if not any(map(math.isnan, each))}
        figures = {
            title: {"mean": round(statistics.fmean(each), 6), "sd": round(deviation(each), 6)}
            for title, each in values.items()
        }
        rows.append({"model": model, "set": data, "method": name, "seeds": len(results)} | figures)
    return rows


def summary(found: Found, cost: dict[str, dict]) -> str:
    """Tells what a person gains and what it costs: the first model's rows, for docs/evidence.md."""
    main = Main(found)
    model, medium = main.models[0], STRENGTHS[MEDIUM]
    heads = [
        "method",
        "clean",
        f"above {BASE}",
        "p",
        f"PGD-10 at {medium:g}",
        f"above {BASE}",
        "p",
        f"a step's time / {BASE}'s",
    ]
    rows = []
    for name in main.methods:
        cells: list[str] = []
        for pick in (accuracy, PGD):
            cells += [
                mean_and_deviation(main.by_seed(model, name, pick)),
                *(["", ""] if name == BASE else _gap(main, model, name, BASE, pick)),
            ]
        rows.append([name, *cells, _cost(cost, name)])
    return table(heads, rows)


def _cost(cost: dict[str, dict], name: str) -> str:
    if name not in cost:
        return "-"
    ratio = cost[name]
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})"


# The other studies


@styled()
def passes(found: Found, output: pathlib.Path) -> str:
    """Reports the study of the number of passes."""
    groups = by_point(found)
    rows = [
        [
            str(m),
            *_usual(results),
            f"{statistics.median(map(figure_of('seconds_per_step'), results)) * 1000:.1f}",
        ]
        for (m,), results in groups.items()
    ]
    figure = plot.figure(5.4, 4)
    axes = figure.subplots()
    for label, pick in HEADLINES.items():
        _line(axes, [m for (m,) in groups], groups.values(), pick, label)
    axes.set(
        xlabel="adversarial passes (m)", ylabel="accuracy in percent", xticks=[m for (m,) in groups]
    )
    axes.legend()
    figure.savefig(output / "passes.png")
    return f"{table(['m', *USUAL, 'ms a step'], rows)}\n\n![passes](passes.png)"


@styled()
def dropout(found: Found, output: pathlib.Path) -> str:
    """Reports the study of two dropout rates."""
    groups = by_point(found)
    rates = sorted({first for first, _ in groups})
    figure = plot.figure(9, 3.8)
    parts = []
    for axes, (title, pick) in zip(figure.subplots(1, 2), HEADLINES.items(), strict=True):
        grid = [
            [100 * statistics.fmean(map(pick, groups[first, second])) for second in rates]
            for first in rates
        ]
        plot.heat_map(
            axes,
            grid,
            rates,
            rates,
            title,
            "rate in the second adversarial pass",
            "rate in the first",
        )
        heads = [
            f"{title}; first pass's rate down, second's across",
            *(f"{rate:g}" for rate in rates),
        ]
        parts.append(
            table(
                heads,
                [
                    [f"{first:g}", *(f"{value:.1f}" for value in row)]
                    for first, row in zip(rates, grid, strict=True)
                ],
            )
        )
    figure.savefig(output / "dropout.png")
    seeds = len(next(iter(groups.values())))
    return "\n\n".join([*parts, f"Means of {seeds} seeds, in points. ![dropout](dropout.png)"])


def size(found: Found, output: pathlib.Path) -> str:
    """Reports the study of the training set's size."""
    return _curves(
        found, output / "size.png", "texts:", "texts to train on", place="{:,}", logarithmic=True
    )


def epsilon(found: Found, output: pathlib.Path) -> str:
    """Reports the study of the attack's size in training."""
    return _curves(found, output / "epsilon.png", "epsilon:", "epsilon in training")


def selection(found: Found, output: pathlib.Path) -> str:
    """Reports the study of the selection's variants."""
    rows = []
    for (kind, variant), results in by_point(found).items():
        options = json.loads(variant)
        names = [
            options[key] if key in options else "-"
            for key in ("normalization", "direction", "target")
        ]
        names[0] += f" {options['keep_probability']:g}" if "keep_probability" in options else ""
        share, inverse = (
            statistics.fmean(map(figure_of(key), results)) for key in ("share", "largest_inverse")
        )
        rows.append(
            [
                kind,
                *names,
                {True: "yes", False: "no"}.get(options.get("rescale"), "-"),
                *_usual(results),
                f"{share:.2%}",
                f"{inverse:.3g}",
            ]
        )
    return table(
        [
            "optimizer",
            "normalization",
            "direction",
            "target",
            "rescale",
            *USUAL,
            "selected",
            "largest 1/p",
        ],
        rows,
    )


def drop_attack(found: Found, output: pathlib.Path) -> str:
    """Reports the study of DropAttack's options."""
    control = "The row epsilon 0 is the control: the same passes without an attack."
    corner, across = "epsilon down, p across", "p, the share of elements attacked"
    return _curves(
        found,
        output / "drop_attack.png",
        corner,
        across,
        row="{:g}",
        line="epsilon {:g}",
        note=control,
    )


@styled()
def _curves(
    found: Found,
    path: pathlib.Path,
    corner: str,
    across: str,
    *,
    place: str = "{:g}",
    row: str = "{}",
    line: str = "{}",
    logarithmic: bool = False,
    note: str = "",
) -> str:
    """Returns tables and draws a picture of runs by two things: a row and a curve for each of the
    first, a column and a place for each of the second.
    """
    groups = by_point(found)
    firsts, seconds = (list(dict.fromkeys(key[i] for key in groups)) for i in range(2))
    figure, parts = plot.figure(9, 3.8), []
    for axes, (title, pick) in zip(figure.subplots(1, 2), HEADLINES.items(), strict=True):
        for first in firsts:
            _line(
                axes,
                seconds,
                [groups[first, second] for second in seconds],
                pick,
                line.format(first),
            )
        axes.set(xlabel=across, ylabel="accuracy in percent", title=title)
        if logarithmic:
            plain_logarithmic(axes.xaxis, min(seconds), max(seconds))
        axes.grid(axis="y")
        axes.legend()
        rows = [
            [
                row.format(first),
                *(mean_and_deviation(list(map(pick, groups[first, second]))) for second in seconds),
            ]
            for first in firsts
        ]
        parts.append(table([f"{title}; {corner}", *map(place.format, seconds)], rows))
    figure.savefig(path)
    return "\n\n".join([*parts, *([note] if note else []), f"![{path.stem}]({path.name})"])


def _usual(results: list[dict[str, Any]]) -> list[str]:
    return [mean_and_deviation([pick(result) for result in results]) for pick in USUAL.values()]


def _line(
    axes: Any,
    places: Iterable[float],
    groups: Iterable[list[dict[str, Any]]],
    pick: Pick,
    label: str,
) -> None:
    values = [[100 * pick(result) for result in results] for results in groups]
    errors = list(map(deviation, values))
    axes.errorbar(list(places), list(map(statistics.fmean, values)), errors, label=label)
