"""Which samples make an optimizer step, and how they go through the model.

The batch size and accumulation say *which* samples make a step; how they are packed is decided here.
The loss is a sum over supervised tokens divided by their count in the whole step, so
any split into micro-batches gives the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuneloom.config import TrainingConfig
from tuneloom.types import IGNORE_INDEX, MicroBatch, Sample, StepPlan


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
    def of(cls, training: TrainingConfig, num_samples: int) -> StepSchedule:
        """Return the schedule that a training section says."""
        return cls(num_samples, training.num_samples_per_step, training.seed, training.num_train_epochs, training.max_steps)

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
"""What one more pass through the model is taken to cost beyond its tokens, in tokens.

A choice, not a measurement: a line through passes of 80 to 1,280 tokens of SmolLM2 on two CPU
cores gave 73; the split is exact with any value."""


def plan_step(samples: Sequence[Sample], max_tokens: int) -> StepPlan:
    """Pack a step's samples into micro-batches of at most `max_tokens` tokens, padding counted.

    Samples sorted by length are cut into runs so that padded tokens plus the cost of each pass
    are the fewest possible (dynamic programming); one longer than the budget goes alone.
    """
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
    groups = []
    end = len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return StepPlan(tuple(pad(group) for group in reversed(groups)), len(samples))


def pad(samples: Sequence[Sample]) -> MicroBatch:
    """Pad samples on the right to one length. The last token of each is a label only, never an input."""
    width = max(sample.num_tokens for sample in samples) - 1
    shape = (len(samples), width)
    ids_BT = np.zeros(shape, dtype=np.int64)
    attention_BT = np.zeros(shape, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = sample.num_tokens - 1
        ids_BT[row, :length] = sample.ids_T[:-1]
        attention_BT[row, :length] = 1
        labels_BT[row, :length] = np.where(sample.mask_T[1:], sample.ids_T[1:], IGNORE_INDEX)
    return MicroBatch(ids_BT, attention_BT, labels_BT, tuple(sample.location for sample in samples))
