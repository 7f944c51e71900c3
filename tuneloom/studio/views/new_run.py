"""A new run: five questions, everything else under Advanced, what will run, Start."""

from __future__ import annotations

from typing import Any

from nicegui import events, ui
from starlette.requests import Request

from tuneloom.config.load import MAX_CONFIG_BYTES
from tuneloom.errors import UserError
from tuneloom.studio import questions
from tuneloom.studio.drafts import Draft, Drafts, read_text, taken_names
from tuneloom.studio.frame import Studio, frame
from tuneloom.studio.planning import Planning
from tuneloom.studio.said import heard, heard_log
from tuneloom.studio.texts import Texts
from tuneloom.studio.views import new_questions
from tuneloom.studio.views.new_form import SECTIONS, Form, facts, section_controls, section_of

_TICK_SECONDS = 0.25
_FOLLOW_SECONDS = 1.5


def add(studio: Studio) -> None:
    """Register the page."""
    drafts = Drafts(studio.runs)
    planning = Planning(studio.runs)

    @ui.page("/")
    def page(request: Request) -> None:
        with frame(studio, request, "frame.new_run") as texts:
            form = Form(studio, drafts, planning, texts)
            with ui.element("div").classes("new-page"):
                with ui.element("div").classes("stack new-asked"):
                    _questions(form)
                with ui.element("div").classes("new-summary"):
                    _aside(form)
                with ui.element("div").classes("new-all"):
                    _advanced(form)
            ui.timer(_TICK_SECONDS, lambda: form.tick(questions.own_paths(form.values)))
            ui.timer(_FOLLOW_SECONDS, form.follow)

    del page


def _aside(form: Form) -> None:
    with ui.element("aside").classes("stack new-aside").props(f'aria-label="{form.texts("new.summary")}"'):
        _summary(form)
        _yaml(form)
        _load(form)


def _questions(form: Form) -> None:
    _presets(form)
    new_questions.ask_model(form)
    new_questions.ask_data(form)
    new_questions.ask_persona(form)
    new_questions.ask_method(form)
    new_questions.ask_effort(form)


def _presets(form: Form) -> None:
    texts = form.texts

    def begin_anew() -> None:
        form.keep(Draft(form.draft.key, questions.new_values()))

    with ui.element("div").classes("line"):
        ui.label(texts("frame.new_run")).classes("new-title").props('role="heading" aria-level="1"')
        ui.label(texts("new.presets")).classes("label push").props('aria-hidden="true"')
        # A preset replaces all that is set: the arrow keys only go to it.
        presets = new_questions.Cards(texts("new.presets"), "line new-presets", choose=False)
        with presets.group:
            for name in questions.PRESETS:
                act = lambda name=name: form.keep(Draft(form.draft.key, questions.preset(name, form.values)))  # noqa: E731
                button = ui.button(texts(f"new.preset_{name}"), on_click=act).props(
                    "outline dense no-caps size=12px padding='4px 10px'"
                )
                button.props["title"] = texts(f"new.preset_{name}_help")
                presets.add(button, lambda name=name: form.values == questions.preset(name, form.values))  # type: ignore[misc]
        form.watch(presets.group, presets.show)
        ui.button(texts("new.reset"), on_click=begin_anew).props("flat dense no-caps size=12px")


def _advanced(form: Form) -> None:
    """Draw the sections of all settings; each is made when it is opened first."""
    texts = form.texts
    with ui.expansion(texts("new.advanced")).classes("panel new-advanced") as outer:
        for section in SECTIONS:
            _section(form, section)
    outer.props["aria-label"] = texts("new.advanced")


def _section(form: Form, section: str) -> None:
    made: list[str] = []

    def opened(event: Any) -> None:
        if event.value and not made:
            made.append(section)
            with expansion:
                section_controls(form, section)

    expansion = ui.expansion(form.texts(f"new.section_{section}"), on_value_change=opened).classes("new-section")

    def show() -> None:
        wrong = sorted(key for key in form.mistakes if section_of(key) == section)
        expansion.props["caption"] = ", ".join(wrong)

    form.watch(expansion, show)


# What will run.


def _summary(form: Form) -> None:
    texts = form.texts
    with ui.element("section").classes("panel stack tight"):
        with ui.element("div").classes("line"):
            ui.label(texts("new.summary")).classes("strong").props('role="heading" aria-level="2"')
            busy = ui.label(texts("new.computing")).classes("small muted push").props('role="status"')
        name = ui.label("").classes("mono")
        figures = {key: _figure(texts(f"new.{key}")) for key in ("samples", "tokens", "steps", "time")}
        note = ui.label("").classes("small muted")
        mistakes = ui.element("div").classes("stack tight")
        button = ui.button(texts("new.start")).props("unelevated no-caps").classes("new-start")
        failed = ui.label("").classes("small bad").props('role="alert"')
        button.on_click(lambda: _start(form, button, failed))

    def show() -> None:
        busy.set_visibility(form.counting and form.config is not None)
        name.set_text(questions.run_name(form.values, taken_names(form.studio.runs, form.studio.jobs)))
        _show_figures(form, figures)
        note.set_text(_note(form))
        note.set_visibility(bool(note.text))
        _show_mistakes(form, mistakes)

    form.watch(name, show, counts=True)


def _figure(label: str) -> tuple[Any, Any]:
    """Draw a figure; return the labels of its value and of what explains it."""
    with ui.element("div").classes("new-figure"):
        ui.label(label).classes("label")
        value = ui.label("").classes("figure")
        more = ui.label("").classes("small muted")
    return value, more


def _show_figures(form: Form, figures: dict[str, tuple[Any, Any]]) -> None:
    plan = form.counted.get("plan")
    found = _figures(form.texts, plan, _is_approximate(form)) if plan else {}
    for key, (value, more) in figures.items():
        text, explained = found.get(key, ("—", ""))
        value.set_text(text)
        more.set_text(explained)


def _figures(texts: Texts, plan: dict[str, Any], approximate: bool) -> dict[str, tuple[str, str]]:
    """Return each figure and what explains it."""
    about = "≈ " if approximate else ""
    rows = {"rows": f"{plan['read']:,}", "dropped": f"{plan['dropped']:,}", "cut": f"{plan['cut']:,}"}
    samples_more = texts("new.samples_more", **rows)
    if plan["validation"]:
        samples_more += "; " + texts("new.validation", count=f"{plan['validation']:,}")
    steps_more = texts("new.steps_more", epochs=f"{plan['epochs']:g}", batch=plan["samples_per_step"])
    time = texts("new.time_unknown"), texts("new.time_unknown_more", device=plan["device"])
    if plan["seconds"] is not None:
        rate = f"{plan['tokens_per_second']:,.0f}"
        explained = texts("new.time_more", rate=rate, run=plan["speed_of"], device=plan["device"])
        time = about + _duration(texts, plan["seconds"]), explained
    return {
        "samples": (f"{about}{plan['samples']:,}", samples_more),
        "tokens": (f"{about}{plan['tokens']:,}", texts("new.tokens_more", longest=f"{plan['longest']:,}")),
        "steps": (f"{plan['steps']:,}", steps_more),
        "time": time,
    }


def _duration(texts: Texts, seconds: float) -> str:
    whole = max(1, round(seconds))
    if whole < 60:
        return texts("new.seconds", s=whole)
    if whole < 3600:
        return texts("new.minutes", m=whole // 60, s=f"{whole % 60:02d}")
    return texts("new.hours", h=f"{whole // 3600:,}", m=f"{whole % 3600 // 60:02d}")


def _is_approximate(form: Form) -> bool:
    """Whether the count stands on something that is not known yet."""
    unnamed = questions.needs_name(form.values) and not questions.variable(form.values, "name")
    return unnamed or bool(form.counted.get("plan", {}).get("approximate"))


def _note(form: Form) -> str:
    """Return what is to be said of the figures."""
    texts, counted = form.texts, form.counted
    if form.config is None:
        return texts("new.not_counted")
    if form.progress is not None:
        what, done, total = heard(texts, form.progress[0]), *form.progress[1:]
        return f"{what}: {done / total:.0%}" if total else what
    if "absent" in counted:
        return texts("new.absent", what=counted["absent"])
    if "fault" in counted:
        return texts("new.fault", reason=heard(texts, counted["fault"]))
    return texts("new.about") if counted.get("plan") and _is_approximate(form) else ""


def _show_mistakes(form: Form, box: Any) -> None:
    """List what must be mended before the run can start."""
    found = {key: facts(form.texts, error) for key, error in form.mistakes.items()}
    if not found and (error := form.counted.get("error")):
        found = {str(form.counted.get("key")): facts(form.texts, UserError(**error))}
    if found == getattr(box, "found", None):
        return
    box.found = found
    box.clear()
    with box:
        if found and form.config is not None:
            ui.label(form.texts("new.mistakes")).classes("label")
        for key, message in found.items():
            with ui.element("div").classes("note bad small"):
                ui.label(key).classes("key")
                ui.label(message).style("overflow-wrap:anywhere")


def _start(form: Form, button: Any, failed: Any) -> None:
    """Start the run, once however often it is pressed, and go to its view."""
    form.wanted_name = True
    missing = [name for name in ("name", "author") if not questions.variable(form.values, name)]
    if missing and questions.needs_name(form.values):
        form.show()
        form.asked[missing[0]].run_method("focus")
        return
    if not form.counting and (error := form.counted.get("error")):
        failed.set_text(form.texts("new.start_failed", reason=facts(form.texts, UserError(**error))))
        return
    failed.set_text("")
    try:
        job = form.drafts.start(form.studio.jobs, form.draft)
    except (UserError, OSError) as fault:
        form.show()
        reason = facts(form.texts, fault) if isinstance(fault, UserError) else str(fault)
        failed.set_text(form.texts("new.start_failed", reason=reason))
        return
    form.frozen = True
    button.set_text(form.texts("new.starting"))
    ui.navigate.to(f"/runs/job-{job.id}")


# The YAML.


def _yaml(form: Form) -> None:
    texts = form.texts
    expansion = ui.expansion(texts("new.yaml")).classes("panel new-advanced")
    expansion.props["aria-label"] = texts("new.yaml")

    def copy() -> None:
        if text := form.yaml():
            ui.clipboard.write(text)
            button.set_text(texts("new.copied"))

    with expansion:
        button = ui.button(texts("new.copy"), on_click=copy).props("outline dense no-caps size=12px")
        shown = ui.label("").classes("mono new-yaml").props('tabindex="0"')
        shown.props["aria-label"] = texts("new.yaml")

    def show() -> None:
        if expansion.value:
            shown.set_text(form.yaml() or texts("new.yaml_wrong"))
            button.set_text(texts("new.copy"))

    expansion.on_value_change(lambda: show())
    form.watch(shown, show)


def _load(form: Form) -> None:
    """Draw the place where a YAML is pasted or uploaded."""
    texts = form.texts
    expansion = ui.expansion(texts("new.load")).classes("panel new-advanced")
    expansion.props["aria-label"] = texts("new.load")

    def take(text: str) -> None:
        try:
            values = read_text(text)
        except UserError as error:
            told.set_text(heard_log(texts, str(error)))
            told.classes(add="bad", remove="muted")
            return
        values["output_dir"] = str(form.studio.runs)
        form.keep(Draft(form.draft.key, values))
        told.set_text(texts("new.loaded"))
        told.classes(add="muted", remove="bad")

    async def arrived(event: events.UploadEventArguments) -> None:
        upload.reset()
        content = await event.file.read()
        pasted.set_value(content[:MAX_CONFIG_BYTES].decode("utf-8-sig", errors="replace"))
        take(pasted.value or "")

    with expansion, ui.element("div").classes("stack tight"):
        pasted = ui.textarea(texts("new.load_label")).props("dense outlined autogrow debounce=200")
        pasted.props["aria-label"] = texts("new.load_label")
        upload = ui.upload(auto_upload=True, max_file_size=MAX_CONFIG_BYTES, on_upload=arrived).classes("new-hidden")
        with ui.element("div").classes("line"):
            ui.button(texts("new.load_button"), on_click=lambda: take(pasted.value or "")).props("outline no-caps")
            pick = ui.button(texts("new.load_file")).props("flat no-caps")
            pick.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
        told = ui.label("").classes("small mono muted").props('role="status"')
