"""What is done to runs, and what is refused: nothing outside the folder of runs is ever touched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_runs import make_run

from tuneloom.checkpoints import sha256_of
from tuneloom.config import dump_config, parse_config
from tuneloom.rundir import ENVIRONMENT, STATE, RunDirectory
from tuneloom.studio.charts import Line, line_chart
from tuneloom.studio.frame import Studio, id_of
from tuneloom.studio.jobs import Jobs
from tuneloom.studio.run_actions import (
    Refusal,
    continuing,
    delete_run,
    metric_rows,
    rename_run,
    stop_run,
    why_not_resume,
)
from tuneloom.studio.run_state import RunLook, chosen
from tuneloom.studio.texts import TEXTS


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    folder = tmp_path / "runs"
    folder.mkdir()
    return Studio(folder, Jobs(folder))


@pytest.fixture
def ended(studio: Studio) -> RunDirectory:
    return make_run(studio.runs, "ended", state={"phase": "interrupted"})


@pytest.fixture
def process(studio: Studio) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the run `live` as a trainer does, notes how often it was asked to end, and ends at SIGWINCH."""
    run = make_run(studio.runs, "live")
    code = """
import signal, sys, time
held = open(sys.argv[1], "ab")
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
signal.signal(signal.SIGWINCH, lambda *_: sys.exit())
print("up", flush=True)
while True:
    time.sleep(0.01)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(run.metrics)], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started
        started.kill()


@pytest.fixture
def live(studio: Studio, process: subprocess.Popen[bytes]) -> RunDirectory:
    run = RunDirectory(studio.runs / "live")
    run.write_json(STATE, {"phase": "training", "step": 2, "total": 9, "pid": process.pid, "time": time.time() + 9})
    return run


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as raised:
        call()
    shown = [text.format(**raised.value.values) for text in TEXTS[raised.value.key]]
    assert all(shown)
    return raised.value.key


def test_a_run_is_deleted_and_links_in_it_are_not_followed(studio: Studio, ended: RunDirectory, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept.txt").write_text("kept")
    (ended.path / "link").symlink_to(other)
    delete_run(studio, ended.path)
    assert not ended.path.exists()
    assert list((studio.runs / ".studio" / "trash").iterdir()) == []
    assert (other / "kept.txt").read_text() == "kept"


def test_nothing_outside_the_folder_of_runs_is_touched(studio: Studio, ended: RunDirectory, tmp_path: Path) -> None:
    outside = make_run(tmp_path, "outside", state={"phase": "done"})
    (studio.runs / "link").symlink_to(outside.path)
    nested = make_run(ended.path, "nested", state={"phase": "done"})
    places = (
        outside.path,
        studio.runs / "link",
        studio.runs / ".." / "outside",
        nested.path,
        studio.runs,
        studio.runs / ".studio",
    )
    for place in places:
        assert refusal(lambda place=place: delete_run(studio, place)) == "runs.outside"
        assert refusal(lambda place=place: rename_run(studio, place, "new")) == "runs.outside"
    assert all(place.exists() for place in places[:5])
    assert refusal(lambda: delete_run(studio, studio.runs / "nowhere")) == "runs.gone"


def test_a_trash_that_leads_elsewhere_is_not_used(studio: Studio, ended: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "trash").mkdir(parents=True)
    (studio.runs / ".studio").symlink_to(tmp_path / "elsewhere")
    assert refusal(lambda: delete_run(studio, ended.path)) == "runs.outside"
    assert ended.path.is_dir()


def test_a_live_run_is_neither_deleted_nor_renamed_nor_resumed(studio: Studio, live: RunDirectory) -> None:
    assert refusal(lambda: delete_run(studio, live.path)) == "runs.live"
    assert refusal(lambda: rename_run(studio, live.path, "new")) == "runs.live"
    reason = why_not_resume(live.path, None)
    assert reason is not None
    assert reason.key == "run.resume_live"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "-a", "x" * 101, "a\n", "名"])
def test_a_name_that_is_none_is_refused(studio: Studio, ended: RunDirectory, name: str) -> None:
    assert refusal(lambda: rename_run(studio, ended.path, name)) == "runs.name_bad"


def test_a_taken_name_is_refused_even_an_empty_folders(studio: Studio, ended: RunDirectory) -> None:
    (studio.runs / "taken").mkdir()
    assert refusal(lambda: rename_run(studio, ended.path, "taken")) == "runs.name_taken"


def test_old_addresses_lead_to_a_renamed_run_and_a_new_run_of_the_old_name_has_its_own(
    studio: Studio, ended: RunDirectory
) -> None:
    first, second = (rename_run(studio, studio.runs / old, new) for old, new in (("ended", "b"), ("b", "c")))
    assert studio.run_path(id_of(ended.path)) == studio.run_path(id_of(first)) == second
    assert rename_run(studio, second, "ended") == ended.path
    assert studio.run_path(id_of(first)) == ended.path
    assert studio.run_path(id_of(ended.path)) == ended.path
    assert studio.run_path("nothing") is None


def test_a_run_that_others_continue_from_keeps_its_name(studio: Studio, ended: RunDirectory) -> None:
    other = make_run(studio.runs, "other", state={"phase": "done"})
    text = other.config.read_text().replace("continue_from: null", f"continue_from: {ended.adapter}")
    other.config.write_text(text)
    assert continuing(studio, ended.path) == ["other"]
    assert refusal(lambda: rename_run(studio, ended.path, "new")) == "runs.continued"


def test_a_trainer_is_asked_to_end_once(studio: Studio, live: RunDirectory, process: subprocess.Popen[bytes]) -> None:
    look = RunLook(studio, live.path)
    assert process.stdout is not None
    heard: list[bytes] = []
    for asked in (False, True, True):
        standing = look.standing()
        assert standing is not None
        assert standing.stopping is asked
        stop_run(live.path, None)
        heard = heard or [process.stdout.readline()]  # two signals at once would be one
    process.send_signal(signal.SIGWINCH)  # taken after a SIGTERM that came before it
    assert [*heard, *process.stdout] == [b"asked\n"]
    process.wait()
    assert refusal(lambda: stop_run(live.path, None)) == "run.not_live"


def test_why_a_run_cannot_be_resumed(studio: Studio, ended: RunDirectory) -> None:
    assert why_not_resume(ended.path, None) is None
    ended.config.write_text("adapter: {rank: 3}")
    fault = why_not_resume(ended.path, None)
    assert fault is not None
    assert (fault.key, "rank" in str(fault.values)) == ("run.resume_config", True)
    ended.write_json(STATE, {"phase": "done"})
    done = why_not_resume(ended.path, None)
    assert done is not None
    assert done.key == "run.resume_done"


def test_a_base_model_or_data_that_is_gone_or_has_changed_is_why(studio: Studio, ended: RunDirectory, tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    data.write_text("{}")
    values = {"base_model": str(model), "data": {"train": [str(data), "self_cognition_en"]}}
    ended.config.write_text(dump_config(parse_config(values)))
    files = {str(data): sha256_of(data), "self_cognition_en.jsonl": "0" * 64}
    ended.write_json(ENVIRONMENT, {"base_model": {"kind": "folder"}, "data_files": files})
    assert why_not_resume(ended.path, None) is None
    for key, harm in {
        "run.resume_data_changed": lambda: data.write_text("{ }"),
        "run.resume_data_gone": data.unlink,
        "run.resume_base": model.rmdir,
    }.items():
        harm()
        fault = why_not_resume(ended.path, None)
        assert fault is not None
        assert (fault.key, fault.values["place"]) == (key, str(model if key == "run.resume_base" else data))


def test_who_only_prepares_to_go_on_holds_the_run_too(
    studio: Studio, live: RunDirectory, process: subprocess.Popen[bytes]
) -> None:
    live.write_json(STATE, {"phase": "interrupted", "pid": 2**30})
    fault = why_not_resume(live.path, None)
    assert fault is not None
    assert fault.key == "run.resume_live"
    assert studio.jobs.all() == []


def test_the_table_holds_numbers_alone(ended: RunDirectory) -> None:
    with open(ended.metrics, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "step", "step": 3, "loss": "=1+1", "=bad": 2, "extra": 1.5}) + "\n")
    columns, rows = metric_rows(ended.path)
    assert columns == ("event", "step", "time", "loss", "eval_loss", "extra")
    assert rows[-1]["step"] == 3
    assert "loss" not in rows[-1]


def test_the_time_left_is_told_between_the_trainers_words_too(studio: Studio, live: RunDirectory) -> None:
    look = RunLook(studio, live.path)
    standing = look.standing()
    assert standing is not None
    assert (standing.phase, standing.live, standing.step, standing.total_steps) == ("training", True, 2, 9)
    assert standing.eta_seconds == pytest.approx(7 * (standing.seconds or 0) / 2)
    live.write_json(STATE, {**(live.read_json(STATE) or {}), "eta_seconds": 42.5})
    standing = look.standing()
    assert standing is not None
    assert standing.eta_seconds == 42.5


def test_answers_are_shown_at_the_first_the_last_and_some_steps_between() -> None:
    assert chosen([1, 2, 3], 8) == [1, 2, 3]
    assert chosen(list(range(100)), 4) == [0, 33, 66, 99]


def test_a_chart_ends_with_the_run_once_half_of_it_is_done() -> None:
    def axis(last: int) -> dict[str, object]:
        return dict(line_chart([Line("loss", [(1, 2.0), (last, 1.23456789)], "--accent")], total_steps=100)["xAxis"])

    assert "max" not in axis(49)
    assert axis(50)["max"] == 100
    assert line_chart([Line("loss", [(1, 1.23456789)], "--accent")])["series"][0]["data"] == [[1, 1.2346]]
