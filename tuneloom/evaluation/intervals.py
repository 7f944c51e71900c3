"""Means with 95 % intervals by the percentile bootstrap (Efron, 1979): rows are drawn anew, with replacement.

The draw is seeded, and the same for all figures of as many rows, so that the difference of two is paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
_SEED = 20
_LOW, _HIGH = 2.5, 97.5


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Change:
    """A figure of the base and of the tuned model on the same rows; `change` is after less before, paired."""

    before: Interval
    after: Interval
    change: Interval

    def as_dict(self) -> dict[str, float]:
        """Return `value`, `low` and `high` of the tuned model, and what it was before and by how much it changed."""
        return {
            **self.after.as_dict(),
            "before": self.before.value,
            "before_low": self.before.low,
            "before_high": self.before.high,
            "change": self.change.value,
            "change_low": self.change.low,
            "change_high": self.change.high,
        }


def share(rows: Sequence[bool]) -> Interval:
    """Return the share of rows that hold.

    Where all rows are alike every draw is too, so there the exact binomial bound stands (Clopper and Pearson, 1934).
    """
    if rows and (all(rows) or not any(rows)):
        bound = 1 - (1 - (_HIGH - _LOW) / 100) / 2
        miss = 1 - (1 - bound) ** (1 / len(rows))
        return Interval(1.0, 1 - miss, 1.0) if rows[0] else Interval(0.0, 0.0, miss)
    return mean(np.asarray(rows, float))


def mean(sums: ArrayLike, counts: ArrayLike | None = None) -> Interval:
    """Return the sum of `sums` over that of `counts` (None: one a row), rows drawn anew.

    Args:
        sums: a value a row, such as its loss summed over its tokens.
        counts: what it is over, such as its tokens.
    """
    sums_N = np.asarray(sums, float)
    counts_N = np.ones_like(sums_N) if counts is None else np.asarray(counts, float)
    if not counts_N.sum():
        raise ValueError("no rows to take a mean over")
    draws_BN = _draws(len(sums_N))
    wholes_B = draws_BN @ counts_N
    found_B = (draws_BN @ sums_N)[wholes_B > 0] / wholes_B[wholes_B > 0]
    low, high = np.percentile(found_B, (_LOW, _HIGH))
    return Interval(float(sums_N.sum() / counts_N.sum()), float(low), float(high))


def change_of_shares(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """Return how a share changed over the same rows."""
    return Change(share(before), share(after), mean(np.asarray(after, float) - np.asarray(before, float)))


def change_of_means(before: ArrayLike, after: ArrayLike, counts: ArrayLike | None = None) -> Change:
    """Return how a mean changed over the same rows; see `mean`."""
    difference = np.asarray(after, float) - np.asarray(before, float)
    return Change(mean(before, counts), mean(after, counts), mean(difference, counts))


def _draws(num_rows: int) -> NDArray[Any]:
    """Return how often each row is drawn in each resample, (B, N)."""
    chance = np.full(num_rows, 1 / num_rows)
    return np.random.default_rng(_SEED).multinomial(num_rows, chance, size=RESAMPLES).astype(float)
