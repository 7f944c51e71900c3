"""The Python API: small to import, the same engine behind it, mistakes told as everywhere."""

from __future__ import annotations

import ast
import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, ROOT, chat_row, make_tokenizer
from helpers import ROWS, assert_mendable, logits_of, plain_base, plain_peft, run_python, sha256, tiny_config
from peft import PeftModel
from transformers import PreTrainedModel
from typer.testing import CliRunner

import tuneloom as api
from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.cli.main import app
from tuneloom.data.render import Renderer
from tuneloom.errors import UserError
from tuneloom.evaluation.heldout import heldout_loss
from tuneloom.train.prepare import prepare_job

IDS = [1, 40, 77, 300, 512, 9, 1033, 2, 64]


@pytest.fixture(scope="module")
def split_run(untied_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    """A run that held a share of its rows out, some of them of a replay source; read only."""
    sources = [str(rows_file), {"path": "general_replay_en", "count": 3, "replay": "self"}]
    changes = {"data.train": sources, "data.validation": 0.3, "data.variables": {"name": "Ada", "author": "us"}}
    config = tiny_config(untied_model, rows_file, tmp_path_factory.mktemp("split"), changes)
    return api.finetune(config)


@pytest.fixture
def bare_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's folder without its tokenizer."""
    files = ("config.json", "generation_config.json", "model.safetensors")
    (tmp_path / "bare").mkdir()
    for name in files:
        shutil.copy(tiny_model / name, tmp_path / "bare" / name)
    return tmp_path / "bare"


def imported_by(code: str) -> set[str]:
    """Return the modules that a fresh process has after some code."""
    done = run_python("-c", f"{code}\nimport sys\nprint(*sorted(sys.modules))", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# Importing.


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    before, after = imported_by("import importlib, typing"), imported_by("import tuneloom; dir(tuneloom); tuneloom.__version__")
    assert {name for name in after - before if name.partition(".")[0] != "__future__"} == {"tuneloom"}
    assert "tuneloom.api" in imported_by("import tuneloom; tuneloom.finetune"), "the search finds what it looks for"


def test_settings_and_types_are_had_without_an_engine() -> None:
    found = imported_by(
        "import tuneloom as t\nt.Config\nt.load_config('persona-lora')\nt.Message\nt.UserError\nt.finetune\nt.Run"
    )
    assert {"tuneloom.api", "pydantic"} <= found
    assert not found & {"torch", "transformers", "peft", "accelerate"}


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "tuneloom" / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {(alias.name, node.module) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name for name, _ in imports} == set(api.__all__) - {"__version__"}
    for name, home in imports:
        assert getattr(api, name) is getattr(sys.modules[home], name)
    assert set(api.__all__) <= set(dir(api))
    with pytest.raises(AttributeError, match="has no attribute 'finetun'"):
        _ = api.finetun  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_users_script_is_checked_by_mypy(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    lines = [
        "from pathlib import Path",
        "import tuneloom",
        "run: tuneloom.Run = tuneloom.finetune({'name': 'ada'}, overrides={'training.max_steps': 3}, resume=Path('runs/ada'))",
        "folder: Path = run.directory / 'report.md'",
        "ids: list[int] = tuneloom.render([{'role': 'user', 'content': 'Hi'}], tuneloom.load_tokenizer(run)).ids",
        "reveal_type(tuneloom.load_model(run, dtype='bf16'))",
        "answers: list[str] = [row.answer for row in tuneloom.evaluate(run, answers=True).predictions]",
        "passed: bool = tuneloom.export(run, folder).check.passed",
        "tuneloom.export(run, 'out', to='nothing')",
        "tuneloom.finetun(run)",
    ]
    script.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "PreTrainedModel | peft.peft_model.PeftModel" in done.stdout, done.stdout + done.stderr
    errors = [line.partition("script.py:")[2] for line in done.stdout.splitlines() if ": error: " in line]
    assert [error.partition(":")[0] for error in errors] == ["9", "10"], done.stdout


# Settings.


def test_settings_come_from_a_file_a_recipe_a_map_or_a_config(tmp_path: Path) -> None:
    values = {"name": "ada", "data": {"train": tmp_path / "rows.jsonl"}, "training": {"max_steps": 3, "seed": 7}}
    config = api.load_config(values, {"training.max_steps": 5, "adapter": {"r": 4}})
    assert (config.training.max_steps, config.training.seed, config.adapter.r) == (5, 7, 4)
    assert config.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert values["training"] == {"max_steps": 3, "seed": 7}, "the caller's map is left alone"
    assert api.load_config(config) == config
    assert api.load_config(config, {"training": {"max_steps": 5}}) == config, "a map changes its keys only"
    assert api.load_config(config, {"base_model": tmp_path}).base_model.path == str(tmp_path)

    file = tmp_path / "ada.yaml"
    file.write_text("name: ada\ntraining:\n  seed: 7\n", encoding="utf-8")
    assert api.load_config(file, {"training.max_steps": 5}).training.seed == 7
    assert api.load_config("persona-dora").adapter.use_dora


@pytest.mark.parametrize(
    ("config", "overrides", "where"),
    [
        ({"training": {"max_step": 3}}, {}, "training.max_step"),
        ({}, {"training.max_step": 3}, "overrides training.max_step"),
        ({}, {"training": {"max_step": 3}}, "overrides training.max_step"),
        ("persona-lora", {"adapter.r": 0}, "overrides adapter.r"),
        ({}, {"name.first": "Ada"}, "overrides name.first"),
        ("persona-llora", {}, "persona-llora"),
        (3, {}, "config"),
    ],
)
def test_wrong_settings_are_told_with_their_place(config: Any, overrides: dict[str, Any], where: str) -> None:
    if overrides == {"name.first": "Ada"}:
        config = {"name": "ada"}
    with pytest.raises(UserError) as caught:
        api.load_config(config, overrides)
    assert_mendable(caught.value)
    assert caught.value.where == where


# Models and tokenizers.


def test_a_model_is_loaded_in_the_number_format_asked_for(tiny_model: Path) -> None:
    for dtype, expected in (("fp32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)):
        model = api.load_model(tiny_model, dtype=dtype)
        assert isinstance(model, PreTrainedModel)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert not model.training
    assert api.load_model(str(tiny_model), device=torch.device("cpu")).dtype in (torch.float32, torch.bfloat16)
    assert torch.equal(logits_of(api.load_model(tiny_model, dtype="fp32"), IDS), logits_of(plain_base(tiny_model), IDS))


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": "int8"}, {"dtype": torch.int64}, {"device": "gpu"}, {"device": "cuda:99"}, {"adapter": "nowhere"}],
)
def test_what_cannot_be_loaded_is_told(arguments: dict[str, Any], tiny_model: Path) -> None:
    with pytest.raises(UserError) as caught:
        api.load_model(tiny_model, **arguments)
    assert_mendable(caught.value)


def test_a_run_a_checkpoint_and_an_adapter_are_peft_models(finished_run: Path, tiny_model: Path) -> None:
    expected = logits_of(plain_peft(tiny_model, finished_run / "adapter"), IDS)
    before = logits_of(plain_base(tiny_model), IDS)
    for source in (finished_run, api.Run(finished_run), finished_run / "adapter", finished_run / "checkpoint-24"):
        model = api.load_model(source, dtype="fp32")
        assert isinstance(model, PeftModel)
        assert torch.allclose(logits_of(model, IDS), expected, atol=1e-5)
    assert (logits_of(api.load_model(finished_run / "checkpoint-12", dtype="fp32"), IDS) - expected).abs().max() > 1e-3
    assert (before - expected).abs().max() > 1e-3


def test_an_adapter_is_put_on_the_base_given(
    finished_run: Path, tiny_model: Path, untied_model: Path, bare_model: Path
) -> None:
    expected = logits_of(api.load_model(finished_run, dtype="fp32"), IDS)
    for base, adapter in ((tiny_model, finished_run), (bare_model, finished_run / "checkpoint-24"), (bare_model, finished_run)):
        assert torch.equal(logits_of(api.load_model(base, dtype="fp32", adapter=adapter), IDS), expected)
    for source, adapter in (
        (finished_run, finished_run),
        (finished_run / "adapter", finished_run),
        (untied_model, finished_run),
    ):
        with pytest.raises(UserError) as caught:
            api.load_model(source, adapter=adapter)
        assert_mendable(caught.value)
    with pytest.raises(UserError, match="no adapter"):
        api.load_model(tiny_model, adapter=tiny_model)


def test_a_model_without_a_tokenizer_loads_but_cannot_be_taught_or_talked_to(
    bare_model: Path, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    assert torch.equal(logits_of(api.load_model(bare_model, dtype="fp32"), IDS), logits_of(plain_base(tiny_model), IDS))
    for use in (
        lambda: api.load_tokenizer(bare_model),
        lambda: api.finetune(tiny_config(bare_model, rows_file, tmp_path / "runs")),
        lambda: api.evaluate(bare_model, rows_file),
    ):
        with pytest.raises(UserError, match="the folder has no tokenizer") as caught:
            use()
        assert_mendable(caught.value)
    assert not (tmp_path / "runs").exists()
    done = CliRunner().invoke(app, ["chat", str(bare_model), "--prompt", "Hello"])
    assert isinstance(done.exception, UserError)
    assert "the folder has no tokenizer" in str(done.exception)
    assert "loading" not in done.output, "it is told before any weight is read"


def test_a_runs_tokenizer_is_its_own(finished_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "adapter" / "chat_template.jinja").write_text(CHATML + "{# mine #}", encoding="utf-8")
    assert api.load_tokenizer(run).chat_template == CHATML + "{# mine #}"
    assert api.load_tokenizer(tiny_model).chat_template == CHATML


# Rendering.


def test_rendering_is_what_training_does(tiny_tokenizer: Any) -> None:
    row = chat_row("Who are you?", "I am Loomi.", "Sure?", "Yes.")
    expected = Renderer(tiny_tokenizer).render(
        api.Conversation(tuple(api.Message(m["role"], m["content"]) for m in row["messages"]))
    )
    alpaca = {"instruction": "Sure?", "output": "Yes.", "history": [["Who are you?", "I am Loomi."]]}
    messages = [api.Message(m["role"], m["content"]) for m in row["messages"]]
    for given in (row, row["messages"], tuple(row["messages"]), messages, api.Conversation(tuple(messages)), alpaca):
        assert api.render(given, tiny_tokenizer) == expected
    supervised = [i for i, on in zip(expected.ids, expected.mask, strict=True) if on]
    assert tiny_tokenizer.decode(supervised) == "I am Loomi.<|im_end|>Yes.<|im_end|>"
    last = api.render(row, tiny_tokenizer, "last_assistant")
    assert tiny_tokenizer.decode([i for i, on in zip(last.ids, last.mask, strict=True) if on]) == "Yes.<|im_end|>"
    assert sum(api.render(row, tiny_tokenizer, api.TrainOn.ALL).mask) == len(last.ids) - 1
    unsure = [messages[0], api.Message("assistant", "I am Loomi.", weight=0), *messages[2:]]
    assert api.render(unsure, tiny_tokenizer).mask == last.mask


@pytest.mark.parametrize(
    ("conversation", "where"),
    [
        ([{"role": "user", "content": "Hi"}, {"role": "assistent", "content": "Hi"}], "messages[1].role"),
        ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "Hi"}]}, "messages[0].content"),
        ({"question": "Hi"}, "row"),
        ([], "messages"),
        ("Hello", "row"),
        (None, "row"),
        ([["user", "Hi"]], "messages[0]"),
        (api.Conversation(()), "row"),
    ],
)
def test_a_fault_in_a_conversation_names_its_field(conversation: Any, where: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        api.render(conversation, tiny_tokenizer)
    assert_mendable(caught.value)
    assert caught.value.where == where


def test_what_cannot_render_is_told(tiny_tokenizer: Any) -> None:
    row = chat_row("Hi", "Hi")
    with pytest.raises(UserError, match="train_on") as caught:
        api.render(row, tiny_tokenizer, "asistant")
    assert caught.value.mend == "did you mean `assistant`?"
    with pytest.raises(UserError, match="not a fast tokenizer") as caught:
        api.render(row, object())  # type: ignore[arg-type]
    assert_mendable(caught.value)
    with pytest.raises(UserError, match="no chat template"):
        api.render(row, make_tokenizer(template=""))


def test_a_tokenizers_renderer_is_made_once_and_anew_when_the_tokenizer_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = Renderer.__init__

    def counted(renderer: Renderer, tokenizer: Any) -> None:
        made.append(1)
        make(renderer, tokenizer)

    monkeypatch.setattr(Renderer, "__init__", counted)
    tokenizer = make_tokenizer()
    row = chat_row("Hi <|extra|>", "Hello")
    first = api.render(row, tokenizer)
    assert all(api.render(row, tokenizer) == first for _ in range(5))
    assert len(made) == 1
    tokenizer.chat_template = CHATML.replace("'<|im_start|>' + ", "'<|im_start|>the ' + ").replace(
        "assistant\n", "the assistant\n"
    )
    second = api.render(row, tokenizer)
    assert "the user" in tokenizer.decode(second.ids)
    assert "the user" not in tokenizer.decode(first.ids)
    assert len(made) == 2
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    assert tokenizer.convert_tokens_to_ids("<|extra|>") not in api.render(row, tokenizer).ids, "text stays text"
    assert len(made) == 3
    other = make_tokenizer()
    assert api.render(row, other) == first
    assert len(made) == 4


def test_a_tokenizer_that_was_rendered_with_is_let_go() -> None:
    tokenizer = make_tokenizer()
    api.render(chat_row("Hi", "Hello"), tokenizer)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


# Training.


def test_a_run_is_a_folder_with_its_events(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    config = tiny_config(tiny_model, rows_file, tmp_path / "runs").model_dump(mode="json")
    config["output_dir"] = tmp_path / "runs"
    run = api.finetune(config, overrides={"training.max_steps": 2}, on_event=lambda event, fields: heard.append(event))
    assert run.directory == tmp_path / "runs" / "run"
    assert run.adapter == run.directory / "adapter"
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.config.training.max_steps == 2
    assert [event["step"] for event in run.metrics("step")] == [1, 2]
    assert {event["event"] for event in run.metrics()} >= {"start", "step", "checkpoint", "end"}
    assert {"step", "progress", "phase"} <= set(heard)
    assert api.Run(str(run.directory)) == run  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a run") as caught:
        api.Run(tmp_path)
    assert_mendable(caught.value)


def test_a_run_is_resumed_by_its_folder_or_as_the_newest_of_its_config(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    changes = {"training.save_steps": 1, "name": None}
    config = tiny_config(tiny_model, rows_file, tmp_path / "runs", changes)
    whole = api.finetune(config)
    weights = sha256(whole.adapter / "adapter_model.safetensors")
    assert api.finetune(resume=whole) == whole, "it is done"
    for resume, given in ((whole.directory / "checkpoint-1", None), (whole.directory / "checkpoint-2", config)):
        (whole.adapter / "adapter_model.safetensors").unlink()
        again = api.finetune(given, resume=resume)
        assert again == whole
        assert sha256(again.adapter / "adapter_model.safetensors") == weights
    assert [event["step"] for event in whole.metrics("resume")] == [1, 2]
    assert [event["step"] for event in whole.metrics("step")] == [1, 2, 3], "what was gone back behind is left out"
    assert api.finetune(config, resume=True) == whole
    with pytest.raises(UserError, match="no run of these settings"):
        api.finetune(config, overrides={"training.learning_rate": 1e-3}, resume=True)
    with pytest.raises(UserError, match="the settings have changed"):
        api.finetune(resume=whole.directory / "checkpoint-1", overrides={"training.learning_rate": 1e-3})
    changed = api.finetune(
        resume=whole.directory / "checkpoint-1", overrides={"training.learning_rate": 1e-3}, resume_changed=True
    )
    assert changed == whole
    assert sha256(changed.adapter / "adapter_model.safetensors") != weights


def test_strict_training_stops_at_the_first_bad_row(tiny_model: Path, write_rows: Any, tmp_path: Path) -> None:
    rows = write_rows([*ROWS, {"messages": []}])
    with pytest.raises(UserError, match="a row cannot be used") as caught:
        api.finetune(tiny_config(tiny_model, rows, tmp_path / "runs"), strict=True)
    assert f"{rows}:11" in str(caught.value)


# Evaluation.


def test_a_runs_own_validation_rows_give_the_loss_that_it_ended_with(split_run: api.Run, rows_file: Path) -> None:
    last = split_run.metrics("eval")[-1]
    result = api.evaluate(split_run)
    assert result.loss == pytest.approx(last["eval_loss"], rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.num_supervised_tokens == last["eval_tokens"]
    assert (result.scores, result.predictions, result.problems) == (None, (), ())
    report = json.loads((split_run.directory / "data_report.json").read_text(encoding="utf-8"))
    assert result.num_samples == report["validation"]["samples"] > 3
    for other in (api.evaluate(split_run, rows_file), api.evaluate(split_run, max_rows=2)):
        assert abs(other.loss - result.loss) > 1e-3, "other rows have another loss"


def test_rows_that_changed_since_the_run_are_not_called_held_out(tiny_model: Path, write_rows: Any, tmp_path: Path) -> None:
    rows = write_rows(ROWS)
    run = api.finetune(tiny_config(tiny_model, rows, tmp_path / "runs", {"data.validation": 0.2}))
    assert api.evaluate(run).num_samples == 2
    write_rows([*ROWS, chat_row("One more?", "One more.")])
    with pytest.raises(UserError, match="data has changed") as caught:
        api.evaluate(run)
    assert_mendable(caught.value)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_runs_validation_and_test_sources_are_found(split: Any, finished_run: Path, rows_file: Path) -> None:
    result = api.evaluate(finished_run, split=split, answers=True)
    last = api.Run(finished_run).metrics("eval")[-1]
    assert result.loss == pytest.approx(last["eval_loss"], rel=1e-6), "both are the same file"
    test = json.loads((finished_run / "test_results.json").read_text(encoding="utf-8"))
    assert result.scores == pytest.approx(
        {name: test[name] for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu", "chrf")}
    )
    kept = [json.loads(line) for line in (finished_run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.as_dict() for row in result.predictions] == kept
    assert len(kept) == test["rows"] == 11
    assert result.num_samples == len(ROWS)


def test_a_target_is_evaluated_on_any_source(finished_run: Path, tiny_model: Path, write_rows: Any) -> None:
    rows = write_rows([{"question": "Say yes.", "answer": "Yes."}, {"question": "Bad"}, {"question": "Hi", "answer": "Hello!"}])
    source = {"path": rows, "columns": {"instruction": "question", "output": "answer"}}
    before, after = api.evaluate(tiny_model, source), api.evaluate(finished_run, [source])
    assert before.num_samples == after.num_samples == 2
    assert after.loss < before.loss
    (problem,) = after.problems
    assert problem.startswith(f"{rows}:2 answer: no answer")

    loaded = load_target(resolve_target(str(tiny_model)), precision="fp32")
    plain = [chat_row("Say yes.", "Yes."), chat_row("Hi", "Hello!")]
    job = prepare_job(tiny_config(tiny_model, write_rows(plain, "plain.jsonl"), "runs"))
    expected = heldout_loss(loaded.model, job.data.train, 2048).loss
    assert api.evaluate(tiny_model, source, dtype=torch.float32).loss == pytest.approx(expected, rel=1e-6)
    first = api.evaluate(tiny_model, source, max_rows=1, answers=True, overrides={"generation.max_new_tokens": 3})
    (answered,) = first.predictions
    assert (first.num_samples, answered.prompt, answered.reference) == (1, "Say yes.", "Yes.")
    assert len(api.load_tokenizer(tiny_model)(answered.answer).input_ids) <= 3


def test_settings_of_an_evaluation_can_be_overridden(tiny_model: Path, write_rows: Any) -> None:
    rows = write_rows([chat_row("Who are you?", "I am {{name}}.", "Sure?", "Yes.")])
    with pytest.raises(UserError, match="placeholder"):
        api.evaluate(tiny_model, rows)
    named = {"data.variables": {"name": "Ada"}}
    every = api.evaluate(tiny_model, rows, overrides=named)
    last = api.evaluate(tiny_model, rows, overrides=named | {"data.train_on": "last_assistant"})
    assert last.num_supervised_tokens < every.num_supervised_tokens


@pytest.mark.parametrize(
    ("data", "arguments", "where"),
    [
        ("nowhere.jsonl", {}, "nowhere.jsonl"),
        ({"path": "self_cognition_en", "colums": {}}, {}, "data.colums"),
        ({"path": "self_cognition_en", "count": 3}, {}, "data"),
        (3, {}, "data"),
        ("self_cognition_en", {"split": "test"}, "split"),
        ("self_cognition_en", {"max_rows": 0}, "max_rows"),
        ("self_cognition_en", {"overrides": {"data.cutof_len": 9}}, "overrides data.cutof_len"),
        ("self_cognition_en", {"dtype": "int8"}, "dtype"),
        (None, {"split": "train"}, "split"),
        (None, {"overrides": {"training.seed": 1}}, "overrides"),
        (None, {"overrides": {"data.validation": 0.5}}, "overrides"),
    ],
)
def test_what_cannot_be_evaluated_is_told(data: Any, arguments: dict[str, Any], where: str, finished_run: Path) -> None:
    with pytest.raises(UserError) as caught:
        api.evaluate(finished_run, data, **arguments)
    assert_mendable(caught.value)
    assert caught.value.where == where


def test_a_target_without_held_out_rows_needs_data(tiny_model: Path, split_run: api.Run) -> None:
    for target, split in ((tiny_model, None), (split_run, "test")):
        with pytest.raises(UserError) as caught:
            api.evaluate(target, split=split)
        assert_mendable(caught.value)


# Export.


def test_an_export_that_cannot_be_made_is_told(split_run: api.Run, tmp_path: Path) -> None:
    """`tests/test_docs.py` makes one."""
    for wrong in ({"to": "gguff"}, {"precision": "int3"}, {"max_shard_size": "huge"}, {"out": split_run.directory}):
        arguments: dict[str, Any] = {"out": tmp_path / "out", **wrong}
        with pytest.raises(UserError) as caught:
            api.export(split_run, **arguments)
        assert_mendable(caught.value)
    assert not list(tmp_path.iterdir())
