"""Training in several processes: the same losses, one that writes, none left behind; and what only such a step has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.config import TrainingConfig, dump_config, load_config
from tuneloom.data.plan import StepSchedule
from tuneloom.data.split import in_step, split_step
from tuneloom.errors import GuardError, UserError
from tuneloom.models.precision import exactly
from tuneloom.rundir import RunDirectory
from tuneloom.train import engine as engine_module
from tuneloom.train import prepare as prepare_module
from tuneloom.train.resume import find_resume
from tuneloom.train.run import finetune
from tuneloom.types import Layout, Sample

CHANGES = {
    "training.max_steps": 4,
    "training.save_steps": 2,
    "training.eval_steps": 2,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 4,
}


def torchrun(num_ranks: int, *arguments: str | Path, cwd: Path, wait: bool = True) -> subprocess.Popen[str]:
    """Start a torchrun of this Python, its output in a file; by default wait for its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    with open(cwd / "torchrun.log", "a", encoding="utf-8") as log:
        started = subprocess.Popen(
            [*command, *map(str, arguments)], cwd=cwd, env=environment, stdout=log, stderr=log, text=True
        )
    if wait:
        assert started.wait(timeout=120) == 0, (cwd / "torchrun.log").read_text(encoding="utf-8")[-4000:]
    return started


def ranks_of(torchrun: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Return the processes that a torchrun has started, by rank."""
    return {child.environ()["RANK"]: child for child in psutil.Process(torchrun.pid).children()}


def config_file(folder: Path, model: Path, rows: Path, changes: dict[str, Any]) -> Path:
    config = tiny_config(model, rows, folder / "runs", CHANGES | {"data.validation": str(rows)} | changes)
    file = folder / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return file


def figures(run: Path) -> dict[str, list[float]]:
    """Return the losses of a run that count."""
    directory = RunDirectory(run)
    return {
        "train": [event["loss"] for event in directory.history("step")],
        "validation": [event["eval_loss"] for event in directory.history("eval")],
    }


def same(left: dict[str, list[float]], right: dict[str, list[float]]) -> bool:
    return all(left[key] == pytest.approx(right[key], rel=1e-5) for key in left)


@pytest.fixture(scope="module")
def alone(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process, twice as many samples in each of its steps as two have in one of theirs."""
    folder = tmp_path_factory.mktemp("alone")
    changes = {"data.validation": str(rows_file), "training.gradient_accumulation_steps": 8}
    return figures(finetune(tiny_config(tiny_model, rows_file, folder, CHANGES | changes)).directory.path)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_two_ranks_with_the_base_in_parts_resumed_by_three_give_the_losses_of_one(
    method: str, tiny_model: Path, rows_file: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    dora = {"adapter.use_dora": method == "dora"}
    if method == "dora":
        changes = CHANGES | dora | {"data.validation": str(rows_file), "training.gradient_accumulation_steps": 8}
        alone = figures(finetune(tiny_config(tiny_model, rows_file, tmp_path / "alone", changes)).directory.path)
    file = config_file(tmp_path, tiny_model, rows_file, dora | {"training.fsdp": "full_shard"})
    torchrun(2, "-m", "tuneloom", "finetune", file, cwd=tmp_path)
    run = tmp_path / "runs" / "run"
    assert same(figures(run), alone)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    assert RunDirectory(run).read_json("plan.json")["fsdp"] == "full_shard"

    torchrun(3, "-m", "tuneloom", "finetune", "--resume-from", run / "checkpoint-2", cwd=tmp_path)
    (resumed,) = RunDirectory(run).events("resume")
    assert resumed["step"] == 2
    assert same(figures(run), alone)


def test_two_ranks_with_the_base_on_each_resumed_by_one_give_the_losses_of_one(
    tiny_model: Path, rows_file: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    file = config_file(tmp_path, tiny_model, rows_file, {})
    torchrun(2, "-m", "tuneloom", "finetune", file, cwd=tmp_path)
    run = tmp_path / "runs" / "run"
    assert same(figures(run), alone)
    log = (tmp_path / "torchrun.log").read_text(encoding="utf-8")
    assert log.count("talk to it with") == 1
    assert log.count("8 samples a step (1 x 4 x 2)") == 1

    finetune(load_config(run / "config.yaml"), resume=find_resume(str(run / "checkpoint-2"), run.parent))
    assert same(figures(run), alone)


def test_frozen_weights_lie_in_parts_a_unit_each_layer_and_adapters_stay_alike(
    tiny_model: Path, rows_file: Path, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    file = config_file(tmp_path, tiny_model, rows_file, {"training.fsdp": "full_shard"})
    torchrun(2, ROOT / "tests" / "ranks.py", file, cwd=tmp_path)
    lines = (tmp_path / "torchrun.log").read_text(encoding="utf-8").splitlines()
    found = next(json.loads(line) for line in lines if line.startswith("{"))
    assert found["frozen_in_parts"]
    assert found["trained_whole"]
    assert found["layers_are_units"]
    assert found["units"] == found["num_layers"] + 1
    assert sum(found["held"]) >= found["whole"]
    assert max(found["held"]) <= 0.52 * found["whole"]
    assert found["losses"] == pytest.approx(alone["train"][:2], rel=1e-5)
    assert found["adapters"][0] == found["adapters"][1]


def begun(folder: Path, model: Path, rows: Path) -> tuple[subprocess.Popen[str], RunDirectory]:
    """Start a long training of two ranks; return it once it has done some steps."""
    file = config_file(folder, model, rows, {"training.max_steps": 3000, "training.eval_steps": None, "data.validation": 0})
    started = torchrun(2, "-m", "tuneloom", "finetune", file, cwd=folder, wait=False)
    run = RunDirectory(folder / "runs" / "run")
    end = time.monotonic() + 90
    while len(list(run.events("step"))) < 3:
        assert started.poll() is None, (folder / "torchrun.log").read_text(encoding="utf-8")[-4000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    return started, run


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_rank_that_is_killed_ends_the_rest_and_the_run_resumes(
    rank: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    started, run = begun(tmp_path, tiny_model, rows_file)
    processes = ranks_of(started)
    processes[rank].kill()
    assert started.wait(timeout=30) != 0
    assert not any(process.is_running() for process in processes.values())
    if rank == "1":
        step = max(run.checkpoints())
        assert f"kept:     checkpoint-{step}" in (tmp_path / "torchrun.log").read_text(encoding="utf-8")
        assert "another process of this training has ended" in run.read_json("state.json")["reason"]
        done = [event["step"] for event in run.events("step")]
        config = load_config(run.config, [f"training.max_steps={step + 2}"])
        finetune(config, resume=find_resume(str(run.path), run.path.parent), override=True)
        assert done[-1] == step
        assert [event["step"] for event in run.history("step")] == list(range(1, step + 3))


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    started, run = begun(tmp_path, tiny_model, rows_file)
    ranks_of(started)["1"].send_signal(signal.SIGTERM)
    assert started.wait(timeout=30) != 0
    step = max(run.checkpoints())
    assert run.read_json("state.json")["phase"] == "interrupted"
    assert f"kept: checkpoint-{step}" in run.read_json("state.json")["reason"]


samples_of_a_step = st.lists(
    st.tuples(st.integers(0, 2), st.integers(2, 60)).map(
        lambda drawn: Sample(
            *_sample(prefix=drawn[0], length=drawn[1]),
        )
    ),
    min_size=1,
    max_size=24,
)


def _sample(prefix: int, length: int) -> tuple[Any, Any]:
    import numpy as np

    ids = np.concatenate([np.full(20 * prefix, prefix), np.arange(length)]).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(ids) - 1


@given(samples=samples_of_a_step, num_ranks=st.integers(1, 5), shared=st.booleans())
@settings(max_examples=60)
def test_ranks_have_each_sample_once_and_about_as_much_to_do(samples: Sequence[Sample], num_ranks: int, shared: bool) -> None:
    plans = split_step(samples, num_ranks, 128, Layout.SHARED if shared else Layout.PACKED)
    assert len(plans) == num_ranks
    assert sum(plan.num_samples for plan in plans) == len(samples)
    assert sum(plan.num_tokens for plan in plans) == sum(sample.num_tokens - 1 for sample in samples)
    longest = max(sample.num_tokens - 1 for sample in samples)
    total = sum(plan.num_tokens for plan in plans)
    if not shared:
        assert max(plan.num_tokens for plan in plans) <= total / num_ranks + longest
    together = [in_step(plans, rank) for rank in range(num_ranks)]
    assert len({len(batches) for batches in together}) == 1
    weights = [[weight for _, weight in batches] for batches in together]
    assert [sum(each) for each in weights] == [len(plan.micro_batches) for plan in plans]


def test_more_processes_make_larger_steps() -> None:
    training = TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert StepSchedule.of(training, 100, 3).samples_per_step == 24


def test_a_gradient_that_overflows_in_fp16_lowers_the_scale_and_leaves_the_weights(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(prepare_module, "choose_precision", lambda wanted, device: exactly("fp16"))
    monkeypatch.setattr(
        engine_module.torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**24, enabled=enabled)
    )
    changes = {"training.max_steps": 12, "training.learning_rate": 1e-3, "training.lr_scheduler_type": "linear"}
    half = finetune(tiny_config(tiny_model, rows_file, tmp_path / "half", changes))
    steps = half.directory.history("step")
    overflowed = [event["step"] for event in half.directory.history("warning")]
    assert overflowed[:3] == [1, 2, 3]
    assert len(overflowed) < 12
    assert steps[0]["loss_scale"] == 2.0**23
    assert steps[-1]["loss_scale"] == 2.0 ** (24 - len(overflowed))
    assert len({event["learning_rate"] for event in steps[:4]}) == 1  # no update, so the schedule stays
    assert steps[-1]["learning_rate"] < steps[0]["learning_rate"]

    monkeypatch.undo()
    whole = finetune(tiny_config(tiny_model, rows_file, tmp_path / "whole", changes))
    first_of_whole = [event["loss"] for event in whole.directory.history("step")]
    assert steps[0]["loss"] == pytest.approx(first_of_whole[0], rel=2e-3)
    saved = half.directory.checkpoint(12)
    assert json.loads((saved / "training_state.json").read_text(encoding="utf-8"))["scaler"]["scale"] == steps[-1]["loss_scale"]


def test_a_scale_that_finds_no_end_stops_the_run(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "choose_precision", lambda wanted, device: exactly("fp16"))
    summed = engine_module.Engine._summed

    def poisoned(engine: Any, losses: Any) -> torch.Tensor:
        next(parameter for parameter in engine._parameters if parameter.grad is not None).grad.fill_(float("inf"))
        return summed(engine, losses)

    monkeypatch.setattr(engine_module.Engine, "_summed", poisoned)
    with pytest.raises(GuardError, match="the gradient is not finite"):
        finetune(tiny_config(tiny_model, rows_file, tmp_path, {"training.max_steps": 60}))


@pytest.mark.parametrize("failures", [1, 3])
def test_a_step_that_memory_does_not_suffice_for_is_done_in_smaller_micro_batches(
    failures: int, tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training.max_steps": 3, "adapter.lora_dropout": 0.0, "training.gradient_accumulation_steps": 4}
    plain = finetune(tiny_config(tiny_model, rows_file, tmp_path / "plain", changes))
    real, left = engine_module.supervised_loss_sum, [failures]

    def short_of_memory(model: Any, batch: Any) -> torch.Tensor:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch)

    monkeypatch.setattr(engine_module, "supervised_loss_sum", short_of_memory)
    run = finetune(tiny_config(tiny_model, rows_file, tmp_path / "short", changes))
    warnings = run.directory.history("warning")
    assert len(warnings) == failures
    assert {event["step"] for event in warnings} == {1}
    budgets = [event["tokens_per_microbatch"] for event in warnings]
    assert budgets == sorted(budgets, reverse=True)
    assert run.directory.read_json("plan.json")["tokens_per_microbatch"] == budgets[-1]
    assert budgets[-1] < plain.directory.read_json("plan.json")["tokens_per_microbatch"]
    losses = [[event["loss"] for event in each.directory.history("step")] for each in (plain, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_single_sample_that_memory_does_not_hold_is_an_error_with_what_to_change(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(model: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module, "supervised_loss_sum", never)
    with pytest.raises(UserError, match=r"cutoff_len") as error:
        finetune(tiny_config(tiny_model, rows_file, tmp_path))
    assert "step 1" in str(error.value)
