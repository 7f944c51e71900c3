"""Answers from a model: one, many at a time, or streamed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Stream
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tuneloom.config import GenerationConfig
from tuneloom.data.formats import check_text
from tuneloom.data.render import Renderer
from tuneloom.data.row import RowError
from tuneloom.errors import UserError
from tuneloom.generate.decode import GlmDecoder, IncrementalDecoder, glm_tokens, read_answer
from tuneloom.types import Conversation, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: decoded, special tokens and calls left out.
        prompt_ids, ids: tokens given and written (the stop token included where it was written).
        finished: whether it ended by itself rather than by max_new_tokens.
        tool_calls: functions that it calls; only a GLM's are read, any other model's stand in the text.
    """

    text: str
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    tool_calls: tuple[ToolCall, ...] = ()

    def __str__(self) -> str:
        """Return text and calls, a line each."""
        return "\n".join(filter(None, [self.text, *map(str, self.tool_calls)]))


class Generator:
    """Writes answers with one model.

    Args:
        model: a causal LM, with a PEFT adapter or without.
        renderer: of the model's tokenizer.
    """

    def __init__(self, model: PreTrainedModel, renderer: Renderer) -> None:
        self.model = model
        self.renderer = renderer
        self.stop_ids = stop_ids(model, renderer)
        glm = glm_tokens(renderer.tokenizer)
        self._assistant_id = glm[0] if glm else None

    def answer(self, conversation: Conversation, settings: GenerationConfig, *, base: bool = False) -> Answer:
        """Answer one conversation; `base`: with the adapter off."""
        return self.answers([conversation], settings, base=base)[0]

    def answers(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationConfig,
        *,
        batch_size: int = 8,
        base: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answer many conversations, in batches of like length; the result is in their order.

        Args:
            conversations: each ends with the message to answer.
            settings: how to write.
            batch_size: conversations at a time.
            base: with the adapter off.
            on_progress: called with (done, all) after each batch.
        """
        prompts = [self._prompt(conversation) for conversation in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        found: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, answer in zip(chosen, self._batch([prompts[i] for i in chosen], settings, base), strict=True):
                found[i] = answer
            if on_progress:
                on_progress(len(found), len(order))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        conversation: Conversation,
        settings: GenerationConfig,
        *,
        base: bool = False,
        stop: threading.Event | None = None,
    ) -> Stream[str, None, Answer]:
        """Yield the answer's text as it is written, whole characters only, and return the answer.

        Args:
            conversation: ends with the message to answer.
            settings: how to write.
            base: with the adapter off.
            stop: set it to end early (beam search, which is certain of nothing before its end, goes on).
        """
        if settings.num_beams > 1:
            answer = self.answer(conversation, settings, base=base)
            if answer.text:
                yield answer.text
            return answer
        prompt = self._prompt(conversation)
        stop = stop or threading.Event()
        pipe = _Pipe(stop)
        failure: list[BaseException] = []

        def write() -> None:
            try:
                with self._adapter_off(base):
                    self._generate([prompt], settings, streamer=pipe, stopping_criteria=[pipe.should_stop])
            except BaseException as error:  # raised again in the reader's thread
                failure.append(error)
            finally:
                pipe.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        decoder = self._decoder()
        ids: list[int] = []
        try:
            for token in pipe:
                ids.append(token)
                if text := decoder.push(token):
                    yield text
            if text := decoder.finish():
                yield text
        finally:
            stop.set()
            writer.join()
        if failure:
            raise failure[0]
        return self._read(prompt, ids)

    def _decoder(self) -> IncrementalDecoder | GlmDecoder:
        tokenizer = self.renderer.tokenizer
        if self._assistant_id is None:
            return IncrementalDecoder(tokenizer, self.stop_ids)
        return GlmDecoder(tokenizer, self.stop_ids, self._assistant_id)

    def _read(self, prompt: list[int], ids: list[int]) -> Answer:
        """Return the answer that was written, less what is behind its end."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        text, calls = read_answer(self.renderer.tokenizer, ids[:end], self._assistant_id)
        return Answer(text, prompt, ids if end is None else ids[: end + 1], end is not None, calls)

    def _prompt(self, conversation: Conversation) -> list[int]:
        """Return a conversation's prompt.

        Raises:
            UserError: the model's chat template refuses it, a system message say.
        """
        try:
            for message in conversation.messages:
                check_text(message.content, message.role)
            return self.renderer.prompt_ids(conversation)
        except RowError as error:
            raise UserError(
                "the model cannot be asked this",
                where=str(conversation.location) if conversation.location else None,
                got=f"{error.reason}: {error.value}",
                mend=error.mend,
            ) from error

    def _batch(self, prompts: list[list[int]], settings: GenerationConfig, base: bool) -> list[Answer]:
        with self._adapter_off(base):
            output_BT = self._generate(prompts, settings)
        width = max(map(len, prompts))
        rows = zip(prompts, output_BT[:, width:].tolist(), strict=True)
        return [self._read(prompt, row) for prompt, row in rows]

    def _generate(self, prompts: list[list[int]], settings: GenerationConfig, **extra: Any) -> torch.Tensor:
        """Run transformers' generate on left-padded prompts."""
        from transformers import GenerationConfig as HfGenerationConfig

        sampling: dict[str, Any] = {}
        if settings.do_sample:
            sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        pad = self.renderer.tokenizer.pad_token_id
        config = HfGenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or None,
            do_sample=settings.do_sample,
            num_beams=settings.num_beams,
            repetition_penalty=settings.repetition_penalty,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=pad if pad is not None else min(self.stop_ids, default=0),
            **sampling,
        )
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in prompts], device=self.model.device)
        attention_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                output: torch.Tensor = self.model.generate(
                    input_ids=ids_BT, attention_mask=attention_BT, generation_config=config, **extra
                )
        finally:
            self.model.train(training)
        return output

    def _adapter_off(self, base: bool) -> contextlib.AbstractContextManager[Any]:
        disable = getattr(self.model, "disable_adapter", None)
        if base and disable and self.model.peft_config["default"].bias != "none":
            raise UserError(
                "the base cannot be shown with this adapter off",
                where="adapter.bias",
                got="biases that were trained with it stay",
                mend="talk to the base model itself",
            )
        return disable() if base and disable else contextlib.nullcontext()


def stop_ids(model: PreTrainedModel, renderer: Renderer) -> frozenset[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's and the template's own, and a GLM's other roles."""
    glm = glm_tokens(renderer.tokenizer)
    found: set[int] = set(glm[1]) if glm else set()
    for value in (model.generation_config.eos_token_id, renderer.tokenizer.eos_token_id, renderer.turn_end_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


class _Pipe:
    """Carries tokens from generate's thread to the reader's, one at a time."""

    def __init__(self, stop: threading.Event) -> None:
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stop = stop
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take what generate gives: the prompt first, then a token a call."""
        if self._prompt_seen:
            for token in value.reshape(-1).tolist():
                self._tokens.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        """Mark the end; generate calls it too, and once more does no harm."""
        self._tokens.put(None)

    def should_stop(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Tell generate to end every sequence once the reader has asked for it."""
        del scores
        return torch.full((input_ids.shape[0],), self._stop.is_set(), device=input_ids.device)

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            yield token
