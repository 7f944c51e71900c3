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


class Stopping:
    """Ends this process in order at SIGTERM, so that what is half written goes; `asked` says whether that was.

    An exit that is raised while the interpreter lets go of an object (in `__del__`, in a weak reference's callback) is
    dropped by it; it is raised again shortly after.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, self._stop)
        sys.unraisablehook = self._dropped

    def _stop(self, _: int, __: object) -> None:
        self.asked = True
        sys.exit(128 + signal.SIGTERM)

    def _dropped(self, told: sys.UnraisableHookArgs) -> None:
        if self.asked and issubclass(told.exc_type, SystemExit):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            sys.__unraisablehook__(told)


def main(folder: str) -> int:
    """Run `tuneloom` with the job's arguments in this process; return the exit code."""
    place = Path(folder)
    write_state(place, os.getpid())
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    sys.argv = ["tuneloom", *job["arguments"]]
    code = 1
    stopping = Stopping()
    try:
        runpy.run_module("tuneloom", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 as the interpreter would
        code = end.code if isinstance(end.code, int) else (0 if end.code is None else 1)
    finally:
        if not stopping.asked:
            write_atomically(place / "exit.json", json.dumps({"code": code}) + "\n")
    return code
