"""Why a control is disabled: another setting overrides it, or something is not installed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tuneloom.doctor.packages import how_to_install, installed_version
from tuneloom.studio.forms import get, settings

Reason = tuple[str, dict[str, object]]
"""A key of the table of texts, and what fills it."""


def reasons(values: dict[str, Any]) -> dict[str, Reason]:
    """Return the settings that do nothing now, each with the reason."""
    found: dict[str, Reason] = {"output_dir": ("new.why_output_dir", {})}
    for key, decides, acts in _OVERRULED:
        if acts(get(values, decides)):
            found[key] = ("new.why_decides", {"setting": decides, "value": _short(get(values, decides))})
    for key, needed in _NEEDS:
        if not get(values, needed):
            found[key] = ("new.why_needs", {"setting": needed})
    if get(values, "base_model.quantization") == "none" and installed_version("bitsandbytes") is None:
        found["base_model.quantization"] = (
            "new.why_missing",
            {"package": "bitsandbytes", "command": how_to_install("bitsandbytes")},
        )
    if get(values, "base_model.revision") is None and not _is_hub_id(get(values, "base_model.path")):
        found["base_model.revision"] = ("new.why_hub_id", {})
    if get(values, "adapter.continue_from"):
        for key in ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "init_lora_weights", "bias"):
            if get(values, f"adapter.{key}") == _DEFAULTS[f"adapter.{key}"]:
                found[f"adapter.{key}"] = ("new.why_continued", {})
    return found


def source_reasons(source: dict[str, Any], prefix: str) -> dict[str, Reason]:
    """Return the same for the settings of one source of data."""
    found: dict[str, Reason] = {}
    sizes = ("count", "share", "weight")
    given = [key for key in sizes if source.get(key) is not None]
    if given:
        for key in sizes:
            if key not in given:
                found[f"{prefix}.{key}"] = ("new.why_decides", {"setting": given[0], "value": _short(source[given[0]])})
    if not _is_hub_id(source.get("path")):
        for key, unset in (("subset", None), ("split", "train"), ("revision", None)):
            if source.get(key, unset) == unset:
                found[f"{prefix}.{key}"] = ("new.why_hub_set", {})
    return found


def missing_trackers() -> set[str]:
    """Return the experiment trackers whose package is not installed."""
    choices = next(setting.choices for setting in settings() if setting.key == "training.report_to")
    return {name for name in choices if name != "none" and importlib.util.find_spec(name) is None}


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


_OVERRULED = (
    ("training.num_train_epochs", "training.max_steps", _positive),
    ("training.warmup_ratio", "training.warmup_steps", _positive),
    ("generation.temperature", "generation.do_sample", lambda value: value is False),
    ("generation.top_p", "generation.do_sample", lambda value: value is False),
    ("generation.top_k", "generation.do_sample", lambda value: value is False),
)
_NEEDS = (
    ("training.save_total_limit", "training.save_steps"),
    ("evaluation.max_rows", "data.validation"),
    ("evaluation.predict_with_generate", "data.validation"),
    ("evaluation.max_generate_rows", "evaluation.predict_with_generate"),
    ("evaluation.sample_max_new_tokens", "evaluation.prompts"),
)
_DEFAULTS = {setting.key: setting.default for setting in settings()}


def _is_hub_id(path: Any) -> bool:
    """Whether a path may be a hub's id: `owner/name` that is nothing on this machine."""
    if not isinstance(path, str):
        return False
    if path.startswith("modelscope://"):
        return True
    try:
        there = Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not there


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:40]
