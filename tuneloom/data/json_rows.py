"""Rows of JSON files, one at a time: lines, an array, or objects one after another.

A file is read in pieces and never held whole. A broken element of an array costs itself alone:
its brackets tell where it ends, or the next line that begins as it does, and what follows is read on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

from tuneloom.data.row import MAX_ROW_CHARS, Row, RowError, Verbatim, too_large
from tuneloom.types import Location

_CHUNK_CHARS = 1 << 20
_BLANKS = "\ufeff \t\r\n"
_KEPT_CHARS = 200
_BLANK = re.compile(r"[\s,\ufeff]*")
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\\n]')
_BARE_ENDS = {"/": re.compile(r"\n"), "#": re.compile(r"\n"), "}": re.compile("[^}]"), "]": re.compile("[^]]")}
_OTHER_BARE_END = re.compile(r"[,{}\[\]\n]")
_ROW_LIST = re.compile(r'\{\s*"(data|rows|train|examples)"\s*:\s*\[')
_CLOSING = {"{": "}", "[": "]"}
_WORD_CHARS = 16
_SHOWN_BEFORE, _SHOWN_AFTER = 48, 20
"""Characters shown before and after the place where a row is no longer JSON."""


class _KeyTwice(ValueError):
    """A map has a key twice; `args[0]` is the key."""


def _map(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _KeyTwice(next(key for key, count in counts.items() if count > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_map)


def json_lines_file(shown: str, file: TextIO) -> Iterator[Row]:
    """Yield the rows of a .jsonl file: of its lines, or as of a .json file where it clearly is one."""
    window = _Window(file)
    start = window.next_character()
    line, _, rest = window.buffer[window.at :].partition("\n")
    is_one_of_lines = start == "[" and _is_json(line) and (rest.strip() or window.fill())
    file.seek(0)
    if (start == "[" and not is_one_of_lines) or line.strip() == "{":
        yield from json_file(shown, file)
    else:
        yield from json_lines(shown, file)


def json_lines(shown: str, file: TextIO) -> Iterator[Row]:
    """Yield one row for each line that is not blank."""
    number = 0
    while line := file.readline(MAX_ROW_CHARS + 1):
        number += 1
        location = Location(shown, number)
        if len(line) > MAX_ROW_CHARS:
            while line and not line.endswith("\n"):
                line = file.readline(_CHUNK_CHARS)
            yield Row(location, error=too_large())
        elif (line := line.strip(_BLANKS)) and not line.isspace():
            yield _decoded(location, line)


def json_file(shown: str, file: TextIO) -> Iterator[Row]:
    """Yield the rows of a .json file: an array, a map that begins with one under `data`, objects, or lines."""
    window = _Window(file)
    start = window.next_character()
    if start == "[":
        window.take(window.at + 1)
        yield from _elements(shown, window, "]")
    elif listed := _ROW_LIST.match(window.buffer, window.at):
        window.take(listed.end())
        yield from _elements(shown, window, "]}")
    elif start != "{" or _is_json(window.buffer[window.at :].partition("\n")[0]):
        file.seek(0)
        yield from json_lines(shown, file)
    else:
        yield from _elements(shown, window, "")


class _Window:
    """A part of a text file: `buffer` from `at` on comes next, and begins on line `line`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.buffer = ""
        self.at = 0
        self.line = 1
        self.ended = False

    def fill(self) -> bool:
        """Read on, as much again as is left, and drop what was taken but for the line's beginning.

        Return whether anything came.
        """
        chunk = self._file.read(max(_CHUNK_CHARS, len(self.buffer) - self.at))
        self.ended = not chunk
        kept = max(0, self.at - _KEPT_CHARS)
        self.buffer = self.buffer[kept:] + chunk
        self.at -= kept
        return bool(chunk)

    def take(self, end: int) -> None:
        """Go on to position `end` of the buffer."""
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end

    def done(self) -> bool:
        """Whether the file has been read to its end."""
        return self.ended and self.at >= len(self.buffer)

    def next_character(self) -> str:
        """Go on to the next character that is neither blank nor a comma, and return it; "" at the end."""
        while True:
            blank = _BLANK.match(self.buffer, self.at)
            self.take(blank.end() if blank else self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def indent(self) -> str | None:
        """Return the blanks before `at` on its line; None where something else stands there."""
        before = self.buffer[max(0, self.at - _KEPT_CHARS) : self.at].rpartition("\n")[2]
        return before if not before.strip() else None


def _elements(shown: str, window: _Window, closed_by: str) -> Iterator[Row]:
    """Yield elements up to `closed_by`; without one, up to the end of the file."""
    while character := window.next_character():
        if closed_by and character == closed_by[0]:
            yield from _after_the_array(shown, window, closed_by[1:])
            return
        location = Location(shown, window.line)
        if character not in '{["':
            yield _slow_element(location, window)
            continue
        try:
            value, end = _raw_decoded(window)
        except (ValueError, RecursionError) as error:
            row = _slow_element(location, window, broken=_is_broken(error, window))
            yield row
            if row.error and window.done():
                return  # torn: that has been said
            continue
        large = end - window.at > MAX_ROW_CHARS
        window.take(end)
        yield Row(location, error=too_large()) if large else Row(location, value)
    if closed_by:
        fault = RowError("file", Verbatim(window.buffer[-40:]), "the array is not closed", "end the file with ]")
        yield Row(Location(shown, window.line), error=fault)


def _raw_decoded(window: _Window) -> tuple[object, int]:
    """Decode an element, reading on while it may only be cut off by the buffer's end; return it and its end."""
    while True:
        try:
            return _DECODER.raw_decode(window.buffer, window.at)
        except ValueError as error:
            if _is_broken(error, window) or len(window.buffer) - window.at > MAX_ROW_CHARS:
                raise
        window.fill()


def _is_broken(error: Exception, window: _Window) -> bool:
    """Whether an element is broken for certain, whatever may follow the buffer."""
    if window.ended or not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated string") and error.pos + _WORD_CHARS < len(window.buffer)


def _slow_element(location: Location, window: _Window, *, broken: bool = False) -> Row:
    """Decode an element that is broken, bare, or goes on beyond the buffer."""
    end = _ElementEnd(window, broken)
    position = end.find()
    text = window.buffer[window.at : position]
    window.take(position)
    return Row(location, error=too_large()) if end.dropped else _decoded(location, text)


class _ElementEnd:
    """Finds where the element that begins at the window's place ends, by its quotes and brackets.

    A string cannot go on over a line's end: one that does is broken. The next line that begins as
    a broken element does ends it. What is over the limit is dropped on the way.
    """

    def __init__(self, window: _Window, broken: bool) -> None:
        self._window = window
        self._broken = broken
        self._next_begins = self._pattern_of_next()
        character = window.buffer[window.at]
        self._bare_end = None if character in '{["' else _BARE_ENDS.get(character, _OTHER_BARE_END)
        self._stack: list[str] = []
        self._num_open = {"}": 0, "]": 0}
        self._inside = False
        self.dropped = False

    def _pattern_of_next(self) -> re.Pattern[str] | None:
        """Return what begins the element after this one; None where none would begin a line, or inner maps do too."""
        window = self._window
        indent = window.indent()
        if indent is None or re.compile(rf"\{{[ \t\r]*\n{re.escape(indent)}[^\s}}]").match(window.buffer, window.at):
            return None
        self._lookback = len(indent) + 1  # of a beginning that the buffer's end cut in two
        return re.compile(rf"\n{re.escape(indent)}\{{")

    def find(self) -> int:
        """Return the end's position in the window's buffer, reading on as far as needed."""
        window = self._window
        scanned = int(self._bare_end is not None)  # characters after window.at
        while True:
            end, position = self._search(window.at + scanned)
            if end is not None:
                return end
            scanned = position - window.at
            if scanned > MAX_ROW_CHARS:
                self.dropped = True
                window.take(len(window.buffer))
                scanned = position - window.at
            if not window.fill():
                return len(window.buffer)

    def _search(self, position: int) -> tuple[int | None, int]:
        """Scan the buffer; return (end, _), or (None, where to go on) where it is not in the buffer yet."""
        buffer = self._window.buffer
        if self._bare_end:
            found = self._bare_end.search(buffer, position)
            return (found.start(), 0) if found else (None, len(buffer))
        begins = None
        if self._broken and self._next_begins:
            begins = self._next_begins.search(buffer, max(self._window.at + 1, position - self._lookback))
        limit = begins.start() if begins else len(buffer)
        while match := (_INSIDE if self._inside else _OUTSIDE).search(buffer, position, limit):
            if self._inside and match.group() == "\n":
                self._inside, first, self._broken = False, not self._broken, True
                if first and self._next_begins:
                    return self._search(match.start())
                position = match.end()
            elif self._inside:
                self._inside = match.group() != '"'
                position = match.end() + (self._inside and not buffer.startswith("\n", match.end()))
            elif self._brackets(match.group()):
                position = match.end()
            else:
                return max(match.start(), self._window.at + 1), 0
            if not self._stack and not self._inside:
                return position, 0
        return (begins.start() + 1, 0) if begins else (None, max(position, len(buffer)))

    def _brackets(self, character: str) -> bool:
        """Take a quote or bracket outside strings; False for one that closes nothing."""
        if character == '"':
            self._inside = True
        elif character in _CLOSING:
            self._stack.append(_CLOSING[character])
            self._num_open[_CLOSING[character]] += 1
        elif not self._num_open[character]:
            return False
        else:
            closed = ""
            while closed != character:
                closed = self._stack.pop()
                self._num_open[closed] -= 1
        return True


def _after_the_array(shown: str, window: _Window, closed_by: str) -> Iterator[Row]:
    window.take(window.at + 1)
    character = window.next_character()
    if closed_by and character == closed_by:
        window.take(window.at + 1)
        character = window.next_character()
    if character:
        rest = window.buffer[window.at : window.at + 80]
        error = RowError("file", Verbatim(rest), "text after the end of the array", "keep one array in a file")
        yield Row(Location(shown, window.line), error=error)


def _decoded(location: Location, text: str) -> Row:
    try:
        return Row(location, _DECODER.decode(text))
    except _KeyTwice as error:
        return Row(location, error=RowError("row", error.args[0], "a key twice in one map", "keep one of them"))
    except (ValueError, RecursionError) as error:
        return Row(location, error=_fault(error, text))


def _fault(error: Exception, text: str) -> RowError:
    if isinstance(error, json.JSONDecodeError):
        return _not_json(error, text)
    if isinstance(error, RecursionError):
        return RowError("row", Verbatim(text[:200]), "nested too deep", "write the row flat")
    return RowError("row", Verbatim(text[:200]), "a number too long", "write it as text, or shorten it")


def _not_json(error: json.JSONDecodeError, text: str) -> RowError:
    """Return the fault of a row, with what stands where it is no longer JSON."""
    torn = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    pos = len(text) if torn else error.pos
    mend = "mend this row; a file that was cut off ends like this" if torn else f"mend this row at its character {pos + 1:,}"
    start = max(0, pos - _SHOWN_BEFORE)
    shown = ("…" if start else "") + text[start : pos + _SHOWN_AFTER]
    return RowError("row", Verbatim(shown), "not valid JSON", mend)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
