"""What is measured before and during training: one real micro-batch, memory, useful work."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from tuneloom.data.plan import StepSchedule
from tuneloom.data.split import split_step
from tuneloom.models.forward import supervised_loss_sum
from tuneloom.train.optim import trainable_parameters
from tuneloom.types import Layout, MicroBatch, Sample, StepPlan

if TYPE_CHECKING:
    from peft import PeftModel

GIB = 1 << 30
_LOOK_EVERY_SECONDS = 0.003
STEPS_LOOKED_THROUGH = 500
"""Steps whose micro-batches are planned ahead to find the heaviest."""


@dataclass(frozen=True)
class Trial:
    """One forward and backward of the heaviest micro-batch, measured.

    Attributes:
        tokens: input tokens of its samples.
        seconds: it took.
        held_gib: memory of the process (CPU: resident; CUDA: allocated) before it.
        peak_memory_gib: the most while it ran.
    """

    tokens: int
    seconds: float
    held_gib: float
    peak_memory_gib: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def heaviest_micro_batch(
    samples: Sequence[Sample],
    schedule: StepSchedule,
    max_tokens: int,
    layout: Layout,
    weight: Callable[[MicroBatch], float] | None = None,
    num_ranks: int = 1,
) -> MicroBatch:
    """Return the heaviest micro-batch among those that the first steps will run.

    Args:
        samples: the training set.
        schedule: which of them make a step.
        max_tokens: token budget.
        layout: of micro-batches.
        weight: of one; its rows unless given, padding counted.
        num_ranks: processes that share a step's samples.
    """
    steps = range(min(schedule.num_steps, STEPS_LOOKED_THROUGH))
    splits = (split_step([samples[i] for i in schedule.indices(step)], num_ranks, max_tokens, layout) for step in steps)
    return max(
        (batch for plans in splits for plan in plans for batch in plan.micro_batches),
        key=weight or partial(rows_of_pass, layout=layout),
    )


def rows_of_pass(batch: MicroBatch, layout: Layout) -> int:
    """Return the rows that the model is given for a micro-batch, padding counted."""
    if layout != Layout.PADDED:
        return batch.num_rows
    return len(batch.segments) * max(segment.end - segment.start for segment in batch.segments)


def trial_micro_batch(model: PeftModel, batch: MicroBatch) -> Trial:
    """Run a micro-batch forward and backward; gradients and random state are put back.

    Run twice where that is quick, and always on a GPU, since a first pass also compiles kernels.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), watched_memory(model.device) as watched:
        model.train()
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            loss = supervised_loss_sum(model, batch) / batch.num_supervised_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if seconds > 10 and model.device.type == "cpu":
                break
    return Trial(batch.num_tokens, seconds, watched.held_gib, watched.peak_gib)


@dataclass
class Watched:
    """Memory of the process before something ran, and the most while it did."""

    held_gib: float
    peak_gib: float


@contextmanager
def watched_memory(device: torch.device) -> Iterator[Watched]:
    """Watch the process's memory: allocated on a GPU; resident on a CPU, looked at all the while by a thread.

    The system's own peak would be that of all that was before, such as loading.
    """
    held = held_memory_gib(device)
    watched = Watched(held, held)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield watched
        watched.peak_gib = peak_memory_gib(device)
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_EVERY_SECONDS):
            watched.peak_gib = max(watched.peak_gib, held_memory_gib(device))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        done.set()
        thread.join()
    watched.peak_gib = max(watched.peak_gib, held_memory_gib(device))


def held_memory_gib(device: torch.device) -> float:
    """Return the memory that the process holds now in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return float(psutil.Process().memory_info().rss / GIB)


def peak_memory_gib(device: torch.device) -> float:
    """Return the process's peak memory in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset / GIB)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


@dataclass(frozen=True)
class WorkPerToken:
    """What counts for useful work: 4 x frozen + 6 x adapter a stored token, 4 x head a supervised one, and attention.

    A prefix that samples share is computed, and counted, once.

    Attributes:
        frozen, adapter, head: parameters in products.
        attention: FLOPs of a pair of tokens, one of which attends to the other: 4 forward and 8 backward for each number
            of each head, in all layers.
    """

    frozen: int
    adapter: int
    head: int
    attention: int

    def gflop(self, plan: StepPlan) -> float:
        """Return the useful GFLOP of training on a step's samples."""
        linear = (4 * self.frozen + 6 * self.adapter) * plan.num_rows + 4 * self.head * plan.num_supervised_tokens
        pairs = sum(int(batch.positions_N.sum()) + batch.num_rows for batch in plan.micro_batches)
        return (linear + self.attention * pairs) / 1e9


def work_per_token(model: PeftModel) -> WorkPerToken:
    """Count the parameters of products: linear layers without the head, the head, the adapter's."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    frozen = sum(
        _unpacked(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    )
    adapter = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return WorkPerToken(frozen, adapter, head.weight.numel(), 12 * heads * size * config.num_hidden_layers)


def _unpacked(weight: torch.Tensor) -> int:
    """Return how many numbers a weight has; 4-bit ones are packed."""
    state = getattr(weight, "quant_state", None)
    return int(state.shape.numel()) if state is not None else weight.numel()
