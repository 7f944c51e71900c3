"""A conversation becomes token ids and label mask together; what people write never becomes a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import CHATML, SPECIALS, corpus, make_tokenizer
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tuneloom.data.render import Renderer
from tuneloom.data.row import RowError
from tuneloom.errors import UserError
from tuneloom.types import Conversation, Message, Rendered, TrainOn, text_messages

END, START = "<|im_end|>", "<|im_start|>"
TOOLS = CHATML.replace("{% for", "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for", 1)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
FORGETS = CHATML.replace("message['content']", "(message['content'] if loop.last or message.role == 'user' else '')")


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


@pytest.fixture(scope="module")
def with_template() -> Callable[[str], Renderer]:
    """Return a renderer of a small tokenizer with another chat template."""
    tokenizer = make_tokenizer(vocab_size=300)

    def make(template: str) -> Renderer:
        tokenizer.chat_template = template
        return Renderer(tokenizer)

    return make


def talk(*said: str, system: str | None = None) -> Conversation:
    pairs: list[Any] = [(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    return Conversation(text_messages([("system", system), *pairs] if system is not None else pairs))  # type: ignore[list-item]


def chatml(conversation: Conversation) -> str:
    """What the template writes, by hand."""
    return "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in conversation.messages)


def supervised(renderer: Renderer, rendered: Rendered) -> str:
    return str(renderer.tokenizer.decode([i for i, on in zip(rendered.ids, rendered.mask, strict=True) if on]))


def as_tokenizer(renderer: Renderer, conversation: Conversation) -> list[int]:
    ids = renderer.tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=True, return_dict=False)
    return list(ids)


# Golden ids, of a tokenizer without merges: three special tokens, then one token a byte ("!" is 3, "u" is 87, line end 201).

USER, ASSISTANT, SYSTEM = [87, 85, 71, 84], [67, 85, 85, 75, 85, 86, 67, 80, 86], [85, 91, 85, 86, 71, 79]
GOLDEN = [
    (
        talk("Hi", "Yo."),
        [1, *USER, 201, 42, 75, 2, 201, 1, *ASSISTANT, 201, 59, 81, 16, 2, 201],
        [(21, 25)],
    ),
    (
        talk("你", "好", "?", "!", system="s"),
        [
            *[1, *SYSTEM, 201, 85, 2, 201, 1, *USER, 201, 163, 124, 257, 2, 201, 1, *ASSISTANT, 201, 164, 101, 124, 2, 201],
            *[1, *USER, 201, 33, 2, 201, 1, *ASSISTANT, 201, 3, 2, 201],
        ],
        [(33, 37), (58, 60)],
    ),
]


@pytest.mark.parametrize(("conversation", "ids", "spans"), GOLDEN)
def test_golden_ids_and_mask(conversation: Conversation, ids: list[int], spans: list[tuple[int, int]]) -> None:
    tokenizer = make_tokenizer(vocab_size=259)
    assert len(tokenizer) == 259
    rendered = Renderer(tokenizer).render(conversation)
    assert rendered.ids == ids
    assert rendered.mask == [any(start <= t < end for start, end in spans) for t in range(len(ids))]


# Ids and mask.


def test_ids_are_the_tokenizers_own(renderer: Renderer) -> None:
    for conversation in (
        talk("Who are you?", "I am Loomi."),
        talk("你是谁？", "我是小织 🎵。", "Really?", "  Yes,\n\nreally. ", system="Be\tbrief.\n"),
        talk("", "-"),
    ):
        assert renderer.render(conversation).ids == as_tokenizer(renderer, conversation)
        assert renderer.tokenizer.decode(renderer.render(conversation).ids) == chatml(conversation)


def test_supervised_are_the_answers_and_their_end_tokens_alone(renderer: Renderer) -> None:
    conversation = talk("q1", "first answer", "q2", "second answer", system="s")
    assert supervised(renderer, renderer.render(conversation)) == f"first answer{END}second answer{END}"
    assert supervised(renderer, renderer.render(talk("q", "a"))) == f"a{END}"


def test_last_assistant_supervises_the_last_answer_only(renderer: Renderer) -> None:
    rendered = renderer.render(talk("q1", "first", "q2", "second"), TrainOn.LAST_ASSISTANT)
    assert supervised(renderer, rendered) == f"second{END}"


def test_all_supervises_everything_but_the_first_token(renderer: Renderer) -> None:
    rendered = renderer.render(talk("q", "a", system="s"), TrainOn.ALL)
    assert rendered.mask == [False] + [True] * (len(rendered.ids) - 1)


def test_weight_0_keeps_a_message_out_of_the_loss(renderer: Renderer) -> None:
    messages = (Message("user", "q1"), Message("assistant", "bad", 0), Message("user", "q2"), Message("assistant", "good"))
    rendered = renderer.render(Conversation(messages))
    assert supervised(renderer, rendered) == f"good{END}"
    assert rendered.ids == renderer.render(talk("q1", "bad", "q2", "good")).ids


def test_each_turn_begins_where_the_generation_prompt_ends(renderer: Renderer) -> None:
    conversation = talk("q1", "first", "q2", "second", system="s")
    layout = renderer.layout(conversation)
    assert [turn.message for turn in layout.turns] == [2, 4]
    for turn in layout.turns:
        prompt = renderer.prompt_ids(Conversation(conversation.messages[: turn.message]))
        assert layout.ids[: turn.start] == prompt
        assert layout.ids[turn.end - 1] == renderer.turn_end_id == renderer.tokenizer.eos_token_id


def test_a_template_without_an_end_token_has_no_turn_end(with_template: Callable[[str], Renderer]) -> None:
    says = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    renderer = with_template(says + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert renderer.turn_end_id is None
    assert supervised(renderer, renderer.render(talk("q", "yes"))) == f"yes\n{END}", "the eos token, appended"


def test_tools_reach_the_template(with_template: Callable[[str], Renderer]) -> None:
    conversation = Conversation(talk("q", "a").messages, None, ({"name": "weather", "days": [1, 2.5, None, True]},))
    text = with_template(TOOLS).text(conversation)
    assert json.loads(text.split("\n")[1].removesuffix(END)) == [{"name": "weather", "days": [1, 2.5, None, True]}]
    assert "system" not in with_template(TOOLS).text(talk("q", "a"))


# Content is content.

TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")  # what the data's formats let through
PIECES = st.sampled_from(
    [*SPECIALS, "<|im_", "end|>", "<|", "user\n", " ", "\n", "\U000f0000", "\U000f0001", "\U000f0003", "a", "你"]
)
CONTENT = st.lists(PIECES | st.text(TEXT, max_size=6), max_size=6).map("".join)


def num_special(renderer: Renderer, ids: list[int]) -> int:
    special = set(renderer.tokenizer.convert_tokens_to_ids(list(SPECIALS)))
    assert special == {0, 1, 2}
    return sum(i in special for i in ids)


def starts_blank(text: str) -> bool:
    return text[:1].isspace()


@given(question=CONTENT, answer=CONTENT, system=CONTENT)
@example(question=END, answer=f"x{END}\n{START}user\nhi", system=START)
@example(question=f"<|im_{END}end|>", answer="\U000f0000\U000f0001\U000f0002", system="\U000f0000")
def test_no_content_becomes_a_special_token(renderer: Renderer, question: str, answer: str, system: str) -> None:
    assume(not starts_blank(answer))
    conversation = talk(question, answer, system=system)
    rendered = renderer.render(conversation)
    assert num_special(renderer, rendered.ids) == 2 * 3, "start and end of three messages"
    assert renderer.tokenizer.decode(rendered.ids) == chatml(conversation)


@given(said=st.lists(st.text(TEXT, min_size=1, max_size=12), min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0))
@example(said=["\r\n\t", "x\x01y\ufeff"])
def test_ordinary_content_has_the_tokenizers_own_ids(renderer: Renderer, said: list[str]) -> None:
    assume(not any(starts_blank(answer) for answer in said[1::2]))
    conversation = talk(*said)
    assert renderer.render(conversation).ids == as_tokenizer(renderer, conversation)


@given(said=st.lists(CONTENT.map(str.strip).filter(bool), min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0))
def test_supervised_tokens_decode_to_the_answers(renderer: Renderer, said: list[str]) -> None:
    rendered = renderer.render(talk(*said))
    assert supervised(renderer, rendered) == "".join(answer + END for answer in said[1::2])


@given(answer=st.builds("".join, st.tuples(st.sampled_from([" ", "\n", "\t", "\u3000", "\r\n"]), CONTENT)))
def test_an_answer_that_starts_blank_is_rendered_right_or_refused(renderer: Renderer, answer: str) -> None:
    try:
        rendered = renderer.render(talk("q", answer))
    except RowError as error:
        assert error.reason == "the chat template is not prefix-stable here"
        assert error.mend.startswith("take off blank space")
    else:
        assert supervised(renderer, rendered) == answer + END


def test_the_renderers_own_anchor_is_refused_in_content(renderer: Renderer) -> None:
    with pytest.raises(RowError, match="text that only a special token can write"):
        renderer.render(talk("x\x00\x01\x00y", "a"))


def test_a_tool_never_becomes_a_special_token(with_template: Callable[[str], Renderer]) -> None:
    renderer = with_template(TOOLS)
    conversation = Conversation(talk("q", "a").messages, None, ({"name": END, "deep": [{START: "\U000f0000"}]},))
    ids = renderer.render(conversation).ids
    assert num_special(renderer, ids) == 2 * 3
    assert json.dumps(list(conversation.tools), ensure_ascii=False) in renderer.tokenizer.decode(ids)


def test_text_that_only_a_special_token_can_write_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [(chr(code), -5.0) for code in range(10, 127)]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("▁", -2.0), *letters], 0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}assistant:"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant:", "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = Renderer(tokenizer)
    assert renderer.render(talk("q 你", "a")).ids.count(tokenizer.eos_token_id) == 2
    with pytest.raises(RowError, match="text that only a special token can write"):
        renderer.render(talk("what is </s>?", "a"))


# Other tokenizers.


def metaspace(scheme: str) -> Renderer:
    """A tokenizer that marks blanks and the text's start, as those born in sentencepiece do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [chr(code) for code in range(10, 127)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus()[:400], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=SPECIALS[0])
    tokenizer.chat_template = CHATML
    return Renderer(tokenizer)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_marks_the_texts_start_does_as_in_the_whole(scheme: str) -> None:
    renderer = metaspace(scheme)
    for said in (("Who are you?", "I am Loomi."), (" x  y", "b", "next", "done"), ("a", "I am\n a b")):
        assert renderer.render(talk(*said)).ids == as_tokenizer(renderer, talk(*said))
    smuggling = renderer.render(talk(f"a{END}b", f"I am {END}"))
    assert num_special(renderer, smuggling.ids) == 2 * 2
    assert supervised(renderer, smuggling) == f"I am {END}{END}"
    longer = renderer.render(talk(f"a{END}b", "I am"))
    assert longer.ids[:5] == smuggling.ids[:5]


def changed(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Renderer:
    """Return a renderer of the tokenizer with its state changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    other.chat_template = CHATML
    return Renderer(other)


@pytest.mark.parametrize("strips", [{"rstrip": True}, {"lstrip": True}, {"rstrip": True, "lstrip": True}])
@pytest.mark.parametrize("which", [[END], [START], [START, END], list(SPECIALS)])
def test_tokens_that_take_the_blanks_beside_them_do_as_in_the_whole(
    tiny_tokenizer: Any, strips: dict[str, bool], which: list[str]
) -> None:
    def strip(state: dict[str, Any]) -> None:
        for token in state["added_tokens"]:
            token.update(strips if token["content"] in which else {})

    renderer = changed(tiny_tokenizer, strip)
    for said in (("Hi there ", "Yo \n", "x", "y"), (" \n", "a  b")):
        assert renderer.render(talk(*said)).ids == as_tokenizer(renderer, talk(*said))


def test_an_answer_that_grows_into_the_prompts_last_token_is_refused(tiny_tokenizer: Any) -> None:
    def join_line_ends(state: dict[str, Any]) -> None:
        state["model"]["vocab"]["ĊĊ"] = len(state["model"]["vocab"])
        state["model"]["merges"].append(["Ċ", "Ċ"])

    renderer = changed(tiny_tokenizer, join_line_ends)
    assert supervised(renderer, renderer.render(talk("q", "x\n\n\ny"))) == f"x\n\n\ny{END}"
    with pytest.raises(RowError, match="not prefix-stable") as caught:
        renderer.render(talk("q", "\n\nx"))
    assert re.search(r'token \d+: "\\n" alone, "\\n\\n" in the whole', caught.value.value)


# Templates that cannot be trained on.


def test_no_chat_template_is_told() -> None:
    tokenizer = make_tokenizer(vocab_size=300)
    for nothing in (None, ""):
        tokenizer.chat_template = nothing
        with pytest.raises(UserError, match="the model has no chat template") as caught:
            Renderer(tokenizer)
        assert "chat_template.jinja" in (caught.value.mend or "")


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("{{ messages | length }}" + CHATML, 'not prefix-stable here: token 0: "1" alone, "2" in the whole'),
        ("{{ raise_exception('not today') }}", "the chat template refuses it: not today"),
        ("{% if %}", "the chat template refuses it"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "the chat template refuses it"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(999999999) %}x{% endfor %}", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("the same for everybody", "the chat template does not write the answer"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_told(
    with_template: Callable[[str], Renderer], template: str, got: str
) -> None:
    with pytest.raises(UserError, match="chat template cannot be trained on") as caught:
        with_template(template)
    assert got in (caught.value.got or "")
    assert len(caught.value.message().splitlines()) <= 6


def test_a_template_too_large_is_told(with_template: Callable[[str], Renderer]) -> None:
    with pytest.raises(UserError, match="too large"):
        with_template(CHATML + " " * 200_000)


def test_a_template_that_forgets_earlier_answers_refuses_such_conversations(with_template: Callable[[str], Renderer]) -> None:
    renderer = with_template(FORGETS)
    assert supervised(renderer, renderer.render(talk("q", "once"))) == f"once{END}"
    with pytest.raises(RowError, match="not prefix-stable") as caught:
        renderer.render(talk("q", "once", "q2", "twice"))
    assert caught.value.field == "message 2"
    assert re.search(r'token \d+: ".+" alone, "<\|im_end\|>" in the whole', caught.value.value)


def test_what_a_template_refuses_is_a_row_error_in_its_own_words(with_template: Callable[[str], Renderer]) -> None:
    renderer = with_template(REFUSES_SYSTEM)
    assert renderer.render(talk("q", "a")).ids
    with pytest.raises(RowError, match="the chat template refuses it") as caught:
        renderer.render(talk("q", "a", system="s"))
    assert caught.value.value == "no system role"
