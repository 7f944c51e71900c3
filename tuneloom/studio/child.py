"""A job's process: runs the command that its folder names, and writes down how it ended.

python -m tuneloom.studio.child JOB_FOLDER
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from tuneloom.rundir import write_atomically


def main(folder: Path) -> int:
    """Run `tuneloom` with the job's arguments in this process."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.argv = ["tuneloom", *job["arguments"]]
    code = 1
    try:
        runpy.run_module("tuneloom", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else (0 if end.code is None else 1)
    finally:
        write_atomically(folder / "exit.json", json.dumps({"code": code}) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
