"""The five questions of a new run, answered in a config's values: model, data, name and author, method, effort."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from functools import cache
from typing import Any, Literal

from tuneloom.config import EMBEDDED_MODEL, load_config
from tuneloom.config.recipes import DEFAULT_RECIPE, find_recipe
from tuneloom.studio.forms import get, put

Values = dict[str, Any]
Method = Literal["lora", "rslora", "dora"]
Effort = Literal["quick", "normal", "careful"]
Preset = Literal["quick_persona", "base_case", "careful"]
METHODS: tuple[Method, ...] = ("lora", "rslora", "dora")
EFFORTS: tuple[Effort, ...] = ("quick", "normal", "careful")
PRESETS: tuple[Preset, ...] = ("quick_persona", "base_case", "careful")
SETS = ("persona", "counselling")
"""Data that a click takes: the persona recipe's mixture, and the supportive dialogues."""

_BASE_CASE = "chatglm3-base-case"
_LARGER_MODEL_RATE = 2e-4
_NEW_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@cache
def _recipe(name: str) -> Values:
    return load_config(find_recipe(name)).model_dump(mode="json")


def new_values() -> Values:
    """Return what the form begins with: the persona recipe, without a name."""
    values = copy.deepcopy(_recipe(DEFAULT_RECIPE))
    del values["data"]["variables"]["name"]
    return values


def preset(name: Preset, values: Values) -> Values:
    """Return a preset's values; name and author stay as they are."""
    kept = get(values, "data.variables")
    chosen = copy.deepcopy(_recipe(_BASE_CASE if name == "base_case" else DEFAULT_RECIPE))
    chosen["data"]["variables"] = dict(kept) if isinstance(kept, dict) else {}
    if name != "base_case":
        set_effort(chosen, "quick" if name == "quick_persona" else "careful")
    return chosen


# The model.


def set_base(values: Values, path: str) -> None:
    """Name the base model; a learning rate that nobody chose goes with it: larger models want a lower one."""
    rates = (_recipe(DEFAULT_RECIPE)["training"]["learning_rate"], _LARGER_MODEL_RATE)
    if get(values, "training.learning_rate") in rates:
        put(values, "training.learning_rate", rates[0] if path == EMBEDDED_MODEL else rates[1])
    put(values, "base_model.path", path)


# The data.


def _set_sources(name: str) -> list[Values]:
    if name == "persona":
        return list(_recipe(DEFAULT_RECIPE)["data"]["train"])
    return [source for source in _recipe(_BASE_CASE)["data"]["train"] if source["path"] == name]


def sources(values: Values) -> list[Values]:
    """Return the training sources that are maps with a path; what else was put there is left out."""
    train = get(values, "data.train")
    found = train if isinstance(train, list) else [train]
    whole = [{"path": source} if isinstance(source, str) else source for source in found]
    return [source for source in whole if isinstance(source, dict) and isinstance(source.get("path"), str)]


def has_set(values: Values, name: str) -> bool:
    """Whether the sources of a set are all there."""
    train = sources(values)
    return all(source in train for source in _set_sources(name))


def choose_set(values: Values, name: str, wanted: bool) -> None:
    """Put a set's sources in front of the others, or take them out."""
    before = effort(values)
    rest = [source for source in sources(values) if source not in _set_sources(name)]
    put(values, "data.train", [*copy.deepcopy(_set_sources(name)), *rest] if wanted else rest)
    _keep_effort(values, before)


def own_paths(values: Values) -> list[str]:
    """Return the paths of the sources that belong to no chosen set."""
    of_sets = [source for name in SETS if has_set(values, name) for source in _set_sources(name)]
    return [source["path"] for source in sources(values) if source not in of_sets and source["path"]]


def add_path(values: Values, path: str) -> None:
    """Add a source by its path."""
    before = effort(values)
    if path not in own_paths(values):
        put(values, "data.train", [*sources(values), {"path": path}])
    _keep_effort(values, before)


def remove_path(values: Values, path: str) -> None:
    """Take out a source that belongs to no set, by its path."""
    before = effort(values)
    if path in own_paths(values):
        of_sets = [source for name in SETS if has_set(values, name) for source in _set_sources(name)]
        put(values, "data.train", [s for s in sources(values) if s["path"] != path or s in of_sets])
    _keep_effort(values, before)


def needs_name(values: Values) -> bool:
    """Whether the built-in sets that are taken speak of a name."""
    return any(source["path"].startswith("self_cognition") for source in sources(values))


# Name and author.


def variable(values: Values, name: str) -> str:
    """Return a placeholder's value, "" where it has none."""
    found = get(values, "data.variables")
    return str(found.get(name, "")) if isinstance(found, dict) else ""


def set_variable(values: Values, name: str, text: str) -> None:
    """Give a placeholder a value; an empty one is none, so that it is missed and not filled with nothing."""
    kept = get(values, "data.variables")
    kept = {key: value for key, value in kept.items() if key != name} if isinstance(kept, dict) else {}
    put(values, "data.variables", {name: text.strip(), **kept} if text.strip() else kept)


# The method.


def method(values: Values) -> Method | None:
    """Return the method, None for one that is none of the three."""
    flags = (get(values, "adapter.use_rslora"), get(values, "adapter.use_dora"))
    known: dict[tuple[Any, Any], Method] = {(False, False): "lora", (True, False): "rslora", (False, True): "dora"}
    return known.get(flags)


def set_method(values: Values, wanted: Method) -> None:
    """Choose the method; rank and alpha go with it unless they were changed."""
    shapes = {name: _shape(_recipe(f"persona-{name}")) for name in METHODS}
    if _shape(values) in shapes.values():
        put(values, "adapter.r", shapes[wanted][0])
        put(values, "adapter.lora_alpha", shapes[wanted][1])
    put(values, "adapter.use_rslora", wanted == "rslora")
    put(values, "adapter.use_dora", wanted == "dora")


def _shape(values: Values) -> tuple[Any, Any]:
    return get(values, "adapter.r"), get(values, "adapter.lora_alpha")


# The effort.


def _efforts(values: Values) -> dict[Effort, Values]:
    """Return what each effort sets; the persona recipe's own steps where its data is all that is taught."""
    recipe = _recipe(DEFAULT_RECIPE)
    steps = recipe["training"]["max_steps"] if sources(values) == _set_sources("persona") else -1
    usual = {"training.max_steps": steps, "training.num_train_epochs": 3.0, "data.validation": 0}
    usual |= {"training.eval_steps": None, "training.load_best_model_at_end": False}
    careful = {"training.max_steps": -1, "data.validation": 0.1, "training.eval_steps": "epoch"}
    return {
        "quick": usual | {"training.max_steps": -1, "training.num_train_epochs": 1.0},
        "normal": usual,
        "careful": usual | careful | {"training.load_best_model_at_end": True},
    }


def effort(values: Values) -> Effort | None:
    """Return the effort that the values say, None for one of the user's own."""
    for name, wanted in _efforts(values).items():
        if all(get(values, key) == value for key, value in wanted.items()):
            return name
    return None


def set_effort(values: Values, wanted: Effort) -> None:
    """Choose how long to train and how closely to look."""
    for key, value in _efforts(values)[wanted].items():
        put(values, key, value)


def _keep_effort(values: Values, before: Effort | None) -> None:
    """After the data has changed, say the same effort in steps or epochs of the new data."""
    if before is not None:
        set_effort(values, before)


# The run's name.


def run_name(values: Values, taken: Collection[str]) -> str:
    """Return the run's name, as it is set or from the persona's name and the method, with a number where it is taken."""
    named = get(values, "name")
    wanted = named if isinstance(named, str) and named else _made_name(values)
    number = 1
    while (found := wanted if number == 1 else f"{wanted}-{number}") in taken:
        number += 1
    return found


def _made_name(values: Values) -> str:
    of_persona = _NEW_NAME.sub("-", variable(values, "name").lower()).strip("-._")[:40]
    flags = [name for name in ("rslora", "dora") if get(values, f"adapter.use_{name}") is True]
    return "-".join([*([of_persona] if of_persona else []), *(flags or ["lora"])])
