"""The data section of a config to samples, with the report of what became of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tuneloom.config import DataConfig, SourceConfig
from tuneloom.data.conversations import ConversationReader
from tuneloom.data.equals import Digested, count_equals
from tuneloom.data.mix import Indices, hold_out, mixed_counts, take
from tuneloom.data.render import Renderer
from tuneloom.data.rendered import rendered_source
from tuneloom.data.report import TRAIN, DataReport, SourceReport, length_statistics
from tuneloom.data.row import RowError
from tuneloom.data.samples import digest_of, prompt_of_turn, require_fitting_prompt
from tuneloom.data.store import Samples, SampleStore, memory_store
from tuneloom.errors import UserError
from tuneloom.types import Conversation, Location, Sample

Replay = Callable[[Sequence[Conversation]], Sequence[Sample | None]]
"""Answers conversations' first questions with the base model: one sample each, None to leave it out."""

Progress = Callable[[str, int, int], None]

_WORTH_SHOWING_BYTES = 1 << 20


def no_progress(what: str, done: int, total: int) -> None:
    """Tell nobody."""
    del what, done, total


class HeldConversations:
    """Conversations that are read from their files again whenever somebody goes through them."""

    def __init__(self) -> None:
        self._parts: list[tuple[ConversationReader, frozenset[int]]] = []

    def add(self, reader: ConversationReader, rows: NDArray[Any]) -> None:
        self._parts.append((reader, frozenset(rows.tolist())))

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._parts)

    def __iter__(self) -> Iterator[Conversation]:
        for reader, rows in self._parts:
            yield from reader.pick(rows)


@dataclass
class PreparedData:
    """Samples to train and validate on; conversations to predict; the report."""

    train: Samples
    validation: Samples
    validation_conversations: HeldConversations
    test_conversations: list[Conversation]
    report: DataReport
    files: dict[str, str] = field(default_factory=dict)
    """Name shown -> sha256 of every file read."""


def prepare_data(
    config: DataConfig,
    renderer: Renderer,
    *,
    seed: int,
    strict: bool = False,
    replay: Replay | None = None,
    progress: Progress = no_progress,
) -> PreparedData:
    """Read, check, render and mix the data of a config.

    Args:
        config: the data section.
        renderer: of the model's tokenizer.
        seed: of the split and the mixture.
        strict: stop at the first row that had to be dropped.
        replay: answers the questions of sources with `replay: self`; needed where there are any.
        progress: called with (what, done, all).

    Raises:
        UserError: nothing to train on, an unfilled placeholder, a row in strict mode.
    """
    loader = _Loader(config, renderer, strict, replay, progress)
    report = loader.report
    rng = np.random.default_rng([seed, 0x5EED])
    sets = [loader.load(source, TRAIN) for source in config.train]
    validating: list[tuple[_Set, Indices]] = []
    usable = [np.arange(len(each.digests)) for each in sets]
    if isinstance(config.validation, float):
        usable, held_out = hold_out([each.digests for each in sets], config.validation, rng)
        validating = list(zip(sets, held_out, strict=True))
    elif config.validation:
        for source in config.validation:
            loaded: _Set = loader.load(source, "validation")
            loaded.report.used = loaded.report.usable
            validating.append((loaded, np.arange(len(loaded.digests))))
    test = [conversation for source in config.test for conversation in loader.askable(source)]
    count_equals(loader.digested, report)

    counts = mixed_counts(config.train, [len(indices) for indices in usable])
    parts = []
    for each, indices, count in zip(sets, usable, counts, strict=True):
        if count > len(indices):
            report.notes.append(f"{each.report.path}: {len(indices)} rows repeated to {count}")
        parts.append(each.part(indices if count == len(indices) else take(indices, count, rng)))
    train = Samples(parts)
    if config.max_samples is not None and len(train) > config.max_samples:
        report.notes.append(f"max_samples: {config.max_samples} of {len(train)} samples used")
        train = train.chosen(np.sort(rng.permutation(len(train))[: config.max_samples]))
    for i, each in enumerate(sets):
        each.report.used = train.count_of(i)
    _require_samples(train, report, config)
    _count_train(train, sets, report)
    validation = Samples(each.part(indices) for each, indices in validating)
    report.validation = length_statistics(validation.column("tokens"), int(validation.column("supervised").sum()))
    held = HeldConversations()
    for loaded, indices in validating:
        if isinstance(loaded, _Rendered):
            held.add(loaded.reader, loaded.store.records["row"][indices])
    return PreparedData(train, validation, held, test, report, loader.files)


class _Set(Protocol):
    """A source's conversations, and how to make samples of some of them."""

    report: SourceReport
    digests: NDArray[Any]
    """Of its usable conversations, S16."""

    def part(self, indices: Indices) -> tuple[SampleStore, Indices]:
        """Return the store that holds these conversations' samples, and where in it."""
        ...


class _Rendered:
    """A source whose own answers are taught."""

    def __init__(self, reader: ConversationReader, store: SampleStore) -> None:
        self.reader = reader
        self.store = store
        self.report = store.report
        self.digests = store.records["digest"]

    def part(self, indices: Indices) -> tuple[SampleStore, Indices]:
        return self.store, indices


class _Replayed:
    """A source whose questions the base answers anew."""

    def __init__(self, conversations: list[Conversation], report: SourceReport, config: DataConfig, loader: _Loader) -> None:
        self.report = report
        self._conversations = conversations
        self._loader = loader
        self._end = config.cutoff_len
        self.digests = np.array([digest_of(conversation) for conversation in conversations], "S16")

    def part(self, indices: Indices) -> tuple[SampleStore, Indices]:
        if not len(indices):
            return memory_store([]), indices
        assert self._loader.replay is not None, "a source with replay needs the base model"
        distinct, back = np.unique(indices, return_inverse=True)
        replies = self._loader.replay([self._conversations[i] for i in distinct.tolist()])
        kept = np.array([reply is not None for reply in replies])
        if left_out := int((~kept).sum()):
            self._loader.report.notes.append(
                f"replay: {left_out} of {len(replies)} answers left out, in which the base speaks of itself"
            )
        samples = [Sample(r.ids_T[: self._end], r.mask_T[: self._end], r.location) for r in replies if r is not None]
        places = np.cumsum(kept) - 1
        return memory_store(samples), places[back[kept[back]]]


class _Loader:
    """Loads sources, keeps their reports and the files they came from."""

    def __init__(self, config: DataConfig, renderer: Renderer, strict: bool, replay: Replay | None, progress: Progress) -> None:
        self.replay = replay
        self.report = DataReport()
        self.files: dict[str, str] = {}
        self._config = config
        self._renderer = renderer
        self._strict = strict
        self._progress = progress
        self.digested: list[Digested] = []

    def load(self, source: SourceConfig, role: str) -> _Rendered | _Replayed:
        """Return a source of samples, to train or to validate on.

        Raises:
            UserError: none is usable, or a placeholder has no value.
        """
        reader = ConversationReader(source, self._config.variables, role)
        loaded: _Rendered | _Replayed
        if source.replay is None:

            def on_bytes(done: int, total: int) -> None:
                if total > _WORTH_SHOWING_BYTES:
                    self._progress(f"reading {source.path}", done, total)

            store = rendered_source(reader, self._config, self._renderer, strict=self._strict, on_bytes=on_bytes)
            loaded = _Rendered(reader, store)
            self.digested.append(Digested(role, loaded.digests, store.location))
        else:
            report = reader.new_report()
            check = require_fitting_prompt
            conversations = self._checked(reader, report, lambda c: check(c, self._config, self._renderer))
            loaded = _Replayed(conversations, report, self._config, self)
            self.digested.append(Digested(role, loaded.digests, _locations(conversations)))
        self._keep(loaded.report)
        return loaded

    def askable(self, source: SourceConfig) -> list[Conversation]:
        """Return a source's conversations that the chat template takes."""
        reader = ConversationReader(source, self._config.variables, "test")
        report = reader.new_report()
        conversations = self._checked(reader, report, lambda c: prompt_of_turn(c, self._renderer, -1))
        report.used = report.usable
        digests = np.array([digest_of(conversation) for conversation in conversations], "S16")
        self.digested.append(Digested(reader.role, digests, _locations(conversations)))
        self._keep(report)
        return conversations

    def _checked(
        self, reader: ConversationReader, report: SourceReport, check: Callable[[Conversation], object]
    ) -> list[Conversation]:
        kept = []
        for read in reader.read(report, strict=self._strict):
            try:
                check(read.conversation)
            except RowError as error:
                report.drop(_location(read.conversation), error, self._strict)
            else:
                kept.append(read.conversation)
        report.usable = len(kept)
        return kept

    def _keep(self, report: SourceReport) -> None:
        self.report.sources.append(report)
        self.files |= dict(zip(report.files, report.sha256, strict=True))
        _require_filled(report)
        report.refuse_unusable()


def _location(conversation: Conversation) -> Location:
    return conversation.location or Location("?", 0)


def _locations(conversations: Sequence[Conversation]) -> Callable[[int], Location]:
    return lambda i: _location(conversations[i])


def _require_filled(report: SourceReport) -> None:
    for name, where in report.unfilled.items():
        raise UserError(
            f"placeholder {{{{{name}}}}} has no value",
            where=where,
            expected=f"data.variables.{name} in the config",
            mend=f"--set data.variables.{name}=...; '{{{{{name}}}}}' as the value keeps it as it is",
        )


def _count_train(train: Samples, sets: Sequence[_Set], report: DataReport) -> None:
    """Fill the report's figures of the training set; repeated rows count once where rows are meant."""
    report.train = length_statistics(train.column("tokens"), int(train.column("supervised").sum()))
    distinct = train.distinct()
    answer, supervised = distinct.column("answer_tokens"), distinct.column("supervised")
    dropped = sum(each.report.num_answer_tokens_dropped for each in sets)
    report.num_cut = int((distinct.column("whole_tokens") > distinct.column("tokens")).sum())
    report.num_answer_tokens = int(answer.sum()) + dropped
    report.num_answer_tokens_lost = int((answer - supervised).sum()) + dropped


def _require_samples(train: Samples, report: DataReport, config: DataConfig) -> None:
    if len(train):
        return
    reasons = report.dropped_by_reason.most_common(1)
    reason, count = reasons[0] if reasons else ("left out by the mixture", 0)
    problem = next((problem for problem in report.problems if problem.reason == reason), None)
    raise UserError(
        "no training sample is left",
        where=str(problem.location) if problem else "data.train",
        got=f"{count} rows dropped: {reason}",
        expected=f"samples of at most data.cutoff_len = {config.cutoff_len} tokens",
        mend=problem.mend if problem else "add rows",
    )
