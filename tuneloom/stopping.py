"""Stopping a run that is being trained: which process it is, asking it once, waiting until it has ended; no torch.

A trainer has metrics.jsonl open for appending as long as it holds the run (`RunDirectory.held`), so that very file says
which process it is: a number that another process has by now does not. It is asked by SIGTERM, at which it saves a
checkpoint and ends; a second signal would end it at once, so that it was asked is noted in the run's directory.
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from tuneloom.errors import GuardError, UserError
from tuneloom.rundir import END_PHASES, STATE, STOP, RunDirectory
from tuneloom.runs import DEAD, summarise

Tell = Callable[[str], object]
_POLL_SECONDS = 0.1
_TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Stopped:
    """How a run ended after it was asked to.

    Attributes:
        run: path of its directory.
        phase: interrupted; done, where it came to its end meanwhile; as before, where it only prepared to go on.
        step, total_steps: done, and of the whole run.
        checkpoint: path of the newest one, None where there is none.
        reason: in the trainer's words.
        resume: the command that goes on with it, None where it is done.
    """

    run: str
    phase: str
    step: int | None
    total_steps: int | None
    checkpoint: str | None
    reason: str | None
    resume: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        return asdict(self)


def trainer(run: RunDirectory) -> psutil.Process | None:
    """Return the process that holds a run, preparing or training, if it is on this machine and can be seen."""
    pid = (run.read_json(STATE) or {}).get("pid")
    with suppress(psutil.Error, ValueError, OverflowError):
        if isinstance(pid, int) and _holds(process := psutil.Process(pid), run):
            return process
    holders = [process for process in psutil.process_iter() if _holds(process, run)]
    return min(holders, key=lambda process: process.create_time(), default=None)


def require_trainer(run: RunDirectory) -> psutil.Process:
    """Return the process that holds a run.

    Raises:
        UserError: nobody trains it here, saying how it stands instead.
    """
    if (process := trainer(run)) is not None:
        return process
    told = run.read_json(STATE) or {}
    host = told.get("host")
    if told.get("phase") not in END_PHASES and isinstance(host, str) and host != platform.node():
        raise UserError(
            "the run was last trained on another machine",
            where=str(run.path),
            got=host,
            expected=platform.node(),
            mend="stop it there",
        )
    if (owner := _foreign_owner(run)) is not None:
        raise UserError("another user trains the run", where=str(run.path), got=owner, mend="stop it as that user")
    phase = summarise(run.path).phase
    raise UserError(
        "the run is not being trained",
        where=str(run.path),
        got=f"phase {phase if phase in END_PHASES else DEAD}",
        mend="there is nothing to stop; `tuneloom runs` lists every run and its phase",
    )


def ask(run: RunDirectory, process: psutil.Process) -> bool:
    """Ask a process once to save a checkpoint and end; return whether this call did.

    Raises:
        UserError: it may not be asked, or that it was cannot be noted.
    """
    note = run.path / f"{STOP}{process.pid}"
    try:
        note.touch(exist_ok=False)
        process.terminate()  # refuses a number that another process has by now
    except (FileExistsError, psutil.NoSuchProcess):
        return False
    except (OSError, psutil.AccessDenied) as error:
        with suppress(OSError):
            note.unlink(missing_ok=True)
        raise UserError(
            "the run cannot be stopped",
            where=str(run.path),
            got=str(error)[:200],
            mend="stop it as the user who started it",
        ) from error
    return True


def is_asked(run: RunDirectory, pid: int) -> bool:
    """Whether a run's process was asked to end."""
    return (run.path / f"{STOP}{pid}").exists()


def wait(run: RunDirectory, process: psutil.Process, tell: Tell, timeout_seconds: float | None = None) -> Stopped:
    """Wait until a process that was asked has ended; return how the run stands then.

    Args:
        run: its run.
        process: that was asked.
        tell: gets a line at each change of phase, and now and then.
        timeout_seconds: at most so long.

    Raises:
        UserError: that time is over and it has not ended.
        GuardError: it ended without saving.
    """
    begun = told_at = time.monotonic()
    phase: object = None
    while _lives(process):
        now, state = time.monotonic(), run.read_json(STATE) or {}
        if timeout_seconds is not None and now - begun >= timeout_seconds:
            raise UserError(
                "the run has not ended yet",
                where=str(run.path),
                got=f"process {process.pid} after {timeout_seconds:g} s, {state.get('phase')}",
                mend="it was asked and will end; ask again with a longer --timeout to wait on",
            )
        now_in = state.get("phase") if state.get("pid") == process.pid else "preparing"
        if now_in != phase or now - told_at >= _TELL_SECONDS:
            phase, told_at = now_in, now
            tell(f"{phase}, step {state.get('step', 0)} of {state.get('total')} ...")
        time.sleep(_POLL_SECONDS)
    return _ended(run, process.pid)


def resume_command(run: RunDirectory) -> str:
    """Return the command that goes on with a run."""
    return f"tuneloom finetune --resume-from {shlex.quote(str(run.path))}"


def _ended(run: RunDirectory, pid: int) -> Stopped:
    """Return how a run stands, whose process is gone."""
    summary = summarise(run.path)
    checkpoints = list(run.checkpoints().values())
    newest = str(checkpoints[-1]) if checkpoints else None
    began = (run.read_json(STATE) or {}).get("pid") == pid
    if began and summary.phase not in ("interrupted", "done"):
        raise GuardError(
            f"the run ended without saving: {summary.reason or summary.phase}\n"
            f"  where:    {run.path}\n"
            f"  kept:     {newest or 'nothing'}\n"
            f"  mend:     {resume_command(run)}"
        )
    return Stopped(
        run=str(run.path),
        phase=summary.phase,
        step=summary.step,
        total_steps=summary.total_steps,
        checkpoint=newest,
        reason=summary.reason if began else "it had not begun to train",
        resume=None if summary.phase == "done" else resume_command(run),
    )


def _holds(process: psutil.Process, run: RunDirectory) -> bool:
    """Whether a process, not this one, has the run's metrics.jsonl open for appending."""
    try:
        files = process.open_files() if process.pid != os.getpid() else []
        return any(
            file.path.endswith(run.metrics.name)
            and str(getattr(file, "mode", "a")).startswith("a")
            and run.metrics.samefile(file.path)
            for file in files
        )
    except (psutil.Error, OSError):
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _foreign_owner(run: RunDirectory) -> str | None:
    """Return the user whose process trains a run, where its files may not be looked at."""
    pid = run.live_pid()
    try:
        process = psutil.Process(pid) if pid is not None else None
        if process is None:
            return None
        try:
            process.open_files()
        except psutil.AccessDenied:
            return f"process {pid} of {process.username()}"
    except psutil.Error:
        pass
    return None
