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
from tuneloom.models.precision import matmul_gflops


def main() -> None:
    """Train and write the figures."""
    job = json.loads(Path(sys.argv[1]).read_text())
    rate = matmul_gflops(torch.bfloat16, torch.device("cpu"), size=2048, repeats=9)
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


if __name__ == "__main__":
    main()
