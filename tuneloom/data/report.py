"""What became of every row: counted, with file, line, field, value, reason and mend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneloom.data.row import RowError
from tuneloom.errors import UserError
from tuneloom.types import Location

MAX_PROBLEMS_LISTED = 1000
TRAIN = "train"
"""Role of a source that is trained on; the others are validation and test."""


@dataclass(frozen=True)
class Problem:
    """One row that was dropped or repaired."""

    location: Location
    action: str
    field: str
    value: str
    reason: str
    mend: str

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.location.file, "line": self.location.line} | {
            key: getattr(self, key) for key in ("action", "field", "value", "reason", "mend")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Problem:
        rest = {key: values[key] for key in ("action", "field", "value", "reason", "mend")}
        return cls(Location(values["file"], values["line"]), **rest)

    def __str__(self) -> str:
        if self.action == "repaired":
            return f"{self.location} {self.field}: {self.reason}"
        return f"{self.location} {self.field}: {self.reason} (got {self.value}; {self.mend})"


@dataclass
class SourceReport:
    """Rows of one source. read = usable + dropped; used counts rows after mixing, of a held-out source all usable ones."""

    path: str
    files: list[str] = field(default_factory=list)
    """Names shown, in order."""
    sha256: list[str] = field(default_factory=list)
    """Of these files' bytes."""
    role: str = TRAIN
    """What the config has it for: train, validation or test."""
    formats: Counter[str] = field(default_factory=Counter)
    read: int = 0
    usable: int = 0
    used: int = 0
    dropped_by_reason: Counter[str] = field(default_factory=Counter)
    repaired_by_reason: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    unfilled: dict[str, str] = field(default_factory=dict)
    """Placeholders without a value: name -> where first."""
    leaked_probes: dict[str, str] = field(default_factory=dict)
    """Held-out probes that are in the training data: text -> where first."""
    num_answer_tokens_dropped: int = 0
    """Answer tokens of rows dropped as too long."""

    def unfilled_lines(self) -> list[str]:
        """Return a line for each placeholder without a value: which, where first, and the mend."""
        return [
            f"{{{{{name}}}}} has no value, first at {where}: --set data.variables.{name}=..."
            for name, where in self.unfilled.items()
        ]

    def drop(self, location: Location, error: RowError, strict: bool = False) -> None:
        """Count a row that cannot be used; in strict mode, stop.

        Raises:
            UserError: in strict mode.
        """
        self.dropped_by_reason[error.reason] += 1
        self._list(Problem(location, "dropped", error.field, error.value, error.reason, error.mend))
        if strict:
            self.refuse_dropped()

    def repair(self, location: Location, what: str) -> None:
        """Count a row that was repaired."""
        self.repaired_by_reason[what] += 1
        self._list(Problem(location, "repaired", "row", "", what, "nothing to do"))

    def _list(self, problem: Problem) -> None:
        if len(self.problems) < MAX_PROBLEMS_LISTED:
            self.problems.append(problem)

    def first_dropped(self) -> Problem | None:
        return next((problem for problem in self.problems if problem.action == "dropped"), None)

    def refuse_dropped(self) -> None:
        """Stop if a row was dropped.

        Raises:
            UserError: the first row that cannot be used.
        """
        if first := self.first_dropped():
            raise UserError(
                f"a row cannot be used: {first.reason}",
                where=f"{first.location} {first.field}",
                got=first.value,
                mend=f"{first.mend}; or run without --strict to drop such rows",
            )

    def refuse_unusable(self) -> None:
        """Stop if no row can be used.

        Raises:
            UserError: there is none, or the first one and why it is none.
        """
        if self.usable:
            return
        first = self.first_dropped()
        raise UserError(
            "no usable row in the data",
            where=str(first.location) if first else self.path,
            got=f"{first.field}: {first.reason} (got {first.value})" if first else "no rows",
            mend=first.mend if first else "write rows into it",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the source's part of data_report.json."""
        counts = {"read": self.read, "usable": self.usable, "used": self.used, "dropped": self.dropped_by_reason.total()}
        return {"path": self.path, "role": self.role, "files": self.files, "formats": dict(self.formats), **counts}

    def as_stored(self) -> dict[str, Any]:
        """Return everything, for the cache; `from_dict` reads it."""
        kept = {key: value for key, value in vars(self).items() if key not in ("used", "role")}
        return kept | {"problems": [problem.as_dict() for problem in self.problems]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SourceReport:
        counters = {key: Counter(values[key]) for key in ("formats", "dropped_by_reason", "repaired_by_reason")}
        problems = [Problem.from_dict(problem) for problem in values["problems"]]
        return cls(**{**values, **counters, "problems": problems})


@dataclass(frozen=True)
class Leak:
    """A conversation that is trained on, though it is held out to evaluate.

    Attributes:
        where: it is held out.
        role: validation or test.
        trained: where it is trained on first.
    """

    where: str
    role: str
    trained: str

    def __str__(self) -> str:
        mend = f"take it out of one of them, or {self.role} asks what was trained on"
        return f"{self.where} ({self.role}): the conversation is trained on too, at {self.trained} ({mend})"


@dataclass
class DataReport:
    """The report of a whole data section; `as_dict` is what data_report.json holds."""

    sources: list[SourceReport] = field(default_factory=list)
    duplicates: int = 0
    """Conversations equal to an earlier one that is trained on too, or is held out too."""
    num_leaks: int = 0
    leaks: list[Leak] = field(default_factory=list)
    """Of conversations that are held out and trained on; the first thousand."""
    num_cut: int = 0
    num_answer_tokens: int = 0
    num_answer_tokens_lost: int = 0
    notes: list[str] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)

    @property
    def num_read(self) -> int:
        return sum(source.read for source in self.sources)

    @property
    def dropped_by_reason(self) -> Counter[str]:
        return sum((source.dropped_by_reason for source in self.sources), Counter())

    @property
    def repaired_by_reason(self) -> Counter[str]:
        return sum((source.repaired_by_reason for source in self.sources), Counter())

    @property
    def num_dropped(self) -> int:
        return self.dropped_by_reason.total()

    @property
    def num_repaired(self) -> int:
        return self.repaired_by_reason.total()

    @property
    def problems(self) -> list[Problem]:
        """The problems of all sources, the first thousand."""
        return list(islice(chain.from_iterable(source.problems for source in self.sources), MAX_PROBLEMS_LISTED))

    def leaked_probes(self) -> Iterator[tuple[str, str]]:
        """Yield (probe, where) for held-out probes that are in the data."""
        for source in self.sources:
            yield from source.leaked_probes.items()

    def leaked_probe_lines(self) -> list[str]:
        """Return a line for each leaked probe: where, which, and the mend."""
        mend = "take it out, or evaluation asks what was trained on"
        return [f"{where}: {probe} ({mend})" for probe, where in self.leaked_probes()]

    def leak_lines(self, most: int) -> list[str]:
        """Return a line for each leaked conversation: where, and the mend; one for those that are more than `most`."""
        lines = [str(leak) for leak in self.leaks[:most]]
        return lines + [f"and {self.num_leaks - most:,} more"] * (self.num_leaks > most)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        problems = self.problems
        return {
            "read": self.num_read,
            "used": sum(source.used for source in self.sources),
            "repaired": self.num_repaired,
            "cut": self.num_cut,
            "dropped": self.num_dropped,
            "duplicates": self.duplicates,
            "leaks": self.num_leaks,
            "leaked_conversations": [asdict(leak) for leak in self.leaks],
            "empty_answers": self.dropped_by_reason["empty answer"],
            "leaked_probes": [{"probe": probe, "where": where} for probe, where in self.leaked_probes()],
            "answer_tokens": self.num_answer_tokens,
            "answer_tokens_lost": self.num_answer_tokens_lost,
            "dropped_by_reason": dict(self.dropped_by_reason),
            "repaired_by_reason": dict(self.repaired_by_reason),
            "sources": [source.as_dict() for source in self.sources],
            "train": self.train,
            "validation": self.validation,
            "notes": self.notes,
            "problems": [problem.as_dict() for problem in problems],
            "problems_not_listed": max(0, self.num_dropped + self.num_repaired - len(problems)),
        }


def length_statistics(lengths: NDArray[Any], num_supervised_tokens: int) -> dict[str, Any]:
    """Return counts of samples, tokens and supervised tokens, and the lengths in tokens with their histogram."""
    if not len(lengths):
        return {"samples": 0, "tokens": 0, "supervised_tokens": 0}
    ordered = np.sort(lengths)
    return {
        "samples": len(ordered),
        "tokens": int(ordered.sum()),
        "supervised_tokens": num_supervised_tokens,
        "shortest": int(ordered[0]),
        "median": int(ordered[len(ordered) // 2]),
        "longest": int(ordered[-1]),
        "histogram": length_histogram(ordered),
    }


def length_histogram(lengths: NDArray[Any]) -> list[dict[str, int]]:
    """Return how many lengths lie in each of about ten ranges of round borders: `from` <= length < `to`.

    Of few different lengths there are fewer ranges, so that most of them hold something.
    """
    lowest, highest = int(lengths.min()), int(lengths.max())
    most_ranges = min(12, 2 * len(np.unique(lengths)))
    step = next(step for step in _steps() if highest // step - lowest // step < most_ranges)
    edges: Sequence[int] = range(lowest // step * step, highest + step + 1, step)
    counts, _ = np.histogram(lengths, np.array(edges))
    ranges = zip(edges, edges[1:], counts, strict=False)
    return [{"from": low, "to": high, "count": int(count)} for low, high, count in ranges]


def _steps() -> Iterator[int]:
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10
