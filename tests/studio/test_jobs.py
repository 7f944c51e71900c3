"""A job is a real process with a folder that says all about it; it outlives the studio and is started once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from tuneloom.studio.jobs import Job, Jobs

KEY = "wish-0001"


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path / "runs")
    yield jobs
    for job in jobs.all():
        if (pid := job.pid()) is not None:
            psutil.Process(pid).kill()


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


def ended(job: Job) -> str:
    until(lambda: job.ended() != "running")
    return job.ended()


def endless(jobs: Jobs, key: str = KEY) -> Job:
    """Start a job that never ends by itself: a studio of its own."""
    job = jobs.start(key, "check", ["studio", "--port", "0", "--runs-dir", str(jobs.folder)])
    until(lambda: "?token=" in job.log_tail())
    return job


def test_a_job_runs_a_command_and_says_how_it_ended(jobs: Jobs) -> None:
    version = jobs.start("version-1", "check", ["--version"], {"run": "测试 <b>"})
    wrong = jobs.start("wrong-001", "check", ["runs", "show", "../no such run; echo $HOME"])
    assert version.ended() == wrong.ended() == "running"
    assert ended(version) == "done"
    assert (version.exit_code(), version.log_tail()) == (0, "tuneloom 0.1.0\n")
    until(lambda: version.pid() is None)
    assert ended(wrong) == "failed"
    assert wrong.exit_code() == 2
    assert wrong.last_words().startswith("tuneloom: no such run")
    assert "no such run; echo $HOME" in wrong.last_words()  # the words came as they were: there was no shell
    assert os.environ["HOME"] not in wrong.log_tail()
    again = Jobs(jobs.folder.parents[1])
    assert [job.id for job in again.all()] == ["wrong-001", "version-1"]
    assert again.get("version-1") == version
    assert again.get("version-1").about == {"run": "测试 <b>"}  # type: ignore[union-attr]


def test_nothing_in_the_folder_where_the_studio_started_is_run(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "runpy", "typer", "tuneloom"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(77)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    job = jobs.start(KEY, "check", ["--version"])
    assert ended(job) == "done", job.log_tail()


def test_start_pressed_in_many_threads_starts_one_job(jobs: Jobs) -> None:
    begin, found = threading.Barrier(12), []

    def press() -> None:
        begin.wait()
        found.append(Jobs(jobs.folder.parents[1]).start(KEY, "check", ["--version"], {"by": threading.get_ident()}))

    threads = [threading.Thread(target=press) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len({json.dumps(job.about) for job in found}) == 1
    assert ended(found[0]) == "done"
    assert found[0].log_tail() == "tuneloom 0.1.0\n"
    assert [path.name for path in jobs.folder.iterdir()] == [KEY]


def test_start_pressed_in_two_processes_starts_one_job(jobs: Jobs) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tuneloom.studio.jobs import Jobs\n"
        "jobs = Jobs(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.readline()\n"
        f"print(jobs.start({KEY!r}, 'check', ['--version'], {{'by': sys.argv[2]}}).about['by'])"
    )
    presses = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(jobs.folder.parents[1]), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for press in presses:
        assert press.stdout is not None
        assert press.stdout.readline() == "ready\n"
    for press in presses:
        assert press.stdin is not None
        press.stdin.write("\n")
        press.stdin.flush()
    said = [press.communicate(timeout=60)[0].strip() for press in presses]
    assert len(set(said)) == 1
    job = jobs.get(KEY)
    assert job is not None
    assert job.about == {"by": said[0]}
    assert ended(job) == "done"
    assert job.log_tail() == "tuneloom 0.1.0\n"


def test_a_killed_job_is_shown_as_killed_and_a_stopped_one_ends(jobs: Jobs) -> None:
    killed, stopped = endless(jobs), endless(jobs, "wish-0002")
    pid = killed.pid()
    assert pid is not None
    assert os.getsid(pid) == pid, "it has a session of its own: a Ctrl-C in the terminal is not for it"
    os.kill(pid, signal.SIGKILL)
    assert jobs.stop(stopped)
    assert ended(killed) == ended(stopped) == "killed"
    assert (killed.exit_code(), killed.pid()) == (None, None)
    assert not jobs.stop(killed)
    assert not jobs.stop(stopped)


_LETS_GO = """
import os, signal, time
from tuneloom.studio.child import Stopping
stopping = Stopping()
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
Last()
print("on", flush=True)
time.sleep(60)
"""


def test_a_stop_that_comes_while_an_object_is_let_go_is_no_stop_lost() -> None:
    command = [sys.executable, "-c", _LETS_GO]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "on\n", "")


def test_a_process_number_that_was_given_again_is_not_the_job(jobs: Jobs) -> None:
    job = jobs.start(KEY, "check", ["--version"])
    ended(job)
    (job.folder / "exit.json").unlink()
    (job.folder / "state.json").write_text(json.dumps({"pid": os.getpid(), "born": 1000.0}), encoding="utf-8")
    jobs.amend(job, created="long ago")
    assert job.pid() is None
    assert not jobs.stop(job)
    assert ended(job) == "killed"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"id": "wish-0001"}', b"\xff\xfe\x00", b"",
     '{"id": "other-001", "kind": "check", "arguments": [], "about": {}, "created": 1}',
     '{"id": "wish-0001", "kind": "shell", "arguments": [], "about": {}, "created": 1}',
     '{"id": "wish-0001", "kind": "check", "arguments": "ab", "about": {}, "created": 1}',
     '{"id": "wish-0001", "kind": "check", "arguments": [1], "about": {}, "created": 1}',
     '{"id": "wish-0001", "kind": "check", "arguments": [], "about": [], "created": 1}',
     '{"id": "wish-0001", "kind": "check", "arguments": [], "about": {}, "created": NaN}',
     '{"id": "wish-0001", "kind": "check", "arguments": [], "about": {}, "created": 1' + "0" * 400 + "}"],
)  # fmt: skip
def test_a_corrupt_job_is_passed_over(jobs: Jobs, content: str | bytes) -> None:
    good = jobs.start("good-0001", "check", ["--version"])
    folder = jobs.folder / KEY
    folder.mkdir()
    (folder / "job.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert jobs.get(KEY) is None
    assert jobs.all() == [good]
    with pytest.raises(ValueError, match="cannot be read"):
        jobs.start(KEY, "check", ["--version"])
    ended(good)


@pytest.mark.parametrize(
    "state", ["", "{", "[]", '{"pid": -1, "born": 1}', '{"pid": true, "born": 1}', '{"pid": 1e999, "born": 1}', "[" * 100_000,
              '{"pid": 99999999999999999999999999, "born": 1}', '{"pid": 1, "born": NaN}', '{"pid": "1", "born": "1"}']
)  # fmt: skip
def test_a_corrupt_state_is_a_job_that_was_killed(jobs: Jobs, state: str) -> None:
    job = Job(KEY, "check", ("--version",), {}, time.time() - 10, jobs.folder / KEY)
    job.folder.mkdir(parents=True)
    (job.folder / "state.json").write_text(state, encoding="utf-8")
    assert job.pid() is None
    assert job.ended() == "killed"
    (job.folder / "exit.json").write_text(state, encoding="utf-8")
    assert job.ended() == "killed"
    assert job.log_tail() == job.last_words() == ""


@pytest.mark.parametrize(
    "key", ["", "short", "../../../etc", "a/b/c/d/e/f", "a" * 65, "with space", "päth-0001", "wish-0001\n"]
)
def test_a_key_that_is_none_is_refused(jobs: Jobs, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        jobs.start(key, "check", ["--version"])
    assert jobs.get(key) is None
    assert not jobs.folder.exists()


def test_an_empty_folder_left_by_a_killed_studio_is_taken(jobs: Jobs) -> None:
    (jobs.folder / KEY).mkdir(parents=True)
    assert ended(jobs.start(KEY, "check", ["--version"])) == "done"


def test_a_long_log_is_shown_from_its_end_in_whole_lines(jobs: Jobs) -> None:
    job = Job(KEY, "check", (), {}, 0.0, jobs.folder / KEY)
    job.folder.mkdir(parents=True)
    job.log.write_bytes(b"".join(b"line %d \xe4\xb8\xad\n" % number for number in range(20_000)) + b"\xff<script>torn")
    tail = job.log_tail(1000)
    assert len(tail) <= 1000
    assert tail.startswith("line ")
    assert tail.endswith("line 19999 中\n\ufffd<script>torn")
    job.log.write_bytes(b"x" * 5000)
    assert job.log_tail(1000) == "x" * 1000
