"""A small sentencepiece model with ChatGLM's switches."""

from __future__ import annotations

from pathlib import Path

from conftest import corpus
from sentencepiece import SentencePieceTrainer


def train_sentencepiece(folder: Path) -> Path:
    """Write tokenizer.model into a folder; return the file."""
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in corpus() for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=2600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"
