"""What tuning changed on replies that it should not have changed: loss, divergence and choice, token by token.

Base (adapter off) and tuned model see the same micro-batches, so that rounding is the same on both sides. Logits of both exist
for a few rows at a time where the head is a frozen linear layer.

Shapes: S samples, R supervised rows of a micro-batch, C of a chunk of them, V vocabulary, F figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tuneloom.data.plan import pack
from tuneloom.models.forward import SupervisedRows, layout_of, supervised_rows
from tuneloom.models.head_loss import CHUNK_ROWS
from tuneloom.types import IGNORE_INDEX, Layout, MicroBatch, Sample

_COLUMNS = ("tokens", "before", "after", "divergence", "agreed")


@dataclass(frozen=True)
class Compared:
    """Sums over the supervised tokens of each sample, in the samples' order.

    Attributes:
        tokens_S: supervised tokens.
        before_S, after_S: cross-entropy of the base and of the tuned model, nats.
        divergence_S: KL(base || tuned), nats.
        agreed_S: tokens at which both would choose the same, greedily.
    """

    tokens_S: NDArray[np.float64]
    before_S: NDArray[np.float64]
    after_S: NDArray[np.float64]
    divergence_S: NDArray[np.float64]
    agreed_S: NDArray[np.float64]


def compare(
    model: Any, samples: Sequence[Sample], max_tokens: int, on_progress: Callable[[int, int], None] | None = None
) -> Compared:
    """Compare a PEFT model with its base on samples.

    Args:
        model: with one adapter, whose biases are not trained.
        samples: each with a supervised token.
        max_tokens: token budget of a micro-batch.
        on_progress: called with (samples done, all); may raise to stop.
    """
    padded = layout_of(model, training=False) == Layout.PADDED
    sums_SF = np.zeros((len(samples), len(_COLUMNS)))
    done = 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for chosen in _groups(samples, max_tokens, padded):
                sums_SF[chosen] = _compared(model, pack([samples[i] for i in chosen]))
                done += len(chosen)
                if on_progress:
                    on_progress(done, len(samples))
    finally:
        model.train(training)
    return Compared(*sums_SF.T)


def _groups(samples: Sequence[Sample], max_tokens: int, padded: bool) -> list[list[int]]:
    """Return the samples' numbers, in micro-batches of like length, the longest first."""
    groups: list[list[int]] = []
    rows = 0
    for i in sorted(range(len(samples)), key=lambda i: samples[i].num_tokens, reverse=True):
        inputs = samples[groups[-1][0] if groups and padded else i].num_tokens - 1
        if not groups or rows + inputs > max_tokens:
            groups.append([])
            rows, inputs = 0, samples[i].num_tokens - 1
        groups[-1].append(i)
        rows += inputs
    return groups


def _compared(model: Any, batch: MicroBatch) -> NDArray[np.float64]:
    """Return the columns of each sample of a micro-batch, (S, F)."""
    with model.disable_adapter():
        base = supervised_rows(model, batch)
    tuned = supervised_rows(model, batch)
    found = [_of_chunk(base, tuned, slice(start, start + CHUNK_ROWS)) for start in range(0, base.num_rows, CHUNK_ROWS)]
    values_RF = torch.cat(found).double().cpu().numpy()
    lengths = [segment.end - segment.start for segment in batch.segments]
    of_row_R = np.repeat(np.arange(len(lengths)), lengths)[batch.labels_N != IGNORE_INDEX]
    sums_SF = np.zeros((len(lengths), len(_COLUMNS)))
    np.add.at(sums_SF, of_row_R, values_RF)
    return sums_SF


def _of_chunk(base: SupervisedRows, tuned: SupervisedRows, rows: slice) -> torch.Tensor:
    labels_C = base.labels_R[rows]
    before_CV, after_CV = (F.log_softmax(side.logits(rows).float(), dim=-1) for side in (base, tuned))
    columns = (
        torch.ones_like(labels_C, dtype=torch.float32),
        -before_CV.gather(1, labels_C.unsqueeze(1)).squeeze(1),
        -after_CV.gather(1, labels_C.unsqueeze(1)).squeeze(1),
        F.kl_div(after_CV, before_CV, reduction="none", log_target=True).sum(1),
        (before_CV.argmax(1) == after_CV.argmax(1)).float(),
    )
    return torch.stack(columns, dim=1)
