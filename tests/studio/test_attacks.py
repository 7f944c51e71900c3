"""Another page in the visitor's own browser, with the cookie there, gets nothing; what users wrote is text and nothing else."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tuneloom.studio.drafts import MAX_UPLOAD_BYTES, Draft, Drafts
from tuneloom.studio.forms import put
from tuneloom.studio.frame import id_of
from tuneloom.studio.questions import new_values

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
    visitor = visit(studio)
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
    page = visitor.open(f"/runs/{id_of(path)}")
    answers = page.locator(".run-answers")
    answers.get_by_text(SCRIPT, exact=True).first.wait_for()
    assert answers.get_by_text(SCRIPT, exact=True).count() == 2, "the prompt and the answer"


ATTACK = (
    "<img src=x onerror='window.__x=1;alert(1)'><script>window.__x=1;alert(1)</script>"
    "{{constructor.constructor('window.__x=1')()}} [x](javascript:window.__x=1)"
)


def assert_harmless(page: Any, shown: Any) -> None:
    """Require a text to be there as it was written, and nothing of it to have been done."""
    shown.first.wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("window.__x") is None
    assert page.locator("img[src=x], [onerror], a[href^=javascript]").count() == 0


def write_job(runs: Path, kind: str, about: dict[str, Any], log: str) -> Path:
    """Write the folder of a job that has ended well; return it."""
    folder = runs / ".studio" / "jobs" / f"hostile-{kind}"
    folder.mkdir(parents=True)
    stored = {"id": folder.name, "kind": kind, "arguments": [ATTACK], "about": about, "created": 1000.0}
    (folder / "job.json").write_text(json.dumps(stored), encoding="utf-8")
    (folder / "log.txt").write_text(log, encoding="utf-8")
    (folder / "exit.json").write_text('{"code": 0}', encoding="utf-8")
    return folder


def test_uploaded_rows_and_the_name_of_their_file_are_text(
    studio: RunningStudio, visit: Callable[..., Visit], tmp_path: Path, tiny_model: Path
) -> None:
    values = new_values()
    put(values, "base_model.path", str(tiny_model))
    Drafts(studio.runs).save(Draft("hostile-rows", values))
    file = tmp_path / "<img src=x onerror=alert(1)>{{7*7}}.jsonl"
    good = {"messages": [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}]}
    file.write_text(f"{json.dumps(good)}\n{json.dumps({'messages': ATTACK})}\n{ATTACK}\n", encoding="utf-8")
    page = visit(studio).open()
    page.locator("input[type=file]").first.set_input_files(file)
    report = page.locator(".new-report", has_text=".jsonl")
    report.get_by_text("3 rows read, 1 usable, 2 dropped").wait_for()
    assert_harmless(page, report.get_by_text(ATTACK))
    assert report.get_by_text(ATTACK, exact=True).count() == 2, "the question and the answer"
    assert report.locator(".new-problems").get_by_text("window.__x=1;alert(1)").count() >= 1
    [kept] = (studio.runs / ".studio" / "uploads").glob("*/*")
    assert re.fullmatch(r"[\w.-]+\.jsonl", kept.name)


def test_answers_of_a_model_and_words_of_a_job_are_text(
    make_studio: Callable[..., RunningStudio], visit: Callable[..., Visit]
) -> None:
    hostile = make_studio()
    names = ("prompt", "answer", "base_answer", "reference")
    predicted = write_job(hostile.runs, "predict", {"target": f"/{ATTACK}".replace("</", "<"), "data": "x"}, ATTACK) / "result"
    predicted.mkdir()
    side = {"loss": 1.0, "perplexity": 2.7, "scores": {}}
    report = {"base": side, "model": side, "num_samples": 1, "problems": [ATTACK]}
    (predicted / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (predicted / "predictions.jsonl").write_text(json.dumps(dict.fromkeys(names, ATTACK)) + "\n", encoding="utf-8")
    out = hostile.runs / "exports" / "mine"
    out.mkdir(parents=True)
    (out / "export.json").write_text(json.dumps({"check": {"passed": True}, "notes": [ATTACK]}), encoding="utf-8")
    write_job(hostile.runs, "export", {"target": ATTACK, "to": ATTACK, "out": str(out)}, f"loading {ATTACK} ...\n")
    chats = hostile.runs / ".studio" / "chats"
    chats.mkdir(parents=True)
    replies = {
        "base": {"text": ATTACK, "status": "done", "tokens": 3, "seconds": 1.0},
        "tuned": {"text": ATTACK, "status": "error", "error": ATTACK},
    }
    chat = {"target": ATTACK, "system": ATTACK, "sampling": {}, "turns": [{"question": ATTACK, "replies": replies}]}
    (chats / f"{'v' * 24}.json").write_text(json.dumps({"target": ATTACK, "both": True, "chats": [chat]}), encoding="utf-8")

    visitor = visit(hostile)
    page = visitor.open()
    page = visitor.open("/predict/hostile-predict")
    assert_harmless(page, page.locator("table.answers").get_by_text(ATTACK, exact=True))
    assert page.locator("table.answers").get_by_text(ATTACK, exact=True).count() == len(names)
    page = visitor.open("/export/hostile-export")
    assert_harmless(page, page.locator("ol.steps").get_by_text(f"loading {ATTACK}", exact=True))
    assert_harmless(page, page.locator(".note").get_by_text(ATTACK, exact=True))
    for place in ("/predict", "/export"):
        assert_harmless(visitor.open(place), page.locator(".job-line"))
    visitor.context.add_cookies([{"name": "tuneloom_visitor", "value": "v" * 24, "url": hostile.base}])
    page = visitor.open("/chat")
    assert_harmless(page, page.locator(".chat-question").get_by_text(ATTACK, exact=True))
    assert page.locator(".chat-answer").get_by_text(ATTACK, exact=True).count() >= 1


# Uploads that are too large.


@pytest.fixture
def upload_address(studio: RunningStudio, visit: Callable[..., Visit], tmp_path: Path) -> tuple[Visit, str]:
    """Let the page upload a small file; return the visitor, and where the file went."""
    Drafts(studio.runs).save(Draft("oversized", new_values()))
    shutil.rmtree(studio.runs / ".studio" / "uploads", ignore_errors=True)
    visitor = visit(studio)
    page = visitor.open()
    small = tmp_path / "small.jsonl"
    small.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with page.expect_request(re.compile("/upload/")) as sent:
        page.locator("input[type=file]").first.set_input_files(small)
    page.locator(".new-report", has_text="small.jsonl").wait_for()
    return visitor, urlsplit(sent.value.url).path


def kept_uploads(studio: RunningStudio) -> list[str]:
    return [path.name for path in (studio.runs / ".studio" / "uploads").glob("*/*")]


def attack(visitor: Visit, place: str, extra: list[str], body: Iterator[bytes]) -> str:
    """Send a body to where the page uploads, as the page itself; return the first line of the answer."""
    port = visitor.studio.port
    cookies = "; ".join(f"{cookie['name']}={cookie['value']}" for cookie in visitor.context.cookies())
    lines = [
        f"POST {place} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        f"Origin: http://127.0.0.1:{port}",
        f"Cookie: {cookies}",
        "Content-Type: multipart/form-data; boundary=b",
        *extra,
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        with contextlib.suppress(ConnectionError):  # it has answered and hung up
            for piece in body:
                connection.sendall(piece)
        return connection.recv(65536).decode(errors="replace").partition("\r\n")[0]


HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'
LARGEST_BODY = 600 << 20


def test_a_file_that_is_too_large_is_not_taken_and_the_page_says_so(upload_address: tuple[Visit, str], tmp_path: Path) -> None:
    visitor, place = upload_address
    refused = attack(visitor, place, [f"Content-Length: {LARGEST_BODY + 1}"], iter([HEAD, b"x" * 65536]))
    assert refused.startswith("HTTP/1.1 413 ")
    assert kept_uploads(visitor.studio) == ["small.jsonl"]
    big = tmp_path / "big.jsonl"
    with open(big, "wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    page = visitor.page
    page.locator("input[type=file]").first.set_input_files(big)
    page.get_by_text("The file was not taken: it is larger than 512 MB").wait_for()
    page.goto(f"{visitor.studio.base}/predict")
    visitor.connected()
    page.get_by_role("combobox", name="Data").click()
    page.get_by_role("option", name="upload a file …").click()
    page.locator("input[type=file]").set_input_files(big)
    page.get_by_text(re.compile("^Not taken: .*512 MB at most")).wait_for()
    assert kept_uploads(visitor.studio) == ["small.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes", [LARGEST_BODY + (1 << 20), MAX_UPLOAD_BYTES + (1 << 20)])
def test_a_body_that_hides_its_length_is_cut_and_one_between_the_limits_is_told(
    upload_address: tuple[Visit, str], num_bytes: int
) -> None:
    visitor, place = upload_address

    def chunks() -> Iterator[bytes]:
        for piece in (HEAD, *(b"x" * (1 << 20) for _ in range(num_bytes >> 20)), b"\r\n--b--\r\n"):
            yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        yield b"0\r\n\r\n"

    status = attack(visitor, place, ["Transfer-Encoding: chunked"], chunks())
    if num_bytes > LARGEST_BODY:
        assert status.startswith("HTTP/1.1 413 ")
    else:
        visitor.page.get_by_text("The file is larger than 512 MB. Name its path instead.").wait_for()
    assert kept_uploads(visitor.studio) == ["small.jsonl"]
    visitor.open("/runs")  # it goes on serving


def test_what_stands_in_an_address_is_text(studio: RunningStudio, visit: Callable[..., Visit]) -> None:
    visitor = visit(studio)
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
