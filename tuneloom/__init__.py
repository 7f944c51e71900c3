"""Tuneloom: teach an open chat model who it is and how to talk, on the machine you have.

    import tuneloom

    run = tuneloom.finetune("persona-lora", overrides={"data.validation": 0.1})
    print(tuneloom.evaluate(run).loss)

Importing this costs nothing: each name is fetched when it is first used. `docs/python.md` shows them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneloom.api import (
        EvaluationResult,
        Run,
        evaluate,
        evaluate_persona,
        export,
        finetune,
        load_config,
        load_model,
        load_tokenizer,
        render,
    )
    from tuneloom.config import Config
    from tuneloom.errors import GuardError, Interrupted, TuneloomError, UserError
    from tuneloom.evaluation.intervals import Change, Interval
    from tuneloom.evaluation.persona import Gate, PersonaResult, ProbeAnswer
    from tuneloom.evaluation.predict import Prediction
    from tuneloom.exporting.adapter import AdapterCheck, ExportedAdapter
    from tuneloom.exporting.merged import Exported
    from tuneloom.exporting.verify import Check
    from tuneloom.types import Conversation, Message, Rendered, ToolCall, TrainOn

__version__ = "0.1.0"

__all__ = [
    "AdapterCheck",
    "Change",
    "Check",
    "Config",
    "Conversation",
    "EvaluationResult",
    "Exported",
    "ExportedAdapter",
    "Gate",
    "GuardError",
    "Interrupted",
    "Interval",
    "Message",
    "PersonaResult",
    "Prediction",
    "ProbeAnswer",
    "Rendered",
    "Run",
    "ToolCall",
    "TrainOn",
    "TuneloomError",
    "UserError",
    "__version__",
    "evaluate",
    "evaluate_persona",
    "export",
    "finetune",
    "load_config",
    "load_model",
    "load_tokenizer",
    "render",
]

_HOMES = {
    "tuneloom.api": (
        *("evaluate", "evaluate_persona", "export", "finetune", "load_config", "load_model", "load_tokenizer", "render"),
        *("EvaluationResult", "Run"),
    ),
    "tuneloom.config": ("Config",),
    "tuneloom.errors": ("GuardError", "Interrupted", "TuneloomError", "UserError"),
    "tuneloom.evaluation.intervals": ("Change", "Interval"),
    "tuneloom.evaluation.persona": ("Gate", "PersonaResult", "ProbeAnswer"),
    "tuneloom.evaluation.predict": ("Prediction",),
    "tuneloom.exporting.adapter": ("AdapterCheck", "ExportedAdapter"),
    "tuneloom.exporting.merged": ("Exported",),
    "tuneloom.exporting.verify": ("Check",),
    "tuneloom.types": ("Conversation", "Message", "Rendered", "ToolCall", "TrainOn"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker knows the names above, and should say of any other that it is none

    def __getattr__(name: str) -> Any:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(home), name)
        return value
