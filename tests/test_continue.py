"""Continuing from an adapter: a new run starts from its weights and its shape, and its files stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model_folder
from helpers import assert_mendable, method, plain_base, plain_peft, sha256, tiny_config
from safetensors.torch import load_file, save_file
from test_cli import invoke
from test_resume import stop_when, stopped

from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.config import Config, load_config, parse_config
from tuneloom.data.plan import plan_step
from tuneloom.errors import UserError
from tuneloom.models.forward import layout_of, supervised_loss_sum
from tuneloom.models.quiet import quiet_peft
from tuneloom.rundir import RunDirectory
from tuneloom.train.resume import find_resume, newest_run
from tuneloom.train.run import Run, finetune, prepare

WEIGHTS = "adapter_model.safetensors"
STILL = {"training.max_steps": 1, "training.learning_rate": 1e-30}
"""One step of no size: the loss is that of the weights as they came, and they stay."""


def continued(tmp_path: Path, model: Path, rows: Path, origin: Path | str, changes: Mapping[str, Any] | None = None) -> Config:
    return tiny_config(model, rows, tmp_path / "runs", {"adapter.continue_from": str(origin), **(changes or {})})


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def loss_of(job: Any, model: Any) -> float:
    """The mean loss of a loaded model on the samples of a job's first step."""
    samples = [job.data.train[i] for i in job.schedule.indices(0)]
    plan = plan_step(samples, 2048, layout_of(model, training=False))
    with torch.inference_mode():
        total = sum(float(supervised_loss_sum(model, batch)) for batch in plan.micro_batches)
    return total / plan.num_supervised_tokens


def edited(origin: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of an adapter, its config changed, without the note of its base."""
    shutil.copytree(origin, folder)
    (folder / "base_model.json").unlink()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | dict(changes)), encoding="utf-8")
    return folder


def refused(config: Config) -> UserError:
    """The error of a config; nothing is written for it."""
    with pytest.raises(UserError) as caught:
        prepare(config)
    assert_mendable(caught.value)
    assert not Path(config.output_dir).exists()
    return caught.value


def origin_run(folder: Path, model: Path, rows: Path, changes: Mapping[str, Any]) -> Run:
    return finetune(tiny_config(model, rows, folder, {"training.max_steps": 2, **changes}))


@pytest.fixture(scope="module")
def dora_run(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of rsLoRA + DoRA on two modules, of rank 4."""
    changes = {**method("rslora+dora"), "adapter.r": 4, "adapter.target_modules": ["up_proj", "q_proj"]}
    return origin_run(tmp_path_factory.mktemp("dora"), tiny_model, rows_file, changes)


# The weights come over.


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("tiny_model", {}),  # the run of `finished_run`
        ("untied_model", {**method("rslora+dora"), "adapter.target_modules": "all-layers", "adapter.bias": "all"}),
        ("untied_model", {"adapter.target_modules": ["q_proj"], "adapter.modules_to_save": ["lm_head"]}),
    ],
    ids=["lora and embedding, tied", "rslora+dora, embedding and biases", "a module saved whole"],
)
def test_the_first_loss_is_that_of_the_adapter_and_its_files_stay(
    model: str, changes: dict[str, Any], rows_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(model)
    if changes:
        origin = origin_run(tmp_path / "first", base, rows_file, changes)
    else:
        origin = Run(RunDirectory(request.getfixturevalue("finished_run")))
    before = files_of(origin.directory.path)
    config = continued(tmp_path, base, rows_file, origin.directory.path, {**STILL, "training.seed": 7})
    done = finetune(config)

    # By plain transformers and PEFT; the base alone, which a fresh adapter starts as, has another loss.
    job = prepare(config)
    (step,) = done.directory.events("step")
    assert step["loss"] == pytest.approx(loss_of(job, plain_peft(base, origin.adapter)), rel=1e-5)
    assert loss_of(job, plain_base(base)) != pytest.approx(step["loss"], rel=1e-2)

    was, now = load_file(origin.adapter / WEIGHTS), load_file(done.adapter / WEIGHTS)
    assert was.keys() == now.keys()
    assert all(torch.allclose(value, now[key], rtol=0, atol=1e-12) for key, value in was.items())
    assert files_of(origin.directory.path) == before
    assert done.directory.path.parent != origin.directory.path.parent


def test_optimizer_and_schedule_begin_anew_from_a_checkpoint_as_well(
    tiny_model: Path, rows_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    checkpoint = finished_run / "checkpoint-12"
    done = finetune(
        continued(
            tmp_path,
            tiny_model,
            rows_file,
            checkpoint,
            {"training.warmup_steps": 2, "training.lr_scheduler_type": "constant_with_warmup"},
        )
    )
    rates = [event["learning_rate"] for event in done.directory.events("step")]
    assert rates == [0, 5e-3, 1e-2], "the warm-up begins again"
    assert list(done.directory.checkpoints()) == [3]
    steps = load_file(done.directory.checkpoint(3) / "optimizer.safetensors")
    assert {int(value) for key, value in steps.items() if key.endswith(".step")} == {3}
    assert sha256(done.adapter / WEIGHTS) != sha256(checkpoint / WEIGHTS)


# The shape comes over.


def test_what_is_left_open_is_taken_over_said_and_repeats(
    tiny_model: Path, rows_file: Path, dora_run: Run, tmp_path: Path
) -> None:
    done = finetune(continued(tmp_path, tiny_model, rows_file, dora_run.directory.path, {"adapter.lora_dropout": 0.25}))
    kept = load_config(done.directory.config)
    assert kept.adapter.model_dump() == load_config(dora_run.directory.config).adapter.model_dump() | {
        "lora_dropout": 0.25,
        "target_modules": ("q_proj", "up_proj"),
        "continue_from": str(dora_run.directory.path),
    }
    assert json.loads((done.adapter / "adapter_config.json").read_text("utf-8"))["lora_dropout"] == 0.25

    again = finetune(kept)
    assert again.directory.path.name == "run-2"
    assert again.directory.config.read_text("utf-8") == done.directory.config.read_text("utf-8")
    assert sha256(again.adapter / WEIGHTS) == sha256(done.adapter / WEIGHTS)


def test_the_adapters_dropout_is_taken_over_and_works(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    origin = origin_run(tmp_path / "first", tiny_model, rows_file, {"adapter.lora_dropout": 0.5}).adapter
    with_it = prepare(continued(tmp_path, tiny_model, rows_file, origin))
    assert with_it.config.adapter.lora_dropout == 0.5
    without = prepare(continued(tmp_path, tiny_model, rows_file, origin, {"adapter.lora_dropout": 0.0}))
    ids = torch.tensor([[1, 2, 3, 4]])
    differ = [
        len({float(job.model.train()(input_ids=ids).logits.detach().sum()) for _ in range(3)}) for job in (with_it, without)
    ]
    assert differ == [3, 1]


@pytest.mark.parametrize("spelling", ["all-linear", ["query_key_value", "dense", "dense_h_to_4h", "down_proj"]])
def test_modules_are_compared_by_what_they_match(
    spelling: Any, tiny_model: Path, rows_file: Path, finished_run: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    origin = origin_run(tmp_path / "first", tiny_model, rows_file, {})
    job = prepare(continued(tmp_path, tiny_model, rows_file, origin.adapter, {"adapter.target_modules": spelling}))
    assert job.config.adapter.target_modules in (spelling, tuple(spelling)), "as the config spells it"
    error = refused(continued(tmp_path, tiny_model, rows_file, finished_run, {"adapter.target_modules": spelling}))
    assert error.where == "adapter.target_modules"
    assert "embed_tokens" in str(error.expected)


@pytest.mark.parametrize(
    ("changes", "where", "got", "expected"),
    [
        ({"r": 8}, "adapter.r", "r 8", "r 4"),
        ({"lora_alpha": 8}, "adapter.lora_alpha", "lora_alpha 8", "lora_alpha 16"),
        ({"use_rslora": False}, "adapter.use_rslora", "use_rslora false", "use_rslora true"),
        ({"use_dora": False}, "adapter.use_dora", "use_dora false", "use_dora true"),
        ({"bias": "all"}, "adapter.bias", "bias all", "bias none"),
        ({"target_modules": ["q_proj"]}, "adapter.target_modules", "target_modules q_proj", "target_modules q_proj, up_proj"),
        ({"modules_to_save": ["lm_head"]}, "adapter.modules_to_save", "modules_to_save lm_head", "modules_to_save none"),
        (
            {"init_lora_weights": "gaussian"},
            "adapter.init_lora_weights",
            "init_lora_weights gaussian",
            "init_lora_weights true",
        ),
        ({"r": 2, "use_dora": False}, "adapter.r, adapter.use_dora", "r 2; use_dora false", "r 4; use_dora true"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_shape_is_refused_by_its_key(
    changes: dict[str, Any],
    where: str,
    got: str,
    expected: str,
    tiny_model: Path,
    rows_file: Path,
    dora_run: Run,
    tmp_path: Path,
) -> None:
    named = {f"adapter.{key}": value for key, value in changes.items()}
    error = refused(continued(tmp_path, tiny_model, rows_file, dora_run.adapter, named))
    assert (error.where, error.got) == (where, got)
    assert error.expected == f"{expected}, as {dora_run.adapter} has it"
    assert "drop adapter.continue_from" in str(error.mend)


# What cannot be continued.


def test_another_base_is_refused_naming_both(tiny_model: Path, rows_file: Path, finished_run: Path, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "other", seed=9)
    error = refused(continued(tmp_path, other, rows_file, finished_run))
    assert error.what == "the adapter belongs to another base model"
    assert str(other) in str(error.where)
    assert str(tiny_model) in str(error.expected)


def test_what_is_no_adapter_says_where_to_look(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    for name, got in (
        (tmp_path / "none", "no such folder"),
        (tiny_model, "no adapter_config.json in it"),
        ("run-9", "no such"),
    ):
        error = refused(continued(tmp_path, tiny_model, rows_file, name))
        assert error.where == "adapter.continue_from"
        assert got in str(error.got)
        assert str(tmp_path / "runs") in str(error.mend)


def test_a_broken_checkpoint_is_refused(tiny_model: Path, rows_file: Path, finished_run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(finished_run / "checkpoint-12", tmp_path / "checkpoint-12")
    data = bytearray((broken / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (broken / WEIGHTS).write_bytes(data)
    assert refused(continued(tmp_path, tiny_model, rows_file, broken)).got == f"{WEIGHTS} does not match its sha256"


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"lora_bias": True}, "lora_bias true"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices 1, 2"),
        ({"some_newer_key": 1}, "some_newer_key 1"),
        ({"lora_alpha": 0.5}, "lora_alpha: 0.5"),
        ({"use_dora": True}, "no base_model.model.model.embed_tokens.lora_magnitude_vector, nor 14 more"),
    ],
    ids=str,
)
def test_a_foreign_adapter_that_would_not_come_over_whole_is_refused(
    changes: dict[str, Any], got: str, tiny_model: Path, rows_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    foreign = edited(finished_run / "adapter", tmp_path / "foreign", changes)
    assert got in str(refused(continued(tmp_path, tiny_model, rows_file, foreign)).got)


def test_an_embedding_written_along_is_continued_only_where_it_is_the_bases_own(
    tiny_model: Path, rows_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    foreign = edited(finished_run / "adapter", tmp_path / "foreign", {})
    own = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    for along in (own, own * 1.5):
        save_file(load_file(finished_run / "adapter" / WEIGHTS) | {key: along}, foreign / WEIGHTS)
        config = continued(tmp_path, tiny_model, rows_file, foreign)
        if along is own:
            assert prepare(config).origin
    assert "brings weights of the base" in refused(config).what


@pytest.mark.parametrize(
    ("targets", "layers", "said"),
    [
        (r".*layers\.1\..*\.(q|v)_proj", None, ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")),
        (["v_proj", "q_proj"], [1], ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")),
        (["v_proj", "q_proj"], None, ("q_proj", "v_proj")),
    ],
    ids=["an expression", "some layers", "names"],
)
def test_a_foreign_adapter_with_patterns_and_ranks_of_its_own_comes_over_whole(
    targets: Any, layers: Any, said: tuple[str, ...], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}, "layers_to_transform": layers}
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **patterns)
    with quiet_peft():
        made = get_peft_model(plain_base(tiny_model), lora)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "foreign")

    config = continued(tmp_path, tiny_model, rows_file, tmp_path / "foreign", STILL)
    done = finetune(config)
    (step,) = done.directory.events("step")
    loss = loss_of(prepare(config), plain_peft(tiny_model, tmp_path / "foreign"))
    assert step["loss"] == pytest.approx(loss, rel=1e-5)
    assert loss_of(prepare(config), plain_base(tiny_model)) != pytest.approx(loss, rel=1e-3)
    settings = load_config(done.directory.config)
    assert settings.adapter.target_modules == said
    assert (settings.adapter.r, settings.adapter.lora_alpha) == (4, 4)
    kept = json.loads((done.adapter / "adapter_config.json").read_text("utf-8"))
    assert {key: kept[key] for key in patterns} == patterns
    prepare(settings)


# What a continued run says, and its resume.


def test_a_continued_run_says_from_what(tiny_model: Path, rows_file: Path, dora_run: Run, tmp_path: Path) -> None:
    said: dict[str, str] = {}
    done = finetune(
        continued(tmp_path, tiny_model, rows_file, dora_run.directory.path),
        on_job=lambda event, fields: said.update(fields["job"].summary()),
    )
    digest = sha256(dora_run.adapter / WEIGHTS)
    environment = done.directory.read_json("environment.json") or {}
    assert environment["continued_from"] == {"path": str(dora_run.adapter), "sha256": digest}
    for file in (done.directory.path / "report.md", done.adapter / "README.md"):
        assert f"| continued from | {dora_run.adapter} ({WEIGHTS}: sha256 {digest}) |" in file.read_text("utf-8")
    assert said["continued from"] == f"{dora_run.adapter} (sha256 {digest[:12]}…)"
    assert said["method"] == "rslora+dora, r 4, alpha 16"
    assert "continued" not in (dora_run.adapter / "README.md").read_text("utf-8")
    assert load_target(resolve_target(str(done.adapter)), device="cpu").target.adapter == done.adapter


def test_a_resume_needs_the_origin_no_more(tiny_model: Path, rows_file: Path, dora_run: Run, tmp_path: Path) -> None:
    origin = shutil.copytree(dora_run.adapter, tmp_path / "origin")
    config = continued(tmp_path, tiny_model, rows_file, origin, {"training.save_steps": 1, "adapter.lora_dropout": 0.2})
    whole = finetune(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    run = stopped(config, show=stop_when(lambda event, _: event == "progress"))
    origin.rename(tmp_path / "moved")
    done = finetune(config, resume=newest_run(config))
    assert done.directory.path == run.path
    assert sha256(done.adapter / WEIGHTS) == sha256(whole.adapter / WEIGHTS)
    assert f"continued from | {origin} (" in (run.path / "report.md").read_text("utf-8")
    assert (run.read_json("environment.json") or {})["continued_from"]["path"] == str(origin)

    # The shape is fixed, and so is where it came from.
    for changes in ({"adapter.r": 8}, {"adapter.continue_from": None}):
        values = load_config(run.config).model_dump(mode="json")
        for key, value in changes.items():
            values["adapter"][key.removeprefix("adapter.")] = value
        with pytest.raises(UserError, match="cannot change") as caught:
            finetune(parse_config(values), resume=find_resume(str(run.path), "runs"), override=True)
        assert next(iter(changes)) in str(caught.value.got)


def test_a_run_without_a_checkpoint_yet_begins_from_the_same_origin_only(
    tiny_model: Path, rows_file: Path, dora_run: Run, finished_run: Path, tmp_path: Path
) -> None:
    origin = shutil.copytree(dora_run.adapter, tmp_path / "origin")
    config = continued(tmp_path, tiny_model, rows_file, origin)
    whole = finetune(config)
    run = RunDirectory(shutil.copytree(whole.directory.path, tmp_path / "copy"))
    for checkpoint in run.checkpoints().values():
        shutil.rmtree(checkpoint)
    run.write_json("state.json", {"phase": "interrupted"})
    point = find_resume(str(run.path), "runs")
    assert sha256(finetune(config, resume=point).adapter / WEIGHTS) == sha256(whole.adapter / WEIGHTS)

    for checkpoint in run.checkpoints().values():
        shutil.rmtree(checkpoint)
    weights = {key: value * 1.01 for key, value in load_file(origin / WEIGHTS).items()}
    save_file(weights, origin / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        finetune(config, resume=point, override=True)
    assert_mendable(caught.value)
    assert caught.value.got == "adapter.continue_from: its weights have changed"


# The command line.


def test_the_command_line_continues_end_to_end(
    tiny_model: Path, rows_file: Path, dora_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "base_model": {"path": str(tiny_model), "attn_implementation": "sdpa"},
        "name": "more",
        "data": {"train": str(rows_file)},
        "training": {"max_steps": 1, "precision": "fp32"},
        "evaluation": {"prompts": []},
    }
    Path("tiny.yaml").write_text(json.dumps(settings), encoding="utf-8")
    first = shutil.copytree(dora_run.directory.path, tmp_path / "runs" / "first")
    before = files_of(first)

    dry = invoke("finetune", "tiny.yaml", "--set", "adapter.continue_from=first", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "continued from  runs/first/adapter (sha256 " in dry.output
    assert not (tmp_path / "runs" / "more").exists()
    done = invoke("finetune", "tiny.yaml", "--set", "adapter.continue_from=runs/first")
    assert done.exit_code == 0, done.output
    kept = load_config("runs/more/config.yaml").adapter
    assert (kept.r, kept.use_dora, kept.continue_from) == (4, True, "runs/first")
    assert files_of(first) == before

    again = invoke("finetune", "tiny.yaml", "--set", "adapter.continue_from=runs/first", "--resume")
    assert "runs/more is done already" in again.output
    with pytest.raises(UserError, match="no adapter to continue from") as caught:
        raise invoke("finetune", "tiny.yaml", "--set", "adapter.continue_from=runs/frist").exception
    assert_mendable(caught.value)
