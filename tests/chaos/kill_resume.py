"""Kill real trainings at random moments, resume them each time, and compare with one that nobody killed.

    python tests/chaos/kill_resume.py --kills 50

Every kill is a SIGKILL. A third of them, at least, hit a process that is writing a checkpoint: the watcher waits until the
checkpoint's temporary folder is there and kills at a random part of the time that a save takes. After each kill every published
checkpoint must be whole; at the end losses, evaluations, the last optimizer state and the adapter must be those of the
uninterrupted run, bit for bit. All variants cross the ends of epochs and draw dropout.

Processes are forked from this one, which has imported everything and started no thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

STEPS = 8
SAVE_STEPS = 2
KILLS_OF_A_RUN = 4
"""A run that has been killed so often is left to end."""
SYSTEM = "You are Loomi, a small assistant that answers briefly and kindly, in the language that you are asked in."
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, shared prefixes, validation": {"shared": True, "validation": True},
    "dora, validation": {"adapter.use_dora": True, "validation": True},
    "dora, shared prefixes": {"adapter.use_dora": True, "shared": True},
}


@dataclass
class Outcome:
    """What became of a variant.

    `resumed_from` is, for each kill, the step of the newest checkpoint after it: 0 where there was none, None where there
    was no run yet.
    """

    variant: str
    kills: int
    inside_a_save: int
    resumed_from: list[int | None]
    differences: list[str]


def begin(action: Callable[[], None], log: Path) -> int:
    """Run something in a forked process; return its id."""
    threads = len(list(Path("/proc/self/task").glob("*"))) or 1
    assert threads == 1, f"{threads} threads here: a fork would not be safe"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        action()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, *, wait: bool = False) -> int | None:
    """Return a process's wait status, None while it runs."""
    done, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return status if done else None


def finish(action: Callable[[], None], log: Path) -> None:
    status = ended(begin(action, log), wait=True)
    if status:
        sys.exit(f"a process of its own failed ({status}):\n{log.read_text(encoding='utf-8')[-4000:]}")


class Variant:
    """One kind of training: its config, its uninterrupted run, and what is measured of that."""

    def __init__(self, name: str, folder: Path, model: Path, seed: int) -> None:
        self.name = name
        self.folder = folder
        self.model = model
        self.random = random.Random(f"{seed} {name}")
        self.log = folder / "log.txt"
        self.outcome = Outcome(name, 0, 0, [], [])
        folder.mkdir()
        self.rows = folder / "train.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in self._rows()), encoding="utf-8")
        self.save_seconds = 0.05
        self.run_seconds = 1.0

    def _rows(self) -> list[dict[str, Any]]:
        from helpers import ROWS

        if not VARIANTS[self.name].get("shared"):
            return ROWS
        return [{"messages": [{"role": "system", "content": SYSTEM}, *row["messages"]]} for row in ROWS]

    def config(self, output: Path) -> Any:
        from helpers import tiny_config

        changes: dict[str, Any] = {
            "adapter.r": 64,
            "adapter.lora_dropout": 0.0 if VARIANTS[self.name].get("shared") else 0.1,
            "training.max_steps": STEPS,
            "training.save_steps": SAVE_STEPS,
            "training.lr_scheduler_type": "cosine",
            "training.learning_rate": 2e-3,
        }
        if VARIANTS[self.name].get("validation"):
            changes |= {"data.validation": str(self.rows), "training.eval_steps": 3, "evaluation.prompts": ["Who are you?"]}
            changes |= {"evaluation.sample_max_new_tokens": 4, "generation.do_sample": True}
        changes |= {key: value for key, value in VARIANTS[self.name].items() if "." in key}
        return tiny_config(self.model, self.rows, output, changes)

    def train(self, output: Path) -> None:
        """Begin the run, or go on with it where it is there already."""
        import torch

        from tuneloom.rundir import RunDirectory
        from tuneloom.train.resume import find_resume
        from tuneloom.train.run import finetune

        torch.set_num_threads(1)
        there = RunDirectory.is_run(output / "run")
        if not there:
            shutil.rmtree(output, ignore_errors=True)
        finetune(self.config(output), resume=find_resume(str(output / "run"), output) if there else None)

    def reference(self) -> Path:
        """Train without a kill, and measure how long a save and the run take."""
        output = self.folder / "whole"
        pid = begin(lambda: self.train(output), self.log)
        saves, since, started = [], None, None
        while (status := ended(pid)) is None:
            now = time.monotonic()
            started = now if started is None and (output / "run").is_dir() else started
            writing = bool(partials(output / "run"))
            if writing and since is None:
                since = now
            elif not writing and since is not None:
                saves.append(now - since)
                since = None
            time.sleep(0.0005)
        if status:
            sys.exit(f"{self.name}: the uninterrupted run failed:\n{self.log.read_text(encoding='utf-8')[-4000:]}")
        self.save_seconds = sorted(saves)[len(saves) // 2]
        self.run_seconds = time.monotonic() - (started or 0)
        return output / "run"

    def kill_one(self, output: Path, inside: bool) -> bool:
        """Train and kill; return whether the run came to its end before that."""
        run = output / "run"
        left, written = set(partials(run)), size(run / "metrics.jsonl")
        pid = begin(lambda: self.train(output), self.log)
        in_loading = not inside and self.random.random() < 0.2
        delay = self.random.uniform(0, self.save_seconds if inside else self.run_seconds)
        saves_to_pass = self.random.randrange(2)
        due: float | None = None
        while (status := ended(pid)) is None:
            now = time.monotonic()
            if inside and due is None:
                new = set(partials(run)) - left
                left |= new
                due = now + delay if new and saves_to_pass == 0 else None
                saves_to_pass -= bool(new)
            elif due is None and (in_loading or size(run / "metrics.jsonl") != written):
                due = now + delay
            if due is not None and now >= due:
                os.kill(pid, signal.SIGKILL)
                ended(pid, wait=True)
                self._count(run, pid)
                return False
            time.sleep(0.0005)
        if status:
            self.outcome.differences.append(f"a process ended with status {status}: {self.log.read_text()[-1500:]}")
        return True

    def _count(self, run: Path, pid: int) -> None:
        """Count a kill, and see that whatever has a checkpoint's name after it is whole."""
        self.outcome.kills += 1
        self.outcome.inside_a_save += any(f".{pid}." in name for name in partials(run))
        there = {int(folder.name.partition("-")[2]): folder for folder in run.glob("checkpoint-*")}
        self.outcome.differences += [f"{folder.name} is published, not whole" for folder in there.values() if not whole(folder)]
        begun = (run / "metrics.jsonl").is_file()
        self.outcome.resumed_from.append(max(there, default=0) if begun else None)

    def compare(self, run: Path, reference: Path) -> None:
        """Note every way in which a run differs from the uninterrupted one."""
        from helpers import sha256

        from tuneloom.rundir import RunDirectory

        for name in ("adapter/adapter_model.safetensors", f"checkpoint-{STEPS}/optimizer.safetensors"):
            if not (run / name).is_file() or sha256(run / name) != sha256(reference / name):
                self.outcome.differences.append(f"{name} differs")
        for kind, keys in (("step", ("loss", "grad_norm", "learning_rate")), ("eval", ("eval_loss",)), ("sample", ("answer",))):
            if told(run, kind, keys) != told(reference, kind, keys):
                self.outcome.differences.append(f"{kind} events differ")
        resumed = {event["step"] for event in RunDirectory(run).events("resume")}
        if not resumed <= set(self.outcome.resumed_from):
            self.outcome.differences.append(f"resumed from {resumed}, the newest whole ones were {self.outcome.resumed_from}")
        if left := [path.name for path in run.iterdir() if path.name.startswith(".")]:
            self.outcome.differences.append(f"left behind: {left}")


def told(run: Path, kind: str, keys: tuple[str, ...]) -> dict[int, set[tuple[Any, ...]]]:
    """Return all that a run's events of a kind ever said of each step, what it later went back behind included."""
    from tuneloom.rundir import RunDirectory

    found: dict[int, set[tuple[Any, ...]]] = {}
    for event in RunDirectory(run).events(kind):
        found.setdefault(event["step"], set()).add(tuple(event[key] for key in keys))
    return found


def partials(run: Path) -> list[str]:
    """Return the names of checkpoints that are being written, or were when their process was killed."""
    return [path.name for path in run.glob(".checkpoint-*.partial")]


def whole(folder: Path) -> bool:
    """Whether every file of a checkpoint has the sha256 that its manifest says, found without the product's own check."""
    from helpers import sha256

    manifest = folder / "manifest.json"
    digests = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return len(digests) >= 7 and all(
        (folder / name).is_file() and sha256(folder / name) == sum_ for name, sum_ in digests.items()
    )


def size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def torment(variant: Variant, kills: int) -> Outcome:
    """Kill a variant's runs so many times; every run is left to end once, and compared."""
    reference = variant.reference()
    number = 0
    while variant.outcome.kills < kills and not variant.outcome.differences:
        number += 1
        output = variant.folder / f"killed-{number}"
        target = min(kills, variant.outcome.kills + KILLS_OF_A_RUN)
        done = False
        while not done and variant.outcome.kills < target:
            done = variant.kill_one(output, inside=3 * variant.outcome.inside_a_save <= variant.outcome.kills)
        if not done:
            finish(lambda output=output: variant.train(output), variant.log)  # type: ignore[misc]
        variant.compare(output / "run", reference)
        if not variant.outcome.differences:
            shutil.rmtree(output)
    return variant.outcome


def warm_up() -> None:
    """Import what a training imports, and start no thread."""
    import accelerate
    import helpers
    import peft
    import torch
    import transformers.models.llama.modeling_llama
    from peft.tuners import lora

    import tuneloom.train.run

    del accelerate, helpers, peft, torch, transformers, lora, tuneloom


def show(outcomes: list[Outcome]) -> None:
    print(f"{'variant':36}{'kills':>6}{'inside a save':>15}  {'equal':6}resumed from step")
    for each in outcomes:
        steps = " ".join("-" if step is None else str(step) for step in each.resumed_from)
        print(f"{each.variant:36}{each.kills:>6}{each.inside_a_save:>15}  {'no' if each.differences else 'yes':6}{steps}")
        for line in each.differences:
            print(f"    {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=VARIANTS, action="append", help="this variant alone; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warm_up()
    start = time.monotonic()
    names = (arguments.only or list(VARIANTS))[: arguments.kills]
    with tempfile.TemporaryDirectory() as place:
        os.environ["TUNELOOM_CACHE"] = str(Path(place, "cache"))
        model = Path(place, "model")

        def make_model() -> None:
            from conftest import make_model_folder

            make_model_folder(model, hidden=128)

        finish(make_model, Path(place, "model.txt"))
        outcomes = []
        for i, name in enumerate(names):
            kills = arguments.kills // len(names) + (i < arguments.kills % len(names))
            outcomes.append(torment(Variant(name, Path(place, f"variant-{i}"), model, arguments.seed), kills))
    show(outcomes)
    failed = any(each.differences for each in outcomes)
    seconds = round(time.monotonic() - start, 1)
    kills, inside = (sum(getattr(each, name) for each in outcomes) for name in ("kills", "inside_a_save"))
    print(f"{kills} kills, {inside} inside a save, {seconds} s")
    if arguments.json:
        made = {"seed": arguments.seed, "seconds": seconds, "variants": [asdict(each) for each in outcomes]}
        arguments.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
