"""View."""

from __future__ import annotations

from nicegui import ui
from starlette.requests import Request

from tuneloom.studio.frame import Studio, frame


def add(studio: Studio) -> None:
    """Register the page."""

    @ui.page("/export")
    def page(request: Request) -> None:
        with frame(studio, request, "frame.export") as texts:
            ui.label(texts("frame.export"))

    del page
