"""Which run to continue, from which checkpoint, and whether its settings are still the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.checkpoints import newest_whole, verify_checkpoint
from tuneloom.config import Config, load_config
from tuneloom.errors import UserError, excerpt, user_path
from tuneloom.rundir import CONFIG, ENVIRONMENT, PLAN, STATE, RunDirectory

WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "name",
        "training.logging_steps",
        "training.eval_steps",
        "training.save_steps",
        "training.save_total_limit",
        "training.report_to",
        "training.per_device_eval_batch_size",
        "base_model.attn_implementation",
        "training.precision",
        "training.tokens_per_microbatch",
        "training.gradient_checkpointing",
        "training.fsdp",
    }
)
"""Settings that may change between a run and its resume: the weights come out the same
(precision and budget are taken from the run's plan)."""

FIXED = ("adapter.", "base_model")
"""What not even an override may change: the checkpoint's tensors belong to it."""


@dataclass(frozen=True)
class ResumePoint:
    """Where to continue.

    Attributes:
        run: the run's directory.
        checkpoint: from there; None: the run has none yet, so from its first step.
        plan: the run's measured choices, used again.
        skipped: newer checkpoints that are broken, and why.
        finished: the run is done already.
    """

    run: RunDirectory
    checkpoint: Path | None
    plan: dict[str, Any] | None
    skipped: tuple[str, ...] = ()
    finished: bool = False


def find_resume(name: str, runs_dir: str | Path) -> ResumePoint:
    """Find what to continue by a run's path or name, or by a checkpoint's path.

    Raises:
        UserError: there is no such run, or the checkpoint named is broken.
    """
    place = user_path(name)
    if not place.exists() and (Path(runs_dir) / name).exists():
        place = Path(runs_dir) / name
    if place.name.startswith("checkpoint-") and RunDirectory.is_run(place.parent):
        fault = verify_checkpoint(place)
        if fault:
            raise UserError(
                "the checkpoint is broken",
                where=str(place),
                got=fault,
                mend=f"resume from the run: --resume-from {place.parent}",
            )
        run = RunDirectory(place.parent)
        refuse_live(run)
        return ResumePoint(run, place, run.read_json(PLAN))
    if not RunDirectory.is_run(place):
        raise UserError("no such run to resume", where=str(place), expected=f"a folder with {CONFIG}, or a checkpoint in one")
    run = RunDirectory(place)
    refuse_live(run)
    checkpoint, skipped = newest_whole(run)
    finished = (run.read_json(STATE) or {}).get("phase") == "done"
    return ResumePoint(run, checkpoint, run.read_json(PLAN), tuple(skipped), finished)


def newest_run(config: Config, *, of_any_config: bool = False) -> ResumePoint:
    """Find the newest run of a config under its output_dir.

    A config with a name finds the runs of that name; one without, those whose settings are the
    same, the ones that are not done first.

    Args:
        config: the settings.
        of_any_config: look at every run there, whatever its settings.

    Raises:
        UserError: there is none, naming those that are there.
    """
    parent = Path(config.output_dir)
    there = [path for path in (parent.iterdir() if parent.is_dir() else ()) if RunDirectory.is_run(path)]
    there.sort(key=lambda path: (path / CONFIG).stat().st_mtime, reverse=True)
    if config.name:
        found = [path for path in there if re.fullmatch(re.escape(config.name) + r"(-\d+)?", path.name)]
    elif of_any_config:
        found = there
    else:
        found = [path for path in there if not changed_settings(RunDirectory(path), config)]
    points = [find_resume(str(path), parent) for path in found]
    if not points:
        raise UserError(
            f"no run named {config.name} to resume" if config.name else "no run of these settings to resume",
            where=str(parent),
            expected=f"one of {', '.join(path.name for path in there[:5])}, by --resume-from" if there else None,
            mend="leave --resume out to start one",
        )
    return points[0] if config.name else next((point for point in points if not point.finished), points[0])


def refuse_live(run: RunDirectory) -> None:
    """Refuse a run that another process is training now.

    Raises:
        UserError: naming the process.
    """
    if (pid := run.live_pid()) is not None:
        raise UserError(
            "the run is being trained right now",
            where=str(run.path),
            got=f"process {pid}",
            mend="wait for it, or stop it first",
        )


def as_begun(run: RunDirectory, config: Config) -> Config:
    """Fill in what a run took over from the adapter that it continues from, where the config leaves it open."""
    begun, asked = load_config(run.config).adapter, config.adapter
    if begun.continue_from is None or begun.continue_from != asked.continue_from:
        return config
    given = {key: getattr(asked, key) for key in asked.model_fields_set}
    return config.model_copy(update={"adapter": begun.model_copy(update=given)})


def changed_settings(run: RunDirectory, config: Config) -> dict[str, str]:
    """Return the settings that affect the result and differ from the run's: key -> `was -> is`."""
    before, now = load_config(run.config).model_dump(mode="json"), as_begun(run, config).model_dump(mode="json")
    return {
        key: f"{excerpt(was, 60)} -> {excerpt(becomes, 60)}"
        for key, was, becomes in _differences(before, now)
        if key not in WITHOUT_EFFECT and not key.startswith(("evaluation.", "generation."))
    }


def changed_inputs(run: RunDirectory, environment: Mapping[str, Any]) -> dict[str, str]:
    """Return which of base model, data files and the adapter continued from are not what the run began with."""
    before = run.read_json(ENVIRONMENT) or {}
    changed = {}
    origins = [(found.get("continued_from") or {}).get("sha256") for found in (before, environment)]
    if origins[0] != origins[1]:
        changed["adapter.continue_from"] = "its weights have changed"
    if before.get("base_model", {}).get("fingerprint") != environment["base_model"]["fingerprint"]:
        changed["base_model"] = "its weights have changed"
    if before.get("data_files") != environment["data_files"]:
        changed["data"] = "the files have changed"
    return changed


def refuse_changes(run: RunDirectory, changes: Mapping[str, str], override: bool) -> None:
    """Refuse to resume over changes, unless `override` is given and they are of a kind that it lets pass.

    Raises:
        UserError: naming them.
    """
    fixed = {key: text for key, text in changes.items() if key.startswith(FIXED)}
    if changes and (fixed or not override):
        raise UserError(
            "what the run began with cannot change" if override else "the settings have changed since the run began",
            where=str(run.path),
            got="; ".join(f"{key}: {text}" for key, text in (fixed if override else changes).items()),
            mend="restore them, or start a new run without --resume"
            + ("" if fixed else ", or go on regardless with --override"),
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**before, **now}:
        was, becomes = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(becomes, dict):
            yield from _differences(was, becomes, f"{prefix}{key}.")
        elif was != becomes:
            yield f"{prefix}{key}", was, becomes
