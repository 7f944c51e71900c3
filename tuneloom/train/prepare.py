"""From a config to a job that is ready to run: everything resolved, loaded, measured and said."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tuneloom.adapters.attach import attach_adapter, count_parameters
from tuneloom.adapters.store import load_adapter
from tuneloom.config import Config, TrainingConfig
from tuneloom.data.plan import StepSchedule, plan_step
from tuneloom.data.prepare import PreparedData, Progress, no_progress, prepare_data
from tuneloom.data.render import Renderer
from tuneloom.data.sources import resolve_source
from tuneloom.errors import UserError
from tuneloom.generate.generator import Generator
from tuneloom.models.fingerprint import fingerprint
from tuneloom.models.forward import layout_of
from tuneloom.models.fused_layers import fuse_layers
from tuneloom.models.load import load_base_model, load_tokenizer_folder, pick_device
from tuneloom.models.precision import Precision, choose_precision
from tuneloom.models.source import ModelSource, resolve_model, silent
from tuneloom.train.choose import Choice, choose
from tuneloom.train.limits import require_memory
from tuneloom.train.measure import heaviest_micro_batch
from tuneloom.train.memory import Fit, falling_budgets, fit_to_memory, layers_of
from tuneloom.train.optim import build_optimizer, build_scheduler, warmup_steps
from tuneloom.train.origin import Origin, aimed, find_origin, load_origin, shaped
from tuneloom.train.replay import replay_samples
from tuneloom.train.tracker import tracker_or_error
from tuneloom.types import Layout, MicroBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Say = Callable[[str], None]

TOKENS_PER_MICROBATCH = {"cpu": 2048, "cuda": 8192}
"""Token budget of `auto`. On two CPU cores long dialogues ran faster in 2k-token micro-batches than in one of 16k; the budget
of GPUs has not been tuned."""

_MAX_LEAKED = 3
_PACKAGES = ("tuneloom", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Job:
    """A run about to start: the loaded model with its adapter, the samples, the schedule, the measured plan."""

    config: Config
    base: ModelSource
    base_fingerprint: str
    model: PeftModel
    renderer: Renderer
    data: PreparedData
    schedule: StepSchedule
    precision: Precision
    choice: Choice
    device: torch.device
    origin: Origin | None = None
    """The adapter that it continues from."""

    @property
    def tokens_per_microbatch(self) -> int:
        return self.choice.fit.tokens_per_microbatch

    @property
    def num_tokens(self) -> int:
        """Input tokens of the whole training."""
        return self.schedule.num_tokens(self.data.train.column("tokens"))

    def plan(self) -> dict[str, Any]:
        """Return the measured choices, for plan.json."""
        return {
            "precision": self.precision.name,
            "precision_why": self.precision.why,
            "gflops": {name: round(rate, 1) for name, rate in self.precision.gflops.items()},
            "attention": self.choice.attention,
            "tokens_per_microbatch": self.tokens_per_microbatch,
            "recomputed_layers": self.choice.fit.recomputed_layers,
            "device": device_name(self.device),
            "trial": {
                "tokens": self.choice.trial.tokens,
                "seconds": round(self.choice.trial.seconds, 4),
                "peak_memory_gib": round(self.choice.trial.peak_memory_gib, 3),
            },
        }

    def summary(self) -> list[tuple[str, str]]:
        """Return every derived number as (label, text) lines, to be shown before the first step."""
        report, schedule, training = self.data.report, self.schedule, self.config.training
        trainable, whole = count_parameters(self.model)
        train = report.train
        seconds = self.num_tokens / self.choice.trial.tokens_per_second
        lines: list[tuple[str, str]] = [
            ("base model", f"{self.base.name} ({whole - trainable:,} parameters)"),
            ("method", f"{self.config.method}, r {self.config.adapter.r}, alpha {self.config.adapter.lora_alpha}"),
            *([("continued from", f"{self.origin.path} (sha256 {self.origin.sha256[:12]}…)")] if self.origin else []),
            ("trainable", f"{trainable:,} parameters ({trainable / whole:.2%})"),
            ("precision", f"{self.precision.name}: {self.precision.why}"),
            ("rows", f"{report.num_read:,} read, {report.num_repaired:,} repaired, {report.num_dropped:,} dropped"),
            ("training set", f"{train['samples']:,} samples, {report.num_cut:,} cut, longest {train['longest']:,} tokens"),
            ("tokens", f"{train['tokens']:,} in the set, {train['supervised_tokens']:,} supervised"),
        ]
        if report.num_answer_tokens_lost:
            lost = report.num_answer_tokens_lost / max(1, report.num_answer_tokens)
            lines.append(("cutoff", f"{lost:.1%} of the answer tokens lost at {self.config.data.cutoff_len} tokens"))
        if self.data.validation:
            lines.append(("validation", f"{len(self.data.validation):,} samples"))
        epochs = schedule.epochs_done(schedule.num_steps)
        warmup = warmup_steps(training, schedule.num_steps)
        lines += [
            (
                "effective batch",
                f"{training.num_samples_per_step} samples a step "
                f"({training.per_device_train_batch_size} x {training.gradient_accumulation_steps})",
            ),
            (
                "steps",
                f"{schedule.num_steps:,} ({epochs:.2f} epochs of {schedule.steps_per_epoch:,})",
            ),
            ("schedule", f"{training.lr_scheduler_type}, peak {training.learning_rate:g}, warm-up {warmup} steps"),
            *([("early stopping", _patience(training))] if training.early_stopping_patience else []),
            ("micro-batches", f"of at most {self.tokens_per_microbatch:,} tokens, {self.choice.attention} attention"),
            *self._prefixes(),
            *([("recomputed", f"activations of {layers:,} layers")] if (layers := self.choice.fit.recomputed_layers) else []),
            (
                "expected memory",
                f"{self.choice.trial.peak_memory_gib:.1f} GiB (measured on the heaviest micro-batch; more may be held)",
            ),
            ("expected time", f"{duration(seconds)} ({self.choice.trial.tokens_per_second:,.0f} tokens/s measured)"),
        ]
        leaked = report.leaked_probe_lines()
        if len(leaked) > _MAX_LEAKED:
            leaked[_MAX_LEAKED:] = [f"and {len(leaked) - _MAX_LEAKED} more: data_report.json, or tuneloom data check"]
        lines += [("note", note) for note in report.notes] + [("leak", line) for line in report.leak_lines(_MAX_LEAKED)]
        return lines + [("leaked probe", line) for line in leaked]

    def _prefixes(self) -> list[tuple[str, str]]:
        """Return a line on what samples begin with in common, where there is something to say."""
        layout = layout_of(self.model.get_base_model(), training=True)
        if layout == Layout.PACKED:
            return [("shared prefixes", "computed for each sample, which draws a dropout of its own")]
        samples = [self.data.train[i] for i in self.schedule.indices(0)]
        plan = plan_step(samples, self.tokens_per_microbatch, layout)
        if plan.num_rows == plan.num_tokens:
            return []
        return [("shared prefixes", f"computed once: {plan.num_tokens:,} tokens of the first step in {plan.num_rows:,} rows")]

    def environment(self) -> dict[str, Any]:
        """Return versions, device, seed and the hashes of base, data and the adapter continued from, for environment.json."""
        found = {
            "versions": {name: metadata.version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
            "seed": self.config.training.seed,
            "base_model": {"name": self.base.name, "kind": self.base.kind, "fingerprint": self.base_fingerprint},
            "data_files": self.data.files,
        }
        return found | {"continued_from": self.origin.note()} if self.origin else found


def prepare_job(
    config: Config,
    *,
    strict: bool = False,
    checkpoint: Path | None = None,
    plan: dict[str, Any] | None = None,
    origin: Origin | None = None,
    say: Say = silent,
    within: Progress = no_progress,
) -> Job:
    """Resolve, load and measure everything that a run needs; nothing is written but caches.

    Args:
        config: the settings.
        strict: stop at the first row that cannot be used.
        checkpoint: take the adapter from there instead of starting one.
        plan: an earlier plan.json, whose choices are used again.
        origin: what the checkpoint's run continued from, as it was noted.
        say: gets a line before anything that takes long.
        within: gets (what, done, all) while it takes.

    Raises:
        UserError: anything that the user must mend first.
    """
    _refuse_several_processes()
    tracker_or_error(config.training.report_to)
    for source in config.data.sources():
        resolve_source(source)  # before anything that takes long
    base = resolve_model(config.base_model.path, revision=config.base_model.revision, say=say)
    renderer = Renderer(load_tokenizer_folder(base.folder))
    device = pick_device()
    precision = choose_precision(plan["precision"] if plan else config.training.precision, device)
    base_fingerprint = fingerprint(base.folder)
    start = None if checkpoint else find_origin(config, base, base_fingerprint, say)
    config = shaped(config, start)

    require_memory(base, precision.dtype, device, config.base_model.quantization)
    say(f"loading {base.name} ...")
    model = load_base_model(base.folder, precision.dtype, device, config.base_model.quantization)
    config = aimed(config, start, model)
    fuse_layers(model)
    generator = Generator(model, renderer)
    data = prepare_data(
        config.data,
        renderer,
        seed=config.training.seed,
        strict=strict,
        replay=lambda rows: replay_samples(generator, rows, base_fingerprint, precision.name, within),
        progress=within,
    )
    if config.evaluation.max_rows is not None:
        data = replace(data, validation=data.validation[: config.evaluation.max_rows])
    adapted = _adapted(model, config, base, checkpoint, start)
    schedule = StepSchedule.of(config.training, len(data.train))
    say("measuring one micro-batch ...")
    attention = plan["attention"] if plan else config.base_model.attn_implementation
    choice = choose(adapted, attention, _fitted(adapted, config, plan, data, schedule))
    build_scheduler(build_optimizer(adapted, config.training), config.training, schedule.num_steps)  # refuses wrong arguments
    return Job(
        config,
        base,
        base_fingerprint,
        adapted,
        renderer,
        data,
        schedule,
        precision,
        choice,
        device,
        start or origin,
    )


def _adapted(
    model: PreTrainedModel, config: Config, base: ModelSource, checkpoint: Path | None, origin: Origin | None
) -> PeftModel:
    """Put the adapter on the base: a checkpoint's, the one that is continued from, or a fresh one."""
    shown = config.base_model.path if base.kind == "hub" else str(base.folder.resolve())
    if checkpoint is not None:
        return load_adapter(model, checkpoint, base, trainable=True)
    if origin is not None:
        return load_origin(model, origin, config, base, shown)
    return attach_adapter(model, config.adapter, config.training.seed, shown)


def _fitted(
    model: PeftModel, config: Config, plan: dict[str, Any] | None, data: PreparedData, schedule: StepSchedule
) -> Callable[[Layout], tuple[Fit, MicroBatch]]:
    """Return what says how the micro-batches of a layout fit into memory, and which is the heaviest."""
    budget, least = config.training.tokens_per_microbatch, 0
    if config.training.gradient_checkpointing and not (least := len(layers_of(model))):
        raise UserError(
            "this model's activations cannot be recomputed",
            where="training.gradient_checkpointing",
            got="true",
            expected="false",
        )
    largest = TOKENS_PER_MICROBATCH.get(model.device.type, 2048)
    budgets = falling_budgets(largest) if budget == "auto" else [budget]

    def fitted(layout: Layout) -> tuple[Fit, MicroBatch]:
        def heaviest(tokens: int, weight: Callable[[MicroBatch], float] | None = None) -> MicroBatch:
            return heaviest_micro_batch(data.train, schedule, tokens, layout, weight)

        if plan is None:
            return fit_to_memory(model, layout, budgets, heaviest, least_layers=least)
        fit = Fit(plan["tokens_per_microbatch"], max(least, plan.get("recomputed_layers", 0)))
        return fit, heaviest(fit.tokens_per_microbatch)

    return fitted


def _patience(training: TrainingConfig) -> str:
    """Return when training ends early."""
    return f"after {training.early_stopping_patience} evaluations without a better validation loss"


def device_name(device: torch.device) -> str:
    """Return a device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return f"CPU, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def duration(seconds: float) -> str:
    """Return seconds as people say them: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def _refuse_several_processes() -> None:
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        raise UserError(
            "training runs in one process",
            got=f"{PartialState().num_processes} processes",
            mend=f"start it without torchrun: {Path(sys.argv[0]).name} finetune",
        )
