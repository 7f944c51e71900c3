"""A conversation to token ids and label mask, together, through the model's own chat template.

How: the template is rendered to text, and the text becomes ids piece by piece (`PieceEncoder`), so
that what somebody wrote is never a special token.

The mask needs the template to be prefix-stable where something is learnt: what the model is asked
with must begin the rendering of the whole, token by token, and so must what ends the answer. That
is proved for each supervised turn of each conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tuneloom.data.pieces import Encoded, PieceEncoder, Pieces
from tuneloom.data.row import RowError, Verbatim, json_excerpt
from tuneloom.errors import UserError
from tuneloom.types import Conversation, Message, Rendered, TrainOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHARS = 200_000
MAX_RENDERED_CHARS = 50_000_000

_MEND_BLANK = "take off blank space at the answer's start, or give this answer weight 0"
_MEND_REWRITTEN = "train on the last answer only (train_on: last_assistant), or give this answer weight 0"

_TAIL_CHARS = 12
"""So much of an answer's end must be in its turn; templates may take thinking from its beginning."""

Found = TypeVar("Found")
_Dicts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Turn:
    """Token positions of an assistant turn: its tokens are ids[start:end]."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A whole conversation's ids, and where assistant turns stand in them: those whose bounds were asked for."""

    ids: list[int]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class _Row:
    """A conversation to lay out: its messages and tools masked, and which of the messages are turns to find."""

    conversation: Conversation
    messages: _Dicts
    tools: _Dicts
    indices: list[int]

    def whole_and_uptos(self) -> list[_Dicts]:
        """Return all messages, and those up to and with each turn but a last one."""
        return [self.messages, *(self.messages[: i + 1] for i in self.indices if i + 1 < len(self.messages))]

    def prompts(self) -> list[_Dicts]:
        """Return the messages before each turn."""
        return [self.messages[:i] for i in self.indices]


@dataclass(frozen=True)
class _Whole:
    """A conversation rendered.

    ends_itself: whether the template ends it with a special token.
    uptos: the texts up to and with turns, by message.
    """

    row: _Row
    encoded: Encoded
    ends_itself: bool
    uptos: Mapping[int, str]


@dataclass(frozen=True)
class Batch:
    """Conversations rendered to text, to be encoded and laid out together (see `Renderer.begin`)."""

    train_on: TrainOn
    rows: list[_Row]
    texts: list[list[str] | RowError]
    prompts: list[list[str] | RowError]
    pieces: Pieces


class Renderer:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        UserError: the tokenizer has no chat template, or one that is too large or cannot be trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = tokenizer.chat_template
        if not template:
            raise UserError(
                "the model has no chat template",
                where=str(tokenizer.name_or_path),
                mend="use the chat (instruct) version of the model, or put its chat_template.jinja into the folder",
            )
        if len(str(template)) > MAX_TEMPLATE_CHARS:
            raise UserError("the chat template is too large", where=str(tokenizer.name_or_path), expected="under 200 kB")
        self.tokenizer = tokenizer
        self.depends_on_date = "strftime_now" in str(template)
        """Whether the template may write today's date: the same conversation then has other ids tomorrow."""
        self._encoder = PieceEncoder(tokenizer)
        self._turn_ends = _turn_ends(tokenizer)
        self.turn_end_id = self._find_turn_end()
        """The special token that the template ends an assistant turn with; None if it leaves that to the next role token."""

    # Text.

    def text(self, conversation: Conversation, *, generation_prompt: bool = False) -> str:
        """Return the template's text for a conversation, special tokens in content masked.

        Raises:
            RowError: the template refuses the conversation.
        """
        messages, tools = self._masked(conversation)
        return self._texts([messages], tools, generation_prompt)[0]

    def _masked(self, conversation: Conversation) -> tuple[_Dicts, _Dicts]:
        mask = self._encoder.masked
        messages = [
            mask(message.as_dict())
            if message.tool_calls or message.name or message.tool_call_id
            else {"role": message.role, "content": mask(message.content)}
            for message in conversation.messages
        ]
        return messages, mask(conversation.tools)

    def _texts(self, conversations: Sequence[_Dicts], tools: _Dicts, generation_prompt: bool) -> list[str]:
        """Render several conversations with the same tools at once, which costs the template's overhead once."""
        from jinja2 import TemplateError

        if not conversations:
            return []
        try:
            texts: list[str] = self.tokenizer.apply_chat_template(
                conversations, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            reason = (str(error).splitlines() or ["refused"])[0][:120]
            raise RowError(
                "row", Verbatim(reason), "the chat template refuses it", "see what roles and order the model takes"
            ) from error
        if (longest := max(map(len, texts))) > MAX_RENDERED_CHARS:
            raise RowError("row", Verbatim(f"{longest:,} characters"), "too large once rendered", "split the conversation")
        return texts

    def _texts_of_all(
        self, asked: Sequence[tuple[Sequence[_Dicts], _Dicts]], generation_prompt: bool
    ) -> list[list[str] | RowError]:
        """Render the conversations of several rows, each with its tools; together where that can be."""
        if not any(tools for _, tools in asked):
            try:
                texts = iter(self._texts([each for several, _ in asked for each in several], (), generation_prompt))
                return [list(islice(texts, len(several))) for several, _ in asked]
            except RowError:
                pass  # one of them: which, is found below
        found: list[list[str] | RowError] = []
        for several, tools in asked:
            try:
                found.append(self._texts(several, tools, generation_prompt))
            except RowError as error:
                found.append(error)
        return found

    # Tokens.

    def encode(self, text: str) -> list[int]:
        """Return the ids of rendered text: special tokens by name, everything else as plain text.

        Raises:
            RowError: content that only a special token can write.
        """
        return self._encoder.encode(text).ids

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return the ids that the model is given to answer a conversation.

        Raises:
            RowError: the template refuses the conversation.
        """
        return self.encode(self.text(conversation, generation_prompt=True))

    # Turns and mask.

    def layout(self, conversation: Conversation, train_on: TrainOn = TrainOn.ASSISTANT) -> Layout:
        """Return ids and the token spans of assistant turns, end token included.

        The spans are those of the turns that `train_on` supervises, each proved. With `all`, where nothing
        depends on them, they are those that can be had, and the last.

        A last turn that the template ends with no special token is ended by the tokenizer's eos token, an earlier one
        by the next role's token where the tokenizer names that as a turn's end (`turn_end_tokens`).

        Raises:
            RowError: the template refuses the conversation, or is not prefix-stable for a supervised turn of it.
        """
        batch = self.begin([conversation], train_on)
        [found] = self.finish(batch, self.encode_batch(batch))
        return _or_raise(found)

    # Many at once.

    def begin(self, conversations: Sequence[Conversation], train_on: TrainOn) -> Batch:
        """Render conversations to all the texts that laying them out needs; what the template refuses is kept as an error."""
        rows = [self._row(conversation, _supervised(conversation, train_on)) for conversation in conversations]
        at_once = [] if train_on is TrainOn.ALL else rows
        texts = self._texts_of_all([(row.whole_and_uptos(), row.tools) for row in at_once], generation_prompt=False)
        prompts = self._texts_of_all([(row.prompts(), row.tools) for row in at_once], generation_prompt=True)
        wholes = [each[0] for each in texts if not isinstance(each, RowError)]
        return Batch(train_on, rows, texts, prompts, self._encoder.split_all(wholes))

    def encode_batch(self, batch: Batch) -> dict[str, list[int]]:
        """Return the ids of a batch's pieces of text. Most of it needs no GIL, so it may run beside other work."""
        return self._encoder.encode_pieces(batch.pieces)

    def finish(self, batch: Batch, ids: Mapping[str, list[int]]) -> list[Layout | RowError]:
        """Return the layouts of a batch; where `layout` would raise, the error stands."""
        if batch.train_on is TrainOn.ALL:
            return [_or_error(partial(self._layout_of_all, row.conversation)) for row in batch.rows]
        joined = iter(self._encoder.join_all(batch.pieces, ids))
        encoded = [texts if isinstance(texts, RowError) else next(joined) for texts in batch.texts]
        every = zip(batch.rows, batch.texts, encoded, batch.prompts, strict=True)
        return [_or_error(partial(self._layout, *each)) for each in every]

    def _layout(
        self,
        row: _Row,
        texts: list[str] | RowError,
        encoded: Encoded | RowError,
        prompts: list[str] | RowError,
    ) -> Layout:
        whole = self._whole(row, _or_raise(encoded), _or_raise(texts)[1:])
        return Layout(whole.encoded.ids, tuple(map(partial(self._turn, whole), row.indices, _or_raise(prompts))))

    def render(self, conversation: Conversation, train_on: TrainOn = TrainOn.ASSISTANT) -> Rendered:
        """Return a conversation's ids and label mask.

        Raises:
            RowError: the template refuses it or is not prefix-stable for a supervised turn of it.
        """
        layout = self.layout(conversation, train_on)
        return Rendered(layout.ids, self.mask(conversation, layout, train_on))

    def mask(self, conversation: Conversation, layout: Layout, train_on: TrainOn) -> list[bool]:
        """Return which of a layout's tokens are supervised.

        Args:
            conversation: the one laid out.
            layout: made for `train_on`, or for `assistant`.
            train_on: which tokens are supervised.
        """
        supervised: list[bool] = self.mask_T(conversation, layout, train_on).tolist()
        return supervised

    def mask_T(self, conversation: Conversation, layout: Layout, train_on: TrainOn) -> NDArray[np.bool_]:
        """Return `mask` as an array."""
        mask_T = np.zeros(len(layout.ids), np.bool_)
        if train_on is TrainOn.ALL:
            mask_T[1:] = True
            return mask_T
        found = {turn.message: turn for turn in layout.turns}
        for message in _supervised(conversation, train_on):
            mask_T[found[message].start : found[message].end] = True
        return mask_T

    def _row(self, conversation: Conversation, indices: list[int]) -> _Row:
        messages, tools = self._masked(conversation)
        return _Row(conversation, messages, tools, indices)

    def _render_whole(self, conversation: Conversation, indices: list[int]) -> _Whole:
        row = self._row(conversation, indices)
        text, *uptos = self._texts(row.whole_and_uptos(), row.tools, False)
        return self._whole(row, self._encoder.encode(text), uptos)

    def _whole(self, row: _Row, encoded: Encoded, uptos: Sequence[str]) -> _Whole:
        """End a last turn with the eos token where the template does not."""
        if not row.messages:
            raise RowError("row", [], "no messages", "add a question and its answer")
        _, end = encoded.last_special(len(encoded.text))
        ends_itself = end > 0 and not encoded.text[end:].strip() and encoded.last_special_id() not in self._turn_ends
        eos = self.tokenizer.eos_token_id
        if eos is not None and not ends_itself and row.messages[-1]["role"] == "assistant":
            encoded.ids.append(eos)
        return _Whole(row, encoded, ends_itself, dict(zip(row.indices, uptos, strict=False)))

    def _turns(self, whole: _Whole) -> list[Turn]:
        """Return the turns that were asked for, having proved their bounds."""
        row = whole.row
        return list(map(partial(self._turn, whole), row.indices, self._texts(row.prompts(), row.tools, True)))

    def _turn(self, whole: _Whole, i: int, prompt: str) -> Turn:
        """Return the turn of message `i`, having proved that it begins where `prompt` ends, and where it ends."""
        start = self._prefix_tokens(prompt, whole.encoded, i)
        if i + 1 == len(whole.row.messages) and not whole.ends_itself:
            text, end = whole.encoded.text, len(whole.encoded.ids)
        else:
            text = self._turn_text(whole.uptos.get(i, whole.encoded.text), len(prompt), whole.encoded)
            end = self._prefix_tokens(text, whole.encoded, i)
            end += not whole.ends_itself and self._turn_ends.issuperset(whole.encoded.ids[end : end + 1])
        message, written = whole.row.conversation.messages[i], text[len(prompt) :]
        self._require_calls(message, written, i)
        if whole.row.messages[i]["content"].strip()[-_TAIL_CHARS:] not in written:
            raise RowError(
                f"message {i + 1}",
                message.content,
                "the chat template does not write the answer",
                "it is for other content than text; use a model whose chat template takes text",
            )
        return Turn(i, start, end)

    def _layout_of_all(self, conversation: Conversation) -> Layout:
        """Return ids, the turns whose bounds can be proved, and the last one anyway."""
        indices = list(conversation.turns())
        try:
            whole = self._render_whole(conversation, indices)
            return Layout(whole.encoded.ids, tuple(self._turns(whole)))
        except RowError:
            whole = self._render_whole(conversation, [])
        turns: list[Turn] = []
        for i in indices:
            self._require_calls(conversation.messages[i], whole.encoded.text, i)
            try:
                turns += self._turns(self._render_whole(conversation, [i]))
            except RowError:
                if i + 1 == len(conversation.messages):
                    turns.append(Turn(i, turns[-1].end if turns else 0, len(whole.encoded.ids)))
        return Layout(whole.encoded.ids, tuple(turns))

    def _turn_text(self, upto: str, start: int, whole: Encoded) -> str:
        """Return the text up to a turn's end: less what the template writes after the special token that ends it.

        That is blank space, or the special tokens with which some templates end the last turn of any conversation.
        """
        shared = len(upto) if whole.text.startswith(upto) else _shared_length(upto, whole.text)
        first, end = whole.last_special(shared)
        if first < start:
            return upto
        rest = upto[end:]
        closed = not rest.strip() or (shared < len(upto) and not self._encoder.without_specials(rest).strip())
        return upto[:end] if closed else upto

    def _prefix_tokens(self, prefix: str, whole: Encoded, message: int) -> int:
        """Return how many tokens `prefix` has, having proved that they begin the whole's."""
        count = self._encoder.prefix_tokens(prefix, whole)
        if count is not None:
            return count
        got, ids = self.encode(prefix), whole.ids
        at = next((i for i, (a, b) in enumerate(zip(got, ids, strict=False)) if a != b), min(len(got), len(ids)))
        alone, together = (self.tokenizer.decode(side[at : at + 1]) for side in (got, ids))
        raise RowError(
            f"message {message + 1}",
            Verbatim(f"token {at}: {json_excerpt(alone)} alone, {json_excerpt(together)} in the whole"),
            "the chat template is not prefix-stable here",
            _MEND_BLANK if whole.text.startswith(prefix) else _MEND_REWRITTEN,
        )

    def _require_calls(self, message: Message, text: str, index: int) -> None:
        """Refuse a turn whose tool calls the template leaves out: the model would learn to say nothing."""
        for call in message.tool_calls:
            name = self._encoder.masked(call.name)
            if name not in text and json.dumps(name, ensure_ascii=False)[1:-1] not in text:
                raise RowError(
                    f"message {index + 1}.tool_calls",
                    call.name,
                    "the chat template does not write tool calls",
                    "use a model whose chat template takes tools, or leave out conversations that call them",
                )

    def _find_turn_end(self) -> int | None:
        """Return the special token that ends an assistant turn, if the template has one."""
        probe = Conversation((Message("user", "a"), Message("assistant", "b")))
        try:
            whole = self._render_whole(probe, [1])
            [turn] = self._turns(whole)
        except RowError as error:
            raise UserError(
                "the model's chat template cannot be trained on",
                where=str(self.tokenizer.name_or_path),
                got=f"{error.reason}: {error.value}",
            ) from error
        ids = whole.encoded.ids
        if turn.end - turn.start <= (0 if whole.ends_itself or self.tokenizer.eos_token_id is None else 1):
            raise UserError(
                "the model's chat template cannot be trained on",
                where=str(self.tokenizer.name_or_path),
                got="it writes nothing for an answer",
            )
        return ids[turn.end - 1] if whole.ends_itself else None


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the special tokens that end the turn before them, as a tokenizer_config.json may name them."""
    named = tokenizer.init_kwargs.get("turn_end_tokens")
    specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(specials[name] for name in named if name in specials) if isinstance(named, list) else frozenset()


def _or_error(make: Callable[[], Layout]) -> Layout | RowError:
    try:
        return make()
    except RowError as error:
        return error


def _or_raise(found: Found | RowError) -> Found:
    if isinstance(found, RowError):
        raise found
    return found


def _supervised(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """Return the assistant messages that are supervised, where not everything is."""
    turns = list(conversation.turns())
    if train_on is TrainOn.LAST_ASSISTANT:
        turns = turns[-1:]
    return [i for i in turns if conversation.messages[i].weight]


def _shared_length(a: str, b: str) -> int:
    """Return how many characters two texts share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
