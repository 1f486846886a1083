"""Draws README's picture: what a training step costs, and what robustness it buys.

`python -m bench docs` draws it again. The gains are the table of `bench/results/accuracy`; where
other results tell more, GAINS and `gains` are what to change.
"""

import json
import pathlib
import re

from uegr_kernels.analysis.pictures import COLOURS, GREY, figure, styled

from . import harness

COST = ("bistage-cpu.jsonl", "small BERT, 16 x 64 words, m = 2")
GAINS = "accuracy/summary.md"
CONTESTANTS = {
    "AdamW, one pass": "AdamW",
    "AdamW, 1 + m passes": "AdamW, as many passes",
    "uegr_kernels": "uegr, this package",
    "UEGR in plain PyTorch": "uegr, plain PyTorch",
}
METHODS = {
    "r_at_su": "r_at_su",
    "roast": "roast",
    "free_lb": "free_lb",
    "dropout_3x": "plain, three times as long",
    "drop_attack": "drop_attack",
    "at": "at",
    "r_at": "r_at",
    "uegr": "uegr",
    "r_drop": "r_drop",
    "child_tuning_f": "child_tuning_f",
}


def costs(results: pathlib.Path) -> dict[str, float]:
    """Returns the milliseconds of a training step (the median) by contestant."""
    file, case = COST
    (record,) = (each for each in harness.read(results / file) if each["case"] == case)
    found = {one["name"]: 1000 * one["seconds"]["median"] for one in record["contestants"]}
    return {label: found[name] for name, label in CONTESTANTS.items()}


def gains(results: pathlib.Path) -> dict[str, tuple[float, float]]:
    """Returns the points above plain training under attack, and their standard deviation over
    seeds.
    """
    rows = (results / GAINS).read_text().splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in rows if row[:1] == "|"}
    found = {}
    for name, label in METHODS.items():
        point, spread = re.fullmatch(r"(\S+) ± (\S+)", cells[name][5]).groups()
        found[label] = float(point), float(spread)
    return found


def shown(results: pathlib.Path) -> str:
    """Returns what the picture shows, as it is kept in the picture."""
    return json.dumps({"costs": costs(results), "gains": gains(results)}, sort_keys=True)


def agrees(results: pathlib.Path, picture: pathlib.Path) -> bool:
    """Returns whether a picture shows these results."""
    # matplotlib has it
    from PIL import Image

    if not picture.exists():
        return False
    with Image.open(picture) as opened:
        return opened.text.get("Comment") == shown(results)


@styled()
def draw(results: pathlib.Path, picture: pathlib.Path) -> None:
    """Writes the picture."""
    drawn = figure(9.4, 3.9)
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.1))
    cost = costs(results)
    colours = [COLOURS[0] if "this package" in name else GREY for name in cost]
    bars = left.barh(list(cost), list(cost.values()), color=colours)
    left.bar_label(bars, fmt="{:.0f} ms", padding=4, fontsize=10)
    left.set(xlabel="milliseconds a training step", xlim=(0, 1.25 * max(cost.values())))
    left.set_title("What a step costs", loc="left", fontweight="bold")
    gain = gains(results)
    points, spreads = zip(*gain.values(), strict=True)
    colours = [GREY if "plain" in name else COLOURS[0] for name in gain]
    right.barh(
        list(gain), points, xerr=spreads, color=colours, error_kw={"elinewidth": 1.2}, height=0.7
    )
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="points above plain training")
    right.set_title("What robustness it buys", loc="left", fontweight="bold")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    drawn.savefig(picture, metadata={"Comment": shown(results)})
