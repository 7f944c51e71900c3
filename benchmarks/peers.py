"""The engine against other trainers: the same samples in the same order with the same step size, side by side, on this CPU.

    python benchmarks/peers.py [--work persona identity dialogue FILE ...] [--method lora dora] [--steps 4] [--blocks 2]
                               [--peers llamafactory trl] [--data DIR] [--venvs DIR] [--json FILE]

Works: `identity` is the built-in set self_cognition in both languages; `persona` EmoLLM's self-cognition set with its
system prompt and `dialogue` its first 64 conversations of aiwei.json, both from DIR, which holds the files of EmoLLM's
`datasets` folder; FILE is anything that `data.train` takes. A step has 16 samples of at most 1,024 tokens; a longer
conversation is shortened before anybody gets it.

Each side runs in processes of its own, A B A B; a block is a fresh process that trains all the steps from the start, and
its first step is left out of the times. Peers get their virtual environments at the first use (about 2 GB each). They are
measured as they come ("default") and at the fastest settings found ("best"): see SIDES. With `--method dora` our DoRA is
compared with our LoRA and with PEFT's own DoRA layers in TRL.

A peer's ratio is its seconds a step over ours, medians of the blocks that ran beside each other. `loss` is the mean over
the supervised tokens of the last step. Peak memory is the process's largest resident set, in 1e9 bytes. Useful work and
its share of the bf16 matrix product's rate, measured in our processes just before training: benchmarks/sides/prepare.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(__file__).resolve().parent / "sides"
SAMPLES_PER_STEP = 16
CUTOFF = 1024
DIALOGUES = 64
COMMON = {"learning_rate": 5e-5, "r": 8, "lora_alpha": 16, "seed": 42, "samples_per_step": SAMPLES_PER_STEP}
PERSONA_FILE, DIALOGUE_FILE = "processed_self_cognition_EmoLLM.json", "aiwei.json"

REQUIREMENTS = {"llamafactory": "llamafactory==0.9.5", "trl": "trl==1.16.0 peft"}
UNUSED = ("torchvision", "torchaudio")
"""Of LLaMA-Factory's requirements: they are for pictures and sound, and no build of them loads beside a CPU build of torch."""


@dataclass(frozen=True)
class Side:
    """A trainer with a setting.

    Attributes:
        name: tuneloom, or one of REQUIREMENTS.
        setting: what it is called in the table.
        batch_size: samples a device and accumulation step; which samples make a step does not depend on it.
        settings: on top of the common ones, by the trainer's own names.
        bf16_model: whether it gets the model's files with bf16 weights.
        method: lora or dora.
    """

    name: str
    setting: str
    batch_size: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    bf16_model: bool = False
    method: str = "lora"


OURS = Side("tuneloom", "default")
SIDES = (
    Side("llamafactory", "default"),
    Side("llamafactory", "best", 2, {"disable_gradient_checkpointing": True}, bf16_model=True),
    Side("trl", "default", 8),
    Side("trl", "best", 2, {"gradient_checkpointing": False, "bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}),
)
"""Defaults: LLaMA-Factory's page gives batches of 2 x 8 and 32-bit weights; TRL batches of 8 and bf16 autocast over 32-bit
weights. Both checkpoint activations."""


@dataclass
class Blocks:
    """What a side's processes measured; the first step of each is left out."""

    step_seconds: list[float] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    """Of each step: useful and needed GFLOP/s."""
    losses: list[float] = field(default_factory=list)
    """Of the last step, one a block."""
    peak_bytes: int = 0
    gemm: list[float] = field(default_factory=list)

    def add(self, result: dict[str, Any], steps: Sequence[dict[str, float]], peak_bytes: int) -> None:
        """Add one process's result.

        Raises:
            SystemExit: it did other than the steps asked for.
        """
        ends = result["step_ends"]
        if len(ends) != len(steps) or len(result["losses"]) != len(steps):
            raise SystemExit(f"{len(ends)} steps and {len(result['losses'])} losses, {len(steps)} were asked for")
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        self.step_seconds += seconds
        timed = zip(steps[1:], seconds, strict=True)
        self.rates += [(step["useful_gflop"] / one, step["needed_gflop"] / one) for step, one in timed]
        self.losses.append(result["losses"][-1])
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        if "gemm_bf16_gflops" in result:
            self.gemm.append(result["gemm_bf16_gflops"])

    def figures(self, gemm: float) -> dict[str, Any]:
        """Return the figures for the JSON."""
        useful, needed = (statistics.median(rates) for rates in zip(*self.rates, strict=True))
        return {
            "seconds_per_step": statistics.median(self.step_seconds),
            "peak_rss_gb": self.peak_bytes / 1e9,
            "loss": statistics.median(self.losses),
            "useful_gflops": useful,
            "useful_share_of_gemm": useful / gemm,
            "needed_gflops": needed,
            "needed_share_of_gemm": needed / gemm,
            "step_seconds": [round(one, 3) for one in self.step_seconds],
        }


def main() -> None:
    """Measure and print."""
    arguments = parse(sys.argv[1:])
    venvs = arguments.venvs.resolve()
    venvs.mkdir(parents=True, exist_ok=True)
    pairs = [(ours, peer) for method in arguments.method for ours, peer in compared(method, arguments.peers)]
    for name in {peer.name for _, peer in pairs if peer.name != OURS.name}:
        ensure_venv(name, venvs)
    results: list[dict[str, Any]] = []
    scratch = Path(tempfile.mkdtemp(prefix="tuneloom-peers-"))
    try:
        for work in arguments.work:
            measured = measure(work, pairs, arguments, scratch)
            results += measured
            print("\n" + table(measured) + "\n", flush=True)
            if arguments.json:
                write_json(arguments, results)
    finally:
        shutil.rmtree(scratch)


def compared(method: str, peers: Sequence[str]) -> list[tuple[Side, Side]]:
    """Return pairs of our side and another."""
    if method == "lora":
        return [(OURS, side) for side in SIDES if side.name in peers]
    ours = with_method(OURS, "dora")
    best = [with_method(side, "dora", f"PEFT's layers, {side.setting}") for side in SIDES if side.setting == "best"]
    return [
        (ours, with_method(OURS, "lora", "LoRA")),
        *((ours, side) for side in best if side.name == "trl" and "trl" in peers),
    ]


def with_method(side: Side, method: str, setting: str | None = None) -> Side:
    """Return the side with another method."""
    return Side(side.name, setting or side.setting, side.batch_size, side.settings, side.bf16_model, method)


def measure(
    work: str, pairs: Sequence[tuple[Side, Side]], arguments: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    """Run all pairs on a work; return one result for each."""
    prepared = prepare(work, arguments, Path(tempfile.mkdtemp(dir=scratch)))
    steps = prepared["steps"]
    tokens = statistics.mean(step["tokens"] for step in steps)
    print(
        f"{work}: {tokens:,.0f} tokens a step, {tokens / statistics.mean(s['distinct_tokens'] for s in steps):.2f} x those "
        f"with shared beginnings once; {statistics.mean(s['supervised_tokens'] for s in steps):,.0f} supervised",
        flush=True,
    )
    found = [(ours, peer, Blocks(), Blocks()) for ours, peer in pairs]
    for block in range(arguments.blocks):
        for ours, peer, our_blocks, peer_blocks in found:
            for side, blocks in ((ours, our_blocks), (peer, peer_blocks)):
                result, peak_bytes = run_side(side, prepared, arguments, scratch)
                blocks.add(result, steps, peak_bytes)
                shown = " ".join(f"{one:.2f}" for one in blocks.step_seconds[1 - len(steps) :])
                print(
                    f"  {block + 1}/{arguments.blocks}  {side.method}  {side.name}, {side.setting}: {shown} s, "
                    f"{peak_bytes / 1e9:.2f} GB, loss {result['losses'][-1]:.4f}",
                    flush=True,
                )
    gemm = statistics.median(rate for _, _, blocks, _ in found for rate in blocks.gemm)
    return [
        result_of(work, ours, peer, ours_figures.figures(gemm), peer_figures.figures(gemm)) | {"gemm_bf16_gflops": gemm}
        for ours, peer, ours_figures, peer_figures in found
    ]


def result_of(work: str, ours: Side, peer: Side, our_figures: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the table."""
    return {
        "work": work,
        "method": ours.method,
        "peer": peer.name,
        "setting": peer.setting,
        "ratio": figures["seconds_per_step"] / our_figures["seconds_per_step"],
        "loss_difference": figures["loss"] / our_figures["loss"] - 1,
        **figures,
        "tuneloom": our_figures,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as aligned text; ours stands behind each peer's figure."""
    header = (
        "work",
        "method",
        "against",
        "s/step",
        "ours",
        "ratio",
        "GB",
        "ours",
        "loss",
        "ours",
        "useful GFLOP/s",
        "ours",
        "of GEMM",
    )
    lines = [header]
    for result in results:
        ours = result["tuneloom"]
        lines.append(
            (
                Path(result["work"]).name,
                result["method"],
                f"{result['peer']}, {result['setting']}",
                f"{result['seconds_per_step']:.2f}",
                f"{ours['seconds_per_step']:.2f}",
                f"{result['ratio']:.2f}",
                f"{result['peak_rss_gb']:.2f}",
                f"{ours['peak_rss_gb']:.2f}",
                f"{result['loss']:.4f}",
                f"{ours['loss']:.4f}",
                f"{result['useful_gflops']:.0f}",
                f"{ours['useful_gflops']:.0f}",
                f"{ours['useful_share_of_gemm']:.2f} ({ours['needed_share_of_gemm']:.2f} needed)",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 3  # columns of words
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# The work and the sides, each in a process of its own.


def prepare(work: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Have the work's files written; return what they hold."""
    job = {
        **COMMON,
        "folder": str(folder),
        "cache": str(arguments.venvs.resolve()),
        "model": arguments.model,
        "source": source_of(work, arguments.data),
        "max_rows": DIALOGUES if work == "dialogue" else None,
        "cutoff": CUTOFF,
        "steps": arguments.steps,
        "batch_size": OURS.batch_size,
        "methods": ["lora", "dora"] if "dora" in arguments.method else ["lora"],
    }
    run([sys.executable, str(SCRIPTS / "prepare.py")], job, folder, dict(os.environ))
    found: dict[str, Any] = json.loads((folder / "work.json").read_text())
    return {**found, "rows": str(folder / "rows.jsonl"), "samples_file": str(folder / "samples.json")}


def source_of(work: str, data: Path | None) -> list[str]:
    """Return what a work's name means to `data.train`.

    Raises:
        SystemExit: its file is not there.
    """
    if work == "identity":
        return ["self_cognition_en", "self_cognition_zh"]
    if work not in ("persona", "dialogue"):
        return [str(Path(work).resolve()) if Path(work).exists() else work]
    name = PERSONA_FILE if work == "persona" else DIALOGUE_FILE
    found = sorted(data.rglob(name)) if data else []
    if not found:
        raise SystemExit(f"the work `{work}` is {name} of EmoLLM's datasets; name the folder that holds it: --data DIR")
    return [str(found[0].resolve())]


def run_side(side: Side, prepared: dict[str, Any], arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], int]:
    """Train on one side; return its result and its peak resident bytes."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    job = {
        **COMMON,
        "steps": arguments.steps,
        "cutoff": CUTOFF,
        "dora": side.method == "dora",
        "batch_size": side.batch_size,
        "settings": side.settings,
        "model": prepared["bf16_model" if side.bf16_model else "model"],
        "rows": prepared["rows"],
        "start": str(Path(prepared["rows"]).parent / f"start-{side.method}"),
        "samples": prepared["samples_file"],
        "longest": prepared["longest"],
        "supervised_tokens": prepared["supervised_tokens"],
        "output_dir": str(folder / "out"),
        "result": str(folder / "result.json"),
    }
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    python = sys.executable
    if side.name != OURS.name:
        python = str(venv_python(arguments.venvs.resolve() / side.name))
        environment |= {"DISABLE_VERSION_CHECK": "1"}  # of LLaMA-Factory: torchvision and torchaudio are absent
        environment.pop("PYTHONPATH", None)
    peak_bytes = run([python, str(SCRIPTS / f"{side.name}_side.py")], job, folder, environment)
    result = json.loads(Path(job["result"]).read_text())
    shutil.rmtree(folder)
    return result, peak_bytes


def run(command: list[str], job: dict[str, Any], folder: Path, environment: dict[str, str]) -> int:
    """Run a script on a job; return the largest resident set of its process, in bytes.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    file, log = folder / "job.json", folder / "log.txt"
    file.write_text(json.dumps(job))
    with open(log, "wb") as output:
        process = subprocess.Popen([*command, str(file)], stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ensure_venv(name: str, venvs: Path) -> None:
    """Install a peer into its own virtual environment, beside the torch that is pinned for us."""
    folder = venvs / name
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    ready, wanted = folder / ".ready", f"{REQUIREMENTS[name]} {torch}"
    if ready.is_file() and ready.read_text() == wanted:
        return
    print(f"installing {wanted} into {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python, given = str(venv_python(folder)), shlex.split(os.environ.get("PIP_ARGS", ""))
    install = [python, "-m", "pip", "--quiet", "install", *given]
    constraints = folder / "constraints.txt"
    constraints.write_text(torch + "\n" if name == "llamafactory" else (ROOT / "constraints.txt").read_text())
    subprocess.run([*install, torch], check=True)  # first: a looser request may take a far larger build
    subprocess.run([*install, "-c", str(constraints), *REQUIREMENTS[name].split()], check=True)
    if name == "llamafactory":
        subprocess.run([python, "-m", "pip", "--quiet", "uninstall", "-y", *UNUSED], check=True)
        for site in folder.glob("lib/python*/site-packages"):
            (site / "torchaudio.py").write_text("")  # it is imported, and not used
    ready.write_text(wanted)


def venv_python(folder: Path) -> Path:
    """Return a virtual environment's interpreter."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def write_json(arguments: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Write everything so far."""
    record = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "platform": platform.platform()},
        "steps": arguments.steps,
        "blocks": arguments.blocks,
        "model": arguments.model,
        **COMMON,
        "peers": REQUIREMENTS,
        "results": results,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", nargs="+", default=["persona", "identity", "dialogue"], help="persona, identity, dialogue, a file"
    )
    parser.add_argument("--method", nargs="+", choices=("lora", "dora"), default=["lora"])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a block, the first not timed")
    parser.add_argument("--blocks", type=int, default=2, help="processes of each side")
    parser.add_argument("--peers", nargs="*", choices=tuple(REQUIREMENTS), default=list(REQUIREMENTS))
    parser.add_argument("--model", default="smollm2-135m-instruct", help="one with SmolLM2's chat template")
    parser.add_argument("--data", type=Path, help="folder with EmoLLM's files, for persona and dialogue")
    cache = Path(os.environ.get("TUNELOOM_CACHE") or Path.home() / ".cache" / "tuneloom")
    parser.add_argument("--venvs", type=Path, default=cache / "peers", help="where the peers are installed")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    found = parser.parse_args(arguments)
    if found.steps < 2:
        parser.error("--steps: at least 2, since the first is not timed")
    return found


if __name__ == "__main__":
    main()
