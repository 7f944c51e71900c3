"""Resume: wherever a run is stopped, going on gives the same adapter bit for bit; what cannot be trusted is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROWS, assert_mendable, sha256, tiny_config

from tuneloom.checkpoints import newest_whole, verify_checkpoint
from tuneloom.config import Config, load_config
from tuneloom.errors import Interrupted, UserError
from tuneloom.rundir import RunDirectory
from tuneloom.train.checkpoint import read_training_state
from tuneloom.train.resume import find_resume, newest_run
from tuneloom.train.run import Run, finetune

CHANGES = {
    "adapter.lora_dropout": 0.2,
    "training.max_steps": 8,
    "training.logging_steps": 3,
    "training.eval_steps": 4,
    "training.save_steps": 2,
    "training.lr_scheduler_type": "cosine",
    "training.tokens_per_microbatch": 40,
    "generation.do_sample": True,
    "evaluation.prompts": ["Who are you?", "你是谁？"],
    "evaluation.sample_max_new_tokens": 4,
}
SIGNAL = signal.SIGTERM


@pytest.fixture
def config(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Config:
    """Dropout, several micro-batches a step, windows of three steps, evaluations that sample."""
    return tiny_config(tiny_model, rows_file, tmp_path / "runs", {**CHANGES, "data.validation": str(rows_file)})


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    changes = {**CHANGES, "data.validation": str(rows_file)}
    return finetune(tiny_config(tiny_model, rows_file, tmp_path_factory.mktemp("whole"), changes))


def told(run: RunDirectory, kind: str, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(event[key] for key in keys) for event in run.events(kind)]


def stop_when(matches: Callable[[str, dict[str, Any]], bool]) -> Callable[[str, dict[str, Any]], None]:
    """Return a listener that sends SIGTERM to this process once, at the first event that matches."""
    sent = []

    def listen(event: str, fields: dict[str, Any]) -> None:
        if not sent and matches(event, fields):
            sent.append(True)
            os.kill(os.getpid(), SIGNAL)

    return listen


def stop_in_pass(number: int) -> Callable[[str, dict[str, Any]], None]:
    """Return an `on_job` that sends SIGTERM in the model's nth pass of the training."""

    def on_job(event: str, fields: dict[str, Any]) -> None:
        passes = itertools.count(1)

        def hook(*_: Any) -> None:
            if next(passes) == number:
                os.kill(os.getpid(), SIGNAL)

        fields["job"].model.register_forward_hook(hook)

    return on_job


def stopped(config: Config, **how: Any) -> RunDirectory:
    """Run until the signal comes; return the run's directory."""
    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        finetune(config, **how)
    assert caught.value.exit_code == 143
    run = RunDirectory(Path(config.output_dir) / "run")
    assert (run.read_json("state.json") or {})["phase"] == "interrupted"
    return run


def go_on(config: Config, run: RunDirectory) -> Run:
    return finetune(config, resume=find_resume(str(run.path), config.output_dir))


STOPS: dict[str, dict[str, Any]] = {
    "before the first step": {"on_job": stop_in_pass(1)},
    "after step 3, which is no checkpoint": {"show": stop_when(lambda event, f: event == "progress" and f["step"] == 3)},
    "inside a step, between micro-batches": {"on_job": stop_in_pass(7)},
    "in the validation of step 4": {"show": stop_when(lambda event, f: event == "within" and f["done"] == 1)},
    "in the sample answers of step 4": {"show": stop_when(lambda event, f: event == "within" and f["done"] == f["total"])},
    "in the last evaluation": {"show": stop_when(lambda event, f: event == "eval" and f["step"] == 8)},
}
"""Signals are looked for before a micro-batch and after each part of an evaluation: some are sent just before their place."""


@pytest.mark.parametrize("place", STOPS)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(place: str, config: Config, uninterrupted: Run) -> None:
    run = stopped(config, **STOPS[place])
    if run.checkpoints():
        assert newest_whole(run)[0] == list(run.checkpoints().values())[-1]
    else:
        assert place == "before the first step"
    done = go_on(config, run)

    name = "adapter_model.safetensors"
    assert sha256(done.adapter / name) == sha256(uninterrupted.adapter / name)
    assert told(run, "step", "step", "loss", "grad_norm", "learning_rate") == told(
        uninterrupted.directory, "step", "step", "loss", "grad_norm", "learning_rate"
    )
    assert set(told(run, "eval", "step", "eval_loss")) == set(told(uninterrupted.directory, "eval", "step", "eval_loss"))
    assert (run.read_json("state.json") or {})["phase"] == "done"
    last = [directory.checkpoint(8) / "optimizer.safetensors" for directory in (run, uninterrupted.directory)]
    assert sha256(last[0]) == sha256(last[1])


def test_the_stop_really_came_inside_a_step(config: Config) -> None:
    run = stopped(config, **{"on_job": stop_in_pass(7)})
    assert list(run.checkpoints())[-1] < 4, "the seventh pass is in step 3 or before, several to a step"
    (end,) = run.events("end")
    assert (end["reason"], end["message"]) == (
        "interrupted",
        f"interrupted by SIGTERM; kept: checkpoint-{max(run.checkpoints())}, of the last whole step",
    )


def test_a_stop_while_the_test_set_is_answered_loses_nothing(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path, {"data.test": str(rows_file), "training.max_steps": 1})
    run = stopped(config, show=stop_when(lambda event, f: event == "phase" and f["phase"] == "evaluating"))
    assert not (run.path / "test_results.json").exists()
    go_on(config, run)
    assert json.loads((run.path / "test_results.json").read_text(encoding="utf-8"))["rows"] == len(ROWS) + 1


# Which checkpoint.


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the finished run, to be damaged."""
    return RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("adapter_model.safetensors", flip_a_bit, "adapter_model.safetensors does not match its sha256"),
        ("optimizer.safetensors", lambda file: os.truncate(file, 100), "optimizer.safetensors does not match its sha256"),
        ("rng.safetensors", Path.unlink, "rng.safetensors is missing"),
        ("training_state.json", Path.unlink, "training_state.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing or torn"),
        ("manifest.json", lambda file: os.truncate(file, 20), "manifest.json is missing or torn"),
        ("manifest.json", lambda file: file.write_text("{}"), "manifest.json is incomplete"),
    ],
)
def test_a_broken_checkpoint_is_skipped_and_named(
    run_copy: RunDirectory, name: str, damage: Callable[[Path], object], fault: str
) -> None:
    damage(run_copy.checkpoint(24) / name)
    assert verify_checkpoint(run_copy.checkpoint(24)) == fault
    point = find_resume(str(run_copy.path), "runs")
    assert point.checkpoint == run_copy.checkpoint(12)
    assert point.skipped == (f"checkpoint-24: {fault}",)
    with pytest.raises(UserError, match="the checkpoint is broken") as caught:
        find_resume(str(run_copy.checkpoint(24)), "runs")
    assert_mendable(caught.value)
    assert caught.value.got == fault
    with pytest.raises(UserError, match="the checkpoint is broken"):
        read_training_state(run_copy.checkpoint(24))


def test_going_on_past_a_broken_checkpoint_makes_it_whole_again(run_copy: RunDirectory, finished_run: Path) -> None:
    flip_a_bit(run_copy.checkpoint(24) / "adapter_model.safetensors")
    done = finetune(load_config(run_copy.config), resume=find_resume(str(run_copy.path), "runs"))
    assert verify_checkpoint(run_copy.checkpoint(24)) is None
    assert sha256(done.adapter / "adapter_model.safetensors") == sha256(finished_run / "adapter/adapter_model.safetensors")
    (event,) = run_copy.events("resume")
    assert (event["step"], event["path"]) == (12, "checkpoint-12")
    assert event["skipped"] == ["checkpoint-24: adapter_model.safetensors does not match its sha256"]


def test_with_every_checkpoint_broken_a_run_goes_on_from_its_first_step(run_copy: RunDirectory) -> None:
    for folder in run_copy.checkpoints().values():
        (folder / "manifest.json").unlink()
    point = find_resume(str(run_copy.path), "runs")
    assert point.checkpoint is None
    assert len(point.skipped) == 2


def test_a_half_written_checkpoint_is_none(run_copy: RunDirectory) -> None:
    run_copy.checkpoint(24).rename(run_copy.path / ".checkpoint-24.123.partial")
    assert list(run_copy.checkpoints()) == [12]


# Which run.


def test_a_run_that_is_not_there_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run") as caught:
        find_resume(str(tmp_path / "nothing"), tmp_path)
    assert_mendable(caught.value)
    config = tiny_config("model", "data", tmp_path / "none")
    with pytest.raises(UserError, match="no run named run to resume") as caught:
        newest_run(config)
    assert_mendable(caught.value)
    with pytest.raises(UserError, match="no run of these settings to resume"):
        newest_run(config.model_copy(update={"name": None}))


def test_the_newest_run_of_the_name_is_found_by_path_or_name(finished_run: Path, tmp_path: Path) -> None:
    config = tiny_config("model", "data", tmp_path)
    for i, name in enumerate(("run", "run-2", "run-dora")):
        shutil.copytree(finished_run, tmp_path / name)
        os.utime(tmp_path / name / "config.yaml", (i, i))
    assert newest_run(config).run.path == tmp_path / "run-2"
    unnamed = config.model_copy(update={"name": None})
    assert newest_run(unnamed, of_any_config=True).run.path == tmp_path / "run-dora"
    with pytest.raises(UserError, match="no run of these settings") as caught:
        newest_run(unnamed)
    assert "run-dora" in str(caught.value.expected)
    same = load_config(finished_run / "config.yaml").model_copy(update={"name": None, "output_dir": str(tmp_path)})
    RunDirectory(tmp_path / "run").write_json("state.json", {"phase": "interrupted"})
    assert newest_run(same).run.path == tmp_path / "run", "the run that is not done comes first"
    assert find_resume("run-2", tmp_path).run.path == tmp_path / "run-2"
    assert find_resume(str(tmp_path / "run" / "checkpoint-12"), tmp_path).checkpoint == tmp_path / "run" / "checkpoint-12"


def test_a_finished_run_is_known_to_be(run_copy: RunDirectory) -> None:
    assert find_resume(str(run_copy.path), "runs").finished
    run_copy.write_json("state.json", {"phase": "training"})
    assert not find_resume(str(run_copy.path), "runs").finished


# Changed settings.


@pytest.fixture(scope="module")
def half_done(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run stopped after its first step of two, with data of its own beside it."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    config = tiny_config(tiny_model, folder / "train.jsonl", folder / "runs", {"training.max_steps": 2})
    stopped(config, show=stop_when(lambda event, f: event == "progress"))
    return folder


@pytest.fixture
def half_done_copy(half_done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half_done, tmp_path / "half")


def resume_with(folder: Path, changes: dict[str, Any], *, override: bool = False) -> Run:
    point = find_resume("run", folder / "runs")
    values = load_config(point.run.config).model_dump(mode="json")
    for key, value in changes.items():
        section, _, last = key.partition(".")
        values[section][last] = value
    return finetune(Config.model_validate(values), resume=point, override=override)


def test_a_changed_setting_is_refused_by_its_key_and_passes_with_override(half_done_copy: Path) -> None:
    with pytest.raises(UserError, match="settings have changed") as caught:
        resume_with(half_done_copy, {"training.learning_rate": 0.02})
    assert_mendable(caught.value)
    assert caught.value.got == "training.learning_rate: 0.01 -> 0.02"
    assert "--override" in str(caught.value.mend)
    done = resume_with(half_done_copy, {"training.learning_rate": 0.02}, override=True)
    steps = done.directory.history("step")
    assert [(event["step"], event["learning_rate"]) for event in steps] == [(1, 0.01), (2, 0.02)]
    assert load_config(done.directory.config).training.learning_rate == 0.02
    assert load_config(done.directory.path / "superseded-1" / "config.yaml").training.learning_rate == 0.01


def test_an_override_sets_later_checkpoints_aside_and_their_events_count_no_more(half_done_copy: Path) -> None:
    run = resume_with(half_done_copy, {"training.save_steps": 1}).directory
    before = sha256(run.checkpoint(2) / "adapter_model.safetensors")
    point = find_resume(str(run.checkpoint(1)), half_done_copy / "runs")
    values = load_config(run.config).model_dump(mode="json")
    values["training"]["learning_rate"] = 0.05
    finetune(Config.model_validate(values), resume=point, override=True)
    assert sha256(run.path / "superseded-1" / "checkpoint-2" / "adapter_model.safetensors") == before
    assert (
        sha256(run.checkpoint(2) / "adapter_model.safetensors") == sha256(run.adapter / "adapter_model.safetensors") != before
    )
    assert [event["step"] for event in run.events("step")] == [1, 2, 2]
    assert [event["learning_rate"] for event in run.history("step")] == [0.01, 0.05]


def test_not_even_an_override_changes_the_adapters_shape(half_done_copy: Path) -> None:
    with pytest.raises(UserError, match="cannot change") as caught:
        resume_with(half_done_copy, {"adapter.r": 4}, override=True)
    assert_mendable(caught.value)
    assert not list((half_done_copy / "runs" / "run").glob("superseded-*"))


def test_a_run_that_another_process_trains_is_not_resumed(run_copy: RunDirectory) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        run_copy.write_json("state.json", {"phase": "training", "pid": child.pid, "time": time.time() + 1})
        with pytest.raises(UserError, match="being trained right now") as caught:
            find_resume(str(run_copy.path), "runs")
        assert_mendable(caught.value)
    finally:
        child.communicate(b"\n")
    assert not find_resume(str(run_copy.path), "runs").finished


def test_settings_without_effect_on_the_weights_may_change(half_done_copy: Path) -> None:
    done = resume_with(half_done_copy, {"training.logging_steps": 2, "training.save_steps": 1, "evaluation.prompts": ["Hi"]})
    assert len(list(done.directory.events("sample"))) == 1


def test_what_the_plan_overrules_is_said(half_done_copy: Path) -> None:
    point = find_resume("run", half_done_copy / "runs")
    values = load_config(point.run.config).model_dump(mode="json")
    values["training"]["precision"] = "bf16"
    said: list[str] = []
    finetune(Config.model_validate(values), resume=point, say=said.append)
    assert "precision: fp32, as the run began, not bf16" in said
    assert not [line for line in said if line.startswith(("attention", "tokens"))]


def test_changed_data_is_refused(half_done_copy: Path, half_done: Path) -> None:
    # The copy's config still names the original's file; it changes for a moment.
    file = half_done / "train.jsonl"
    before = file.read_bytes()
    try:
        file.write_bytes(before.replace(b"Yes.", b"No.."))
        with pytest.raises(UserError, match="settings have changed") as caught:
            resume_with(half_done_copy, {})
    finally:
        file.write_bytes(before)
    assert_mendable(caught.value)
    assert caught.value.got == "data: the files have changed"
