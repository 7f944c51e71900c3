"""What goes wrong around a training costs no work: full and read-only disks, a second trainer, signals, clocks, memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chaos.small_disk import CHANGES
from conftest import ROOT
from helpers import assert_mendable, run_python, script, sha256, tiny_config

from tuneloom.config import load_config
from tuneloom.errors import Interrupted, UserError
from tuneloom.rundir import RunDirectory
from tuneloom.train.resume import find_resume
from tuneloom.train.run import finetune

# A disk that is full, or takes nothing.


def own_mounts() -> list[str]:
    """Return the command that gives a process mounts of its own; skip where the system allows none."""
    command = ["unshare", "-Urm"]
    tried = "mount -t tmpfs tmpfs /mnt"
    if (
        not shutil.which("unshare")
        or subprocess.run([*command, "sh", "-c", tried], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets nobody mount a small disk of their own (unshare -Urm)")
    return command


@pytest.fixture(scope="module")
def on_small_disks(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each scenario, all in one process, and under `folder` the folder of their disks."""
    folder = tmp_path_factory.mktemp("disks")
    script = ROOT / "tests" / "chaos" / "small_disk.py"
    command = [*own_mounts(), sys.executable, script, tiny_model, rows_file, folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    done = finetune(tiny_config(tiny_model, rows_file, tmp_path_factory.mktemp("undisturbed"), CHANGES))
    return sha256(done.adapter / "adapter_model.safetensors")


def test_a_run_waits_for_room_and_ends_as_if_there_had_always_been_some(
    on_small_disks: dict[str, Any], undisturbed: str
) -> None:
    found = on_small_disks["wait"]
    assert found["told"][0] == f"the disk is full; waiting for room in {on_small_disks['folder'] / 'wait' / 'run'}"
    assert (found["steps"], found["hidden"]) == ([1, 2, 3, 4, 5, 6], [])
    assert found["sha256"] == undisturbed


def test_a_run_that_is_stopped_while_it_waits_keeps_its_checkpoints(on_small_disks: dict[str, Any], undisturbed: str) -> None:
    found = on_small_disks["stop"]
    assert found["exit_code"] == 143
    assert found["message"] == "interrupted by SIGTERM; kept: checkpoint-2; the disk is full"
    assert found["checkpoints"] == [2]
    assert (sorted(set(found["steps"])), found["hidden"]) == ([1, 2, 3, 4, 5, 6], [])
    assert found["sha256"] == undisturbed


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_a_run_is_made(on_small_disks: dict[str, Any]) -> None:
    found = on_small_disks["tight"]
    assert found["exit_code"] == 2
    assert "the disk has too little room for the run's checkpoints" in found["message"]
    assert "room for 4 checkpoints" in found["message"]
    assert (found["steps"], found["checkpoints"]) == ([], [])


def test_a_disk_that_gets_read_only_is_told_and_so_are_new_and_resumed_runs(on_small_disks: dict[str, Any]) -> None:
    found = on_small_disks["read-only"]
    for told, what in (
        (found, "cannot write the run's folder"),
        (found["new"], "cannot write the output folder"),
        (found["resumed"], "cannot write the run's folder"),
    ):
        assert told["exit_code"] == 2
        assert told["message"].startswith(f"{what}\n  where:"), told["message"]
        assert "mend:" in told["message"]
    assert found["checkpoints"] == [2]


# A second trainer.

HOLD = (
    "import sys, time; from tuneloom.rundir import RunDirectory\n"
    "with RunDirectory(sys.argv[1]).held():\n    print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def stopped_run(tiny_model: Path, rows_file: Path, tmp_path: Path) -> RunDirectory:
    """A run that was stopped after its first step of two."""

    def stop(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and fields["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        finetune(tiny_config(tiny_model, rows_file, tmp_path, {"training.max_steps": 2}), show=stop)
    return RunDirectory(tmp_path / "run")


def test_a_second_trainer_is_refused_until_the_first_is_gone_however_it_goes(stopped_run: RunDirectory) -> None:
    path = stopped_run.path
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        point = find_resume(str(path), path.parent)
        with pytest.raises(UserError, match="the run is being trained right now") as caught:
            finetune(load_config(stopped_run.config), resume=point)
        assert_mendable(caught.value)
        assert caught.value.exit_code == 2
        again = script("-m", "tuneloom", "finetune", "--resume-from", path)
        assert again.code == 2
        assert "the run is being trained right now" in again.stderr
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    done = finetune(load_config(stopped_run.config), resume=find_resume(str(path), path.parent))
    assert done.adapter.is_dir()


def test_new_and_resumed_runs_are_locked_while_they_train(stopped_run: RunDirectory) -> None:
    tries = []

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            run = RunDirectory(config.output_dir + "/" + name)
            with pytest.raises(UserError, match="being trained right now"), run.held():
                pass
            tries.append(name)

    config, name = load_config(stopped_run.config), "run"
    finetune(config, resume=find_resume(str(stopped_run.path), "runs"), show=show)
    name = "run-2"
    finetune(config, show=show)
    assert tries == ["run", "run-2", "run-2"]
    with stopped_run.held():
        pass


def test_what_a_killed_trainer_left_half_written_is_removed(stopped_run: RunDirectory) -> None:
    for name in (".checkpoint-2.77.partial", ".checkpoint-1.doomed", ".adapter.77.old"):
        (stopped_run.path / name).mkdir()
        (stopped_run.path / name / "adapter_model.safetensors").write_bytes(b"half")
    (stopped_run.path / ".state.json.77.partial").write_bytes(b"{")
    finetune(load_config(stopped_run.config), resume=find_resume(str(stopped_run.path), "runs"))
    assert not list(stopped_run.path.glob(".*"))


def test_a_torn_metrics_line_costs_no_event_but_itself(stopped_run: RunDirectory) -> None:
    whole = list(stopped_run.events())
    with stopped_run.metrics.open("ab") as file:
        file.write(b'{"event": "step", "step": 2, "lo')
    finetune(load_config(stopped_run.config), resume=find_resume(str(stopped_run.path), "runs"))
    assert list(stopped_run.events())[: len(whole)] == whole
    assert [event["step"] for event in stopped_run.history("step")] == [1, 2]


# Signals.

SIGNALS = {
    "Ctrl-C, then SIGTERM": ((signal.SIGINT, signal.SIGTERM), False, -signal.SIGTERM),
    "Ctrl-C twice": ((signal.SIGINT, signal.SIGINT), False, 130),
    "SIGINT twice, in the background": ((signal.SIGINT, signal.SIGINT), True, 130),
}
"""What is sent, whether SIGINT was ignored at first, and the exit code."""


@pytest.fixture(scope="module")
def signalled(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How a training ended that was sent each pair of signals, and under `folder` the folder of their runs."""
    folder = tmp_path_factory.mktemp("signals")
    cases = json.dumps({name: [signals, ignored] for name, (signals, ignored, _) in SIGNALS.items()})
    done = run_python(ROOT / "tests" / "chaos" / "two_signals.py", cases, tiny_model, rows_file, folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "folder": folder}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_signal_ends_a_process_at_once(name: str, signalled: dict[str, Any]) -> None:
    run = RunDirectory(signalled["folder"] / name / "run")
    said = signalled[name]["said"]
    assert signalled[name]["code"] == SIGNALS[name][2], said
    assert list(run.checkpoints()) == [1], "it did not stay to save another"
    assert find_resume(str(run.path), run.path.parent).checkpoint == run.checkpoint(1)
    assert "Traceback" not in said


@pytest.mark.parametrize("at", ["loading", "measuring"])
def test_sigterm_before_the_training_ends_it_without_a_run(at: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith(at):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM; training had not begun") as caught:
        finetune(tiny_config(tiny_model, rows_file, tmp_path / "runs"), say=say)
    assert caught.value.exit_code == 143
    assert said[-1].startswith(at)
    assert not (tmp_path / "runs").exists()


# Clocks, memory.


def test_a_clock_that_jumps_back_and_forth_changes_nothing(
    tiny_model: Path, rows_file: Path, tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    jumps = iter([-86400.0, 3e8, -1e9] * 1000)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    done = finetune(tiny_config(tiny_model, rows_file, tmp_path, CHANGES))
    monkeypatch.undo()
    assert sha256(done.adapter / "adapter_model.safetensors") == undisturbed
    steps = done.directory.history("step")
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0 < event["step_seconds"] < 60 and event["tokens_per_second"] > 0 for event in steps)
    assert find_resume(str(done.directory.path), tmp_path).finished


def test_a_base_that_memory_does_not_hold_is_refused_before_it_loads(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    with (model / "more.safetensors").open("wb") as file:
        file.write(b"\x02\0\0\0\0\0\0\0{}")
        file.truncate(4 << 40)
    said: list[str] = []
    with pytest.raises(UserError, match="the base model does not fit into memory") as caught:
        finetune(tiny_config(model, rows_file, tmp_path / "runs"), say=said.append)
    assert_mendable(caught.value)
    assert caught.value.exit_code == 2
    assert str(caught.value.expected).startswith("at least 4398")
    assert not [line for line in said if line.startswith("loading")]
    assert not (tmp_path / "runs").exists()
