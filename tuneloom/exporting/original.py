"""Write a native model back in ChatGLM's original layout, beside its owner's own config.json and tokenizer files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from tuneloom.adapters.target import Target
from tuneloom.errors import UserError
from tuneloom.models.chatglm.config import is_original
from tuneloom.models.chatglm.names import DROPPED
from tuneloom.models.chatglm.weights import find_shards, opened_shard, original_tensors
from tuneloom.rundir import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INDEX = "model.safetensors.index.json"


def require_original(target: Target) -> None:
    """Require a target whose base is in the original layout.

    Raises:
        UserError: it is in another: there is no config.json and no tokenizer of that layout to write beside the weights.
    """
    config = target.base.config()
    if not is_original(config):
        raise UserError(
            "the base model is not a ChatGLM in its original layout",
            where=target.base.name,
            got=f"model_type {config.get('model_type')!r}",
            expected="model_type 'chatglm'",
            mend="--to merged writes the native layout; for the other, train on the original folder",
        )


def write_original(model: PreTrainedModel, base: Path, folder: Path, max_shard_size: str) -> None:
    """Write weights under their original names, sharded and with an index, and copy the base's other files.

    Files of code are copied with the rest, for tools that run them; they are not run here. Memory at its highest is the
    model and what one shard takes.

    Args:
        model: a native one, any adapter folded in.
        base: folder of the original layout that it was loaded from.
        folder: to write into.
        max_shard_size: of a file, e.g. `2GB`.
    """
    state = model.state_dict()
    natives = original_tensors(state)
    dropped = _dropped_tensors(base)
    planned = {name: _planned([state[part] for part in parts]) for name, parts in natives.items()}
    plan = split_torch_state_dict_into_shards(
        planned | {name: tensor.to("meta") for name, tensor in dropped.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: dropped[name] if name in dropped else _joined([state[part] for part in natives[name]]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        write_atomically(folder / _INDEX, json.dumps(index, indent=2) + "\n")
    _copy_others(base, folder, model.dtype)


def _planned(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return what `_joined` will, without data."""
    rows = sum(part.shape[0] for part in parts)
    return torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, device="meta")


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _dropped_tensors(base: Path) -> dict[str, torch.Tensor]:
    """Return the base's tensors that the native model computes anew; the original code wants them in the file."""
    found: dict[str, torch.Tensor] = {}
    for file in find_shards(base):
        with opened_shard(file) as (names, tensor):
            found |= {name: tensor(name).clone() for name in names if name in DROPPED}
    return found


def _copy_others(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy everything that is no weights; config.json as it is but for the dtype, where that is another one now."""
    for file in sorted(base.iterdir()):
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "README.md":
            shutil.copyfile(file, folder / file.name)
    written = str(dtype).removeprefix("torch.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("torch_dtype") != written:
        write_atomically(
            folder / "config.json", json.dumps(config | {"torch_dtype": written}, indent=2, ensure_ascii=False) + "\n"
        )
