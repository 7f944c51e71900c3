"""What can be done to a run from the page: stop, resume, rename, delete. No page here: a refusal is a key of the texts."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import psutil

from tuneloom.config import load_config
from tuneloom.config.schema import Config
from tuneloom.errors import UserError
from tuneloom.rundir import CONFIG, STATE, RunDirectory
from tuneloom.stopping import ask, trainer
from tuneloom.studio.frame import Studio, id_of
from tuneloom.studio.jobs import Job
from tuneloom.studio.resumption import missing_input

_NAME = re.compile(str(next(rule.pattern for rule in Config.model_fields["name"].metadata if hasattr(rule, "pattern"))))
_CONTINUES = re.compile(r"^\s*continue_from:\s*(.+?)\s*$", re.MULTILINE)


class Refusal(Exception):
    """Something that is not done, and why: a key of the table of texts and what fills it."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key)
        self.key = key
        self.values = values


# The jobs of a run.


def job_of(studio: Studio, path: Path) -> Job | None:
    """Return the newest training job of a run: the one that made it, or that resumed it."""
    told = (RunDirectory(path).read_json(STATE) or {}).get("pid")
    started = _changed(path / CONFIG)
    for job in studio.jobs.all("finetune"):
        if told is not None and job_pid(job) == told:
            return job
        # A job that was asked for this name while the run was there already made another run.
        if job.about.get("run") == path.name and (job.about.get("resume") or job.created <= started + 1):
            return job
    return None


def job_pid(job: Job) -> int | None:
    """Return the process that a job had, alive or not."""
    try:
        pid = json.loads((job.folder / "state.json").read_text(encoding="utf-8")).get("pid")
    except (OSError, ValueError, AttributeError):
        return None
    return pid if isinstance(pid, int) else None


def run_of(studio: Studio, job: Job) -> Path | None:
    """Return the run that a training job made, once its directory is there."""
    pid, name = job_pid(job), job.about.get("run")
    for summary in studio.summaries():
        path = Path(summary.path)
        if _changed(path / CONFIG) + 2 < job.created:
            continue
        told = (RunDirectory(path).read_json(STATE) or {}).get("pid")
        if (told == pid) if told is not None else (name is not None and re.fullmatch(re.escape(name) + r"(-\d+)?", path.name)):
            return path
    return None


# Stop and resume.


def stop_run(path: Path, job: Job | None) -> None:
    """Ask whoever trains a run, or prepares to, to save a checkpoint and to end; nobody is asked twice.

    Raises:
        Refusal: nobody does, or they may not be asked.
    """
    run = RunDirectory(path)
    pid = job.pid() if job is not None else None
    try:
        process = trainer(run) or (psutil.Process(pid) if pid is not None else None)
    except psutil.Error:
        process = None
    if process is None:
        raise Refusal("run.not_live")
    try:
        ask(run, process)
    except UserError as error:
        raise Refusal("run.not_stopped", reason=error.got) from error


def trainer_pid(path: Path, job: Job | None) -> int | None:
    """Return the process that trains a run, or prepares to, as state.json and the job tell."""
    pid = RunDirectory(path).live_pid()
    return pid if pid is not None or job is None else job.pid()


def resume_run(studio: Studio, path: Path) -> Job:
    """Start a job that goes on with a run; asked twice, it starts one.

    Raises:
        Refusal: it cannot be resumed.
    """
    job = job_of(studio, path)
    if job is not None and job.pid() is not None:
        return job
    if (reason := why_not_resume(path, job)) is not None:
        raise reason
    earlier = sum(other.about.get("run") == path.name for other in studio.jobs.all("finetune"))
    key = f"resume-{id_of(path)}-{earlier}"
    about = {"run": path.name, "resume": True}
    return studio.jobs.start(key, "finetune", ["finetune", "--resume-from", str(path)], about)


def why_not_resume(path: Path, job: Job | None) -> Refusal | None:
    """Return why a run cannot be resumed, None where it can be tried."""
    run = RunDirectory(path)
    if (run.read_json(STATE) or {}).get("phase") == "done":
        return Refusal("run.resume_done")
    if trainer_pid(path, job) is not None or trainer(run) is not None:
        return Refusal("run.resume_live")
    try:
        config = load_config(run.config)
    except UserError as error:
        return Refusal("run.resume_config", fault=f"{error.what} ({error.where})")
    fault = missing_input(run, config)
    return Refusal(fault[0], **fault[1]) if fault else None


# Rename and delete.


def rename_run(studio: Studio, path: Path, name: str) -> Path:
    """Give a run another name; its old address leads to it from then on.

    Raises:
        Refusal: a name that is none or is taken, a run that is live, one that others continue from.
    """
    _check_place(studio, path)
    target = path.parent / name
    if not _NAME.fullmatch(name):
        raise Refusal("runs.name_bad")
    if name == path.name:
        return path
    if os.path.lexists(target):
        raise Refusal("runs.name_taken", name=name)
    if followers := continuing(studio, path):
        raise Refusal("runs.continued", names=", ".join(followers))
    path.rename(target)
    studio.note_rename(path, target)
    for job in studio.jobs.all("finetune"):
        if job.about.get("run") == path.name:
            studio.jobs.amend(job, run=name)
    return target


def delete_run(studio: Studio, path: Path) -> None:
    """Move a run to the trash, then remove it. Links in it are removed, not followed.

    Raises:
        Refusal: it is live, a link, or not directly in the folder of runs.
    """
    _check_place(studio, path)
    trash = studio.runs / ".studio" / "trash"
    trash.mkdir(parents=True, exist_ok=True)
    if trash.resolve() != studio.runs.resolve() / ".studio" / "trash":
        raise Refusal("runs.outside")
    place = trash / f"{path.name[:80]}-{secrets.token_hex(4)}"
    try:
        path.rename(place)
        shutil.rmtree(place)
    except OSError as error:
        raise Refusal("runs.not_deleted", reason=error.strerror or str(error)) from error


def continuing(studio: Studio, path: Path) -> list[str]:
    """Return the names of the runs that continue from a run's adapter: they name its folder."""
    found = []
    for other in studio.summaries():
        try:
            text = (Path(other.path) / CONFIG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        told = [match.strip("'\"") for match in _CONTINUES.findall(text)]
        if any(Path(place).resolve().is_relative_to(path.resolve()) for place in told if place not in ("null", "~")):
            found.append(other.name)
    return [name for name in found if name != path.name]


def _check_place(studio: Studio, path: Path) -> None:
    """Require a folder directly in the folder of runs that nobody works in."""
    parent = studio.runs.resolve()
    resolved = path.resolve()
    if path.is_symlink() or resolved.parent != parent or not resolved.is_relative_to(parent) or path.name.startswith("."):
        raise Refusal("runs.outside")
    if not path.is_dir():
        raise Refusal("runs.gone")
    if trainer_pid(path, job_of(studio, path)) is not None:
        raise Refusal("runs.live")


def _changed(file: Path) -> float:
    """Return when a file was written last, 0 where it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def metric_rows(path: Path) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the numbers of a run's step and eval events as columns and rows, for a table file."""
    columns: dict[str, None] = dict.fromkeys(("event", "step", "time"))
    rows = []
    for event in RunDirectory(path).history():
        if event["event"] in ("step", "eval"):
            row = {key: value for key, value in event.items() if isinstance(value, (int, float))}
            columns |= dict.fromkeys(key for key in row if re.fullmatch(r"[\w.-]+", key))
            rows.append({"event": event["event"], **row})
    return tuple(columns), rows
