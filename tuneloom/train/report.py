"""What a run leaves for people: report.md, the model card, loss.png, predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tuneloom.adapters.attach import count_parameters
from tuneloom.evaluation.predict import Predictions
from tuneloom.rundir import REPORT, RunDirectory, write_atomically
from tuneloom.train.measure import peak_memory_gib
from tuneloom.train.plot import plot_loss
from tuneloom.train.prepare import Job, duration

PREDICTIONS = "predictions-test.jsonl"
TEST_RESULTS = "test_results.json"

_CARD = """\
---
base_model: {base_id}
library_name: peft
pipeline_tag: text-generation
tags: [{tags}]
{license}---

# {title}

{method} adapter for `{base}`, trained with Tuneloom.

{table}

## Use

```
tuneloom chat PATH_TO_THIS_FOLDER
```

or with plain transformers and peft:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("PATH_TO_BASE_MODEL")
model = PeftModel.from_pretrained(base, "PATH_TO_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")
```

## Limits

The adapter changes how the base answers, and inherits what the base knows and does not know. Its answers can be wrong.
{counselling}{notice}"""

_COUNSELLING = """
It was trained on supportive dialogues. It is no therapist, diagnoses nothing, and must not stand in for help in a crisis.
"""


_NOTICE = """
## Licence of the base model

{notice}
"""


def write_report(job: Job, run: RunDirectory) -> None:
    """Write loss.png, report.md and the adapter's card."""
    plot_loss(run)
    results = _results(job, run)
    write_atomically(run.path / REPORT, _report(job, run, results))
    write_atomically(run.adapter / "README.md", _card(job, run, results))


def write_predictions(run: RunDirectory, predictions: Predictions) -> None:
    """Write the test set's answers and scores."""
    lines = [json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in predictions.rows]
    write_atomically(run.path / PREDICTIONS, "".join(lines))
    run.write_json(TEST_RESULTS, {"rows": len(predictions.rows), **predictions.scores})


def _results(job: Job, run: RunDirectory) -> list[tuple[str, str]]:
    """Return the run's outcome as (label, text) rows."""
    end = (run.history("end"))[-1]
    evals = run.history("eval")
    trainable, whole = count_parameters(job.model)
    adapter, training = job.config.adapter, job.config.training
    rows = [
        ("method", f"{job.config.method}, r {adapter.r}, alpha {adapter.lora_alpha}, dropout {adapter.lora_dropout:g}"),
        ("targets", ", ".join(sorted(job.model.peft_config["default"].target_modules))),
        *([("continued from", str(job.origin))] if job.origin else []),
        ("trainable parameters", f"{trainable:,} of {whole:,} ({trainable / whole:.2%})"),
        ("training set", f"{len(job.data.train):,} samples, {job.data.report.train['supervised_tokens']:,} supervised tokens"),
        ("steps", f"{end['step']:,} of {training.num_samples_per_step} samples"),
        ("learning rate", f"{training.learning_rate:g}, {training.lr_scheduler_type}"),
        ("precision", job.precision.name),
        ("time in steps", f"{duration(end['seconds'])}, {duration(job.estimate.seconds or 0)} expected"),
        ("tokens per second", f"{end['tokens_per_second']:,.0f}"),
        ("useful work", _useful(job, end["useful_gflops"])),
        ("peak memory", f"{_peak(job, run):.2f} GiB, {job.estimate.memory.peak:.2f} expected"),
        ("train loss", f"{end['loss']:.4f} nats a supervised token"),
    ]
    losses = [(event["eval_loss"], event["step"]) for event in evals if event.get("eval_loss") is not None]
    if losses:
        rows.append(("validation loss", f"{losses[-1][0]:.4f} at the end, best {min(losses)[0]:.4f} at step {min(losses)[1]}"))
    for event in run.history("test"):
        rows.append(("test", ", ".join(f"{name} {event[name]:.4g}" for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"))))
    return rows


def _peak(job: Job, run: RunDirectory) -> float:
    """Return the most memory of the run, in GiB: as its steps have it, and of this process to its end."""
    return max([peak_memory_gib(job.device), *(float(event["peak_memory_gib"]) for event in run.history("step"))])


def _useful(job: Job, gflops: float) -> str:
    """Return the rate of useful work, as a share of the measured rate of matrix products where there is one."""
    measured = job.precision.gflops.get(job.precision.name)
    share = f", {gflops / measured:.0%} of the {measured:.0f} measured for plain matrix products" if measured else ""
    return f"{gflops:,.0f} GFLOP/s{share}"


def _report(job: Job, run: RunDirectory, results: list[tuple[str, str]]) -> str:
    report, cutoff = job.data.report, job.config.data.cutoff_len
    parts = [
        f"# Run {run.path.name}\n",
        f"Base model `{job.base.name}`. The settings are in `config.yaml`; running it again repeats the run.\n",
        _table(results, "what", "value"),
        "\n![loss](loss.png)\n",
        "## Data\n",
        _table(
            [(f"{source.path} ({source.role})", f"{source.read:,} read, {source.used:,} used") for source in report.sources],
            "source",
            "rows",
        ),
        f"\n{report.num_dropped:,} dropped, {report.num_repaired:,} repaired, {report.num_cut:,} cut at {cutoff} "
        f"tokens ({report.num_answer_tokens_lost:,} answer tokens lost), {report.duplicates:,} duplicates.\n",
    ]
    found = [f"- leak: {line}\n" for line in report.leak_lines(20)]
    found += [f"- leaked probe: {line}\n" for line in report.leaked_probe_lines()]
    found += [f"- {problem.action}: {problem}\n" for problem in report.problems[:20]]
    parts += ["".join(found)] if found else []
    samples = run.history("sample")
    if samples:
        parts += ["\n## Answers\n", _answers(samples)]
    return "\n".join(parts)


def _answers(samples: list[dict[str, Any]]) -> str:
    """Return the answers to the fixed prompts, step by step."""
    blocks = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        rows = [(str(sample["step"]), sample["answer"]) for sample in samples if sample["prompt"] == prompt]
        blocks.append(f"**{_cell(prompt)}**\n\n{_table(rows, 'step', 'answer')}\n")
    return "\n".join(blocks)


def _card(job: Job, run: RunDirectory, results: list[tuple[str, str]]) -> str:
    from tuneloom.models.embedded import EMBEDDED

    embedded = EMBEDDED.get(job.base.name)
    notice = job.base.notice()
    name = job.config.data.variables.get("name")
    paths = [source.path for source in job.config.data.train]
    tags = ["tuneloom", "lora", *(job.config.method.split("+") if job.config.method != "lora" else [])]
    return _CARD.format(
        base_id=json.dumps(embedded.hub_id if embedded else job.base.name, ensure_ascii=False),
        tags=", ".join(tags),
        license=f"license: {embedded.license}\n" if embedded else "",
        title=_cell(name or run.path.name),
        method=job.config.method,
        base=job.base.name,
        table=_table(results, "what", "value"),
        counselling=_COUNSELLING if any("counselling" in path for path in paths) else "",
        notice=_NOTICE.format(notice=notice) if notice else "",
    )


def _table(rows: Iterable[tuple[str, str]], left: str, right: str) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    lines += [f"| {_cell(a)} | {_cell(b)} |" for a, b in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Keep text inside its cell and out of the markup."""
    safe = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\r", " ")
    return " ".join(safe.split("\n"))
