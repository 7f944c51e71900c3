"""Conversations to samples: rendered, labelled, cut or dropped at the cutoff."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tuneloom.config import DataConfig
from tuneloom.data.render import Batch, Layout, Renderer
from tuneloom.data.row import RowError, Verbatim
from tuneloom.errors import UserError
from tuneloom.types import Conversation, Overflow, Sample


class Made(NamedTuple):
    """A sample, and what it was before the cutoff."""

    sample: Sample
    whole_tokens: int
    answer_tokens: int


def make_samples(conversations: Sequence[Conversation], config: DataConfig, renderer: Renderer) -> list[Made | RowError]:
    """Render conversations and cut them at the cutoff; a RowError stands where there is no sample.

    It says: the template refuses it, nothing is supervised, or nothing fits.

    Raises:
        UserError: one is too long and overflow is `error`.
    """
    batch = renderer.begin(conversations, config.train_on)
    return list(samples_of(batch, renderer.encode_batch(batch), config, renderer))


def samples_of(batch: Batch, ids: Mapping[str, list[int]], config: DataConfig, renderer: Renderer) -> Iterator[Made | RowError]:
    """Do the last part of `make_samples`, one by one, after `Renderer.begin` and `Renderer.encode_batch`."""
    for row, layout in zip(batch.rows, renderer.finish(batch, ids), strict=True):
        try:
            yield layout if isinstance(layout, RowError) else _sample(row.conversation, layout, config, renderer)
        except RowError as error:
            yield error


def _sample(conversation: Conversation, layout: Layout, config: DataConfig, renderer: Renderer) -> Made:
    mask_T = renderer.mask_T(conversation, layout, config.train_on)
    on = np.flatnonzero(mask_T)
    if not len(on):
        raise RowError(
            "weight", 0, "no answer to learn from", "give the last answer weight 1, or set data.train_on to assistant"
        )
    end = int(on[-1]) + 1
    ids_T = np.fromiter(layout.ids, np.int32, len(layout.ids))
    if end <= config.cutoff_len:
        return Made(Sample(ids_T[:end], mask_T[:end], conversation.location), end, len(on))
    _refuse_overflow(conversation, end, config)
    own_end = _own_end(renderer)
    fitting = [turn.end for turn in layout.turns if on[0] < turn.end <= config.cutoff_len - len(own_end)]
    if config.overflow is Overflow.DROP or not fitting:
        raise _too_long(layout.turns[0].start, end, len(on), config)
    cut = fitting[-1]
    ids_T = np.concatenate([ids_T[:cut], np.array(own_end, np.int32)])
    mask_T = np.concatenate([mask_T[:cut], np.ones(len(own_end), np.bool_)])
    return Made(Sample(ids_T, mask_T, conversation.location), end, len(on))


def _own_end(renderer: Renderer) -> list[int]:
    """Return what ends a turn that is now the last, where the template leaves that to the next message."""
    eos = renderer.tokenizer.eos_token_id
    return [] if renderer.turn_end_id is not None or eos is None else [eos]


def require_fitting_prompt(conversation: Conversation, config: DataConfig, renderer: Renderer) -> None:
    """Require that the prompt before the first answer leaves room for one.

    Raises:
        RowError: it fills the cutoff, or the template refuses it.
    """
    length = len(prompt_of_turn(conversation, renderer, 0))
    if length >= config.cutoff_len:
        raise _too_long(length, length, 0, config)


def prompt_of_turn(conversation: Conversation, renderer: Renderer, turn: int) -> list[int]:
    """Return the ids that a model is given to write an answer: the first, or with -1 the last.

    Raises:
        RowError: the template refuses it.
    """
    message = list(conversation.turns())[turn]
    return renderer.prompt_ids(replace(conversation, messages=conversation.messages[:message]))


def digest_of(conversation: Conversation) -> bytes:
    """Return 16 bytes that are equal for equal messages and tools."""
    parts = [f"{m.role}\x01{m.weight}\x01{m.content}\x01{m.tool_calls or ''}" for m in conversation.messages]
    tools = json.dumps(conversation.tools, sort_keys=True) if conversation.tools else ""
    return hashlib.blake2b("\x00".join([*parts, tools]).encode(), digest_size=16).digest()


def _refuse_overflow(conversation: Conversation, num_tokens: int, config: DataConfig) -> None:
    if config.overflow is Overflow.ERROR:
        raise UserError(
            "a conversation is longer than the cutoff",
            where=str(conversation.location),
            got=f"{num_tokens} tokens",
            expected=f"at most data.cutoff_len = {config.cutoff_len}",
            mend="raise data.cutoff_len, or set data.overflow to cut_at_turn or drop",
        )


def _too_long(prompt_tokens: int, num_tokens: int, answer_tokens: int, config: DataConfig) -> RowError:
    if prompt_tokens >= config.cutoff_len:
        value, reason = Verbatim(f"a prompt of {prompt_tokens} tokens"), "prompt longer than the cutoff"
        return RowError("row", value, reason, "raise data.cutoff_len", answer_tokens)
    mend = f"raise data.cutoff_len to {num_tokens}"
    return RowError("row", Verbatim(f"{num_tokens} tokens"), "longer than the cutoff", mend, answer_tokens)
