"""Curves for the page: a run's series smoothed and thinned, point by point, whatever its length.

Each point is looked at once. A curve keeps the least and the greatest point of each of its buckets; when there are too
many buckets, neighbours are joined and each stands for twice as many points. So peaks are never lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MOST_POINTS = 2000
FEW_POINTS = 400

Pairs = list[tuple[int, float]]


@dataclass
class _Bucket:
    low: tuple[int, float]
    high: tuple[int, float]

    def add(self, point: tuple[int, float]) -> None:
        if point[1] < self.low[1]:
            self.low = point
        if point[1] > self.high[1]:
            self.high = point

    def join(self, later: _Bucket) -> None:
        self.add(later.low)
        self.add(later.high)


class Thinned:
    """A series of which a bounded number of points is kept, its extremes among them.

    Args:
        most: points that are kept, at least 6.

    Attributes:
        work: points and buckets that were touched so far.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most_buckets = (most - 2) // 2
        self._buckets: list[_Bucket] = []
        self._width = 1
        self._in_last = 0
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self.work = 0

    def add(self, step: int, value: float) -> None:
        """Add the next point; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        point = (step, value)
        self._first, self._last = self._first or point, point
        self.work += 1
        if self._in_last == self._width and len(self._buckets) == self._most_buckets:
            self._halve()
        if self._buckets and self._in_last < self._width:
            self._buckets[-1].add(point)
            self._in_last += 1
        else:
            self._buckets.append(_Bucket(point, point))
            self._in_last = 1

    def points(self) -> Pairs:
        """Return what is kept, by step."""
        kept = {point for bucket in self._buckets for point in (bucket.low, bucket.high)}
        kept |= {point for point in (self._first, self._last) if point is not None}
        return sorted(kept)

    def _halve(self) -> None:
        """Join the buckets in pairs; one that is left over is filled up from here on."""
        self.work += len(self._buckets)
        left, right = self._buckets[::2], self._buckets[1::2]
        for bucket, later in zip(left, right, strict=False):
            bucket.join(later)
        if len(left) == len(right):
            self._in_last = 2 * self._width
        self._buckets = left
        self._width *= 2


class Smoother:
    """An exponential mean, corrected for its start: after n values it is their weighted mean.

    Args:
        window: about how many values it looks back.
    """

    def __init__(self, window: float) -> None:
        self._keep = 1 - 1 / max(1.0, window)
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """Return the mean with one more value; one that is not finite changes nothing."""
        if math.isfinite(value):
            self._sum = self._keep * self._sum + (1 - self._keep) * value
            self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight if self._weight else math.nan


def smoothing_window(total_steps: int | None) -> float:
    """Return how far to look back in a run of so many steps: a fortieth of it, 5 steps at least and 250 at most."""
    return min(250.0, max(5.0, (total_steps or 400) / 40))


@dataclass
class Curve:
    """A series, and beside it the same smoothed.

    Args:
        window: of the smoothing; None: it is not smoothed.
        most: points that are kept of each.

    Attributes:
        raw, smooth: what is kept of it.
    """

    window: float | None
    most: int = MOST_POINTS
    raw: Thinned = field(init=False)
    smooth: Thinned = field(init=False)

    def __post_init__(self) -> None:
        self.raw, self.smooth = Thinned(self.most), Thinned(self.most)
        self._smoother = Smoother(self.window) if self.window is not None else None

    def add(self, step: int, value: float) -> None:
        """Add the next point."""
        self.raw.add(step, value)
        if self._smoother is not None:
            self.smooth.add(step, self._smoother.add(value))
