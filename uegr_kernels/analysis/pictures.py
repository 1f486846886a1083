"""The one style of every picture: readable at half a page, told apart by the colour-blind, axes in
words.
"""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart; the yellow is too light for lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# what others are compared with, controls and lines of reference
GREY = "#777777"
# of a number's size, as the colour-blind see it too
MAP = "cividis"
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[str, object] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "image.cmap": MAP,
    "savefig.dpi": 120,
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draws in the style what is drawn inside; also a decorator."""
    import matplotlib
    from cycler import cycler

    # dashed where there are more lines than colours
    lines = cycler(linestyle=("-", "--")) * (cycler(color=COLOURS) + cycler(marker=SHAPES))
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": lines}):
        yield


def figure(width: float, height: float) -> Any:
    """Returns an empty figure of so many inches; without pyplot no window system is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextlib.contextmanager
def picture(path: str | pathlib.Path, **kwargs: object) -> Iterator[Any]:
    """Yields axes to draw on; written to `path` in the end."""
    with pictures(path, 1, **kwargs) as (axes,):
        yield axes


@contextlib.contextmanager
def pictures(path: str | pathlib.Path, count: int, **kwargs: object) -> Iterator[list[Any]]:
    """Yields so many axes, up to three in a row; written to `path` in the end."""
    columns = 2 if count == 4 else max(1, min(3, count))
    rows = max(1, -(-count // columns))
    with styled():
        drawn = figure(5.4, 4.0) if count < 2 else figure(3.8 * columns, 3.3 * rows)
        yield [drawn.add_subplot(rows, columns, i + 1, **kwargs) for i in range(count)]
        drawn.savefig(path)


def plain_logarithmic(axis: Any, low: float, high: float) -> None:
    """Makes an axis logarithmic, with numbers as people write them: 0.5, 1, 2, 5, 10."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    steps = (1, 10) if high > 200 * low else (1, 2, 5)
    marks = [step * 10.0**power for power in range(-3, 10) for step in dict.fromkeys(steps)]
    axis.set_major_locator(FixedLocator([mark for mark in marks if low / 2 < mark < 2 * high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
