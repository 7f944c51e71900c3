"""Early stopping: an overfitting run ends once its validation loss gets no better, at the same step over any resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_row
from helpers import sha256, tiny_config
from test_resume import go_on, stop_when, stopped, told
from test_runs import invoke

from tuneloom.checkpoints import MANIFEST, TRAINING_STATE, sha256_of
from tuneloom.config import Config
from tuneloom.errors import UserError
from tuneloom.rundir import STATE, RunDirectory
from tuneloom.studio.said import heard
from tuneloom.studio.tail import RunTail
from tuneloom.studio.texts import Texts
from tuneloom.train.checkpoint import read_training_state
from tuneloom.train.run import Run, finetune

PLANNED, PATIENCE, EVERY = 60, 2, 2
CHANGES = {
    "adapter.lora_dropout": 0.2,
    "training.max_steps": PLANNED,
    "training.learning_rate": 5e-2,
    "training.logging_steps": 3,
    "training.eval_steps": EVERY,
    "training.early_stopping_patience": PATIENCE,
    "generation.do_sample": True,
    "evaluation.prompts": ["Who are you?"],
    "evaluation.sample_max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that nothing in the training set helps with."""
    file = tmp_path_factory.mktemp("other") / "validation.jsonl"
    rows = [chat_row("Who are you?", "Nobody at all."), chat_row("What is the sea?", "Water, salt and wind.")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def config_in(folder: Path, model: Path, rows: Path, validation: Path, **changes: Any) -> Config:
    return tiny_config(model, rows, folder, {**CHANGES, "data.validation": str(validation), **changes})


@pytest.fixture(scope="module")
def early(tiny_model: Path, rows_file: Path, other_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune(config_in(tmp_path_factory.mktemp("early"), tiny_model, rows_file, other_rows))


def stopping_step(run: RunDirectory) -> int:
    """The step at which transformers' EarlyStoppingCallback would have ended, of the losses that were evaluated."""
    best, stale = float("inf"), 0
    for step, loss in told(run, "eval", "step", "eval_loss"):
        stale = 0 if loss < best else stale + 1
        best = min(best, loss)
        if stale == PATIENCE:
            return int(step)
    raise AssertionError("it did not overfit")


def test_it_ends_at_the_step_of_the_rule_done_with_a_checkpoint_and_says_why(early: Run) -> None:
    run = early.directory
    last = stopping_step(run)
    assert EVERY * PATIENCE < last < PLANNED
    losses = dict(told(run, "eval", "step", "eval_loss"))
    best = min(losses, key=lambda step: losses[step])
    state = run.read_json(STATE) or {}
    assert (state["phase"], state["step"], state["total"]) == ("done", last, last)
    assert max(losses) == told(run, "step", "step")[-1][0] == max(run.checkpoints()) == last
    (event,) = run.events("early_stop")
    assert (event["step"], event["planned_steps"]) == (last, PLANNED)
    why = f"no better validation loss in 2 evaluations, the best {losses[best]:.4f} at step {best}; 60 steps were planned"
    assert event["message"] == why
    assert f"| ended early | {why} |" in (run.path / "report.md").read_text(encoding="utf-8")
    shown = invoke("show", str(run.path)).stdout.splitlines()
    assert any(line.startswith("ended early") and why in line for line in shown)
    tail = RunTail(run.path)
    tail.update()
    assert (tail.total_steps(), tail.summary().early_stop) == (last, why)
    assert "没有变好" in heard(Texts("zh"), why)
    assert "没有变好" in heard(Texts("zh"), f"step {last}: ended early: {why}")


@pytest.mark.parametrize("place", ["in the evaluation before the last", "in the last one's answers", "in between"])
def test_patience_survives_a_resume(
    place: str, early: Run, tiny_model: Path, rows_file: Path, other_rows: Path, tmp_path: Path
) -> None:
    last = stopping_step(early.directory)
    stop = {
        "in the evaluation before the last": lambda event, f: event == "eval" and f["step"] == last - EVERY,
        "in the last one's answers": lambda event, f: event == "eval" and f["step"] == last,
        "in between": lambda event, f: event == "progress" and f["step"] == last - 1,
    }[place]
    config = config_in(tmp_path, tiny_model, rows_file, other_rows)
    run = stopped(config, show=stop_when(stop))
    done = go_on(config, run)
    name = "adapter_model.safetensors"
    assert sha256(done.adapter / name) == sha256(early.adapter / name)
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert told(run, "step", *keys) == told(early.directory, "step", *keys)
    assert told(run, "early_stop", "step", "message") == told(early.directory, "early_stop", "step", "message")
    ends = [event for event in run.events("end") if "loss" in event]
    assert [(event["step"], event["eval_loss"]) for event in ends] == told(early.directory, "end", "step", "eval_loss")


def test_a_checkpoint_from_before_there_was_early_stopping_loads(early: Run) -> None:
    folder = next(iter(early.directory.checkpoints().values()))
    file, manifest = folder / TRAINING_STATE, folder / MANIFEST
    kept = file.read_bytes(), manifest.read_bytes()
    try:
        values = json.loads(kept[0])
        del values["stale_evaluations"]
        file.write_text(json.dumps(values), encoding="utf-8")
        manifest.write_text(json.dumps(json.loads(kept[1]) | {TRAINING_STATE: sha256_of(file)}), encoding="utf-8")
        assert read_training_state(folder).stale_evaluations == 0
    finally:
        file.write_bytes(kept[0])
        manifest.write_bytes(kept[1])


def test_a_threshold_asks_for_more_than_any_improvement(
    tiny_model: Path, rows_file: Path, other_rows: Path, tmp_path: Path
) -> None:
    changes = {"training.early_stopping_threshold": 100.0, "evaluation.prompts": []}
    done = finetune(config_in(tmp_path, tiny_model, rows_file, other_rows, **changes))
    assert told(done.directory, "end", "step") == [(EVERY * (PATIENCE + 1),)]


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"data.validation": 0}, "early_stopping_patience needs data.validation"),
        ({"training.eval_steps": None}, "early_stopping_patience needs training.eval_steps"),
        (
            {"training.early_stopping_patience": None, "training.early_stopping_threshold": 0.1},
            "early_stopping_threshold needs training.early_stopping_patience",
        ),
    ],
)
def test_what_it_needs_is_asked_for(changes: dict[str, Any], needed: str, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config("model", rows_file, tmp_path, {**CHANGES, "data.validation": str(rows_file), **changes})
    assert needed in str(caught.value)
