"""Rendered text to token ids: special tokens by name, everything between them as plain text.

That is what a tokenizer does by itself, with one difference that matters: a special token's name
inside somebody's message or tool is masked before rendering, so content can never become one.
Where every special token stands is kept, so that a prefix of the text costs only its last piece.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneloom.data.row import RowError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MASK = "\U000f0000"  # private use: begins the stand-in of a special token's name, and of itself, in content
_FIRST_NUMBER = 0xF0001  # private use: what follows it, by the name's number
_ANCHOR = "\x00\x01\x00"  # an added token of our own copy of the tokenizer
_NOT_FIRST = "\x00"
_CACHED_PIECES = 4096  # and as many older ones
_CACHED_CHARS = 200


@dataclass
class Encoded:
    """A text's ids, and where its parts begin: a special token (none before the first) and the text after it.

    Part k's special token is text[starts[k]:ends[k]], and its first token is ids[tokens[k]].
    """

    text: str
    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def part_at(self, length: int) -> int:
        """Return the last part whose special token lies whole in the first `length` characters; -1 if there is none."""
        return bisect_right(self.ends, length) - 1

    def last_special(self, length: int) -> tuple[int, int]:
        """Return start and end of the last special token whole in the first `length` characters; (-1, -1) if there is none."""
        k = self.part_at(length)
        return (self.starts[k], self.ends[k]) if k >= 0 and self.ends[k] > self.starts[k] else (-1, -1)

    def last_special_id(self) -> int | None:
        """Return the last special token; None if there is none."""
        return self.ids[self.tokens[-1]] if self.ends and self.ends[-1] > self.starts[-1] else None


_Part = tuple[str, int, int, str]
"""Special token or "", its start, its end, and the key of the text after it."""


@dataclass(frozen=True)
class Pieces:
    """Texts split at their special tokens, and the pieces whose ids are not known yet, by key."""

    texts: Sequence[str]
    parts: list[list[_Part]]
    missing: Mapping[str, str]


class PieceEncoder:
    """Masks content, and encodes rendered text, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        specials = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._backend = _literal_backend(tokenizer)
        self._ids = {name: i for name, (i, _) in specials.items()}
        self._takes_before = {name for name, (_, token) in specials.items() if token.lstrip}
        self._takes_after = {name for name, (_, token) in specials.items() if token.rstrip}
        self.special_ids = frozenset(self._ids.values())
        self._never_content = (self.special_ids | {self._backend.token_to_id(_ANCHOR)}) - {tokenizer.unk_token_id}
        self._names = [*sorted(specials, key=len, reverse=True), _MASK]
        self._beginnings = "".join({name[0] for name in self._names})
        self._special = re.compile("|".join(map(re.escape, self._names[:-1])) or r"(?!)")
        self._to_mask = re.compile("|".join(map(re.escape, self._names)))
        self._stand_ins = {name: _MASK + chr(_FIRST_NUMBER + number) for number, name in enumerate(self._names)}
        self._pieces: dict[str, list[int]] = {}
        self._older_pieces: dict[str, list[int]] = {}

    def masked(self, content: Any) -> Any:
        """Mask special tokens' names in text, or in every text of maps and lists."""
        if isinstance(content, str):
            if not any(character in content for character in self._beginnings):
                return content
            return self._to_mask.sub(lambda match: self._stand_ins[match.group()], content)
        if isinstance(content, Mapping):
            return {self.masked(key): self.masked(value) for key, value in content.items()}
        return [self.masked(item) for item in content] if isinstance(content, (list, tuple)) else content

    def _unmasked(self, piece: str) -> str:
        if _MASK not in piece:
            return piece
        return re.sub(f"{_MASK}(.)", lambda match: self._names[ord(match[1]) - _FIRST_NUMBER], piece)

    def without_specials(self, text: str) -> str:
        """Return rendered text less its special tokens."""
        return self._special.sub("", text)

    def encode(self, text: str) -> Encoded:
        """Return the ids of rendered text.

        Raises:
            RowError: content that only a special token can write.
        """
        return self._encoded(text, self._split(text), {})

    def split_all(self, texts: Sequence[str]) -> Pieces:
        """Split rendered texts, to be encoded together."""
        parts = [list(self._split(text)) for text in texts]
        missing = {
            key: self._plain(_piece(key, not special), not special)
            for each in parts
            for special, _, _, key in each
            if key and self._recalled(key) is None
        }
        return Pieces(texts, parts, missing)

    def encode_pieces(self, pieces: Pieces) -> dict[str, list[int]]:
        """Return the ids of pieces that are not known yet. Most of it needs no GIL, so it may run beside other work."""
        encodings = self._backend.encode_batch_fast(list(pieces.missing.values()), add_special_tokens=False)
        names = zip(pieces.missing, encodings, strict=True)
        return {key: encoding.ids[key.startswith(_NOT_FIRST) :] for key, encoding in names}

    def join_all(self, pieces: Pieces, known: Mapping[str, list[int]]) -> list[Encoded | RowError]:
        """Return the ids of the texts that were split, or why there are none."""
        found: list[Encoded | RowError] = []
        for text, parts in zip(pieces.texts, pieces.parts, strict=True):
            try:
                found.append(self._encoded(text, parts, known))
            except RowError as error:
                found.append(error)
        return found

    def _encoded(self, text: str, parts: Iterable[_Part], known: Mapping[str, list[int]]) -> Encoded:
        encoded = Encoded(text)
        ids, starts, ends, tokens = encoded.ids, encoded.starts, encoded.ends, encoded.tokens
        for special, start, end, key in parts:
            starts.append(start)
            ends.append(end)
            tokens.append(len(ids))
            if special:
                ids.append(self._ids[special])
            if key:
                ids += self._encode_piece(key, not special, known)
        return encoded

    def prefix_tokens(self, prefix: str, whole: Encoded) -> int | None:
        """Return how many tokens a prefix of a text has; None if it is none, or its own tokens do not begin the text's.

        A special token that lies whole in the prefix is one there too, so all before the last of them is the same:
        what is after it is encoded and compared.
        """
        if not whole.text.startswith(prefix):
            return None
        k = whole.part_at(len(prefix))
        start, token = (whole.starts[k], whole.tokens[k]) if k >= 0 else (0, 0)
        if k >= 0 and start < whole.ends[k] == len(prefix):
            return token + 1
        border = self.encode(prefix[start:]).ids
        end = token + len(border)
        return end if whole.ids[token:end] == border else None

    def _split(self, text: str) -> Iterator[_Part]:
        """Yield the parts; of the text after a special token, the blanks that tokens beside it take are left out."""
        special, start, at = "", 0, 0
        for match in self._special.finditer(text):
            (begins, ends), after = match.span(), match.group()
            if special or begins > at:
                yield special, start, at, _key(self._stripped(special, text[at:begins], after), not special)
            special, start, at = after, begins, ends
        yield special, start, at, _key(self._stripped(special, text[at:], ""), not special)

    def _stripped(self, before: str, piece: str, after: str) -> str:
        piece = piece.rstrip() if after in self._takes_before else piece
        return piece.lstrip() if before in self._takes_after else piece

    def _encode_piece(self, key: str, first: bool, known: Mapping[str, list[int]]) -> list[int]:
        """Encode text between special tokens, as the tokenizer does when it stands there."""
        ids = self._recalled(key)
        if ids is None:
            ids = self._only_content(known[key] if key in known else self._encode_plain(_piece(key, first), first))
            if len(key) <= _CACHED_CHARS:
                self._remember(key, ids)
        return ids

    def _recalled(self, key: str) -> list[int] | None:
        ids = self._pieces.get(key)
        if ids is None and (ids := self._older_pieces.get(key)) is not None:
            self._remember(key, ids)
        return ids

    def _remember(self, key: str, ids: list[int]) -> None:
        """Keep ids; the older half of what is kept is forgotten, but for what was asked for since."""
        if len(self._pieces) >= _CACHED_PIECES:
            self._older_pieces, self._pieces = self._pieces, {}
        self._pieces[key] = ids

    def _plain(self, piece: str, first: bool) -> str:
        """Return a piece unmasked, behind a token unless first, so that no text's start is marked in the middle."""
        plain = self._unmasked(piece)
        return plain if first else _ANCHOR + plain

    def _encode_plain(self, piece: str, first: bool) -> list[int]:
        ids: list[int] = self._backend.encode(self._plain(piece, first), add_special_tokens=False).ids
        return ids if first else ids[1:]

    def _only_content(self, ids: list[int]) -> list[int]:
        if not self._never_content.isdisjoint(ids):
            name = self._backend.id_to_token(next(i for i in ids if i in self._never_content))
            raise RowError("row", name, "text that only a special token can write", "take it out of the text")
        return ids


def _key(piece: str, first: bool) -> str:
    """Return what a piece's ids are kept by; "" of an empty one."""
    return piece if first or not piece else _NOT_FIRST + piece


def _piece(key: str, first: bool) -> str:
    return key if first else key[len(_NOT_FIRST) :]


def _literal_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer's engine that takes special tokens' names for plain text, and knows `_ANCHOR`.

    It neither pads nor cuts, as the engine does once the tokenizer was asked to.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    backend.add_tokens([AddedToken(_ANCHOR, normalized=False)])
    return backend
