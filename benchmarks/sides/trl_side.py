"""TRL's side: its SFTTrainer with PEFT's layers on the work's tokens and labels, with a clock.

python trl_side.py JOB.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from clock import Clock, common_arguments, read_job
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train and write the figures."""
    job, samples = read_job(sys.argv[1])
    clock = Clock(samples)
    settings = {**common_arguments(job), "max_length": None, "train_sampling_strategy": "sequential", **job["settings"]}
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list([{key: sample[key] for key in ("input_ids", "labels")} for sample in samples]),
        peft_config=LoraConfig(
            r=job["r"],
            lora_alpha=job["lora_alpha"],
            target_modules="all-linear",
            use_dora=job["dora"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    set_peft_model_state_dict(trainer.model, load_file(Path(job["start"]) / "adapter_model.safetensors"))
    trainer.train()
    clock.write(job["result"])


if __name__ == "__main__":
    main()
