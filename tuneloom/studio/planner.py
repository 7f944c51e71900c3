"""The planner: a child process that counts what a config would train, with the model's own tokenizer.

python -m tuneloom.studio.planner

A request is a line of JSON on stdin, an answer a line on stdout; it ends with its stdin. Of several requests of one
page the newest counts. Nothing is downloaded: what is not on this machine is said to be absent.

    {"id": 1, "page": "a", "do": "plan", "config": {...}, "runs": "runs"}  ->  {"id": 1, "plan": {...}}
    {"id": 2, "page": "b", "do": "check", "config": {...}, "path": "rows.jsonl"}  ->  {"id": 2, "check": {...}}
                                              a user's mistake  ->  {"id": 1, "error": {...}, "key": "data.train"}
                                              meanwhile         ->  {"id": 1, "progress": ["reading x", 5, 10]}
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from tuneloom.config import Config, SourceConfig, parse_config
from tuneloom.errors import UserError

if TYPE_CHECKING:
    from tuneloom.data.render import Renderer
    from tuneloom.models.source import ModelSource
    from tuneloom.types import Conversation, Sample

PROBLEMS_SHOWN = 50
ROWS_SHOWN = 3
_TEXT_SHOWN = 2000
_PLACEHOLDER = re.compile(r"data\.variables\.(\w+)")
Answer = Callable[[dict[str, Any]], None]


class Absent(Exception):
    """Something that is not on this machine, and would be fetched when the run starts."""


class _Mistake(Exception):
    """A user's mistake, and the setting that it is in."""

    def __init__(self, error: UserError, key: str) -> None:
        self.error = error
        self.key = key


class Planner:
    """Answers requests; tokenizers stay loaded."""

    def __init__(self) -> None:
        self._renderers: dict[str, tuple[ModelSource, Renderer]] = {}

    def answer(self, request: dict[str, Any], tell: Answer) -> dict[str, Any]:
        """Return the answer to a request, its id left out.

        Args:
            request: as above.
            tell: gets an answer meanwhile.
        """
        try:
            with _mistakes_of(""):
                config = parse_config(request["config"])
            if request["do"] == "check":
                return {"check": self._check(config, str(request["path"]), tell)}
            return {"plan": self._plan(config, Path(request["runs"]), tell)}
        except Absent as error:
            return {"absent": str(error)}
        except _Mistake as mistake:
            facts = {name: getattr(mistake.error, name) for name in ("what", "where", "got", "expected", "mend")}
            return {"error": facts, "key": _key(mistake)}

    def _plan(self, config: Config, runs: Path, tell: Answer) -> dict[str, Any]:
        """Count the samples, tokens and steps of a config."""
        from tuneloom.data.plan import StepSchedule
        from tuneloom.data.prepare import prepare_data
        from tuneloom.models.load import pick_device
        from tuneloom.studio.speeds import measured_speed
        from tuneloom.train.prepare import device_name

        base, renderer = self._renderer(config)
        replay = _Replay(config, base, renderer)
        with _mistakes_of("data.train"):
            data = prepare_data(
                config.data, renderer, seed=config.training.seed, replay=replay, progress=lambda *at: tell({"progress": at})
            )
        schedule = StepSchedule.of(config.training, len(data.train))
        tokens = schedule.num_tokens(data.train.column("tokens"))
        device = device_name(pick_device())
        speed = measured_speed(runs, base.name, config.method, device)
        report = data.report.as_dict()
        return {
            "samples": len(data.train),
            "validation": len(data.validation),
            "tokens": tokens,
            "longest": report["train"]["longest"],
            "steps": schedule.num_steps,
            "epochs": round(schedule.epochs_done(schedule.num_steps), 2),
            "samples_per_step": schedule.samples_per_step,
            "approximate": replay.approximate,
            "device": device,
            "tokens_per_second": speed.tokens_per_second if speed else None,
            "speed_of": speed.run if speed else None,
            "seconds": tokens / speed.tokens_per_second if speed else None,
            **{key: report[key] for key in ("read", "cut", "dropped", "repaired", "duplicates", "notes", "sources")},
        }

    def _check(self, config: Config, path: str, tell: Answer) -> dict[str, Any]:
        """Report a source of data, its first rows as chat."""
        from tuneloom.data.check import check_data
        from tuneloom.data.conversations import ConversationReader
        from tuneloom.data.view import view_rows

        _, renderer = self._renderer(config)
        source = next((each for each in config.data.train if each.path == path), None) or SourceConfig(path=path)
        with _mistakes_of("data.train"):
            _require_here(source)
            reader = ConversationReader(source, config.data.variables)
            report = check_data(config.data, [reader], renderer, progress=lambda *at: tell({"progress": at}))
            rows = islice(view_rows(reader, reader.new_report(), config.data, renderer), ROWS_SHOWN)
            chats = [_chat(row.conversation) for row in rows]
        found = report.as_dict()
        found["problems"] = found["problems"][:PROBLEMS_SHOWN]
        unfilled = sorted({name for each in report.sources for name in each.unfilled})
        return {**found, "path": path, "rows": chats, "unfilled": unfilled, "cutoff_len": config.data.cutoff_len}

    def _renderer(self, config: Config) -> tuple[ModelSource, Renderer]:
        """Return the base model's whereabouts and its renderer."""
        from tuneloom.data.render import Renderer
        from tuneloom.models.load import load_tokenizer_folder
        from tuneloom.models.source import resolve_model

        base = config.base_model
        name = f"{base.path} {base.revision}"
        if name not in self._renderers:
            _require_embedded_here(base.path)
            with _mistakes_of("base_model.path"):
                source = resolve_model(base.path, revision=base.revision)
                self._renderers[name] = source, Renderer(load_tokenizer_folder(source.folder))
        return self._renderers[name]


class _Replay:
    """Stands for the base's own answers: those that it wrote in earlier runs, else those that the set has written.

    Attributes:
        approximate: whether the base still has to write some, so that their lengths are not known.
    """

    def __init__(self, config: Config, base: ModelSource, renderer: Renderer) -> None:
        self.renderer = renderer
        self.approximate = False
        self._config = config
        self._base = base

    def __call__(self, conversations: Sequence[Conversation]) -> Sequence[Sample | None]:
        from tuneloom.data.prepare import no_progress
        from tuneloom.models.fingerprint import fingerprint
        from tuneloom.models.load import pick_device
        from tuneloom.models.precision import choose_precision
        from tuneloom.train.replay import replay_samples

        precision = choose_precision(self._config.training.precision, pick_device())
        try:
            return replay_samples(cast(Any, self), conversations, fingerprint(self._base.folder), precision.name, no_progress)
        except Absent:
            self.approximate = True
            return [self._written(conversation) for conversation in conversations]

    def answers(self, *_: object, **__: object) -> list[Any]:
        """Say that nothing is written here."""
        raise Absent

    def _written(self, conversation: Conversation) -> Sample | None:
        from tuneloom.data.row import RowError
        from tuneloom.data.samples import make_samples

        [made] = make_samples([conversation], self._config.data, self.renderer)
        return None if isinstance(made, RowError) else made.sample


def _chat(conversation: Conversation) -> list[dict[str, str]]:
    """Return a conversation's messages for people, at readable length."""
    return [
        {"role": message.role, "content": "\n".join([message.content, *map(str, message.tool_calls)])[:_TEXT_SHOWN]}
        for message in conversation.messages
    ]


def _require_here(source: SourceConfig) -> None:
    """Refuse a path that could only be a hub's."""
    from tuneloom.data.sources import resolve_source

    resolve_source(source)


def _require_embedded_here(path: str) -> None:
    """Refuse an embedded model whose package would have to be downloaded.

    Raises:
        Absent: it would.
    """
    from tuneloom.models.embedded import EMBEDDED, ready_folder

    if path not in EMBEDDED or ready_folder(path) is not None or EMBEDDED[path].consent:
        return
    if any(importlib.util.find_spec(part.module) is None for part in EMBEDDED[path].parts):
        raise Absent(path)


@contextmanager
def _mistakes_of(key: str) -> Iterator[None]:
    """Say of a user's mistake which setting it is in."""
    try:
        yield
    except UserError as error:
        if "the hub gave" in (error.got or ""):
            raise Absent(error.where or key) from error
        raise _Mistake(error, key) from error


def _key(mistake: _Mistake) -> str:
    """Return the setting that a mistake is shown at: the one that it names, else where it came up."""
    error = mistake.error
    if placeholder := _PLACEHOLDER.match(error.expected or ""):
        return placeholder.group()
    return mistake.key or error.where or ""


class _Waiting:
    """Requests that wait: the newest of each page, in the order of their coming."""

    def __init__(self) -> None:
        self._requests: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()

    def put(self, request: dict[str, Any]) -> None:
        with self._changed:
            self._requests.pop(str(request.get("page")), None)
            self._requests[str(request.get("page"))] = request
            self._changed.notify()

    def take(self) -> dict[str, Any]:
        with self._changed:
            while not self._requests:
                self._changed.wait()
            return self._requests.pop(next(iter(self._requests)))


def _listen(lines: TextIO, waiting: _Waiting) -> None:
    """Read requests until there are no more, and end the process then, whatever it is doing."""
    for line in lines:
        waiting.put(json.loads(line))
    os._exit(0)


def main() -> None:
    """Answer until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    waiting = _Waiting()
    threading.Thread(target=_listen, args=(sys.stdin, waiting), daemon=True).start()
    planner = Planner()
    while True:
        request = waiting.take()

        def tell(answer: dict[str, Any], request: dict[str, Any] = request) -> None:
            out.write(json.dumps({"id": request.get("id"), **answer}, ensure_ascii=False) + "\n")
            out.flush()

        try:
            tell(planner.answer(request, tell))
        except Exception as error:  # our bug: told, and the next request is answered all the same
            traceback.print_exc()
            tell({"fault": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
