"""What a training takes of memory and time: measured on the loaded model, or reckoned from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from tuneloom.config import Config
from tuneloom.data.plan import StepSchedule
from tuneloom.data.store import Samples
from tuneloom.generate.generator import Generator
from tuneloom.models.forward import COMPILED, PACKED
from tuneloom.models.source import ModelSource
from tuneloom.train.measure import (
    GIB,
    Trial,
    Watched,
    heaviest_micro_batch,
    held_memory_gib,
    peak_memory_gib,
    rows_of_pass,
    watched_memory,
)
from tuneloom.train.memory import UPDATE_BYTES, Fit, fit_kept
from tuneloom.train.optim import trainable_parameters
from tuneloom.train.skeleton import reckon
from tuneloom.types import Conversation, Layout, Message

if TYPE_CHECKING:
    from peft import PeftModel

_BEGUN_TOKENS = 2
"""Of an answer: what more of them adds is a few KB each."""


@dataclass(frozen=True)
class Memory:
    """What a training holds, in GiB: of the process on a CPU, allocated on a GPU.

    Attributes:
        process: Python, the libraries and the data.
        weights: of the base.
        adapter, gradients, optimizer: of what is trained.
        activations: of the heaviest micro-batch, with all that its passes need besides.
        answers: what answering the fixed prompts adds. On a CPU it comes on top of activations that are gone, whose memory
            the allocator keeps in pieces.
        loading: the most that was held before.
    """

    process: float
    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    answers: float = 0.0
    loading: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """What is held at one time."""
        parts = asdict(self)
        del parts["loading"]
        return parts

    @property
    def trained(self) -> float:
        return self.adapter + self.gradients + self.optimizer

    @property
    def rest(self) -> float:
        """Of the peak: what is neither weights, nor trained, nor activations."""
        return self.peak - self.weights - self.trained - self.activations

    @property
    def peak(self) -> float:
        return max(self.loading, sum(self.parts.values()))


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a whole training; the time in steps, evaluations and checkpoints left out.

    Attributes:
        memory: what it holds.
        num_steps, num_tokens: of the training.
        tokens_per_second: None where nothing was measured.
    """

    memory: Memory
    num_steps: int
    num_tokens: int
    tokens_per_second: float | None

    @property
    def seconds(self) -> float | None:
        return self.num_tokens / self.tokens_per_second if self.tokens_per_second else None

    @property
    def seconds_per_step(self) -> float | None:
        return self.seconds / self.num_steps if self.seconds is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plan.json and `estimate --json` have them."""
        memory = {name: round(value, 3) for name, value in self.memory.parts.items()}
        rate, step, whole = self.tokens_per_second, self.seconds_per_step, self.seconds
        return {
            "memory_gib": memory | {"loading": round(self.memory.loading, 3), "peak": round(self.memory.peak, 3)},
            "tokens_per_second": None if rate is None else round(rate, 2),
            "seconds_per_step": None if step is None else round(step, 4),
            "seconds": None if whole is None else round(whole, 2),
        }


def measured(
    model: PeftModel, trial: Trial, answering: Watched | None, num_steps: int, num_tokens: int, num_processes: int = 1
) -> Estimate:
    """Return what a training takes, from the trial of its heaviest micro-batch.

    The trial has weights, adapter and activations. While a step's other micro-batches run its gradients are there too, and
    from the first update on the optimizer's state.

    Args:
        model: with its adapter.
        trial: of the heaviest micro-batch.
        answering: what was held while the model began to answer, after the trial; None where it never does.
        num_steps, num_tokens: of the training.
        num_processes: that share its tokens; memory is one's.
    """
    trained = sum(parameter.nbytes for parameter in trainable_parameters(model).values()) / GIB
    weights = sum(_local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())) / GIB - trained
    memory = Memory(
        process=max(0.0, trial.held_gib - weights - trained),
        weights=weights,
        adapter=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=trial.peak_memory_gib - trial.held_gib,
        answers=_added(trial, answering, model.device) if answering else 0.0,
        loading=peak_memory_gib(model.device),
    )
    return Estimate(memory, num_steps, num_tokens, num_processes * trial.tokens_per_second)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _added(trial: Trial, answering: Watched, device: torch.device) -> float:
    """Return what answers add to the height of the trial: on a GPU what was freed is one piece again."""
    if device.type == "cuda":
        return max(0.0, answering.peak_gib - trial.peak_memory_gib)
    return answering.peak_gib - answering.held_gib


def watched_answers(generator: Generator, config: Config, device: torch.device) -> Watched | None:
    """Return what is held while the model begins its answers to the fixed prompts; random state is put back."""
    if not config.evaluation.prompts:
        return None
    asked = [Conversation((Message("user", prompt),)) for prompt in config.evaluation.prompts]
    short = config.generation.model_copy(update={"max_new_tokens": _BEGUN_TOKENS, "min_new_tokens": 0})
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), watched_memory(device) as watched:
        generator.answers(asked, short)
    return watched


@dataclass(frozen=True)
class Outlook:
    """What a training takes, reckoned before its base is loaded: a bound from below.

    Attributes:
        estimate: memory as it would be; no time.
        fit: how micro-batches fit, None where they do not.
        num_rows: of the heaviest micro-batch.
        needed_bytes, free_bytes: weights included.
        weight_bytes: of the base.
        num_trained: parameters.
    """

    estimate: Estimate
    fit: Fit | None
    num_rows: int
    needed_bytes: float
    free_bytes: float
    weight_bytes: float
    num_trained: int


@dataclass(frozen=True)
class Place:
    """Where a training is to be.

    Attributes:
        dtype, device: of the weights.
        free_bytes: memory that there is for it.
        weight_share: of the weights, which lies on this device.
    """

    dtype: torch.dtype
    device: torch.device
    free_bytes: float
    weight_share: float = 1.0


def look_ahead(
    config: Config,
    base: ModelSource,
    place: Place,
    train: Samples,
    schedule: StepSchedule,
    budgets: Sequence[int],
) -> Outlook:
    """Return what a training takes by its base's config.json, its settings and its samples.

    Args:
        config, base, train, schedule: of the training.
        place: where it is to be.
        budgets: token budgets to choose from, falling.

    Raises:
        UserError: a config.json that no model can be built from, or a target that matches nothing.
    """
    wanted = config.base_model.attn_implementation
    layout = _layout(wanted, config.adapter.lora_dropout)
    blocks = place.device.type == "cpu" and wanted in ("auto", PACKED)
    reckoned = reckon(base, config.adapter, place.dtype, config.base_model.quantization, pairs=blocks)
    bound = reckoned.kept if wanted == PACKED else replace(reckoned.kept, of_pair=0.0)  # a model may not take packed samples
    least = bound.num_layers if config.training.gradient_checkpointing else 0
    free = place.free_bytes
    weights = place.weight_share * reckoned.weight_bytes
    fit, batch, needed = fit_kept(
        bound,
        layout,
        budgets,
        lambda tokens, weight: heaviest_micro_batch(train, schedule, tokens, layout, weight),
        UPDATE_BYTES * reckoned.num_trained,
        free - weights - reckoned.adapter_bytes,
        least_layers=least,
    )
    layers = fit.recomputed_layers if fit else bound.num_layers
    adapter = reckoned.adapter_bytes / GIB
    memory = Memory(
        process=held_memory_gib(place.device),
        weights=weights / GIB,
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=reckoned.kept.num_bytes(batch, layout, layers) / GIB,
    )
    return Outlook(
        Estimate(memory, schedule.num_steps, schedule.num_tokens(train.column("tokens")), None),
        fit,
        rows_of_pass(batch, layout),
        needed + weights + reckoned.adapter_bytes,
        free,
        weights,
        reckoned.num_trained,
    )


def _layout(attention: str, dropout: float) -> Layout:
    """Return the layout that an attention path most likely takes; none has fewer rows than the one with shared prefixes."""
    if attention not in ("auto", PACKED, COMPILED):
        return Layout.PADDED
    return Layout.PACKED if dropout else Layout.SHARED
