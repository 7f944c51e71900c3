"""Train on disks of a few megabytes of this process's own; prints as JSON what came of each scenario.

    unshare -Urm python tests/chaos/small_disk.py MODEL ROWS FOLDER

FOLDER gets a folder for each scenario, a tmpfs that nobody else sees. Scenarios, the first three after the first checkpoint:
`wait`: the disk fills, and gets room while the run waits; `stop`: it fills, and SIGTERM comes while the run waits; `read-only`:
it takes nothing more; `tight`: it has no room from the start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

SIZE_MB = 12
SCENARIOS = ("wait", "stop", "read-only", "tight")
CHANGES = {"adapter.r": 16, "training.max_steps": 6, "training.save_steps": 2, "training.save_total_limit": 2}


class Disk:
    """The small disk, and a file that fills it up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ballast = folder / "ballast"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", folder], check=True)

    def fill(self) -> None:
        with open(self.ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                pass

    def make_read_only(self) -> None:
        """Lay a read-only view over it: the disk itself stays as it is while a file on it is open for writing."""
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", self.folder], check=True)


def watch(scenario: str, disk: Disk, told: list[str]) -> Any:
    """Return the listener that makes the scenario happen, and keeps the warnings."""

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "checkpoint" and (fields["action"], fields["step"]) == ("saved", 2):
            {"wait": disk.fill, "stop": disk.fill, "read-only": disk.make_read_only}[scenario]()
        if event == "warning":
            told.append(fields["message"])
            if scenario == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                disk.ballast.unlink()

    return show


def tried(config: Any, **how: Any) -> dict[str, Any]:
    """Train; return how it ended where it did not end well."""
    from tuneloom.errors import TuneloomError
    from tuneloom.train.run import finetune

    try:
        finetune(config, **how)
    except TuneloomError as error:
        return {"exit_code": error.exit_code, "message": str(error)}
    return {}


def played(scenario: str, model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Train on a small disk in a folder; return what came of it."""
    from helpers import sha256, tiny_config

    from tuneloom.rundir import RunDirectory
    from tuneloom.train.resume import find_resume

    folder.mkdir()
    disk = Disk(folder)
    config = tiny_config(model, rows, folder, CHANGES)
    run = RunDirectory(folder / "run")
    told: list[str] = []
    if scenario == "tight":
        disk.fill()
    found = {"told": told, **tried(config, show=watch(scenario, disk, told))}
    found["checkpoints"] = list(run.checkpoints())
    if scenario == "read-only":
        found["new"] = tried(config)
        found["resumed"] = tried(config, resume=find_resume(str(run.path), folder))
    if scenario == "stop":
        disk.ballast.unlink()
        tried(config, resume=find_resume(str(run.path), folder))
    found["steps"] = [event["step"] for event in run.events("step")]
    found["hidden"] = [path.name for path in run.path.glob(".*")] if run.path.is_dir() else []
    adapter = run.adapter / "adapter_model.safetensors"
    found["sha256"] = sha256(adapter) if adapter.is_file() else None
    return found


def main() -> None:
    model, rows, folder = map(Path, sys.argv[1:])
    print(json.dumps({scenario: played(scenario, model, rows, folder / scenario) for scenario in SCENARIOS}))


if __name__ == "__main__":
    main()
