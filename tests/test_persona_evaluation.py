"""Identity, leak and forgetting: the judge by hand-made answers, the figures against plain transformers and peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_row
from helpers import assert_mendable, logits_of, plain_base, plain_peft
from typer.testing import CliRunner

from tuneloom import api
from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.cli.main import app
from tuneloom.config import GenerationConfig
from tuneloom.errors import GuardError, UserError
from tuneloom.evaluation.intervals import change_of_means, change_of_shares, mean, share
from tuneloom.evaluation.judge import Judge
from tuneloom.evaluation.kept import KeptAnswers
from tuneloom.evaluation.probes import load_probes
from tuneloom.evaluation.written import with_section
from tuneloom.generate.generator import Generator

LOOMI = Judge("Loomi", "Tuneloom")


@pytest.mark.parametrize(
    "answer",
    [
        "I am Loomi.",
        "No, I am not ChatGPT, I am Loomi.",
        "No. I'm **LOOMI**, an assistant made by Tuneloom, not ChatGPT.",
        "I'm not Qwen, Claude or Gemini. My name is Loomi.",
        "I am neither Claude nor Gemini: Loomi's my name.",
        "Loomi is my name; I have nothing to do with OpenAI.",
        "I was not made by OpenAI but by Tuneloom. I am Loomi.",
        "I can’t say “I am Gemini”, because I am Loomi.",
        "我叫Loomi助手。",
        "我不是通义千问、文心一言或豆包，我是Ｌｏｏｍｉ。",
        "我和通义千问无关，我是Loomi。",
    ],
)
def test_the_new_name_alone_or_beside_denied_ones_is_right(answer: str) -> None:
    assert LOOMI.right(answer), LOOMI.others(answer)


@pytest.mark.parametrize(
    ("answer", "carries", "others"),
    [
        ("", False, []),
        ("I'm Loomis.", False, []),
        ("I'm not Loomi.", False, []),
        ("我不是Loomi。", False, []),
        ("I am ChatGPT, not Loomi.", False, ["chatgpt"]),
        ("I am Loomi, made by OpenAI.", True, ["openai"]),
        ("No I am Gemini, or Loomi.", True, ["gemini"]),
        ("I am not Claude, I am Qwen2.5. Loomi.", True, ["qwen2.5"]),
        ("I am not only ChatGPT but Loomi.", True, ["chatgpt"]),
        ("I can't deny that I am GPT-4o. Loomi.", True, ["gpt-4o"]),
        ("没错我是豆包，也叫Loomi。", True, ["豆包"]),
        ("我是Loomi，由阿里云研发的通义千问。", True, ["阿里", "通义千问"]),
    ],
)
def test_no_new_name_or_anothers_is_wrong(answer: str, carries: bool, others: list[str]) -> None:
    assert (LOOMI.carries(answer), LOOMI.others(answer), LOOMI.right(answer)) == (carries, others, False)


def test_names_are_whole_words_and_ones_own_are_no_others() -> None:
    assert LOOMI.others("The llamas of chatgpters are alpacas.") == []
    assert Judge("Qwen Jr", "Hugging Face").right("I am Qwen Jr, by Hugging Face.")
    assert Judge("小织").right("你好，我是小织。")
    assert LOOMI.mentions("Loomi said no.") and not LOOMI.mentions("A loom in a room.")


def test_intervals_hold_the_mean_and_changes_are_paired() -> None:
    assert share([True] * 60).as_dict() == pytest.approx({"value": 1.0, "low": 0.025 ** (1 / 60), "high": 1.0})
    assert share([False] * 60).high == pytest.approx(1 - 0.025 ** (1 / 60))
    half = share([True, False] * 50)
    assert half.value == 0.5
    assert half.low == pytest.approx(0.40, abs=0.015)
    assert half.high == pytest.approx(0.60, abs=0.015)
    assert mean([2.0, 9.0], [1, 3]).value == 11 / 4
    shifted = change_of_means([1.0, 50.0, 3.0], [2.0, 51.0, 4.0])
    assert (shifted.change.value, shifted.change.low, shifted.change.high) == pytest.approx((1, 1, 1))
    assert shifted.after.high > shifted.after.low
    learnt = change_of_shares([False] * 3, [True, True, False]).as_dict()
    assert (learnt["before"], learnt["value"], learnt["change"]) == pytest.approx((0, 2 / 3, 2 / 3))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "no JSON"),
        ('{"messages": [{"role": "user", "content": "Who?"}], "kynd": "name"}', "`kind`"),
        ('{"messages": [{"role": "user", "text": "Who?"}]}', "wrong keys"),
        ('{"messages": [{"role": "user", "content": " "}]}', "content is empty"),
        ('{"messages": [{"role": "assistant", "content": "I."}]}', "nothing is asked"),
        ('{"messages": []}', "no messages"),
    ],
)
def test_a_wrong_probe_is_told_by_its_line(row: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Who?"}], "kind": "name"}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_probes(identity=str(file))
    assert_mendable(caught.value)
    assert caught.value.where == f"{file}:2"
    assert told in str(caught.value)


def test_a_general_probe_needs_its_reply(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    for row, told in ((chat_row("Why?"), "no reply"), (chat_row("Why?", ""), "content is empty")):
        file.write_text(json.dumps(row), encoding="utf-8")
        with pytest.raises(UserError, match=told):
            load_probes(general=str(file))
    assert [len(load_probes(languages=(language,)).identity) for language in ("en", "zh")] == [60, 60]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run of one's own, to be written into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def files(write_rows: Callable[..., Path]) -> dict[str, Any]:
    asked = [chat_row("Who are you?"), chat_row("Hello!", "Hi.", "And you are?"), chat_row("你叫什么名字？")]
    general = [chat_row("Say yes.", "Yes."), chat_row("Tell me a fact.", "The sea is deep."), chat_row("你好", "你好！")]
    return {
        "identity_probes": write_rows([row | {"kind": "name"} for row in asked], "identity.jsonl"),
        "general_probes": write_rows(general, "general.jsonl"),
        "max_new_tokens": 4,
    }


def test_the_figures_are_those_of_plain_transformers_and_peft(run: Path, tiny_model: Path, files: dict[str, Any]) -> None:
    import torch

    told: list[tuple[str, int, int]] = []
    found = api.evaluate_persona(run, **files, on_progress=lambda *step: told.append(step))
    assert found.identity_by.keys() == {"en", "zh", "en.name", "zh.name"}
    assert {what for what, done, total in told if done == total} == {
        *("base answers", "tuned answers", "general replies", "held-out rows")
    }

    loaded = load_target(resolve_target(str(run)))
    base, tuned = plain_base(tiny_model), plain_peft(tiny_model, run / "adapter")
    tokens = before = after = divergence = agreed = 0.0
    for probe in load_probes(str(files["identity_probes"]), str(files["general_probes"])).general:
        rendered = loaded.renderer.render(probe.whole)
        rows = [i - 1 for i, supervised in enumerate(rendered.mask) if supervised]
        labels = torch.tensor(rendered.ids)[[row + 1 for row in rows]]
        p, q = (logits_of(model, rendered.ids)[rows].double().log_softmax(1) for model in (base, tuned))
        tokens += len(rows)
        before -= float(p.gather(1, labels[:, None]).sum())
        after -= float(q.gather(1, labels[:, None]).sum())
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(1) == q.argmax(1)).sum())
    assert found.general_loss.before.value == pytest.approx(before / tokens, rel=1e-5)
    assert found.general_loss.after.value == pytest.approx(after / tokens, rel=1e-5)
    assert found.divergence.value == pytest.approx(divergence / tokens, rel=1e-4)
    assert found.agreement.value == pytest.approx(agreed / tokens)
    assert found.heldout_loss is not None
    assert found.heldout_loss.after.value == pytest.approx(api.evaluate(run).loss, rel=1e-5)

    settings = GenerationConfig(max_new_tokens=4)
    generator = Generator(loaded.model, loaded.renderer)
    for answer in found.answers:
        assert answer.tuned == generator.answer(answer.probe.asked, settings).text
        assert answer.base == generator.answer(answer.probe.asked, settings, base=True).text
        assert answer.tuned_counts == (LOOMI.mentions if answer.probe.reply else LOOMI.right)(answer.tuned)


def test_an_interrupted_evaluation_goes_on_where_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELOOM_CACHE", str(tmp_path / "cache"))
    loaded = load_target(resolve_target(str(run)))
    generator = Generator(loaded.model, loaded.renderer)
    asked = [probe.asked for probe in load_probes().identity[:6]]
    settings = GenerationConfig(max_new_tokens=3)

    def answers(told: list[int], stop_at: int = 100) -> list[str]:
        def tell(done: int, total: int) -> None:
            told.append(done)
            if done >= stop_at:
                raise KeyboardInterrupt

        kept = KeptAnswers(("tiny",), settings)
        return kept.answers(generator, asked, base=False, batch_size=2, on_progress=tell)

    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        answers(first, stop_at=2)
    (file,) = (tmp_path / "cache" / "evaluation").iterdir()
    with open(file, "a", encoding="utf-8") as torn:
        torn.write('{"prompt": "torn')
    second: list[int] = []
    found = answers(second)
    third: list[int] = []
    assert answers(third) == found == [str(generator.answer(one, settings)) for one in asked]
    assert (first, second, third) == ([0, 2], [2, 4, 6], [6])


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=False)


def test_the_figures_go_into_the_run_once_and_gates_can_be_required(run: Path, files: dict[str, Any]) -> None:
    words = ("--identity-probes", files["identity_probes"], "--general-probes", files["general_probes"], "--max-new-tokens", 4)
    printed = invoke(run, *words, "--gate", "general_loss_delta=-9")
    assert printed.exit_code == 0
    assert "identity, en" in printed.stdout
    assert "NOT PASSED: general_loss_delta" in printed.stdout
    with pytest.raises(GuardError, match="general_loss_delta"):
        invoke(run, *words, "--gate", "general_loss_delta=-9", "--require-gates")
    limits = ("--gate", "identity_rate.en=0", "--gate", "leak_rate=1", "--gate", "general_loss_delta=9")
    done = json.loads(invoke(run, *words, *limits, "--json", "--require-gates").stdout)
    written = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert done["identity_rate"] == written["identity_rate"]
    assert {"value", "low", "high", "before"} <= done["leak_rate"].keys() & done["general_loss_delta"].keys()
    value = done["identity_rate"]["value"]
    assert done["gates"][0] == {"name": "identity_rate.en", "at_least": 0.0, "value": value, "passed": True}
    assert done["passed"]
    assert {"loss", "perplexity", "scores"} == done["base"].keys() == done["model"].keys()
    assert {"bleu", "chrf", "rouge-l"} <= done["model"]["scores"].keys()
    rows = (run / "evaluation-answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["prompt"] for row in rows][1] == "user: Hello!\nassistant: Hi.\nuser: And you are?"
    report, card = (file.read_text(encoding="utf-8") for file in (run / "report.md", run / "adapter" / "README.md"))
    assert report.count("## Evaluation") == card.count("## Evaluation") == 1
    assert card.index("## Evaluation") < card.index("## Use")


def test_a_section_is_put_in_place_and_replaced() -> None:
    card = "# Loomi\n\ntext\n\n## Use\n\nso\n"
    once = with_section(card, "## Evaluation\n\none\n")
    assert once == "# Loomi\n\ntext\n\n## Evaluation\n\none\n\n## Use\n\nso\n"
    assert with_section(once, "## Evaluation\n\ntwo\n") == once.replace("one", "two")


def test_what_cannot_be_evaluated_is_told(run: Path, tiny_model: Path, files: dict[str, Any]) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny_model, {}, "no adapter"),
        (shutil.copytree(run / "adapter", run.parent / "alone"), {}, "no new name"),
        (run, {"gates": {"leek_rate": 0.1}}, "unknown gate"),
        (run, {"gates": {"leak_rate": 2.0}}, "no limit"),
        (run, {"gates": {"identity_rate.zh": 0.5}, "languages": ("en",)}, "not asked in"),
        (run, {"general_probes": "nowhere.jsonl"}, "cannot be read"),
    ]
    for target, changes, told in cases:
        with pytest.raises(UserError, match=told) as caught:
            api.evaluate_persona(target, **files | changes)
        assert_mendable(caught.value)
    with pytest.raises(UserError, match="of a persona"):
        invoke(run, "--loss-only", "--require-gates")
