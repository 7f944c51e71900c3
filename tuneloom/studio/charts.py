"""ECharts options for a run's curves. Colours are the style sheet's, looked up in the page when a chart is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tuneloom.studio.series import Pairs

Options = dict[str, Any]
DIGITS = 5


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend; empty: not in it.
        points: by step.
        colour: a variable of the style sheet.
        faint: thin and pale, as raw values are behind their mean.
        marked: each point is marked, as of values that are far apart.
        dotted: drawn as dots.
        told: its values are shown where the pointer is.
    """

    name: str
    points: Pairs
    colour: str
    faint: bool = False
    marked: bool = False
    dotted: bool = False
    told: bool = True


def css(variable: str, alpha: str = "") -> str:
    """Return a page expression for a colour of the style sheet; `alpha` are two digits put behind it."""
    return f"getComputedStyle(document.body).getPropertyValue('{variable}').trim() + '{alpha}'"


def line_chart(lines: Iterable[Line], *, title: str = "", total_steps: int | None = None, legend: bool = False) -> Options:
    """Return a chart over steps.

    Args:
        lines: in the order in which they are drawn.
        title: over it, for charts without a heading of their own.
        total_steps: the axis ends there once half of the run is done; before, the lines have all of the width.
        legend: whether the lines are named below.
    """
    drawn = list(lines)
    last = max((line.points[-1][0] for line in drawn if line.points), default=0)
    end = {"max": total_steps} if total_steps and 2 * last >= total_steps else {}
    return {
        "animation": False,
        "aria": {"enabled": True},
        "grid": {"left": 8, "right": 24, "top": 34 if title else 14, "bottom": 30 if legend else 6, "containLabel": True},
        "title": _title(title),
        "legend": _legend(drawn) if legend else {"show": False},
        "tooltip": _tooltip(),
        "xAxis": _axis(grid=False) | {"min": 0, "minInterval": 1} | end,
        "yAxis": _axis(grid=True) | {"scale": True, "splitNumber": 4},
        "series": [_series(line) for line in drawn],
    }


def _title(text: str) -> Options:
    if not text:
        return {"show": False}
    return {"text": text, "left": 0, "top": 0, "textStyle": {"fontSize": 12, "fontWeight": 500, ":color": css("--muted")}}


def _legend(lines: list[Line]) -> Options:
    names = list(dict.fromkeys(line.name for line in lines if line.name and line.points))
    style = {":color": css("--text"), "fontSize": 12}
    return {
        "show": True,
        "type": "scroll",
        "bottom": 0,
        "left": 0,
        "data": names,
        "icon": "roundRect",
        "itemWidth": 14,
        "itemHeight": 3,
        "textStyle": style,
    }


def _tooltip() -> Options:
    return {
        "trigger": "axis",
        ":backgroundColor": css("--panel"),
        ":borderColor": css("--line"),
        "textStyle": {":color": css("--text"), "fontSize": 12},
        "axisPointer": {"type": "line", "lineStyle": {":color": css("--muted")}},
        ":valueFormatter": "(value) => value == null ? '' : Number(Number(value).toPrecision(4)).toString()",
    }


def _axis(*, grid: bool) -> Options:
    return {
        "type": "value",
        "axisLine": {"show": not grid, "lineStyle": {":color": css("--line")}},
        "axisTick": {"show": False},
        "axisLabel": {":color": css("--muted"), "fontSize": 11, "hideOverlap": True},
        "splitLine": {"show": grid, "lineStyle": {":color": css("--line")}},
    }


def _series(line: Line) -> Options:
    alone = len(line.points) < 2
    return {
        "type": "line",
        "name": line.name,
        "data": [[step, float(f"{value:.{DIGITS}g}")] for step, value in line.points],
        "showSymbol": line.marked or alone,
        "symbol": "circle",
        "symbolSize": 6 if line.marked or alone else 4,
        "silent": line.faint,
        "z": 2 if line.faint else 3,
        "tooltip": {"show": line.told},
        "lineStyle": {
            "width": 1 if line.faint else 2,
            "type": "dotted" if line.dotted else "solid",
            "opacity": 0.35 if line.faint else 1,
            ":color": css(line.colour),
        },
        "itemStyle": {":color": css(line.colour), "opacity": 0.35 if line.faint and not alone else 1},
        "emphasis": {"disabled": True},
    }


SAVE_PICTURE = f"""(event) => {{
    const button = event.currentTarget;
    const place = button.closest('.panel').querySelector('.run-chart');
    const link = document.createElement('a');
    link.href = getElement(place.id.slice(1)).chart.getDataURL({{
        type: 'png', pixelRatio: 2, backgroundColor: {css("--panel")},
    }});
    link.download = button.dataset.file;
    link.click();
}}"""
"""The page's handler of a button in a chart's panel: saves the chart as a PNG file, by the name that the button carries."""
