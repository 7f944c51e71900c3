"""A training in a terminal, for every verb that trains: resume said, numbers first, then the live view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from tuneloom.cli.progress import TrainingView
from tuneloom.config import Config
from tuneloom.train.resume import ResumePoint
from tuneloom.train.run import Run, finetune, prepare
from tuneloom.train.team import team


def watch_training(
    settings: Config,
    point: ResumePoint | None = None,
    *,
    override: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    before_start: Callable[[], None] | None = None,
) -> Run | None:
    """Train and show it.

    Args:
        settings: the run's settings.
        point: where to resume, None for a new run.
        override, strict: see `finetune`.
        dry_run: say every number and stop.
        before_start: called once everything is known, before anything is written.

    Returns:
        The run, or None: it was done already, a dry run, or another process of the training shows it.
    """
    if not team().is_first:
        _help_along(settings, point, override, strict, dry_run)
        return None
    if point is not None and point.finished:
        typer.echo(f"{point.run.path} is done already; its adapter: {point.run.adapter}")
        return None
    with TrainingView() as view:
        if point is not None:
            view.say_resume(point)
        if dry_run:
            view.show_job("job", {"job": prepare(settings, resume=point, strict=strict, say=view.say, show=view.show)})
            view.say("dry run: nothing was trained, no run was made")
            return None

        def on_job(event: str, fields: dict[str, Any]) -> None:
            view.show_job(event, fields)
            if before_start:
                before_start()

        return finetune(settings, resume=point, override=override, strict=strict, say=view.say, show=view.show, on_job=on_job)


def _help_along(settings: Config, point: ResumePoint | None, override: bool, strict: bool, dry_run: bool) -> None:
    """Do this process's part of a training of several; the first one shows it."""
    if point is not None and point.finished:
        return
    if dry_run:
        prepare(settings, resume=point, strict=strict)
    else:
        finetune(settings, resume=point, override=override, strict=strict)
