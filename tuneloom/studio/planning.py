"""The studio's end of the planner: starts it when it is asked, hands requests over, keeps answers until fetched.

A planner that nobody has asked anything for a while is let go; it holds tokenizers and the libraries that read data.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

IDLE_SECONDS = 5 * 60.0
_LOG = "planner.log"
# With -P: nothing that lies in the folder where the studio was started is taken for a module; but this very package is.
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); import tuneloom; del sys.path[0]; "
    "from tuneloom.studio.planner import main; main()"
)


class Planning:
    """A planner process and what it has answered.

    Args:
        runs: the folder of runs.
        idle_seconds: after which a planner without work is let go.
    """

    def __init__(self, runs: Path, idle_seconds: float = IDLE_SECONDS) -> None:
        self.runs = runs
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._timer: threading.Timer | None = None
        self._last = 0
        self._asked: dict[int, dict[str, Any]] = {}
        """By id: empty until something is told of it."""

    def ask(self, page: str, do: Literal["plan", "check"], config: dict[str, Any], path: str = "") -> int:
        """Hand a request over and return its number.

        Args:
            page: who asks; of several requests of one page the newest is answered.
            do: what is asked for.
            config: a config's values.
            path: of the source to check.
        """
        with self._lock:
            self._last += 1
            request = {"id": self._last, "page": page, "do": do, "config": config, "path": path, "runs": str(self.runs)}
            self._asked[self._last] = {}
            try:
                stdin = self._running().stdin
                assert stdin is not None
                stdin.write(json.dumps(request, ensure_ascii=False) + "\n")
                stdin.flush()
            except OSError as error:
                self._asked[self._last] = {"fault": str(error)}
            self._wait_for_idleness()
            return self._last

    def told(self, number: int) -> dict[str, Any] | None:
        """Return the newest answer to a request: empty or a `progress` so far, None where it was fetched or let go."""
        with self._lock:
            answer = self._asked.get(number)
            if answer and "progress" not in answer:
                del self._asked[number]
            return answer

    def forget(self, number: int) -> None:
        """Let go of a request that nobody waits for any more."""
        with self._lock:
            self._asked.pop(number, None)

    @property
    def pid(self) -> int | None:
        """The planner's process, where there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def _wait_for_idleness(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(self._idle_seconds, self._let_go)
        self._timer.daemon = True
        self._timer.start()

    def _let_go(self) -> None:
        """End the planner, unless it still owes an answer; then it is looked at again."""
        with self._lock:
            if any(not answer or "progress" in answer for answer in self._asked.values()):
                self._wait_for_idleness()
                return
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                process.wait()
                with contextlib.suppress(OSError):
                    assert process.stdin is not None
                    process.stdin.close()

    def _running(self) -> subprocess.Popen[str]:
        """Return the process, started where there is none."""
        if self._process is None or self._process.poll() is not None:
            folder = self.runs / ".studio"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / _LOG, "wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).resolve().parents[2])],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                )
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        return self._process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    answer = json.loads(line)
                    with self._lock:
                        if answer.get("id") in self._asked:
                            self._asked[answer["id"]] = answer
        with self._lock:
            if process is self._process:
                for number in self._asked:
                    self._asked[number] = {"fault": f"the planner ended; see {self.runs / '.studio' / _LOG}"}
