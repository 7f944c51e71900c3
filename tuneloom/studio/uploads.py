"""Uploaded data files: where they are kept, and which of them nobody needs any more.

RUNS/.studio/uploads/<id>/<name>
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tuneloom.rundir import CONFIG
from tuneloom.studio.jobs import Jobs

UPLOADS = ".studio/uploads"
KEPT_SECONDS = 86_400.0


def tidy_uploads(runs: Path, jobs: Jobs, now: float | None = None) -> list[Path]:
    """Remove the uploads older than a day that no draft, no run's config and no live job names; return their folders.

    Args:
        runs: the folder of runs.
        jobs: its child processes.
        now: seconds since 1970.
    """
    folder = runs / UPLOADS
    found = [place for place in _inside(folder) if (time.time() if now is None else now) - _touched(place) > KEPT_SECONDS]
    if not found or folder.is_symlink():
        return []
    named = "\n".join(_texts(runs, jobs))
    unnamed = [place for place in found if place.name not in named]
    for place in unnamed:
        if place.is_symlink() or not place.is_dir():
            place.unlink(missing_ok=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return unnamed


def _texts(runs: Path, jobs: Jobs) -> Iterator[str]:
    """Yield whatever may name an upload that is still wanted."""
    yield _text(runs / ".studio" / "drafts" / "draft.json")
    for path in _inside(runs):
        yield _text(path / CONFIG)
    for job in jobs.all():
        if job.ended() == "running":
            yield "\n".join(job.arguments)
            yield _text(Path(str(job.about.get("config", ""))))


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _touched(place: Path) -> float:
    """Return when something in a folder was written last."""
    try:
        return max(path.lstat().st_mtime for path in (place, *_inside(place)))
    except OSError:  # going already
        return time.time()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
