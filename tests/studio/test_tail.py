"""metrics.jsonl as it grows, and curves that stay small: against the run directory's own reading of the file."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_runs import make_run

from tuneloom.rundir import METRICS, RunDirectory
from tuneloom.runs import summarise
from tuneloom.studio.listing import NOTES, RunListing
from tuneloom.studio.series import Curve, Smoother, Thinned, smoothing_window
from tuneloom.studio.tail import RunTail


def step(number: int, loss: float = 1.0, **fields: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "time": 100.0 + number, **fields}


def append(run: RunDirectory, *events: dict[str, Any]) -> None:
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path, "run")


def losses(tail: RunTail) -> list[tuple[int, float]]:
    return tail.curves()["loss"].raw.points()


def assert_as_history(tail: RunTail) -> None:
    history = tail.run.history()
    steps = [event for event in history if event["event"] == "step"]
    assert tail.events == [event for event in history if event["event"] != "step"]
    assert losses(tail) == [(event["step"], event["loss"]) for event in steps]
    assert tail.num_steps() == len(steps)
    assert (tail.last_step or {}).get("step") == (steps[-1]["step"] if steps else None)
    assert tail.summary() == summarise(tail.run.path)


# The tail.


def test_only_new_bytes_are_read(run: RunDirectory) -> None:
    tail = RunTail(run.path)
    assert tail.update()
    assert_as_history(tail)
    before = tail.bytes_read
    assert not tail.update()
    line = json.dumps(step(3)) + "\n"
    append(run, step(3))
    assert tail.update()
    assert tail.bytes_read - before == len(line)
    assert_as_history(tail)


def test_a_torn_last_line_waits_for_its_rest(run: RunDirectory) -> None:
    tail = RunTail(run.path)
    tail.update()
    line = json.dumps(step(3)) + "\n"
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write(line[:20])
        file.flush()
        assert not tail.update()
        file.write(line[20:])
    assert tail.update()
    assert losses(tail)[-1] == (3, 1.0)


def test_a_torn_line_of_a_killed_trainer_is_passed_over(run: RunDirectory) -> None:
    tail = RunTail(run.path)
    run.metrics.write_text(run.metrics.read_text() + '{"event": "step", "st')
    tail.update()
    run.append_event("resume", step=2)
    run.append_event("step", step=3, loss=9.0)
    tail.update()
    assert_as_history(tail)
    assert losses(tail)[-1] == (3, 9.0)


def test_a_resume_cuts_what_it_goes_back_behind(run: RunDirectory) -> None:
    tail = RunTail(run.path)
    append(run, step(3, 5.0), {"event": "eval", "step": 3, "eval_loss": 0.1}, step(4, 4.0))
    tail.update()
    assert losses(tail)[-1] == (4, 4.0)
    generation = tail.generation
    append(run, {"event": "resume", "step": 2}, step(3, 2.0))
    tail.update()
    assert_as_history(tail)
    assert losses(tail)[1:] == [(2, 2.5), (3, 2.0)]
    assert tail.curves()["eval_loss"].raw.points() == [(2, 2.75)]
    assert tail.generation > generation


def test_a_resume_to_the_beginning_leaves_no_step(run: RunDirectory) -> None:
    tail = RunTail(run.path)
    append(run, {"event": "resume", "step": 0})
    tail.update()
    assert_as_history(tail)
    assert (losses(tail), tail.last_step) == ([], None)


@pytest.mark.parametrize("same_file", [True, False])
def test_a_file_replaced_or_shrunk_is_read_anew(run: RunDirectory, tmp_path: Path, same_file: bool) -> None:
    tail = RunTail(run.path)
    tail.update()
    events = [{"event": "start", "total_steps": 2, "time": 1.0}, *(step(i, 7.0) for i in range(1, 40))]
    text = "".join(json.dumps(event) + "\n" for event in (events[:3] if same_file else events))
    if same_file:
        run.metrics.write_text(text)
    else:
        (tmp_path / "other").write_text(text)
        os.replace(tmp_path / "other", run.metrics)
    assert tail.update()
    assert_as_history(tail)


def test_a_file_that_is_gone_is_forgotten_and_comes_back(run: RunDirectory) -> None:
    tail = RunTail(run.path)
    tail.update()
    text = run.metrics.read_text()
    run.metrics.unlink()
    assert tail.update()
    assert losses(tail) == []
    assert not tail.update()
    run.metrics.write_text(text)
    assert tail.update()
    assert_as_history(tail)


@given(
    st.lists(
        st.one_of(st.binary(max_size=60), st.sampled_from([b"{}", b"[]", b'{"event": 1}', b'{"event": "step"}'])), max_size=6
    )
)
def test_any_bytes_are_read_as_the_run_directory_reads_them(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    run = make_run(tmp_path_factory.mktemp("any"), "run")
    with open(run.metrics, "ab") as file:
        for line in lines:
            file.write(line.replace(b"\n", b"").replace(b"\r", b"") + b"\n" + json.dumps(step(5)).encode() + b"\n")
    tail = RunTail(run.path)
    tail.update()
    history = run.history()
    assert tail.num_steps() == sum(event["event"] == "step" and isinstance(event.get("step"), int) for event in history)
    assert tail.events == [event for event in history if event["event"] != "step"]


def test_a_run_of_the_trainer_is_summarised_alike(finished_run: Path) -> None:
    tail = RunTail(finished_run)
    tail.update()
    assert_as_history(tail)
    assert sorted(tail.samples()) == [8, 16, 24]
    assert set(tail.samples()[24]) == {"Who are you?", "你是谁？"}


def test_a_hundred_thousand_steps_cost_each_line_once(run: RunDirectory) -> None:
    """Work, not time: bytes are read once, points are touched a few times, and what is shown stays bounded."""
    num = 100_000
    with open(run.metrics, "a", encoding="utf-8") as file:
        for i in range(3, num + 1):
            file.write(f'{{"event": "step", "step": {i}, "loss": {99.0 if i == 55_555 else 1 + i % 7 / 10}, "time": {i}}}\n')
    tail = RunTail(run.path)
    tail.update()
    curve = tail.curves()["loss"]
    assert tail.num_steps() == num
    assert tail.bytes_read == run.metrics.stat().st_size
    assert max(len(curve.raw.points()), len(curve.smooth.points())) <= 2000
    assert (55_555, 99.0) in curve.raw.points(), "a peak of one step stays to be seen"
    assert losses(tail)[0] == (1, 3.0)
    assert losses(tail)[-1][0] == num
    assert curve.raw.work < 1.2 * num
    before = (tail.bytes_read, curve.raw.work)
    append(run, step(num + 1))
    tail.update()
    assert tail.bytes_read - before[0] < 100
    assert tail.curves()["loss"] is curve
    assert curve.raw.work - before[1] <= 1 + 2000
    assert losses(tail)[-1] == (num + 1, 1.0)


# The curves.


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(6, 40))
def test_thinning_keeps_first_last_and_extremes(values: list[float], most: int) -> None:
    thinned = Thinned(most)
    for i, value in enumerate(values):
        thinned.add(i, value)
    points = thinned.points()
    assert len(points) <= most
    assert set(points) <= set(enumerate(values))
    assert points == sorted(points)
    if values:
        assert points[0] == (0, values[0])
        assert points[-1] == (len(values) - 1, values[-1])
        kept = [value for _, value in points]
        assert (min(kept), max(kept)) == (min(values), max(values))


def test_few_points_are_kept_as_they_are() -> None:
    thinned = Thinned(100)
    for i in range(49):
        thinned.add(i, i * 0.5)
    assert thinned.points() == [(i, i * 0.5) for i in range(49)]


def test_what_is_not_finite_is_not_drawn() -> None:
    curve = Curve(5)
    for i, value in enumerate([1.0, math.nan, math.inf, 3.0]):
        curve.add(i, value)
    assert curve.raw.points() == [(0, 1.0), (3, 3.0)]
    assert all(math.isfinite(value) for _, value in curve.smooth.points())


def test_smoothing_is_a_weighted_mean_from_the_first_value_on() -> None:
    smoother = Smoother(4)
    assert smoother.add(2.0) == pytest.approx(2.0)
    assert smoother.add(4.0) == pytest.approx((0.75 * 2 + 4) / 1.75)
    for _ in range(200):
        last = smoother.add(-1.0)
    assert last == pytest.approx(-1.0)


def test_the_window_grows_with_the_run() -> None:
    assert [smoothing_window(total) for total in (None, 20, 4000, 100_000)] == [10, 5, 100, 250]


# The listing.


def test_a_run_that_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    for i in range(50):
        make_run(tmp_path, f"run-{i}", started=1000.0 + i, state={"phase": "done"})
    listing = RunListing(tmp_path)
    names = [run.name for run in listing.summaries()]
    assert names == [f"run-{i}" for i in range(49, -1, -1)]
    assert listing.reads == 50
    assert [run.name for run in listing.summaries()] == names
    assert listing.reads == 50
    append(RunDirectory(tmp_path / "run-7"), step(9, 0.5))
    assert next(run for run in listing.summaries() if run.name == "run-7").train_loss == 0.5
    assert listing.reads == 51


def test_a_restarted_studio_reads_only_what_has_changed_meanwhile(tmp_path: Path) -> None:
    for i in range(5):
        make_run(tmp_path, f"run-{i}", started=1000.0 + i, state={"phase": "done"})
    found = RunListing(tmp_path).summaries()
    append(RunDirectory(tmp_path / "run-3"), step(9, 0.5))
    again = RunListing(tmp_path)
    changed = [before.name for before, after in zip(found, again.summaries(), strict=True) if before != after]
    assert (changed, again.reads) == (["run-3"], 1)


def test_who_asks_for_the_list_never_reads_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 100_000
    run = make_run(tmp_path, "long", started=50.0, state={"phase": "done", "step": number, "total": number})
    lines = [f'{{"event": "step", "step": {i}, "loss": {9 - i / 20_000}, "time": {100 + i}}}\n' for i in range(3, number + 1)]
    lines.insert(50_000, json.dumps({"event": "eval", "step": 50_000, "eval_loss": 0.25, "time": 50_100.0}) + "\n")
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.writelines(lines)
    readers: list[tuple[int, int]] = []
    update = RunTail.update

    def watched(tail: RunTail) -> bool:
        before = tail.bytes_read
        changed = update(tail)
        readers.append((threading.get_ident(), tail.bytes_read - before))
        return changed

    monkeypatch.setattr(RunTail, "update", watched)
    listing = RunListing(tmp_path)
    (at_once,) = listing.summaries()
    assert (at_once.step, at_once.train_loss, at_once.phase, at_once.started) == (number, 4.0, "done", 50.0)
    assert listing.summaries()[0].name == "long"
    listing.settle()
    assert listing.summaries() == [summarise(run.path)]
    assert listing.summaries()[0].best_eval_loss == 0.25, "which is in the middle of the file"
    assert [reader for reader, _ in readers] != [] and threading.get_ident() not in [reader for reader, _ in readers]
    assert sum(num_bytes for _, num_bytes in readers) == run.metrics.stat().st_size, "read once, whoever asks how often"
    assert RunListing(tmp_path).summaries() == [summarise(run.path)]
    assert len(readers) == 1, "what the thread has read is kept for the next studio"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run-0": 1}', '{"run-0": [[], {}]}', '{"run-0": {"name": "run-0"}}'])
def test_notes_of_the_listing_that_are_none_are_made_anew(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, "run-0", state={"phase": "done"})
    expected = RunListing(tmp_path).summaries()
    (tmp_path / NOTES).write_text(text)
    assert RunListing(tmp_path).summaries() == expected


def test_a_name_that_is_no_utf8_is_listed_and_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", state={"phase": "done"})
    strange = tmp_path / os.fsdecode(b"caf\xe9")
    run.path.rename(strange)
    for _ in range(2):
        (found,) = RunListing(tmp_path).summaries()
        assert (found.name, found.path) == ("caf\ufffd", str(strange))
    (strange / METRICS).unlink()
    assert [broken.name for broken in RunListing(tmp_path).broken()] == ["caf\ufffd"]


def test_runs_that_come_go_and_break(tmp_path: Path) -> None:
    kept, other = make_run(tmp_path, "kept", state={"phase": "done"}), make_run(tmp_path, "other")
    (tmp_path / "notes").mkdir()
    listing = RunListing(tmp_path)
    assert len(listing.summaries()) == 2
    assert listing.broken() == []
    (other.path / METRICS).unlink()
    (kept.path / "state.json").write_text('{"phase": "do')
    (found,) = listing.summaries()
    assert (found.name, found.phase) == ("kept", "unknown")
    (broken,) = listing.broken()
    assert (broken.name, broken.missing) == ("other", (METRICS,))
