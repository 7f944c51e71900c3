"""What both peers' sides share: when each optimizer step ended, what loss it reported, and what it trained on.

Runs in a peer's own virtual environment, so it knows nothing of Tuneloom.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes the end of every optimizer step and its loss; refuses to train on other tokens than the work's.

    Args:
        samples: the work's samples in the order of the steps: input_ids and labels.
    """

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples
        self.step_ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, model: Any, train_dataloader: Any, **__: Any) -> None:
        dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
        if dtypes != {"torch.float32"}:
            raise SystemExit(f"the peer's adapter is {dtypes}, not fp32")
        dataset = train_dataloader.dataset
        if len(dataset) != len(self.samples):
            raise SystemExit(f"the peer has {len(dataset)} samples, the work {len(self.samples)}")
        for i, (own, sample) in enumerate(zip(dataset, self.samples, strict=True)):
            for key in ("input_ids", "labels"):
                if list(own[key]) != sample[key]:
                    raise SystemExit(f"sample {i}: the peer's {key} are others\n{list(own[key])}\n{sample[key]}")
        order = list(itertools.chain.from_iterable(train_dataloader.batch_sampler))
        if order != list(range(len(self.samples))):
            raise SystemExit(f"the peer takes the samples in another order: {order}")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def write(self, file: str) -> None:
        """Write what was noted."""
        Path(file).write_text(json.dumps({"step_ends": self.step_ends, "losses": self.losses}))


def read_job(file: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the job and its samples."""
    job: dict[str, Any] = json.loads(Path(file).read_text())
    samples: list[dict[str, Any]] = json.loads(Path(job["samples"]).read_text())
    return job, samples


def common_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that make a step what it is, by transformers' names."""
    return {
        "output_dir": job["output_dir"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": job["samples_per_step"] // job["batch_size"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
