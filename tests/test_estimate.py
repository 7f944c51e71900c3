"""What a training takes is told before it starts: by shapes before the base is loaded, measured after."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_mendable, method, tiny_config
from typer.testing import CliRunner

from tuneloom.adapters.attach import attach_adapter, count_parameters
from tuneloom.cli.main import app
from tuneloom.config import Config, dump_config
from tuneloom.data.plan import StepSchedule
from tuneloom.errors import UserError
from tuneloom.models.forward import PACKED, use_attention
from tuneloom.models.fused_layers import fuse_layers
from tuneloom.models.load import load_base_model
from tuneloom.models.source import resolve_model
from tuneloom.train.estimate import Place, look_ahead
from tuneloom.train.kernels import KEPT, limit_kernels
from tuneloom.train.limits import require_memory_of_training
from tuneloom.train.measure import watched_memory
from tuneloom.train.memory import kept_for_backward
from tuneloom.train.prepare import look_at
from tuneloom.train.run import finetune
from tuneloom.train.skeleton import reckon
from tuneloom.types import Layout

CPU = torch.device("cpu")
PARTS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "answers")


def estimated(config: Config, folder: Path, *more: str) -> Any:
    file = folder / "tiny.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return CliRunner().invoke(app, ["estimate", str(file), *more], env={"COLUMNS": "160"})


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("quick", [False, True])
def test_the_parts_add_up_and_json_has_them_all(quick: bool, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path / "runs")
    done = estimated(config, tmp_path, "--json", *(["--quick"] if quick else []))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    memory = told["memory_gib"]
    assert memory["peak"] == pytest.approx(max(memory["loading"], sum(memory[part] for part in PARTS)), abs=0.005)
    assert memory["process"] > 0
    assert memory["weights"] > 0
    assert not quick or memory["activations"] > 0  # measured, it may be what this process has held before
    assert (told["steps"], told["trained_parameters"], told["measured"]) == (3, 32_768, not quick)
    if quick:
        assert told["seconds"] is told["seconds_per_step"] is told["tokens_per_second"] is None
    else:
        assert told["seconds"] == pytest.approx(3 * told["seconds_per_step"], abs=0.01)
        assert told["seconds"] == pytest.approx(told["tokens"] / told["tokens_per_second"], abs=0.01)
    assert not (tmp_path / "runs").exists()


def test_people_get_a_table(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    done = estimated(tiny_config(tiny_model, rows_file, tmp_path / "runs"), tmp_path)
    assert done.exit_code == 0, done.output
    for label in ("time of a step", "time of all steps", "weights of the base", "its optimizer state", "at its height"):
        assert label in done.output


def test_what_cannot_fit_is_refused_before_the_base_is_loaded(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = 1 << 34  # terabytes, and no such weights are there
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = estimated(tiny_config(model, rows_file, tmp_path / "runs"), tmp_path)
    assert isinstance(refused.exception, UserError)
    assert refused.exception.exit_code == 2
    assert_mendable(refused.exception)
    assert "tokens_per_microbatch" in str(refused.exception.mend)
    with pytest.raises(UserError, match="training does not fit into memory"):
        finetune(tiny_config(model, rows_file, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_wrong_config_is_told(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("training: {max_step: 3}\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["estimate", str(file)])
    assert isinstance(done.exception, UserError)
    assert "max_steps" in str(done.exception)


def test_activations_are_refused_where_the_weights_would_fit(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path)
    ahead = look_at(config)
    schedule = StepSchedule.of(config.training, len(ahead.data.train))

    def looked(free: float) -> Any:
        return look_ahead(config, ahead.base, Place(torch.float32, CPU, free), ahead.data.train, schedule, [2048])

    plenty = looked(1e12)
    assert (plenty.fit.tokens_per_microbatch, plenty.fit.recomputed_layers) == (2048, 0)
    tight = looked(plenty.needed_bytes - 1)
    assert tight.fit.recomputed_layers == 1
    none = looked(looked(0.0).needed_bytes - 1)
    assert none.weight_bytes < none.free_bytes
    with pytest.raises(UserError, match="does not fit") as refused:
        require_memory_of_training(none)
    assert_mendable(refused.value)


def loaded(folder: Path, config: Config) -> Any:
    """Return the model of a config with its adapter, on the path that a training takes."""
    base = load_base_model(folder, torch.float32, CPU)
    fuse_layers(base)
    use_attention(base, PACKED)
    return attach_adapter(base, config.adapter, 0, "base")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["tiny_model", "chatglm"])
def test_shapes_tell_what_is_counted_on_the_loaded_model(
    kind: str, family: str, rows_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    config = tiny_config(folder, rows_file, tmp_path, {**method(kind), "adapter.target_modules": "all-linear"})
    reckoned = reckon(resolve_model(str(folder)), config.adapter, torch.float32, pairs=True)
    model = loaded(folder, config)
    trained, whole = count_parameters(model)
    assert (reckoned.num_trained, reckoned.weight_bytes) == (trained, 4 * (whole - trained))
    counted = kept_for_backward(model, Layout.SHARED)
    assert 0.8 * counted.of_row <= reckoned.kept.of_row <= 1.02 * counted.of_row
    assert (reckoned.kept.num_layers, reckoned.kept.of_input) == (counted.num_layers, counted.of_input)
    assert reckoned.kept.of_pair == pytest.approx(counted.of_pair, rel=0.5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_shapes_tell_the_parameters_of_an_adapted_embedding(
    kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, rows_file, tmp_path, {**method(kind), "adapter.target_modules": "all-layers"})
    reckoned = reckon(resolve_model(str(tiny_model)), config.adapter, torch.float32)
    assert reckoned.num_trained == count_parameters(loaded(tiny_model, config))[0]


def test_memory_that_is_given_back_is_seen() -> None:
    with watched_memory(CPU) as watched:
        held = torch.ones(64 << 20)  # 256 MiB
        del held
    assert watched.peak_gib > watched.held_gib + 0.2


def test_a_run_says_what_was_expected_and_reached(finished_run: Path) -> None:
    plan = json.loads((finished_run / "plan.json").read_text(encoding="utf-8"))["estimate"]
    report = (finished_run / "report.md").read_text(encoding="utf-8")
    told = re.search(r"\| peak memory \| ([\d.]+) GiB, ([\d.]+) expected \|", report)
    assert told, report
    assert float(told[2]) == pytest.approx(plan["memory_gib"]["peak"], abs=0.006)
    assert float(told[1]) >= max(event["peak_memory_gib"] for event in events(finished_run, "step")) - 0.006


def test_the_environment_may_say_how_many_compiled_products_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "17")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    limit_kernels()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("17", KEPT)
