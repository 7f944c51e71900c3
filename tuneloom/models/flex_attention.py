"""Attention of samples that lie end to end by torch's FlexAttention: one fused kernel, compiled for a CUDA device.

The segments of a micro-batch (see `MicroBatch`) lie depth first: those below a segment follow it without a gap. What may attend
to row k are therefore the rows k to `until[k]`, the end of what lies below the segment of k, and no others: row q attends to k
iff k <= q < until[k], which is one load and two comparisons in the kernel. Which blocks of rows hold such pairs follows from
the least and the greatest `until` of a block, so that nothing of the micro-batch's size squared exists here either.

Rows are rounded up to whole blocks; a row that is added attends to itself alone, and none attends to it. The kernel is
compiled for one number of rows, then for any.

Without a CUDA device torch runs the same function uncompiled, and without gradients.

Shapes: N rows of the micro-batch, M rounded up, B blocks of them; H heads, K of keys and values, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tuneloom.types import MicroBatch, Segment

BLOCK_ROWS = 128
"""Rows of a block: what the kernel is told of at once."""

_MOST_KERNELS = 32
"""Variants that are compiled at most: with and without gradients, with and without a window, of one size and of any."""

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FlexAttention:
    """What attention needs to know of a micro-batch; made once for it, used by every layer.

    Args:
        batch: the micro-batch, its segments depth first.
        device: of the model.

    Attributes:
        num_rows: rows that the model is to be given, whole blocks of them.
    """

    def __init__(self, batch: MicroBatch, device: torch.device) -> None:
        num_added = -batch.num_rows % BLOCK_ROWS
        self.num_rows = batch.num_rows + num_added
        self._device = device
        own = np.arange(batch.num_rows, self.num_rows) + 1
        self._until_M = np.concatenate([_until(batch.segments), own]).astype(np.int32)
        self._positions_M = np.pad(batch.positions_N, (0, num_added)).astype(np.int32)
        self._longest = int(batch.positions_N.max()) + 1
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """Return which rows attend to which, in a sliding window where one is given that leaves any out."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._masks:
            self._masks[window] = self._made(window)
        return self._masks[window]

    def _made(self, window: int | None) -> BlockMask:
        some_BB, all_BB = _blocks(self._until_M)
        until_M = self._on_device(self._until_M)
        mask_mod = _attends(until_M)
        if window is not None:
            near_BB, inside_BB = _blocks_within(self._positions_M, window)
            some_BB, all_BB = some_BB & near_BB, all_BB & inside_BB
            positions_M = self._on_device(self._positions_M)
            mask_mod = _attends_within(until_M, positions_M, positions_M - window)
        part_BB = some_BB & ~all_BB
        maps = {"kv": part_BB, "full_kv": all_BB, "q": part_BB.T, "full_q": all_BB.T}
        tables = {name: self._listed(blocks_BB) for name, blocks_BB in maps.items()}
        return BlockMask(
            (self.num_rows, self.num_rows),
            *tables["kv"],
            *tables["full_kv"],
            *tables["q"],
            *tables["full_q"],
            BLOCK_SIZE=(BLOCK_ROWS, BLOCK_ROWS),
            mask_mod=mask_mod,
        )

    def _listed(self, blocks_BB: Bools) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many blocks each line has, (1, 1, B), and which, first in it, (1, 1, B, B)."""
        counts_B = blocks_BB.sum(1, dtype=np.int32)
        order_BB = np.argsort(~blocks_BB, axis=1, kind="stable").astype(np.int32)
        return self._on_device(counts_B[None, None]), self._on_device(order_BB[None, None])

    def _on_device(self, array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def attend(
        self,
        query_MHD: torch.Tensor,
        key_MKD: torch.Tensor,
        value_MKD: torch.Tensor,
        scaling: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """Return the attention's output, (M, H, D)."""
        by_heads = [each.transpose(0, 1).unsqueeze(0) for each in (query_MHD, key_MKD, value_MKD)]
        attention: Callable[..., torch.Tensor] = flex_attention
        if query_MHD.device.type == "cuda":
            attention = _compiled()
        output = attention(*by_heads, block_mask=self.mask(window), scale=scaling, enable_gqa=True)
        return output[0].transpose(0, 1)


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    """Return the kernel. What does not compile is an error: uncompiled it would hold all scores."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KERNELS)
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _until(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Return for each row the end of what lies below its segment, (N,)."""
    ends = [segment.end for segment in segments]
    sizes = [segment.end - segment.start for segment in segments]
    for number in reversed(range(len(segments))):
        segment = segments[number]
        assert sizes[number] == ends[number] - segment.start, "segments do not lie depth first"
        if segment.parent >= 0:
            ends[segment.parent] = max(ends[segment.parent], ends[number])
            sizes[segment.parent] += sizes[number]
    return np.repeat(ends, [segment.end - segment.start for segment in segments])


def _blocks(until_M: Ints) -> tuple[Bools, Bools]:
    """Return which blocks of queries attend to some row of which blocks of keys, and which to all, (B, B) each."""
    until_BP = until_M.reshape(-1, BLOCK_ROWS)
    firsts_B1 = np.arange(len(until_BP))[:, None] * BLOCK_ROWS
    before_BB = np.tri(len(until_BP), k=-1, dtype=np.bool_)
    some_BB = before_BB & (until_BP.max(1) > firsts_B1)
    all_BB = before_BB & (until_BP.min(1) >= firsts_B1 + BLOCK_ROWS)
    return some_BB | np.eye(len(until_BP), dtype=np.bool_), all_BB


def _blocks_within(positions_M: Ints, window: int) -> tuple[Bools, Bools]:
    """Return which blocks may hold pairs of rows in a sliding window, and which hold no others, (B, B) each."""
    positions_BP = positions_M.reshape(-1, BLOCK_ROWS)
    lowest_B, highest_B = positions_BP.min(1), positions_BP.max(1)
    return lowest_B[:, None] - highest_B < window, highest_B[:, None] - lowest_B < window


def _attends(until_M: torch.Tensor) -> MaskMod:
    def mask_mod(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query < until_M[key])

    return mask_mod


def _attends_within(until_M: torch.Tensor, positions_M: torch.Tensor, outside_M: torch.Tensor) -> MaskMod:
    """As `_attends`, in a window: `outside_M` is the last position that each row does not attend to any more."""

    def mask_mod(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query < until_M[key]) & (positions_M[key] > outside_M[query])

    return mask_mod
