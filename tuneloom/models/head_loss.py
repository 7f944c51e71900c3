"""The loss of a frozen linear head, whose logits become their own gradient in place, a chunk of rows at a time.

Two pieces of memory serve all chunks, since pages that are new at each of them cost more than what is computed on them. On a
CPU what is computed in fp32 is so for a few rows at a time, which stay in its caches.

Shapes: R supervised rows, V vocabulary, D hidden size, C rows of a chunk, S rows of a slice of it.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_ROWS = 256
"""Supervised rows whose logits exist at a time."""

SLICE_ROWS = 32
"""Rows of a chunk that are in fp32 at a time on a CPU (measured with 49,152 logits a row: 16 to 32 are the fastest)."""


def head_loss(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_R: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross-entropy (nats), scalar, fp32 (fp64 of fp64 rows).

    Args:
        hidden_RD: what goes into the head, in its format.
        weight_VD, bias_V: the head, frozen.
        labels_R: what each row predicts.
    """
    loss: torch.Tensor = _HeadLoss.apply(hidden_RD, weight_VD, bias_V, labels_R)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_R: torch.Tensor
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden_RD.dtype, torch.float32)
        chunk_rows = min(CHUNK_ROWS, len(labels_R))
        slice_rows = SLICE_ROWS if hidden_RD.device.type == "cpu" else CHUNK_ROWS
        logits_memory = hidden_RD.new_empty((chunk_rows, len(weight_VD)))
        exact_memory = None
        if exact != hidden_RD.dtype:
            exact_memory = logits_memory.new_empty((min(slice_rows, chunk_rows), len(weight_VD)), dtype=exact)
        total = hidden_RD.new_zeros((), dtype=exact)
        d_hidden_RD = torch.empty_like(hidden_RD) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels_R), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits_CV = _logits(hidden_RD[rows], weight_VD, bias_V, logits_memory)
            for logits_SV, labels_S in zip(
                torch.split(logits_CV, slice_rows), torch.split(labels_R[rows], slice_rows), strict=True
            ):
                total += _to_gradient(logits_SV, labels_S, exact_memory)
            if d_hidden_RD is not None:
                torch.mm(logits_CV, weight_VD, out=d_hidden_RD[rows])
        ctx.save_for_backward(d_hidden_RD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (d_hidden_RD,) = ctx.saved_tensors
        return d_hidden_RD * grads[0].to(d_hidden_RD.dtype), None, None, None


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, memory: torch.Tensor
) -> torch.Tensor:
    """Return logits_CV, which lie in `memory`."""
    out = memory[: len(hidden_CD)]
    if bias_V is None:
        return torch.mm(hidden_CD, weight_VD.t(), out=out)
    return torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=out)


def _to_gradient(logits_SV: torch.Tensor, labels_S: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """Make logits their gradient, in place; return their summed loss. What is between is in `memory`, in its format."""
    exact_SV = logits_SV if memory is None else memory[: len(labels_S)].copy_(logits_SV)
    labels_S1 = labels_S.unsqueeze(1)
    wanted_S1 = exact_SV.gather(1, labels_S1)
    largest_S1 = exact_SV.amax(1, keepdim=True)
    exps_SV = exact_SV.sub_(largest_S1).exp_()
    sums_S1 = exps_SV.sum(1, keepdim=True)
    gradient_SV = exps_SV.div_(sums_S1).scatter_add_(1, labels_S1, -torch.ones_like(wanted_S1))
    if memory is not None:
        logits_SV.copy_(gradient_SV)
    return (sums_S1.log() + largest_S1 - wanted_S1).sum()
