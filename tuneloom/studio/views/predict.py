"""Measure a model on a data file: figures, and each answer beside its reference."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from nicegui import app, events, ui
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from tuneloom.studio.evaluations import (
    PREDICTIONS,
    RESULT,
    PredictWish,
    builtin_sets,
    matching,
    prediction_progress,
    prediction_report,
    prediction_rows,
    start_prediction,
    upload_place,
)
from tuneloom.studio.frame import Studio, frame
from tuneloom.studio.job_view import job_head, job_list, job_log, target_name, when_it_changes
from tuneloom.studio.jobs import Job
from tuneloom.studio.picker import TargetPicker
from tuneloom.studio.targets import choices, config_of, find_choice, has_adapter
from tuneloom.studio.texts import Texts

_OWN, _PATH, _UPLOAD = "own", "path", "upload"
_MAX_UPLOAD_BYTES = 512 << 20
_PAGE_ROWS = 20
_METRICS = ("loss", "perplexity", "rouge-1", "rouge-2", "rouge-l", "bleu-4")
_COLUMNS = ("prompt", "answer", "base_answer", "reference")


def add(studio: Studio) -> None:
    """Register the pages, and the download."""

    @ui.page("/predict")
    def page(request: Request, target: str | None = None) -> None:
        known = find_choice(choices(studio), target)
        with frame(studio, request, "frame.predict") as texts:
            ui.label(texts("frame.predict")).classes("page-title").props('role="heading" aria-level="1"')
            PredictForm(studio, texts, known.target if known else None)
            job_list(studio, texts, "predict", texts("predict.past"), lambda job: _data_name(texts, job))

    @ui.page("/predict/{job_id}")
    def one(request: Request, job_id: str) -> None:
        job = studio.jobs.get(job_id)
        with frame(studio, request, "frame.predict") as texts:
            if job is None or job.kind != "predict":
                ui.label(texts("frame.not_found")).classes("note bad")
                return
            _job_page(studio, texts, job)

    @app.get("/predict/{job_id}/predictions.jsonl")
    def download(job_id: str) -> Response:
        job = studio.jobs.get(job_id)
        file = job.folder / RESULT / PREDICTIONS if job is not None else None
        if file is None or not file.is_file():
            return PlainTextResponse("There is nothing here.", status_code=404)
        return FileResponse(file, media_type="application/jsonl", filename=f"predictions-{job_id[:8]}.jsonl")

    del page, one, download


class PredictForm:
    """What to measure, and on what."""

    def __init__(self, studio: Studio, texts: Texts, target: str | None) -> None:
        self._studio = studio
        self._texts = texts
        self._key = secrets.token_hex(8)
        self._uploaded: Path | None = None
        with ui.element("section").classes("panel stack"):
            self._picker = TargetPicker(studio, texts, target, lambda _: self._show())
            self._draw_data()
            with ui.element("div").classes("form-line"):
                self._rows = self._number("predict.max_rows", 50, 1_000_000)
                self._tokens = self._number("predict.max_new_tokens", 128, 32_768)
                self._compare = ui.switch(texts("predict.compare"), value=True)
            self._no_base = ui.label(texts("chat.no_adapter")).classes("small muted")
            with ui.element("div").classes("line"):
                self._start = ui.button(texts("predict.start"), on_click=self._begin).props("no-caps unelevated")
                self._why = ui.label().classes("small muted").props('role="status"')
        self._show()

    def _draw_data(self) -> None:
        texts = self._texts
        with ui.element("div").classes("form-line"):
            self._data = ui.select({}, label=texts("predict.data"), on_change=lambda _: self._show_data())
            self._data.props(f'dense outlined options-dense aria-label="{texts("predict.data")}"').classes("grow")
            self._path = ui.input(texts("predict.path"), on_change=lambda _: self._check()).props(
                "dense outlined maxlength=4096"
            )
            self._path.classes("grow")
        self._upload = ui.upload(
            label=texts("predict.upload_label"),
            auto_upload=True,
            max_files=1,
            max_file_size=_MAX_UPLOAD_BYTES,
            on_upload=self._keep,
            on_rejected=self._refuse,
        ).props('flat bordered accept=".json,.jsonl,.csv,.tsv,.txt,.parquet,.arrow"')
        self._said = ui.label().classes("small muted").props('role="status"')

    def _number(self, key: str, value: int, most: int) -> ui.number:
        field = ui.number(
            self._texts(key), value=value, min=1, max=most, step=1, precision=0, on_change=lambda _: self._check()
        )
        return field.props("dense outlined")

    def _show(self) -> None:
        """Show what goes with the target."""
        target = self._picker.target
        config = config_of(target) if target else None
        options = {_OWN: self._texts("predict.own")} if config and (config.data.validation or config.data.test) else {}
        options |= {name: self._texts("predict.builtin", name=name) for name in builtin_sets()}
        options |= {_PATH: self._texts("predict.a_path"), _UPLOAD: self._texts("predict.upload")}
        value = self._data.value if self._data.value in options else next(iter(options))
        self._data.set_options(options, value=value)
        comparable = target is not None and has_adapter(target)
        self._compare.set_enabled(comparable)
        self._no_base.set_visibility(not comparable)
        self._show_data()

    def _show_data(self) -> None:
        self._path.set_visibility(self._data.value == _PATH)
        self._upload.set_visibility(self._data.value == _UPLOAD)
        self._said.set_visibility(self._data.value == _UPLOAD)
        self._check()

    def _source(self) -> str | None:
        """Return the data's source, "" where none is named yet, None for the run's own rows."""
        if self._data.value == _PATH:
            return (self._path.value or "").strip()
        if self._data.value == _UPLOAD:
            return str(self._uploaded) if self._uploaded else ""
        return None if self._data.value == _OWN else str(self._data.value)

    def _check(self) -> None:
        """Let the button be pressed, or say why not."""
        missing = None
        if not self._picker.target:
            missing = "target.none"
        elif self._source() == "":
            missing = "predict.no_data"
        elif not self._rows.value or not self._tokens.value:
            missing = "predict.no_number"
        self._start.set_enabled(missing is None)
        self._why.set_text(self._texts(missing) if missing else "")

    async def _keep(self, event: events.UploadEventArguments) -> None:
        place = upload_place(self._studio, event.file.name)
        await event.file.save(place)
        self._uploaded = place
        self._said.set_text(self._texts("predict.uploaded", name=place.name))
        self._check()

    def _refuse(self) -> None:
        self._said.set_text(self._texts("predict.rejected"))

    def _begin(self) -> None:
        target = self._picker.target
        if target is None or self._source() == "":
            return
        compare = bool(self._compare.value) and has_adapter(target)
        wish = PredictWish(target, self._source(), int(self._rows.value), int(self._tokens.value), compare)
        job = start_prediction(self._studio, self._key, wish)
        ui.navigate.to(f"/predict/{job.id}")


def _data_name(texts: Texts, job: Job) -> str:
    data = job.about.get("data")
    return texts("predict.own") if data is None else Path(str(data)).name


def _job_page(studio: Studio, texts: Texts, job: Job) -> None:
    with ui.element("div").classes("line"):
        ui.label(target_name(job)).classes("page-title").props('role="heading" aria-level="1"')
        with ui.element("a").classes("push").props('href="/predict"'):
            ui.label(texts("predict.new"))

    @ui.refreshable
    def whole() -> None:
        with ui.element("section").classes("panel stack"):
            job_head(
                studio,
                texts,
                job,
                f"{_data_name(texts, job)} · {texts('predict.rows_at_most', rows=job.about.get('max_rows'))}",
            )
            if job.ended() == "running":
                _draw_progress(texts, job)
            report = prediction_report(job)
            if report is not None:
                _draw_figures(texts, report)
            job_log(texts, job)
        if report is not None:
            Answers(texts, job)

    whole()
    when_it_changes(job, whole.refresh)


def _draw_progress(texts: Texts, job: Job) -> None:
    told = prediction_progress(job.log_tail())
    if told is None:
        ui.label(texts("predict.loading")).classes("muted")
        return
    side = texts("chat.base" if told.side == "base" else "chat.model")
    ui.label(f"{side}: {texts(f'predict.doing_{told.what}')} {told.done}/{told.total}").classes("muted")
    share = 100 * told.done / max(1, told.total)
    bar = ui.element("div").classes("bar")
    with bar.props(f'role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100"'):
        ui.element("div").style(f"width:{share:.1f}%")


def _draw_figures(texts: Texts, report: dict[str, Any]) -> None:
    sides = [side for side in ("base", "model") if isinstance(report.get(side), dict)]
    with ui.element("table").classes("plain figures"):
        with ui.element("tr"):
            for name in ("", *(texts(f"chat.{'tuned' if side == 'model' and len(sides) > 1 else side}") for side in sides)):
                with ui.element("th"):
                    ui.label(name)
        for metric in _METRICS:
            values = [_figure(report[side], metric) for side in sides]
            if any(values):
                with ui.element("tr"):
                    for text in (texts(f"predict.{metric.replace('-', '_')}"), *values):
                        with ui.element("td"):
                            ui.label(text)
    counts = {name: f"{report.get(name) or 0:,}" for name in ("num_samples", "num_supervised_tokens", "num_answers")}
    ui.label(texts("predict.counts", **counts)).classes("small muted")
    problems = [str(problem) for problem in report.get("problems") or ()]
    if problems:
        with ui.expansion(texts("predict.problems", number=len(problems))).props("dense"):
            ui.label("\n".join(problems[:200])).classes("mono")


def _figure(side: dict[str, Any], metric: str) -> str:
    value = side.get(metric) if metric in side else (side.get("scores") or {}).get(metric)
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.4f}" if metric in ("loss", "bleu-4") else f"{value:,.2f}"


class Answers:
    """The answers of a prediction: paged, and searched by a text."""

    def __init__(self, texts: Texts, job: Job) -> None:
        self._texts = texts
        self._rows = prediction_rows(job)
        self._found = self._rows
        self._page = 0
        with ui.element("section").classes("panel stack tight"):
            with ui.element("div").classes("line"):
                search = ui.input(texts("predict.search"), on_change=lambda e: self._search(e.value or ""))
                search.props("dense outlined clearable debounce=200")
                self._count = ui.label().classes("small muted").props('role="status"')
                self._back = ui.button("‹", on_click=lambda: self._turn(-1)).classes("push")
                self._next = ui.button("›", on_click=lambda: self._turn(1))
                for button, key in ((self._back, "predict.back"), (self._next, "predict.next")):
                    button.props(f'flat dense aria-label="{texts(key)}"')
                with ui.element("a").props(f'href="/predict/{job.id}/predictions.jsonl" download'):
                    ui.label(texts("predict.download"))
            self._table = ui.element("table").classes("plain answers")
        self._draw()

    def _search(self, text: str) -> None:
        self._found, self._page = matching(self._rows, text), 0
        self._draw()

    def _turn(self, pages: int) -> None:
        self._page += pages
        self._draw()

    def _draw(self) -> None:
        begin = self._page * _PAGE_ROWS
        shown = self._found[begin : begin + _PAGE_ROWS]
        end = begin + len(shown)
        self._count.set_text(self._texts("predict.shown", begin=min(begin + 1, end), end=end, total=len(self._found)))
        self._back.set_enabled(self._page > 0)
        self._next.set_enabled(end < len(self._found))
        columns = [name for name in _COLUMNS if any(name in row for row in self._rows)]
        self._table.clear()
        with self._table:
            with ui.element("tr"):
                for name in columns:
                    with ui.element("th"):
                        ui.label(self._texts(f"predict.{name}"))
            for row in shown:
                with ui.element("tr"):
                    for name in columns:
                        with ui.element("td").props(f'data-label="{self._texts(f"predict.{name}")}"'):
                            text = row.get(name, "")
                            ui.label(text or self._texts("predict.empty")).classes("" if text else "muted")
