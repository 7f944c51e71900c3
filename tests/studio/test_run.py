"""A run's page in a real browser, on real trainings of the tiny model: killed, resumed, paused, renamed, done, deleted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model_folder
from helpers import tiny_config
from test_runs import make_run

from tuneloom.config import dump_config
from tuneloom.rundir import METRICS, RunDirectory
from tuneloom.runs import summarise
from tuneloom.studio.frame import Studio, id_of
from tuneloom.studio.jobs import Job, Jobs

from .conftest import RunningStudio, Visit

pytestmark = pytest.mark.browser
Opened = Callable[..., Visit]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


def start(studio: RunningStudio, model: Path, rows: Path, name: str, **changes: Any) -> Job:
    """Start a training as the page for a new run does."""
    values = {
        "name": name,
        "training.max_steps": 160,
        "training.eval_steps": 20,
        "data.validation": str(rows),
        "evaluation.prompts": ["Who are you?"],
        "evaluation.sample_max_new_tokens": 8,
        **changes,
    }
    file = studio.runs.parent / f"{name}.yaml"
    file.write_text(dump_config(tiny_config(model, rows, studio.runs, values)), encoding="utf-8")
    return Jobs(studio.runs).start(f"start-{name}", "finetune", ["finetune", str(file)], {"run": name})


def points(page: Any, series: int = 0, chart: int = 0) -> int:
    """How many points a line of a chart has."""
    script = """([chart, series]) => {
        const place = document.querySelectorAll('.run-chart')[chart];
        const drawn = place && getElement(place.id.slice(1))?.chart?.getOption();
        return drawn?.series?.[series]?.data?.length ?? 0;
    }"""
    return int(page.evaluate(script, [chart, series]))


def wait_for_points(page: Any, least: int) -> int:
    end = time.monotonic() + 60
    while (found := points(page)) < least:
        assert time.monotonic() < end, f"{found} points"
        page.wait_for_timeout(100)
    return found


def phase(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('.run-phase')?.innerText.trim() === text", arg=text, timeout=120_000)


def figure(page: Any, name: str) -> str:
    return str(page.locator(f"[data-figure={name}]").inner_text())


def test_a_run_is_watched_killed_resumed_paused_renamed_finished_and_deleted(
    studio: RunningStudio, visit: Opened, model: Path, rows_file: Path
) -> None:
    rows = Path(shutil.copy(rows_file, studio.runs.parent / "rows.jsonl"))
    job = start(studio, model, rows, "first")
    visitor = visit(studio)
    page = visitor.open(f"/runs/job-{job.id}")
    phase(page, "preparing")
    run = RunDirectory(studio.runs / "first")
    page.wait_for_url(f"**/runs/{id_of(run.path)}")

    # Watched: the chart gets points. The trainer is killed: shown as such, and it can be resumed.
    few = wait_for_points(page, 2)
    wait_for_points(page, few + 1)
    pid = job.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    phase(page, "killed")
    assert "it was killed" in page.locator(".note.bad").inner_text()
    kept = summarise(run.path)
    assert kept.phase == "dead"

    # Resumed, by a button pressed twice: one job.
    page.get_by_role("button", name="Begin again").dblclick()
    phase(page, "training")
    jobs = Jobs(studio.runs).all("finetune")
    assert len(jobs) == 2
    assert jobs[0].arguments == ("finetune", "--resume-from", str(run.path))

    # Paused: it says so, leaves a checkpoint, and a refresh and a second tab show the same.
    wait_for_points(page, 2)
    page.get_by_role("button", name="Pause").click()
    phase(page, "paused")
    assert list(run.checkpoints()) == [summarise(run.path).step]
    shown = (figure(page, "step"), figure(page, "train_loss"), points(page), page.locator(".run-log").inner_text())
    (note,) = page.locator(".note").all()
    assert f"Paused at step {summarise(run.path).step}." in note.inner_text()
    assert "kept: checkpoint-" in note.inner_text()
    assert "tuneloom: " in shown[3]
    second = visitor.context.new_page()
    second.goto(page.url)
    page.reload()
    for tab in (page, second):
        phase(tab, "paused")
        wait_for_points(tab, 1)
        assert (figure(tab, "step"), figure(tab, "train_loss"), points(tab), tab.locator(".run-log").inner_text()) == shown

    # Renamed in the list; the page with the old address leads to it.
    page.goto(f"{studio.base}/runs")
    page.get_by_role("button", name="Rename: first").click()
    field = page.get_by_label("New name")
    field.fill("../second")
    page.get_by_role("button", name="Rename", exact=True).click()
    page.get_by_text("A name begins with").wait_for()
    field.fill("second")
    field.press("Enter")
    page.locator("tr[data-run=second]").wait_for()
    assert not run.path.exists()
    run = RunDirectory(studio.runs / "second")
    second.wait_for_url(f"**/runs/{id_of(run.path)}")
    second.wait_for_function("window.socket?.connected === true")

    # Where it cannot go on the reason stands in the button's place, and the button comes back with what was missing.
    rows.rename(rows.with_suffix(".away"))
    second.get_by_text(f"A data file is not there any more: {rows}").wait_for()
    assert second.get_by_role("button", name="Resume").count() == 0
    rows.with_suffix(".away").rename(rows)
    second.get_by_role("button", name="Resume").click()
    phase(second, "done")
    assert figure(second, "step") == "160 / 160"
    assert run.adapter.is_dir()
    links = [link.get_attribute("href") for link in second.locator(".main a[href*='target=']").all()]
    assert links == [f"/{place}?target={id_of(run.path)}" for place in ("chat", "predict", "export")]
    assert second.locator(".run-answers tbody tr").count() == 8
    history = run.history("step")
    assert [event["step"] for event in history] == list(range(1, 161))

    # The numbers as a file, the chart as a picture.
    table = visitor.context.request.get(f"{second.url}/metrics.csv")
    assert table.headers["content-disposition"].startswith("attachment")
    lines = table.text().splitlines()
    assert lines[0].startswith("event,step,time,")
    assert sum(line.startswith("step,") for line in lines) == 160
    assert sum(line.startswith("eval,") for line in lines) == 8
    with second.expect_download() as saved:
        second.get_by_role("button", name="Save the chart as PNG").click()
    assert saved.value.suggested_filename == "second-loss.png"
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")

    # Deleted: asks first.
    page.get_by_role("button", name="Delete: second").click()
    page.get_by_role("button", name="Keep").click()
    assert run.path.is_dir()
    page.get_by_role("button", name="Delete: second").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.locator("tr[data-run=second]").wait_for(state="detached")
    assert not run.path.exists()
    assert not list((studio.runs / ".studio" / "trash").iterdir())


def test_a_job_that_makes_no_run_shows_its_last_words(
    studio: RunningStudio, visit: Opened, model: Path, tmp_path: Path
) -> None:
    job = start(studio, model, tmp_path / "nowhere.jsonl", "unborn")
    page = visit(studio).open(f"/runs/job-{job.id}")
    phase(page, "failed")
    assert "nowhere.jsonl" in page.locator(".note.bad").inner_text()
    assert page.get_by_role("button", name="Stop").count() == 0


def test_fifty_runs_a_torn_one_and_a_broken_one(
    make_studio: Callable[..., RunningStudio], visit: Opened, tmp_path: Path
) -> None:
    for i in range(50):
        make_run(tmp_path / "runs", f"run-{i:02}", started=1000.0 + i, state={"phase": "done"})
    torn, broken = tmp_path / "runs" / "run-07", tmp_path / "runs" / "run-08"
    (torn / "state.json").write_text("{")
    (broken / METRICS).unlink()
    studio = make_studio(tmp_path / "runs")
    page = visit(studio).open("/runs")
    rows = page.locator("tr[data-run]")
    page.locator("tr[data-run=run-08]").wait_for()
    names = [row.get_attribute("data-run") for row in rows.all()]
    assert names == [f"run-{i:02}" for i in range(49, -1, -1) if i != 8] + ["run-08"]
    assert "metrics.jsonl is missing" in page.locator("tr[data-run=run-08]").inner_text()
    assert "unreadable" in page.locator("tr[data-run=run-07]").inner_text()
    page.get_by_label("Filter").fill("dora unreadable")
    page.wait_for_function(
        "() => [...document.querySelectorAll('tr[data-run]')].filter((row) => row.offsetParent).length === 1"
    )
    page.get_by_label("Filter").fill("no such run")
    page.get_by_text("No run matches.").wait_for()
    page.goto(f"{studio.base}/runs/{id_of(torn)}")
    phase(page, "unreadable")
    assert "state.json is missing or torn" in page.locator(".note.bad").inner_text()


def test_smoothing_is_switched_and_remembered_and_dark_has_its_own_colours(
    make_studio: Callable[..., RunningStudio], visit: Opened, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "run", state={"phase": "done"})
    studio = make_studio(tmp_path / "runs")
    page = visit(studio).open(f"/runs/{id_of(run.path)}")
    wait_for_points(page, 2)
    colour = "() => getElement(document.querySelector('.run-chart').id.slice(1)).chart.getOption().series[0].lineStyle.color"
    lines = "() => getElement(document.querySelector('.run-chart').id.slice(1))?.chart?.getOption()?.series?.length"
    assert page.evaluate(lines) == 3
    page.get_by_role("switch", name="Smooth").click()
    page.wait_for_function(f"() => ({lines})() === 2")
    light = page.evaluate(colour)
    page.goto(f"{studio.base}/choose?theme=dark&back=/runs/{id_of(run.path)}")
    page.wait_for_function(f"() => ({lines})() === 2")
    assert {light, page.evaluate(colour)} == {"#0f766e", "#2dd4bf"}


def test_a_run_that_cannot_be_resumed_says_why(
    make_studio: Callable[..., RunningStudio], visit: Opened, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "run", state={"phase": "interrupted", "pid": 4_000_000})
    page = visit(make_studio(run.path.parent)).open(f"/runs/{id_of(run.path)}")
    page.get_by_role("button", name="Begin again").click()
    page.get_by_text("The last attempt to resume it failed").wait_for(timeout=120_000)
    assert "/models/small" in page.locator(".note.bad").inner_text()
    assert page.get_by_role("button", name="Begin again").is_enabled()
    run.config.write_text("adapter: {rank: 3}")
    page.reload()
    page.get_by_text("It cannot be resumed.").wait_for()
    assert page.get_by_role("button", name="Begin again").count() == 0


def test_a_job_of_a_renamed_run_is_still_its_job(tmp_path: Path) -> None:
    from tuneloom.studio.run_actions import job_of, rename_run

    run = make_run(tmp_path, "old", state={"phase": "failed"})
    studio = Studio(tmp_path, Jobs(tmp_path))
    job = Jobs(tmp_path).start("start-old", "finetune", ["doctor", "--no-such-option"], {"run": "old", "resume": True})
    while job.pid() is not None:
        time.sleep(0.05)
    target = rename_run(studio, run.path, "new")
    found = job_of(studio, target)
    assert found is not None
    assert found.id == job.id
    assert studio.run_path(id_of(run.path)) == target
    assert json.loads((job.folder / "job.json").read_text())["about"]["run"] == "new"


def test_runs_are_sorted_selected_and_compared(
    make_studio: Callable[..., RunningStudio], visit: Opened, tmp_path: Path
) -> None:
    odd = "<img src=x onerror=alert(1)>"
    for i, name in enumerate(("a", "b", odd)):
        make_run(tmp_path / "runs", name, started=1000.0 + i, state={"phase": "done"})
    second = RunDirectory(tmp_path / "runs" / "b")
    second.config.write_text(second.config.read_text().replace("r: 3", "r: 64"))
    second.append_event("step", step=3, loss=1.25, learning_rate=0.001, step_seconds=2.0, tokens=90)
    studio = make_studio(tmp_path / "runs")
    visitor = visit(studio)
    page = visitor.open("/runs")

    def names() -> list[str | None]:
        return [row.get_attribute("data-run") for row in page.locator("tr[data-run]").all()]

    # Sorted by a column, by keyboard; selected, which sorting keeps.
    assert names() == [odd, "b", "a"]
    assert page.get_by_role("button", name="Compare (0)").is_disabled()
    page.get_by_role("checkbox", name="Select for comparison: a").click()
    page.get_by_role("button", name="Sort by: Loss").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('tr[data-run]').dataset.run === 'b'")
    assert page.locator("th.runs-train_loss").get_attribute("aria-sort") == "ascending"
    page.get_by_role("checkbox", name="Select for comparison: b").focus()
    page.keyboard.press("Space")
    page.get_by_role("checkbox", name=odd).click()
    page.get_by_role("button", name="Compare (3)").click()

    # Compared: curves over each other, what differs, how each went.
    page.wait_for_url("**/compare?run=*&run=*&run=*")
    visitor.connected()
    assert page.url.split("?")[1] == "&".join(f"run={id_of(tmp_path / 'runs' / name)}" for name in ("b", odd, "a"))
    page.get_by_text("adapter.r", exact=True).wait_for()
    cells = page.locator("tr", has_text="adapter.r").locator("td").all_inner_texts()
    assert cells == ["64", "3", "3"]
    assert page.locator("tr", has_text="Training loss").locator("td").all_inner_texts() == ["1.2500", "2.5000", "2.5000"]
    assert [points(page, series) for series in (0, 1, 2)] == [3, 3, 1]
    assert points(page, 0, chart=1) == 1
    box = page.locator(".run-chart").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_text(odd).last.wait_for()  # in the tooltip, as text

    # A run that goes on: followed.
    second.append_event("step", step=4, loss=0.75, learning_rate=0.001, step_seconds=2.0, tokens=120)
    page.get_by_text("0.7500", exact=True).wait_for()
    page.wait_for_function(
        "() => getElement(document.querySelector('.run-chart').id.slice(1)).chart.getOption().series[0].data.length === 4"
    )

    # On a phone, in Chinese, without one that is gone.
    page.set_viewport_size({"width": 360, "height": 800})
    page.get_by_role("link", name="切换到中文").click()
    page.get_by_text("不同的设置").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.goto(page.url + "&run=0123456789abcdef")
    page.get_by_text("其中 1 个训练已不存在。").wait_for()
    page.get_by_text("不同的设置").wait_for()
    page.goto(f"{studio.base}/compare?run={id_of(second.path)}")
    page.get_by_text("请在训练记录中选择").wait_for()
