"""RMSNorm and the gated product of a feed-forward layer as one autograd function each, in place of a family's own modules.

A family writes them as five to seven operations; for the backward pass autograd then keeps each one's result: of a norm two
fp32 copies of its input, of a feed-forward layer the activated gate. Here a norm keeps its input and one number a row, the
gated product its two factors.

A module is replaced only where it computes the same: by name it is one of those below, and on random input it gives what ours
gives. Parameters and their names stay.

Shapes: N rows, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_ROWS = 256
"""Rows of a norm that are in fp32 at a time, so that they stay in a core's cache."""


def fuse_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace the norms (on a CPU) and the gated feed-forward layers of a model; return those that were, by parent and name.

    Elsewhere than on a CPU a norm's rows do not fit into a cache, and only its memory would be gained.
    """
    found_same: dict[type, bool] = {}
    replaced = []
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            fused = _fused_norm(module, found_same) or _fused_feed_forward(module, found_same)
            if fused is not None:
                setattr(parent, name, fused.train(module.training))
                replaced.append((parent, name, module))
    return replaced


class FusedRMSNorm(nn.Module):
    """y = w * (x / sqrt(mean(x^2) + eps)), the quotient rounded to the format of x before the product, as Llama's is.

    Args:
        weight: (D,).
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed rows, shape and format of x."""
        if self.weight.requires_grad or self.weight.dtype != x.dtype:
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * scaled.to(x.dtype)
        y: torch.Tensor = _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


class _Norm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and g = dy w: dx = r (g - x r mean(g x r))."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        x_ND = x.reshape(-1, x.shape[-1])
        y_ND = torch.empty_like(x_ND)
        rate_N1 = x_ND.new_empty((len(x_ND), 1), dtype=exact)
        for rows_ND, out_ND, rate in zip(*map(_slices, (x_ND, y_ND, rate_N1)), strict=True):
            exact_ND = rows_ND.to(exact)
            rate.copy_(torch.rsqrt(exact_ND.square().mean(1, keepdim=True) + eps))
            torch.mul(weight_D, (exact_ND * rate).to(x.dtype), out=out_ND)
        ctx.save_for_backward(x_ND, rate_N1, weight_D)
        return y_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_ND, rate_N1, weight_D = ctx.saved_tensors
        dy_ND = grads[0].reshape(x_ND.shape)
        dx_ND = torch.empty_like(x_ND)
        for rows_ND, grad_ND, rate, out_ND in zip(*map(_slices, (x_ND, dy_ND, rate_N1, dx_ND)), strict=True):
            scaled_ND = rows_ND * rate
            g_ND = (grad_ND * weight_D).to(scaled_ND.dtype)
            mean_N1 = torch.linalg.vecdot(g_ND, scaled_ND).unsqueeze(1) / x_ND.shape[1]
            out_ND.copy_(g_ND.addcmul_(scaled_ND, mean_N1, value=-1).mul_(rate))
        return dx_ND.view(grads[0].shape), None, None


def _slices(rows_ND: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(rows_ND, _ROWS)


class FusedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), of the three layers of a family's module, which keep their names."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, shape of x."""
        y: torch.Tensor = self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]
        return y


class FusedJoinedFeedForward(FusedFeedForward):
    """The same of a module whose gate and up are one layer, the gate's rows first."""

    gate_up_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, shape of x."""
        y: torch.Tensor = self.down_proj(_GatedHalves.apply(self.gate_up_proj(x)))  # type: ignore[no-untyped-call]
        return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        return d_gate_up


# Which modules compute the same.


def _fused_norm(module: nn.Module, found_same: dict[type, bool]) -> FusedRMSNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.device.type != "cpu":
        return None
    fused = FusedRMSNorm(weight, float(eps))
    return fused if _same(module, fused, len(weight), found_same) else None


def _fused_feed_forward(module: nn.Module, found_same: dict[type, bool]) -> FusedFeedForward | None:
    children = dict(module.named_children())
    layers = {name: child for name, child in children.items() if type(child) is nn.Linear}
    activations = [child for name, child in children.items() if name not in layers]
    if len(activations) > 1 or any(type(child).__name__ not in ("SiLU", "SiLUActivation") for child in activations):
        return None
    kinds = {("down_proj", "gate_proj", "up_proj"): FusedFeedForward, ("down_proj", "gate_up_proj"): FusedJoinedFeedForward}
    kind = kinds.get(tuple(sorted(layers)))
    if kind is None:
        return None
    fused = kind(module)
    first = layers["gate_proj" if "gate_proj" in layers else "gate_up_proj"]
    return fused if _same(module, fused, first.in_features, found_same) else None


def _same(module: nn.Module, fused: nn.Module, size: int, found_same: dict[type, bool]) -> bool:
    """Whether both compute the same on random rows, to the rounding of their format; tried once for a class of a model."""
    kind = type(module)
    if kind not in found_same:
        weight = next(module.parameters())
        generator = torch.Generator().manual_seed(0)
        x = (3 * torch.randn(1, 5, size, generator=generator)).to(weight.device, weight.dtype)
        with torch.no_grad():
            expected, found = module(x), fused(x)
        rounding = 2 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)  # families norm in fp32
        largest = float(expected.abs().max())
        found_same[kind] = largest > 0 and float((expected - found).abs().max()) <= rounding * largest
    return found_same[kind]
