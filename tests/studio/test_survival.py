"""The studio is killed and comes back; its jobs never notice, and broken folders break nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from tuneloom.studio.frame import Studio, id_of
from tuneloom.studio.jobs import Jobs

from .conftest import RunningStudio, Visit
from .test_attacks import hostile_run
from .test_guard import Client
from .test_jobs import ended, endless, until


def plain_run(runs: Path, number: int, num_steps: int = 200) -> Path:
    """Write a run directory as a trainer leaves it."""
    path = runs / f"run-{number:03d}"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("base_model: smollm2-135m-instruct\n", encoding="utf-8")
    events = [{"event": "start", "time": 1000.0 + number, "base_model": "tiny", "method": "lora", "total_steps": num_steps}]
    events += [{"event": "step", "time": 1001.0 + number, "step": step, "loss": 2.0} for step in range(1, num_steps + 1)]
    events.append({"event": "end", "time": 2000.0 + number, "reason": "done", "loss": 2.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    state = {"phase": "done", "pid": 1, "step": num_steps, "total": num_steps, "time": 2000.0}
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return path


def corrupt_runs(runs: Path) -> None:
    """Write folders that were runs, torn in different ways."""
    for number, (file, content) in enumerate(
        [
            ("state.json", b""),
            ("state.json", b"{"),
            ("state.json", b"[1]"),
            ("state.json", b'{"phase": 7, "step": "x", "total": -1, "pid": "me", "time": []}'),
            ("state.json", b'{"phase": "training", "pid": -5, "time": 1e400}'),
            ("metrics.jsonl", b""),
            ("metrics.jsonl", b"\xff\xfe\x00\x00"),
            ("metrics.jsonl", b'{"event": "step", "step": {}, "loss": "NaN"}\n' + b"[" * 100_000 + b"\n{"),
            ("metrics.jsonl", b'{"event": "start", "time": "now", "total_steps": 1e999}\n{"event": 5}\nnull\n'),
            ("config.yaml", b"\x00: [}"),
        ]
    ):
        (plain_run(runs, 900 + number, 3) / file).write_bytes(content)
    (runs / "empty").mkdir()
    (runs / "a file").write_text("x", encoding="utf-8")
    (runs / "dangling").symlink_to(runs / "nowhere")
    (runs / "loop").symlink_to(runs)
    strange = runs / os.fsdecode(b"not utf-8 \xff")
    strange.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (strange / name).write_text("", encoding="utf-8")


def test_broken_folders_break_no_view(make_studio: Callable[..., RunningStudio]) -> None:
    studio = make_studio()
    corrupt_runs(studio.runs)
    hostile_run(studio.runs)
    jobs = studio.runs / ".studio" / "jobs"
    for name, content in (("broken-01", "{"), ("broken-02", "[]"), ("broken-03", ""), ("..hidden", "{}")):
        (jobs / name).mkdir(parents=True)
        (jobs / name / "job.json").write_text(content, encoding="utf-8")
    (jobs / "a-file-00").write_text("", encoding="utf-8")
    client = Client(studio)
    for place in ("/", "/runs", "/chat", "/predict", "/export"):
        assert client.look(place) == 200, place
        assert "run-900" in client.body.decode()
    for path in sorted(studio.runs.iterdir()):
        assert client.look(f"/runs/{id_of(path)}") == 200, path
    assert "Traceback" not in studio.said()
    assert "Error" not in studio.said()


@pytest.mark.parametrize("kind", ["missing", "file", "dangling"])
def test_a_folder_of_runs_that_is_none_has_no_runs(tmp_path: Path, kind: str) -> None:
    runs = tmp_path / "runs"
    if kind == "file":
        runs.write_text("x", encoding="utf-8")
    elif kind == "dangling":
        runs.symlink_to(tmp_path / "nowhere")
    studio = Studio(runs, Jobs(runs))
    assert studio.summaries() == []
    assert studio.run_path("0" * 16) is None
    assert studio.jobs.all() == []


def test_fifty_runs_are_listed_quickly(tmp_path: Path) -> None:
    for number in range(50):
        plain_run(tmp_path, number)
    studio = Studio(tmp_path, Jobs(tmp_path))
    begin = time.perf_counter()
    found = studio.summaries()
    seconds = time.perf_counter() - begin
    assert [run.name for run in found] == [f"run-{number:03d}" for number in reversed(range(50))]
    assert {run.phase for run in found} == {"done"}
    assert seconds < 3  # 0.2 s on an idle core


def test_a_killed_studio_comes_back_with_the_same_runs_and_jobs_and_the_jobs_go_on(
    make_studio: Callable[..., RunningStudio],
) -> None:
    studio = make_studio()
    plain_run(studio.runs, 1)
    jobs = Jobs(studio.runs)
    job = endless(jobs)  # started as a view would, by another process than the test's own below
    before = Client(studio)
    assert before.inside("GET", "/runs").status == 200
    pid = job.pid()
    studio.restart()
    assert job.pid() == pid
    assert job.ended() == "running"
    after = Client(studio)
    assert after.inside("GET", "/runs").status == 200
    assert b"run-001" in after.body
    again = Jobs(studio.runs)
    assert [found.id for found in again.all()] == [job.id]
    assert again.start(job.id, "check", ["--version"]) == job, "the wish was granted before; nothing is started twice"
    assert again.stop(again.all()[0])
    assert ended(job) == "killed"
    assert before.ask("GET", "/", {"Cookie": before.cookie}).status == 401


def test_a_job_outlives_what_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tuneloom.studio.jobs import Jobs\n"
        "job = Jobs(Path(sys.argv[1])).start('wish-0001', 'check', ['runs', '--dir', sys.argv[1], '--json'])\n"
        "print(job.pid(), flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "runs")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGKILL)  # its whole group, as a closed terminal would
    parent.wait()
    parent.stdout.close()
    job = Jobs(tmp_path / "runs").get("wish-0001")
    assert job is not None
    assert (job.pid(), job.ended()) == (pid, "running")
    assert ended(job) == "done"  # by itself, and it says how
    assert json.loads(job.log_tail())["runs"] == []


@pytest.mark.browser
def test_an_open_page_follows_a_run_and_is_told_when_the_studio_is_gone(
    make_studio: Callable[..., RunningStudio], visit: Callable[..., Visit]
) -> None:
    studio = make_studio()
    path = plain_run(studio.runs, 1)
    visitor = visit(studio)
    visitor.ignored = ["WebSocket connection", "status of 40[13]", "ERR_CONNECTION"]
    page = visitor.open("/runs")
    second = visitor.context.new_page()
    second.goto(f"{studio.base}/runs")
    plain_run(studio.runs, 2)
    (path / "state.json").unlink()
    (path / "metrics.jsonl").write_text('{"event": "start", "time": 1000.0}\n', encoding="utf-8")
    for tab in (page, second):
        tab.locator("nav.side").get_by_text("run-002").wait_for()
        tab.locator("nav.side").get_by_text("unreadable").wait_for()
    second.reload()
    second.locator("nav.side").get_by_text("run-002").wait_for()
    studio.kill()
    page.locator("#popup[aria-hidden=false]").wait_for()
    studio.start()
    page.goto(studio.url)
    page.wait_for_url(f"{studio.base}/")
    visitor.connected()
    page.locator("nav.side").get_by_text("run-002").wait_for()
    page.goto(studio.url)  # the printed address again, in the same browser
    page.wait_for_url(f"{studio.base}/")
    visitor.connected()
    stranger = visit(studio)
    stranger.ignored = ["status of 401"]
    stranger.page.goto(studio.url)
    stranger.page.get_by_text("Open the studio with the address that the terminal shows.").wait_for()
    until(lambda: not stranger.context.cookies())
