"""Files become rows with their lines; no content of a file is a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import chat_row
from hypothesis import example, given
from hypothesis import strategies as st

from tuneloom.config import SourceConfig
from tuneloom.data.formats import RowShape, parse_row
from tuneloom.data.read import read_rows
from tuneloom.data.row import RowError
from tuneloom.data.sources import BUILTIN, builtin_names, source_files
from tuneloom.errors import UserError, excerpt
from tuneloom.types import Location

QA = json.dumps(chat_row("你是谁？", "我是小织。"), ensure_ascii=False)
Seen = list[tuple[int, str]]


@pytest.fixture
def seen(tmp_path: Path) -> Callable[[str, str | bytes], Seen]:
    """Write a file and return (line, "ok" or the reason why not) of each row."""

    def write_and_read(name: str, content: str | bytes) -> Seen:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_and_parse(file)

    return write_and_read


def read_and_parse(file: Path) -> Seen:
    found: Seen = []
    for row in read_rows(file.name, file):
        assert row.location.file == file.name
        try:
            if row.error is not None:
                raise row.error
            parse_row(row.value, row.location)
        except RowError as error:
            found.append((row.location.line, error.reason))
        else:
            found.append((row.location.line, "ok"))
    return found


def test_jsonl_rows_have_the_line_they_are_on(seen: Callable[..., Seen]) -> None:
    assert seen("x.jsonl", f"{QA}\n\n  \n{QA}\r\n{QA}") == [(1, "ok"), (4, "ok"), (5, "ok")]


def test_a_bad_line_spoils_itself_only(seen: Callable[..., Seen]) -> None:
    assert seen("x.jsonl", f"{QA}\n{QA[:-9]}\n{QA}\n") == [(1, "ok"), (2, "not valid JSON"), (3, "ok")]
    assert seen("x.jsonl", f"{QA}\n{QA[:30]}") == [(1, "ok"), (2, "not valid JSON")]


def test_json_array_rows_have_the_line_they_begin_on(seen: Callable[..., Seen]) -> None:
    pretty = json.dumps([chat_row("q", "a")] * 2, indent=1)
    assert seen("x.json", pretty) == [(2, "ok"), (14, "ok")]
    assert seen("x.json", f"\n\n[{QA}, {QA},\n{QA}]\n") == [(3, "ok"), (3, "ok"), (4, "ok")]
    assert seen("x.json", "[]") == []


def test_a_torn_json_array_keeps_what_came_whole(seen: Callable[..., Seen]) -> None:
    assert seen("x.json", f"[\n{QA},\n{QA},\n{QA[:40]}") == [(2, "ok"), (3, "ok"), (4, "not valid JSON")]
    assert seen("x.json", f"[\n{QA},\n") == [(2, "ok"), (3, "the array is not closed")]
    assert seen("x.json", f"[\n{QA}") == [(2, "ok"), (2, "the array is not closed")]


def test_what_follows_a_json_array_is_told(seen: Callable[..., Seen]) -> None:
    assert seen("x.json", f"[{QA}]\n\n[{QA}]\n") == [(1, "ok"), (3, "text after the end of the array")]


def test_a_json_file_may_be_one_row_or_lines(seen: Callable[..., Seen]) -> None:
    assert seen("x.json", "\n" + json.dumps(chat_row("q", "a"), indent=1)) == [(2, "ok")]
    assert seen("x.json", f"{QA}\n{QA}\n") == [(1, "ok"), (2, "ok")]
    assert seen("x.json", "3") == [(1, "not a map")]


def test_csv_rows_have_the_line_they_begin_on(seen: Callable[..., Seen]) -> None:
    text = 'instruction,output\nq,a\n"two\nlines",a\n\nq,a\nq\nq,a,more\n'
    assert seen("x.csv", text) == [(2, "ok"), (3, "ok"), (6, "ok"), (7, "empty answer"), (8, "more cells than columns")]


def test_csv_cells_may_hold_commas_quotes_json_and_long_texts(seen: Callable[..., Seen]) -> None:
    conversations = json.dumps([{"from": "human", "value": 'say "hi", please'}, {"from": "gpt", "value": "hi"}])
    quoted = conversations.replace('"', '""')
    assert seen("x.csv", f'id,conversations\r\n1,"{quoted}"\r\n') == [(2, "ok")]
    assert seen("x.csv", f"prompt,completion\nq,{'long ' * 40_000}\nq,a\n") == [(2, "ok"), (3, "ok")]


def test_torn_csv_is_told(seen: Callable[..., Seen]) -> None:
    assert seen("x.csv", 'prompt,completion\nq,a\nq,"a') == [(2, "ok"), (3, "not valid csv")]
    assert seen("x.csv", 'prompt,completion\nq,"a"b\n') == [(2, "not valid csv")]
    assert seen("x.csv", "prompt,completion\n") == []


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_utf8_with_and_without_bom_and_gb18030_read_alike(name: str, encoding: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes((QA if name == "x.jsonl" else f"[{QA}]").encode(encoding))
    (row,) = read_rows(name, file)
    assert row.value == json.loads(QA)


def test_bom_and_gb18030_in_csv(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    for encoding in ("utf-8-sig", "gb18030"):
        file.write_bytes("prompt,completion\n你是谁？,我是小织。\n".encode(encoding))
        (row,) = read_rows("x.csv", file)
        assert row.value == {"prompt": "你是谁？", "completion": "我是小织。"}


def test_no_known_encoding_is_told(seen: Callable[..., Seen]) -> None:
    with pytest.raises(UserError, match="no known encoding") as caught:
        seen("x.jsonl", QA.encode("utf-16"))
    assert caught.value.mend == "save it as UTF-8"


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_an_empty_file_is_told(seen: Callable[..., Seen], name: str, content: str) -> None:
    with pytest.raises(UserError, match="the data file is empty") as caught:
        seen(name, content)
    assert caught.value.where == name


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"messages":', "}")])
def test_nesting_of_any_depth_is_a_bad_row(seen: Callable[..., Seen], opening: str, closing: str) -> None:
    for depth in (2, *range(880, 1010), 10_000):  # Python's own limit is near 1,000
        nested = opening * depth + "1" + closing * depth
        for name, text in (("x.jsonl", f"{nested}\n{QA}"), ("x.json", f"[{nested}]"), ("x.json", nested)):
            (_, reason) = seen(name, text)[0]
            assert reason in {"nested too deep", "not a map", "not a list of messages"}
            assert depth < 2000 or reason == "nested too deep"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r'{"prompt": "q\ud800", "completion": "a"}', "holds half a character (a lone surrogate)"),
        (r'{"prompt": "q", "completion": "a\udfff"}', "holds half a character (a lone surrogate)"),
        (r'{"prompt": "q\u0000", "completion": "a"}', "holds a NUL byte"),
        ('{"prompt": "q\x00", "completion": "a"}', "not valid JSON"),
        (r'{"prompt": "\ud83d\ude42", "completion": "a"}', "ok"),
        ('{"prompt": ' + "9" * 5000 + ', "completion": "a"}', "a number too long"),
        ('{"prompt": 1e999, "completion": "a"}', "not text"),
        ('{"prompt": NaN, "completion": "a"}', "not text"),
    ],
)
def test_odd_characters_and_numbers_are_bad_rows(seen: Callable[..., Seen], text: str, reason: str) -> None:
    assert seen("x.jsonl", text) == [(1, reason)]


LONG = "很长 " * 200


@pytest.mark.parametrize(
    ("text", "shown", "mend"),
    [
        (f'{{"prompt": "{LONG}", "completion": "he said "yes" to"}}', '"he said "yes" to"', "at its character 640"),
        (f'{{"prompt": "{LONG}\x00", "completion": "a"}}', "\x00", "at its character 613"),
        (f'{{"prompt": "{LONG}", "completion": "a"}} // the best', '"a"} // the best', "at its character 635"),
        (f'{{"prompt": "{LONG}", "completion": "torn he', '"completion": "torn he', "cut off ends like this"),
        (f'{{"prompt": "{LONG}", "completion": ', '"completion":', "cut off ends like this"),
    ],
)
def test_a_row_that_is_not_json_shows_where(tmp_path: Path, text: str, shown: str, mend: str) -> None:
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    [row] = read_rows("x.jsonl", tmp_path / "x.jsonl")
    assert row.error is not None
    assert row.error.reason == "not valid JSON"
    assert shown.replace("\x00", "\\u0000") in row.error.value
    assert len(row.error.value) <= 80
    assert row.error.mend.endswith(mend)


def test_nul_in_csv_is_a_bad_row(seen: Callable[..., Seen]) -> None:
    assert seen("x.csv", "prompt,completion\nq,a\x00b\nq,a\n") == [(2, "holds a NUL byte"), (3, "ok")]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(QA, encoding="utf-8")


def test_a_folder_is_its_train_files_or_all_of_them(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.csv", "notes.txt", "c.json")
    assert [file.name for _, file in source_files(SourceConfig(path=str(tmp_path)))] == ["a.csv", "b.jsonl", "c.json"]
    write(tmp_path, "train.json", "dev.json")
    assert source_files(SourceConfig(path=str(tmp_path))) == [(str(tmp_path / "train.json"), tmp_path / "train.json")]


def test_a_built_in_set_is_both_languages_or_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [shown for shown, _ in source_files(SourceConfig(path="self_cognition"))] == [
        "self_cognition_en.jsonl",
        "self_cognition_zh.jsonl",
    ]
    assert [shown for shown, _ in source_files(SourceConfig(path="counselling_zh"))] == ["counselling_zh.jsonl"]
    assert set(BUILTIN) < set(builtin_names())
    assert all(file.is_file() for name in builtin_names() for _, file in source_files(SourceConfig(path=name)))


def test_what_is_not_there_or_not_data_is_told(tmp_path: Path) -> None:
    write(tmp_path, "x.xlsx", "noending")
    (tmp_path / "empty").mkdir()
    for path, what, mend in (
        (tmp_path / "none.json", "data not found", "check the path"),
        ("self_cogniton", "data not found", "did you mean `self_cognition`?"),
        ("identity_probes_en", "data not found", ""),
        (tmp_path / "x.xlsx", "unknown kind of data file", ""),
        (tmp_path / "noending", "unknown kind of data file", ""),
        (tmp_path / "empty", "the data folder has no data files", ""),
        ("name" * 100, "the path cannot be looked up", ""),
        ("~no-such-user/x.json", "the path cannot be looked up", ""),
        ("a\x00b", "data not found", ""),
    ):
        with pytest.raises(UserError) as caught:
            source_files(SourceConfig(path=str(path)))
        assert what in caught.value.what
        assert caught.value.where in (str(path), excerpt(str(path)))
        assert mend in (caught.value.mend or "")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match="cannot read the data file"):
        list(read_rows("x.json", tmp_path / "x.json"))


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TURN_KEYS = ("messages", "conversations", "conversation", "role", "content", "from", "value", "weight", "tools")
KEYS = st.sampled_from([*TURN_KEYS, "instruction", "input", "output", "history", "system", "prompt", "completion"])
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "x"])
TREE = st.recursive(
    LEAF | ROLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["x.jsonl", "x.json", "x.csv"])


def test_a_file_cut_off_inside_a_character_loses_its_last_row_only(seen: Callable[..., Seen]) -> None:
    whole = f"{QA}\n{QA}".encode()
    cut = whole[: whole.rindex("织".encode()) + 1]
    assert seen("x.jsonl", cut) == [(1, "ok"), (2, "not valid JSON")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arbitrary")


def assert_rows_or_told(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        for line, reason in read_and_parse(file):
            assert line >= 1
            assert reason
    except UserError as error:
        assert len(error.message().splitlines()) <= 6


@given(name=NAMES, data=st.binary(max_size=200))
@example(name="x.csv", data=b'"')
@example(name="x.csv", data=b"\n,\n,")
@example(name="x.csv", data=b"\r\r\r,,\x00")
@example(name="x.json", data=b"[,,]")
@example(name="x.json", data=b'[{"messages"')
@example(name="x.jsonl", data=b"\xef\xbb\xbf\xef\xbb\xbf{}")
def test_arbitrary_bytes_are_rows_or_told(folder: Path, name: str, data: bytes) -> None:
    assert_rows_or_told(folder / name, data)


@given(rows=st.lists(TREE, max_size=4), cut=st.integers(0, 400), name=NAMES)
def test_arbitrary_json_whole_or_torn_is_rows_or_told(folder: Path, rows: list[object], cut: int, name: str) -> None:
    text = json.dumps(rows, ensure_ascii=False) if name == "x.json" else "\n".join(json.dumps(row) for row in rows)
    data = text.encode("utf-8", errors="surrogatepass")
    assert_rows_or_told(folder / name, data)
    assert_rows_or_told(folder / name, data[:cut])


@given(row=st.dictionaries(KEYS, TREE, max_size=4), columns=st.dictionaries(KEYS, KEYS, max_size=2))
def test_arbitrary_values_and_columns_are_conversations_or_row_errors(row: dict[str, object], columns: dict[str, str]) -> None:
    try:
        conversation = parse_row(row, Location("x", 1), RowShape(columns)).conversation
    except RowError as error:
        assert error.reason
        assert error.mend
    else:
        assert conversation.messages[-1].role == "assistant"


@pytest.mark.parametrize("key", ["subset", "split", "revision"])
def test_a_hubs_settings_on_a_local_source_are_told(key: str, tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl")
    for path in (str(tmp_path / "x.jsonl"), "self_cognition"):
        with pytest.raises(UserError, match=f"{key} has no effect") as caught:
            source_files(SourceConfig.model_validate({"path": path, key: "other"}))
        assert caught.value.mend
