"""A conversation in a terminal: streamed, several turns, one model or base and tuned side by side."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuneloom.config import GenerationConfig
from tuneloom.generate.generator import Generator
from tuneloom.types import Conversation, Message, ToolCall


class ChatSession:
    """Keeps the history and asks the model.

    Args:
        generator: the model.
        settings: how to write.
        system: system prompt, if any.
        base: with the adapter off.
        compare: answer with base and tuned; each keeps its own history.
        tools: functions that the model may call; a person gives the results.
    """

    def __init__(
        self,
        generator: Generator,
        settings: GenerationConfig,
        *,
        system: str | None,
        base: bool,
        compare: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._generator = generator
        self._settings = settings
        self._tools = tuple(tools)
        self._start: tuple[Message, ...] = (Message("system", system),) if system else ()
        self._sides = (True, False) if compare else (base,)
        self._histories: dict[bool, tuple[Message, ...]] = dict.fromkeys(self._sides, self._start)
        self._console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

    def talk(self) -> None:
        """Ask the user until they leave; after calls, for the result of each."""
        calls: tuple[ToolCall, ...] = ()
        try:
            while (said := self._listen(calls)) is not None:
                calls = self._tell(said) if said else ()
        except (EOFError, KeyboardInterrupt):
            self._console.print()

    def _listen(self, calls: tuple[ToolCall, ...]) -> tuple[Message, ...] | None:
        """Return the results of calls or, where there are none, a question; () for nothing, None to leave."""
        said: list[Message] = []
        for call in calls or (None,):
            text = input(f"\nresult of {call.name}: " if call else "\nyou: ").strip()
            if text in ("/exit", "/quit"):
                return None
            if text == "/clear":
                self._histories = dict.fromkeys(self._sides, self._start)
                return ()
            if call:
                said.append(Message("tool", text, name=call.name))
            elif text:
                said.append(Message("user", text))
        return tuple(said)

    def ask(self, text: str) -> None:
        """Ask one question and show the answer as it is written, then what it calls; Ctrl-C ends the answer, not the chat."""
        self._tell((Message("user", text),))

    def _tell(self, said: tuple[Message, ...]) -> tuple[ToolCall, ...]:
        """Say something, show the answer, and return the calls in it."""
        if len(self._sides) == 2:
            self._ask_both(said)
            return ()
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            self._console.print(Text(piece), end="")

        calls = self._answer(self._sides[0], said, show)
        if shown or not calls:
            self._console.print()
        for call in calls:
            self._console.print(Text(str(call)))
        return calls

    def _ask_both(self, said: tuple[Message, ...]) -> None:
        shown = dict.fromkeys(self._sides, "")
        if not self._console.is_terminal:
            for side in self._sides:
                self._answer(side, said, lambda piece, side=side: shown.update({side: shown[side] + piece}))  # type: ignore[misc]
                self._console.print(Text(f"{'base ' if side else 'tuned'}  {shown[side]}"))
            return
        with Live(console=self._console, refresh_per_second=12) as live:
            for side in self._sides:

                def show(piece: str, side: bool = side) -> None:
                    shown[side] += piece
                    live.update(_columns(shown))

                self._answer(side, said, show)

    def _answer(self, side: bool, said: tuple[Message, ...], show: Callable[[str], None]) -> tuple[ToolCall, ...]:
        """Show an answer as it is written, keep it in the history, and return the calls in it."""
        asked = (*self._histories[side], *said)
        stop = threading.Event()
        pieces: list[str] = []
        calls: tuple[ToolCall, ...] = ()
        stream = self._generator.stream(Conversation(asked, tools=self._tools), self._settings, base=side, stop=stop)
        try:
            while True:
                pieces.append(next(stream))
                show(pieces[-1])
        except StopIteration as end:
            calls = end.value.tool_calls
        except KeyboardInterrupt:
            stop.set()
        self._histories[side] = (*asked, Message("assistant", "".join(pieces), tool_calls=calls))
        return calls


def _columns(shown: dict[bool, str]) -> Table:
    table = Table(expand=True)
    table.add_column("base", ratio=1)
    table.add_column("tuned", ratio=1)
    table.add_row(Text(shown[True]), Text(shown[False]))
    return table
