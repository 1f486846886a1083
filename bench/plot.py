"""Pictures of results: ratios as bars with their spread; time over size on log axes, with the time that the bytes take at a copy's rate."""

import importlib.util
import pathlib
from typing import Any


def pictures(path: pathlib.Path, lines: list[dict]) -> list[pathlib.Path]:
    """Draws what a suite's results have to show beside their file; none without matplotlib."""
    lines = [line for line in lines if "contestants" in line]
    if not lines or importlib.util.find_spec("matplotlib") is None:
        return []
    return [_scaling(path, lines) if all("axis" in line for line in lines) else _ratios(path, lines)]


def _ratios(path: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    from matplotlib.figure import Figure

    bars = [
        (line["case"], one["name"], one["ours_over_this"]) for line in lines for one in line["contestants"][1:] if "ours_over_this" in one
    ]
    figure = Figure(figsize=(9, 0.32 * len(bars) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    peers = list(dict.fromkeys(peer for _, peer, _ in bars))
    for i, (_, peer, ratio) in enumerate(bars):
        beyond = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
        axes.barh(i, ratio["median"], xerr=beyond, color=f"C{peers.index(peer) % 10}", error_kw={"elinewidth": 1})
    axes.set_yticks(range(len(bars)), [f"{case} / {peer}" for case, peer, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="our time / the peer's (median, quartiles)", title=path.stem)
    return _written(figure, path)


def _scaling(path: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(line["axis"] for line in lines))
    figure = Figure(figsize=(5.5 * len(axes_names), 4.5), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(axes_names), squeeze=False)[0], axes_names, strict=True):
        found = [line for line in lines if line["axis"] == axis]
        for name in dict.fromkeys(one["name"] for line in found for one in line["contestants"]):
            points = [
                (line["elements"], one["seconds"]["median"])
                for line in found
                for one in line["contestants"]
                if one["name"] == name and "seconds" in one
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        limit = [(line["elements"], line["contestants"][0]["bytes"] / line["copy_gb_s"]["median"] / 1e9) for line in found]
        axes.plot(*zip(*limit, strict=True), linestyle=":", color="black", label="its bytes at a copy's rate")
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="seconds a step", title=axis)
        axes.legend(fontsize=7)
    return _written(figure, path)


def _written(figure, path: pathlib.Path) -> pathlib.Path:
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heat_map(axes: Any, grid: list[list[float]], rows: list[float], columns: list[float], title: str, across: str, down: str) -> None:
    """A grid of numbers as colours, each with its value."""
    axes.imshow(grid, cmap="viridis", aspect="auto")
    middle = (min(map(min, grid)) + max(map(max, grid))) / 2
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if value < middle else "black")
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set(title=title, xlabel=across, ylabel=down)
