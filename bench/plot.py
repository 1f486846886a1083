"""Pictures of results: how many times faster ours is, as bars with their spread; and over the
size.
"""

import importlib.util
import pathlib
import textwrap
from typing import Any

from . import tables


def _style() -> Any:
    """Loads the pictures' style by its file: the package imports torch, for which the process that
    draws a GPU's figures has no time.
    """
    file = pathlib.Path(__file__).parent.parent / "uegr_kernels" / "analysis" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


style = _style()
figure, styled = style.figure, style.styled


def pictures(path: pathlib.Path, records: list[dict]) -> list[pathlib.Path]:
    """Draws what a suite's results have to show beside their file; none without matplotlib."""
    measured = [record for record in records if "contestants" in record]
    if not measured or importlib.util.find_spec("matplotlib") is None:
        return []
    named = tables.missing(records)
    return [
        _scaling(path, measured, named)
        if all("axis" in record for record in measured)
        else _speeds(path, measured, named)
    ]


# largest over smallest speed, from which on a plain axis shows the small ones no more
WIDE = 12


@styled()
def _speeds(path: pathlib.Path, records: list[dict], missing: str) -> pathlib.Path:
    """Draws a group of bars for each case, a colour for each peer: how many times faster ours is,
    from 1 on.
    """
    groups = {
        record["case"]: {
            one["name"]: times_faster(one["ours_over_this"])
            for one in record["contestants"]
            if "ours_over_this" in one
        }
        for record in records
    }
    peers = list(dict.fromkeys(peer for group in groups.values() for peer in group))
    medians = [each[1] for group in groups.values() for each in group.values()]
    drawn = figure(7, 0.22 * len(medians) + 0.16 * len(groups) + 1.7)
    axes = drawn.add_subplot()
    place, centres, labelled = 0.0, [], set()
    for group in groups.values():
        for i, (peer, (low, middle, high)) in enumerate(group.items()):
            axes.barh(
                place + i,
                middle - 1,
                0.9,
                left=1,
                xerr=[[middle - low], [high - middle]],
                color=(*style.COLOURS, style.GREY)[peers.index(peer) % (len(style.COLOURS) + 1)],
                error_kw={"elinewidth": 1},
                label=None if peer in labelled else f"than {peer}",
            )
            labelled.add(peer)
        centres.append(place + (len(group) - 1) / 2)
        place += len(group) + 1
    axes.set_yticks(centres, [textwrap.fill(name, 34) for name in groups])
    axes.set_ylim(place - 0.5, -1)
    axes.axvline(1, color="black", linewidth=0.8)
    if medians and max(medians) > WIDE * min(medians):
        style.plain_logarithmic(axes.xaxis, min(medians), max(medians))
    axes.set(xlabel="times faster (median, quartiles); left of 1 ours is slower")
    axes.grid(axis="x")
    drawn.legend(loc="outside upper right", ncols=2)
    if missing:
        drawn.supxlabel(textwrap.fill(missing, 100), fontsize=7, color=style.GREY)
    return _written(drawn, path)


def times_faster(ours_over_this: dict[str, float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile of a peer's time over ours."""
    low, middle, high = (1 / ours_over_this[name] for name in ("q3", "median", "q1"))
    return low, middle, high


@styled()
def _scaling(path: pathlib.Path, records: list[dict], missing: str) -> pathlib.Path:
    """Draws over the size, a line for each number of threads, how many times faster ours is than
    each peer, and below it the nanoseconds that an element takes.
    """
    axes_names = list(dict.fromkeys(record["axis"] for record in records))
    threads = list(dict.fromkeys(record["threads"] for record in records))
    drawn = figure(4.2 * len(axes_names), 7)
    for column, axis in zip(
        drawn.subplots(2, len(axes_names), squeeze=False).T, axes_names, strict=True
    ):
        speed, element = column
        for dashes, count in zip(("-", "--", ":"), threads, strict=False):
            some = [r for r in records if r["axis"] == axis and r["threads"] == count]
            ending = "" if count is None else f", {count} thread{'s' * (count > 1)}"
            names = dict.fromkeys(one["name"] for record in some for one in record["contestants"])
            for i, name in enumerate(names):
                looks = {"color": style.COLOURS[i], "marker": style.SHAPES[i], "linestyle": dashes}
                found = [(r["elements"], one) for r in some for one in r["contestants"]]
                mine = [(n, one) for n, one in found if one["name"] == name and "seconds" in one]
                times = [(n, 1e9 * one["seconds"]["median"] / n) for n, one in mine]
                faster = [
                    (n, times_faster(one["ours_over_this"])[1])
                    for n, one in mine
                    if "ours_over_this" in one
                ]
                if times:
                    element.plot(*zip(*times, strict=True), label=name + ending, **looks)
                if faster:
                    speed.plot(*zip(*faster, strict=True), label=f"than {name}{ending}", **looks)
        speed.axhline(1, color="black", linewidth=0.8)
        speed.set(xscale="log", ylabel="times faster", title=axis, ylim=(0, None))
        element.set(xscale="log", yscale="log", ylabel="nanoseconds an element")
        element.set(xlabel="elements in all")
        for axes in column:
            axes.grid(axis="y")
            axes.legend()
    if missing:
        drawn.supxlabel(textwrap.fill(missing, 100), fontsize=7, color=style.GREY)
    return _written(drawn, path)


def _written(drawn: Any, path: pathlib.Path) -> pathlib.Path:
    picture = path.with_suffix(".png")
    drawn.savefig(picture)
    return picture


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
    axes.imshow(grid, cmap=style.MAP, aspect="auto")
    middle = (min(map(min, grid)) + max(map(max, grid))) / 2
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(
                j,
                i,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="white" if value < middle else "black",
            )
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set(title=title, xlabel=across, ylabel=down)
