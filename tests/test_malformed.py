"""Malformed data files: what `tuneloom data check` says of each, row by row; none is a traceback, a hang or a full memory."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROOT, chat_row
from helpers import assert_mendable
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tuneloom.config import SourceConfig, parse_config
from tuneloom.data.check import check_data
from tuneloom.data.conversations import ConversationReader
from tuneloom.data.formats import parse_row
from tuneloom.data.prepare import prepare_data
from tuneloom.data.read import SUFFIXES, read_rows
from tuneloom.data.render import Renderer
from tuneloom.data.report import DataReport
from tuneloom.errors import UserError
from tuneloom.types import Message

Dropped = tuple[int, str, str]
"""Line, field and reason of a row that is dropped."""


@dataclass(frozen=True)
class Case:
    """A data file, and the whole report of it.

    Attributes:
        says: what is wrong with it, in a sentence.
        name: of the file.
        content: its bytes, or what writes it.
        dropped: all rows that are dropped, in order.
        usable: how many rows are.
        refused: `what` of the error where the file is refused as a whole.
    """

    says: str
    name: str
    content: bytes | Callable[[Path], object]
    dropped: Sequence[Dropped] = ()
    usable: int = 0
    refused: str = ""

    def write(self, folder: Path) -> Path:
        file = folder / self.name
        if isinstance(self.content, bytes):
            file.write_bytes(self.content)
        else:
            self.content(file)
        return file


def text_of(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def lines(*rows: object) -> bytes:
    """Rows as lines; text is a line as it is."""
    return "".join((row if isinstance(row, str) else text_of(row)) + "\n" for row in rows).encode()


OK = chat_row("q", "a")
QA = text_of(OK)
ZH = text_of(chat_row("你是谁？", "我是小织，很高兴认识你。"))
LATIN = text_of(chat_row("Où est le café?", "À côté de l'école, près du théâtre."))

# Rows: each is a line between two good ones, so the fault has to be told of line 2, and 2 rows are usable.

NO_TEXT = "not text"
UNKNOWN_ROLE = "unknown role"
NO_LIST = "not a list of messages"
HALF = "holds half a character (a lone surrogate)"
NUL = "holds a NUL byte"
NO_QUESTION = "does not start with a user message"


def turns(*said: tuple[str, object], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, object]]:
    return [dict(zip(keys, pair, strict=True)) for pair in said]


def openai(*said: tuple[str, object], **more: object) -> dict[str, object]:
    """A row of OpenAI messages; `more` goes into the last message."""
    messages = turns(*said)
    messages[-1].update(more)
    return {"messages": messages}


def sharegpt(*said: tuple[str, object], **more: object) -> dict[str, object]:
    return {"conversations": turns(*said, keys=("from", "value")), **more}


def chatglm3(**tool: object) -> dict[str, object]:
    """A row with a tool turn."""
    whole = {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": "sun", **tool}
    return {"conversations": [*turns(("user", "q")), whole, *turns(("assistant", "a"))]}


def xtuner(**turn: object) -> dict[str, object]:
    return {"conversation": [{"input": "q", "output": "a", **turn}]}


def alpaca(**columns: object) -> dict[str, object]:
    return {"instruction": "q", "output": "a", **columns}


def completion(**columns: object) -> dict[str, object]:
    return {"prompt": "q", "completion": "a", **columns}


def call(**changes: object) -> dict[str, object]:
    return openai(("user", "q"), ("assistant", None), tool_calls=[{"function": {"name": "f", "arguments": {}, **changes}}])


def tools(value: object) -> dict[str, object]:
    return {**OK, "tools": value}


ASKED, ANSWERED = ("user", "q"), ("assistant", "a")
CALL = "messages[1].tool_calls[0].function"
TRUE_CALL = {"name": "f", "arguments": {}}

BAD_ROWS: list[tuple[str, object, str, str]] = [
    ("a row is a list", [OK], "row", "not a map"),
    ("a row is a text", '"q and a"', "row", "not a map"),
    ("a row is null", "null", "row", "not a map"),
    ("a row is an empty map", {}, "row", "no known format"),
    ("a row has columns of unknown names", {"question": "q", "answer": "a"}, "row", "no known format"),
    ("a row of preferences has no completion", {"prompt": "q", "chosen": "a", "rejected": "b"}, "row", "no known format"),
    # OpenAI messages
    ("messages are an empty list", {"messages": []}, "messages", NO_LIST),
    ("messages are JSON text of a map", {"messages": "{}"}, "messages", NO_LIST),
    ("messages are torn JSON text", {"messages": '[{"role": "user"'}, "messages", "not JSON"),
    ("messages are a list in a list", {"messages": [turns(ASKED, ANSWERED)]}, "messages[0]", "not a message"),
    ("a message is a text", {"messages": ["q", "a"]}, "messages[0]", "not a message"),
    ("the second message is null", {"messages": [*turns(ASKED), None]}, "messages[1]", "not a message"),
    ("a message has no role", {"messages": [{"content": "q"}, *turns(ANSWERED)]}, "messages[0].role", UNKNOWN_ROLE),
    ("a role is unknown", openai(ASKED, ("narrator", "a")), "messages[1].role", UNKNOWN_ROLE),
    ("a role is in capitals", openai(("User", "q"), ANSWERED), "messages[0].role", UNKNOWN_ROLE),
    ("a role has a blank behind it", openai(("user ", "q"), ANSWERED), "messages[0].role", UNKNOWN_ROLE),
    ("a role is empty", openai(("", "q"), ANSWERED), "messages[0].role", UNKNOWN_ROLE),
    ("a message has no content", {"messages": [*turns(ASKED), {"role": "assistant"}]}, "messages[1].content", "no text"),
    ("a part of the content is an image", openai(ASKED, ("assistant", [{"type": "text", "text": "a"}, {"type": "image_url"}])),
     "messages[1].content[1].type", "a part that is not text"),
    ("a message of OpenAI has a value instead of content",
     {"messages": [{"role": "user", "value": "q"}]}, "messages[0].content", "no text"),
    ("a weight is 2", openai(ASKED, ANSWERED, weight=2), "messages[1].weight", "wrong weight"),
    ("a weight is a half", openai(ASKED, ANSWERED, weight=0.5), "messages[1].weight", "wrong weight"),
    ("a weight is below 0", openai(ASKED, ANSWERED, weight=-1), "messages[1].weight", "wrong weight"),
    ("a weight is a flag", openai(ASKED, ANSWERED, weight=False), "messages[1].weight", "wrong weight"),
    ("a weight is a text", openai(ASKED, ANSWERED, weight="1"), "messages[1].weight", "wrong weight"),
    ("a weight is a list", openai(ASKED, ANSWERED, weight=[1]), "messages[1].weight", "wrong weight"),
    ("a weight is NaN", openai(ASKED, ANSWERED, weight=float("nan")), "messages[1].weight", "wrong weight"),
    ("every answer has weight 0", openai(ASKED, ANSWERED, weight=0), "weight", "every answer has weight 0"),
    ("there is no answer", openai(ASKED), "row", "no answer"),
    ("there are only questions", openai(ASKED, ASKED), "row", "no answer"),
    ("there is a system message only", openai(("system", "s")), "row", "no answer"),
    ("an answer is empty", openai(ASKED, ("assistant", "")), "messages[1].content", "empty answer"),
    ("an answer is blanks", openai(ASKED, ("assistant", " \n\t\u3000")), "messages[1].content", "empty answer"),
    ("the first of two answers is empty", openai(ASKED, ("assistant", ""), ASKED, ANSWERED),
     "messages[1].content", "empty answer"),
    ("the answer comes first", openai(ANSWERED, ASKED, ANSWERED), "message 1", NO_QUESTION),
    ("the answer follows the system message", openai(("system", "s"), ANSWERED), "message 2", NO_QUESTION),
    ("a tool's result comes first", openai(("tool", "t"), ANSWERED), "message 1", NO_QUESTION),
    ("two questions follow each other", openai(ASKED, ASKED, ANSWERED), "message 2", "two user messages in a row"),
    ("two answers follow each other", openai(ASKED, ANSWERED, ANSWERED), "message 3", "two assistant messages in a row"),
    ("a system message comes late", openai(ASKED, ("system", "s"), ANSWERED), "message 2", "system message not first"),
    ("there are two system messages",
     openai(("system", "s"), ("system", "t"), ASKED, ANSWERED), "message 2", "system message not first"),
    # tool calls
    ("tool calls are a map", openai(ASKED, ANSWERED, tool_calls=TRUE_CALL),
     "messages[1].tool_calls", "not a list of tool calls"),
    ("a tool call is a text", openai(ASKED, ANSWERED, tool_calls=["f()"]), "messages[1].tool_calls[0]", "not a tool call"),
    ("a tool call is null", openai(ASKED, ANSWERED, tool_calls=[None]), "messages[1].tool_calls[0]", "not a tool call"),
    ("a tool call is empty", openai(ASKED, ANSWERED, tool_calls=[{}]), "messages[1].tool_calls[0]", "not a tool call"),
    ("a tool call's function is a text", openai(ASKED, ANSWERED, tool_calls=[{"function": "f"}]), CALL, "not a tool call"),
    ("a tool call has no name", openai(ASKED, ANSWERED, tool_calls=[{"function": {"arguments": {}}}]), f"{CALL}.name", NO_TEXT),
    ("a tool call's name is blanks", call(name=" "), f"{CALL}.name", "an empty name"),
    ("a tool call's name is a number", call(name=3), f"{CALL}.name", NO_TEXT),
    ("a tool call's arguments are no JSON", call(arguments="city=Berlin"), f"{CALL}.arguments", "not JSON"),
    ("a tool call's arguments are a list", call(arguments=["Berlin"]), f"{CALL}.arguments", "not a map of arguments"),
    ("a tool call's arguments are JSON text of a number", call(arguments="3"), f"{CALL}.arguments", "not a map of arguments"),
    ("a tool call's arguments hold NaN", call(arguments={"x": float("nan")}), f"{CALL}.arguments", "cannot be written as JSON"),
    ("a tool call's arguments are JSON text with Infinity",
     call(arguments='{"x": Infinity}'), f"{CALL}.arguments", "cannot be written as JSON"),
    ("a tool call's arguments hold a NUL", call(arguments={"x": ["a\0"]}), f"{CALL}.arguments", NUL),
    ("a name in a tool call's arguments holds a NUL", call(arguments={"x\0": 1}), f"{CALL}.arguments", NUL),
    ("a tool call's arguments are JSON text with a NUL escape", call(arguments=r'{"x": "\\\u0000"}'), f"{CALL}.arguments", NUL),
    ("a tool call's id is a number",
     openai(ASKED, ANSWERED, tool_calls=[{"id": 3, "function": TRUE_CALL}]), "messages[1].tool_calls[0].id", NO_TEXT),
    ("a user calls a tool",
     openai(ASKED, tool_calls=[TRUE_CALL]), "messages[0].role", "a tool call by another than the assistant"),
    ("an older function_call is a text",
     openai(ASKED, ANSWERED, function_call="f()"), "messages[1].function_call", "not a tool call"),
    ("a tool's result has a number as id",
     openai(ASKED, ("tool", "t"), tool_call_id=7), "messages[1].tool_call_id", NO_TEXT),
    # tools
    ("tools are a number", tools(3), "tools", "not a list of tools"),
    ("tools are 0", tools(0), "tools", "not a list of tools"),
    ("tools are false", tools(False), "tools", "not a list of tools"),
    ("tools are one map", tools({"name": "f"}), "tools", "not a list of tools"),
    ("tools are plain text", tools("weather"), "tools", "not JSON"),
    ("a tool is a text", tools(["weather"]), "tools", "not a list of tools"),
    ("a tool has no name", tools([{"description": "d"}]), "tools[0]", "a tool without a name"),
    ("the second tool's name is blanks", tools([{"name": "f"}, {"name": " "}]), "tools[1]", "a tool without a name"),
    ("a tool's parameters hold NaN", tools([{"name": "f", "parameters": float("nan")}]), "tools", "cannot be written as JSON"),
    ("a tool's description holds a NUL", tools([{"name": "f", "description": "d\0"}]), "tools", NUL),
    ("a tool's description ends in half a character",
     QA[:-1] + r', "tools": [{"name": "f", "description": "\ud83d"}]}', "tools", HALF),
    # ShareGPT
    ("ShareGPT conversations are empty", sharegpt(), "conversations", NO_LIST),
    ("a speaker of ShareGPT is unknown", sharegpt(("human", "q"), ("robot", "a")), "conversations[1].from", UNKNOWN_ROLE),
    ("the first turn of ShareGPT has no speaker",
     {"conversations": [{"value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations[0].from", UNKNOWN_ROLE),
    ("a turn of ShareGPT has content instead of a value",
     {"conversations": [{"from": "human", "content": "q"}]}, "conversations[0].value", "no text"),
    ("an answer of ShareGPT is empty", sharegpt(("human", "q"), ("gpt", "")), "conversations[1].value", "empty answer"),
    ("ShareGPT begins with the answer", sharegpt(("gpt", "a"), ("human", "q"), ("gpt", "a")), "message 1", NO_QUESTION),
    ("a function_call of ShareGPT is plain text",
     sharegpt(("human", "q"), ("function_call", "f()")), "conversations[1].value", "not JSON"),
    ("a function_call of ShareGPT is an empty list",
     sharegpt(("human", "q"), ("function_call", "[]")), "conversations[1].value", "not a tool call"),
    ("a function_call of ShareGPT has no name",
     sharegpt(("human", "q"), ("function_call", '{"arguments": {}}')), "conversations[1].value", "not a tool call"),
    ("ShareGPT has two system messages",
     sharegpt(("system", "s"), ("human", "q"), ("gpt", "a"), system="s"), "message 2", "system message not first"),
    # ChatGLM3 with tools
    ("a tool of ChatGLM3 has no name", chatglm3(name=None), "conversations[1].name", NO_TEXT),
    ("a tool of ChatGLM3 has a blank name", chatglm3(name=" "), "conversations[1].name", "an empty name"),
    ("parameters of ChatGLM3 are no JSON", chatglm3(parameters="city=北京"), "conversations[1].parameters", "not JSON"),
    ("parameters of ChatGLM3 are a list", chatglm3(parameters=[1]), "conversations[1].parameters", "not a map of arguments"),
    ("an observation of ChatGLM3 is null", chatglm3(observation=None), "conversations[1].observation", NO_TEXT),
    ("an observation of ChatGLM3 is a number", chatglm3(observation=23), "conversations[1].observation", NO_TEXT),
    ("an observation of ChatGLM3 holds NaN",
     chatglm3(observation=[float("nan")]), "conversations[1].observation", "cannot be written as JSON"),
    ("an observation of ChatGLM3 holds a NUL", chatglm3(observation=["a\0"]), "conversations[1].observation", NUL),
    ("a tool of ChatGLM3 has a wrong weight", chatglm3(weight=3), "conversations[1].weight", "wrong weight"),
    ("ChatGLM3 begins with a tool",
     {"conversations": chatglm3()["conversations"][1:]}, "message 1", NO_QUESTION),  # type: ignore[index]
    # XTuner
    ("an XTuner conversation is empty", {"conversation": []}, "conversation", "not a list of turns"),
    ("an XTuner conversation is a map", {"conversation": {}}, "conversation", "not a list of turns"),
    ("an XTuner turn is a text", {"conversation": ["q"]}, "conversation[0]", "not a turn"),
    ("an XTuner turn has no output", {"conversation": [{"input": "q"}]}, "conversation[0]", "not a turn"),
    ("an XTuner output is empty", xtuner(output=""), "conversation[0].output", "empty answer"),
    ("the second XTuner turn has a system message",
     {"conversation": [{"input": "q", "output": "a"}, {"system": "s", "input": "q", "output": "a"}]},
     "conversation[1].system", "system message not first"),
    # Alpaca
    ("an Alpaca row has no output", {"instruction": "q"}, "output", "no answer"),
    ("an Alpaca output is empty", alpaca(output=""), "output", "empty answer"),
    ("an Alpaca input is 0", alpaca(input=0), "input", NO_TEXT),
    ("an Alpaca history is a map", alpaca(history={}), "history", "not a list"),
    ("an Alpaca history is 0", alpaca(history=0), "history", "not a list"),
    ("an Alpaca history is plain text", alpaca(history="earlier"), "history", "not JSON"),
    ("an Alpaca history is of texts", alpaca(history=["q", "a"]), "history[0]", "not a pair"),
    ("an Alpaca history has three texts", alpaca(history=[["q", "a"], ["q", "a", "b"]]), "history[1]", "not a pair"),
    ("an Alpaca history has a number", alpaca(history=[["q", 3]]), "history[0][1]", NO_TEXT),
    ("an Alpaca history has an empty answer", alpaca(history=[["q", ""]]), "history[0][1]", "empty answer"),
    # prompt and completion
    ("a completion is empty", completion(completion=""), "completion", "empty answer"),
    ("a completion is a list, the prompt a text", completion(completion=turns(ANSWERED)), "completion", NO_TEXT),
    ("a prompt is a list, the completion a text", completion(prompt=turns(ASKED)), "completion", NO_LIST),
    ("a completion is of no messages", completion(prompt=turns(ASKED), completion=[]), "completion", NO_LIST),
    ("a completion has no answer", completion(prompt=turns(ASKED), completion=turns(ASKED)), "completion", "no answer"),
    ("every answer of a completion has weight 0",
     completion(prompt=turns(ASKED), completion=[{"role": "assistant", "content": "a", "weight": 0}]),
     "weight", "every answer has weight 0"),
    ("prompt and completion both begin with questions",
     completion(prompt=turns(ASKED), completion=turns(ASKED, ANSWERED)), "message 2", "two user messages in a row"),
    ("a message of a prompt has no role", completion(prompt=[{"content": "q"}], completion=turns(ANSWERED)),
     "prompt[0].role", UNKNOWN_ROLE),
    # characters and JSON
    ("an answer holds a NUL escape", r'{"prompt": "q", "completion": "a\u0000"}', "completion", NUL),
    ("an answer holds a raw NUL", '{"prompt": "q", "completion": "a\0"}', "row", "not valid JSON"),
    ("a text holds a raw tab", '{"prompt": "q\t", "completion": "a"}', "row", "not valid JSON"),
    ("a text ends in half a character", r'{"prompt": "q\ud83d", "completion": "a"}', "prompt", HALF),
    ("a text holds the halves in the wrong order", r'{"prompt": "q", "completion": "\ude42\ud83d"}',
     "completion", HALF),
    ("an escape is cut short", r'{"prompt": "q\u12", "completion": "a"}', "row", "not valid JSON"),
    ("an escape is unknown", r'{"prompt": "C:\dir", "completion": "a"}', "row", "not valid JSON"),
    ("a text is NaN", '{"prompt": NaN, "completion": "a"}', "prompt", NO_TEXT),
    ("a text is minus Infinity", '{"prompt": -Infinity, "completion": "a"}', "prompt", NO_TEXT),
    ("a number has 5,000 digits", f'{{"prompt": {"7" * 5000}, "completion": "a"}}', "row", "a number too long"),
    ("a number overflows", '{"prompt": 1e999, "completion": "a"}', "prompt", NO_TEXT),
    ("a row has a key twice", '{"prompt": "q", "completion": "a", "prompt": "q2"}', "row", "a key twice in one map"),
    ("a message has a key twice", '{"messages": [{"role": "user", "role": "assistant"}]}', "row", "a key twice in one map"),
    ("quotes are single", "{'prompt': 'q', 'completion': 'a'}", "row", "not valid JSON"),
    ("a comment stands behind the row", QA + " // the best", "row", "not valid JSON"),
    ("a line is a comment", "# questions", "row", "not valid JSON"),
    ("a comma trails in a map", QA[:-1] + ",}", "row", "not valid JSON"),
    ("a comma trails behind the row", QA + ",", "row", "not valid JSON"),
    ("a comma is missing", '{"prompt": "q" "completion": "a"}', "row", "not valid JSON"),
    ("two rows share a line", QA + QA, "row", "not valid JSON"),
    ("keys have no quotes", '{prompt: "q", completion: "a"}', "row", "not valid JSON"),
    ("words are Python's", '{"prompt": None, "completion": "a"}', "row", "not valid JSON"),
    ("a row is torn in a text", QA[:-10], "row", "not valid JSON"),
    ("a row is torn after a colon", QA[: QA.index(":") + 1], "row", "not valid JSON"),
    ("a row is nested 10,000 lists deep", "[" * 10_000 + "]" * 10_000, "row", "nested too deep"),
    ("a row is nested 100,000 maps deep", '{"messages":' * 100_000 + "1" + "}" * 100_000, "row", "nested too deep"),
    ("a row opens 100,000 lists and closes none", "[" * 100_000, "row", "nested too deep"),
]  # fmt: skip

WRONG_TYPES: list[tuple[str, Callable[[Any], dict[str, object]], str, str]] = [
    ("an OpenAI role", lambda x: {"messages": [{"role": x, "content": "q"}]}, "messages[0].role", UNKNOWN_ROLE),
    ("an OpenAI content", lambda x: openai(("user", x), ANSWERED), "messages[0].content", NO_TEXT),
    ("OpenAI messages", lambda x: {"messages": x}, "messages", NO_LIST),
    ("a ShareGPT speaker", lambda x: {"conversations": [{"from": x, "value": "q"}]}, "conversations[0].from", UNKNOWN_ROLE),
    ("a ShareGPT value", lambda x: sharegpt(("human", "q"), ("gpt", x)), "conversations[1].value", NO_TEXT),
    ("ShareGPT or ChatGLM3 conversations", lambda x: {"conversations": x}, "conversations", NO_LIST),
    ("a ChatGLM3 content", lambda x: {"conversations": turns(ASKED, ("assistant", x))}, "conversations[1].content", NO_TEXT),
    ("a ChatGLM3 tool's name", lambda x: chatglm3(name=x), "conversations[1].name", NO_TEXT),
    ("an XTuner conversation", lambda x: {"conversation": x}, "conversation", "not a list of turns"),
    ("an XTuner input", lambda x: xtuner(input=x), "conversation[0].input", NO_TEXT),
    ("an XTuner output", lambda x: xtuner(output=x), "conversation[0].output", NO_TEXT),
    ("an Alpaca instruction", lambda x: alpaca(instruction=x), "instruction", NO_TEXT),
    ("an Alpaca output", lambda x: alpaca(output=x), "output", NO_TEXT),
    ("an Alpaca history's question", lambda x: alpaca(history=[[x, "a"]]), "history[0][0]", NO_TEXT),
    ("a completion", lambda x: completion(completion=x), "completion", NO_TEXT),
]
NULL_IS_ABSENT: list[tuple[str, Callable[[Any], dict[str, object]], str, str]] = [
    ("an XTuner system", lambda x: xtuner(system=x), "conversation[0].system", NO_TEXT),
    ("an Alpaca system", lambda x: alpaca(system=x), "system", NO_TEXT),
    ("an Alpaca input", lambda x: alpaca(input=x), "input", NO_TEXT),
    ("a ShareGPT system", lambda x: sharegpt(("human", "q"), ("gpt", "a"), system=x), "system", NO_TEXT),
    ("a tool's name in its result", lambda x: openai(ASKED, ("tool", "t"), name=x), "messages[1].name", NO_TEXT),
]
WRONG: list[object] = [3, 0, 1.5, True, False, {"text": "q"}]


def wrong_types(says: str, row: Callable[[Any], dict[str, object]], field: str, reason: str, *more: object) -> Case:
    """A line of each type that the field cannot have."""
    values = [*WRONG, *more]
    dropped = [(i, field, reason) for i in range(1, len(values) + 1)]
    return Case(f"{says} is of a wrong type", "rows.jsonl", lines(*map(row, values), OK), dropped, 1)


ROWS = [
    *(Case(says, "rows.jsonl", lines(OK, row, OK), [(2, field, reason)], 2) for says, row, field, reason in BAD_ROWS),
    *(wrong_types(*case, None) for case in WRONG_TYPES),
    *(wrong_types(*case, ["q"]) for case in NULL_IS_ABSENT),
]

# Encodings.

CUT = f"{ZH}\n{ZH}".encode()[:-12]
NO_ENCODING = "the data file is in no known encoding"
BROKEN_BYTES = "holds bytes that are not UTF-8"

ENCODINGS = [
    Case("UTF-16 with a mark", "rows.jsonl", lines(OK, OK).decode().encode("utf-16"), refused=NO_ENCODING),
    Case("UTF-16 of the other order", "rows.json", b"\xfe\xff" + QA.encode("utf-16-be"), refused=NO_ENCODING),
    Case("UTF-16 without a mark", "rows.jsonl", f"{QA}\n{QA}\n".encode("utf-16-le"), refused=NO_ENCODING),
    Case("UTF-16 of the other order without a mark", "rows.jsonl", f"{QA}\n".encode("utf-16-be"), refused=NO_ENCODING),
    Case("Chinese in UTF-16 without a mark", "rows.jsonl", f"{ZH}\n".encode("utf-16-le"), refused=NO_ENCODING),
    Case("csv in UTF-16 without a mark", "rows.csv", "prompt,completion\nq,a\n".encode("utf-16-le"), refused=NO_ENCODING),
    Case("UTF-32 with a mark", "rows.jsonl", QA.encode("utf-32"), refused=NO_ENCODING),
    Case("UTF-32 without a mark", "rows.jsonl", QA.encode("utf-32-le"), refused=NO_ENCODING),
    Case("nothing but NULs", "rows.jsonl", b"\0" * 5000, refused=NO_ENCODING),
    Case("a file that a crash filled up with NULs", "rows.jsonl", lines(OK) + b"\0" * 4096, refused=NO_ENCODING),
    Case("French in Latin-1", "rows.jsonl", f"{LATIN}\n{LATIN}\n".encode("latin-1"), refused=NO_ENCODING),
    Case("Latin-1 that could be read as rare Chinese characters", "rows.jsonl",
         text_of(chat_row("été", "préféré, étonné")).encode("latin-1"), refused=NO_ENCODING),
    Case("Russian in Windows-1251", "rows.jsonl", text_of(chat_row("Кто ты?", "Я помощник.")).encode("cp1251"),
         refused=NO_ENCODING),
    Case("GB18030", "rows.jsonl", f"{ZH}\n{QA}\n{ZH}\n".encode("gb18030"), usable=3),
    Case("GB18030 with an emoji and rare characters", "rows.json",
         f"[{ZH}, {text_of(chat_row('你好🎵', '𠮷野家在这里'))}]".encode("gb18030"), usable=2),
    Case("GB18030 in csv", "rows.csv", "prompt,completion\n你是谁？,我是小织。\n".encode("gb18030"), usable=1),
    Case("GB18030 in a dialogue", "rows.txt", "用户：你是谁？\n助手：我是小织。\n".encode("gb18030"), usable=1),
    Case("a few broken bytes in Chinese UTF-8", "rows.jsonl",
         lines(ZH, ZH).replace("我".encode(), "我".encode()[:2], 1) + lines(ZH, ZH, ZH, ZH),
         [(1, "messages[1].content", BROKEN_BYTES)], 5),
    Case("a few broken bytes in English UTF-8", "rows.jsonl",
         lines(*[OK] * 50) + b'{"prompt": "a \x93quoted\x94 word", "completion": "a"}\n' + lines(OK),
         [(51, "prompt", BROKEN_BYTES)], 51),
    Case("broken bytes in a column that is not used", "rows.jsonl",
         lines(*[ZH] * 4) + b'{"id": "\xff", "prompt": "q", "completion": "a"}\n', usable=5),
    Case("a broken byte outside a text", "rows.jsonl", lines(ZH, ZH) + b'\xff{"prompt": "q"}\n' + lines(ZH),
         [(3, "row", "not valid JSON")], 3),
    Case("a UTF-8 file cut inside a character", "rows.jsonl", CUT, [(2, "row", "not valid JSON")], 1),
    Case("a plain file cut inside its only wide character", "rows.txt", b"User: q\nAssistant: fine\xe2\x80",
         [(1, "messages[1].content", BROKEN_BYTES)]),
    Case("UTF-8 with a byte order mark", "rows.jsonl", b"\xef\xbb\xbf" + lines(OK, OK), usable=2),
    Case("two byte order marks", "rows.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf" + lines(OK, OK), usable=2),
    Case("a byte order mark where two files were joined", "rows.jsonl",
         b"\xef\xbb\xbf" + lines(OK) + b"\xef\xbb\xbf" + lines(OK, OK), usable=3),
    Case("a byte order mark inside an array", "rows.json", f"[{QA},\n\ufeff{QA}]".encode(), usable=2),
    Case("a byte order mark and nothing else", "rows.jsonl", b"\xef\xbb\xbf", refused="the data file is empty"),
    Case("a byte order mark in csv", "rows.csv", b"\xef\xbb\xbfprompt,completion\nq,a\n", usable=1),
    Case("UTF-8 of surrogates", "rows.jsonl",
         QA.encode() + b'\n{"prompt": "\xed\xa0\x80", "completion": "a"}\n' + lines(*[ZH] * 4),
         [(2, "prompt", BROKEN_BYTES)], 5),
]  # fmt: skip

# JSON as a whole.

PRETTY = json.dumps([OK, OK, OK], indent=2, ensure_ascii=False)
ONE = json.dumps(OK, indent=2)
OPEN = "the array is not closed"
TORN = "not valid JSON"


def pretty(change: Callable[[str], str], which: int = 1) -> bytes:
    """Three pretty-printed rows, 15 lines each from line 2 on, of which one is changed."""
    parts = ["\n".join("  " + line for line in ONE.splitlines())] * 3
    parts[which] = change(parts[which])
    return ("[\n" + ",\n".join(parts) + "\n]\n").encode()


def without(text: str, count: int = 1) -> Callable[[str], str]:
    return lambda row: row.replace(text, "", count)


HEIGHT = len(ONE.splitlines())
SECOND = 2 + HEIGHT

JSON_FILES = [
    Case("an array without its end", "rows.json", f"[\n{QA},\n{QA}\n".encode(), [(4, "file", OPEN)], 2),
    Case("an array that ends after a comma", "rows.json", f"[\n{QA},\n".encode(), [(3, "file", OPEN)], 1),
    Case("an array torn in its last text", "rows.json", f"[\n{QA},\n{QA[:-20]}".encode(), [(3, "row", TORN)], 1),
    Case("an array torn in a pretty-printed row", "rows.json", PRETTY[: -len(PRETTY) // 4].encode(),
         [(SECOND + HEIGHT, "row", TORN)], 2),
    Case("an array that is its opening bracket", "rows.json", b"[", [(1, "file", OPEN)]),
    Case("an empty array", "rows.json", b"[]"),
    Case("an array of commas", "rows.json", b"[,,,]"),
    Case("a broken element between good ones", "rows.json", f'[{QA},\n{{"prompt": q}},\n{QA}]'.encode(), [(2, "row", TORN)], 2),
    Case("a broken element on the line of good ones", "rows.json", f'[{QA}, {{"prompt": q}}, {QA}]'.encode(),
         [(1, "row", TORN)], 2),
    Case("elements that are no maps", "rows.json", f'[{QA}, 3, "q", null, true, [1], {QA}]'.encode(),
         [(1, "row", "not a map")] * 5, 2),
    Case("no comma between elements", "rows.json", f"[{QA}\n{QA}]".encode(), usable=2),
    Case("a comma after the last element", "rows.json", f"[{QA},\n{QA},\n]".encode(), usable=2),
    Case("no comma inside a pretty-printed row", "rows.json", pretty(without(",")), [(SECOND, "row", TORN)], 2),
    Case("a comma trailing inside a pretty-printed row", "rows.json", pretty(lambda row: row.replace('"a"', '"a",')),
         [(SECOND, "row", TORN)], 2),
    Case("a text without its end in a pretty-printed row", "rows.json", pretty(lambda row: row.replace('"q"', '"q')),
         [(SECOND, "row", TORN)], 2),
    Case("a text without its beginning in a pretty-printed row", "rows.json", pretty(lambda row: row.replace('"q"', 'q"')),
         [(SECOND, "row", TORN)], 2),
    Case("a backslash before the end of a pretty-printed text", "rows.json", pretty(lambda row: row.replace('"q"', '"q\\"')),
         [(SECOND, "row", TORN)], 2),
    Case("a pretty-printed row without its closing brackets", "rows.json", pretty(lambda row: row[: row.index("]")]),
         [(SECOND, "row", TORN)], 2),
    Case("a pretty-printed row torn after a colon", "rows.json", pretty(lambda row: row[: row.index(":") + 1]),
         [(SECOND, "row", TORN)], 2),
    Case("a pretty-printed row with a bracket too many", "rows.json", pretty(lambda row: row + "}"),
         [(SECOND + HEIGHT - 1, "row", TORN)], 3),
    Case("the first pretty-printed row torn", "rows.json", pretty(lambda row: row[: row.index('"q"')], 0),
         [(2, "row", TORN)], 2),
    Case("single quotes in a pretty-printed row", "rows.json", pretty(lambda row: row.replace('"', "'")),
         [(SECOND, "row", TORN)], 2),
    Case("a comment in a pretty-printed row", "rows.json", pretty(lambda row: row.replace('"q"', '"q" // why {')),
         [(SECOND, "row", TORN)], 2),
    Case("a comment between elements", "rows.json", f"[\n{QA},\n// one more, and {{another}}\n{QA}]".encode(),
         [(3, "row", TORN)], 2),
    Case("words between elements", "rows.json", f"[\n{QA},\nand one more\n{QA}]".encode(), [(3, "row", TORN)], 2),
    Case("a raw NUL in an array", "rows.json", f'[{ZH}, {{"prompt": "\0"}}, {ZH}]'.encode(), [(1, "row", TORN)], 2),
    Case("a key twice in an array", "rows.json", f'[{QA}, {{"prompt": "q", "prompt": "q"}}, {QA}]'.encode(),
         [(1, "row", "a key twice in one map")], 2),
    Case("a number of 5,000 digits in an array", "rows.json", f'[{QA}, {{"prompt": {"7" * 5000}}}, {QA}]'.encode(),
         [(1, "row", "a number too long")], 2),
    Case("an element nested 10,000 deep", "rows.json", f"[{QA},\n{'[' * 10_000}{']' * 10_000},\n{QA}]".encode(),
         [(2, "row", "nested too deep")], 2),
    Case("an element nested 100,000 deep", "rows.json", f"""[{QA},\n{'{"a":' * 100_000}1{'}' * 100_000},\n{QA}]""".encode(),
         [(2, "row", "nested too deep")], 2),
    Case("an array nested 100,000 deep that never ends", "rows.json", b"[" * 100_000, [(1, "row", "nested too deep")]),
    Case("200,000 brackets that close nothing", "rows.json", b"[" + b"}" * 200_000 + f", {QA}]".encode(),
         [(1, "row", TORN)], 1),
    Case("100,000 open maps and lists that open and close", "rows.json",
         b"[" + b'{"a":' * 100_000 + b"[],[]," * 50_000, [(1, "row", "nested too deep")]),
    Case("500 rows torn after their first bracket", "rows.json", b"[\n" + b'{"messages": [\n' * 500 + b"]",
         [(line, "row", TORN) for line in range(2, 502)]),
    Case("text after the array", "rows.json", f"[{QA}]\nthe end\n".encode(),
         [(2, "file", "text after the end of the array")], 1),
    Case("an array after the array", "rows.json", f"[{QA}]\n[{QA}]\n".encode(),
         [(2, "file", "text after the end of the array")], 1),
    Case("a bracket too many after the array", "rows.json", f"[{QA}]]".encode(),
         [(1, "file", "text after the end of the array")], 1),
    Case("rows under data", "rows.json", f'{{"data": [{QA}, {QA}]}}'.encode(), usable=2),
    Case("rows under data, and more beside them", "rows.json", f'{{"data": [{QA}],\n"version": 1}}'.encode(),
         [(2, "file", "text after the end of the array")], 1),
    Case("rows under data without an end", "rows.json", f'{{"data": [{QA}'.encode(), [(1, "file", OPEN)], 1),
    Case("rows under an unknown name", "rows.json", f'{{"all": [{QA}]}}'.encode(), [(1, "row", "no known format")]),
    Case("pretty-printed objects one after another", "rows.json", f"{ONE}\n{ONE}\n".encode(), usable=2),
    Case("pretty-printed objects, the first torn", "rows.json", f"{ONE[:40]}\n{ONE}\n{ONE}".encode(), [(1, "row", TORN)], 2),
    Case("lines in a .json file", "rows.json", lines(OK, OK), usable=2),
    Case("lines in a .json file, the first torn in a text", "rows.json", lines(QA[:-8], OK, OK), [(1, "row", TORN)], 2),
    Case("lines in a .json file, the first torn after a colon", "rows.json", lines(QA[:13], OK, OK), [(1, "row", TORN)], 2),
    Case("lines in a .json file, the second torn", "rows.json", lines(OK, QA[:-8], OK), [(2, "row", TORN)], 2),
    Case("one line in a .json file", "rows.json", QA.encode(), usable=1),
    Case("a .json file that is a number", "rows.json", b"3", [(1, "row", "not a map")]),
    Case("a .json file that is words", "rows.json", b"no data yet\n", [(1, "row", TORN)]),
    Case("an array in a .jsonl file", "rows.jsonl", f"[{QA}, {QA}]\n".encode(), usable=2),
    Case("a pretty-printed array in a .jsonl file", "rows.jsonl", PRETTY.encode(), usable=3),
    Case("pretty-printed objects in a .jsonl file", "rows.jsonl", f"{ONE}\n{ONE}\n".encode(), usable=2),
    Case("a first line that is a list, and lines after it", "rows.jsonl", lines([OK], OK, OK), [(1, "row", "not a map")], 2),
    Case("lines of formats that differ", "rows.jsonl",
         lines(OK, alpaca(), completion(), xtuner(), sharegpt(("human", "q"), ("gpt", "a")),
         {"conversations": turns(ASKED, ANSWERED)}, {"text": "q"}),
         [(7, "row", "no known format")], 6),
    Case("lines that end as on other systems", "rows.jsonl", f"{QA}\r\n\r\n{QA}\r\n".encode(), usable=2),
    Case("control characters in escapes", "rows.jsonl", rb'{"prompt": "\u0007\u001b[1m", "completion": "\u007f a"}', usable=1),
    Case("a tool call that the chat template does not write", "rows.jsonl", lines(OK, chatglm3(), OK),
         [(2, "message 2.tool_calls", "the chat template does not write tool calls")], 2),
    Case("messages after the last answer", "rows.jsonl", lines(openai(ASKED, ANSWERED, ASKED)), usable=1),
]  # fmt: skip

# Files that are none, or empty.

FILES = [
    *(Case(f"an empty {suffix} file", f"rows{suffix}", b"", refused="the data file is empty")
      for suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt")),
    *(Case(f"a {suffix} file of blanks", f"rows{suffix}", b" \n\t\r\n\n", refused="the data file is empty")
      for suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt")),
    Case("a folder named as a file", "rows.jsonl", Path.mkdir, refused="the data folder has no data files"),
    Case("a file of another kind", "rows.xlsx", b"PK\3\4", refused="unknown kind of data file"),
    Case("an archive named as lines", "rows.jsonl", b"\x1f\x8b\x08" + bytes(range(256)) * 20, refused=NO_ENCODING),
]  # fmt: skip

# csv and tsv.

CSV = [
    Case("csv of other columns", "rows.csv", b"question,answer\nq,a\n", [(2, "row", "no known format")]),
    Case("csv without a header", "rows.csv", b"q,a\nq2,a2\n", [(2, "row", "no known format")]),
    Case("csv with a header only", "rows.csv", b"prompt,completion\n"),
    Case("csv with an empty header", "rows.csv", b"\n,\nq,a\n", [(3, "row", "no known format")]),
    Case("csv with a column twice", "rows.csv", b"prompt,prompt,completion\nq,q,a\n", refused="two columns have one name"),
    Case("csv with cells too many", "rows.csv", b"prompt,completion\nq,a, really\nq,a\n",
         [(2, "row", "more cells than columns")], 1),
    Case("csv with a cell missing", "rows.csv", b"prompt,completion\nq\nq,a\n", [(2, "completion", "empty answer")], 1),
    Case("csv without the last cells that are not needed", "rows.csv", b"instruction,output,system,history\nq,a\nq,a,s\n",
         usable=2),
    Case("csv with an empty answer", "rows.csv", b"prompt,completion\nq,\nq,a\n", [(2, "completion", "empty answer")], 1),
    Case("csv with a quote without its end", "rows.csv", b'prompt,completion\nq,a\nq,"a\nq,a\n',
         [(3, "row", "not valid csv")], 1),
    Case("csv with text behind a quote", "rows.csv", b'prompt,completion\nq,"a"b\nq,a\n', [(2, "row", "not valid csv")]),
    Case("csv with quotes inside cells", "rows.csv", b'prompt,completion\nsay "hi",5" long\n"a ""b""",c\n', usable=2),
    Case("csv with lines inside cells", "rows.csv", b'prompt,completion\n"q\n\nq","a\r\na"\nq,\n',
         [(6, "completion", "empty answer")], 1),
    Case("csv parted by semicolons", "rows.csv", b"prompt;completion\nq, r;a\n", usable=1),
    Case("csv parted by tabs", "rows.csv", b"prompt\tcompletion\nq, r\ta\n", usable=1),
    Case("tsv parted by commas", "rows.tsv", b"prompt,completion\nq,a\n", usable=1),
    Case("csv that begins with blank lines", "rows.csv", b"\n\nprompt;completion\nq;a\n", usable=1),
    Case("csv with a NUL", "rows.csv", b"prompt,completion\nq,a\0a\n" + b"q,a\n" * 10, [(2, "completion", NUL)], 10),
    Case("csv with messages that are no JSON", "rows.csv", b"messages\nhello\n", [(2, "messages", "not JSON")]),
    Case("csv with history that is torn JSON", "rows.csv", b'instruction,output,history\nq,a,"[[""q"", "\nq,a,\n',
         [(2, "history", "not JSON")], 1),
    Case("csv with a weight in its JSON that is wrong", "rows.csv",
         b'messages\n"[{""role"": ""user"", ""content"": ""q"", ""weight"": 7}]"\n',
         [(2, "messages[0].weight", "wrong weight")]),
    Case("csv with line ends of old", "rows.csv", b"prompt,completion\rq,a\rq,\r", [(3, "completion", "empty answer")], 1),
]  # fmt: skip

# Text dialogues.

TXT = [
    Case("a dialogue without a speaker", "rows.txt", b"It was a dark and stormy night.\nIt rained.\n",
         [(1, "line", "a line without a speaker")]),
    Case("a title before the dialogues", "rows.txt", b"Dialogues\n\nUser: q\nAssistant: a\n\nUser: q\nAssistant: a\n",
         [(1, "line", "a line without a speaker")], 2),
    Case("a line before the first speaker", "rows.txt", b"\nhello\nUser: q\nAssistant: a\n\nUser: q\nAssistant: a\n",
         [(2, "line", "a line without a speaker")], 1),
    Case("a dialogue of user lines only", "rows.txt", b"User: q\nUser: r\nUser: s\n", [(1, "row", "no answer")]),
    Case("a dialogue that begins with the assistant", "rows.txt", b"Assistant: a\nUser: q\nAssistant: a\n",
         [(1, "message 1", NO_QUESTION)]),
    Case("two questions in a dialogue", "rows.txt", b"User: q\nUser: r\nAssistant: a\n\nUser: q\nAssistant: a\n",
         [(1, "message 2", "two user messages in a row")], 1),
    Case("an empty answer in a dialogue", "rows.txt", b"User: q\nAssistant:\n\nUser: q\nAssistant: a\n",
         [(1, "message 2", "empty answer")], 1),
    Case("a system line inside a dialogue", "rows.txt", b"User: q\nAssistant: a\nSystem: s\nUser: q\nAssistant: a\n",
         [(1, "message 3", "system message not first")]),
    Case("a NUL in a dialogue", "rows.txt", b"User: q\0\nAssistant: a\n\nUser: q\nAssistant: a\n",
         [(1, "messages[0].content", NUL)], 1),
]  # fmt: skip

# Parquet and Arrow.

PLAIN = {"prompt": ["q", "q", "q"], "completion": ["a", "a", "a"]}
ROLES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write_arrow(table: pa.Table, file: Path) -> None:
    with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def write_stream(table: pa.Table, file: Path) -> None:
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)


def write_table(file: Path, table: pa.Table) -> None:
    (write_arrow if file.suffix == ".arrow" else parquet.write_table)(table, file)


def table_of(columns: dict[str, Any]) -> Callable[[Path], None]:
    return lambda file: write_table(file, pa.table(columns))


def cut(columns: dict[str, Any], share: float) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        write_table(file, pa.table(columns))
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return write


def not_utf8() -> Any:
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 1, 3, 4))
    return pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(b"a\xff\xfea"))


def messages_not_utf8() -> Any:
    """Three rows of messages; the second's answer is not UTF-8."""
    said = pa.array([b"q", b"a", b"q", b"\xe9t\xe9", b"q", b"a"], pa.binary()).view(pa.string())
    roles = pa.array(["user", "assistant"] * 3)
    return pa.ListArray.from_arrays([0, 2, 4, 6], pa.StructArray.from_arrays([roles, said], names=["role", "content"]))


def shared_not_utf8() -> Any:
    return pa.ListArray.from_arrays([0, 3], pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), not_utf8()))


def maps_not_utf8() -> Any:
    """Three maps of lists of texts; the second holds one that is not UTF-8."""
    return pa.MapArray.from_arrays([0, 1, 2, 3], pa.array(["k"] * 3), pa.LargeListArray.from_arrays([0, 1, 2, 3], not_utf8()))


def pointing_beyond(columns: dict[str, Any], file: Path) -> None:
    """Write a stream in which the second of three texts of one letter goes on beyond all there is."""
    write_stream(pa.table(columns), file)
    offsets = [b"".join(n.to_bytes(4, "little") for n in (0, 1, end, 3)) for end in (2, 1 << 30)]
    assert offsets[0] in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(*offsets))


def claiming(num_bytes: int, texts: Any, file: Path) -> None:
    """Write a compressed file of which a text of 5,003 bytes says that it unpacks to so much."""
    write_arrow(pa.table({"prompt": ["q"], "completion": texts}), file)
    true, claimed = (number.to_bytes(8, "little") + b"\x28\xb5\x2f\xfd" for number in (5003, num_bytes))
    assert file.read_bytes().count(true) == 1
    file.write_bytes(file.read_bytes().replace(true, claimed))


def two_of_one_name() -> Any:
    names = ["prompt", "prompt", "completion"]
    return pa.Table.from_arrays([pa.array(["q"]), pa.array(["r"]), pa.array(["a"])], names=names)


def role_twice() -> Any:
    message = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["q"])], names=["role", "role"])
    return pa.Table.from_arrays([message], names=["messages"])


def columnar(suffix: str) -> list[Case]:
    """Cases that are the same for both."""
    kind, name = suffix[1:], f"rows{suffix}"
    what = f"not a whole {kind} file"
    shared = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), pa.array(["q", "x" * (17 << 20)]))
    return [
        Case(f"a {kind} file that is text", name, lines(OK), refused=what),
        Case(f"an empty {kind} file", name, b"", refused="the data file is empty"),
        Case(f"a {kind} file of NULs", name, b"\0" * 1000, refused=what),
        Case(f"a {kind} file cut at its end", name, cut(PLAIN, 0.9), refused=what),
        Case(f"a {kind} file cut in its middle", name, cut(PLAIN, 0.5), refused=what),
        Case(f"a {kind} file of its first bytes", name, cut(PLAIN, 0.02), refused=what),
        Case(f"a {kind} file without rows", name, table_of({"prompt": pa.array([], pa.string())})),
        Case(f"a {kind} file without columns", name, table_of({})),
        Case(f"a {kind} file of other columns", name, table_of({"text": ["q", "r"]}),
             [(1, "row", "no known format"), (2, "row", "no known format")]),
        Case(f"a {kind} column of numbers", name, table_of(PLAIN | {"completion": [1, 2, 3]}),
             [(i, "completion", NO_TEXT) for i in (1, 2, 3)]),
        Case(f"a {kind} column of bytes", name, table_of(PLAIN | {"prompt": [b"q", b"q", b"q"]}),
             [(i, "prompt", NO_TEXT) for i in (1, 2, 3)]),
        Case(f"a {kind} column of lists", name, table_of({"prompt": [["q"]], "completion": ["a"]}),
             [(1, "prompt[0]", "not a message")]),
        Case(f"a {kind} column of nulls", name, table_of({"messages": pa.nulls(2)}),
             [(i, "row", "no known format") for i in (1, 2)]),
        Case(f"a {kind} row whose completion is null", name, table_of(PLAIN | {"completion": ["a", None, "a"]}),
             [(2, "row", "no known format")], 2),
        Case(f"{kind} messages that are null, empty, or hold null", name,
             table_of({"messages": [ROLES, None, [], [None], [{"role": "user", "content": None}], [*ROLES, {"role": None}]]}),
             [(2, "row", "no known format"), (3, "messages", NO_LIST), (4, "messages[0]", "not a message"),
              (5, "messages[0].content", "no text"), (6, "messages[2].role", UNKNOWN_ROLE)], 1),
        Case(f"{kind} weights and names that only some messages have", name,
             table_of({"messages": [[ROLES[0], ROLES[1] | {"weight": 1, "name": "n"}], ROLES]}), usable=2),
        Case(f"{kind} rows of two formats, null in each other's columns", name,
             table_of({"messages": [ROLES, None], "prompt": [None, "q"], "completion": [None, "a"]}), usable=2),
        Case(f"{kind} text that is not UTF-8", name, table_of(PLAIN | {"completion": not_utf8()}),
             [(2, "completion", BROKEN_BYTES)], 2),
        Case(f"{kind} text within messages that is not UTF-8", name, table_of({"messages": messages_not_utf8()}),
             [(2, "messages", BROKEN_BYTES)], 2),
        Case(f"{kind} text within lists and maps that is not UTF-8", name, table_of(PLAIN | {"maps": maps_not_utf8()}),
             [(2, "maps", BROKEN_BYTES)], 2),
        Case(f"{kind} times that no calendar has", name,
             table_of(PLAIN | {"when": pa.array([1, 2**62, 1], pa.timestamp("us", "No/Where"))}),
             usable=3),
        Case(f"a {kind} row over the limit among others", name, table_of(PLAIN | {"prompt": shared}),
             [(2, "row", "row too large")], 2),
    ]  # fmt: skip


LONG_TEXT = pa.array(["x" * 5003])
COLUMNAR = [
    *columnar(".parquet"),
    *columnar(".arrow"),
    Case("an arrow file with a column twice", "rows.arrow", partial(write_arrow, two_of_one_name()),
         refused="two columns have one name"),
    Case("an arrow file with a key twice in a message", "rows.arrow", partial(write_arrow, role_twice()),
         [(1, "messages", "cannot be read")]),
    Case("an arrow text that goes on beyond the file", "rows.arrow", partial(pointing_beyond, PLAIN),
         refused="not a whole arrow file"),
    Case("an arrow text in a message that goes on beyond the file", "rows.arrow",
         partial(pointing_beyond, {"messages": [[{"content": "q"}]] * 3}), refused="not a whole arrow file"),
    Case("an arrow text that many messages share and is not UTF-8", "rows.arrow",
         table_of({"messages": shared_not_utf8()}),
         refused="not a whole arrow file"),
    Case("a compressed arrow text that claims a tebibyte", "rows.arrow", partial(claiming, 1 << 40, LONG_TEXT),
         refused="a batch of the data file is too large to unpack"),
    Case("a compressed arrow text that rows share and that claims a tebibyte", "rows.arrow",
         partial(claiming, 1 << 40, LONG_TEXT.dictionary_encode()), refused="a batch of the data file is too large to unpack"),
    Case("a compressed arrow text that claims more than it has", "rows.arrow", partial(claiming, 10_000, LONG_TEXT),
         refused="not a whole arrow file"),
    Case("an arrow stream", "rows.arrow", partial(write_stream, pa.table(PLAIN)), usable=3),
    Case("an arrow file named parquet", "rows.parquet", partial(write_arrow, pa.table(PLAIN)),
         refused="not a whole parquet file"),
    Case("a parquet file named arrow", "rows.arrow", partial(parquet.write_table, pa.table(PLAIN)),
         refused="not a whole arrow file"),
    Case("a parquet file named jsonl", "rows.jsonl", partial(parquet.write_table, pa.table(PLAIN)), refused=NO_ENCODING),
]  # fmt: skip

CASES = [*ROWS, *ENCODINGS, *JSON_FILES, *FILES, *CSV, *TXT, *COLUMNAR]


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


def checked(file: Path, renderer: Renderer, **data: Any) -> DataReport:
    """What `tuneloom data check` reports."""
    config = parse_config({"data": {"train": str(file), **data}}).data
    return check_data(config, [ConversationReader(config.train[0], config.variables)], renderer)


def dropped_rows(report: DataReport) -> list[Dropped]:
    return [(p.location.line, p.field, p.reason) for p in report.problems if p.action == "dropped"]


def assert_every_row_is_accounted_for(report: DataReport) -> None:
    (source,) = report.sources
    assert source.read == source.usable + report.num_dropped
    for problem in report.problems:
        assert problem.location.line >= 1
        assert problem.reason
        assert problem.mend
        assert len(problem.value) <= 80


@pytest.mark.parametrize("case", CASES, ids=[case.says for case in CASES])
def test_a_malformed_file_is_told_in_full(case: Case, renderer: Renderer, tmp_path: Path) -> None:
    file = case.write(tmp_path)
    if case.refused:
        with pytest.raises(UserError) as caught:
            checked(file, renderer)
        assert caught.value.what == case.refused
        assert str(file) in str(caught.value.where)
        assert_mendable(caught.value)
        return
    report = checked(file, renderer)
    assert dropped_rows(report) == list(case.dropped)
    assert report.sources[0].usable == case.usable
    assert_every_row_is_accounted_for(report)


def test_there_are_cases_enough_and_no_two_are_called_the_same() -> None:
    assert len({case.says for case in CASES}) == len(CASES) >= 120


# Too long for the cutoff, and placeholders.

LONG = chat_row("q", "a", "q", "word " * 100)
LONG_PROMPT = chat_row("word " * 100, "a")


@pytest.mark.parametrize(
    ("overflow", "dropped"),
    [
        ("cut_at_turn", [(3, "row", "prompt longer than the cutoff")]),
        ("drop", [(2, "row", "longer than the cutoff"), (3, "row", "prompt longer than the cutoff")]),
    ],
)
def test_what_does_not_fit_the_cutoff_is_told(
    overflow: str, dropped: list[Dropped], renderer: Renderer, tmp_path: Path
) -> None:
    file = Case("", "rows.jsonl", lines(OK, LONG, LONG_PROMPT, OK)).write(tmp_path)
    report = checked(file, renderer, cutoff_len=50, overflow=overflow)
    assert dropped_rows(report) == dropped
    assert_every_row_is_accounted_for(report)


def test_a_placeholder_without_a_value_is_told_with_its_place(renderer: Renderer, tmp_path: Path) -> None:
    file = Case("", "rows.jsonl", lines(OK, chat_row("Who are you?", "I am {{ name }}, {{name}} or {{}}."))).write(tmp_path)
    report = checked(file, renderer)
    assert report.sources[0].unfilled == {"name": f"{file}:2"}
    assert dropped_rows(report) == []
    with pytest.raises(UserError) as caught:
        prepare_data(parse_config({"data": {"train": str(file)}}).data, renderer, seed=0)
    assert (caught.value.what, caught.value.where) == ("placeholder {{name}} has no value", f"{file}:2")
    assert_mendable(caught.value)


# Memory: each is read in a process of its own, whose peak is measured.

MIB = 1 << 20
READ = """
import json, resource, sys
from pathlib import Path
import pyarrow.parquet
from tuneloom.data.formats import parse_row
from tuneloom.data.read import read_rows
from tuneloom.data.row import RowError
from tuneloom.errors import UserError

def fault(row):
    try:
        if row.error:
            raise row.error
        parse_row(row.value, row.location)
    except RowError as error:
        return error.reason
    return "ok"

seen = []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    seen = [(row.location.line, fault(row)) for row in read_rows("rows", Path(sys.argv[1]))]
except UserError as error:
    seen = error.what
print(json.dumps([seen, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024]))
"""


def read_beside(file: Path) -> tuple[object, int]:
    """Read a file in another process; return (line, reason) of each row, and by how many MiB its memory grew."""
    ran = subprocess.run([sys.executable, "-c", READ, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    seen, grown_mib = json.loads(ran.stdout)
    return [tuple(row) for row in seen] if isinstance(seen, list) else seen, grown_mib


def giant(before: bytes, after: bytes, *, of: bytes = b"x" * MIB, times: int = 100) -> Callable[[Path], None]:
    """Write 100 MB between two texts."""

    def write(file: Path) -> None:
        with open(file, "wb") as opened:
            opened.write(before)
            for _ in range(times):
                opened.write(of)
            opened.write(after)

    return write


SLOW = {
    "a line of 100 MB in Chinese that never ends",
    "an element of 100 MB that never ends",
    "a quoted csv cell of 100 MB in lines",
    "a csv quote without its end, and 100 MB behind it",
    "a line of dialogue of 100 MB",
    "a parquet cell of 300 MB",
    "an arrow cell of 300 MB",
    "parquet rows of 600 MB",
}
TOO_LARGE = "row too large"
ROW, END = b'{"prompt": "q", "completion": "', b'"}'
GIANTS = [
    ("a line of 100 MB", "rows.jsonl", giant(lines(OK) + ROW, END + b"\n" + lines(OK)), [(1, "ok"), (2, TOO_LARGE), (3, "ok")]),
    ("a line of 100 MB in Chinese that never ends", "rows.jsonl", giant(lines(OK) + ROW, b"", of="字".encode() * (MIB // 3)),
     [(1, "ok"), (2, TOO_LARGE)]),
    ("an element of 100 MB", "rows.json", giant(b"[" + lines(OK) + b"," + ROW, END + b",\n" + lines(OK) + b"]"),
     [(1, "ok"), (2, TOO_LARGE), (3, "ok")]),
    ("an element of 100 MB that never ends", "rows.json", giant(b"[\n" + ROW, b""), [(2, TOO_LARGE)]),
    ("a csv cell of 100 MB", "rows.csv", giant(b"prompt,completion\nq,", b"\nq,a\n"), [(2, TOO_LARGE), (3, "ok")]),
    ("a quoted csv cell of 100 MB in lines", "rows.csv",
     giant(b'prompt,completion\nq,"', b'"\nq,a\n', of=(b"x" * 1023 + b"\n") * 1024),
     [(2, TOO_LARGE), (2 + 100 * 1024 + 1, "ok")]),
    ("a csv quote without its end, and 100 MB behind it", "rows.csv",
     giant(b'prompt,completion\nq,"', b"", of=(b"q," + b"x" * 1021 + b"\n") * 1024), [(2, "not valid csv")]),
    ("a line of dialogue of 100 MB", "rows.txt", giant(b"User: q\nAssistant: ", b"\n\nUser: q\nAssistant: a\n"),
     [(1, TOO_LARGE), (4, "ok")]),
]  # fmt: skip


def in_time(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Parameters of the rows; those that take seconds are marked."""
    return [pytest.param(*row[1:], id=row[0], marks=[pytest.mark.slow] * (row[0] in SLOW)) for row in rows]


@pytest.mark.parametrize(("name", "write", "seen"), in_time(GIANTS))
def test_a_row_of_100_mb_is_passed_over(
    name: str, write: Callable[[Path], None], seen: list[tuple[int, str]], tmp_path: Path
) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 99_000_000
    found, grown_mib = read_beside(tmp_path / name)
    assert found == seen
    assert grown_mib < 400


def shared_text(num_rows: int, num_chars: int) -> Any:
    """Rows of which all have the same large text, stored once."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array(["x" * num_chars]))
    return pa.table({"prompt": texts, "completion": ["a"] * num_rows})


def write_bomb(file: Path) -> None:
    table = pa.table(PLAIN | {"prompt": ["q", "x" * (300 * MIB), "q"]})
    write_arrow(table, file) if file.suffix == ".arrow" else parquet.write_table(table, file, compression="zstd")


BOMBS = [
    ("a parquet cell of 300 MB", "rows.parquet", write_bomb, [(1, "ok"), (2, TOO_LARGE), (3, "ok")]),
    ("an arrow cell of 300 MB", "rows.arrow", write_bomb, [(1, "ok"), (2, TOO_LARGE), (3, "ok")]),
    ("a text of 4 MB that 400 parquet rows share", "rows.parquet",
     lambda file: parquet.write_table(shared_text(400, 4 * MIB), file, compression="zstd", store_schema=False),
     [(i, "ok") for i in range(1, 401)]),
    ("parquet rows of 600 MB", "rows.parquet",
     lambda file: parquet.write_table(shared_text(2, 600 * MIB), file, compression="zstd", store_schema=False),
     "the rows of the data file are too large"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "seen"), in_time(BOMBS))
def test_what_unpacks_to_much_more_stays_below_a_gibibyte(
    name: str, write: Callable[[Path], None], seen: object, tmp_path: Path
) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < MIB
    found, grown_mib = read_beside(tmp_path / name)
    assert found == seen
    assert grown_mib < 1000


# Whatever the bytes: rows or a UserError, and every row is accounted for.

SEEDS: dict[str, list[bytes]] = {}


def seed_files(folder: Path) -> dict[str, list[bytes]]:
    """Valid files of every suffix, to be broken."""
    if not SEEDS:
        rows = [OK, chat_row("你是谁？", 'say "hi", then\nleave', "{[q]}", "a\\"), alpaca(history=[["q", "a"]]), chatglm3()]
        dialogue = "User: 你好\nAssistant: hi\n\nSystem: s\nUser: q\nAssistant: a\nb\n"
        csv_text = 'instruction,output,history\nq,a,\n"你, q","a ""b""\nc","[[""q"", ""a""]]"\n'
        table = pa.table(PLAIN | {"messages": [ROLES, None, ROLES]})
        for suffix, write in (("parquet", parquet.write_table), ("arrow", write_arrow), ("stream", write_stream)):
            write(table, folder / suffix)
        SEEDS.update(
            {
                ".json": [json.dumps(rows, indent=1).encode(), text_of(rows).encode(), text_of({"data": rows}).encode()],
                ".jsonl": [lines(*rows), lines(*rows).decode().encode("gb18030")],
                ".csv": [csv_text.encode(), csv_text.replace(",", ";").encode("gb18030")],
                ".tsv": [csv_text.replace(",", "\t").encode()],
                ".txt": [dialogue.encode()],
                ".parquet": [(folder / "parquet").read_bytes()],
                ".arrow": [(folder / "arrow").read_bytes(), (folder / "stream").read_bytes()],
            }
        )
    return SEEDS


def mutated(data: bytes, changes: Sequence[tuple[str, float, float, bytes]]) -> bytes:
    """Apply changes: what to do, where, how far, with what."""
    for what, where, length, inserted in changes:
        start = int(where * len(data))
        end = min(len(data), start + 1 + int(length * 40))
        slices = {"flip": bytes(byte ^ 0x15 for byte in data[start:end]), "cut": b"", "insert": inserted + data[start:end]}
        data = data[:start] + slices.get(what, data[start:end] * 2) + data[end:]
        if what == "tear":
            data = data[:start]
    return data


CHANGES = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "double", "tear"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.binary(max_size=4) | st.sampled_from([b'"', b"\\", b"\n", b"{", b"]", b"\0", b"\xef\xbb\xbf", b"\xed\xa0\x80"]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


def assert_told(file: Path) -> None:
    try:
        reader = ConversationReader(SourceConfig(path=str(file)), {})
        report = reader.new_report()
        num_usable = sum(1 for _ in reader.read(report))
    except UserError as error:
        assert_mendable(error)
    else:
        assert report.read == num_usable + report.dropped_by_reason.total()
        assert all(problem.location.line >= 1 and problem.reason and problem.mend for problem in report.problems)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40)
@given(changes=st.lists(CHANGES, min_size=1, max_size=4), which=st.integers(0, 2))
def test_a_broken_copy_of_a_valid_file_is_rows_or_told(
    folder: Path, suffix: str, changes: list[tuple[str, float, float, bytes]], which: int
) -> None:
    seeds = seed_files(folder)[suffix]
    file = folder / f"rows{suffix}"
    file.write_bytes(mutated(seeds[which % len(seeds)], changes))
    assert_told(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=15)
@given(data=st.binary(max_size=100))
def test_arbitrary_bytes_of_every_suffix_are_rows_or_told(folder: Path, suffix: str, data: bytes) -> None:
    file = folder / f"any{suffix}"
    file.write_bytes(data)
    assert_told(file)


# Round trip: what is written in any format and kind of file reads back equal.

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ANSWER = TEXT.filter(str.strip)
CHAT = st.tuples(st.none() | TEXT.filter(bool), st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3))
Chat = tuple[str | None, list[tuple[str, str]]]


def messages_of(
    chat: Chat, user: str = "user", assistant: str = "assistant", keys: tuple[str, str] = ("role", "content")
) -> Any:
    system, pairs = chat
    said: list[tuple[str, object]] = [] if system is None else [("system", system)]
    for question, answer in pairs:
        said += [(user, question), (assistant, answer)]
    return turns(*said, keys=keys)


def as_alpaca(chat: Chat) -> dict[str, object]:
    system, pairs = chat
    question, answer = pairs[-1]
    return {"instruction": question, "output": answer, "system": system or "", "history": [list(pair) for pair in pairs[:-1]]}


def as_xtuner(chat: Chat) -> dict[str, object]:
    system, pairs = chat
    first = {} if system is None else {"system": system}
    return {"conversation": [{**(first if i == 0 else {}), "input": q, "output": a} for i, (q, a) in enumerate(pairs)]}


WRITERS: dict[str, Callable[[Chat], dict[str, object]]] = {
    "OpenAI": lambda chat: {"messages": messages_of(chat)},
    "ShareGPT": lambda chat: {"conversations": messages_of(chat, "human", "gpt", ("from", "value"))},
    "ChatGLM3": lambda chat: {"conversations": messages_of(chat)},
    "XTuner": as_xtuner,
    "Alpaca": as_alpaca,
    "completion": lambda chat: {"prompt": messages_of(chat)[:-1], "completion": messages_of(chat)[-1:]},
}


def write_chats(file: Path, rows: list[dict[str, object]], indent: int | None) -> None:
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(indent)), encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_bytes(lines(*rows))
    elif file.suffix in (".parquet", ".arrow"):
        write_table(file, pa.Table.from_pylist(rows))
    else:
        with open(file, "w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), delimiter="," if file.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows({key: v if isinstance(v, str) else text_of(v) for key, v in row.items()} for row in rows)


def read_back(file: Path) -> list[tuple[Message, ...]]:
    return [parse_row(row.value, row.location).conversation.messages for row in read_rows(file.name, file) if row.error is None]


@pytest.mark.parametrize("written", WRITERS)
@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".txt"])
@settings(max_examples=8)
@given(chats=st.lists(CHAT, min_size=1, max_size=3), indent=st.sampled_from([None, 0, 2]))
def test_conversations_written_in_any_format_read_back_equal(
    folder: Path, written: str, suffix: str, chats: list[Chat], indent: int | None
) -> None:
    if written == "completion" and suffix in (".csv", ".tsv"):  # there, prompt and completion are texts
        chats = [(None, pairs[:1]) for _, pairs in chats]
        rows: list[dict[str, object]] = [dict(zip(("prompt", "completion"), pairs[0], strict=True)) for _, pairs in chats]
    else:
        rows = [WRITERS[written](chat) for chat in chats]
    file = folder / f"round{suffix}"
    write_chats(file, rows, indent)
    expected = [tuple(Message(m["role"], m["content"]) for m in messages_of(chat)) for chat in chats]
    found = [tuple(replace(message, weight=1) for message in messages) for messages in read_back(file)]
    assert found == expected


SPOKEN = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters=":："), min_size=1, max_size=20)


@given(chats=st.lists(st.lists(st.tuples(SPOKEN, SPOKEN), min_size=1, max_size=3), min_size=1, max_size=3))
def test_dialogues_written_as_text_read_back_equal(folder: Path, chats: list[list[tuple[str, str]]]) -> None:
    file = folder / "round.txt"
    text = "\n\n".join("\n".join(f"User: {q}\n助手：{a}" for q, a in pairs) for pairs in chats)
    file.write_text(text, encoding="utf-8", newline="")
    assert read_back(file) == [tuple(Message(m["role"], m["content"]) for m in messages_of((None, pairs))) for pairs in chats]
