"""Every error that Tuneloom raises on purpose, and the exit code of each.

    TuneloomError
    ├── UserError      2    something the user can mend: a key, a file, a folder
    ├── GuardError     3    a guard or a check stopped the work; the last good state is kept
    └── Interrupted  130/143  Ctrl-C or SIGTERM; a checkpoint is saved if a step was done

Anything else that escapes is our bug: exit 1 with a traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from pathlib import Path


class TuneloomError(Exception):
    """Root of the tree.

    Attributes:
        exit_code: what the command line ends with.
        told_elsewhere: whether another process of the same training tells it.
    """

    exit_code = 1
    told_elsewhere = False


class UserError(TuneloomError):
    """A mistake that the user can mend, told in one short message.

    Args:
        what: one sentence, what is wrong.
        where: file, `file:line`, or config key.
        got: what was found there.
        expected: what would have been right.
        mend: what to do about it.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: str | None = None,
        expected: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.mend = mend
        super().__init__(self.message())

    def message(self) -> str:
        """Return the whole message, one fact a line."""
        facts = (("where", self.where), ("got", self.got), ("expected", self.expected), ("mend", self.mend))
        lines = [self.what]
        lines += [f"  {name + ':':<10}{value}" for name, value in facts if value is not None]
        return "\n".join(lines)


class GuardError(TuneloomError):
    """A guard stopped the work, or a check failed; nothing good was lost."""

    exit_code = 3


class Interrupted(TuneloomError):
    """The user or the system asked the work to end.

    Args:
        number: the signal's number (2 for Ctrl-C, 15 for SIGTERM).
        detail: what was kept, for the message.
    """

    def __init__(self, number: int, detail: str) -> None:
        self.number = number
        self.exit_code = 128 + number
        super().__init__(f"interrupted by {signal.Signals(number).name}; {detail}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` closest to `name`, or None where nothing comes near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def user_path(text: str) -> Path:
    """Return a path that a user wrote, `~` expanded.

    Raises:
        UserError: it cannot even be looked up: too long a name, an unknown user's home, no access.
    """
    try:
        place = Path(text).expanduser()
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("the path cannot be looked up", where=excerpt(text), got=reason, mend="check the path") from error
    return place


def excerpt(value: object, limit: int = 80) -> str:
    """Return `repr(value)`, cut to `limit` characters, for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}, nested too deep to show"
    return text if len(text) <= limit else text[: limit - 1] + "…"
