"""Uploads that nobody names any more go after a day; all others stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from tuneloom.studio.drafts import Draft, Drafts
from tuneloom.studio.jobs import Jobs
from tuneloom.studio.questions import add_path, new_values
from tuneloom.studio.uploads import UPLOADS, tidy_uploads

DAY = 86_400


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def upload(runs: Path, name: str, days: float) -> Path:
    """Make an upload of so many days of age; return its file."""
    file = runs / UPLOADS / name / "rows.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    for path in (file, file.parent):
        os.utime(path, (time.time() - days * DAY,) * 2)
    return file


def test_an_old_upload_that_nobody_names_goes(tmp_path: Path, jobs: Jobs) -> None:
    old, new = upload(tmp_path, "old-upload", 1.1), upload(tmp_path, "new-upload", 0.9)
    assert tidy_uploads(tmp_path, jobs) == [old.parent]
    assert not old.parent.exists()
    assert new.is_file()
    assert tidy_uploads(tmp_path, jobs) == []


def test_what_the_draft_or_a_run_or_a_live_job_names_stays(tmp_path: Path, jobs: Jobs) -> None:
    of_draft, of_run, of_job, of_nobody = (upload(tmp_path, name, 9) for name in ("draft-up", "run-up", "job-up", "none-up"))
    values = new_values()
    add_path(values, str(of_draft))
    Drafts(tmp_path).save(Draft("number", values))
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "config.yaml").write_text(f"data:\n  train: {of_run}\n", encoding="utf-8")
    live = jobs.start("live-job", "check", ["studio", "--port", "0", "--runs-dir", str(of_job.parent)])
    assert tidy_uploads(tmp_path, jobs) == [of_nobody.parent]
    assert all(file.is_file() for file in (of_draft, of_run, of_job))
    while live.pid() is None:
        time.sleep(0.02)
    psutil.Process(live.pid()).kill()
    while live.ended() == "running":
        time.sleep(0.02)
    assert tidy_uploads(tmp_path, jobs) == [of_job.parent], "its job has ended"


def test_no_link_leads_out_of_the_folder_of_uploads(tmp_path: Path, jobs: Jobs) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept", encoding="utf-8")
    link = upload(tmp_path, "old-upload", 9).parent.with_name("a-link")
    link.symlink_to(outside, target_is_directory=True)
    later = time.time() + 9 * DAY
    assert len(tidy_uploads(tmp_path, jobs, later)) == 2
    assert not link.is_symlink()
    assert (outside / "kept.txt").read_text(encoding="utf-8") == "kept"
    uploads = tmp_path / UPLOADS
    uploads.rmdir()
    uploads.symlink_to(outside, target_is_directory=True)
    assert tidy_uploads(tmp_path, jobs, later) == []
    assert (outside / "kept.txt").is_file()
