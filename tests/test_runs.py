"""`tuneloom runs`: what is told of runs that are done, live, dead, torn, or no runs at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_mendable
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tuneloom.cli.main import app
from tuneloom.config import dump_config, parse_config
from tuneloom.errors import UserError
from tuneloom.rundir import CONFIG, METRICS, STATE, RunDirectory
from tuneloom.runs import describe, find_run, list_runs, summarise


def invoke(*words: str, columns: int = 200) -> Any:
    return CliRunner().invoke(app, ["runs", *words], env={"COLUMNS": str(columns)})


def make_run(parent: Path, name: str, *, started: float = 1000.0, state: dict[str, Any] | None = None) -> RunDirectory:
    """A run as a trainer leaves it after step 2 of 9."""
    run = RunDirectory.create(parent, name)
    run.write_text(CONFIG, dump_config(parse_config({"base_model": "/models/small", "adapter": {"r": 3}})))
    events: list[dict[str, Any]] = [
        {"event": "start", "total_steps": 9, "method": "dora", "base_model": "/models/small"},
        {"event": "step", "step": 1, "loss": 3.0},
        {"event": "step", "step": 2, "loss": 2.5},
        {"event": "eval", "step": 2, "eval_loss": 2.75},
    ]
    lines = [json.dumps({"time": started + 10 * i, **event}) + "\n" for i, event in enumerate(events)]
    run.metrics.write_text("".join(lines), encoding="utf-8")
    if state is not None:
        run.write_json(STATE, {"phase": "training", "step": 2, "total": 9, "pid": 1, "time": 1.0, **state})
    return run


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that lives until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


# A real run.


def test_a_finished_run_is_summarised_as_it_went(finished_run: Path) -> None:
    run = summarise(finished_run)
    events = [json.loads(line) for line in (finished_run / METRICS).read_text(encoding="utf-8").splitlines()]
    (end,) = [event for event in events if event["event"] == "end"]
    evals = [event["eval_loss"] for event in events if event["event"] == "eval"]
    assert (run.name, run.path, run.phase, run.pid) == (finished_run.name, str(finished_run), "done", None)
    assert (run.step, run.total_steps, run.method) == (24, 24, "lora")
    assert (run.train_loss, run.eval_loss, run.best_eval_loss) == (end["loss"], evals[-1], min(evals))
    assert run.started == events[0]["time"]
    assert run.seconds == pytest.approx(events[-1]["time"] - events[0]["time"], abs=0.1)
    assert run.num_bytes == sum(path.stat().st_size for path in finished_run.rglob("*") if path.is_file())
    assert run.reason is None


def test_a_run_at_length(finished_run: Path, rows_file: Path) -> None:
    details = describe(find_run(finished_run.name, finished_run.parent))
    assert details.changed["training.max_steps"] == 24
    assert details.changed["data.variables.name"] == "Loomi"
    assert details.changed["adapter.target_modules"] == "all-layers"
    assert not {"adapter.r", "training.optim"} & details.changed.keys(), "defaults are not told"
    assert details.data["used"] == 30  # to train, to validate and to test on
    assert details.data["sources"][0] == {"path": str(rows_file), "role": "train", "read": 10, "used": 10}
    assert [point.step for point in details.train_losses] == [20, 21, 22, 23, 24]
    assert [point.step for point in details.eval_losses] == [8, 16, 24]
    assert list(details.checkpoints) == [12, 24]
    assert details.adapter == str(finished_run / "adapter")
    assert [(a.prompt, a.first_step, a.last_step) for a in details.answers] == [("Who are you?", 8, 24), ("你是谁？", 8, 24)]
    assert all(answer.first != answer.last for answer in details.answers)
    assert [command.split()[1] for command, _ in details.next] == ["chat", "export"]


def test_show_prints_it_and_its_json_has_the_same(finished_run: Path) -> None:
    shown = invoke("show", str(finished_run))
    assert shown.exit_code == 0, shown.exception
    lines = shown.stdout.splitlines()
    for words in (
        ("phase", "done"),
        ("step", "24 of 24"),
        ("validation loss", "step 24: ", "best "),
        ("adapter", str(finished_run / "adapter")),
        ("checkpoints", "checkpoint-12, checkpoint-24"),
        ("  training.max_steps", "24"),
        ("  data.variables.author", '"Tuneloom"'),
        ("  rows", "30 read, 30 used, 0 repaired"),
        ("Who are you?", " 8 "),
        (f"tuneloom export {finished_run}",),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, shown.stdout)
    for words in (["show", str(finished_run), "--json"], ["--json", "show", str(finished_run)]):
        told = json.loads(invoke(*words).stdout)
        assert told["summary"]["train_loss"] == summarise(finished_run).train_loss
        assert told["checkpoints"][0] == {"step": 12, "path": str(finished_run / "checkpoint-12")}
        assert told["next"][0]["command"] == f"tuneloom chat {finished_run} --compare"
    by_name = ["show", finished_run.name, "--dir", str(finished_run.parent), "--json"]
    assert json.loads(invoke(*by_name).stdout) == json.loads(
        invoke("--dir", str(finished_run.parent), *by_name[:2], "--json").stdout
    )


# Phases.


def test_a_live_run_is_told_from_a_dead_one(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    later = 2.0**33
    for name, state in {
        "live": {"pid": process.pid, "time": later},
        "another-process-has-its-pid-now": {"pid": process.pid, "time": 5.0},
        "no-such-pid": {"pid": 2**30, "time": later},
        "failed": {"phase": "failed", "reason": "step 3: the loss is not finite\n  cause: a rate too high"},
        "interrupted": {"phase": "interrupted", "reason": "interrupted by SIGTERM; kept: checkpoint-2"},
        "saving": {"phase": "saving", "pid": process.pid, "time": later},
    }.items():
        make_run(tmp_path, name, state=state)
    runs = {run.name: run for run in list_runs(tmp_path).runs}
    assert {name: run.phase for name, run in runs.items()} == {
        "live": "training",
        "another-process-has-its-pid-now": "dead",
        "no-such-pid": "dead",
        "failed": "failed",
        "interrupted": "interrupted",
        "saving": "saving",
    }
    live = runs["live"]
    assert (live.pid, live.step, live.total_steps, live.train_loss, live.eval_loss) == (process.pid, 2, 9, 2.5, 2.75)
    assert live.seconds > 1e6, "it is going on"
    assert runs["no-such-pid"].seconds == 30.0
    assert "not finite" in str(runs["failed"].reason)
    assert [command.split()[1] for command, _ in describe(RunDirectory(live.path)).next] == ["runs", "runs"]
    assert [command.split()[1] for command, _ in describe(RunDirectory(runs["failed"].path)).next] == ["finetune"]

    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert summarise(live.path).phase == "dead", "killed, though nobody has waited for it yet"


def test_without_a_state_the_events_tell(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    assert summarise(run.path).phase == "unknown"
    run.append_event("end", reason="failed", message="no more")
    assert (summarise(run.path).phase, summarise(run.path).reason) == ("failed", "no more")
    run.append_event("resume", step=2)
    run.append_event("end", step=9, loss=1.5)
    assert (summarise(run.path).phase, summarise(run.path).train_loss, summarise(run.path).step) == ("done", 1.5, 9)


def test_a_pause_before_a_resume_is_not_counted_and_what_it_went_back_behind_is_not_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    more = [{"event": "resume", "step": 1, "time": 9000.0}, {"event": "step", "step": 2, "loss": 2.0, "time": 9007.0}]
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in more)
    summary = summarise(run.path)
    assert summary.seconds == 37.0
    assert (summary.train_loss, summary.eval_loss) == (2.0, None)


# The list.


def test_no_runs_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke()
    assert done.exit_code == 0
    assert "there are no runs in runs\nmake one with:  tuneloom finetune\n" in done.stdout
    assert json.loads(invoke("--json").stdout) == {"folder": "runs", "runs": [], "others": []}
    assert list(tmp_path.iterdir()) == []


def test_the_newest_comes_first_and_what_is_no_run_is_named(tmp_path: Path) -> None:
    for name, started in (("old", 1000.0), ("new", 3000.0), ("middle", 2000.0)):
        make_run(tmp_path, name, started=started, state={"phase": "done"})
    (tmp_path / "notes").mkdir()
    (tmp_path / "a-file").write_text("", encoding="utf-8")
    for hidden in (".studio", "exports"):  # the studio's own
        (tmp_path / hidden).mkdir()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    done = invoke("--dir", str(tmp_path))
    assert done.exit_code == 0
    table = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in table[1:4]] == ["new", "middle", "old"]
    assert table[1][1:7] == ["done", "2", "of", "9", "small", "dora"]
    assert table[1][7:9] == ["2.5000", "2.7500"]
    assert "no runs, passed over: notes\n" in done.stdout
    told = json.loads(invoke("--dir", str(tmp_path), "--json").stdout)
    assert ([run["name"] for run in told["runs"]], told["others"]) == (["new", "middle", "old"], ["notes"])
    narrow = invoke("--dir", str(tmp_path), columns=70).stdout.splitlines()
    assert narrow[1].split() == ["new", "done", "2", "of", "9", "dora", "2.5000", "2.7500", *narrow[1].split()[-2:]]
    assert narrow[4] == "too narrow here for: size, base model, took; --json has all"
    assert len(narrow[1]) <= 70


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "samples", "x"]), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("time", "step", "loss", "eval_loss", "prompt", "answer", "message", "reason", "base_model", "total_steps")
EVENT = st.fixed_dictionaries(
    {"event": st.sampled_from(["start", "step", "eval", "sample", "resume", "end", "warning"]) | JSON},
    optional=dict.fromkeys(KEYS, JSON),
)
REPORT = st.dictionaries(st.sampled_from(["read", "train", "validation", "sources", "cut"]), JSON)
STATE_MAP = st.dictionaries(st.sampled_from(["phase", "pid", "time", "step", "total", "reason"]), JSON)


@settings(max_examples=12)
@given(events=st.lists(EVENT | JSON, max_size=5), state=STATE_MAP | JSON, report=REPORT | JSON, config=JSON)
def test_no_content_of_a_runs_files_breaks_anything(
    events: list[Any], state: Any, report: Any, config: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-runs"
    shutil.rmtree(folder, ignore_errors=True)
    make_run(folder, "good", state={"phase": "done"})
    bad = make_run(folder, "bad")
    bad.metrics.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    for name, value in ((STATE, state), ("data_report.json", report), (CONFIG, config)):
        (bad.path / name).write_text(json.dumps(value), encoding="utf-8")
    assert {run.name for run in list_runs(folder).runs} == {"good", "bad"}
    json.dumps(describe(bad).as_dict(), allow_nan=False)
    for words in (["--dir", str(folder)], ["show", str(bad.path)]):
        done = invoke(*words)
        assert done.exception is None, (words, done.exception)


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe\x00", b"[" * 100_000, b'{"event": "step"', b"\x1b[2J"])
def test_torn_files_are_told_and_never_reach_the_terminal_as_they_are(junk: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path, "torn\x1b[2J")
    for name in (METRICS, STATE, "data_report.json", CONFIG):
        (run.path / name).write_bytes(junk[:300] if name == CONFIG else junk)  # YAML takes long over deep nesting
    listed, shown = invoke("--dir", str(tmp_path)), invoke("show", str(run.path))
    assert (listed.exception, shown.exception) == (None, None)
    assert "unknown" in listed.stdout
    assert "\x1b[2J" not in listed.stdout + shown.stdout


# Names.


def test_an_unknown_run_is_told_the_nearest(tmp_path: Path) -> None:
    make_run(tmp_path, "persona-lora")
    done = invoke("show", "persona-lorra", "--dir", str(tmp_path))
    assert isinstance(done.exception, UserError)
    assert done.exception.exit_code == 2
    assert done.exception.mend == "did you mean `persona-lora`?"
    assert_mendable(done.exception)
    (tmp_path / "folder").mkdir()
    for words in (["show", str(tmp_path / "folder")], ["show", "x" * 300], ["--dir", str(tmp_path / "persona-lora" / CONFIG)]):
        done = invoke(*words)
        assert isinstance(done.exception, UserError), (words, done.exception)
        assert_mendable(done.exception)
