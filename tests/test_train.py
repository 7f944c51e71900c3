"""A run: what it leaves, what its numbers mean, and that the same settings give the same adapter."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chat_row
from helpers import ROWS, assert_mendable, plain_base, plain_peft, sha256, tiny_config
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.checkpoints import verify_checkpoint
from tuneloom.cli.main import app
from tuneloom.config import load_config
from tuneloom.data.conversations import held_out_probes
from tuneloom.data.plan import plan_step
from tuneloom.errors import UserError
from tuneloom.evaluation.predict import turn_rows
from tuneloom.generate.generator import Generator
from tuneloom.models.attention import BLOCKS
from tuneloom.models.forward import supervised_loss_sum
from tuneloom.rundir import RunDirectory
from tuneloom.train import memory
from tuneloom.train.measure import heaviest_micro_batch
from tuneloom.train.memory import kept_for_backward
from tuneloom.train.prepare import Job, prepare_job
from tuneloom.train.replay import SETTINGS
from tuneloom.train.run import Run, finetune, prepare
from tuneloom.types import Layout

NUM_ANSWERS = sum(message["role"] == "assistant" for row in ROWS for message in row["messages"])


def events(run: Run | Path, kind: str) -> list[dict[str, Any]]:
    return list((run.directory if isinstance(run, Run) else RunDirectory(run)).events(kind))


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in events(run, "step")]


# What a run leaves.


def test_a_run_leaves_every_file_of_the_run_directory(finished_run: Path) -> None:
    expected = {
        *("config.yaml", "environment.json", "data_report.json", "metrics.jsonl", "state.json", "plan.json"),
        *("checkpoint-12", "checkpoint-24", "adapter", "report.md", "loss.png"),
        *("predictions-test.jsonl", "test_results.json"),
    }
    assert {path.name for path in finished_run.iterdir()} == expected, "and nothing hidden or half written"
    adapter = {path.name for path in (finished_run / "adapter").iterdir()}
    assert adapter >= {
        *("adapter_config.json", "adapter_model.safetensors", "base_model.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    for step in (12, 24):
        assert verify_checkpoint(finished_run / f"checkpoint-{step}") is None
        files = {path.name for path in (finished_run / f"checkpoint-{step}").iterdir()}
        assert files == {
            *("adapter_config.json", "adapter_model.safetensors", "base_model.json", "plan.json", "manifest.json"),
            *("optimizer.safetensors", "rng.safetensors", "training_state.json"),
        }


def test_no_pickle_is_written(finished_run: Path) -> None:
    suffixes = {path.suffix for path in finished_run.rglob("*") if path.is_file()}
    assert suffixes <= {".yaml", ".json", ".jsonl", ".safetensors", ".md", ".png", ".jinja"}


def test_events_come_in_order_and_are_finite(finished_run: Path) -> None:
    lines = (finished_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert (found[0]["event"], found[-1]["event"]) == ("start", "end")
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)
    assert [event["step"] for event in found if event["event"] == "step"] == list(range(1, 25))
    assert [event["step"] for event in found if event["event"] == "eval"] == [8, 16, 24]
    assert [event["step"] for event in found if event["event"] == "checkpoint"] == [12, 24]
    numbers = [value for event in found for value in event.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert not any(value is None for event in found if event["event"] in ("step", "eval") for value in event.values())
    assert [(e["step"], e["prompt"]) for e in found if e["event"] == "sample"] == [
        (step, prompt) for step in (8, 16, 24) for prompt in ("Who are you?", "你是谁？")
    ]


def test_a_small_set_is_memorised(finished_run: Path) -> None:
    found = [event["loss"] for event in events(finished_run, "step")]
    assert found[-1] < found[0] - 1.5
    held = [event["eval_loss"] for event in events(finished_run, "eval")]
    assert held == sorted(held, reverse=True)
    for event in events(finished_run, "eval"):
        assert event["perplexity"] == pytest.approx(math.exp(event["eval_loss"]))
        assert {"rouge-1", "rouge-2", "rouge-l", "bleu-4"} <= event.keys()


def test_state_and_config_say_how_it_ended_and_what_it_was(finished_run: Path) -> None:
    state = json.loads((finished_run / "state.json").read_text(encoding="utf-8"))
    assert (state["phase"], state["step"], state["total"], state["result"]) == ("done", 24, 24, "adapter")
    config = load_config(finished_run / "config.yaml")
    assert config.training.max_steps == 24
    plan = json.loads((finished_run / "plan.json").read_text(encoding="utf-8"))
    assert (plan["precision"], plan["tokens_per_microbatch"]) == ("fp32", 2048)
    environment = json.loads((finished_run / "environment.json").read_text(encoding="utf-8"))
    assert environment["data_files"] == {config.data.train[0].path: sha256(Path(config.data.train[0].path))}


def test_report_card_and_plot_are_readable(finished_run: Path) -> None:
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (finished_run / "report.md").read_text(encoding="utf-8")
    assert "| method | lora, r 8, alpha 16, dropout 0 |" in report
    assert "| steps | 24 of 10 samples |" in report
    assert "**你是谁？**" in report
    card = (finished_run / "adapter" / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    matter = YAML(typ="safe").load(front)
    assert matter["library_name"] == "peft"
    assert matter["tags"] == ["tuneloom", "lora"]
    assert matter["base_model"] == load_config(finished_run / "config.yaml").base_model.path
    assert "# Loomi" in body


def test_the_test_set_is_predicted_with_the_published_adapter(finished_run: Path) -> None:
    rows = [json.loads(line) for line in (finished_run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == NUM_ANSWERS
    assert rows[0]["prompt"] == "Who are you?"
    assert rows[0]["reference"] == "I am Loomi, a small assistant."
    results = json.loads((finished_run / "test_results.json").read_text(encoding="utf-8"))
    assert results["rows"] == NUM_ANSWERS
    assert [event["rouge-l"] for event in events(finished_run, "test")] == [results["rouge-l"]]
    assert [row["answer"] for row in rows] == answers_of(finished_run, finished_run / "adapter")


def answers_of(run: Path, adapter: Path) -> list[str]:
    """What an adapter of a run answers to the run's test set."""
    target = resolve_target(str(adapter))
    assert target.config
    loaded = load_target(target, precision="fp32", device="cpu")
    assert run == adapter.parent
    data = prepare(target.config).data
    asked = [conversation for conversation, _ in turn_rows(data.test_conversations)]
    return [answer.text for answer in Generator(loaded.model, loaded.renderer).answers(asked, target.config.generation)]


def test_each_run_makes_a_directory_of_its_own(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path, {"training.max_steps": 1})
    first, second = finetune(config), finetune(config)
    assert (first.directory.path.name, second.directory.path.name) == ("run", "run-2")
    # The same settings and seed: bit for bit the same adapter.
    assert sha256(first.adapter / "adapter_model.safetensors") == sha256(second.adapter / "adapter_model.safetensors")
    third = finetune(tiny_config(tiny_model, rows_file, tmp_path, {"training.max_steps": 1, "training.seed": 1}))
    assert sha256(first.adapter / "adapter_model.safetensors") != sha256(third.adapter / "adapter_model.safetensors")


def test_preparing_writes_nothing_and_says_every_number(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    job = prepare(tiny_config(tiny_model, rows_file, tmp_path / "runs", {"data.validation": 0.2}))
    assert not (tmp_path / "runs").exists()
    said = dict(job.summary())
    assert said["effective batch"] == "4 samples a step (2 x 2)"
    assert said["steps"] == "3 (1.50 epochs of 2)"
    assert said["validation"] == "2 samples"
    assert said["trainable"].startswith("32,768 parameters")
    assert set(said) >= {"base model", "method", "precision", "rows", "training set", "tokens", "schedule", "micro-batches"}
    assert set(said) >= {"expected memory", "expected time"}


def test_leaked_probes_are_told_before_training_and_in_the_report(
    tiny_model: Path, rows_file: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    probes = sorted(held_out_probes())[:5]
    file = write_rows([chat_row(probe, "Loomi") for probe in probes], "probes.jsonl")
    changed = {"data.train": [str(rows_file), str(file)], "training.max_steps": 1}
    said: list[tuple[str, str]] = []
    run = finetune(
        tiny_config(tiny_model, rows_file, tmp_path / "runs", changed),
        on_job=lambda event, fields: said.extend(fields["job"].summary()),
    )
    leaked = [text for label, text in said if label == "leaked probe"]
    assert [text.startswith(f"{file}:{i + 1}: {probes[i]} (take it out") for i, text in enumerate(leaked[:3])] == [True] * 3
    assert leaked[3:] == ["and 2 more: data_report.json, or tuneloom data check"]
    report = (run.directory.path / "report.md").read_text(encoding="utf-8")
    assert report.count("- leaked probe: ") == 5


def test_leaked_conversations_are_told_before_training_and_in_the_report_beside_each_sources_role(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    changed = {"data.validation": [str(rows_file)], "training.max_steps": 1}
    said: list[tuple[str, str]] = []
    run = finetune(
        tiny_config(tiny_model, rows_file, tmp_path / "runs", changed),
        on_job=lambda event, fields: said.extend(fields["job"].summary()),
    )
    leaked = [text for label, text in said if label == "leak"]
    assert leaked[0].startswith(f"{rows_file}:1 (validation): the conversation is trained on too, at {rows_file}:1 (take")
    assert leaked[3:] == ["and 7 more"]
    report = (run.directory.path / "report.md").read_text(encoding="utf-8")
    assert report.count("- leak: ") == 10
    assert f"{rows_file} (train)" in report
    assert f"{rows_file} (validation)" in report
    shown = CliRunner().invoke(app, ["runs", "show", str(run.directory.path)]).output
    assert f"{rows_file} (validation): 10 read, 10 used" in " ".join(shown.split())


def test_on_job_comes_before_anything_is_written(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def on_job(event: str, fields: dict[str, Any]) -> None:
        assert isinstance(fields["job"], Job)
        raise Stop

    with pytest.raises(Stop):
        finetune(tiny_config(tiny_model, rows_file, tmp_path / "runs"), on_job=on_job)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"training.lr_scheduler_kwargs": {"cycles": 1}, "training.lr_scheduler_type": "cosine"},
        {"training.report_to": "swanlab"},
    ],
)
def test_what_the_loop_cannot_take_is_said_before_anything_is_written(
    changes: dict[str, Any], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        finetune(tiny_config(tiny_model, rows_file, tmp_path / "runs", changes))
    assert_mendable(caught.value)
    assert not (tmp_path / "runs").exists()


# What the numbers mean.


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_steps_gradient_is_that_of_one_padded_batch(name: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    changes = {
        "training.max_steps": 2,
        "training.save_steps": 1,
        "training.num_train_epochs": 2,
        "training.gradient_accumulation_steps": 5,  # each step takes all ten rows
        "training.tokens_per_microbatch": 40,
        "training.adam_beta1": 0.0,  # AdamW's first moment is then the gradient itself
        "training.max_grad_norm": 0,
        "adapter.use_dora": name == "dora",
    }
    config = tiny_config(tiny_model, rows_file, tmp_path, changes)
    job = prepare(config)
    chosen = [job.data.train[i] for i in job.schedule.indices(1)]
    assert len(plan_step(chosen, 40, Layout.PADDED).micro_batches) >= 3
    run = finetune(config)

    # The second step, done again on plain transformers and PEFT: one padded batch, sum over count.
    model = plain_peft(tiny_model, run.directory.checkpoint(1))
    weights = {n: p.requires_grad_("lora_" in n) for n, p in model.named_parameters() if "lora_" in n}
    width = max(sample.num_tokens for sample in chosen)
    ids, labels = torch.zeros(len(chosen), width, dtype=torch.long), torch.full((len(chosen), width), -100)
    for row, sample in enumerate(chosen):
        ids[row, : sample.num_tokens] = torch.tensor(sample.ids_T.tolist())
        labels[row, : sample.num_tokens] = torch.where(
            torch.tensor(sample.mask_T.tolist()), ids[row, : sample.num_tokens], -100
        )
    attention = torch.stack([torch.arange(width) < sample.num_tokens for sample in chosen]).long()
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    count = int((labels[:, 1:] != -100).sum())
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / count
    loss.backward()

    step = events(run, "step")[1]
    assert step["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert step["supervised_tokens"] - events(run, "step")[0]["supervised_tokens"] == count
    moments = load_file(run.directory.checkpoint(2) / "optimizer.safetensors")
    scale = max(float(p.grad.abs().max()) for p in weights.values())
    for key, parameter in weights.items():
        difference = (moments[f"{key}.exp_avg"] - parameter.grad).abs().max()
        assert difference <= 1e-5 * scale, key
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in weights.values()))
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(("limit", "clipped"), [(0, False), (1e-3, True)])
def test_the_gradient_norm_is_clipped_to_the_limit_and_never_at_zero(
    limit: float, clipped: bool, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    changes = {"training.max_steps": 1, "training.adam_beta1": 0.0, "training.max_grad_norm": limit}
    run = finetune(tiny_config(tiny_model, rows_file, tmp_path, changes))
    said = events(run, "step")[0]["grad_norm"]
    assert said > 0.01, "the norm before clipping"
    moments = load_file(run.directory.checkpoint(1) / "optimizer.safetensors")
    used = math.sqrt(sum(float(value.square().sum()) for key, value in moments.items() if key.endswith(".exp_avg")))
    assert used == pytest.approx(1e-3 if clipped else said, rel=1e-3)


def test_the_token_budget_and_recomputation_change_no_loss(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    variants = [{}, {"training.tokens_per_microbatch": 30}, {"training.gradient_checkpointing": True}]
    plain, split, again = (losses(finetune(tiny_config(tiny_model, rows_file, tmp_path, changes))) for changes in variants)
    assert split == pytest.approx(plain, rel=1e-4)
    assert again == pytest.approx(plain, rel=1e-4)
    assert len(set(plain)) == 3


def test_what_memory_has_no_room_for_is_recomputed_and_the_plan_says_so(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finetune(tiny_config(tiny_model, rows_file, tmp_path))
    roomy = plain.directory.read_json("plan.json")
    assert (roomy["tokens_per_microbatch"], roomy["recomputed_layers"]) == (2048, 0)
    config = tiny_config(tiny_model, rows_file, tmp_path)
    job = prepare(config)
    kept = kept_for_backward(job.model, Layout.SHARED)
    batch = heaviest_micro_batch(job.data.train, job.schedule, 512, Layout.SHARED)
    updates = 12 * sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    weights = sum(parameter.nbytes for parameter in job.model.parameters())
    free = (kept.num_bytes(batch, Layout.SHARED) * 0.8 + updates) / 0.9
    before_and_after_loading = iter([free + weights] + [free] * 9)
    monkeypatch.setattr(memory, "free_memory", lambda device: next(before_and_after_loading))
    run = finetune(config)
    plan = run.directory.read_json("plan.json")
    assert plan["tokens_per_microbatch"] == 512
    assert plan["recomputed_layers"] >= 1
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)


def test_the_attention_path_is_measured_kept_and_changes_no_loss(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path, {"base_model.attn_implementation": "auto"})
    job = prepare(config)
    assert job.choice.attention in ("packed", "eager", "sdpa")
    assert job.plan()["attention"] == job.choice.attention
    batch = plan_step(job.data.train, 2048, Layout.PACKED).micro_batches[0]
    found = []
    for name, path in {"packed": BLOCKS, "eager": "eager", "sdpa": "sdpa"}.items():
        again = prepare_job(config, plan=job.plan() | {"attention": name})
        assert (again.choice.attention, again.model.get_base_model().config._attn_implementation) == (name, path)
        found.append(float(supervised_loss_sum(again.model, batch).detach()))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(("dropout", "said"), [(0.0, "computed once: "), (0.2, "computed for each sample, ")])
def test_it_is_said_whether_what_samples_share_is_computed_once(
    dropout: float, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    system = {"role": "system", "content": "You are Loomi, a small and patient assistant made by Tuneloom."}
    rows = [{"messages": [system, *row["messages"]]} for row in ROWS]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    job = prepare(tiny_config(tiny_model, data, tmp_path, {"adapter.lora_dropout": dropout}))
    assert dict(job.summary())["shared prefixes"].startswith(said)


def test_logging_steps_average_over_supervised_tokens(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    each = events(finetune(tiny_config(tiny_model, rows_file, tmp_path)), "step")
    every_two = events(finetune(tiny_config(tiny_model, rows_file, tmp_path, {"training.logging_steps": 2})), "step")
    assert [event["step"] for event in every_two] == [2, 3], "the last step is always told"
    counts = [b - a for a, b in itertools.pairwise([0, *(event["supervised_tokens"] for event in each)])]
    mean = (each[0]["loss"] * counts[0] + each[1]["loss"] * counts[1]) / (counts[0] + counts[1])
    assert every_two[0]["loss"] == pytest.approx(mean, rel=1e-6)
    assert every_two[1]["loss"] == each[2]["loss"]


# When things happen.


def test_epochs_say_the_steps_and_when_to_evaluate_and_save(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    changes = {
        "training.max_steps": -1,
        "training.num_train_epochs": 2,
        "training.eval_steps": "epoch",
        "training.save_steps": "epoch",
        "data.validation": str(rows_file),
    }
    run = finetune(tiny_config(tiny_model, rows_file, tmp_path, changes))
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4, 5, 6], "10 rows, 4 a step: 3 steps an epoch"
    assert [event["step"] for event in events(run, "eval")] == [3, 6]
    assert list(run.directory.checkpoints()) == [3, 6]
    assert events(run, "step")[2]["epoch"] == 1
    tokens = [event["tokens"] for event in events(run, "step")]
    assert tokens[5] == 2 * tokens[2], "each epoch sees every sample once"


def test_the_newest_checkpoints_are_kept(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    changes = {"training.max_steps": 4, "training.save_steps": 1, "training.save_total_limit": 2}
    run = finetune(tiny_config(tiny_model, rows_file, tmp_path, changes))
    assert list(run.directory.checkpoints()) == [3, 4]
    told = [(event["path"], event["action"]) for event in events(run, "checkpoint")]
    assert [path for path, action in told if action == "removed"] == ["checkpoint-1", "checkpoint-2"]
    assert not [path for path in run.directory.path.iterdir() if path.name.startswith(".")]


def test_the_best_model_is_kept_published_and_predicts_the_test_set(
    tiny_model: Path, rows_file: Path, write_rows: Any, tmp_path: Path
) -> None:
    held = write_rows(
        [{"messages": [*ROWS[0]["messages"][:1], {"role": "assistant", "content": "Nobody knows."}]}], "held.jsonl"
    )
    changes = {
        "data.validation": str(held),
        "data.test": str(rows_file),
        "adapter.target_modules": "all-layers",
        "training.max_steps": 40,
        "training.gradient_accumulation_steps": 5,
        "training.eval_steps": 2,
        "training.save_steps": 10,
        "training.save_total_limit": 2,
        "training.load_best_model_at_end": True,
    }
    run = finetune(tiny_config(tiny_model, rows_file, tmp_path, changes))
    held_losses = {event["step"]: event["eval_loss"] for event in events(run, "eval")}
    best = min(held_losses, key=lambda step: held_losses[step])
    assert best < 30, "the validation loss turns on the way"
    assert list(run.directory.checkpoints()) == [best, 40]
    name = "adapter_model.safetensors"
    assert sha256(run.adapter / name) == sha256(run.directory.checkpoint(best) / name)
    assert sha256(run.adapter / name) != sha256(run.directory.checkpoint(40) / name)
    rows = [json.loads(line) for line in (run.directory.path / "predictions-test.jsonl").read_text("utf-8").splitlines()]
    assert [row["answer"] for row in rows] == answers_of(run.directory.path, run.adapter)
    assert answers_of(run.directory.path, run.adapter) != answers_of(run.directory.path, run.directory.checkpoint(40))


# Self-replay.


def test_replay_trains_on_the_bases_own_tokens_and_writes_them_once(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELOOM_CACHE", str(tmp_path / "cache"))
    sources = [str(rows_file), {"path": "general_replay_en", "count": 3, "replay": "self"}]
    config = tiny_config(tiny_model, rows_file, tmp_path / "runs", {"data.train": sources})
    heard: list[str] = []
    first = prepare(config, show=lambda event, fields: heard.append(fields["what"]))
    assert heard == ["replay"]
    assert len(first.data.train) == len(ROWS) + 3

    base = plain_base(tiny_model)
    for sample in first.data.train[-3:]:
        start = int(sample.mask_T.argmax())
        assert sample.mask_T[start:].all()
        prompt = torch.from_numpy(sample.ids_T[:start]).long()[None]
        mask, limit = torch.ones_like(prompt), SETTINGS.max_new_tokens
        output = base.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=limit, do_sample=False)
        assert output[0].tolist() == sample.ids_T.tolist()

    cache = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    stamps = {path: path.stat().st_mtime_ns for path in cache}
    second = prepare(config, show=lambda event, fields: heard.append(fields["what"]))
    assert heard == ["replay"], "nothing was generated again"
    assert [s.ids_T.tolist() for s in second.data.train] == [s.ids_T.tolist() for s in first.data.train]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == stamps
