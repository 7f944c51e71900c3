"""Samples end to end, shared prefixes once: the same losses and gradients as transformers and PEFT, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tuneloom.adapters.attach import attach_adapter
from tuneloom.config import AdapterConfig
from tuneloom.data.plan import pack, plan_step
from tuneloom.data.split import split_step
from tuneloom.models import head_loss, packed_attention
from tuneloom.models.forward import COMPILED, PACKED, layout_of, supervised_logits, supervised_loss_sum, use_attention
from tuneloom.models.packed_attention import PackedAttention
from tuneloom.train.proof import takes_packed
from tuneloom.types import Layout, MicroBatch, Sample

CPU = torch.device("cpu")
VOCABULARY = 64
LLAMA = {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "mistral": LLAMA | {"sliding_window": 7},
    "gemma3_text": LLAMA | {"head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": LLAMA | {"head_dim": 16, "pad_token_id": 0},
    "glm4": LLAMA | {"head_dim": 16, "pad_token_id": 0},
    "phi3": LLAMA | {"pad_token_id": 0},
    "granite": LLAMA | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": LLAMA | {"logit_scale": 0.25},
}
"""Grouped queries, biases, norms of queries, sliding windows longer and shorter than samples, partial rotary, scaled logits."""
NOT_PACKED: dict[str, dict[str, Any]] = {"gemma2": LLAMA | {"head_dim": 16, "attn_logit_softcapping": 5.0}, "mamba": {}}


def make_model(family: str, more: dict[str, Any], dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, max_position_embeddings=512, **(sizes | more))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def with_exact_norms(model: Any) -> Any:
    """The model with torch's RMSNorm, since transformers' rounds to fp32 whatever the model's format."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=child.weight.dtype)
                exact.weight.data = child.weight.data
                setattr(parent, name, exact)
    return model


def adapted(model: Any, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """The model with an adapter whose B is not zero."""
    result = attach_adapter(model, AdapterConfig(r=4, **settings), 0, "x").train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in result.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=generator)
    return result


def sample_of(ids: Sequence[int], supervised: Sequence[int]) -> Sample:
    mask_T = np.zeros(len(ids), dtype=np.bool_)
    mask_T[list(supervised)] = True
    return Sample(np.array(ids, dtype=np.int32), mask_T)


def plain_losses(model: Any, sample: Sample) -> torch.Tensor:
    """The loss of each supervised token, by transformers, the sample alone."""
    ids = torch.tensor(sample.ids_T.tolist()).unsqueeze(0)
    logits = model(input_ids=ids[:, :-1]).logits[0]
    rows = torch.tensor(sample.mask_T[1:].tolist())
    return F.cross_entropy(logits[rows], ids[0, 1:][rows], reduction="none")


def gradients(model: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    model.zero_grad()
    return found


@st.composite
def steps(draw: st.DrawFn) -> list[Sample]:
    """Samples that begin alike on several levels, or not at all."""
    token = st.integers(0, VOCABULARY - 1)
    prefixes = draw(st.lists(st.lists(token, min_size=16, max_size=40), min_size=2, max_size=2))
    found = []
    for _ in range(draw(st.integers(1, 7))):
        shared = [each for i in draw(st.lists(st.integers(0, 1), max_size=2)) for each in prefixes[i]]
        own = draw(st.lists(token, min_size=2, max_size=30))
        supervised = draw(st.sets(st.integers(len(shared) + 1, len(shared) + len(own) - 1), min_size=1, max_size=5))
        found.append(sample_of(shared + own, sorted(supervised)))
    return found


@pytest.fixture(scope="module")
def fp64_models() -> dict[str, Any]:
    return {
        "plain": adapted(with_exact_norms(make_model("llama", LLAMA))),
        "dora": adapted(with_exact_norms(make_model("qwen2", LLAMA)), use_dora=True, use_rslora=True),
    }


@pytest.mark.parametrize("kind", ["plain", "dora"])
@given(
    samples=steps(),
    max_tokens=st.integers(20, 300),
    block_rows=st.sampled_from([5, 16, 256]),
    num_ranks=st.integers(1, 3),
)
@settings(max_examples=25)
def test_a_step_is_the_samples_one_by_one_whoever_has_them(
    kind: str, fp64_models: dict[str, Any], samples: list[Sample], max_tokens: int, block_rows: int, num_ranks: int
) -> None:
    model = fp64_models[kind]
    base = model.get_base_model()
    use_attention(base, "sdpa")
    expected = sum(plain_losses(model, sample).sum() for sample in samples)
    expected.backward()
    wanted = gradients(model)
    use_attention(base, PACKED)
    usual = packed_attention.BLOCK_ROWS
    packed_attention.BLOCK_ROWS = block_rows
    try:
        plans = split_step(samples, num_ranks, max_tokens, layout_of(model, training=True))
        loss = sum(supervised_loss_sum(model, batch) for plan in plans for batch in plan.micro_batches)
        loss.backward()
    finally:
        packed_attention.BLOCK_ROWS = usual
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float((gradients(model) - wanted).norm()) <= 1e-10 * float(wanted.norm())


def some_samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    prefix = generator.integers(0, VOCABULARY, 21).tolist()
    lengths = (5, 30, 9, 17)
    return [
        sample_of([*prefix, *generator.integers(0, VOCABULARY, length).tolist()], range(23, 21 + length)) for length in lengths
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-5)])
def test_every_family_packed_is_itself_unpacked(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = adapted(make_model(family, FAMILIES[family], dtype), torch.float32 if dtype == torch.float32 else dtype)
    samples = some_samples()
    expected = sum(plain_losses(model, sample).sum() for sample in samples)
    expected.backward()
    wanted = gradients(model)
    assert takes_packed(model.get_base_model())
    use_attention(model.get_base_model(), PACKED)
    [batch] = plan_step(samples, 1000).micro_batches
    assert batch.num_rows == batch.num_tokens - 3 * 21
    loss = supervised_loss_sum(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    assert float((gradients(model) - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("family", NOT_PACKED)
def test_a_family_that_cannot_is_found_out_and_left_as_it_was(family: str) -> None:
    model = make_model(family, NOT_PACKED[family], torch.float32, "eager")
    assert not takes_packed(model)
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_a_model_that_looks_beyond_its_sample_is_found_out() -> None:
    model = make_model("llama", LLAMA, torch.float32)
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda hidden: plain(hidden + 1e-3 * hidden.mean(1, keepdim=True))  # a token sees all others
    assert not takes_packed(model)


@pytest.mark.parametrize("path", [PACKED, COMPILED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_sample_leaves_the_others_as_they_are_bit_for_bit(dtype: torch.dtype, path: str) -> None:
    model = make_model("llama", LLAMA, dtype)
    use_attention(model, path)
    samples = some_samples()
    other = sample_of([*samples[1].ids_T[:21].tolist(), *([1] * 30)], np.flatnonzero(samples[1].mask_T).tolist())

    def losses(of: list[Sample]) -> list[torch.Tensor]:
        logits_RV, labels_R = supervised_logits(model, pack(of, share=True))
        each = F.cross_entropy(logits_RV.double(), labels_R, reduction="none")
        return list(each.split([sample.num_supervised_tokens for sample in of]))

    with torch.inference_mode():
        before, after = losses(samples), losses([samples[0], other, *samples[2:]])
    assert [torch.equal(one, two) for one, two in zip(before, after, strict=True)] == [True, False, True, True]


def test_with_dropout_nothing_is_shared_and_each_sample_draws_its_own() -> None:
    model = adapted(make_model("llama", LLAMA), lora_dropout=0.5)
    use_attention(model.get_base_model(), PACKED)
    assert layout_of(model, training=True) == Layout.PACKED
    assert layout_of(model, training=False) == Layout.SHARED
    twice = [some_samples()[0]] * 2
    [batch] = plan_step(twice, 1000, Layout.PACKED).micro_batches
    logits_RV, _ = supervised_logits(model, batch)
    first, second = logits_RV.chunk(2)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_16_bits_attention_is_as_near_to_exact_as_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = pack([sample_of(range(1, 301), [299]), sample_of(range(40), [39])])
    packed = PackedAttention(batch, CPU)
    made = [torch.randn(batch.num_rows, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]

    def outcome(kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [each.clone().to(kind).requires_grad_() for each in made]
        output = packed.attend(*inputs, scaling=0.25)
        (output * output.detach()).sum().backward()
        return [output.detach().double(), *(each.grad.double() for each in inputs if each.grad is not None)]

    def by_sample(kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [each.clone().to(kind).requires_grad_() for each in made]
        parts = [
            F.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1) for x in inputs), is_causal=True, scale=0.25, enable_gqa=True
            )
            for a, b in ((0, 299), (299, 338))
        ]
        output = torch.cat([part.transpose(0, 1) for part in parts])
        (output * output.detach()).sum().backward()
        return [output.detach().double(), *(each.grad.double() for each in inputs if each.grad is not None)]

    exact = by_sample(torch.float64)
    for ours, theirs, true in zip(outcome(dtype), by_sample(dtype), exact, strict=True):
        assert float((ours - true).norm()) <= 4 * float((theirs - true).norm()) + 1e-12


# The loss of the head.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
def test_the_chunked_loss_is_cross_entropy(
    rows: int, dtype: torch.dtype, tolerance: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 4)
    monkeypatch.setattr(head_loss, "SLICE_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(rows, 16, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(50, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    labels = torch.randint(0, 50, (rows,), generator=generator)
    loss = head_loss.head_loss(hidden, weight, offset, labels)
    (loss / 7).backward()
    assert hidden.grad is not None
    found, hidden.grad = hidden.grad, None
    expected = F.cross_entropy(
        F.linear(hidden.double(), weight.double(), None if offset is None else offset.double()), labels, reduction="sum"
    )
    (expected / 7).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    torch.testing.assert_close(found, hidden.grad, rtol=0, atol=tolerance * float(hidden.grad.abs().max()))
    with torch.no_grad():
        assert float(head_loss.head_loss(hidden, weight, offset, labels)) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", LLAMA, torch.float32).requires_grad_(False)
    use_attention(model, PACKED)
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and func is not torch.ops.aten.t.default
                and result.dim()
                and result.shape[-1] == VOCABULARY
            ):
                largest = max(largest, result.numel() // VOCABULARY)
            return result

    batch = pack([sample_of(range(60), range(2, 60))])
    with Watch():
        supervised_loss_sum(model, batch)
    assert largest == 8


def test_a_trained_head_gets_its_gradient() -> None:
    model = adapted(with_exact_norms(make_model("llama", LLAMA)), target_modules=["q_proj", "lm_head"])
    samples = some_samples()
    expected = sum(plain_losses(model, sample).sum() for sample in samples)
    expected.backward()
    wanted = gradients(model)
    use_attention(model.get_base_model(), PACKED)
    supervised_loss_sum(model, pack(samples, share=True)).backward()
    assert float((gradients(model) - wanted).norm()) <= 1e-10 * float(wanted.norm())


def test_shared_prefixes_are_refused_by_a_model_that_takes_padded_samples() -> None:
    model = make_model("llama", LLAMA)
    batch: MicroBatch = pack(some_samples(), share=True)
    call: Callable[[], object] = lambda: supervised_loss_sum(model, batch)  # noqa: E731
    with pytest.raises(RuntimeError, match="padded"):
        call()
