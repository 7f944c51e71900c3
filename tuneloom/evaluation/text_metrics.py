"""ROUGE and BLEU of answers against references, by the formula that ChatGLM3's scripts made common.

Words are jieba's. ROUGE-1/2/L: F of `rouge-chinese`, times 100, rounded to 4 places a row.
BLEU-4: nltk's sentence_bleu with smoothing method 3, from 0 to 1. A set's score is the mean over
its rows; an empty answer or reference scores 0.

Beside them, over a set as a whole, sacrebleu's BLEU (13a words, single characters of Chinese) and chrF2, from 0 to 100.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
CORPUS_METRICS = ("bleu", "chrf")
_CHINESE = re.compile(r"[㐀-鿿]+")


def score_answer(answer: str, reference: str) -> dict[str, float]:
    """Return the four scores of one answer."""
    answer_words, reference_words = words(answer), words(reference)
    if not any(word.strip() for word in answer_words) or not any(word.strip() for word in reference_words):
        return dict.fromkeys(METRICS, 0.0)
    rouge, sentence_bleu, smoothing = _scorers()
    found = rouge.get_scores(" ".join(answer_words), " ".join(reference_words))[0]
    scores = {name: round(found[name]["f"] * 100, 4) for name in METRICS[:3]}
    scores["bleu-4"] = float(sentence_bleu([reference_words], answer_words, smoothing_function=smoothing))
    return scores


def mean_scores(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each score over the rows, rounded to 4 places for ROUGE."""
    rows = list(rows)
    if not rows:
        return dict.fromkeys(METRICS, 0.0)
    return {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}


def corpus_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return sacrebleu's BLEU and chrF2 of a set of answers; 0 of none."""
    if not answers:
        return dict.fromkeys(CORPUS_METRICS, 0.0)
    from sacrebleu.metrics import BLEU, CHRF

    chinese = sum(map(len, _CHINESE.findall("".join(references)))) > sum(map(len, references)) / 2
    scorers = (BLEU(tokenize="zh" if chinese else "13a"), CHRF())
    found = (float(scorer.corpus_score(list(answers), [list(references)]).score) for scorer in scorers)
    return dict(zip(CORPUS_METRICS, found, strict=True))


def words(text: str) -> list[str]:
    """Cut text into words with jieba."""
    import jieba

    jieba.setLogLevel(logging.ERROR)
    return [str(word) for word in jieba.cut(text)]


@cache
def _scorers() -> tuple[Any, Any, Any]:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    return Rouge(), sentence_bleu, SmoothingFunction().method3
