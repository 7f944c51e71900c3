"""Values of Arrow rows as they were before they went into columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow import DataType, Schema

Restore = Callable[[Any], Any]


def row_restorer(schema: Schema) -> Restore:
    """Return what makes a row of `to_pylist` of this schema into what was written.

    A column gives all of its maps the same keys: those that a map did not have are null, and are left out again.
    Values too unlike each other for one type are kept as JSON text (type `arrow.json`), and are decoded again.
    """
    restorers = {field.name: restore for field in schema if (restore := _restorer(field.type))}

    def restored(row: dict[str, Any]) -> dict[str, Any]:
        return row | {name: restore(row[name]) for name, restore in restorers.items() if row.get(name) is not None}

    return restored


def _restorer(kind: DataType) -> Restore | None:
    """Return what restores a value that is not null; None where it is as it was."""
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _decoded if kind.extension_name == "arrow.json" else None
    if types.is_struct(kind):
        inner = {field.name: _restorer(field.type) for field in kind}
        return lambda value: _restored_map(value, inner)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        restore = _restorer(kind.value_type)
        return (lambda value: [item if item is None else restore(item) for item in value]) if restore else None
    return None


def _restored_map(value: dict[str, Any], inner: dict[str, Restore | None]) -> dict[str, Any]:
    return {key: restore(item) if (restore := inner[key]) else item for key, item in value.items() if item is not None}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
