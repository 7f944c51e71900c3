"""LLaMA-Factory's side: its own training, from its own sharegpt data, with a clock.

    python llamafactory_side.py JOB.json

Its template `smollm2` supervises the line break after each answer as well, and its default system message ends in a
full stop, which the model's own has not. Here that line break begins the next question instead, and the system message
is the model's, so that it learns the very tokens that the others learn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from clock import Clock, common_arguments, read_job
from llamafactory.data.formatter import StringFormatter
from llamafactory.data.template import TEMPLATES, register_template
from llamafactory.train.tuner import run_exp

TEMPLATE = "smollm2_same_labels"


def main() -> None:
    """Train and write the figures."""
    job, samples = read_job(sys.argv[1])
    register_template(
        name=TEMPLATE,
        format_user=StringFormatter(slots=["\n<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>"]),
        stop_words=TEMPLATES["smollm2"].stop_words,
        default_system=TEMPLATES["smollm2"].default_system.removesuffix("."),
    )
    clock = Clock(samples)
    run_exp(arguments(job, write_data(job, samples)), callbacks=[clock])
    clock.write(job["result"])


def write_data(job: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """Write the conversations as a data set of LLaMA-Factory's; return its folder."""
    folder = Path(job["output_dir"]) / "data"
    folder.mkdir(parents=True)
    rows = []
    for sample in samples:
        messages = sample["messages"]
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        rows.append({"system": system, "messages": [m for m in messages if m["role"] != "system"]})
    (folder / "work.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {
        "file_name": "work.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "system": "system"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"work": info}))
    return str(folder)


def arguments(job: dict[str, Any], data: str) -> dict[str, Any]:
    """Return the training's arguments; a setting of the job's wins."""
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "adapter_name_or_path": job["start"],
        "finetuning_type": "lora",
        "lora_rank": job["r"],
        "lora_alpha": job["lora_alpha"],
        "lora_target": "all",
        "use_dora": job["dora"],
        "template": TEMPLATE,
        "dataset_dir": data,
        "dataset": "work",
        "cutoff_len": job["longest"] + 64,
        "disable_shuffling": True,
        "overwrite_cache": True,
        **common_arguments(job),
        **job["settings"],
    }


if __name__ == "__main__":
    main()
