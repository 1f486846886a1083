"""Pictures of results: ratios as bars with their spread; time over size on log axes, with the
time that the bytes take at a copy's rate.
"""

import importlib.util
import pathlib
import textwrap
from typing import Any

from . import tables


def pictures(path: pathlib.Path, records: list[dict]) -> list[pathlib.Path]:
    """Draws what a suite's results have to show beside their file; none without matplotlib."""
    measured = [record for record in records if "contestants" in record]
    if not measured or importlib.util.find_spec("matplotlib") is None:
        return []
    named = textwrap.fill(tables.missing(records), 110)
    return [
        _scaling(path, measured, named)
        if all("axis" in record for record in measured)
        else _ratios(path, measured, named)
    ]


def _ratios(path: pathlib.Path, records: list[dict], missing: str) -> pathlib.Path:
    """Draws a group of bars for each case, a colour for each peer."""
    peers = list(
        dict.fromkeys(
            one["name"]
            for record in records
            for one in record["contestants"]
            if "ours_over_this" in one
        )
    )
    bars = [
        [
            (one["name"], one["ours_over_this"])
            for one in record["contestants"]
            if "ours_over_this" in one
        ]
        for record in records
    ]
    height = 0.17 * sum(map(len, bars)) + 0.15 * len(bars) + 1.8
    drawn = figure(10, height)
    axes = drawn.add_subplot()
    place, centres = 0.0, []
    for group in bars:
        for i, (peer, ratio) in enumerate(group):
            beyond = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
            axes.barh(
                place + i,
                ratio["median"],
                0.9,
                xerr=beyond,
                color=f"C{peers.index(peer) % 10}",
                error_kw={"elinewidth": 1},
            )
        centres.append(place + (len(group) - 1) / 2)
        place += len(group) + 1
    axes.set_yticks(centres, [tables.case_name(record) for record in records], fontsize=8)
    axes.set_ylim(place - 0.5, -1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.legend(
        [axes.barh(0, 0, color=f"C{i % 10}") for i in range(len(peers))],
        peers,
        fontsize=7,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=5,
    )
    axes.set(
        xscale="log",
        xlabel="our time / the peer's (median, quartiles); left of the line "
        f"ours is faster\n{missing}",
    )
    axes.xaxis.label.set_size(8)
    drawn.suptitle(path.stem)
    return _written(drawn, path)


def _scaling(path: pathlib.Path, records: list[dict], missing: str) -> pathlib.Path:
    """Draws time over size, a line for each contestant and number of threads, and below it the same
    by element.
    """
    axes_names = list(dict.fromkeys(record["axis"] for record in records))
    threads = list(dict.fromkeys(record["threads"] for record in records))
    drawn = figure(5.5 * len(axes_names), 8.5)
    for column, axis in zip(
        drawn.subplots(2, len(axes_names), squeeze=False).T, axes_names, strict=True
    ):
        found = [record for record in records if record["axis"] == axis]
        for style, count in zip(("-", "--", ":"), threads, strict=False):
            some = [record for record in found if record["threads"] == count]
            ending = "" if count is None else f", {count} thread{'s' * (count > 1)}"
            for i, name in enumerate(
                dict.fromkeys(one["name"] for record in some for one in record["contestants"])
            ):
                _curves(
                    column,
                    f"{name}{ending}",
                    some,
                    name,
                    color=f"C{i}",
                    linestyle=style,
                    marker="o",
                    markersize=3,
                )
            _curves(
                column,
                f"its bytes at a copy's rate{ending}",
                some,
                None,
                color="black",
                linestyle=style,
                linewidth=0.8,
            )
        column[0].set(
            xscale="log", yscale="log", xlabel="elements", ylabel="seconds a step", title=axis
        )
        column[1].set(
            xscale="log", yscale="log", xlabel="elements", ylabel="nanoseconds an element"
        )
        column[0].legend(fontsize=7)
    disturbed = sum(tables.disturbed(record) for record in records)
    warning = (
        (f"{disturbed} of {len(records)} cases were disturbed by other programs")
        if disturbed
        else ""
    )
    drawn.suptitle("\n".join(filter(None, (path.stem, warning, missing))), fontsize=8)
    return _written(drawn, path)


def _curves(column, label: str, records: list[dict], name: str | None, **looks) -> None:
    """Draws a contestant's seconds over the elements, and its nanoseconds an element; without a
    name, those that our bytes take in a copy.
    """
    points = []
    for record in records:
        if name is None:
            points.append(
                (
                    record["elements"],
                    record["contestants"][0]["bytes"] / record["copy_gb_s"]["median"] / 1e9,
                )
            )
        points += [
            (record["elements"], one["seconds"]["median"])
            for one in record["contestants"]
            if one["name"] == name and "seconds" in one
        ]
    if points:
        sizes, seconds = zip(*points, strict=True)
        column[0].plot(sizes, seconds, label=label, **looks)
        column[1].plot(sizes, [1e9 * each / size for size, each in points], **looks)


def _written(drawn: Any, path: pathlib.Path) -> pathlib.Path:
    picture = path.with_suffix(".png")
    drawn.savefig(picture, dpi=110)
    return picture


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heat_map(
    axes: Any,
    grid: list[list[float]],
    rows: list[float],
    columns: list[float],
    title: str,
    across: str,
    down: str,
) -> None:
    """Draws a grid of numbers as colours, each with its value."""
    axes.imshow(grid, cmap="viridis", aspect="auto")
    middle = (min(map(min, grid)) + max(map(max, grid))) / 2
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(
                j,
                i,
                f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < middle else "black",
            )
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set(title=title, xlabel=across, ylabel=down)
