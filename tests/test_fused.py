"""The fused LoRA layer computes what PEFT's does, in PEFT's files, and stands aside where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain_peft, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from tuneloom.adapters.fused import FusedLinear, PlainLinear, _LoraLinear, with_fused_layers
from tuneloom.train.run import finetune, prepare

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference as a share of the largest value: rounding of the format, not less."""


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=bias)
        self.last = nn.Linear(40, 16, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def adapted(fused: bool, dtype: torch.dtype, *, bias: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    net = Net(bias).to(dtype)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["first", "last"], "init_lora_weights": False} | settings)
    torch.manual_seed(1)
    model = get_peft_model(net, with_fused_layers(config) if fused else config)
    return model.double() if dtype is torch.float64 else model


def results(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output, gradient of the input, gradients of the adapter; dropout drawn from one seed."""
    torch.manual_seed(2)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_(True)
    torch.manual_seed(3)
    y = model.train()(x)
    (y.to(torch.float64) * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert x.grad is not None
    assert all(grad is not None for grad in grads.values())
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"use_rslora": True},
        {"lora_dropout": 0.4},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
    ],
    ids=["lora", "bias", "rslora", "dropout", "dora", "rslora+dora"],
)
def test_outputs_and_gradients_are_peft_s(settings: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = (results(adapted(fused, dtype, **settings), dtype) for fused in (True, False))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        difference = float((ours[name] - expected).abs().max())
        assert difference <= TOLERANCE[dtype] * float(expected.abs().max()), name


@pytest.mark.parametrize("dropped", [False, True])
def test_the_gradients_are_the_function_s(dropped: bool) -> None:
    torch.manual_seed(0)
    made = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 6), (2, 3, 6), (2, 6), (5, 2)]]
    x, other, a, b = made
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor, other: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return _LoraLinear.apply(x, other if dropped else None, weight, bias, a, b, 1.7, None, None)

    assert torch.autograd.gradcheck(layer, (x, other if dropped else other.detach(), bias, a, b))


def test_the_gradients_are_the_function_s_with_magnitudes() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 6), (2, 6), (5, 2), (5,), (5,)]
    x, a, b, bias, magnitude = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight, norm = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5

    def layer(x: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor) -> Any:
        return _LoraLinear.apply(x, None, weight, bias, a, b, 1.7, magnitude, norm)

    assert torch.autograd.gradcheck(layer, (x, bias, a, b, magnitude))


@pytest.mark.parametrize("fused_optimizer", [False, True])
def test_dora_s_norms_follow_the_weights(fused_optimizer: bool) -> None:
    """The norms are kept between updates: steps, loading and setting weights must each be seen."""
    ours, theirs = (adapted(fused, torch.float32, use_dora=True) for fused in (True, False))
    torch.manual_seed(4)
    inputs = torch.randn(3, 7, 24)
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1, fused=fused_optimizer)
        for x in inputs:
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-5)
    state = {name: value * 1.5 for name, value in ours.state_dict().items()}
    for model in (ours, theirs):
        model.load_state_dict(state)
    assert torch.allclose(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-5)


def test_dora_trains_after_a_pass_in_inference_mode() -> None:
    model, plain = adapted(True, torch.float32, use_dora=True), adapted(True, torch.float32, use_dora=True)
    with torch.inference_mode():
        model(torch.randn(3, 24))
    expected = results(plain, torch.float32)
    for name, value in results(model, torch.float32).items():
        assert torch.equal(value, expected[name]), name


def test_only_nn_linear_itself_is_fused() -> None:
    """PEFT asks its hook before it asks whether a layer is quantised, and quantised layers are subclasses of nn.Linear."""

    class Quantised(nn.Linear):
        pass

    assert isinstance(nn.Linear(2, 2), PlainLinear)
    assert not isinstance(Quantised(2, 2), PlainLinear)
    net = Net(bias=False)
    net.last = Quantised(40, 16)
    model = get_peft_model(net, with_fused_layers(LoraConfig(r=2, target_modules=["first", "last"]))).base_model.model
    assert type(model.first) is FusedLinear
    assert type(model.last) is PeftLinear


def test_an_adapter_that_is_off_merged_or_not_alone_is_peft_s_business() -> None:
    model = adapted(True, torch.float32)
    plain = adapted(False, torch.float32)
    x = torch.randn(3, 24)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        torch.manual_seed(7)
        each.add_adapter("second", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        each.base_model.set_adapter(["default", "second"])
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    for each in (model, plain):
        each.base_model.set_adapter("default")
        each.merge_adapter()
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x), plain(x), atol=1e-2)


@pytest.mark.parametrize("fused_first", [True, False])
def test_files_of_one_load_in_the_other(fused_first: bool, tmp_path: Path) -> None:
    written = adapted(fused_first, torch.float32)
    written.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    read = PeftModel.from_pretrained(Net(False), tmp_path, config=config if fused_first else with_fused_layers(config))
    x = torch.randn(3, 24)
    assert torch.allclose(read(x), written(x), atol=1e-6)
    assert type(read.base_model.model.first) is (PeftLinear if fused_first else FusedLinear)


def test_a_run_trains_on_fused_layers_and_its_files_are_plain(untied_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = tiny_config(untied_model, rows_file, tmp_path)
    job = prepare(config)
    layers = [module for module in job.model.modules() if isinstance(module, PeftLinear)]
    assert layers
    assert {type(layer) for layer in layers} == {FusedLinear}
    run = finetune(config)
    assert "custom" not in (run.adapter / "adapter_config.json").read_text()
    assert {type(m) for m in plain_peft(untied_model, run.adapter).modules() if isinstance(m, PeftLinear)} == {PeftLinear}
