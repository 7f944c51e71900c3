"""What a run needs to go on: its base model, its data, a whole checkpoint. Asked of the disk before a button offers it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from tuneloom.checkpoints import newest_whole, sha256_of
from tuneloom.config import Config
from tuneloom.rundir import ENVIRONMENT, RunDirectory

_HASHED_BYTES = 16 << 20
"""A larger data file is compared by the trainer alone, which takes its time."""

Fault = tuple[str, dict[str, str]]
"""A key of the texts and what fills it."""


def missing_input(run: RunDirectory, config: Config) -> Fault | None:
    """Return what of the base model and the data is gone or has changed since the run began; hubs are not asked."""
    noted = run.read_json(ENVIRONMENT) or {}
    base = noted.get("base_model")
    if isinstance(base, dict) and base.get("kind") in ("folder", "gguf") and not _is_there(config.base_model.path):
        return "run.resume_base", {"place": config.base_model.path}
    files = noted.get("data_files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        file = Path(name)
        if file.is_file():
            if _digest(file) not in (None, digest):
                return "run.resume_data_changed", {"place": name}
        elif file.is_absolute() or name in {source.path for source in config.data.sources()}:
            return "run.resume_data_gone", {"place": name}
    return None


def newest_checkpoint(run: RunDirectory) -> tuple[Path | None, tuple[str, ...]]:
    """Return the checkpoint that a run goes on from, and why newer ones are not it; files are read again when they change."""
    files = [file for folder in run.checkpoints().values() for file in sorted(folder.iterdir())]
    return _newest(str(run.path), tuple(stamp for file in files if (stamp := _stamp(file)) is not None))


@lru_cache(maxsize=64)
def _newest(path: str, stamps: tuple[Any, ...]) -> tuple[Path | None, tuple[str, ...]]:
    del stamps
    checkpoint, skipped = newest_whole(RunDirectory(path))
    return checkpoint, tuple(skipped)


def _digest(file: Path) -> str | None:
    """Return a file's sha256, None where it is large or cannot be read."""
    stamp = _stamp(file)
    return None if stamp is None or stamp[1] > _HASHED_BYTES else _digest_at(stamp)


@lru_cache(maxsize=256)
def _digest_at(stamp: tuple[str, int, int]) -> str | None:
    try:
        return sha256_of(Path(stamp[0]))
    except OSError:
        return None


def _stamp(file: Path) -> tuple[str, int, int] | None:
    """Return a file's path, size and time of change, None where it is gone."""
    try:
        told = file.stat()
    except OSError:
        return None
    return str(file), told.st_size, told.st_mtime_ns


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
