"""`tuneloom runs compare`: settings and results side by side, of runs that are done, live, failed or torn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_mendable
from test_runs import invoke, make_run

from tuneloom.comparison import compare, find_runs, num_parameters
from tuneloom.config import dump_config, parse_config
from tuneloom.rundir import CONFIG, ENVIRONMENT, STATE, RunDirectory

EVALUATED = {
    "identity_rate": {"value": 0.975, "low": 0.94, "high": 1.0},
    "leak_rate": {"value": 0.0125, "low": 0.0, "high": 0.03},
    "general_loss_delta": {"value": -0.0123, "low": -0.02, "high": 0.01},
    "gates": [
        {"name": "identity_rate.en", "at_least": 0.95, "value": 0.975, "passed": True},
        {"name": "leak_rate", "at_most": 0.01, "value": 0.0125, "passed": False},
        {"name": "odd", "passed": "?"},
        "odd",
    ],
}


def made(parent: Path, name: str, config: dict[str, Any] | None = None, fingerprint: str = "a" * 64) -> RunDirectory:
    """A run after 4 steps of 2 s and 1 s, the last ones of which are logged as one."""
    run = make_run(parent, name, state={"phase": "done", "step": 4, "total": 4})
    run.write_text(CONFIG, dump_config(parse_config({"base_model": "/models/small", **(config or {})})))
    environment = {"device": "CPU", "base_model": {"fingerprint": fingerprint}, "data_files": {"rows": "b" * 64}, "seed": 1}
    run.write_json(ENVIRONMENT, environment)
    events: list[dict[str, Any]] = [
        {"event": "start", "total_steps": 4, "method": "dora", "base_model": "/models/small"},
        {"event": "step", "step": 2, "loss": 3.0, "tokens": 60, "step_seconds": 4.0, "mfu": 0.5, "peak_memory_gib": 1.5},
        {"event": "eval", "step": 2, "eval_loss": 2.5},
        {"event": "step", "step": 4, "loss": 2.0, "tokens": 100, "step_seconds": 2.0, "mfu": 0.2, "peak_memory_gib": 1.25},
        {"event": "eval", "step": 4, "eval_loss": 2.75},
    ]
    lines = [json.dumps({"time": 1000.0 + i, "epoch": i / 2, "learning_rate": 0.1, **event}) for i, event in enumerate(events)]
    run.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


def test_settings_that_differ_are_told_with_their_defaults_and_nothing_else(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "a", {"name": "one", "adapter": {"r": 8}, "data": {"train": "rows.jsonl", "variables": {"name": "A"}}}),
        made(tmp_path, "b", {"name": "two", "adapter": {"r": 64, "use_rslora": True}, "data": {"train": "rows.jsonl"}}),
        made(tmp_path, "c", {"data": {"train": [{"path": "rows.jsonl", "weight": 2}]}, "output_dir": "elsewhere"}),
    ]
    assert compare(runs).settings == {
        "data.train": (["rows.jsonl"], ["rows.jsonl"], [{"path": "rows.jsonl", "weight": 2.0}]),
        "data.variables.name": ("A", None, None),
        "adapter.r": (8, 64, 8),
        "adapter.use_rslora": (False, True, False),
    }
    assert compare(runs[:1] + runs[:1]).settings == {}


def test_results_are_what_the_events_add_up_to(tmp_path: Path) -> None:
    a, b = made(tmp_path, "a"), made(tmp_path, "b")
    a.write_json("evaluation.json", EVALUATED)
    b.write_text("evaluation.json", '{"identity_rate": {"value": "high"}, "leak_rate": [], "gates": 3')
    left, right = compare([a, b]).runs
    assert (left.phase, left.step, left.total_steps, left.epochs, left.method) == ("done", 4, 4, 1.5, "dora")
    assert (left.train_loss, left.eval_loss, left.best_eval_loss, left.best_eval_step) == (2.0, 2.75, 2.5, 2)
    assert (left.seconds, left.step_seconds, left.tokens_per_second) == (6.0, 1.5, pytest.approx(100 / 6, abs=0.01))
    assert (left.mfu, left.peak_memory_gib) == (0.4, 1.5)  # (0.5 x 4 s + 0.2 x 2 s) / 6 s
    assert left.identity_rate is not None
    assert (left.identity_rate.value, left.identity_rate.low, left.identity_rate.high) == (0.975, 0.94, 1.0)
    assert left.gates == {"identity_rate.en": True, "leak_rate": False}
    assert (right.identity_rate, right.leak_rate, right.general_loss_delta, right.gates) == (None, None, None, {})
    assert (right.trainable_parameters, right.adapter_bytes) == (None, None)


def test_a_real_runs_figures_are_its_reports(finished_run: Path, tmp_path: Path) -> None:
    real, _ = compare([RunDirectory(finished_run), made(tmp_path, "other")]).runs
    (end,) = RunDirectory(finished_run).events("end")
    report = (finished_run / "report.md").read_text(encoding="utf-8")
    assert f"{real.trainable_parameters:,}" == re.findall(r"trainable parameters \| ([\d,]+) of", report)[0]
    assert real.adapter_bytes == (finished_run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert real.seconds == pytest.approx(end["seconds"], abs=0.02)
    assert real.tokens_per_second == pytest.approx(end["tokens_per_second"], rel=0.02)
    assert real.peak_memory_gib == max(event["peak_memory_gib"] for event in RunDirectory(finished_run).events("step"))


def test_another_base_and_other_data_are_said(tmp_path: Path) -> None:
    same = made(tmp_path, "same")
    assert compare([same, made(tmp_path, "twin")]).different == ()
    for i, run in enumerate((same, RunDirectory(tmp_path / "twin"))):
        run.write_json("plan.json", {"estimate": {"seconds": i}, "precision_why": f"{i} GFLOP/s", "trial": {"seconds": i}})
    assert compare([same, RunDirectory(tmp_path / "twin")]).surroundings == {}, "what is measured anew is no difference"
    other_weights = compare([same, made(tmp_path, "weights", fingerprint="c" * 64)])
    assert other_weights.different == ("base_model",)
    assert other_weights.surroundings == {"environment.base_model.fingerprint": ("a" * 64, "c" * 64)}
    assert compare([same, made(tmp_path, "cut", {"data": {"cutoff_len": 64}})]).different == ("data",)
    seeds = [made(tmp_path, f"seed-{i}", {"training": {"seed": i}, "data": {"validation": 0.1}}) for i in (1, 2)]
    assert compare(seeds).different == ("data",), "another seed holds other rows out"


def test_torn_and_unfinished_runs_are_compared_as_far_as_they_are(tmp_path: Path) -> None:
    whole, torn, early = made(tmp_path, "whole"), made(tmp_path, "torn"), made(tmp_path, "early")
    torn.config.write_text("adapter: {rank: 3}")
    torn.write_json(STATE, {"phase": "failed", "reason": "the loss is not finite\nmore"})
    (torn.checkpoint(4)).mkdir()
    (torn.checkpoint(4) / "adapter_model.safetensors").write_bytes(b"\xff" * 16)
    early.metrics.write_text('{"event": "sta', encoding="utf-8")
    comparison = compare([whole, torn, early])
    assert [run.phase for run in comparison.runs] == ["done", "failed", "done"]
    assert comparison.faults.keys() == {"torn"}
    assert comparison.settings == {}
    assert (comparison.runs[1].trainable_parameters, comparison.runs[1].adapter_bytes) == (None, 16)
    assert (comparison.runs[2].train_loss, comparison.runs[2].seconds, comparison.runs[2].epochs) == (None, None, None)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0[]", b'\x0c\0\0\0\0\0\0\0{"a": {"b":1}', b"\xff" * 8])
def test_a_torn_weight_file_has_no_count(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights").write_bytes(content)
    assert num_parameters(tmp_path / "weights") is None


def test_the_verb_prints_a_table_json_and_a_picture(tmp_path: Path) -> None:
    made(tmp_path / "runs", "lora", {"adapter": {"r": 8}}).write_json("evaluation.json", EVALUATED)
    made(tmp_path / "runs", "dora", {"adapter": {"r": 64, "use_dora": True}}, fingerprint="c" * 64)
    out = tmp_path / "both.png"
    words = ["compare", "lora", str(tmp_path / "runs" / "dora"), "--dir", str(tmp_path / "runs")]
    shown = invoke(*words, "--out", str(out))
    assert shown.exit_code == 0, shown.exception
    lines = [re.split(r" {2,}", line) for line in shown.stdout.splitlines()]
    for row in (
        ["", "lora", "dora"],
        ["validation loss", "2.7500", "2.7500"],
        ["", "best", "2.5000 at step 2", "2.5000 at step 2"],
        ["identity", "97.5% (94% to 100%)"],
        ["general loss", "-0.0123 (-0.020 to +0.010)"],
        ["gates", "identity_rate.en passed, leak_rate not passed"],
        ["MFU", "40%", "40%"],
        ["adapter.use_dora", "false", "true"],
        ["environment.base_model.fingerprint", "aaaaaaaaaaaa…", "cccccccccccc…"],
    ):
        assert row in lines, (row, shown.stdout)
    assert "the base models differ" in shown.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["both.png"]
    told = json.loads(invoke(*words, "--json").stdout)
    assert (told["settings"]["adapter.r"], told["picture"]) == ([8, 64], None)
    assert told["runs"][0]["identity_rate"] == EVALUATED["identity_rate"]
    assert told["different"] == ["base_model"]


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made(tmp_path, name)
    (tmp_path / "there.png").write_text("kept")
    for words, what in (
        (["one"], "one run has nothing to be compared with"),
        (["one", "tow"], "no such run"),
        (["one", "two", str(tmp_path / "one")], "the same run twice"),
        (["one", "two", "--out", str(tmp_path / "a.svg")], "the curves are drawn as PNG"),
        (["one", "two", "--out", str(tmp_path / "there.png")], "the picture is there already"),
        (["one", "two", "--out", str(tmp_path / "no" / "where.png")], "the picture cannot be written"),
    ):
        done = invoke("compare", *words, "--dir", str(tmp_path))
        assert_mendable(done.exception)
        assert done.exception.what == what
    assert "one, two" in str(invoke("compare", "one", "tow", "--dir", str(tmp_path)).exception)
    assert (tmp_path / "there.png").read_text() == "kept"
    (tmp_path / "below").mkdir()
    other = made(tmp_path / "below", "one")
    both = compare(find_runs(["one", str(other.path)], tmp_path)).runs
    assert [run.name for run in both] == [str(tmp_path / "one"), str(other.path)]
