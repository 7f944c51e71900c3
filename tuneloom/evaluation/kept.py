"""Answers that are kept as they come: asked again, a model need not write them again.

So an evaluation that was interrupted goes on where it was, and the base is asked once for all its adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tuneloom.cache import cache_subfolder
from tuneloom.config import GenerationConfig
from tuneloom.errors import UserError
from tuneloom.generate.generator import Generator
from tuneloom.types import Conversation

FOLDER = "evaluation"


class KeptAnswers:
    """The greedy answers of one model, a line of JSON each, in a file of the cache.

    Args:
        model: what tells the model from others: fingerprints, precision, device.
        settings: how it writes.
    """

    def __init__(self, model: Sequence[str], settings: GenerationConfig) -> None:
        key = hashlib.sha256(json.dumps([*model, settings.model_dump_json()]).encode()).hexdigest()
        self._file: Path = cache_subfolder(FOLDER) / f"{key[:32]}.jsonl"
        self._settings = settings
        self._answers = _read(self._file)

    def answers(
        self,
        generator: Generator,
        conversations: Sequence[Conversation],
        *,
        base: bool,
        batch_size: int,
        on_progress: Callable[[int, int], None],
    ) -> list[str]:
        """Return the answer to each conversation, writing those that are not kept yet, the longest prompts first.

        Args:
            generator: of the model.
            conversations: each ends with the message to answer.
            base: with the adapter off.
            batch_size: conversations at a time; each batch is kept as soon as it is written.
            on_progress: called with (done, all); may raise to stop.

        Raises:
            UserError: the cache cannot be written, or the model's template refuses a conversation.
        """
        prompts = [generator.renderer.prompt_ids(conversation) for conversation in conversations]
        keys = [hashlib.sha256(np.array(prompt, np.int32).tobytes()).hexdigest()[:32] for prompt in prompts]
        missing = {key: i for i, key in enumerate(keys) if key not in self._answers}
        order = sorted(missing, key=lambda key: (-len(prompts[missing[key]]), key))
        on_progress(len(keys) - len(order), len(keys))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            asked = [conversations[missing[key]] for key in chosen]
            written = generator.answers(asked, self._settings, batch_size=batch_size, base=base)
            self._keep({key: str(answer) for key, answer in zip(chosen, written, strict=True)})
            on_progress(sum(key in self._answers for key in keys), len(keys))
        return [self._answers[key] for key in keys]

    def _keep(self, answers: dict[str, str]) -> None:
        lines = "".join(json.dumps({"prompt": key, "answer": text}, ensure_ascii=False) + "\n" for key, text in answers.items())
        try:
            with open(self._file, "ab") as file:  # a line that a killed process tore is ended by the blank one
                file.write(("\n" + lines if self._torn() else lines).encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(
                "the answers cannot be kept",
                where=str(self._file),
                got=error.strerror,
                mend="make room, or set TUNELOOM_CACHE to a folder that you may write",
            ) from error
        self._answers |= answers

    def _torn(self) -> bool:
        with open(self._file, "rb") as file:
            if not file.seek(0, 2):
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def _read(file: Path) -> dict[str, str]:
    found = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            found[str(row["prompt"])] = str(row["answer"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found
