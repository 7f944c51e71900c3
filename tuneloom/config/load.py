"""From a YAML file and `--set a.b=c` to a `Config`, with the file and line of each mistake."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

from tuneloom.config.finetune_demo import is_finetune_demo, origin, translate
from tuneloom.config.schema import Config
from tuneloom.errors import UserError, excerpt, nearest

MAX_CONFIG_BYTES = 1_000_000

Path_ = tuple[str | int, ...]


class Document:
    """A parsed YAML file that remembers the line of every key."""

    def __init__(self, tree: CommentedMap, file: str) -> None:
        self._tree = tree
        self.file = file

    def plain(self) -> dict[str, Any]:
        """Return the content as plain dicts, lists, strings and numbers."""
        plain = _plain(self._tree)
        assert isinstance(plain, dict)
        return plain

    def where(self, path: Sequence[str | int]) -> str:
        """Return `file:line key.path` of the deepest part of `path` that is in the file."""
        node: Any = self._tree
        line: int | None = None
        for part in path:
            if isinstance(node, CommentedMap) and part in node:
                line = node.lc.key(part)[0] + 1
            elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
                line = node.lc.item(part)[0] + 1
            else:
                break
            node = node[part]
        place = self.file if line is None else f"{self.file}:{line}"
        return f"{place} {dotted(path)}".rstrip()


class _Representer(SafeRepresenter):
    """Quotes and escapes text with Unicode's rarer line ends, which would not come back as they were."""

    def represent_str(self, data: str) -> Any:
        style = '"' if any(end in data for end in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def load_config(
    path: str | Path | None = None,
    sets: Iterable[str] = (),
    *,
    overrides: Mapping[str, object] | None = None,
    data_dir: str | Path = ".",
) -> Config:
    """Read a config file and apply `--set` assignments and overrides on top.

    Args:
        path: a YAML file in our keys or in ChatGLM3's `finetune_demo` dialect; None: defaults.
        sets: assignments `a.b=value`; the value is YAML.
        overrides: dotted keys and their values; see `build_config`.
        data_dir: folder of the data files that a `finetune_demo` config names.

    Raises:
        UserError: the file is missing, torn or holds an unknown key or a wrong value.
    """
    document = read_yaml(path) if path is not None else None
    values = document.plain() if document else {}
    in_file: Callable[[Path_], str] = document.where if document else dotted
    demo = is_finetune_demo(values)
    if demo:
        values = translate(values, where=in_file, data_dir=data_dir)
    assigned = [_assign(values, assignment) for assignment in sets]
    overridden = _override(values, overrides or {})

    def where(path: Path_) -> str:
        for name, keys in (("overrides", overridden), ("--set", assigned)):
            if any(path[: len(key)] == key for key in keys):
                return f"{name} {dotted(path)}"
        return in_file(origin(path) if demo else path)

    return parse_config(values, where)


def build_config(values: Mapping[str, object], overrides: Mapping[str, object] | None = None) -> Config:
    """Validate a map of Python values, paths among them, with overrides on top.

    Args:
        values: a config as nested maps.
        overrides: dotted keys and their values, `{"training.max_steps": 3}`; a map for a whole section
            changes the keys in it and leaves the others.

    Raises:
        UserError: an unknown key or a wrong value.
    """
    plain = {str(key): _from_python(value) for key, value in values.items()}
    overridden = _override(plain, overrides or {})

    def where(path: Path_) -> str:
        named = any(path[: len(key)] == key for key in overridden)
        return f"overrides {dotted(path)}" if named else dotted(path)

    return parse_config(plain, where)


def parse_config(values: Mapping[str, Any], where: Callable[[Path_], str] | None = None) -> Config:
    """Validate plain values into a `Config`.

    Args:
        values: nested maps, lists, strings and numbers.
        where: gives the place of a key path, for messages; None: the path itself.

    Raises:
        UserError: naming the first wrong key, its place, what was got and what is expected.
    """
    try:
        # A section whose lines are all commented out reads as null: its defaults.
        return Config.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        _explain(error, values, where or dotted)


def dump_config(config: Config) -> str:
    """Return the config as YAML, complete, in the order of its declaration."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def read_yaml(path: str | Path) -> Document:
    """Parse a YAML file whose root is a map.

    Raises:
        UserError: missing, too large, not UTF-8, not YAML, or not a map.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError("the config file is too large", where=str(file), expected="under 1 MB")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            "config file not found", where=str(file), mend="check the path; `ls recipes` shows the ready ones"
        ) from None
    except IsADirectoryError:
        raise UserError("the config is a folder", where=str(file), expected="a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            "the config file is not UTF-8", where=str(file), got=f"byte {error.start}", mend="save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError("cannot read the config file", where=str(file), got=error.strerror) from None
    return Document(_parse_yaml(text, str(file)), str(file))


def dotted(path: Sequence[str | int]) -> str:
    """Return `a.b[0].c` for ("a", "b", 0, "c")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _parse_yaml(text: str, file: str) -> CommentedMap:
    try:
        tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark is not None else 1
        raise UserError(
            "the config is not valid YAML",
            where=f"{file}:{line}",
            got=" ".join((error.problem or "").split())[:200],
            mend="look at this line and the one above: indentation, quotes, a missing colon or bracket",
        ) from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            "the config is not valid YAML", where=file, got=(str(error) or "nested too deep").splitlines()[0]
        ) from None
    if tree is None:
        return CommentedMap()
    if not isinstance(tree, CommentedMap):
        raise UserError(
            "the config is not a map of keys", where=file, got=type(_plain(tree)).__name__, expected="lines like `name: my-run`"
        )
    return tree


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)


def _from_python(value: object) -> Any:
    """Return a caller's value in maps, lists and text of our own: paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _from_python(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_from_python(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _override(values: dict[str, Any], overrides: Mapping[str, object]) -> list[Path_]:
    """Write overrides into the nested dict; return the paths of what is new in it."""
    flat: dict[str, object] = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and key in Config.model_fields:
            flat |= {f"{key}.{inner}": changed for inner, changed in value.items()}
        else:
            flat[str(key)] = value
    return [_put(values, key, _from_python(value), "overrides") for key, value in flat.items()]


def _assign(values: dict[str, Any], assignment: str) -> Path_:
    """Write `a.b=value` into the nested dict; return the path of what is new in it."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UserError(
            "--set wants key=value", got=excerpt(assignment), expected="for example --set training.learning_rate=1e-4"
        )
    key = key.strip()
    value = _plain(_parse_yaml(f"value: {text}", f"--set {key}")["value"]) if text.strip() else ""
    return _put(values, key, value, "--set")


def _put(values: dict[str, Any], key: str, value: object, option: str) -> Path_:
    """Write a value at a dotted key; `option` names where it came from."""
    parts = key.split(".")
    node = values
    depth = len(parts)
    for at, part in enumerate(parts[:-1], 1):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
            depth = min(depth, at)
        if isinstance(child, str) and part == "base_model":
            child = node[part] = {"path": child}
        if not isinstance(child, dict):
            raise UserError(
                f"{option} cannot reach into this key",
                where=f"{option} {key}",
                got=f"{part} is {excerpt(child)}",
                mend=f"set {part} itself",
            )
        node = child
    node[parts[-1]] = value
    return tuple(parts[:depth])


def _explain(error: ValidationError, values: Mapping[str, Any], where: Callable[[Path_], str]) -> NoReturn:
    """Turn pydantic's first error into a UserError."""
    details = _most_telling(error.errors(include_url=False), values)
    loc = _key_path(details, values)
    place = where(loc)
    if details["loc"][-1:] == ("[key]",):
        _refuse_name(details, loc, values, place)
    if details["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = nearest(str(loc[-1]), known)
        raise UserError(
            f"unknown key `{loc[-1]}`",
            where=place,
            expected=None if near else f"one of {', '.join(sorted(known))}",
            mend=f"did you mean `{near}`?" if near else "remove it or correct it; docs/configuration.md lists every key",
        ) from None
    got = None if details["type"] == "missing" or not loc else excerpt(details["input"])
    message = details["msg"].removeprefix("Value error, ")
    what = f"wrong value for `{dotted(loc)}`" if loc else message
    raise UserError(
        what,
        where=place or None,
        got=got,
        expected=message[:1].lower() + message[1:] if loc else None,
        mend="docs/configuration.md has every key with its type and range",
    ) from None


def _refuse_name(details: ErrorDetails, loc: Path_, values: Mapping[str, Any], place: str) -> NoReturn:
    """Refuse a key of a map of our names to the file's, such as `columns`."""
    name, known = str(loc[-1]), re.findall("'(.*?)'", details.get("ctx", {}).get("expected", ""))
    node: Any = values
    for part in loc:
        node = node[part]
    near = nearest(name, known)
    mend = f"did you mean `{near}`?" if near else "remove it or correct it"
    if node in known:
        mend = f"our name comes first: `{node}: {name}`"
    raise UserError(f"unknown name `{name}`", where=place, expected=f"one of {', '.join(known)}", mend=mend) from None


def _most_telling(details: list[ErrorDetails], values: Mapping[str, Any]) -> ErrorDetails:
    """Pick the error to show: an unknown key first (deepest), else the first one.

    Where that says only that a list or map should have been something else, the key can hold several kinds of things,
    and the error deepest inside is meant.
    """
    extra = [d for d in details if d["type"] == "extra_forbidden"]
    if extra:
        return max(extra, key=lambda d: len(d["loc"]))
    inside = isinstance(details[0]["input"], (dict, list))
    return max(details, key=lambda d: (len(_key_path(d, values)), d["type"] == "value_error")) if inside else details[0]


def _key_path(details: ErrorDetails, values: Mapping[str, Any]) -> Path_:
    """Return the keys that pydantic's location goes through; it also names union branches and items not written as a list."""
    node: Any = values
    path: list[str | int] = []
    for part in details["loc"]:
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list) and part in range(len(node))
        if inside:
            path.append(part)
            node = node[part]
    return (*path, details["loc"][-1]) if details["type"] == "missing" else tuple(path)


def _known_keys(path: Path_) -> list[str]:
    """Return the keys that the section at `path` declares."""
    model: type[BaseModel] | None = Config
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = _section_of(field.annotation) if field else None
    if model is None:
        return []
    return [*model.model_fields, *(("fp16", "bf16") if model.__name__ == "TrainingConfig" else ())]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Find the section class inside an annotation such as `tuple[Source, ...] | float`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    origin = getattr(annotation, "__origin__", None)
    return _section_of(origin) if isinstance(origin, type) and origin is not annotation else None
