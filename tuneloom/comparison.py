"""Runs side by side: what differs in their settings and in what they ran on, and how each went; no torch.

A run that is live, failed or torn is compared as far as it went, with its phase.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tuneloom.config import load_config
from tuneloom.errors import UserError
from tuneloom.rundir import DATA_REPORT, ENVIRONMENT, EVALUATION, PLAN, RunDirectory
from tuneloom.runs import Clock, find_run, number, shown_name, summary_of

WEIGHTS = "adapter_model.safetensors"
BASE, DATA = "base_model", "data"
"""What makes losses of runs no measure of each other where it differs."""
_NAMES_ONLY = ("name", "output_dir")
_LEFT_OUT = (
    *("plan.gflops.", "plan.trial.", "plan.estimate.", "plan.precision_why", "environment.memory_gib"),  # measured anew
    *("plan.device", "environment.seed"),  # said elsewhere
)
_FILES = "environment.data_files."
_COUNTS = ("samples", "tokens", "supervised_tokens")
_MOST_HEADER_BYTES = 1 << 24

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A figure of an evaluation, and the ends of its interval where it has them."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Results:
    """How a run went. What is not known, or not yet, is None.

    Attributes:
        name: of its directory; where two are alike, the path.
        path: of its directory.
        phase, reason, step, total_steps, base_model, method: as of `RunSummary`.
        epochs: passes over the data so far.
        train_loss, eval_loss, best_eval_loss: the last ones, and the best; nats a supervised token.
        best_eval_step: where that was.
        identity_rate, leak_rate, general_loss_delta: of evaluation.json.
        gates: of evaluation.json: what was to be reached -> whether it was.
        seconds: spent in steps, without evaluations and checkpoints.
        step_seconds: of the mean step.
        tokens_per_second: over all steps; input tokens.
        mfu: useful work over what plain matrix products can do, over all steps.
        peak_memory_gib: the greatest of all steps.
        trainable_parameters: as counted in the adapter's file, or in the newest checkpoint's.
        adapter_bytes: of that file.
    """

    name: str
    path: str
    phase: str
    reason: str | None
    step: int | None
    total_steps: int | None
    base_model: str | None
    method: str | None
    epochs: float | None
    train_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    identity_rate: Measured | None
    leak_rate: Measured | None
    general_loss_delta: Measured | None
    gates: dict[str, bool]
    seconds: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    peak_memory_gib: float | None
    trainable_parameters: int | None
    adapter_bytes: int | None


@dataclass(frozen=True)
class Look:
    """What a comparison takes from a run.

    Attributes:
        results: how it went.
        settings: as `settings_of`; None where config.yaml cannot be read.
        fault: why it cannot.
        surroundings: as `surroundings_of`.
    """

    results: Results
    settings: Settings | None
    fault: str | None
    surroundings: Settings


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: in the order that was asked for.
        settings: key of the config -> its value in each run, of those that differ; None where a run has no such key.
        surroundings: the same of environment.json, plan.json and data_report.json: versions, device, hashes, counts.
        faults: run -> why its config.yaml cannot be read; its settings are None then.
        different: `base_model` and `data`, where runs differ in them, so that their losses are no measure of each other.
    """

    runs: tuple[Results, ...]
    settings: dict[str, tuple[Any, ...]]
    surroundings: dict[str, tuple[Any, ...]]
    faults: dict[str, str]
    different: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        return asdict(self)


def find_runs(names: Sequence[str], folder: str | Path = "runs") -> list[RunDirectory]:
    """Find the runs to compare, each by its path or its name below a folder.

    Raises:
        UserError: fewer than two, the same one twice, or one that is no run; those that exist are named.
    """
    found = [find_run(name, folder) for name in names]
    if len(found) < 2:
        raise UserError(
            "one run has nothing to be compared with",
            where="runs compare",
            got=", ".join(names) or "no run",
            mend="name two runs or more; `tuneloom runs` lists them",
        )
    seen: dict[Path, str] = {}
    for name, run in zip(names, found, strict=True):
        place = run.path.resolve()
        if place in seen:
            raise UserError(
                "the same run twice", where="runs compare", got=f"{seen[place]} and {name}", mend="name each run once"
            )
        seen[place] = name
    return found


def compare(runs: Sequence[RunDirectory]) -> Comparison:
    """Compare runs.

    Raises:
        UserError: the files of one may not be read.
    """
    names = distinct_names([run.path for run in runs])
    return side_by_side([look_at(run, name) for name, run in zip(names, runs, strict=True)])


def look_at(run: RunDirectory, name: str) -> Look:
    """Read a run for comparisons.

    Args:
        run: its directory.
        name: what it is called there.

    Raises:
        UserError: its files may not be read.
    """
    try:
        settings, fault = settings_of(run), None
    except UserError as error:
        settings, fault = None, f"{error.what} ({error.where})"
    return Look(_results(name, run), settings, fault, surroundings_of(run))


def side_by_side(looks: Sequence[Look]) -> Comparison:
    """Compare runs that were looked at."""
    settings = differing([look.settings for look in looks])
    surroundings = differing([look.surroundings for look in looks])
    return Comparison(
        runs=tuple(look.results for look in looks),
        settings=settings,
        surroundings=surroundings,
        faults={look.results.name: look.fault for look in looks if look.fault is not None},
        different=tuple(_different(looks, settings, surroundings)),
    )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of folders, the path of those whose name another one has too."""
    names = [shown_name(path) for path in paths]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def settings_of(run: RunDirectory) -> dict[str, Any]:
    """Return every setting of a run by dotted key, defaults included, but for where it lies and what it is called.

    Raises:
        UserError: config.yaml cannot be read.
    """
    return {key: value for key, value in _values(load_config(run.config)) if key not in _NAMES_ONLY}


def surroundings_of(run: RunDirectory) -> dict[str, Any]:
    """Return what a run ran on by dotted key: versions, device, hashes, what was chosen, how many samples there were."""
    report = run.read_json(DATA_REPORT) or {}
    counts = {
        role: {name: part[name] for name in _COUNTS if name in part}
        for role in ("train", "validation")
        if isinstance(part := report.get(role), dict)
    }
    files = {"environment": run.read_json(ENVIRONMENT) or {}, "plan": run.read_json(PLAN) or {}, "data_report": counts}
    return {key: value for key, value in _flat(files) if not key.startswith(_LEFT_OUT)}


def differing(maps: Sequence[Settings | None]) -> dict[str, tuple[Any, ...]]:
    """Return the keys that not all maps have the same value for -> the value in each, None where it is not there.

    A map that is None says nothing and differs in nothing.
    """
    keys = dict.fromkeys(key for values in maps if values is not None for key in values)
    found = {}
    for key in keys:
        told = [values.get(key) for values in maps if values is not None]
        if any(value != told[0] for value in told):
            found[key] = tuple(None if values is None else values.get(key) for values in maps)
    return found


def _different(looks: Sequence[Look], settings: Settings, surroundings: Settings) -> Iterator[str]:
    """Yield what makes the losses of these runs no measure of each other."""
    told = surroundings.get("environment.base_model.fingerprint", ())
    fingerprints = {str(fingerprint) for fingerprint in told if fingerprint is not None}
    if len({look.results.base_model for look in looks} - {None}) > 1 or len(fingerprints) > 1:
        yield BASE
    held_by_seed = "training.seed" in settings and any(
        isinstance(look.settings["data.validation"], float) for look in looks if look.settings is not None
    )
    if held_by_seed or any(key.startswith("data.") for key in settings) or any(_FILES in key for key in surroundings):
        yield DATA


def _values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config's settings by dotted key, as YAML would say them in short."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _values(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from ((f"{prefix}{name}.{key}", item) for key, item in value.items())
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        told = value.model_dump(mode="json", exclude_defaults=True)
        return told["path"] if told.keys() == {"path"} else told
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# How a run went.


def _results(name: str, run: RunDirectory) -> Results:
    try:
        history, weights = run.history(), _weights(run)
        summary = summary_of(run, history, Clock(run.events()))
        num_bytes = weights.stat().st_size if weights is not None else None
    except OSError as error:
        raise UserError(
            "the run cannot be read", where=str(run.path), got=error.strerror, mend="see who may read the folder"
        ) from error
    steps = [event for event in history if event["event"] == "step"]
    told = run.read_json(EVALUATION) or {}
    best_loss, best_step = min(_evaluated(history), default=(None, None))
    return Results(
        name=name,
        path=str(run.path),
        phase=summary.phase,
        reason=summary.reason,
        step=summary.step,
        total_steps=summary.total_steps,
        base_model=summary.base_model,
        method=summary.method,
        epochs=number(steps[-1].get("epoch")) if steps else None,
        train_loss=summary.train_loss,
        eval_loss=summary.eval_loss,
        best_eval_loss=best_loss,
        best_eval_step=best_step,
        identity_rate=_measured(told.get("identity_rate")),
        leak_rate=_measured(told.get("leak_rate")),
        general_loss_delta=_measured(told.get("general_loss_delta")),
        gates=_gates(told.get("gates")),
        **_speed(steps),
        trainable_parameters=num_parameters(weights) if weights is not None else None,
        adapter_bytes=num_bytes,
    )


def _evaluated(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, int]]:
    """Yield (validation loss, step) of each evaluation."""
    for event in history:
        loss, step = number(event.get("eval_loss")), event.get("step")
        if event["event"] == "eval" and loss is not None and isinstance(step, int):
            yield loss, step


def _speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the steps cost, each weighted by its time."""
    seconds = useful = timed = 0.0
    for event in steps:
        took, mfu = number(event.get("step_seconds")) or 0.0, number(event.get("mfu"))
        seconds += took
        if mfu is not None:
            useful, timed = useful + mfu * took, timed + took
    last = steps[-1] if steps else {}
    tokens, done = number(last.get("tokens")), number(last.get("step"))
    return {
        "seconds": round(seconds, 2) if seconds else None,
        "step_seconds": round(seconds / done, 4) if seconds and done else None,
        "tokens_per_second": round(tokens / seconds, 2) if seconds and tokens else None,
        "mfu": round(useful / timed, 4) if timed else None,
        "peak_memory_gib": max((peak for event in steps if (peak := number(event.get("peak_memory_gib")))), default=None),
    }


def _weights(run: RunDirectory) -> Path | None:
    """Return the file of the result's weights, of the newest checkpoint's where there is no result yet."""
    folders = [run.adapter, *reversed(run.checkpoints().values())]
    return next((folder / WEIGHTS for folder in folders if (folder / WEIGHTS).is_file()), None)


def num_parameters(file: Path) -> int | None:
    """Return how many numbers a safetensors file holds, as its header tells; None where that is torn."""
    try:
        with open(file, "rb") as opened:
            (num_bytes,) = struct.unpack("<Q", opened.read(8))
            if num_bytes > _MOST_HEADER_BYTES:
                return None
            header = json.loads(opened.read(num_bytes))
        total = 0
        for name, entry in header.items():
            if name != "__metadata__":
                total += _product(entry["shape"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return total


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= int(size)
    return product


def _measured(value: object) -> Measured | None:
    """Return a figure of evaluation.json: a number, or a map with `value`, `low` and `high`."""
    told = value if isinstance(value, dict) else {"value": value}
    found = number(told.get("value"))
    return None if found is None else Measured(found, number(told.get("low")), number(told.get("high")))


def _gates(value: object) -> dict[str, bool]:
    """Return whether each gate was passed; one that does not say so is left out."""
    gates = [gate for gate in value if isinstance(gate, dict)] if isinstance(value, list) else []
    told = [(gate.get("name"), gate.get("passed")) for gate in gates]
    return {name: passed for name, passed in told if isinstance(name, str) and isinstance(passed, bool)}
