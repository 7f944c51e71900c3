"""What the page of a run shows, taken from disk at one moment."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tuneloom.rundir import CONFIG, STATE, RunDirectory
from tuneloom.runs import DEAD, UNKNOWN, RunSummary
from tuneloom.stopping import is_asked
from tuneloom.studio.frame import Studio
from tuneloom.studio.jobs import Job
from tuneloom.studio.resumption import newest_checkpoint
from tuneloom.studio.run_actions import Refusal, job_of, job_pid, trainer_pid, why_not_resume
from tuneloom.studio.tail import RunTail

ANSWER_ROWS = 8
_LOOK_SECONDS = 5.0
_RESUMABLE = ("failed", "interrupted", DEAD, UNKNOWN)


@dataclass(frozen=True)
class Standing:
    """Where a run stands, in words and figures.

    Attributes:
        phase: of the summary; `preparing` while a job resumes it.
        live: a process trains it or prepares to.
        stopping: that process was asked to end.
        reason: why it failed, in the trainer's words.
        early_stop: why it ended before the steps that were planned, in the trainer's words.
        last_words: of the job that trained it and failed or was killed.
        attempt: the last words of a job that was to resume it and failed before it could.
    """

    phase: str
    live: bool
    stopping: bool
    resumable: bool
    step: int | None
    total_steps: int | None
    eta_seconds: float | None
    seconds: float | None
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    memory_gib: float | None
    reason: str | None
    early_stop: str | None
    last_words: str
    attempt: str
    checkpoints: tuple[tuple[int, str], ...]
    has_adapter: bool

    @property
    def share(self) -> float:
        """How much of the run is done."""
        return (self.step or 0) / self.total_steps if self.total_steps else 0.0


class RunLook:
    """A run, looked at again and again.

    Args:
        studio: the folder of runs and its jobs.
        path: the run's directory.
    """

    def __init__(self, studio: Studio, path: Path) -> None:
        self.studio = studio
        self.path = path
        self.tail: RunTail = studio.listing.tail(path)
        self.job: Job | None = None
        self._jobs_seen: tuple[int, int] | None = None
        self._refusal: tuple[object, Refusal | None] | None = None

    def read(self) -> None:
        """Read what is new of the run's numbers."""
        with suppress(OSError):
            self.tail.update()
            self.tail.curves()

    def find_job(self) -> Job | None:
        """Return the run's newest job; jobs are looked through when one has come or the run has begun again."""
        try:
            seen = (self.studio.jobs.folder.stat().st_mtime_ns, (self.path / STATE).stat().st_ino)
        except OSError:
            seen = (0, 0)
        if seen != self._jobs_seen or seen == (0, 0):
            self.job = job_of(self.studio, self.path)
            self._jobs_seen = seen
        return self.job

    def standing(self) -> Standing | None:
        """Return where the run stands, None where it is gone."""
        try:
            self.tail.update()
            summary = self.tail.summary()
        except OSError:
            return None
        job = self.find_job()
        pid = trainer_pid(self.path, job)
        return self._standing(summary, job, pid)

    def _standing(self, summary: RunSummary, job: Job | None, pid: int | None) -> Standing:
        state = RunDirectory(self.path).read_json(STATE) or {}
        last = self.tail.last_step or {}
        live, again = pid is not None, pid is not None and summary.pid is None
        words = job.last_words() if job is not None and not live and job.ended() in ("failed", "killed") else ""
        trained = job is None or state.get("pid") in (None, job_pid(job))
        return Standing(
            phase="preparing" if again else summary.phase,
            live=live,
            stopping=pid is not None and is_asked(RunDirectory(self.path), pid),
            resumable=not live and summary.phase in _RESUMABLE,
            step=summary.step,
            total_steps=summary.total_steps,
            eta_seconds=_time_left(summary, state.get("eta_seconds")),
            seconds=summary.seconds,
            train_loss=summary.train_loss,
            eval_loss=summary.eval_loss,
            tokens_per_second=_positive(last.get("tokens_per_second")),
            memory_gib=_positive(last.get("peak_memory_gib")),
            reason=None if live else summary.reason,
            early_stop=summary.early_stop,
            last_words=words if trained else "",
            attempt="" if trained else words,
            checkpoints=tuple((step, path.name) for step, path in RunDirectory(self.path).checkpoints().items()),
            has_adapter=RunDirectory(self.path).adapter.is_dir(),
        )

    def refusal(self) -> Refusal | None:
        """Return why the run cannot be resumed, None where it can be tried; looked at again every few seconds."""
        key = tuple(_written(self.path / name) for name in (STATE, CONFIG)), int(time.monotonic() / _LOOK_SECONDS)
        if self._refusal is None or self._refusal[0] != key:
            self._refusal = key, why_not_resume(self.path, self.find_job())
        return self._refusal[1]

    def goes_on_from(self) -> tuple[Path | None, tuple[str, ...]]:
        """Return the checkpoint that a resume takes, None for the first step, and why newer ones are passed over."""
        try:
            return newest_checkpoint(RunDirectory(self.path))
        except OSError:
            return None, ()

    def answers(self) -> tuple[tuple[str, ...], list[tuple[int, tuple[str, ...]]]]:
        """Return the prompts, and the answers by step: the first, the last, and some between."""
        samples = self.tail.samples()
        prompts = tuple(dict.fromkeys(prompt for answers in samples.values() for prompt in answers))
        steps = chosen(sorted(samples), ANSWER_ROWS)
        return prompts, [(step, tuple(samples[step].get(prompt, "") for prompt in prompts)) for step in steps]


def _written(file: Path) -> int:
    """Return when a file was written last, 0 where it is gone."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def chosen(steps: list[int], most: int) -> list[int]:
    """Return at most so many of the steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _time_left(summary: RunSummary, told: object) -> float | None:
    """Return how long a live run will take yet: as the trainer tells, between its words as the run went so far."""
    if summary.pid is None:
        return None
    if (seconds := _positive(told)) is not None:
        return seconds
    if not summary.step or not summary.total_steps or summary.seconds is None:
        return None
    return max(0, summary.total_steps - summary.step) * summary.seconds / summary.step


def _positive(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value >= 0 else None
