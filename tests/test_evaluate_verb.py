"""`tuneloom evaluate`, and how the studio starts and reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_row
from helpers import assert_mendable
from typer.testing import CliRunner

from tuneloom import api
from tuneloom.cli.main import app
from tuneloom.errors import UserError
from tuneloom.models.load import load_base_model


def invoke(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_base_and_tuned_are_measured_on_the_same_rows_and_written(
    finished_run: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_rows([chat_row("Who are you?", "I am Loomi."), chat_row("Say yes.", "Yes.", "Again.", "Yes!")])
    out = tmp_path / "found"
    printed = invoke(finished_run, "--data", data, "--compare", "--max-new-tokens", 4, "--out", out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    tuned = api.evaluate(finished_run, data, answers=True, overrides={"generation.max_new_tokens": 4})
    base = api.evaluate(finished_run, data, base=True)
    assert report["model"] == {"loss": tuned.loss, "perplexity": tuned.perplexity, "scores": tuned.scores}
    assert report["base"]["loss"] == base.loss != tuned.loss
    assert [row["answer"] for row in rows] == [row.answer for row in tuned.predictions]
    assert [(row["prompt"], row["reference"]) for row in rows] == [
        ("Who are you?", "I am Loomi."),
        ("Say yes.", "Yes."),
        ("Again.", "Yes!"),
    ]
    assert all("base_answer" in row for row in rows)
    assert (report["num_samples"], report["num_answers"]) == (2, 3)
    assert f"{tuned.loss:.4f}" in printed
    assert f"{base.loss:.4f}" in printed
    assert str(out) in printed


def test_the_base_is_loaded_once_for_both_sides(
    finished_run: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[Path] = []

    def counted(folder: Path, *rest: Any) -> Any:
        loaded.append(folder)
        return load_base_model(folder, *rest)

    monkeypatch.setattr("tuneloom.adapters.target.load_base_model", counted)
    words = ("--data", rows_file, "--max-rows", "2", "--max-new-tokens", "2")
    invoke(finished_run, *words, "--compare", "--out", tmp_path / "both")
    assert len(loaded) == 1
    both = json.loads((tmp_path / "both" / "report.json").read_text(encoding="utf-8"))
    settings: dict[str, object] = {"generation.max_new_tokens": 2}
    for side in ("base", "model"):
        alone = api.evaluate(finished_run, rows_file, base=side == "base", max_rows=2, answers=True, overrides=settings)
        assert both[side] == {"loss": alone.loss, "perplexity": alone.perplexity, "scores": alone.scores}


def test_the_base_off_the_adapter_is_the_base_itself(finished_run: Path, tiny_model: Path, rows_file: Path) -> None:
    off = api.evaluate(finished_run, rows_file, base=True, max_rows=3)
    itself = api.evaluate(tiny_model, rows_file, max_rows=3, dtype="fp32", overrides={"data.cutoff_len": 256})
    assert off.loss == pytest.approx(itself.loss, rel=1e-6)


def test_progress_is_told_to_the_end(finished_run: Path) -> None:
    told: list[tuple[str, int, int]] = []
    api.evaluate(finished_run, max_rows=2, answers=True, on_progress=lambda *step: told.append(step))
    last = {what: (done, total) for what, done, total in told}
    assert last.keys() == {"loss", "answers"}
    assert all(done == total > 0 for done, total in last.values())


def test_the_runs_own_rows_are_the_default_and_json_is_the_report(finished_run: Path) -> None:
    report = json.loads(invoke(finished_run, "--loss-only", "--max-rows", 2, "--json"))
    assert report["num_samples"] == 2
    assert report["model"]["scores"] is None
    assert "base" not in report


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("--compare",), "tiny"),
        (("--variable", "name"), "--variable"),
        (("--out", "."), "."),
    ],
)
def test_what_cannot_be_measured_is_told(words: tuple[str, ...], where: str, tiny_model: Path, rows_file: Path) -> None:
    with pytest.raises(UserError) as caught:
        invoke(tiny_model, "--data", rows_file, *words)
    assert_mendable(caught.value)
    assert where in str(caught.value)


def test_placeholders_are_filled(tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    data = write_rows([chat_row("Who are you?", "I am {{name}}.")])
    out = tmp_path / "found"
    invoke(tiny_model, "--data", data, "--variable", "name=Ada=B", "--max-new-tokens", 2, "--out", out)
    assert json.loads((out / "predictions.jsonl").read_text(encoding="utf-8"))["reference"] == "I am Ada=B."
