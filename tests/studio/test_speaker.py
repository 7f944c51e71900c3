"""The process that answers for the chat, and the conversations that are kept of it; on the tiny model."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tuneloom.studio.chats import Chat, Reply, Sampling, Turn, Visitor, Visitors
from tuneloom.studio.speaker import settings_of
from tuneloom.studio.voice import Voice

PATIENCE_SECONDS = 90
LONG = {"max_new_tokens": 1900, "min_new_tokens": 1900}


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Voice]:
    """One model that talks, for all of these tests."""
    voice = Voice(tmp_path_factory.mktemp("voice"))
    yield voice
    voice.close()


class Heard:
    """The events of one answer."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def __call__(self, event: dict[str, Any]) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, *kinds: str) -> dict[str, Any]:
        """Return the first event of these kinds."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: next((e for e in self.events if e["event"] in kinds), None), PATIENCE_SECONDS
            )
        assert found is not None, self.events
        return found

    @property
    def text(self) -> str:
        return "".join(event["text"] for event in self.events if event["event"] == "piece")


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def ask(voice: Voice, target: Path | str, base: bool = False, text: str = "Who are you?", **settings: Any) -> tuple[int, Heard]:
    heard = Heard()
    messages = [{"role": "user", "content": text}]
    return voice.ask(str(target), messages, {"max_new_tokens": 12, **settings}, base=base, listen=heard), heard


def test_it_streams_what_the_generator_writes_with_the_adapter_and_without(voice: Voice, finished_run: Path) -> None:
    from helpers import asked

    from tuneloom.adapters.target import load_target, resolve_target
    from tuneloom.config import GenerationConfig
    from tuneloom.generate.generator import Generator

    answers = {base: ask(voice, finished_run, base)[1] for base in (False, True)}
    loaded = load_target(resolve_target(str(finished_run)))
    generator = Generator(loaded.model, loaded.renderer)
    for base, heard in answers.items():
        end = heard.wait("end", "error")
        expected = generator.answer(asked("Who are you?"), GenerationConfig(max_new_tokens=12), base=base)
        assert heard.text.strip() == end["text"] == expected.text
        assert (end["tokens"], end["finished"], end["stopped"]) == (len(expected.ids), expected.finished, False)
    assert answers[True].text != answers[False].text
    assert answers[False].text.strip()
    assert voice.state.phase == "ready"
    assert voice.state.adapter is True


def test_an_answer_is_stopped_in_the_middle_and_one_that_waits_before_it_begins(voice: Voice, finished_run: Path) -> None:
    first, second = (ask(voice, finished_run, **LONG) for _ in range(2))
    first[1].wait("piece")
    voice.stop(second[0])
    voice.stop(first[0])
    end = first[1].wait("end", "error")
    assert end["stopped"]
    assert not end["finished"]
    assert 0 < end["tokens"] < 1900
    assert second[1].wait("end", "error")["stopped"]
    assert second[1].text == ""
    assert ask(voice, finished_run)[1].wait("end", "error")["stopped"] is False, "it goes on"


def test_a_setting_out_of_its_range_is_told_and_the_next_question_answered(voice: Voice, finished_run: Path) -> None:
    message = ask(voice, finished_run, top_p=3)[1].wait("end", "error")["message"]
    assert "top_p" in message
    assert ask(voice, finished_run)[1].wait("end", "error")["event"] == "end"


def test_temperature_nought_is_greedy() -> None:
    assert settings_of({"temperature": 0, "top_p": 0.5}).do_sample is False
    warm = settings_of({"temperature": 0.3})
    assert (warm.do_sample, warm.temperature) == (True, 0.3)


def test_a_visitors_conversation_is_kept_and_each_side_remembers_its_own_answers(
    voice: Voice, finished_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "visitor.json"
    visitor = Visitor(file, voice)
    visitor.choose(str(finished_run))
    chat = visitor.chat(str(finished_run), Sampling(max_new_tokens=6))
    visitor.change(chat, system="Be kind.", top_k=3)
    visitor.ask(chat, "Who are you?", ("tuned", "base"))
    assert chat.busy
    visitor.ask(chat, "And now?", ("tuned",))
    assert len(chat.turns) == 1, "nothing is asked while an answer is to come"
    until(lambda: not chat.busy)
    visitor.ask(chat, "Say yes.", ("tuned",))
    until(lambda: not chat.busy)
    replies = chat.turns[0].replies
    assert [message["content"] for message in chat.messages("base")] == [
        "Be kind.",
        *(["Who are you?", replies["base"].text] if replies["base"].text else []),
        "Say yes.",
    ]
    until(
        lambda: Visitor(file, voice).chat(str(finished_run)).turns == chat.turns
    )  # written as the answer ends, a moment later
    again = Visitor(file, voice)
    assert again.target == str(finished_run)
    kept = again.chat(again.target)
    assert (kept.turns, kept.system, kept.sampling) == (chat.turns, "Be kind.", chat.sampling)
    before = kept.turns[-1].replies["tuned"]
    again.again(kept, ("tuned",))
    until(lambda: not kept.busy)
    assert kept.turns[-1].replies["tuned"] is not before
    assert kept.turns[-1].replies["tuned"].text == before.text, "greedy"
    again.clear(kept)
    assert Visitor(file, voice).chat(str(finished_run)).turns == []


def test_an_answer_that_was_being_written_is_shown_as_stopped_and_a_torn_file_as_empty(voice: Voice, tmp_path: Path) -> None:
    file = tmp_path / "visitor.json"
    visitor = Visitor(file, voice)
    chat: Chat = visitor.chat("somewhere")
    chat.turns.append(Turn("Hello?", {"tuned": Reply("writing", "I a")}))
    visitor.save()
    assert Visitor(file, voice).chat("somewhere").turns == [Turn("Hello?", {"tuned": Reply("stopped", "I a")})]
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert Visitor(file, voice).chat("somewhere").turns == []


def test_a_visitors_name_leads_nowhere_else(voice: Voice, tmp_path: Path) -> None:
    visitors = Visitors(tmp_path, voice)
    for name in (None, "", "short", "../../../../etc/passwd", "a" * 20 + "/x", "x" * 65):
        assert visitors.get(name) is None
    assert visitors.get("a" * 24) is visitors.get("a" * 24) is not None


def test_it_ends_with_its_stdin_even_in_the_middle_of_an_answer(voice: Voice, finished_run: Path) -> None:
    _, heard = ask(voice, finished_run, **LONG)
    heard.wait("piece")
    process = psutil.Process(voice.pid)
    assert voice._process is not None
    assert voice._process.stdin is not None
    voice._process.stdin.close()
    process.wait(timeout=PATIENCE_SECONDS)
    assert heard.wait("end", "error")["event"] == "error"
    assert voice.state.phase == "asleep"


def test_a_target_that_is_none_is_told_and_those_who_wait_hear_of_it(voice: Voice) -> None:
    _, heard = ask(voice, "no-such-model")
    message = heard.wait("end", "error")["message"]
    assert "no-such-model" in message
    assert "Traceback" not in message
    assert voice.state.phase == "failed"
    assert voice.state.message == message


def test_the_process_prints_events_alone_and_ends_by_itself_without_work(tiny_model: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    from conftest import ROOT

    command = [sys.executable, "-m", "tuneloom.studio.speaker", "--idle", "0.1", str(tiny_model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert done.stdout is not None
    printed = done.stdout.read()
    assert done.wait(timeout=PATIENCE_SECONDS) == 0
    assert done.stdin is not None
    done.stdin.close()
    events = [json.loads(line) for line in printed.splitlines()]
    assert events[-1] == {"event": "ready", "base": str(tiny_model), "adapter": False}
