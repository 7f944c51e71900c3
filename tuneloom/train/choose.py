"""What is chosen before the first step, by measurement: the attention path, and how its micro-batches fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tuneloom.errors import UserError
from tuneloom.models.forward import COMPILED, PACKED, layout_of, use_attention
from tuneloom.train.measure import Trial, trial_micro_batch
from tuneloom.train.memory import Fit, recompute
from tuneloom.train.proof import takes_packed
from tuneloom.train.team import Team
from tuneloom.types import Layout, MicroBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SECONDS_OF_ONE_PATH = 10.0
"""Where a micro-batch takes longer than this on an attention path, none after it is tried."""
EAGER_MAX_TOKENS = 512
"""Longest micro-batch row for which plain products are tried as attention (measured: they win to 512, lose at 1,024)."""


@dataclass(frozen=True)
class Choice:
    """How a run's micro-batches go through the model, and what the heaviest of them takes."""

    attention: str
    fit: Fit
    trial: Trial


def choose(model: PeftModel, wanted: str, fitted: Callable[[Layout], tuple[Fit, MicroBatch]], team: Team) -> Choice:
    """Put the model on the attention path `wanted`; with `auto`, on the fastest for the heaviest micro-batch.

    Where one takes long, those after it are not tried; one that does not fit into memory, or fails in a compiler, is left
    out where there is another.

    Args:
        model: with its adapter.
        wanted: a path, or `auto`.
        fitted: returns how the micro-batches of a layout fit into memory, and the heaviest of them.
        team: whose ranks all choose what the first one measures.

    Raises:
        UserError: a packed path was asked for, and the model or the device does not take it; memory does not suffice.
        RuntimeError: all of them failed; the last one's.
    """
    base = model.get_base_model()
    found: list[Choice] = []
    paths = _paths(base, wanted)
    for name in paths:
        use_attention(base, name)
        try:
            fit, batch = fitted(layout_of(base, training=True))
            if found and name == "eager" and _longest(batch) > EAGER_MAX_TOKENS:
                break
            recompute(model, fit.recomputed_layers)
            trial = trial_micro_batch(model, batch)
            seconds = team.agreed(partial(getattr, trial, "seconds"))
            found.append(Choice(name, fit, replace(trial, seconds=seconds)))
        except (UserError, RuntimeError) as error:
            model.zero_grad(set_to_none=True)
            may_fail = isinstance(error, UserError) or base.device.type == "cuda"
            if not may_fail or not (found or name != paths[-1]):
                raise
            continue
        if found[-1].trial.seconds > SECONDS_OF_ONE_PATH:
            break
    best = max(found, key=lambda choice: choice.trial.tokens_per_second)
    use_attention(base, best.attention)
    recompute(model, best.fit.recomputed_layers)
    return best


def _paths(base: PreTrainedModel, wanted: str) -> list[str]:
    """Return the attention paths to try: packed samples, and what transformers would take.

    On a CPU nothing padded is tried beside packed samples, which never were slower and need less memory; where a model does
    not take them, plain products are.
    """
    on_gpu = base.device.type == "cuda"
    if wanted == COMPILED and not on_gpu:
        raise UserError(
            "the kernel of this attention is compiled for CUDA devices only",
            where="base_model.attn_implementation",
            got=f"{COMPILED} on {base.device.type}",
            expected="auto, packed, sdpa or eager",
        )
    if wanted in (PACKED, COMPILED):
        if not takes_packed(base, wanted):
            raise UserError(
                "this model does not take packed samples",
                where="base_model.attn_implementation",
                got=wanted,
                expected="auto, sdpa or eager",
            )
        return [wanted]
    if wanted != "auto":
        return [wanted]
    packed = [name for name in ((PACKED, COMPILED) if on_gpu else (PACKED,)) if takes_packed(base, name)]
    usual = str(base.config._attn_implementation)
    if on_gpu:
        return [*packed, usual]
    return packed or [usual, *(["eager"] if usual == "sdpa" else [])]


def _longest(batch: MicroBatch) -> int:
    return int(batch.positions_N.max()) + 1
