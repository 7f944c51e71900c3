"""Chat templates of the model families: text, ids and label mask, tools, weights, and where they cannot be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneloom.data.render import Layout, Renderer
from tuneloom.data.row import RowError
from tuneloom.errors import UserError
from tuneloom.types import Conversation, Message, Rendered, ToolCall, TrainOn

TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")  # fmt: skip
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GEMMA = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
IM_END, EOT, EOS = "<|im_end|>", "<|eot_id|>", "</s>"


@dataclass(frozen=True)
class Family:
    """A template, the tokens that it is written with, and how an answer stands between the prompt and the turn's end."""

    specials: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    before: str = ""
    plain: tuple[str, ...] = ()
    turn_end: bool = True
    stable: bool = True
    """Whether a conversation with a system message and two questions can be trained on in all its answers."""


FAMILIES = {
    "smollm2": Family(QWEN, IM_END, IM_END),
    "llama3": Family(LLAMA, EOT, EOT, "<|begin_of_text|>"),
    "llama3_1": Family(LLAMA, EOT, EOT, "<|begin_of_text|>"),
    "qwen2": Family(QWEN, IM_END, IM_END),
    "qwen2_5": Family(QWEN, IM_END, IM_END, plain=("<tool_call>", "</tool_call>")),
    "qwen3": Family(QWEN, IM_END, IM_END, before="<think>\n\n</think>\n\n", stable=False,
                    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")),
    "gemma3": Family(GEMMA, "<eos>", "<end_of_turn>", "<bos>"),
    "glm4": Family(GLM, "<|endoftext|>", "<|endoftext|>", before="\n", turn_end=False),
    "mistral_v3": Family(MISTRAL, EOS, EOS, "<s>", before=" ", stable=False),
    "mistral_v7": Family(MISTRAL, EOS, EOS, "<s>"),
}  # fmt: skip
ALL_OF_THEM = pytest.mark.parametrize("name", FAMILIES)
STABLE = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.stable])


def template_of(name: str) -> str:
    """A family's published template as the `trl` package ships it; our own in the family's format where it does not."""
    published = PUBLISHED / f"{name}.jinja"
    return (published if published.is_file() else TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def of(name: str) -> Renderer:
    """A renderer of a family's template, on a small tokenizer with the family's special tokens."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(template_of(name), family.specials, family.eos, len(family.specials) + 300)
    tokenizer.add_tokens(list(family.plain))
    if family.bos is not None:
        tokenizer.bos_token = family.bos
    return Renderer(tokenizer)


def talk(*said: str, system: str | None = None) -> Conversation:
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]  # type: ignore[arg-type]
    return Conversation(tuple(messages if system is None else [Message("system", system), *messages]))


def weighted(conversation: Conversation, *weights: int) -> Conversation:
    given = iter(weights)
    messages = tuple(replace(m, weight=next(given)) if m.role == "assistant" else m for m in conversation.messages)
    return replace(conversation, messages=messages)


def supervised(renderer: Renderer, rendered: Rendered) -> str:
    return str(renderer.tokenizer.decode([i for i, on in zip(rendered.ids, rendered.mask, strict=True) if on]))


def template_text(renderer: Renderer, conversation: Conversation) -> str:
    tools = list(conversation.tools) or None
    return str(renderer.tokenizer.apply_chat_template(conversation.as_dicts(), tools=tools, tokenize=False))


FOUR = talk("Who are you?", "I am Loomi.", "Really?", "Yes, 真的。", system="Be brief.")


# What each family writes.

CHATML_FOUR = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am Loomi.<|im_end|>\n"
    "<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n{}Yes, 真的。<|im_end|>\n"
)
LLAMA_FOUR = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}Be brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nI am Loomi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nReally?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes, 真的。<|eot_id|>"
)
TEXTS = {
    "smollm2": CHATML_FOUR.format(""),
    "llama3": LLAMA_FOUR.format(""),
    "llama3_1": LLAMA_FOUR.format("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    "qwen2": CHATML_FOUR.format(""),
    "qwen2_5": CHATML_FOUR.format(""),
    "qwen3": CHATML_FOUR.format("<think>\n\n</think>\n\n"),
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    "I am Loomi.<end_of_turn>\n"
    "<start_of_turn>user\nReally?<end_of_turn>\n<start_of_turn>model\nYes, 真的。<end_of_turn>\n",
    "glm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWho are you?<|assistant|>\nI am Loomi.<|user|>\nReally?<|assistant|>"
    "\nYes, 真的。",
    "mistral_v3": "<s>[INST] Who are you?[/INST] I am Loomi.</s>[INST] Be brief.\n\nReally?[/INST] Yes, 真的。</s>",
    "mistral_v7": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Who are you?[/INST]I am Loomi.</s>"
    "[INST]Really?[/INST]Yes, 真的。</s>",
}


@ALL_OF_THEM
def test_the_text_is_the_templates_and_the_ids_are_the_tokenizers_own(name: str) -> None:
    renderer = of(name)
    text = template_text(renderer, FOUR)
    assert renderer.text(FOUR) == text == TEXTS[name]
    for conversation in (FOUR, talk("Who are you?", "  I am\n\nLoomi. "), talk("q", "- x", system=" s ")):
        own = renderer.tokenizer(template_text(renderer, conversation), add_special_tokens=False).input_ids
        appended = [] if FAMILIES[name].turn_end else [renderer.tokenizer.eos_token_id]
        assert renderer.render(conversation, TrainOn.ALL).ids == own + appended


@ALL_OF_THEM
def test_the_prompt_ends_where_the_answer_begins(name: str) -> None:
    renderer = of(name)
    asked = Conversation(FOUR.messages[:-1])
    [turn] = renderer.layout(FOUR, TrainOn.LAST_ASSISTANT).turns
    ids = renderer.layout(FOUR, TrainOn.LAST_ASSISTANT).ids
    assert renderer.prompt_ids(asked) == ids[: turn.start]
    family = FAMILIES[name]
    assert renderer.tokenizer.decode(ids[turn.start :]).rstrip("\n") == f"{family.before}Yes, 真的。{family.end}"
    token = renderer.tokenizer.convert_tokens_to_ids(family.end)
    assert renderer.turn_end_id == (token if family.turn_end else None)


# What is supervised.


@STABLE
def test_answers_and_their_ends_are_supervised_alone(name: str) -> None:
    renderer, family = of(name), FAMILIES[name]
    first, last = (f"{family.before}{answer}{family.end}" for answer in ("I am Loomi.", "Yes, 真的。"))
    if not family.turn_end:
        first = first.removesuffix(family.end)
    assert supervised(renderer, renderer.render(FOUR)) == first + last
    assert supervised(renderer, renderer.render(weighted(FOUR, 0, 1))) == last
    assert supervised(renderer, renderer.render(weighted(FOUR, 1, 0))) == first
    assert renderer.render(weighted(FOUR, 0, 1)).ids == renderer.render(FOUR).ids
    assert [turn.message for turn in renderer.layout(weighted(FOUR, 0, 1)).turns] == [4]


@ALL_OF_THEM
def test_the_last_answer_alone_can_be_supervised_of_every_family(name: str) -> None:
    renderer, family = of(name), FAMILIES[name]
    last = f"{family.before}Yes, 真的。{family.end}"
    assert supervised(renderer, renderer.render(FOUR, TrainOn.LAST_ASSISTANT)) == last
    assert supervised(renderer, renderer.render(weighted(FOUR, 0, 1))) == last, "turns of weight 0 need not be stable"
    assert not any(renderer.render(weighted(FOUR, 1, 0), TrainOn.LAST_ASSISTANT).mask)


@ALL_OF_THEM
def test_all_supervises_all_but_the_first_and_gives_the_turns_that_can_be_had(name: str) -> None:
    renderer = of(name)
    rendered, layout = renderer.render(FOUR, TrainOn.ALL), renderer.layout(FOUR, TrainOn.ALL)
    assert rendered.mask == [False] + [True] * (len(rendered.ids) - 1)
    assert [turn.message for turn in layout.turns] == ([2, 4] if FAMILIES[name].stable else [4])
    if FAMILIES[name].stable:
        assert layout == renderer.layout(FOUR)
    for turn in layout.turns:
        text = renderer.tokenizer.decode(layout.ids[: turn.end])
        assert text.removesuffix(FAMILIES[name].end).endswith(FOUR.messages[turn.message].content)


def first_difference(name: str, conversation: Conversation) -> str:
    with pytest.raises(RowError, match="the chat template is not prefix-stable here") as caught:
        of(name).render(conversation)
    assert caught.value.field.startswith("message ")
    assert caught.value.mend.startswith("train on the last answer only (train_on: last_assistant)")
    said = re.fullmatch(r"token \d+: (.+)", caught.value.value)
    assert said
    return said[1]


WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


def test_what_is_not_prefix_stable_is_refused_by_its_first_differing_token() -> None:
    assert first_difference("qwen3", FOUR) == '"<think>" alone, "I" in the whole'
    assert first_difference("mistral_v3", FOUR) == '"B" alone, "W" in the whole'
    with_tools = replace(talk("q1", "a1", "q2", "a2"), tools=(WEATHER,))
    assert first_difference("mistral_v3", with_tools) == '"[AVAILABLE_TOOLS]" alone, "[INST]" in the whole'
    assert first_difference("mistral_v7", replace(with_tools, messages=(Message("system", "s"), *with_tools.messages))) == (
        '"[AVAILABLE_TOOLS]" alone, "[INST]" in the whole'
    )
    for name in ("mistral_v3", "mistral_v7"):
        assert supervised(of(name), of(name).render(with_tools, TrainOn.LAST_ASSISTANT)).strip() == "a2</s>"
    assert supervised(of("qwen3"), of("qwen3").render(talk("q", "a"))) == "<think>\n\n</think>\n\na<|im_end|>"


# Turns that nothing ends.


def test_the_last_turn_that_nothing_ends_gets_the_eos_token_and_the_next_role_token_is_not_supervised() -> None:
    renderer = of("glm4")
    rendered = renderer.render(FOUR)
    assert rendered.ids[-1] == renderer.tokenizer.eos_token_id and rendered.mask[-1]
    assert rendered.ids.count(renderer.tokenizer.eos_token_id) == 1
    user = renderer.tokenizer.convert_tokens_to_ids("<|user|>")
    assert [on for i, on in zip(rendered.ids, rendered.mask, strict=True) if i == user] == [False, False]
    assert not renderer.render(weighted(FOUR, 1, 0)).mask[-1]
    assert renderer.prompt_ids(talk("q"))[-1] != renderer.tokenizer.eos_token_id, "a prompt is not ended"


def test_without_an_eos_token_nothing_is_appended() -> None:
    tokenizer = make_tokenizer((TEMPLATES / "glm4.jinja").read_text(encoding="utf-8"), GLM, GLM[0], len(GLM) + 257)
    tokenizer.eos_token = None
    renderer = Renderer(tokenizer)
    assert supervised(renderer, renderer.render(FOUR)) == "\nI am Loomi.\nYes, 真的。"


def test_what_a_template_writes_after_every_conversation_is_no_part_of_an_earlier_turn() -> None:
    always = "{%- if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    tokenizer = make_tokenizer((TEMPLATES / "smollm2.jinja").read_text(encoding="utf-8") + always, QWEN, IM_END, 300)
    renderer = Renderer(tokenizer)
    rendered = renderer.render(FOUR)
    assert supervised(renderer, rendered) == "I am Loomi.<|im_end|>Yes, 真的。<|im_end|>\n<|endoftext|>"
    assert renderer.tokenizer.decode(rendered.ids) == TEXTS["smollm2"] + "<|endoftext|>"


def test_a_template_that_writes_the_date_says_so() -> None:
    assert [name for name in FAMILIES if of(name).depends_on_date] == ["mistral_v7"]
    text = of("mistral_v7").text(talk("q", "a"))
    assert re.match(r"<s>\[SYSTEM_PROMPT\].+ \d{4}-\d\d-\d\d\.\[/SYSTEM_PROMPT\]", text)
    assert supervised(of("mistral_v7"), of("mistral_v7").render(talk("q", "a"))) == "a</s>"


# Tools.

CALLS = Conversation(
    (
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "北京"}', "call12345"),)),
        Message("tool", "sunny", name="weather", tool_call_id="call12345"),
        Message("assistant", "It is sunny."),
    ),
    tools=(WEATHER,),
)
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "北京"}, "id": "call12345"}]</s>'
MISTRAL_RESULT = '[TOOL_RESULTS] {"content": sunny, "call_id": "call12345"}[/TOOL_RESULTS]'
# (supervised text, text of the tool's result)
TOOL_TEXTS = {
    "llama3_1": ('{"name": "weather", "parameters": {"city": "北京"}}<|eot_id|>It is sunny.<|eot_id|>',
                 '<|start_header_id|>ipython<|end_header_id|>\n\n"sunny"<|eot_id|>'),
    "qwen2_5": (f"{HERMES}It is sunny.<|im_end|>", "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"),
    "qwen3": ("<think>\n\n</think>\n\nIt is sunny.<|im_end|>",
              "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"),
    "glm4": ('weather\n{"city": "北京"}\nIt is sunny.<|endoftext|>', "<|observation|>\nsunny<|assistant|>"),
    "mistral_v3": (f"{MISTRAL_CALL} It is sunny.</s>", MISTRAL_RESULT),
    "mistral_v7": (f"{MISTRAL_CALL}It is sunny.</s>", MISTRAL_RESULT),
}  # fmt: skip
WITH_TOOLS = pytest.mark.parametrize("name", TOOL_TEXTS)


@WITH_TOOLS
def test_tools_calls_and_results(name: str) -> None:
    renderer = of(name)
    conversation = weighted(CALLS, 0, 1) if name == "qwen3" else CALLS
    rendered = renderer.render(conversation)
    answers, result = TOOL_TEXTS[name]
    assert supervised(renderer, rendered) == answers
    text = template_text(renderer, conversation)
    assert result in text
    assert '"description": "d"' in text, "the tools stand in the prompt"
    end = "" if FAMILIES[name].turn_end else FAMILIES[name].eos
    assert renderer.tokenizer.decode(rendered.ids) == text + end


def test_a_call_as_the_last_message_is_supervised_and_ended() -> None:
    called = replace(CALLS, messages=CALLS.messages[:2])
    assert supervised(of("qwen3"), of("qwen3").render(called)) == f"<think>\n\n</think>\n\n{HERMES}"
    assert supervised(of("glm4"), of("glm4").render(called)) == 'weather\n{"city": "北京"}<|endoftext|>'


@pytest.mark.parametrize("train_on", TrainOn)
@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2"])
def test_calls_that_the_template_leaves_out_are_refused(name: str, train_on: TrainOn) -> None:
    called = replace(CALLS, messages=CALLS.messages[:2])
    with pytest.raises(RowError, match="the chat template does not write tool calls") as caught:
        of(name).render(called, train_on)
    assert (caught.value.field, caught.value.value) == ("message 2.tool_calls", '"weather"')


def test_what_a_family_does_not_take_is_refused_in_its_own_words() -> None:
    for name, conversation, words in (
        ("gemma3", CALLS, "roles must alternate"),
        ("mistral_v3", replaced_id("call_1"), "tool call ids have 9 characters"),
        ("llama3_1", doubled(CALLS), "only supports single tool-calls"),
    ):
        with pytest.raises(RowError, match="the chat template refuses it") as caught:
            of(name).render(conversation)
        assert words in caught.value.value


def replaced_id(number: str) -> Conversation:
    asked, called, *rest = CALLS.messages
    return replace(CALLS, messages=(asked, replace(called, tool_calls=(replace(called.tool_calls[0], id=number),)), *rest))


def doubled(conversation: Conversation) -> Conversation:
    asked, called, *rest = conversation.messages
    return replace(conversation, messages=(asked, replace(called, tool_calls=called.tool_calls * 2), *rest))


@pytest.mark.parametrize("name", ["qwen2_5", "glm4", "mistral_v3", "mistral_v7"])
def test_several_calls_in_one_message(name: str) -> None:
    renderer = of(name)
    assert supervised(renderer, renderer.render(doubled(CALLS))).count("weather") == 2


# Content is content.


def contents(name: str) -> st.SearchStrategy[str]:
    """Text full of the family's special tokens, with a letter at each end: what a template strips is not the matter here."""
    pieces = st.sampled_from([*FAMILIES[name].specials, "<|", "user\n", " ", '"', "\\", "\U000f0000", "\U000f0001", "a", "你"])
    return st.lists(pieces | st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=3), max_size=5).map(
        lambda parts: "x" + "".join(parts) + "x"
    )


def num_special(renderer: Renderer, ids: Sequence[int]) -> int:
    special = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    assert special
    return sum(i in special for i in ids)


few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@ALL_OF_THEM
@few
@given(data=st.data())
def test_no_content_becomes_a_special_token(name: str, data: st.DataObject) -> None:
    renderer = of(name)
    said = [data.draw(contents(name)) for _ in range(5)]
    conversation = talk(*said[:4], system=said[4])
    rendered = renderer.render(conversation, TrainOn.LAST_ASSISTANT)
    assert num_special(renderer, rendered.ids) == num_special(renderer, renderer.render(FOUR, TrainOn.LAST_ASSISTANT).ids)
    family = FAMILIES[name]
    end = "" if family.turn_end else family.eos
    assert renderer.tokenizer.decode(rendered.ids) == template_text(renderer, conversation) + end
    assert supervised(renderer, rendered) == family.before + said[3] + family.end
    if family.stable:
        first = said[1] + (family.end if family.turn_end else "")
        assert supervised(renderer, renderer.render(conversation)) == family.before + first + supervised(renderer, rendered)


@WITH_TOOLS
@few
@given(data=st.data())
def test_no_tool_call_or_result_becomes_a_special_token(name: str, data: st.DataObject) -> None:
    renderer = of(name)
    tool, city, key, result, described = (data.draw(contents(name)) for _ in range(5))
    asked, called, answered, last = CALLS.messages
    call = ToolCall(tool, json.dumps({key: [city], "n": 1.5}), "call12345")
    messages = (asked, replace(called, tool_calls=(call,)), replace(answered, content=result, name=tool), last)
    function = {"name": tool, "description": described, "parameters": {key: {"enum": [city]}}}
    conversation = weighted(Conversation(messages, None, ({"type": "function", "function": function},)), name != "qwen3", 1)
    rendered = renderer.render(conversation)
    assert num_special(renderer, rendered.ids) == num_special(renderer, renderer.render(weighted(CALLS, 0, 1)).ids)
    end = "" if FAMILIES[name].turn_end else FAMILIES[name].eos
    assert renderer.tokenizer.decode(rendered.ids) == template_text(renderer, conversation) + end


# The proof of a prefix.


def naive_layout(renderer: Renderer, conversation: Conversation) -> list[int]:
    """Return the start of each turn, every prompt encoded wholly and compared."""
    starts = []
    for i in conversation.turns():
        prompt = renderer.prompt_ids(replace(conversation, messages=conversation.messages[:i]))
        assert renderer.render(conversation, TrainOn.ALL).ids[: len(prompt)] == prompt
        starts.append(len(prompt))
    return starts


@STABLE
@few
@given(said=st.lists(st.text(st.sampled_from("ab 你\n<|>"), min_size=1, max_size=9), min_size=4, max_size=4))
def test_turns_start_where_the_whole_prompts_encoding_ends(name: str, said: list[str]) -> None:
    renderer = of(name)
    conversation = talk(*said[:1], f"x{said[1]}", *said[2:3], f"x{said[3]}")
    assert [turn.start for turn in renderer.layout(conversation).turns] == naive_layout(renderer, conversation)


def test_a_layout_serves_the_mask_that_it_was_made_for() -> None:
    renderer = of("smollm2")
    layout: Callable[[TrainOn], Layout] = lambda train_on: renderer.layout(FOUR, train_on)  # noqa: E731
    for train_on in TrainOn:
        assert renderer.mask(FOUR, layout(TrainOn.ASSISTANT), train_on) == renderer.render(FOUR, train_on).mask
    with pytest.raises(KeyError):
        renderer.mask(FOUR, layout(TrainOn.LAST_ASSISTANT), TrainOn.ASSISTANT)


# Every family that `trl` ships a published template of.

_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<turn\|>|\[gMASK\]|<sop>|<(?:bos|s|/s|end_of_utterance)>"
)
KINDS = {
    "one question": (talk("Hi?", "Yes."), TrainOn.ASSISTANT),
    "system": (talk("Hi?", "Yes.", system="Be."), TrainOn.ASSISTANT),
    "several": (FOUR, TrainOn.ASSISTANT),
    "last of several": (FOUR, TrainOn.LAST_ASSISTANT),
    "tools": (CALLS, TrainOn.ASSISTANT),
}
REFUSES, UNSTABLE, NO_CALLS = "refuses it", "is not prefix-stable here", "does not write tool calls"
NOT_TAKEN: dict[str, dict[str, str]] = {
    "cohere": {"tools": REFUSES},
    "cohere2": {"tools": REFUSES},
    "gemma": {"system": REFUSES, "several": REFUSES, "last of several": REFUSES, "tools": REFUSES},
    "gemma3": {"tools": REFUSES},
    "gptoss": {"several": UNSTABLE},
    "lfm2": {"tools": NO_CALLS},
    "llama3": {"tools": NO_CALLS},
    "phi3": {"tools": NO_CALLS},
    "phi3_5": {"tools": NO_CALLS},
    "qwen2_5_vl": {"tools": NO_CALLS},
    "qwen3": {"several": UNSTABLE, "tools": UNSTABLE},
    "qwen3_5_nothink": {"several": UNSTABLE},
    "qwen3_5_think": {"several": UNSTABLE},
    "qwen3_6": {"several": UNSTABLE},
}
"""What a family's template cannot be trained on; everything else of KINDS can."""

NOT_TRAINABLE = {
    "deepseek_r1_distill": UNSTABLE,  # thinking stands in the prompt and is taken out of the answer
    "deepseekv3": UNSTABLE,
    "nemotron_3_5_lightning": UNSTABLE,
    "nemotron_3_nano": UNSTABLE,
    "nemotron_3_super": UNSTABLE,
    "nemotron_3_ultra": UNSTABLE,
    "idefics3": "does not write the answer",  # for images: text must stand in a list
    "llava_next": REFUSES,
    "smolvlm": "does not write the answer",
}


def published_names() -> list[str]:
    return sorted(file.stem for file in PUBLISHED.glob("*.jinja") if not file.stem.endswith("_training"))


def published_tokenizer(name: str) -> Any:
    text = (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")
    specials = tuple(dict.fromkeys(["<pad>", "<eos>", *_SPECIAL.findall(text)]))
    tokenizer = make_tokenizer(text, specials, "<eos>", len(specials) + 280)
    tokenizer.bos_token = "<bos>" if "<bos>" in specials else "<eos>"
    return tokenizer


@pytest.mark.parametrize("name", published_names())
def test_a_published_template_is_taught_as_it_writes_or_refused(name: str) -> None:
    tokenizer = published_tokenizer(name)
    if name in NOT_TRAINABLE:
        with pytest.raises(UserError, match="the model's chat template cannot be trained on") as refused:
            Renderer(tokenizer)
        assert NOT_TRAINABLE[name] in (refused.value.got or "")
        return
    renderer = Renderer(tokenizer)
    for kind, (conversation, train_on) in KINDS.items():
        reason = NOT_TAKEN.get(name, {}).get(kind)
        if reason:
            with pytest.raises(RowError, match=reason):
                renderer.render(conversation, train_on)
            continue
        rendered = renderer.render(conversation, train_on)
        own = tokenizer.encode(template_text(renderer, conversation), add_special_tokens=False)
        assert rendered.ids[: len(own)] == own, "as the tokenizer itself has it"
        assert len(rendered.ids) - len(own) == (renderer.turn_end_id is None), "and eos where nothing ends the turn"
        learnt = supervised(renderer, rendered)
        answers = [m.content for m in conversation.messages if m.role == "assistant" and m.content]
        for answer in answers[-1:] if train_on is TrainOn.LAST_ASSISTANT else answers:
            assert answer in learnt
        assert not any(m.content in learnt for m in conversation.messages if m.role in ("user", "system"))
