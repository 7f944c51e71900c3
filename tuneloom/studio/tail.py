"""metrics.jsonl as it grows: only what is new is read, and what a resume went back behind is taken out again."""

from __future__ import annotations

import json
import math
import os
from array import array
from pathlib import Path
from threading import RLock
from typing import Any

from tuneloom.rundir import RunDirectory
from tuneloom.runs import Clock, RunSummary, summary_of
from tuneloom.studio.series import FEW_POINTS, MOST_POINTS, Curve, smoothing_window

COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib")
SMOOTHED = ("loss", "grad_norm", "tokens_per_second")
_HEAD_BYTES = 256
_BLOCK_BYTES = 1 << 20
_LONGEST_LINE = 16 << 20


class RunTail:
    """What a run's metrics.jsonl says so far; as `RunDirectory.history`, without reading anything twice.

    A last line without its end is left for later. A file that was replaced, or is shorter than it was, is read anew.

    Args:
        path: the run's directory.

    Attributes:
        run: the run's directory.
        events: those that count, step events left out.
        last_step: the last step event that counts.
        generation: grows whenever something that was there is not there any more.
        bytes_read: so far, in all.
    """

    def __init__(self, path: str | Path) -> None:
        self.run = RunDirectory(path)
        self.generation = 0
        self.bytes_read = 0
        self._lock = RLock()
        self._seen: tuple[int, int, int] | None = None
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self._head = b""
        self._skipping = False
        self._clock = Clock()
        self._steps = array("q")
        self._columns = {name: array("d") for name in COLUMNS}
        self.events: list[dict[str, Any]] = []
        self.last_step: dict[str, Any] | None = None
        self._evals: list[tuple[int, float]] = []
        self._erase()

    def update(self) -> bool:
        """Read what is new.

        Returns:
            Whether anything is.

        Raises:
            OSError: the file is there and cannot be read.
        """
        with self._lock:
            try:
                file = open(self.run.metrics, "rb")  # noqa: SIM115 closed below
            except FileNotFoundError:
                return self._forget()
            with file:
                found = os.fstat(file.fileno())
                seen = (found.st_ino, found.st_size, found.st_mtime_ns)
                if seen == self._seen:
                    return False
                head = file.read(_HEAD_BYTES)
                replaced = self._seen is not None and found.st_ino != self._seen[0]
                if replaced or found.st_size < self._offset or not head.startswith(self._head):
                    self.generation += 1
                    self._begin()
                self._head, self._seen = head, seen
                return self._read(file)

    def unread_bytes(self) -> int:
        """Return how much the next update reads, 0 where there is no file."""
        try:
            found = self.run.metrics.stat()
        except FileNotFoundError:
            return 0
        replaced = self._seen is None or found.st_ino != self._seen[0] or found.st_size < self._offset
        return found.st_size - (0 if replaced else self._offset)

    def summary(self) -> RunSummary:
        """Return the run in a line, as of the last update.

        Raises:
            OSError: the directory is gone, or may not be read.
        """
        with self._lock:
            last = [self.last_step] if self.last_step is not None else []
            return summary_of(self.run, [*self.events, *last], self._clock)

    def curves(self) -> dict[str, Curve]:
        """Return the curves by column of the step events, and `eval_loss`, as of the last update."""
        with self._lock:
            self._draw()
            return self._curves

    def total_steps(self) -> int | None:
        """Return how many steps the run has, as its first event tells, or as its early stop does."""
        early = next((event.get("step") for event in reversed(self.events) if event["event"] == "early_stop"), None)
        if isinstance(early, int) and self.last_step is not None and early == self.last_step.get("step"):
            return early
        total = next((event.get("total_steps") for event in self.events if event["event"] == "start"), None)
        return total if isinstance(total, int) else None

    def num_steps(self) -> int:
        """Return how many step events count."""
        return len(self._steps)

    def samples(self) -> dict[int, dict[str, str]]:
        """Return the sample answers: step -> prompt -> answer."""
        found: dict[int, dict[str, str]] = {}
        for event in list(self.events):
            step, prompt, answer = event.get("step"), event.get("prompt"), event.get("answer")
            if event["event"] == "sample" and isinstance(step, int) and isinstance(prompt, str) and isinstance(answer, str):
                found.setdefault(step, {})[prompt] = answer
        return found

    def warnings(self) -> list[str]:
        """Return the messages of its warnings."""
        return [str(event.get("message", "")) for event in list(self.events) if event["event"] == "warning"]

    # Reading.

    def _forget(self) -> bool:
        if self._seen is None:
            return False
        self._seen = None
        self.generation += 1
        self._begin()
        return True

    def _read(self, file: Any) -> bool:
        file.seek(self._offset)
        rest, changed = b"", False
        while block := file.read(_BLOCK_BYTES):
            self.bytes_read += len(block)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._offset += len(line) + 1
                changed |= self._line(line)
            if len(rest) > _LONGEST_LINE:  # nothing that a trainer wrote
                self._offset += len(rest)
                rest, self._skipping = b"", True
        return changed

    def _line(self, line: bytes) -> bool:
        if self._skipping:
            self._skipping = False
            return False
        try:
            event = json.loads(line.decode("utf-8", errors="replace"))
        except (ValueError, RecursionError):
            return False
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            return False
        self._clock.add(event)
        if event["event"] == "step":
            self._add_step(event)
        else:
            self._add_other(event)
        return True

    def _add_step(self, event: dict[str, Any]) -> None:
        step = event.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or abs(step) > 1 << 60:
            return
        self.last_step = event
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(_number(event.get(name)))

    def _add_other(self, event: dict[str, Any]) -> None:
        if event["event"] == "resume":
            self._go_back(_step(event))
        self.events.append(event)
        if event["event"] == "eval" and isinstance(event.get("step"), int):
            self._evals.append((event["step"], _number(event.get("eval_loss"))))

    # Going back.

    def _go_back(self, step: int) -> None:
        """Take out what is after a step."""
        self.events = [event for event in self.events if _step(event) <= step]
        kept = [i for i, at in enumerate(self._steps) if at <= step]
        if len(kept) < len(self._steps):
            self._steps = array("q", (self._steps[i] for i in kept))
            self._columns = {name: array("d", (column[i] for i in kept)) for name, column in self._columns.items()}
            self.last_step = self._last_kept()
        self._evals = [point for point in self._evals if point[0] <= step]
        self.generation += 1
        self._erase()

    def _last_kept(self) -> dict[str, Any] | None:
        if not self._steps:
            return None
        values = {name: column[-1] for name, column in self._columns.items() if math.isfinite(column[-1])}
        return {"event": "step", "step": self._steps[-1], **values}

    def _erase(self) -> None:
        """Forget the curves: they are drawn when somebody asks for them."""
        self._curves: dict[str, Curve] = {}
        self._drawn = self._evals_drawn = 0

    def _draw(self) -> None:
        """Carry the curves on to what has been read."""
        if not self._curves:
            window = smoothing_window(self.total_steps())
            for name in COLUMNS:
                self._curves[name] = Curve(window if name in SMOOTHED else None, MOST_POINTS if name == "loss" else FEW_POINTS)
            self._curves["eval_loss"] = Curve(None, MOST_POINTS)
        for name, column in self._columns.items():
            add = self._curves[name].add
            for i in range(self._drawn, len(self._steps)):
                add(self._steps[i], column[i])
        for point in self._evals[self._evals_drawn :]:
            self._curves["eval_loss"].add(*point)
        self._drawn, self._evals_drawn = len(self._steps), len(self._evals)


def _step(event: dict[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _number(value: object) -> float:
    """Return a number, nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
