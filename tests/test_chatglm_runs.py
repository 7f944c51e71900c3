"""ChatGLM in its original layout, whole: the three commands, every kind of layer, both layouts out."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_folders import make_chatglm_folder
from helpers import ROWS, assert_mendable, logits_of, method, plain_base, script, sha256, tiny_config
from safetensors.torch import load_file

from tuneloom.adapters.target import load_target, resolve_target
from tuneloom.errors import UserError
from tuneloom.exporting.merged import export_merged
from tuneloom.generate.generator import Generator
from tuneloom.models.load import load_tokenizer_folder
from tuneloom.models.source import silent
from tuneloom.rundir import RunDirectory
from tuneloom.train.run import finetune

KINDS = ["word_embeddings", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
NATIVE_KINDS = {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}

CONFIG = f"""\
data_config: {{train_file: train.json, val_file: dev.json, num_proc: 4}}
max_input_length: 128
max_output_length: 127
training_args:
  output_dir: ./output
  max_steps: 4
  learning_rate: 1e-2
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  save_steps: 2
  logging_steps: 1
  evaluation_strategy: steps
  eval_steps: 4
  predict_with_generate: true
  generation_config: {{max_new_tokens: 4}}
peft_config: {{peft_type: LORA, task_type: CAUSAL_LM, r: 4, lora_alpha: 8, target_modules: [{", ".join(KINDS)}]}}
"""


pytestmark = pytest.mark.usefixtures("checked_here")


def original_weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def commands(chatglm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which finetune_hf.py has run on the model."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "data").mkdir()
    for name, rows in (("train", ROWS), ("dev", ROWS[4:6])):
        conversations = [{"conversations": row["messages"]} for row in rows]
        (folder / "data" / f"{name}.json").write_text(json.dumps(conversations, ensure_ascii=False), encoding="utf-8")
    (folder / "lora.yaml").write_text(CONFIG, encoding="utf-8")
    with contextlib.chdir(folder):
        done = script("finetune_hf.py", "data", chatglm, "lora.yaml")
    assert done.code == 0, done.stderr
    return folder


def test_the_three_commands_run_with_the_seven_kinds_of_layer(commands: Path, chatglm: Path) -> None:
    output = RunDirectory(commands / "output")
    assert list(output.checkpoints()) == [2, 4]
    adapter = json.loads((output.checkpoint(4) / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == NATIVE_KINDS
    (event,) = output.events("eval")
    assert {"eval_loss", "rouge-l", "bleu-4"} <= event.keys()

    with contextlib.chdir(commands):
        asked = script("inference_hf.py", "output/checkpoint-4/", "--prompt", "你是谁?")
        assert asked.code == 0, asked.stderr
        exported = script("model_export_hf.py", "output/checkpoint-4/", "--out-dir", "./merged")
    assert exported.code == 0, exported.stderr
    merged = plain_base(commands / "merged")
    assert type(merged).__name__ == "GlmForCausalLM"
    tuned = load_target(resolve_target(str(commands / "output")), precision="fp32")
    ids = tuned.renderer.encode("[gMASK]<sop><|user|>\n 你好<|assistant|>")
    assert torch.allclose(logits_of(merged, ids), logits_of(tuned.model, ids), atol=1e-4)
    vocabulary = tuned.renderer.tokenizer.get_vocab()
    ends = [2, vocabulary["<|user|>"], vocabulary["<|observation|>"]]
    assert merged.generation_config.eos_token_id == ends
    assert Generator(tuned.model, tuned.renderer).stop_ids == frozenset(ends)


def test_the_run_resumes_to_the_same_end(commands: Path, chatglm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(commands, tmp_path / "work")
    whole = sha256(folder / "output" / "checkpoint-4" / "adapter_model.safetensors")
    (folder / "output" / "state.json").unlink()
    shutil.rmtree(folder / "output" / "checkpoint-4")
    with contextlib.chdir(folder):
        done = script("finetune_hf.py", "data", chatglm, "lora.yaml", "yes")
    assert done.code == 0, done.stderr
    assert "resuming output from checkpoint-2" in done.stdout
    assert sha256(folder / "output" / "checkpoint-4" / "adapter_model.safetensors") == whole


def trained(model: Path, rows: Path, output: Path, changes: dict[str, Any]) -> Path:
    return finetune(tiny_config(model, rows, output, {"adapter.target_modules": "all-layers"} | changes)).directory.path


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("original", "dora"),
        ("native", "rslora"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [("original", "lora"), ("original", "rslora"), ("native", "dora")]
        ),
    ],
)
def test_a_tuned_model_leaves_in_either_layout(layout: Any, name: str, chatglm: Path, rows_file: Path, tmp_path: Path) -> None:
    run = trained(chatglm, rows_file, tmp_path / "runs", method(name))
    out = tmp_path / "out"
    done = export_merged(resolve_target(str(run)), out, layout=layout, max_shard_size="1MB", say=silent)
    assert done.check.passed
    assert done.check.max_logit_difference <= 1e-4
    tuned = load_target(resolve_target(str(run)), precision="fp32")
    again = load_target(resolve_target(str(out)), precision="fp32")
    ids = tuned.renderer.encode("[gMASK]<sop><|user|>\n Who are you?<|assistant|>")
    assert torch.allclose(logits_of(again.model, ids), logits_of(tuned.model, ids), atol=1e-4)
    base = load_target(resolve_target(str(chatglm)), precision="fp32")
    assert not torch.allclose(logits_of(base.model, ids), logits_of(tuned.model, ids), atol=1e-2)
    if layout == "original":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        weights = original_weights(out)
        assert index["weight_map"].keys() == weights.keys() == original_weights(chatglm).keys()
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
        assert all(name in load_file(out / file) for name, file in index["weight_map"].items())


def test_the_original_layout_comes_back_bit_for_bit_with_its_owner_s_files(chatglm: Path, tmp_path: Path) -> None:
    done = export_merged(resolve_target(str(chatglm)), tmp_path / "out", layout="original", max_shard_size="1MB", say=silent)
    assert done.check.max_logit_difference == 0
    before, after = original_weights(chatglm), original_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    for file in chatglm.iterdir():
        if file.suffix not in (".safetensors",) and not file.name.endswith(".index.json"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_through_the_native_layout_and_back_is_bit_for_bit(chatglm: Path, tmp_path: Path) -> None:
    """Native classes hold every number of the file: q, k and v put together again are the fused weight."""
    from tuneloom.models.chatglm.weights import native_tensors

    export_merged(resolve_target(str(chatglm)), tmp_path / "native", say=silent)
    native = original_weights(tmp_path / "native")
    views = {name: view.clone() for name, view in native_tensors(chatglm, json.loads((chatglm / "config.json").read_text()))}
    assert native.keys() == views.keys()
    assert all(native[name].numpy().tobytes() == views[name].numpy().tobytes() for name in views)
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "glm"


def test_a_16_bit_checkpoint_keeps_its_dtype_and_another_one_is_written_into_config_json(tmp_path: Path) -> None:
    half = make_chatglm_folder(tmp_path / "half", dtype=torch.float16, layout="sharded bin")
    export_merged(resolve_target(str(half)), tmp_path / "same", layout="original", say=silent)
    assert (tmp_path / "same" / "config.json").read_bytes() == (half / "config.json").read_bytes()
    assert {weight.dtype for weight in original_weights(tmp_path / "same").values()} == {torch.float16}
    export_merged(resolve_target(str(half)), tmp_path / "other", layout="original", precision="bf16", say=silent)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config == json.loads((half / "config.json").read_text()) | {"torch_dtype": "bfloat16"}


def test_no_code_of_the_folder_is_copied_into_a_run(commands: Path) -> None:
    """Had one been run, it would have ended the process: each of the folder's raises SystemExit."""
    assert not list((commands / "output").rglob("*.py"))


@pytest.mark.parametrize(("wanted", "base"), [("original", "tiny_model")])
def test_the_original_layout_needs_a_base_in_it(wanted: Any, base: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    target = resolve_target(str(request.getfixturevalue(base)))
    with pytest.raises(UserError, match="not a ChatGLM in its original layout") as caught:
        export_merged(target, tmp_path / "out", layout=wanted, say=silent)
    assert_mendable(caught.value)


def test_finetune_and_chat_ask_for_tokenizer_model(chatglm: Path, rows_file: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(chatglm, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    for act in (
        lambda: finetune(tiny_config(bare, rows_file, tmp_path / "runs")),
        lambda: load_target(resolve_target(str(bare))),
        lambda: load_tokenizer_folder(bare),
    ):
        with pytest.raises(UserError, match=r"tokenizer\.model") as caught:
            act()
        assert_mendable(caught.value)
    assert not (tmp_path / "runs").exists()
