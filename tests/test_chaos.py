"""Trainings that are killed at random moments and resumed end as if nobody had killed them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import run_python

KILLS = 6
SCRIPT = ROOT / "tests" / "chaos" / "kill_resume.py"


@pytest.mark.skipif("sys.platform == 'win32'", reason="there is no fork, nor a SIGKILL")
def test_runs_killed_and_resumed_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = run_python(SCRIPT, "--kills", str(KILLS), "--json", found, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    variants = json.loads(found.read_text(encoding="utf-8"))["variants"]
    assert [variant["differences"] for variant in variants] == [[]] * 4
    assert sum(variant["kills"] for variant in variants) == KILLS
    assert sum(variant["inside_a_save"] for variant in variants) >= KILLS // 3
    assert any(step for variant in variants for step in variant["resumed_from"]), "some went on from a checkpoint"
