"""Write a run as a model that other tools read, and show the check that it passed."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from nicegui import ui
from starlette.requests import Request

from tuneloom.studio.evaluations import (
    export_bytes,
    export_place,
    export_report,
    free_export_name,
    said_steps,
    start_export,
)
from tuneloom.studio.frame import Studio, frame, id_of
from tuneloom.studio.job_view import job_head, job_list, job_log, target_name, when_it_changes
from tuneloom.studio.jobs import Job
from tuneloom.studio.picker import TargetPicker
from tuneloom.studio.said import heard, heard_step
from tuneloom.studio.targets import base_model_type, choices, find_choice, has_adapter
from tuneloom.studio.texts import Texts

_FORMATS = ("merged", "adapter", "chatglm")
_PRECISIONS = ("auto", "bf16", "fp16", "fp32")
_CHATGLM = "chatglm"


def add(studio: Studio) -> None:
    """Register the pages."""

    @ui.page("/export")
    def page(request: Request, target: str | None = None) -> None:
        known = find_choice(choices(studio, adapters_only=True), target)
        with frame(studio, request, "frame.export") as texts:
            ui.label(texts("frame.export")).classes("page-title").props('role="heading" aria-level="1"')
            ExportForm(studio, texts, known.target if known else None)
            job_list(studio, texts, "export", texts("export.past"), _described)

    @ui.page("/export/{job_id}")
    def one(request: Request, job_id: str) -> None:
        job = studio.jobs.get(job_id)
        with frame(studio, request, "frame.export") as texts:
            if job is None or job.kind != "export":
                ui.label(texts("frame.not_found")).classes("note bad")
                return
            _job_page(studio, texts, job)

    del page, one


def _described(job: Job) -> str:
    return f"{job.about.get('to')} · {Path(str(job.about.get('out'))).name}"


class ExportForm:
    """What to write, in which format, and where."""

    def __init__(self, studio: Studio, texts: Texts, target: str | None) -> None:
        self._studio = studio
        self._texts = texts
        self._key = secrets.token_hex(8)
        self._proposed = ""
        with ui.element("section").classes("panel stack"):
            self._picker = TargetPicker(studio, texts, target, lambda _: self._show(), adapters_only=True)
            with ui.element("div").classes("form-line"):
                names = {name: texts(f"export.{name}") for name in _FORMATS}
                self._to = ui.select(names, value="merged", label=texts("export.to"), on_change=lambda _: self._show())
                precisions = {name: texts("export.auto") if name == "auto" else name for name in _PRECISIONS}
                self._precision = ui.select(precisions, value="auto", label=texts("export.precision"))
                self._name = ui.input(texts("export.name"), on_change=lambda _: self._check()).props("maxlength=100")
                for control in (self._to, self._precision, self._name):
                    control.props("dense outlined options-dense").classes("grow")
            self._note = ui.label().classes("small muted")
            self._place = ui.label().classes("mono muted")
            with ui.element("div").classes("line"):
                self._start = ui.button(texts("export.start"), on_click=self._begin).props("no-caps unelevated")
                self._why = ui.label().classes("small muted").props('role="status"')
        self._show()

    def _show(self) -> None:
        """Show what goes with the target and the format; propose a name unless one was typed."""
        target, to = self._picker.target, str(self._to.value)
        self._precision.set_enabled(to != "adapter")
        self._note.set_text(self._texts(f"export.{to}_help"))
        if target and (self._name.value or "") == self._proposed:
            run = Path(target).parent if Path(target).name.startswith("checkpoint-") else Path(target)
            self._proposed = free_export_name(self._studio, f"{run.name}-{to}")
            self._name.set_value(self._proposed)
        self._check()

    def _check(self) -> None:
        """Let the button be pressed, or say why not."""
        place = export_place(self._studio, self._name.value or "")
        self._place.set_text(str(place) if place else "")
        missing = self._missing(place)
        self._start.set_enabled(missing is None)
        self._why.set_text(self._texts(missing) if missing else "")

    def _missing(self, place: Path | None) -> str | None:
        target, to = self._picker.target, self._to.value
        if not target:
            return "export.no_run"
        if to == "chatglm" and base_model_type(target) != _CHATGLM:
            return "export.no_chatglm"
        if to == "adapter" and not has_adapter(target):
            return "export.no_adapter"
        if place is None:
            return "export.bad_name"
        return "export.taken" if place.exists() else None

    def _begin(self) -> None:
        target, place = self._picker.target, export_place(self._studio, self._name.value or "")
        if not target or place is None:
            return
        job = start_export(self._studio, self._key, target, str(self._to.value), str(self._precision.value), place)
        ui.navigate.to(f"/export/{job.id}")


def _job_page(studio: Studio, texts: Texts, job: Job) -> None:
    with ui.element("div").classes("line"):
        ui.label(target_name(job)).classes("page-title").props('role="heading" aria-level="1"')
        with ui.element("a").classes("push").props('href="/export"'):
            ui.label(texts("export.new"))

    @ui.refreshable
    def whole() -> None:
        with ui.element("section").classes("panel stack"):
            job_head(studio, texts, job, _described(job))
            _draw_steps(texts, job)
            if job.ended() == "done":
                _draw_result(texts, job)
            job_log(texts, job)

    whole()
    when_it_changes(job, whole.refresh)


def _draw_steps(texts: Texts, job: Job) -> None:
    steps, running = said_steps(job.log_tail()), job.ended() == "running"
    with ui.element("ol").classes("steps"):
        for number, step in enumerate(steps, 1):
            now = running and number == len(steps)
            with ui.element("li").classes("line").props('aria-current="step"' if now else ""):
                ui.element("div").classes(
                    "dot live" if now else "dot done" if job.ended() == "done" or number < len(steps) else "dot"
                )
                ui.label(heard_step(texts, step)).style("min-width:0;overflow-wrap:anywhere;flex:1")


def _draw_result(texts: Texts, job: Job) -> None:
    out = str(job.about.get("out"))
    report = export_report(job)
    if report is None:
        ui.label(texts("export.gone", place=out)).classes("note bad")
        return
    check = report.get("check") or {}
    ui.label(texts("export.passed" if check.get("passed") else "export.not_passed")).classes("note strong")
    with ui.element("table").classes("plain figures"):
        for label, value in [*_check_rows(texts, check), (texts("export.size"), _size(export_bytes(job)))]:
            with ui.element("tr"):
                for text in (label, value):
                    with ui.element("td"):
                        ui.label(text)
    for note in report.get("notes") or ():
        ui.label(heard(texts, str(note))).classes("note")
    with ui.element("div").classes("line"):
        ui.label(out).classes("mono").style("min-width:0;overflow-wrap:anywhere")
        copied = ui.label().classes("small good").props('role="status"')

        def copy() -> None:
            ui.clipboard.write(out)
            copied.set_text(texts("export.copied"))

        ui.button(texts("export.copy"), on_click=copy).props("outline dense no-caps padding='2px 12px'")
        if job.about.get("to") != "adapter":
            with ui.element("a").props(f'href="/chat?target={id_of(out)}"'):
                ui.label(texts("export.talk"))


def _check_rows(texts: Texts, check: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the check's figures with their labels: a merged model's, or an adapter's."""
    shown = {
        "max_logit_difference": "{:.2e}",
        "mean_kl": "{:.2e}",
        "top1_agreement": "{:.1%}",
        "positions": "{:,}",
        "layers": "{:,}",
        "max_difference": "{:.1e}",
    }
    return [
        (texts(f"export.{name}"), form.format(check[name]))
        for name, form in shown.items()
        if isinstance(check.get(name), (int, float))
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"
