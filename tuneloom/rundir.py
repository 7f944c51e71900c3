"""The run directory: the only interface between the trainer and everything that shows or uses a run.

    runs/<name>/
      config.yaml  environment.json  data_report.json  plan.json  state.json
      metrics.jsonl      one event a line, append only
      checkpoint-<step>/ adapter/
      report.md  loss.png  evaluation.json

The trainer writes through `RunDirectory`; readers use it too and never need torch.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from tuneloom.errors import UserError

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
DATA_REPORT = "data_report.json"
METRICS = "metrics.jsonl"
STATE = "state.json"
PLAN = "plan.json"
ADAPTER = "adapter"
EVALUATION = "evaluation.json"
REPORT = "report.md"
LOSS_PLOT = "loss.png"
STOP = ".stop-"
"""What the note begins with that a process, whose number follows, was asked to end."""
EXPORTS = "exports"
"""Folder beside the runs that the studio writes exports into."""
END_PHASES = ("done", "failed", "interrupted")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunDirectory:
    """A run's folder, and the names of what is in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, parent: str | Path, name: str) -> RunDirectory:
        """Make a new directory `parent/name`; a taken name gets `-2`, `-3`, ...

        Raises:
            UserError: the parent cannot be written.
        """
        parent = Path(parent)
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError as error:
                if not parent.is_dir():
                    raise UserError(
                        "the output folder is a file", where=str(parent), mend="set output_dir to a folder"
                    ) from error
                number += 1
                continue
            except OSError as error:
                raise UserError(
                    "cannot write the output folder",
                    where=str(parent),
                    got=error.strerror,
                    mend="set output_dir to a folder that you may write",
                ) from error
            return cls(path)

    @staticmethod
    def check_parent(parent: str | Path) -> None:
        """Require that a run can be made below a folder, before anything that takes long.

        Raises:
            UserError: it is a file, or may not be written.
        """
        place = Path(parent).absolute()
        there = next(path for path in (place, *place.parents) if path.exists())
        if not there.is_dir():
            raise UserError("the output folder is a file", where=str(there), mend="set output_dir to a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(
                "cannot write the output folder", where=str(there), mend="set output_dir to a folder that you may write"
            )

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a folder is a run directory."""
        return (path / CONFIG).is_file() and (path / METRICS).is_file()

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint of a step, there or not."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> dict[int, Path]:
        """Return the published checkpoints, by step, ascending."""
        found = {}
        for path in self.path.glob("checkpoint-*"):
            match = _CHECKPOINT.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match.group(1))] = path
        return dict(sorted(found.items()))

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file's map, or None where it is absent or torn."""
        return read_json_map(self.path / name)

    def append_event(self, event: str, **fields: Any) -> None:
        """Append one event to metrics.jsonl and flush it; a non-finite number is written as null.

        A torn last line, left by a killed trainer, is ended first.
        """
        record = {"event": event, "time": round(time.time(), 3), **{key: _finite(value) for key, value in fields.items()}}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.metrics, "ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                line = "\n" + line
            file.write(line.encode("utf-8", errors="replace"))
            file.flush()

    def events(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the events, of one kind or all; a torn line is passed over."""
        try:
            file = open(self.metrics, encoding="utf-8", errors="replace")  # noqa: SIM115 closed below, with the generator
        except FileNotFoundError:
            return
        with file:
            for line in file:
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(event, dict) and isinstance(event.get("event"), str) and kind in (None, event["event"]):
                    yield event

    def history(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events that still count: what a resume went back behind is left out."""
        kept: list[dict[str, Any]] = []
        for event in self.events():
            if event["event"] == "resume":
                kept = [earlier for earlier in kept if _step(earlier) <= _step(event)]
            kept.append(event)
        return [event for event in kept if kind in (None, event["event"])]

    def live_pid(self) -> int | None:
        """Return the process that is training in this directory now, if another one is."""
        state = self.read_json(STATE) or {}
        pid, phase = state.get("pid"), state.get("phase")
        if not isinstance(pid, int) or pid == os.getpid() or phase in END_PHASES:
            return None
        told = state.get("time")
        try:
            process = psutil.Process(pid)
            lives = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= float(told or 0)
        except (psutil.Error, TypeError, ValueError, OverflowError):  # no such process, or a state that we did not write
            return None
        return pid if lives else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process within the block: metrics.jsonl is open all along, with a lock on it that the
        system ends with the process.

        Where the system or the file system has no such locks, nothing is held.

        Raises:
            UserError: another process holds it, or it may not be written.
        """
        try:
            file = open(self.metrics, "ab")  # noqa: SIM115 closed below
        except OSError as error:
            raise UserError(
                "cannot write the run's folder",
                where=str(self.path),
                got=error.strerror,
                mend="make it writable, or copy the run to a folder that you may write",
            ) from error
        with file:
            if not _locked(file):
                pid = (self.read_json(STATE) or {}).get("pid")
                raise UserError(
                    "the run is being trained right now",
                    where=str(self.path),
                    got=f"process {pid}" if pid else "another process",
                    mend="wait for it, or stop it first",
                )
            try:
                yield
            finally:
                with suppress(OSError):  # whatever became of the disk, it must not hide how the run ended
                    (self.path / f"{STOP}{os.getpid()}").unlink()

    def sweep(self) -> None:
        """Remove what a killed trainer left half written or half removed; for whoever holds the run."""
        for pattern in (".*.partial", ".*.doomed", ".*.old", f"{STOP}*"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def set_aside(self, step: int) -> Path:
        """Copy config.yaml and move the checkpoints after `step` into `superseded-<n>/`; return that folder."""
        later = [path for at, path in self.checkpoints().items() if at > step]
        number = 1 + sum(1 for _ in self.path.glob("superseded-*"))
        folder = self.path / f"superseded-{number}"
        folder.mkdir()
        for path in later:
            path.rename(folder / path.name)
        (folder / CONFIG).write_bytes(self.config.read_bytes())
        return folder

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace state.json atomically."""
        self.write_json(STATE, {**state, "pid": os.getpid(), "host": platform.node(), "time": round(time.time(), 3)})


def run_name(method: str, base: str) -> str:
    """Return a new run's default name: method, base model and local time."""
    base = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(base).name).strip("-.")[:40] or "model"
    return f"{method.replace('+', '-')}-{base}-{datetime.now():%Y%m%d-%H%M%S}"


def folder_bytes(folder: Path) -> int:
    """Return the size of the files below a folder; links are not followed, and what vanishes meanwhile counts nothing."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += Path(place, name).lstat().st_size
            except OSError:
                continue
    return total


def read_json_map(file: Path) -> dict[str, Any] | None:
    """Return a JSON file's map, or None where it is absent, torn, or no map."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_atomically(path: Path, text: str) -> None:
    """Write beside, sync, rename: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _locked(file: Any) -> bool:
    """Lock an open file until it is closed; False where another one has it locked."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _step(event: Mapping[str, Any]) -> int:
    """Return an event's step, 0 where it has none."""
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return bytes(file.read(1))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
