"""Our side: `tuneloom.finetune` with a user's defaults, and a clock on its events.

python tuneloom_side.py JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tuneloom


def main() -> None:
    """Train and write the figures."""
    job = json.loads(Path(sys.argv[1]).read_text())
    rate = gemm_gflops()
    step_ends: list[float] = []
    losses: list[float] = []
    supervised: list[int] = []

    def on_event(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            step_ends.append(time.perf_counter())
            losses.append(fields["loss"])
            supervised.append(fields["supervised_tokens"])

    run = tuneloom.finetune(config(job), on_event=on_event)
    if supervised != job["supervised_tokens"]:
        raise SystemExit(f"trained on {supervised} supervised tokens up to each step; the work has {job['supervised_tokens']}")
    plan = json.loads((run.directory / "plan.json").read_text())
    result = {"step_ends": step_ends, "losses": losses, "gemm_bf16_gflops": rate, "plan": plan}
    Path(job["result"]).write_text(json.dumps(result))


def config(job: dict[str, Any]) -> dict[str, Any]:
    """Return the run's config: what makes a step what it is, and no setting of speed."""
    return {
        "base_model": {"path": job["model"]},
        "output_dir": job["output_dir"],
        "name": "bench",
        "data": {"train": [job["rows"]], "cutoff_len": job["cutoff"]},
        "adapter": {"r": job["r"], "lora_alpha": job["lora_alpha"], "use_dora": job["dora"], "continue_from": job["start"]},
        "training": {
            "max_steps": job["steps"],
            "per_device_train_batch_size": job["batch_size"],
            "gradient_accumulation_steps": job["samples_per_step"] // job["batch_size"],
            "learning_rate": job["learning_rate"],
            "lr_scheduler_type": "constant",
            "seed": job["seed"],
            **job.get("settings", {}),
        },
        "evaluation": {"prompts": []},
    }


def gemm_gflops(size: int = 2048, repeats: int = 9) -> float:
    """Return GFLOP/s of a square bf16 matrix product on this machine now: the median of single ones after three to warm up."""
    a = torch.randn(size, size).to(torch.bfloat16)
    seconds = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / sorted(seconds[3:])[repeats // 2] / 1e9)


if __name__ == "__main__":
    main()
