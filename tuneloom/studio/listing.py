"""The runs of a folder, looked at again and again: what has not changed since is not read again.

Nor is it by a studio that starts anew: what is known of runs that are not live is kept in a file, by when their files
were written. It can be lost at any time.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tuneloom.rundir import ADAPTER, CONFIG, METRICS, PLAN, STATE, RunDirectory, write_atomically
from tuneloom.runs import RunSummary, shown_name
from tuneloom.studio.tail import RunTail

_TAILS = 16
_TRACES = (CONFIG, METRICS, STATE, PLAN, ADAPTER)
NOTES = ".studio/runs.json"
_Stamp = tuple[tuple[int, int, int] | None, ...]
_NOTED = TypeAdapter(dict[str, tuple[_Stamp, RunSummary]])


@dataclass(frozen=True)
class Broken:
    """A folder that was a run.

    Attributes:
        name, path: of the folder.
        missing: the files without which it is none; empty: it may not be read.
    """

    name: str
    path: str
    missing: tuple[str, ...]


class RunListing:
    """A folder of runs.

    Args:
        runs: the folder; it need not be there.

    Attributes:
        reads: how often a run was looked into, not only at.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.reads = 0
        self._known: dict[Path, tuple[_Stamp, RunSummary]] = self._noted()
        self._tails: OrderedDict[Path, RunTail] = OrderedDict()

    def summaries(self) -> list[RunSummary]:
        """Return the runs, newest first."""
        before = {path: known for path, known in self._known.items() if known[1].pid is None}
        found = [summary for path in self._folders() if (summary := self.summary(path)) is not None]
        there = {Path(summary.path) for summary in found}
        for path in self._known.keys() - there:
            self._known.pop(path)
            self._tails.pop(path, None)
        self._note(before)
        return sorted(found, key=lambda run: (run.started or 0.0, run.name), reverse=True)

    def summary(self, path: Path) -> RunSummary | None:
        """Return a run in a line, None where the folder is none or may not be read."""
        try:
            if not RunDirectory.is_run(path):
                return None
            stamp = tuple(_stamp(path / name) for name in (METRICS, STATE, CONFIG))
            known = self._known.get(path)
            if known is not None and known[0] == stamp and known[1].pid is None:
                return known[1]
            self.reads += 1
            tail = self._tails.get(path) or RunTail(path)
            tail.update()
            summary = tail.summary()
        except OSError:
            return None
        self._known[path] = (stamp, summary)
        if summary.pid is not None:
            self._keep(path, tail)
        return summary

    def broken(self) -> list[Broken]:
        """Return the folders that were runs and cannot be read as such, by name."""
        found = []
        for path in self._folders():
            try:
                if not RunDirectory.is_run(path) and any((path / name).exists() for name in _TRACES):
                    missing = tuple(name for name in (CONFIG, METRICS) if not (path / name).is_file())
                    found.append(Broken(shown_name(path), str(path), missing))
            except OSError:
                found.append(Broken(shown_name(path), str(path), ()))
        return found

    def tail(self, path: Path) -> RunTail:
        """Return the reader of a run's metrics, the same one for everybody who looks."""
        return self._keep(path, self._tails.get(path) or RunTail(path))

    def _noted(self) -> dict[Path, tuple[_Stamp, RunSummary]]:
        """Return what an earlier studio knew of runs that were not live."""
        try:
            noted = _NOTED.validate_json((self.runs / NOTES).read_bytes())
        except (OSError, ValidationError):
            return {}
        return {self.runs / name: known for name, known in noted.items() if known[1].path == str(self.runs / name)}

    def _note(self, before: dict[Path, tuple[_Stamp, RunSummary]]) -> None:
        ended = {path: known for path, known in self._known.items() if known[1].pid is None}
        if ended != before:
            noted = {path.name: (stamp, summary.as_dict()) for path, (stamp, summary) in ended.items()}
            with suppress(OSError):  # a folder that may not be written is only slower
                (self.runs / NOTES).parent.mkdir(exist_ok=True)
                write_atomically(self.runs / NOTES, json.dumps(noted) + "\n")

    def _keep(self, path: Path, tail: RunTail) -> RunTail:
        self._tails[path] = tail
        self._tails.move_to_end(path)
        if len(self._tails) > _TAILS:
            self._tails.popitem(last=False)
        return tail

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.runs.iterdir() if not path.name.startswith(".") and path.is_dir())
        except OSError:
            return []


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
