"""The process that holds a model and answers for the studio's chat.

    python -m tuneloom.studio.speaker TARGET [--idle SECONDS]

It reads JSON lines from stdin and writes JSON lines to stdout:

    in   {"id": 1, "base": false, "messages": [{"role": ..., "content": ...}], "settings": {"temperature": 0, ...}}
         {"stop": 1}
    out  {"event": "says", "text": ...}             while it loads
         {"event": "ready", "base": NAME, "adapter": true}
         {"event": "piece", "id": 1, "text": ...}   as it is written
         {"event": "end", "id": 1, "text": ..., "finished": true, "stopped": false, "tokens": 12, "seconds": 0.8}
         {"event": "error", "id": 1, "message": ...}; without an id: it cannot go on, and ends

It ends when stdin closes, so that none is left behind by a studio that was killed, and after a while without work.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from tuneloom.config import GenerationConfig
from tuneloom.errors import TuneloomError, UserError

if TYPE_CHECKING:
    from tuneloom.generate.generator import Generator

IDLE_SECONDS = 15 * 60
Say = Callable[..., None]


def main() -> int:
    """Load the target and answer until there is nobody to answer to; return the exit code."""
    parser = argparse.ArgumentParser(prog="tuneloom.studio.speaker")
    parser.add_argument("target")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS)
    asked = parser.parse_args()
    say = _teller(_own_stdout())
    inbox = Inbox(sys.stdin)
    try:
        generator = _load(asked.target, say)
        while (request := inbox.next(asked.idle)) is not None:
            _serve(generator, request, inbox, say)
    except TuneloomError as error:
        say("error", message=str(error))
        return error.exit_code
    except Exception as error:
        say("error", message=f"{type(error).__name__}: {error}")
        raise
    return 0


class Inbox:
    """What comes in, read by a thread: requests in their order; a stop reaches its answer at once.

    Args:
        lines: where they come from; the process ends with them.
    """

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stopped: set[object] = set()
        self._current: tuple[object, threading.Event] | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Wait for a request; None after so many seconds without one."""
        try:
            return self._requests.get(timeout=seconds)
        except queue.Empty:
            return None

    def begin(self, number: object) -> threading.Event:
        """Return the event by which the answer of this number is stopped; set, where it was already."""
        event = threading.Event()
        with self._lock:
            self._current = (number, event)
            if number in self._stopped:
                event.set()
        return event

    def _read(self) -> None:
        for line in self._lines:
            try:
                request = json.loads(line)
            except ValueError:
                continue
            if isinstance(request, dict) and "stop" in request:
                self._stop(request["stop"])
            elif isinstance(request, dict):
                self._requests.put(request)
        os._exit(0)  # nobody listens: in the middle of an answer, too

    def _stop(self, number: object) -> None:
        with self._lock:
            self._stopped.add(number)
            if self._current is not None and self._current[0] == number:
                self._current[1].set()


def _load(target: str, say: Say) -> Generator:
    from tuneloom.adapters.target import load_target, resolve_target
    from tuneloom.generate.generator import Generator

    resolved = resolve_target(target, say=lambda line: say("says", text=line))
    loaded = load_target(resolved)
    say("ready", base=resolved.base.name, adapter=resolved.adapter is not None)
    return Generator(loaded.model, loaded.renderer)


def _serve(generator: Generator, request: Mapping[str, Any], inbox: Inbox, say: Say) -> None:
    """Answer one request; a mistake in it is told, and the next one may come."""
    number = request.get("id")
    stop = inbox.begin(number)
    try:
        _answer(generator, request, stop, say)
    except TuneloomError as error:
        say("error", id=number, message=str(error))
    except Exception as error:  # a chat goes on after whatever one question did
        say("error", id=number, message=f"{type(error).__name__}: {error}")


def _answer(generator: Generator, request: Mapping[str, Any], stop: threading.Event, say: Say) -> None:
    from tuneloom.types import Conversation, Message

    number, begun = request.get("id"), time.monotonic()
    messages = tuple(Message(message["role"], message["content"]) for message in request["messages"])
    settings = settings_of(request.get("settings") or {})
    if stop.is_set():
        say("end", id=number, text="", finished=False, stopped=True, tokens=0, seconds=0.0)
        return
    stream = generator.stream(Conversation(messages), settings, base=bool(request.get("base")), stop=stop)
    while True:
        try:
            say("piece", id=number, text=next(stream))
        except StopIteration as end:
            answer = end.value
            break
    stopped = not answer.finished and len(answer.ids) < settings.max_new_tokens
    seconds = round(time.monotonic() - begun, 2)
    tokens = len(answer.ids)
    say("end", id=number, text=str(answer), finished=answer.finished, stopped=stopped, tokens=tokens, seconds=seconds)


def settings_of(values: Mapping[str, Any]) -> GenerationConfig:
    """Return settings of generation; temperature 0 is greedy.

    Raises:
        UserError: a setting out of its range.
    """
    from pydantic import ValidationError

    given = dict(values)
    temperature = given.pop("temperature", 0)
    given["do_sample"] = bool(temperature)
    if temperature:
        given["temperature"] = temperature
    try:
        return GenerationConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError("a setting is out of its range", where=name, got=str(first["input"]), expected=first["msg"]) from error


def _own_stdout() -> TextIO:
    """Keep stdout for the events alone; whatever else prints goes to stderr."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _teller(out: TextIO) -> Say:
    def say(event: str, **fields: object) -> None:
        out.write(json.dumps({"event": event, **fields}) + "\n")
        out.flush()

    return say


if __name__ == "__main__":
    sys.exit(main())
