"""Events of a run: to metrics.jsonl for everybody, to listeners in this process, to a tracker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tuneloom.errors import UserError
from tuneloom.rundir import RunDirectory
from tuneloom.train.limits import is_full, is_refused

_T = TypeVar("_T")

Listener = Callable[[str, dict[str, Any]], None]
"""Called with (event, fields). `progress` events go to listeners only; all others are also in metrics.jsonl."""


def no_listener(event: str, fields: dict[str, Any]) -> None:
    """Listen to nothing."""
    del event, fields


def go_on() -> None:
    """Stop nothing."""


_STATE_EVERY_SECONDS = 1.0
_ROOM_EVERY_SECONDS = 0.5


class Recorder:
    """The one way that training tells what happens.

    Args:
        run: where events are kept.
        listeners: called at once, in order.
        num_steps: of the whole run.
        check: raises where the run is to stop; asked while it waits for room on the disk.
    """

    def __init__(
        self, run: RunDirectory, listeners: Sequence[Listener], num_steps: int, check: Callable[[], None] = go_on
    ) -> None:
        self.run = run
        self.num_steps = num_steps
        self._check = check
        self._listeners = tuple(listeners)
        self._step = 0
        self._last_state = 0.0
        self._phase = "preparing"

    def event(self, name: str, **fields: Any) -> None:
        """Keep an event and tell the listeners."""
        self.written(lambda: self.run.append_event(name, **fields))
        self._tell(name, fields)

    def written(self, write: Callable[[], _T]) -> _T:
        """Write something; where the disk is full, keep everything in memory and wait until there is room.

        Raises:
            Interrupted: the run is to stop, and the disk is full.
            UserError: the disk takes nothing any more.
        """
        waited = False
        while True:
            try:
                return write()
            except Exception as error:  # safetensors and tokenizers have errors of their own for it
                if is_refused(error):
                    raise UserError(
                        "cannot write the run's folder",
                        where=str(self.run.path),
                        got=str(error)[:200],
                        mend="mend the disk or its rights; --resume-from goes on from the last checkpoint",
                    ) from error
                if not is_full(error):
                    raise
            self._check()
            if not waited:
                self._tell("warning", {"message": f"the disk is full; waiting for room in {self.run.path}"})
            waited = True
            time.sleep(_ROOM_EVERY_SECONDS)

    def progress(self, step: int, **fields: Any) -> None:
        """Tell where training stands; state.json follows at most once a second."""
        self._step = step
        self._tell("progress", {"step": step, "total": self.num_steps, **fields})
        if time.monotonic() - self._last_state >= _STATE_EVERY_SECONDS:
            self._write_state(fields.get("eta_seconds"))

    def phase(self, name: str, **fields: Any) -> None:
        """Enter a phase: preparing, training, evaluating, saving, done, failed, interrupted."""
        if name == self._phase and not fields:
            return
        self._phase = name
        self._write_state(None, **fields)
        self._tell("phase", {"phase": name})

    def within(self, what: str, done: int, total: int) -> None:
        """Tell how far a part of a phase is (validation rows, answers)."""
        self._tell("within", {"what": what, "done": done, "total": total})

    def _write_state(self, eta_seconds: float | None, **fields: Any) -> None:
        self._last_state = time.monotonic()
        state = {"phase": self._phase, "step": self._step, "total": self.num_steps, "eta_seconds": eta_seconds}
        self.written(lambda: self.run.write_state(state | fields))

    def _tell(self, name: str, fields: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(name, fields)


class SilentRecorder(Recorder):
    """Tells nobody, and writes nothing: of all ranks but the first."""

    def event(self, name: str, **fields: Any) -> None:
        """Keep nothing."""
        del name, fields

    def progress(self, step: int, **fields: Any) -> None:
        """Tell nobody."""
        del step, fields

    def phase(self, name: str, **fields: Any) -> None:
        """Enter no phase."""
        del name, fields

    def within(self, what: str, done: int, total: int) -> None:
        """Tell nobody."""
        del what, done, total
