"""LoRA, rsLoRA and DoRA at two ranks on the base case: trains what is not there yet, then prints the table in Markdown.

    python benchmarks/methods.py [--runs-dir runs] [--ranks 8 64] [--steps 60] [--precision bf16] [--table]

Six runs named compare-METHOD-rRANK, one after another, each from `recipes/base-case-METHOD.yaml` and evaluated by
`tuneloom evaluate`. All in one precision: `auto` measures anew for each run, and may choose otherwise. What is there is not
done again, a run that was interrupted is resumed; --table does nothing but print, with blanks for what is not evaluated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METHODS = ("lora", "rslora", "dora")
COLUMNS = (
    "method",
    "r",
    "steps",
    "train loss",
    "validation loss",
    "identity",
    "leak",
    "general loss delta",
    "time a step",
    "peak memory",
)
TUNELOOM = (sys.executable, "-m", "tuneloom")


def run_name(method: str, rank: int) -> str:
    """Return the name of a run."""
    return f"compare-{method}-r{rank}"


def command(method: str, rank: int, runs: Path, steps: int | None, precision: str) -> list[str]:
    """Return the command that trains a run, or goes on with it."""
    place = runs / run_name(method, rank)
    if (place / "metrics.jsonl").exists():
        return [*TUNELOOM, "finetune", "--resume-from", str(place)]
    settings = {"adapter.r": rank, "name": place.name, "output_dir": runs, "training.precision": precision}
    settings |= {"training.max_steps": steps} if steps else {}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [*TUNELOOM, "finetune", f"base-case-{method}", *sets]


def table(compared: Mapping[str, Any]) -> str:
    """Return the Markdown table of what `tuneloom runs compare --json` prints."""
    ranks = compared["settings"].get("adapter.r")
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for i, run in enumerate(compared["runs"]):
        rank = ranks[i] if ranks else run["name"].rpartition("-r")[2]
        cells = (
            run["method"] or "",
            str(rank),
            _shown(run["step"], "{:,}"),
            _shown(run["train_loss"], "{:.4f}"),
            _shown(run["eval_loss"], "{:.4f}"),
            _measured(run["identity_rate"], "{:.1%}"),
            _measured(run["leak_rate"], "{:.1%}"),
            _measured(run["general_loss_delta"], "{:+.4f}"),
            _shown(run["step_seconds"], "{:.2f} s"),
            _shown(run["peak_memory_gib"], "{:.2f} GiB"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _measured(told: Mapping[str, float | None] | None, form: str) -> str:
    if told is None:
        return ""
    value, low, high = (told[key] for key in ("value", "low", "high"))
    return _shown(value, form) + (f" ({_shown(low, form)} to {_shown(high, form)})" if None not in (low, high) else "")


def compare(names: Sequence[str], runs: Path) -> dict[str, Any]:
    """Return what `tuneloom runs compare --json` prints."""
    words = [*TUNELOOM, "runs", "compare", *names, "--dir", str(runs), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, help="instead of the recipes' 60")
    parser.add_argument("--precision", default="bf16", help="of all of them")
    parser.add_argument("--table", action="store_true", help="train and evaluate nothing")
    arguments = parser.parse_args()
    wanted = [(method, rank) for rank in arguments.ranks for method in METHODS]
    for method, rank in () if arguments.table else wanted:
        place = arguments.runs_dir / run_name(method, rank)
        subprocess.run(command(method, rank, arguments.runs_dir, arguments.steps, arguments.precision), check=True)
        if not (place / "evaluation.json").exists():
            subprocess.run([*TUNELOOM, "evaluate", str(place), "--persona"], check=True)
    print(table(compare([run_name(*each) for each in wanted], arguments.runs_dir)))


if __name__ == "__main__":
    main()
