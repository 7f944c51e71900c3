"""Which samples make an optimizer step, and how they go through the model.

The batch size and accumulation say *which* samples make a step; how they are packed is decided here: end to end without
padding, and what several samples begin with (a system prompt) only once.
The loss is a sum over supervised tokens divided by their count in the whole step, so
any split into micro-batches gives the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuneloom.types import IGNORE_INDEX, Layout, MicroBatch, Sample, Segment, StepPlan

if TYPE_CHECKING:
    from tuneloom.config import TrainingConfig


class StepSchedule:
    """Maps an optimizer step to its samples: a pure function of (seed, epoch, position).

    Args:
        num_samples: samples in the training set.
        samples_per_step: effective batch size; an epoch's last step takes what is left.
        seed: of the order.
        num_epochs: may be fractional.
        max_steps: wins over num_epochs unless -1.
    """

    def __init__(self, num_samples: int, samples_per_step: int, seed: int, num_epochs: float, max_steps: int) -> None:
        self.num_samples = num_samples
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.steps_per_epoch = math.ceil(num_samples / samples_per_step)
        self.num_steps = max_steps if max_steps > 0 else max(1, math.ceil(num_epochs * self.steps_per_epoch))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @classmethod
    def of(cls, training: TrainingConfig, num_samples: int, num_processes: int = 1) -> StepSchedule:
        """Return the schedule that a training section says, of so many processes together."""
        per_step = training.num_samples_per_step * num_processes
        return cls(num_samples, per_step, training.seed, training.num_train_epochs, training.max_steps)

    def indices(self, step: int) -> list[int]:
        """Return the sample indices of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.num_samples, self.seed, epoch)
        start = position * self.samples_per_step
        return [int(i) for i in self._order[start : start + self.samples_per_step]]

    def epochs_done(self, step: int) -> float:
        """Return how many epochs are done after `step` steps."""
        return step / self.steps_per_epoch

    def num_tokens(self, lengths: NDArray[np.integer]) -> int:
        """Return the input tokens of all steps: of each sample all but the last, which is a label only.

        Args:
            lengths: the samples' tokens.
        """
        whole, rest = divmod(self.num_steps, self.steps_per_epoch)
        inputs = lengths.astype(np.int64) - 1
        last = [index for step in range(whole * self.steps_per_epoch, self.num_steps) for index in self.indices(step)]
        return whole * int(inputs.sum()) + (int(inputs[last].sum()) if rest else 0)

    def due(self, every: int | str | None, step: int) -> bool:
        """Whether something that happens at an interval happens after `step` steps."""
        if every is None:
            return False
        return step % (self.steps_per_epoch if every == "epoch" else int(every)) == 0


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the order of the samples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


PASS_COST_TOKENS = 48
"""What one more padded pass through the model is taken to cost beyond its tokens, in tokens.

A choice, not a measurement: a line through passes of 80 to 1,280 tokens of SmolLM2 on two CPU
cores gave 73; the split is exact with any value."""

MIN_SHARED_TOKENS = 16
"""Fewest tokens that are worth a segment of their own."""


def plan_step(samples: Sequence[Sample], max_tokens: int, layout: Layout = Layout.SHARED) -> StepPlan:
    """Pack a step's samples into micro-batches of at most `max_tokens` rows; one longer than that goes alone.

    Padded: samples sorted by length are cut into runs so that padded tokens plus the cost of each pass are the fewest
    possible. Else as few micro-batches as the budget allows, of about equal size; what samples may share are inputs
    before the first row that any of them has a label at.
    """
    if layout == Layout.PADDED:
        groups = _cut_padded(samples, max_tokens)
        return StepPlan(tuple(pack(group) for group in groups), len(samples))
    if layout == Layout.PACKED:
        order = sorted(samples, key=lambda sample: sample.num_tokens)
        groups = _cut_packed(order, [0] * len(order), max_tokens)
        return StepPlan(tuple(pack(group) for group in groups), len(samples))
    order = sorted(samples, key=order_of_prefixes)
    groups = _cut_packed(order, _shared_with_previous(order), max_tokens)
    return StepPlan(tuple(pack(group, share=True) for group in groups), len(samples))


def pack(samples: Sequence[Sample], share: bool = False) -> MicroBatch:
    """Lay samples end to end. The last token of each is a label only, never an input.

    Args:
        samples: with `share` those that begin alike must be neighbours.
        share: whether to store common beginnings once.
    """
    packing = _Packing(samples, _shared_with_previous(samples) if share else [0] * len(samples))
    packing.add(0, len(samples), 0, -1)
    num_tokens = sum(sample.num_tokens - 1 for sample in samples)
    return packing.micro_batch(num_tokens)


class _Packing:
    """Samples being laid end to end, as the trie of what they share.

    Args:
        samples: in order.
        shared: tokens that each may share with the one before it.
    """

    def __init__(self, samples: Sequence[Sample], shared: Sequence[int]) -> None:
        self.samples = samples
        self.shared = shared
        self.parts: list[tuple[Sample, int, int]] = []
        self.segments: list[Segment] = []

    def add(self, first: int, end: int, depth: int, parent: int) -> None:
        """Add samples first..end, all of which have their first `depth` tokens in `parent` and before it."""
        begin = first
        for cut in range(first + 1, end + 1):
            if cut < end and self.shared[cut] - depth >= MIN_SHARED_TOKENS:
                continue
            if cut - begin == 1:
                self._append(self.samples[begin], depth, self.samples[begin].num_tokens - 1, parent)
            else:
                deeper = min(self.shared[begin + 1 : cut])
                self.add(begin, cut, deeper, self._append(self.samples[begin], depth, deeper, parent))
            begin = cut

    def _append(self, sample: Sample, start: int, end: int, parent: int) -> int:
        row = self.segments[-1].end if self.segments else 0
        self.parts.append((sample, start, end))
        self.segments.append(Segment(row, row + end - start, parent))
        return len(self.segments) - 1

    def micro_batch(self, num_tokens: int) -> MicroBatch:
        ids_N = np.concatenate([sample.ids_T[start:end] for sample, start, end in self.parts]).astype(np.int64)
        positions_N = np.concatenate([np.arange(start, end) for _, start, end in self.parts])
        labels_N = np.concatenate([_labels(sample)[start:end] for sample, start, end in self.parts])
        locations = tuple(sample.location for sample in self.samples)
        return MicroBatch(ids_N, positions_N, labels_N, tuple(self.segments), num_tokens, locations)


def _labels(sample: Sample) -> NDArray[np.int64]:
    """Return what each input predicts, IGNORE_INDEX where that is not supervised."""
    return np.where(sample.mask_T[1:], sample.ids_T[1:], IGNORE_INDEX).astype(np.int64)


def order_of_prefixes(sample: Sample) -> bytes:
    """Return a key by which samples that begin alike are neighbours."""
    return sample.ids_T.astype(">i4").tobytes()


def _shared_with_previous(samples: Sequence[Sample]) -> list[int]:
    """Return how many inputs each sample may share with the one before it; 0 where they are too few."""
    shareable = [_num_shareable(sample) for sample in samples]
    shared = [0]
    for previous, sample, limit in zip(samples, samples[1:], map(min, shareable, shareable[1:]), strict=False):
        alike = previous.ids_T[:limit] == sample.ids_T[:limit]
        length = limit if alike.all() else int(alike.argmin())
        shared.append(length if length >= MIN_SHARED_TOKENS else 0)
    return shared


def _num_shareable(sample: Sample) -> int:
    """Return the inputs before the first row with a label; at least one row stays the sample's own."""
    supervised = np.flatnonzero(sample.mask_T[1:])
    return int(supervised[0]) if len(supervised) else max(0, sample.num_tokens - 2)


def _cut_packed(samples: Sequence[Sample], shared: Sequence[int], max_tokens: int) -> list[Sequence[Sample]]:
    """Cut samples, in their order, into the fewest runs whose rows fit, as equal as that allows."""
    fewest = _filled(samples, shared, max_tokens)
    total = sum(sample.num_tokens - 1 - alike for sample, alike in zip(samples, shared, strict=True))
    even = _filled(samples, shared, min(max_tokens, math.ceil(1.05 * total / len(fewest))))
    return even if len(even) == len(fewest) else fewest


def _filled(samples: Sequence[Sample], shared: Sequence[int], max_tokens: int) -> list[Sequence[Sample]]:
    """Cut samples into runs, each as long as the rows allow."""
    runs: list[Sequence[Sample]] = []
    begin, rows = 0, 0
    for i, (sample, alike) in enumerate(zip(samples, shared, strict=True)):
        inputs = sample.num_tokens - 1
        if i > begin and rows + inputs - alike > max_tokens:
            runs.append(samples[begin:i])
            begin, rows, alike = i, 0, 0
        rows += inputs - alike if i > begin else inputs
    return [*runs, samples[begin:]] if len(samples) > begin else runs


def _cut_padded(samples: Sequence[Sample], max_tokens: int) -> list[Sequence[Sample]]:
    """Cut samples into runs by dynamic programming over their sorted lengths."""
    order = sorted(samples, key=lambda sample: sample.num_tokens, reverse=True)
    widths = [sample.num_tokens - 1 for sample in order]
    costs = [0.0] + [math.inf] * len(order)  # costs[k]: of the first k samples, at best
    starts = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        for start in range(end - 1, -1, -1):
            padded = widths[start] * (end - start)
            if padded > max_tokens and end - start > 1:
                break
            if costs[start] + padded + PASS_COST_TOKENS < costs[end]:
                costs[end], starts[end] = costs[start] + padded + PASS_COST_TOKENS, start
    groups: list[Sequence[Sample]] = []
    end = len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]
