"""A job's process: runs the command that its folder names, and writes down how it ended."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from tuneloom.rundir import write_atomically
from tuneloom.studio.jobs import write_state


def main(folder: str) -> int:
    """Run `tuneloom` with the job's arguments in this process; return the exit code."""
    place = Path(folder)
    write_state(place, os.getpid())
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    sys.argv = ["tuneloom", *job["arguments"]]
    code = 1
    stopped = False

    def stop(number: int, _: object) -> None:  # an end in order: what is half written goes
        nonlocal stopped
        stopped = True
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        runpy.run_module("tuneloom", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 as the interpreter would
        code = end.code if isinstance(end.code, int) else (0 if end.code is None else 1)
    finally:
        if not stopped:
            write_atomically(place / "exit.json", json.dumps({"code": code}) + "\n")
    return code
