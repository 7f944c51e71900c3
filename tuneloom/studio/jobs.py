"""Child processes of the studio: trainings, exports, predictions. Each has a folder that says all about it.

    RUNS/.studio/jobs/<id>/
      job.json    what was asked for; made before the process starts
      state.json  the process: pid, when it was started
      log.txt     what it printed
      exit.json   how it ended; absent where it was killed

A job is a process group of its own, started with an argument list: it outlives the studio, and a studio that
starts again finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from tuneloom.rundir import read_json_map, write_atomically

Kind = Literal["finetune", "export", "predict", "check"]
Ended = Literal["running", "done", "failed", "killed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
JOBS = "jobs"
_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_LOG_BYTES = 64 << 10
# With -P: nothing that lies in the folder where the studio was started is taken for a module; but this very package is.
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); import tuneloom; del sys.path[0]; "
    "from tuneloom.studio.child import main; sys.exit(main(sys.argv[2]))"
)
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A child process, running or ended.

    Attributes:
        id: opaque; in URLs.
        kind: what it does.
        arguments: of the command `tuneloom`.
        about: what the views want to know of it later: the run's name, a target, an output.
        created: seconds since 1970.
        folder: where its files are.
    """

    id: str
    kind: Kind
    arguments: tuple[str, ...]
    about: dict[str, Any]
    created: float
    folder: Path = field(repr=False)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "log.txt"

    def pid(self) -> int | None:
        """Return its process if that is alive."""
        state = read_json_map(self.folder / "state.json") or {}
        pid, born = state.get("pid"), state.get("born")
        if not isinstance(pid, int) or not isinstance(born, (int, float)):
            return None
        try:
            process = psutil.Process(pid)
            lives = abs(process.create_time() - born) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError, OverflowError):  # gone, or a number that we did not write
            return None
        return pid if lives else None

    def ended(self) -> Ended:
        """Return whether it runs, and if not, how it ended."""
        code = self.exit_code()
        if code is not None:
            return "done" if code == 0 else "failed"
        starting = not (self.folder / "state.json").exists() and time.time() - self.created < 5
        if starting or self.pid() is not None:
            return "running"
        return "killed" if self.exit_code() is None else self.ended()

    def exit_code(self) -> int | None:
        """Return the code that it ended with; None while it runs, and where it was killed."""
        code = (read_json_map(self.folder / "exit.json") or {}).get("code")
        return code if isinstance(code, int) else None

    def log_tail(self, max_bytes: int = _LOG_BYTES) -> str:
        """Return the last part of what it printed, whole lines."""
        try:
            with open(self.log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - max_bytes))
                content = file.read()
        except OSError:
            return ""
        if size > max_bytes:
            content = content.partition(b"\n")[2] or content
        return content.decode("utf-8", errors="replace")

    def last_words(self) -> str:
        """Return the message that it ended with: from the last line that begins with the command's name."""
        lines = self.log_tail().rstrip().splitlines()
        begin = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith("tuneloom: ")), max(0, len(lines) - 1))
        return "\n".join(lines[begin:])


class Jobs:
    """The jobs of a folder of runs.

    Args:
        runs: the folder of runs; made where it is missing.
    """

    def __init__(self, runs: Path) -> None:
        self.folder = runs / ".studio" / JOBS
        self._known: dict[str, tuple[int, Job | None]] = {}  # by the time at which the file was written

    def start(self, key: str, kind: Kind, arguments: Sequence[str], about: Mapping[str, Any] | None = None) -> Job:
        """Start a job; a second call with the same key returns the first one's.

        Args:
            key: names the wish: a form's own number, so that a button pressed twice is one wish.
            kind: what it does.
            arguments: of the command `tuneloom`.
            about: kept with it.

        Raises:
            ValueError: a key that is none.
        """
        if not _ID.fullmatch(key):
            raise ValueError(f"not a key: {key[:80]!r}")
        folder = self.folder / key
        job = Job(key, kind, tuple(arguments), dict(about or {}), round(time.time(), 3), folder)
        if not self._claim(job):
            return self._there(key)
        with open(job.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(_PACKAGES), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
            )
        write_state(folder, process.pid)
        _reap(process)
        return job

    def _claim(self, job: Job) -> bool:
        """Publish a job's folder by rename, whole; return whether this call did, of all that ever tried."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
        _write(replace(job, folder=made))
        try:
            made.rename(job.folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not job.folder.is_dir():
                raise
            return False
        return True

    def get(self, key: str) -> Job | None:
        """Return a job by its id, None where there is none."""
        if not _ID.fullmatch(key):
            return None
        file = self.folder / key / "job.json"
        try:
            written = file.stat().st_mtime_ns
        except OSError:
            return None
        known = self._known.get(key)
        if known is None or known[0] != written:
            known = self._known[key] = written, _parsed(read_json_map(file) or {}, file.parent)
        return known[1]

    def all(self, kind: Kind | None = None) -> list[Job]:
        """Return the jobs, newest first; a folder that is none is passed over."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except OSError:
            return []
        found = [job for job in map(self.get, names) if job is not None and kind in (None, job.kind)]
        return sorted(found, key=lambda job: job.created, reverse=True)

    def of_run(self, name: str) -> Job | None:
        """Return the newest training job of a run by the run's name."""
        return next((job for job in self.all("finetune") if job.about.get("run") == name), None)

    def stop(self, job: Job) -> bool:
        """Ask a job to end in order (SIGTERM); return whether it was alive."""
        pid = job.pid()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)
        return True

    def amend(self, job: Job, **about: Any) -> None:
        """Change what is kept about a job, as when its run gets another name."""
        _write(replace(job, about={**job.about, **about}))

    def _there(self, key: str) -> Job:
        """Return the job of a folder that is there."""
        job = self.get(key)
        if job is None:
            raise ValueError(f"the folder of a job that cannot be read: {key}")
        return job


def write_state(folder: Path, pid: int) -> None:
    """Note a job's process; both it and who started it do, since either may be killed before it could."""
    with contextlib.suppress(psutil.Error):  # gone already
        born = psutil.Process(pid).create_time()
        write_atomically(folder / "state.json", json.dumps({"pid": pid, "born": born}) + "\n")


def _write(job: Job) -> None:
    stored = {name: value for name, value in asdict(job).items() if name != "folder"}
    write_atomically(job.folder / "job.json", json.dumps(stored, ensure_ascii=False, indent=2) + "\n")


def _parsed(stored: dict[str, Any], folder: Path) -> Job | None:
    """Return the job that a file tells of, None where it tells of none."""
    kind, arguments, about = stored.get("kind"), stored.get("arguments"), stored.get("about")
    created = stored.get("created")
    if kind not in KINDS or not isinstance(about, dict) or stored.get("id") != folder.name:
        return None
    if not isinstance(arguments, list) or not all(isinstance(word, str) for word in arguments):
        return None
    if not isinstance(created, (int, float)) or not 0 <= created < 1e12:
        return None
    return Job(folder.name, kind, tuple(arguments), about, float(created), folder)


_CHILDREN: list[subprocess.Popen[bytes]] = []


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Keep a child until it has ended, and let go of those that have: they would stay as zombies."""
    _CHILDREN.append(process)
    for child in _ended():
        _CHILDREN.remove(child)


def _ended() -> Iterator[subprocess.Popen[bytes]]:
    return iter([child for child in _CHILDREN if child.poll() is not None])
