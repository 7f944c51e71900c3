"""The studio's server: views, the style sheet, the visitor's choices, all behind the guard."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
import threading
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import psutil

from tuneloom.errors import UserError
from tuneloom.studio.lean import lean_imports

with lean_imports():
    import uvicorn
    from fastapi import FastAPI, Query
    from fastapi.responses import Response
    from nicegui import Client, ui
    from nicegui import app as nicegui
    from starlette.requests import Request

from tuneloom.studio.frame import LANGUAGE_COOKIE, STYLE_PATH, THEME_COOKIE, Studio, frame
from tuneloom.studio.guard import COOKIE, TOKEN, Guard
from tuneloom.studio.jobs import Jobs
from tuneloom.studio.uploads import tidy_uploads

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 compared, not bound
DEFAULT_PORT = 7878
_YEAR = 365 * 86400
_OWN_PLACE = re.compile(r"/(?:[A-Za-z0-9_~.-][A-Za-z0-9_~./-]*)?(?:\?[A-Za-z0-9_~./=&%+-]*)?")


def serve(runs: Path, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT, say: Callable[[str], None]) -> None:
    """Run the studio until it is told to end.

    Args:
        runs: the folder of runs; made with the first run.
        host: to listen at; off loopback the address is open to the network, and that is said.
        port: to listen at; 0: any that is free. A default port that is taken gives way to a free one.
        say: gets the address to open, once the page is there.

    Raises:
        UserError: the port is taken.
    """
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(24)
    studio = Studio(runs.resolve(), Jobs(runs.resolve()))
    guarded = Guard(build(studio), allowed_hosts(host, port), token, cookie=f"{COOKIE}_{port}")
    if host not in LOOPBACK:
        say(f"warning: {host} can be reached from other machines; whoever has the address below can use this one")
    say(f"http://{_host_header('127.0.0.1' if host in EVERYWHERE else host, port)}/?{TOKEN}={token}")
    config = uvicorn.Config(
        guarded,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws_max_size=16 << 20,
        timeout_graceful_shutdown=1,
    )
    threading.Thread(target=tidy_uploads, args=(studio.runs, studio.jobs), daemon=True).start()
    uvicorn.Server(config).run(sockets=[listening])


def allowed_hosts(host: str, port: int) -> list[str]:
    """Return what a request may name as its host: the addresses that are listened at, and loopback's names."""
    names = {*LOOPBACK, host}
    if host in EVERYWHERE:
        found = [address.address for card in psutil.net_if_addrs().values() for address in card]
        names = {*LOOPBACK, *(name for name in found if _is_address(name))}
    return sorted(_host_header(name, port) for name in names)


def _host_header(name: str, port: int) -> str:
    """Return an address as a browser names it: without the port that it need not say."""
    name = f"[{name}]" if ":" in name else name
    return name if port == 80 else f"{name}:{port}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:  # of a card, or with a zone, which no browser sends
        return False
    return "%" not in text


def build(studio: Studio) -> FastAPI:
    """Return the app with all views, unguarded."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    sheet = files(__package__).joinpath("studio.css").read_text(encoding="utf-8")

    @app.get(STYLE_PATH)
    def style() -> Response:
        return Response(sheet, media_type="text/css", headers={"cache-control": "no-cache"})

    @app.get("/choose")
    def choose(
        back: Annotated[str, Query()] = "/",
        language: Annotated[str | None, Query(pattern="^(en|zh)$")] = None,
        theme: Annotated[str | None, Query(pattern="^(light|dark)$")] = None,
    ) -> Response:
        response = Response(status_code=303, headers={"location": back if _OWN_PLACE.fullmatch(back) else "/"})
        for name, value in ((LANGUAGE_COOKIE, language), (THEME_COOKIE, theme)):
            if value:
                response.set_cookie(name, value, max_age=_YEAR, samesite="strict", httponly=True)
        return response

    # The page talks over its websocket alone. The other transport leaves tracebacks where a browser goes in mid-request.
    nicegui.config.socket_io_js_transports = ["websocket"]

    @app.api_route("/_nicegui_ws/{rest:path}", methods=["GET", "POST", "OPTIONS"])
    def polled(rest: str) -> Response:
        del rest
        return Response(status_code=426, headers={"upgrade": "websocket", "connection": "upgrade"})

    @nicegui.exception_handler(404)
    def nothing_here(request: Request, _: Exception) -> Response:
        if request.method != "GET" or request.url.path.startswith("/_nicegui"):
            return Response(status_code=404)
        with Client(ui.page(""), request=request) as client, frame(studio, request, "frame.not_found") as texts:
            ui.label(texts("frame.not_found")).classes("muted")
        return client.build_response(request, 404)

    _add_views(studio)
    ui.run_with(app, title="Tuneloom", tailwind=False, show_welcome_message=False, reconnect_timeout=30)
    return app


def _add_views(studio: Studio) -> None:
    from tuneloom.studio.views import chat, compare, export, new_run, predict, run, runs

    for view in (new_run, run, runs, compare, chat, predict, export):
        view.add(studio)


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port, or a free one where the default is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in (port, 0) if port == DEFAULT_PORT else (port,):
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, wanted))
            listening.listen(128)  # from here on a browser waits rather than being turned away
        except OSError as error:
            listening.close()
            failed = error
            continue
        return listening
    raise UserError("cannot listen there", where=f"{host}:{port}", got=failed.strerror, mend="give another --port") from failed
