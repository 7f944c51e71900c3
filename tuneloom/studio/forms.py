"""The config's declaration as a form: which control a setting gets, text to value and back, every mistake by its key.

Values are plain nested maps, as `Config.model_dump(mode="json")` gives them, and may hold what was typed wrong.
"""

from __future__ import annotations

import copy
import enum
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuneloom.config import Config, SourceConfig, parse_config
from tuneloom.errors import UserError

Kind = Literal["switch", "choice", "scalar", "text", "words", "lines", "map", "sources", "held"]
TOP = "run"
"""Name of the section of the settings that are in none."""
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_MOST_PROBLEMS = 30


@dataclass(frozen=True)
class Setting:
    """A setting and its control.

    Attributes:
        key: dotted, as in a config.
        kind: of the control.
        description: from the declaration.
        default: plain; None for none, and where one must be given.
        choices: of a `choice`; words that are also taken, of a `scalar` or `words`.
        optional: whether it may be left empty.
    """

    key: str
    kind: Kind
    description: str
    default: Any
    choices: tuple[Any, ...]
    optional: bool

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def section(self) -> str:
        """The first part of the key, or that of the top."""
        return self.key.partition(".")[0] if "." in self.key else TOP


def settings() -> list[Setting]:
    """Return every setting of a config, in the order of the declaration."""
    return list(_settings(Config, ""))


def source_settings(prefix: str) -> list[Setting]:
    """Return the settings of one source of data at a key, such as `data.train[0]`."""
    return list(_settings(SourceConfig, f"{prefix}."))


def _settings(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        section = next((part for part in _parts(field.annotation) if _is_section(part)), None)
        if section is not None and section is not SourceConfig:
            yield from _settings(section, f"{prefix}{name}.")
        else:
            yield _setting(f"{prefix}{name}", field)


def _setting(key: str, field: FieldInfo) -> Setting:
    parts = _parts(field.annotation)
    kinds = [part for part in parts if part is not type(None)]
    choices = tuple(choice for part in kinds for choice in _choices(part))
    default = None if field.is_required() else plain(field.get_default(call_default_factory=True))
    return Setting(key, _kind(kinds), field.description or "", default, choices, type(None) in parts)


def _kind(parts: list[Any]) -> Kind:
    """Return the control for a union of types."""
    tuples = [part for part in parts if get_origin(part) is tuple]
    if any(_is_section(inner) for part in tuples for inner in _parts(get_args(part)[0])):
        return "sources" if len(parts) == 1 else "held"
    if tuples:
        return "lines" if len(parts) == 1 else "words"
    if parts == [bool]:
        return "switch"
    if all(part is bool or _choices(part) for part in parts):
        return "choice"
    if any(get_origin(part) is dict for part in parts):
        return "map"
    return "text" if parts == [str] else "scalar"


def _choices(part: Any) -> tuple[Any, ...]:
    if get_origin(part) is Literal:
        return get_args(part)
    if isinstance(part, type) and issubclass(part, enum.Enum):
        return tuple(item.value for item in part)
    return (True, False) if part is bool else ()


def _parts(annotation: Any) -> list[Any]:
    """Return the members of a union, what annotates them taken off."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for part in get_args(annotation) for inner in _parts(part)]
    return [annotation]


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def plain(value: Any) -> Any:
    """Return a setting's value as JSON has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return {str(key): plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


# Text and values.


def shown(setting: Setting, value: Any) -> str:
    """Return a value as its control's text."""
    if value is None:
        return ""
    if isinstance(value, list) and setting.kind in ("lines", "words"):
        return ("\n" if setting.kind == "lines" else ", ").join(map(str, value))
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_word(inner)}" for key, inner in value.items())
    return value if isinstance(value, str) else _word(value)


def entered(setting: Setting, text: str) -> Any:
    """Return the value that a control's text means; what means none stays text, for the loader to refuse."""
    if setting.kind == "lines":
        return [line.strip() for line in text.splitlines() if line.strip()]
    if setting.kind == "map":
        return _map(text, numbers=setting.name.endswith("kwargs"))
    text = text.strip()
    if not text and (setting.optional or setting.kind == "words"):
        return None if setting.optional else []
    if setting.kind == "words":
        return text if text in setting.choices else [word for word in re.split(r"[,\s]+", text) if word]
    return scalar(text) if setting.kind in ("scalar", "held") else text


def scalar(text: str) -> int | float | str:
    """Return the number that a text is, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _map(text: str, *, numbers: bool) -> Any:
    """Return `name: value` lines as a map, or the text where a line is none."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if not line.strip():
            continue
        if not colon or not name.strip():
            return text
        found[name.strip()] = _json_or_text(value.strip()) if numbers else value.strip()
    return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return scalar(text)


# Keys in nested values.


def split(key: str) -> list[str | int]:
    """Return the parts of a dotted key: `data.train[0].path` has four."""
    return [int(number) if number else name for name, number in _PART.findall(key)]


def get(values: Any, key: str) -> Any:
    """Return what is at a key, None where there is nothing."""
    node = values
    for part in split(key):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return None
    return node


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Write a value at a key; a section that is missing is made."""
    *path, last = split(key)
    node: Any = values
    for part in path:
        if isinstance(node, dict) and not isinstance(node.get(part), (dict, list)):
            node[part] = {}
        node = node[part]
    node[last] = value


# Mistakes.


def check(values: Mapping[str, Any]) -> tuple[Config | None, dict[str, UserError]]:
    """Return the config, or None and each mistake by the key of its setting, as the config loader tells it.

    A mistake that is no one setting's has the key "".
    """
    mistakes: dict[str, UserError] = {}
    rest = copy.deepcopy(dict(values))
    for _ in range(_MOST_PROBLEMS):
        try:
            config = parse_config(rest)
        except UserError as error:
            key = _key_of(error)
            if key in mistakes:
                break
            mistakes[key] = error
            if not _remove(rest, key):
                break
        else:
            return (None if mistakes else config), mistakes
    return None, mistakes


def _key_of(error: UserError) -> str:
    """Return the key of the setting that a loader's message is about."""
    if error.where:
        return error.where
    named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", error.what)
    known = {setting.key for setting in settings()}
    return next((key for key in named if key in known), "")


def _remove(values: dict[str, Any], key: str) -> bool:
    """Take a setting out, so that its default stands; return whether anything was there."""
    parts = split(key)
    for end in range(len(parts), 0, -1):
        node: Any = values
        for part in parts[: end - 1]:
            node = node[part] if _has(node, part) else None
        if _has(node, parts[end - 1]):
            del node[parts[end - 1]]
            return True
    return False


def _has(node: Any, part: str | int) -> bool:
    if isinstance(node, dict):
        return part in node
    return isinstance(node, list) and isinstance(part, int) and 0 <= part < len(node)


def setting_key(key: str, known: typing.Container[str]) -> str:
    """Return the setting that a deeper key belongs to: `data.train[0].count` to `data.train`; "" where there is none."""
    while key and key not in known:
        key = re.sub(r"(\.[^.\[\]]+|\[\d+\]|^[^.\[\]]+)$", "", key)
    return key
