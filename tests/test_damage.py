"""Checkpoints damaged in every way that a disk has: each damage is named, and a run goes on from the newest whole one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import assert_mendable
from typer.testing import CliRunner

from tuneloom.checkpoints import MANIFEST, verify_checkpoint
from tuneloom.cli.main import app, run
from tuneloom.errors import UserError
from tuneloom.rundir import RunDirectory
from tuneloom.train.resume import find_resume

FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "base_model.json", "optimizer.safetensors"),
    *("plan.json", "rng.safetensors", "training_state.json", MANIFEST),
)
FLIPS, CUTS = 16, 9


def mutations(file: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what can happen to a file, each with how to do it: removed, emptied, cut at tenths, one bit flipped."""
    content, chance = file.read_bytes(), random.Random(file.name)

    def flip(place: int, bit: int) -> None:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])

    yield "removed", file.unlink
    yield "emptied", lambda: file.write_bytes(b"")
    for tenth in range(1, CUTS + 1):
        yield f"cut at {tenth}/10", lambda tenth=tenth: file.write_bytes(content[: len(content) * tenth // 10])  # type: ignore[misc]
    for _ in range(FLIPS):
        place, bit = chance.randrange(len(content)), chance.randrange(8)
        yield f"bit {bit} of byte {place} flipped", lambda place=place, bit=bit: flip(place, bit)  # type: ignore[misc]


@pytest.fixture
def damaged(finished_run: Path, tmp_path: Path) -> RunDirectory:
    """A copy of a run of two checkpoints that was still training, to be damaged."""
    copy = RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))
    copy.write_json("state.json", {"phase": "training"})
    return copy


def test_every_damage_is_named_and_the_newest_whole_checkpoint_taken(damaged: RunDirectory) -> None:
    newest, before = damaged.checkpoint(24), damaged.checkpoint(12)
    assert {file.name for file in newest.iterdir()} == set(FILES)
    done = 0
    for name in FILES:
        file = newest / name
        content = file.read_bytes()
        for what, damage in mutations(file):
            damage()
            fault = verify_checkpoint(newest)
            assert fault, f"{name} {what}"
            assert name == MANIFEST or fault.startswith(name), f"{name} {what}: {fault}"
            point = find_resume(str(damaged.path), damaged.path.parent)
            assert (point.checkpoint, point.skipped) == (before, (f"checkpoint-24: {fault}",)), f"{name} {what}"
            with pytest.raises(UserError, match="the checkpoint is broken") as caught:
                find_resume(str(newest), damaged.path.parent)
            assert (caught.value.exit_code, caught.value.got) == (2, fault)
            assert_mendable(caught.value)
            file.write_bytes(content)
            done += 1
    assert done >= 200
    assert verify_checkpoint(newest) is None


def test_a_manifest_that_forgets_a_file_is_incomplete(damaged: RunDirectory) -> None:
    manifest = damaged.checkpoint(24) / MANIFEST
    lines = manifest.read_text(encoding="utf-8").splitlines()
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"):
        manifest.write_text("\n".join(line for line in lines if name not in line), encoding="utf-8")
        assert verify_checkpoint(damaged.checkpoint(24)) == f"{MANIFEST} is incomplete"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.json", MANIFEST])
def test_the_command_ends_with_2_for_a_broken_checkpoint_that_is_named(
    name: str, damaged: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged.checkpoint(24) / name).write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        run(lambda: app(["finetune", "--resume-from", str(damaged.checkpoint(24))], standalone_mode=False))
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "the checkpoint is broken" in told
    assert name in told
    assert f"--resume-from {damaged.path}" in told


def test_the_command_says_what_it_skips(damaged: RunDirectory) -> None:
    (damaged.checkpoint(24) / "optimizer.safetensors").unlink()
    told = CliRunner().invoke(app, ["finetune", "--resume-from", str(damaged.path), "--dry-run"], catch_exceptions=False)
    assert "skipped checkpoint-24: optimizer.safetensors is missing" in told.output
    assert "checkpoint-12" in told.output
