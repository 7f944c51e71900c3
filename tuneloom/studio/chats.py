"""Conversations of the studio's visitors: kept on disk as they grow, so that a refresh or another tab shows the same.

RUNS/.studio/chats/<visitor>.json
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tuneloom.config import GenerationConfig
from tuneloom.rundir import write_atomically
from tuneloom.studio.voice import Voice

Side = Literal["base", "tuned"]
Status = Literal["waiting", "writing", "done", "length", "stopped", "error"]
SIDES: tuple[Side, ...] = ("base", "tuned")
ENDED = ("done", "length", "stopped", "error")
MAX_TEXT = 32_768
_KEPT_TARGETS = 20
_SAVE_EVERY_SECONDS = 1.0
_VISITOR = re.compile(r"[A-Za-z0-9_-]{16,64}")


@dataclass
class Reply:
    """One side's answer.

    Attributes:
        status: waiting, writing, or how it ended: length: at max_new_tokens.
        text: what is written of it; of an error, its message.
        tokens, seconds: what it took.
    """

    status: Status = "waiting"
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass
class Turn:
    """A question and its answers."""

    question: str
    replies: dict[Side, Reply] = field(default_factory=dict)


@dataclass
class Sampling:
    """How answers are written; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, settings: GenerationConfig) -> Sampling:
        """Return a run's own settings."""
        temperature = settings.temperature if settings.do_sample else 0.0
        return cls(temperature, settings.top_p, settings.top_k, settings.max_new_tokens, settings.repetition_penalty)


@dataclass
class Chat:
    """A conversation with one target.

    Attributes:
        target: what is talked to.
        system: the system prompt, "" for none.
        sampling: how answers are written.
        turns: what was said.
        version: grows with every change; not kept.
    """

    target: str
    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    version: int = 0

    def messages(self, side: Side) -> list[dict[str, str]]:
        """Return what a side is asked: its own earlier answers, and the last question.

        A turn that it has not answered is left out, since roles must alternate.
        """
        found = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in self.turns[:-1]:
            reply = turn.replies.get(side)
            if reply is not None and reply.status != "error" and reply.text:
                found += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": reply.text}]
        return [*found, {"role": "user", "content": self.turns[-1].question}]

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self.turns) and any(reply.status not in ENDED for reply in self.turns[-1].replies.values())


class Visitor:
    """A visitor's conversations, one a target, and what they chose.

    Args:
        file: where they are kept.
        voice: the model that talks.

    Attributes:
        target: that is being talked to; None before one is chosen.
        both: whether the base is shown beside the tuned model.
    """

    def __init__(self, file: Path, voice: Voice) -> None:
        self._file = file
        self._voice = voice
        self._lock = threading.RLock()
        self._numbers: dict[tuple[str, Side], int] = {}
        self._saved = 0.0
        self._chats: dict[str, Chat] = {}
        self.target: str | None = None
        self.both = True
        self._load()

    def chat(self, target: str, sampling: Sampling | None = None) -> Chat:
        """Return the conversation with a target, a new one with these settings where there is none."""
        with self._lock:
            chat = self._chats.pop(target, None) or Chat(target, sampling or Sampling())
            self._chats[target] = chat  # the last one used is the last to be forgotten
            return chat

    def choose(self, target: str) -> None:
        """Talk to another target."""
        with self._lock:
            if target != self.target:
                self.target = target
                self.save()

    def ask(self, chat: Chat, question: str, sides: tuple[Side, ...]) -> None:
        """Ask a question of these sides; nothing happens while an answer is still to come, nor without a text."""
        with self._lock:
            if chat.busy or not question.strip():
                return
            chat.turns.append(Turn(question[:MAX_TEXT]))
            self._answer(chat, sides)

    def again(self, chat: Chat, sides: tuple[Side, ...]) -> None:
        """Have the last question answered anew."""
        with self._lock:
            if chat.busy or not chat.turns:
                return
            chat.turns[-1].replies.clear()
            self._answer(chat, sides)

    def stop(self, chat: Chat) -> None:
        """End the answers that are being written; what is there stays."""
        with self._lock:
            numbers = [self._numbers.get((chat.target, side)) for side in SIDES]
        for number in numbers:
            if number is not None:
                self._voice.stop(number)

    def clear(self, chat: Chat) -> None:
        """Begin anew with the same target, system prompt and settings."""
        self.stop(chat)
        with self._lock:
            chat.turns = []
            self._changed(chat)

    def change(self, chat: Chat, **values: Any) -> None:
        """Change the system prompt or settings of sampling."""
        with self._lock:
            for name, value in values.items():
                setattr(chat if name == "system" else chat.sampling, name, value)
            self.save()

    def show_both(self, both: bool) -> None:
        """Show the base beside the tuned model, or not."""
        with self._lock:
            self.both = both
            self.save()

    def save(self) -> None:
        """Write everything; the oldest conversations beyond the newest few are forgotten."""
        with self._lock:
            while len(self._chats) > _KEPT_TARGETS:
                del self._chats[next(iter(self._chats))]
            kept = [{name: value for name, value in asdict(chat).items() if name != "version"} for chat in self._chats.values()]
            state = {"target": self.target, "both": self.both, "chats": kept}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(state, indent=1) + "\n")
            self._saved = time.monotonic()

    def _answer(self, chat: Chat, sides: tuple[Side, ...]) -> None:
        turn = chat.turns[-1]
        for side in sides:
            turn.replies[side] = Reply()
        self._changed(chat)
        for side in sides:
            reply = turn.replies[side]

            def listen(event: Mapping[str, Any], reply: Reply = reply) -> None:
                self._take(chat, reply, event)

            self._numbers[chat.target, side] = self._voice.ask(
                chat.target, chat.messages(side), asdict(chat.sampling), base=side == "base", listen=listen
            )

    def _take(self, chat: Chat, reply: Reply, event: Mapping[str, Any]) -> None:
        """Take one event of an answer; called from the voice's thread."""
        kind = event["event"]
        if kind == "piece":
            reply.status = "writing"
            reply.text += str(event["text"])
        elif kind == "end":
            reply.status = "stopped" if event["stopped"] else "done" if event["finished"] else "length"
            reply.text = str(event["text"])  # whole, with the calls; blanks at its ends left out
            reply.tokens, reply.seconds = int(event["tokens"]), float(event["seconds"])
        else:
            reply.status, reply.error = "error", str(event.get("message", ""))
        self._changed(chat, at_once=kind != "piece")

    def _changed(self, chat: Chat, at_once: bool = True) -> None:
        chat.version += 1
        if at_once or time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
            self.save()

    def _load(self) -> None:
        """Read what is kept; a torn file is an empty one. Answers that were being written were stopped."""
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
            self.target = state["target"]
            self.both = bool(state["both"])
            self._chats = {chat.target: chat for chat in map(_chat, state["chats"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._chats = {}


def _chat(values: Mapping[str, Any]) -> Chat:
    turns = []
    for turn in values["turns"]:
        replies = {side: Reply(**turn["replies"][side]) for side in SIDES if side in turn["replies"]}
        for reply in replies.values():
            reply.status = reply.status if reply.status in ENDED else "stopped"
        turns.append(Turn(str(turn["question"]), replies))
    return Chat(str(values["target"]), Sampling(**values["sampling"]), str(values["system"]), turns)


class Visitors:
    """All visitors of a studio.

    Args:
        folder: of their files.
        voice: the model that talks.
    """

    def __init__(self, folder: Path, voice: Voice) -> None:
        self._folder = folder
        self._voice = voice
        self._known: dict[str, Visitor] = {}

    def get(self, name: str | None) -> Visitor | None:
        """Return a visitor by the name in their cookie; None for what is no name."""
        if name is None or not _VISITOR.fullmatch(name):
            return None
        if name not in self._known:
            self._known[name] = Visitor(self._folder / f"{name}.json", self._voice)
        return self._known[name]
