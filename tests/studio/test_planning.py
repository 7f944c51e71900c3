"""The studio's end of the planner: a process that is there while it is asked, and only then."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

from tuneloom.studio.planning import Planning

WRONG = {"training": {"learning_rate": "fast"}}


def told(planning: Planning, number: int) -> dict[str, Any]:
    end = time.monotonic() + 60
    while not (answer := planning.told(number)):
        assert answer is not None, "it was let go"
        assert time.monotonic() < end
        time.sleep(0.01)
    return answer


def test_an_idle_planner_is_let_go_and_a_new_one_comes_when_it_is_asked(tmp_path: Path) -> None:
    planning = Planning(tmp_path, idle_seconds=0.01)
    number = planning.ask("page", "plan", WRONG)
    first = planning.pid  # it owes an answer, so it is there
    assert first is not None
    assert told(planning, number)["key"] == "training.learning_rate"
    end = time.monotonic() + 60
    while planning.pid is not None or psutil.pid_exists(first):
        assert time.monotonic() < end
        time.sleep(0.02)
    number = planning.ask("page", "plan", WRONG)
    assert planning.pid not in (None, first)
    assert told(planning, number)["key"] == "training.learning_rate"


def test_a_planner_that_owes_an_answer_stays(tmp_path: Path) -> None:
    planning = Planning(tmp_path, idle_seconds=0.01)  # much less than a process takes to begin
    number = planning.ask("page", "plan", WRONG)
    pid = planning.pid
    assert pid is not None
    assert told(planning, number)["key"] == "training.learning_rate"
