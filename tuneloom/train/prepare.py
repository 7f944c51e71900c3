"""From a config to a job that is ready to run: everything resolved, loaded, measured and said."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tuneloom.adapters.attach import attach_adapter, count_parameters
from tuneloom.adapters.store import load_adapter
from tuneloom.config import Config, TrainingConfig
from tuneloom.data.plan import StepSchedule, plan_step
from tuneloom.data.prepare import PreparedData, Progress, Replay, no_progress, prepare_data
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
from tuneloom.train.estimate import Estimate, Outlook, Place, look_ahead, measured, watched_answers
from tuneloom.train.kernels import limit_kernels
from tuneloom.train.limits import require_memory, require_memory_of_training, weight_bytes
from tuneloom.train.measure import heaviest_micro_batch
from tuneloom.train.memory import Fit, falling_budgets, fit_to_memory, free_for_each, layers_of
from tuneloom.train.optim import build_optimizer, build_scheduler, warmup_steps
from tuneloom.train.origin import Origin, aimed, find_origin, load_origin, shaped
from tuneloom.train.replay import replay_samples, unanswered
from tuneloom.train.sharding import bring_together_once, is_sharded, shard
from tuneloom.train.team import Team, team
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
    estimate: Estimate
    device: torch.device
    origin: Origin | None = None
    """The adapter that it continues from."""
    team: Team = field(default_factory=team)
    num_processes: int = 1
    """Processes that it began with: they say how many samples make a step."""
    is_sharded: bool = False
    """Whether the base's weights are shared out among the processes."""

    @property
    def tokens_per_microbatch(self) -> int:
        return self.choice.fit.tokens_per_microbatch

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return count_parameters(self.model)[0]

    @property
    def num_tokens(self) -> int:
        """Input tokens of the whole training."""
        return self.estimate.num_tokens

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
            "num_processes": self.num_processes,
            "fsdp": "full_shard" if self.is_sharded else "none",
            "trial": {
                "tokens": self.choice.trial.tokens,
                "seconds": round(self.choice.trial.seconds, 4),
                "peak_memory_gib": round(self.choice.trial.peak_memory_gib, 3),
            },
            "estimate": self.estimate.as_dict(),
        }

    def summary(self) -> list[tuple[str, str]]:
        """Return every derived number as (label, text) lines, to be shown before the first step."""
        report, schedule, training = self.data.report, self.schedule, self.config.training
        trainable, whole = count_parameters(self.model)
        train = report.train
        estimate = self.estimate
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
                f"{schedule.samples_per_step} samples a step ({training.per_device_train_batch_size} x "
                f"{training.gradient_accumulation_steps}{f' x {self.num_processes}' if self.num_processes > 1 else ''})",
            ),
            *self._processes(),
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
                f"{estimate.memory.peak:.1f} GiB: {estimate.memory.weights:.1f} weights, {estimate.memory.trained:.1f} adapter "
                f"and optimizer, {estimate.memory.activations:.1f} activations (measured), {estimate.memory.rest:.1f} the rest",
            ),
            ("expected time", f"{duration(estimate.seconds or 0)} ({estimate.tokens_per_second:,.0f} tokens/s measured)"),
        ]
        leaked = report.leaked_probe_lines()
        if len(leaked) > _MAX_LEAKED:
            leaked[_MAX_LEAKED:] = [f"and {len(leaked) - _MAX_LEAKED} more: data_report.json, or tuneloom data check"]
        lines += [("note", note) for note in report.notes] + [("leak", line) for line in report.leak_lines(_MAX_LEAKED)]
        return lines + [("leaked probe", line) for line in leaked]

    def _processes(self) -> list[tuple[str, str]]:
        """Return a line on the processes, where there are several."""
        if self.team.alone:
            return []
        how = "the base's weights shared out among them" if self.is_sharded else "the whole base on each"
        return [("processes", f"{self.team.num_ranks}, {how}")]

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
            "processes": self.team.num_ranks,
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
    ranks = team()
    ahead = look_at(config, strict=strict, checkpoint=checkpoint, plan=plan, say=say, within=within)
    config, base, renderer, start = ahead.config, ahead.base, ahead.renderer, ahead.start
    require_memory_of_training(ahead.outlook)
    precision, device, base_fingerprint, data = ahead.precision, ahead.device, ahead.base_fingerprint, ahead.data
    say(f"loading {base.name} ...")
    config, adapted = _loaded(ahead, checkpoint)
    if any(source.replay for source in config.data.sources()):
        generator = Generator(adapted, renderer)
        replay = partial(
            replay_samples,
            generator,
            base_fingerprint=base_fingerprint,
            precision=precision.name,
            progress=within,
            base=config.adapter.bias == "none",
            in_step=ahead.is_sharded,
        )
        data = _data_of(config, renderer, strict, within, replay)
    ranks.require_same(data.files, "the data", "give every machine the same files")
    num_processes = (plan or {}).get("num_processes", 1 if plan else ranks.num_ranks)
    schedule = StepSchedule.of(config.training, len(data.train), num_processes)
    say("measuring one micro-batch ...")
    attention = plan["attention"] if plan else config.base_model.attn_implementation
    choice = choose(adapted, attention, _fitted(adapted, config, plan, data, schedule), ranks)
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
        _estimated(adapted, config, choice, renderer, data, schedule),
        device,
        start or origin,
        ranks,
        num_processes,
        ahead.is_sharded,
    )


def _loaded(ahead: Ahead, checkpoint: Path | None) -> tuple[Config, PeftModel]:
    """Load the base, put the adapter on it and, where it is to be so, share its weights out: a rank of a machine at a time."""
    ranks, config, base = team(), ahead.config, ahead.base

    def load(device: torch.device) -> tuple[Config, PeftModel]:
        model = load_base_model(base.folder, ahead.precision.dtype, device, config.base_model.quantization)
        aimed_config = aimed(config, ahead.start, model)
        fuse_layers(model)
        return aimed_config, _adapted(model, aimed_config, base, checkpoint, ahead.start)

    if not ahead.is_sharded:
        return load(ahead.device)
    with ranks.in_turn():
        config, adapted = load(torch.device("cpu"))
        shard(adapted, ahead.device)
    bring_together_once(adapted)
    return config, adapted


def _estimated(
    model: PeftModel, config: Config, choice: Choice, renderer: Renderer, data: PreparedData, schedule: StepSchedule
) -> Estimate:
    answering = watched_answers(Generator(model, renderer), config, model.device)
    num_tokens = schedule.num_tokens(data.train.column("tokens"))
    return measured(model, choice.trial, answering, schedule.num_steps, num_tokens, team().num_ranks)


@dataclass(frozen=True)
class Ahead:
    """A run before its base is loaded: everything resolved, the data prepared, memory reckoned.

    Samples whose answers the base is still to write stand for their questions alone.
    """

    config: Config
    base: ModelSource
    base_fingerprint: str
    renderer: Renderer
    precision: Precision
    device: torch.device
    start: Origin | None
    data: PreparedData
    outlook: Outlook
    is_sharded: bool


def look_at(
    config: Config,
    *,
    strict: bool = False,
    checkpoint: Path | None = None,
    plan: dict[str, Any] | None = None,
    say: Say = silent,
    within: Progress = no_progress,
) -> Ahead:
    """Resolve everything that a run needs and say what it takes of memory, as far as that goes without loading the base.

    Args:
        config, strict, checkpoint, plan, say, within: see `prepare_job`.

    Raises:
        UserError: anything that the user must mend first; the base's weights alone do not fit into memory.
    """
    limit_kernels()
    tracker_or_error(config.training.report_to)
    for source in config.data.sources():
        resolve_source(source)  # before anything that takes long
    ranks = team()
    with ranks.in_turn():
        base = resolve_model(config.base_model.path, revision=config.base_model.revision, say=say)
    renderer = Renderer(load_tokenizer_folder(base.folder))
    device = pick_device()
    precision = ranks.agreed(lambda: choose_precision(plan["precision"] if plan else config.training.precision, device))
    base_fingerprint = fingerprint(base.folder)
    ranks.require_same(base_fingerprint, "the base model", "give every machine the same files")
    start = None if checkpoint else find_origin(config, base, base_fingerprint, say)
    config = shaped(config, start)
    quantization = config.base_model.quantization
    whole = weight_bytes(base, precision.dtype, quantization)
    sharded = is_sharded(config.training.fsdp, whole, device, ranks, quantization)
    share = 1 / ranks.num_ranks if sharded else 1.0
    require_memory(base, whole * (share * ranks.local_ranks + sharded), device)  # one at a time is loaded whole
    data = _data_of(config, renderer, strict, within, partial(unanswered, renderer))
    schedule = StepSchedule.of(
        config.training, len(data.train), (plan or {}).get("num_processes", 1 if plan else ranks.num_ranks)
    )
    budgets = [plan["tokens_per_microbatch"]] if plan else _budgets(config, device)
    place = Place(precision.dtype, device, free_for_each(device, ranks), share)
    outlook = look_ahead(config, base, place, data.train, schedule, budgets)
    return Ahead(config, base, base_fingerprint, renderer, precision, device, start, data, outlook, sharded)


def _data_of(config: Config, renderer: Renderer, strict: bool, within: Progress, replay: Replay) -> PreparedData:
    data = prepare_data(config.data, renderer, seed=config.training.seed, strict=strict, replay=replay, progress=within)
    if config.evaluation.max_rows is not None:
        data = replace(data, validation=data.validation[: config.evaluation.max_rows])
    return data


def _budgets(config: Config, device: torch.device) -> list[int]:
    """Return the token budgets to choose from, falling."""
    budget = config.training.tokens_per_microbatch
    return falling_budgets(TOKENS_PER_MICROBATCH.get(device.type, 2048)) if budget == "auto" else [budget]


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
    least = 0
    if config.training.gradient_checkpointing and not (least := len(layers_of(model))):
        raise UserError(
            "this model's activations cannot be recomputed",
            where="training.gradient_checkpointing",
            got="true",
            expected="false",
        )
    budgets = _budgets(config, model.device)

    def fitted(layout: Layout) -> tuple[Fit, MicroBatch]:
        def heaviest(tokens: int, weight: Callable[[MicroBatch], float] | None = None) -> MicroBatch:
            return heaviest_micro_batch(data.train, schedule, tokens, layout, weight, team().num_ranks)

        if plan is None:
            free = free_for_each(model.device, team())
            return fit_to_memory(model, layout, budgets, heaviest, least_layers=least, free_bytes=free)
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
