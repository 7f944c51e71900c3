"""Every command of the README, executed in its order, trainings cut short."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHANGES = {
    "training.max_steps": "1",
    "training.gradient_accumulation_steps": "1",
    "data.train": "self_cognition_en",
    "evaluation.prompts": "[]",
    "generation.max_new_tokens": "16",  # of the chats and answers after it as well
}
SHORT = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={value}")]


def commands(name: str) -> list[list[str]]:
    """The commands in a page's `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def run_in(words: list[str], folder: Path) -> str:
    """Run a command of the README in a folder that has what a checkout has; return what it printed."""
    for name in ("data", "configs", "recipes", "finetune_hf.py", "inference_hf.py", "model_export_hf.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_both_readmes_have_the_same_commands() -> None:
    assert commands("README.md") == commands("README_zh.md")
    assert len(commands("README.md")) >= 10


def test_files_that_the_readmes_link_to_exist() -> None:
    for name in ("README.md", "README_zh.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name} links to {target}"


@pytest.mark.real
def test_the_readmes_commands_run(tmp_path: Path) -> None:
    for words in commands("README.md"):
        if words[0] in ("source", "python3"):  # the others are test_seed_commands.py's, for another process
            continue
        short = words[:2] == ["tuneloom", "finetune"] and "--resume-from" not in words
        printed = run_in([*words, *SHORT] if short else words, tmp_path)
        assert printed or words[0] == "cp", f"{shlex.join(words)} printed nothing"
