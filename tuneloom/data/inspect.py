"""A first pass over a data file: its content hash, its encoding, whether anything is in it."""

from __future__ import annotations

import codecs
import hashlib
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tuneloom.errors import UserError

BINARY_SUFFIXES = (".parquet", ".arrow")
_CHUNK_BYTES = 1 << 20
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NUL_SHARE = 0.05
_BROKEN_SHARE = 0.001
_COMMON_SHARE = 0.25
_BROKEN = re.compile("[\udc80-\udcff]+")
_WIDE = re.compile("[^\x00-\x7f\udc80-\udcff]+")


@dataclass(frozen=True)
class Inspected:
    """What a file is, before its rows are read.

    Attributes:
        sha256: of its bytes.
        num_bytes: of the file.
        encoding: Python's name; None for a binary format.
        blank: nothing but blanks is in it.
    """

    sha256: str
    num_bytes: int
    encoding: str | None
    blank: bool


def inspect_file(shown: str, file: Path) -> Inspected:
    """Read a file once, chunk by chunk.

    Text is UTF-8 (with a byte order mark or without) or GB18030. A UTF-8 file with a few broken
    bytes is still UTF-8: the rows that hold them are reported, and no character is guessed.

    Raises:
        UserError: the file cannot be read, or is in no known encoding.
    """
    digest = hashlib.sha256()
    binary = file.suffix.lower() in BINARY_SUFFIXES
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    num_bytes = num_nul = wide = broken = 0
    blank = True
    mark = None
    try:
        with open(file, "rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                if not num_bytes and not binary and (mark := _mark(chunk)) and mark != "utf-8-sig":
                    raise _unknown(shown, mark.upper())
                num_bytes += len(chunk)
                digest.update(chunk)
                if binary:
                    blank = False
                    continue
                num_nul += chunk.count(0)
                text = decoder.decode(chunk)
                blank = blank and not text.strip("\ufeff \t\r\n")
                if not text.isascii():
                    broken_here = _BROKEN.findall(text)
                    broken += len(broken_here)
                    wide += len(text) - len(text.encode("ascii", "ignore")) - sum(map(len, broken_here))
    except OSError as error:
        raise UserError(
            "cannot read the data file", where=shown, got=error.strerror, mend="check the file and its permissions"
        ) from error
    if num_nul > num_bytes * _NUL_SHARE:
        raise _unknown(shown, f"a NUL in every {num_bytes / num_nul:.2g} bytes: UTF-16 or UTF-32, or no text")
    encoding = None if binary else _encoding(shown, file, num_bytes, mark or "utf-8", wide, broken)
    return Inspected(digest.hexdigest(), num_bytes, encoding, blank)


def _encoding(shown: str, file: Path, num_bytes: int, mark: str, wide: int, broken: int) -> str:
    if broken == 0 or broken * 10 <= wide:
        return mark
    if _is_gb18030(file):
        return "gb18030"
    if broken <= max(1, num_bytes * _BROKEN_SHARE):
        return mark
    raise _unknown(shown, f"{broken:,} places that are not UTF-8")


def _mark(head: bytes) -> str | None:
    """Return the encoding that a byte order mark names."""
    return next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)


def _unknown(shown: str, got: str) -> UserError:
    return UserError(
        "the data file is in no known encoding", where=shown, got=got, expected="UTF-8 or GB18030", mend="save it as UTF-8"
    )


def _is_gb18030(file: Path) -> bool:
    """Whether a file decodes, and to common characters: accented letters of Western texts may decode to rare ones."""
    decoder = codecs.getincrementaldecoder("gb18030")()
    num_wide = num_common = 0
    with open(file, "rb") as opened:
        try:
            for chunk in chain(iter(lambda: opened.read(_CHUNK_BYTES), b""), [b""]):
                wide = "".join(_WIDE.findall(decoder.decode(chunk, final=not chunk)))
                num_wide += len(wide)
                num_common += len(wide.encode("gb2312", "ignore")) // 2
        except UnicodeDecodeError:
            return False
    return num_common >= num_wide * _COMMON_SHARE
