"""The ways in which samples that lie end to end get their attention, as transformers is told of them.

A way is a class that is made once for a micro-batch and used by every layer; transformers knows each under a name, and hands
`packed=`, the object, through the model to it. Without `packed=` it is torch's fused attention, so that a model may generate
while it trains.

Shapes: N rows of the micro-batch; H heads, K of keys and values; D size of a head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuneloom.models.flex_attention import FlexAttention
from tuneloom.models.packed_attention import PackedAttention
from tuneloom.types import MicroBatch

BLOCKS, FLEX = "tuneloom_packed", "tuneloom_flex"


class Packed(Protocol):
    """What attention knows of a micro-batch.

    Attributes:
        num_rows: rows that the model is to be given, of which those of the micro-batch are the first.
    """

    num_rows: int

    def attend(
        self,
        query_NHD: torch.Tensor,
        key_NKD: torch.Tensor,
        value_NKD: torch.Tensor,
        scaling: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """Return the attention's output, (N, H, D)."""
        ...


def is_packed(attention: str) -> bool:
    """Whether transformers' name is one of an attention that takes samples end to end."""
    return attention in (BLOCKS, FLEX)


def packed_for(attention: str, batch: MicroBatch, device: torch.device) -> Packed:
    """Return what an attention, by transformers' name, is to know of a micro-batch."""
    return FlexAttention(batch, device) if attention == FLEX else PackedAttention(batch, device)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Do attention as transformers asks for it; query (1, H, N, D), key and value (1, K, N, D) -> (1, N, H, D).

    Raises:
        NotImplementedError: something is asked for that it cannot do.
    """
    if packed is None:
        if sliding_window is not None:
            more["sliding_window"] = sliding_window
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
        return output, None
    if more.get("dropout") or any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("dropout, soft caps, sinks and biases of attention")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_NHD, key_NKD, value_NKD = (each[0].transpose(0, 1) for each in (query, key, value))
    return packed.attend(query_NHD, key_NKD, value_NKD, scaling, sliding_window).unsqueeze(0), None


for _name in (BLOCKS, FLEX):
    AttentionInterface.register(_name, _attention_forward)
    AttentionMaskInterface.register(_name, sdpa_mask)
