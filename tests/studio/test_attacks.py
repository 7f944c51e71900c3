"""Another page in the visitor's own browser, with the cookie there, gets nothing; what users wrote is text and nothing else."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tuneloom.studio.frame import id_of

from .conftest import RunningStudio, Visit

pytestmark = pytest.mark.browser

# What a page of another site tries; each line says how it went.
EVIL = """<!doctype html><meta charset=utf-8><body><script>
const base = new URLSearchParams(location.search).get("base");
const results = {};
async function attempt(name, act) {
  try { results[name] = await act(); } catch (error) { results[name] = "failed"; }
}
const socket = () => new Promise((done) => {
  const opened = new WebSocket(base.replace("http", "ws") + "/_nicegui_ws/socket.io/?EIO=4&transport=websocket");
  opened.onmessage = (event) => done("heard " + event.data);
  opened.onerror = () => done("failed");
});
const element = (tag, attribute) => new Promise((done) => {
  const made = document.createElement(tag);
  made.onload = () => done("loaded");
  made.onerror = () => done("failed");
  made[attribute] = base + (tag === "script" ? "/_nicegui/3.18.0/static/nicegui.js" : "/studio.css");
  if (tag === "link") made.rel = "stylesheet";
  document.body.append(made);
});
(async () => {
  await attempt("websocket", socket);
  await attempt("read", async () => (await fetch(base + "/runs", {credentials: "include"})).status);
  await attempt("blind post", async () => {
    await fetch(base + "/choose?theme=dark", {method: "POST", mode: "no-cors", credentials: "include", body: "x"});
    return "sent";
  });
  await attempt("script", () => element("script", "src"));
  await attempt("style", () => element("link", "href"));
  const framed = document.createElement("iframe");
  framed.src = base + "/";
  document.body.append(framed);
  await new Promise((done) => { framed.onload = done; });
  await attempt("frame", () => framed.contentDocument === null ? "closed" : "open");
  const other = window.open(base + "/", "other");
  for (let i = 0; i < 100 && !other.closed; i++) await new Promise((done) => setTimeout(done, 100));
  results.window = other.closed ? "cut" : "open";  // it is there; but this page has lost hold of it
  document.title = JSON.stringify(results);
})();
</script>"""


@pytest.fixture(scope="module")
def evil_site() -> Iterator[int]:
    """A site on this machine whose page attacks the studio; return its port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(EVIL.encode())

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])  # another site; the same site by another port
def test_a_page_of_another_site_gets_nothing(
    studio: RunningStudio, visit: Callable[..., Visit], evil_site: int, name: str
) -> None:
    visitor = visit(studio.restart())
    visitor.ignored = [""]  # all that fails here is meant to
    visitor.open()
    evil = visitor.context.new_page()
    evil.goto(f"http://{name}:{evil_site}/?base={studio.base}")
    evil.wait_for_function("document.title.startsWith('{')")
    results = json.loads(evil.title())
    assert results.pop("blind post") in ("sent", "failed")  # nobody can keep a page from sending; it is answered with 403
    assert results == {
        "websocket": "failed",
        "read": "failed",
        "script": "failed",
        "style": "failed",
        "frame": "closed",
        "window": "cut",
    }
    visitor.page.reload()
    visitor.connected()
    assert visitor.page.evaluate("document.cookie") == ""  # neither the session nor a choice is a script's to read


def test_a_name_brought_by_another_site_to_mean_this_machine_is_refused(studio: RunningStudio) -> None:
    """DNS rebinding: the browser believes that evil.example is here, and asks as that page itself."""
    studio.restart()
    lines = [
        f"GET /?{studio.url.partition('?')[2]} HTTP/1.1",
        f"Host: evil.example:{studio.port}",
        "Sec-Fetch-Site: same-origin",
    ]
    with socket.create_connection(("127.0.0.1", studio.port), timeout=20) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 421 ")
    assert "set-cookie" not in answer.lower()


SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def hostile_run(runs: Path, number: int = 0, name: str | None = None, phase: str = "failed") -> Path:
    """Write a run directory whose every text is a script."""
    path = runs / (name or f"{SCRIPT.replace('/', '')} {{{{7*7}}}} ${{7*7}} `x` {number}")
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("base_model: " + json.dumps(SCRIPT) + "\n", encoding="utf-8")
    events = [
        {"event": "start", "time": 1000.0 + number, "base_model": SCRIPT, "method": SCRIPT, "total_steps": 9},
        {"event": "step", "time": 1001.0 + number, "step": 1, "loss": 1.5},
        {"event": "sample", "time": 1002.0, "step": 1, "prompt": SCRIPT, "answer": SCRIPT},
        {"event": "warning", "time": 1003.0, "message": SCRIPT},
        {"event": "end", "time": 1004.0, "reason": phase, "message": SCRIPT},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    state = {"phase": phase, "pid": 1, "step": 1, "total": 9, "time": 1004.0, "reason": SCRIPT}
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return path


def test_what_users_and_models_wrote_is_shown_as_text(
    studio: RunningStudio, make_studio: Callable[..., RunningStudio], visit: Callable[..., Visit]
) -> None:
    hostile = make_studio()
    path = hostile_run(hostile.runs)
    job = hostile.runs / ".studio" / "jobs" / "hostile-1"
    job.mkdir(parents=True)
    stored = {"id": job.name, "kind": "finetune", "arguments": [SCRIPT], "about": {"run": path.name}, "created": 1000.0}
    (job / "job.json").write_text(json.dumps(stored), encoding="utf-8")
    (job / "log.txt").write_text(f"{SCRIPT}\ntuneloom: {SCRIPT}\n", encoding="utf-8")
    (job / "exit.json").write_text('{"code": 1}', encoding="utf-8")
    visitor = visit(hostile)
    for place in ("/", "/runs", f"/runs/{id_of(path)}", "/chat", "/predict", "/export"):
        page = visitor.open(place)
        page.wait_for_timeout(400)
        assert page.locator("nav.side").get_by_text(path.name).count() == 1, "the name stands there as it was written"
        assert "owned" not in page.title()
        assert page.locator("img[src=x]").count() == 0
        assert page.locator("[onerror], [onclick], [onload]").count() == 0


def test_what_stands_in_an_address_is_text(studio: RunningStudio, visit: Callable[..., Visit]) -> None:
    visitor = visit(studio.restart())
    visitor.ignored = ["status of 404"]
    hostile = 'a" onclick="document.title=1" x="</script><script>document.title=1</script>'
    page = visitor.open()
    for address in (f"/runs/{quote(hostile, safe='')}", f"/nowhere/{quote(hostile, safe='')}", f"/chat?run={quote(hostile)}"):
        page.goto(studio.base + address)
        page.wait_for_timeout(300)
        assert page.title() != "1"
        assert page.locator("[onclick], [x]").count() == 0
    page.locator("a[href^='/choose?language']").click()  # back to where it was made, the query with it
    page.wait_for_url(re.compile(r"/chat\?run="))
    assert page.evaluate("new URLSearchParams(location.search).get('run')") == hostile
