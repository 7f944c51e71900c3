"""ChatGLM's tokenizer: the sentencepiece library's ids for any text, and conversations by the model's own rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chatglm import make_tokenizer_folder, training_lines
from conftest import chat_row
from helpers import assert_mendable
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tuneloom.data.formats import parse_row
from tuneloom.data.render import Renderer
from tuneloom.errors import UserError
from tuneloom.models.chatglm.tokenizer import build_tokenizer, chat_stop_ids, special_ids
from tuneloom.models.load import load_tokenizer_folder
from tuneloom.types import Conversation, Location, Message, Role, ToolCall, TrainOn

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
NAMES = (*MARKS, *ROLE_TOKENS, "<unk>", "<s>", "</s>", "sop", "eop")

HAND = (
    "", " ", "  ", "   ", " " * 17, " " * 200, "\n", "\n\n\n", "\t", " \t \n ", "\r\n", "a\n", "\na", " a", "a ", " a  b ",
    "▁", "▁▁", " ▁ ", "a▁b", "▁a", "people", "isopropyl", "sop eop", "你好", "你 好", " 你好 ", "你好。\n再见",
    "🎵", "🧵🪡", "👩‍👩‍👧‍👦", "🇨🇳", "e\u0301", "ก็", "नमस्ते", "שלום", "مرحبا", "𠮷野家", "龘", "ﷺ", "Ⅷ", "ﬁ", "ａｂｃ", "\u3000",
    "\u00a0", "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x01\x7f", "\x1b[0m", "\u2028\u2029", "<0x0A>", "<0xE4>", "</w>",
    *NAMES, "a<|user|>b", "<|user|>\n 你好", "a" * 300, "哈" * 300, "=" * 100, "ab" * 150, "0123456789" * 20, "don't", "C:\\x",
    "\"'`", "{'k': [1, 2.5]}", "```python\nx = 1\n```",
)  # fmt: skip
"""Strings that a tokenizer of this kind may stumble over."""

LINES = sorted({line[:40] for line in training_lines()})
FRAGMENTS = st.one_of(
    st.text(max_size=6),
    st.text(alphabet=" \n\t▁ab哈.", max_size=10),
    st.sampled_from(HAND),
    st.sampled_from(LINES),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=3), st.integers(1, 20)),
)
PER_EXAMPLE, EXAMPLES = 22, 48
assert (PER_EXAMPLE * PER_EXAMPLE + PER_EXAMPLE) * EXAMPLES >= 20_000


@pytest.fixture(scope="session")
def glm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("models") / "chatglm3-6b")


@pytest.fixture(scope="session")
def oracle(glm_folder: Path) -> Any:
    return SentencePieceProcessor(model_file=str(glm_folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def tokenizer(glm_folder: Path) -> Any:
    return load_tokenizer_folder(glm_folder)


@pytest.fixture(scope="session")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def glm_copy(glm_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(glm_folder, tmp_path / "copy")


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts as content, in which no name is a special token."""
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return found


def same_as_oracle(tokenizer: Any, oracle: Any, texts: Sequence[str]) -> None:
    expected = oracle.encode(texts)
    for text, ours, theirs in zip(texts, plain_ids(tokenizer, texts), expected, strict=True):
        assert ours == theirs, repr(text)
    for text, ours, theirs in zip(texts, tokenizer.batch_decode(expected), oracle.decode(expected), strict=True):
        assert ours == theirs, repr(text)


# Text.


def test_hand_picked_strings_have_the_librarys_ids(tokenizer: Any, oracle: Any) -> None:
    same_as_oracle(tokenizer, oracle, [*HAND])
    same_as_oracle(tokenizer, oracle, [a + b for a in HAND for b in HAND])


@settings(max_examples=EXAMPLES)
@given(st.lists(FRAGMENTS, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_any_string_has_the_librarys_ids(tokenizer: Any, oracle: Any, fragments: list[str]) -> None:
    same_as_oracle(tokenizer, oracle, [*fragments, *(a + b for a in fragments for b in fragments)])


def test_decoding_gives_the_text_back(tokenizer: Any) -> None:
    texts = [text for text in HAND if "▁" not in text]
    assert tokenizer.batch_decode(plain_ids(tokenizer, texts)) == texts


def test_words_that_hold_a_marks_name_stay_whole(tokenizer: Any) -> None:
    assert tokenizer.tokenize("people isopropyl") == ["▁people", "▁isopropyl"]


def test_a_plain_text_gets_the_models_prefix(tokenizer: Any, oracle: Any) -> None:
    prefix = [tokenizer.convert_tokens_to_ids(name) for name in ("[gMASK]", "<sop>")]
    assert tokenizer("你好").input_ids == prefix + oracle.encode("你好")
    assert tokenizer("").input_ids == prefix
    assert tokenizer("a", "b").input_ids == [*prefix, *oracle.encode("a"), *oracle.encode("b"), 2]
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_a_batch_is_padded_on_the_left(tokenizer: Any) -> None:
    batch = tokenizer(["a", "你好，今天天气很好。"], padding=True)
    assert batch.input_ids[0][0] == 0 and batch.attention_mask[0][0] == 0
    assert batch.input_ids[0][-1] != 0


def test_ids_of_special_tokens_follow_the_pieces(tokenizer: Any, oracle: Any) -> None:
    count = oracle.vocab_size()
    assert special_ids(64789)["<|observation|>"] == 64797
    assert tokenizer.convert_tokens_to_ids([*MARKS, *ROLE_TOKENS]) == list(range(count, count + 9))
    assert [*special_ids(count)] == [*MARKS, *ROLE_TOKENS]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0, 2, None)
    assert len(tokenizer) == count + 9


def test_decoding_drops_special_tokens_when_asked(tokenizer: Any, renderer: Renderer) -> None:
    ids = [*renderer.prompt_ids(talk(("user", "Hi 你好"))), *tokenizer.encode("Hello", add_special_tokens=False), 2, 1, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "\n Hi 你好 Hello"
    assert tokenizer.decode(ids).startswith("[gMASK]<sop><|user|>")


# Conversations.


def talk(*pairs: tuple[Role, str], tools: Sequence[dict[str, Any]] = ()) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in pairs), tools=tuple(tools))


Turns = Iterable[tuple[str, str, str]]


def by_the_rules(oracle: Any, turns: Turns) -> tuple[list[int], list[bool]]:
    """Ids and labels of turns (role, metadata, content), each text encoded on its own by the sentencepiece library."""
    number = special_ids(oracle.vocab_size())
    ids, mask, taught = [number["[gMASK]"], number["<sop>"]], [False, False], False
    for role, metadata, content in turns:
        ids.append(number[f"<|{role}|>"])
        mask.append(taught)
        texts = oracle.encode(metadata + "\n") + oracle.encode(content)
        taught = role == "assistant"
        ids += texts
        mask += [taught] * len(texts)
    return ([*ids, 2], [*mask, True]) if taught else (ids, mask)


def test_the_example_of_the_format(renderer: Renderer, oracle: Any) -> None:
    number = special_ids(oracle.vocab_size())
    blank = oracle.piece_to_id("▁")
    assert renderer.prompt_ids(talk(("system", "You are helpful."), ("user", "你好"))) == [
        number["[gMASK]"], number["<sop>"],
        number["<|system|>"], blank, 13, *oracle.encode("You are helpful."),
        number["<|user|>"], blank, 13, *oracle.encode("你好"),
        number["<|assistant|>"],
    ]  # fmt: skip


CONTENT = FRAGMENTS.map(lambda text: text.replace("\x00", ""))
TALKS = st.tuples(
    st.lists(st.tuples(st.just("system"), CONTENT), max_size=1),
    st.lists(st.tuples(st.sampled_from(["user", "user", "assistant", "tool"]), CONTENT), max_size=4),
    CONTENT,
    CONTENT,
).map(lambda parts: [*parts[0], *parts[1], ("user", parts[2]), ("assistant", parts[3])])


@given(TALKS)
def test_any_conversation_has_the_ids_and_labels_of_the_rules(
    renderer: Renderer, oracle: Any, pairs: list[tuple[Role, str]]
) -> None:
    turns = [("observation" if role == "tool" else role, "", text) for role, text in pairs]
    rendered = renderer.render(talk(*pairs))
    assert (rendered.ids, rendered.mask) == by_the_rules(oracle, turns)
    asked = renderer.prompt_ids(talk(*pairs[:-1]))
    assert asked == by_the_rules(oracle, turns[:-1])[0] + [special_ids(oracle.vocab_size())["<|assistant|>"]]


@given(st.lists(st.sampled_from([*NAMES, " ", "\n", "x", "你", "<|", "|>"]), min_size=1, max_size=6).map("".join))
def test_no_content_becomes_a_special_token(renderer: Renderer, oracle: Any, text: str) -> None:
    number = special_ids(oracle.vocab_size())
    ids = renderer.render(talk(("system", text), ("user", text), ("tool", text), ("assistant", text))).ids
    roles = [number[name] for name in ("<|system|>", "<|user|>", "<|observation|>", "<|assistant|>")]
    assert [i for i in ids if i >= oracle.vocab_size() or i < 3] == [number["[gMASK]"], number["<sop>"], *roles, 2]


@pytest.mark.parametrize("train_on", TrainOn)
def test_labels_are_what_follows_the_assistants_token_and_the_end_of_the_turn(renderer: Renderer, train_on: TrainOn) -> None:
    rendered = renderer.render(talk(("user", "q"), ("assistant", "你好"), ("user", "r"), ("assistant", "Yes.")), train_on)
    taught = [i for i, on in zip(rendered.ids, rendered.mask, strict=True) if on]
    last = "\n Yes.</s>"
    expected = {
        TrainOn.ASSISTANT: "\n 你好<|user|>" + last,
        TrainOn.LAST_ASSISTANT: last,
        TrainOn.ALL: renderer.tokenizer.decode(rendered.ids).removeprefix("[gMASK]"),
    }
    assert renderer.tokenizer.decode(taught).replace(" \n", "\n") == expected[train_on].replace(" \n", "\n")
    assert rendered.ids[-1] == 2


def test_an_answer_of_weight_0_is_not_learnt_nor_is_its_end(renderer: Renderer, oracle: Any) -> None:
    conversation = Conversation(
        (Message("user", "q"), Message("assistant", "a", weight=0), Message("user", "r"), Message("assistant", "b"))
    )
    rendered = renderer.render(conversation)
    assert rendered.mask.count(True) == len(oracle.encode("\n") + oracle.encode("b")) + 1


# Tools.

WEATHER = {"name": "weather", "description": "天气 of a <|user|>", "parameters": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, {"name": "clock", "description": "the time"}]
DESCRIBED = json.dumps(TOOLS, indent=4, ensure_ascii=False)
CALLED = {
    "conversations": [
        {"role": "user", "content": "北京天气？"},
        {"role": "assistant", "content": "Let me see."},
        {"role": "tool", "name": "weather", "parameters": {"city": "北京", "days": 3}, "observation": '{"t": 21}'},
        {"role": "assistant", "content": "21 度。"},
    ],
    "tools": TOOLS,
}


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_calls_and_observations(renderer: Renderer, oracle: Any, system: str | None) -> None:
    row = json.loads(json.dumps(CALLED))
    if system:
        row["conversations"].insert(0, {"role": "system", "content": system})
    begin = system or "Answer the following questions as best as you can. You have access to the following tools:"
    turns = [
        ("system", "", f"{begin}\n{DESCRIBED}"),
        ("user", "", "北京天气？"),
        ("assistant", "", "Let me see."),
        ("assistant", "weather", "```python\ntool_call(city='北京', days=3)\n```"),
        ("observation", "", '{"t": 21}'),
        ("assistant", "", "21 度。"),
    ]
    rendered = renderer.render(parse_row(row, Location("t.jsonl", 1)).conversation)
    assert (rendered.ids, rendered.mask) == by_the_rules(oracle, turns)


@pytest.mark.parametrize(
    ("value", "literal"),
    [
        ("it's", '"it\'s"'),
        ("a \"b\" 'c'", "'a \"b\" \\'c\\''"),
        ('\\ \n\t"', "'\\\\ \\n\\t\"'"),
        (True, "True"),
        (None, "None"),
        (-1.5e-7, "-1.5e-07"),
        ([1, "二", {"k": [], "l": {}}], "[1, '二', {'k': [], 'l': {}}]"),
        ("<|user|>", "'<|user|>'"),
    ],
)
def test_arguments_are_python_literals(renderer: Renderer, oracle: Any, value: object, literal: str) -> None:
    call = ToolCall("f", json.dumps({"x": value, "a-b": value}))
    conversation = Conversation((Message("user", "q"), Message("assistant", "", tool_calls=(call,))))
    code = f"```python\ntool_call(x={literal}, **{{'a-b': {literal}}})\n```"
    assert renderer.render(conversation).ids == by_the_rules(oracle, [("user", "", "q"), ("assistant", "f", code)])[0]


def test_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="ChatGLM3 knows no role critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_transformers_own_way_through_the_template_gives_the_same_ids(tokenizer: Any, renderer: Renderer) -> None:
    conversation = talk(("system", "s"), ("user", "  a\nb "), ("assistant", ""), ("user", "你好"))
    ids = tokenizer.apply_chat_template(conversation.as_dicts(), add_generation_prompt=True, return_dict=False)
    assert ids == renderer.prompt_ids(conversation)


# ChatGLM2.


def test_chatglm2_has_rounds_and_no_roles(tmp_path: Path, oracle: Any) -> None:
    folder = make_tokenizer_folder(tmp_path / "mine", name="THUDM/ChatGLM2-6b-32k")
    renderer = Renderer(load_tokenizer_folder(folder))
    begin = [oracle.vocab_size() + 1, oracle.vocab_size() + 3]
    asked = talk(("user", "你好"), ("assistant", "Hi!"), ("user", "And <|user|>?"))
    text = "[Round 1]\n\n问：你好\n\n答： Hi!\n\n[Round 2]\n\n问：And <|user|>?\n\n答："
    assert renderer.prompt_ids(asked) == begin + oracle.encode(text)
    assert len(renderer.tokenizer) == oracle.vocab_size() + 5
    rendered = renderer.render(Conversation((*asked.messages, Message("assistant", "“好”"))))
    taught = [i for i, on in zip(rendered.ids, rendered.mask, strict=True) if on]
    assert taught == [*oracle.encode("Hi!"), *oracle.encode("“好”"), 2]
    with_system = renderer.prompt_ids(talk(("system", "Be brief."), ("user", "q")))
    assert with_system == begin + oracle.encode("Be brief.\n\n[Round 1]\n\n问：q\n\n答：")
    with pytest.raises(Exception, match="ChatGLM2 takes no tools"):
        renderer.tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tools=[WEATHER], tokenize=False)
    assert chat_stop_ids(folder) == [2]
    shutil.copytree(folder, tmp_path / "chatglm2-6b-int")
    assert chat_stop_ids(tmp_path / "chatglm2-6b-int") == [2]


def test_a_chat_stops_at_the_end_and_at_who_speaks_next(glm_folder: Path, oracle: Any, tmp_path: Path) -> None:
    count = oracle.vocab_size()
    assert chat_stop_ids(glm_folder) == [2, count + 6, count + 8]
    assert chat_stop_ids(tmp_path) == [2]


# Files.


def same_tokenizer(tokenizer: Any, other: Any) -> None:
    texts = [text for text in HAND if text]
    assert plain_ids(other, texts) == plain_ids(tokenizer, texts)
    assert other("你好 <|user|> a").input_ids == tokenizer("你好 <|user|> a").input_ids
    ids = tokenizer(list(HAND)).input_ids
    assert other.batch_decode(ids, skip_special_tokens=True) == tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert other.chat_template == tokenizer.chat_template
    for name in ("padding_side", "all_special_tokens", "all_special_ids", "pad_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(other, name) == getattr(tokenizer, name), name
    conversation = talk(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert Renderer(other).render(conversation) == Renderer(tokenizer).render(conversation)


@pytest.mark.parametrize("beside", ["nothing", "a native config", "the original config"])
def test_saved_and_loaded_it_is_the_same(glm_folder: Path, tokenizer: Any, tmp_path: Path, beside: str) -> None:
    from transformers import AutoTokenizer, GlmConfig

    tokenizer.save_pretrained(tmp_path)
    if beside == "a native config":
        GlmConfig(architectures=["GlmForCausalLM"]).save_pretrained(tmp_path)
    if beside == "the original config":
        named = json.loads((glm_folder / "config.json").read_text(encoding="utf-8"))
        named["auto_map"] = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.Model"}
        (tmp_path / "config.json").write_text(json.dumps(named), encoding="utf-8")
    else:
        same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(tmp_path, local_files_only=True))
    same_tokenizer(tokenizer, load_tokenizer_folder(tmp_path))


def test_nothing_else_of_the_folder_is_read(glm_copy: Path, tokenizer: Any) -> None:
    (glm_copy / "tokenization_chatglm.py").write_text("raise SystemExit('this code ran')\n", encoding="utf-8")
    (glm_copy / "chat_template.jinja").write_text("{{ 'theirs' }}", encoding="utf-8")
    (glm_copy / "special_tokens_map.json").write_text('{"eos_token": "sop"}', encoding="utf-8")
    theirs = {
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "tokenizer_class": "ChatGLMTokenizer",
        "chat_template": "{{ 'theirs' }}",
        "padding_side": "right",
    }
    (glm_copy / "tokenizer_config.json").write_text(json.dumps(theirs), encoding="utf-8")
    (glm_copy / "tokenizer.json").write_text('{"normalizer": null}', encoding="utf-8")
    same_tokenizer(tokenizer, load_tokenizer_folder(glm_copy))


def retrained(**switches: Any) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with file.open("wb") as target:
            SentencePieceTrainer.train(
                **{
                    "sentence_iterator": iter(["the people of the loom", "今天天气很好"] * 20),
                    "model_writer": target,
                    "model_type": "bpe",
                    "vocab_size": 300,
                    "hard_vocab_limit": False,
                    "byte_fallback": True,
                    "normalization_rule_name": "identity",
                    "remove_extra_whitespaces": False,
                    "pad_id": -1,
                    "minloglevel": 2,
                    **switches,
                }
            )

    return write


def cut(keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(keep(file.read_bytes()))

    return write


def narrow(file: Path) -> None:
    config = {"model_type": "chatglm", "padded_vocab_size": 2000}
    (file.parent / "config.json").write_text(json.dumps(config), encoding="utf-8")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "the folder has no tokenizer.model, which ChatGLM's tokenizer is built from"),
    "a folder": (lambda file: (file.unlink(), file.mkdir())[1], "tokenizer.model cannot be read"),
    "git-lfs": (cut(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "a git-lfs pointer"),
    "empty": (cut(lambda _: b""), "torn, or no sentencepiece model"),
    "other bytes": (cut(lambda _: b"\xff\xfe" * 90), "torn, or no sentencepiece model"),
    "cut in a piece": (cut(lambda raw: raw[: len(raw) // 2]), "torn, or no sentencepiece model"),
    "cut at the end": (cut(lambda raw: raw[:-1]), "torn, or no sentencepiece model"),
    "unigram": (retrained(model_type="unigram"), "model type differs"),
    "no bytes": (retrained(byte_fallback=False), "byte_fallback differs"),
    "normalized": (retrained(normalization_rule_name="nmt_nfkc"), "normalization differs"),
    "no dummy prefix": (retrained(add_dummy_prefix=False), "add_dummy_prefix differs"),
    "blanks taken out": (retrained(remove_extra_whitespaces=True), "remove_extra_whitespaces differs"),
    "suffix blanks": (retrained(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix differs"),
    "a pad piece": (retrained(pad_id=3), "its pieces are of other kinds"),
    "user-defined": (retrained(user_defined_symbols=["<|user|>"]), "its pieces are of other kinds"),
    "other control pieces": (retrained(bos_piece="<bos>"), "its first pieces"),
    "other order": (retrained(unk_id=2, eos_id=0), "its pieces are of other kinds"),
    "small model": (narrow, "more tokens than the model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_tokenizer_of_a_chatglm_is_refused_by_name(glm_copy: Path, name: str) -> None:
    spoil, told = BROKEN[name]
    spoil(glm_copy / "tokenizer.model")
    with pytest.raises(UserError, match=told) as caught:
        load_tokenizer_folder(glm_copy)
    assert_mendable(caught.value)
    assert caught.value.where in (str(glm_copy), str(glm_copy / "tokenizer.model"))


@settings(max_examples=40)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_never_builds(glm_folder: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    raw = (glm_folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match="torn, or no sentencepiece model"):
        build_tokenizer(folder)


def test_rows_of_the_common_format_are_rendered(renderer: Renderer, oracle: Any) -> None:
    conversation = parse_row(chat_row("你好", "Hi"), Location("t.jsonl", 1)).conversation
    assert renderer.render(conversation).ids == by_the_rules(oracle, [("user", "", "你好"), ("assistant", "", "Hi")])[0]
