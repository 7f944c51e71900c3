"""Fixtures: a random model of about a million parameters with a tokenizer trained here, and config files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("suite", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent

_THREADS = "OMP_NUM_THREADS"
_GIVEN_THREADS = os.environ.get(_THREADS)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for the tiny model, which is quicker so, the more on a busy machine; the real one has all, or those given."""
    real = item.get_closest_marker("real") is not None
    threads = _GIVEN_THREADS if real else "1"
    if threads is None:
        os.environ.pop(_THREADS, None)
    else:
        os.environ[_THREADS] = threads
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads or os.cpu_count() or 1))


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_NOTICE = "Tiny is provided under the Tiny Terms."
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def corpus() -> list[str]:
    """Text that a small tokenizer is trained on: the built-in sets, which ship with the package."""
    folder = ROOT / "tuneloom" / "data" / "builtin"
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


@cache
def trained_bpe(vocab_size: int) -> str:
    """A byte-level BPE tokenizer without special tokens, as JSON; training takes twenty times as long as reading it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    return str(backend.to_str())


def make_tokenizer(
    template: str = CHATML, specials: Sequence[str] = SPECIALS, eos: str = "<|im_end|>", vocab_size: int = 1500
) -> Any:
    """Make a byte-level BPE tokenizer whose special tokens come first, and give it a chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(trained_bpe(vocab_size - len(specials)))
    learnt = {token: number + len(specials) for token, number in state["model"]["vocab"].items()}
    state["model"]["vocab"] = {name: number for number, name in enumerate(specials)} | learnt
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=specials[0])
    tokenizer.chat_template = template
    return tokenizer


def make_model_folder(folder: Path, *, tied: bool = True, seed: int = 0, hidden: int = 128, bias: bool = False) -> Path:
    """Write a random Llama of about a million parameters with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    blank = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    with torch.no_grad():
        model.get_output_embeddings().weight[blank] *= 0.1  # else it says the prompt's last token, a blank, for ever
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with tied embeddings, and a notice that goes with what is made from it."""
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "tiny-tied")
    (folder / "NOTICE").write_text(TINY_NOTICE + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with a head of its own, biases on attention, other weights."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny-untied", tied=False, seed=1, bias=True)


@pytest.fixture(scope="session")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random ChatGLM3 in its original layout, its code files included, which must never be run."""
    from chatglm_folders import make_chatglm_folder

    return make_chatglm_folder(tmp_path_factory.mktemp("models") / "chatglm3-tiny")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of our own for the session, unless a test of the real model asks for the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ.setdefault("TUNELOOM_CACHE", str(folder))
    return Path(os.environ["TUNELOOM_CACHE"])


@pytest.fixture
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check merged exports in this process: a fresh one, which test_export proves, takes seconds to import the engine."""
    from tuneloom.exporting import merged, verify

    monkeypatch.setattr(merged, "verify_in_fresh_process", verify.verify)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to a jsonl (or json) file and return its path."""

    def write(rows: Sequence[object], name: str = "train.jsonl") -> Path:
        file = tmp_path / name
        if name.endswith(".json"):
            file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        else:
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


def chat_row(*texts: str) -> dict[str, Any]:
    """A row of messages, user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small set that runs on the tiny model train on."""
    from helpers import ROWS

    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def finished_run(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a LoRA run of 24 steps with validation, test set, evaluations and checkpoints; read only."""
    from helpers import tiny_config

    from tuneloom.train.run import finetune

    changes = {
        "data.validation": str(rows_file),
        "data.test": str(rows_file),
        "data.variables": {"name": "Loomi", "author": "Tuneloom"},
        "adapter.target_modules": "all-layers",
        "training.max_steps": 24,
        "training.gradient_accumulation_steps": 5,
        "training.eval_steps": 8,
        "training.save_steps": 12,
        "evaluation.prompts": ["Who are you?", "你是谁？"],
        "evaluation.sample_max_new_tokens": 8,
        "evaluation.predict_with_generate": True,
    }
    config = tiny_config(tiny_model, rows_file, tmp_path_factory.mktemp("runs"), changes)
    return finetune(config).directory.path
