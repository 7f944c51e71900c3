"""Experiment trackers, through accelerate."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tuneloom.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def tracker_or_error(name: str) -> str | None:
    """Return accelerate's name of a tracker, or None for `none`.

    Raises:
        UserError: its package is not installed.
    """
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"the tracker {name} is not installed", where="training.report_to", mend=f"pip install {name}, or report_to: none"
        )
    return name


def open_tracker(name: str, folder: Path) -> Accelerator | None:
    """Return what takes a run's figures, None for `none`.

    Args:
        name: see `tracker_or_error`.
        folder: for what it writes.
    """
    tracker = tracker_or_error(name)
    if tracker is None:
        return None
    from accelerate import Accelerator
    from torch import cuda

    accelerator = Accelerator(cpu=not cuda.is_available(), log_with=tracker, project_dir=str(folder))
    accelerator.init_trackers("tuneloom", config={}, init_kwargs={})
    return accelerator
