"""How fast and in how much memory dialogues are read, checked and rendered.

    python benchmarks/data_speed.py [--dialogues 100000] [--format jsonl|json|parquet] [--model smollm2-135m-instruct]

Dialogues are put together from the sentences of the built-in sets, one to four turns each. Two fresh
processes do the work, the first with an empty cache. Memory is what the process and those that it starts grew
by, at the peak, since just before the work: anonymous memory, sampled every 50 ms, so that the mapped cache
file, which the system may drop at any time, does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

MIB = 1 << 20


def main() -> None:
    arguments = _arguments()
    if arguments.work:
        work(Path(arguments.work), arguments.model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"dialogues.{arguments.format}"
        make_dialogues(file, arguments.dialogues)
        size = file.stat().st_size
        print(f"{arguments.dialogues:,} dialogues, {size / MIB:.1f} MiB of {arguments.format}")
        from tuneloom.models.source import resolve_model

        folder = resolve_model(arguments.model).folder
        environment = {**os.environ, "TUNELOOM_CACHE": str(Path(scratch) / "cache")}
        command = [sys.executable, __file__, "--work", str(file), "--model", str(folder)]
        for name in ("first", "from the cache"):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {found['seconds']:.1f} s, {arguments.dialogues / found['seconds']:,.0f} dialogues/s, "
                f"{found['tokens'] / found['seconds']:,.0f} tokens/s; "
                f"memory grew by {found['grown_bytes'] / MIB:.0f} MiB, {found['grown_bytes'] / size:.2f} x the file"
            )


def work(file: Path, model: str) -> None:
    """Read, check and render the file; print figures as JSON."""
    from tuneloom.config import DataConfig, SourceConfig
    from tuneloom.data.check import check_data
    from tuneloom.data.conversations import ConversationReader
    from tuneloom.data.render import Renderer
    from tuneloom.models.load import load_tokenizer_folder

    renderer = Renderer(load_tokenizer_folder(Path(model)))
    with PeakMemory() as memory:
        start = time.perf_counter()
        report = check_data(DataConfig(), [ConversationReader(SourceConfig(path=str(file)), {})], renderer)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens": report.train["tokens"], "grown_bytes": memory.grown_bytes}))


class PeakMemory:
    """Samples this process's anonymous memory on a thread."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._peak = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def grown_bytes(self) -> int:
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        memory = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found = process.memory_info()
                memory += found.rss - found.shared
        return int(memory)


def make_dialogues(file: Path, count: int) -> None:
    """Write dialogues of one to four turns, put together from the built-in sets."""
    from tuneloom.data.read import read_rows
    from tuneloom.data.sources import builtin_file

    names = ("self_cognition_en", "self_cognition_zh", "counselling_en", "counselling_zh", "general_replay_en")
    said: dict[str, list[str]] = {"user": [], "assistant": []}
    for name in names:
        for row in read_rows(name, builtin_file(name)):
            for message in row.value["messages"]:  # type: ignore[index]
                said.setdefault(message["role"], []).append(message["content"].replace("{{", "").replace("}}", ""))
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        messages = []
        for turn in range(int(rng.integers(1, 5))):
            question = said["user"][int(rng.integers(len(said["user"])))]
            answer = said["assistant"][int(rng.integers(len(said["assistant"])))]
            messages += [
                {"role": "user", "content": f"{question} ({number}.{turn})"},
                {"role": "assistant", "content": answer},
            ]
        rows.append({"messages": messages})
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=5000)
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=100_000)
    parser.add_argument("--format", choices=("jsonl", "json", "parquet"), default="jsonl")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
