"""Ctrl-C and SIGTERM: the first asks for an orderly end, a second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tuneloom.errors import Interrupted


class InterruptFlag:
    """Says whether a signal has come; the loop asks between micro-batches."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self, detail: str = "") -> None:
        """Raise if a signal has come; `detail` says what was kept.

        Raises:
            Interrupted: to unwind to whoever saves the checkpoint.
        """
        if self.number is not None:
            raise Interrupted(self.number, detail)


_ENDS: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@contextmanager
def catch_signals() -> Iterator[InterruptFlag]:
    """Within the block, SIGINT and SIGTERM set the flag; the second one acts as it always did.

    A shell starts what runs in its background with SIGINT ignored; there the second one acts as it does elsewhere.
    """
    flag = InterruptFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        flag.number = number
        for each, handler in before.items():
            signal.signal(each, _ENDS[each] if handler is signal.SIG_IGN else handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
