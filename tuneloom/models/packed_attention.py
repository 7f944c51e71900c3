"""Attention of samples that lie end to end: each row attends to its own sample up to itself, shared prefixes included.

A segment (see `MicroBatch`) attends to the segments before it in its sample and, causally, to itself. Segments are cut into
blocks of rows; a block's keys are the rows before it in its sample and its own. Blocks of nearly one shape are computed
together, as plain matrix products in the format of the model with an fp32 softmax between them, in one autograd function that
keeps the probabilities. Nothing of the micro-batch's size squared exists, and what is masked behind a block is not computed.

Shapes: N rows of the micro-batch; H heads, K of keys and values, E = H / K; G blocks of a group, Q rows of a block, S keys of
a block; D size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tuneloom.types import MicroBatch, Segment

BLOCK_ROWS = 256
"""Most rows of a block. Shorter blocks compute less of what is masked; longer ones make fewer and larger products."""

_FINEST_ROWS = 8
"""Sizes are rounded up to multiples of an eighth of their power of two, at least of this, so that blocks are alike."""

Span = tuple[int, int]


@dataclass(frozen=True)
class _Block:
    """Rows `start` to `end` of a segment, and the spans of rows before them in their sample."""

    start: int
    end: int
    before: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def num_before(self) -> int:
        return sum(end - start for start, end in self.before)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and keys before them, rounded up."""
        return _rounded(self.num_rows), _rounded(self.num_before)


class _Group:
    """Blocks that are computed together: their own keys are the last Q; what they lack before them is padded in front.

    Args:
        blocks: of at most `rows` rows and `before` keys before them.
        device: of the model.
    """

    def __init__(self, blocks: Sequence[_Block], device: torch.device) -> None:
        self.blocks = tuple(blocks)
        self.num_rows = max(block.num_rows for block in blocks)
        self.num_before = max(block.num_before for block in blocks)
        queries_GQ = np.zeros((len(blocks), self.num_rows), dtype=np.int64)
        before_GP = np.zeros((len(blocks), self.num_before), dtype=np.int64)
        for queries_Q, before_P, block in zip(queries_GQ, before_GP, blocks, strict=True):
            queries_Q[: block.num_rows] = np.arange(block.start, block.end)
            for (start, end), place in self.places(block):
                before_P[place : place + end - start] = np.arange(start, end)
        self.query_rows = torch.from_numpy(queries_GQ.reshape(-1)).to(device)
        self.key_rows = torch.from_numpy(np.concatenate([before_GP, queries_GQ], axis=1).reshape(-1)).to(device)
        self.not_causal_QQ = torch.ones(self.num_rows, self.num_rows, dtype=torch.bool, device=device).triu_(1)
        self.alike = all(block.before == blocks[0].before for block in blocks)

    def places(self, block: _Block) -> Iterator[tuple[Span, int]]:
        """Yield the spans before a block, and where each begins among the block's keys."""
        place = self.num_before - block.num_before
        for start, end in block.before:
            yield (start, end), place
            place += end - start

    def outside(self, positions_N: torch.Tensor, window: int) -> torch.Tensor:
        """Return which keys lie further back than a sliding window, (G, 1, 1, Q, S)."""
        queries = positions_N[self.query_rows].view(len(self.blocks), 1, 1, self.num_rows, 1)
        keys = positions_N[self.key_rows].view(len(self.blocks), 1, 1, 1, -1)
        return queries - keys >= window


class PackedAttention:
    """What attention needs to know of a micro-batch; made once for it, used by every layer.

    Args:
        batch: the micro-batch.
        device: of the model.

    Attributes:
        num_rows: rows that the model is to be given.
    """

    def __init__(self, batch: MicroBatch, device: torch.device) -> None:
        self.num_rows = batch.num_rows
        alike: dict[tuple[int, int], list[_Block]] = {}
        for block in _blocks(batch.segments):
            alike.setdefault(block.shape, []).append(block)
        self.groups = tuple(_Group(blocks, device) for blocks in alike.values())
        back_N = np.empty(batch.num_rows, dtype=np.int64)
        place = 0
        for group in self.groups:
            for block in group.blocks:
                back_N[block.start : block.end] = np.arange(place, place + block.num_rows)
                place += group.num_rows
        self.back_N = torch.from_numpy(back_N).to(device)
        """Where each row of the micro-batch is among the rows of all groups."""
        self._positions_N = torch.from_numpy(batch.positions_N).to(device)
        self._longest = int(batch.positions_N.max()) + 1
        self._outside: dict[int, list[torch.Tensor]] = {}

    def outside(self, window: int | None) -> list[torch.Tensor] | None:
        """Return for each group which keys a sliding window leaves out; None where it leaves out none."""
        if window is None or window >= self._longest:
            return None
        if window not in self._outside:
            self._outside[window] = [group.outside(self._positions_N, window) for group in self.groups]
        return self._outside[window]

    def attend(
        self, query_NHD: torch.Tensor, key_NKD: torch.Tensor, value_NKD: torch.Tensor, scaling: float, window: int | None = None
    ) -> torch.Tensor:
        """Return the attention's output, (N, H, D)."""
        output: torch.Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
            query_NHD, key_NKD, value_NKD, self, scaling, self.outside(window)
        )
        return output


def _blocks(segments: Sequence[Segment]) -> Iterator[_Block]:
    """Cut segments into blocks."""
    chains: list[tuple[Span, ...]] = []
    for segment in segments:
        before = chains[segment.parent] if segment.parent >= 0 else ()
        chains.append((*before, (segment.start, segment.end)))
        num_blocks = math.ceil((segment.end - segment.start) / BLOCK_ROWS)
        cuts = np.linspace(segment.start, segment.end, num_blocks + 1).round().astype(int).tolist()
        for start, end in pairwise(cuts):
            own = ((segment.start, start),) if start > segment.start else ()
            yield _Block(start, end, (*before, *own))


def num_pairs(segments: Sequence[Segment]) -> int:
    """Return the pairs of rows that attention is computed for, and a share kept of, in each head."""
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for block in _blocks(segments):
        sizes.setdefault(block.shape, []).append((block.num_rows, block.num_before))
    widest = [(len(alike), *map(max, zip(*alike, strict=True))) for alike in sizes.values()]
    return sum(blocks * rows * (rows + before) for blocks, rows, before in widest)


def _rounded(size: int) -> int:
    """Round a size up so that few sizes remain, by less than an eighth where it is 64 or more."""
    step = max(_FINEST_ROWS, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class _Attend(torch.autograd.Function):
    """The products of all groups. Gradients of keys that several blocks use are summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NHD: torch.Tensor,
        key_NKD: torch.Tensor,
        value_NKD: torch.Tensor,
        packed: PackedAttention,
        scaling: float,
        outside: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        outputs, kept = [], []
        for number, group in enumerate(packed.groups):
            queries, keys, values = _gathered(group, query_NHD, key_NKD, value_NKD)
            scores = torch.bmm(queries.mul_(scaling), keys.transpose(1, 2))
            _mask(
                scores.view(len(group.blocks), -1, *_sizes(group, query_NHD, key_NKD)),
                group,
                outside[number] if outside else None,
            )
            shares = torch.softmax(scores, -1)
            _clear_padding(shares.view(len(group.blocks), -1, *_sizes(group, query_NHD, key_NKD)), group)
            outputs.append(_rows(torch.bmm(shares, values), group, query_NHD))
            kept.append(shares)
        ctx.save_for_backward(query_NHD, key_NKD, value_NKD, *kept)
        ctx.packed, ctx.scaling = packed, scaling
        return _joined(outputs, packed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query_NHD, key_NKD, value_NKD, *kept = ctx.saved_tensors
        packed: PackedAttention = ctx.packed
        d_queries, d_keys, d_values = [], [], []
        for group, shares in zip(packed.groups, kept, strict=True):
            queries, keys, values = _gathered(group, query_NHD, key_NKD, value_NKD)
            d_output = _by_heads(grads[0].index_select(0, group.query_rows), group, key_NKD.shape[1])
            d_values.append(torch.bmm(shares.transpose(1, 2), d_output))
            d_shares = torch.bmm(d_output, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
            d_queries.append(_rows(torch.bmm(d_scores, keys).mul_(ctx.scaling), group, query_NHD))
            d_keys.append(torch.bmm(d_scores.transpose(1, 2), queries.mul_(ctx.scaling)))
        d_query = _joined(d_queries, packed)
        return d_query, _summed(d_keys, packed, key_NKD), _summed(d_values, packed, value_NKD), None, None, None


def _sizes(group: _Group, query_NHD: torch.Tensor, key_NKD: torch.Tensor) -> tuple[int, int, int]:
    """Return (E, Q, S)."""
    return query_NHD.shape[1] // key_NKD.shape[1], group.num_rows, group.num_before + group.num_rows


def _by_heads(rows: torch.Tensor, group: _Group, num_key_heads: int) -> torch.Tensor:
    """Bring rows (G Q, H, D) to (G K, E Q, D)."""
    _, heads, size = rows.shape
    rows = rows.view(len(group.blocks), -1, num_key_heads, heads // num_key_heads, size).permute(0, 2, 3, 1, 4)
    return rows.reshape(len(group.blocks) * num_key_heads, -1, size)


def _gathered(
    group: _Group, query_NHD: torch.Tensor, key_NKD: torch.Tensor, value_NKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a group's queries (G K, E Q, D), keys and values (G K, S, D); the queries may be written to."""
    num_key_heads = key_NKD.shape[1]
    queries = _by_heads(query_NHD.index_select(0, group.query_rows), group, num_key_heads)
    keys = _by_heads(key_NKD.index_select(0, group.key_rows), group, num_key_heads)
    values = _by_heads(value_NKD.index_select(0, group.key_rows), group, num_key_heads)
    return queries, keys, values


def _mask(scores: torch.Tensor, group: _Group, outside: torch.Tensor | None) -> None:
    """Mask what is later, padded or outside of a sliding window. Scores: (G, K, E, Q, S)."""
    scores[..., group.num_before :].masked_fill_(group.not_causal_QQ, -math.inf)
    for of_block, block in zip(scores, group.blocks, strict=True):
        if block.num_before < group.num_before:
            of_block[..., : group.num_before - block.num_before] = -math.inf
    if outside is not None:
        scores.masked_fill_(outside, -math.inf)


def _clear_padding(shares: torch.Tensor, group: _Group) -> None:
    """Take out what padded rows would give to gradients. Shares: (G, K, E, Q, S)."""
    for of_block, block in zip(shares, group.blocks, strict=True):
        if block.num_rows < group.num_rows:
            of_block[..., block.num_rows :, :] = 0


def _rows(by_heads: torch.Tensor, group: _Group, like_NHD: torch.Tensor) -> torch.Tensor:
    """Bring (G K, E Q, D) back to rows (G Q, H, D)."""
    _, heads, size = like_NHD.shape
    num_key_heads = by_heads.shape[0] // len(group.blocks)
    split = by_heads.view(len(group.blocks), num_key_heads, heads // num_key_heads, -1, size)
    return split.permute(0, 3, 1, 2, 4).reshape(-1, heads, size)


def _joined(parts: list[torch.Tensor], packed: PackedAttention) -> torch.Tensor:
    """Return the groups' rows in the order of the micro-batch."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, packed.back_N)


def _summed(parts: list[torch.Tensor], packed: PackedAttention, like_NKD: torch.Tensor) -> torch.Tensor:
    """Return the gradient of keys or values, (N, K, D), from those of each group's keys, (G K, S, D)."""
    by_block = [part.view(len(group.blocks), -1, *part.shape[1:]) for part, group in zip(parts, packed.groups, strict=True)]
    own = [
        part[:, :, group.num_before :].transpose(1, 2).reshape(-1, *like_NKD.shape[1:])
        for part, group in zip(by_block, packed.groups, strict=True)
    ]
    total_NKD = _joined(own, packed)
    if not any(group.num_before for group in packed.groups):
        return total_NKD
    total_NKD = total_NKD.to(torch.promote_types(total_NKD.dtype, torch.float32))
    for part, group in zip(by_block, packed.groups, strict=True):
        if not group.num_before:
            continue
        blocks = group.blocks[:1] if group.alike else group.blocks
        parts_GKSD = part.sum(0, keepdim=True, dtype=total_NKD.dtype) if group.alike else part
        for of_block, block in zip(parts_GKSD, blocks, strict=True):
            for (start, end), place in group.places(block):
                total_NKD[start:end] += of_block[:, place : place + end - start].transpose(0, 1)
    return total_NKD.to(like_NKD.dtype)
