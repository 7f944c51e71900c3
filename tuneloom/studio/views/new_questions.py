"""The five questions of a new run on the page, and the report of one's own data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from nicegui import events, ui

from tuneloom.config import EMBEDDED_MODEL
from tuneloom.errors import UserError
from tuneloom.models.embedded import EMBEDDED, ready_folder
from tuneloom.studio import questions
from tuneloom.studio.drafts import MAX_UPLOAD_BYTES
from tuneloom.studio.forms import get
from tuneloom.studio.said import heard
from tuneloom.studio.views.new_form import Form, facts, suggest

_BASES_SHOWN = 4
_SUFFIXES = ".json .jsonl .csv .tsv .txt .parquet .arrow"


def question(number: int, title: str) -> Any:
    """Return the panel of a question, to draw in."""
    panel = ui.element("section").classes("panel stack tight")
    with panel, ui.element("h2").classes("new-question"):
        ui.label(str(number)).classes("new-number").props('aria-hidden="true"')
        ui.label(title)
    return panel


_ARROWS = """(event) => {
  const steps = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity};
  const step = steps[event.key];
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = [...event.currentTarget.querySelectorAll("[role=radio]")];
  const at = all.indexOf(event.target.closest("[role=radio]"));
  if (at < 0) return;
  event.preventDefault();
  const next = all[Number.isFinite(step) ? (at + step + all.length) % all.length : step < 0 ? 0 : all.length - 1];
  next.focus();
  if (CHOOSE) next.click();
}"""


class Cards:
    """Things of which one is chosen: one stop of the Tab key, and the arrow keys go from one to the next.

    Args:
        label: of the group.
        classes: of the group's element.
        choose: whether the arrow keys choose what they come to; without, Enter and the space bar do.
    """

    def __init__(self, label: str, classes: str = "new-cards", *, choose: bool = True) -> None:
        self.group = ui.element("div").classes(classes).props('role="radiogroup"')
        self.group.props["aria-label"] = label
        self.group.on("keydown", js_handler=_ARROWS.replace("CHOOSE", str(choose).lower()))
        self._all: list[tuple[Any, Callable[[], bool]]] = []

    def add(self, button: Any, is_chosen: Callable[[], bool]) -> None:
        """Take something that is chosen by a click into the group."""
        button.props["role"] = "radio"
        self._all.append((button, is_chosen))

    def show(self) -> None:
        """Show which is chosen; that one, or the first where none is, is where the Tab key comes in."""
        states = [is_chosen() for _, is_chosen in self._all]
        entry = states.index(True) if True in states else 0
        for number, ((button, _), state) in enumerate(zip(self._all, states, strict=True)):
            button.props["aria-checked"] = "true" if state else "false"
            button.props["tabindex"] = "0" if number == entry else "-1"


def card(title: str, text: str, role: str, on_click: Callable[[], object], key: str = "") -> Any:
    """Draw something that is chosen by a click: its name and a sentence on it."""
    button = ui.element("button").classes("new-card").props(f'type="button" role="{role}"')
    with button:
        ui.label(title).classes("strong")
        if text:
            ui.label(text).classes("small muted")
        if key:
            ui.label(key).classes("key")
    button.on("click", on_click)
    return button


def chosen(button: Any, is_chosen: bool) -> None:
    """Show whether a card is chosen."""
    button.props["aria-checked"] = "true" if is_chosen else "false"


def _cards(form: Form, kind: str, names: tuple[str, ...], now: Callable[[], Any], take: Any) -> None:
    """Draw cards of which one is chosen, and beneath them a sentence where it is none of them."""
    texts = form.texts
    cards = Cards(texts(f"new.{kind}"))
    with cards.group:
        for name in names:
            act = lambda name=name: form.change(lambda values: take(values, name))  # noqa: E731
            button = card(texts(f"new.{kind}_{name}"), texts(f"new.{kind}_{name}_help"), "radio", act)
            cards.add(button, lambda name=name: now() == name)  # type: ignore[misc]
    form.watch(cards.group, cards.show)
    other = ui.label(texts(f"new.{kind}_other")).classes("small muted")
    form.watch(other, lambda: other.set_visibility(now() is None))


def ask_model(form: Form) -> None:
    """Draw the question of the base model."""
    texts = form.texts
    used = dict.fromkeys(run.base_model for run in form.studio.summaries() if run.base_model)
    with question(1, texts("new.model")):
        cards = Cards(texts("new.model_label"))
        with cards.group:
            for name in EMBEDDED:
                if name == EMBEDDED_MODEL or ready_folder(name) is not None:
                    about = texts("new.model_embedded" if name == EMBEDDED_MODEL else "new.model_pulled")
                    _base_card(form, cards, name, about)
            for name in [name for name in used if name not in EMBEDDED][:_BASES_SHOWN]:
                _base_card(form, cards, name, texts("new.model_used"))
        form.watch(cards.group, cards.show)
        path = ui.input(
            texts("new.model_label"),
            on_change=lambda event: form.change(
                lambda values: questions.set_base(values, (event.value or "").strip()), event.sender
            ),
        ).props("dense outlined debounce=300 no-error-icon hide-bottom-space")
        path.props["aria-label"] = texts("new.model_label")
        suggest(path, [name for name in {**dict.fromkeys(EMBEDDED), **used} if ready_folder(name) or name not in EMBEDDED])
        form.watch(path, lambda: path.set_value(str(get(form.values, "base_model.path") or "")))
        ui.label(texts("new.model_help")).classes("small muted")
        _hint(form, "base_model.path")


def _base_card(form: Form, cards: Cards, name: str, about: str) -> None:
    shown = PurePath(name).name if len(name) > 40 else name
    button = card(shown, about, "radio", lambda: form.change(lambda values: questions.set_base(values, name)))
    button.props["title"] = name
    cards.add(button, lambda: get(form.values, "base_model.path") == name)


def _hint(form: Form, key: str) -> None:
    """Draw a place for the mistake of a setting."""
    hint = ui.label("").classes("small bad").props('role="status"')

    def show() -> None:
        hint.set_text(form.mistake_at(key) or "")
        hint.set_visibility(bool(hint.text))

    form.watch(hint, show, counts=True)


def ask_data(form: Form) -> None:
    """Draw the question of the data: built-in sets, files of one's own, the report of each."""
    texts = form.texts
    with question(2, texts("new.data")):
        with ui.element("div").classes("new-cards").props(f'role="group" aria-label="{texts("new.data")}"'):
            for name in questions.SETS:
                _set_card(form, name)
        with ui.element("div").classes("line new-add"):
            _upload(form)
            path = ui.input(texts("new.path_label")).props("dense outlined").classes("new-grow")
            path.props["aria-label"] = texts("new.path_label")

            def add() -> None:
                if wanted := (path.value or "").strip():
                    form.change(lambda values: questions.add_path(values, wanted))
                    path.set_value("")

            path.on("keydown.enter", add)
            ui.button(texts("new.add"), on_click=add).props("outline no-caps")
        _own_sources(form)
        _hint(form, "data.train")
        nothing = ui.label(texts("new.no_data")).classes("small bad")
        form.watch(nothing, lambda: nothing.set_visibility(not questions.sources(form.values)))


def _set_card(form: Form, name: str) -> None:
    def toggle() -> None:
        form.change(lambda values: questions.choose_set(values, name, not questions.has_set(values, name)))

    button = card(form.texts(f"new.set_{name}"), form.texts(f"new.set_{name}_help"), "checkbox", toggle)
    form.watch(button, lambda: chosen(button, questions.has_set(form.values, name)))


def size_text(num_bytes: int) -> str:
    """Return a size for people."""
    return f"{num_bytes / (1 << 20):,.0f} MB"


def _upload(form: Form) -> None:
    """Draw the button that uploads a data file into the studio's folder of uploads."""
    texts = form.texts
    limit = size_text(MAX_UPLOAD_BYTES)
    told = {"limit": limit, "suffixes": _SUFFIXES}

    def refuse(message: str) -> None:
        note.set_text(message)
        note.set_visibility(True)

    async def arrived(event: events.UploadEventArguments) -> None:
        upload.reset()
        if event.file.size() > MAX_UPLOAD_BYTES:
            refuse(texts("new.upload_too_large", limit=limit))
            return
        try:
            place = form.drafts.upload_place(event.file.name)
        except UserError as error:
            refuse(facts(texts, error))
            return
        partial = place.with_name(f".{place.name}.partial")
        await event.file.save(partial)
        partial.rename(place)
        note.set_visibility(False)
        form.change(lambda values: questions.add_path(values, str(place)))

    upload = ui.upload(
        auto_upload=True,
        max_file_size=MAX_UPLOAD_BYTES,
        on_upload=arrived,
        on_rejected=lambda: refuse(texts("new.upload_rejected", **told)),
    )
    upload.classes("new-hidden").props(f'accept="{_SUFFIXES.replace(" ", ",")}"')
    button = ui.button(texts("new.upload")).props("outline no-caps")
    button.props["title"] = texts("new.upload_help", **told)
    button.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
    note = ui.label("").classes("small bad").props('role="alert"')
    note.set_visibility(False)


def _own_sources(form: Form) -> None:
    """Draw the sources that belong to no set, each with its report."""
    box = ui.element("div").classes("stack tight")
    drawn: list[Any] = []

    def show() -> None:
        paths = questions.own_paths(form.values)
        wanted = [(path, form.reports.get(path)) for path in paths]
        if drawn != wanted:
            drawn[:] = wanted
            box.clear()
            with box:
                for path, report in wanted:
                    _own_source(form, path, report)

    form.watch(box, show, counts=True)


def _own_source(form: Form, path: str, answer: dict[str, Any] | None) -> None:
    texts = form.texts
    with ui.element("div").classes("panel stack tight new-report"):
        with ui.element("div").classes("line").style("flex-wrap:nowrap"):
            ui.label(PurePath(path).name or path).classes("strong ellipsis").style("flex:1;min-width:0").props["title"] = path
            remove = ui.button("×", on_click=lambda: form.change(lambda values: questions.remove_path(values, path)))
            remove.props("flat dense").props["aria-label"] = texts("new.remove", name=PurePath(path).name or path)
        if not answer or "progress" in answer:
            ui.label(texts("new.reading") + _share(answer)).classes("small muted")
        elif "check" in answer:
            _report(form, answer["check"])
        elif "error" in answer:
            ui.label(facts(texts, UserError(**answer["error"]))).classes("small bad")
        elif "absent" in answer:
            ui.label(texts("new.absent", what=answer["absent"])).classes("small muted")
        else:
            ui.label(texts("new.fault", reason=heard(texts, answer.get("fault", "?")))).classes("small bad")


def _share(answer: dict[str, Any] | None) -> str:
    _, done, total = (answer or {}).get("progress", ("", 0, 0))
    return f" {done / total:.0%}" if total else ""


def _report(form: Form, found: dict[str, Any]) -> None:
    """Draw what became of a source's rows."""
    texts = form.texts
    formats = ", ".join(name for source in found["sources"] for name in source["formats"])
    counts = {key: f"{found[key]:,}" for key in ("read", "used", "dropped", "repaired")}
    ui.label(texts("new.report", **counts)).classes("warn" if found["dropped"] else "")
    if found["train"].get("samples"):
        about = {"tokens": f"{found['train']['tokens']:,}", "longest": f"{found['train']['longest']:,}"}
        more = {key: f"{found[key]:,}" for key in ("cut", "duplicates")} | {"cutoff": found["cutoff_len"]}
        ui.label(f"{texts('new.report_format', formats=formats)}. {texts('new.report_more', **about, **more)}").classes(
            "small muted"
        )
    if found["unfilled"]:
        ui.label(texts("new.report_unfilled", names=", ".join(found["unfilled"]))).classes("small warn")
    if found["leaked_probes"]:
        ui.label(texts("new.report_leaked", count=len(found["leaked_probes"]))).classes("small warn")
    if found["problems"]:
        _problems(form, found)
    if found["rows"]:
        ui.label(texts("new.report_rows")).classes("label")
        with ui.element("div").classes("new-chats"):
            for row in found["rows"]:
                _chat(form, row)


def _problems(form: Form, found: dict[str, Any]) -> None:
    texts = form.texts
    listed = found["problems"]
    reasons = {**found["dropped_by_reason"], **found["repaired_by_reason"]}
    ui.label(
        texts("new.report_problems")
        + ": "
        + ", ".join(f"{count} × {heard(texts, reason, 'row')}" for reason, count in reasons.items())
    ).classes("label")
    with ui.element("div").classes("new-problems").props('tabindex="0"').props(f'aria-label="{texts("new.report_problems")}"'):
        for problem in listed:
            with ui.element("div").classes("line small").style("gap:8px"):
                ui.label(f"{PurePath(problem['file']).name}:{problem['line']}").classes("key")
                ui.label(f"{problem['field']}: {heard(texts, problem['reason'], 'row')}")
                if problem["action"] == "dropped":
                    got = texts("new.report_got", value=problem["value"])
                    ui.label(f"{got}; {heard(texts, problem['mend'], 'row')}").classes("muted")


def _chat(form: Form, messages: list[dict[str, str]]) -> None:
    with ui.element("div").classes("stack tight new-chat"):
        for message in messages:
            with ui.element("div").classes(f"new-bubble {message['role']}"):
                ui.label(form.texts(f"new.role_{message['role']}")).classes("key")
                ui.label(message["content"]).style("white-space:pre-wrap;overflow-wrap:anywhere")


def ask_persona(form: Form) -> None:
    """Draw the question of name and author."""
    texts = form.texts
    with question(3, texts("new.persona")), ui.element("div").classes("grid2"):
        for name in ("name", "author"):
            with ui.element("div").classes("new-setting"):
                _variable(form, name)


def _variable(form: Form, name: str) -> None:
    texts, key = form.texts, f"data.variables.{name}"
    box = ui.input(
        texts(f"new.{name}_label"),
        placeholder={"name": "Loomi", "author": "Tuneloom"}[name],
        on_change=lambda event: form.change(
            lambda values: questions.set_variable(values, name, event.value or ""), event.sender
        ),
    ).props("dense outlined debounce=200 maxlength=80")
    box.props["aria-label"] = texts(f"new.{name}_label")
    box.props["data-key"] = key
    form.asked[name] = box
    ui.label(key).classes("key")
    hint = ui.label("").classes("small bad").props('role="alert"')

    def show() -> None:
        missing = form.wanted_name and not questions.variable(form.values, name) and questions.needs_name(form.values)
        hint.set_text(texts(f"new.{name}_needed") if missing else form.mistake_at(key) or "")

    form.watch(hint, show, counts=True)
    form.watch(box, lambda: box.set_value(questions.variable(form.values, name)))


def ask_method(form: Form) -> None:
    """Draw the question of the method."""
    with question(4, form.texts("new.method")):
        _cards(form, "method", questions.METHODS, lambda: questions.method(form.values), questions.set_method)


def ask_effort(form: Form) -> None:
    """Draw the question of the effort."""
    with question(5, form.texts("new.effort")):
        _cards(form, "effort", questions.EFFORTS, lambda: questions.effort(form.values), questions.set_effort)
