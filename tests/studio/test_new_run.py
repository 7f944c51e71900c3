"""A new run in a real browser: one click, a double click, an uploaded file with a bad row, a refresh, a second tab."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloom.config import dump_config, load_config
from tuneloom.studio.drafts import Draft, Drafts
from tuneloom.studio.forms import get, put
from tuneloom.studio.jobs import Jobs
from tuneloom.studio.questions import new_values

from .conftest import RunningStudio, Visit

pytestmark = pytest.mark.browser

NAME = '[data-key="data.variables.name"]'


@pytest.fixture
def tiny_draft(studio: RunningStudio, tiny_model: Path, rows_file: Path) -> Drafts:
    """The form with the tiny model and four steps on a file of its own; neither name nor author is given."""
    drafts = Drafts(studio.runs)
    values = new_values()
    for key, value in {
        "base_model.path": str(tiny_model),
        "data.train": [{"path": str(rows_file)}, {"path": "self_cognition_en", "count": 8}],
        "training.max_steps": 4,
        "training.gradient_accumulation_steps": 1,
        "evaluation.prompts": [],
    }.items():
        put(values, key, value)
    drafts.save(Draft(f"key-{time.time_ns()}", values))
    return drafts


def wait_for(page: Any, found: Callable[[], Any]) -> Any:
    """Return the first true answer."""
    for _ in range(300):
        if answer := found():
            return answer
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen within 30 s")


def test_a_name_and_two_quick_clicks_on_start_train_one_run(
    studio: RunningStudio, visit: Callable[..., Visit], tiny_draft: Drafts
) -> None:
    visitor = visit(studio)
    visitor.ignored.append("404")  # the run's view may not be there
    page = visitor.open()
    start = page.get_by_role("button", name="Start", exact=True)
    start.click()
    page.get_by_text("Give it a name.").wait_for()
    wait_for(page, lambda: page.evaluate("document.activeElement.dataset.key") == "data.variables.name")
    assert Jobs(studio.runs).all() == []
    page.fill(NAME, "Loomi")
    page.get_by_text("loomi-lora", exact=True).wait_for()
    page.get_by_text("The YAML that will run").click()
    shown = page.locator(".new-yaml")
    wait_for(page, lambda: "name: Loomi" in shown.inner_text())
    yaml = shown.inner_text()
    start.dblclick()
    page.wait_for_url("**/runs/job-*")
    [job] = Jobs(studio.runs).all("finetune")
    assert page.url.endswith(f"/runs/job-{job.id}")
    assert Path(job.arguments[1]).read_text(encoding="utf-8").strip() == yaml.strip()
    assert job.about["run"] == "loomi-lora"
    assert wait_for(page, lambda: job.ended() != "running" and job.ended()) == "done", job.log_tail()
    ended = [json.loads(line) for line in (studio.runs / "loomi-lora" / "metrics.jsonl").read_text().splitlines()]
    assert any(event["event"] == "end" and event["step"] == 4 for event in ended)
    page = visitor.open("/")
    page.get_by_text("loomi-lora-2", exact=True).wait_for()  # the next run's name
    page.get_by_text("as loomi-lora on").wait_for()  # and its time, by what this one has measured


def test_an_uploaded_file_shows_its_bad_row_as_text_and_a_refresh_keeps_the_form(
    studio: RunningStudio, visit: Callable[..., Visit], tiny_draft: Drafts, tmp_path: Path
) -> None:
    rows = tmp_path / "my rows.jsonl"
    script = "<img src=x onerror=\"document.title='broken in'\">"
    good = {"messages": [{"role": "user", "content": script}, {"role": "assistant", "content": "Hello!"}]}
    rows.write_text(f"{json.dumps(good)}\n{json.dumps({'messages': 3})}\n", encoding="utf-8")
    visitor = visit(studio)
    page = visitor.open()
    page.locator("input[type=file]").first.set_input_files(rows)
    report = page.locator(".new-report", has_text="my_rows.jsonl")
    report.get_by_text("my_rows.jsonl:2").wait_for()
    report.get_by_text("2 rows read, 1 usable, 1 dropped").wait_for()
    assert report.get_by_text(script).count() == 1 and page.locator("main img").count() == 0
    assert "broken" not in page.title()
    [place] = tiny_draft.uploads.glob("*/*")
    assert place.read_bytes() == rows.read_bytes()
    page.fill(NAME, "小织")
    page.get_by_role("radio", name="rsLoRA").click()
    page.reload()
    visitor.connected()
    assert page.input_value(NAME) == "小织"
    assert page.get_by_role("radio", name="rsLoRA").get_attribute("aria-checked") == "true"
    page.locator(".new-report", has_text="my_rows.jsonl").get_by_text("my_rows.jsonl:2").wait_for()


def test_with_the_keyboard_alone_a_method_and_an_effort_are_chosen(
    studio: RunningStudio, visit: Callable[..., Visit], tiny_draft: Drafts
) -> None:
    visitor = visit(studio)
    page = visitor.open()

    def focused() -> str:
        return str(page.evaluate("(document.activeElement.innerText || '').split('\\n')[0]"))

    def checked(group: str) -> list[str]:
        found = page.get_by_role("radiogroup", name=group).get_by_role("radio", checked=True)
        return [text.splitlines()[0] for text in found.all_inner_texts()]

    for group in page.get_by_role("radiogroup").all():
        assert group.get_by_role("radio").count() > group.locator('[role=radio][tabindex="0"]').count() == 1 or (
            group.get_by_role("radio").count() == 1
        ), "one stop of the Tab key"
    page.get_by_label("Its author").focus()
    page.keyboard.press("Tab")
    assert focused() == "LoRA"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert focused() == "DoRA"
    wait_for(page, lambda: checked("How is it taught?") == ["DoRA"])
    page.keyboard.press("ArrowRight")
    wait_for(page, lambda: checked("How is it taught?") == ["LoRA"])
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    wait_for(page, lambda: checked("How is it taught?") == ["rsLoRA"])
    page.keyboard.press("Tab")
    assert focused() == "Quick", "no effort of the three is set, so the first is where Tab comes in"
    page.keyboard.press("End")
    wait_for(page, lambda: checked("How much effort?") == ["Careful"])
    values = tiny_draft.load().values
    assert (get(values, "adapter.use_rslora"), get(values, "adapter.use_dora")) == (True, False)
    assert get(values, "data.validation") == 0.1
    page.keyboard.press("Shift+Tab")
    assert focused() == "rsLoRA"

    presets = page.get_by_role("radiogroup", name="Start from")
    presets.get_by_role("radio").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused() == "Careful"
    page.wait_for_timeout(300)
    assert get(tiny_draft.load().values, "adapter.use_rslora") is True, "an arrow key replaces nothing"
    page.keyboard.press("Space")
    wait_for(page, lambda: checked("Start from") == ["Careful"])
    assert get(tiny_draft.load().values, "adapter.use_rslora") is False


def test_advanced_tells_a_mistake_beside_its_control_why_one_is_off_and_another_tab_sees_it(
    studio: RunningStudio, visit: Callable[..., Visit], tiny_draft: Drafts
) -> None:
    visitor = visit(studio)
    page, other = visitor.open(), visitor.context.new_page()
    other.goto(studio.base)
    page.get_by_text("Advanced: every setting").click()
    page.locator(".new-section", has_text="Training").locator(".q-item").first.click()
    epochs = page.locator('[aria-label="training.num_train_epochs"]')
    epochs.wait_for()
    assert epochs.is_disabled()
    setting = page.locator(".new-setting", has_text="training.num_train_epochs")
    assert "no effect: training.max_steps is 4" in setting.inner_text()
    page.fill('[aria-label="training.learning_rate"]', "fast")
    wrong = page.locator(".new-setting", has_text="training.learning_rate")
    wrong.get_by_text("got 'fast'").wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    other.locator("aside").get_by_text("got 'fast'").wait_for()
    page.fill('[aria-label="training.learning_rate"]', "5e-4")
    wait_for(page, lambda: get(tiny_draft.load().values, "training.learning_rate") == 5e-4)
    assert page.input_value('[aria-label="training.learning_rate"]') == "5e-4"  # not written over while it is typed
    wrong.get_by_text("got 'fast'").wait_for(state="detached")
    page.locator("aside").get_by_text("in all steps").wait_for()
    page.get_by_text("Load a YAML").click()
    yaml = dump_config(load_config(None, ["training.max_steps=9", "data.variables={name: Nomi, author: Us}"]))
    page.get_by_role("textbox", name="Paste a config").fill(yaml)
    page.get_by_role("button", name="Load", exact=True).click()
    wait_for(page, lambda: get(tiny_draft.load().values, "training.max_steps") == 9)
    assert page.input_value('[aria-label="training.max_steps"]') == "9" and page.input_value(NAME) == "Nomi"


def test_the_planner_ends_with_the_studio(make_studio: Callable[..., RunningStudio], visit: Callable[..., Visit]) -> None:
    import psutil

    own = make_studio()
    page = visit(own).open()
    assert own.process is not None
    studio_process = psutil.Process(own.process.pid)
    [planner] = wait_for(page, lambda: studio_process.children(recursive=True))
    page.close()
    own.kill()
    planner.wait(timeout=20)
