"""Checkpoints: whole or absent, and everything that an exact resume needs.

    checkpoint-<step>/
      adapter_config.json  adapter_model.safetensors  base_model.json   PEFT's files and the base's note
      optimizer.safetensors  rng.safetensors                            tensors
      training_state.json                                               position, schedule, best
      plan.json
      manifest.json                                                     sha256 of each file, written last

A checkpoint is written beside its place, synced, and published by rename. JSON and
safetensors only; no pickle is read or written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tuneloom.adapters.store import save_adapter
from tuneloom.checkpoints import MANIFEST, OPTIMIZER, RNG, TRAINING_STATE, sha256_of, verify_checkpoint
from tuneloom.errors import UserError
from tuneloom.models.source import ModelSource
from tuneloom.rundir import PLAN, RunDirectory
from tuneloom.train.optim import optimizer_tensors, restore_optimizer, restore_scheduler

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim.lr_scheduler import LRScheduler


@dataclass
class Window:
    """What has been trained on since the last step event."""

    loss_sum: float = 0.0
    supervised_tokens: int = 0
    tokens: int = 0
    useful_gflop: float = 0.0
    seconds: float = 0.0


@dataclass
class TrainingState:
    """Where a run stands after `step` optimizer steps.

    Attributes:
        step: steps done; the next one is this index.
        tokens, supervised_tokens: trained on so far.
        useful_gflop: what they needed (see `WorkPerToken`).
        seconds: spent in steps so far.
        best_loss, best_step: of the validation, where there was one.
        stale_evaluations: since one was better, for early stopping.
        final_loss: mean train loss of the last logged window.
        window: what the next step event has so far.
        settled: whether the step's evaluation, if it has one, is done; else it comes first on resume.
        scheduler: the schedule's own state.
        scaler: GradScaler's state with fp16, else empty.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    useful_gflop: float = 0.0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    final_loss: float | None = None
    window: Window = field(default_factory=Window)
    settled: bool = True
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: RunDirectory,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    base: ModelSource,
) -> Path:
    """Write the checkpoint of `state.step` and publish it; a whole one that exists is left as it is."""
    final = run.checkpoint(state.step)
    if final.is_dir():
        if verify_checkpoint(final) is None:
            return final
        shutil.rmtree(final)
    partial = run.path / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, run, model, optimizer, state, base)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(final)
    _sync(run.path)
    return final


def _write(
    folder: Path,
    run: RunDirectory,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    base: ModelSource,
) -> None:
    save_adapter(model, folder, base)
    save_file(optimizer_tensors(model, optimizer), folder / OPTIMIZER)
    save_file(rng_tensors(), folder / RNG)
    (folder / TRAINING_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(run.path / PLAN, folder / PLAN)
    digests = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def read_training_state(folder: Path) -> TrainingState:
    """Return the state kept in a checkpoint.

    Raises:
        UserError: the checkpoint is not whole.
    """
    fault = verify_checkpoint(folder)
    if fault:
        raise UserError("the checkpoint is broken", where=str(folder), got=fault, mend="resume from another one")
    values = json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8"))
    return TrainingState(**values | {"window": Window(**values["window"])})


def restore(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> TrainingState:
    """Put optimizer, schedule and random state back; the adapter is loaded by whoever made `model`.

    Raises:
        UserError: the state does not fit this model.
    """
    state = read_training_state(folder)
    try:
        restore_optimizer(model, optimizer, load_file(folder / OPTIMIZER))
        rng = load_file(folder / RNG)
    except (SafetensorError, KeyError) as error:
        raise UserError("the checkpoint does not fit this run", where=str(folder), got=str(error)[:200]) from error
    restore_scheduler(scheduler, state.scheduler)
    restore_rng(rng)
    return state


def prune(run: RunDirectory, limit: int | None, keep: set[int]) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`; steps in `keep` stay. Return what was removed."""
    if limit is None:
        return []
    checkpoints = run.checkpoints()
    excess = len(checkpoints) - limit
    removed = []
    for step, path in checkpoints.items():
        if excess <= 0:
            break
        if step in keep:
            continue
        doomed = path.with_name(f".{path.name}.doomed")
        path.rename(doomed)
        shutil.rmtree(doomed)
        removed.append(path)
        excess -= 1
    return removed


def rng_tensors() -> dict[str, torch.Tensor]:
    """Return the random state that dropout draws from."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_tensors` returned."""
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
