"""Trainings that are killed at random moments and resumed end as if nobody had killed them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import run_python

SCRIPT = ROOT / "tests" / "chaos" / "kill_resume.py"
SOME = ("lora, shared prefixes, validation", "dora, validation")
"""Of all variants those that have each of their parts."""


@pytest.mark.skipif("sys.platform == 'win32'", reason="there is no fork, nor a SIGKILL")
@pytest.mark.parametrize(
    ("only", "kills"), [pytest.param(SOME, 6, id="some"), pytest.param((), 12, id="all", marks=pytest.mark.slow)]
)
def test_runs_killed_and_resumed_end_as_if_they_had_not_been(only: tuple[str, ...], kills: int, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    chosen = [word for variant in only for word in ("--only", variant)]
    done = run_python(SCRIPT, "--kills", str(kills), "--json", found, *chosen, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    variants = json.loads(found.read_text(encoding="utf-8"))["variants"]
    assert [variant["differences"] for variant in variants] == [[]] * (len(only) or 4)
    assert sum(variant["kills"] for variant in variants) == kills
    assert sum(variant["inside_a_save"] for variant in variants) >= kills // 3
    assert any(step for variant in variants for step in variant["resumed_from"]), "some went on from a checkpoint"
