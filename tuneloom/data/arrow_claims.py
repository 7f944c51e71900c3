"""What compressed buffers of an Arrow file claim to unpack to, read from its metadata before anything is unpacked.

A message's metadata is a flatbuffer, and a compressed buffer begins with its length unpacked:
https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow import Buffer, MemoryMappedFile

_MAGIC = b"ARROW1\0\0"
_HEADER = 2  # numbers of fields: in a message,
_BUFFERS, _COMPRESSION = 2, 3  # in a record batch,
_NUMBER, _DATA, _ADDS = 0, 1, 2  # and in a dictionary batch


def claimed_bytes(mapped: MemoryMappedFile) -> Iterator[int]:
    """Yield for each batch of an Arrow file or stream how much memory it needs unpacked, dictionaries before it included.

    Ends where the messages cannot be followed: reading says why.
    """
    import pyarrow

    mapped.seek(0)
    if mapped.read(len(_MAGIC)) != _MAGIC:
        mapped.seek(0)
    shared: dict[int, int] = {}  # of the last dictionary of each number
    try:
        for message in pyarrow.ipc.MessageReader.open_stream(mapped):
            if message.type == "record batch":
                yield _claimed(message.body, message.metadata, _header(message.metadata)) + sum(shared.values())
            elif message.type == "dictionary":
                metadata, header = message.metadata, _header(message.metadata)
                claimed = _claimed(message.body, metadata, _table(metadata, _field(metadata, header, _DATA)))
                number, adds = _integer(metadata, header, _NUMBER, "<q"), _integer(metadata, header, _ADDS, "<?")
                shared[number] = claimed + (shared.get(number, 0) if adds else 0)
                yield sum(shared.values())
    except (pyarrow.ArrowException, OSError, struct.error, IndexError):
        return


def _claimed(body: Buffer | None, metadata: Buffer, batch: int) -> int:
    buffers = _field(metadata, batch, _BUFFERS)
    if body is None or buffers is None or _field(metadata, batch, _COMPRESSION) is None:
        return 0
    vector = _table(metadata, buffers)
    (count,) = struct.unpack_from("<I", metadata, vector)
    places = struct.iter_unpack("<qq", metadata[vector + 4 : vector + 4 + 16 * count])
    lengths = (struct.unpack_from("<q", body, start)[0] for start, length in places if length >= 8)
    return sum(length for length in lengths if length > 0)  # -1 where the buffer is not compressed


def _header(metadata: Buffer) -> int:
    return _table(metadata, _field(metadata, _table(metadata, 0), _HEADER))


def _table(metadata: Buffer, place: int | None) -> int:
    """Follow an offset to a table or vector."""
    if place is None:
        raise struct.error("no such field")
    return int(place + struct.unpack_from("<I", metadata, place)[0])


def _field(metadata: Buffer, table: int, number: int) -> int | None:
    """Return where a table's field is; None where it is left out."""
    names = table - struct.unpack_from("<i", metadata, table)[0]
    entry = 4 + 2 * number
    if entry >= struct.unpack_from("<H", metadata, names)[0]:
        return None
    offset = struct.unpack_from("<H", metadata, names + entry)[0]
    return int(table + offset) if offset else None


def _integer(metadata: Buffer, table: int, number: int, kind: str) -> int:
    """Return a field's value; 0 where it is left out."""
    place = _field(metadata, table, number)
    return 0 if place is None else int(struct.unpack_from(kind, metadata, place)[0])
