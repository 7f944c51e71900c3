"""Micro-batches through a model: the loss of supervised tokens, and no logits of any other.

Shapes: N rows of the micro-batch, B samples, T tokens (padded), R supervised rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tuneloom.models.attention import BLOCKS, FLEX, is_packed, packed_for
from tuneloom.models.head_loss import head_loss
from tuneloom.types import IGNORE_INDEX, Layout, MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED, COMPILED = "packed", "flex"
"""Names of the paths that take samples end to end, by blocks of plain products and by a compiled kernel, where people choose:
other names are transformers' attention, with padded samples."""

_ATTENTIONS = {PACKED: BLOCKS, COMPILED: FLEX}


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Put a model, or the base of an adapted one, on an attention path."""
    model.set_attn_implementation(_ATTENTIONS.get(name, name))


def path_on(name: str, device: torch.device) -> str:
    """Return a path that computes on a device what the path `name` computes: the kernel is compiled for CUDA only."""
    return PACKED if name == COMPILED and device.type != "cuda" else name


def layout_of(model: PreTrainedModel, training: bool) -> Layout:
    """Return how samples must lie in the micro-batches of a model.

    With dropout each sample draws its own, so that what samples share is then stored for each.
    """
    if not is_packed(model.config._attn_implementation):
        return Layout.PADDED
    drops = training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return Layout.PACKED if drops else Layout.SHARED


def supervised_loss_sum(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Return the summed cross-entropy (nats) of the batch's supervised tokens, scalar, fp32 (fp64 of an fp64 model).

    The head sees the supervised rows only. Where it is a frozen linear layer whose output is the model's, their logits exist
    a chunk at a time; else (a trained head, a soft cap on logits) the model computes them.

    Raises:
        RuntimeError: the batch has shared prefixes, and the model takes padded samples.
    """
    inputs, rows_R, labels_R = _supervised(model, batch)
    head = model.get_output_embeddings()
    if not _is_frozen_linear(head) or getattr(model, _SHAPED, False):
        return _cross_entropy(_logits(model, inputs, rows_R), labels_R)
    hidden_RD, first_logits = _hidden(model, inputs, rows_R)
    if not hasattr(model, _SHAPED):
        with torch.no_grad():
            setattr(model, _SHAPED, not torch.equal(head(hidden_RD[:1]).view(-1), first_logits.view(-1)))
        if getattr(model, _SHAPED):
            return _cross_entropy(_logits(model, inputs, rows_R), labels_R)
    return head_loss(hidden_RD, head.weight, head.bias, labels_R)


_SHAPED = "_tuneloom_shapes_logits"
"""Name under which a model keeps whether it does more to its logits than its head does."""


def supervised_logits(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits_RV and labels_R of the supervised rows, in the order of the micro-batch."""
    inputs, rows_R, labels_R = _supervised(model, batch)
    return _logits(model, inputs, rows_R), labels_R


@dataclass(frozen=True)
class SupervisedRows:
    """A micro-batch's supervised rows, whose logits are made a chunk at a time where the head allows it.

    Attributes:
        labels_R: what each row predicts.
        rows_RX: what goes into the head, (R, D), or logits, (R, V), where there is no head.
        head: a frozen linear layer whose output is the model's; None where the model made the logits itself.
    """

    labels_R: torch.Tensor
    rows_RX: torch.Tensor
    head: nn.Linear | None

    @property
    def num_rows(self) -> int:
        return len(self.labels_R)

    def logits(self, rows: slice) -> torch.Tensor:
        """Return the logits_CV of some rows."""
        rows_CX = self.rows_RX[rows]
        return rows_CX if self.head is None else F.linear(rows_CX, self.head.weight, self.head.bias)


def supervised_rows(model: PreTrainedModel, batch: MicroBatch) -> SupervisedRows:
    """Run a model, and return its supervised rows in the order of the micro-batch."""
    inputs, rows_R, labels_R = _supervised(model, batch)
    head = model.get_output_embeddings()
    if _is_frozen_linear(head):
        hidden_RD, first_logits = _hidden(model, inputs, rows_R)
        if torch.equal(head(hidden_RD[:1]).view(-1), first_logits.view(-1)):
            return SupervisedRows(labels_R, hidden_RD, head)
    return SupervisedRows(labels_R, _logits(model, inputs, rows_R), None)


def _supervised(model: PreTrainedModel, batch: MicroBatch) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return what the model is called with, the supervised rows of its output, and what they predict."""
    inputs, places_N = _inputs(model, batch)
    labels_N = torch.from_numpy(batch.labels_N).to(model.device)
    rows_R = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    return inputs, rows_R if places_N is None else places_N[rows_R], labels_N[rows_R]


def _inputs(model: PreTrainedModel, batch: MicroBatch) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Return what the model is called with, and where row n of the batch is among its B x T rows (None: at n)."""
    device = model.device
    if is_packed(model.config._attn_implementation):
        packed = packed_for(model.config._attn_implementation, batch, device)
        added = (0, packed.num_rows - batch.num_rows)
        inputs = {
            "input_ids": torch.from_numpy(np.pad(batch.ids_N, added)).to(device).unsqueeze(0),
            "position_ids": torch.from_numpy(np.pad(batch.positions_N, added)).to(device).unsqueeze(0),
            "attention_mask": torch.empty((1, 1, 1, 1), device=device),  # handed on as it is, so none is made
            "packed": packed,
        }
        return inputs, None
    if any(segment.parent >= 0 for segment in batch.segments):
        raise RuntimeError("a micro-batch with shared prefixes for a model that takes padded samples")
    lengths = [segment.end - segment.start for segment in batch.segments]
    ids_BT = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    places_BT = np.arange(ids_BT.size).reshape(ids_BT.shape)
    kept_BT = np.arange(ids_BT.shape[1]) < np.array(lengths)[:, None]
    ids_BT[kept_BT] = batch.ids_N
    padded = {"input_ids": ids_BT, "attention_mask": kept_BT.astype(np.int64)}
    return {name: torch.from_numpy(array).to(device) for name, array in padded.items()}, torch.from_numpy(
        places_BT[kept_BT]
    ).to(device)


def _logits(model: PreTrainedModel, inputs: dict[str, Any], rows_R: torch.Tensor) -> torch.Tensor:
    """Run the model with the head given some rows only; return its logits_RV.

    Rows are picked by a hook on the head: whatever a family does to its logits afterwards is done as always.
    """

    def pick_rows(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_picked(args[0], rows_R), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick_rows)
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits


def _hidden(model: PreTrainedModel, inputs: dict[str, Any], rows_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model; return what goes into the head at some rows, (R, D), and the model's logits of the first of them."""
    found: list[torch.Tensor] = []

    def keep_rows(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(_picked(args[0], rows_R))
        return (found[0][:1].detach(), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_rows)
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return found[0], logits


def _picked(hidden_BTD: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, rows_R)


def _is_frozen_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())


def _cross_entropy(logits_RV: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    exact = torch.promote_types(logits_RV.dtype, torch.float32)
    return F.cross_entropy(logits_RV.to(exact), labels_R, reduction="sum")
