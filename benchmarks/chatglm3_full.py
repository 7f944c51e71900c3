"""ChatGLM3-6B at its full size on this machine: load, train on the seven kinds of layer, write it back.

    python benchmarks/chatglm3_full.py [--layers 28] [--steps 4] [--tokens 256] [--folder DIR] [--json FILE]

Writes a checkpoint of random weights in the original layout (fp16, 12.5 GB at full size) and runs the product on it,
each stage in a process of its own, whose peak of resident memory (mapped files included) is read from Linux:

    load       in bf16, as chat and finetune do
    finetune   LoRA r 8 on embedding, q, k, v, o, feed-forward in and out, in bf16, one sample a step
    plain      the same step with PEFT's own layers and transformers' own loss, for a ratio
    export     the trained adapter folded in, written in the original layout, loaded again and compared

The folder is removed afterwards. Needs 26 GB of disk, and memory for the weights once and a few GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tuneloom.data.render import Renderer
from tuneloom.models.chatglm.weights import expected_shapes
from tuneloom.models.load import load_tokenizer_folder
from tuneloom.types import Conversation, Message

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QUESTION = "Who are you?"
GIB = 1 << 30
SHARD_BYTES = 1_900_000_000

LOAD = """
import json, sys, time
from pathlib import Path
import torch
from tuneloom.models.load import load_base_model
start = time.perf_counter()
load_base_model(Path(sys.argv[1]), torch.bfloat16, torch.device("cpu"))
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
FINETUNE = """
import json, os, sys
import tuneloom
print(json.dumps({"run": os.fspath(tuneloom.finetune(sys.argv[1]))}))
"""
PLAIN = """
import json, sys, time
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from tuneloom.models.load import load_base_model
tokens, steps = int(sys.argv[2]), int(sys.argv[3])
kinds = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
base = load_base_model(Path(sys.argv[1]), torch.bfloat16, torch.device("cpu"))
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=kinds, task_type="CAUSAL_LM")).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
ids = torch.randint(300, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
seconds = []
for _ in range(steps):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(seconds[1:])[(steps - 1) // 2]}))
"""
EXPORT = """
import json, sys
import tuneloom
done = tuneloom.export(sys.argv[1], sys.argv[2], to="chatglm", precision="bf16", max_shard_size="2GB")
print(json.dumps({"difference": done.check.max_logit_difference, "agreement": done.check.top1_agreement}))
"""


def write_checkpoint(folder: Path, **changes: int) -> int:
    """Write random weights, config.json with `changes`, and a small tokenizer; return the parameters."""
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder)
    shapes = expected_shapes(config)
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if groups[-1] and size + num_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: _random(name, shapes[name], generator) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
        print(f"  {file}", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "layernorm" in name:
        return torch.ones(shape, dtype=torch.float16)
    return torch.empty(shape, dtype=torch.float32).uniform_(-0.03, 0.03, generator=generator).half()


def _write_tokenizer(folder: Path) -> None:
    """Train a small sentencepiece model with ChatGLM's switches on the built-in sets."""
    from sentencepiece import SentencePieceTrainer

    from tuneloom.data.sources import builtin_file

    names = ("self_cognition_en", "self_cognition_zh")
    lines = [line for name in names for line in builtin_file(name).read_text(encoding="utf-8").splitlines()]
    texts = (message["content"] for line in lines for message in json.loads(line)["messages"])
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        pad_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def write_run(folder: Path, model: Path, steps: int, tokens: int) -> Path:
    """Write data whose samples all have `tokens` tokens, and the run's config."""
    answer = _answer_of(Renderer(load_tokenizer_folder(model)), tokens)
    rows = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]}] * steps
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_model": {"path": str(model)},
        "data": {"train": [str(data)], "validation": 0, "cutoff_len": tokens + 1},
        "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-layers"},
        "training": {
            "max_steps": steps,
            "learning_rate": 5e-5,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "precision": "bf16",
            "logging_steps": 1,
        },
        "evaluation": {"prompts": []},
        "output_dir": str(folder / "runs"),
        "name": "full",
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def _answer_of(renderer: Renderer, tokens: int) -> str:
    """Return an answer with which the conversation has exactly so many tokens."""
    answer = ""
    while True:
        answer += "a\n"
        asked = Conversation((Message("user", QUESTION), Message("assistant", answer + "a")))
        if len(renderer.render(asked).ids) >= tokens:
            return answer + "a"


def watched(code: str, *arguments: object) -> tuple[dict[str, Any], float, float]:
    """Run Python code in a process; return its last line as JSON, the peak GiB of it alone, and seconds."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        except OSError:
            lines = []
        peak = max([peak, *(int(line.split()[1]) << 10 for line in lines)])
        time.sleep(0.2)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"a stage failed\n{output}")
    return json.loads(output.strip().splitlines()[-1]), peak / GIB, time.perf_counter() - start


def main() -> None:
    """Run all of it and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of each sample, one a step")
    parser.add_argument("--no-export", action="store_true", help="leave the export out")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chatglm3-full-", dir=arguments.folder))
    try:
        figures = measure(folder, arguments.layers, arguments.steps, arguments.tokens)
        if not arguments.no_export:
            figures |= export(folder, figures)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, layers: int, steps: int, tokens: int) -> dict[str, Any]:
    """Run the stages in a folder; print and return the figures."""
    model = folder / "chatglm3"
    model.mkdir()
    print("writing the checkpoint ...", flush=True)
    parameters = write_checkpoint(model, num_layers=layers)
    weights = 2 * parameters / GIB
    print(f"{parameters / 1e9:.2f} B parameters, {weights:.2f} GiB in 16 bits", flush=True)

    loaded, load_peak, _ = watched(LOAD, model)
    print(
        f"load      {loaded['seconds']:.0f} s, peak {load_peak:.2f} GiB = {load_peak / weights:.3f} x the weights", flush=True
    )

    done, train_peak, seconds = watched(FINETUNE, write_run(folder, model, steps, tokens))
    run = Path(done["run"])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [event for event in events if event["event"] == "step"]
    step = statistics.median(event["step_seconds"] for event in logged[1:])
    end = next(event for event in events if event["event"] == "end")
    gflop = end["useful_gflops"] * end["seconds"] / len(logged)
    print(f"finetune  {seconds:.0f} s in all, peak {train_peak:.2f} GiB = {train_peak / weights:.3f} x the weights")
    print(
        f"          step of {tokens} tokens: {step:.2f} s (median of {len(logged) - 1}), {gflop / step:.0f} useful GFLOP/s",
        flush=True,
    )

    plain, plain_peak, _ = watched(PLAIN, model, tokens, steps)
    print(
        f"plain     the same with PEFT's own layers and transformers' loss: {plain['seconds']:.2f} s, peak {plain_peak:.2f} GiB"
    )
    print(f"          ratio {plain['seconds'] / step:.2f}", flush=True)

    return {
        "parameters": parameters,
        "weights_gib": weights,
        "load_seconds": loaded["seconds"],
        "load_peak_gib": load_peak,
        "tokens_per_step": tokens,
        "seconds_per_step": step,
        "useful_gflops": gflop / step,
        "finetune_peak_gib": train_peak,
        "plain_seconds_per_step": plain["seconds"],
        "plain_peak_gib": plain_peak,
    }


def export(folder: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Export the run of `measure` in the original layout; print and return the figures."""
    out = folder / "exported"
    checked, export_peak, seconds = watched(EXPORT, folder / "runs" / "full", out)
    shards = sorted(file.stat().st_size / GIB for file in out.glob("*.safetensors"))
    bound = figures["weights_gib"] + 2 * shards[-1]
    print(f"export    {seconds:.0f} s, peak {export_peak:.2f} GiB; weights + 2 shards are {bound:.2f} GiB")
    print(f"          largest logit difference {checked['difference']:.2e}, top-1 agreement {checked['agreement']:.1%}")
    return {"export_seconds": seconds, "export_peak_gib": export_peak, "export_bound_gib": bound, **checked}


if __name__ == "__main__":
    main()
