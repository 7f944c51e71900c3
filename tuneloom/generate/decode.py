"""Tokens to text as they come, never showing half a character, nor half a function call."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from tuneloom.generate.calls import may_be_call, read_call
from tuneloom.types import ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "�"
_WINDOW = 16

_ASSISTANT, _OBSERVATION = "<|assistant|>", "<|observation|>"
_OTHERS = ("<|user|>", _OBSERVATION)


def glm_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, frozenset[int]] | None:
    """Return a GLM's <|assistant|>, and the role tokens at which its chats stop; None for another family's tokenizer."""
    specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not {_ASSISTANT, _OBSERVATION} <= specials.keys():
        return None
    return specials[_ASSISTANT], frozenset(specials[name] for name in _OTHERS if name in specials)


def read_answer(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], assistant_id: int | None
) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text of an answer, blank space around it taken off, and the calls in it.

    Args:
        tokenizer: the model's.
        ids: what it wrote, less the token that ends it.
        assistant_id: a GLM's <|assistant|>, None for another family. It divides an answer into parts, each of which is
            text, or a function's name and the arguments for it.
    """
    texts, calls = [], []
    for part in _parts(ids, assistant_id):
        text = str(tokenizer.decode(part, skip_special_tokens=True))
        if assistant_id is not None and (call := read_call(text)):
            calls.append(call)
        else:
            texts.append(text.strip())
    return "\n".join(filter(None, texts)), tuple(calls)


def _parts(ids: Sequence[int], divider: int | None) -> Iterator[list[int]]:
    part: list[int] = []
    for token in ids:
        if token == divider:
            yield part
            part = []
        else:
            part.append(token)
    yield part


class IncrementalDecoder:
    """Decodes a stream of tokens.

    The text of a token can depend on those before it, so a window of tokens is decoded
    with and without the new one, and the difference is the new text. The window begins
    where text was shown, so never within a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._shown: list[list[int]] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now, often ""."""
        if token in self._stop_ids:
            return ""
        self._pending.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """Return what is left, a half character as the replacement sign."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        shown = [token for tokens in self._shown for token in tokens]
        before = self._decode(shown)
        whole = self._decode(shown + self._pending)
        if not self._pending or (whole.endswith(_HALF) and not final):
            return ""
        self._shown.append(self._pending)
        while sum(map(len, self._shown[1:])) >= _WINDOW:
            del self._shown[0]
        self._pending = []
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class GlmDecoder:
    """Decodes a GLM's answer as it comes: the text that `read_answer` gives, and nothing of a call.

    What may become a call is held back until it is one, or cannot be; blank space until text follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], assistant_id: int) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._assistant_id = assistant_id
        self._any_shown = False
        self._begin()

    def _begin(self) -> None:
        """Begin a part of the answer."""
        self._decoder = IncrementalDecoder(self._tokenizer, self._stop_ids)
        self._held = ""
        self._is_text = self._is_shown = False

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now, often ""."""
        if token == self._assistant_id:
            ended = self.finish()
            self._begin()
            return ended
        self._held += self._decoder.push(token)
        self._is_text = self._is_text or may_be_call(self._held) is False
        return self._show() if self._is_text else ""

    def finish(self) -> str:
        """Return what is left, a half character as the replacement sign."""
        self._held += self._decoder.finish()
        return self._show() if self._is_text or not read_call(self._held) else ""

    def _show(self) -> str:
        text = self._held if self._is_shown else self._held.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        between = "\n" if shown and self._any_shown and not self._is_shown else ""
        self._is_shown = self._is_shown or bool(shown)
        self._any_shown = self._any_shown or self._is_shown
        return between + shown
