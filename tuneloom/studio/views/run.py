"""A run: where it stands, its curves, answers, data, settings, log; pause and resume."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException
from nicegui import app, run, ui
from starlette.requests import Request
from starlette.responses import Response

from tuneloom.rundir import RunDirectory
from tuneloom.runs import changed_settings, data_counts, shown_name
from tuneloom.studio.figures import NOTHING, figure, loss, moment, size, span, steps
from tuneloom.studio.frame import ENDED, Studio, frame, id_of, phase_dot
from tuneloom.studio.run_actions import Refusal, metric_rows, resume_run, run_of, stop_run
from tuneloom.studio.run_state import RunLook, Standing
from tuneloom.studio.said import heard, heard_log
from tuneloom.studio.texts import Texts
from tuneloom.studio.views.run_charts import SMOOTH_COOKIE, RunCharts
from tuneloom.studio.views.run_scores import draw_scores, scores_of

JOB = "job-"
_POLL_SECONDS = 1.0
_LITTLE_BYTES = 2 << 20


def add(studio: Studio) -> None:
    """Register the page and the table of its numbers."""

    @ui.page("/runs/{run_id}")
    def page(request: Request, run_id: str) -> None:
        path = studio.run_path(run_id)
        if run_id.startswith(JOB):
            _job_page(studio, request, run_id.removeprefix(JOB))
        elif path is None:
            with frame(studio, request, "frame.runs") as texts:
                ui.label(texts("frame.not_found")).classes("muted")
        else:
            look = RunLook(studio, path)
            with frame(studio, request, "frame.runs") as texts:
                RunPage(look, texts, smooth=request.cookies.get(SMOOTH_COOKIE) != "0").draw()

    @app.get("/runs/{run_id}/metrics.csv")
    def metrics(run_id: str) -> Response:
        path = studio.run_path(run_id)
        if path is None:
            raise HTTPException(404)
        name = quote(f"{shown_name(path)}-metrics.csv", safe="")
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{name}", "cache-control": "no-store"}
        return Response(_table_file(path), media_type="text/csv; charset=utf-8", headers=headers)

    del page, metrics


def _table_file(path: Path) -> str:
    columns, rows = metric_rows(path)
    written = io.StringIO()
    table = csv.DictWriter(written, columns, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


class Part:
    """A part of the page that is drawn again when what it shows has changed, and only then."""

    def __init__(self, draw: Callable[[Any], object], classes: str = "stack") -> None:
        self._draw = draw
        self._seen: object = object()
        self._place = ui.element("div").classes(classes)

    def show(self, content: object) -> None:
        """Show this; None: nothing."""
        if content == self._seen:
            return
        self._seen = content
        self._place.clear()
        self._place.set_visibility(content is not None)
        if content is not None:
            with self._place:
                self._draw(content)


class RunPage:
    """The page of one run."""

    def __init__(self, look: RunLook, texts: Texts, *, smooth: bool) -> None:
        self.look = look
        self.texts = texts
        self.run_id = id_of(look.path)
        self.charts = RunCharts(look, texts, self.run_id, smooth)

    def draw(self) -> None:
        """Draw the page and keep it up to date."""
        little = look_costs_little(self.look.path)
        if little:
            self.look.read()
        with ui.element("div").classes("stack tight"):
            with ui.element("div").classes("line"):
                ui.label(shown_name(self.look.path)).classes("run-name").props('role="heading" aria-level="1"')
                self.head = Part(self._head, "line run-head")
            self.origin = Part(self._origin, "line small muted")
        self.notes = Part(self._notes, "stack tight")
        self._glance()
        self.charts.draw(empty=not little)
        self.scores = Part(lambda scores: draw_scores(self.texts, scores), "panel stack")
        self.answers = Part(self._answers, "panel stack")
        self._books()
        with ui.element("div").classes("panel stack tight"):
            self._heading("run.log")
            self.log = log_box(self.texts("run.log"))
        if little:
            self.tick()
        else:
            self.notes.show((("", self.texts("run.reading"), ""),))
        ui.timer(_POLL_SECONDS, self._follow)

    async def _follow(self) -> None:
        """Read beside the server's loop, where a long run's file takes its time; then show."""
        await run.io_bound(self.look.read)
        self.tick()

    def tick(self) -> None:
        """Look at the run and show what has changed."""
        standing = self.look.standing()
        if standing is None:
            self._gone()
            return
        refusal = self.look.refusal() if standing.resumable else None
        goes_on = standing.resumable and refusal is None
        self.head.show((standing.phase, standing.live, standing.stopping, goes_on, self._reachable(standing)))
        self.notes.show(self._told(standing, refusal))
        self._show_figures(standing)
        self.charts.show()
        self.scores.show(scores_of(self.look.path))
        answers = self.look.answers()
        self.answers.show(answers if answers[1] else None)
        self.checkpoints.show((standing.checkpoints, standing.has_adapter))
        job = self.look.job
        said = heard_log(self.texts, job.log_tail()) if job is not None else ""
        self.log.set_text(said or self.texts("run.no_log"))

    def _gone(self) -> None:
        place = self.look.studio.run_path(self.run_id)
        ui.navigate.to(f"/runs/{id_of(place)}" if place is not None and place != self.look.path else "/runs")

    # The head: what it is called, how it stands, what can be done.

    def _head(self, content: tuple[str, bool, bool, bool, tuple[bool, bool]]) -> None:
        phase, live, stopping, goes_on, (talks, exports) = content
        texts = self.texts
        with ui.element("div").classes("line run-phase").props('role="status"'):
            phase_dot(phase)
            ui.label(texts("run.pausing") if stopping else texts(f"phase.{phase}"))
        with ui.element("div").classes("line push"):
            if live:
                pause = ui.button(texts("run.pause"), icon="pause", on_click=self._pause).props("outline no-caps")
                pause.set_enabled(not stopping)
                pause.props(f'title="{texts("run.pause_help")}"')
            if goes_on:
                self._resume_button()
            if talks:
                _link(texts("frame.chat"), f"/chat?target={self.run_id}", strong=phase == "done")
                _link(texts("frame.predict"), f"/predict?target={self.run_id}")
            if exports:
                _link(texts("frame.export"), f"/export?target={self.run_id}")

    def _resume_button(self) -> None:
        anew = self.look.goes_on_from()[0] is None
        label, help_ = ("run.begin_again", "run.begin_again_help") if anew else ("run.resume", "run.resume_help")
        button = ui.button(self.texts(label), icon="play_arrow", on_click=self._resume).props("unelevated no-caps")
        button.tooltip(self.texts(help_))

    def _pause(self) -> None:
        try:
            stop_run(self.look.path, self.look.find_job())
        except Refusal as refusal:
            ui.notify(self.texts(refusal.key, **refusal.values))
        self.tick()

    def _resume(self) -> None:
        try:
            resume_run(self.look.studio, self.look.path)
        except Refusal as refusal:
            ui.notify(self.texts(refusal.key, **refusal.values))
        self.tick()

    def _reachable(self, standing: Standing) -> tuple[bool, bool]:
        """Whether there is something to talk to, and to export."""
        return not standing.live and (standing.has_adapter or bool(standing.checkpoints)), (
            not standing.live and standing.has_adapter
        )

    def _origin(self, content: tuple[str, ...]) -> None:
        for text in content:
            ui.label(text)

    # Notes: why it is not going on.

    def _told(self, standing: Standing, refusal: Refusal | None) -> tuple[tuple[str, str, str], ...] | None:
        """Return (kind, text, words of the trainer) for what must be said."""
        told = []
        if standing.stopping:
            told.append(("", self.texts("run.pausing_note"), ""))
        elif standing.phase == "preparing" and standing.live:
            told.append(("", self.texts("run.resuming_note"), ""))
        elif standing.phase in ("dead", "failed", "unknown"):
            told.append(("bad", self.texts(f"run.{standing.phase}_note"), self._heard(standing.reason or standing.last_words)))
        elif standing.phase == "interrupted":
            told.append(("", self.texts("run.paused_note", step=standing.step or 0), self._heard(standing.reason or "")))
        if standing.early_stop:
            told.append(("", self.texts("run.early_note"), self._heard(standing.early_stop)))
        if standing.attempt:
            told.append(("bad", self.texts("run.job_failed"), self._heard(standing.attempt)))
        if refusal is not None:
            told.append(("bad", self.texts("run.no_resume"), self.texts(refusal.key, **refusal.values)))
        elif standing.resumable:
            told += self._way_on()
        told += [("bad", self.texts("run.warning"), self._heard(text)) for text in self.look.tail.warnings()[-3:]]
        return tuple(told) or None

    def _way_on(self) -> list[tuple[str, str, str]]:
        """Return a note on where a resume begins, where that is not where the run ended."""
        checkpoint, broken = self.look.goes_on_from()
        if not broken:
            return []
        faults = "\n".join(heard(self.texts, fault, "wrong") for fault in broken)
        if checkpoint is None:
            return [("bad", self.texts("run.all_broken_note"), faults)]
        return [("bad", self.texts("run.broken_note", checkpoint=checkpoint.name), faults)]

    def _heard(self, text: str) -> str:
        return heard_log(self.texts, text)

    def _notes(self, content: tuple[tuple[str, str, str], ...]) -> None:
        for kind, text, words in content:
            with ui.element("div").classes(f"note stack tight {kind}").props('role="status"'):
                ui.label(text)
                if words:
                    ui.label(words).classes("mono")

    # At a glance.

    def _glance(self) -> None:
        names = ("step", "eta", "took", "train_loss", "eval_loss", "speed", "memory")
        with ui.element("div").classes("panel stack"):
            with ui.element("div").classes("bar").props(f'role="progressbar" aria-label="{self.texts("run.progress")}"') as bar:
                self.filled = ui.element("div").style("width:0")
            self.bar = bar
            self.figures: dict[str, ui.label] = {}
            with ui.element("div").classes("run-figures"):
                for name in names:
                    with ui.element("div"):
                        ui.label(self.texts(f"run.{name}")).classes("label")
                        self.figures[name] = ui.label(NOTHING).classes("figure").props(f"data-figure={name}")

    def _show_figures(self, standing: Standing) -> None:
        shown = {
            "step": steps(standing.step, standing.total_steps),
            "eta": span(standing.eta_seconds),
            "took": span(standing.seconds),
            "train_loss": loss(standing.train_loss),
            "eval_loss": loss(standing.eval_loss),
            "speed": figure(standing.tokens_per_second),
            "memory": figure(standing.memory_gib, "GiB"),
        }
        for name, text in shown.items():
            self.figures[name].set_text(text)
        self.filled.style(f"width:{100 * standing.share:.1f}%")
        self.bar.props(f"aria-valuenow={100 * standing.share:.0f} aria-valuemin=0 aria-valuemax=100")
        summary = self.look.tail.summary()
        told = (summary.method, summary.base_model, summary.started and moment(summary.started), size(summary.num_bytes))
        self.origin.show(tuple(str(text) for text in told if text))

    # Answers, data, settings, checkpoints.

    def _answers(self, content: tuple[tuple[str, ...], list[tuple[int, tuple[str, ...]]]]) -> None:
        prompts, rows = content
        self._heading("run.answers")
        with ui.element("div").classes("run-wide"), ui.element("table").classes("plain run-answers"):
            with ui.element("thead"), ui.element("tr"):
                _cell(self.texts("run.step"), "th")
                for prompt in prompts:
                    _cell(prompt, "th")
            with ui.element("tbody"):
                for step, answers in rows:
                    with ui.element("tr"):
                        _cell(f"{step:,}", classes="muted")
                        for answer in answers:
                            _cell(answer or NOTHING)

    def _books(self) -> None:
        """Draw what does not change while the run goes on, and the checkpoints."""
        run_directory = RunDirectory(self.look.path)
        changed, fault = changed_settings(run_directory)
        with ui.element("div").classes("grid2"):
            with ui.element("div").classes("panel stack tight"):
                self._heading("run.settings")
                if fault:
                    ui.label(self.texts("run.resume_config", fault=fault)).classes("bad")
                _facts(
                    [
                        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                        for key, value in changed.items()
                    ],
                    "key",
                )
            with ui.element("div").classes("stack"):
                with ui.element("div").classes("panel stack tight"):
                    self._heading("run.data")
                    self._data(data_counts(run_directory))
                self.checkpoints = Part(self._checkpoints, "panel stack tight")

    def _data(self, data: dict[str, Any]) -> None:
        if not data:
            ui.label(self.texts("run.no_data")).classes("muted")
            return
        counts = [
            (self.texts(f"run.data_{key}"), data.get(key))
            for key in ("read", "used", "repaired", "cut", "dropped", "duplicates")
        ]
        for key in ("train", "validation"):
            for name in ("samples", "tokens", "supervised_tokens"):
                counts.append((f"{self.texts(f'run.data_{key}')} · {self.texts(f'run.data_{name}')}", data[key].get(name)))
        _facts([(name, f"{count:,}") for name, count in counts if count])
        for source in data["sources"]:
            if source["path"]:
                ui.label(source["path"]).classes("key run-break")

    def _checkpoints(self, content: tuple[tuple[tuple[int, str], ...], bool]) -> None:
        checkpoints, has_adapter = content
        self._heading("run.checkpoints")
        for _, name in reversed(checkpoints):
            ui.label(name).classes("mono")
        if has_adapter:
            ui.label(self.texts("run.adapter")).classes("mono")
        if not checkpoints and not has_adapter:
            ui.label(self.texts("run.no_checkpoints")).classes("muted")

    def _heading(self, key: str) -> None:
        ui.label(self.texts(key)).classes("strong").props('role="heading" aria-level="2"')


def look_costs_little(path: Path) -> bool:
    """Whether a run's numbers are read before the page is sent, rather than after."""
    try:
        return RunDirectory(path).metrics.stat().st_size < _LITTLE_BYTES
    except OSError:
        return True


# A job whose run is not there yet.


def _job_page(studio: Studio, request: Request, job_id: str) -> None:
    """Show what a job prints until its run is there, then go there; or its last words."""
    job = studio.jobs.get(job_id)
    with frame(studio, request, "frame.runs") as texts:
        if job is None or job.kind != "finetune":
            ui.label(texts("frame.not_found")).classes("muted")
            return
        with ui.element("div").classes("line"):
            ui.label(str(job.about.get("run") or texts("frame.new_run"))).classes("run-name").props(
                'role="heading" aria-level="1"'
            )
            phase = Part(lambda name: _phase(texts, name), "line run-phase")
            stop = (
                ui.button(texts("run.stop"), icon="stop", on_click=lambda: _stop_job()).props("outline no-caps").classes("push")
            )
        words = Part(lambda text: ui.label(text).classes("mono"), "note bad")
        with ui.element("div").classes("panel stack tight"):
            ui.label(texts("run.log")).classes("strong")
            log = log_box(texts("run.log"))

        def _stop_job() -> None:
            stop.disable()
            studio.jobs.stop(job)

        def tick() -> None:
            if (path := run_of(studio, job)) is not None:
                timer.deactivate()
                ui.navigate.to(f"/runs/{id_of(path)}")
                return
            ended = job.ended()
            phase.show({"running": "preparing", "killed": "dead"}.get(ended, ended))
            stop.set_visibility(ended == "running")
            words.show(
                (heard_log(texts, job.last_words()) or texts("run.dead_note")) if ended in ("failed", "killed") else None
            )
            log.set_text(heard_log(texts, job.log_tail()) or texts("run.starting"))

        timer = ui.timer(_POLL_SECONDS, tick, immediate=False)
        tick()


def _phase(texts: Texts, name: str) -> None:
    phase_dot(name if name in ENDED else "live")
    ui.label(texts(f"phase.{name}"))


# Small things.


def log_box(name: str) -> ui.label:
    """Draw a box for a log that stays at its end, unless one scrolls up in it."""
    with ui.element("div").classes("run-log").props(f'tabindex="0" role="log" aria-label="{name}"'):
        return ui.label("").classes("mono")


def _link(text: str, place: str, *, strong: bool = False) -> None:
    ui.button(text).props(f'no-caps href="{place}" {"unelevated" if strong else "outline"}')


def _cell(text: str, tag: str = "td", classes: str = "") -> None:
    with ui.element(tag).classes(classes):
        ui.label(text)


def _facts(facts: list[tuple[str, str]], name_classes: str = "label") -> None:
    with ui.element("dl").classes("run-facts"):
        for name, value in facts:
            with ui.element("dt").classes(name_classes):
                ui.label(name)
            with ui.element("dd"):
                ui.label(value)
