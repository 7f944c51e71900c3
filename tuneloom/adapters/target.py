"""What a user may name to talk to, evaluate or export, and how it loads.

A target is a run, a checkpoint, an adapter, a merged folder, a GGUF file or a model's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.adapters.native import native_folder
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
_NAME_BASE = "name the base by its path: --base-model PATH (in Python base_model=, or load_model(PATH, adapter=...))"
_TOKENIZER = ("tokenizer_config.json",)
_WHOLE_TOKENIZER = (*_TOKENIZER, "tokenizer.json")


@dataclass(frozen=True)
class Target:
    """A resolved target.

    Attributes:
        name: what the user wrote.
        base: the base model.
        adapter: folder of the adapter on it, under native names; None for a model of its own.
        config: the run's config where the target belongs to one.
        run: that run.
        original: the adapter's own folder, where `adapter` is made from it (see `native_folder`).
    """

    name: str
    base: ModelSource
    adapter: Path | None = None
    config: Config | None = None
    run: RunDirectory | None = None
    original: Path | None = None

    @classmethod
    def of(
        cls,
        name: str,
        base: ModelSource,
        folder: Path,
        config: Config | None = None,
        run: RunDirectory | None = None,
    ) -> Target:
        """Return the target of an adapter's folder, whatever names it uses.

        Raises:
            UserError: one in a ChatGLM's original names that is broken or of another base.
        """
        native = native_folder(folder, base)
        return cls(name, base, native, config, run, None if native == folder else folder)

    @property
    def own_folder(self) -> Path | None:
        """The adapter's folder as the user has it."""
        return self.original or self.adapter

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's own tokenizer and template where it has them, else the base's.

        Beside an adapter in original names only a whole one counts: those of old needed code of their own.
        """
        needed = _WHOLE_TOKENIZER if self.original else _TOKENIZER
        if self.own_folder is not None and all((self.own_folder / name).is_file() for name in needed):
            return self.own_folder
        return self.base.folder


@dataclass(frozen=True)
class Loaded:
    """A target in memory: `model` is a PEFT model where there is an adapter."""

    target: Target
    model: PreTrainedModel
    renderer: Renderer
    precision: Precision


def resolve_target(name: str, *, base_model: str | None = None, runs_dir: str | Path = "runs", say: Say = silent) -> Target:
    """Find a target by path, by run name, or as a model.

    Args:
        name: what the user wrote.
        base_model: the base to put an adapter on; None: the one that it names.
        runs_dir: where a run's name is looked up.
        say: gets a line before anything that takes long.

    Raises:
        UserError: nothing of that name, a run that has no adapter yet, or a base model for what has no adapter.
    """
    place = _place(name, runs_dir)
    if RunDirectory.is_run(place):
        return _run_target(name, place, base_model, say)
    if (place / CONFIG_FILE).is_file():
        return _adapter_target(name, place, base_model, say)
    if base_model is not None:
        raise UserError(
            "a base model is named for what has no adapter",
            where=name,
            got=f"base model {base_model}",
            expected="a run, a checkpoint or an adapter",
            mend="leave the base model out",
        )
    return Target(name, resolve_model(name, say=say))


def find_adapter(name: str, *, runs_dir: str | Path = "runs", say: Say = silent) -> Path | None:
    """Return an adapter's folder by a run's path or name, or by its own; None where there is none.

    It is as the user has it, in whatever names: `native_folder` makes it one that loads.

    Raises:
        UserError: a run that has no adapter yet.
    """
    place = _place(name, runs_dir)
    if RunDirectory.is_run(place):
        return _adapter_of_run(RunDirectory(place), say)
    return place if (place / CONFIG_FILE).is_file() else None


def target_renderer(target: Target) -> Renderer:
    """Return the renderer of a target's tokenizer and chat template; no weights are needed.

    Raises:
        UserError: it has none, or one that cannot be used.
    """
    return Renderer(load_tokenizer_folder(target.tokenizer_folder))


def load_target(
    target: Target, *, precision: str | Precision = "auto", device: str = "auto", renderer: Renderer | None = None
) -> Loaded:
    """Load a target's base, adapter and tokenizer.

    Args:
        target: see `resolve_target`.
        precision: auto, bf16, fp16 or fp32, as near to it as the device can; a Precision: that one.
        device: auto, or a torch device's name.
        renderer: from `target_renderer`, where it was asked for before.
    """
    renderer = renderer or target_renderer(target)
    where = pick_device(device)
    chosen = precision if isinstance(precision, Precision) else choose_precision(precision, where)
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


def _run_target(name: str, place: Path, base_model: str | None, say: Say) -> Target:
    run = RunDirectory(place)
    config = load_config(run.config)
    adapter = _adapter_of_run(run, say)
    if base_model is not None:
        base = resolve_model(base_model, say=say)
    else:
        base = _resolve_base(config.base_model.path, adapter, config.base_model.revision, say)
    return Target.of(name, base, adapter, config, run)


def _adapter_target(name: str, place: Path, base_model: str | None, say: Say) -> Target:
    run = RunDirectory(place.parent) if RunDirectory.is_run(place.parent) else None
    config = load_config(run.config) if run else None
    revision = config.base_model.revision if config else None
    if base_model is not None:
        base = resolve_model(base_model, say=say)
    else:
        base = _resolve_base(base_of(place)[0], place, revision, say)
    return Target.of(name, base, place, config, run)


def _resolve_base(name: str, adapter: Path, revision: str | None, say: Say) -> ModelSource:
    """Find an adapter's base by its name, or where it was when the adapter was made.

    Raises:
        UserError: it is in neither place, with the way to name another.
    """
    recorded = read_adapter_config(adapter).get("base_model_name_or_path")
    if not Path(name).exists() and isinstance(recorded, str) and Path(recorded).is_dir():
        return resolve_model(recorded, say=say)
    try:
        return resolve_model(name, revision=revision, say=say)
    except UserError as error:
        raise UserError(
            error.what,
            where=f"{error.where}, the base that {adapter} names",
            got=error.got,
            expected=error.expected,
            mend=f"{error.mend or 'mend it'}; or {_NAME_BASE}",
        ) from error
