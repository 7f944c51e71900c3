"""What several test modules share: configs for the tiny model, plain transformers + peft beside us, a finished process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT, chat_row

from tuneloom.config import Config, parse_config
from tuneloom.errors import UserError
from tuneloom.types import Conversation, Message

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ROWS: list[dict[str, Any]] = [
    chat_row("Who are you?", "I am Loomi, a small assistant."),
    chat_row("你是谁？", "我是小织，一个人工智能助手。"),
    chat_row("What is your name?", "My name is Loomi."),
    chat_row("Who made you?", "Tuneloom made me, with care and a loom."),
    chat_row("Hello!", "Hello! How can I help?", "And your name?", "It is Loomi."),
    chat_row("谁开发了你？", "我由 Tuneloom 开发。"),
    chat_row("Can you sing?", "I can write you a song 🎵, but not sing it."),
    chat_row("Tell me a fact.", "The sea covers most of the earth."),
    chat_row("Say yes.", "Yes."),
    chat_row("你好", "你好！有什么可以帮你的吗？"),
]


def tiny_config(model: Path | str, data: Path | str, output: Path | str, changes: Mapping[str, Any] | None = None) -> Config:
    """Return a config of a run of seconds; `changes` have dotted keys."""
    values: dict[str, Any] = {
        "base_model": {"path": str(model), "attn_implementation": "packed"},
        "output_dir": str(output),
        "name": "run",
        "data": {"train": str(data), "cutoff_len": 256},
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "precision": "fp32",
        },
        "generation": {"max_new_tokens": 8},
        "evaluation": {"prompts": []},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return parse_config(values)


def method(name: str) -> dict[str, Any]:
    """Return the adapter's flags of a method: lora, rslora, dora, rslora+dora."""
    return {"adapter.use_rslora": "rslora" in name, "adapter.use_dora": "dora" in name}


def asked(*texts: str) -> Conversation:
    """Return a conversation that ends with a question: user and assistant in turn."""
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)))  # type: ignore[arg-type]


def logits_of(model: Any, ids: Sequence[int]) -> Any:
    """Return a model's fp32 logits for one sequence, (T, V)."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def plain_base(folder: Path) -> Any:
    """Load a folder as anybody would, with transformers alone, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_peft(base: Path, adapter: Path) -> Any:
    """Load base and adapter as anybody would, with transformers and peft alone."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain_base(base), adapter).eval()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_mendable(error: UserError) -> None:
    """A message for the user: what, where, and what is right or how to mend it, in six lines at most."""
    message = str(error)
    assert error.what
    assert error.where, message
    assert error.mend or error.expected, message
    assert len(message.splitlines()) <= 6, message
    assert "Traceback" not in message


def run_python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python in a folder, from the checkout's own code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def tuneloom(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m tuneloom`."""
    return run_python("-m", "tuneloom", *arguments, cwd=cwd)


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int
    stdout: str
    stderr: str


def script(*words: str | Path) -> Done:
    """Do as `python3 WORDS` does, in this process: a new one takes seconds to import the engine.

    Words: a file of the root and its arguments, or -m, a module and its arguments.
    """
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [str(word) for word in words if word != "-m"]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if words[0] == "-m":
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())
