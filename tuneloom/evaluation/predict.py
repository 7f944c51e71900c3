"""Answers to a data set's questions, beside the references, with their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tuneloom.config import GenerationConfig
from tuneloom.evaluation.text_metrics import corpus_scores, mean_scores, score_answer
from tuneloom.generate.generator import Generator
from tuneloom.types import Conversation


@dataclass(frozen=True)
class Prediction:
    """One assistant turn: what was asked last, what the model wrote, what stood there."""

    prompt: str
    answer: str
    reference: str

    def as_dict(self) -> dict[str, str]:
        return {"prompt": self.prompt, "answer": self.answer, "reference": self.reference}


@dataclass(frozen=True)
class Predictions:
    """Rows and the mean scores over them."""

    rows: list[Prediction]
    scores: dict[str, float]


def turn_rows(conversations: Iterable[Conversation], limit: int | None = None) -> list[tuple[Conversation, str]]:
    """Return (conversation up to an answer, that answer) for each assistant turn, the first `limit`."""
    rows: list[tuple[Conversation, str]] = []
    for conversation in conversations:
        for i in conversation.turns():
            if limit is not None and len(rows) >= limit:
                return rows
            asked = Conversation(conversation.messages[:i], conversation.location, conversation.tools)
            rows.append((asked, conversation.messages[i].content))
    return rows


def predict(
    generator: Generator,
    rows: Sequence[tuple[Conversation, str]],
    settings: GenerationConfig,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Answer rows of `turn_rows` and score the answers.

    Args:
        generator: of the model to look at.
        rows: conversations and references.
        settings: how to write.
        batch_size: conversations at a time.
        on_progress: called with (rows done, all); may raise to stop.
    """
    answers = generator.answers([asked for asked, _ in rows], settings, batch_size=batch_size, on_progress=on_progress)
    found = [
        Prediction(asked.messages[-1].content, str(answer), reference)
        for (asked, reference), answer in zip(rows, answers, strict=True)
    ]
    scores = mean_scores(score_answer(row.answer, row.reference) for row in found)
    scores |= corpus_scores([row.answer for row in found], [row.reference for row in found])
    return Predictions(found, scores)
