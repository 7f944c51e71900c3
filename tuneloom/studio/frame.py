"""The frame around every view: the top bar, the runs at the left, language and theme, the visitor's choices."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import quote

from nicegui import ui
from starlette.requests import Request

from tuneloom.rundir import END_PHASES
from tuneloom.runs import DEAD, UNKNOWN, RunSummary, list_runs
from tuneloom.studio.jobs import Jobs
from tuneloom.studio.texts import LANGUAGES, Language, Texts

STYLE_PATH = "/studio.css"
LANGUAGE_COOKIE = "tuneloom_language"
THEME_COOKIE = "tuneloom_theme"
LINKS = (
    ("/", "frame.new_run"),
    ("/runs", "frame.runs"),
    ("/chat", "frame.chat"),
    ("/predict", "frame.predict"),
    ("/export", "frame.export"),
)
ENDED = (*END_PHASES, DEAD, UNKNOWN)
_SIDE_RUNS = 30
_REFRESH_SECONDS = 2.0


@dataclass(frozen=True)
class Studio:
    """What every view works on.

    Attributes:
        runs: the folder of runs.
        jobs: its child processes.
    """

    runs: Path
    jobs: Jobs

    def summaries(self) -> list[RunSummary]:
        """Return the runs, newest first."""
        return list(list_runs(self.runs).runs) if self.runs.is_dir() else []

    def run_path(self, run_id: str) -> Path | None:
        """Return the directory of a run by its opaque id, None where there is none."""
        return next((Path(run.path) for run in self.summaries() if run_id == id_of(run.path)), None)


def id_of(path: str | Path) -> str:
    """Return the opaque id by which URLs name a run."""
    return hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()[:16]


def visitor_texts(request: Request) -> Texts:
    """Return the texts in the visitor's language: as chosen, else as the browser asks."""
    chosen = request.cookies.get(LANGUAGE_COOKIE)
    if chosen not in LANGUAGES:
        chosen = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
    return Texts(cast(Language, chosen))


@contextmanager
def frame(studio: Studio, request: Request, title: str) -> Iterator[Texts]:
    """Draw the frame; what is drawn inside of it is the view.

    Args:
        studio: the folder of runs and its jobs.
        request: the page's.
        title: key of the view's title in the table of texts.
    """
    texts = visitor_texts(request)
    ui.page_title(f"{texts(title)} · Tuneloom")
    ui.add_head_html(f'<link rel="stylesheet" href="{STYLE_PATH}">')
    theme = request.cookies.get(THEME_COOKIE)
    ui.dark_mode({"dark": True, "light": False}.get(theme or ""))
    _top(request, texts, theme)
    with ui.element("div").classes("body"):
        with ui.element("nav").classes("side").props(f'aria-label="{texts("frame.runs")}"'):
            _side(studio, request, texts)
        with ui.element("main").classes("main stack").props('id="content" tabindex="-1"'):
            yield texts


def _top(request: Request, texts: Texts, theme: str | None) -> None:
    path = request.url.path
    with ui.element("header").classes("top"):
        with ui.element("a").classes("skip").props('href="#content"'):
            ui.label(texts("frame.skip"))
        with ui.element("a").classes("brand").props(f'href="/" title="{texts("frame.tagline")}"'):
            ui.label("Tuneloom")
        with ui.element("nav").classes("links"):
            for place, key in LINKS:
                here = path == place or (place != "/" and path.startswith(place))
                current = ' aria-current="page"' if here else ""
                with ui.element("a").props(f'href="{place}"{current}'):
                    ui.label(texts(key))
        other = "zh" if texts.language == "en" else "en"
        # Escaped twice, since what stands in a path or a query is anybody's: once as a place, once as a parameter.
        back = quote(quote(path, safe="/") + (f"?{request.url.query}" if request.url.query else ""), safe="/")
        _choice(f"/choose?language={other}&back={back}", texts("frame.language"), texts("frame.language_help"))
        next_theme = "light" if theme == "dark" else "dark"
        _choice(f"/choose?theme={next_theme}&back={back}", "◐", texts("frame.theme_help"))


def _choice(place: str, shown: str, explained: str) -> None:
    with ui.element("a").classes("muted").props(f'href="{place}" aria-label="{explained}" title="{explained}"'):
        ui.label(shown)


def _side(studio: Studio, request: Request, texts: Texts) -> None:
    here = request.url.path

    @ui.refreshable
    def runs() -> None:
        found = studio.summaries()
        if not found:
            ui.label(texts("frame.no_runs")).classes("muted small")
        for run in found[:_SIDE_RUNS]:
            side_run(run, texts, here)

    shown: list[RunSummary] = studio.summaries()
    runs()

    def look() -> None:
        nonlocal shown
        found = studio.summaries()
        if [_seen(run) for run in found] != [_seen(run) for run in shown]:
            shown = found
            runs.refresh()

    ui.timer(_REFRESH_SECONDS, look)


def side_run(run: RunSummary, texts: Texts, here: str) -> None:
    """Draw a run's line in the list at the left."""
    place = f"/runs/{id_of(run.path)}"
    current = ' aria-current="page"' if here == place else ""
    with ui.element("a").classes("side-run").props(f'href="{place}"{current}'):
        with ui.element("div").classes("line").style("flex-wrap:nowrap;gap:8px"):
            phase_dot(run.phase)
            ui.label(run.name).classes("ellipsis").style("flex:1;min-width:0")
        with ui.element("div").classes("line small muted").style("padding-left:16px"):
            ui.label(texts(f"phase.{run.phase}"))
            if run.step is not None and run.total_steps:
                ui.label(f"{run.step}/{run.total_steps}").classes("push")
        if run.phase not in ENDED and run.total_steps:
            progress_bar(run)


def phase_dot(phase: str) -> None:
    """Draw the coloured dot of a phase."""
    ui.element("div").classes(f"dot {phase if phase in ENDED else 'live'}").props('aria-hidden="true"')


def progress_bar(run: RunSummary) -> None:
    """Draw how far a run is."""
    share = 100 * (run.step or 0) / max(1, run.total_steps or 1)
    with (
        ui.element("div")
        .classes("bar")
        .props(f'role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100"')
    ):
        ui.element("div").style(f"width:{share:.1f}%")


def _seen(run: RunSummary) -> tuple[object, ...]:
    return run.path, run.phase, run.step, run.total_steps
