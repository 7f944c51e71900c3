"""Function calls in the words of the GLM family, read and never run.

A call is the function's name on a line, and its arguments below: ChatGLM3 writes them as the
keywords of a Python call, `tool_call(city='Rome')`, in a code block; GLM-4 as JSON.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from typing import Any

from tuneloom.types import ToolCall

_MAX_CHARS = 50_000
_MAX_DEPTH = 50
_NAME = re.compile(r"[\w.:/-]{1,64}")
_FENCE = "```"
_KEYWORD = re.compile(rf"([(,]\s*)({'|'.join(keyword.kwlist)})(\s*=(?!=))")
_NAMED_VALUES = {"true": True, "false": False, "null": None}


def may_be_call(text: str) -> bool | None:
    """Whether what an answer begins with may be a call; None where more of it is needed to tell."""
    head, newline, rest = text.partition("\n")
    name, body = head.strip(), rest.lstrip()
    if name and not _NAME.fullmatch(name):
        return False
    if not newline or (name and not body):
        return None
    return bool(name) and (body.startswith("{") or _FENCE.startswith(body[: len(_FENCE)]))


def read_call(text: str) -> ToolCall | None:
    """Return the call that a whole text is; None for any other text, whoever wrote it."""
    if len(text) > _MAX_CHARS or not may_be_call(text):
        return None
    head, _, body = text.partition("\n")
    try:
        arguments = _arguments(body.strip())
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        written.encode("utf-8")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ast and json, on nonsense
        return None
    return ToolCall(head.strip(), written)


def _arguments(body: str) -> dict[str, Any]:
    """Return the arguments; ValueError or SyntaxError for what is none."""
    if body.startswith(_FENCE):
        _, _, body = body.partition("\n")
        body = body.rstrip().removesuffix(_FENCE).strip()
    if not body.startswith("{"):
        return _keywords(body)
    value = json.loads(body, parse_constant=_refuse)
    _require_shallow(value)
    return dict(value)


def _keywords(code: str) -> dict[str, Any]:
    """Return the keywords of `tool_call(...)`, plain values all of them."""
    mark = "_" * (1 + max(map(len, re.findall("_+", code)), default=0))  # stands nowhere in the code
    call = _parsed(_KEYWORD.sub(rf"\1\2{mark}\3", code))  # `from`, `class`: good names elsewhere
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call" or call.args:
        raise ValueError("not tool_call(...)")
    found: dict[str, Any] = {}
    for each in call.keywords:
        value = _value(each.value, mark)
        named = value if each.arg is None else {each.arg.replace(mark, ""): value}
        if not isinstance(named, dict) or named.keys() & found.keys():
            raise ValueError("an argument twice, or ** of something else")
        found |= named
    return found


def _parsed(code: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backslash too many
        return ast.parse(code, mode="eval").body


def _value(node: ast.expr, mark: str, depth: int = 0) -> Any:
    """Return a literal's value: text, numbers, lists, maps, and the three named values in Python's or JSON's words."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value.replace(mark, "") if isinstance(node.value, str) else node.value
    if isinstance(node, ast.Name) and node.id in _NAMED_VALUES:
        return _NAMED_VALUES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, mark, depth + 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key, mark, depth + 1) for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, (_value(item, mark, depth + 1) for item in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand, mark, depth + 1)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number
    raise ValueError("not a literal")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _require_shallow(value: object, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _require_shallow(item, depth + 1)
