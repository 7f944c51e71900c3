"""LLaMA-Factory's `dataset_info.json`: one entry to the settings of a source.

The file's keys: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md

Differences: a name that `columns` or `tags` does not give keeps its default; `num_samples` takes the first rows; a
`file_name` that is there is read even where a hub is named too. A `file_name` may lead out of the folder (`../x.json`):
it is a path of the user's own, like any other in a config.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.data.hub import MODELSCOPE
from tuneloom.data.inspect import inspect_file
from tuneloom.data.read import SUFFIXES
from tuneloom.data.row import json_excerpt
from tuneloom.errors import UserError, nearest, user_path

FILE_NAME = "dataset_info.json"

_FORMATTINGS = ("alpaca", "sharegpt", "openai")
_ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_COMMON_COLUMNS = {"system": "system", "tools": "tools"}
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_MEDIA = ("images", "videos", "audios")
_PREFERENCE = ("chosen", "rejected", "kto_tag")
COLUMN_KEYS = (*_ALPACA_COLUMNS, "messages", *_COMMON_COLUMNS, *_MEDIA, *_PREFERENCE)
TAG_KEYS = ("role_tag", "content_tag", *_ROLE_TAGS)
_HUBS = {"hf_hub_url": "", "ms_hub_url": MODELSCOPE}
_PLACES = ("file_name", *_HUBS, "om_hub_url", "script_url", "cloud_file_name")
KEYS = (*_PLACES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags", "file_sha1")
"""`file_sha1` is of older versions, which only warned where it differed; it is passed over."""


@dataclass(frozen=True)
class Entry:
    """One data set of a dataset_info.json; either `file` or `hub` is given.

    Attributes:
        where: the file and the entry's name, for messages.
        file: its file or folder.
        hub: its id, as `SourceConfig.path` has it.
        columns, roles: ours -> the file's, as `SourceConfig` has them.
        subset, split: of a hub's set.
        num_samples: at most this many.
    """

    where: str
    file: Path | None
    hub: str | None
    columns: Mapping[str, str]
    roles: Mapping[str, str]
    subset: str | None
    split: str
    num_samples: int | None


def find_entry(path: str) -> Entry | None:
    """Return the entry that `folder/name` or `folder/dataset_info.json/name` means; None where no such file is there.

    Raises:
        UserError: there is a dataset_info.json without that name, a broken one, or an entry that is no dialogue.
    """
    place = user_path(path)
    folder = place.parent.parent if place.parent.name == FILE_NAME else place.parent
    file = folder / FILE_NAME
    if place.exists() or not file.is_file():
        return None
    info = _read(file)
    if place.name in info:
        return _entry(info[place.name], folder, f"{file} {place.name}")
    if place.suffix.lower() in SUFFIXES:
        return None
    near = nearest(place.name, info)
    raise UserError(
        f"no data set of that name in {FILE_NAME}",
        where=str(file),
        got=place.name,
        expected=", ".join(list(info)[:12]) + (", ..." if len(info) > 12 else "") or "at least one entry",
        mend=f"did you mean `{near}`?" if near else "take a name from this list",
    )


def refuse_without_name(path: str, folder: Path) -> None:
    """Refuse a folder's dataset_info.json where one of its data sets must be named.

    Raises:
        UserError: naming them.
    """
    file = folder / FILE_NAME
    names = [name for name, entry in _read(file).items() if _names_a_place(entry)]
    if names:
        raise UserError(
            f"the folder has a {FILE_NAME}: name one of its data sets",
            where=path,
            expected=", ".join(f"{folder}/{name}" for name in names[:8]),
            mend=f"write {folder}/{names[0]}, or name the files themselves",
        )


def _names_a_place(entry: object) -> bool:
    return isinstance(entry, dict) and any(isinstance(entry.get(key), str) for key in _PLACES)


def _read(file: Path) -> dict[str, Any]:
    encoding = inspect_file(str(file), file).encoding
    assert encoding is not None
    try:
        info = json.loads(file.read_bytes().decode(encoding))
    except OSError as error:
        raise UserError(
            f"cannot read {FILE_NAME}", where=str(file), got=error.strerror, mend="check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{FILE_NAME} is not valid JSON",
            where=f"{file}{place}",
            got=str(error)[:160],
            mend="look at this line and the one above: a comma, a quote, a bracket",
        ) from error
    if not isinstance(info, dict):
        raise UserError(
            f"{FILE_NAME} is not a map", where=str(file), got=json_excerpt(info), expected="{name: {file_name: ...}}"
        )
    return info


def _entry(entry: object, folder: Path, where: str) -> Entry:
    if not isinstance(entry, dict):
        raise UserError("the entry is not a map", where=where, got=json_excerpt(entry), expected="{file_name: ...}")
    _refuse_unknown(entry, KEYS, where, "")
    columns, tags = _names(entry, "columns", COLUMN_KEYS, where), _names(entry, "tags", TAG_KEYS, where)
    _refuse_other_data(entry, columns, where)
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in _FORMATTINGS:
        raise UserError(
            "unknown formatting",
            where=where,
            got=json_excerpt(formatting),
            expected=", ".join(_FORMATTINGS),
            mend="take the one that the rows are in",
        )
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise UserError("num_samples is no count", where=where, got=json_excerpt(samples), expected="a whole number above 0")
    file, hub = _place(entry, folder, where)
    return Entry(
        where,
        file,
        hub,
        _columns(formatting, columns, tags),
        {ours: tags[theirs] for theirs, ours in _ROLE_TAGS.items() if theirs in tags},
        _text(entry, "subset", where),
        _text(entry, "split", where) or "train",
        samples,
    )


def _columns(formatting: str, columns: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """Return our names of columns, and of a message's keys -> the file's."""
    theirs = _COMMON_COLUMNS if formatting != "alpaca" else _ALPACA_COLUMNS | _COMMON_COLUMNS
    mapped = {ours: columns[name] for name, ours in theirs.items() if name in columns}
    if formatting == "alpaca":
        return mapped
    default = {"sharegpt": ("from", "value"), "openai": ("role", "content")}[formatting]
    keys = (tags.get("role_tag", default[0]), tags.get("content_tag", default[1]))
    turns = columns.get("messages", "conversations")
    if keys == ("from", "value"):
        return mapped | {"conversations": turns}
    return mapped | {"messages": turns, "role": keys[0], "content": keys[1]}


def _refuse_other_data(entry: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
    """Refuse what is no dialogue in text."""
    media, preference = ([key for key in keys if key in columns] for keys in (_MEDIA, _PREFERENCE))
    if media:
        got = f"columns.{media[0]}: data with images, sound or video"
    elif preference or entry.get("ranking"):
        got = f"{f'columns.{preference[0]}' if preference else 'ranking'}: preference data"
    else:
        return
    raise UserError(
        "the data set is not a dialogue in text",
        where=where,
        got=got,
        expected="conversations to imitate",
        mend="take another data set, or make one whose answers are texts to imitate",
    )


def _place(entry: Mapping[str, Any], folder: Path, where: str) -> tuple[Path | None, str | None]:
    """Return the file, or else the hub's id."""
    name, subset, split, part = (_text(entry, key, where) for key in ("file_name", "subset", "split", "folder"))
    hub = next((prefix + url for key, prefix in _HUBS.items() if (url := _text(entry, key, where))), None)
    file = folder / user_path(name) if name else None
    if file is not None and (hub is None or file.exists()):
        without_effect = {"subset": subset, "split": None if split == "train" else split, "folder": part}
        for key, value in without_effect.items():
            if value and hub is None:
                raise UserError(
                    f"{key} has no effect on a local file", where=where, got=f"{key}: {value}", mend=f"remove {key}"
                )
        return file, None
    if hub is not None and part is not None:
        raise UserError(
            "`folder` of a hub's set cannot be read",
            where=where,
            got=f"folder: {part}",
            mend="download that folder and give it as file_name",
        )
    if hub is not None:
        return None, hub
    raise UserError(
        "the entry names no place that can be read",
        where=where,
        got=next((key for key in _PLACES if key in entry), "no file_name"),
        expected="file_name, hf_hub_url or ms_hub_url",
        mend="download the data and give its file_name",
    )


def _names(entry: Mapping[str, Any], key: str, known: Collection[str], where: str) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise UserError(
            f"{key} is not a map of names",
            where=where,
            got=json_excerpt(value),
            expected=f"{{{next(iter(known))}: name in the file, ...}}",
        )
    _refuse_unknown(value, known, where, f"{key}.")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: Collection[str], where: str, within: str) -> None:
    for key in values:
        if key not in known:
            near = nearest(key, known)
            raise UserError(
                "unknown key in the entry",
                where=where,
                got=f"{within}{key}",
                expected=None if near else ", ".join(known),
                mend=f"did you mean `{near}`?" if near else "remove it",
            )


def _text(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} is not text", where=where, got=json_excerpt(value), mend=f'write "{key}": "..."')
    return value or None
