"""Rows of every format become conversations; every bad row says why it is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tuneloom.data.formats import RowShape, parse_row
from tuneloom.data.row import RowError
from tuneloom.types import Conversation, Location, Message, ToolCall, text_messages

HERE = Location("x.jsonl", 7)
QA = [("user", "q"), ("assistant", "a")]


def parse(row: object, **columns: str) -> Conversation:
    return parse_row(row, HERE, RowShape(columns)).conversation


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in pairs]


GLM_TOOLS = [{"name": "weather", "parameters": {"city": "text"}}]
FOUR = [("system", "s"), *QA, ("user", "q2"), ("assistant", "a2")]
GOOD: list[tuple[str, dict[str, Any], str, list[tuple[str, str]]]] = [
    ("messages", {"messages": turns(*QA)}, "OpenAI messages", QA),
    ("messages, several turns and a system", {"messages": turns(*FOUR)}, "OpenAI messages", FOUR),
    ("messages with a tool", {"messages": turns(("user", "q"), ("tool", "t"), ("tool", "t"), ("assistant", "a"))},
     "OpenAI messages", [("user", "q"), ("tool", "t"), ("tool", "t"), ("assistant", "a")]),
    ("sharegpt", {"conversations": said(("human", "q"), ("gpt", "a"))}, "ShareGPT conversations", QA),
    ("sharegpt with a system column", {"system": "s", "conversations": said(("user", "q"), ("assistant", "a"))},
     "ShareGPT conversations", [("system", "s"), *QA]),
    ("sharegpt with observations", {"conversations": said(("human", "q"), ("observation", "t"), ("bot", "a"))},
     "ShareGPT conversations", [("user", "q"), ("tool", "t"), ("assistant", "a")]),
    ("chatglm3", {"conversations": turns(*QA)}, "ChatGLM3 conversations", QA),
    ("chatglm3 with a system", {"conversations": turns(*FOUR)}, "ChatGLM3 conversations", FOUR),
    ("chatglm3 with tools", {"tools": GLM_TOOLS, "conversations": turns(*QA)}, "ChatGLM3 conversations", QA),
    ("xtuner", {"conversation": [{"input": "q", "output": "a"}]}, "XTuner conversation", QA),
    ("xtuner with a system", {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "q2", "output": "a2"}]},
     "XTuner conversation", FOUR),
    ("alpaca", {"instruction": "q", "output": "a"}, "Alpaca", QA),
    ("alpaca with input", {"instruction": "q", "input": "i", "output": "a"}, "Alpaca", [("user", "q\ni"), ("assistant", "a")]),
    ("alpaca with empty input", {"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, "Alpaca", QA),
    ("alpaca with history", {"instruction": "q2", "output": "a2", "history": [["q", "a"]], "system": "s"}, "Alpaca", FOUR),
    ("prompt and completion", {"prompt": "q", "completion": "a"}, "prompt and completion", QA),
    ("messages as JSON text", {"messages": json.dumps(turns(*QA))}, "OpenAI messages", QA),
    ("sharegpt as JSON text", {"conversations": json.dumps(said(("human", "q"), ("gpt", "a")))}, "ShareGPT conversations", QA),
    ("xtuner as JSON text", {"conversation": json.dumps([{"input": "q", "output": "a"}])}, "XTuner conversation", QA),
    ("history as JSON text", {"instruction": "q2", "output": "a2", "history": '[["q", "a"]]', "system": "s"}, "Alpaca", FOUR),
    ("other columns beside it", {"id": 3, "messages": turns(*QA), "conversation": "no. 3"}, "OpenAI messages", QA),
    ("blank space is kept", {"prompt": "  q\n", "completion": " a "},
     "prompt and completion", [("user", "  q\n"), ("assistant", " a ")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "pairs"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_a_format_is_told_by_its_keys(row: dict[str, Any], name: str, pairs: list[Any]) -> None:
    before = json.dumps(row)
    parsed = parse_row(row, HERE)
    assert parsed.format == name
    assert parsed.conversation.messages == text_messages(pairs)
    assert parsed.conversation.location == HERE
    assert parsed.repairs == []
    assert json.dumps(row) == before, "the row itself is left alone"


def test_columns_of_other_names_are_mapped() -> None:
    assert parse({"问题": "q", "回答": "a"}, instruction="问题", output="回答").as_dicts() == turns(*QA)
    assert parse({"chat": turns(*QA)}, messages="chat").as_dicts() == turns(*QA)
    assert parse({"conversation": "q", "output": "a"}, instruction="conversation").as_dicts() == turns(*QA)
    assert parse({"output": "q", "instruction": "a"}, instruction="output", output="instruction").as_dicts() == turns(*QA)
    assert parse({"instruction": "q", "output": "a"}, instruction="question").as_dicts() == turns(*QA)


def test_a_mapped_column_replaces_ours() -> None:
    row = {"instruction": "an id", "question": "q", "output": "a"}
    assert parse(row, instruction="question").as_dicts() == turns(*QA)


def test_tools_are_maps_or_json_text_and_bare_ones_are_wrapped() -> None:
    wrapped = ({"type": "function", "function": GLM_TOOLS[0]},)
    assert parse({"tools": GLM_TOOLS, "conversations": turns(*QA)}).tools == wrapped
    assert parse({"tools": json.dumps(GLM_TOOLS), "messages": turns(*QA)}).tools == wrapped
    assert parse({"tools": list(wrapped), "messages": turns(*QA)}).tools == wrapped
    assert parse({"tools": [{"function": GLM_TOOLS[0]}], "messages": turns(*QA)}).tools == wrapped
    assert parse({"tools": "", "messages": turns(*QA)}).tools == ()
    assert parse({"tools": None, "messages": turns(*QA)}).tools == ()


CITY = {"city": "北京"}
CITY_TEXT = '{"city": "北京"}'
CALL = {"name": "weather", "arguments": CITY}


def calling(call: ToolCall, result: Message, content: str = "") -> tuple[Message, ...]:
    """What a row with one tool call becomes."""
    return (Message("user", "q"), Message("assistant", content, tool_calls=(call,)), result, Message("assistant", "a"))


def openai_call(**extra: Any) -> dict[str, Any]:
    return {"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "c1", "function": CALL}], **extra},
        {"role": "tool", "content": "t", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "a"},
    ]}  # fmt: skip


def sharegpt_call(value: object) -> dict[str, Any]:
    who = ("human", "function_call", "observation", "gpt")
    return {"conversations": [{"from": f, "value": v} for f, v in zip(who, ("q", value, "t", "a"), strict=True)]}


def glm_call(*before: dict[str, Any], **changes: Any) -> dict[str, Any]:
    tool = {"role": "tool", "name": "weather", "parameters": CITY, "observation": "t"} | changes
    return {"conversations": [{"role": "user", "content": "q"}, *before, tool, {"role": "assistant", "content": "a"}]}


KNOWN = ToolCall("weather", CITY_TEXT, "c1")
TIED = Message("tool", "t", name="weather", tool_call_id="c1")
NAMED = Message("tool", "t", name="weather")
BARE = ToolCall("weather", CITY_TEXT)
CALLS: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("openai, null content", openai_call(), calling(KNOWN, TIED)),
    ("openai, with content", openai_call(content="Let me see."), calling(KNOWN, TIED, "Let me see.")),
    ("openai, arguments as text",
     openai_call(tool_calls=[{"id": "c1", "function": {"name": "weather", "arguments": CITY_TEXT}}]), calling(KNOWN, TIED)),
    ("openai, arguments that name the escape of a NUL",
     openai_call(tool_calls=[{"function": {"name": "weather", "arguments": {"x": r"\u0000 \\u0000"}}}]),
     calling(ToolCall("weather", json.dumps({"x": r"\u0000 \\u0000"})), TIED)),
    ("openai, no arguments",
     openai_call(tool_calls=[{"id": "c1", "function": {"name": "weather", "arguments": ""}}]),
     calling(ToolCall("weather", "{}", "c1"), TIED)),
    ("openai, the older key", openai_call(tool_calls=None, function_call=CALL), calling(BARE, TIED)),
    ("sharegpt", sharegpt_call(json.dumps(CALL, ensure_ascii=False)), calling(BARE, Message("tool", "t"))),
    ("sharegpt, a list", sharegpt_call(json.dumps([CALL])), calling(BARE, Message("tool", "t"))),
    ("sharegpt, a map", sharegpt_call(CALL), calling(BARE, Message("tool", "t"))),
    ("chatglm3, nobody before", glm_call(), calling(BARE, NAMED)),
    ("chatglm3, said before", glm_call({"role": "assistant", "content": "Let me see."}), calling(BARE, NAMED, "Let me see.")),
    ("chatglm3, a map observed", glm_call(observation={"t": 1}), calling(BARE, Message("tool", '{"t": 1}', name="weather"))),
    ("chatglm3, no parameters",
     {"conversations": [{"role": "user", "content": "q"}, {"role": "tool", "name": "weather", "observation": "t"},
                        {"role": "assistant", "content": "a"}]},
     calling(ToolCall("weather", "{}"), NAMED)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_tool_calls_of_every_format(row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    before = json.dumps(row)
    assert parse(row).messages == messages
    assert json.dumps(row) == before, "the row itself is left alone"


def test_a_list_of_calls_is_one_message_and_tool_rows_that_follow_each_other_are_calls_of_their_own() -> None:
    two = [CALL, {"name": "time", "arguments": {}}]
    both = parse(sharegpt_call(json.dumps(two))).messages[1].tool_calls
    assert both == (BARE, ToolCall("time", "{}"))
    second = {"role": "tool", "name": "time", "parameters": {}, "observation": "noon", "weight": 0}
    row = glm_call()
    row["conversations"].insert(2, second)
    roles = [(m.role, m.weight, [call.name for call in m.tool_calls]) for m in parse(row).messages]
    assert roles[1:5] == [("assistant", 1, ["weather"]), ("tool", 1, []), ("assistant", 0, ["time"]), ("tool", 1, [])]


def test_a_call_may_be_the_answer_itself() -> None:
    row = {"messages": openai_call()["messages"][:2]}
    assert parse(row).messages == calling(KNOWN, TIED)[:2]


def test_prompt_and_completion_of_messages_supervise_the_completion_alone() -> None:
    row = {
        "prompt": turns(("system", "s"), *QA, ("user", "q2")),
        "completion": turns(("assistant", "a2"), ("user", "q3"), ("assistant", "a3")),
    }
    parsed = parse_row(row, HERE)
    assert parsed.format == "prompt and completion"
    assert [m.content for m in parsed.conversation.messages] == ["s", "q", "a", "q2", "a2", "q3", "a3"]
    weights = [m.weight for m in parsed.conversation.messages if m.role == "assistant"]
    assert weights == [0, 1, 1]


def test_weight_0_keeps_an_answer_out_and_may_leave_it_empty() -> None:
    row = {
        "messages": [
            *turns(("user", "q")),
            {"role": "assistant", "content": "", "weight": 0},
            *turns(("user", "q2"), ("assistant", "a2")),
        ]
    }
    assert parse(row).messages[1] == Message("assistant", "", 0)
    assert parse(row).messages[3] == Message("assistant", "a2", 1)
    assert (
        parse({"messages": [*turns(("user", "q")), {"role": "assistant", "content": "a", "weight": 1.0}]}).messages[1].weight
        == 1
    )


def test_text_in_parts_is_joined_as_it_is() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "\nb"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]}
    assert parse(row).messages == text_messages([("user", "a \nb"), ("assistant", "a ")])


def test_developer_is_openais_newer_word_for_system() -> None:
    row = {"messages": turns(("developer", "s"), *QA), "system": "another"}
    assert parse(row).messages == text_messages([("system", "s"), *QA])


def test_a_null_is_an_absent_key() -> None:
    rows = [
        {"messages": [*turns(QA[0]), {**turns(QA[1])[0], "weight": None, "name": None, "tool_calls": None}]},
        {"messages": None, "conversations": said(("human", "q"), ("gpt", "a"))},
        {"messages": None, "conversations": None, "instruction": "q", "output": "a", "input": None, "history": None},
    ]
    assert {parse(row).messages for row in rows} == {text_messages(QA)}


def test_what_follows_the_last_answer_is_taken_off_and_said() -> None:
    parsed = parse_row({"messages": turns(*QA, ("user", "q2"), ("tool", "t"))}, HERE)
    assert parsed.conversation.as_dicts() == turns(*QA)
    assert parsed.repairs == ["messages after the last answer taken off"]


def bad(content: object = "a", **extra: object) -> dict[str, Any]:
    return {"messages": [*turns(("user", "q")), {"role": "assistant", "content": content, **extra}]}


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
CALL_MAP = {"name": "weather", "arguments": {}}
NO_LIST = "not a list of messages"
NO_QUESTION = "does not start with a user message"
HALF = "holds half a character (a lone surrogate)"
BAD: list[tuple[str, object, str, str]] = [
    ("text", "hello", "row", "not a map"),
    ("a number", 3, "row", "not a map"),
    ("null", None, "row", "not a map"),
    ("a list", [{"role": "user"}], "row", "not a map"),
    ("an endless nest", DEEP, "row", "not a map"),
    ("an empty map", {}, "row", "no known format"),
    ("other keys", {"question": "q", "answer": "a"}, "row", "no known format"),
    ("a prompt alone", {"prompt": "q"}, "row", "no known format"),
    ("messages of null", {"messages": None}, "messages", NO_LIST),
    ("messages of number", {"messages": 3}, "messages", NO_LIST),
    ("no messages", {"messages": []}, "messages", NO_LIST),
    ("messages as a map", {"messages": {"role": "user"}}, "messages", NO_LIST),
    ("messages as text", {"messages": "hello"}, "messages", "not JSON"),
    ("messages as empty text", {"messages": ""}, "messages", "not JSON"),
    ("messages as JSON null", {"messages": "null"}, "messages", NO_LIST),
    ("conversations of null", {"conversations": None}, "conversations", NO_LIST),
    ("no conversations", {"conversations": []}, "conversations", NO_LIST),
    ("a message as text", {"messages": ["q", "a"]}, "messages[0]", "not a message"),
    ("a message as null", {"messages": [*turns(("user", "q")), None]}, "messages[1]", "not a message"),
    ("no role", {"messages": [{"content": "q"}]}, "messages[0].role", "unknown role"),
    ("an unknown role", {"messages": turns(("narrator", "q"))}, "messages[0].role", "unknown role"),
    ("a role that is a list", {"messages": [{"role": ["user"], "content": "q"}]}, "messages[0].role", "unknown role"),
    ("an unknown speaker", {"conversations": [{"from": "narrator", "value": "q"}]}, "conversations[0].from", "unknown role"),
    ("keys of two formats", {"conversations": [{"from": "human", "content": "q"}]}, "conversations[0].value", "no text"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content", "no text"),
    ("content of null", bad(None), "messages[1].content", "not text"),
    ("content of number", bad(3), "messages[1].content", "not text"),
    ("content of no parts", bad([]), "messages[1].content", "not text"),
    ("content of parts without a type", bad([{"text": "a"}]), "messages[1].content", "not text"),
    ("an image beside text", bad([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x.png"}}]),
     "messages[1].content[1].type", "a part that is not text"),
    ("a part of null", bad([{"type": "text", "text": None}]), "messages[1].content[0].text", "not text"),
    ("half a character in a part", bad([{"type": "text", "text": "a\ud83d"}]), "messages[1].content[0].text", HALF),
    ("endless content", bad(DEEP), "messages[1].content", "not text"),
    ("half a character", bad("a\ud83d"), "messages[1].content", HALF),
    ("a NUL", bad("a\x00b"), "messages[1].content", "holds a NUL byte"),
    ("an empty answer", bad(""), "messages[1].content", "empty answer"),
    ("a blank answer", bad(" \n\t"), "messages[1].content", "empty answer"),
    ("weight 2", bad(weight=2), "messages[1].weight", "wrong weight"),
    ("weight as a flag", bad(weight=True), "messages[1].weight", "wrong weight"),
    ("weight as text", bad(weight="0"), "messages[1].weight", "wrong weight"),
    ("weight 0 throughout", bad(weight=0), "weight", "every answer has weight 0"),
    ("no answer", {"messages": turns(("user", "q"))}, "row", "no answer"),
    ("a system alone", {"messages": turns(("system", "s"))}, "row", "no answer"),
    ("an answer first", {"messages": turns(("assistant", "a"))}, "message 1", NO_QUESTION),
    ("an answer after the system", {"messages": turns(("system", "s"), ("assistant", "a"))}, "message 2", NO_QUESTION),
    ("a tool first", {"messages": turns(("tool", "t"), ("assistant", "a"))}, "message 1", NO_QUESTION),
    ("two questions", {"messages": turns(("user", "q"), *QA)}, "message 2", "two user messages in a row"),
    ("two answers", {"messages": turns(*QA, ("assistant", "a"))}, "message 3", "two assistant messages in a row"),
    ("a late system", {"messages": turns(*QA, ("system", "s"), *QA)}, "message 3", "system message not first"),
    ("two systems", {"messages": turns(("system", "s"), ("system", "s"), *QA)}, "message 2", "system message not first"),
    ("system of number", {"system": 3, "instruction": "q", "output": "a"}, "system", "not text"),
    ("instruction of null", {"instruction": None, "output": "a"}, "instruction", "not text"),
    ("input of list", {"instruction": "q", "input": ["i"], "output": "a"}, "input", "not text"),
    ("no output", {"instruction": "q"}, "output", "no answer"),
    ("output of null", {"instruction": "q", "output": None}, "output", "not text"),
    ("empty output", {"instruction": "q", "output": ""}, "output", "empty answer"),
    ("history as a map", {"instruction": "q", "output": "a", "history": {"q": "a"}}, "history", "not a list"),
    ("history as text", {"instruction": "q", "output": "a", "history": "before"}, "history", "not JSON"),
    ("history of singles", {"instruction": "q", "output": "a", "history": [["q"]]}, "history[0]", "not a pair"),
    ("history of null", {"instruction": "q", "output": "a", "history": [["q", None]]}, "history[0][1]", "not text"),
    ("no xtuner turns", {"conversation": []}, "conversation", "not a list of turns"),
    ("an xtuner turn without output", {"conversation": [{"input": "q"}]}, "conversation[0]", "not a turn"),
    ("xtuner output of number", {"conversation": [{"input": "q", "output": 3}]}, "conversation[0].output", "not text"),
    ("completion of list", {"prompt": "q", "completion": ["a"]}, "completion", "not text"),
    ("tools of number", {"tools": 3, "messages": turns(*QA)}, "tools", "not a list of tools"),
    ("tools of text", {"tools": "weather", "messages": turns(*QA)}, "tools", "not JSON"),
    ("a tool that is text", {"tools": ["weather"], "messages": turns(*QA)}, "tools", "not a list of tools"),
    ("a tool without a name", {"tools": [{"type": "function"}], "messages": turns(*QA)}, "tools[0]", "a tool without a name"),
    ("a tool's function that is text", {"tools": [{"function": "weather"}], "messages": turns(*QA)},
     "tools[0]", "a tool without a name"),
    ("tool calls as a map", bad(tool_calls=CALL_MAP), "messages[1].tool_calls", "not a list of tool calls"),
    ("a tool call as text", bad(tool_calls=["weather"]), "messages[1].tool_calls[0]", "not a tool call"),
    ("a tool call of nothing", bad(tool_calls=[{"id": "c"}]), "messages[1].tool_calls[0]", "not a tool call"),
    ("a call's function as text", bad(tool_calls=[{"function": "f"}]), "messages[1].tool_calls[0].function", "not a tool call"),
    ("a call without a name", bad(tool_calls=[{"function": {}}]), "messages[1].tool_calls[0].function.name", "not text"),
    ("a call of an empty name", bad(tool_calls=[{"name": " "}]), "messages[1].tool_calls[0].name", "an empty name"),
    ("a call's id that is a number", bad(tool_calls=[{"id": 3, "function": CALL_MAP}]),
     "messages[1].tool_calls[0].id", "not text"),
    ("arguments that are no JSON", bad(tool_calls=[{"name": "f", "arguments": "x="}]),
     "messages[1].tool_calls[0].arguments", "not JSON"),
    ("arguments of a list", bad(tool_calls=[{"name": "f", "arguments": "[1]"}]),
     "messages[1].tool_calls[0].arguments", "not a map of arguments"),
    ("endless arguments", bad(tool_calls=[{"name": "f", "arguments": {"x": DEEP}}]),
     "messages[1].tool_calls[0].arguments", "cannot be written as JSON"),
    ("half a character in arguments", bad(tool_calls=[{"name": "f", "arguments": '{"x": "\\ud83d"}'}]),
     "messages[1].tool_calls[0].arguments", HALF),
    ("a user who calls", {"messages": [{"role": "user", "content": "q", "tool_calls": [CALL_MAP]}]},
     "messages[0].role", "a tool call by another than the assistant"),
    ("a tool's name that is a number", {"messages": [*turns(("user", "q")), {"role": "tool", "content": "t", "name": 3}]},
     "messages[1].name", "not text"),
    ("null content and no calls", bad(None, tool_calls=[]), "messages[1].content", "not text"),
    ("a function_call of plain text", {"conversations": said(("human", "q"), ("function_call", "weather()"))},
     "conversations[1].value", "not JSON"),
    ("a function_call of none", {"conversations": said(("human", "q"), ("function_call", "[]"))},
     "conversations[1].value", "not a tool call"),
    ("a function_call of a list of texts", {"conversations": said(("human", "q"), ("function_call", '["weather"]'))},
     "conversations[1].value[0]", "not a tool call"),
    ("a chatglm3 tool without a name", {"conversations": [{"role": "tool", "parameters": {}, "observation": "t"}]},
     "conversations[0].name", "not text"),
    ("a chatglm3 tool of other parameters", {"conversations": [{"role": "tool", "name": "f", "parameters": "x=1"}]},
     "conversations[0].parameters", "not JSON"),
    ("a chatglm3 tool without observation", {"conversations": [{"role": "tool", "name": "f", "parameters": {}}]},
     "conversations[0].observation", "not text"),
    ("a chatglm3 tool of wrong weight",
     {"conversations": [{"role": "tool", "name": "f", "parameters": {}, "observation": "t", "weight": 2}]},
     "conversations[0].weight", "wrong weight"),
    ("a prompt of messages, a completion of text", {"prompt": turns(("user", "q")), "completion": 3},
     "completion", "not a list of messages"),
    ("a completion without an answer", {"prompt": turns(*QA), "completion": turns(("user", "q"))}, "completion", "no answer"),
    ("an empty completion", {"prompt": turns(*QA), "completion": []}, "completion", "not a list of messages"),
    ("half a character in a tool", {"tools": [{"name": "\ud83d"}], "messages": turns(*QA)}, "tools", HALF),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_row_says_field_reason_and_mend(row: object, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert (caught.value.field, caught.value.reason) == (field, reason)
    assert caught.value.mend
    assert len(caught.value.value) <= 80


@pytest.mark.parametrize(
    ("row", "mend"),
    [
        ({"messages": turns(("narrator", "q"))}, "name yours in `roles` of the source"),
        ({"messages": "hello"}, "write messages as a list, or as the JSON text of one"),
        ({"instruction": "q", "response": "a"}, "add `output`, or map your column to it"),
        (bad(""), "write the answer, or give it weight 0"),
        ({"conversations": said(("human", "q"), ("gpt", ""))}, "write the answer, or give it weight 0"),
        ({"instruction": "q", "output": "a", "history": [["q", ""]]}, "write the answer, or leave the row out"),
        ({"conversation": [{"input": "q", "output": ""}]}, "write the answer, or leave the row out"),
        ({"prompt": "q", "completion": ""}, "write the answer, or leave the row out"),
    ],
)
def test_a_mend_names_what_can_be_done_in_any_kind_of_file(row: object, mend: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert mend in caught.value.mend


def test_a_column_map_that_matches_nothing_leaves_the_row_unknown() -> None:
    with pytest.raises(RowError, match="no known format") as caught:
        parse({"q": "q", "a": "a"}, instruction="question")
    assert caught.value.value == '["q", "a"]'


@pytest.mark.parametrize(
    ("row", "lists"),
    [
        ({"version": 1, "data": [{"messages": turns(*QA)}]}, "the list data:"),
        ({"license": "mit", "all": [{"question": "q", "reply": "a"}], "more": []}, "the list all:"),
        (
            {"train": [{"prompt": "q", "completion": "a"}], "test": [{"messages": turns(*QA)}]},
            "the list train and the list test:",
        ),
        ({"id": 1, "dialogue": turns(*QA)}, None),
        ({"version": 1, "data": []}, None),
        ({"data": [{"messages": "[torn"}]}, None),
    ],
    ids=["under data", "with columns", "two lists", "messages", "an empty list", "no rows"],
)
def test_a_file_that_wraps_its_rows_is_told_which_list_holds_them(row: object, lists: str | None) -> None:
    with pytest.raises(RowError, match="no known format") as caught:
        parse(row, instruction="question", output="reply")
    expected = f"its rows are in {lists} save that list alone as the file" if lists else "or map your columns"
    assert expected in caught.value.mend


def test_an_empty_answer_is_named_as_the_file_names_it() -> None:
    with pytest.raises(RowError, match="empty answer") as caught:
        parse({"question": "q", "reply": ""}, instruction="question", output="reply")
    assert caught.value.field == "reply"


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (None, "null"),
        ({"messages": turns(("user", True))}, "true"),  # type: ignore[arg-type]
        ({"messages": turns(("user", {"a": None, "b": "it's \u200b“你”"}))}, '{"a": null, "b": "it\'s \\u200b“你”"}'),  # type: ignore[arg-type]
        ({"messages": turns(("user", "a\n\x00"))}, '"a\\n\\u0000"'),
        ({"messages": turns(("user", "a\ud83d"))}, '"a\\ud83d"'),
        ({"messages": turns(("user", ["x" * 90]))}, '["' + "x" * 77 + "…"),  # type: ignore[arg-type]
    ],
)
def test_a_value_is_shown_as_a_json_file_has_it(row: object, shown: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert caught.value.value == shown


def test_other_names_of_roles_and_message_keys_are_mapped_and_faults_told_in_the_files_words() -> None:
    shape = RowShape(
        {"messages": "dialog", "role": "who", "content": "text", "system": "setting"}, {"client": "user", "agent": "assistant"}
    )
    row = {"dialog": [{"who": "client", "text": "q"}, {"who": "agent", "text": "a"}]}
    assert parse_row(row, HERE, shape).conversation.messages == text_messages([("user", "q"), ("assistant", "a")])
    row["dialog"][1] = {"who": "agent"}
    with pytest.raises(RowError) as caught:
        parse_row(row, HERE, shape)
    assert (caught.value.field, caught.value.reason, caught.value.mend) == ("dialog[1].text", "no text", "add `text`")
    csv_row = {"dialog": json.dumps([{"who": "client", "text": "q"}, {"who": "agent", "text": "a"}])}
    assert len(parse_row(csv_row, HERE, shape).conversation.messages) == 2
