"""Self-replay: the base answers everyday questions, and these answers are mixed in.

A persona learnt from identity rows alone spoils everything else. Answers that the base wrote
itself hold it where it was: on them the untrained model's loss is already low, so whatever
moves them is what should not move. Answers in which the base speaks of itself are left out: they
would rehearse the very self that is being replaced. All are kept in the cache by base, prompts and settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tuneloom.cache import cache_subfolder
from tuneloom.config import GenerationConfig
from tuneloom.data.render import Renderer
from tuneloom.generate.generator import Generator
from tuneloom.rundir import write_atomically
from tuneloom.train.team import team
from tuneloom.types import Conversation, Sample

SETTINGS = GenerationConfig(max_new_tokens=64)
BATCH_SIZE = 32
SPEAKS_OF_ITSELF = re.compile(
    r"\b(as an?|I'm an?|I am an?)\s[\w\s-]{0,30}(AI|assistant|chatbot|bot|language model)\b"
    r"|作为(一个|一名|一款)?(AI|人工智能|语言模型|助手|聊天机器人)|我是(一个|一名|一款)?(AI|人工智能|语言模型|助手|聊天机器人)",
    re.IGNORECASE,
)
"""How chat models speak of what they are, in English and Chinese."""

Progress = Callable[[str, int, int], None]


def unanswered(renderer: Renderer, conversations: Sequence[Conversation]) -> list[Sample | None]:
    """Return what stands for the samples of `replay_samples` while there is no model: each question, and one token to learn."""
    asked = (Conversation(c.messages[: next(c.turns())], c.location, c.tools) for c in conversations)
    prompts = [renderer.prompt_ids(conversation) for conversation in asked]
    return [
        Sample(np.array([*prompt, prompt[-1]], np.int32), np.arange(len(prompt) + 1) == len(prompt), conversation.location)
        for prompt, conversation in zip(prompts, conversations, strict=True)
    ]


def replay_samples(
    generator: Generator,
    conversations: Sequence[Conversation],
    base_fingerprint: str,
    precision: str,
    progress: Progress,
    *,
    base: bool = False,
    in_step: bool = False,
) -> list[Sample | None]:
    """Return one sample for each conversation: its first question, answered by the base, greedily.

    None stands for an answer in which the base speaks of itself.

    The tokens are the base's own, so an answer that ran into the limit has no end token
    and teaches none.

    Args:
        generator: of the base.
        conversations: only what comes before the first answer is used.
        base_fingerprint, precision: parts of the cache's key.
        progress: called with ("replay", done, all).
        base: whether the model has an adapter, to be off.
        in_step: with several processes, whether all run the model together; else the first one does, and tells the others.
    """
    ranks = team()
    asked = [Conversation(c.messages[: next(c.turns())], c.location, c.tools) for c in conversations]
    prompts = [generator.renderer.prompt_ids(c) for c in asked]
    cache = ranks.agreed(lambda: _Cache(base_fingerprint, precision))
    new = {tuple(prompt): c for prompt, c in zip(prompts, asked, strict=True) if cache.get(prompt) is None}

    def write() -> list[list[int]]:
        answers = generator.answers(
            list(new.values()),
            SETTINGS,
            batch_size=BATCH_SIZE,
            base=base,
            on_progress=lambda done, total: progress("replay", done, total),
        )
        return [answer.ids for answer in answers]

    if new:
        for key, ids in zip(new, write() if in_step else ranks.agreed(write), strict=True):
            cache.put(key, ids)
        if ranks.is_first:
            cache.save()
    samples: list[Sample | None] = []
    for prompt, conversation in zip(prompts, asked, strict=True):
        ids = cache.get(prompt) or []
        if SPEAKS_OF_ITSELF.search(str(generator.renderer.tokenizer.decode(ids, skip_special_tokens=True))):
            samples.append(None)
            continue
        mask = [False] * len(prompt) + [True] * len(ids)
        samples.append(Sample(np.array(prompt + ids, np.int32), np.array(mask, np.bool_), conversation.location))
    return samples


class _Cache:
    """Answers by prompt tokens, in one JSON file a base and precision."""

    def __init__(self, base_fingerprint: str, precision: str) -> None:
        key = hashlib.sha256(f"{base_fingerprint} {precision} {SETTINGS.model_dump_json()}".encode()).hexdigest()
        self._file: Path = cache_subfolder("replay") / f"{key[:24]}.json"
        self._answers: dict[str, list[int]] = {}
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            self._answers = {str(k): [int(i) for i in v] for k, v in stored.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._answers = {}  # absent or torn: written anew

    @staticmethod
    def _key(prompt: Sequence[int]) -> str:
        return hashlib.sha256(np.array(prompt, np.int32).tobytes()).hexdigest()

    def get(self, prompt: Sequence[int]) -> list[int] | None:
        return self._answers.get(self._key(prompt))

    def put(self, prompt: Sequence[int], ids: list[int]) -> None:
        self._answers[self._key(prompt)] = ids

    def save(self) -> None:
        write_atomically(self._file, json.dumps(self._answers) + "\n")
