"""The runs of a folder, looked at again and again: what has not changed since is not read again.

Nor is it by a studio that starts anew: what is known of runs that are not live is kept in a file, by when their files
were written. It can be lost at any time.

Who asks never waits for a long file: a thread reads it, and meanwhile its beginning and its end tell how the run stands.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tuneloom.rundir import ADAPTER, CONFIG, METRICS, PLAN, STATE, RunDirectory, write_atomically
from tuneloom.runs import Clock, RunSummary, shown_name, summary_of
from tuneloom.studio.tail import RunTail

_TAILS = 16
_LITTLE_BYTES = 1 << 20
_ENDS_BYTES = 64 << 10
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
        self._kept = self._noted()
        self._known = dict(self._kept)
        self._tails: OrderedDict[Path, RunTail] = OrderedDict()
        self._lock = threading.RLock()
        self._readers: dict[Path, threading.Thread] = {}

    def summaries(self) -> list[RunSummary]:
        """Return the runs, newest first."""
        found = [summary for path in self._folders() if (summary := self.summary(path)) is not None]
        there = {Path(summary.path) for summary in found}
        with self._lock:
            for path in self._known.keys() - there:
                self._known.pop(path)
                self._tails.pop(path, None)
            self._note()
        return sorted(found, key=lambda run: (run.started or 0.0, run.name), reverse=True)

    def summary(self, path: Path) -> RunSummary | None:
        """Return a run in a line, None where the folder is none or may not be read."""
        try:
            if not RunDirectory.is_run(path):
                return None
            known = self._known.get(path)
            if known is not None and known[0] == _stamps(path) and known[1].pid is None:
                return known[1]
            tail = self._tails.get(path) or RunTail(path)
            if tail.unread_bytes() > _LITTLE_BYTES:
                self._read_beside(path, tail)
                return glance(path) if known is None else known[1]
            return self._read(path, tail)
        except OSError:
            return None

    def settle(self, seconds: float | None = None) -> None:
        """Wait for the threads that read long files, each at most so long."""
        for reader in list(self._readers.values()):
            reader.join(seconds)

    def _read(self, path: Path, tail: RunTail) -> RunSummary:
        """Read what is new of a run."""
        stamp = _stamps(path)
        self.reads += 1
        tail.update()
        summary = tail.summary()
        with self._lock:
            self._known[path] = (stamp, summary)
            if summary.pid is not None:
                self._keep(path, tail)
        return summary

    def _read_beside(self, path: Path, tail: RunTail) -> None:
        """Have a thread read a run, unless one does already."""
        with self._lock:
            if path in self._readers:
                return

            def read() -> None:
                with suppress(OSError):
                    self._read(path, tail)
                with self._lock:
                    self._readers.pop(path, None)

            self._readers[path] = threading.Thread(target=read, daemon=True)
        self._readers[path].start()

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

    def _note(self) -> None:
        ended = {path: known for path, known in self._known.items() if known[1].pid is None}
        if ended != self._kept:
            self._kept = ended
            noted = {path.name: (stamp, summary.as_dict()) for path, (stamp, summary) in ended.items()}
            with suppress(OSError):  # a folder that may not be written is only slower
                (self.runs / NOTES).parent.mkdir(exist_ok=True)
                write_atomically(self.runs / NOTES, json.dumps(noted) + "\n")

    def _keep(self, path: Path, tail: RunTail) -> RunTail:
        with self._lock:
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


def glance(path: Path) -> RunSummary:
    """Return a run in a line from the beginning and the end of its metrics alone; its time then counts pauses too.

    Raises:
        OSError: the directory is gone, or may not be read.
    """
    run = RunDirectory(path)
    events = list(_ends(run.metrics))
    return summary_of(run, events, Clock(events))


def _ends(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the events at the beginning and at the end of a file."""
    with open(file, "rb") as lines:
        head = lines.read(_ENDS_BYTES)
        size = lines.seek(0, os.SEEK_END)
        lines.seek(max(len(head), size - _ENDS_BYTES))
        tail = lines.read()
    for line in (*head.split(b"\n")[:-1], *tail.split(b"\n")[:-1]):
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event


def _stamps(path: Path) -> _Stamp:
    return tuple(_stamp(path / name) for name in (METRICS, STATE, CONFIG))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
