"""A base model's fingerprint: cheap enough to take at every start, sharp enough to tell bases apart."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tuneloom.errors import UserError
from tuneloom.models.chatglm.config import check_original, is_original
from tuneloom.models.source import read_model_config

_BYTES_PER_TENSOR = 4096

_Entry = tuple[str, str, list[int], bytes]
_DTYPE_NAMES = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float64": "F64"}
"""Torch's names -> safetensors'."""


def fingerprint(folder: Path) -> str:
    """Return a sha256 over every tensor's name, dtype, shape and first 4 KiB.

    It reads headers and little else, so it costs milliseconds for any size of model. A change
    inside a tensor beyond its first 4 KiB is not seen; another checkpoint or a fine-tuned base is.
    A ChatGLM in its original layout has the fingerprint of the same weights in the native one.

    Raises:
        UserError: a file without a whole header.
    """
    digest = hashlib.sha256()
    for name, dtype, shape, head in sorted(_entries(folder)):
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(head)
    return digest.hexdigest()


def _entries(folder: Path) -> Iterator[_Entry]:
    """Yield name, dtype, shape and first bytes of each tensor."""
    config = read_model_config(folder) if (folder / "config.json").is_file() else {}
    if is_original(config):
        check_original(config, folder / "config.json")
        yield from _original_entries(folder, config)
        return
    for file in folder.glob("*.safetensors"):
        try:
            yield from _safetensors_entries(file)
        except (OSError, OverflowError, MemoryError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise UserError(
                "a weight file is torn",
                where=str(file),
                got=(str(error).splitlines() or [type(error).__name__])[0][:200],
                mend="copy or download the model's file again",
            ) from error


def _safetensors_entries(file: Path) -> Iterator[_Entry]:
    with open(file, "rb") as opened:
        (num_bytes,) = struct.unpack("<Q", opened.read(8))
        if num_bytes > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(opened.read(num_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            opened.seek(8 + num_bytes + start)
            yield name, entry["dtype"], entry["shape"], opened.read(min(end - start, _BYTES_PER_TENSOR))


def _original_entries(folder: Path, config: dict[str, object]) -> Iterator[_Entry]:
    import torch

    from tuneloom.models.chatglm.weights import native_tensors

    for name, tensor in native_tensors(folder, config):
        first = tensor.reshape(-1)[: _BYTES_PER_TENSOR // tensor.element_size()].contiguous()
        yield name, _DTYPE_NAMES[str(tensor.dtype)], list(tensor.shape), first.view(torch.uint8).numpy().tobytes()
