"""The folder that an export is written into: beside its place, to be renamed once it is whole and checked."""

from __future__ import annotations

import os
from pathlib import Path

from tuneloom.errors import UserError


def partial_folder(out: Path) -> Path:
    """Make the folder to write into, beside `out`.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    if out.exists():
        raise UserError("the output exists already", where=str(out), mend="choose another --out; nothing is overwritten")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            "cannot write the output folder", where=str(out.parent), got=error.strerror, mend="choose another --out"
        ) from error
    return partial
