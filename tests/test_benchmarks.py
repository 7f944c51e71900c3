"""The benchmark against other trainers: what every side is given, and how the figures are put together."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules peers, prepare and tuneloom_side."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "sides"))
    import peers
    import prepare
    import tuneloom_side

    yield type("Sides", (), {"peers": peers, "prepare": prepare, "tuneloom_side": tuneloom_side})
    for name in ("peers", "prepare", "tuneloom_side"):
        del sys.modules[name]


def write_rows(file: Path, count: int) -> None:
    """Write conversations of one and two turns; every fifth is long."""
    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": "You are Loomi."}, {"role": "user", "content": f"Question {i}?"}]
        messages.append({"role": "assistant", "content": f"Answer {i}. " * (60 if i % 5 == 0 else 1)})
        if i % 2:
            messages += [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"Then {i}."}]
        rows.append({"messages": messages})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_side_gets_the_samples_that_our_steps_take(
    sides: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloom.config import Config
    from tuneloom.train.run import prepare as prepare_ours

    write_rows(tmp_path / "given.jsonl", 11)
    job = {
        **sides.peers.COMMON,
        "folder": str(tmp_path),
        "cache": str(tmp_path),
        "model": str(tiny_model),
        "source": [str(tmp_path / "given.jsonl")],
        "max_rows": None,
        "cutoff": 100,
        "steps": 4,
        "batch_size": 2,
        "samples_per_step": 4,
        "rows": str(tmp_path / "rows.jsonl"),
        "methods": ["dora"],
        "start": str(tmp_path / "start-dora"),
        "dora": True,
        "output_dir": str(tmp_path / "runs"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "job.json")])
    sides.prepare.main()
    samples = json.loads((tmp_path / "samples.json").read_text())
    work = json.loads((tmp_path / "work.json").read_text())

    assert len(samples) == 16  # eight of eleven rows, twice
    assert work["longest"] <= 100
    assert work["left_out"] == 3
    ours = prepare_ours(Config.model_validate(sides.tuneloom_side.config(job)))
    taken = [ours.data.train[i] for step in range(4) for i in ours.schedule.indices(step)]
    assert [sample.ids_T.tolist() for sample in taken] == [sample["input_ids"] for sample in samples]
    assert [sample.mask_T.tolist() for sample in taken] == [[label >= 0 for label in sample["labels"]] for sample in samples]
    assert ours.config.method == "dora"
    assert sum(sample.num_supervised_tokens for sample in taken) == work["supervised_tokens"][-1]


def test_shared_beginnings_are_counted_once(sides: Any) -> None:
    shape = sides.prepare.Shape(frozen=1000, adapter=10, head=100, attention_width=7)

    def sample(ids: list[int], prompt: int) -> dict[str, Any]:
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    step = [sample([1, 2, 3, 4, 5], 3), sample([1, 2, 9, 4], 3), sample([1, 2, 3, 4, 5], 3), sample([2, 2, 3], 2)]
    assert sides.prepare.repeated_positions(step) == [0, 1, 0, 1, 2]
    work = sides.prepare.work_of(step, shape)
    assert work["tokens"] == 4 + 3 + 4 + 2
    assert work["distinct_tokens"] == work["tokens"] - 5
    assert work["supervised_tokens"] == 2 + 1 + 2 + 1
    keys = (1 + 2 + 3 + 4) + (1 + 2 + 3) + (1 + 2 + 3 + 4) + (1 + 2)
    assert work["useful_gflop"] == pytest.approx((13 * 4060 + 6 * 400 + 12 * 7 * keys) / 1e9)
    assert work["needed_gflop"] == pytest.approx(work["useful_gflop"] - (5 * 4060 + 12 * 7 * (1 + 2 + 1 + 2 + 3)) / 1e9)


def test_the_first_step_of_a_block_is_not_timed(sides: Any) -> None:
    steps = [{"useful_gflop": 8.0, "needed_gflop": 4.0}] * 3
    ours, theirs = sides.peers.Blocks(), sides.peers.Blocks()
    ours.add({"step_ends": [50, 51, 53], "losses": [3.0, 2.5, 2.0], "gemm_bf16_gflops": 16.0}, steps, 10**9)
    ours.add({"step_ends": [0, 2, 4], "losses": [3.0, 2.5, 2.0], "gemm_bf16_gflops": 16.0}, steps, 2 * 10**9)
    theirs.add({"step_ends": [9, 17, 25], "losses": [3.0, 2.5, 2.02]}, steps, 3 * 10**9)
    with pytest.raises(SystemExit, match="2 steps"):
        theirs.add({"step_ends": [9, 17], "losses": [3.0, 2.5, 2.02]}, steps, 0)

    peer = sides.peers.SIDES[0]
    found = sides.peers.result_of("identity", sides.peers.OURS, peer, ours.figures(16.0), theirs.figures(16.0))
    assert (found["seconds_per_step"], found["ratio"], found["peak_rss_gb"], found["loss"]) == (8, 4, 3, 2.02)
    assert found["loss_difference"] == pytest.approx(0.01)
    assert found["tuneloom"]["peak_rss_gb"] == 2
    assert (found["tuneloom"]["useful_share_of_gemm"], found["tuneloom"]["needed_share_of_gemm"]) == (0.25, 0.125)
    header, line = sides.peers.table([found]).splitlines()
    assert header.split()[:3] == ["work", "method", "against"]
    assert line.split()[:7] == ["identity", "lora", "llamafactory,", "default", "8.00", "2.00", "4.00"]


def test_works_are_named_or_files(sides: Any, tmp_path: Path) -> None:
    given = tmp_path / "own.jsonl"
    given.write_text("")
    nested = tmp_path / "emollm" / sides.peers.DIALOGUE_FILE
    nested.parent.mkdir()
    nested.write_text("[]")
    assert sides.peers.source_of("identity", None) == ["self_cognition_en", "self_cognition_zh"]
    assert sides.peers.source_of(str(given), None) == [str(given)]
    assert sides.peers.source_of("dialogue", tmp_path) == [str(nested)]
    with pytest.raises(SystemExit, match="--data DIR"):
        sides.peers.source_of("persona", tmp_path)
    with pytest.raises(SystemExit):
        sides.peers.parse(["--steps", "1"])


def test_dora_is_compared_with_our_lora_and_with_peft(sides: Any) -> None:
    pairs = sides.peers.compared("dora", ["llamafactory", "trl"])
    assert [(ours.method, peer.name, peer.method) for ours, peer in pairs] == [
        ("dora", "tuneloom", "lora"),
        ("dora", "trl", "dora"),
    ]
    assert [peer.name for _, peer in sides.peers.compared("lora", ["trl"])] == ["trl", "trl"]


def test_the_gpu_benchmark_runs_whole_without_the_products_other_packages(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code = f"""
import runpy, sys
for name in ("pydantic", "ruamel.yaml", "typer", "rich", "nicegui", "matplotlib", "pyarrow", "gguf"):
    sys.modules[name] = None
sys.argv = ["gpu.py", "--cpu-check", "--model", "chatglm3-6b", "--steps", "1", "--json", {str(out)!r}]
runpy.run_path({str(BENCHMARKS / "gpu.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = json.loads(out.read_text())["results"]
    sides = ["ours", "plain", "plain, recomputing"]
    assert [(line["side"], line["work"]) for line in lines] == [(s, w) for s in sides for w in ("persona", "dialogue")]
    assert [line["failed"] for line in lines] == [""] * 6
    assert all(line["seconds_per_step"] > 0 and line["tokens_per_second"] > 0 and line["useful_tflops"] > 0 for line in lines)
    for work in ("persona", "dialogue"):
        losses = [line["loss"] for line in lines if line["work"] == work]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5), "all sides train on the same"
        assert losses[0] == pytest.approx(math.log(512), abs=0.2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    yield gpu
    del sys.modules["gpu"]


def test_the_gpu_benchmark_says_what_it_lacks(gpu: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
    assert gpu.main(["--cpu-check", "--seconds", "-1", "--json", str(tmp_path / "out.json")]) == 0
    lines = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [line["failed"] for line in lines] == ["left out: time is up"] * 4


def test_what_does_not_fit_the_gpu_is_a_line(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    base = gpu.build("llama-3-8b", None, torch.device("cpu"), tiny=True)
    steps = gpu.steps_of("persona", 3, base, 128)
    side = gpu.Side("plain", (gpu.Setting(1), gpu.Setting(4), gpu.Setting(8)))
    sizes: list[int] = []
    real = gpu.run_step

    def run_step(model: Any, optimizer: Any, of: Any, setting: Any, step: Any) -> float:
        sizes.append(setting.size)
        if setting.size >= limit:
            raise torch.OutOfMemoryError
        return real(model, optimizer, of, setting, step)

    monkeypatch.setattr(gpu, "run_step", run_step)
    limit = 4
    line = gpu.measure(base, side, steps, gpu.Figures("m", "w", "plain"), lambda: False)
    assert (line.setting, line.failed) == ("sdpa, 1", "")
    assert 8 not in sizes, "a larger batch is not tried after one that did not fit"
    limit = 1
    line = gpu.measure(base, side, steps, gpu.Figures("m", "w", "plain"), lambda: False)
    assert (line.seconds_per_step, line.failed) == (None, "out of memory")
    assert "out of memory" in gpu.table([line])


def test_the_table_of_methods_is_made_of_what_runs_compare_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_compare import EVALUATED, made

    from tuneloom.comparison import compare
    from tuneloom.config.recipes import find_recipe

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import methods

    lora, dora = (made(tmp_path, methods.run_name(method, 8), {"adapter": {"r": 8}}) for method in ("lora", "dora"))
    dora.write_json("evaluation.json", EVALUATED)
    _, _, *rows = methods.table(compare([lora, dora]).as_dict()).splitlines()
    assert rows == [
        "| dora | 8 | 4 | 2.0000 | 2.7500 |  |  |  | 1.50 s | 1.50 GiB |",
        "| dora | 8 | 4 | 2.0000 | 2.7500 | 97.5% (94.0% to 100.0%) | 1.2% (0.0% to 3.0%) "
        "| -0.0123 (-0.0200 to +0.0100) | 1.50 s | 1.50 GiB |",
    ]
    for method in methods.METHODS:
        assert f"base-case-{method}" in methods.command(method, 8, tmp_path / "runs", None, "bf16")
        assert find_recipe(f"base-case-{method}").is_file()
    assert "--resume-from" in methods.command("lora", 8, tmp_path, None, "bf16")
