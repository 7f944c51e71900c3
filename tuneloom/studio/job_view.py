"""What the pages of predictions and exports have in common: the list of jobs, a job's state, its log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nicegui import ui

from tuneloom.studio.frame import Studio
from tuneloom.studio.jobs import Job, Kind
from tuneloom.studio.said import heard_log
from tuneloom.studio.texts import Texts

_DOTS = {"running": "live", "done": "done", "failed": "failed", "killed": "interrupted"}
_REFRESH_SECONDS = 2.0


def target_name(job: Job) -> str:
    """Return a job's target as people know it: a run's name, or a checkpoint's with its run's."""
    place = Path(str(job.about.get("target", "")))
    return f"{place.parent.name}/{place.name}" if place.name.startswith("checkpoint-") else place.name


def job_list(studio: Studio, texts: Texts, kind: Kind, title: str, describe: Callable[[Job], str]) -> None:
    """Draw the jobs of a kind, newest first, each a link to its page.

    Args:
        studio: whose jobs.
        texts: of the visitor.
        kind: of the jobs.
        title: of the list.
        describe: returns what is shown beside the target.
    """

    @ui.refreshable
    def listed() -> None:
        jobs = studio.jobs.all(kind)
        if not jobs:
            ui.label(texts("job.none")).classes("muted")
        for job in jobs[:200]:
            with ui.element("a").classes("job-line").props(f'href="/{kind}/{job.id}"'):
                status_dot(job)
                ui.label(target_name(job)).classes("ellipsis strong")
                ui.label(describe(job)).classes("ellipsis muted")
                ui.label(texts(f"job.{job.ended()}")).classes("small muted push")
                ui.label(time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created))).classes("small muted")

    def state() -> list[tuple[str, str]]:
        return [(job.id, job.ended()) for job in studio.jobs.all(kind)]

    shown = state()
    with ui.element("section").classes("panel stack tight"):
        ui.label(title).classes("strong").props('role="heading" aria-level="2"')
        listed()

    def look() -> None:
        nonlocal shown
        if (now := state()) != shown:
            shown = now
            listed.refresh()

    ui.timer(_REFRESH_SECONDS, look)


def status_dot(job: Job) -> None:
    """Draw the coloured dot of a job."""
    ui.element("div").classes(f"dot {_DOTS[job.ended()]}").props('aria-hidden="true"')


def job_head(studio: Studio, texts: Texts, job: Job, described: str) -> None:
    """Draw what a job is and how it stands, with a way to stop it and the reason where it failed."""
    ended = job.ended()
    with ui.element("div").classes("line"):
        status_dot(job)
        ui.label(texts(f"job.{ended}")).classes("strong").props('role="status"')
        ui.label(described).classes("muted")
        if ended == "running":
            ui.button(texts("job.stop"), on_click=lambda: studio.jobs.stop(job)).props("outline dense no-caps").classes("push")
    if ended == "failed":
        ui.label(heard_log(texts, job.last_words())).classes("note bad mono").props('role="alert"')
    if ended == "killed":
        ui.label(texts("job.killed_why")).classes("note")


def job_log(texts: Texts, job: Job) -> None:
    """Draw what a job printed, folded."""
    with ui.expansion(texts("job.log")).props("dense"):
        ui.label(heard_log(texts, job.log_tail().replace("\r", "\n")) or "…").classes("mono")


def when_it_changes(job: Job, redraw: Callable[[], object]) -> None:
    """Draw anew with every change of a job's log, until it has ended."""

    def state() -> tuple[int, str]:
        try:
            size = job.log.stat().st_size
        except OSError:
            size = 0
        return size, job.ended()

    shown = state()
    timer = ui.timer(1.0, lambda: look())

    def look() -> None:
        nonlocal shown
        now = state()
        if now != shown:
            shown = now
            redraw()
        if now[1] != "running":
            timer.deactivate()
