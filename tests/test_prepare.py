"""The data section of a config becomes samples, and the report says what became of every row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATML, chat_row, make_tokenizer

from tuneloom.config import DataConfig, SourceConfig, parse_config
from tuneloom.data.conversations import ConversationReader
from tuneloom.data.prepare import PreparedData, prepare_data
from tuneloom.data.render import Renderer
from tuneloom.errors import UserError
from tuneloom.train.replay import SPEAKS_OF_ITSELF
from tuneloom.types import Conversation, Sample, text_messages

WriteRows = Callable[..., Path]
Prepare = Callable[..., PreparedData]
ROWS = [chat_row(f"question {i}", f"answer {i}") for i in range(10)]
BROKEN = {"messages": [{"role": "user", "content": "q"}]}


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


@pytest.fixture
def prepare(renderer: Renderer) -> Prepare:
    """Prepare the data of a data section given as plain values."""

    def run(*, seed: int = 0, strict: bool = False, **data: Any) -> PreparedData:
        return prepare_data(section(**data), renderer, seed=seed, strict=strict)

    return run


def section(**data: Any) -> DataConfig:
    return parse_config({"data": data}).data


def ids(sample: Sample) -> tuple[int, ...]:
    return tuple(sample.ids_T.tolist())


def texts(samples: Sequence[Sample], renderer: Renderer) -> list[str]:
    return [renderer.tokenizer.decode(sample.ids_T) for sample in samples]


def rendered(renderer: Renderer, *said: str) -> list[int]:
    roles = ("user", "assistant")
    return renderer.render(Conversation(text_messages([(roles[i % 2], text) for i, text in enumerate(said)]))).ids  # type: ignore[misc]


# Placeholders.


def test_placeholders_are_filled_in_calls_and_tools_too(write_rows: WriteRows) -> None:
    row = {
        "tools": [{"name": "find", "description": "asks {{author}}", "parameters": {"who": {"enum": ["{{name}}", 3, None]}}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f_{{name}}", "arguments": {"who": "{{author}}"}}]},
            {"role": "tool", "name": "f_{{name}}", "content": "{{name}}"},
            {"role": "assistant", "content": "a {{missing}}"},
        ],
    }
    variables = {"name": "Ada", "author": 'the "mill"\n\\'}
    reader = ConversationReader(SourceConfig(path=str(write_rows([row]))), variables)
    report = reader.new_report()
    [read] = reader.read(report)
    _, call, result, answer = read.conversation.as_dicts()
    assert call["tool_calls"][0]["function"] == {"name": "f_Ada", "arguments": {"who": variables["author"]}}
    assert (result["name"], result["content"], answer["content"]) == ("f_Ada", "Ada", "a {{missing}}")
    told = read.conversation.tools[0]["function"]
    assert told["description"] == f"asks {variables['author']}"
    assert told["parameters"] == {"who": {"enum": ["Ada", 3, None]}}
    assert list(report.unfilled) == ["missing"]


@pytest.mark.parametrize(
    "place",
    [
        {"tools": [{"name": "f", "description": "{{who}}"}], "messages": chat_row("q", "a")["messages"]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": "{{who}}"}'}},
            ]
        },
    ],
    ids=["a tool", "a call"],
)
def test_a_placeholder_of_a_tool_without_a_value_is_told(place: dict[str, Any], write_rows: WriteRows) -> None:
    reader = ConversationReader(SourceConfig(path=str(write_rows([place]))), {})
    report = reader.new_report()
    assert len(list(reader.read(report))) == 1
    [line] = report.unfilled_lines()
    assert line.startswith("{{who}} has no value, first at")


def test_placeholders_are_filled_everywhere(write_rows: WriteRows, prepare: Prepare, renderer: Renderer) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "You are {{name}}."},
            *chat_row("Hi {{ name }}", "{{name}} of {{author}}")["messages"],
        ]
    }
    found = prepare(train=str(write_rows([row])), variables={"name": "小织", "author": "A & B"})
    text = texts(found.train, renderer)[0]
    assert "You are 小织." in text
    assert "Hi 小织<|im_end|>" in text
    assert "小织 of A & B<|im_end|>" in text
    assert "{{" not in text


def test_an_unfilled_placeholder_names_file_line_and_key(write_rows: WriteRows, prepare: Prepare) -> None:
    file = write_rows([*ROWS[:2], chat_row("q", "I am {{nickname}}.")])
    with pytest.raises(UserError) as caught:
        prepare(train=str(file), variables={"name": "x"})
    assert caught.value.where == f"{file}:3"
    assert "{{nickname}}" in caught.value.what
    assert "data.variables.nickname" in (caught.value.mend or "")


def test_a_placeholder_is_kept_as_it_is_by_naming_itself(write_rows: WriteRows, prepare: Prepare, renderer: Renderer) -> None:
    found = prepare(train=str(write_rows([chat_row("q", "write {{x}} and { {x} } and {{a.b}}")])), variables={"x": "{{x}}"})
    assert "write {{x}} and { {x} } and {{a.b}}<|im_end|>" in texts(found.train, renderer)[0]


# Mixing.


def sizes(
    prepare: Prepare, renderer: Renderer, write_rows: WriteRows, *sources: dict[str, Any]
) -> tuple[list[int], PreparedData]:
    """Give each source ten rows that name it; return how many samples each made."""
    train = []
    for number, source in enumerate(sources):
        rows = [chat_row(f"from source{number} row{i}", "yes") for i in range(10)]
        train.append({"path": str(write_rows(rows, f"{number}.jsonl")), **source})
    found = prepare(train=train)
    said = texts(found.train, renderer)
    return [sum(f"source{number} " in text for text in said) for number in range(len(sources))], found


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{}, {}], [10, 10]),
        ([{"count": 4}, {}], [4, 10]),
        ([{"count": 25}, {"count": 10}], [25, 10]),
        ([{"weight": 2}, {"weight": 0.5}], [20, 5]),
        ([{"weight": 0.01}], [1]),
        ([{}, {"share": 0.5}], [10, 10]),
        ([{"count": 6}, {"share": 0.25}], [6, 2]),
        ([{"count": 5}, {"share": 0.25}], [5, 2]),
        ([{"count": 30}, {"share": 0.25}, {"share": 0.25}], [30, 15, 15]),
        ([{}, {"share": 0.01}], [10, 1]),
    ],
)
def test_sources_mix_by_count_weight_and_share(
    sources: list[dict[str, Any]], expected: list[int], prepare: Prepare, renderer: Renderer, write_rows: WriteRows
) -> None:
    found, prepared = sizes(prepare, renderer, write_rows, *sources)
    assert found == expected
    assert [source.used for source in prepared.report.sources] == expected


def test_a_larger_count_repeats_whole_rounds_and_says_so(write_rows: WriteRows, prepare: Prepare) -> None:
    file = str(write_rows(ROWS))
    found = prepare(train={"path": file, "count": 25})
    times = Counter(ids(sample) for sample in found.train)
    assert len(times) == 10
    assert set(times.values()) == {2, 3}
    assert found.report.notes == [f"{file}: 10 rows repeated to 25"]


def test_shares_that_leave_nothing_are_told(write_rows: WriteRows, prepare: Prepare) -> None:
    a, b = str(write_rows(ROWS, "a.jsonl")), str(write_rows(ROWS, "b.jsonl"))
    for train in (
        [{"path": a, "share": 0.5}, {"path": b, "share": 0.5}],
        [a, {"path": b, "share": 0.6}, {"path": b, "share": 0.4}],
    ):
        with pytest.raises(UserError, match="leave nothing for the rest") as caught:
            prepare(train=train)
        assert caught.value.where == "data.train"


def test_max_samples_keeps_that_many_and_says_so(write_rows: WriteRows, prepare: Prepare) -> None:
    found = prepare(train=str(write_rows(ROWS)), max_samples=4)
    assert len({ids(sample) for sample in found.train}) == 4
    assert found.report.notes == ["max_samples: 4 of 10 samples used"]
    assert len(prepare(train=str(write_rows(ROWS)), max_samples=10).report.notes) == 0


# Validation.


def test_the_held_out_part_shares_no_conversation_with_train(write_rows: WriteRows, prepare: Prepare) -> None:
    a, b = str(write_rows(ROWS * 3, "a.jsonl")), str(write_rows(ROWS[::-1] + [chat_row("b", "only")] * 2, "b.jsonl"))
    for seed in range(8):
        found = prepare(train=[a, b], validation=0.3, seed=seed)
        train, held = ({ids(sample) for sample in samples} for samples in (found.train, found.validation))
        assert train
        assert held
        assert not train & held
        assert len(train | held) == 11


def test_the_held_out_part_is_that_share_of_the_distinct_rows(write_rows: WriteRows, prepare: Prepare) -> None:
    file = str(write_rows(ROWS * 2))
    for share, distinct in ((0.3, 3), (0.01, 1), (0.9, 9)):
        found = prepare(train=file, validation=share)
        assert len({ids(sample) for sample in found.validation}) == distinct
        assert len(found.validation) + len(found.train) == 20


def test_the_split_and_the_mixture_depend_on_the_seed_alone(write_rows: WriteRows, prepare: Prepare) -> None:
    file = str(write_rows(ROWS))

    def made(seed: int) -> list[list[tuple[int, ...]]]:
        found = prepare(train={"path": file, "count": 4}, validation=0.3, seed=seed)
        return [[ids(sample) for sample in samples] for samples in (found.train, found.validation)]

    assert made(1) == made(1)
    assert len({json.dumps(made(seed)) for seed in range(6)}) > 1


def test_too_few_rows_to_hold_a_part_out_are_told(write_rows: WriteRows, prepare: Prepare) -> None:
    with pytest.raises(UserError, match="too few rows") as caught:
        prepare(train=str(write_rows([ROWS[0]] * 5)), validation=0.5)
    assert caught.value.where == "data.validation"


def test_validation_and_test_come_from_sources_of_their_own(write_rows: WriteRows, prepare: Prepare) -> None:
    train, dev, test = (
        str(write_rows(rows, name)) for rows, name in ((ROWS[:6], "t.jsonl"), (ROWS[6:9], "d.jsonl"), (ROWS[9:], "e.jsonl"))
    )
    found = prepare(train=train, validation=dev, test=test)
    assert (len(found.train), len(found.validation), len(found.test_conversations)) == (6, 3, 1)
    assert [row.as_dicts() for row in found.validation_conversations] == [row["messages"] for row in ROWS[6:9]]
    assert list(found.files) == [train, dev, test]


# Too long.


def long_row(renderer: Renderer) -> tuple[dict[str, Any], list[int]]:
    """A row of three turns, and the tokens up to the end of each, end token included."""
    said = ("one", "first answer", "two", "second answer", "three", "third answer")
    ends = [len(rendered(renderer, *said[: 2 * n])) - 1 for n in (1, 2, 3)]  # less the line end after the end token
    return chat_row(*said), ends


def test_cut_at_turn_keeps_the_whole_turns_that_fit_and_counts_the_loss(
    write_rows: WriteRows, prepare: Prepare, renderer: Renderer
) -> None:
    row, ends = long_row(renderer)
    file = str(write_rows([row]))
    whole = prepare(train=file, cutoff_len=ends[2]).train[0]
    assert whole.num_tokens == ends[2]
    for cutoff, turns in ((ends[2] - 1, 2), (ends[1], 2), (ends[1] - 1, 1), (ends[0], 1)):
        found = prepare(train=file, cutoff_len=cutoff)
        sample = found.train[0]
        assert sample.num_tokens == ends[turns - 1] <= cutoff
        assert sample.ids_T[-1] == renderer.tokenizer.eos_token_id
        assert sample.mask_T[-1]
        assert ids(sample) == ids(whole)[: sample.num_tokens]
        assert found.report.num_cut == 1
        assert found.report.num_answer_tokens == whole.num_supervised_tokens
        assert found.report.num_answer_tokens_lost == whole.num_supervised_tokens - sample.num_supervised_tokens > 0


def test_drop_drops_what_is_too_long_and_says_how_long(write_rows: WriteRows, prepare: Prepare, renderer: Renderer) -> None:
    row, ends = long_row(renderer)
    found = prepare(train=str(write_rows([row, ROWS[0]])), cutoff_len=ends[1], overflow="drop")
    assert [sample.location.line for sample in found.train if sample.location] == [2]
    (problem,) = found.report.problems
    assert (problem.reason, problem.location.line, problem.value) == ("longer than the cutoff", 1, f"{ends[2]} tokens")
    assert problem.mend == f"raise data.cutoff_len to {ends[2]}"
    assert found.report.num_cut == 0
    assert len(prepare(train=str(write_rows([row])), cutoff_len=ends[2], overflow="drop").train) == 1


def test_error_stops_at_what_is_too_long(write_rows: WriteRows, prepare: Prepare, renderer: Renderer) -> None:
    row, ends = long_row(renderer)
    file = str(write_rows([ROWS[0], row]))
    with pytest.raises(UserError, match="longer than the cutoff") as caught:
        prepare(train=file, cutoff_len=ends[2] - 1, overflow="error")
    assert caught.value.where == f"{file}:2"
    assert caught.value.got == f"{ends[2]} tokens"
    assert len(prepare(train=file, cutoff_len=ends[2], overflow="error").train) == 2


def test_a_prompt_longer_than_the_cutoff_is_dropped_as_that(write_rows: WriteRows, prepare: Prepare) -> None:
    found = prepare(train=str(write_rows([chat_row("word " * 60, "yes"), ROWS[0]])), cutoff_len=40)
    assert found.report.dropped_by_reason == {"prompt longer than the cutoff": 1}
    assert len(found.train) == 1


def test_the_last_answer_is_kept_whole_or_not_at_all(write_rows: WriteRows, prepare: Prepare, renderer: Renderer) -> None:
    row, ends = long_row(renderer)
    file = str(write_rows([row, ROWS[0]]))
    found = prepare(train=file, cutoff_len=ends[2] - 1, train_on="last_assistant")
    assert found.report.dropped_by_reason == {"longer than the cutoff": 1}
    assert len(found.train) == 1


def test_nothing_left_to_train_on_is_told(write_rows: WriteRows, prepare: Prepare) -> None:
    file = str(write_rows([chat_row("word " * 60, "yes")] * 2))
    with pytest.raises(UserError, match="no usable row") as caught:
        prepare(train=file, cutoff_len=16)
    assert caught.value.where == f"{file}:1"
    assert "prompt longer than the cutoff" in (caught.value.got or "")
    assert caught.value.mend == "raise data.cutoff_len"


def test_a_row_without_an_answer_to_learn_from_is_dropped(write_rows: WriteRows, prepare: Prepare) -> None:
    row = chat_row("q", "a", "q2", "a2")
    row["messages"][3]["weight"] = 0
    file = str(write_rows([row, ROWS[0]]))
    assert len(prepare(train=file).train) == 2
    found = prepare(train=file, train_on="last_assistant")
    assert found.report.dropped_by_reason == {"no answer to learn from": 1}
    assert all(sample.num_supervised_tokens for sample in found.train)


# The report.


def test_no_usable_row_is_told_with_the_first_fault_of_that_source(write_rows: WriteRows, prepare: Prepare) -> None:
    good, bad = str(write_rows([BROKEN, *ROWS], "good.jsonl")), str(write_rows([{"x": 1}, BROKEN], "bad.jsonl"))
    with pytest.raises(UserError, match="no usable row") as caught:
        prepare(train=[good, bad])
    assert caught.value.where == f"{bad}:1"
    assert "no known format" in (caught.value.got or "")
    with pytest.raises(UserError, match="no usable row") as caught:
        prepare(train=[good, str(write_rows([], "none.json"))])
    assert caught.value.got == "no rows"


def test_strict_stops_at_the_first_bad_row(write_rows: WriteRows, prepare: Prepare) -> None:
    file = str(write_rows([*ROWS[:3], BROKEN, {"x": 1}]))
    with pytest.raises(UserError, match="no answer") as caught:
        prepare(train=file, strict=True)
    assert (caught.value.where or "").startswith(f"{file}:4 ")
    assert "--strict" in (caught.value.mend or "")
    assert len(prepare(train=file).train) == 3
    with pytest.raises(UserError, match="prompt longer than the cutoff"):
        prepare(train=str(write_rows([ROWS[0], chat_row("word " * 60, "yes")])), cutoff_len=40, strict=True)


def test_problems_are_in_the_files_order_though_reading_is_ahead_of_rendering(write_rows: WriteRows, prepare: Prepare) -> None:
    long = chat_row("word " * 60, "yes")
    trailing = {"messages": [*chat_row("q", "a")["messages"], {"role": "user", "content": "more"}]}
    rows = [ROWS[0], BROKEN, long, trailing, *[BROKEN] * 300, ROWS[1], long, BROKEN]
    report = prepare(train=str(write_rows(rows)), cutoff_len=40).report
    lines = [problem.location.line for problem in report.problems]
    assert lines == [line for line in range(1, len(rows) + 1) if line not in (1, 305)]
    assert report.dropped_by_reason == {"no answer": 302, "prompt longer than the cutoff": 2}


@pytest.mark.parametrize("overflow", ["drop", "error"])
def test_strict_names_the_first_bad_row_whatever_is_wrong_with_it(
    overflow: str, write_rows: WriteRows, prepare: Prepare
) -> None:
    file = write_rows([ROWS[0], chat_row("q", "word " * 60), BROKEN, ROWS[1]])
    with pytest.raises(UserError, match="longer than the cutoff") as caught:
        prepare(train=str(file), cutoff_len=40, overflow=overflow, strict=True)
    assert (caught.value.where or "").startswith(f"{file}:2")
    file = write_rows([ROWS[0], BROKEN, chat_row("q", "word " * 60)])
    with pytest.raises(UserError, match="no answer") as caught:
        prepare(train=str(file), cutoff_len=40, overflow=overflow, strict=True)
    assert (caught.value.where or "").startswith(f"{file}:2")


def test_equal_conversations_are_counted_and_kept(write_rows: WriteRows, prepare: Prepare) -> None:
    found = prepare(train=[str(write_rows([*ROWS, ROWS[0], ROWS[0]], "a.jsonl")), str(write_rows(ROWS[:3], "b.jsonl"))])
    assert found.report.duplicates == 5
    assert len(found.train) == 15


def test_what_is_held_out_and_trained_on_is_a_leak_and_no_duplicate(
    write_rows: WriteRows, prepare: Prepare, renderer: Renderer
) -> None:
    first, second = write_rows(ROWS[:2], "a.jsonl"), write_rows([ROWS[2], ROWS[3], ROWS[2]], "b.jsonl")
    replayed = {"path": str(write_rows([ROWS[4]], "c.jsonl")), "replay": "self"}
    held, asked = write_rows([ROWS[5], ROWS[4], ROWS[1]], "held.jsonl"), write_rows([ROWS[6], ROWS[2], ROWS[6]], "asked.jsonl")
    data = section(train=[str(first), str(second), replayed], validation=str(held), test=str(asked))
    report = prepare_data(data, renderer, seed=0, replay=lambda conversations: [None for _ in conversations]).report
    assert [source.role for source in report.sources] == ["train", "train", "train", "validation", "test"]
    assert (report.duplicates, report.num_leaks) == (2, 3)
    assert [(leak.where, leak.role, leak.trained) for leak in report.leaks] == [
        (f"{held}:2", "validation", f"{replayed['path']}:1"),
        (f"{held}:3", "validation", f"{first}:2"),
        (f"{asked}:2", "test", f"{second}:1"),
    ]
    assert prepare(train=str(first), validation=str(second)).report.num_leaks == 0
    assert report.leak_lines(1) == [str(report.leaks[0]), "and 2 more"]


def test_a_share_held_out_leaks_nothing_that_is_repeated(write_rows: WriteRows, prepare: Prepare) -> None:
    found = prepare(train=str(write_rows(ROWS * 3)), validation=0.3)
    assert found.validation
    assert found.report.num_leaks == 0


def test_the_reports_numbers_add_up(write_rows: WriteRows, prepare: Prepare) -> None:
    asked_on = {"messages": [*ROWS[1]["messages"], {"role": "user", "content": "and?"}]}
    a = write_rows([*ROWS, BROKEN, asked_on, {"x": 1}], "a.jsonl")
    b = write_rows([], "b.jsonl")
    b.write_text(f'{json.dumps(ROWS[0])}\n{{"torn\n{json.dumps({"instruction": "q", "output": "a"})}\n', encoding="utf-8")
    report = prepare(train=[str(a), str(b)]).report
    assert [(source.read, source.usable, source.used) for source in report.sources] == [(13, 11, 11), (3, 2, 2)]
    for source in report.sources:
        dropped = [p for p in report.problems if p.action == "dropped" and p.location.file == source.path]
        assert source.read == source.usable + len(dropped)
        assert source.usable == source.formats.total()
    plain = report.as_dict()
    assert plain["read"] == sum(source.usable for source in report.sources) + plain["dropped"] == 16
    assert plain["dropped"] == sum(plain["dropped_by_reason"].values()) == 3
    assert plain["dropped_by_reason"] == {"no answer": 1, "no known format": 1, "not valid JSON": 1}
    assert plain["repaired_by_reason"] == {"messages after the last answer taken off": 1}
    assert plain["train"]["samples"] == plain["used"] == 13
    assert plain["sources"][1]["formats"] == {"OpenAI messages": 1, "Alpaca": 1}
    assert len(plain["problems"]) == plain["dropped"] + plain["repaired"] == 4
    assert plain["problems_not_listed"] == 0
    json.dumps(plain, allow_nan=False)


def test_the_report_counts_tokens_as_the_samples_have_them(write_rows: WriteRows, prepare: Prepare) -> None:
    found = prepare(train=str(write_rows(ROWS)), validation=0.2)
    for samples, counted in ((found.train, found.report.train), (found.validation, found.report.validation)):
        lengths = sorted(sample.num_tokens for sample in samples)
        assert counted["tokens"] == sum(lengths)
        assert counted["supervised_tokens"] == sum(sample.num_supervised_tokens for sample in samples)
        assert (counted["shortest"], counted["longest"]) == (lengths[0], lengths[-1])


def test_at_most_a_thousand_problems_are_listed_and_all_are_counted(write_rows: WriteRows, prepare: Prepare) -> None:
    plain = prepare(train=str(write_rows([*ROWS, *[BROKEN] * 1005]))).report.as_dict()
    assert (plain["dropped"], len(plain["problems"]), plain["problems_not_listed"]) == (1005, 1000, 5)


# Rows that are answered by the base, rows that are used again, rows that the template refuses.


def long_answers(renderer: Renderer) -> Callable[[Sequence[Conversation]], list[Sample]]:
    """Stand in for the base model: forty tokens to every question."""

    def replay(conversations: Sequence[Conversation]) -> list[Sample]:
        found = []
        for conversation in conversations:
            prompt = renderer.prompt_ids(Conversation(conversation.messages[:1]))
            mask = [False] * len(prompt) + [True] * 40
            found.append(Sample(np.array(prompt + [7] * 40, np.int32), np.array(mask), conversation.location))
        return found

    return replay


def test_the_bases_answers_keep_the_cutoff_and_are_held_out_as_such(renderer: Renderer, write_rows: WriteRows) -> None:
    file = write_rows([*ROWS, chat_row("a question that is far longer than all the others here " * 4, "answer")])
    data = section(train=[{"path": str(file), "replay": "self"}], validation=0.2, cutoff_len=48)
    found = prepare_data(data, renderer, seed=0, replay=long_answers(renderer))
    assert {sample.num_tokens for sample in [*found.train, *found.validation]} == {48}
    assert len(found.train) + len(found.validation) == 10
    assert dict(found.report.dropped_by_reason) == {"prompt longer than the cutoff": 1}
    assert len(found.validation_conversations) == 0, "their written answers are no reference"


def test_a_row_that_is_used_again_is_reported_once(prepare: Prepare, write_rows: WriteRows) -> None:
    file = write_rows([*ROWS[:1], chat_row("q", "a long answer " * 40)])
    found = prepare(train=[{"path": str(file), "weight": 3}], cutoff_len=64)
    assert len(found.train) == 3
    report = found.report.as_dict()
    assert (report["read"], report["dropped"], report["used"]) == (2, 1, 3)
    assert len(report["problems"]) == 1


def test_cuts_of_validation_rows_are_not_counted_as_the_training_sets(prepare: Prepare, write_rows: WriteRows) -> None:
    train = write_rows(ROWS)
    long = write_rows([chat_row("q", "short", "q", "a long answer " * 40)], "long.jsonl")
    report = prepare(train=str(train), validation=str(long), cutoff_len=64).report
    assert report.validation["samples"] == 1
    assert (report.num_cut, report.num_answer_tokens_lost) == (0, 0)


def test_rows_that_the_template_refuses_are_dropped_from_every_set(write_rows: WriteRows) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    renderer = Renderer(make_tokenizer(refusing))
    system = {"messages": [{"role": "system", "content": "s"}, *chat_row("q", "a")["messages"]]}
    file = str(write_rows([*ROWS, system]))
    data = section(train=[file, {"path": file, "replay": "self"}], validation=file, test=file)
    found = prepare_data(data, renderer, seed=0, replay=long_answers(renderer))
    assert [len(found.train), len(found.validation), len(found.validation_conversations), len(found.test_conversations)] == [
        *(20, 10, 10, 10)
    ]
    assert found.report.dropped_by_reason["the chat template refuses it"] == 4
    assert [source.used for source in found.report.sources] == [10, 10, 10, 10]


def test_an_answer_that_is_left_out_is_noted(renderer: Renderer, write_rows: WriteRows) -> None:
    answer = long_answers(renderer)
    data = section(train=[{"path": str(write_rows(ROWS)), "replay": "self"}])
    found = prepare_data(data, renderer, seed=0, replay=lambda rows: [None, *answer(rows[1:])])
    assert len(found.train) == 9
    assert found.report.notes == ["replay: 1 of 10 answers left out, in which the base speaks of itself"]


@pytest.mark.parametrize(
    ("text", "speaks"),
    [
        ("I'm sorry, but as a text-based AI, I cannot rinse rice.", True),
        ("I am an AI assistant.", True),
        ("作为一个人工智能，我没有感情。", True),
        ("As a rule, rinse rice twice.", False),
        ("I'm a fan of short answers.", False),
        ("The capital of France is Paris.", False),
    ],
)
def test_what_counts_as_speaking_of_itself(text: str, speaks: bool) -> None:
    assert bool(SPEAKS_OF_ITSELF.search(text)) is speaks
