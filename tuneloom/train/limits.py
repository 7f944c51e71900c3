"""What a machine cannot do: a base that its memory does not hold, checkpoints that its disk does not, a disk that gets full."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tuneloom.data.plan import StepSchedule
from tuneloom.doctor.machine import examine_memory
from tuneloom.errors import UserError
from tuneloom.models.source import ModelSource

if TYPE_CHECKING:
    import torch

    from tuneloom.config import Config
    from tuneloom.train.estimate import Outlook

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_STORED_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED_BYTES = {"4bit": 0.5, "8bit": 1.0}
_STATE_BYTES = 12
"""Of a trained parameter in a checkpoint: itself and AdamW's two moments, fp32."""


def weight_bytes(base: ModelSource, dtype: torch.dtype, quantization: str) -> float:
    """Return the bytes that a base's weights take in memory, by the size of its files."""
    config = base.config()
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    files = list(base.folder.glob("*.safetensors")) or list(base.folder.glob("*.bin"))
    parameters = sum(file.stat().st_size for file in files) / _STORED_BYTES.get(stored, 4)
    return parameters * _QUANTISED_BYTES.get(quantization, dtype.itemsize)


def require_memory(base: ModelSource, needed: float, device: torch.device) -> None:
    """Refuse a base whose weights alone are more than the memory that is free: a CPU process would be killed, not told.

    Args:
        base: for the message.
        needed: bytes of all copies of its weights on this machine.
        device: where they are to be.

    Raises:
        UserError: with what is needed and what there is.
    """
    if device.type != "cpu":
        return
    free = examine_memory().available_bytes
    if needed > free:
        raise UserError(
            "the base model does not fit into memory",
            where=str(base.folder),
            got=f"{free / 1e9:.1f} GB free",
            expected=f"at least {needed / 1e9:.1f} GB for its weights alone",
            mend="end other programs, take a smaller model, or set base_model.quantization to 4bit",
        )


def require_memory_of_training(outlook: Outlook) -> None:
    """Refuse a training that memory cannot hold, as its base's shapes and its samples' lengths say.

    Raises:
        UserError: with what is needed, and what to change.
    """
    if outlook.fit is not None:
        return
    raise UserError(
        "training does not fit into memory",
        where=f"the heaviest micro-batch, {outlook.num_rows:,} tokens",
        got=f"{outlook.free_bytes / 1e9:.1f} GB free",
        expected=f"about {outlook.needed_bytes / 1e9:.1f} GB, {outlook.weight_bytes / 1e9:.1f} GB of them for weights",
        mend="lower data.cutoff_len or training.tokens_per_microbatch, set base_model.quantization to 4bit, "
        "take a smaller model, or end other programs",
    )


def require_room(config: Config, num_trained: int, schedule: StepSchedule, num_there: int) -> None:
    """Refuse a run whose checkpoints its disk has no room for: those that are kept, and two.

    Args:
        config: the settings.
        num_trained: trained parameters.
        schedule: of the run.
        num_there: checkpoints that it has already.

    Raises:
        UserError: with what is needed and what there is.
    """
    made = 1 + sum(schedule.due(config.training.save_steps, step) for step in range(1, schedule.num_steps))
    kept = max(0, min(made, config.training.save_total_limit or made) - num_there) + 2
    needed = kept * num_trained * _STATE_BYTES
    place = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if needed > free:
        raise UserError(
            "the disk has too little room for the run's checkpoints",
            where=str(place),
            got=f"{free / 1e6:,.0f} MB free",
            expected=f"{needed / 1e6:,.0f} MB: room for {kept} checkpoints",
            mend="make room, lower training.save_total_limit, or set output_dir to another disk",
        )


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full; libraries of Rust tell it in words alone."""
    return _says(error, _FULL)


def is_refused(error: BaseException) -> bool:
    """Whether an error says that the disk takes nothing: read-only, not allowed, broken."""
    return _says(error, _REFUSED)


def _says(error: BaseException, numbers: set[int]) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)
