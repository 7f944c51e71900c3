"""The loss curves of runs as a picture: of one beside it, of several over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.rundir import LOSS_PLOT, RunDirectory
from tuneloom.runs import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 2000
COLOURS = ("#1f5fa8", "#c8553d", "#2e7d4f", "#7b4fa3", "#b8860b", "#178a94", "#b03a78", "#5f6368")
"""Of runs over each other; the ninth has the first one's again, dashed."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run.

    Attributes:
        steps: (step, train loss, learning rate), thinned.
        held: (step, validation loss).
    """

    steps: Sequence[tuple[int, float, float]]
    held: Sequence[tuple[int, float]]

    @classmethod
    def of(cls, run: RunDirectory) -> Curves:
        """Read a run's curves; what is no number is left out."""
        steps, held = [], []
        for event in run.history():
            step, loss, rate = event.get("step"), number(event.get("loss")), number(event.get("learning_rate"))
            eval_loss = number(event.get("eval_loss"))
            if not isinstance(step, int):
                continue
            if event["event"] == "step" and loss is not None:
                steps.append((step, loss, rate or 0.0))
            elif event["event"] == "eval" and eval_loss is not None:
                held.append((step, eval_loss))
        return cls(steps[:: max(1, len(steps) // MAX_POINTS)], held)


def plot_loss(run: RunDirectory) -> bool:
    """Draw train loss (raw and smoothed), validation loss and learning rate to loss.png.

    Returns:
        Whether there was anything to draw.
    """
    curves = Curves.of(run)
    if not curves.steps:
        return False
    figure = _figure(4.5)
    # Margins that are looked for cost as much as all the rest.
    figure.subplots_adjust(left=0.1, right=0.87, bottom=0.11, top=0.92)
    axes = figure.add_subplot()
    _draw_train(axes, curves, "#9db8d9", "#1f5fa8", ("train loss", "train loss, smoothed"))
    _draw_held(axes, curves, "#c8553d", "validation loss")
    _name_losses(axes)
    axes.set_xlabel("step")
    axes.set_title(_text(run.path.name), fontsize=10)
    right = axes.twinx()
    _draw_rate(right, curves, "#888888", linestyle=":", label="learning rate")
    lines, labels = axes.get_legend_handles_labels()
    more, more_labels = right.get_legend_handles_labels()
    axes.legend(lines + more, labels + more_labels, fontsize=8, loc="upper right")
    figure.savefig(run.path / LOSS_PLOT)
    return True


def plot_comparison(curves: Sequence[tuple[str, Curves]], file: Path) -> bool:
    """Draw the curves of several runs over each other: losses large, learning rates small below them.

    Args:
        curves: behind the name of each run.
        file: the PNG file to write.

    Returns:
        Whether there was anything to draw; else nothing is written.

    Raises:
        OSError: the file cannot be written.
    """
    if not any(each.steps or each.held for _, each in curves):
        return False
    figure = _figure(6.0)
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.09, top=0.97, hspace=0.08)
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 1))
    axes = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=axes)
    for i, (name, each) in enumerate(curves):
        colour, style = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
        _draw_train(axes, each, f"{colour}40", colour, ("", _text(name)), style)
        _draw_held(axes, each, colour, "" if each.steps else _text(name), "dotted")
        _draw_rate(below, each, colour, linestyle=style)
    axes.plot([], [], color="#444444", marker="o", markersize=4, linestyle="dotted", label="validation loss")
    _name_losses(axes)
    axes.tick_params(labelbottom=False)
    below.set_xlabel("step")
    below.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(file, format="png")
    return True


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average of values, corrected for its start."""
    found, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        found.append(average / total)
    return found


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _draw_train(axes: Axes, curves: Curves, faint: str, colour: str, labels: tuple[str, str], style: str = "-") -> None:
    """Draw the train loss, faint, and over it smoothed; a label that is empty is not in the legend."""
    if curves.steps:
        xs, losses, _ = zip(*curves.steps, strict=True)
        axes.plot(xs, losses, color=faint, linewidth=1, label=labels[0] or None)
        axes.plot(xs, smoothed(losses), color=colour, linewidth=2, linestyle=style, label=labels[1])


def _draw_held(axes: Axes, curves: Curves, colour: str, label: str, style: str = "-") -> None:
    if curves.held:
        xs, losses = zip(*curves.held, strict=True)
        axes.plot(xs, losses, color=colour, marker="o", markersize=4, linestyle=style, label=label or None)


def _draw_rate(axes: Axes, curves: Curves, colour: str, **looks: Any) -> None:
    if curves.steps:
        xs, _, rates = zip(*curves.steps, strict=True)
        axes.plot(xs, rates, color=colour, linewidth=1, **looks)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)


def _name_losses(axes: Axes) -> None:
    axes.set_ylabel("loss, nats a supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _text(name: str) -> str:
    """Return a name that is drawn as it is: matplotlib sets what is between dollars as a formula, and hides a leading _."""
    safe = name.replace("$", r"\$")
    return f" {safe}" if safe.startswith("_") else safe
