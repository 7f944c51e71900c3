"""The three commands of ChatGLM3's `finetune_demo`, run as they are written, from a folder of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import ROWS, asked, plain_base, run_python, script

from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.generate.generator import Generator
from tuneloom.rundir import RunDirectory

CONFIG = """\
data_config:
  train_file: train.json
  val_file: dev.json
  test_file: test.json
  num_proc: 4
max_input_length: 64
max_output_length: 63
training_args:
  output_dir: ./output
  max_steps: 4
  learning_rate: 1e-2
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  save_strategy: steps
  save_steps: 2
  logging_steps: 1
  evaluation_strategy: steps
  eval_steps: 2
  predict_with_generate: true
  generation_config:
    max_new_tokens: 4
peft_config:
  peft_type: LORA
  task_type: CAUSAL_LM
  r: 4
  lora_alpha: 8
"""


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which finetune_hf.py has run, in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data").mkdir()
    for name, rows in (("train", ROWS), ("dev", ROWS[4:6]), ("test", ROWS[:2])):
        conversations = [{"conversations": row["messages"]} for row in rows]
        (folder / "data" / f"{name}.json").write_text(json.dumps(conversations, ensure_ascii=False), encoding="utf-8")
    (folder / "configs").mkdir()
    (folder / "configs" / "lora.yaml").write_text(CONFIG, encoding="utf-8")
    done = run_python(ROOT / "finetune_hf.py", "data", tiny_model, "configs/lora.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    (folder / "stderr.txt").write_text(done.stderr, encoding="utf-8")
    return folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, as the current directory."""
    folder = shutil.copytree(trained, tmp_path / "demo")
    monkeypatch.chdir(folder)
    return folder


def steps(run: Path) -> list[int]:
    return [event["step"] for event in RunDirectory(run).events("step")]


def test_finetune_hf_leaves_checkpoints_predictions_and_says_what_next(trained: Path) -> None:
    output = trained / "output"
    assert list(RunDirectory(output).checkpoints()) == [2, 4]
    assert steps(output) == [1, 2, 3, 4]
    printed = (trained / "stdout.txt").read_text(encoding="utf-8")
    assert 'python3 inference_hf.py output/checkpoint-4/ --prompt "..."' in printed
    assert "effective batch  4 samples a step (2 x 2)" in printed
    assert (trained / "stderr.txt").read_text(encoding="utf-8") == "note: data_config.num_proc changes nothing here\n"

    evals = list(RunDirectory(output).events("eval"))
    assert [event["step"] for event in evals] == [2, 4]
    assert all({"eval_loss", "rouge-1", "rouge-2", "rouge-l", "bleu-4"} <= event.keys() for event in evals)
    rows = [json.loads(line) for line in (output / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["reference"]) for row in rows] == [
        ("Who are you?", "I am Loomi, a small assistant."),
        ("你是谁？", "我是小织，一个人工智能助手。"),
    ]
    results = json.loads((output / "test_results.json").read_text(encoding="utf-8"))
    assert results.keys() == {"rows", "rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu", "chrf"}


@pytest.mark.parametrize("answer", ["yes", "YES"])
def test_yes_on_a_finished_run_says_so(answer: str, workplace: Path, tiny_model: Path) -> None:
    done = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", answer)
    assert (done.code, done.stdout) == (0, "output is done already; its adapter: output/adapter\n")


def test_yes_goes_on_from_the_newest_whole_checkpoint(workplace: Path, tiny_model: Path) -> None:
    (workplace / "output" / "state.json").unlink()
    (workplace / "output" / "checkpoint-4" / "manifest.json").unlink()
    done = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", "yes")
    assert done.code == 0, done.stderr
    assert "skipped checkpoint-4: manifest.json is missing or torn" in done.stdout
    assert "resuming output from checkpoint-2" in done.stdout
    assert steps(workplace / "output") == [1, 2, 3, 4, 3, 4]


def test_a_number_goes_on_from_that_checkpoint(workplace: Path, tiny_model: Path) -> None:
    before = (workplace / "output" / "adapter" / "adapter_model.safetensors").read_bytes()
    done = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", "2")
    assert done.code == 0, done.stderr
    assert "resuming output from checkpoint-2" in done.stdout
    assert steps(workplace / "output") == [1, 2, 3, 4, 3, 4]
    assert (workplace / "output" / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("answer", "words"), [("3", ["no such checkpoint", "2, 4"]), ("maybe", ["yes, no, or a step's number"])]
)
def test_another_answer_is_the_users_to_mend(answer: str, words: list[str], workplace: Path, tiny_model: Path) -> None:
    done = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", answer)
    assert done.code == 2
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr


def test_no_moves_the_old_output_aside_and_starts_anew(workplace: Path, tiny_model: Path) -> None:
    (workplace / "output" / "mine.txt").write_text("precious", encoding="utf-8")
    done = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", "no", "--set", "training.max_steps=2")
    assert done.code == 0, done.stderr
    (aside,) = workplace.glob("output-*")
    assert f"output was there already; moved to {aside.name}" in done.stdout
    assert (aside / "mine.txt").read_text(encoding="utf-8") == "precious"
    assert list(RunDirectory(aside).checkpoints()) == [2, 4]
    assert list(RunDirectory(workplace / "output").checkpoints()) == [2]


def test_a_mistake_leaves_the_old_output_where_it_is(workplace: Path, tiny_model: Path) -> None:
    done = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", "--set", "data.train=nowhere.json")
    assert (done.code, done.stderr.count("tuneloom: data not found")) == (2, 1)
    dry = script("finetune_hf.py", "data", str(tiny_model), "configs/lora.yaml", "--dry-run")
    assert dry.code == 0, dry.stderr
    assert "dry run: nothing was trained, no run was made" in dry.stdout
    assert list(workplace.glob("output*")) == [workplace / "output"]
    assert steps(workplace / "output") == [1, 2, 3, 4]


def test_the_adapter_to_continue_from_is_not_moved_aside(workplace: Path, tiny_model: Path) -> None:
    command = ("data", str(tiny_model), "configs/lora.yaml", "--dry-run", "--set", "adapter.continue_from=output/checkpoint-4")
    done = script("finetune_hf.py", *command)
    assert done.code == 2
    assert "lies in the output that a new run moves aside" in done.stderr
    assert "--set name=NEW" in done.stderr
    done = script("finetune_hf.py", *command, "--set", "name=next")
    assert done.code == 0, done.stderr
    assert "continued from  output/checkpoint-4 (sha256 " in done.stdout


def test_inference_hf_prints_an_answer(workplace: Path) -> None:
    done = script("inference_hf.py", "output/checkpoint-4/", "--prompt", "你是谁?")
    assert done.code == 0, done.stderr
    loaded = load_target(resolve_target("output/checkpoint-4/"))
    assert loaded.target.config is not None
    pieces = Generator(loaded.model, loaded.renderer).stream(asked("你是谁?"), loaded.target.config.generation)
    assert done.stdout == "".join(pieces) + "\n"
    assert done.stderr.startswith("loading ")
    assert "checkpoint-4" in done.stderr


def test_model_export_hf_writes_a_model_that_loads(workplace: Path, checked_here: None) -> None:
    done = script("model_export_hf.py", "output/checkpoint-4/", "--out-dir", "./merged-01")
    assert done.code == 0, done.stderr
    assert "written   merged-01 (fp32)" in done.stdout
    assert plain_base(workplace / "merged-01").config.model_type == "llama"
    again = script("model_export_hf.py", "output/checkpoint-4/", "--out-dir", "./merged-01")
    assert (again.code, again.stderr.splitlines()[0]) == (2, "tuneloom: the output exists already")
