"""The form of a new run on the page: what it holds, who is told when it changes, and the controls of all settings."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.element import Element

from tuneloom.config import Config, dump_config
from tuneloom.errors import UserError
from tuneloom.studio.drafts import Draft, Drafts, run_config, taken_names
from tuneloom.studio.forms import (
    Setting,
    check,
    entered,
    get,
    put,
    setting_key,
    settings,
    shown,
    source_settings,
)
from tuneloom.studio.frame import Studio
from tuneloom.studio.planning import Planning
from tuneloom.studio.questions import Values, needs_name
from tuneloom.studio.reasons import missing_trackers, reasons, source_reasons
from tuneloom.studio.said import heard_mistake
from tuneloom.studio.settings_zh import SETTINGS_ZH
from tuneloom.studio.texts import Texts

SECTIONS = ("run", "base_model", "data", "adapter", "training", "generation", "evaluation")
_DEBOUNCE_SECONDS = 0.5
_STAND_INS = {"name": "Loomi", "author": "Tuneloom"}
_WIDE = ("lines", "map")


class Form:
    """What a page's form holds. Each change is checked, kept on disk, shown by all who watch, and counted.

    Attributes:
        values: a config's values, wrong ones among them.
        config: the same as a config, None while something is wrong.
        mistakes: by the key of the setting.
        reasons: why controls are disabled, by the key of the setting.
        counted: the planner's last answer; empty while there is none.
        progress: what the planner reads meanwhile, how far it is, of how much.
        reports: the planner's last answer on each source of the user's own, by path.
        frozen: whether a run was started, so that nothing changes any more.
        wanted_name: whether Start was pressed, so that a name that is missing is told.
        asked: the controls of name and author.
        counting: whether an answer is on its way.
    """

    def __init__(self, studio: Studio, drafts: Drafts, planning: Planning, texts: Texts) -> None:
        self.studio = studio
        self.drafts = drafts
        self.planning = planning
        self.texts = texts
        self.page = secrets.token_hex(4)
        self.draft = drafts.load()
        self.stamp = drafts.stamp()
        self.counted: dict[str, Any] = {}
        self.progress: tuple[str, int, int] | None = None
        self.reports: dict[str, dict[str, Any]] = {}
        self.frozen = False
        self.wanted_name = False
        self.asked: dict[str, ui.input] = {}
        self._watching: list[tuple[Element, Callable[[], object], bool]] = []
        self._showing = False
        self._due: float | None = time.monotonic()
        self._asked: dict[str, int] = {}
        self._checked: dict[str, object] = {}
        self.config: Config | None
        self.mistakes: dict[str, UserError]
        self.config, self.mistakes = check(self.values)
        self.reasons = reasons(self.values)

    @property
    def values(self) -> Values:
        return self.draft.values

    @property
    def counting(self) -> bool:
        return self._due is not None or "" in self._asked

    def watch(self, element: Element, show: Callable[[], object], *, counts: bool = False) -> None:
        """Call `show` now and after each change, as long as an element is on the page.

        Args:
            element: that it shows something in.
            show: is told.
            counts: tell it of the planner's answers too.
        """
        self._watching.append((element, show, counts))
        self._show(show)

    def change(self, act: Callable[[Values], object], by: Element | None = None) -> None:
        """Change the values; `by` is the control that shows the change already."""
        if self._showing or self.frozen:
            return
        if self.drafts.stamp() != self.stamp:  # another page was quicker
            self._take(self.drafts.load(), by)
        act(self.values)
        self.keep(self.draft, by)

    def keep(self, draft: Draft, by: Element | None = None) -> None:
        """Take a draft, keep it on disk, show it."""
        self.drafts.save(draft)
        self._take(draft, by)

    def follow(self) -> None:
        """Take what another page has changed."""
        if not self.frozen and self.drafts.stamp() != self.stamp:
            self._take(self.drafts.load(), None)

    def _take(self, draft: Draft, by: Element | None) -> None:
        self.draft = draft
        self.stamp = self.drafts.stamp()
        self.config, self.mistakes = check(self.values)
        self.reasons = reasons(self.values)
        self._due = time.monotonic() + _DEBOUNCE_SECONDS
        self.show(by)

    def show(self, by: Element | None = None) -> None:
        """Have everything shown anew but the control that is being typed in."""
        self._watching = [watching for watching in self._watching if not watching[0].is_deleted]
        for element, show, _ in list(self._watching):
            if element is not by and not element.is_deleted:
                self._show(show)

    def _show(self, show: Callable[[], object]) -> None:
        before, self._showing = self._showing, True
        try:
            show()
        finally:
            self._showing = before

    def yaml(self) -> str | None:
        """Return the YAML that Start runs, None while something is wrong."""
        try:
            return dump_config(run_config(self.values, self.studio.runs, taken_names(self.studio.runs, self.studio.jobs)))
        except UserError:
            return None

    # Counting.

    def tick(self, own_paths: list[str]) -> None:
        """Ask the planner what has to be asked, and take what it has answered."""
        if self._due is not None and time.monotonic() >= self._due:
            self._due = None
            self._ask(own_paths)
            self.show_counts()
        changed = False
        for name, number in list(self._asked.items()):
            answer = self.planning.told(number)
            if answer == {}:
                continue
            if answer is None or "progress" not in answer:
                del self._asked[name]
            changed = True
            if name:
                self.reports[name] = answer or {}
            elif answer and "progress" in answer:
                self.progress = answer["progress"]
            elif answer is not None:
                self.counted, self.progress = answer, None
        if changed:
            self.show_counts()

    def _ask(self, own_paths: list[str]) -> None:
        if self.config is None:
            self._forget("")
            self.counted = {}
            return
        plain = self.config.model_dump(mode="json")
        if needs_name(self.values):  # counted before it is typed
            plain["data"]["variables"] = _STAND_INS | plain["data"]["variables"]
        self._forget("")
        self._asked[""] = self.planning.ask(self.page, "plan", plain)
        for path in own_paths:
            of_it = [source for source in plain["data"]["train"] if source["path"] == path]
            wanted = (of_it, plain["base_model"], {**plain["data"], "train": None, "validation": None, "test": None})
            if self._checked.get(path) != wanted:
                self._checked[path] = wanted
                self._forget(path)
                self._asked[path] = self.planning.ask(f"{self.page} {path}", "check", plain, path)

    def _forget(self, name: str) -> None:
        if (number := self._asked.pop(name, None)) is not None:
            self.planning.forget(number)

    def show_counts(self) -> None:
        """Have the planner's answers shown; controls of settings stay as they are."""
        for element, show, counts in list(self._watching):
            if counts and not element.is_deleted:
                self._show(show)

    def mistake_at(self, key: str) -> str | None:
        """Return the message to show beside a setting: the loader's, else the planner's."""
        if key in self.mistakes:
            return facts(self.texts, self.mistakes[key])
        error = self.counted.get("error")
        return facts(self.texts, UserError(**error)) if error and self.counted.get("key") == key else None


def facts(texts: Texts, error: UserError) -> str:
    """Return a loader's message in a line: what, where it is no key, got, expected, what to do."""
    heard = heard_mistake(texts, error)
    told = [heard.expected] if heard.expected else []
    told += [texts("new.got", value=heard.got)] if heard.got else []
    between = texts("new.between") + " "
    if error.what.startswith("wrong value for") and told:
        return between.join(told)
    place = f" ({error.where})" if error.where and ":" in error.where else ""
    mend = [heard.mend] if heard.mend and not (error.mend or "").startswith("docs/") else []
    return between.join([heard.what + place, *told, *mend])


# Controls.


def describe(texts: Texts, setting: Setting) -> str:
    """Return a setting's description in the visitor's language."""
    if texts.language == "en":
        return setting.description
    return SETTINGS_ZH.get(setting.key) or SETTINGS_ZH.get(setting.name) or setting.description


def section_controls(form: Form, section: str) -> None:
    """Draw the controls of a section."""
    with ui.element("div").classes("grid2 new-settings"):
        for setting in settings():
            if setting.section == section:
                control(form, setting, lambda: form.reasons)


def control(form: Form, setting: Setting, why: Callable[[], dict[str, Any]]) -> None:
    """Draw a setting's key, control, description, and beneath it why it does nothing or is wrong.

    Args:
        form: that it is part of.
        setting: what it sets.
        why: gives the reasons for which controls are disabled, by key.
    """
    if setting.kind in ("sources", "held"):
        _source_list(form, setting)
        return
    with ui.element("div").classes("new-setting" + (" new-wide" if setting.kind in _WIDE else "")):
        ui.label(setting.key).classes("key")
        made, show_value = _made(form, setting)
        made.props["aria-label"] = setting.key
        ui.label(describe(form.texts, setting)).classes("small muted")
        hint = ui.label("").classes("small").props('role="status"')

    def show() -> None:
        reason = why().get(setting.key)
        wrong = form.mistake_at(setting.key)
        text = wrong or (form.texts(reason[0], **reason[1]) if reason else "")
        if setting.key == "training.report_to" and not wrong and get(form.values, setting.key) in missing_trackers():
            package = get(form.values, setting.key)
            text = form.texts("new.why_missing", package=package, command=f"pip install {package}")
        hint.set_text(text)
        hint.classes(add="bad", remove="warn") if wrong else hint.classes(add="warn", remove="bad")
        made.props(add="error" if wrong else None, remove=None if wrong else "error")
        made.set_enabled(reason is None or wrong is not None)

    form.watch(hint, show, counts=True)
    form.watch(made, show_value)


def _made(form: Form, setting: Setting) -> tuple[Any, Callable[[], object]]:
    """Make a setting's control; return it, and what shows the form's value in it."""
    key, kind = setting.key, setting.kind

    def value() -> Any:
        return get(form.values, key)

    if kind == "switch":
        switch = ui.switch(on_change=lambda event: form.change(lambda values: put(values, key, event.value), event.sender))
        return switch, lambda: switch.set_value(value() is True)
    if kind == "choice":
        return _choice(form, setting)
    made: Any = ui.textarea if kind in _WIDE else ui.input
    text = made(
        on_change=lambda event: form.change(lambda values: put(values, key, entered(setting, event.value or "")), event.sender)
    )
    text.props("dense outlined debounce=300 no-error-icon hide-bottom-space" + (" autogrow" if kind in _WIDE else ""))
    if setting.optional or kind in _WIDE:
        text.props["placeholder"] = form.texts("new.empty")
    if kind in ("scalar", "words") and setting.choices:
        _suggest(text, [str(choice) for choice in setting.choices])
    return text, lambda: text.set_value(shown(setting, value()))


def _choice(form: Form, setting: Setting) -> tuple[Any, Callable[[], object]]:
    key = setting.key
    labels = {choice: shown(setting, choice) for choice in setting.choices}
    select = ui.select(labels, on_change=lambda event: form.change(lambda values: put(values, key, event.value), event.sender))
    select.props("dense outlined options-dense no-error-icon hide-bottom-space")
    if setting.optional:
        select.props("clearable")

    def show() -> None:
        value = get(form.values, key)
        known = value is None or value in [*labels]
        if not known:
            select.set_options({**labels, str(value): str(value)})
        select.set_value(value if known else str(value))

    return select, show


def _suggest(text: Any, words: list[str]) -> None:
    """Offer words in the browser's own list beneath an input."""
    name = f"words-{text.id}"
    with ui.element("datalist").props(f'id="{name}"'):
        for word in words:
            ui.element("option").props["value"] = word
    text.props(f"list={name}")


def suggest(text: Any, words: list[str]) -> None:
    """Offer words beneath an input."""
    _suggest(text, words)


# Sources of data.


def _source_list(form: Form, setting: Setting) -> None:
    """Draw a list of sources, each with its own settings; of `held`, a share in its place."""
    texts, key = form.texts, setting.key
    with ui.element("div").classes("new-setting new-wide"):
        ui.label(key).classes("key")
        ui.label(describe(texts, setting)).classes("small muted")
        hint = ui.label("").classes("small bad").props('role="status"')
        held = _held_kind(form, setting) if setting.kind == "held" else None
        box = ui.element("div").classes("stack tight")
        add = ui.button(texts("new.add_source"), on_click=lambda: form.change(lambda values: _append(values, key)))
        add.props("flat dense no-caps size=12px").style("align-self:flex-start")
    drawn: list[int] = []

    def show() -> None:
        found = get(form.values, key)
        sources = found if isinstance(found, list) else []
        hint.set_text(form.mistake_at(key) or "")
        add.set_visibility(held is None or isinstance(found, list))
        if drawn != [len(sources)]:
            drawn[:] = [len(sources)]
            box.clear()
            with box:
                for number in range(len(sources)):
                    _source(form, key, number)

    form.watch(hint, show, counts=True)


def _append(values: Values, key: str) -> None:
    found = get(values, key)
    put(values, key, [*(found if isinstance(found, list) else []), {"path": ""}])


def _held_kind(form: Form, setting: Setting) -> Any:
    texts, key = form.texts, setting.key
    choices = {"share": texts("new.held_share"), "sources": texts("new.held_sources")}
    with ui.element("div").classes("line"):
        kind = ui.select(
            choices,
            value="share",
            on_change=lambda event: form.change(lambda v: put(v, key, [{"path": ""}] if event.value == "sources" else 0)),
        ).props("dense outlined options-dense")
        kind.props["aria-label"] = f"{key}: {texts('new.held_kind')}"
        share = ui.input(
            on_change=lambda event: form.change(lambda v: put(v, key, entered(setting, event.value or "")), event.sender)
        ).props("dense outlined debounce=300 no-error-icon hide-bottom-space")
        share.props["aria-label"] = key

    def show() -> None:
        value = get(form.values, key)
        kind.set_value("sources" if isinstance(value, list) else "share")
        share.set_visibility(not isinstance(value, list))
        if not isinstance(value, list):
            share.set_value(shown(setting, value))

    form.watch(share, show)
    return kind


def _source(form: Form, key: str, number: int) -> None:
    prefix = f"{key}[{number}]"
    texts = form.texts

    def remove() -> None:
        def act(values: Values) -> None:
            rest = [source for at, source in enumerate(get(values, key) or []) if at != number]
            put(values, key, rest if rest or key != "data.validation" else 0)

        form.change(act)

    made: list[str] = []

    def opened(event: Any) -> None:
        if event.value and not made:
            made.append(prefix)
            with expansion, ui.element("div").classes("grid2 new-settings"):
                for setting in source_settings(prefix):
                    control(form, setting, lambda: source_reasons(get(form.values, prefix) or {}, prefix))

    with ui.element("div").classes("line").style("flex-wrap:nowrap;align-items:flex-start"):
        expansion = ui.expansion("", on_value_change=opened).classes("new-source new-grow")
        away = ui.button("×", on_click=remove).props("flat dense")
        away.props["aria-label"] = texts("new.remove", name=prefix)

    def show() -> None:
        path = get(form.values, f"{prefix}.path")
        expansion.set_text(str(path or texts("new.source", number=number + 1)))
        if not path:
            expansion.open()

    form.watch(expansion, show)


def section_of(key: str) -> str:
    """Return the section that a mistake's key is in."""
    known = {setting.key: setting.section for setting in settings()}
    return known.get(setting_key(key, known), "run")
