"""The data of a config looked at without a model: what becomes of every row, how long they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuneloom.config import DataConfig
from tuneloom.data.conversations import ConversationReader
from tuneloom.data.equals import Digested, count_equals
from tuneloom.data.prepare import Progress, no_progress
from tuneloom.data.render import Renderer
from tuneloom.data.rendered import rendered_source
from tuneloom.data.report import DataReport, length_statistics
from tuneloom.data.store import Samples


def check_data(
    config: DataConfig,
    readers: Sequence[ConversationReader],
    renderer: Renderer,
    *,
    strict: bool = False,
    progress: Progress = no_progress,
) -> DataReport:
    """Read, check and render sources, and report; a placeholder without a value is reported too.

    Lengths are those of whole conversations, before the cutoff. A source with `replay` is looked at with its
    written answers.

    Args:
        config: the data section, for the cutoff, the labels and the variables.
        readers: of the sources to look at.
        renderer: of the model's tokenizer.
        strict: stop at the first row that cannot be used.
        progress: called with (what, done, all).

    Raises:
        UserError: a file cannot be read; a row in strict mode.
    """
    report = DataReport()
    parts = []
    for reader in readers:

        def on_bytes(done: int, total: int, path: str = reader.source.path) -> None:
            progress(f"reading {path}", done, total)

        store = rendered_source(reader, config, renderer, strict=strict, on_bytes=on_bytes)
        report.sources.append(store.report)
        store.report.used = store.report.usable
        parts.append((store, np.arange(len(store))))
    samples = Samples(parts)
    answer, supervised = samples.column("answer_tokens"), samples.column("supervised")
    dropped = sum(source.num_answer_tokens_dropped for source in report.sources)
    report.num_cut = int((samples.column("whole_tokens") > samples.column("tokens")).sum())
    report.num_answer_tokens = int(answer.sum()) + dropped
    report.num_answer_tokens_lost = int((answer - supervised).sum()) + dropped
    count_equals([Digested(store.report.role, store.records["digest"], store.location) for store, _ in parts], report)
    report.train = length_statistics(samples.column("whole_tokens"), int(answer.sum()))
    return report
