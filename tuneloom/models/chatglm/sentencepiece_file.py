"""A `tokenizer.model`: what stands in the file, checked for the switches that ChatGLM's has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.errors import UserError, excerpt

FILE = "tokenizer.model"

_LFS = b"version https://git-lfs"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
_KINDS = {_NORMAL: "normal", _UNKNOWN: "unknown", _CONTROL: "control", 4: "user-defined", 5: "unused", _BYTE: "byte"}
_FIRST = (_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256)
_COPY = "copy the model's own tokenizer.model again"


@dataclass(frozen=True)
class Pieces:
    """The pieces of a BPE vocabulary.

    Attributes:
        ids: every piece's id.
        scores: of those that text is made of; the pair with the highest is merged first.
    """

    ids: Mapping[str, int]
    scores: Mapping[str, float]

    def merges(self) -> list[tuple[str, str]]:
        """Return every pair of pieces that is one too, in the order of merging."""
        rows = [
            (-score, self.ids[piece], i, piece[:i], piece[i:])
            for piece, score in self.scores.items()
            for i in range(1, len(piece))
            if piece[:i] in self.scores and piece[i:] in self.scores
        ]
        return [(left, right) for *_, left, right in sorted(rows)]


def read_pieces(folder: Path) -> Pieces:
    """Read a folder's tokenizer.model.

    Raises:
        UserError: it is missing, a git-lfs pointer, torn, or not the kind of file that ChatGLM has.
    """
    file = folder / FILE
    model = _parsed(file)
    _check_switches(model, file)
    _check_kinds(model, file)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    if len(ids) < len(model.pieces) or "" in ids:
        raise UserError("a piece of the vocabulary stands there twice, or is empty", where=str(file), mend=_COPY)
    return Pieces(ids, {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL})


def _parsed(file: Path) -> Any:
    """Return the file's message, both its specs in it."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"the folder has no {FILE}, which ChatGLM's tokenizer is built from",
            where=str(file.parent),
            mend=f"copy {FILE} from where the model came from; its .py files are not needed",
        ) from None
    except OSError as error:
        raise UserError(f"{FILE} cannot be read", where=str(file), got=error.strerror, mend="check the file") from error
    if raw.startswith(_LFS):
        raise UserError(
            f"{FILE} is a git-lfs pointer, not the file itself",
            where=str(file),
            got=f"{len(raw)} bytes",
            mend="run `git lfs pull` in the folder, or download the file",
        )
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError as error:
        raise _torn(file, len(raw)) from error
    if not (model.pieces and model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise _torn(file, len(raw))
    return model


def _torn(file: Path, num_bytes: int) -> UserError:
    return UserError(f"{FILE} is torn, or no sentencepiece model", where=str(file), got=f"{num_bytes} bytes", mend=_COPY)


def _check_switches(model: Any, file: Path) -> None:
    """Require what the rules of this tokenizer rest on: any other switch would give other ids, silently."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    found = {
        "model type": (trainer.model_type, _BPE),
        "byte_fallback": (trainer.byte_fallback, True),
        "treat_whitespace_as_suffix": (trainer.treat_whitespace_as_suffix, False),
        "normalization": (bool(normalizer.precompiled_charsmap), False),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, True),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
        "denormalization": (bool(model.denormalizer_spec.precompiled_charsmap), False),
    }
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise UserError(
                f"{FILE} is not that of a ChatGLM: {name} differs",
                where=str(file),
                got=f"{name} {value}",
                expected=f"{name} {wanted}{' (BPE)' if name == 'model type' else ''}",
                mend=_COPY,
            )


def _check_kinds(model: Any, file: Path) -> None:
    """Require the unknown piece, two control pieces, the 256 bytes and then text."""
    kinds = [piece.type for piece in model.pieces]
    wanted = [*_FIRST, *[_NORMAL] * (len(kinds) - len(_FIRST))]
    wrong = next((i for i, pair in enumerate(zip(kinds, wanted, strict=False)) if pair[0] != pair[1]), None)
    if wrong is None and len(kinds) > len(_FIRST):
        return
    at = len(kinds) - 1 if wrong is None else wrong
    raise UserError(
        f"{FILE} is not that of a ChatGLM: its pieces are of other kinds",
        where=str(file),
        got=f"piece {at}, {excerpt(model.pieces[at].piece)}, is {_KINDS.get(kinds[at], 'of no known kind')}",
        expected="<unk>, <s>, </s>, 256 bytes, then normal pieces",
        mend=_COPY,
    )
