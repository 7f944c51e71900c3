"""Chat, predict and export in a real Chromium, on a finished run of the tiny model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import chat_row

from tuneloom.runs import list_runs
from tuneloom.studio.frame import id_of

pytestmark = pytest.mark.browser
JOB_MS = 180_000
COOKIES: dict[str, list[Any]] = {}
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def talking(make_studio: Callable[..., Any], finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A studio with one finished run."""
    runs = tmp_path_factory.mktemp("talking") / "runs"
    shutil.copytree(finished_run, runs / "loomi")
    return make_studio(runs=runs)


@pytest.fixture
def enter(talking: Any, visit: Callable[..., Any]) -> Callable[[str], Any]:
    """Open a path as the one visitor of this module: the token is good for once."""

    def go(path: str) -> Any:
        visitor = visit(talking)
        kept = COOKIES.get(talking.url)
        if kept:
            visitor.context.add_cookies(kept)
        visitor.open(path)
        COOKIES[talking.url] = visitor.context.cookies()
        return visitor

    return go


def texts_of(page: Any, label: str) -> list[str]:
    return [text.strip() for text in page.locator(f'section[aria-label="{label}"] .chat-text').all_inner_texts()]


def speakers(process: psutil.Process) -> list[psutil.Process]:
    living = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "tuneloom.studio.speaker" in child.cmdline()]


def test_base_and_tuned_answer_side_by_side_and_the_conversation_stays(talking: Any, enter: Callable[[str], Any]) -> None:
    visitor = enter(f"/chat?target={id_of(talking.runs / 'loomi')}")
    page = visitor.page
    page.get_by_text(re.compile("^Ready")).wait_for(timeout=JOB_MS)
    message = page.get_by_label("Message", exact=True)
    message.fill(f"Hello {SCRIPT}")
    message.press("Shift+Enter")
    message.type("there")
    message.press("Enter")
    page.get_by_text(re.compile("^8 tokens")).nth(1).wait_for(timeout=JOB_MS)
    assert page.locator(".chat-question").inner_text() == f"Hello {SCRIPT}\nthere"
    left, right = (page.locator(f'section[aria-label="{side}"]').bounding_box() for side in ("Base", "Tuned"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert texts_of(page, "Tuned") != texts_of(page, "Base")

    page.get_by_text("System prompt and sampling").click()
    for name, value in (("Temperature", "5"), ("Longest answer, tokens", "1500"), ("Repetition penalty", "3")):
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_text("System prompt and sampling").click()
    page.get_by_text("Base beside it").click()
    message.fill("Go on.")
    page.get_by_role("button", name="Send").click()
    page.wait_for_function("document.querySelectorAll('.chat-text')[1]?.innerText.length > 20")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile("stopped$")).wait_for()
    stopped = texts_of(page, "Tuned")
    assert len(stopped) == 2

    page.reload()
    visitor.connected()
    page.get_by_text(re.compile("stopped$")).wait_for()
    assert texts_of(page, "Tuned") == stopped
    assert page.locator(".chat-question").all_inner_texts()[1] == "Go on."
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function(
        "text => { const t = [...document.querySelectorAll('.chat-text')].at(-1)?.innerText; return t && t !== text }",
        arg=stopped[1],
    )
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Regenerate").and_(page.locator(":enabled")).wait_for()
    assert len(texts_of(page, "Tuned")) == 2
    page.set_viewport_size({"width": 360, "height": 800})
    page.get_by_text("Base beside it").click()
    upper, lower = (page.locator(f'section[aria-label="{side}"]').first.bounding_box() for side in ("Base", "Tuned"))
    assert upper["y"] + upper["height"] < lower["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("window.hacked") is None
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Nothing said yet. Ask it who it is.").wait_for()


def test_a_target_that_does_not_load_says_why_and_another_one_can_be_chosen(talking: Any, enter: Callable[[str], Any]) -> None:
    visitor = enter("/chat")
    page = visitor.page
    page.get_by_role("combobox", name="Run or model").click()
    page.get_by_role("option", name="Another folder or model …").click()
    page.get_by_label("Path of a folder, or a model's name").fill("/no/such/folder")
    page.get_by_role("button", name="Use", exact=True).click()
    page.get_by_text("The model could not be loaded, or has ended.").wait_for(timeout=JOB_MS)
    assert "/no/such/folder" in page.locator(".note.bad").first.inner_text()
    page.get_by_role("combobox", name="Run or model").click()
    page.get_by_role("option", name="loomi").click()
    page.get_by_text(re.compile("^(Loading|Ready)")).wait_for()


def test_a_file_is_predicted_and_past_predictions_survive_a_killed_studio(
    talking: Any, enter: Callable[[str], Any], write_rows: Callable[..., Path]
) -> None:
    rows = [chat_row(f"Question {i} {SCRIPT}", f"Reference {i}") for i in range(23)]
    file = write_rows(rows, "mine.jsonl")
    visitor = enter("/predict")
    page = visitor.page
    page.get_by_role("combobox", name="Data").click()
    page.get_by_role("option", name="upload a file …").click()
    page.get_by_text("Name the data first.").wait_for()
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_text("mine.jsonl is here.").wait_for()
    page.get_by_label("Longest answer, tokens").fill("4")
    page.get_by_role("button", name="Start").dblclick()
    page.get_by_text("Loss, nats a token", exact=True).wait_for(timeout=JOB_MS)
    report = json.loads(next(talking.runs.glob(".studio/jobs/*/result/report.json")).read_text(encoding="utf-8"))
    assert page.get_by_text(f"{report['base']['loss']:.4f}", exact=True).is_visible()
    assert page.get_by_text(f"{report['model']['loss']:.4f}", exact=True).is_visible()
    assert page.get_by_text("1 to 20 of 23").is_visible()
    assert page.locator("table.answers td").first.inner_text() == f"Question 0 {SCRIPT}"
    page.get_by_role("button", name="Next page").click()
    page.get_by_text("21 to 23 of 23").wait_for()
    page.get_by_label("Search").fill("reference 7")
    page.get_by_text("1 to 1 of 1").wait_for()
    assert page.evaluate("window.hacked") is None
    with page.expect_download() as started:
        page.get_by_role("link", name="Download").click()
    assert len(Path(started.value.path()).read_text(encoding="utf-8").splitlines()) == 23
    place = page.url.removeprefix(talking.base)
    head = page.request.get(f"{page.url}/predictions.jsonl").headers
    assert head["content-disposition"].startswith("attachment")
    assert head["x-content-type-options"] == "nosniff"

    assert talking.process is not None
    heard = speakers(psutil.Process(talking.process.pid))
    visitor.ignored.append("ERR_CONNECTION_REFUSED|WebSocket|ERR_CONNECTION_RESET")
    page.goto("about:blank")
    talking.restart()
    assert psutil.wait_procs(heard, timeout=30)[1] == [], "no model is left behind by a killed studio"
    visitor.context.clear_cookies()
    visitor.open("/predict")
    COOKIES[talking.url] = visitor.context.cookies()
    assert page.locator(".job-line").count() == 1, "pressed twice, started once"
    page.locator(".job-line").click()
    page.wait_for_url(f"**{place}")
    page.get_by_text("1 to 20 of 23").wait_for()
    assert page.request.get(talking.base + "/predict/..%2f..%2fetc/predictions.jsonl").status == 404


def test_an_export_shows_its_steps_its_check_and_its_place(talking: Any, enter: Callable[[str], Any]) -> None:
    visitor = enter("/export")
    page = visitor.page
    page.get_by_role("combobox", name="Format").click()
    page.get_by_role("option", name="ChatGLM's original layout").click()
    page.get_by_text("The base of this run is not in ChatGLM's original layout.").wait_for()
    assert page.get_by_role("button", name="Export").is_disabled()
    page.get_by_role("combobox", name="Format").click()
    page.get_by_role("option", name="merged: one model").click()
    name = page.get_by_label("Name of the folder")
    page.wait_for_function("() => document.querySelector('[aria-label=\"Name of the folder\"]').value === 'loomi-merged'")
    name.fill("../elsewhere")
    page.get_by_text(re.compile("^A name has letters")).wait_for()
    name.fill("mine")
    page.get_by_role("button", name="Export").and_(page.locator(":enabled")).click()
    page.get_by_text("Checked: the export answers as the tuned model.").wait_for(timeout=JOB_MS)
    check = json.loads((talking.runs / "exports" / "mine" / "export.json").read_text(encoding="utf-8"))["check"]
    assert page.get_by_text(f"{check['max_logit_difference']:.2e}").first.is_visible()
    assert page.get_by_text("reloading it in a fresh process").first.is_visible()
    assert page.get_by_text(str(talking.runs / "exports" / "mine"), exact=True).is_visible()
    assert [run.name for run in list_runs(talking.runs).runs] == ["loomi"]
    page.get_by_role("link", name="Talk to it").click()
    page.get_by_text(re.compile("^Ready")).wait_for(timeout=JOB_MS)
    assert page.get_by_text("A model without an adapter has nothing to be compared with.").is_visible()
    page = visitor.open("/export")
    page.get_by_label("Name of the folder").fill("mine")
    page.get_by_text("There is a folder of this name; nothing is overwritten.").wait_for()
    assert page.get_by_role("button", name="Export").is_disabled()
