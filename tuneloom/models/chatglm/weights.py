"""Weights in the original layout: found, checked by name and shape, read a tensor at a time, and written back.

A shard is mapped, not read, and let go of after some dozen megabytes, so that what it takes of memory
beside the model's own weights stays small whatever its size.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.errors import UserError
from tuneloom.models.chatglm.config import attention_of
from tuneloom.models.chatglm.names import DROPPED, native_modules, original_module

if TYPE_CHECKING:
    import torch

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_AGAIN = "copy or download the model's file again"
_MAPPED_BYTES = 64 << 20
"""A shard is let go of after so much of it was read."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard.

    Attributes:
        file: the shard.
        shape: of the tensor.
        num_bytes: its size there.
    """

    file: Path
    shape: Shape
    num_bytes: int


def find_shards(folder: Path) -> list[Path]:
    """Return a folder's weight files: those that its index names, or the one there is; safetensors before `.bin`.

    Raises:
        UserError: no weights, a torn index, or a shard that the index names and is not there.
    """
    for index in (folder / name for name in _INDEXES):
        if index.is_file():
            names = _index_names(index)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(
                    f"{len(missing)} of {len(names)} weight files are missing",
                    where=str(folder),
                    got=f"no {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}",
                    expected=f"what {index.name} names",
                    mend="copy or download the missing files too",
                )
            return [folder / name for name in names]
    for single in (folder / name for name in _SINGLES):
        if single.is_file():
            return [single]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    raise UserError(
        "the folder has no index of its weight files" if found else "the folder has no weights",
        where=str(folder),
        got=", ".join(file.name for file in found[:3]) or "no .safetensors and no .bin file",
        expected=f"{_INDEXES[0]}, {_INDEXES[1]}, {_SINGLES[0]} or {_SINGLES[1]}",
        mend="copy or download the model's folder again",
    )


def check_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Require exactly the tensors that the config means; headers are read, no weights.

    Args:
        folder: of the original layout.
        config: its checked config.json.

    Returns:
        Where each tensor is, those left out that are computed anew.

    Raises:
        UserError: a torn file, or a tensor missing, left over, of another shape, or quantised.
    """
    found: dict[str, Stored] = {}
    for file in find_shards(folder):
        with opened_shard(file) as (names, tensor):
            for name in names:
                value = tensor(name)
                if not value.is_floating_point():
                    raise _quantised(file, name, value)
                found[name] = Stored(file, tuple(value.shape), value.numel() * value.element_size())
    found = {name: stored for name, stored in found.items() if name not in DROPPED}
    expected = expected_shapes(config)
    for problem, names in (
        ("the weights lack a tensor", sorted(expected.keys() - found.keys())),
        ("the weights have a tensor that does not belong there", sorted(found.keys() - expected.keys())),
    ):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            mend = _P_TUNING if "prefix_encoder" in names[0] else "config.json and the weights must come from the same model"
            raise UserError(problem, where=str(folder), got=names[0] + more, mend=mend)
    for name, stored in found.items():
        if stored.shape != expected[name]:
            raise UserError(
                "a tensor is of another shape than config.json says",
                where=f"{stored.file}: {name}",
                got=str(list(stored.shape)),
                expected=str(list(expected[name])),
                mend="config.json and the weights must come from the same model",
            )
    return found


_P_TUNING = "this is a P-tuning checkpoint: use the model that it was made from, and train a LoRA"


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of each tensor of the original layout."""
    hidden, wide, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    attention = attention_of(config)
    fused = sum(attention.parts)
    shapes: dict[str, Shape] = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_layers"]):
        stem = f"transformer.encoder.layers.{layer}."
        shapes |= {
            f"{stem}input_layernorm.weight": (hidden,),
            f"{stem}post_attention_layernorm.weight": (hidden,),
            f"{stem}self_attention.query_key_value.weight": (fused, hidden),
            f"{stem}self_attention.dense.weight": (hidden, attention.query_rows),
            f"{stem}mlp.dense_h_to_4h.weight": (2 * wide, hidden),
            f"{stem}mlp.dense_4h_to_h.weight": (hidden, wide),
        }
        if config.get("add_qkv_bias", False):
            shapes[f"{stem}self_attention.query_key_value.bias"] = (fused,)
    return shapes


def native_tensors(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor under its native name, as a view of the mapped file: copy it before the next one is asked for.

    Raises:
        UserError: as `check_weights` does.
    """
    import torch

    parts = list(attention_of(config).parts)
    for file, names in _by_file(check_weights(folder, config)).items():
        for group in names:
            with opened_shard(file) as (_, tensor):
                for name in group:
                    value = tensor(name)
                    module, _, kind = name.rpartition(".")
                    natives = native_modules(module)
                    pieces = torch.split(value, parts) if len(natives) > 1 else (value,)
                    for native, piece in zip(natives, pieces, strict=True):
                        yield f"{native}.{kind}", piece
                    del value, pieces


def original_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each tensor of the original layout the native ones that it is made of, in their order.

    Args:
        names: of a native model's tensors.

    Raises:
        KeyError: a name that has no place in the original layout.
    """
    found: dict[str, dict[int, str]] = {}
    for native in names:
        module, _, kind = native.rpartition(".")
        place = original_module(module)
        if place is None:
            raise KeyError(native)
        found.setdefault(f"{place[0]}.{kind}", {})[place[1] or 0] = native
    return {name: [parts[i] for i in sorted(parts)] for name, parts in found.items()}


@contextlib.contextmanager
def opened_shard(file: Path) -> Iterator[tuple[Sequence[str], Callable[[str], torch.Tensor]]]:
    """Map a shard; give its tensors' names, and a function from a name to the tensor, a view of the mapped file.

    `.bin` is read by torch's weights-only reader, which builds tensors and nothing else.

    Raises:
        UserError: a torn file, or one that holds something else than tensors.
    """
    with contextlib.ExitStack() as stack:
        try:
            if file.suffix == ".safetensors":
                from safetensors import safe_open

                opened = stack.enter_context(safe_open(file, framework="pt"))
                names, tensor = list(opened.keys()), opened.get_tensor
            else:
                held = _torch_tensors(file)
                names, tensor = list(held), held.__getitem__
        except UserError:
            raise
        except Exception as error:  # both libraries raise whatever the damage leads to
            unsafe = type(error).__name__ == "UnpicklingError"
            raise UserError(
                "a weight file holds something else than tensors, which is never read" if unsafe else "a weight file is torn",
                where=str(file),
                got=(str(error).strip().splitlines() or [type(error).__name__])[0][:200],
                mend="use the model owner's files" if unsafe else _AGAIN,
            ) from error
        yield names, tensor


def _torch_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that torch.save wrote, mapped.

    Raises:
        UserError: something else than tensors by name.
        ValueError: not such a file.
    """
    import zipfile

    import torch

    if not zipfile.is_zipfile(file):
        raise ValueError("not a file that torch.save wrote, or only a part of one")
    held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    strange = None if isinstance(held, dict) else type(held).__name__
    if strange is None:
        strange = next((str(name) for name, value in held.items() if not isinstance(value, torch.Tensor)), None)
    if strange is not None:
        raise UserError(
            "a weight file holds something else than tensors",
            where=str(file),
            got=strange[:200],
            mend="use the model owner's files",
        )
    return dict(held)


def _index_names(index: Path) -> list[str]:
    """Return the file names in an index; names that lead elsewhere are refused."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("weight_map names no files of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("the index of the weight files is torn", where=str(index), got=str(error)[:200], mend=_AGAIN) from None
    return names


def _by_file(stored: Mapping[str, Stored]) -> dict[Path, list[list[str]]]:
    """Group tensors by file, and in a file by how much is mapped at a time."""
    found: dict[Path, list[list[str]]] = {}
    size = 0
    for name, tensor in stored.items():
        groups = found.setdefault(tensor.file, [])
        if not groups or size > _MAPPED_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.num_bytes
    return found


def _quantised(file: Path, name: str, value: torch.Tensor) -> UserError:
    return UserError(
        "the weights are quantised, which is not read",
        where=str(file),
        got=f"{name}: {str(value.dtype).removeprefix('torch.')}",
        expected="float16, bfloat16 or float32",
        mend="use the unquantised checkpoint; base_model.quantization: 4bit or 8bit quantises it while loading",
    )
