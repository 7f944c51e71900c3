"""Rendered samples on disk: the cache keeps to its limit, and is not measured at every write; histograms of lengths."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloom.data import store
from tuneloom.data.report import SourceReport, length_histogram
from tuneloom.data.store import SampleStore, StoreWriter
from tuneloom.types import Location, Sample

NUM_TOKENS = 2000
LIMIT = 60_000  # five stores of 10,000 bytes of tokens each, and their records and reports


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "MAX_CACHE_BYTES", LIMIT)
    return tmp_path / "data"


def published(cache: Path, name: str, used_at: int) -> SampleStore:
    """Write a store, used last at this second."""
    with StoreWriter(cache / name) as writer:
        sample = Sample(np.arange(NUM_TOKENS, dtype=np.int32), np.ones(NUM_TOKENS, np.bool_), Location("x", 1))
        writer.add(sample, row=0, digest=b"0" * 16)
        written = writer.publish(SourceReport("x", ["x"], usable=1))
    os.utime(cache / name, (used_at, used_at))
    return written


def num_bytes(cache: Path) -> int:
    return sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())


def test_the_cache_keeps_to_its_limit_and_to_what_was_used_last(cache: Path) -> None:
    for number in range(12):
        assert published(cache, f"s{number:02}", used_at=number).sample(0).num_tokens == NUM_TOKENS
        if number > 2:
            os.utime(cache / "s00", (100, 100))  # used again and again
        assert num_bytes(cache) <= LIMIT
    assert sorted(path.name for path in cache.iterdir()) == ["s00", "s08", "s09", "s10", "s11"]


def test_the_cache_is_measured_again_only_when_it_may_be_over_its_limit(cache: Path) -> None:
    published(cache, "first", used_at=50)
    foreign = cache / "foreign"  # of another process
    foreign.mkdir()
    (foreign / "ids.i32").write_bytes(b"0" * LIMIT)
    os.utime(foreign, (1, 1))
    published(cache, "second", used_at=51)
    assert foreign.exists()
    for number in range(4):
        published(cache, f"s{number}", used_at=60 + number)
    assert not foreign.exists()
    assert (cache / "second").exists()


def test_a_store_over_the_limit_is_kept_while_it_is_new(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_CACHE_BYTES", 100)
    published(cache, "old", used_at=1)
    assert published(cache, "new", used_at=2).sample(0).num_tokens == NUM_TOKENS
    assert [path.name for path in cache.iterdir()] == ["new"]


@given(lengths=st.lists(st.integers(1, 100_000), min_size=1, max_size=40))
def test_a_histogram_counts_every_length_once_in_few_ranges(lengths: list[int]) -> None:
    ranges = length_histogram(np.array(lengths))
    for each in ranges:
        assert each["count"] == sum(each["from"] <= length < each["to"] for length in lengths)
    assert sum(each["count"] for each in ranges) == len(lengths)
    assert len(ranges) <= min(12, 2 * len(set(lengths)))


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([7], {7: 1}),
        ([34, 34, 34, 45], {30: 3, 35: 0, 40: 0, 45: 1}),
        ([41, 54, 72], {40: 1, 50: 1, 60: 0, 70: 1}),
        ([10, 11, 12, 14, 15, 17], {10: 1, 11: 1, 12: 1, 13: 0, 14: 1, 15: 1, 16: 0, 17: 1}),
    ],
)
def test_few_lengths_are_drawn_in_few_ranges(lengths: list[int], counts: dict[int, int]) -> None:
    assert {each["from"]: each["count"] for each in length_histogram(np.array(lengths))} == counts
