"""All runs: how each stands; sort, filter, select to compare, rename, delete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import run as worker
from nicegui import ui
from starlette.requests import Request

from tuneloom.rundir import folder_bytes
from tuneloom.runs import RunSummary, shown_name
from tuneloom.studio.figures import loss, moment, short_model, size, span, steps
from tuneloom.studio.frame import ENDED, Studio, frame, id_of, phase_dot, progress_bar
from tuneloom.studio.listing import Broken
from tuneloom.studio.run_actions import Refusal, continuing, delete_run, rename_run
from tuneloom.studio.said import heard_log
from tuneloom.studio.texts import Texts
from tuneloom.studio.views.compare import LEAST_RUNS, MOST_RUNS, compare_place

_POLL_SECONDS = 2.0
_COLUMNS = ("pick", "name", "state", "train_loss", "eval_loss", "started", "size", "actions")
_SORTS: dict[str, Callable[[RunSummary], Any]] = {
    "name": lambda run: run.name.lower(),
    "state": lambda run: run.phase,
    "train_loss": lambda run: run.train_loss,
    "eval_loss": lambda run: run.eval_loss,
    "started": lambda run: run.started,
    "size": lambda run: run.num_bytes,
}
_LARGEST_FIRST = ("started", "size")


def add(studio: Studio) -> None:
    """Register the page."""

    @ui.page("/runs")
    def page(request: Request) -> None:
        with frame(studio, request, "frame.runs") as texts:
            RunsPage(studio, texts).draw()

    del page


class RunsPage:
    """The table of runs."""

    def __init__(self, studio: Studio, texts: Texts) -> None:
        self.studio = studio
        self.texts = texts
        self.wanted = ""
        self.rows: list[Row] = []
        self.picked: set[Path] = set()
        self.sort, self.falling = "started", True
        self._names: object = None

    def draw(self) -> None:
        """Draw the page and keep it up to date."""
        with ui.element("div").classes("line"):
            ui.label(self.texts("frame.runs")).classes("run-name").props('role="heading" aria-level="1"')
            label = self.texts("runs.filter")
            search = ui.input(placeholder=label, on_change=lambda event: self._filter(event.value or ""))
            search.props(f'dense outlined clearable aria-label="{label}"').classes("push runs-filter")
            self.compare = ui.button("", icon="stacked_line_chart", on_click=self._compare).props("outline no-caps")
        self._draw_table()
        self.none = ui.label(self.texts("runs.no_match")).classes("muted")
        self.look()
        ui.timer(_POLL_SECONDS, self.look)

    def look(self) -> None:
        """Look at the runs; the table is drawn anew when runs have come, gone or changed their names."""
        runs, broken = sorted_runs(self.studio.summaries(), self.sort, self.falling), self.studio.listing.broken()
        names = [run.path for run in runs], broken
        if names != self._names:
            self._names = names
            self._draw_rows(runs, broken)
        for row, run in zip(self.rows, runs, strict=False):
            row.show(run)
        self._apply_filter()
        self.show_picked()

    def show_picked(self) -> None:
        """Say how many runs are selected, and whether they can be compared."""
        count = len(self.picked)
        self.compare.set_text(self.texts("runs.compare", count=count))
        right = LEAST_RUNS <= count <= MOST_RUNS
        self.compare.set_enabled(right)
        help_ = self.texts("runs.compare_help", least=LEAST_RUNS, most=MOST_RUNS)
        self.compare.props("remove=title" if right else f'title="{help_}"')

    def _compare(self) -> None:
        """Go to the comparison of the selected runs, in the order of the table."""
        ui.navigate.to(compare_place([row.path for row in self.rows if row.path in self.picked]))

    def _draw_table(self) -> None:
        """Draw the table without its rows."""
        with ui.element("div").classes("panel runs-table"):
            self.empty = ui.label(self.texts("runs.none")).classes("muted")
            with ui.element("table").classes("plain") as self.table:
                with ui.element("thead"), ui.element("tr"):
                    self.heads = {name: ui.element("th").classes(f"runs-{name}") for name in _COLUMNS}
                self.body = ui.element("tbody")
        self.arrows = {name: self._draw_head(name) for name in _SORTS}
        self._show_sort()

    def _draw_head(self, name: str) -> ui.label:
        shown = self.texts(f"runs.{name}")
        with (
            self.heads[name],
            ui.element("button")
            .classes("runs-sort")
            .props(f'type="button" aria-label="{self.texts("runs.sort", name=shown)}"')
            .on("click", lambda: self._sort_by(name)),
        ):
            ui.label(shown)
            return ui.label("").props('aria-hidden="true"')

    def _sort_by(self, name: str) -> None:
        self.falling = not self.falling if name == self.sort else name in _LARGEST_FIRST
        self.sort = name
        self._show_sort()
        self.look()

    def _show_sort(self) -> None:
        for name, arrow in self.arrows.items():
            chosen = name == self.sort
            arrow.set_text(("↓" if self.falling else "↑") if chosen else "")
            order = "descending" if self.falling else "ascending"
            self.heads[name].props(f"aria-sort={order}" if chosen else "remove=aria-sort")

    def _draw_rows(self, runs: list[RunSummary], broken: list[Broken]) -> None:
        self.body.clear()
        with self.body:
            self.rows = [Row(self, run) for run in runs]
            self.rows += [Row(self, None, folder) for folder in broken]
        self.picked &= {Path(run.path) for run in runs}
        self.table.set_visibility(bool(self.rows))
        self.empty.set_visibility(not self.rows)

    def _filter(self, wanted: str) -> None:
        self.wanted = wanted.strip().lower()
        self._apply_filter()

    def _apply_filter(self) -> None:
        shown = [row.filter(self.wanted) for row in self.rows]
        self.none.set_visibility(bool(shown) and not any(shown))


def sorted_runs(runs: list[RunSummary], by: str, falling: bool) -> list[RunSummary]:
    """Return the runs by a column of the table; those that have nothing there come last, whichever way."""
    tell = _SORTS[by]
    told = [run for run in runs if tell(run) is not None]
    return sorted(told, key=tell, reverse=falling) + [run for run in runs if tell(run) is None]


class Row:
    """A run's row, and below it the line that asks before something is done to it."""

    def __init__(self, page: RunsPage, run: RunSummary | None, broken: Broken | None = None) -> None:
        self.page = page
        self.texts = page.texts
        path = run.path if run is not None else broken.path if broken is not None else ""
        self.path = Path(path)
        self.name = shown_name(self.path)
        self._seen: RunSummary | None = None
        with ui.element("tr") as self.row:
            self.row.props["data-run"] = self.name
            self.cells = {name: ui.element("td").classes(f"runs-{name}") for name in _COLUMNS}
        with ui.element("tr") as self.asking, ui.element("td").props(f"colspan={len(_COLUMNS)}"):
            self.question = ui.element("div").classes("line")
        self.asking.set_visibility(False)
        with self.cells["name"]:
            self._draw_name(run)
        if run is not None:
            with self.cells["pick"]:
                pick = ui.checkbox(value=self.path in page.picked, on_change=lambda event: self._pick(event.value))
                pick.props("dense size=sm").props["aria-label"] = f"{self.texts('runs.pick')}: {self.name}"
        if broken is not None:
            self._draw_broken(broken)
        with self.cells["actions"], ui.element("div").classes("line runs-buttons"):
            self.rename = self._button("edit", "runs.rename", self._ask_name)
            self.delete = self._button("delete", "runs.delete", self._ask_delete)
        self.rename.set_visibility(run is not None)

    def show(self, run: RunSummary) -> None:
        """Bring the row up to date."""
        if run == self._seen:
            return
        self._seen = run
        for name in ("state", "train_loss", "eval_loss", "started", "size"):
            self.cells[name].clear()
        with self.cells["state"]:
            self._draw_state(run)
        for name, text in (
            ("train_loss", loss(run.train_loss)),
            ("eval_loss", loss(run.eval_loss)),
            ("size", size(run.num_bytes)),
        ):
            with self.cells[name]:
                ui.label(text)
        with self.cells["started"]:
            ui.label(moment(run.started))
            ui.label(span(run.seconds)).classes("small muted")
        self.about.set_text(" · ".join(text for text in (run.method, short_model(run.base_model)) if text))
        for button in (self.rename, self.delete):
            button.set_enabled(run.pid is None)
            button.props(f'title="{self.texts("runs.live")}"' if run.pid is not None else "remove=title")

    def filter(self, wanted: str) -> bool:
        """Show the row if its run is wanted; return whether it is."""
        run = self._seen
        about = (run.method or "", run.base_model or "", self.texts(f"phase.{run.phase}"), run.phase) if run else ()
        shown = all(any(word in text.lower() for text in (self.name, *about)) for word in wanted.split())
        self.row.set_visibility(shown)
        if not shown:
            self.asking.set_visibility(False)
        return shown

    # Drawing.

    def _draw_name(self, run: RunSummary | None) -> None:
        if run is None:
            ui.label(self.name).classes("run-break")
            return
        with ui.element("a").props(f'href="/runs/{id_of(run.path)}"').classes("strong run-break"):
            ui.label(self.name)
        self.about = ui.label("").classes("small muted run-break")

    def _draw_state(self, run: RunSummary) -> None:
        with ui.element("div").classes("line").style("gap:0 8px"):
            phase_dot(run.phase)
            ui.label(self.texts(f"phase.{run.phase}"))
            ui.label(steps(run.step, run.total_steps)).classes("muted small push")
        if run.phase not in ENDED and run.total_steps:
            progress_bar(run)
        if run.phase == "failed" and run.reason:
            ui.label(heard_log(self.texts, run.reason.splitlines()[0])).classes("small bad runs-reason")

    def _draw_broken(self, broken: Broken) -> None:
        with self.cells["state"]:
            with ui.element("div").classes("line").style("gap:8px;flex-wrap:nowrap"):
                phase_dot("unknown")
                ui.label(self.texts("phase.unknown"))
            missing = ", ".join(broken.missing)
            ui.label(self.texts("runs.broken", missing=missing) if missing else self.texts("runs.no_access")).classes(
                "small bad"
            )

    def _button(self, icon: str, key: str, act: Callable[[], None]) -> ui.button:
        button = ui.button(icon=icon, on_click=act).props("flat dense round size=sm color=grey")
        button.props["aria-label"] = f"{self.texts(key)}: {self.name}"  # not parsed: a folder may have any name
        return button

    def _pick(self, picked: bool) -> None:
        (self.page.picked.add if picked else self.page.picked.discard)(self.path)
        self.page.show_picked()

    # Asking, and doing.

    def _ask(self) -> ui.element:
        self.question.clear()
        self.asking.set_visibility(True)
        return self.question

    def _close(self) -> None:
        self.question.clear()
        self.asking.set_visibility(False)

    def _ask_name(self) -> None:
        texts = self.texts
        with self._ask():
            name = (
                ui.input(texts("runs.new_name"), value=self.name)
                .props("dense outlined autofocus maxlength=100")
                .classes("runs-filter")
            )
            name.on("keydown.enter", lambda: self._rename(name.value or ""))
            name.on("keydown.esc", self._close)
            ui.button(texts("runs.rename"), on_click=lambda: self._rename(name.value or "")).props("unelevated no-caps")
            ui.button(texts("runs.keep"), on_click=self._close).props("flat no-caps")
            self.fault = ui.label("").classes("bad small").props('role="alert"')

    def _rename(self, name: str) -> None:
        try:
            rename_run(self.page.studio, self.path, name.strip())
        except Refusal as refusal:
            self.fault.set_text(self.texts(refusal.key, **refusal.values))
            return
        self._close()
        self.page.look()

    def _ask_delete(self) -> None:
        texts = self.texts
        weight = size(self._seen.num_bytes if self._seen is not None else folder_bytes(self.path))
        followers = continuing(self.page.studio, self.path)
        with self._ask():
            ui.label(texts("runs.delete_sure", name=self.name, size=weight)).classes("run-break")
            if followers:
                ui.label(texts("runs.delete_followed", names=", ".join(followers))).classes("warn")
            ui.button(texts("runs.delete"), on_click=self._delete).props("unelevated no-caps color=negative")
            ui.button(texts("runs.keep"), on_click=self._close).props("flat no-caps autofocus")
            self.fault = ui.label("").classes("bad small").props('role="alert"')

    async def _delete(self) -> None:
        try:
            await worker.io_bound(delete_run, self.page.studio, self.path)
        except Refusal as refusal:
            self.fault.set_text(self.texts(refusal.key, **refusal.values))
            return
        self.page.look()
