"""Merged exports: checked in a fresh process, equal in plain transformers, published only if they answer the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_NOTICE
from helpers import assert_mendable, logits_of, plain_base, plain_peft, tiny_config
from safetensors.torch import load_file, save_file

from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.errors import GuardError, UserError
from tuneloom.exporting.merged import export_merged, stored_precision
from tuneloom.exporting.reference import PROBES, Reference, make_reference
from tuneloom.exporting.verify import verify
from tuneloom.models.source import resolve_model, silent
from tuneloom.train.run import finetune

IDS = [1, 40, 77, 300, 512, 9, 1033, 2, 64]


def trained(model: Path, rows: Path, output: Path, changes: dict[str, Any]) -> Path:
    return finetune(tiny_config(model, rows, output, changes)).directory.path


@pytest.fixture(scope="module")
def lora_run(untied_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(untied_model, rows_file, tmp_path_factory.mktemp("lora"), {})


@pytest.fixture(scope="module")
def dora_run(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_model, rows_file, tmp_path_factory.mktemp("dora"), {"adapter.use_dora": True})


@pytest.fixture(scope="module")
def dora_all_layers_run(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"adapter.use_dora": True, "adapter.target_modules": "all-layers"}
    return trained(tiny_model, rows_file, tmp_path_factory.mktemp("dora-all"), changes)


@pytest.fixture
def empty_parent(tmp_path: Path) -> Path:
    """A folder that must hold nothing but the export afterwards."""
    folder = tmp_path / "exports"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("run", "model", "untied", "checked"),
    [
        pytest.param("dora_all_layers_run", "tiny_model", True, "freshly", id="dora all-layers, tied"),
        pytest.param("lora_run", "untied_model", True, "here", id="lora all-linear"),
        pytest.param("dora_run", "tiny_model", False, "freshly", id="dora all-linear, tied", marks=pytest.mark.slow),
        pytest.param("finished_run", "tiny_model", True, "freshly", id="lora all-layers, tied", marks=pytest.mark.slow),
    ],
)
def test_a_merged_export_is_verified_and_equal_in_plain_transformers(
    run: str, model: str, untied: bool, checked: str, empty_parent: Path, request: pytest.FixtureRequest
) -> None:
    if checked == "here":
        request.getfixturevalue("checked_here")
    source: Path = request.getfixturevalue(run)
    said: list[str] = []
    done = export_merged(resolve_target(str(source)), empty_parent / "out", max_shard_size="1MB", say=said.append)
    assert [path.name for path in empty_parent.iterdir()] == ["out"]
    assert done.precision == "fp32"
    assert done.check.passed
    assert done.check.max_logit_difference <= 1e-4
    assert done.check.positions >= len(PROBES)
    assert said[-1] == "reloading it in a fresh process ..."

    merged = plain_base(done.folder)
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "PeftModel" not in card
    notice = TINY_NOTICE if model == "tiny_model" else None
    assert (notice in card) if notice else ("Licence" not in card)
    assert resolve_model(str(done.folder)).notice() == notice, "it goes on with what is made from the export"
    tuned = plain_peft(request.getfixturevalue(model), source / "adapter")
    assert (logits_of(merged, IDS) - logits_of(tuned, IDS)).abs().max() <= 1e-4
    with tuned.disable_adapter():
        assert (logits_of(merged, IDS) - logits_of(tuned, IDS)).abs().max() > 1e-3, "the adapter is in it"
    assert merged.config.tie_word_embeddings is not untied

    names = {path.name for path in done.folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "export.json",
    } <= names
    assert sum(name.endswith(".safetensors") for name in names) > 1, "in shards"
    assert not any("adapter" in name for name in names)
    report = json.loads((done.folder / "export.json").read_text(encoding="utf-8"))
    assert report["check"]["passed"] is True


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_16_bit_export_of_a_checkpoint_passes_its_check(
    precision: str, dtype: str, lora_run: Path, empty_parent: Path, checked_here: None
) -> None:
    checkpoint = lora_run / "checkpoint-3"
    done = export_merged(resolve_target(str(checkpoint)), empty_parent / "out", precision=precision, say=silent)
    assert done.precision == precision
    assert done.check.passed
    assert done.check.safe_positions > 0
    assert json.loads((done.folder / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    assert stored_precision(resolve_target(str(done.folder))) == precision
    weights = load_file(done.folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}


def test_a_model_that_answers_otherwise_is_not_published(
    lora_run: Path, empty_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Reference.save

    def tampered(reference: Reference, file: Path) -> None:
        save(reference, file)
        tensors = load_file(file)
        tensors["logits"][3, 5] += 1e-3
        save_file(tensors, file)

    monkeypatch.setattr(Reference, "save", tampered)
    with pytest.raises(GuardError, match="does not answer as the tuned one") as caught:
        export_merged(resolve_target(str(lora_run)), empty_parent / "out", say=silent)
    assert caught.value.exit_code == 3
    assert "nothing was published" in str(caught.value)
    assert list(empty_parent.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "moved_by", "passes"),
    [
        ("fp32", 0.0, True),
        ("fp32", 1e-3, False),
        ("fp32", float("nan"), False),
        ("bf16", 0.0, True),
        ("bf16", 1e-3, True),  # less than the format can hold
        ("bf16", 10.0, False),
        ("bf16", float("nan"), False),
    ],
)
def test_the_check_passes_what_answers_the_same_and_nothing_else(
    precision: str, moved_by: float, passes: bool, tiny_model: Path, tmp_path: Path
) -> None:
    loaded = load_target(resolve_target(str(tiny_model)), precision=precision, device="cpu")
    reference = make_reference(loaded.model, loaded.renderer)
    runner_up = int(reference.logits_PV[0].topk(2).indices[1])
    reference.logits_PV[0, runner_up] += moved_by
    reference.save(tmp_path / "reference")
    check = verify(tiny_model, tmp_path / "reference", precision)
    assert check.passed is passes
    assert check.same_tokens
    assert check.rounding > 0 or not passes


def test_an_output_that_exists_is_left_alone(lora_run: Path, empty_parent: Path) -> None:
    out = empty_parent / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine", encoding="utf-8")
    for taken in (out, out / "precious.txt"):
        with pytest.raises(UserError, match="exists already") as caught:
            export_merged(resolve_target(str(lora_run)), taken, say=silent)
        assert_mendable(caught.value)
    with pytest.raises(UserError, match="cannot write the output folder") as caught:
        export_merged(resolve_target(str(lora_run)), out / "precious.txt" / "below", say=silent)
    assert_mendable(caught.value)
    assert [path.name for path in empty_parent.rglob("*")] == ["out", "precious.txt"]
    assert (out / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_a_shard_size_that_is_none_is_told(lora_run: Path, empty_parent: Path) -> None:
    with pytest.raises(UserError, match="not a shard size") as caught:
        export_merged(resolve_target(str(lora_run)), empty_parent / "out", max_shard_size="huge", say=silent)
    assert_mendable(caught.value)
    assert not list(empty_parent.iterdir())


def test_a_target_without_an_adapter_cannot_be_merged(tiny_model: Path, empty_parent: Path) -> None:
    with pytest.raises(UserError, match="no adapter") as caught:
        export_merged(resolve_target(str(tiny_model)), empty_parent / "out", say=silent)
    assert_mendable(caught.value)
    assert list(empty_parent.iterdir()) == []


def test_a_failure_while_loading_leaves_nothing_behind(lora_run: Path, empty_parent: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(lora_run, tmp_path / "broken")
    (broken / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="torn"):
        export_merged(resolve_target(str(broken)), empty_parent / "out", say=silent)
    assert list(empty_parent.iterdir()) == []


def test_a_reference_survives_the_disk(tmp_path: Path) -> None:
    reference = Reference([[1, 2, 3], [4, 5]], [2, 1], torch.randn(2, 7), 0.125)
    reference.save(tmp_path / "reference")
    again: Any = Reference.load(tmp_path / "reference")
    assert (again.sequences, again.prompt_lengths, again.rounding) == ([[1, 2, 3], [4, 5]], [2, 1], 0.125)
    assert torch.equal(again.logits_PV, reference.logits_PV)
