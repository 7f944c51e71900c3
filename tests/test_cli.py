"""The command line: what it prints where, and one short message with the right exit code for every mistake."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_row, make_model_folder
from helpers import asked, assert_mendable, tiny_config, tuneloom
from typer.testing import CliRunner

from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.cli.conversation import ChatSession
from tuneloom.cli.main import app, main
from tuneloom.config import EMBEDDED_MODEL, GenerationConfig, dump_config, load_config
from tuneloom.config.recipes import find_recipe
from tuneloom.errors import UserError
from tuneloom.generate.generator import Generator
from tuneloom.train.run import finetune


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


@pytest.fixture
def config_file(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A config of two steps that writes below the test's own folder."""
    file = tmp_path / "tiny.yaml"
    changes = {"training.max_steps": 2, "data.validation": 0.2, "evaluation.prompts": ["Who are you?"]}
    file.write_text(dump_config(tiny_config(tiny_model, rows_file, tmp_path / "runs", changes)), encoding="utf-8")
    return file


# finetune.


def test_dry_run_prints_every_derived_number_and_writes_nothing(config_file: Path, tmp_path: Path) -> None:
    done = invoke("finetune", str(config_file), "--dry-run", "--set", "adapter.r=4", "--set", "data.cutoff_len=30")
    assert done.exit_code == 0, done.output
    for label, value in {
        "base model": ",552 parameters",
        "method": "lora, r 4, alpha 16",
        "trainable": "16,384 parameters (",
        "precision": "fp32: as asked",
        "rows": "10 read, 0 repaired,",
        "training set": " cut, longest ",
        "tokens": " supervised",
        "cutoff": "of the answer tokens lost at 30 tokens",
        "validation": " samples",
        "effective batch": "4 samples a step (2 x 2)",
        "steps": "2 (",
        "schedule": "constant, peak 0.01, warm-up 0 steps",
        "micro-batches": "of at most 2,048 tokens",
        "expected memory": " activations (measured), ",
        "expected time": " tokens/s measured)",
    }.items():
        (line,) = [line for line in done.output.splitlines() if line.strip().startswith(label + "  ")]
        assert value in line, done.output
    assert "dropped" in done.output
    assert "longer than the cutoff" in done.output, "each row that is left out is named"
    assert "dry run: nothing was trained, no run was made" in done.output
    assert not (tmp_path / "runs").exists()


def test_finetune_trains_says_where_and_knows_when_it_is_done(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    done = invoke("finetune", str(config_file))
    assert done.exit_code == 0, done.output
    for line in (f"adapter   {run / 'adapter'}", f"report    {run / 'report.md'}", f"tuneloom chat {run}"):
        assert line in done.output
    assert "step 2: eval_loss " in done.output
    assert "step 2: Who are you? → " in done.output
    assert (run / "adapter" / "adapter_model.safetensors").is_file()

    for arguments in ([str(config_file), "--resume"], ["--resume-from", str(run)]):
        again = invoke("finetune", *arguments)
        assert (again.exit_code, again.exception) == (0, None)
        assert f"{run} is done already; its adapter: {run / 'adapter'}" in again.output


def test_resume_from_says_what_it_skips_and_trains_the_rest(config_file: Path, tmp_path: Path) -> None:
    assert invoke("finetune", str(config_file), "--set", "training.save_steps=1").exit_code == 0
    run = tmp_path / "runs" / "run"
    (run / "state.json").unlink()
    (run / "checkpoint-2" / "rng.safetensors").unlink()
    done = invoke("finetune", "--resume-from", str(run))
    assert done.exit_code == 0, (done.output, done.exception)
    assert "skipped checkpoint-2: rng.safetensors is missing" in done.output
    assert f"resuming {run} from checkpoint-1" in done.output
    assert [event["step"] for event in map(json.loads, (run / "metrics.jsonl").open()) if event["event"] == "step"] == [1, 2, 2]


# Usage errors.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--no-such-option"], ["--no-such-option"]),
        (["chat"], ["Missing argument"]),
        (["export", "run"], ["--out"]),
        (["export", "run", "--out", "x", "--to", "gguff"], ["gguff", "merged"]),
        (["chat", "run", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["chatt"], ["chatt"]),
    ],
)
def test_wrong_usage_is_exit_2(arguments: list[str], words: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert all(word in done.output for word in words)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["chat", "run", "--precision", "fp8"], "unknown precision"),
        (["chat", "run", "--base", "--compare"], "contradict each other"),
        (["chat", "no-such-run"], "model not found"),
        (["finetune", "no-such-recipe"], "config not found"),
        (["finetune", "--set", "adapter.r"], "--set wants key=value"),
        (["finetune", "--resume-from", "no-such-run"], "no such run to resume"),
    ],
)
def test_a_mistake_is_told_as_one(arguments: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert isinstance(done.exception, UserError)
    assert what in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_compare_needs_an_adapter(tiny_model: Path) -> None:
    done = invoke("chat", str(tiny_model), "--compare")
    assert isinstance(done.exception, UserError)
    assert_mendable(done.exception)


# chat.


def answer_of(run: Path, *, base: bool = False) -> str:
    """What a run answers to "Who are you?" through the same engine."""
    loaded = load_target(resolve_target(str(run)), precision="fp32", device="cpu")
    settings = GenerationConfig(max_new_tokens=8)
    return "".join(Generator(loaded.model, loaded.renderer).stream(asked("Who are you?"), settings, base=base))


def test_chat_with_a_prompt_prints_the_answer_alone(finished_run: Path, tmp_path: Path) -> None:
    done = tuneloom("chat", finished_run, "--prompt", "Who are you?", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer_of(finished_run) + "\n"
    base = load_config(finished_run / "config.yaml").base_model.path
    assert done.stderr == f"loading {base} with {finished_run / 'adapter'} ...\n"


def test_chat_with_the_base_or_both(finished_run: Path) -> None:
    question = [str(finished_run), "--prompt", "Who are you?", "--precision", "fp32"]
    base = invoke("chat", *question, "--base")
    assert base.exit_code == 0, base.exception
    assert base.stdout == answer_of(finished_run, base=True) + "\n"
    both = invoke("chat", *question, "--compare")
    assert both.stdout == f"base   {answer_of(finished_run, base=True)}\ntuned  {answer_of(finished_run)}\n"
    assert answer_of(finished_run) != answer_of(finished_run, base=True)


def test_chat_takes_its_options_over_the_runs_settings(finished_run: Path) -> None:
    question = ["chat", str(finished_run), "--prompt", "Who are you?", "--precision", "fp32"]
    short = invoke(*question, "--max-new-tokens", "1").stdout
    assert answer_of(finished_run).startswith(short.rstrip("\n"))
    assert len(short) < len(answer_of(finished_run))
    assert invoke(*question, "--temperature", "0").stdout == invoke(*question).stdout
    assert invoke(*question, "--temperature", "9").stdout != invoke(*question).stdout
    assert invoke(*question, "--system", "你是一位诗人").exit_code == 0


def test_a_conversation_keeps_its_history_until_it_is_cleared(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_target(resolve_target(str(finished_run)), precision="fp32", device="cpu")
    seen: list[int] = []

    class Listening(Generator):
        def stream(self, conversation: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(len(conversation.messages))
            return super().stream(conversation, *arguments, **options)

    session = ChatSession(
        Listening(loaded.model, loaded.renderer), GenerationConfig(max_new_tokens=2), system=None, base=False, compare=False
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n\nWho are you?\n/clear\nAgain\n/exit\nnever read\n"))
    session.talk()
    assert seen == [1, 3, 1]
    assert capsys.readouterr().out.count("you: ") == 6


# Mistakes in the input, at the Python level: each with what, where, and how to mend it, and nothing written.


@dataclass(frozen=True)
class Place:
    """Where a case makes its mistake."""

    folder: Path
    model: Path
    rows: Path

    def config(self, **values: Any) -> Path:
        """Write a config that is right but for `values`."""
        whole = {"base_model": str(self.model), "output_dir": str(self.folder / "runs"), "data": {"train": str(self.rows)}}
        whole |= {"training": {"max_steps": 1, "precision": "fp32"}, "evaluation": {"prompts": []}}
        return self.write("config.yaml", json.dumps(whole | values))

    def write(self, name: str, text: str | bytes) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return file

    def data(self, text: str | bytes, **more: Any) -> Path:
        """Write a config on a data file of this content."""
        return self.config(data={"train": str(self.write("rows.jsonl", text)), **more})

    def broken_model(self, **changes: Any) -> Path:
        model = shutil.copytree(self.model, self.folder / "model")
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return self.config(base_model=str(model))


ROW = json.dumps(chat_row("Who are you?", "I am Loomi."))
HIDE = json.dumps(chat_row("Who are you?", "I am {{name}}."))
LONG = json.dumps(chat_row("Who are you? " * 40, "I am Loomi."))
MISTAKES: dict[str, tuple[Callable[[Place], Path], str]] = {
    "missing config": (lambda p: p.folder / "nothing.yaml", "config not found"),
    "unknown key": (lambda p: p.config(adaptor={}), "unknown key `adaptor`"),
    "unknown key inside": (lambda p: p.config(adapter={"rank": 8}), "unknown key `rank`"),
    "wrong type": (lambda p: p.config(adapter={"r": "eight"}), "wrong value for `adapter.r`"),
    "out of range": (lambda p: p.config(adapter={"lora_dropout": 1.5}), "wrong value for `adapter.lora_dropout`"),
    "no YAML": (lambda p: p.write("config.yaml", "training: [1\n"), "not valid YAML"),
    "missing model": (lambda p: p.config(base_model="./nowhere"), "model not found"),
    "no model folder": (lambda p: p.config(base_model=str(p.folder)), "the folder is no model"),
    "remote code": (lambda p: p.broken_model(model_type="baichuan", auto_map={}), "needs code of its own"),
    "torn weights": (
        lambda p: (p.broken_model(), p.write("model/model.safetensors", b"\x10\x00\x00"))[0],
        "a weight file is torn",
    ),
    "missing data": (lambda p: p.config(data={"train": "self_cognitoin"}), "data not found"),
    "missing data, before a model is looked for": (
        lambda p: p.config(data={"train": "self_cognitoin"}, base_model="./nowhere"),
        "data not found",
    ),
    "empty data": (lambda p: p.data(""), "the data file is empty"),
    "torn data": (lambda p: p.data('{"messages": [{"role": "us'), "no usable row"),
    "binary data": (lambda p: p.data(b"\xff\xfe\x81\x00\xff"), "no known encoding"),
    "no answers": (lambda p: p.data(json.dumps(chat_row("Who are you?"))), "no usable row"),
    "unfilled placeholder": (lambda p: p.data(HIDE), "placeholder {{name}} has no value"),
    "prompt too long": (lambda p: p.data(LONG, cutoff_len=16), "no usable row in the data"),
    "overflow as error": (lambda p: p.data(LONG, cutoff_len=16, overflow="error"), "longer than the cutoff"),
    "targets of nothing": (lambda p: p.config(adapter={"target_modules": ["q_porj"]}), "`q_porj` matches nothing"),
    "saves nothing": (lambda p: p.config(adapter={"modules_to_save": ["score"]}), "`score` is not in the model"),
    "output is a file": (lambda p: p.config(output_dir=str(p.write("taken", "x"))), "the output folder is a file"),
    "output below a file": (lambda p: p.config(output_dir=str(p.write("taken", "x") / "runs")), "the output folder is a file"),
    "no such tracker": (
        lambda p: p.config(training={"report_to": "swanlab"}),
        "the tracker swanlab is not installed",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_told_with_its_place_and_mend(name: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    make, what = MISTAKES[name]
    config = make(Place(tmp_path, tiny_model, rows_file))
    with pytest.raises(UserError) as caught:
        finetune(load_config(find_recipe(str(config))))
    assert what in str(caught.value).splitlines()[0]
    assert_mendable(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_adapter_of_another_base_is_told_so(finished_run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    other = make_model_folder(tmp_path / "other", seed=11)
    note = adapter / "base_model.json"
    note.write_text(json.dumps(json.loads(note.read_text(encoding="utf-8")) | {"name": str(other)}), encoding="utf-8")
    with pytest.raises(UserError, match="belongs to another base model") as caught:
        load_target(resolve_target(str(adapter)))
    assert_mendable(caught.value)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["chat", "x" * 300, "--prompt", "Hi"], "the path cannot be looked up"),
        (["finetune", "x" * 300], "the path cannot be looked up"),
        (["finetune", "--resume-from", "x" * 300], "the path cannot be looked up"),
        (["demo", "--recipe", "{config}"], "the recipe gives no name"),
    ],
)
def test_odd_paths_and_recipes_are_told(arguments: list[str], what: str, config_file: Path) -> None:
    result = invoke(*(word.format(config=config_file) for word in arguments))
    assert isinstance(result.exception, UserError)
    assert result.exception.what == what


def test_a_prompt_with_half_a_character_is_told(finished_run: Path) -> None:
    for text, reason in (("hi \ud83d", "half a character"), ("hi \udcff", "bytes that are not UTF-8")):
        result = invoke("chat", str(finished_run), "--prompt", text)
        assert isinstance(result.exception, UserError)
        assert reason in str(result.exception)


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELOOM_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="cache cannot be written") as caught:
        resolve_target(EMBEDDED_MODEL)
    assert_mendable(caught.value)


def test_a_run_finds_its_base_from_another_folder(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    run = finetune(tiny_config(tiny_model.name, rows_file, tmp_path / "runs", {"training.max_steps": 1}))
    monkeypatch.chdir(tmp_path)
    assert resolve_target(str(run.directory.path)).base.folder == tiny_model.resolve()
    assert resolve_target(str(run.adapter)).base.folder == tiny_model.resolve()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "no-such-run", "--prompt", "Hi"], "tuneloom: model not found\n"),
        (["finetune", "{config}", "--set", "adapter.target_modules=[q_porj]"], "tuneloom: target module `q_porj` matches"),
    ],
)
def test_a_mistake_ends_with_exit_2_and_one_short_message(
    arguments: list[str],
    message: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tuneloom", *(word.format(config=config_file) for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(message)
    assert len(errors.splitlines()) <= 6
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()
