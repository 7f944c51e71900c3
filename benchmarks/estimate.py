"""What a training was expected to take against what it took, each in a process of its own.

    python benchmarks/estimate.py [--case persona dora dialogue glm-small glm-middle] [--steps N] [--json FILE]

Cases: `persona` and `dora` are the recipes persona-lora and persona-dora; `dialogue` the same base on the built-in counselling
sets and long dialogues made of them, up to 1,024 tokens; `glm-small` and `glm-middle` random ChatGLM3s in the original layout
(benchmarks/chatglm3_full.py) of a few layers, with the seven kinds of layer, on the counselling sets.

Expected is what `tuneloom estimate` says (plan.json keeps it); memory is held against the peak of the whole process as the
system counts it, evaluation and answers included. Time is held against the seconds in steps: as expected before the first step,
and as the first step's event has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatglm3_full import FINETUNE, watched, write_checkpoint

from tuneloom.config import dump_config, load_config
from tuneloom.config.recipes import find_recipe
from tuneloom.data.sources import builtin_file

COUNSELLING = ("counselling_en", "counselling_zh")
GLM = {
    "glm-small": {"num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 3424, "num_attention_heads": 8},
    "glm-middle": {"num_layers": 6, "hidden_size": 2048, "ffn_hidden_size": 6848, "num_attention_heads": 16},
}
CASES = ("persona", "dora", "dialogue", *GLM)


def write_case(case: str, folder: Path, steps: int) -> Path:
    """Write a case's config, and its model and data where it has its own."""
    sets: dict[str, Any] = {"output_dir": str(folder / "runs"), "name": case, "training.logging_steps": 1}
    if steps:
        sets["training.max_steps"] = steps
    if case == "dialogue":
        sets |= {"data.train": [str(_dialogues(folder))], "data.cutoff_len": 1024, "data.validation": 0.1}
        sets |= {"training.gradient_accumulation_steps": 2, "evaluation.sample_max_new_tokens": 16}
    if case in GLM:
        model = folder / case
        model.mkdir()
        write_checkpoint(model, **GLM[case])
        sets |= {
            "base_model": str(model),
            "data.train": list(COUNSELLING),
            "data.cutoff_len": 256,
            "training.gradient_accumulation_steps": 2,
            "adapter.target_modules": "all-layers",
            "evaluation.sample_max_new_tokens": 16,
        }
    recipe = "persona-dora" if case == "dora" else "persona-lora"
    file = folder / f"{case}.yaml"
    file.write_text(dump_config(load_config(find_recipe(recipe), overrides=sets)), encoding="utf-8")
    return file


def _dialogues(folder: Path) -> Path:
    """Write dialogues of many turns: counselling conversations one after another, 1 to 8 of them."""
    lines = [line for name in COUNSELLING for line in builtin_file(name).read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line)["messages"] for line in lines]
    joined: list[list[dict[str, Any]]] = []
    while rows:
        count = 1 + len(joined) % 8
        joined.append([message for row in rows[:count] for message in row if message["role"] != "system"])
        rows = rows[count:]
    file = folder / "dialogues.jsonl"
    file.write_text("".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in joined), encoding="utf-8")
    return file


def measure(case: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run a case; return expected and reached."""
    done, peak, _ = watched(FINETUNE, write_case(case, folder, steps))
    run = Path(done["run"])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = json.loads((run / "plan.json").read_text(encoding="utf-8"))["estimate"]
    logged = [event for event in events if event["event"] == "step"]
    end = next(event for event in events if event["event"] == "end")
    after_first = logged[0]["step_seconds"] / logged[0]["tokens"] * end["tokens"]
    return {
        "case": case,
        "expected_memory_gib": expected["memory_gib"]["peak"],
        "memory_gib": peak,
        "memory_error": expected["memory_gib"]["peak"] / peak - 1,
        "parts_gib": expected["memory_gib"],
        "steps": len(logged),
        "expected_seconds": expected["seconds"],
        "seconds_after_first_step": after_first,
        "seconds": end["seconds"],
        "time_error": expected["seconds"] / end["seconds"] - 1,
        "time_error_after_first_step": after_first / end["seconds"] - 1,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Run the cases and print what was expected and what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--steps", type=int, default=0, help="of each case; its recipe's own unless given")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args(words)
    found = []
    for case in arguments.case:
        folder = Path(tempfile.mkdtemp(prefix="estimate-"))
        try:
            figures = measure(case, folder, arguments.steps)
        finally:
            shutil.rmtree(folder)
        found.append(figures)
        print(
            f"{case:11} {figures['steps']:3} steps   memory {figures['expected_memory_gib']:.2f} expected, "
            f"{figures['memory_gib']:.2f} GiB reached ({figures['memory_error']:+.1%})   "
            f"time {figures['expected_seconds']:.0f} s expected, {figures['seconds_after_first_step']:.0f} s after one step, "
            f"{figures['seconds']:.0f} s reached ({figures['time_error']:+.1%}, {figures['time_error_after_first_step']:+.1%})",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
