"""Loss on conversations that were not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tuneloom.data.plan import plan_step
from tuneloom.models.forward import layout_of, supervised_loss_sum
from tuneloom.types import MicroBatch, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats a supervised token, over `num_tokens` of them."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def heldout_loss(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    max_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeldOutLoss:
    """Return the loss over all samples' supervised tokens.

    Args:
        model: evaluated as it stands, dropout off.
        samples: at least one with a supervised token.
        max_tokens: token budget of a micro-batch.
        on_progress: called with (micro-batches done, all); may raise to stop.
    """
    plan = plan_step(samples, max_tokens, layout_of(model, training=False))
    total = math.fsum(losses_of(model, plan.micro_batches, on_progress))
    return HeldOutLoss(total / plan.num_supervised_tokens, plan.num_supervised_tokens)


def losses_of(
    model: PreTrainedModel, micro_batches: Sequence[MicroBatch], on_progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """Return the summed cross-entropy (nats) of each micro-batch, dropout off; see `heldout_loss`."""
    training = model.training
    model.eval()
    losses = []
    try:
        with torch.inference_mode():
            for done, batch in enumerate(micro_batches, 1):
                losses.append(float(supervised_loss_sum(model, batch)))
                if on_progress:
                    on_progress(done, len(micro_batches))
    finally:
        model.train(training)
    return losses
