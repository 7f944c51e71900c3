"""An adapter in a ChatGLM's original names, as a folder that loads on native classes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from tuneloom.adapters.chatglm import has_original_names, sizes_of, to_native
from tuneloom.adapters.lora import read_adapter, write_adapter
from tuneloom.adapters.store import CONFIG_FILE, WEIGHTS_FILE, check_fingerprint, tensor_shapes
from tuneloom.cache import cache_subfolder
from tuneloom.models.fingerprint import fingerprint
from tuneloom.models.source import ModelSource

_VERSION = 1
"""Of the conversion; a converted folder of another one is made anew."""


def native_folder(folder: Path, base: ModelSource) -> Path:
    """Return an adapter's folder under native names: as it is, or converted into the cache, once by content.

    Args:
        folder: the adapter; one that lacks its files is returned as it is, and refused where it is loaded.
        base: the base model that it goes on.

    Raises:
        UserError: an adapter in original names that is broken, or of another base.
    """
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return folder
    if not has_original_names(list(tensor_shapes(folder))):
        return folder
    sizes = sizes_of(base.config(), base.folder / "config.json")
    if sizes is None:
        return folder
    check_fingerprint(folder, base, fingerprint(base.folder))
    key = [_VERSION, repr(sizes), *(_sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))]
    converted = cache_subfolder("adapters") / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not converted.is_dir():
        adapter = to_native(read_adapter(folder, sizes.original()), sizes)
        with tempfile.TemporaryDirectory(dir=converted.parent, prefix=".adapter.") as scratch:
            written = Path(scratch) / "native"
            written.mkdir()
            write_adapter(adapter, written, sizes.native())
            _publish(written, converted)
    return converted


def _publish(written: Path, place: Path) -> None:
    """Rename; where another process was first, its folder, which is the same, stays."""
    try:
        written.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
