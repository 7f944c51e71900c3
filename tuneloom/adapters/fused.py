"""LoRA and DoRA on a linear layer as one autograd function, in PEFT's own layer.

With x the input, W the frozen weight, A and B the adapter, s its scaling, m DoRA's magnitudes, n the norms of the rows of
W + s B A, which are held constant in the backward pass (arXiv:2402.09353, 4.3), and c = m / n (c = 1 in LoRA):

    z  = x W^T + s (x A^T) B^T,   y = c z + b
    dz = c dy,   P = s dz B,   dA = P^T x,   dB = s dz^T (x A^T),   dx = dz W + P A,   dm = sum dy z / n

PEFT casts x to the adapter's fp32, keeps the copy for the backward pass, and goes over y three times more (scale, add, cast
back); for DoRA it multiplies an identity matrix through B A and takes the norm of the whole sum at every pass. Here x and
x A^T are kept as they are, the thin products are added to z and dx as they are made, and the norms come from

    n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

once an update. Masters of A, B and m stay fp32; products are in the format of x, with fp32 sums inside of each. c scales as
z + (c - 1) z, so that what 16 bits round of c is a part of its distance from one.

PEFT makes these layers through its hook for custom modules, for weights that are not quantised. Where the function does not fit
(other variants, DoRA with dropout, several adapters at once, autocast) the layer is PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._norms = _RowNorms()

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
        a_RI, b_OR, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        magnitude_O = norm_O = None
        if name in self.lora_variant:
            magnitude_O = self.lora_magnitude_vector[name].weight
            norm_O = self._norms.of(base.weight, a_RI, b_OR, scaling)
        dropped = self.lora_dropout[name](x)
        y: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x,
            None if dropped is x else dropped,
            base.weight,
            base.bias,
            a_RI.to(x.dtype),
            b_OR.to(x.dtype),
            scaling,
            magnitude_O,
            norm_O,
        )
        return y

    def _one_active(self) -> str | None:
        """Return the one adapter that is on, plain LoRA or DoRA; None where it is not so."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.lora_A[active[0]].bias is not None or self.lora_B[active[0]].bias is not None:
            return None
        variant = self.lora_variant.get(active[0])
        drops = self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity)
        fits = variant is None or (_name(variant) == "DoraLinearVariant" and not drops)
        return active[0] if fits else None


def _name(variant: object) -> str:
    """Return the name of a variant, which PEFT keeps as its class or an instance of it."""
    return variant.__name__ if isinstance(variant, type) else type(variant).__name__


_num_updates = 0


def _count_update(*_: object) -> None:
    global _num_updates
    _num_updates += 1


# A fused optimizer writes to its parameters without counting up their version.
register_optimizer_step_post_hook(_count_update)


class _RowNorms:
    """The norms of the rows of W + s B A, fp32, computed anew when one of the three may have changed.

    That is after any optimizer's step, and after any write that autograd counts; not after one through `.data`.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._norm_O: torch.Tensor | None = None
        self._weight_key: tuple[object, ...] = ()
        self._weight_square_O: torch.Tensor | None = None

    def of(self, weight: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return them, (O,)."""
        key = (_num_updates, *_state(weight), *_state(a_RI), *_state(b_OR), scaling)
        if self._norm_O is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():  # a pass without gradients may be first, one with them next
                self._norm_O, self._key = self._compute(weight, a_RI, b_OR, scaling), key
        return self._norm_O

    def _compute(self, weight: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        if self._weight_square_O is None or _state(weight) != self._weight_key:
            self._weight_square_O = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square_()
            self._weight_key = _state(weight)
        a, b = a_RI.to(exact), b_OR.to(exact)
        cross_O = ((weight @ a_RI.T.to(weight.dtype)).to(exact) * b).sum(1)
        own_O = ((b @ (a @ a.T)) * b).sum(1)
        square_O = self._weight_square_O + 2 * scaling * cross_O + scaling**2 * own_O
        return square_O.clamp_(min=torch.finfo(exact).tiny).sqrt_()


def _state(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what tells whether a tensor has changed: its place, and how often it was written to."""
    return tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


class _LoraLinear(torch.autograd.Function):
    """Shapes: x (..., I), weight (O, I), A (R, I), B (O, R), magnitude and norm (O,), None in LoRA.

    `dropped` is x after the adapter's dropout, None for x itself; there is none with a magnitude.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 what autograd is given
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
        magnitude_O: torch.Tensor | None,
        norm_O: torch.Tensor | None,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        taken_NI = x_NI if dropped is None else dropped.reshape(x_NI.shape)
        down_NR = taken_NI @ a_RI.T
        z_NO = F.linear(x_NI, weight, bias if magnitude_O is None else None)
        z_NO.addmm_(down_NR, b_OR.T, alpha=scaling)
        y_NO, extra_O = z_NO, None
        if magnitude_O is not None and norm_O is not None:
            extra_O = (magnitude_O / norm_O - 1).to(x.dtype)
            y_NO = torch.addcmul(z_NO, z_NO, extra_O)
            if bias is not None:
                y_NO += bias
        ctx.save_for_backward(taken_NI, down_NR, weight, a_RI, b_OR, extra_O, norm_O, z_NO if extra_O is not None else None)
        ctx.scaling, ctx.dropped, ctx.biased = scaling, dropped is not None, bias is not None
        return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        taken_NI, down_NR, weight, a_RI, b_OR, extra_O, norm_O, z_NO = ctx.saved_tensors
        shape = grads[0].shape[:-1]
        dy_NO = grads[0].reshape(-1, grads[0].shape[-1])
        need_x, need_dropped, _, need_bias, need_a, need_b, _, need_magnitude, _ = ctx.needs_input_grad
        d_bias = dy_NO.sum(0) if ctx.biased and need_bias else None
        dz_NO, d_magnitude = dy_NO, None
        if extra_O is not None:
            dz_NO = torch.addcmul(dy_NO, dy_NO, extra_O)
            if need_magnitude:
                d_magnitude = _products_summed(dy_NO, z_NO, norm_O.dtype) / norm_O
        up_NR = (dz_NO @ b_OR).mul_(ctx.scaling)
        da = up_NR.T @ taken_NI if need_a else None
        db = (dz_NO.T @ down_NR).mul_(ctx.scaling) if need_b else None
        dx = d_dropped = None
        if need_x:
            dx_NI = dz_NO @ weight
            if not ctx.dropped:
                dx_NI.addmm_(up_NR, a_RI)
            dx = dx_NI.reshape(*shape, dx_NI.shape[-1])
        if ctx.dropped and need_dropped:
            d_dropped = (up_NR @ a_RI).reshape(*shape, a_RI.shape[-1])
        return dx, d_dropped, None, d_bias, da, db, None, d_magnitude, None


def _products_summed(left_NO: torch.Tensor, right_NO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum over rows of left x right, (O,), summed in `dtype`."""
    return (left_NO * right_NO).sum(0, dtype=dtype)
