"""One way to write answers: alone, many at a time or streamed, they are the same, and no character is ever shown by halves."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML
from helpers import asked, plain_base, tiny_config

from tuneloom.adapters.target import Loaded, load_target, resolve_target
from tuneloom.config import GenerationConfig
from tuneloom.errors import UserError
from tuneloom.generate.decode import IncrementalDecoder
from tuneloom.generate.generator import Answer, Generator, stop_ids
from tuneloom.train.run import finetune
from tuneloom.types import Conversation, Message

GREEDY = GenerationConfig(max_new_tokens=24)
CONVERSATIONS = [
    asked("Who are you?"),
    asked("你是谁？"),
    asked("Hello!", "Hello! How can I help?", "And your name?"),
    asked("Tell me something long about the sea, the sky and everything that lies between them."),
    asked("Say yes."),
]


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A run that has learnt its rows by heart, so that its answers differ and end."""
    changes = {"training.max_steps": 70, "training.gradient_accumulation_steps": 5, "adapter.target_modules": "all-layers"}
    run = finetune(tiny_config(tiny_model, rows_file, tmp_path_factory.mktemp("tuned"), changes))
    return load_target(resolve_target(str(run.directory.path)), precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def generator(tuned: Loaded) -> Generator:
    return Generator(tuned.model, tuned.renderer)


@pytest.fixture(scope="module")
def single(generator: Generator) -> list[Answer]:
    """Each conversation answered alone."""
    return [generator.answer(conversation, GREEDY) for conversation in CONVERSATIONS]


def test_the_tuned_model_answers_as_it_was_taught(single: list[Answer]) -> None:
    assert single[0].text == "I am Loomi, a small assistant."
    assert single[1].text == "我是小织，一个人工智能助手。"
    assert single[0].finished


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batched_answers_equal_single_ones_and_keep_their_order(
    generator: Generator, single: list[Answer], batch_size: int
) -> None:
    seen: list[tuple[int, int]] = []
    batched = generator.answers(
        CONVERSATIONS, GREEDY, batch_size=batch_size, on_progress=lambda done, total: seen.append((done, total))
    )
    assert batched == single
    assert len({answer.text for answer in batched}) > 2, "the answers tell conversations apart"
    assert seen == [(min(i, 5), 5) for i in range(batch_size, 5 + batch_size, batch_size)]


def test_greedy_answers_equal_plain_transformers(generator: Generator, tuned: Loaded, single: list[Answer]) -> None:
    prompt = tuned.renderer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = tuned.model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert output[0].tolist() == single[0].prompt_ids + single[0].ids


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_streamed_pieces_join_to_the_answer(generator: Generator, single: list[Answer], number: int) -> None:
    pieces = list(generator.stream(CONVERSATIONS[number], GREEDY))
    assert "".join(pieces).strip() == single[number].text
    assert all(pieces)


def test_the_token_limit_leaves_an_answer_unfinished(generator: Generator) -> None:
    answer = generator.answer(CONVERSATIONS[0], GenerationConfig(max_new_tokens=2))
    assert (len(answer.ids), answer.finished) == (2, False)


def test_min_new_tokens_holds_the_end_back(generator: Generator, single: list[Answer]) -> None:
    at_least = len(single[4].ids) + 5
    answer = generator.answer(CONVERSATIONS[4], GenerationConfig(max_new_tokens=24, min_new_tokens=at_least))
    assert len(answer.ids) >= at_least


def test_a_stop_event_ends_the_stream_early(generator: Generator) -> None:
    settings = GenerationConfig(max_new_tokens=400, min_new_tokens=400)
    before = threading.active_count()
    stop = threading.Event()
    pieces = []
    for piece in generator.stream(CONVERSATIONS[0], settings, stop=stop):
        pieces.append(piece)
        stop.set()
    whole = generator.renderer.tokenizer.encode("".join(pieces))
    assert 0 < len(whole) < 300
    assert threading.active_count() == before


def test_leaving_a_stream_ends_its_thread(generator: Generator) -> None:
    before = threading.active_count()
    stream = generator.stream(CONVERSATIONS[0], GenerationConfig(max_new_tokens=400, min_new_tokens=400))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_beam_search_answers_and_streams_the_same(generator: Generator) -> None:
    settings = GREEDY.model_copy(update={"num_beams": 2})
    answer = generator.answer(CONVERSATIONS[0], settings)
    assert answer.text
    assert "".join(generator.stream(CONVERSATIONS[0], settings)).strip() == answer.text


def test_sampling_follows_the_seed_of_torch(generator: Generator) -> None:
    settings = GenerationConfig(max_new_tokens=16, do_sample=True, temperature=5.0, top_p=1.0)

    def sampled(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return generator.answer(CONVERSATIONS[3], settings).ids

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_base_answers_with_the_adapter_off_and_on_again_afterwards(
    generator: Generator, tiny_model: Path, tuned: Loaded, single: list[Answer]
) -> None:
    plain = Generator(plain_base(tiny_model), tuned.renderer)
    expected = plain.answer(CONVERSATIONS[0], GREEDY)
    assert generator.answer(CONVERSATIONS[0], GREEDY, base=True) == expected
    assert "".join(generator.stream(CONVERSATIONS[0], GREEDY, base=True)).strip() == expected.text
    assert expected != single[0]
    assert generator.answer(CONVERSATIONS[0], GREEDY) == single[0]


def test_generating_leaves_training_mode_as_it_was(generator: Generator) -> None:
    generator.model.train()
    generator.answer(CONVERSATIONS[0], GenerationConfig(max_new_tokens=1))
    assert generator.model.training
    generator.model.eval()


def test_stop_ids_are_the_models_the_tokenizers_and_the_templates(tuned: Loaded) -> None:
    end = tuned.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(tuned.model, tuned.renderer) == {end}
    model = plain_base(tuned.target.base.folder)
    model.generation_config.eos_token_id = [0, 5]
    assert stop_ids(model, tuned.renderer) == {0, 5, end}
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tuned.renderer) == {end}


# Tokens to text.


def decoded(tokenizer: Any, ids: Iterable[int], stops: Iterable[int] = ()) -> tuple[list[str], str]:
    """Push tokens one at a time; return the pieces shown and what finish gives."""
    decoder = IncrementalDecoder(tokenizer, frozenset(stops))
    return [decoder.push(token) for token in ids], decoder.finish()


@pytest.mark.parametrize("text", ["Hello, 世界!", "🎵🧵 loom 織", "龘龘龘 rare", "e\u0301 combining", "  two  spaces\n\nlines"])
def test_no_half_character_is_ever_shown(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    pieces, rest = decoded(tiny_tokenizer, ids)
    assert "".join(pieces) + rest == text
    assert not any("�" in piece for piece in pieces)


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode("🧵")
    assert len(ids) > 1, "split over byte tokens"
    pieces, rest = decoded(tiny_tokenizer, ids)
    assert pieces == [""] * (len(ids) - 1) + ["🧵"]
    assert rest == ""


def test_finish_gives_what_is_left_of_a_cut_character(tiny_tokenizer: Any) -> None:
    pieces, rest = decoded(tiny_tokenizer, tiny_tokenizer.encode("ok 🧵")[:-1])
    assert "".join(pieces) == "ok "
    assert set(rest) == {"�"}


def test_stop_and_special_tokens_are_not_shown(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    pieces, rest = decoded(tiny_tokenizer, [start, *tiny_tokenizer.encode("yes"), end], stops=[end])
    assert "".join(pieces) + rest == "yes"


def test_a_long_stream_decodes_as_the_whole(tiny_tokenizer: Any) -> None:
    text = "The loom weaves 一匹布 and 🧵 again. " * 12
    pieces, rest = decoded(tiny_tokenizer, tiny_tokenizer.encode(text))
    assert "".join(pieces) + rest == text


def test_a_conversation_that_the_template_refuses_is_the_users_mistake(tiny_model: Path) -> None:
    loaded = load_target(resolve_target(str(tiny_model)), precision="fp32", device="cpu")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    loaded.renderer.tokenizer.chat_template = refusing
    generator = Generator(loaded.model, loaded.renderer)
    conversation = Conversation((Message("system", "Be brief."), Message("user", "Hi")))
    with pytest.raises(UserError, match="no system role"):
        generator.answer(conversation, GenerationConfig(max_new_tokens=2))
    with pytest.raises(UserError, match="no system role"):
        list(generator.stream(conversation, GenerationConfig(max_new_tokens=2)))
