"""What reading a file yields: rows, each with its place, or the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneloom.types import Location

MAX_ROW_CHARS = 16 << 20
"""A larger row is reported and passed over; it would be millions of tokens."""


_SHOWN_CHARS = 80


class Verbatim(str):
    """Text that a report shows without quotes: a piece of a file as it stands there, or words of our own."""

    __slots__ = ()


def json_excerpt(value: object) -> str:
    """Return a value as a JSON file has it, on one printable line, cut to 80 characters."""
    text = value if isinstance(value, Verbatim) else _json(value)
    shown = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text[: _SHOWN_CHARS + 1])
    return shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 1] + "…"


def _json(value: object) -> str:
    if isinstance(value, bytes):
        return value[:_SHOWN_CHARS].decode("utf-8", "backslashreplace")
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"


class RowError(Exception):
    """A row that cannot be used.

    Args:
        field: the key or path in the row, such as `messages[1].content`.
        value: what stood there; the report shows it as JSON, cut short.
        reason: a short clause, the same for the same fault: reports count by it.
        mend: what to do.
        answer_tokens: that are lost with it, where that is known.
    """

    def __init__(self, field: str, value: object, reason: str, mend: str, answer_tokens: int = 0) -> None:
        self.field = field
        self.value = json_excerpt(value)
        self.reason = reason
        self.mend = mend
        self.answer_tokens = answer_tokens
        super().__init__(f"{field}: {reason}")

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values; `from_dict` reads them."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RowError:
        error = cls(values["field"], "", values["reason"], values["mend"], values["answer_tokens"])
        error.value = values["value"]
        return error


@dataclass(frozen=True, slots=True)
class Row:
    """A decoded row, or the reason why it could not be decoded."""

    location: Location
    value: object = None
    error: RowError | None = None


def too_large() -> RowError:
    """Return the fault of a row over the limit."""
    return RowError("row", Verbatim(f"over {MAX_ROW_CHARS >> 20} Mi characters"), "row too large", "split the conversation")
