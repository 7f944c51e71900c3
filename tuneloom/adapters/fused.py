"""LoRA on a linear layer as one autograd function, in PEFT's own layer.

With x the input, W the frozen weight, A and B the adapter, s its scaling:

    y  = x W^T + b + s (x A^T) B^T
    P  = s dy B,   dA = P^T x,   dB = s dy^T (x A^T),   dx = dy W + P A

PEFT casts x to the adapter's fp32, keeps the copy for the backward pass, and goes over y three times more (scale, add, cast
back). Here x and x A^T are kept as they are, and the thin products are added to y and dx as they are made. Masters of A and B
stay fp32; products are in the format of x, with fp32 sums inside of each.

PEFT makes these layers through its hook for custom modules, for weights that are not quantised. Where the function does not fit
(DoRA and other variants, several adapters at once, autocast) the layer is PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft import LoraConfig


class _Exactly(type):
    """Makes `isinstance(x, PlainLinear)` true for nn.Linear itself and for no subclass of it, such as a quantised one."""

    def __instancecheck__(cls, instance: object) -> bool:
        return type(instance) is nn.Linear


class PlainLinear(metaclass=_Exactly):
    """What the fused layer is for; PEFT asks for it before it asks for quantised layers."""


def with_fused_layers(config: LoraConfig) -> LoraConfig:
    """Have PEFT make fused layers for this config; what is saved of it is the same as ever."""
    config._register_custom_module({PlainLinear: FusedLinear})
    return config


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA layer with a fused forward and backward pass. Files, merging and everything else are PEFT's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, (..., out), in the format of x."""
        name = self._one_active()
        base = self.base_layer
        if (
            name is None
            or args
            or kwargs
            or type(base) is not nn.Linear
            or base.weight.requires_grad
            or base.weight.dtype != x.dtype
            or torch.is_autocast_enabled(x.device.type)
        ):
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        a_RI, b_OR = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
        dropped = self.lora_dropout[name](x)
        y: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, None if dropped is x else dropped, base.weight, base.bias, a_RI, b_OR, self.scaling[name]
        )
        return y

    def _one_active(self) -> str | None:
        """Return the one adapter that is plain LoRA and on; None where it is not so."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        biased = self.lora_A[active[0]].bias is not None or self.lora_B[active[0]].bias is not None
        return None if biased else active[0]


class _LoraLinear(torch.autograd.Function):
    """Shapes: x (..., I), weight (O, I), A (R, I), B (O, R); `dropped` is x after the adapter's dropout, None for x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        taken_NI = x_NI if dropped is None else dropped.reshape(x_NI.shape)
        down_NR = taken_NI @ a_RI.T
        y_NO = F.linear(x_NI, weight, bias)
        y_NO.addmm_(down_NR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(taken_NI, down_NR, weight, a_RI, b_OR)
        ctx.scaling, ctx.dropped, ctx.biased = scaling, dropped is not None, bias is not None
        return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        taken_NI, down_NR, weight, a_RI, b_OR = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        need_x, need_dropped, _, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        up_NR = (dy_NO @ b_OR).mul_(ctx.scaling)
        da = up_NR.T @ taken_NI if need_a else None
        db = (dy_NO.T @ down_NR).mul_(ctx.scaling) if need_b else None
        dx = d_dropped = None
        if need_x:
            dx_NI = dy_NO @ weight
            if not ctx.dropped:
                dx_NI.addmm_(up_NR, a_RI)
            dx = dx_NI.reshape(*dy.shape[:-1], dx_NI.shape[-1])
        if ctx.dropped and need_dropped:
            d_dropped = (up_NR @ a_RI).reshape(*dy.shape[:-1], a_RI.shape[-1])
        d_bias = dy_NO.sum(0) if ctx.biased and need_bias else None
        return dx, d_dropped, None, d_bias, da, db, None
