"""What a user may name to talk to, evaluate or export, and how it loads.

A target is a run, a checkpoint, an adapter, a merged folder, a GGUF file or a model's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.adapters.store import CONFIG_FILE, base_of, load_adapter, read_adapter_config
from tuneloom.config import Config, load_config
from tuneloom.data.render import Renderer
from tuneloom.errors import UserError, user_path
from tuneloom.models.load import load_base_model, load_tokenizer_folder, pick_device
from tuneloom.models.precision import Precision, choose_precision
from tuneloom.models.source import ModelSource, resolve_model, silent
from tuneloom.rundir import RunDirectory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Say = Callable[[str], None]
_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Target:
    """A resolved target.

    Attributes:
        name: what the user wrote.
        base: the base model.
        adapter: folder of the adapter on it, None for a model of its own.
        config: the run's config where the target belongs to one.
        run: that run.
    """

    name: str
    base: ModelSource
    adapter: Path | None = None
    config: Config | None = None
    run: RunDirectory | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's own tokenizer and template where it has them, else the base's."""
        if self.adapter is not None and (self.adapter / _TOKENIZER).is_file():
            return self.adapter
        return self.base.folder


@dataclass(frozen=True)
class Loaded:
    """A target in memory: `model` is a PEFT model where there is an adapter."""

    target: Target
    model: PreTrainedModel
    renderer: Renderer
    precision: Precision


def resolve_target(name: str, *, runs_dir: str | Path = "runs", say: Say = silent) -> Target:
    """Find a target by path, by run name, or as a model.

    Raises:
        UserError: nothing of that name, or a run that has no adapter yet.
    """
    place = _place(name, runs_dir)
    if RunDirectory.is_run(place):
        return _run_target(name, place, say)
    if (place / CONFIG_FILE).is_file():
        return _adapter_target(name, place, say)
    return Target(name, resolve_model(name, say=say))


def find_adapter(name: str, *, runs_dir: str | Path = "runs", say: Say = silent) -> Path | None:
    """Return an adapter's folder by a run's path or name, or by its own; None where there is none.

    Raises:
        UserError: a run that has no adapter yet.
    """
    place = _place(name, runs_dir)
    if RunDirectory.is_run(place):
        return _adapter_of_run(RunDirectory(place), say)
    return place if (place / CONFIG_FILE).is_file() else None


def load_target(target: Target, *, precision: str | Precision = "auto", device: str = "auto") -> Loaded:
    """Load a target's base, adapter and tokenizer.

    Args:
        target: see `resolve_target`.
        precision: auto, bf16, fp16 or fp32, as near to it as the device can; a Precision: that one.
        device: auto, or a torch device's name.
    """
    where = pick_device(device)
    chosen = precision if isinstance(precision, Precision) else choose_precision(precision, where)
    renderer = Renderer(load_tokenizer_folder(target.tokenizer_folder))
    model = with_adapter(load_target_base(target, chosen.dtype, where), target)
    return Loaded(target, model, renderer, chosen)


def load_target_base(target: Target, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a target's base, quantised as its run says; no tokenizer is needed."""
    quantization = target.config.base_model.quantization if target.config else "none"
    return load_base_model(target.base.folder, dtype, device, quantization)


def with_adapter(base: PreTrainedModel, target: Target) -> Any:
    """Put a target's adapter on its loaded base, where it has one: a PEFT model then, else the base.

    Raises:
        UserError: torn files, or an adapter of another base.
    """
    return base if target.adapter is None else load_adapter(base, target.adapter, target.base).eval()


def _place(name: str, runs_dir: str | Path) -> Path:
    """Return the path that a name means: as it is, or a run of that name."""
    place, in_runs = user_path(name), Path(runs_dir) / name
    return in_runs if not place.exists() and RunDirectory.is_run(in_runs) else place


def _adapter_of_run(run: RunDirectory, say: Say) -> Path:
    if (run.adapter / CONFIG_FILE).is_file():
        return run.adapter
    whole = [path for path in run.checkpoints().values() if (path / CONFIG_FILE).is_file()]
    if not whole:
        raise UserError("the run has no adapter yet", where=str(run.path), mend="wait for its first checkpoint, or for its end")
    say(f"the run is not done; using {whole[-1].name}")
    return whole[-1]


def _run_target(name: str, place: Path, say: Say) -> Target:
    run = RunDirectory(place)
    config = load_config(run.config)
    adapter = _adapter_of_run(run, say)
    base = _resolve_base(config.base_model.path, adapter, config.base_model.revision, say)
    return Target(name, base, adapter, config, run)


def _adapter_target(name: str, place: Path, say: Say) -> Target:
    base, _ = base_of(place)
    run = RunDirectory(place.parent) if RunDirectory.is_run(place.parent) else None
    config = load_config(run.config) if run else None
    revision = config.base_model.revision if config else None
    return Target(name, _resolve_base(base, place, revision, say), place, config, run)


def _resolve_base(name: str, adapter: Path, revision: str | None, say: Say) -> ModelSource:
    """Find an adapter's base by its name, or where it was when the adapter was made."""
    recorded = read_adapter_config(adapter).get("base_model_name_or_path")
    if not Path(name).exists() and isinstance(recorded, str) and Path(recorded).is_dir():
        return resolve_model(recorded, say=say)
    return resolve_model(name, revision=revision, say=say)
