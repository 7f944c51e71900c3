"""One work for every side: the conversations as a file of ours, and in the order of the steps with tokens and labels.

    python prepare.py JOB.json

The job names the rows' source and the steps; beside the samples the useful floating-point operations of each step are
written, by the definitions of `work_of`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from tuneloom.config import SourceConfig, TrainingConfig
from tuneloom.data.conversations import ConversationReader
from tuneloom.data.plan import StepSchedule
from tuneloom.data.render import Renderer
from tuneloom.models.load import load_tokenizer_folder
from tuneloom.models.source import resolve_model
from tuneloom.types import IGNORE_INDEX, Conversation

VARIABLES = {"name": "Loomi", "author": "Tuneloom"}
SHORTEST_ANSWER = 16
"""Characters below which an answer is not shortened to fit the cutoff; the turn is left out instead."""


@dataclass(frozen=True)
class Shape:
    """A model's numbers that a token's work is counted from.

    Attributes:
        frozen: parameters of its linear layers, the head left out.
        adapter: parameters of the adapter on these.
        head: of the head.
        attention_width: heads x head size, summed over the layers.
    """

    frozen: int
    adapter: int
    head: int
    attention_width: int


def main() -> None:
    """Write everything that the job asks for."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    model = resolve_model(job["model"]).folder.resolve()
    renderer = Renderer(load_tokenizer_folder(model))
    conversations = conversations_of(job["source"], renderer, job["cutoff"], job["max_rows"])
    per_step = job["samples_per_step"]
    whole = len(conversations) // per_step * per_step
    if not whole:
        raise SystemExit(f"{job['source']}: {len(conversations)} conversations, fewer than the {per_step} of one step")
    rows = conversations[:whole]
    lines = (json.dumps({"messages": row.as_dicts()}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")

    steps = step_indices(whole, job)
    samples = [sample_of(rows[i], renderer) for step in steps for i in step]
    (folder / "samples.json").write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    for method in job["methods"]:
        write_start(model, folder / f"start-{method}", job, dora=method == "dora")
    shape = shape_of(model, job["r"])
    found = [work_of(samples[start : start + per_step], shape) for start in range(0, len(samples), per_step)]
    figures = {
        "model": str(model),
        "bf16_model": str(bf16_copy(model, Path(job["cache"]))),
        "longest": max(len(sample["input_ids"]) for sample in samples),
        "samples": len(samples),
        "left_out": len(conversations) - whole,
        "supervised_tokens": list(accumulate(step["supervised_tokens"] for step in found)),
        "steps": found,
    }
    (folder / "work.json").write_text(json.dumps(figures))


def conversations_of(source: Sequence[str], renderer: Renderer, cutoff: int, max_rows: int | None) -> list[Conversation]:
    """Return the source's conversations in order, none longer than the cutoff."""
    found: list[Conversation] = []
    for path in source:
        reader = ConversationReader(SourceConfig(path=path), VARIABLES)
        for read in reader.read(reader.new_report()):
            if len(found) == max_rows:
                return found
            if (fitting := shortened(read.conversation, renderer, cutoff)) is not None:
                found.append(fitting)
    return found


def shortened(conversation: Conversation, renderer: Renderer, cutoff: int) -> Conversation | None:
    """Return the leading turns that fit, the answer that goes over the cutoff shortened in its text.

    Sides cut long conversations each in their own way; so none has to.
    """
    if num_tokens(conversation, renderer) <= cutoff:
        return conversation
    kept = None
    for turn in conversation.turns():
        upto = replace(conversation, messages=conversation.messages[: turn + 1])
        if num_tokens(upto, renderer) <= cutoff:
            kept = upto
            continue
        answer = upto.messages[-1]
        fits, over = 0, len(answer.content)
        while over - fits > 1:
            middle = (fits + over) // 2
            shorter = with_answer(upto, answer.content[:middle])
            fits, over = (middle, over) if num_tokens(shorter, renderer) <= cutoff else (fits, middle)
        text = answer.content[:fits].rstrip()
        return with_answer(upto, text) if len(text) >= SHORTEST_ANSWER else kept
    return kept


def with_answer(conversation: Conversation, text: str) -> Conversation:
    """Return the conversation with another last answer."""
    *before, last = conversation.messages
    return replace(conversation, messages=(*before, replace(last, content=text)))


def num_tokens(conversation: Conversation, renderer: Renderer) -> int:
    """Return the conversation's tokens up to its last supervised one."""
    return len(sample_of(conversation, renderer)["input_ids"])


def sample_of(conversation: Conversation, renderer: Renderer) -> dict[str, Any]:
    """Return input_ids, labels and messages; what follows the last supervised token teaches nothing and is left out."""
    rendered = renderer.render(conversation)
    end = max((i for i, on in enumerate(rendered.mask) if on), default=-1) + 1
    ids = list(map(int, rendered.ids[:end]))
    labels = [token if on else IGNORE_INDEX for token, on in zip(ids, rendered.mask[:end], strict=True)]
    return {"input_ids": ids, "labels": labels, "messages": conversation.as_dicts()}


def step_indices(num_samples: int, job: dict[str, Any]) -> list[list[int]]:
    """Return the samples of each step, as our own schedule takes them."""
    training = TrainingConfig(
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=job["samples_per_step"] // job["batch_size"],
        seed=job["seed"],
    )
    schedule = StepSchedule.of(training, num_samples)
    return [schedule.indices(step) for step in range(job["steps"])]


def work_of(samples: Sequence[dict[str, Any]], shape: Shape) -> dict[str, float]:
    """Return a step's tokens and GFLOP.

    `useful_gflop`: 4 x frozen + 6 x adapter for each input token (the last token of a sample is a label only),
    4 x head for each supervised token, and 12 x attention width for each key that a query attends to. `needed_gflop`:
    the same with beginnings that samples share, labelled tokens not among them, counted once.
    """
    useful = sum(token_gflop(position, shape) for sample in samples for position in range(len(sample["input_ids"]) - 1))
    supervised = sum(label != IGNORE_INDEX for sample in samples for label in sample["labels"])
    head = 4 * shape.head * supervised / 1e9
    repeated = repeated_positions(samples)
    return {
        "tokens": sum(len(sample["input_ids"]) - 1 for sample in samples),
        "distinct_tokens": sum(len(sample["input_ids"]) - 1 for sample in samples) - len(repeated),
        "supervised_tokens": supervised,
        "useful_gflop": useful + head,
        "needed_gflop": useful + head - sum(token_gflop(position, shape) for position in repeated),
    }


def token_gflop(position: int, shape: Shape) -> float:
    """Return the GFLOP of one input token at a position, the head left out."""
    return (4 * shape.frozen + 6 * shape.adapter + 12 * shape.attention_width * (position + 1)) / 1e9


def repeated_positions(samples: Sequence[dict[str, Any]]) -> list[int]:
    """Return the positions, one for each input token that another sample of the step has in the same beginning."""
    nodes: dict[tuple[int, int], int] = {}
    repeated = []
    for sample in samples:
        first_label = next(i for i, label in enumerate(sample["labels"]) if label != IGNORE_INDEX)
        node = 0
        for position, token in enumerate(sample["input_ids"][:first_label]):
            if (node, token) in nodes:
                repeated.append(position)
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return repeated


def shape_of(folder: Path, r: int) -> Shape:
    """Count a model's parameters without loading it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        sum(module.weight.numel() for module in linear),
        sum(r * (module.in_features + module.out_features) for module in linear),
        head.weight.numel(),
        config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def write_start(model: Path, folder: Path, job: dict[str, Any], *, dora: bool) -> None:
    """Write the adapter that every side starts from, by PEFT itself: its random half tells in early losses."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=job["r"],
        lora_alpha=job["lora_alpha"],
        target_modules="all-linear",
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(job["seed"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config).save_pretrained(folder)


def bf16_copy(folder: Path, cache: Path) -> Path:
    """Return the model with bf16 weights, for sides that take the dtype from the files; written once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy = cache / f"{folder.name}-bf16"
    if not copy.is_dir():
        partial = cache / f".{folder.name}-bf16.partial"
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder).save_pretrained(partial)
        partial.rename(copy)
    return copy


if __name__ == "__main__":
    main()
