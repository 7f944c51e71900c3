"""A source to samples: read, rendered, cut or dropped at the cutoff, stored by content.

Tokenising, which needs no GIL, runs beside reading and rendering; a few hundred rows are in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path

from tuneloom.cache import cache_subfolder
from tuneloom.config import DataConfig
from tuneloom.data.conversations import ConversationReader, OnBytes, Read, Unusable, told
from tuneloom.data.render import Batch, Renderer
from tuneloom.data.row import RowError
from tuneloom.data.samples import Made, digest_of, samples_of
from tuneloom.data.store import SampleStore, StoreWriter

_ROWS_A_BATCH = 128


def rendered_source(
    reader: ConversationReader, config: DataConfig, renderer: Renderer, *, strict: bool = False, on_bytes: OnBytes | None = None
) -> SampleStore:
    """Return a source's samples, from the cache where the same were made before.

    Raises:
        UserError: a file cannot be read, a row in strict mode, one over the cutoff with overflow `error`.
    """
    folder = cache_subfolder("data") / _key(reader, config, renderer)
    store = SampleStore.open(folder)
    if store is None:
        store = _write(folder, reader, config, renderer, strict, on_bytes)
    store.report.role = reader.role
    if strict:
        store.report.refuse_dropped()
    return store


def _write(
    folder: Path,
    reader: ConversationReader,
    config: DataConfig,
    renderer: Renderer,
    strict: bool,
    on_bytes: OnBytes | None,
) -> SampleStore:
    report = reader.new_report()
    rows = reader.read_all(report, on_bytes=on_bytes)
    with StoreWriter(folder) as writer, _collecting_what_is_new():
        for read, made in _made(rows, config, renderer):
            if not told(read, report, strict):
                continue
            assert made is not None
            if isinstance(made, RowError):
                report.num_answer_tokens_dropped += made.answer_tokens
                assert read.conversation.location is not None
                report.drop(read.conversation.location, made, strict)
                continue
            writer.add(
                made.sample,
                row=read.row,
                digest=digest_of(read.conversation),
                file=read.file,
                whole_tokens=made.whole_tokens,
                answer_tokens=made.answer_tokens,
            )
            report.usable += 1
        return writer.publish(report)


_Rows = list[Read | Unusable]
_Ids = Mapping[str, list[int]]


def _made(
    rows: Iterator[Read | Unusable], config: DataConfig, renderer: Renderer
) -> Iterator[tuple[Read | Unusable, Made | RowError | None]]:
    """Yield (row, what was made of it) in order; one batch's text is encoded while the next one is rendered."""

    def finished(batch: _Rows, begun: Batch, ids: Future[_Ids]) -> Iterator[tuple[Read | Unusable, Made | RowError | None]]:
        made = samples_of(begun, ids.result(), config, renderer)
        return ((row, next(made) if isinstance(row, Read) else None) for row in batch)

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as thread:
        ahead: deque[tuple[_Rows, Batch, Future[_Ids]]] = deque()
        while batch := list(islice(rows, _ROWS_A_BATCH)):
            begun = renderer.begin([row.conversation for row in batch if isinstance(row, Read)], config.train_on)
            ahead.append((batch, begun, thread.submit(renderer.encode_batch, begun)))
            if len(ahead) > 1:
                yield from finished(*ahead.popleft())
        while ahead:
            yield from finished(*ahead.popleft())


@contextmanager
def _collecting_what_is_new() -> Iterator[None]:
    """Keep the garbage collector from going through all that was there before, again and again; it took a sixth of the time."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _key(reader: ConversationReader, config: DataConfig, renderer: Renderer) -> str:
    """Return a hash of all that a source's samples depend on."""
    tokenizer = renderer.tokenizer
    parts = {
        "code": _code_hash(),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": str(tokenizer.chat_template),
        "specials": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "date": str(date.today()) if renderer.depends_on_date else "",
        "files": [
            (shown, file.suffix, seen.sha256) for (shown, file), seen in zip(reader.files, reader.inspected, strict=True)
        ],
        "shape": [sorted(reader.shape.columns.items()), sorted(reader.shape.roles.items()), reader.max_rows],
        "settings": config.model_dump(mode="json", include={"cutoff_len", "overflow", "train_on", "variables"}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code_hash() -> str:
    """Return a hash of this package's code and of the libraries that render: other code, other samples."""
    import jinja2
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{jinja2.__version__} {tokenizers.__version__} {transformers.__version__}".encode())
    package = Path(__file__).parent
    for file in [*sorted(package.glob("*.py")), package.parent / "types.py"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
