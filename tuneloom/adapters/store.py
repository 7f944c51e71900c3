"""Adapters on disk, in PEFT's layout, beside a note of the base that they belong to."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.checkpoints import ADAPTER_FILES
from tuneloom.errors import UserError
from tuneloom.models.fingerprint import fingerprint
from tuneloom.models.quiet import quiet_peft
from tuneloom.models.source import ModelSource

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
BASE_FILE = "base_model.json"
_PREFIX = "base_model.model."
STARTS = (True, False, "gaussian", "orthogonal")
"""Ways to start an adapter that leave the base as it was; after any other, the file's weights belong to a changed base."""

CARRIED = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "lora_dropout", "target_modules", "modules_to_save"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    }
)
"""Keys of PEFT's config that come through loading and saving whole, whatever they say."""

_COPY_AGAIN = "copy the adapter again, or use another checkpoint of its run"


def save_adapter(model: PeftModel, folder: Path, base: ModelSource) -> None:
    """Write adapter_config.json, adapter_model.safetensors and base_model.json.

    The base's embedding is never written along (`save_embedding_layers=False`).
    """
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; a run writes its own
    note = {"name": base.name, "kind": base.kind, "fingerprint": fingerprint(base.folder)}
    (folder / BASE_FILE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adapter(
    model: PreTrainedModel, folder: Path, base: ModelSource, *, trainable: bool = False, dropout: float | None = None
) -> PeftModel:
    """Put a saved adapter on its base.

    Args:
        model: the loaded base.
        folder: the adapter, in PEFT's layout.
        base: where the base came from.
        trainable: whether its weights are to be trained further.
        dropout: on the adapter's input; None: as it was trained with.

    Raises:
        UserError: torn files, or an adapter of another base.
    """
    from peft import LoraConfig, PeftModel
    from safetensors import SafetensorError

    from tuneloom.adapters.fused import with_fused_layers

    check_adapter(model, folder, base)
    try:
        with quiet_peft():
            config = with_fused_layers(LoraConfig.from_pretrained(folder))
            if dropout is not None:
                config.lora_dropout = dropout
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config, local_files_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the adapter does not load",
            where=str(folder),
            got=(str(error).splitlines() or [type(error).__name__])[0][:240],
            mend=_COPY_AGAIN,
        ) from error


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Put a saved adapter's weights into a model that has the same adapter already."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return a folder's adapter_config.json.

    Raises:
        UserError: absent, torn, or no LoRA.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "the folder is no adapter", where=str(folder), got=f"no {CONFIG_FILE}", expected="a folder in PEFT's layout"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            "the adapter's config cannot be read", where=str(file), got=str(error)[:200], mend=_COPY_AGAIN
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError("not a LoRA adapter", where=str(file), got=f"peft_type {kind!r}", expected="LORA")
    return config


def strange_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an adapter_config.json that say more than LoRA, rsLoRA or DoRA on an unchanged base."""
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    strange = {key: value for key, value in config.items() if key not in CARRIED and value and value != plain.get(key)}
    start = config.get("init_lora_weights", True)
    return strange if start in STARTS else {"init_lora_weights": start}


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return (name or path of the base, its fingerprint where known) that an adapter belongs to."""
    config = read_adapter_config(folder)
    try:
        note = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        return str(note["name"]), str(note["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            "the adapter does not name its base model", where=str(folder / CONFIG_FILE), expected="base_model_name_or_path"
        )
    return name, None


def check_adapter(model: PreTrainedModel, folder: Path, base: ModelSource) -> None:
    """Require every tensor of an adapter to fit a module of the base.

    Raises:
        UserError: an adapter of another base, by shapes or by fingerprint.
    """
    name, _ = base_of(folder)
    modules = dict(model.named_modules())
    for key, shape in tensor_shapes(folder).items():
        path, kind = module_of(key)
        module = modules.get(path)
        size = _expected_size(module, kind)
        if module is None or (size is not None and size != shape[0 if kind in ("lora_B", "lora_magnitude_vector") else 1]):
            there = "no such module" if module is None else f"{size} there, {list(shape)} in the adapter"
            raise _other_base(folder, base, name, f"{path}: {there}")
    check_fingerprint(folder, base, fingerprint(base.folder))


def check_fingerprint(folder: Path, base: ModelSource, base_fingerprint: str) -> None:
    """Require an adapter that knows its base's fingerprint to find that base; no weights are read.

    Raises:
        UserError: an adapter of another base, naming both.
    """
    name, expected = base_of(folder)
    if expected is not None and expected != base_fingerprint:
        raise _other_base(folder, base, name, "its weights have another fingerprint")


def _other_base(folder: Path, base: ModelSource, name: str, got: str) -> UserError:
    return UserError(
        "the adapter belongs to another base model",
        where=f"{folder} on {base.name}",
        got=got,
        expected=f"the base that it was trained on: {name}",
        mend="use that base, or train a new adapter on this one",
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of an adapter's tensors, by key; only the file's header is read.

    Raises:
        UserError: absent or torn.
    """
    file = folder / WEIGHTS_FILE
    try:
        with open(file, "rb") as opened:
            (num_bytes,) = struct.unpack("<Q", opened.read(8))
            if num_bytes > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(opened.read(num_bytes))
        return {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    except FileNotFoundError:
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            "the adapter has no weights",
            where=str(folder),
            got="adapter_model.bin: pickled weights can run code and are not read" if pickled else f"no {WEIGHTS_FILE}",
            mend=f"convert it to {WEIGHTS_FILE} first, with a PEFT that trusts it" if pickled else _COPY_AGAIN,
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError("the adapter's weights are torn", where=str(file), got=str(error)[:200], mend=_COPY_AGAIN) from None


def module_of(key: str) -> tuple[str, str]:
    """Split an adapter tensor's key into its module's path and the kind of tensor."""
    for kind in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_A", "lora_B"):
        if f".{kind}" in key:
            return key.removeprefix(_PREFIX).partition(f".{kind}")[0], kind
    path = key.removeprefix(_PREFIX).rpartition(".")[0]
    return path.removesuffix(".base_layer"), "other"


def _expected_size(module: Any, kind: str) -> int | None:
    """Return the size that a tensor must share with its module, None where there is none to compare."""
    attribute = {
        "lora_A": "in_features",
        "lora_B": "out_features",
        "lora_embedding_A": "num_embeddings",
    }.get(kind)
    size = getattr(module, attribute, None) if attribute else None
    return size if isinstance(size, int) else None
