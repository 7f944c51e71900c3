"""Sources that are no plain files: sets of a hub, of ModelScope, of a `dataset_info.json`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import ROOT, chat_row
from helpers import assert_mendable
from hub_server import COMMIT, HubServer
from pyarrow import parquet

from tuneloom.config import SourceConfig, build_config
from tuneloom.data.conversations import ConversationReader
from tuneloom.errors import UserError
from tuneloom.types import Conversation


def read(path: str | Path, **settings: Any) -> list[Conversation]:
    """Return a source's conversations; a row that is none raises."""
    reader = ConversationReader(SourceConfig(path=str(path), **settings), {})
    return [read.conversation for read in reader.read(reader.new_report(), strict=True)]


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def refused(path: str | Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    assert_mendable(caught.value)
    return caught.value


# The hub, by its real client.

TOKEN = "hf_" + "s3cret" * 6

READ_MANY = """
import json, sys, time
from tuneloom.config import SourceConfig
from tuneloom.data.conversations import ConversationReader
from tuneloom.errors import UserError
told = []
for settings in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        reader = ConversationReader(SourceConfig(**settings), {})
        read = [read.conversation for read in reader.read(reader.new_report(), strict=True)]
        rows = [[str(c.location), [[m.role, m.content, m.weight] for m in c.messages]] for c in read]
        calls = [[[call.name, json.loads(call.arguments)] for m in c.messages for call in m.tool_calls] for c in read]
        told.append({"rows": rows, "calls": calls, "tools": [c.tools for c in read]})
    except UserError as error:
        told.append({"error": str(error), "what": error.what, "got": error.got, "expected": error.expected, "mend": error.mend})
    told[-1]["seconds"] = time.monotonic() - start
print(json.dumps(told))
"""


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(*rows: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def called(name: str, arguments: dict[str, Any], **properties: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Please."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Done.", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is done.", "weight": 1},
    ]
    return {"messages": turns, "tools": [tool(name, **properties)]}


SUBSETS = b"""---
configs:
- config_name: en
  data_files: [{split: train, path: en/*.parquet}]
- config_name: zh
  data_files: [{split: train, path: zh/*.parquet}]
---
"""
SETS = {
    "owner/talk": {
        "train.jsonl": lines(chat_row("Who are you?", "Loomi."), chat_row("And I?", "A weaver.")),
        "test.jsonl": lines(chat_row("Yes?", "Yes.")),
    },
    "owner/table": {
        "README.md": SUBSETS,
        "en/part-0.parquet": table({"question": "Who?", "answer": "I."}, {"question": "Why?", "answer": "So."}),
        "zh/part-0.parquet": table({"question": "谁？", "answer": "我。"}),
    },
    "owner/tools": {
        "train.jsonl": lines(
            called("weather", {"city": "Rome"}, city="string"),
            called("alarm", {"day": "Monday", "hour": 7}, day="string", hour="integer"),
            chat_row("Hello.", "Hello."),
        )
    },
    "owner/script": {"script.py": b"open('script-ran', 'w').close()\n", "train.jsonl": lines(chat_row("a", "b"))},
}


class Client:
    """Reads sources in a process of its own, since HF_ENDPOINT is read once."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.output = ""

    def read(self, *sources: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        kept_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        own = {name: value for name, value in os.environ.items() if name not in kept_out and "proxy" not in name.lower()}
        own |= {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(self.folder / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", READ_MANY, json.dumps(sources)]
        done = subprocess.run(
            command, cwd=self.folder, env=own | environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        self.output += done.stdout + done.stderr
        return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = HubServer(SETS, failing={"owner/down": 503, "owner/silent": 0})
    yield Client(server, tmp_path_factory.mktemp("hub"))
    server.end()


FAULTS: tuple[tuple[dict[str, str], dict[str, str]], ...] = (
    ({"path": "owner/nothing"}, {"what": "data not found", "got": "no such set on", "mend": "token"}),
    ({"path": "owner/talk", "revision": "v9"}, {"what": "no such revision", "got": "revision: v9"}),
    ({"path": "owner/talk", "split": "dev"}, {"what": "no such split", "got": "dev", "expected": "train, test"}),
    ({"path": "owner/talk", "subset": "fr"}, {"what": "no such subset", "got": "subset: fr", "expected": "default"}),
    ({"path": "owner/table", "subset": "fr"}, {"what": "no such subset", "expected": "en, zh"}),
    ({"path": "owner/table"}, {"what": "several subsets", "expected": "en, zh", "mend": "`subset`"}),
    ({"path": "owner/script"}, {"what": "cannot be read", "got": "scripts are no longer supported", "mend": "download"}),
    ({"path": "owner/down"}, {"what": "data not found", "got": "503", "mend": "HF_HUB_OFFLINE=1"}),
    ({"path": "owner/silent"}, {"what": "data not found", "got": "timed out", "mend": "HF_ENDPOINT"}),
)


@pytest.fixture(scope="module")
def online(client: Client) -> list[dict[str, Any]]:
    """What the first use of each set gave, then of each fault."""
    return client.read(
        {"path": "owner/talk"},
        {"path": "owner/talk", "split": "test", "revision": COMMIT},
        {"path": "owner/table", "subset": "en", "columns": {"instruction": "question", "output": "answer"}},
        {"path": "owner/tools"},
        *(source for source, _ in FAULTS),
    )


def test_rows_of_the_hub_that_is_named(client: Client, online: list[dict[str, Any]]) -> None:
    talk, test, english, _ = online[:4]
    assert talk["rows"] == [
        ["owner/talk[train]:1", [["user", "Who are you?", 1], ["assistant", "Loomi.", 1]]],
        ["owner/talk[train]:2", [["user", "And I?", 1], ["assistant", "A weaver.", 1]]],
    ]
    assert test["rows"] == [["owner/talk[test]:1", [["user", "Yes?", 1], ["assistant", "Yes.", 1]]]]
    assert [row[0] for row in english["rows"]] == ["owner/table/en[train]:1", "owner/table/en[train]:2"]
    assert english["rows"][1][1] == [["user", "Why?", 1], ["assistant", "So.", 1]]
    assert f"GET /datasets/owner/talk/resolve/{COMMIT}/train.jsonl" in client.server.requests
    assert client.server.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in client.output


def test_rows_unlike_each_other_come_as_they_were_written(online: list[dict[str, Any]]) -> None:
    tools = online[3]
    assert tools["calls"] == [[["weather", {"city": "Rome"}]], [["alarm", {"day": "Monday", "hour": 7}]], []]
    assert tools["tools"] == [[tool("weather", city="string")], [tool("alarm", day="string", hour="integer")], []]


def test_faults_of_the_hub_are_told_at_once(client: Client, online: list[dict[str, Any]]) -> None:
    for (source, expected), told in zip(FAULTS, online[4:], strict=True):
        assert "error" in told, source
        for field, text in expected.items():
            assert text in str(told[field]), (source, told)
        assert len(told["error"].splitlines()) <= 6
        assert told["seconds"] < 5, (source, told)
    assert not list(client.folder.rglob("script-ran"))


def test_a_second_use_needs_no_network(client: Client, online: list[dict[str, Any]]) -> None:
    before = len(client.server.requests)
    talk, pinned, other, chinese, unknown = client.read(
        {"path": "owner/talk"},
        {"path": "owner/talk", "split": "test", "revision": COMMIT},
        {"path": "owner/talk", "revision": "v9"},
        {"path": "owner/table", "subset": "zh"},
        {"path": "owner/nothing"},
        HF_HUB_OFFLINE="1",
    )
    assert len(client.server.requests) == before
    assert (talk["rows"], pinned["rows"]) == (online[0]["rows"], online[1]["rows"])
    assert (other["what"], COMMIT in other["mend"]) == ("the copy on this machine may be of another revision", True)
    assert "'en'" in chinese["got"]
    assert "no such file or folder" in unknown["got"]
    assert all("HF_HUB_OFFLINE" in fault["mend"] for fault in (other, chinese, unknown))


def test_without_network_nothing_is_waited_for(tmp_path: Path) -> None:
    server = HubServer({}, {})
    server.end()
    secret = server.endpoint.replace("//", "//me:geheim@")
    client = Client(server, tmp_path)
    (told,) = client.read({"path": "owner/talk"}, HF_ENDPOINT=secret)
    assert "does not answer" in told["got"]
    assert "HF_HUB_OFFLINE=1" in told["mend"]
    assert told["seconds"] < 5
    assert "geheim" not in client.output


# ModelScope.


def test_modelscope_names_its_package_and_the_shape_of_an_id() -> None:
    assert refused("modelscope://owner/name").mend == "pip install 'tuneloom[modelscope]'"
    assert refused("modelscope://name").expected == "modelscope://owner/name"
    assert "subset" in refused("modelscope://owner/name", subset="en").what


def test_a_set_of_modelscope_is_read_by_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """With a stand-in for the client's one function, of the same arguments."""
    copy = tmp_path / "copy"
    (copy / ".cache").mkdir(parents=True)
    (copy / "data").mkdir()
    (copy / ".cache" / "train.jsonl").write_bytes(lines({"text": "no dialogue"}))
    (copy / "configuration.json").write_text("{}", encoding="utf-8")
    (copy / "data" / "train.jsonl").write_bytes(lines(chat_row("a", "b")))
    (copy / "data" / "test.jsonl").write_bytes(lines(chat_row("c", "d")))
    signature = "def dataset_snapshot_download(dataset_id, revision='master', **_):"
    code = f"{signature}\n    return {str(copy)!r} if revision == 'v1' else 1 / 0\n"
    (tmp_path / "modelscope.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    request.addfinalizer(lambda: sys.modules.pop("modelscope", None))
    (row,) = read("modelscope://owner/name", revision="v1")
    assert (said(row), str(row.location)) == (
        [("user", "a"), ("assistant", "b")],
        "modelscope://owner/name/data/train.jsonl:1",
    )
    assert said(read("modelscope://owner/name", revision="v1", split="test")[0])[0] == ("user", "c")
    assert "no such split" in refused("modelscope://owner/name", revision="v1", split="dev").what
    assert refused("modelscope://owner/name").got == "ModelScope gave: division by zero"


# dataset_info.json.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def write(folder: Path, info: object, **files: Sequence[object]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info, ensure_ascii=False), encoding="utf-8")
    return folder


ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi.", "Hello."]], "system": "Be brief."},
    {"instruction": "Who?", "input": "", "output": "I."},
]


def test_alpaca_is_the_default_and_a_name_is_a_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"identity": {"file_name": "rows.json"}}, rows=ALPACA)
    expected = [
        [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Add.\n1 2"), ("assistant", "3")],
        [("user", "Who?"), ("assistant", "I.")],
    ]
    monkeypatch.chdir(folder.parent)
    for name in ("data/identity", "data/dataset_info.json/identity", folder / "identity", "./data/identity"):
        rows = read(name)
        assert [said(row) for row in rows] == expected
    assert str(rows[0].location) == "data/rows.json:1"


def test_columns_of_alpaca_are_mapped(folder: Path) -> None:
    columns = {
        "prompt": "q",
        "query": "more",
        "response": "a",
        "history": "before",
        "system": "persona",
        "tools": "functions",
    }
    row = {
        "q": "Go.",
        "more": "Now.",
        "a": "Gone.",
        "before": [["Hi.", "Hello."]],
        "persona": "Be brief.",
        "functions": json.dumps([tool("go")]),
    }
    write(folder, {"x": {"file_name": "rows.json", "columns": columns}}, rows=[row])
    (conversation,) = read(folder / "x")
    assert said(conversation) == [
        ("system", "Be brief."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Go.\nNow."),
        ("assistant", "Gone."),
    ]
    assert conversation.tools[0]["function"]["name"] == "go"
    write(folder, {"x": {"file_name": "rows.json", "columns": columns}}, rows=[{**row, "a": None}])
    assert "`a`" in str(refused(folder / "x")) or " a" in str(refused(folder / "x").where)


TURNS = [
    ("human", "Weather?"),
    ("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
    ("observation", "Sun."),
    ("gpt", "Sunny."),
]
ROLES = ["system", "user", "assistant", "tool", "assistant"]


def test_sharegpt_by_its_own_names_and_by_tags(folder: Path) -> None:
    own = [{"conversations": [{"from": who, "value": text} for who, text in TURNS], "system": "Be brief."}]
    theirs = {"human": "Q", "function_call": "CALL", "observation": "RESULT", "gpt": "A"}
    tagged = [
        {"talk": [{"who": "S", "says": "Be brief."}, *({"who": theirs[who], "says": text} for who, text in TURNS)]},
    ]
    tags = {
        "role_tag": "who",
        "content_tag": "says",
        "user_tag": "Q",
        "assistant_tag": "A",
        "observation_tag": "RESULT",
        "function_tag": "CALL",
        "system_tag": "S",
    }
    half = [{"chat": [{"from": who, "value": text} for who, text in TURNS], "persona": "Be brief."}]
    beside = [{"chat": [{"role": "Q", "content": "Hi."}, {"role": "A", "content": "Hello."}], "persona": "Be brief."}]
    write(
        folder,
        {
            "own": {"file_name": "own.json", "formatting": "sharegpt"},
            "tagged": {"file_name": "tagged.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
            "half": {"file_name": "half.json", "formatting": "sharegpt", "columns": {"messages": "chat", "system": "persona"}},
            "beside": {
                "file_name": "beside.json",
                "formatting": "openai",
                "columns": {"messages": "chat", "system": "persona"},
                "tags": {"user_tag": "Q", "assistant_tag": "A"},
            },
        },
        own=own,
        tagged=tagged,
        half=half,
        beside=beside,
    )
    for name in ("own", "tagged", "half"):
        (conversation,) = read(folder / name)
        assert [message.role for message in conversation.messages] == ROLES, name
        assert conversation.messages[0].content == "Be brief."
        assert [(call.name, json.loads(call.arguments)) for call in conversation.messages[2].tool_calls] == [
            ("weather", {"city": "Rome"})
        ]
        assert conversation.messages[4].content == "Sunny."
    (conversation,) = read(folder / "beside")
    assert said(conversation) == [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello.")]


def test_a_system_column_counts_where_no_system_message_is(folder: Path) -> None:
    messages = chat_row("Hi.", "Hello.")["messages"]
    rows = [
        {"messages": messages, "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be kind."}, *messages], "system": "Be brief."},
    ]
    write(folder, {}, rows=rows)
    assert [said(row)[0] for row in read(folder / "rows.json")] == [("system", "Be brief."), ("system", "Be kind.")]


def test_openai_formatting(folder: Path) -> None:
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *chat_row("Hi.", "Hello.")["messages"]]}]
    columns = {"messages": "messages"}
    write(
        folder,
        {
            "x": {"file_name": "rows.json", "formatting": "openai", "columns": columns, "tags": tags},
            "y": {"file_name": "rows.json", "formatting": "openai"},
            "z": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        },
        rows=rows,
    )
    for name in "xyz":
        assert said(read(folder / name)[0]) == [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello.")]


def test_the_sources_own_settings_win_over_the_entrys(folder: Path) -> None:
    entry = {"file_name": "rows.json", "columns": {"prompt": "q", "response": "bad"}}
    write(folder, {"x": entry}, rows=[{"q": "Who?", "bad": "No.", "good": "Yes."}])
    assert said(read(folder / "x")[0])[1] == ("assistant", "No.")
    assert said(read(folder / "x", columns={"output": "good"})[0])[1] == ("assistant", "Yes.")


def test_num_samples_a_folder_and_a_file_elsewhere(folder: Path) -> None:
    (folder / "many").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "many" / f"{name}.jsonl").write_bytes(lines(chat_row(name, "x"), chat_row(name * 2, "x")))
    (folder.parent / "outside.jsonl").write_bytes(lines(chat_row("out", "x")))
    write(
        folder,
        {
            "few": {"file_name": "many", "num_samples": 3},
            "outside": {"file_name": "../outside.jsonl"},
            "system": {"file_name": "../../../../../../../../../../etc/passwd"},
            "v1.5": {"file_name": "many/a.jsonl"},
            "self_cognition": {"file_name": "self_cognition"},
        },
    )
    assert [said(row)[0][1] for row in read(folder / "few")] == ["a", "aa", "b"]
    assert [said(row)[0][1] for row in read(folder / "outside")] == ["out"]
    assert len(read(folder / "v1.5")) == 2
    assert "unknown kind of data file" in str(refused(folder / "system"))
    assert "file is not there" in str(refused(folder / "self_cognition"))


def test_an_entrys_place_on_a_hub(folder: Path) -> None:
    write(
        folder,
        {
            "both": {"file_name": "rows.json", "hf_hub_url": "owner/name", "ms_hub_url": "owner/name", "subset": "en"},
            "hub": {"file_name": "gone.json", "hf_hub_url": "owner/name"},
            "scope": {"ms_hub_url": "owner/name"},
            "part": {"hf_hub_url": "owner/name", "folder": "en"},
        },
        rows=ALPACA,
    )
    assert len(read(folder / "both")) == 2, "a file that is there is read"
    assert (refused(folder / "hub").where, refused(folder / "scope").where) == ("owner/name", "modelscope://owner/name")
    assert "`folder`" in refused(folder / "part").what


@pytest.mark.parametrize(
    ("entry", "what", "got"),
    [
        ({"script_url": "belle"}, "no place that can be read", "script_url"),
        ({"om_hub_url": "owner/name"}, "no place that can be read", "om_hub_url"),
        ({"cloud_file_name": "s3://x"}, "no place that can be read", "cloud_file_name"),
        ({}, "no place that can be read", "no file_name"),
        ({"file_name": 3}, "file_name is not text", "3"),
        ({"file_name": "gone.json"}, "file is not there", "gone.json"),
        ({"file_name": "rows.json", "ranking": True}, "not a dialogue in text", "ranking: preference"),
        (
            {
                "file_name": "rows.json",
                "ranking": True,
                "columns": {"prompt": "p", "chosen": "c", "rejected": "r"},
            },
            "not a dialogue in text",
            "columns.chosen: preference",
        ),
        ({"file_name": "rows.json", "columns": {"kto_tag": "label"}}, "not a dialogue in text", "columns.kto_tag: preference"),
        ({"file_name": "rows.json", "columns": {"images": "images"}}, "not a dialogue in text", "columns.images"),
        ({"file_name": "rows.json", "columns": {"audios": "audios"}}, "not a dialogue in text", "sound"),
        ({"file_name": "rows.json", "format": "sharegpt"}, "unknown key", "format"),
        ({"file_name": "rows.json", "columns": {"promt": "q"}}, "unknown key", "columns.promt"),
        ({"file_name": "rows.json", "tags": {"user": "q"}}, "unknown key", "tags.user"),
        ({"file_name": "rows.json", "columns": ["q"]}, "columns is not a map", '["q"]'),
        ({"file_name": "rows.json", "formatting": "share_gpt"}, "unknown formatting", "share_gpt"),
        ({"file_name": "rows.json", "num_samples": 0}, "num_samples is no count", "0"),
        ({"file_name": "rows.json", "num_samples": "5"}, "num_samples is no count", '"5"'),
        ({"file_name": "rows.json", "subset": "en"}, "subset has no effect on a local file", "en"),
        ({"file_name": "rows.json", "split": "test"}, "split has no effect on a local file", "test"),
        ({"file_name": "rows.json", "folder": "x"}, "folder has no effect on a local file", "x"),
        ("rows.json", "the entry is not a map", "rows.json"),
    ],
)
def test_what_an_entry_cannot_be_is_refused_by_name(folder: Path, entry: object, what: str, got: str) -> None:
    error = refused(write(folder, {"x": entry}, rows=ALPACA) / "x")
    assert what in error.what
    assert got in str(error.got)
    assert str(folder / "dataset_info.json") in str(error.where)


def test_the_nearest_name_is_told(folder: Path) -> None:
    write(
        folder, {"identity": {"file_name": "rows.json", "formating": "alpaca"}, "other": {"file_name": "x.json"}}, rows=ALPACA
    )
    assert refused(folder / "identity").mend == "did you mean `formatting`?"
    error = refused(folder / "identiti")
    assert (error.mend, error.expected) == ("did you mean `identity`?", "identity, other")
    assert "data not found" in str(refused(folder / "identity.json")), "a file's name is a file"


def test_the_folder_and_the_file_itself_name_their_sets(folder: Path) -> None:
    write(folder, {"identity": {"file_name": "rows.json"}, "demo": {"hf_hub_url": "a/b"}}, rows=ALPACA)
    for path in (folder, folder / "dataset_info.json"):
        assert refused(path).expected == f"{folder}/identity, {folder}/demo"
    other = write(folder.parent / "saved", {"features": {"file_name": {"dtype": "string"}}}, train=ALPACA)
    assert len(read(other)) == 2, "a dataset_info.json of another kind is none of ours"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_encodings_of_dataset_info(folder: Path, encoding: str) -> None:
    write(folder, {}, 身份=ALPACA)
    text = json.dumps({"自我认知": {"file_name": "身份.json"}}, ensure_ascii=False)
    (folder / "dataset_info.json").write_bytes(text.encode(encoding))
    assert len(read(folder / "自我认知")) == 2


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (b'{\n "x": {"file_name": "a.json"}\n "y": {}\n}', "not valid JSON", "dataset_info.json:3"),
        (b"", "not valid JSON", "dataset_info.json"),
        (b'["x"]', "not a map", "dataset_info.json"),
        ("{}".encode("utf-16"), "no known encoding", "dataset_info.json"),
        (b"[" * 100_000, "not valid JSON", "dataset_info.json"),
    ],
)
def test_a_broken_dataset_info_is_told(folder: Path, content: bytes, what: str, where: str) -> None:
    write(folder, {})
    (folder / "dataset_info.json").write_bytes(content)
    error = refused(folder / "x")
    assert what in error.what
    assert where in str(error.where)


def test_a_path_that_cannot_be_looked_up_is_told() -> None:
    assert "cannot be looked up" in refused("x" * 5000).what


# Settings of a source.


@pytest.mark.parametrize(("key", "value"), [("subset", "en"), ("split", "test"), ("revision", "v1")])
def test_a_setting_of_a_hubs_set_is_refused_elsewhere(folder: Path, key: str, value: str) -> None:
    write(folder, {"x": {"file_name": "rows.json"}}, rows=ALPACA)
    (folder.parent / "plain").mkdir()
    (folder.parent / "plain" / "train.jsonl").write_bytes(lines(chat_row("a", "b")))
    kinds = {
        "self_cognition": "a built-in set",
        str(folder / "rows.json"): "a local file",
        str(folder / "x"): "a local file",
        str(folder.parent / "plain"): "a local folder",
    }
    for path, kind in kinds.items():
        error = refused(path, **{key: value})
        assert (error.what, error.got) == (f"{key} has no effect on {kind}", f"{key}: {value}")


def test_the_default_split_written_out_is_no_mistake(folder: Path) -> None:
    write(folder, {}, rows=ALPACA)
    assert len(read(folder / "rows.json", split="train")) == 2


@pytest.mark.parametrize("place", ["train", "validation"])
@pytest.mark.parametrize(
    ("settings", "mend"),
    [
        ({"columns": {"instructon": "q"}}, "did you mean `instruction`?"),
        ({"columns": {"question": "instruction"}}, "our name comes first: `instruction: question`"),
        ({"columns": {"xyz": "q"}}, "remove it or correct it"),
        ({"roles": {"asistant": "bot"}}, "did you mean `assistant`?"),
    ],
)
def test_a_wrong_name_of_ours_gives_the_nearest(place: str, settings: dict[str, dict[str, str]], mend: str) -> None:
    ((key, names),) = settings.items()
    with pytest.raises(UserError) as caught:
        build_config({"data": {place: {"path": "x.json", **settings}}})
    assert_mendable(caught.value)
    assert caught.value.mend == mend
    assert str(caught.value.where).endswith(f".{key}.{next(iter(names))}")
    assert "assistant" in str(caught.value.expected) or "instruction" in str(caught.value.expected)


def test_the_error_inside_a_source_is_told_where_a_share_was_possible_too() -> None:
    for settings, what in (({"count": 1, "share": 0.5}, "data.validation"), ({"split": "a b"}, "data.validation.split")):
        with pytest.raises(UserError) as caught:
            build_config({"data": {"validation": {"path": "x.json", **settings}}})
        assert f"`{what}`" in caught.value.what
        assert "valid number" not in str(caught.value)


# Arrow and Parquet files: what columns do to rows is undone.


def test_keys_that_a_map_did_not_have_are_left_out_again(tmp_path: Path) -> None:
    rows = [called("weather", {"city": "Rome"}, city="string"), called("alarm", {"day": "Monday"}, day="string")]
    (tmp_path / "train.parquet").write_bytes(table(*rows))
    first, second = read(tmp_path / "train.parquet")
    assert first.tools[0]["function"]["parameters"]["properties"] == {"city": {"type": "string"}}
    assert [json.loads(call.arguments) for call in second.messages[1].tool_calls] == [{"day": "Monday"}]
    assert [message.weight for message in first.messages] == [1, 1, 1, 1]


def test_maps_kept_as_json_text_are_decoded(tmp_path: Path) -> None:
    turns = [json.dumps(turn) for turn in chat_row("Hi.", "Hello.")["messages"]]
    kind = pyarrow.list_(pyarrow.json_())
    storage = pyarrow.array([turns, None, ["no json"]], pyarrow.list_(pyarrow.string()))
    parquet.write_table(pyarrow.table({"messages": storage.cast(kind)}), tmp_path / "train.parquet")
    reader = ConversationReader(SourceConfig(path=str(tmp_path / "train.parquet")), {})
    report = reader.new_report()
    (good,) = reader.read(report)
    assert said(good.conversation) == [("user", "Hi."), ("assistant", "Hello.")]
    assert report.dropped_by_reason.total() == 2
