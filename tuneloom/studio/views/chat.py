"""Talk to a model: base and tuned side by side, as they write."""

from __future__ import annotations

import secrets
import time
from typing import Any

from nicegui import ui
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tuneloom.errors import UserError
from tuneloom.studio.chats import ENDED, MAX_TEXT, SIDES, Chat, Reply, Sampling, Side, Turn, Visitor, Visitors
from tuneloom.studio.frame import Studio, frame
from tuneloom.studio.picker import TargetPicker
from tuneloom.studio.said import heard, heard_log
from tuneloom.studio.targets import choices, config_of, find_choice, has_adapter
from tuneloom.studio.texts import Texts
from tuneloom.studio.voice import Voice, VoiceState

VISITOR_COOKIE = "tuneloom_visitor"
_LOOK_SECONDS = 0.15
_SEND_ON_ENTER = """(event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  emit(event.target.value);
}"""
_FOLLOW = "if (innerHeight + scrollY > document.body.scrollHeight - 320) scrollTo(0, document.body.scrollHeight)"
_SAMPLING = {
    "temperature": (0.0, 5.0, 0.1, float),
    "top_p": (0.01, 1.0, 0.05, float),
    "top_k": (0, 100_000, 1, int),
    "max_new_tokens": (1, 32_768, 1, int),
    "repetition_penalty": (0.1, 5.0, 0.05, float),
}


def add(studio: Studio) -> None:
    """Register the page."""
    folder = studio.runs / ".studio"
    voice = Voice(folder)
    visitors = Visitors(folder / "chats", voice)

    @ui.page("/chat")
    def page(request: Request, target: str | None = None) -> Response | None:
        visitor = visitors.get(request.cookies.get(VISITOR_COOKIE))
        if visitor is None:
            return _named_visitor(request)
        known = find_choice(choices(studio), target)
        if known is not None:
            visitor.choose(known.target)
            voice.open(known.target)
        with frame(studio, request, "frame.chat") as texts:
            ChatPage(studio, texts, visitor, voice, unknown=target is not None and known is None)
        return None

    del page


def _named_visitor(request: Request) -> Response:
    """Give the visitor a name of their own, and have the page asked for again."""
    place = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    response = RedirectResponse(place, status_code=303)
    response.set_cookie(VISITOR_COOKIE, secrets.token_urlsafe(18), max_age=365 * 86400, samesite="strict", httponly=True)
    return response


class ChatPage:
    """One page of one visitor; several may show the same conversation.

    Args:
        studio: whose runs there are to talk to.
        texts: of the visitor.
        visitor: whose conversation it is.
        voice: the model that talks.
        unknown: whether the address named a run that is not there.
    """

    def __init__(self, studio: Studio, texts: Texts, visitor: Visitor, voice: Voice, *, unknown: bool) -> None:
        self._texts = texts
        self._visitor = visitor
        self._voice = voice
        self._seen: tuple[object, ...] = ()
        self._cells: dict[tuple[int, Side], AnswerCell] = {}
        ui.label(texts("frame.chat")).classes("page-title").props('role="heading" aria-level="1"')
        if unknown:
            ui.label(texts("chat.unknown")).classes("note bad")
        with ui.element("div").classes("panel stack tight"):
            picker = TargetPicker(studio, texts, visitor.target, self._pick)
            status = self._status_line()
        target = visitor.target or picker.target
        self._chat: Chat | None = visitor.chat(target, _defaults(target)) if target else None
        if self._chat is None:
            return
        if visitor.target is None:
            visitor.choose(self._chat.target)
        self._adapter = has_adapter(self._chat.target)
        with status:
            self._switch()
        self._settings(self._chat)
        self._list = ui.element("div").classes("chat-turns stack").props(f'role="log" aria-label="{texts("chat.log")}"')
        self._composer()
        ui.timer(_LOOK_SECONDS, self._look)
        self._look()

    @property
    def _sides(self) -> tuple[Side, ...]:
        if not self._adapter:
            return ("tuned",)
        return ("tuned", "base") if self._visitor.both else ("tuned",)

    def _pick(self, target: str) -> None:
        self._visitor.choose(target)
        self._voice.open(target)
        ui.navigate.to("/chat")

    # The model's state.

    def _status_line(self) -> ui.element:
        with ui.element("div").classes("line small") as line:
            self._dot = ui.element("div").classes("dot").props('aria-hidden="true"')
            self._status = ui.label().classes("muted chat-status").props('role="status"')
            self._reload = ui.button(self._texts("chat.load_again"), on_click=self._open_again).props("flat dense no-caps")
        self._reload.set_visibility(False)
        self._failure = ui.label().classes("note bad mono")
        self._failure.set_visibility(False)
        return line

    def _switch(self) -> None:
        both = ui.switch(self._texts("chat.both"), value=self._visitor.both and self._adapter, on_change=self._show_both)
        both.classes("push").props("dense")
        if not self._adapter:
            both.disable()
            ui.label(self._texts("chat.no_adapter")).classes("muted")

    def _open_again(self) -> None:
        if self._chat is not None:
            self._voice.open(self._chat.target)

    def _show_state(self, state: VoiceState) -> None:
        ours = self._chat is not None and state.target == self._chat.target
        phase = state.phase if ours else "asleep"
        seconds = int(time.monotonic() - state.since)
        values = {"seconds": seconds, "message": heard(self._texts, state.message)}
        self._status.set_text(self._texts(f"chat.{phase}", **values))
        self._dot.classes(replace=f"dot {_DOTS[phase]}")
        self._reload.set_visibility(phase == "failed")
        self._failure.set_visibility(phase == "failed")
        self._failure.set_text(heard_log(self._texts, state.message) if phase == "failed" else "")

    # System prompt and sampling.

    def _settings(self, chat: Chat) -> None:
        texts = self._texts
        with ui.expansion(texts("chat.settings")).classes("chat-settings").props("dense"):
            system = ui.textarea(texts("chat.system"), value=chat.system).props("dense outlined autogrow maxlength=32768")
            system.on_value_change(lambda e: self._visitor.change(chat, system=e.value or ""))
            with ui.element("div").classes("chat-sampling"):
                for name in _SAMPLING:
                    self._number(chat, name)
            ui.label(texts("chat.greedy")).classes("small muted")

    def _number(self, chat: Chat, name: str) -> None:
        low, high, step, kind = _SAMPLING[name]
        field = ui.number(self._texts(f"chat.{name}"), value=getattr(chat.sampling, name), min=low, max=high, step=step).props(
            f'dense outlined hint="{name}"'
        )

        def changed(value: Any) -> None:
            if isinstance(value, (int, float)) and low <= value <= high:
                self._visitor.change(chat, **{name: kind(value)})

        field.on_value_change(lambda e: changed(e.value))

    def _show_both(self, event: Any) -> None:
        self._visitor.show_both(bool(event.value))
        self._seen = ()

    # Questions.

    def _composer(self) -> None:
        texts = self._texts
        with ui.element("div").classes("chat-composer panel stack tight"):
            self._input = ui.textarea(texts("chat.message"), placeholder=texts("chat.enter"))
            self._input.props(f'dense outlined autogrow autofocus maxlength={MAX_TEXT} aria-label="{texts("chat.message")}"')
            self._input.on("keydown", lambda e: self._send(e.args), js_handler=_SEND_ON_ENTER)
            with ui.element("div").classes("line"):
                self._send_button = ui.button(texts("chat.send"), on_click=lambda: self._send(self._input.value))
                self._stop_button = ui.button(texts("chat.stop"), on_click=self._stop).props("outline")
                self._again_button = ui.button(texts("chat.again"), on_click=self._again).props("flat")
                self._clear_button = ui.button(texts("chat.clear"), on_click=self._clear).props("flat").classes("push")
                for button in (self._send_button, self._stop_button, self._again_button, self._clear_button):
                    button.props("dense no-caps padding='4px 14px'")
                self._why = ui.label().classes("small muted")

    def _send(self, text: object) -> None:
        if self._chat is None or not isinstance(text, str) or not text.strip() or self._chat.busy:
            return
        self._visitor.ask(self._chat, text.strip(), self._sides)
        self._input.set_value("")
        self._look()
        ui.run_javascript("scrollTo(0, document.body.scrollHeight)")

    def _stop(self) -> None:
        if self._chat is not None:
            self._visitor.stop(self._chat)

    def _again(self) -> None:
        if self._chat is not None:
            self._visitor.again(self._chat, self._sides)
            self._look()

    def _clear(self) -> None:
        if self._chat is not None:
            self._visitor.clear(self._chat)
            self._look()

    # What is shown, kept up with what is there.

    def _look(self) -> None:
        chat = self._chat
        if chat is None:
            return
        self._show_state(self._voice.state)
        shape = tuple((id(turn), *((side, id(reply)) for side, reply in turn.replies.items())) for turn in chat.turns)
        if (shape, self._visitor.both) != self._seen:
            self._seen = (shape, self._visitor.both)
            self._draw(chat)
        grew = [cell.update() for cell in self._cells.values()]
        if any(grew):
            ui.run_javascript(_FOLLOW)
        self._buttons(chat)

    def _draw(self, chat: Chat) -> None:
        self._cells.clear()
        self._list.clear()
        with self._list:
            if not chat.turns:
                ui.label(self._texts("chat.empty")).classes("muted")
            for number, turn in enumerate(chat.turns):
                self._draw_turn(number, turn)

    def _draw_turn(self, number: int, turn: Turn) -> None:
        ui.label(turn.question).classes("chat-question").props(f'aria-label="{self._texts("chat.you")}"')
        shown = [side for side in SIDES if side in turn.replies and (side == "tuned" or self._visitor.both)]
        with ui.element("div").classes("grid2" if len(shown) > 1 else "stack"):
            for side in shown:
                name = side if self._adapter else "model"
                self._cells[number, side] = AnswerCell(self._texts, turn.replies[side], name)

    def _buttons(self, chat: Chat) -> None:
        self._send_button.set_enabled(not chat.busy)
        self._stop_button.set_visibility(chat.busy)
        self._again_button.set_enabled(bool(chat.turns) and not chat.busy)
        self._clear_button.set_enabled(bool(chat.turns))
        why = "chat.busy" if chat.busy else "chat.nothing_yet" if not chat.turns else None
        self._why.set_text(self._texts(why) if why else "")


class AnswerCell:
    """An answer as it is written.

    Args:
        texts: of the visitor.
        reply: what is shown.
        name: base, tuned, or model where there is one alone.
    """

    def __init__(self, texts: Texts, reply: Reply, name: str) -> None:
        self._texts = texts
        self._reply = reply
        self._seen: tuple[object, ...] = ()
        with ui.element("section").classes(f"chat-answer {name}").props(f'aria-label="{texts(f"chat.{name}")}"'):
            ui.label(texts(f"chat.{name}")).classes("chat-side")
            self._text = ui.label().classes("chat-text")
            self._fault = ui.label().classes("note bad mono")
            self._foot = ui.label().classes("small muted")

    def update(self) -> bool:
        """Show what has changed; return whether something has."""
        reply = self._reply
        now = (reply.status, len(reply.text))
        if now == self._seen:
            return False
        self._seen = now
        nothing = reply.status == "done" and not reply.text
        self._text.set_text(self._texts("chat.nothing") if nothing else reply.text)
        self._text.classes(replace="chat-text muted" if nothing else "chat-text")
        self._text.set_visibility(bool(reply.text) or nothing)
        fault = heard_log(self._texts, reply.error) or self._texts("chat.replaced")
        self._fault.set_text(fault if reply.status == "error" else "")
        self._fault.set_visibility(reply.status == "error")
        self._foot.set_text(self._foot_text(reply))
        return True

    def _foot_text(self, reply: Reply) -> str:
        if reply.status == "error":
            return self._texts("chat.try_again")
        if reply.status not in ENDED:
            return self._texts(f"chat.reply_{reply.status}")
        took = self._texts("chat.took", tokens=reply.tokens, seconds=f"{reply.seconds:.1f}") if reply.tokens else ""
        said = self._texts(f"chat.reply_{reply.status}") if reply.status in ("length", "stopped") else ""
        return " · ".join(filter(None, (took, said)))


_DOTS = {"asleep": "", "loading": "live", "ready": "done", "failed": "failed"}


def _defaults(target: str) -> Sampling:
    try:
        config = config_of(target)
    except (OSError, UserError):
        config = None
    return Sampling.of(config.generation) if config else Sampling()
