"""Conversations that equal each other: repeated ones, and those that are trained on and evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneloom.data.report import TRAIN, DataReport, Leak
from tuneloom.types import Location

MAX_LEAKS_LISTED = 1000


@dataclass(frozen=True)
class Digested:
    """A source's usable conversations.

    Attributes:
        role: train, validation or test.
        digests: of each, S16, as `digest_of` makes them.
        location: returns where one of them was read.
    """

    role: str
    digests: NDArray[np.bytes_]
    location: Callable[[int], Location]


def count_equals(sources: Sequence[Digested], report: DataReport) -> None:
    """Count what equals an earlier conversation on its side, and what is held out though it is trained on."""
    trained = _Side([source for source in sources if source.role == TRAIN])
    held_out = _Side([source for source in sources if source.role != TRAIN])
    report.duplicates = trained.num_repeated + held_out.num_repeated
    leaked = np.flatnonzero(np.isin(held_out.digests, trained.digests))
    report.num_leaks = len(leaked)
    for i in leaked[:MAX_LEAKS_LISTED].tolist():
        (source, here), (_, there) = held_out.place(i), trained.place(trained.first(held_out.digests[i]))
        report.leaks.append(Leak(str(here), source.role, str(there)))


class _Side:
    """Sources that are all trained on, or all held out."""

    def __init__(self, sources: Sequence[Digested]) -> None:
        self._sources = sources
        self._ends = np.cumsum([len(source.digests) for source in sources])
        self.digests = np.concatenate([np.zeros(0, "S16"), *(source.digests for source in sources)])
        self._distinct, self._first = np.unique(self.digests, return_index=True)
        self.num_repeated = len(self.digests) - len(self._distinct)

    def first(self, digest: np.bytes_) -> int:
        """Return the first index of a digest that is among them."""
        return int(self._first[np.searchsorted(self._distinct, digest)])

    def place(self, i: int) -> tuple[Digested, Location]:
        """Return the source of a conversation, and where it was read."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        source = self._sources[number]
        return source, source.location(i - int(self._ends[number]) + len(source.digests))
