"""Whether a checkpoint is whole, by the sha256 of each of its files; no torch. `tuneloom.train.checkpoint` writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tuneloom.rundir import RunDirectory

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
TRAINING_STATE = "training_state.json"


def verify_checkpoint(folder: Path) -> str | None:
    """Return None for a whole checkpoint, else what is wrong with it."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {*ADAPTER_FILES, TRAINING_STATE, OPTIMIZER, RNG}
        if not isinstance(digests, dict) or not expected <= digests.keys():
            return f"{MANIFEST} is incomplete"
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or torn"
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} does not match its sha256"
    return None


def newest_whole(run: RunDirectory) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and why newer ones were skipped."""
    skipped: list[str] = []
    for _, path in reversed(run.checkpoints().items()):
        fault = verify_checkpoint(path)
        if fault is None:
            return path, skipped
        skipped.append(f"{path.name}: {fault}")
    return None, skipped


def sha256_of(path: Path) -> str:
    """Return a file's sha256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
