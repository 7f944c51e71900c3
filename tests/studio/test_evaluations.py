"""What the pages of predictions and exports read and write, without a browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneloom.studio.evaluations import (
    Progress,
    export_place,
    free_export_name,
    matching,
    prediction_progress,
    said_steps,
    start_export,
    upload_place,
)
from tuneloom.studio.frame import Studio, id_of
from tuneloom.studio.jobs import Jobs
from tuneloom.studio.targets import base_model_type, choices, config_of, find_choice, has_adapter, states, typed_target


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path, Jobs(tmp_path))


def test_progress_is_the_last_that_was_said() -> None:
    log = "base: loading x ...\nbase: loss 2/2\nmodel: answers 3/8\nmodel: answers 8/"
    assert prediction_progress(log) == Progress("model", "answers", 3, 8)
    assert prediction_progress("base: loading x ...\n") is None


def test_steps_are_what_was_said_before_each_part() -> None:
    log = "loading tiny in fp32 ...\nshards: 0%\rshards: 100%\rmerging and writing ...\nwritten   out\n"
    assert said_steps(log) == ["loading tiny in fp32", "merging and writing"]


def test_rows_are_searched_in_every_column_and_in_whatever_case() -> None:
    rows = [{"prompt": "Who?", "answer": "LOOMI"}, {"prompt": "你好", "answer": ""}]
    assert matching(rows, " loomi ") == rows[:1]
    assert matching(rows, "你") == rows[1:]
    assert matching(rows, "") == rows


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/../../b.jsonl", "..", "\0.jsonl", "x" * 500 + ".jsonl", "数据.jsonl", ""]
)
def test_an_upload_stays_in_its_folder_whatever_it_is_called(studio: Studio, name: str) -> None:
    place = upload_place(studio, name)
    assert place.resolve().is_relative_to(studio.runs / ".studio" / "uploads")
    assert place.parent != upload_place(studio, name).parent
    assert len(place.name) < 120
    assert "\0" not in str(place)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "x" * 101, "a\n"])
def test_an_exports_name_is_a_name(studio: Studio, name: str) -> None:
    assert export_place(studio, name) is None
    assert export_place(studio, "my-model.v1") == studio.runs / "exports" / "my-model.v1"


def test_a_free_name_is_proposed(studio: Studio) -> None:
    assert free_export_name(studio, "run-merged") == "run-merged"
    (studio.runs / "exports" / "run-merged").mkdir(parents=True)
    assert free_export_name(studio, "run-merged") == "run-merged-2"
    assert export_place(studio, free_export_name(studio, "../ä b")) is not None


def test_what_can_be_chosen(finished_run: Path, tiny_model: Path, chatglm: Path) -> None:
    runs = finished_run.parent
    studio = Studio(runs, Jobs(runs))
    found = choices(studio, adapters_only=True)
    assert [choice.target for choice in found] == [str(finished_run)]
    assert find_choice(found, id_of(finished_run)) == find_choice(found, str(finished_run / "checkpoint-12")) == found[0]
    assert find_choice(found, "0" * 16) is None
    assert list(states(finished_run)) == ["adapter", "checkpoint-24", "checkpoint-12"]
    config = config_of(str(finished_run / "checkpoint-12"))
    assert config is not None
    assert config.base_model.path == str(tiny_model)
    assert has_adapter(str(finished_run))
    assert has_adapter(str(finished_run / "checkpoint-12"))
    assert not has_adapter(str(tiny_model))
    assert base_model_type(str(finished_run)) == "llama"
    assert base_model_type(str(chatglm)) == "chatglm"
    assert base_model_type("no-such-model") is None
    assert typed_target(" runs/x ") == "runs/x"


def test_an_export_that_is_stopped_leaves_nothing_behind(studio: Studio, finished_run: Path) -> None:
    out = studio.runs / "exports" / "mine"
    job = start_export(studio, "stopped-export", str(finished_run), "merged", "auto", out)
    until(lambda: "keeping its answers" in job.log_tail() or job.ended() != "running")
    assert any(out.parent.glob(".mine.*"))
    assert studio.jobs.stop(job)
    until(lambda: job.ended() != "running")
    assert job.ended() == "killed"
    assert list(out.parent.iterdir()) == []


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
