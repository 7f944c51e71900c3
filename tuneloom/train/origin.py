"""The adapter that a new run continues from: found, checked, its shape taken over, its weights loaded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from tuneloom.adapters.attach import checked_modules_to_save, module_paths, resolve_targets
from tuneloom.adapters.native import native_folder
from tuneloom.adapters.store import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_fingerprint,
    load_adapter,
    module_of,
    read_adapter_config,
    strange_settings,
    tensor_shapes,
)
from tuneloom.adapters.target import find_adapter
from tuneloom.checkpoints import MANIFEST, verify_checkpoint
from tuneloom.config import AdapterConfig, Config
from tuneloom.errors import UserError, excerpt
from tuneloom.models.source import ModelSource, Say
from tuneloom.rundir import ENVIRONMENT, RunDirectory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_KEY = "adapter.continue_from"
_SCALARS = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights")
"""Settings that must be the adapter's own, found without its base."""

_MERGE_FIRST = "fold it into its base (tuneloom export --to merged) and train a new adapter on that"


@dataclass(frozen=True)
class Origin:
    """An adapter to continue from.

    Attributes:
        path: its folder, in PEFT's layout, as the user has it.
        sha256: of its adapter_model.safetensors.
        native: the folder made from it that loads, where its names are a ChatGLM's original ones.
    """

    path: str
    sha256: str
    native: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder to load it from."""
        return self.native or Path(self.path)

    def note(self) -> dict[str, str]:
        """Return what a run keeps of it."""
        return {"path": self.path, "sha256": self.sha256}

    def __str__(self) -> str:
        return f"{self.path} ({WEIGHTS_FILE}: sha256 {self.sha256})"


def find_origin(config: Config, base: ModelSource, base_fingerprint: str, say: Say) -> Origin | None:
    """Find the adapter that a config continues from; None where it starts a fresh one.

    Raises:
        UserError: there is none, it is broken, of another base, or of a kind that cannot be continued faithfully.
    """
    name = config.adapter.continue_from
    if name is None:
        return None
    folder = find_adapter(name, runs_dir=config.output_dir, say=say)
    if folder is None:
        raise UserError(
            "there is no adapter to continue from",
            where=_KEY,
            got=f"{excerpt(name)}: {f'no {CONFIG_FILE} in it' if Path(name).expanduser().is_dir() else 'no such folder'}",
            expected="a run, a checkpoint, or an adapter's folder in PEFT's layout",
            mend=f"check the path; a run may be named alone where it is in {config.output_dir}",
        )
    fault = verify_checkpoint(folder) if (folder / MANIFEST).is_file() else None
    if fault:
        raise UserError("the checkpoint is broken", where=str(folder), got=fault, mend="continue from another one of its run")
    check_fingerprint(folder, base, base_fingerprint)
    tensor_shapes(folder)
    _refuse_unknown_kind(folder)
    native = native_folder(folder, base)
    with open(folder / WEIGHTS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Origin(str(folder), digest, native if native != folder else None)


def noted_origin(run: RunDirectory) -> Origin | None:
    """Return what a run noted of the adapter that it continued from."""
    note = (run.read_json(ENVIRONMENT) or {}).get("continued_from")
    return Origin(note["path"], note["sha256"]) if note else None


def shaped(config: Config, origin: Origin | None) -> Config:
    """Take the settings over that the config leaves open, all but the modules (see `aimed`).

    Raises:
        UserError: a setting that is given and is not the adapter's own.
    """
    if origin is None:
        return config
    own, given = _own(origin), config.adapter
    _refuse_differing(
        origin,
        {key: (getattr(given, key), getattr(own, key)) for key in _SCALARS if key in given.model_fields_set},
    )
    open_keys = {*_SCALARS, "lora_dropout"} - given.model_fields_set
    return _with(config, {key: getattr(own, key) for key in open_keys})


def aimed(config: Config, origin: Origin | None, model: PreTrainedModel) -> Config:
    """Take the modules over that the config leaves open; those given are compared by what they match in the model.

    Raises:
        UserError: modules that are given and are not the adapter's own.
    """
    if origin is None:
        return config
    raw, given, taken = read_adapter_config(origin.folder), config.adapter, {}
    own = frozenset(path for path, kind in map(module_of, tensor_shapes(origin.folder)) if kind != "other")
    names = raw.get("target_modules")
    own_names = sorted(names if isinstance(names, list) and module_paths(model, names) == own else own)
    if "target_modules" not in given.model_fields_set:
        taken["target_modules"] = tuple(own_names)
    elif module_paths(model, resolve_targets(model, given.target_modules)) != own:
        _refuse_differing(origin, {"target_modules": (given.target_modules, own_names)})
    saved_names = sorted(raw.get("modules_to_save") or ())
    if "modules_to_save" not in given.model_fields_set:
        taken["modules_to_save"] = tuple(saved_names)
    elif module_paths(model, checked_modules_to_save(model, given.modules_to_save)) != module_paths(model, saved_names):
        _refuse_differing(origin, {"modules_to_save": (given.modules_to_save, saved_names)})
    return _with(config, taken)


def load_origin(model: PreTrainedModel, origin: Origin, config: Config, base: ModelSource, base_name: str) -> PeftModel:
    """Put the adapter on its base, to be trained further; its files are only read.

    Args:
        model: the loaded base.
        origin: the adapter.
        config: the settings, `shaped` and `aimed`.
        base: where the base came from.
        base_name: written to adapter_config.json as the base's name or path.

    Raises:
        UserError: torn files, another base, weights that are missing, or weights of the base that were changed along.
    """
    from peft import get_peft_model_state_dict

    _refuse_changed_base(model, origin, config.adapter)
    torch.manual_seed(config.training.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing adapter keys.*")  # refused below, shorter
        adapted = load_adapter(model, origin.folder, base, trainable=True, dropout=config.adapter.lora_dropout)
    missing = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - tensor_shapes(origin.folder).keys()
    if missing:
        raise UserError(
            "the adapter lacks weights that its config asks for",
            where=str(origin.folder / WEIGHTS_FILE),
            got=f"no {min(missing)}" + (f", nor {len(missing) - 1} more" if len(missing) > 1 else ""),
            mend="copy the adapter again, or continue from another one",
        )
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def _own(origin: Origin) -> AdapterConfig:
    """Return the adapter's own settings in our terms, its modules left out."""
    from peft import LoraConfig

    raw = LoraConfig().to_dict() | read_adapter_config(origin.folder)
    values = {key: raw[key] for key in (*_SCALARS, "lora_dropout")}
    if values["init_lora_weights"] == "orthogonal":
        values["init_lora_weights"] = True  # how it once started is all the same to its weights
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = first["loc"][0] if first["loc"] else "?"
        raise UserError(
            "the adapter has a setting that cannot be continued",
            where=str(origin.folder / CONFIG_FILE),
            got=f"{key}: {excerpt(first['input'])}",
            expected=first["msg"][:1].lower() + first["msg"][1:],
            mend=_MERGE_FIRST,
        ) from None


def _with(config: Config, taken: Mapping[str, Any]) -> Config:
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=dict(taken))})


def _refuse_differing(origin: Origin, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse settings, key -> (given, the adapter's own), that are not the same."""
    differing = {key: pair for key, pair in settings.items() if pair[0] != pair[1]}
    if not differing:
        return
    several = len(differing) > 1
    raise UserError(
        f"{'these settings are' if several else 'this setting is'} not the adapter's own",
        where=", ".join(f"adapter.{key}" for key in differing),
        got=_listed({key: given for key, (given, _) in differing.items()}),
        expected=_listed({key: own for key, (_, own) in differing.items()}) + f", as {origin.path} has it",
        mend=f"give the same, leave the key{'s' if several else ''} out, or drop {_KEY} to start a fresh one",
    )


def _listed(settings: Mapping[str, Any]) -> str:
    """Return `r 8; use_dora false`, of bearable length."""
    text = "; ".join(f"{key} {_shown(value)}" for key, value in settings.items())
    return text if len(text) <= 200 else f"{text[:199]}…"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_unknown_kind(folder: Path) -> None:
    """Refuse an adapter whose config says more than loading, training and saving it here would keep."""
    if strange := strange_settings(read_adapter_config(folder)):
        raise UserError(
            "an adapter of this kind cannot be continued faithfully",
            where=str(folder / CONFIG_FILE),
            got=_listed(strange),
            expected="LoRA, rsLoRA or DoRA on a base that was left as it was",
            mend=_MERGE_FIRST,
        )


def _refuse_changed_base(model: PreTrainedModel, origin: Origin, adapter: AdapterConfig) -> None:
    """Refuse weights of the base written along with an adapter, unless they are the base's own.

    PEFT writes an adapted embedding whole by itself, which is harmless; a trained or a resized one
    would be lost at the next save.
    """
    from safetensors import safe_open

    modules, saved = dict(model.named_modules()), module_paths(model, adapter.modules_to_save)
    with safe_open(origin.folder / WEIGHTS_FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 no mapping
            path, kind = module_of(key)
            weight = getattr(modules.get(path), "weight", None)
            if kind != "other" or path in saved or not key.endswith(".weight") or weight is None:
                continue
            written = file.get_tensor(key)
            if written.shape != weight.shape or not torch.equal(written.to(weight.device, weight.dtype), weight):
                raise UserError(
                    "the adapter brings weights of the base that are not this base's",
                    where=str(origin.folder / WEIGHTS_FILE),
                    got=f"{key}, {list(written.shape)}",
                    expected=f"the base's own {path}, {list(weight.shape)}",
                    mend=_MERGE_FIRST,
                )
