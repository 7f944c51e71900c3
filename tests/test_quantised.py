"""A base quantised by bitsandbytes trains under PEFT's own LoRA layers, and its adapter is a file like any other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from helpers import TARGETS, logits_of, method, plain_base, plain_peft, sha256, tiny_config
from peft.tuners.lora import bnb as peft_bnb
from safetensors.torch import load_file
from torch.nn import functional as F

from tuneloom.adapters.attach import count_parameters
from tuneloom.adapters.fused import FusedLinear
from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.config import load_config
from tuneloom.data.plan import plan_step
from tuneloom.exporting.merged import export_merged
from tuneloom.models.forward import PACKED, layout_of, supervised_logits, supervised_loss_sum, use_attention
from tuneloom.models.load import load_base_model
from tuneloom.models.source import resolve_model
from tuneloom.train.prepare import Job
from tuneloom.train.proof import takes_packed
from tuneloom.train.resume import find_resume
from tuneloom.train.run import Run, finetune
from tuneloom.types import Layout

KINDS = ("4bit lora", "4bit dora", "8bit lora", "8bit dora")
LAYERS: dict[str, tuple[type, type]] = {
    "4bit": (bitsandbytes.nn.Linear4bit, peft_bnb.Linear4bit),
    "8bit": (bitsandbytes.nn.Linear8bitLt, peft_bnb.Linear8bitLt),
}
"""What the library makes of a linear layer, and what PEFT puts over it."""
FAR = {"4bit": 0.35, "8bit": 0.04}
"""Largest change of the logits by quantising the tiny random model, as a share of their norm."""
IDS = [5, 310, 42, 9, 700, 3, 1201, 88]


def quantised_config(kind: str, model: Path, rows: Path, output: Path) -> Any:
    bits, _, how = kind.partition(" ")
    changes = {
        "base_model.quantization": bits,
        "adapter.lora_dropout": 0.1 if how == "lora" else 0.0,
        "training.max_steps": 12,
        "training.save_steps": 6,
        "training.gradient_accumulation_steps": 5,
        **method(how),
    }
    return tiny_config(model, rows, output, changes)


class Trained:
    """A finished run, and the model as it was when the run ended."""

    def __init__(self, run: Run, job: Job) -> None:
        self.run = run
        self.job = job


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(kind: str, tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    kept: list[Job] = []
    config = quantised_config(kind, tiny_model, rows_file, tmp_path_factory.mktemp("quantised"))
    run = finetune(config, on_job=lambda _, fields: kept.append(fields["job"]))
    return Trained(run, kept[0])


def test_layers_are_the_library_s_under_peft_s_own(kind: str, trained: Trained) -> None:
    base_layer, lora_layer = LAYERS[kind[:4]]
    layers = [module for module in trained.job.model.modules() if isinstance(module, lora_layer)]
    assert len(layers) == len(TARGETS) * 2, "seven kinds in two decoder layers"
    assert {type(layer.base_layer) for layer in layers} == {base_layer}
    assert not [module for module in trained.job.model.modules() if isinstance(module, FusedLinear)]
    stored = Counter(str(layer.base_layer.weight.dtype) for layer in layers)
    assert stored == {"torch.uint8" if kind.startswith("4bit") else "torch.int8": len(layers)}
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.base_layer.parameters())
    if kind.startswith("4bit"):
        assert {layer.base_layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}


def test_the_loss_goes_down(trained: Trained) -> None:
    losses = [event["loss"] for event in trained.run.directory.events("step")]
    assert losses[-1] < losses[0] - 0.5


def test_parameters_are_counted_unpacked(trained: Trained, tiny_model: Path) -> None:
    trainable, whole = count_parameters(trained.job.model)
    assert whole - trainable == sum(parameter.numel() for parameter in plain_base(tiny_model).parameters())


def test_the_adapter_s_file_holds_what_any_adapter_s_does(kind: str, trained: Trained) -> None:
    tensors = load_file(trained.run.adapter / "adapter_model.safetensors")
    parts = {"lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if kind.endswith("dora") else [])}
    blocks = {name: "self_attn" if len(name) == len("q_proj") else "mlp" for name in TARGETS}
    modules = [f"model.layers.{i}.{block}.{name}" for i in range(2) for name, block in blocks.items()]
    assert tensors.keys() == {f"base_model.model.{module}.{part}" for module in modules for part in parts}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert all(bool(tensor.any()) for tensor in tensors.values()), "B starts at zero and is trained"
    config = json.loads((trained.run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert not {key for key in config if "quant" in key}


def test_it_reloads_on_the_quantised_base_bit_for_bit_and_on_the_unquantised_one_nearly(
    kind: str, trained: Trained, tiny_model: Path
) -> None:
    use_attention(trained.job.model.get_base_model(), "sdpa")
    expected = logits_of(trained.job.model.eval(), IDS)
    again = load_target(resolve_target(str(trained.run.directory.path)), precision="fp32")
    assert {type(layer) for layer in again.model.modules() if hasattr(layer, "lora_A")} == {LAYERS[kind[:4]][1]}
    assert torch.equal(logits_of(again.model, IDS), expected)

    unquantised = logits_of(plain_peft(tiny_model, trained.run.adapter), IDS)
    untrained = logits_of(plain_base(tiny_model), IDS)
    change = float((unquantised - expected).norm() / expected.norm())
    assert 0 < change < FAR[kind[:4]]
    assert change < 0.5 * float((untrained - expected).norm() / expected.norm()), "the adapter does on it what it was taught"


@pytest.mark.parametrize("kind", ["4bit lora", "8bit dora"], indirect=True)
def test_the_merged_export_has_the_unquantised_weights_and_says_so(
    trained: Trained, tiny_model: Path, tmp_path: Path, checked_here: None
) -> None:
    said: list[str] = []
    made = export_merged(resolve_target(str(trained.run.directory.path)), tmp_path / "merged", say=said.append)
    assert "the base was quantised in training; merging into its unquantised weights" in said
    assert made.check.passed
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    expected = logits_of(plain_peft(tiny_model, trained.run.adapter), IDS)
    assert torch.allclose(logits_of(plain_base(made.folder), IDS), expected, atol=1e-4)


def test_packed_samples_have_the_padded_ones_losses(trained: Trained) -> None:
    job = trained.job
    base = job.model.get_base_model()
    samples = [job.data.train[i] for i in job.schedule.indices(0)]
    job.model.eval()
    sums, each = {}, {}
    for path in ("sdpa", PACKED):
        use_attention(base, path)
        layout = layout_of(job.model, training=False)
        assert (layout == Layout.SHARED) == (path == PACKED)
        batches = plan_step(samples, 2048, layout).micro_batches
        with torch.inference_mode():
            sums[path] = sum(float(supervised_loss_sum(job.model, batch)) for batch in batches)
            found = [supervised_logits(job.model, batch) for batch in batches]
        losses = [(labels, F.cross_entropy(logits.float(), labels, reduction="none")) for logits, labels in found]
        each[path] = sorted(pair for labels, some in losses for pair in zip(labels.tolist(), some.tolist(), strict=True))
    assert sums[PACKED] == pytest.approx(sums["sdpa"], rel=1e-3)
    assert [label for label, _ in each[PACKED]] == [label for label, _ in each["sdpa"]]
    assert [loss for _, loss in each[PACKED]] == pytest.approx([loss for _, loss in each["sdpa"]], rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("bits", LAYERS)
def test_a_pass_without_gradients_stops_none_after_it(bits: str, tiny_model: Path) -> None:
    model = load_base_model(tiny_model, torch.float32, torch.device("cpu"), bits)
    embedded = model.get_input_embeddings()(torch.tensor([IDS])).detach()

    def gradient() -> torch.Tensor:
        given = embedded.clone().requires_grad_(True)
        model.train()(inputs_embeds=given).logits.square().sum().backward()
        assert given.grad is not None
        return given.grad

    before = gradient()
    model.eval()
    logits_of(model, IDS)
    assert before.abs().sum() > 1
    assert torch.equal(gradient(), before)


def test_resumed_halfway_it_ends_as_it_did(trained: Trained, tmp_path: Path) -> None:
    before = sha256(trained.run.adapter / "adapter_model.safetensors")
    directory = trained.run.directory
    last = directory.checkpoint(12)
    last.rename(tmp_path / "checkpoint-12")
    done = finetune(load_config(directory.config), resume=find_resume(str(directory.checkpoint(6)), tmp_path))
    assert sha256(done.adapter / "adapter_model.safetensors") == before
    (resumed,) = directory.events("resume")
    assert resumed["step"] == 6


@pytest.mark.parametrize("bits", LAYERS)
def test_a_chatglm_in_its_original_layout_is_quantised_while_it_loads(bits: str, chatglm: Path) -> None:
    cpu = torch.device("cpu")
    whole = load_base_model(chatglm, torch.float32, cpu)
    model = load_base_model(chatglm, torch.float32, cpu, bits)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not model.lm_head]
    assert {type(module) for module in linear} == {LAYERS[bits][0]}
    expected = logits_of(whole, IDS)
    assert 0 < float((logits_of(model, IDS) - expected).norm() / expected.norm()) < FAR[bits]


@pytest.mark.real
@pytest.mark.parametrize("bits", LAYERS)
def test_the_real_model_takes_packed_samples_on_a_quantised_base(bits: str) -> None:
    model = load_base_model(resolve_model("smollm2-135m-instruct").folder, torch.float32, torch.device("cpu"), bits)
    assert takes_packed(model)
