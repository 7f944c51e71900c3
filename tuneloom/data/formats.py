"""One row of a file to one `Conversation`, for every format that people keep them in, tool calls included.

A format is told by a row's keys, so a file may mix them. What is wrong with a row is raised
as `RowError`; what is repaired with certainty is named in `Parsed.repairs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeGuard

from tuneloom.data.row import RowError
from tuneloom.types import ROLES, Conversation, Location, Message, Role, ToolCall

ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}


_BROKEN_BYTE = re.compile("[\udc80-\udcff]")
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # as JSON text has it; behind another backslash it is only its name
_NUL = ("holds a NUL byte", "remove it")

TURN_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a whole conversation, the first found counts; a csv file has it as JSON text."""


@dataclass
class Parsed:
    """A row understood: its format's name, the conversation, what was repaired."""

    format: str
    conversation: Conversation
    repairs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowShape:
    """Names that differ in a file from ours.

    Attributes:
        columns: ours -> the file's, of a row's keys, and of `role` and `content` of its messages.
        roles: the file's -> ours.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def in_our_words(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with our names; what another name of ours would hide is left out."""
        columns = {ours: theirs for ours, theirs in self.columns.items() if ours not in _MESSAGE_KEYS}
        renamed = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        named = {key: value for key, value in row.items() if key not in columns.values()} | renamed
        for turns in TURN_COLUMNS:
            if named.get(turns) is not None:
                decoded = _from_json(named[turns], turns)
                renames = self.roles or any(key in self.columns for key in _MESSAGE_KEYS)
                named[turns] = [self._turn(turn) for turn in decoded] if renames and isinstance(decoded, list) else decoded
                break
        return named

    def _turn(self, turn: object) -> object:
        if not isinstance(turn, dict):
            return turn
        keys = {theirs: ours for ours, theirs in self.columns.items() if ours in _MESSAGE_KEYS}
        turn = {keys.get(key, key): value for key, value in turn.items()}
        for key in ("role", "from"):
            if isinstance(turn.get(key), str):
                turn[key] = self.roles.get(turn[key], turn[key])
        return turn

    def in_the_files_words(self, place: str) -> str:
        """Return a place such as `messages[1].content` with the file's names."""
        return re.sub(r"[a-z_]+", lambda word: self.columns.get(word[0], word[0]), place)


class _Placed(NamedTuple):
    """A message, where its text stands in the row, and whether its format has weights."""

    message: Message
    where: str
    has_weight: bool = False

    def changed(self, **values: Any) -> _Placed:
        return self._replace(message=replace(self.message, **values))

    def empty_answer(self) -> RowError:
        mend = "write the answer, or give it weight 0" if self.has_weight else "write the answer, or leave the row out"
        return RowError(self.where, self.message.content, "empty answer", mend)


_MESSAGE_KEYS = ("role", "content")
_AS_IT_IS = RowShape()


def parse_row(row: object, location: Location, shape: RowShape = _AS_IT_IS) -> Parsed:
    """Turn a row into a conversation.

    Args:
        row: the decoded row.
        location: its file and line.
        shape: names that differ from ours.

    Raises:
        RowError: the row is no conversation.
    """
    if not isinstance(row, dict):
        raise RowError("row", row, "not a map", "write each row as {...}")
    try:
        return _parsed(shape.in_our_words(row), location, shape)
    except RowError as error:
        error.field = shape.in_the_files_words(error.field)
        error.mend = re.sub("`[^`]+`", lambda name: shape.in_the_files_words(name[0]), error.mend)
        raise


def _parsed(row: Mapping[str, Any], location: Location, shape: RowShape) -> Parsed:
    """Read a row in the format that its keys tell; a key that is null counts only where no other tells one."""
    for keys in ({key: value for key, value in row.items() if value is not None}, row):
        for name, is_it, read in FORMATS:
            if is_it(keys):
                messages, repairs = _settle(read(row))
                return Parsed(name, Conversation(messages, location, _tools(row)), repairs)
    mend = "use `messages`, `conversations` or `instruction` + `output`, or map your columns in data.train.columns"
    if lists := [key for key, value in row.items() if isinstance(value, list) and value and _is_row(value[0], shape)]:
        mend = f"this is no row, its rows are in the list {' and the list '.join(lists)}: save that list alone as the file"
    raise RowError("row", list(row), "no known format", mend)


def _is_row(value: object, shape: RowShape) -> bool:
    """Whether a value is itself a row, by its keys."""
    if not isinstance(value, dict):
        return False
    try:
        row = shape.in_our_words(value)
    except RowError:
        return False
    return any(is_it(row) for _, is_it, _ in FORMATS)


def _is_sharegpt(row: Mapping[str, Any]) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns)


def _read_messages(row: Mapping[str, Any]) -> list[_Placed]:
    """Read turns; a column `system` beside them counts where they do not begin with one."""
    messages = _read_turns(row["messages"], "messages", "role", "content")
    return messages if messages[0].message.role == "system" else _with_system(row.get("system"), "system", messages)


def _read_chatglm3(row: Mapping[str, Any]) -> list[_Placed]:
    """Read turns of which some are tools: {role: tool, name, parameters, observation} is a call and its result."""
    messages: list[_Placed] = []
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations", turns, "not a list of messages", "write [{role, content}, ...]")
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict) or turn.get("role") != "tool" or not turn.keys() & {"parameters", "observation"}:
            messages.append(_read_turn(turn, where, "role", "content"))
            continue
        call = ToolCall(_name(turn.get("name"), f"{where}.name"), _map_text(turn.get("parameters"), f"{where}.parameters"))
        if messages and messages[-1].message.role == "assistant":
            messages[-1] = messages[-1].changed(tool_calls=(*messages[-1].message.tool_calls, call))
        else:
            messages.append(_message("assistant", "", f"{where}.parameters", turn.get("weight"), (call,), has_weight=True))
        observation = turn.get("observation")
        text = _json_text(observation, f"{where}.observation") if isinstance(observation, (dict, list)) else observation
        messages.append(_message("tool", text, f"{where}.observation", name=call.name))
    return messages


def _read_sharegpt(row: Mapping[str, Any]) -> list[_Placed]:
    messages = _read_turns(row["conversations"], "conversations", "from", "value")
    return _with_system(row.get("system"), "system", messages)


def _read_alpaca(row: Mapping[str, Any]) -> list[_Placed]:
    messages: list[_Placed] = []
    history = _from_json(_given(row, "history", []), "history")
    if not isinstance(history, list):
        raise RowError("history", history, "not a list", "write history as a list of [question, answer]")
    for i, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"history[{i}]", pair, "not a pair", "write each as [question, answer]")
        messages += [_message("user", pair[0], f"history[{i}][0]"), _message("assistant", pair[1], f"history[{i}][1]")]
    question = check_text(row["instruction"], "instruction")
    extra = check_text(_given(row, "input", ""), "input")
    messages.append(_Placed(Message("user", "\n".join(text for text in (question, extra) if text)), "instruction"))
    if "output" not in row:
        raise RowError("output", None, "no answer", "add `output`, or map your column to it")
    messages.append(_message("assistant", row["output"], "output"))
    return _with_system(row.get("system"), "system", messages)


def _read_xtuner(row: Mapping[str, Any]) -> list[_Placed]:
    messages: list[_Placed] = []
    turns = row["conversation"]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversation", turns, "not a list of turns", "write [{system, input, output}, ...]")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "input" not in turn or "output" not in turn:
            raise RowError(f"conversation[{i}]", turn, "not a turn", "write {input, output}")
        system = _with_system(turn.get("system"), f"conversation[{i}].system", [])
        if i and system:
            raise RowError(f"conversation[{i}].system", turn["system"], "system message not first", "put it first")
        messages += system
        messages.append(_message("user", turn["input"], f"conversation[{i}].input"))
        messages.append(_message("assistant", turn["output"], f"conversation[{i}].output"))
    return messages


def _read_completion(row: Mapping[str, Any]) -> list[_Placed]:
    """Read two texts, or two lists of messages, of which the completion's answers alone are supervised."""
    if isinstance(row["prompt"], list):
        asked = _read_turns(row["prompt"], "prompt", "role", "content")
        answered = _read_turns(row["completion"], "completion", "role", "content")
        if not any(message.role == "assistant" for message, *_ in answered):
            raise RowError("completion", row["completion"], "no answer", "add an assistant message")
        return [*(m.changed(weight=0) if m.message.role == "assistant" else m for m in asked), *answered]
    return [_message("user", row["prompt"], "prompt"), _message("assistant", row["completion"], "completion")]


FORMATS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], list[_Placed]]], ...] = (
    ("OpenAI messages", lambda row: "messages" in row, _read_messages),
    ("ShareGPT conversations", _is_sharegpt, _read_sharegpt),
    ("ChatGLM3 conversations", lambda row: "conversations" in row, _read_chatglm3),
    ("XTuner conversation", lambda row: "conversation" in row, _read_xtuner),
    ("Alpaca", lambda row: "instruction" in row, _read_alpaca),
    ("prompt and completion", lambda row: "prompt" in row and "completion" in row, _read_completion),
)


def _read_turns(turns: object, name: str, role_key: str, text_key: str) -> list[_Placed]:
    if not isinstance(turns, list) or not turns:
        raise RowError(name, turns, "not a list of messages", f"write [{{{role_key}, {text_key}}}, ...]")
    return [_read_turn(turn, f"{name}[{i}]", role_key, text_key) for i, turn in enumerate(turns)]


def _read_turn(turn: object, where: str, role_key: str, text_key: str) -> _Placed:
    if not isinstance(turn, dict):
        raise RowError(where, turn, "not a message", f"write {{{role_key}, {text_key}}}")
    name = turn.get(role_key)
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise RowError(
            f"{where}.{role_key}",
            name,
            "unknown role",
            f"use one of {', '.join(ROLES)}, or name yours in `roles` of the source",
        )
    role, text, calls = ROLE_NAMES[name], turn.get(text_key), _calls(turn, where)
    if name == "function_call":
        text, calls = "", _calls_of_text(text, f"{where}.{text_key}")
    elif _is_parts(text):
        text = _joined(text, f"{where}.{text_key}")
    if calls and role != "assistant":
        raise RowError(f"{where}.{role_key}", name, "a tool call by another than the assistant", "make it the assistant's")
    if calls and text is None:
        text = ""
    elif text_key not in turn:
        raise RowError(f"{where}.{text_key}", None, "no text", f"add `{text_key}`")
    extra = {key: _name(turn[key], f"{where}.{key}") for key in ("name", "tool_call_id") if turn.get(key) is not None}
    return _message(
        role, text, f"{where}.{text_key}", turn.get("weight"), calls, has_weight=True, **(extra if role == "tool" else {})
    )


def _is_parts(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a message's text is written in parts, as OpenAI takes it: [{type: text, text}, ...]."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def _joined(parts: list[Mapping[str, Any]], where: str) -> str:
    """Return the text of parts, joined as they are."""
    for i, part in enumerate(parts):
        if part["type"] != "text":
            mend = "only text is read: leave the part out, or the row"
            raise RowError(f"{where}[{i}].type", part["type"], "a part that is not text", mend)
    return "".join(check_text(part.get("text"), f"{where}[{i}].text") for i, part in enumerate(parts))


def _calls(turn: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    """Read a message's `tool_calls`, or the single `function_call` of older files."""
    if turn.get("function_call") is not None:
        return (_call(turn["function_call"], f"{where}.function_call"),)
    calls = turn.get("tool_calls")
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls", calls, "not a list of tool calls", "write [{function: {name, arguments}}, ...]")
    return tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls))


def _calls_of_text(text: object, where: str) -> tuple[ToolCall, ...]:
    """Read the JSON text of one call or of a list of them."""
    calls = _from_json(text, where, "write {name, arguments} as JSON text")
    if calls == []:
        raise RowError(where, calls, "not a tool call", "write {name, arguments}")
    if isinstance(calls, list):
        return tuple(_call(call, f"{where}[{i}]") for i, call in enumerate(calls))
    return (_call(calls, where),)


def _call(call: object, where: str) -> ToolCall:
    """Read {id, type: function, function: {name, arguments}}, or {name, arguments} alone."""
    if not isinstance(call, dict):
        raise RowError(where, call, "not a tool call", "write {name, arguments}")
    number = call.get("id")
    if "function" in call:
        where, inner = f"{where}.function", call["function"]
        if not isinstance(inner, dict):
            raise RowError(where, inner, "not a tool call", "write {name, arguments}")
        call = inner
    elif "name" not in call:
        raise RowError(where, call, "not a tool call", "write {name, arguments}")
    name, arguments = _name(call.get("name"), f"{where}.name"), _map_text(call.get("arguments"), f"{where}.arguments")
    return ToolCall(name, arguments, None if number is None else _name(number, f"{where.removesuffix('.function')}.id"))


def _name(value: object, where: str) -> str:
    text = check_text(value, where)
    if not text.strip():
        raise RowError(where, value, "an empty name", "write the name")
    return text


def _map_text(value: object, where: str) -> str:
    """Return a tool's arguments as the JSON text of a map; none at all are an empty one."""
    mend = "write {name: value, ...}, or that as JSON text"
    decoded = _from_json(value, where, mend) if value not in (None, "") else {}
    if not isinstance(decoded, dict):
        raise RowError(where, value, "not a map of arguments", mend)
    text = _json_text(decoded, where)
    return value if isinstance(value, str) and value else text


def _json_text(value: object, where: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise RowError(where, value, "cannot be written as JSON", "use texts, numbers, lists and maps") from None
    if "\\u0000" in text and _ESCAPED_NUL.search(text):
        raise RowError(where, value, *_NUL)
    return check_text(text, where)


def _given(row: Mapping[str, Any], name: str, otherwise: object) -> object:
    """Return a column, or `otherwise` where it is absent, null or empty text."""
    value = row.get(name)
    return otherwise if value is None or value == "" else value


def _from_json(value: object, name: str, mend: str | None = None) -> object:
    """Decode a column that holds JSON text, as csv files do."""
    if not isinstance(value, str):
        return value
    try:
        decoded: object = json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(name, value, "not JSON", mend or f"write {name} as a list, or as the JSON text of one") from None
    return decoded


def _message(
    role: Role,
    content: object,
    where: str,
    weight: object = None,
    tool_calls: tuple[ToolCall, ...] = (),
    *,
    name: str | None = None,
    tool_call_id: str | None = None,
    has_weight: bool = False,
) -> _Placed:
    """Check a message; a weight that is absent or null is 1."""
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise RowError(f"{where.rpartition('.')[0]}.weight", weight, "wrong weight", "use 0 or 1")
    text = check_text(content, where)
    return _Placed(Message(role, text, 0 if weight == 0 else 1, tool_calls, name, tool_call_id), where, has_weight)


def check_text(value: object, where: str) -> str:
    """Return a value that is text which can be encoded.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str):
        raise RowError(where, value, "not text", "write it as a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        if _BROKEN_BYTE.search(value):
            raise RowError(where, value, "holds bytes that are not UTF-8", "write it as UTF-8") from None
        raise RowError(where, value, "holds half a character (a lone surrogate)", "write the character whole") from None
    if "\x00" in value:
        raise RowError(where, value, *_NUL)
    return value


def _with_system(system: object, where: str, messages: list[_Placed]) -> list[_Placed]:
    if system is None or system == "":
        return messages
    return [_Placed(Message("system", check_text(system, where)), where), *messages]


def _settle(placed: list[_Placed]) -> tuple[tuple[Message, ...], list[str]]:
    """Check the order of roles; take off what follows the last answer."""
    repairs = []
    messages = tuple(message for message, *_ in placed)
    last_answer = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=None)
    if last_answer is None:
        raise RowError("row", messages[-1].content, "no answer", "add an assistant message")
    if last_answer + 1 < len(messages):
        repairs.append("messages after the last answer taken off")
        messages = messages[: last_answer + 1]
    start = 1 if messages[0].role == "system" else 0
    previous = "system"
    for i, message in enumerate(messages[start:], start):
        if message.role == "system":
            raise RowError(f"message {i + 1}", message.role, "system message not first", "put it first")
        if previous == "system" and message.role != "user":
            raise RowError(f"message {i + 1}", message.role, "does not start with a user message", "begin with a question")
        if message.role == previous and message.role != "tool":
            raise RowError(f"message {i + 1}", message.role, f"two {message.role} messages in a row", "join or alternate them")
        if message.role == "assistant" and message.weight and not (message.content.strip() or message.tool_calls):
            raise placed[i].empty_answer()
        previous = message.role
    if not any(message.weight for message in messages if message.role == "assistant"):
        raise RowError("weight", 0, "every answer has weight 0", "leave one answer at weight 1")
    return messages, repairs


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    given = _given(row, "tools", None)
    return () if given is None else read_tools(_from_json(given, "tools"))


def read_tools(tools: object) -> tuple[Mapping[str, Any], ...]:
    """Return tools as chat templates want them.

    Args:
        tools: a list of OpenAI's {type, function: {name, ...}} or ChatGLM3's bare {name, description, parameters}.

    Raises:
        RowError: it is none.
    """
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools", tools, "not a list of tools", "write a list of maps")
    _json_text(tools, "tools")
    return tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def _tool(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a tool as chat templates want it: a bare {name, description, parameters} is wrapped."""
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(where, tool, "a tool without a name", "write {name, description, parameters}")
    if "function" in tool:
        return {"type": "function", **tool}
    return {"type": "function", "function": {key: value for key, value in tool.items() if (key, value) != ("type", "function")}}
