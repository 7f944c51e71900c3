"""A source to conversations, one at a time: placeholders filled, every bad row reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeGuard

from tuneloom.config import SourceConfig
from tuneloom.data.formats import Parsed, parse_row
from tuneloom.data.inspect import Inspected, inspect_file
from tuneloom.data.read import read_rows
from tuneloom.data.report import TRAIN, SourceReport
from tuneloom.data.row import Row, RowError
from tuneloom.data.sources import builtin_file, resolve_source
from tuneloom.types import Conversation, Location, Message, ToolCall

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_PROBES = ("identity_probes_en", "identity_probes_zh")

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Read:
    """A conversation, and which one it is in its source.

    Attributes:
        row: its number among the source's conversations, from 0.
        file: index of its file.
        conversation: placeholders filled.
        repairs: what was repaired in it.
    """

    row: int
    file: int
    conversation: Conversation
    repairs: Sequence[str] = ()


@dataclass(frozen=True)
class Unusable:
    """A row that is no conversation, and why."""

    location: Location
    error: RowError


class ConversationReader:
    """Reads one source; may be asked again and again.

    Args:
        source: from the config.
        variables: values of placeholders.
        role: what the config has it for: train, validation or test.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """

    def __init__(self, source: SourceConfig, variables: Mapping[str, str], role: str = TRAIN) -> None:
        self.source = source
        self.role = role
        self._variables = variables
        resolved = resolve_source(source)
        self.files = resolved.files
        self.shape = resolved.shape
        self.max_rows = resolved.max_rows

    @cached_property
    def inspected(self) -> list[Inspected]:
        """Each file's hash and encoding."""
        return [inspect_file(shown, file) for shown, file in self.files]

    def new_report(self) -> SourceReport:
        """Return an empty report of this source."""
        hashes = [inspected.sha256 for inspected in self.inspected]
        return SourceReport(self.source.path, [shown for shown, _ in self.files], hashes, self.role)

    def read(self, report: SourceReport, *, strict: bool = False, on_bytes: OnBytes | None = None) -> Iterator[Read]:
        """Yield the conversations; count every row in the report.

        Args:
            report: from `new_report`.
            strict: stop at the first row that cannot be used.
            on_bytes: called with (bytes read, all), now and then.

        Raises:
            UserError: a file cannot be read, a row in strict mode.
        """
        for row in self.read_all(report, on_bytes=on_bytes):
            if told(row, report, strict):
                yield row

    def read_all(self, report: SourceReport, *, on_bytes: OnBytes | None = None) -> Iterator[Read | Unusable]:
        """Yield every row; those that are dropped or repaired are left for `told`, so that one may read ahead.

        Raises:
            UserError: a file cannot be read.
        """
        total, before, number = sum(inspected.num_bytes for inspected in self.inspected), 0, 0
        for file, ((shown, path), inspected) in enumerate(zip(self.files, self.inspected, strict=True)):
            start = before

            def on_position(position: int, start: int = start) -> None:
                if on_bytes:
                    on_bytes(start + position, total)

            for row in read_rows(shown, path, inspected, on_position):
                if report.read == self.max_rows:
                    return
                report.read += 1
                try:
                    parsed = self._parsed(row, report)
                except RowError as error:
                    yield Unusable(row.location, error)
                    continue
                yield Read(number, file, parsed.conversation, parsed.repairs)
                number += 1
            before += inspected.num_bytes
            on_position(inspected.num_bytes)

    def pick(self, rows: Collection[int]) -> Iterator[Conversation]:
        """Yield the conversations of these numbers, read anew."""
        if not rows:
            return
        last = max(rows)
        for read in self.read(self.new_report()):
            if read.row in rows:
                yield read.conversation
            if read.row == last:
                return

    def _parsed(self, row: Row, report: SourceReport) -> Parsed:
        if row.error is not None:
            raise row.error
        parsed = parse_row(row.value, row.location, self.shape)
        report.formats[parsed.format] += 1
        parsed.conversation = self._filled(parsed.conversation, report)
        for message in parsed.conversation.messages:
            if message.role == "user" and message.content.strip().casefold() in held_out_probes():
                report.leaked_probes.setdefault(message.content.strip(), str(row.location))
        return parsed

    def _filled(self, conversation: Conversation, report: SourceReport) -> Conversation:
        """Fill `{{name}}`-like placeholders from data.variables: in texts, in calls, and in what is told of tools."""
        if not conversation.tools and not any(map(_may_have_placeholders, conversation.messages)):
            return conversation

        def value(hit: re.Match[str]) -> str:
            if hit[1] not in self._variables:
                report.unfilled.setdefault(hit[1], str(conversation.location))
            return self._variables.get(hit[1], hit[0])

        messages = tuple(_filled_message(message, value) for message in conversation.messages)
        tools = tuple(_filled_values(tool, value) for tool in conversation.tools)
        return replace(conversation, messages=messages, tools=tools)


_Value = Callable[[re.Match[str]], str]


def _may_have_placeholders(message: Message) -> bool:
    return "{{" in message.content or bool(message.tool_calls or message.name)


def _filled_message(message: Message, value: _Value) -> Message:
    if not _may_have_placeholders(message):
        return message
    calls = tuple(_filled_call(call, value) for call in message.tool_calls)
    name = message.name and _PLACEHOLDER.sub(value, message.name)
    return replace(message, content=_PLACEHOLDER.sub(value, message.content), tool_calls=calls, name=name)


def _filled_call(call: ToolCall, value: _Value) -> ToolCall:
    """Fill a call; its arguments are JSON text, in which only strings can have placeholders."""

    def escaped(hit: re.Match[str]) -> str:
        return json.dumps(value(hit), ensure_ascii=False)[1:-1]

    arguments = _PLACEHOLDER.sub(escaped, call.arguments)
    return replace(call, name=_PLACEHOLDER.sub(value, call.name), arguments=arguments)


def _filled_values(told: Any, value: _Value) -> Any:
    """Fill the texts within maps and lists; keys stay."""
    if isinstance(told, str):
        return _PLACEHOLDER.sub(value, told)
    if isinstance(told, Mapping):
        return {key: _filled_values(inner, value) for key, inner in told.items()}
    return [_filled_values(inner, value) for inner in told] if isinstance(told, list) else told


def told(row: Read | Unusable, report: SourceReport, strict: bool = False) -> TypeGuard[Read]:
    """Tell the report of a row's repairs, or that it is dropped; return whether it is a conversation.

    Raises:
        UserError: it is none, in strict mode.
    """
    if isinstance(row, Unusable):
        report.drop(row.location, row.error, strict)
        return False
    for what in row.repairs:
        assert row.conversation.location is not None
        report.repair(row.conversation.location, what)
    return True


@cache
def held_out_probes() -> frozenset[str]:
    """Return the questions that evaluation asks and training must not see, case folded."""
    texts: set[str] = set()
    for name in _PROBES:
        for row in read_rows(name, builtin_file(name)):
            texts |= {str(message["content"]).strip().casefold() for message in row.value["messages"]}  # type: ignore[index]
    return frozenset(texts)
