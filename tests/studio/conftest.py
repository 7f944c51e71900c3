"""Fixtures: the real studio as a process of its own, and one Chromium that fails on errors and on foreign requests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import ROOT

from tuneloom.studio.guard import COOKIE

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
PATIENCE_SECONDS = 60
TOLD = """() => {
    if (!window.did_handshake || window.socket?.connected !== true) return false;
    const [seen, since, begun] = window.told ?? [null, 0, Date.now()];
    if (window.nextMessageId !== seen) window.told = [window.nextMessageId, Date.now(), begun];
    return (window.nextMessageId === seen && Date.now() - since > 200) || Date.now() - begun > 3000;
}"""
"""No message for a fifth of a second; a page that is told something all the time counts as told after three."""


@dataclass
class RunningStudio:
    """A studio's process on a folder of runs.

    `url` holds the one-time token; `base` is the address without it, the same after a restart. `key` is the cookie that a
    visitor got for the token, with which the next ones come in.
    """

    runs: Path
    terminal: Path
    environment: dict[str, str]
    port: int = 0
    url: str = ""
    key: list[Any] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> RunningStudio:
        """Start it, on the port that it had before, and read its address."""
        begin = self.terminal.stat().st_size if self.terminal.exists() else 0
        with open(self.terminal, "ab") as terminal:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tuneloom", "studio", "--port", str(self.port), "--runs-dir", str(self.runs)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            )
        self.url, self.key = self._address(begin), []
        self.port = urlsplit(self.url).port or 80
        return self

    def _address(self, begin: int) -> str:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if found := re.search(r"http://\S+\?token=\S+\n", self.said()[begin:]):
                return found.group().strip()
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)
        raise AssertionError(f"no address in {PATIENCE_SECONDS} s: {self.said()}")

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it by SIGTERM."""
        self._end(signal.SIGTERM)

    def restart(self) -> RunningStudio:
        """Kill it and start it again: same runs, same port, a new token."""
        self.kill()
        return self.start()

    def said(self) -> str:
        """Return all that it printed."""
        return self.terminal.read_text(encoding="utf-8", errors="replace")

    def _end(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(timeout=PATIENCE_SECONDS)

    def end_jobs(self) -> None:
        """Kill what its jobs left running."""
        import psutil

        from tuneloom.studio.jobs import Jobs

        for job in Jobs(self.runs).all():
            if (pid := job.pid()) is not None:
                with contextlib.suppress(psutil.Error):
                    family = psutil.Process(pid)
                    for process in (*family.children(recursive=True), family):
                        process.kill()


@pytest.fixture(scope="session")
def make_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningStudio]]:
    """Start a studio: `make_studio(runs=None, environment={...})`; all are killed at the end, with their jobs."""
    started: list[RunningStudio] = []

    def make(runs: Path | None = None, environment: dict[str, str] | None = None) -> RunningStudio:
        folder = tmp_path_factory.mktemp("studio")
        studio = RunningStudio(runs or folder / "runs", folder / "terminal.txt", environment or {})
        started.append(studio)
        return studio.start()

    yield make
    for studio in started:
        studio.kill()
        studio.end_jobs()


@pytest.fixture(scope="module")
def studio(make_studio: Callable[..., RunningStudio]) -> RunningStudio:
    """A studio without runs, one a module."""
    return make_studio()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; one for all of these tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """A browser of one visitor (cookies of its own): its page, and what went wrong in it.

    Attributes:
        page: playwright's page, at the studio.
        faults: console errors, script errors, dialogs, and requests to anything but the studio.
        ignored: patterns of faults that are meant to happen in this test.
    """

    def __init__(self, browser: Any, studio: RunningStudio, **options: Any) -> None:
        options = {"viewport": {"width": 1440, "height": 900}, "locale": "en-US", **options}
        self.studio = studio
        self.faults: list[str] = []
        self.ignored: list[str] = []
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE_SECONDS * 1000 / 2)
        self.context.on("request", lambda request: self._asked(request.url))
        self.context.on("page", self._watch)
        self.page = self.context.new_page()

    def open(self, path: str = "/") -> Any:
        """Open a path of the studio, with the token at the first time; return the page when it is connected."""
        if not self._holds_key():
            self.context.add_cookies(self.studio.key)
        if self._holds_key():
            self.page.goto(self.studio.base + path)
        else:
            self.page.goto(self.studio.url)
            self.page.wait_for_url(f"{self.studio.base}/")
            self.studio.key = [cookie for cookie in self.context.cookies() if cookie["name"].startswith(COOKIE)]
            if path != "/":
                self.page.goto(self.studio.base + path)
        self.connected()
        return self.page

    def _holds_key(self) -> bool:
        return any(cookie["name"].startswith(COOKIE) for cookie in self.context.cookies())

    def connected(self) -> None:
        """Wait until the page talks with the server, and what the server had to tell it at first is told.

        From here on buttons do something, and what is filled in is not written over.
        """
        self.page.wait_for_function(TOLD)

    def check(self) -> None:
        """Fail where anything went wrong."""
        faults = [fault for fault in self.faults if not any(re.search(pattern, fault) for pattern in self.ignored)]
        assert faults == []

    def _watch(self, page: Any) -> None:
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("dialog", self._asked_by_script)
        page.on("websocket", lambda opened: self._asked(opened.url))

    def _asked_by_script(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.faults.append(f"console: {text}")

    def _asked(self, url: str) -> None:
        place = urlsplit(url)
        if place.scheme not in ("data", "blob") and place.netloc != f"127.0.0.1:{self.studio.port}":
            self.faults.append(f"request: {url}")


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """Be a visitor: `visit(studio).open("/runs")`; keywords are playwright's for a context.

    At the test's end each visitor's console errors, script errors and foreign requests fail it.
    """
    visitors: list[Visit] = []

    def make(studio: RunningStudio, **options: Any) -> Visit:
        visitors.append(Visit(chromium, studio, **options))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.context.close()
    for visitor in visitors:
        visitor.check()
