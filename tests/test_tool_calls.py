"""A GLM's calls are read and never run, its text comes without the format's blanks, and chat goes on with a call's result."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm import train_sentencepiece
from helpers import assert_mendable
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tuneloom.adapters.target import Loaded, load_target, resolve_target
from tuneloom.cli.conversation import ChatSession
from tuneloom.cli.main import app
from tuneloom.config import GenerationConfig
from tuneloom.data.render import Renderer
from tuneloom.errors import UserError
from tuneloom.generate.calls import read_call
from tuneloom.generate.decode import GlmDecoder, IncrementalDecoder, glm_tokens, read_answer
from tuneloom.generate.generator import Generator, stop_ids
from tuneloom.models.chatglm.tokenizer import build_tokenizer
from tuneloom.types import Conversation, Message, ToolCall


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("tokenizer")).parent)


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer)


# Reading.


def fenced(code: str, name: str = "weather") -> str:
    return f"{name}\n ```python\n{code}\n```"


READ: dict[str, dict[str, Any]] = {
    fenced("tool_call(city='北京', days=3)"): {"city": "北京", "days": 3},
    fenced("tool_call()"): {},
    fenced('tool_call(\n  a="it\'s",\n  b=[1, -2.5, True, None],\n)'): {"a": "it's", "b": [1, -2.5, True, None]},
    fenced("tool_call(a=true, b=false, c=null, d=(1, 2))"): {"a": True, "b": False, "c": None, "d": [1, 2]},
    fenced("tool_call(from='a, to=b', class={'from': 1})"): {"from": "a, to=b", "class": {"from": 1}},
    fenced("tool_call(**{'a-b': 1}, c=2)"): {"a-b": 1, "c": 2},
    fenced("tool_call(pattern='\\d+')"): {"pattern": "\\d+"},
    fenced("tool_call(a='```')"): {"a": "```"},
    "weather\n```python\ntool_call(city='x')": {"city": "x"},
    'weather\n{"city": "北京", "days": [1, 2]}': {"city": "北京", "days": [1, 2]},
    "weather\n```json\n{}\n```": {},
    " weather \n\n {} ": {},
}


@pytest.mark.parametrize("text", READ)
def test_a_call_is_read(text: str) -> None:
    call = read_call(text)
    assert call is not None
    assert call.name == "weather"
    assert json.loads(call.arguments) == READ[text]


NO_CALLS = (
    "", "weather", "weather\n", "\n {}", "\n```python\ntool_call(a=1)\n```", "Here it is:\n{}", "你好！\n{}", "w" * 65 + "\n{}",
    "weather\n{", 'weather\n{"city": NaN}', "weather\n[1]", 'weather\n{"a": 1} and more', 'weather\n{"a": "\\ud800"}',
    "weather\ntool_call(a=1)", fenced("print('hi')", "interpreter"), fenced("import os"), fenced("tool_call('x')"),
    fenced("tool_call(a=open('x'))"), fenced("tool_call(a=1 + 1)"), fenced("tool_call(a=b)"), fenced("tool_call(a=f'{b}')"),
    fenced("tool_call(a=1, a=2)"), fenced("tool_call(**{'a': 1}, a=2)"), fenced("tool_call(**b)"), fenced("tool_call(**1)"),
    fenced("tool_call(a=b'x')"), fenced("tool_call(a=1j)"), fenced("tool_call(a=...)"), fenced("tool_call(a={1})"),
    fenced("tool_call(a={1: 2})"), fenced("tool_call(a={**{}})"), fenced("tool_call(a=-'x')"), fenced("tool_call(a=-True)"),
    fenced("tool_call(a=1e999)"), fenced("tool_call(a='\\ud800')"), fenced("tool_call(a=1); x()"), fenced("x.tool_call(a=1)"),
    fenced("tool_call(a='" + "x" * 50_000 + "')"), fenced("tool_call(a=" + "9" * 5000 + ")"), 'w\n{"a": ' + "9" * 5000 + "}",
    fenced("("), fenced("tool_call(a='"), fenced("tool_call(a='x\0')"),
)  # fmt: skip


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_none(text: str) -> None:
    assert read_call(text) is None


DEEP = 40_000
BOMBS = {
    "brackets": "tool_call(x=" + "[" * DEEP + "]" * DEEP + ")",
    "lists": "tool_call(x=" + "[" * 60 + "]" * 60 + ")",
    "open": "(" * DEEP,
    "minus": "tool_call(x=" + "-" * DEEP + "1)",
    "not": "tool_call(x=" + "not " * (DEEP // 4) + "1)",
    "dots": "tool_call(x=a" + ".a" * (DEEP // 2) + ")",
    "sum": "tool_call(x=1" + "+1" * (DEEP // 2) + ")",
    "calls": "tool_call" + "()" * (DEEP // 2),
    "lambda": "tool_call(x=" + "lambda:" * (DEEP // 7) + "1)",
    "maps": '{"a":' * (DEEP // 6) + "1" + "}" * (DEEP // 6),
    "shallow enough to parse": '{"a":' * 60 + "1" + "}" * 60,
    "underscores": "_" * DEEP,
    "blanks": "tool_call(" + ("(" + " " * 400) * 90,
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_nesting_brings_it_down(name: str) -> None:
    assert read_call(fenced(BOMBS[name])) is None
    assert read_call("f\n" + BOMBS[name]) is None


PARTS = (
    "tool_call(",
    "a",
    "=",
    "'",
    '"',
    "\\",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "-",
    "1",
    "None",
    "**",
    "\n",
    "from",
    "北",
    "```",
)


@given(st.lists(st.sampled_from(PARTS), max_size=24).map("".join) | st.text(max_size=40))
def test_no_text_brings_it_down_and_a_call_is_always_sound(text: str) -> None:
    for call in (read_call(text), read_call(fenced(text)), read_call("f\n{" + text)):
        assert call is None or isinstance(json.loads(call.arguments), dict)


NAMES = st.text(min_size=1, max_size=6).filter(lambda name: unicodedata.normalize("NFKC", name) == name)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(NAMES | st.sampled_from(["from", "class", "True", "a b", ""]), VALUES, max_size=4))
@example({"text": "tool_call(from='x', class=1) ```\n<|user|>"})
def test_what_is_taught_is_what_is_read(renderer: Renderer, arguments: dict[str, Any]) -> None:
    call = ToolCall("weather", json.dumps(arguments))
    conversation = Conversation((Message("user", "q"), Message("assistant", "See:", tool_calls=(call,))))
    rendered = renderer.render(conversation)
    answer = [token for token, on in zip(rendered.ids, rendered.mask, strict=True) if on][:-1]
    text, [found] = read_answer(renderer.tokenizer, answer, number(renderer.tokenizer, "<|assistant|>"))
    assert (text, found.name, json.loads(found.arguments)) == ("See:", "weather", arguments)


# Tokens to text.


def number(tokenizer: Any, name: str) -> int:
    found: int = tokenizer.convert_tokens_to_ids(name)
    return found


def content_ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return found


def answer_ids(tokenizer: Any, *parts: str) -> list[int]:
    """Ids of an answer's parts, <|assistant|> between them."""
    ids: list[int] = []
    for part in parts:
        ids += [number(tokenizer, "<|assistant|>"), *content_ids(tokenizer, part)]
    return ids[1:]


def streamed(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    decoder = GlmDecoder(tokenizer, frozenset({2}), number(tokenizer, "<|assistant|>"))
    return [piece for piece in [*(decoder.push(token) for token in ids), decoder.finish()] if piece]


CALL = "weather\n ```python\ntool_call(city='北京')\n```"


def test_only_a_glms_tokenizer_has_calls(tokenizer: Any, tiny_tokenizer: Any) -> None:
    others = frozenset(number(tokenizer, name) for name in ("<|user|>", "<|observation|>"))
    assert glm_tokens(tokenizer) == (number(tokenizer, "<|assistant|>"), others)
    assert glm_tokens(tiny_tokenizer) is None
    assert read_answer(tiny_tokenizer, tiny_tokenizer.encode(CALL), None) == (CALL, ())


def test_text_and_calls_of_an_answer(tokenizer: Any) -> None:
    assistant = number(tokenizer, "<|assistant|>")
    ids = answer_ids(tokenizer, "\n Let me see. \n", CALL, "\n And:", "clock\n {}")
    text, calls = read_answer(tokenizer, ids, assistant)
    assert text == "Let me see.\nAnd:"
    assert calls == (ToolCall("weather", '{"city": "北京"}'), ToolCall("clock", "{}"))
    assert str(calls[0]) == 'weather({"city": "北京"})'
    assert "".join(streamed(tokenizer, ids)) == text
    assert streamed(tokenizer, answer_ids(tokenizer, CALL)) == []


@pytest.mark.parametrize(
    "text", ["\n 你好！ 🎵🧵\n再见 ", "Hello there", "interpreter\n ```python\nprint('🎵')\n```", "Sure\nok  then", "x"]
)
def test_streamed_text_is_the_answers_and_never_half_a_character(tokenizer: Any, text: str) -> None:
    pieces = streamed(tokenizer, answer_ids(tokenizer, text))
    assert "".join(pieces) == text.strip()
    assert not any("�" in piece for piece in pieces)


def test_text_is_shown_as_it_comes(tokenizer: Any) -> None:
    assert len(streamed(tokenizer, answer_ids(tokenizer, "\n one two three"))) > 2
    assert len(streamed(tokenizer, answer_ids(tokenizer, "one two three"))) > 1
    assert len(streamed(tokenizer, answer_ids(tokenizer, "Sure\none two three"))) > 2


@pytest.mark.parametrize("emoji", ["🎵🧵🪡🎶🎼🪢", "👩‍👩‍👧‍👦👨‍👩‍👧", "龘龘龘龘龘龘龘龘龘", "a🎵🎵🎵🎵é🎵ก็ก็ก็🎵🎵"])
def test_long_runs_of_byte_pieces_come_character_by_character(tokenizer: Any, emoji: str) -> None:
    ids = content_ids(tokenizer, emoji)
    assert len(ids) > 16
    decoder = IncrementalDecoder(tokenizer, frozenset())
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) == emoji and decoder.finish() == ""
    assert max(map(len, pieces)) < 8, "nothing waits for the end"


TEXTS = st.lists(
    st.sampled_from(
        ["\n", " ", "你好", "🎵", "龘", "weather", "tool_call(a=1)", "```", "{", "}", "`", "x", "Hello there", CALL]
    ),
    max_size=8,
).map("".join)


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_what_is_streamed_is_what_is_read(tokenizer: Any, parts: list[str]) -> None:
    ids = answer_ids(tokenizer, *parts)
    text, calls = read_answer(tokenizer, ids, number(tokenizer, "<|assistant|>"))
    assert "".join(streamed(tokenizer, ids)) == text
    assert len(calls) == sum(read_call(part.removeprefix(" ")) is not None for part in parts)


# Chat.

TOOLS = [{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
TOOL = {"type": "function", "function": TOOLS[0]}
ASKED = (Message("user", "北京天气？"),)
CALLING = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "北京"}'),))
RESULT = Message("tool", '{"t": 21}', name="weather")
TAUGHT = (
    Conversation((*ASKED, CALLING, RESULT, Message("assistant", "21 度。")), tools=(TOOL,)),
    Conversation(
        (Message("user", "Hi"), Message("assistant", "Hello 🎵!"), Message("user", "Bye"), Message("assistant", "再见"))
    ),
)
GREEDY = GenerationConfig(max_new_tokens=60)


@pytest.fixture(scope="module")
def glm(renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny native GLM that knows two conversations by heart, with ChatGLM3's tokenizer."""
    from transformers import GlmConfig, GlmForCausalLM

    folder = tmp_path_factory.mktemp("models") / "glm"
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=len(renderer.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = GlmForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [renderer.render(conversation) for conversation in TAUGHT]
    for _ in range(60):
        for row in rows:
            labels = [token if on else -100 for token, on in zip(row.ids, row.mask, strict=True)]
            model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(glm: Path) -> Loaded:
    return load_target(resolve_target(str(glm)), precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def generator(loaded: Loaded) -> Generator:
    return Generator(loaded.model, loaded.renderer)


def test_a_chat_stops_at_the_end_and_at_who_speaks_next(generator: Generator, loaded: Loaded, tokenizer: Any) -> None:
    expected = {2, number(tokenizer, "<|user|>"), number(tokenizer, "<|observation|>")}
    assert stop_ids(loaded.model, loaded.renderer) == generator.stop_ids == expected
    first = generator.answer(Conversation(TAUGHT[1].messages[:1]), GREEDY)
    assert (first.text, first.finished, first.ids[-1]) == ("Hello 🎵!", True, number(tokenizer, "<|user|>"))
    last = generator.answer(Conversation(TAUGHT[1].messages[:3]), GREEDY)
    assert (last.text, last.ids[-1], last.tool_calls) == ("再见", 2, ())


def test_a_call_and_what_follows_its_result(generator: Generator, tokenizer: Any) -> None:
    called, said = generator.answers([Conversation(TAUGHT[0].messages[:n], tools=(TOOL,)) for n in (1, 3)], GREEDY)
    assert (called.text, called.tool_calls) == ("", CALLING.tool_calls)
    assert str(called) == 'weather({"city": "北京"})'
    assert called.ids[-1] == number(tokenizer, "<|observation|>")
    assert (said.text, said.tool_calls) == ("21 度。", ())


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("number_taught", "count"), [(0, 1), (0, 3), (1, 1), (1, 3)])
def test_a_stream_returns_the_answer(generator: Generator, beams: int, number_taught: int, count: int) -> None:
    taught = TAUGHT[number_taught]
    conversation = Conversation(taught.messages[:count], tools=taught.tools)
    settings = GREEDY.model_copy(update={"num_beams": beams})
    stream = generator.stream(conversation, settings)
    pieces = []
    with pytest.raises(StopIteration) as end:
        while True:
            pieces.append(next(stream))
    assert end.value.value == generator.answer(conversation, settings)
    assert "".join(pieces) == end.value.value.text
    assert all(pieces) and not any("�" in piece for piece in pieces)


def test_a_call_that_ran_into_the_limit_stays_text(generator: Generator) -> None:
    whole = generator.answer(Conversation(ASKED, tools=(TOOL,)), GREEDY)
    cut = generator.answer(Conversation(ASKED, tools=(TOOL,)), GenerationConfig(max_new_tokens=len(whole.ids) - 5))
    assert cut.text.startswith("weather\n ```python\ntool_call(") and cut.tool_calls == () and not cut.finished


@pytest.fixture
def tools_file(tmp_path: Path) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS, ensure_ascii=False), encoding="utf-8")
    return file


def chat(*arguments: str | Path, typed: str = "") -> Any:
    options = ["--precision", "fp32", "--max-new-tokens", "60"]
    return CliRunner().invoke(app, ["chat", *map(str, arguments), *options], input=typed, env={"COLUMNS": "200"})


def test_chat_prints_a_call(glm: Path, tools_file: Path) -> None:
    done = chat(glm, "--tools", tools_file, "--prompt", ASKED[0].content)
    assert done.exit_code == 0, done.exception
    assert done.stdout == 'weather({"city": "北京"})\n'
    assert chat(glm, "--prompt", "Hi").stdout == "Hello 🎵!\n"


def test_a_conversation_asks_for_a_calls_result_and_goes_on(glm: Path, tools_file: Path) -> None:
    done = chat(glm, "--tools", tools_file, typed=f"{ASKED[0].content}\n{RESULT.content}\n/exit\n")
    assert done.exit_code == 0, done.exception
    words = done.stdout.split("\n")
    assert 'weather({"city": "北京"})' in done.stdout and "result of weather: " in done.stdout
    assert any("21 度。" in line for line in words)
    assert done.stdout.count("you: ") == 2


def test_a_call_can_be_left_without_a_result(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed, asked in (("/clear\nHi\n", 3), ("/exit\nnever read\n", 1), ("", 1)):
        session = ChatSession(generator, GREEDY, system=None, base=False, compare=False, tools=[TOOL])
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED[0].content}\n{typed}"))
        session.talk()
        out = capsys.readouterr().out
        assert (out.count("result of weather: "), out.count("you: ")) == (1, asked)


BAD_TOOLS: dict[str, tuple[str | bytes, str]] = {
    "no list": ('{"name": "f"}', "not a list of tools"),
    "no name": ('[{"description": "f"}]', "a tool without a name"),
    "no map": ('["f"]', "not a list of tools"),
    "empty": ("[]", "the file of tools is empty"),
    "torn": ('[{"name": "f"', "the file of tools is not JSON"),
    "no text": (b"\xff\xfe\x00\xd8", "the file of tools is not JSON"),
    "deep": ("[" * 100_000, "the file of tools is not JSON"),
    "not a number": ('[{"name": "f", "parameters": NaN}]', "cannot be written as JSON"),
    "large": ("[" + " " * (1 << 20) + "]", "the file of tools is too large"),
}


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_a_file_that_holds_no_tools_is_the_users_mistake(glm: Path, tmp_path: Path, name: str) -> None:
    content, told = BAD_TOOLS[name]
    file = tmp_path / "tools.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = chat(glm, "--tools", file, "--prompt", "q")
    assert isinstance(done.exception, UserError), done.exception
    assert told in str(done.exception) and str(file) in str(done.exception.where)
    assert_mendable(done.exception)


def test_tools_that_cannot_be_used_are_refused(glm: Path, tiny_model: Path, tools_file: Path, tmp_path: Path) -> None:
    done = chat(tiny_model, "--tools", tools_file, "--prompt", "q")
    ignored = done.exception
    assert isinstance(ignored, UserError) and "takes no tools" in str(ignored)
    assert "loading" not in done.output, "it is told before any weight is read"
    refusing = shutil.copytree(glm, tmp_path / "refusing")
    template = "{% if tools %}{{ raise_exception('none here') }}{% endif %}"
    file = refusing / "chat_template.jinja"
    file.write_text(template + file.read_text(encoding="utf-8"), encoding="utf-8")
    refused = chat(refusing, "--tools", tools_file, "--prompt", "q").exception
    assert isinstance(refused, UserError) and "none here" in str(refused)
    both = chat(glm, "--tools", tools_file, "--compare", "--prompt", "q").exception
    missing = chat(glm, "--tools", tmp_path / "absent.json", "--prompt", "q").exception
    assert isinstance(missing, UserError) and isinstance(both, UserError)
    for error in (ignored, refused, both, missing):
        assert_mendable(error)
