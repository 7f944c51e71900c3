"""What the studio's chat, prediction and export may be pointed at: runs with an adapter, their checkpoints, embedded models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuneloom.adapters.store import CONFIG_FILE
from tuneloom.config import Config, load_config
from tuneloom.errors import UserError
from tuneloom.models.embedded import EMBEDDED, ready_folder
from tuneloom.rundir import EXPORTS, RunDirectory, read_json_map
from tuneloom.studio.chats import MAX_TEXT
from tuneloom.studio.frame import Studio, id_of

OTHER = "other"
_MODEL = "model-"


@dataclass(frozen=True)
class Choice:
    """Something to choose.

    Attributes:
        key: opaque; in URLs.
        name: what is shown.
        target: what the command line is given.
        run: whether it is a run.
    """

    key: str
    name: str
    target: str
    run: bool


def choices(studio: Studio, *, adapters_only: bool = False) -> list[Choice]:
    """Return what there is to choose from.

    Args:
        studio: whose runs; those that have an adapter or a checkpoint, newest first.
        adapters_only: leave out exported models, and embedded ones that are on this machine or may be fetched.
    """
    found = [Choice(id_of(run.path), run.name, run.path, True) for run in studio.summaries() if states(run.path)]
    if adapters_only:
        return found
    found += [Choice(id_of(path), f"{EXPORTS}/{path.name}", str(path), False) for path in exported_models(studio.runs)]
    models = [name for name, model in EMBEDDED.items() if ready_folder(name) is not None or not model.consent]
    return [*found, *(Choice(_MODEL + name, name, name, False) for name in models)]


def exported_models(runs: Path) -> list[Path]:
    """Return the merged models that were exported here, by name."""
    return sorted(file.parent for file in (runs / EXPORTS).glob("*/config.json") if not file.parent.name.startswith("."))


def states(run: str | Path) -> dict[str, str]:
    """Return a run's adapter and whole checkpoints: name -> path, the published adapter first, then the newest."""
    directory = RunDirectory(run)
    there = [directory.adapter, *reversed(directory.checkpoints().values())]
    return {path.name: str(path) for path in there if (path / CONFIG_FILE).is_file()}


def find_choice(found: list[Choice], asked: str | None) -> Choice | None:
    """Return the choice of a key or of what the command line would be given; a checkpoint's is its run's."""
    if asked is None:
        return None
    by_key = next((choice for choice in found if asked in (choice.key, choice.target)), None)
    return by_key or next((choice for choice in found if choice.run and str(Path(asked).parent) == choice.target), None)


def config_of(target: str) -> Config | None:
    """Return the settings of the run that a target is or belongs to, None where there is none that can be read."""
    place = Path(target)
    for folder in (place, place.parent):
        if RunDirectory.is_run(folder):
            try:
                return load_config(RunDirectory(folder).config)
            except UserError:
                return None
    return None


def has_adapter(target: str) -> bool:
    """Return whether a target has an adapter, as far as its folder tells without loading it."""
    place = Path(target)
    return (place / CONFIG_FILE).is_file() or (RunDirectory.is_run(place) and bool(states(place)))


def base_model_type(target: str) -> str | None:
    """Return the model_type of a target's base where that is a folder on this machine."""
    config = config_of(target)
    folder = Path(config.base_model.path) if config else Path(target)
    value = read_json_map(folder / "config.json")
    return None if value is None else str(value.get("model_type"))


def typed_target(text: str) -> str:
    """Return a target that somebody typed: a path or a model's name.

    Raises:
        UserError: nothing, or what cannot be one.
    """
    target = text.strip()
    if not target or "\0" in target or "\n" in target or len(target) > MAX_TEXT:
        raise UserError("no target", where="target", got=target[:80], expected="a folder, or a model's name")
    return str(Path(target).expanduser()) if target.startswith("~") else target
