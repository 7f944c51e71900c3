"""A small tokenizer.model of the same kind as ChatGLM's, trained here: the real one is its owner's and is never shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from conftest import corpus


def training_lines() -> Iterator[str]:
    """Lines of both languages, code and runs of blanks; no piece can hold a newline, as in the original."""
    for text in corpus():
        yield from (line for line in text.split("\n") if line)
    for _ in range(60):
        yield "people use isopropyl alcohol; isopropyl people of the isopropyl plant"
        yield "    def f(x):        return {'k': [1, 2.5, -3], \"v\": None}                # a    b"
        yield "今天天气怎么样？北京的天气很好。"
        yield "```python tool_call(city='北京') ``` weather"


def train_sentencepiece(folder: Path, vocab_size: int = 2000) -> Path:
    """Write a tokenizer.model with ChatGLM's switches into `folder`; rare characters are left to its byte pieces."""
    from sentencepiece import SentencePieceTrainer

    file = folder / "tokenizer.model"
    with file.open("wb") as target:
        SentencePieceTrainer.train(
            sentence_iterator=training_lines(),
            model_writer=target,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.98,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    return file


def make_tokenizer_folder(folder: Path, name: str = "chatglm3-6b") -> Path:
    """Write what a tokenizer is built from: tokenizer.model and the two lines of config.json that it depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(folder)
    config = {"model_type": "chatglm", "_name_or_path": name, "padded_vocab_size": 65024}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
