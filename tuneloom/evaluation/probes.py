"""The questions that evaluation asks: of identity, and general ones with the replies that must not become less likely.

The built-in ones are in no built-in training set. A file of one's own has the same rows, JSON lines:

    {"messages": [{"role": "user", "content": "Under which name do you go?"}], "kind": "name"}
    {"messages": [{"role": "user", "content": "How far is the moon?"}, {"role": "assistant", "content": "384,400 km."}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuneloom.data.sources import builtin_file
from tuneloom.errors import UserError, excerpt, nearest, user_path
from tuneloom.types import ROLES, Conversation, Location, Message

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
OF_IDENTITY, GENERAL = "identity probes", "general probes"

_CHINESE = re.compile(r"[㐀-鿿]")


@dataclass(frozen=True)
class Probe:
    """A question.

    Attributes:
        asked: the conversation up to what is to be answered.
        language: en or zh.
        kind: of an identity probe: name, maker, denial, introduction, or whatever its file says.
        reply: of a general probe, what should stay likely; "" of an identity probe.
    """

    asked: Conversation
    language: Language
    kind: str = ""
    reply: str = ""

    @property
    def whole(self) -> Conversation:
        """The question with its reply."""
        return Conversation((*self.asked.messages, Message("assistant", self.reply)), self.asked.location)


@dataclass(frozen=True)
class Probes:
    """What is asked, and where it is from, for the report."""

    identity: tuple[Probe, ...]
    general: tuple[Probe, ...]
    sources: dict[str, str]


def load_probes(identity: str | None = None, general: str | None = None, languages: Sequence[Language] = LANGUAGES) -> Probes:
    """Return the probes of the languages, built in or of one's own files.

    Args:
        identity, general: files; None: the built-in ones.
        languages: which to ask in.

    Raises:
        UserError: a file that is not there, a wrong row, or none in these languages.
    """
    found = {what: _read(what, file, languages) for what, file in ((OF_IDENTITY, identity), (GENERAL, general))}
    sources = {"identity": identity or "built in", "general": general or "built in"}
    return Probes(tuple(found[OF_IDENTITY]), tuple(found[GENERAL]), sources)


def _read(what: str, file: str | None, languages: Sequence[Language]) -> list[Probe]:
    if file is None:
        names = [(language, f"{what.replace(' ', '_')}_{language}") for language in languages]
        return [probe for language, name in names for probe in _rows(what, name, builtin_file(name), language)]
    found = [probe for probe in _rows(what, file, user_path(file), None) if probe.language in languages]
    if not found:
        raise UserError(f"no {what} to ask", where=file, got="no rows", expected=f"rows in {' or '.join(languages)}")
    return found


def _rows(what: str, name: str, file: Path, language: Language | None) -> Iterator[Probe]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"the {what} cannot be read", where=name, got=reason, expected="a UTF-8 file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _probe(what, line, Location(name, number), language)


def _probe(what: str, line: str, location: Location, language: Language | None) -> Probe:
    def wrong(reason: str, got: object, expected: str) -> UserError:
        return UserError(f"{what}: {reason}", where=str(location), got=excerpt(got), expected=expected)

    keys = ("messages", "kind") if what == OF_IDENTITY else ("messages",)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise wrong("the row is no JSON", line, '{"messages": [...]} on one line') from None
    if not isinstance(row, dict):
        raise wrong("the row is no map", row, '{"messages": [...]}')
    for key in row:
        if key not in keys:
            near = nearest(str(key), keys)
            raise wrong(
                f"unknown key `{key}`", row[key], f"of {', '.join(keys)}" + (f"; did you mean `{near}`?" if near else "")
            )
    messages = _messages(row.get("messages"), wrong)
    kind = row.get("kind", "own")
    if not isinstance(kind, str) or not kind.strip():
        raise wrong("kind is no text", kind, "a word, such as name")
    reply = ""
    if what == GENERAL:
        *messages, last = messages
        if last.role != "assistant" or not messages:
            raise wrong("the row has no reply", last.content, "an assistant's message at its end")
        reply = last.content
    if not messages or messages[-1].role != "user":
        raise wrong(
            "nothing is asked", messages[-1].content if messages else None, "a user's message at the end of the question"
        )
    spoken: Language = language or ("zh" if _CHINESE.search(messages[-1].content) else "en")
    return Probe(Conversation(tuple(messages), location), spoken, kind if what == OF_IDENTITY else "", reply)


def _messages(value: object, wrong: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise wrong("no messages", value, '"messages": [{"role": "user", "content": "..."}]')
    found = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise wrong(f"messages[{i}] has wrong keys", turn, "role and content, no others")
        if turn["role"] not in ROLES:
            raise wrong(f"messages[{i}].role is unknown", turn["role"], f"one of {', '.join(ROLES)}")
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise wrong(f"messages[{i}].content is empty", turn["content"], "text")
        found.append(Message(turn["role"], turn["content"]))
    return found
