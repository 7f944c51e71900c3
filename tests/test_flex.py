"""FlexAttention for samples end to end: who attends to whom, the blocks' losses and gradients, and few compilations.

torch runs the kernel's own function uncompiled on a CPU, and refuses gradients there although that function has them; the
fixture `gradients_on_cpu` lifts the refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import (
    CPU,
    FAMILIES,
    LLAMA,
    NOT_PACKED,
    adapted,
    gradients,
    make_model,
    plain_losses,
    sample_of,
    some_samples,
    steps,
    with_exact_norms,
)
from torch.nn import functional as F

from tuneloom.data.plan import pack, plan_step
from tuneloom.errors import UserError
from tuneloom.models import flex_attention
from tuneloom.models.flex_attention import BLOCK_ROWS, FlexAttention
from tuneloom.models.forward import (
    COMPILED,
    PACKED,
    layout_of,
    path_on,
    supervised_loss_sum,
    use_attention,
)
from tuneloom.models.packed_attention import PackedAttention
from tuneloom.train.choose import choose
from tuneloom.train.memory import Fit
from tuneloom.train.proof import takes_packed
from tuneloom.train.team import team
from tuneloom.types import Layout, MicroBatch, Sample, Segment


@pytest.fixture(autouse=True)
def no_compilations_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def attending(batch: MicroBatch, window: int | None) -> np.ndarray:
    """Which row attends to which, (N, N), by the definition: own segment or one before it, no later position, in the window."""
    allowed_NN = np.zeros((batch.num_rows, batch.num_rows), dtype=np.bool_)
    for number, segment in enumerate(batch.segments):
        before = number
        while before >= 0:
            rows, keys = slice(segment.start, segment.end), slice(batch.segments[before].start, batch.segments[before].end)
            allowed_NN[rows, keys] = True
            before = batch.segments[before].parent
    back_NN = batch.positions_N[:, None] - batch.positions_N
    return allowed_NN & (back_NN >= 0) & (back_NN < (window or batch.num_rows + 1))


def as_blocks(counts: torch.Tensor, order: torch.Tensor) -> np.ndarray:
    """A block mask's list as a map of blocks, (B, B)."""
    found = np.zeros(tuple(order.shape[2:]), dtype=np.bool_)
    for row, (count, blocks) in enumerate(zip(counts[0, 0].tolist(), order[0, 0].tolist(), strict=True)):
        assert sorted(blocks) == list(range(len(found)))
        found[row, blocks[:count]] = True
    return found


@given(samples=steps(), repeats=st.integers(1, 12), window=st.sampled_from([None, 1, 9, 60, 5000]))
@settings(max_examples=60)
def test_a_row_attends_to_its_sample_up_to_itself_and_to_no_other(
    samples: list[Sample], repeats: int, window: int | None
) -> None:
    longer = [sample_of(sample.ids_T.tolist() * repeats, [sample.num_tokens * repeats - 1]) for sample in samples]
    [batch] = plan_step(longer, 100_000).micro_batches
    flex = FlexAttention(batch, CPU)
    mask = flex.mask(window)
    assert flex.num_rows % BLOCK_ROWS == 0
    assert 0 <= flex.num_rows - batch.num_rows < BLOCK_ROWS
    assert mask.shape == (1, 1, flex.num_rows, flex.num_rows)

    found_MM = torch_flex.create_mask(mask.mask_mod, None, None, flex.num_rows, flex.num_rows, "cpu")[0, 0].numpy()
    wanted_MM = np.eye(flex.num_rows, dtype=np.bool_)
    wanted_MM[: batch.num_rows, : batch.num_rows] = attending(batch, window)
    assert np.array_equal(found_MM, wanted_MM)

    part_BB, all_BB = as_blocks(mask.kv_num_blocks, mask.kv_indices), as_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert np.array_equal(part_BB.T, as_blocks(mask.q_num_blocks, mask.q_indices))
    assert np.array_equal(all_BB.T, as_blocks(mask.full_q_num_blocks, mask.full_q_indices))
    pairs_BB = wanted_MM.reshape(len(part_BB), BLOCK_ROWS, -1, BLOCK_ROWS).sum((1, 3))
    assert not (part_BB & all_BB).any()
    assert (pairs_BB[all_BB] == BLOCK_ROWS**2).all(), "no row of these blocks is looked at by the mask"
    assert (pairs_BB[~part_BB & ~all_BB] == 0).all(), "these blocks are not computed"
    if window is None or window == 5000:
        assert np.array_equal(all_BB, pairs_BB == BLOCK_ROWS**2), "no block is masked that need not be"
        assert np.array_equal(part_BB | all_BB, pairs_BB > 0), "no block is computed that need not be"


@pytest.mark.parametrize("window", [None, 7, 50])
def test_outputs_and_gradients_are_those_of_the_blocks(window: int | None, gradients_on_cpu: None) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = pack([*some_samples(), sample_of(range(300), [299])], share=True)
    flex, blocks = FlexAttention(batch, CPU), PackedAttention(batch, CPU)
    made = [torch.randn(batch.num_rows, heads, 16, generator=generator, dtype=torch.float64) for heads in (6, 2, 2)]
    added = (0, 0, 0, 0, 0, flex.num_rows - batch.num_rows)
    assert added[-1] > 0

    def outcome(ours: bool) -> list[torch.Tensor]:
        inputs = [each.clone().requires_grad_() for each in made]
        if ours:
            output = flex.attend(*(F.pad(each, added, value=3.0) for each in inputs), scaling=0.25, window=window)
            assert bool(output.isfinite().all())
            output = output[: batch.num_rows]
        else:
            output = blocks.attend(*inputs, scaling=0.25, window=window)
        (output * output.detach()).sum().backward()
        return [output.detach(), *(each.grad for each in inputs if each.grad is not None)]

    for ours, theirs in zip(outcome(True), outcome(False), strict=True):
        assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-5)])
def test_every_family_is_itself_unpacked(family: str, dtype: torch.dtype, tolerance: float, gradients_on_cpu: None) -> None:
    model = adapted(make_model(family, FAMILIES[family], dtype), torch.float32 if dtype == torch.float32 else dtype)
    samples = some_samples()
    expected = sum(plain_losses(model, sample).sum() for sample in samples)
    expected.backward()
    wanted = gradients(model)
    assert takes_packed(model.get_base_model(), COMPILED)
    use_attention(model.get_base_model(), COMPILED)
    assert layout_of(model, training=True) == Layout.SHARED
    [batch] = plan_step(samples, 1000).micro_batches
    assert batch.num_rows % BLOCK_ROWS
    loss = supervised_loss_sum(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    assert float((gradients(model) - wanted).norm()) <= tolerance * float(wanted.norm())


def test_a_step_of_nested_prefixes_is_the_same_on_every_path(gradients_on_cpu: None) -> None:
    model = adapted(with_exact_norms(make_model("llama", LLAMA)))
    generator = np.random.default_rng(0)
    outer, inner = (generator.integers(0, 64, length).tolist() for length in (40, 30))
    starts = [outer, outer + inner, outer + inner, [], outer]
    samples = [
        sample_of([*start, *generator.integers(0, 64, 20 + i).tolist()], [len(start) + 9]) for i, start in enumerate(starts)
    ]
    outcomes = []
    for path in (COMPILED, PACKED, "sdpa"):
        use_attention(model.get_base_model(), path)
        plan = plan_step(samples, 1000, layout_of(model, training=True))
        loss = sum(supervised_loss_sum(model, batch) for batch in plan.micro_batches)
        loss.backward()
        outcomes.append((float(loss.detach()), gradients(model)))
    (ours, our_gradient), *others = outcomes
    for theirs, gradient in others:
        assert ours == pytest.approx(theirs, rel=1e-12)
        assert float((our_gradient - gradient).norm()) <= 1e-10 * float(gradient.norm())


@pytest.mark.parametrize("family", NOT_PACKED)
def test_a_family_that_cannot_is_found_out_and_left_as_it_was(family: str) -> None:
    model = make_model(family, NOT_PACKED[family], torch.float32, "eager")
    assert not takes_packed(model, COMPILED)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("window", [None, 40])
def test_it_is_compiled_for_one_size_and_then_for_any(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = 0

    def count(graph: Any, _: object) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    monkeypatch.setattr(
        flex_attention, "flex_attention", torch.compile(torch_flex.flex_attention, fullgraph=True, backend=count)
    )
    generator = torch.Generator().manual_seed(0)
    for rows in (44, 700, 300, 301, 1100, 90, 513):
        batch = pack([sample_of(range(rows), [rows - 1]), sample_of(range(60), [59])])
        flex, blocks = FlexAttention(batch, CPU), PackedAttention(batch, CPU)
        made = [torch.randn(flex.num_rows, heads, 16, generator=generator) for heads in (4, 2, 2)]
        ours = flex.attend(*made, scaling=0.25, window=window)[: batch.num_rows]
        theirs = blocks.attend(*(each[: batch.num_rows] for each in made), scaling=0.25, window=window)
        torch.testing.assert_close(ours, theirs)
    assert compilations <= 3 if window else compilations == 2  # a window that holds all is none


def test_segments_that_do_not_lie_depth_first_are_refused() -> None:
    rows = np.arange(6)
    segments = (Segment(0, 2), Segment(2, 4), Segment(4, 6, parent=0))
    with pytest.raises(AssertionError, match="depth first"):
        FlexAttention(MicroBatch(rows, rows, rows, segments, 6), CPU)


def test_without_cuda_it_is_refused_by_name_and_read_as_blocks() -> None:
    model = adapted(make_model("llama", LLAMA, torch.float32), torch.float32)
    with pytest.raises(UserError, match="CUDA") as refused:
        choose(model, COMPILED, lambda layout: (Fit(2048), pack(some_samples())), team())
    assert refused.value.where == "base_model.attn_implementation"
    assert [path_on(name, CPU) for name in (COMPILED, PACKED, "sdpa")] == [PACKED, PACKED, "sdpa"]
    assert path_on(COMPILED, torch.device("cuda")) == COMPILED
