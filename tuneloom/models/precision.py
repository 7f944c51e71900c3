"""Which number format the weights are held in, chosen by what the device can do and by measurement."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Name = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Precision:
    """A choice and its reason.

    Attributes:
        name: of the frozen weights and their products; adapters are always fp32 masters.
        why: one clause, shown and kept in plan.json.
        gflops: measured GFLOP/s of matrix products in each format tried (empty where none was measured).
    """

    name: Name
    why: str
    gflops: dict[str, float]

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.name]


def exactly(name: str) -> Precision:
    """Return the precision of that name, whatever the device would rather have."""
    return Precision(_name(name), "as asked", {})


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Choose the precision: what is wanted where the device can, else the nearest.

    `auto` measures fp32 against bf16 products on a CPU (a tenth of a second) and takes bf16 where
    it is faster by more than a tenth; on a GPU it takes bf16, or fp16 where bf16 is missing.
    """
    import torch

    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "auto":
            return Precision("bf16", "the GPU has bf16", {}) if has_bf16 else Precision("fp16", "the GPU has no bf16", {})
        if wanted == "bf16" and not has_bf16:
            return Precision("fp16", "asked for bf16, which this GPU lacks", {})
        return Precision(_name(wanted), "as asked", {})
    gflops = {name: matmul_gflops(dtype, device) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    faster = gflops["bf16"] > 1.1 * gflops["fp32"]
    rates = f"{gflops['bf16']:.0f} against {gflops['fp32']:.0f} GFLOP/s measured"
    if wanted == "auto":
        name: Name = "bf16" if faster else "fp32"
        return Precision(name, f"bf16 is {'faster' if faster else 'no faster'} here: {rates}", gflops)
    if wanted == "fp16":
        name = "bf16" if faster else "fp32"
        return Precision(name, f"asked for fp16, which trains on GPUs only; {rates}", gflops)
    return Precision(_name(wanted), "as asked", gflops)


@cache
def matmul_gflops(dtype: torch.dtype, device: torch.device, size: int = 768, repeats: int = 12) -> float:
    """Measure GFLOP/s of a square matrix product: the median of single runs after three to warm up. Once a process."""
    import torch

    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / sorted(seconds[3:])[repeats // 2] / 1e9)


def _name(wanted: str) -> Name:
    names: dict[str, Name] = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
    return names[wanted]
