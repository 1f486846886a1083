"""Tells how the two models compare: a table, a picture, and UEGR's settings in a sentence."""

import inspect
import pathlib
import statistics

from .. import BiStage, SelectiveAdamW
from .demo_training import ARMS, ATTACKS, Arm


def comparison(arms: dict[str, Arm]) -> str:
    """Returns accuracy, robustness and cost of both models as lines of text."""
    rows = [("", *ARMS), ("accuracy", *(f"{arms[name].accuracy[0]:.1%}" for name in ARMS))]
    for i, epsilon in enumerate(ATTACKS, 1):
        rows.append(
            (
                f"accuracy under FGM, epsilon {epsilon:g}",
                *(f"{arms[name].accuracy[i]:.1%}" for name in ARMS),
            )
        )
    rows.append(
        (
            "seconds per step (median)",
            *(f"{statistics.median(arms[name].seconds):.4f}" for name in ARMS),
        )
    )
    shares = arms["UEGR"].shares
    rows.append(("parameters selected per step", "100 %", f"{statistics.fmean(shares):.4%}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {adamw:>10}  {uegr:>10}" for name, adamw, uegr in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: pathlib.Path, arms: dict[str, Arm], title: str) -> None:
    """Draws the losses, the accuracies under attack and the time of a step, into `path`."""
    from matplotlib.figure import Figure  # without pyplot there is no window system to ask for

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, colour in zip(ARMS, ("tab:gray", "tab:blue"), strict=True):
        losses = arms[name].losses
        window = max(1, len(losses) // 30)
        left.plot(
            [statistics.fmean(losses[max(0, i - window) : i + 1]) for i in range(len(losses))],
            color=colour,
            label=name,
        )
        middle.plot(
            (0, *ATTACKS),
            [100 * value for value in arms[name].accuracy],
            "o-",
            color=colour,
            label=name,
        )
        bar = right.bar(name, 1000 * statistics.median(arms[name].seconds), color=colour)
        right.bar_label(bar, fmt="%.0f")
    left.set(title="Cross-entropy on clean batches", xlabel="step", ylim=(0, None))
    middle.set(title="Test accuracy under FGM (%)", xlabel="attack's epsilon", ylim=(0, 100))
    right.set(title="Milliseconds per step")
    right.margins(y=0.12)  # for the numbers on the bars
    left.legend()
    middle.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def describe(epsilon: float, passes: int) -> str:
    """Returns UEGR's settings as they stand in the signatures."""
    defaults = {name: p.default for name, p in inspect.signature(SelectiveAdamW).parameters.items()}
    chosen = ", ".join(
        f"{name}={defaults[name]!r}"
        for name in ("threshold", "sharpness", "normalization", "direction")
    )
    js_weight = inspect.signature(BiStage).parameters["js_weight"].default
    stage = f"BiStage(epsilon={epsilon:g}, passes={passes}, js_weight={js_weight})"
    return f"{stage}, AdaptiveDropout and SelectiveAdamW({chosen})"
