"""The studio's one model that talks: a process of its own, started with the first question, replaced with another target."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

Phase = Literal["asleep", "loading", "ready", "failed"]
Listener = Callable[[dict[str, Any]], None]
_LAST_WORDS_BYTES = 4096


@dataclass(frozen=True)
class VoiceState:
    """How the model that talks is.

    Attributes:
        phase: asleep: no process; loading; ready; failed: it ended with `message`.
        target: what is loaded or was.
        since: of the phase; seconds of `time.monotonic`.
        message: what it says while it loads, or why it ended.
        adapter: whether the target has one; None until it is known.
    """

    phase: Phase = "asleep"
    target: str | None = None
    since: float = 0.0
    message: str = ""
    adapter: bool | None = None


class Voice:
    """Starts, asks and stops the process `tuneloom.studio.speaker`; safe from any thread.

    Args:
        folder: where its stderr is kept.
        idle_seconds: after which it ends by itself; None: the speaker's own.
    """

    def __init__(self, folder: Path, idle_seconds: float | None = None) -> None:
        self._folder = folder
        self._idle = idle_seconds
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._listeners: dict[int, Listener] = {}
        self._number = 0
        self._state = VoiceState()

    @property
    def state(self) -> VoiceState:
        """How it is now."""
        return self._state

    @property
    def pid(self) -> int | None:
        """Its process, where there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def open(self, target: str) -> None:
        """Load a target, unless it is there or on its way; another one is let go first."""
        with self._lock:
            if self._state.target == target and self._state.phase in ("loading", "ready") and self.pid is not None:
                return
            self.close()
            self._start(target)

    def ask(
        self,
        target: str,
        messages: Sequence[Mapping[str, str]],
        settings: Mapping[str, Any],
        *,
        base: bool,
        listen: Listener,
    ) -> int:
        """Ask a target, loading it where needed; return the answer's number.

        Args:
            target: a run, a checkpoint, an adapter, a folder, a model's name.
            messages: the conversation, each with role and content.
            settings: see `tuneloom.studio.speaker.settings_of`.
            base: with the adapter off.
            listen: gets the speaker's events of this answer, from another thread; the last one is `end` or `error`.
        """
        with self._lock:
            self.open(target)
            self._number += 1
            self._listeners[self._number] = listen
            number = self._number
            request = {"id": number, "base": base, "messages": list(messages), "settings": dict(settings)}
            self._send(request)
            return number

    def stop(self, number: int) -> None:
        """End an answer early; what is written of it stays."""
        with self._lock:
            self._send({"stop": number})

    def close(self) -> None:
        """Let the model go; answers that it owes end with an error."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                with contextlib.suppress(OSError):
                    assert process.stdin is not None
                    process.stdin.close()
            self._state = VoiceState(since=time.monotonic())
            self._abandon("")

    def _start(self, target: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tuneloom.studio.speaker"]
        command += ["--idle", str(self._idle)] if self._idle is not None else []
        with open(self._errors, "wb") as errors:
            process = subprocess.Popen(
                [*command, "--", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        assert process.stdout is not None
        self._process = process
        self._state = VoiceState("loading", target, time.monotonic())
        threading.Thread(target=self._read, args=(process, process.stdout), daemon=True).start()

    @property
    def _errors(self) -> Path:
        return self._folder / "speaker.log"

    def _send(self, request: Mapping[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has ended; its reader tells so
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[str], lines: IO[str]) -> None:
        """Take a process's events to those who listen, to its end."""
        fault = ""
        with lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    fault = self._take(process, json.loads(line)) or fault
        code = process.wait()
        with self._lock:
            if self._process is not process:
                return
            self._process = None
            if code == 0:
                self._state = VoiceState("asleep", self._state.target, time.monotonic(), adapter=self._state.adapter)
            else:
                message = fault or self._last_words(code)
                self._state = VoiceState("failed", self._state.target, time.monotonic(), message)
        self._abandon(self._state.message or "the model was let go after a while without work; ask again")

    def _take(self, process: subprocess.Popen[str], event: dict[str, Any]) -> str | None:
        """Take one event; return why it ends, where it says so."""
        kind, number = event.get("event"), event.get("id")
        with self._lock:
            if self._process is not process:
                return None
            listener = None
            if number is not None:
                last = kind in ("end", "error")
                listener = self._listeners.pop(number, None) if last else self._listeners.get(number)
            elif kind == "says":
                self._state = VoiceState("loading", self._state.target, self._state.since, str(event["text"]))
            elif kind == "ready":
                now = time.monotonic()
                self._state = VoiceState("ready", self._state.target, now, str(event["base"]), bool(event["adapter"]))
            elif kind == "error":
                return str(event["message"])
        if listener is not None:  # without the lock: it takes locks of its own
            listener(event)
        return None

    def _abandon(self, message: str) -> None:
        """Tell those who wait that nothing will come; an empty message: another model was asked for."""
        with self._lock:
            waiting, self._listeners = self._listeners, {}
        for number, listener in waiting.items():
            listener({"event": "error", "id": number, "message": message})

    def _last_words(self, code: int) -> str:
        if code < 0:
            return f"the model's process was ended by signal {-code}; memory may have run out"
        try:
            content = self._errors.read_bytes()[-_LAST_WORDS_BYTES:].decode("utf-8", errors="replace")
        except OSError:
            content = ""
        return (content.strip().splitlines() or [f"the model's process ended with code {code}"])[-1]
