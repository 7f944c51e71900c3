"""Send trainings two signals each, and print as JSON how they ended.

    python tests/chaos/two_signals.py CASES MODEL ROWS FOLDER

CASES is JSON: a name to the signals, and whether SIGINT is ignored at first, as a shell starts what runs in its background.
Each trains in a process forked from this one, which has imported everything and started no thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]


def train(signals: list[int], ignored: bool, model: Path, rows: Path, output: Path) -> None:
    """Train three steps as the command line does, and be sent the signals in the second."""
    from helpers import tiny_config

    from tuneloom.cli.main import run
    from tuneloom.train.run import finetune

    def show(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and fields["step"] == 2:
            for number in signals:
                os.kill(os.getpid(), number)

    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = tiny_config(model, rows, output, {"training.max_steps": 3, "training.save_steps": 1})
    try:
        run(lambda: finetune(config, show=show))
    except SystemExit as ended:  # the interpreter makes its exit code of it
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def main() -> None:
    from chaos.kill_resume import begin, ended, warm_up

    cases, model, rows, folder = json.loads(sys.argv[1]), *map(Path, sys.argv[2:])
    warm_up()
    found = {}
    for name, (signals, ignored) in cases.items():
        log = folder / f"{name}.txt"
        status = ended(begin(lambda: train(signals, ignored, model, rows, folder / name), log), wait=True)  # noqa: B023 run at once
        assert status is not None
        found[name] = {"code": os.waitstatus_to_exitcode(status), "said": log.read_text(encoding="utf-8")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
