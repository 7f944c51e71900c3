"""How fast trainings like the one in the form went: measured by earlier runs in the folder, never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.errors import UserError
from tuneloom.rundir import PLAN, RunDirectory
from tuneloom.runs import RunSummary, list_runs


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a run, over all of its steps where it has ended."""

    tokens_per_second: float
    run: str


def measured_speed(runs: Path, base: str, method: str, device: str) -> Speed | None:
    """Return the speed of the newest run of the same base, method and device that has done a step.

    Args:
        runs: the folder of runs.
        base: the base model's name, as runs note it.
        method: lora, rslora, dora, rslora+dora.
        device: its name, as plan.json has it.
    """
    try:
        found = list_runs(runs).runs
    except UserError:
        return None
    alike = (run for run in found if (run.base_model, run.method) == (base, method))
    return next((speed for run in alike if (speed := _speed(run, device)) is not None), None)


def _speed(run: RunSummary, device: str) -> Speed | None:
    directory = RunDirectory(run.path)
    if (directory.read_json(PLAN) or {}).get("device") != device:
        return None
    history = directory.history()
    ends = [event for event in history if event["event"] == "end"]
    rate = _positive(ends[-1].get("tokens_per_second")) if ends else None
    if rate is None:
        rate = _rate_of_steps([event for event in history if event["event"] == "step"])
    return None if rate is None else Speed(rate, run.name)


def _rate_of_steps(steps: list[dict[str, Any]]) -> float | None:
    """Return tokens over seconds of the steps that are told."""
    tokens = seconds = 0.0
    for step in steps:
        rate, took = _positive(step.get("tokens_per_second")), _positive(step.get("step_seconds"))
        if rate is not None and took is not None:
            tokens, seconds = tokens + rate * took, seconds + took
    return tokens / seconds if seconds else None


def _positive(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        return None
    return float(value)
