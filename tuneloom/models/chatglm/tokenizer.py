"""ChatGLM2's and ChatGLM3's tokenizer, built from the checkpoint's own tokenizer.model.

What a checkpoint brings beside that file is not read: its `.py` files cannot run on today's
transformers, and its chat template is for the tokenizer that they make. Each text between special
tokens is encoded on its own with a blank put before it, as the sentencepiece library does.

`sop` and `eop` are called `<sop>` and `<eop>`: special tokens of their old names would be found in
the middle of words (people, isopropyl).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.errors import UserError, excerpt
from tuneloom.models.chatglm.config import EOS_ID, PAD_ID
from tuneloom.models.chatglm.sentencepiece_file import FILE, Pieces, read_pieces
from tuneloom.rundir import read_json_map

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_BLANK = "▁"
_PREFIX = ("[gMASK]", "<sop>")
_MARKS = ("[MASK]", *_PREFIX[:1], "[sMASK]", *_PREFIX[1:], "<eop>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_TURN_ENDS = ("<|user|>", "<|observation|>")
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"

_NORMALIZER: dict[str, Any] = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _BLANK},
        {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK},
    ],
}


def special_ids(num_pieces: int, *, roles: bool = True) -> dict[str, int]:
    """Return the ids of the special tokens that stand behind the pieces of text.

    Args:
        num_pieces: of tokenizer.model.
        roles: whether the model has tokens for roles; ChatGLM2 has none.
    """
    names = (*_MARKS, *_ROLES) if roles else _MARKS
    return {name: num_pieces + i for i, name in enumerate(names)}


def chat_stop_ids(folder: Path) -> list[int]:
    """Return the tokens at which a model of the original layout stops in a chat.

    They are the end of text and the roles that another speaks in. Without a tokenizer.model, or for ChatGLM2, it is
    the former alone.

    Raises:
        UserError: tokenizer.model is not what it must be.
    """
    if not has_roles(folder) or not (folder / FILE).is_file():
        return [EOS_ID]
    ids = special_ids(len(read_pieces(folder).ids))
    return [EOS_ID, *(ids[name] for name in _TURN_ENDS)]


def has_roles(folder: Path) -> bool:
    """Whether the model has tokens for roles, as ChatGLM3 does; ChatGLM2 is told by the name it goes by."""
    names = (str(read_config(folder).get("_name_or_path", "")), folder.name)
    return not any("chatglm2" in name.lower() for name in names)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json, {} where there is none that can be read."""
    return read_json_map(folder / "config.json") or {}


def needs_building(folder: Path) -> bool:
    """Whether the tokenizer of a folder in the original layout is to be built from tokenizer.model.

    That is not so where one that was built is saved there, and tokenizer.model is not.
    """
    return (folder / FILE).is_file() or (read_json_map(folder / "tokenizer.json") or {}).get("normalizer") != _NORMALIZER


def build_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Build the fast tokenizer of a folder in the original layout, chat template and all.

    Raises:
        UserError: tokenizer.model is missing, torn, of another kind, or of another model than config.json.
    """
    from transformers import PreTrainedTokenizerFast

    pieces = read_pieces(folder)
    roles = has_roles(folder)
    specials = special_ids(len(pieces.ids), roles=roles)
    _check(pieces, specials, folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(pieces, specials),
        name_or_path=str(folder),
        unk_token=_UNKNOWN,
        pad_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[*specials],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        turn_end_tokens=[*_ROLES] if roles else [],
    )
    template = "chatglm3.jinja" if roles else "chatglm2.jinja"
    tokenizer.chat_template = files(__package__).joinpath(template).read_text(encoding="utf-8")
    return tokenizer


def _backend(pieces: Pieces, specials: Mapping[str, int]) -> Tokenizer:
    """Return the engine: the same ids as sentencepiece's for each text, and the model's prefix before a plain one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = models.BPE(dict(pieces.ids), pieces.merges(), unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    named = (_UNKNOWN, _BEGIN, _END, *specials)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in named])
    prefix = " ".join(_PREFIX)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A",
        pair=f"{prefix} $A $B {_END}",
        special_tokens=[*((name, specials[name]) for name in _PREFIX), (_END, EOS_ID)],
    )
    return backend


def _check(pieces: Pieces, specials: Mapping[str, int], folder: Path) -> None:
    """Require the pieces that the ids stand for, and a vocabulary that fits the model's."""
    first = [*pieces.ids][: EOS_ID + 1]
    taken = [name for name in specials if name in pieces.ids]
    if first[PAD_ID] != _UNKNOWN or first[1:] != [_BEGIN, _END] or taken:
        raise UserError(
            f"{FILE} is not that of a ChatGLM: its first pieces, or the names of special tokens, are other ones",
            where=str(folder / FILE),
            got=excerpt(first + taken),
            expected=f"{_UNKNOWN}, {_BEGIN}, {_END} first, and no piece called like a special token",
            mend="copy the model's own tokenizer.model again",
        )
    size, needed = read_config(folder).get("padded_vocab_size"), max(specials.values()) + 1
    if isinstance(size, int) and size < needed:
        raise UserError(
            f"{FILE} has more tokens than the model",
            where=str(folder / FILE),
            got=f"{needed} tokens, special ones included",
            expected=f"at most {size} (padded_vocab_size of config.json)",
            mend=f"config.json and {FILE} must come from the same model",
        )
