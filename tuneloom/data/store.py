"""Rendered samples on disk: written one by one, mapped into memory, found again by the content of their source.

    <cache>/data/<key>/
      ids.i32      token ids of all samples, one after another
      mask.u8      1 where supervised
      records.bin  one `RECORD` a sample
      report.json  what became of every row (`SourceReport`)

The key is a hash of everything the samples depend on, so a set that changed is another set.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tuneloom.data.report import SourceReport
from tuneloom.types import Location, Sample

RECORD = np.dtype(
    [
        ("start", "<i8"),  # position in ids and mask
        ("tokens", "<i4"),  # of the sample
        ("supervised", "<i4"),  # tokens of the sample
        ("whole_tokens", "<i4"),  # of the conversation before it was cut
        ("answer_tokens", "<i4"),  # supervised tokens before it was cut
        ("file", "<i4"),  # index in the report's files
        ("line", "<i8"),
        ("row", "<i8"),  # number of the conversation in its source, from 0
        ("digest", "S16"),  # of the messages: equal conversations are equal here
    ]
)
_PACKED = struct.Struct("<qiiiiiqq16s")
assert _PACKED.size == RECORD.itemsize
_FILES = {"ids.i32": np.dtype("<i4"), "mask.u8": np.dtype(np.bool_), "records.bin": RECORD}
_REPORT = "report.json"
MAX_CACHE_BYTES = 4 << 30


class SampleStore:
    """The samples of one source, in the order of its rows.

    Attributes:
        ids, mask: all samples' tokens, int32 and bool.
        records: one `RECORD` a sample.
        report: of the source.
    """

    def __init__(self, ids: NDArray[Any], mask: NDArray[Any], records: NDArray[Any], report: SourceReport) -> None:
        self.ids = ids
        self.mask = mask
        self.records = records
        self.report = report

    @classmethod
    def open(cls, folder: Path) -> SampleStore | None:
        """Map a written store; None where it is absent or not whole."""
        try:
            report = SourceReport.from_dict(json.loads((folder / _REPORT).read_text(encoding="utf-8")))
            arrays = [_mapped(folder / name, dtype) for name, dtype in _FILES.items()]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        ids, mask, records = arrays
        last = int(records[-1]["start"] + records[-1]["tokens"]) if len(records) else 0
        if len(records) != report.usable or not len(ids) == len(mask) == last:
            return None
        os.utime(folder)  # read now: the last to be evicted
        return cls(ids, mask, records, report)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, i: int) -> Sample:
        """Return sample i; its arrays are views."""
        record = self.records[i]
        start, end = int(record["start"]), int(record["start"]) + int(record["tokens"])
        return Sample(self.ids[start:end], self.mask[start:end], self.location(i))

    def location(self, i: int) -> Location:
        """Return where sample i was read."""
        record = self.records[i]
        return Location(self.report.files[int(record["file"])], int(record["line"]))


class StoreWriter:
    """Writes a store beside, and publishes it by rename.

    Args:
        folder: the store's place in the cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        self._opened = {name: open(self._partial / name, "wb") for name in _FILES}  # noqa: SIM115 closed by __exit__
        self._position = 0

    def add(
        self,
        sample: Sample,
        *,
        row: int,
        digest: bytes,
        file: int = 0,
        whole_tokens: int | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        """Append a sample.

        Args:
            sample: what is trained on.
            row: number of its conversation in the source.
            digest: of its messages, 16 bytes.
            file: index of its file.
            whole_tokens, answer_tokens: before it was cut, where it was.
        """
        supervised = sample.num_supervised_tokens
        record = (
            self._position,
            sample.num_tokens,
            supervised,
            sample.num_tokens if whole_tokens is None else whole_tokens,
            supervised if answer_tokens is None else answer_tokens,
            file,
            sample.location.line if sample.location else 0,
            row,
            digest,
        )
        self._opened["ids.i32"].write(sample.ids_T.astype("<i4", copy=False).tobytes())
        self._opened["mask.u8"].write(sample.mask_T.tobytes())
        self._opened["records.bin"].write(_PACKED.pack(*record))
        self._position += sample.num_tokens

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._opened.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def publish(self, report: SourceReport) -> SampleStore:
        """Finish the store and map it."""
        for file in self._opened.values():
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps(report.as_stored(), ensure_ascii=True)
        (self._partial / _REPORT).write_text(text, encoding="utf-8")
        try:
            self._partial.rename(self._folder)
        except OSError:  # another process was first, or what lies there is not whole
            if SampleStore.open(self._folder) is None:
                shutil.rmtree(self._folder)
                self._partial.rename(self._folder)
        _evict(self._folder.parent, keep=self._folder)
        stored = SampleStore.open(self._folder)
        assert stored is not None, "a store that was just written"
        return stored


def memory_store(samples: Sequence[Sample]) -> SampleStore:
    """Return a store of samples that are in memory already."""
    records = np.zeros(len(samples), RECORD)
    records["tokens"] = records["whole_tokens"] = [sample.num_tokens for sample in samples]
    records["supervised"] = records["answer_tokens"] = [sample.num_supervised_tokens for sample in samples]
    records["start"] = np.cumsum(records["tokens"]) - records["tokens"]
    records["line"] = [sample.location.line if sample.location else 0 for sample in samples]
    files = list(dict.fromkeys(sample.location.file if sample.location else "?" for sample in samples))
    records["file"] = [files.index(sample.location.file if sample.location else "?") for sample in samples]
    ids = np.concatenate([np.zeros(0, np.int32), *(sample.ids_T for sample in samples)])
    mask = np.concatenate([np.zeros(0, np.bool_), *(sample.mask_T for sample in samples)])
    return SampleStore(ids, mask, records, SourceReport("", files, usable=len(samples)))


class Samples(Sequence[Sample]):
    """Samples of several stores, chosen and ordered; each is made when it is asked for.

    Args:
        parts: (store, indices of its samples) pairs, joined in this order.
    """

    def __init__(self, parts: Iterable[tuple[SampleStore, NDArray[np.int64]]]) -> None:
        parts = list(parts)
        self._stores = [store for store, _ in parts]
        self._which = np.repeat(np.arange(len(parts), dtype=np.int32), [len(indices) for _, indices in parts])
        self._index = np.concatenate([np.zeros(0, np.int64), *(indices for _, indices in parts)])

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> Samples: ...
    def __getitem__(self, i: int | slice) -> Sample | Samples:
        if isinstance(i, slice):
            return self.chosen(np.arange(len(self))[i])
        store: SampleStore = self._stores[int(self._which[i])]
        return store.sample(int(self._index[i]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def chosen(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at these indices, in this order."""
        picked = object.__new__(Samples)
        picked._stores = self._stores
        picked._which, picked._index = self._which[indices], self._index[indices]
        return picked

    def count_of(self, part: int) -> int:
        """Return how many samples come from a part."""
        return int((self._which == part).sum())

    def column(self, name: str) -> NDArray[Any]:
        """Return a field of `RECORD` for each sample."""
        values = np.zeros(len(self), RECORD[name])
        for number, store in enumerate(self._stores):
            here = self._which == number
            values[here] = store.records[name][self._index[here]]
        return values

    def distinct(self) -> Samples:
        """Return each sample once, however often it is repeated."""
        keys = self._which.astype(np.int64) << 40 | self._index
        _, first = np.unique(keys, return_index=True)
        return self.chosen(np.sort(first))


def _mapped(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a file read-only; an empty one cannot be mapped."""
    if file.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r")


_num_bytes_estimated: dict[Path, int] = {}
"""Of the stores in a cache folder: measured once, and since then what this process added."""


def _evict(folder: Path, keep: Path) -> None:
    """Remove the stores unused for longest while all of them are over the limit; they are measured only when they may be."""
    known = _num_bytes_estimated.get(folder)
    if known is not None:
        _num_bytes_estimated[folder] = known = known + _num_bytes(keep)
    if known is not None and known <= MAX_CACHE_BYTES:
        return
    stores = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    sizes = {path: _num_bytes(path) for path in stores}
    total = sum(sizes.values())
    if total > MAX_CACHE_BYTES:
        for path in sorted((path for path in stores if path != keep), key=_last_used):
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
            if total <= MAX_CACHE_BYTES:
                break
    _num_bytes_estimated[folder] = total


def _num_bytes(store: Path) -> int:
    """Return a store's size; 0 where another process has removed it."""
    try:
        return sum(file.stat().st_size for file in store.iterdir())
    except OSError:
        return 0


def _last_used(store: Path) -> float:
    try:
        return store.stat().st_mtime
    except OSError:
        return 0.0
