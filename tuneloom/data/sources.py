"""What a config names as data, to files: a built-in set, a file, a folder, or a set of a hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tuneloom.config import SourceConfig
from tuneloom.data.dataset_info import FILE_NAME, Entry, find_entry, refuse_without_name
from tuneloom.data.formats import RowShape
from tuneloom.data.hub import HUB_ID, MODELSCOPE, hub_files, modelscope_folder
from tuneloom.data.read import SUFFIXES
from tuneloom.errors import UserError, nearest, user_path

BUILTIN: dict[str, tuple[str, ...]] = {
    "self_cognition": ("self_cognition_en", "self_cognition_zh"),
    "counselling": ("counselling_en", "counselling_zh"),
    "general_replay": ("general_replay_en", "general_replay_zh"),
}
"""Built-in sets that hold both languages; each part is a name of its own too."""

_NOT_ROWS = {FILE_NAME, "dataset_infos.json", "dataset_dict.json", "state.json", "configuration.json"}
_HUB_KEYS = ("subset", "split", "revision")


def builtin_names() -> list[str]:
    """Return the names of the built-in training sets."""
    return [*BUILTIN, *(part for parts in BUILTIN.values() for part in parts)]


def builtin_file(name: str) -> Path:
    """Return the path of a built-in set's file."""
    return Path(str(resources.files("tuneloom.data") / "builtin" / f"{name}.jsonl"))


@dataclass(frozen=True)
class Resolved:
    """Where a source's rows are, and how they are written.

    Attributes:
        files: (name shown, file) pairs.
        shape: names that differ from ours.
        max_rows: read at most this many; None: all.
    """

    files: list[tuple[str, Path]]
    shape: RowShape
    max_rows: int | None = None


def resolve_source(source: SourceConfig) -> Resolved:
    """Find a source's files: of a built-in set, a file, a folder, a dataset_info.json, or a hub.

    Raises:
        UserError: nothing is there, nothing that can be read, or a setting has no effect there.
    """
    no_file = source.path in builtin_names() or source.path.startswith(MODELSCOPE)
    entry = None if no_file else find_entry(source.path)
    if entry is None:
        return Resolved(source_files(source), RowShape(dict[Any, str](source.columns), _by_the_files_name(source.roles)))
    columns: dict[Any, str] = {**entry.columns, **source.columns}
    roles: dict[Any, str] = {**entry.roles, **source.roles}
    return Resolved(_entry_files(entry, source), RowShape(columns, _by_the_files_name(roles)), entry.num_samples)


def _entry_files(entry: Entry, source: SourceConfig) -> list[tuple[str, Path]]:
    if entry.hub is not None:
        split = source.split if source.split != "train" else entry.split
        settings = {"path": entry.hub, "subset": source.subset or entry.subset, "split": split}
        return _hub_files(source.model_copy(update=settings))
    assert entry.file is not None
    if not entry.file.exists():
        raise UserError(
            "the entry's file is not there",
            where=entry.where,
            got=str(entry.file),
            mend="correct its file_name, which is looked up from the folder of dataset_info.json, or put the file there",
        )
    _refuse_hub_keys(source, "a local file", _HUB_KEYS)
    return _local_files(str(entry.file), entry.file)


def source_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """Return a source's (shown name, file) pairs.

    Raises:
        UserError: nothing is there, nothing that can be read, or a setting has no effect there.
    """
    path = source.path
    if path in builtin_names():
        _refuse_hub_keys(source, "a built-in set", _HUB_KEYS)
        return [(f"{part}.jsonl", builtin_file(part)) for part in BUILTIN.get(path, (path,))]
    place = user_path(path)
    if path.startswith(MODELSCOPE):
        return _hub_files(source)
    if place.is_dir() or place.is_file():
        files = _local_files(path, place)
        _refuse_hub_keys(source, "a local folder" if place.is_dir() else "a local file", _HUB_KEYS)
        return files
    if HUB_ID.fullmatch(path) and place.suffix.lower() not in SUFFIXES:
        return _hub_files(source)
    near = nearest(path, builtin_names())
    raise UserError(
        "data not found",
        where=path,
        expected=f"a file, a folder, a hub id, or a built-in set ({', '.join(BUILTIN)})",
        mend=f"did you mean `{near}`?" if near else "check the path; it is looked up from the current folder",
    )


def _local_files(path: str, place: Path) -> list[tuple[str, Path]]:
    if place.is_dir():
        return [(str(file), file) for file in _folder_files(path, place)]
    if place.name == FILE_NAME:
        refuse_without_name(path, place.parent)
    if place.suffix.lower() not in SUFFIXES:
        raise UserError(
            "unknown kind of data file",
            where=path,
            got=place.suffix or "no suffix",
            expected=", ".join(SUFFIXES),
            mend="save it as one of these",
        )
    return [(path, place)]


def _hub_files(source: SourceConfig) -> list[tuple[str, Path]]:
    path = source.path
    if not path.startswith(MODELSCOPE):
        return hub_files(path, source.subset, source.split, source.revision)
    _refuse_hub_keys(source, "a set of ModelScope", ("subset",))
    folder = modelscope_folder(path.removeprefix(MODELSCOPE), source.revision)
    return [(f"{path}/{file.relative_to(folder)}", file) for file in _folder_files(path, folder, source.split)]


def _refuse_hub_keys(source: SourceConfig, kind: str, keys: Iterable[str]) -> None:
    for key in keys:
        value, default = getattr(source, key), SourceConfig.model_fields[key].default
        if value != default:
            raise UserError(f"{key} has no effect on {kind}", where=source.path, got=f"{key}: {value}", mend=f"remove {key}")


def _by_the_files_name(roles: Mapping[Any, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in roles.items()}


def _folder_files(path: str, folder: Path, split: str = "train") -> list[Path]:
    """Return the train files of a folder, or all of its data files; of its subfolders where it has none itself."""
    if (folder / FILE_NAME).is_file():
        refuse_without_name(path, folder)
    try:
        files = _data_files(folder, folder.iterdir()) or _data_files(folder, folder.rglob("*"))
    except OSError as error:
        raise UserError(
            "cannot look into the data folder", where=path, got=error.strerror, mend="check its permissions"
        ) from error
    if not files:
        raise UserError("the data folder has no data files", where=path, expected=" ".join(f"*{suffix}" for suffix in SUFFIXES))
    starts = (f"{split}-", f"{split}_", f"{split}.")
    named = [file for file in files if file.stem == split or file.name.startswith(starts)]
    if not named and split != "train":
        raise UserError(
            "the data set has no such split",
            where=path,
            got=f"split: {split}",
            expected=", ".join(str(file.relative_to(folder)) for file in files[:8]),
            mend="take the name that a file begins with",
        )
    return named or files


def _data_files(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Return the data files among paths; text files only where there is nothing else, since most are no dialogues."""
    found = sorted(
        file
        for file in paths
        if file.suffix.lower() in SUFFIXES
        and file.name not in _NOT_ROWS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )
    return [file for file in found if file.suffix.lower() != ".txt"] or found
