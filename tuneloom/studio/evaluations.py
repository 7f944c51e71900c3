"""Predictions and exports as jobs of the studio: what they are started with, how far they are, what they left."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuneloom.data.sources import BUILTIN
from tuneloom.rundir import EXPORTS, folder_bytes, read_json_map
from tuneloom.studio.frame import Studio
from tuneloom.studio.jobs import Job
from tuneloom.studio.uploads import UPLOADS

RESULT = "result"
PREDICTIONS = "predictions.jsonl"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PROGRESS = re.compile(r"^(base|model): (loss|answers) (\d+)/(\d+)$", re.MULTILINE)
_UNSAFE = re.compile(r"[^\w.-]+")


def builtin_sets() -> list[str]:
    """Return the built-in sets, each in both languages and alone."""
    return [name for whole, parts in BUILTIN.items() for name in (whole, *parts)]


def upload_place(studio: Studio, name: str) -> Path:
    """Return where an upload is kept: a folder of its own, under its own name as far as that can be trusted."""
    stem, suffix = Path(name).stem, Path(name).suffix
    stem = _UNSAFE.sub("_", stem).strip("._")[:80] or "data"
    folder = studio.runs / UPLOADS / secrets.token_hex(8)
    return folder / (stem + _UNSAFE.sub("", suffix)[:12])


@dataclass(frozen=True)
class PredictWish:
    """A prediction as the form has it.

    Attributes:
        target: what is measured.
        data: a source; None: the run's own held-out rows.
        max_rows, max_new_tokens: at most.
        compare: the base too.
    """

    target: str
    data: str | None
    max_rows: int
    max_new_tokens: int
    compare: bool


def start_prediction(studio: Studio, key: str, wish: PredictWish) -> Job:
    """Start a prediction; see `Jobs.start` for the key."""
    arguments = ["evaluate", "--no-persona", "--max-rows", str(wish.max_rows), "--max-new-tokens", str(wish.max_new_tokens)]
    arguments += ["--data", wish.data] if wish.data is not None else []
    arguments += ["--compare"] if wish.compare else []
    arguments += ["--out", str(studio.jobs.folder / key / RESULT), "--", wish.target]
    about = {"target": wish.target, "data": wish.data, "max_rows": wish.max_rows, "compare": wish.compare}
    return studio.jobs.start(key, "predict", arguments, about)


@dataclass(frozen=True)
class Progress:
    """How far a prediction is: what it does, on which side, and how much of that."""

    side: str
    what: str
    done: int
    total: int


def prediction_progress(log: str) -> Progress | None:
    """Return what a log says last of how far it is."""
    found = _PROGRESS.findall(log)
    if not found:
        return None
    side, what, done, total = found[-1]
    return Progress(side, what, int(done), int(total))


def prediction_report(job: Job) -> dict[str, Any] | None:
    """Return a prediction's figures; None before its end."""
    return read_json_map(job.folder / RESULT / "report.json")


def prediction_rows(job: Job) -> Sequence[dict[str, str]]:
    """Return a prediction's answers."""
    file = job.folder / RESULT / PREDICTIONS
    try:
        return _rows(file, file.stat().st_mtime_ns)
    except OSError:
        return ()


@lru_cache(maxsize=8)
def _rows(file: Path, changed: int) -> tuple[dict[str, str], ...]:
    del changed  # part of the key: another file has another time
    found = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append({str(key): str(value) for key, value in row.items()})
    return tuple(found)


def matching(rows: Sequence[dict[str, str]], text: str) -> Sequence[dict[str, str]]:
    """Return the rows that hold a text, in whatever case."""
    wanted = text.strip().casefold()
    return [row for row in rows if any(wanted in value.casefold() for value in row.values())] if wanted else rows


def export_place(studio: Studio, name: str) -> Path | None:
    """Return the folder of an export's name, None where it cannot be one."""
    return studio.runs / EXPORTS / name if FOLDER_NAME.fullmatch(name) else None


def free_export_name(studio: Studio, wanted: str) -> str:
    """Return a name that is not taken: as it is wanted, or with a number."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-._")[:90] or "model"
    number = 1
    while (studio.runs / EXPORTS / (name := plain if number == 1 else f"{plain}-{number}")).exists():
        number += 1
    return name


def start_export(studio: Studio, key: str, target: str, to: str, precision: str, out: Path) -> Job:
    """Start an export; see `Jobs.start` for the key."""
    arguments = ["export", "--to", to, "--out", str(out)]
    arguments += ["--precision", precision] if to != "adapter" else []
    return studio.jobs.start(
        key, "export", [*arguments, "--", target], {"target": target, "to": to, "precision": precision, "out": str(out)}
    )


def export_report(job: Job) -> dict[str, Any] | None:
    """Return an export's check; None before its end, and where the folder is gone."""
    return read_json_map(Path(str(job.about.get("out"))) / "export.json") if job.ended() == "done" else None


def export_bytes(job: Job) -> int:
    """Return the size of what an export wrote."""
    return folder_bytes(Path(str(job.about.get("out"))))


def said_steps(log: str) -> list[str]:
    """Return a log's steps: what was said before each part, in order."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in log.splitlines()]
    return [line.removesuffix("...").strip() for line in lines if line.endswith("...")]
