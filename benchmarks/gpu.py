"""The engine against transformers + PEFT on one CUDA device: random weights of real shapes, the same samples for each side.

    python benchmarks/gpu.py [--model chatglm3-6b llama-3-8b] [--work persona dialogue] [--steps 3] [--layers N]
                             [--seconds 480] [--json FILE]
    python benchmarks/gpu.py --cpu-check

Works: samples as long as real ones, their tokens drawn at random. `persona`: short answers under one system prompt of 257
tokens, 364 tokens a sample; `dialogue`: several turns, 700 to 1,024 tokens, nothing shared. A step has 16 samples of at most
1,024 tokens; LoRA r 8 on all linear layers, bf16 weights, fp32 adapters, AdamW.

    ours                the product's layers, packing, attention and loss; attention `packed` and `flex`, micro-batches of at
                        most 4, 8 and 16 thousand rows
    plain               PEFT's own layers, padded batches of 1, 2, 4 and 8 samples, the model's own loss and fused attention
    plain, recomputing  the same with gradient checkpointing
    liger               the two plain ones with Liger's kernels, where `liger_kernel` can be imported and knows the model

Each side tries its settings on one step and keeps the fastest that fits; steps that follow are timed, the device waited for,
and their median is told. tokens/s: input tokens of the samples without padding, a beginning that they share counted for each.
useful TFLOP/s: the step's work with such beginnings counted once, the same for each side (4 x frozen + 6 x adapter parameters
a token, 4 x head a supervised one, 12 x width a pair of tokens that attend), over the time. loss: of the first step, the
adapter fresh, so it must be the same for all sides. Memory is what torch allocated at most.

After `--seconds` nothing new is begun, and what was left out is said. It needs torch, transformers, peft, what these need, and
this repository's folder: of the product only modules that import no other package. No network is used. Without a CUDA device
it says so and ends with exit code 2; `--cpu-check` runs all of it with tiny shapes on a CPU, which measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft import LoraConfig, get_peft_model

from tuneloom.adapters.fused import with_fused_layers
from tuneloom.data.plan import plan_step
from tuneloom.models.forward import COMPILED, PACKED, layout_of, supervised_loss_sum, use_attention
from tuneloom.models.fused_layers import fuse_layers
from tuneloom.train.proof import takes_packed
from tuneloom.types import IGNORE_INDEX, Sample

SAMPLES_PER_STEP = 16
GIB = 1 << 30
FIRST_ID = 300
"""Tokens are drawn from here on: special ones mean something to some models."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "chatglm3-6b": (
        "glm",
        {
            "vocab_size": 65024,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 28,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": True,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        },
    ),
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Setting:
    """What a side may choose: ours an attention and rows of a micro-batch, a plain one samples of a batch."""

    size: int
    attention: str = "sdpa"

    def __str__(self) -> str:
        return f"{self.attention}, {self.size}"


@dataclass(frozen=True)
class Side:
    """A way to train. `settings` are tried in order, each attention's until one does not fit."""

    name: str
    settings: tuple[Setting, ...]
    ours: bool = False
    recomputing: bool = False
    liger: bool = False


@dataclass(frozen=True)
class Step:
    """An optimizer step's samples, and what they cost.

    Attributes:
        tokens: input tokens.
        supervised_tokens: of these, what enters the loss.
        tflop: useful work.
    """

    samples: tuple[Sample, ...]
    tokens: int
    supervised_tokens: int
    tflop: float


@dataclass(frozen=True)
class Figures:
    """A line of the table; `failed` is why there are no figures."""

    model: str
    work: str
    side: str
    setting: str = ""
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    useful_tflops: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    failed: str = ""


# The samples.


def draw(work: str, generator: np.random.Generator, prompt_T: np.ndarray, vocabulary: int, cutoff: int) -> Sample:
    """Return a sample of a work."""
    turns = [(len(prompt_T) + int(generator.integers(12, 37)), int(generator.integers(40, 127)))]
    if work == "dialogue":
        length, turns = int(generator.integers(700 * cutoff // 1024, cutoff + 1)), []
        while sum(map(sum, turns)) < length:
            turns.append((int(generator.integers(20, 61)), int(generator.integers(60, 241))))
    mask_T = np.concatenate([np.arange(asked + told) >= asked for asked, told in turns])
    ids_T = generator.integers(min(FIRST_ID, vocabulary // 2), vocabulary, len(mask_T)).astype(np.int32)
    if work == "persona":
        ids_T[: len(prompt_T)] = prompt_T
    end = min(cutoff, len(mask_T)) if work == "persona" else length
    return Sample(ids_T[:end], mask_T[:end])


def steps_of(work: str, count: int, base: Any, cutoff: int, samples: int = SAMPLES_PER_STEP) -> list[Step]:
    """Return steps of a work, the same for every side."""
    generator = np.random.default_rng(42)
    vocabulary = base.config.vocab_size
    prompt_T = generator.integers(min(FIRST_ID, vocabulary // 2), vocabulary, 257 * cutoff // 1024).astype(np.int32)
    return [
        counted(tuple(draw(work, generator, prompt_T, vocabulary, cutoff) for _ in range(samples)), base) for _ in range(count)
    ]


def counted(samples: tuple[Sample, ...], base: Any) -> Step:
    """Count a step's tokens and work; beginnings that samples share are work once."""
    config, head = base.config, base.get_output_embeddings()
    linear = [module for module in base.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    frozen = sum(module.weight.numel() for module in linear)
    adapter = sum(8 * (module.in_features + module.out_features) for module in linear)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * size * config.num_hidden_layers
    [batch] = plan_step(samples, sys.maxsize).micro_batches
    pairs = int(batch.positions_N.sum()) + batch.num_rows
    flop = (4 * frozen + 6 * adapter) * batch.num_rows + 4 * head.weight.numel() * batch.num_supervised_tokens
    return Step(samples, batch.num_tokens, batch.num_supervised_tokens, (flop + 12 * width * pairs) / 1e12)


# The models.


def build(name: str, layers: int | None, device: torch.device, tiny: bool) -> Any:
    """Return a model of a shape with random weights on the device: bf16, fp32 in the check."""
    family, shape = SHAPES[name]
    shape = {**shape, **(TINY if tiny else {}), **({"num_hidden_layers": layers} if layers else {})}
    config = transformers.AutoConfig.for_model(family, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if tiny else torch.bfloat16, attn_implementation="sdpa"
        )
    return model.requires_grad_(False)


def adapted(base: Any, side: Side) -> Any:
    """Return the base with the side's adapter, which begins the same for all."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    torch.manual_seed(0)
    model = get_peft_model(base, with_fused_layers(lora) if side.ours else lora).train()
    base.gradient_checkpointing_disable()
    if side.recomputing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def sides_for(base: Any, tiny: bool) -> Iterator[Side]:
    """Yield the sides, those with Liger last, since its kernels stay in the model."""
    on_gpu = base.device.type == "cuda"
    paths = [path for path in ((COMPILED, PACKED) if on_gpu else (PACKED,)) if takes_packed(base, path)]
    rows = (256, 512) if tiny else (4096, 8192, 16384)
    yield Side("ours", tuple(Setting(size, path) for path in paths for size in rows), ours=True)
    plain = tuple(map(Setting, (1, 4) if tiny else (1, 2, 4, 8)))
    yield Side("plain", plain)
    yield Side("plain, recomputing", plain, recomputing=True)
    if importlib.util.find_spec("liger_kernel") is not None:
        yield Side("liger", plain, liger=True)
        yield Side("liger, recomputing", plain, recomputing=True, liger=True)


def with_liger(base: Any) -> str:
    """Put Liger's kernels into a model; return why not, if so."""
    from liger_kernel.transformers import monkey_patch

    if base.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no kernels for {base.config.model_type}"
    monkey_patch._apply_liger_kernel_to_instance(model=base)
    return ""


# A step.


def run_step(model: Any, optimizer: torch.optim.Optimizer, side: Side, setting: Setting, step: Step) -> float:
    """Train one step; return its loss, the mean over its supervised tokens."""
    total = torch.zeros((), device=model.device)
    for loss in (ours_losses if side.ours else plain_losses)(model, setting, step):
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def ours_losses(model: Any, setting: Setting, step: Step) -> Iterator[torch.Tensor]:
    """Yield what each micro-batch adds to the loss, the product's way."""
    for batch in plan_step(step.samples, setting.size, layout_of(model, training=True)).micro_batches:
        yield supervised_loss_sum(model, batch) / step.supervised_tokens


def plain_losses(model: Any, setting: Setting, step: Step) -> Iterator[torch.Tensor]:
    """Yield the same with padded batches and the model's own loss; samples of like length go together."""
    order = sorted(step.samples, key=lambda sample: sample.num_tokens)
    for start in range(0, len(order), setting.size):
        batch = padded(order[start : start + setting.size])
        tensors = {name: torch.from_numpy(array).to(model.device) for name, array in batch.items()}
        count = torch.tensor(step.supervised_tokens, device=model.device)
        yield model(**tensors, use_cache=False, num_items_in_batch=count).loss


def padded(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return a batch as transformers takes it."""
    shape = len(samples), max(sample.num_tokens for sample in samples)
    batch = {name: np.full(shape, fill) for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX))}
    for row, sample in enumerate(samples):
        end = sample.num_tokens
        batch["input_ids"][row, :end] = sample.ids_T
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, :end] = np.where(sample.mask_T, sample.ids_T, IGNORE_INDEX)
    return batch


# Measuring.


def measure(base: Any, side: Side, steps: Sequence[Step], line: Figures, late: Callable[[], bool]) -> Figures:
    """Return a side's figures on a work: the fastest setting, timed on the steps after the first two."""
    if side.liger and (why := with_liger(base)):
        return replace(line, failed=why)
    replaced = fuse_layers(base) if side.ours else []
    model = adapted(base, side)
    try:
        trials, loss = tried(model, side, steps, late)
        if not trials:
            return replace(line, failed="out of memory" if side.settings and not late() else "no setting could be tried")
        best = min(trials, key=lambda setting: trials[setting])
        return timed(model, side, best, steps[2:], replace(line, setting=str(best), loss=loss))
    finally:
        model.unload()
        for parent, name, module in replaced:
            setattr(parent, name, module)
        use_attention(base, "sdpa")
        base.gradient_checkpointing_disable()


def tried(model: Any, side: Side, steps: Sequence[Step], late: Callable[[], bool]) -> tuple[dict[Setting, float], float | None]:
    """Return the seconds of each setting that fits, on the second step, and the loss of the first step."""
    found: dict[Setting, float] = {}
    too_large: set[str] = set()
    first_loss = None
    for setting in side.settings:
        if setting.attention in too_large or late():
            continue
        use_attention(model.get_base_model(), setting.attention)
        optimizer = optimizer_of(model, learning_rate=0.0)  # so that all begin the same
        try:
            loss = run_step(model, optimizer, side, setting, steps[0])
            run_step(model, optimizer, side, setting, steps[1])
            found[setting] = seconds_of(model, optimizer, side, setting, steps[1])
            first_loss = loss if first_loss is None else first_loss
        except torch.OutOfMemoryError:
            too_large.add(setting.attention)
        forget(model)  # not in the handler, where the error still holds its frames
    return found, first_loss


def timed(model: Any, side: Side, setting: Setting, steps: Sequence[Step], line: Figures) -> Figures:
    """Return a line with its figures, on steps that are trained."""
    use_attention(model.get_base_model(), setting.attention)
    on_gpu = model.device.type == "cuda"
    forget(model)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    optimizer = optimizer_of(model, learning_rate=5e-5)
    try:
        seconds = [seconds_of(model, optimizer, side, setting, step) for step in steps]
    except torch.OutOfMemoryError:
        return replace(line, failed="out of memory on a longer step")
    return replace(
        line,
        seconds_per_step=statistics.median(seconds),
        tokens_per_second=statistics.median(step.tokens / took for step, took in zip(steps, seconds, strict=True)),
        useful_tflops=statistics.median(step.tflop / took for step, took in zip(steps, seconds, strict=True)),
        peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
    )


def seconds_of(model: Any, optimizer: torch.optim.Optimizer, side: Side, setting: Setting, step: Step) -> float:
    """Return how long a step takes, the device waited for."""
    settle(model.device)
    start = time.perf_counter()
    run_step(model, optimizer, side, setting, step)
    settle(model.device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def optimizer_of(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW for the adapter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=model.device.type == "cuda")


def forget(model: Any) -> None:
    """Give back what a measurement held."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def table(lines: Sequence[Figures]) -> str:
    """Return the lines as text; the ratio is a side's seconds over ours."""
    ours = {(line.model, line.work): line.seconds_per_step for line in lines if line.side == "ours"}
    rows: list[tuple[str, ...]] = [
        ("model", "work", "side", "setting", "s/step", "ratio", "tokens/s", "TFLOP/s", "GiB", "loss")
    ]
    for line in lines:
        own, took = ours.get((line.model, line.work)), line.seconds_per_step
        shown = [
            cell(took, ".3f"),
            cell(took / own if took and own else None, ".2f"),
            cell(line.tokens_per_second, ",.0f"),
            cell(line.useful_tflops, ".1f"),
            cell(line.peak_gib, ".1f"),
            cell(line.loss, ".4f"),
        ]
        rows.append((line.model, line.work, line.side, line.failed or line.setting, *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def cell(value: float | None, form: str) -> str:
    """Return a number as text."""
    return "-" if value is None else format(value, form)


def results(arguments: argparse.Namespace, device: torch.device) -> list[Figures]:
    """Measure everything, saying each line as it is there; what the time does not suffice for is a line that says so."""
    began, found = time.monotonic(), []
    tiny: bool = arguments.cpu_check
    allowed: float = arguments.seconds

    def late() -> bool:
        return time.monotonic() - began > allowed

    for name in arguments.model:
        if late():
            found += [Figures(name, work, "all", failed="left out: time is up") for work in arguments.work]
            continue
        base = build(name, arguments.layers, device, tiny)
        cutoff, samples = (128, 4) if tiny else (1024, SAMPLES_PER_STEP)
        works = {work: steps_of(work, arguments.steps + 2, base, cutoff, samples) for work in arguments.work}
        for side in sides_for(base, tiny):
            for work, steps in works.items():
                line = Figures(name, work, side.name)
                line = replace(line, failed="left out: time is up") if late() else measure(base, side, steps, line, late)
                found.append(line)
                print(
                    f"{line.model}, {line.work}, {line.side}: {line.failed or cell(line.seconds_per_step, '.3f')}", flush=True
                )
        del base
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Run all of it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--work", nargs="+", choices=("persona", "dialogue"), default=["persona", "dialogue"])
    parser.add_argument("--steps", type=int, default=3, help="timed, after the settings were tried on two others")
    parser.add_argument("--layers", type=int, help="of each model, instead of its own")
    parser.add_argument("--seconds", type=float, default=480, help="after which nothing new is begun")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--cpu-check", action="store_true", help="tiny shapes on a CPU: whether all of it runs")
    arguments = parser.parse_args(given)
    if arguments.steps < 1:
        parser.error("--steps: at least 1")
    if not arguments.cpu_check and not torch.cuda.is_available():
        print("no CUDA device is here, and nothing was measured; --cpu-check tries the code with tiny shapes", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.cpu_check else "cuda")
    machine = "cpu" if arguments.cpu_check else torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    lines = results(arguments, device)
    print(f"\n{table(lines)}")
    if arguments.json:
        record = {"device": machine, "torch": torch.__version__, "results": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
