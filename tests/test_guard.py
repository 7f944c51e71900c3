"""What must not reach the weights does not; who asks a run to end gets a checkpoint and the right exit code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from tuneloom.checkpoints import verify_checkpoint
from tuneloom.config import Config, dump_config
from tuneloom.errors import GuardError, Interrupted
from tuneloom.rundir import RunDirectory
from tuneloom.train.run import finetune, prepare

# Non-finite losses.


def poison(folder: Path, token: int, value: float) -> None:
    """Damage one row of a saved model's embedding."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][token] = value
    save_file(tensors, file, metadata={"format": "pt"})


def poisoned_run(config: Config, step: int, value: float) -> int:
    """Poison a token that only one sample of a step holds; return the sample's line."""
    job = prepare(config)
    sample = job.data.train[job.schedule.indices(step)[0]]
    others = {int(i) for other in job.data.train if other.location != sample.location for i in other.ids_T}
    token = next(int(i) for i in sample.ids_T if int(i) not in others)
    poison(job.base.folder, token, value)
    assert sample.location is not None
    return sample.location.line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_loss_stops_before_the_update_and_names_the_row(
    value: float, untied_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(untied_model, tmp_path / "model")
    changes = {"training.max_steps": 3, "training.tokens_per_microbatch": 8, "training.save_steps": 1}
    config = tiny_config(model, rows_file, tmp_path / "runs", changes)
    line = poisoned_run(config, 1, value)

    with pytest.raises(GuardError, match="step 2: the loss is not finite") as caught:
        finetune(config)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert f"{rows_file}:{line}\n" in message
    assert message.count(str(rows_file)) == 1, "the healthy rows of the step are not accused"
    assert "kept:     checkpoint-1" in message
    assert "mend:" in message

    run = RunDirectory(tmp_path / "runs" / "run")
    assert list(run.checkpoints()) == [1]
    assert verify_checkpoint(run.checkpoint(1)) is None
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(run.checkpoint(1) / name).values())
    assert not run.adapter.exists()
    (warning,) = run.events("warning")
    assert (warning["step"], warning["samples"]) == (2, f"{rows_file}:{line}")
    (end,) = run.events("end")
    assert end["reason"] == "failed"
    assert (run.read_json("state.json") or {})["phase"] == "failed"


def test_a_nonfinite_loss_in_the_first_step_keeps_nothing(untied_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(untied_model, tmp_path / "model")
    config = tiny_config(model, rows_file, tmp_path / "runs")
    poisoned_run(config, 0, float("nan"))
    with pytest.raises(GuardError, match="step 1: the loss is not finite") as caught:
        finetune(config)
    assert "no step was done" in str(caught.value)
    assert not RunDirectory(tmp_path / "runs" / "run").checkpoints()


# Signals.


def test_a_signal_before_the_training_ends_it_without_a_run(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELOOM_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGINT)

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "within" and fields["done"] < fields["total"]:
            os.kill(os.getpid(), signal.SIGINT)

    sources = [str(rows_file), {"path": "general_replay_en", "count": 40, "replay": "self"}]
    with pytest.raises(Interrupted, match="SIGINT; training had not begun") as caught:
        finetune(tiny_config(tiny_model, rows_file, tmp_path / "runs", {"data.train": sources}), show=show)
    assert caught.value.exit_code == 130
    assert not (tmp_path / "runs").exists()
    assert signal.getsignal(signal.SIGINT) is before, "the handlers are as they were"


def wait_for_steps(run: RunDirectory, process: subprocess.Popen[str], number: int) -> None:
    """Wait until a run has told of some steps; fail where it ended before."""
    limit = time.monotonic() + 90
    while len(list(run.events("step"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],  # SIGTERM: within this process, test_resume
    ids=["SIGINT", "SIGTERM"],
)
def test_a_first_signal_ends_a_process_with_a_checkpoint_and_its_code(
    number: signal.Signals, code: int, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    config = tiny_config(tiny_model, rows_file, tmp_path, {"training.max_steps": 100_000})
    file.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "tuneloom", "finetune", str(file)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    run = RunDirectory(tmp_path / config.name)
    try:
        wait_for_steps(run, process, 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    (step,) = run.checkpoints()
    assert verify_checkpoint(run.checkpoint(step)) is None
    assert f"tuneloom: interrupted by {number.name}; kept: checkpoint-{step}" in errors
    assert "Traceback" not in errors
    assert (run.read_json("state.json") or {})["phase"] == "interrupted"
