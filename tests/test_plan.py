"""Which samples make a step, and how they go through the model: exactly once, shifted, padding masked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuneloom.data.plan import MIN_SHARED_TOKENS, PASS_COST_TOKENS, StepSchedule, epoch_order, pack, plan_step
from tuneloom.types import IGNORE_INDEX, Layout, Location, MicroBatch, Sample, Segment, StepPlan


def schedule(num_samples: int = 10, per_step: int = 4, seed: int = 0, epochs: float = 1.0, max_steps: int = -1) -> StepSchedule:
    return StepSchedule(num_samples, per_step, seed, epochs, max_steps)


def sample(number: int, length: int, supervised: Sequence[int] = ()) -> Sample:
    """A sample whose tokens tell it from every other: number * 1000 + position."""
    mask_T = np.zeros(length, dtype=np.bool_)
    mask_T[list(supervised)] = True
    return Sample(np.arange(length, dtype=np.int32) + number * 1000 + 1, mask_T, Location("x", number))


def padded_tokens(batch: MicroBatch) -> int:
    """What the batch is when its samples are padded to one length."""
    return len(batch.segments) * max(segment.end - segment.start for segment in batch.segments)


def sample_of(ids: Sequence[int], supervised: Sequence[int], number: int = 0) -> Sample:
    mask_T = np.zeros(len(ids), dtype=np.bool_)
    mask_T[list(supervised)] = True
    return Sample(np.array(ids, dtype=np.int32), mask_T, Location("x", number))


def unpacked(batch: MicroBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """The ids, positions and labels of each sample in a batch: along the segments from the root to each leaf."""
    parents = {segment.parent for segment in batch.segments}
    found = []
    for number, segment in enumerate(batch.segments):
        if number in parents:
            continue
        rows: list[int] = []
        while True:
            rows = [*range(segment.start, segment.end), *rows]
            if segment.parent < 0:
                break
            segment = batch.segments[segment.parent]
        found.append((batch.ids_N[rows].tolist(), batch.positions_N[rows].tolist(), batch.labels_N[rows].tolist()))
    return found


# The schedule.


def test_an_epoch_takes_every_sample_once_and_its_last_step_what_is_left() -> None:
    plan = schedule(num_samples=10, per_step=4, epochs=2)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 6)
    for epoch in (0, 1):
        steps = [plan.indices(3 * epoch + position) for position in range(3)]
        assert [len(step) for step in steps] == [4, 4, 2]
        assert sorted(i for step in steps for i in step) == list(range(10))


def test_a_step_is_a_function_of_seed_and_number_alone() -> None:
    steps = [5, 0, 3, 3, 1, 11, 4]
    one = schedule(epochs=9)
    assert [one.indices(step) for step in steps] == [schedule(epochs=9).indices(step) for step in steps]
    assert [one.indices(step) for step in steps] == [schedule(max_steps=40).indices(step) for step in steps]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, -1, 3), (2, -1, 6), (2.5, -1, 8), (0.5, -1, 2), (0.01, -1, 1), (3, 2, 2), (0.1, 100, 100), (2, 0, 6)],
)
def test_max_steps_wins_over_epochs_which_may_be_fractions(epochs: float, max_steps: int, expected: int) -> None:
    assert schedule(epochs=epochs, max_steps=max_steps).num_steps == expected


def test_a_set_smaller_than_a_step_is_a_step() -> None:
    plan = schedule(num_samples=3, per_step=16, epochs=2)
    assert (plan.steps_per_epoch, plan.num_steps) == (1, 2)
    assert sorted(plan.indices(0)) == sorted(plan.indices(1)) == [0, 1, 2]


def test_what_happens_at_intervals_is_due_after_that_many_steps() -> None:
    plan = schedule(num_samples=10, per_step=4, epochs=3)
    assert [step for step in range(1, 10) if plan.due("epoch", step)] == [3, 6, 9]
    assert [step for step in range(1, 10) if plan.due(4, step)] == [4, 8]
    assert not any(plan.due(None, step) for step in range(1, 10))
    assert [plan.epochs_done(step) for step in (0, 3, 9)] == [0, 1, 3]
    assert plan.epochs_done(1) == pytest.approx(1 / 3)


# A step's micro-batches.


def test_labels_are_shifted_by_one_and_positions_begin_anew() -> None:
    long, short = sample(1, 5, [2, 3, 4]), sample(2, 3, [1])
    batch = pack([long, short])
    assert batch.ids_N.tolist() == [1001, 1002, 1003, 1004, 2001, 2002]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 0, 1]
    no = IGNORE_INDEX
    assert batch.labels_N.tolist() == [no, 1003, 1004, 1005, 2002, no]
    assert batch.segments == (Segment(0, 4), Segment(4, 6))
    assert batch.locations == (Location("x", 1), Location("x", 2))
    assert (batch.num_tokens, batch.num_rows, batch.num_supervised_tokens) == (6, 6, 4)


def test_padded_like_lengths_share_a_pass_and_unlike_ones_do_not() -> None:
    samples = [sample(n, length, [length - 1]) for n, length in enumerate((500, 20, 510, 22, 21, 505))]
    plan = plan_step(samples, 10_000, Layout.PADDED)
    assert [padded_tokens(batch) for batch in plan.micro_batches] == [3 * 509, 3 * 21]


def test_what_samples_begin_with_is_stored_once_on_every_level() -> None:
    system, question = list(range(100, 120)), list(range(200, 220))
    samples = [
        sample_of([*system, *question, 1, 2, 3], [41, 42], 0),
        sample_of([*system, *question, 4, 5], [41], 1),
        sample_of([*system, 900, 901, 902], [21, 22], 2),
        sample_of([300, 301, 302], [1, 2], 3),
    ]
    [batch] = plan_step(samples[::-1], 1000).micro_batches
    assert batch.segments == (
        Segment(0, 20),
        Segment(20, 40, 0),
        Segment(40, 42, 1),
        Segment(42, 43, 1),
        Segment(43, 45, 0),
        Segment(45, 47),
    )
    assert batch.num_rows == 47
    assert batch.num_tokens == sum(each.num_tokens - 1 for each in samples)


def test_a_row_with_a_label_is_never_shared_nor_is_a_short_beginning() -> None:
    alike = list(range(40))
    early = [sample_of([*alike, n, n], [30, 40, 41]) for n in (50, 60)]
    [batch] = plan_step(early, 1000).micro_batches
    assert batch.segments[0] == Segment(0, 29), "row 29 predicts token 30"
    short = [sample_of([*alike[: MIN_SHARED_TOKENS - 1], n, n, n], [MIN_SHARED_TOKENS + 1]) for n in (50, 60)]
    assert {segment.parent for segment in plan_step(short, 1000).micro_batches[0].segments} == {-1}
    twice = [sample_of(alike, [39])] * 2
    [batch] = plan_step(twice, 1000).micro_batches
    assert batch.segments == (Segment(0, 38), Segment(38, 39, 0), Segment(39, 40, 0)), "the same sample twice counts twice"
    assert batch.num_supervised_tokens == 2


def test_packed_micro_batches_are_the_fewest_and_about_equal() -> None:
    plan = plan_step([sample(n, 101, [50]) for n in range(10)], 600, Layout.PACKED)
    assert [batch.num_rows for batch in plan.micro_batches] == [500, 500]


def test_a_pass_more_is_made_only_where_padding_would_cost_more() -> None:
    near, far = 100 + PASS_COST_TOKENS - 1, 100 + PASS_COST_TOKENS + 1
    for other, passes in ((near, 1), (far, 2)):
        plan = plan_step([sample(1, 100, [99]), sample(2, other, [1])], 10_000, Layout.PADDED)
        assert len(plan.micro_batches) == passes


def test_a_sample_longer_than_the_budget_goes_alone() -> None:
    samples = [sample(1, 200, [5]), sample(2, 30, [5]), sample(3, 31, [5])]
    for layout in Layout:
        assert sorted(batch.num_rows for batch in plan_step(samples, 64, layout).micro_batches) == [59, 199]


SAMPLES = st.lists(
    st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n - 1), min_size=1))),
    min_size=1,
    max_size=20,
)


@st.composite
def alike(draw: st.DrawFn) -> list[Sample]:
    """Samples of few different tokens in long runs, so that many begin alike on several levels."""
    blocks = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30)), min_size=3, max_size=3))
    found = []
    for number in range(draw(st.integers(1, 12))):
        chosen = [blocks[i] for i in draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))]
        ids = [token for token, times in chosen for _ in range(times)]
        ids += draw(st.lists(st.integers(4, 6), min_size=1, max_size=3))
        found.append(sample_of(ids, sorted(draw(st.sets(st.integers(1, len(ids) - 1), min_size=1, max_size=4))), number))
    return found


@given(shapes=SAMPLES, max_tokens=st.integers(1, 200), layout=st.sampled_from(Layout))
@example(shapes=[(2, {1})], max_tokens=1, layout=Layout.SHARED)
def test_a_step_holds_every_sample_once_whatever_the_budget(
    shapes: list[tuple[int, set[int]]], max_tokens: int, layout: Layout
) -> None:
    check_whole([sample(number, length, sorted(on)) for number, (length, on) in enumerate(shapes)], max_tokens, layout)


@given(samples=alike(), max_tokens=st.integers(1, 300), layout=st.sampled_from(Layout))
def test_a_step_of_samples_that_begin_alike_holds_every_one(samples: list[Sample], max_tokens: int, layout: Layout) -> None:
    plan = check_whole(samples, max_tokens, layout)
    for batch in plan.micro_batches:
        prefixes = {segment.parent for segment in batch.segments} - {-1}
        for number in prefixes:
            segment = batch.segments[number]
            assert (batch.labels_N[segment.start : segment.end] == IGNORE_INDEX).all()
            assert segment.end - segment.start >= MIN_SHARED_TOKENS


def check_whole(samples: list[Sample], max_tokens: int, layout: Layout) -> StepPlan:
    plan = plan_step(samples, max_tokens, layout)
    for batch in plan.micro_batches:
        size = padded_tokens(batch) if layout == Layout.PADDED else batch.num_rows
        assert size <= max_tokens or len(batch.locations) == 1
        assert [segment.start for segment in batch.segments] == [0, *(segment.end for segment in batch.segments[:-1])]
        assert all(segment.parent < number for number, segment in enumerate(batch.segments))
    locations = [location for batch in plan.micro_batches for location in batch.locations]
    assert sorted(location.line for location in locations if location) == list(range(len(samples)))
    rows = [row for batch in plan.micro_batches for row in unpacked(batch)]
    assert len(rows) == len(samples)
    for location, (ids, positions, labels) in zip(locations, rows, strict=True):
        assert location
        of = samples[location.line]
        assert ids == of.ids_T[:-1].tolist()
        assert positions == list(range(len(ids)))
        labelled = {position + 1: label for position, label in enumerate(labels) if label != IGNORE_INDEX}
        assert labelled == {t: of.ids_T[t] for t in np.flatnonzero(of.mask_T).tolist()}
    assert plan.num_samples == len(samples)
    assert plan.num_tokens == sum(s.num_tokens - 1 for s in samples)
    assert plan.num_supervised_tokens == sum(s.num_supervised_tokens for s in samples)
    return plan


@given(shapes=SAMPLES, max_tokens=st.integers(40, 400))
def test_no_grouping_of_neighbours_by_length_is_cheaper(shapes: list[tuple[int, set[int]]], max_tokens: int) -> None:
    lengths = sorted((length - 1 for length, _ in shapes[:9]), reverse=True)
    plan = plan_step([sample(n, length + 1, [1]) for n, length in enumerate(lengths)], max_tokens, Layout.PADDED)
    got = sum(padded_tokens(batch) + PASS_COST_TOKENS for batch in plan.micro_batches)
    best = float("inf")
    for cuts in range(2 ** (len(lengths) - 1)):  # bit i: a cut after sample i
        cost, start = 0, 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or cuts >> (end - 1) & 1:
                padded = lengths[start] * (end - start)
                cost += padded + PASS_COST_TOKENS if padded <= max_tokens or end - start == 1 else 10**9
                start = end
        best = min(best, cost)
    assert got == best
