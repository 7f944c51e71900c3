"""Rendered text becomes ids piece by piece; comparing a prefix at its border alone tells what comparing it wholly does."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from tuneloom.data.pieces import Encoded, PieceEncoder

# Names that begin one another, and one that begins with another's end.
SPECIALS = ("<pad>", "<a>", "<a>b", ">x<", "\n<c>")


STRIPS: dict[str, dict[str, dict[str, bool]]] = {
    "plain": {},
    "after": {"<a>": {"rstrip": True}, ">x<": {"rstrip": True}},
    "before": {"<a>": {"lstrip": True}, "\n<c>": {"lstrip": True}},
    "both": {name: {"lstrip": True, "rstrip": True} for name in SPECIALS},
}


@cache
def encoder(kind: str) -> PieceEncoder:
    """An encoder of a tokenizer whose tokens grow across blanks and line ends, some of the special ones taking those beside."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(make_tokenizer(specials=SPECIALS, eos="<a>", vocab_size=400).backend_tokenizer.to_str())
    for left, right in (("Ċ", "Ċ"), ("Ġ", "Ġ"), ("b", "b"), ("bb", "b")):
        if left + right not in state["model"]["vocab"]:
            state["model"]["vocab"][left + right] = len(state["model"]["vocab"])
            state["model"]["merges"].append([left, right])
    for token in state["added_tokens"]:
        token.update(STRIPS[kind].get(token["content"], {}))
    return PieceEncoder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<a>"))


EVERY = pytest.mark.parametrize("kind", STRIPS)
TEXTS = st.lists(st.sampled_from([*SPECIALS, "b", "bb", " ", "\n", "<", "a>", "x", "你"]), max_size=8).map("".join)


def in_full(encode: PieceEncoder, prefix: str, whole: Encoded) -> int | None:
    """Encode the prefix wholly, and compare it with the whole's beginning."""
    ids = encode.encode(prefix).ids
    return len(ids) if whole.text.startswith(prefix) and whole.ids[: len(ids)] == ids else None


@EVERY
@given(text=TEXTS, length=st.integers(0, 24))
@example(text="<a>b", length=3)
@example(text="b<a>bb", length=4)
@example(text="x \n<c> b", length=2)
@example(text="<a>  b", length=4)
@example(text="bbbb", length=2)
def test_the_border_alone_tells_what_the_whole_prefix_tells(kind: str, text: str, length: int) -> None:
    encode = encoder(kind)
    whole = encode.encode(text)
    assert encode.prefix_tokens(text[:length], whole) == in_full(encode, text[:length], whole)


@EVERY
@given(text=TEXTS, other=TEXTS)
@example(text="bb", other="b")
@example(text="", other="")
def test_a_text_that_is_no_prefix_is_told(kind: str, text: str, other: str) -> None:
    encode = encoder(kind)
    whole = encode.encode(text)
    assert encode.prefix_tokens(other, whole) == in_full(encode, other, whole)


def test_both_answers_occur() -> None:
    encode = encoder("plain")
    assert encode.prefix_tokens("x<a>", encode.encode("x<a> b")) == 2
    assert encode.prefix_tokens("x<a>", encode.encode("x<a>b")) is None
    assert encode.prefix_tokens("<pad>b", encode.encode("<pad>bb")) is None
    assert encode.prefix_tokens("<pad>b", encode.encode("<pad>bx")) == 2


@EVERY
@given(text=TEXTS)
def test_parts_tell_where_the_special_tokens_stand(kind: str, text: str) -> None:
    whole = encoder(kind).encode(text)
    for start, end, token in zip(whole.starts, whole.ends, whole.tokens, strict=True):
        special = whole.text[start:end]
        assert special in ("", *SPECIALS)
        assert not special or whole.ids[token] == SPECIALS.index(special)
    assert sum(i < len(SPECIALS) for i in whole.ids) == sum(
        end > start for start, end in zip(whole.starts, whole.ends, strict=True)
    )


@pytest.mark.parametrize("content", ["<a>b", [{"<a>": ("x", ">x<")}], {"n": 1, "deep": [None, True, "\U000f0000<pad>"]}])
def test_what_is_masked_holds_no_name_and_comes_back_as_text(content: Any) -> None:
    encode = encoder("plain")
    masked = json.dumps(encode.masked(content), ensure_ascii=False)
    assert not any(name in masked for name in SPECIALS)
    ids = encode.encode(masked).ids
    assert all(i >= len(SPECIALS) for i in ids)
    assert encode._backend.decode(ids) == json.dumps(content, ensure_ascii=False)


def test_a_tokenizer_that_was_asked_to_pad_or_to_cut_still_gives_every_text_its_own_ids() -> None:
    tokenizer = make_tokenizer()
    texts = ["Hi", "<|im_start|>user\n你好，今天天气很好。<|im_end|>"]
    expected = [PieceEncoder(tokenizer).encode(text).ids for text in texts]
    tokenizer(texts, padding=True, truncation=True, max_length=8)
    encoder = PieceEncoder(tokenizer)
    pieces = encoder.split_all(texts)
    joined = encoder.join_all(pieces, encoder.encode_pieces(pieces))
    assert [encoded.ids for encoded in joined if isinstance(encoded, Encoded)] == expected
