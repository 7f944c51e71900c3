"""The label view: a row as the model sees it, token by token, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tuneloom.config import DataConfig
from tuneloom.data.conversations import ConversationReader
from tuneloom.data.render import Renderer
from tuneloom.data.report import SourceReport
from tuneloom.data.row import RowError
from tuneloom.data.samples import Made, make_samples
from tuneloom.types import Conversation

_MAX_JOINED = 8


@dataclass(frozen=True)
class TokenView:
    """One token; or several that only together are characters.

    Attributes:
        text: what it writes.
        ids: its ids.
        position: of the first in the sample, from 0.
        supervised: whether it enters the loss.
        special: whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    supervised: bool
    special: bool


@dataclass(frozen=True)
class RowView:
    """A row as chat and as tokens.

    Attributes:
        number: of the row among the readable ones, from 1.
        conversation: as chat.
        tokens: of the sample, after the cutoff.
        num_cut_tokens: what the cutoff took off.
        error: why it makes no sample; `tokens` are empty then.
    """

    number: int
    conversation: Conversation
    tokens: list[TokenView]
    num_cut_tokens: int = 0
    error: RowError | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(token.ids) for token in self.tokens)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(len(token.ids) for token in self.tokens if token.supervised)


def view_rows(reader: ConversationReader, report: SourceReport, config: DataConfig, renderer: Renderer) -> Iterator[RowView]:
    """Yield the rows of a source that can be read, as they are taught; those that cannot are told to the report."""
    for read in reader.read(report):
        number = read.row + 1
        [made] = make_samples([read.conversation], config, renderer)
        if isinstance(made, RowError):
            yield RowView(number, read.conversation, [], error=made)
        else:
            yield _row_view(number, read.conversation, made, renderer)


def _row_view(number: int, conversation: Conversation, made: Made, renderer: Renderer) -> RowView:
    sample = made.sample
    tokens = token_views(sample.ids_T.tolist(), sample.mask_T.tolist(), renderer.tokenizer)
    return RowView(number, conversation, tokens, made.whole_tokens - sample.num_tokens)


def token_views(ids: Sequence[int], mask: Sequence[bool], tokenizer: Any) -> list[TokenView]:
    """Return tokens with their text; those that are parts of one character are joined.

    A token is decoded behind the one before it, since some tokenizers take off a text's first blank.
    """
    special_ids = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    views: list[TokenView] = []
    start = 0
    for end in range(1, len(ids) + 1):
        before = list(ids[max(0, start - 1) : start])
        text = _decoded(tokenizer, [*before, *ids[start:end]])[len(_decoded(tokenizer, before)) :]
        torn = "\ufffd" in text and end < len(ids) and end - start < _MAX_JOINED
        if torn and mask[end] == mask[start] and ids[end] not in special_ids:
            continue
        views.append(TokenView(text, tuple(ids[start:end]), start, mask[start], ids[start] in special_ids))
        start = end
    return views


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
