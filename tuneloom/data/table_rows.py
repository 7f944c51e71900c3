"""Rows of csv, Parquet, Arrow and plain-text dialogue files, one at a time."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tuneloom.data.arrow_claims import claimed_bytes
from tuneloom.data.arrow_values import Restore, row_restorer
from tuneloom.data.row import MAX_ROW_CHARS, Row, RowError, Verbatim, json_excerpt, too_large
from tuneloom.errors import UserError
from tuneloom.types import Location

if TYPE_CHECKING:
    from pyarrow import DataType, MemoryMappedFile, RecordBatch
    from pyarrow.parquet import FileMetaData

_ROWS_A_BATCH = 256
_CHUNK_CHARS = 1 << 20
_MAX_GROUP_BYTES = 512 << 20
_SPEAKER = re.compile(r"\s{0,3}(system|user|human|assistant|gpt|bot|model|系统|用户|问|助手|答)\s*[:：]\s?(.*)", re.IGNORECASE)
_ANSWERS = ("assistant", "gpt", "bot", "model")
_SPEAKERS = {"系统": "system", "用户": "user", "问": "user", "助手": "assistant", "答": "assistant"}


def csv_rows(shown: str, file: TextIO) -> Iterator[Row]:
    """Yield the rows of a csv file with a header; a row's line is the one it begins on.

    Cells are parted by what parts the header: comma, semicolon or tab. Cells that a row lacks are empty.

    Raises:
        UserError: two columns have one name.
    """
    csv.field_size_limit(2 * MAX_ROW_CHARS)
    lines = _CsvLines(file)
    reader = csv.reader(lines, strict=True, delimiter=_delimiter(file))
    header: list[str] = []
    try:
        while True:
            lines.begin_row()
            cells = next(reader, None)
            location = Location(shown, lines.row_begins)
            if cells is None:
                return
            if lines.dropped:
                yield Row(location, error=too_large())
            elif not cells:
                continue
            elif not header:
                header = [cell.strip() for cell in cells]
                _refuse_twice(shown, header)
            elif extra := cells[len(header) :]:
                yield Row(location, error=RowError("row", extra, "more cells than columns", "quote cells that hold commas"))
            else:
                yield Row(location, dict(zip_longest(header, cells, fillvalue="")))
    except csv.Error as error:
        mend = "quote cells that hold quotes or line ends; what comes after is not read"
        yield Row(Location(shown, lines.row_begins), error=RowError("row", Verbatim(error), "not valid csv", mend))


class _CsvLines:
    """The lines of a csv file for its reader. Of a row over the limit only the quotes are passed on, which tell its end."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._line = 1
        self._num_chars = 0
        self.row_begins = 1
        self.dropped = False

    def begin_row(self) -> None:
        self.row_begins = self._line
        self._num_chars = 0
        self.dropped = False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = piece = self._file.readline(MAX_ROW_CHARS + 1)
        if not line:
            raise StopIteration
        self._line += 1
        self._num_chars += len(line)
        if self._num_chars <= MAX_ROW_CHARS:
            return line
        self.dropped = True
        num_quotes = line.count('"')
        while piece and not piece.endswith(("\n", "\r")):
            piece = self._file.readline(_CHUNK_CHARS)
            num_quotes += piece.count('"')
        return '"\n' if num_quotes % 2 else "\n"


def _delimiter(file: TextIO) -> str:
    first = "\n"
    while first and not first.strip():
        first = file.readline(1 << 16)
    file.seek(0)
    return max(",;\t", key=first.count)


def _refuse_twice(shown: str, columns: Sequence[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise UserError(
            "two columns have one name", where=shown, got=json_excerpt(twice[0]), mend="rename or remove one of them"
        )


def dialogue_rows(shown: str, file: TextIO) -> Iterator[Row]:
    """Yield the dialogues of a text file as rows of messages; blank lines part them.

    A line that begins with `User:`, `Assistant:` or `System:` (or 用户：, 助手：, 系统：) begins a message;
    others go on with it. A blank line before the next speaker of the same dialogue is allowed: a
    dialogue ends where a blank line is followed by a system message, or by a user after an assistant.
    """
    dialogue = _Dialogue(shown)
    number, whole = 0, True
    while line := file.readline(MAX_ROW_CHARS + 1):
        number += whole
        whole = line.endswith("\n")
        speaker = _SPEAKER.match(line)
        role = None
        if speaker:
            role = _SPEAKERS.get(speaker[1], speaker[1].lower())
        if role and dialogue.ends_before(role):
            yield dialogue.row()
            dialogue = _Dialogue(shown)
        dialogue.add(number, role, speaker[2] if speaker else line.rstrip("\r\n"))
    if dialogue.begun:
        yield dialogue.row()


class _Dialogue:
    """The messages of one dialogue, line by line."""

    def __init__(self, shown: str) -> None:
        self._location = Location(shown, 1)
        self._messages: list[tuple[str, list[str]]] = []
        self._stray: str | None = None
        self._after_blank = False
        self._num_chars = 0
        self.begun = False

    def ends_before(self, role: str) -> bool:
        """Whether a message of `role` that comes now begins another dialogue."""
        last = self._messages[-1][0] if self._messages else None
        return self.begun and self._after_blank and (role == "system" or last not in ("system", "user", "human"))

    def add(self, line: int, role: str | None, text: str) -> None:
        """Add a line; `role` where it begins a message."""
        self._after_blank = role is None and not text.strip()
        if not self.begun:
            if self._after_blank:
                return
            self.begun = True
            self._location = Location(self._location.file, line)
        self._num_chars += len(text)
        if self._num_chars > MAX_ROW_CHARS:
            self._messages.clear()
        elif role:
            self._messages.append((role, [text.rstrip()]))
        elif self._messages:
            self._messages[-1][1].append(text.rstrip())
        elif text.strip():
            self._stray = self._stray or text

    def row(self) -> Row:
        if self._num_chars > MAX_ROW_CHARS:
            return Row(self._location, error=too_large())
        if self._stray is not None:
            mend = "begin each message with User: or Assistant:"
            return Row(self._location, error=RowError("line", Verbatim(self._stray), "a line without a speaker", mend))
        messages = [{"role": role, "content": "\n".join(lines).strip()} for role, lines in self._messages]
        for i, message in enumerate(messages):
            if message["role"] in _ANSWERS and not message["content"]:
                mend = "write the answer, or leave the dialogue out"
                return Row(self._location, error=RowError(f"message {i + 1}", "", "empty answer", mend))
        return Row(self._location, {"messages": messages})


def arrow_rows(shown: str, file: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file; `line` is the row's number, from 1.

    Raises:
        UserError: it is not such a file, or a torn one; two columns have one name; its rows are too large to unpack.
    """
    import pyarrow

    number, restored = 0, None
    try:
        for batch in _parquet_batches(shown, file) if file.suffix.lower() == ".parquet" else _arrow_batches(shown, file):
            if restored is None:
                _refuse_twice(shown, batch.schema.names)
                restored = row_restorer(batch.schema)
            for values in _plain_rows(batch, restored):
                number += 1
                yield Row(Location(shown, number), *values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"not a whole {file.suffix.lower()[1:]} file",
            where=shown if not number else f"{shown}:{number + 1}",
            got=(str(error).splitlines() or ["nothing"])[0][:160],
            mend="download or write it again",
        ) from error


def _plain_rows(batch: RecordBatch, restored: Restore) -> Iterator[tuple[Any, RowError | None]]:
    """Yield a batch's rows without nulls, which stand where a map of another row has a key."""
    try:
        rows = batch.to_pylist() if batch.nbytes <= MAX_ROW_CHARS else None
    except (ValueError, ArithmeticError, LookupError):
        rows = None
    if rows is not None:
        yield from ((restored(_without_nulls(row)), None) for row in rows)
        return
    for i in range(batch.num_rows):
        try:
            yield restored(_without_nulls(_plain_row(batch.slice(i, 1)))), None
        except RowError as error:
            yield None, error


def _plain_row(row: RecordBatch) -> dict[str, Any]:
    """Return the one row of a batch; times that Python has no value for are left out.

    Raises:
        RowError: it is too large, or holds what cannot be read.
    """
    from pyarrow import types

    values = {}
    cells = [column.dictionary_decode() if types.is_dictionary(column.type) else column for column in row.columns]
    if sum(cell.nbytes for cell in cells) > MAX_ROW_CHARS:
        raise too_large()
    for name, cell in zip(row.schema.names, cells, strict=True):
        try:
            values[name] = cell[0].as_py()
        except UnicodeDecodeError as error:
            raise RowError(name, error.object, "holds bytes that are not UTF-8", "write it as UTF-8") from None
        except (ValueError, ArithmeticError, LookupError) as error:
            if not types.is_temporal(cell.type):
                raise RowError(name, Verbatim(error), "cannot be read", "write texts, numbers, lists and maps") from None
    return values


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parquet_batches(shown: str, file: Path) -> Iterator[RecordBatch]:
    """Yield the rows one by one: a text that many rows share is stored once, and each row unpacks it."""
    from pyarrow import parquet

    with parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
        _refuse_large_groups(shown, opened.metadata)
        yield from opened.iter_batches(batch_size=1, use_threads=False)


def _refuse_large_groups(shown: str, metadata: FileMetaData) -> None:
    """Refuse columns that would be unpacked at once for rows over the limit."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        num_bytes = max((group.column(j).total_uncompressed_size for j in range(group.num_columns)), default=0)
        if num_bytes > _MAX_GROUP_BYTES and num_bytes > group.num_rows * MAX_ROW_CHARS:
            raise UserError(
                "the rows of the data file are too large",
                where=shown,
                got=f"{num_bytes >> 20:,} MiB in {group.num_rows:,} rows of row group {i + 1}",
                expected=f"at most {MAX_ROW_CHARS >> 20} Mi characters a row",
                mend="split the conversations",
            )


def _arrow_batches(shown: str, file: Path) -> Iterator[RecordBatch]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        _refuse_large_batches(shown, mapped)
        mapped.seek(0)
        try:
            opened = pyarrow.ipc.open_file(mapped)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            batches = iter(pyarrow.ipc.open_stream(mapped))
        for batch in batches:
            _require_whole(batch)
            for start in range(0, batch.num_rows, _ROWS_A_BATCH):
                yield batch.slice(start, _ROWS_A_BATCH)


def _refuse_large_batches(shown: str, mapped: MemoryMappedFile) -> None:
    """Refuse compressed batches that would be unpacked at once into more memory than rows should need."""
    for num_bytes in claimed_bytes(mapped):
        if num_bytes > _MAX_GROUP_BYTES:
            raise UserError(
                "a batch of the data file is too large to unpack",
                where=shown,
                got=f"{num_bytes >> 20:,} MiB",
                expected=f"at most {_MAX_GROUP_BYTES >> 20} MiB",
                mend="write it in smaller batches, without compression, or as Parquet",
            )


def _require_whole(batch: RecordBatch) -> None:
    """Require that nothing in a batch points beyond its buffers, which reading it would follow.

    Raises:
        pyarrow.ArrowInvalid: something does, or a text that many rows share is not UTF-8.
    """
    batch.validate()
    for column in batch.columns:
        kind = _as_bytes(column.type)  # a text that is not UTF-8 is a fault of its row
        (column if kind == column.type else column.view(kind)).validate(full=True)


def _as_bytes(kind: DataType) -> DataType:
    """Return a type with bytes instead of texts, within lists and maps too."""
    import pyarrow
    from pyarrow import types

    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    if types.is_list(kind):
        return pyarrow.list_(_as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_as_bytes(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_as_bytes(kind.value_type), kind.list_size)
    texts = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return texts.get(kind, kind)
