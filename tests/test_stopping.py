"""`tuneloom runs stop`: a real training saves a checkpoint and ends; what is no trainer of the run is never signalled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from helpers import assert_mendable, tiny_config
from test_runs import invoke, make_run

from tuneloom.config import dump_config
from tuneloom.errors import GuardError, UserError
from tuneloom.rundir import STATE, STOP, RunDirectory
from tuneloom.stopping import ask, is_asked, require_trainer, trainer

HOLDS = """
import sys, time
from tuneloom.rundir import RunDirectory
from tuneloom.train.interrupt import catch_signals
run, how = RunDirectory(sys.argv[1]), sys.argv[2]
with catch_signals() as flag, run.held():
    if how != "prepares":
        run.write_state({"phase": "training", "step": 2, "total": 9})
    print("up", flush=True)
    while flag.number is None or how == "goes on":
        time.sleep(0.01)
    print("asked", flush=True)
    if how == "is killed":
        sys.exit(1)
    time.sleep(0.3)
    if how != "prepares":
        run.write_state({"phase": "interrupted", "step": 2, "total": 9, "reason": "kept: nothing"})
"""
"""Holds a run as a trainer does, with the trainer's own parts, and trains nothing."""

Holder = Callable[[RunDirectory, str], subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Holder]:
    started: list[subprocess.Popen[str]] = []

    def start(run: RunDirectory, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS, str(run.path), how]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def fault(*words: str) -> UserError:
    done = invoke("stop", *words)
    assert isinstance(done.exception, UserError), done.output
    assert_mendable(done.exception)
    return done.exception


def test_a_training_saves_a_checkpoint_and_ends_and_the_command_told_goes_on(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path, {"training.max_steps": 3000, "training.logging_steps": 100})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "tuneloom", "finetune", str(file)]
    run = RunDirectory(tmp_path / "run")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while (run.read_json(STATE) or {}).get("step", 0) < 1:
            assert process.poll() is None
            time.sleep(0.05)
        done = invoke("stop", "run", "--dir", str(tmp_path), "--json")
        assert done.exit_code == 0, done.exception
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    told = json.loads(done.stdout)
    (kept,) = run.checkpoints().values()
    assert (told["phase"], told["checkpoint"], told["total_steps"]) == ("interrupted", str(kept), 3000)
    assert kept.name == f"checkpoint-{told['step']}"
    assert told["resume"] == f"tuneloom finetune --resume-from {run.path}"
    assert list(run.path.glob(f"{STOP}*")) == []
    assert fault(str(run.path)).got == "phase interrupted"


def test_what_is_waited_for_is_told_and_asking_again_waits_without_a_second_signal(hold: Holder, tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    process = hold(run, "trains")
    assert require_trainer(run).pid == process.pid
    assert ask(run, require_trainer(run))
    assert not ask(run, require_trainer(run))
    assert is_asked(run, process.pid)
    done = invoke("stop", str(run.path))
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[0] == f"process {process.pid} was asked to save a checkpoint and end"
    assert lines[1] == "training, step 2 of 9 ..."
    assert f"{run.path} has stopped at step 2 of 9" in lines
    assert any(line.split() == ["kept", "nothing;", "no", "step", "was", "done"] for line in lines)
    assert process.communicate()[0] == "asked\n"
    assert process.returncode == 0, "a second signal would have killed it"


def test_a_run_that_only_prepares_to_go_on_is_stopped_too(hold: Holder, tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", state={"phase": "failed", "pid": 2**30})
    process = hold(run, "prepares")
    done = invoke("stop", str(run.path), "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["reason"] == "it had not begun to train"
    assert process.wait() == 0


def test_a_limit_on_the_waiting_and_an_end_without_saving_are_told(hold: Holder, tmp_path: Path) -> None:
    slow, killed = make_run(tmp_path, "slow"), make_run(tmp_path, "killed")
    process = hold(slow, "goes on")
    late = fault(str(slow.path), "--timeout", "0.2")
    assert late.what == "the run has not ended yet"
    assert process.poll() is None
    hold(killed, "is killed")
    done = invoke("stop", str(killed.path))
    assert isinstance(done.exception, GuardError)
    assert f"tuneloom finetune --resume-from {killed.path}" in str(done.exception)


def test_no_process_but_the_runs_trainer_is_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has the trainer's number by now, one that reads the run, and a run of another machine."""
    state: dict[str, Any] = {"time": 2.0**33}
    run = make_run(tmp_path, "run")
    reads = f"import sys; f = open({str(run.metrics)!r}); print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", reads], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        run.write_json(STATE, {"phase": "training", "pid": process.pid, **state})
        assert run.live_pid() == process.pid, "it looks alive by its number"
        assert trainer(run) is None
        assert fault(str(run.path)).got == "phase dead"
        run.write_json(STATE, {"phase": "training", "pid": process.pid, "host": "elsewhere", **state})
        assert fault(str(run.path)).what == "the run was last trained on another machine"
        assert process.poll() is None
        with monkeypatch.context() as other:
            other.setattr(psutil.Process, "open_files", _denied)  # as for the process of another user
            run.write_json(STATE, {"phase": "training", "pid": process.pid, **state})
            assert fault(str(run.path)).what == "another user trains the run"
        process.communicate(b"\n")
        assert process.returncode == 0
    assert fault("nothing", "--dir", str(tmp_path)).what == "no such run"


def _denied(self: psutil.Process) -> None:
    raise psutil.AccessDenied(self.pid)
