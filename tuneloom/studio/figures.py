"""Figures as people read them: spans, sizes, moments, losses. The same in every language."""

from __future__ import annotations

import time

NOTHING = "–"


def span(seconds: float | None) -> str:
    """Return a length of time: `42 s`, `3:07 min`, `2:03 h`, `3 d 4 h`."""
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(num_bytes: int) -> str:
    """Return a size: `12 kB`, `98 MB`, `1.07 GB`."""
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.0f} kB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"


def moment(seconds: float | None) -> str:
    """Return a time of the day, with the date where that is not today's."""
    if seconds is None:
        return NOTHING
    then = time.localtime(seconds)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", then)


def loss(value: float | None) -> str:
    """Return a loss: `0.4538`."""
    return NOTHING if value is None else f"{value:.4f}"


def figure(value: float | None, unit: str = "") -> str:
    """Return a number of three digits or more, with its unit: `208 tokens/s`, `3.59 GiB`."""
    if value is None:
        return NOTHING
    shown = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{shown} {unit}".rstrip()


def steps(step: int | None, total: int | None) -> str:
    """Return how far a run is: `12 / 54`."""
    if step is None:
        return NOTHING
    return f"{step:,} / {total:,}" if total else f"{step:,}"


def short_model(name: str | None) -> str:
    """Return a base model's name without the folders that it lies in."""
    return (name or "").rstrip("/").rpartition("/")[2] or NOTHING
