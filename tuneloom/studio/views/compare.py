"""Runs side by side: their curves over each other, what differs in their settings, how each went."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nicegui import run as worker
from nicegui import ui
from starlette.requests import Request

from tuneloom.comparison import Comparison, Look, Measured, Results, distinct_names, look_at, side_by_side
from tuneloom.errors import UserError
from tuneloom.rundir import CONFIG, EVALUATION, METRICS, STATE, RunDirectory
from tuneloom.studio.charts import SAVE_PICTURE, Line, Options, line_chart
from tuneloom.studio.figures import NOTHING, figure, loss, short_model, size, span, steps
from tuneloom.studio.frame import ENDED, Studio, frame, id_of, phase_dot
from tuneloom.studio.said import heard_log
from tuneloom.studio.tail import RunTail
from tuneloom.studio.texts import Texts
from tuneloom.studio.views.run import Part
from tuneloom.studio.views.run_charts import renew

LEAST_RUNS, MOST_RUNS = 2, 8
"""As many as there are colours."""
_POLL_SECONDS = 2.0
_HASH_CHARS = 12


def add(studio: Studio) -> None:
    """Register the page."""

    @ui.page("/compare")
    def page(request: Request) -> None:
        asked = list(dict.fromkeys(request.query_params.getlist("run")))[:MOST_RUNS]
        paths = list(dict.fromkeys(path for run_id in asked if (path := studio.run_path(run_id)) is not None))
        with frame(studio, request, "compare.title") as texts:
            ui.label(texts("compare.title")).classes("run-name").props('role="heading" aria-level="1"')
            if len(paths) < len(asked):
                ui.label(texts("compare.gone", count=len(asked) - len(paths))).classes("note").props('role="status"')
            if len(paths) >= LEAST_RUNS:
                ComparePage(studio, texts, paths).draw()
                return
            ui.label(texts("compare.too_few")).classes("muted")
            ui.button(texts("frame.runs")).props('no-caps outline href="/runs"').style("align-self:flex-start")

    del page


def compare_place(paths: Sequence[Path]) -> str:
    """Return the address of the comparison of some runs."""
    return "/compare?" + "&".join(f"run={id_of(path)}" for path in paths)


class ComparePage:
    """The page of some runs side by side."""

    def __init__(self, studio: Studio, texts: Texts, paths: list[Path]) -> None:
        self.texts = texts
        self.paths = paths
        self.names = distinct_names(paths)
        self.tails: list[RunTail] = [studio.listing.tail(path) for path in paths]
        self.comparison: Comparison | None = None
        self._looks: dict[Path, tuple[object, Look]] = {}
        self._drawn: object = None

    def draw(self) -> None:
        """Draw the page; what is in the runs' files comes beside it, and again when it changes."""
        texts = self.texts
        self.notes = Part(self._notes, "stack tight")
        self.notes.show((texts("compare.reading"),))
        with ui.element("div").classes("panel stack tight"):
            with ui.element("div").classes("line"):
                ui.label(texts("run.loss_chart")).classes("strong").props('role="heading" aria-level="2"')
                ui.label(texts("compare.lines")).classes("muted small")
                picture = ui.button("PNG", icon="download").classes("push")
                picture.props(f'flat dense no-caps aria-label="{texts("run.png")}"')
                picture.props["data-file"] = "compare.png"
                picture.on("click", js_handler=SAVE_PICTURE)
            self.losses = _chart(texts("run.loss_chart"), "run-chart")
            self.rates = _chart(texts("run.learning_rate"), "run-chart small")
        self.table = Part(self._table, "panel run-wide")
        ui.timer(_POLL_SECONDS, self._follow)

    async def _follow(self) -> None:
        """Read beside the server's loop what is new; then show it."""
        if not await worker.io_bound(self._read):
            ui.navigate.to(compare_place(self.paths))  # which looks for new names, and goes on with those that are left
            return
        comparison = self.comparison
        if comparison is None:
            return
        self.notes.show(tuple(self._told(comparison)) or None)
        self.table.show(comparison)
        signs = [(tail.generation, tail.num_steps(), len(tail.events)) for tail in self.tails]
        if signs != self._drawn:
            self._drawn = signs
            renew(self.losses, self._loss_lines())
            renew(self.rates, self._rate_lines())

    def _read(self) -> bool:
        """Read the runs whose files have changed; return whether all of them are still there."""
        for name, path, tail in zip(self.names, self.paths, self.tails, strict=True):
            stamp, known = _stamps(path), self._looks.get(path)
            if known is not None and known[0] == stamp and known[1].results.phase in ENDED:
                continue
            with suppress(OSError):
                tail.update()
                tail.curves()
            try:
                self._looks[path] = stamp, look_at(RunDirectory(path), name)
            except UserError:
                return False
        self.comparison = side_by_side([self._looks[path][1] for path in self.paths])
        return True

    # The curves.

    def _loss_lines(self) -> Options:
        lines = []
        for i, (name, tail) in enumerate(zip(self.names, self.tails, strict=True)):
            curves, colour = tail.curves(), _colour(i)
            lines.append(Line(name, curves["loss"].smooth.points(), colour))  # first: the legend looks like it
            lines.append(Line(name, curves["loss"].raw.points(), colour, faint=True, told=False))
            held = f"{name} · {self.texts('run.eval_loss')}"
            lines.append(Line(held, curves["eval_loss"].raw.points(), colour, marked=True, dotted=True))
        return line_chart(lines, total_steps=self._total_steps(), legend=True)

    def _rate_lines(self) -> Options:
        lines = [
            Line(name, tail.curves()["learning_rate"].raw.points(), _colour(i))
            for i, (name, tail) in enumerate(zip(self.names, self.tails, strict=True))
        ]
        return line_chart(lines, title=self.texts("run.learning_rate"), total_steps=self._total_steps())

    def _total_steps(self) -> int | None:
        return max((tail.total_steps() or 0 for tail in self.tails), default=0) or None

    # What is told.

    def _told(self, comparison: Comparison) -> list[str]:
        told = [self.texts(f"compare.different_{what}") for what in comparison.different]
        return told + [
            f"{name}: {self.texts('run.resume_config', fault=heard_log(self.texts, fault))}"
            for name, fault in comparison.faults.items()
        ]

    def _notes(self, content: tuple[str, ...]) -> None:
        for text in content:
            ui.label(text).classes("note").props('role="status"')

    def _table(self, comparison: Comparison) -> None:
        with ui.element("table").classes("plain compare-table"):
            with ui.element("thead"), ui.element("tr"):
                _cell(self.texts("compare.result"), "th")
                for i, run in enumerate(comparison.runs):
                    self._head(i, run)
            with ui.element("tbody"):
                for key, cells in self._results(comparison.runs):
                    self._row(self.texts(f"compare.{key}"), cells)
                for heading, rows in (("settings", comparison.settings), ("surroundings", comparison.surroundings)):
                    self._section(heading, rows, len(comparison.runs))

    def _head(self, i: int, run: Results) -> None:
        with ui.element("th").props('scope="col"'), ui.element("div").classes("stack tight"):
            ui.element("div").classes("compare-colour").style(f"background:var({_colour(i)})").props('aria-hidden="true"')
            with ui.element("a").props(f'href="/runs/{id_of(run.path)}"').classes("strong run-break"):
                ui.label(run.name)
            with ui.element("div").classes("line").style("gap:6px"):
                phase_dot(run.phase)
                ui.label(self.texts(f"phase.{run.phase}"))

    def _section(self, heading: str, rows: dict[str, tuple[Any, ...]], num_runs: int) -> None:
        if not rows and heading != "settings":
            return
        with ui.element("tr"), ui.element("th").props(f'colspan={num_runs + 1} scope="colgroup"').classes("compare-section"):
            ui.label(self.texts(f"compare.{heading}" if rows else "compare.no_settings"))
        for key, values in rows.items():
            self._row(key, [self._value(value) for value in values], "key")

    def _row(self, name: str, cells: Sequence[str], name_classes: str = "label") -> None:
        with ui.element("tr"):
            with ui.element("th").props('scope="row"'):
                ui.label(name).classes(f"{name_classes} run-break")
            for text in cells:
                _cell(text)

    def _results(self, runs: Sequence[Results]) -> list[tuple[str, list[str]]]:
        """Return (key, text of each run) of the figures that any of them has."""
        rows: tuple[tuple[str, Callable[[Results], str]], ...] = (
            ("method", lambda run: run.method or NOTHING),
            ("base", lambda run: short_model(run.base_model)),
            ("steps", lambda run: steps(run.step, run.total_steps)),
            ("epochs", lambda run: figure(run.epochs)),
            ("train_loss", lambda run: loss(run.train_loss)),
            ("eval_loss", lambda run: loss(run.eval_loss)),
            ("best_eval_loss", self._best),
            ("identity_rate", lambda run: _measured(run.identity_rate, "{:.1%}")),
            ("leak_rate", lambda run: _measured(run.leak_rate, "{:.1%}")),
            ("general_loss_delta", lambda run: _measured(run.general_loss_delta, "{:+.4f}")),
            ("gates", self._gates),
            ("seconds", lambda run: span(run.seconds)),
            ("step_seconds", lambda run: figure(run.step_seconds, "s")),
            ("tokens_per_second", lambda run: figure(run.tokens_per_second)),
            ("mfu", lambda run: NOTHING if run.mfu is None else f"{run.mfu:.0%}"),
            ("peak_memory_gib", lambda run: figure(run.peak_memory_gib, "GiB")),
            ("trainable_parameters", lambda run: figure(run.trainable_parameters)),
            ("adapter_bytes", lambda run: NOTHING if run.adapter_bytes is None else size(run.adapter_bytes)),
            ("reason", lambda run: heard_log(self.texts, (run.reason or NOTHING).partition("\n")[0])),
        )
        told = [(key, [tell(run) for run in runs]) for key, tell in rows]
        return [(key, cells) for key, cells in told if any(cell != NOTHING for cell in cells)]

    def _best(self, run: Results) -> str:
        if run.best_eval_loss is None:
            return NOTHING
        return self.texts("compare.at_step", value=loss(run.best_eval_loss), step=run.best_eval_step)

    def _gates(self, run: Results) -> str:
        told = [self.texts("compare.passed" if passed else "compare.not_passed", name=n) for n, passed in run.gates.items()]
        return " · ".join(told) or NOTHING

    def _value(self, value: Any) -> str:
        """Return a setting's value as text; of a hash its beginning."""
        if value is None:
            return self.texts("new.empty")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        is_hash = len(text) == 64 and all(char in "0123456789abcdef" for char in text)
        return f"{text[:_HASH_CHARS]}…" if is_hash else text


def _measured(told: Measured | None, form: str) -> str:
    if told is None:
        return NOTHING
    value = form.format(told.value)
    return value if told.low is None or told.high is None else f"{value} ({form.format(told.low)} – {form.format(told.high)})"


def _chart(name: str, classes: str) -> ui.echart:
    return ui.echart({}).classes(classes).props(f'role="img" aria-label="{name}"')


def _cell(text: str, tag: str = "td") -> None:
    with ui.element(tag):
        ui.label(text).classes("run-break")


def _colour(i: int) -> str:
    return f"--run-{i + 1}"


def _stamps(path: Path) -> list[tuple[int, int, int] | None]:
    """Return what tells whether an ended run's files have changed."""
    found: list[tuple[int, int, int] | None] = []
    for name in (METRICS, STATE, CONFIG, EVALUATION):
        try:
            told = (path / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((told.st_ino, told.st_size, told.st_mtime_ns))
    return found
