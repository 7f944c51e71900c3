"""A model with fused norms and feed-forward layers computes what it did, and its gradients are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tuneloom.models import fused_layers
from tuneloom.models.fused_layers import FusedFeedForward, FusedJoinedFeedForward, FusedRMSNorm, fuse_layers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FUSED = {"llama": 7, "qwen2": 7, "qwen3": 11, "mistral": 7, "glm": 7, "phi3": 7, "granite": 7}
"""How many modules of two layers are: two norms and a feed-forward layer each, and the last norm; Qwen3 norms heads too."""
OTHERS = {"gemma": 0, "gpt2": 0, "gemma3_text": 0}
"""Families whose norms scale by one more than their weights, with other activations, or with none of these modules."""


def made(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False)


def outcome(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return logits, and the gradients of the embedded input and of a layer in the middle."""
    weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    ids = torch.arange(40).view(2, 20) % 64
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits
    (logits.double() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    assert embedded.grad is not None
    return [logits.detach(), embedded.grad, weight.grad]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FUSED)
def test_outputs_and_gradients_stay(family: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "_ROWS", 16)
    plain, model = made(family, dtype), made(family, dtype)
    names = set(plain.state_dict())
    assert len(fuse_layers(model)) == FUSED[family]
    assert set(model.state_dict()) == names
    for ours, theirs in zip(outcome(model, dtype), outcome(plain, dtype), strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("family", OTHERS)
def test_modules_that_compute_otherwise_are_left(family: str) -> None:
    model = made(family)
    assert len(fuse_layers(model)) == OTHERS[family]


def test_another_activation_is_left() -> None:
    config = transformers.AutoConfig.for_model("llama", **SIZES, hidden_act="gelu")
    model = transformers.AutoModelForCausalLM.from_config(config)
    fuse_layers(model)
    assert not any(isinstance(module, FusedFeedForward) for module in model.modules())


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    norm = FusedRMSNorm(nn.Parameter(torch.rand(8, dtype=torch.float64)), 1e-5)
    expected = torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), expected)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    assert float(norm.weight.grad.abs().sum()) > 0


def test_gradients_are_the_functions() -> None:
    torch.manual_seed(0)
    x, gate, up = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    norm = FusedRMSNorm(nn.Parameter(torch.rand(6, dtype=torch.float64), requires_grad=False), 1e-5)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(fused_layers._Gated.apply, (gate, up))
    assert torch.autograd.gradcheck(fused_layers._GatedHalves.apply, (gate,))


@pytest.mark.parametrize(("family", "kind"), [("llama", FusedFeedForward), ("glm", FusedJoinedFeedForward)])
def test_a_fused_model_keeps_less_for_the_backward_pass(family: str, kind: type) -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model(torch.arange(60).view(1, 60) % 64).logits
        assert logits.requires_grad
        return sum(sizes.values())

    plain, model = made(family, torch.bfloat16), made(family, torch.bfloat16)
    fuse_layers(model)
    assert any(type(module) is kind for module in model.modules())
    assert kept(model) < 0.8 * kept(plain)
