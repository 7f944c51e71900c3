"""The loss curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuneloom.rundir import LOSS_PLOT, RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 2000


def plot_loss(run: RunDirectory) -> bool:
    """Draw train loss (raw and smoothed), validation loss and learning rate to loss.png.

    Returns:
        Whether there was anything to draw.
    """
    steps = [
        (event["step"], event["loss"], event["learning_rate"]) for event in run.history("step") if event.get("loss") is not None
    ]
    if not steps:
        return False
    held = [(event["step"], event["eval_loss"]) for event in run.history("eval") if event.get("eval_loss") is not None]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.1, right=0.87, bottom=0.11, top=0.92
    )  # margins that are looked for cost as much as all the rest
    axes = figure.add_subplot()
    _draw(axes, steps[:: max(1, len(steps) // MAX_POINTS)], held)
    axes.set_title(run.path.name, fontsize=10)
    figure.savefig(run.path / LOSS_PLOT)
    return True


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average of values, corrected for its start."""
    found, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        found.append(average / total)
    return found


def _draw(axes: Axes, steps: Sequence[tuple[int, float, float]], held: Sequence[tuple[int, float]]) -> None:
    xs, losses, rates = zip(*steps, strict=True)
    axes.plot(xs, losses, color="#9db8d9", linewidth=1, label="train loss")
    axes.plot(xs, smoothed(losses), color="#1f5fa8", linewidth=2, label="train loss, smoothed")
    if held:
        axes.plot(*zip(*held, strict=True), color="#c8553d", marker="o", markersize=4, label="validation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.plot(xs, rates, color="#888888", linewidth=1, linestyle=":", label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    lines, labels = axes.get_legend_handles_labels()
    more, more_labels = right.get_legend_handles_labels()
    axes.legend(lines + more, labels + more_labels, fontsize=8, loc="upper right")
