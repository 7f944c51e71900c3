"""`tuneloom data check` and `data show`: the report and the label view, for people, machines and pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import chat_row
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tuneloom.cli.main import app
from tuneloom.data.view import token_views
from tuneloom.errors import UserError

WriteRows = Callable[..., Path]
ROWS = [
    chat_row("Who are you?", "I am {{name}}."),
    chat_row("你是谁？", "我是小织。", "谢谢", "不客气 🎵"),
    chat_row("你是谁？", "我是小织。", "谢谢", "不客气 🎵"),
    {"messages": [{"role": "user", "content": "q"}]},
    chat_row("q", ""),
    {"messages": [*chat_row("q", "a")["messages"], {"role": "user", "content": "and?"}]},
    chat_row("long", "word " * 60),
    chat_row("I forgot to ask: what do people call you?", "Loomi"),
]


@pytest.fixture
def data(tiny_model: Path) -> Callable[..., Result]:
    """Run a `tuneloom data` verb with the tiny model's tokenizer."""

    def run(verb: str, *words: str | Path) -> Result:
        return CliRunner().invoke(app, ["data", verb, *map(str, words), "--model", str(tiny_model)], env={"COLUMNS": "160"})

    return run


def test_check_counts_every_row_and_names_file_line_reason_and_mend(data: Callable[..., Result], write_rows: WriteRows) -> None:
    file = write_rows(ROWS)
    result = data("check", file, "--set", "data.cutoff_len=64")
    assert result.exit_code == 0, result.output
    for said in (
        f"{file}: OpenAI messages 6",
        "8 read, 5 usable, 3 dropped, 1 repaired",
        "duplicates  1",
        f"{{{{name}}}} has no value, first at {file}:1: --set data.variables.name=...",
        f"leaked probe  {file}:8: I forgot to ask: what do people call you?",
        "1  empty answer",
        "1  longer than the cutoff",
        f'{file}:4 row: no answer (got "q"; add an assistant message)',
        f"{file}:6 row: messages after the last answer taken off",
    ):
        assert said in result.output
    assert re.search(r"█+ 1\n", result.output), "a histogram"


def test_check_as_json_has_what_the_run_keeps(data: Callable[..., Result], write_rows: WriteRows) -> None:
    file = write_rows(ROWS)
    report = json.loads(data("check", file, "--json", "--set", "data.cutoff_len=64").output)
    assert {key: report[key] for key in ("read", "dropped", "repaired", "duplicates", "empty_answers", "cut")} == {
        "read": 8,
        "dropped": 3,
        "repaired": 1,
        "duplicates": 1,
        "empty_answers": 1,
        "cut": 0,
    }
    assert report["answer_tokens_lost"] > 60
    assert sum(bar["count"] for bar in report["train"]["histogram"]) == report["train"]["samples"] == 5
    assert report["leaked_probes"] == [{"probe": "I forgot to ask: what do people call you?", "where": f"{file}:8"}]
    assert {problem["line"] for problem in report["problems"]} == {4, 5, 6, 7}


def test_strict_stops_at_the_first_bad_row_also_from_the_cache(data: Callable[..., Result], write_rows: WriteRows) -> None:
    file = write_rows(ROWS)
    assert data("check", file).exit_code == 0
    for _ in range(2):
        result = data("check", file, "--strict")
        assert isinstance(result.exception, UserError)
        assert result.exception.where == f"{file}:4 row"
    good = write_rows([chat_row("q", "a")], "good.jsonl")
    assert data("check", good, "--strict").exit_code == 0


def test_check_without_a_usable_row_reports_and_is_a_mistake(data: Callable[..., Result], write_rows: WriteRows) -> None:
    result = data("check", write_rows([{"x": 1}]))
    assert "1 read, 0 usable, 1 dropped" in result.output
    assert isinstance(result.exception, UserError)
    assert result.exception.got == 'row: no known format (got ["x"])'


def test_check_refuses_a_source_that_training_refuses(
    data: Callable[..., Result], write_rows: WriteRows, tmp_path: Path
) -> None:
    good, bad = write_rows([chat_row("q", "a")], "good.jsonl"), write_rows([chat_row("q", "")], "bad.jsonl")
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{train: [{good}, {bad}]}}")
    result = data("check", config)
    assert f"{bad}: no usable row" in result.output
    assert "2 read, 1 usable, 1 dropped" in result.output
    assert isinstance(result.exception, UserError)
    assert result.exception.where == f"{bad}:1"


@pytest.mark.parametrize("verb", ["check", "show"])
def test_missing_data_is_told_before_a_model_is_looked_for(verb: str) -> None:
    result = CliRunner().invoke(app, ["data", verb, "nowhere.jsonl", "--model", "no-model-of-this-name"])
    assert isinstance(result.exception, UserError)
    assert result.exception.what == "data not found"


def test_a_changed_file_and_changed_settings_are_read_anew(data: Callable[..., Result], write_rows: WriteRows) -> None:
    def tokens(*sets: str) -> int:
        report = json.loads(data("check", file, "--json", *(word for text in sets for word in ("--set", text))).output)
        return int(report["train"]["tokens"])

    file = write_rows([chat_row("q", "a")])
    first = tokens()
    write_rows([chat_row("q", "a much longer answer")])
    assert tokens() > first
    write_rows([chat_row("{{x}}", "a")])
    assert tokens("data.variables.x=a far longer text than one placeholder") > tokens("data.variables.x=a")


def test_columns_of_other_names_and_whole_configs(data: Callable[..., Result], write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows([{"question": "q", "reply": "a"}])
    result = data("check", file, "--columns", "instruction=question", "--columns", "output=reply")
    assert "Alpaca 1" in result.output
    config = tmp_path / "config.yaml"
    other = write_rows([chat_row("q", "a")], "other.jsonl")
    config.write_text(
        f"data: {{train: [{other}, {{path: {file}, columns: {{instruction: question, output: reply}}}}], validation: {other}}}"
    )
    report = json.loads(data("check", config, "--json").output)
    assert [source["path"] for source in report["sources"]] == [str(other), str(file), str(other)]
    assert [source["role"] for source in report["sources"]] == ["train", "train", "validation"]
    assert (report["duplicates"], report["leaks"]) == (1, 1), "two are trained on, and the third asks what they taught"
    leak = {"where": f"{other}:1", "role": "validation", "trained": f"{other}:1"}
    assert report["leaked_conversations"] == [leak]
    said = data("check", config).output
    assert f"source  {other} (validation): OpenAI messages 1" in said
    assert f"leak  {other}:1 (validation): the conversation is trained on too, at {other}:1 (take it out of one" in said
    assert isinstance(data("check", file, "--columns", "instruction").exception, UserError)
    assert isinstance(data("check", config, "--columns", "output=reply").exception, UserError)
    assert isinstance(data("check", file, "--set", f"data.train={other}").exception, UserError), "would have no effect"


def test_show_tells_a_placeholder_without_a_value(data: Callable[..., Result], write_rows: WriteRows) -> None:
    file = write_rows(ROWS)
    assert (
        f"placeholder {{{{name}}}} has no value, first at {file}:1: --set data.variables.name=..." in data("show", file).output
    )
    assert "has no value" not in data("show", file, "--set", "data.variables.name=Ada").output


def test_show_prints_chat_and_tokens_learnt_ones_in_brackets(data: Callable[..., Result], write_rows: WriteRows) -> None:
    file = write_rows(ROWS)
    result = data("show", file, "--rows", "1", "--from", "2")
    assert f"row 2  {file}:2" in result.output
    assert "⟦我是小织。<|im_end|>⟧" in result.output
    assert "⟦不客气 🎵<|im_end|>⟧" in result.output
    assert "⟦你是谁" not in result.output
    assert "Who are you" not in result.output
    last = data("show", file, "--rows", "1", "--from", "2", "--set", "data.train_on=last_assistant")
    assert "⟦我是小织。" not in last.output
    assert "⟦不客气 🎵<|im_end|>⟧" in last.output


def test_show_says_how_many_rows_it_passed_over(data: Callable[..., Result], write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows(ROWS)
    assert "passed over" not in data("show", file, "--rows", "3").output
    result = data("show", file, "--rows", "2", "--from", "3")
    assert f"row 4  {file}:6" in result.output
    assert f"passed over so far: 2 that cannot be used; see why with: tuneloom data check {file}" in result.output
    assert "passed over so far: 2" in data("show", file, "--html", tmp_path / "page.html", "--from", "4").output


def test_show_says_why_a_row_makes_no_sample(data: Callable[..., Result], write_rows: WriteRows) -> None:
    file = write_rows(ROWS)
    assert "no sample: longer than the cutoff" in data("show", file, "--from", "5", "--set", "data.cutoff_len=64").output
    result = data("show", file, "--from", "99")
    assert isinstance(result.exception, UserError)
    assert result.exception.what == "no row to show"


class _Page(HTMLParser):
    """Collects a page's tags, and its text by the class that it stands in."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.learnt = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and "learnt" in self._open[-1].split() and "tokens" in self._open:
            self.learnt += data


def test_the_page_stands_alone_and_escapes_all_text(data: Callable[..., Result], write_rows: WriteRows, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    file = write_rows([chat_row(attack, f'no {attack} & "quotes"')])
    page = tmp_path / "page.html"
    assert data("show", file, "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    parsed = _Page()
    parsed.feed(text)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img", "link", "iframe"})
    assert not any(key in ("src", "href") or key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert parsed.learnt == f'no {attack} & "quotes"<|im_end|>'
    again = data("show", file, "--html", page)
    assert isinstance(again.exception, UserError)
    assert page.read_text(encoding="utf-8") == text, "nothing is overwritten"


@given(st.text(max_size=40), st.lists(st.booleans(), max_size=200))
def test_views_join_to_the_text_and_hold_every_token_once(tiny_tokenizer: Any, text: str, labels: list[bool]) -> None:
    ids = tiny_tokenizer.encode(text)
    mask = (labels + [False] * len(ids))[: len(ids)]
    views = token_views(ids, mask, tiny_tokenizer)
    assert [i for view in views for i in view.ids] == ids
    assert [view.position for view in views] == [sum(len(v.ids) for v in views[:k]) for k in range(len(views))]
    assert all(mask[view.position + k] == view.supervised for view in views for k in range(len(view.ids)))
    if len(set(mask)) < 2:
        assert "".join(view.text for view in views) == tiny_tokenizer.decode(ids)
