"""View."""

from __future__ import annotations

from nicegui import ui
from starlette.requests import Request

from tuneloom.studio.frame import Studio, frame


def add(studio: Studio) -> None:
    """Register the page."""

    @ui.page("/runs")
    def page(request: Request) -> None:
        with frame(studio, request, "frame.runs") as texts:
            ui.label(texts("frame.runs"))

    del page
