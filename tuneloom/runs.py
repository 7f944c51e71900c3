"""What the runs below a folder are and how they went, read from their directories; no torch.

A folder that is no run is passed over by name; a run whose files are torn is listed with what can still be read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneloom.errors import UserError, nearest, user_path
from tuneloom.rundir import DATA_REPORT, END_PHASES, EXPORTS, STATE, RunDirectory, folder_bytes

DEAD = "dead"
"""Phase of a run whose process is gone without having said how it ended."""
UNKNOWN = "unknown"
"""Phase of a run whose state.json is gone or torn."""
_LAST_LOSSES = 5
_RESUMABLE = ("failed", "interrupted", DEAD, UNKNOWN)
_REPORT_KEYS = ("read", "used", "repaired", "cut", "dropped", "duplicates", "leaks", "answer_tokens", "answer_tokens_lost")


@dataclass(frozen=True)
class RunSummary:
    """A run in a line.

    Attributes:
        name, path: of its directory.
        phase: preparing, training, evaluating, saving, done, failed, interrupted, dead or unknown.
        pid: of the process that is training it now, None where there is none.
        step, total_steps: done, and of the whole run.
        base_model, method: as its start event has them.
        train_loss, eval_loss, best_eval_loss: the last ones, and the best; nats a supervised token.
        started: seconds since 1970.
        seconds: from start to now or to the last event, pauses before a resume left out.
        num_bytes: of the directory.
        reason: why it failed or was interrupted.
        early_stop: why it ended before the steps that were planned, where early stopping ended it.
    """

    name: str
    path: str
    phase: str
    pid: int | None
    step: int | None
    total_steps: int | None
    base_model: str | None
    method: str | None
    train_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    started: float | None
    seconds: float | None
    num_bytes: int
    reason: str | None
    early_stop: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        return asdict(self)


@dataclass(frozen=True)
class Listing:
    """The runs below a folder, newest first, and the names of what else is there; the studio's own folders left out."""

    folder: str
    runs: tuple[RunSummary, ...]
    others: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        return {"folder": self.folder, "runs": [run.as_dict() for run in self.runs], "others": list(self.others)}


@dataclass(frozen=True)
class Point:
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True)
class Answer:
    """An answer to a fixed prompt, at its first and its last evaluation."""

    prompt: str
    first_step: int
    first: str
    last_step: int
    last: str


@dataclass(frozen=True)
class RunDetails:
    """A run at length.

    Attributes:
        summary: in a line.
        changed: the settings that are not the default, by dotted key.
        config_fault: why config.yaml cannot be read, where it cannot.
        data: counts of data_report.json, empty where it is absent.
        train_losses, eval_losses: the last ones.
        checkpoints: step -> folder, ascending.
        adapter: the published adapter's folder.
        answers: to the fixed prompts.
        warnings: the messages of its warning events.
        next: commands to go on with, each with what it does.
    """

    summary: RunSummary
    changed: dict[str, Any]
    config_fault: str | None
    data: dict[str, Any]
    train_losses: tuple[Point, ...]
    eval_losses: tuple[Point, ...]
    checkpoints: dict[int, str]
    adapter: str | None
    answers: tuple[Answer, ...]
    warnings: tuple[str, ...]
    next: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        return {
            **asdict(self),
            "checkpoints": [{"step": step, "path": path} for step, path in self.checkpoints.items()],
            "next": [{"command": command, "what": what} for command, what in self.next],
        }


def list_runs(folder: str | Path = "runs") -> Listing:
    """Summarise every run directly below a folder, newest first; a missing folder has none.

    Raises:
        UserError: the folder is a file, or may not be looked into.
    """
    place = user_path(str(folder))
    runs, others = [], []
    for path in _below(place):
        try:
            if RunDirectory.is_run(path):
                runs.append(summarise(path))
            elif not path.name.startswith(".") and path.name != EXPORTS:
                others.append(path.name)
        except OSError:  # may not be read
            others.append(path.name)
    runs.sort(key=lambda run: (run.started or 0.0, run.name), reverse=True)
    return Listing(str(place), tuple(runs), tuple(others))


def find_run(name: str, folder: str | Path = "runs") -> RunDirectory:
    """Find a run by its path, or by its name below a folder.

    Raises:
        UserError: there is no such run; the nearest name is told.
    """
    place, parent = user_path(name), user_path(str(folder))
    for path in (place, parent / name):
        if RunDirectory.is_run(path):
            return RunDirectory(path)
    names = [path.name for path in _below(parent) if RunDirectory.is_run(path)]
    near = nearest(place.name, names)
    raise UserError(
        "the folder is no run" if place.is_dir() else "no such run",
        where=name if place.is_dir() else str(parent / name),
        expected=f"one of {', '.join(names[:5])}" if names else f"a run's name or path; there is none in {parent}",
        mend=f"did you mean `{near}`?" if near else "`tuneloom runs` lists them; --dir names another folder",
    )


def summarise(path: str | Path) -> RunSummary:
    """Return a run in a line.

    Raises:
        OSError: its files may not be read.
    """
    run = RunDirectory(path)
    return summary_of(run, run.history(), Clock(run.events()))


def shown_name(path: Path) -> str:
    """Return a folder's name as it can be shown: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path.absolute().name).decode("utf-8", errors="replace")


def describe(run: RunDirectory) -> RunDetails:
    """Return a run at length.

    Raises:
        UserError: its files may not be read.
    """
    try:
        return _describe(run)
    except OSError as error:
        raise UserError(
            "the run cannot be read", where=str(run.path), got=error.strerror, mend="see who may read the folder"
        ) from error


def _describe(run: RunDirectory) -> RunDetails:
    history = run.history()
    summary = summary_of(run, history, Clock(run.events()))
    changed, fault = changed_settings(run)
    checkpoints = {step: str(path) for step, path in run.checkpoints().items()}
    adapter = str(run.adapter) if run.adapter.is_dir() else None
    return RunDetails(
        summary=summary,
        changed=changed,
        config_fault=fault,
        data=data_counts(run),
        train_losses=tuple(_points(history, "step", "loss")[-_LAST_LOSSES:]),
        eval_losses=tuple(_points(history, "eval", "eval_loss")[-_LAST_LOSSES:]),
        checkpoints=checkpoints,
        adapter=adapter,
        answers=tuple(_answers(history)),
        warnings=tuple(_text(event.get("message")) or "" for event in history if event["event"] == "warning"),
        next=tuple(_next(summary, bool(checkpoints), adapter is not None)),
    )


def _below(folder: Path) -> list[Path]:
    """Return the folders in a folder, none where it is missing."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise UserError("the folder of runs is a file", where=str(folder), mend="name a folder with --dir")
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(
            "the folder of runs cannot be read", where=str(folder), got=error.strerror, mend="name another one with --dir"
        ) from error


class Clock:
    """How long a run took: the time between its events, less what lies before each resume.

    Args:
        events: all of them, those that a resume went back behind included.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self._total = 0.0
        self._last: float | None = None
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Count the next event."""
        at = number(event.get("time"))
        if at is None:
            return
        if self._last is not None and event["event"] != "resume":
            self._total += max(0.0, at - self._last)
        self._last = at

    def seconds(self, now: float | None = None) -> float | None:
        """Return the time up to the last event, or up to `now` for a run that is going on; None: nothing has a time."""
        if self._last is None:
            return None
        return round(self._total + (max(0.0, now - self._last) if now is not None else 0.0), 1)


def summary_of(run: RunDirectory, history: Sequence[Mapping[str, Any]], clock: Clock) -> RunSummary:
    """Return a run in a line, from events that were read already.

    Args:
        run: its directory.
        history: the events that count. Of the step events the last is enough.
        clock: that all events were counted by.

    Raises:
        OSError: the directory is gone, or may not be read.
    """
    state = run.read_json(STATE) or {}
    start = _first(history, "start")
    end = _first(reversed(history), "end")
    train, held = _points(history, "step", "loss"), _points(history, "eval", "eval_loss")
    pid = run.live_pid()
    phase = _phase(state, end, pid)
    started = number(start.get("time"))
    early = _first(reversed(history), "early_stop")
    steps = [whole for event in history if (whole := _whole(event.get("step"))) is not None]
    return RunSummary(
        name=shown_name(run.path),
        path=str(run.path),
        phase=phase,
        pid=pid,
        step=max([*steps, _whole(state.get("step")) or 0]) if steps or state else None,
        total_steps=_whole(state.get("total")) or _whole(start.get("total_steps")),
        base_model=_text(start.get("base_model")),
        method=_text(start.get("method")),
        train_loss=number(end.get("loss")) if "loss" in end else (train[-1].value if train else None),
        eval_loss=held[-1].value if held else None,
        best_eval_loss=min((point.value for point in held), default=None),
        started=started if started is not None else run.config.stat().st_mtime,
        seconds=clock.seconds(now=time.time() if pid is not None else None),
        num_bytes=folder_bytes(run.path),
        reason=None if phase == "done" else _text(state.get("reason")) or _text(end.get("message")),
        early_stop=_text(early.get("message")) if early and _whole(early.get("step")) == max(steps, default=None) else None,
    )


def _first(events: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    return next((event for event in events if event["event"] == kind), {})


def _phase(state: Mapping[str, Any], end: Mapping[str, Any], pid: int | None) -> str:
    """Return the phase that state.json tells, corrected by whether the process lives."""
    told = _text(state.get("phase"))
    if told is None:
        reason = _text(end.get("reason")) or ("done" if end else UNKNOWN)
        return reason if reason in END_PHASES else UNKNOWN
    return told if told in END_PHASES or pid is not None else DEAD


def _points(history: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[Point]:
    """Return the finite values of a key over the events of a kind."""
    found = []
    for event in history:
        step, value = _whole(event.get("step")), number(event.get(key))
        if event["event"] == kind and step is not None and value is not None:
            found.append(Point(step, value))
    return found


def _answers(history: Sequence[Mapping[str, Any]]) -> Iterator[Answer]:
    """Yield each fixed prompt's first and last answer."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for event in history:
        prompt, answer, step = _text(event.get("prompt")), _text(event.get("answer")), _whole(event.get("step"))
        if event["event"] == "sample" and prompt is not None and answer is not None and step is not None:
            by_prompt.setdefault(prompt, []).append((step, answer))
    for prompt, answers in by_prompt.items():
        yield Answer(prompt, *answers[0], *answers[-1])


def changed_settings(run: RunDirectory) -> tuple[dict[str, Any], str | None]:
    """Return the settings that are not the default, and why there are none where config.yaml cannot be read."""
    from tuneloom.config import load_config

    try:
        values = load_config(run.config).model_dump(mode="json", exclude_defaults=True)
    except UserError as error:
        return {}, f"{error.what} ({error.where})"
    return dict(_flat(values)), None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def data_counts(run: RunDirectory) -> dict[str, Any]:
    """Return data_report.json without its list of rows."""
    report = run.read_json(DATA_REPORT)
    if report is None:
        return {}
    kept: dict[str, Any] = {key: _whole(report.get(key)) for key in _REPORT_KEYS}
    for key in ("train", "validation"):
        counts = report.get(key)
        kept[key] = (
            {name: value for name, value in counts.items() if _whole(value) is not None} if isinstance(counts, dict) else {}
        )
    sources = report.get("sources")
    kept["sources"] = [_source(source) for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return kept


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    texts, counts = ("path", "role"), ("read", "used")
    return {key: _text(source.get(key)) for key in texts} | {key: _whole(source.get(key)) for key in counts}


def _next(summary: RunSummary, has_checkpoint: bool, has_adapter: bool) -> Iterator[tuple[str, str]]:
    """Yield the commands that make sense now, each with what it does."""
    path = summary.path
    if summary.pid is not None:
        yield f"tuneloom runs show {path}", "look again; it is being trained"
        yield f"tuneloom runs stop {path}", "save a checkpoint and end"
    if summary.phase in _RESUMABLE:
        yield (
            f"tuneloom finetune --resume-from {path}",
            "go on from its newest checkpoint" if has_checkpoint else "begin it again",
        )
    if has_adapter or has_checkpoint:
        yield f"tuneloom chat {path} --compare", "talk to it, the base beside it"
    if has_adapter and summary.phase == "done":
        yield f"tuneloom export {path} --out my-model", "one model folder, checked"


def number(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if number - number == 0 else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
