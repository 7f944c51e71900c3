"""The Python API: `tuneloom.finetune` and its neighbours, over the engine that the verbs use.

Importing this module imports no engine: torch and transformers come with the first call that needs them.
What takes long is told to the logger `tuneloom`, at level INFO.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from tuneloom.config import Config, DataConfig, GenerationConfig, SourceConfig, build_config, parse_config
from tuneloom.config.load import dotted
from tuneloom.config.load import load_config as read_config
from tuneloom.config.recipes import DEFAULT_RECIPE, find_recipe
from tuneloom.errors import UserError, excerpt, nearest
from tuneloom.rundir import CONFIG, ENVIRONMENT, METRICS, PLAN, RunDirectory
from tuneloom.types import Conversation, Location, Message, Rendered, Sample, TrainOn

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tuneloom.adapters.target import Target
    from tuneloom.data.prepare import PreparedData
    from tuneloom.data.render import Renderer
    from tuneloom.evaluation.persona import PersonaResult, Subject
    from tuneloom.evaluation.predict import Prediction
    from tuneloom.evaluation.probes import Language
    from tuneloom.exporting.adapter import ExportedAdapter
    from tuneloom.exporting.merged import Exported
    from tuneloom.models.precision import Name, Precision
    from tuneloom.train.resume import ResumePoint

_say = logging.getLogger("tuneloom").info
Side = Literal["base", "model"]
"""What is measured: the base alone, or the target as it is."""

_PRECISIONS: dict[str, Name] = {
    **{"fp32": "fp32", "float32": "fp32", "float": "fp32"},
    **{"bf16": "bf16", "bfloat16": "bf16"},
    **{"fp16": "fp16", "float16": "fp16", "half": "fp16"},
}


# Settings.


def load_config(
    config: str | PathLike[str] | Mapping[str, object] | Config, overrides: Mapping[str, object] | None = None
) -> Config:
    """Return checked settings.

    Args:
        config: a YAML file, a recipe's name, nested maps of settings, or a `Config`.
        overrides: settings on top, by dotted key: `{"training.max_steps": 3}`. `{"training": {"max_steps": 3}}`
            says the same.

    Raises:
        UserError: no such file or recipe, an unknown key, a wrong value.
    """
    if isinstance(config, Config):
        return build_config(config.model_dump(mode="json"), overrides)
    if isinstance(config, Mapping):
        return build_config(config, overrides)
    if not isinstance(config, (str, PathLike)):
        raise UserError(
            "no settings", where="config", got=excerpt(config), expected="a path, a recipe's name, a map or a Config"
        )
    return read_config(find_recipe(fspath(config)), overrides=overrides)


# Models.


def load_model(
    source: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    adapter: str | PathLike[str] | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model, in evaluation mode, base weights frozen; a PEFT model where there is an adapter.

    Args:
        source: a folder, a model's name, a GGUF file, a hub id, a run, a checkpoint or an adapter.
            The folder needs no tokenizer.
        dtype: of the base's weights: auto (what suits the device, measured), fp32, bf16 or fp16, or torch's.
        device: auto (a GPU where there is one), or torch's.
        adapter: a run, a checkpoint or an adapter's folder, to put on a source that has none.

    Raises:
        UserError: nothing there, torn files, an adapter of another base.
    """
    from tuneloom.adapters.target import Target, find_adapter, load_target_base, resolve_target, with_adapter
    from tuneloom.models.load import pick_device

    where = pick_device(device)
    precision = _precision(dtype, where)
    target = resolve_target(fspath(source), say=_say)
    if adapter is not None:
        if target.adapter is not None:
            raise UserError(
                "two adapters for one model",
                where=f"source {target.name}",
                got=f"an adapter, and adapter={fspath(adapter)!r} beside it",
                mend=f"give its base as the source ({target.base.name}), or leave adapter out",
            )
        folder = find_adapter(fspath(adapter), say=_say) or Path(adapter)  # which then is refused by what it lacks
        target = Target.of(target.name, target.base, folder)
    model: PreTrainedModel | PeftModel = with_adapter(load_target_base(target, precision.dtype, where), target)
    return model


def load_tokenizer(source: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; a run's or an adapter's own, with its chat template, where it has one.

    Args:
        source: as `load_model` takes it.

    Raises:
        UserError: nothing there, or no tokenizer in it.
    """
    from tuneloom.adapters.target import resolve_target
    from tuneloom.models.load import load_tokenizer_folder

    return load_tokenizer_folder(resolve_target(fspath(source), say=_say).tokenizer_folder)


# Rendering.


def render(
    conversation: Conversation | Sequence[Message | Mapping[str, Any]] | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn | str = "assistant",
) -> Rendered:
    """Return a conversation's token ids and label mask, as training sees them (before any cut at data.cutoff_len).

    Args:
        conversation: a `Conversation`, a list of messages (`{"role": ..., "content": ...}`), or a row of any format
            that data files may have; rows are checked and repaired as training does, placeholders are left as they are.
        tokenizer: a fast tokenizer with a chat template.
        train_on: which messages are supervised: assistant, last_assistant or all.

    Raises:
        UserError: no conversation, naming the field; a template that refuses it or cannot be trained on.
    """
    from tuneloom.data.row import RowError

    try:
        return _renderer(tokenizer).render(_conversation(conversation), _train_on(train_on))
    except RowError as error:
        raise UserError(
            f"the conversation cannot be used: {error.reason}", where=error.field, got=error.value, mend=error.mend
        ) from error


class _Renderers:
    """A renderer for each living tokenizer, made anew when its template or its tokens have changed.

    Renderers hold their tokenizer by a weak proxy: held here and holding it, they would keep it alive.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, Renderer]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        from tuneloom.data.render import Renderer

        state = (str(tokenizer.chat_template), len(tokenizer), tuple(tokenizer.all_special_tokens))
        with self._lock:
            kept = self._kept.get(tokenizer)
            if kept is None or kept[0] != state:
                kept = (state, Renderer(weakref.proxy(tokenizer)))
                self._kept[tokenizer] = kept
        return kept[1]


_RENDERERS = _Renderers()


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "not a fast tokenizer",
            where="tokenizer",
            got=type(tokenizer).__name__,
            expected="a fast tokenizer of transformers",
            mend="tuneloom.load_tokenizer loads one",
        )
    return _RENDERERS.of(tokenizer)


def _conversation(given: object) -> Conversation:
    """Return a conversation in any of the forms that `render` takes.

    Raises:
        RowError: it is none.
    """
    from tuneloom.data.formats import parse_row

    if isinstance(given, Conversation):
        return given
    row: object = given
    if isinstance(given, Mapping):
        row = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        row = {"messages": [_as_row(message) for message in given]}
    return parse_row(row, Location("conversation", 1)).conversation


def _as_row(message: object) -> object:
    """Return a message as a data file has it."""
    if isinstance(message, Message):
        return message.as_dict() | {"weight": message.weight}
    return dict(message) if isinstance(message, Mapping) else message


def _train_on(name: TrainOn | str) -> TrainOn:
    try:
        return TrainOn(name)
    except ValueError:
        near = nearest(str(name), list(TrainOn))
        raise UserError(
            "unknown value",
            where="train_on",
            got=excerpt(name),
            expected=", ".join(TrainOn),
            mend=f"did you mean `{near}`?" if near else None,
        ) from None


# Training.


@dataclass(frozen=True)
class Run:
    """A run on disk. It may be given wherever a model or a target is wanted.

    Attributes:
        directory: the run's folder; `docs/python.md` and the README say what is in it.

    Raises:
        UserError: the folder is no run.
    """

    directory: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))
        if not RunDirectory.is_run(self.directory):
            raise UserError("not a run", where=str(self.directory), expected=f"a folder with {CONFIG} and {METRICS}")

    def __fspath__(self) -> str:
        return str(self.directory)

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, in PEFT's layout; there once the run is done."""
        return RunDirectory(self.directory).adapter

    @property
    def config(self) -> Config:
        """The run's settings, complete."""
        return read_config(RunDirectory(self.directory).config)

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the run's events in order, all or those of one kind (`step`, `eval`, `sample`, ...).

        What a resume went back behind is left out.
        """
        return RunDirectory(self.directory).history(event)


def finetune(
    config: str | PathLike[str] | Mapping[str, object] | Config | None = None,
    *,
    overrides: Mapping[str, object] | None = None,
    resume: bool | str | PathLike[str] = False,
    resume_changed: bool = False,
    strict: bool = False,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
) -> Run:
    """Fine-tune a model and publish its adapter.

    Ctrl-C and SIGTERM save a checkpoint and raise `Interrupted`.

    Args:
        config: as `load_config` takes it; None: the persona recipe on the embedded model, or the resumed run's own.
        overrides: settings on top, as `load_config` takes them.
        resume: True: the newest run of this config; a run or a checkpoint: that one. A run that is done is returned
            as it is.
        resume_changed: resume although settings that affect the result have changed.
        strict: stop at the first row that cannot be used.
        on_event: called with (event, fields) of everything that happens: the run's events, and `progress`, `phase`
            and `within`, which are not kept.

    Raises:
        UserError, GuardError, Interrupted: see `tuneloom.errors`.
    """
    from tuneloom.train.recorder import no_listener
    from tuneloom.train.run import finetune as train

    settings, point = _settings_and_point(config, overrides, resume)
    if point is not None and point.finished:
        return Run(point.run.path)
    done = train(settings, resume=point, override=resume_changed, strict=strict, say=_say, show=on_event or no_listener)
    return Run(done.directory.path)


def _settings_and_point(
    config: str | PathLike[str] | Mapping[str, object] | Config | None,
    overrides: Mapping[str, object] | None,
    resume: bool | str | PathLike[str],
) -> tuple[Config, ResumePoint | None]:
    from tuneloom.train.resume import find_resume, newest_run

    if not isinstance(resume, bool):
        given = load_config({} if config is None else config, overrides)
        point = find_resume(fspath(resume), given.output_dir)
        return (given if config is not None else load_config(point.run.config, overrides)), point
    settings = load_config(DEFAULT_RECIPE if config is None else config, overrides)
    if not resume:
        return settings, None
    point = newest_run(settings, of_any_config=config is None and not overrides)
    return (settings if config is not None else load_config(point.run.config, overrides)), point


# Evaluation.


@dataclass(frozen=True)
class EvaluationResult:
    """How a model does on conversations that it was not trained on.

    Attributes:
        loss: mean cross-entropy in nats a supervised token.
        perplexity: exp(loss).
        num_samples: conversations that were looked at.
        num_supervised_tokens: tokens that the loss is the mean over.
        scores: mean ROUGE-1, ROUGE-2, ROUGE-L (0 to 100) and BLEU-4 (0 to 1) of the answers written, by name; None
            where none was asked for.
        predictions: these answers, each with its prompt and its reference.
        problems: rows of the data that were dropped or repaired, each with its file and line.
        persona: identity, leak and forgetting, where they were asked for; without held-out rows the figures above are
            then of none: nan, and 0.
    """

    loss: float
    perplexity: float
    num_samples: int
    num_supervised_tokens: int
    scores: dict[str, float] | None = None
    predictions: tuple[Prediction, ...] = ()
    problems: tuple[str, ...] = ()
    persona: PersonaResult | None = None


def evaluate(  # noqa: PLR0913 each is a question of its own
    target: str | PathLike[str],
    data: str | PathLike[str] | Mapping[str, object] | SourceConfig | Sequence[object] | None = None,
    *,
    split: Literal["validation", "test"] | None = None,
    answers: bool = False,
    max_rows: int | None = None,
    overrides: Mapping[str, object] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    base_model: str | PathLike[str] | None = None,
    base: bool = False,
    persona: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EvaluationResult:
    """Measure held-out loss and perplexity and, where asked for, ROUGE and BLEU of written answers.

    Args:
        target: as `load_model` takes a source.
        data: a source, or a list of sources, as `data.train` of a config takes them; None: the run's own held-out rows,
            exactly those that it did not train on.
        split: which of the run's own: validation or test; None: validation where there is one, else test.
        answers: also answer every assistant turn, and score the answers.
        max_rows: at most this many conversations, the first ones; None: all (of a run's validation set: as many as
            the run looked at).
        overrides: settings on top of the run's, or of the defaults: `data.cutoff_len`, `data.variables`,
            `generation.max_new_tokens`, ...
        dtype: as `load_model` takes it; auto: what the run was trained in.
        device: as `load_model` takes it.
        base_model: the base to put an adapter on, as `load_model` takes a source; None: the one that it names.
        base: leave the adapter off: how the base does on the same rows, rendered the same.
        persona: also identity, leak and forgetting, before and after, as `evaluate_persona` measures them; a run
            needs no rows of its own then.
        on_progress: called with (`loss` or `answers`, done, all), in micro-batches and in answers, and as
            `evaluate_persona` calls it.

    Raises:
        UserError: no data, data that cannot be read, a run whose data files have changed.
    """
    told = None
    if persona:
        told = evaluate_persona(
            target,
            max_rows=max_rows,
            overrides=overrides,
            dtype=dtype,
            device=device,
            base_model=base_model,
            on_progress=on_progress,
        )
        if data is None and told.heldout_loss is None:
            return EvaluationResult(math.nan, math.nan, 0, 0, persona=told)
    side: Side = "base" if base else "model"
    tell = None if on_progress is None else lambda _, what, done, total: on_progress(what, done, total)
    found = evaluate_sides(
        target,
        data,
        sides=(side,),
        split=split,
        answers=answers,
        max_rows=max_rows,
        overrides=overrides,
        dtype=dtype,
        device=device,
        base_model=base_model,
        on_progress=tell,
    )
    return replace(found[side], persona=told)


def evaluate_sides(  # noqa: PLR0913 as `evaluate`
    target: str | PathLike[str],
    data: str | PathLike[str] | Mapping[str, object] | SourceConfig | Sequence[object] | None = None,
    *,
    sides: Collection[Side] = ("base", "model"),
    split: Literal["validation", "test"] | None = None,
    answers: bool = False,
    max_rows: int | None = None,
    overrides: Mapping[str, object] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    base_model: str | PathLike[str] | None = None,
    on_progress: Callable[[Side, str, int, int], None] | None = None,
) -> dict[Side, EvaluationResult]:
    """Measure a target's base, the target itself, or one after the other on the same rows: the base is loaded once.

    Args:
        target, data, split, answers, max_rows, overrides, dtype, device, base_model: as `evaluate` takes them.
        sides: what is measured: the base before the adapter goes on, and the model.
        on_progress: called with (side, `loss` or `answers`, done, all).

    Raises:
        UserError: as `evaluate`.
    """
    from tuneloom.adapters.target import load_target_base, resolve_target, with_adapter

    found = resolve_target(fspath(target), base_model=_optional_path(base_model), say=_say)
    config = load_config(found.config or {}, overrides)
    wanted = _own_rows(found, config, split) if data is None else _given_rows(config, data, split)
    limit = _checked_limit(max_rows) or wanted.max_rows
    opened = _opened(found, dtype, device)
    renderer = opened.renderer
    model = load_target_base(found, opened.precision.dtype, opened.device)
    opened.use_path(model)
    prepared = _prepared(wanted, config, found, model, renderer, opened.precision)
    samples = prepared.validation[:limit]
    if not samples:
        first = next(iter(prepared.report.problems), None)
        raise UserError("no row to evaluate on is left", where=wanted.where, got=str(first) if first else "no rows")
    budget = opened.tokens_per_microbatch
    asked = list(islice(prepared.validation_conversations, limit)) if answers else None
    problems = tuple(dict.fromkeys(map(str, prepared.report.problems)))
    results: dict[Side, EvaluationResult] = {}
    for side in sorted(sides):  # the base first: the adapter that goes on then stays
        model = model if side == "base" else with_adapter(model, found)
        tell = None if on_progress is None else partial(on_progress, side)
        results[side] = _measured(model, renderer, samples, budget, asked, config, problems, tell)
    return results


def evaluate_persona(  # noqa: PLR0913 each is a question of its own
    target: str | PathLike[str],
    *,
    identity_probes: str | PathLike[str] | None = None,
    general_probes: str | PathLike[str] | None = None,
    languages: Sequence[Language] = ("en", "zh"),
    gates: Mapping[str, float | None] | None = None,
    max_new_tokens: int = 64,
    max_rows: int | None = None,
    overrides: Mapping[str, object] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    base_model: str | PathLike[str] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> PersonaResult:
    """Measure how well a persona was learnt, whether it leaks and what was forgotten, before and after.

    Answers are greedy, with the run's repetition penalty, and kept in the cache as they come: what was interrupted goes on
    where it was, and a base is asked once. The figures are written into a run whose own adapter it was: `evaluation.json`,
    `evaluation-answers.jsonl`, and a section of `report.md` and of the adapter's card.

    Args:
        target: a run, a checkpoint or an adapter.
        identity_probes, general_probes: files of questions, rows as the built-in ones have them; None: those.
        languages: which of the questions to ask.
        gates: figure -> what it must reach, on top of the defaults (`identity_rate.en` at least 0.95, `leak_rate` at
            most 0.02, `general_loss_delta` at most 0.10); None takes one away.
        max_new_tokens: longest answer to a probe.
        max_rows: at most this many of the run's held-out rows; None: as many as the run looked at.
        overrides: settings on top of the run's: `{"data.variables": {"name": "Ada"}}` is the new name of what is of no run.
        dtype, device, base_model: as `evaluate` takes them.
        on_progress: called with (`base answers`, `tuned answers`, `general replies` or `held-out rows`, done, all).

    Raises:
        UserError: no adapter, no new name, wrong probes or gates, a base that answers nothing.
    """
    from tuneloom.adapters.target import load_target_base, resolve_target, with_adapter
    from tuneloom.evaluation.judge import Judge
    from tuneloom.evaluation.persona import checked_gates, unheard
    from tuneloom.evaluation.persona import evaluate_persona as measure
    from tuneloom.evaluation.probes import load_probes

    probes = load_probes(_optional_path(identity_probes), _optional_path(general_probes), languages)
    checked = checked_gates(gates or {}, probes)
    found = resolve_target(fspath(target), base_model=_optional_path(base_model), say=_say)
    config = load_config(found.config or {}, overrides)
    name = _new_name(found, config)
    opened = _opened(found, dtype, device)
    model = load_target_base(found, opened.precision.dtype, opened.device)
    opened.use_path(model)
    heldout = _heldout_samples(found, config, model, opened)[: _checked_limit(max_rows)]
    subject = _subject(found, config, with_adapter(model, found), opened, max_new_tokens)
    judge = Judge(name, config.data.variables.get("author", ""))
    result = measure(subject, probes, judge, checked, heldout, on_progress or unheard)
    if found.run is not None and found.own_folder == found.run.adapter:
        _write_persona(found.run, result)
    return result


def _write_persona(run: RunDirectory, result: PersonaResult) -> None:
    from tuneloom.evaluation.written import write_evaluation

    write_evaluation(run, result.as_dict(), [answer.as_dict() for answer in result.answers])


def _new_name(target: Target, config: Config) -> str:
    """Return the new name of a target whose base can be seen with the adapter off.

    Raises:
        UserError: it has no adapter, no new name, or biases that stay when the adapter is off.
    """
    from tuneloom.adapters.store import read_adapter_config

    if target.adapter is None:
        raise UserError(
            "nothing to compare: the target has no adapter", where=target.name, mend="name a run, a checkpoint or an adapter"
        )
    bias = read_adapter_config(target.adapter).get("bias", "none")
    if bias != "none":
        raise UserError(
            "the base cannot be shown with this adapter off",
            where=f"{target.name}: adapter.bias",
            got=f"{bias}: biases that were trained with it stay",
            expected="none",
        )
    name = config.data.variables.get("name", "").strip()
    if not name:
        raise UserError(
            "the target has no new name to look for",
            where=f"{target.name}: data.variables",
            got="no `name`",
            mend="give it: --variable name=NAME (in Python overrides={'data.variables': {'name': NAME}})",
        )
    return name


@dataclass(frozen=True)
class _Opened:
    """How a target is computed: as its run was, where it has one."""

    plan: dict[str, Any]
    device: torch.device
    precision: Precision
    renderer: Renderer

    @property
    def tokens_per_microbatch(self) -> int:
        from tuneloom.train.prepare import TOKENS_PER_MICROBATCH

        default = TOKENS_PER_MICROBATCH.get(self.device.type, TOKENS_PER_MICROBATCH["cpu"])
        return int(self.plan.get("tokens_per_microbatch", default))

    def use_path(self, model: PreTrainedModel) -> None:
        """Put a loaded base on the run's attention path."""
        from tuneloom.models.forward import path_on, use_attention

        if "attention" in self.plan:
            use_attention(model, path_on(self.plan["attention"], self.device))


def _opened(target: Target, dtype: str | torch.dtype, device: str | torch.device) -> _Opened:
    from tuneloom.data.render import Renderer
    from tuneloom.models.load import load_tokenizer_folder, pick_device
    from tuneloom.models.precision import choose_precision

    where = pick_device(device)
    plan = (target.run.read_json(PLAN) if target.run else None) or {}
    precision = choose_precision(plan.get("precision", "auto"), where) if dtype == "auto" else _precision(dtype, where)
    return _Opened(plan, where, precision, Renderer(load_tokenizer_folder(target.tokenizer_folder)))


def _heldout_samples(target: Target, config: Config, base: PreTrainedModel, opened: _Opened) -> list[Sample]:
    """Return the run's own held-out rows; none where it has none."""
    if target.config is None or not (target.config.data.validation or target.config.data.test):
        return []
    wanted = _own_rows(target, config, None)
    prepared = _prepared(wanted, config, target, base, opened.renderer, opened.precision)
    return list(prepared.validation[: wanted.max_rows])


def _subject(target: Target, config: Config, model: PreTrainedModel, opened: _Opened, max_new_tokens: int) -> Subject:
    """Return what `evaluation.persona` looks at."""
    from tuneloom.adapters.store import CONFIG_FILE, WEIGHTS_FILE
    from tuneloom.evaluation.persona import Subject
    from tuneloom.generate.generator import Generator
    from tuneloom.models.fingerprint import fingerprint

    assert target.adapter is not None
    generator = Generator(model, opened.renderer)
    settings = GenerationConfig(max_new_tokens=max_new_tokens, repetition_penalty=config.generation.repetition_penalty)
    ends = " ".join(map(str, sorted(generator.stop_ids)))
    base = (fingerprint(target.base.folder), config.base_model.quantization, opened.precision.name, opened.device.type, ends)
    tuned = tuple(_sha256(target.adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    batch_size = _PROBES_AT_A_TIME.get(opened.device.type, _PROBES_AT_A_TIME["cpu"])
    return Subject(generator, target.base.name, base, (*base, *tuned), settings, batch_size, opened.tokens_per_microbatch)


_PROBES_AT_A_TIME = {"cpu": 16, "cuda": 64}


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _measured(
    model: PreTrainedModel,
    renderer: Renderer,
    samples: Sequence[Sample],
    budget: int,
    asked: Sequence[Conversation] | None,
    config: Config,
    problems: tuple[str, ...],
    tell: Callable[[str, int, int], None] | None,
) -> EvaluationResult:
    """Return a model's loss, and its answers where any are asked for."""
    from tuneloom.evaluation.heldout import heldout_loss

    held = heldout_loss(model, samples, budget, _progress("loss", tell))
    told = _progress("answers", tell)
    scores, predictions = _answers(model, renderer, asked, config, told) if asked is not None else (None, ())
    return EvaluationResult(held.loss, held.perplexity, len(samples), held.num_tokens, scores, predictions, problems)


def _progress(what: str, tell: Callable[[str, int, int], None] | None) -> Callable[[int, int], None] | None:
    return None if tell is None else lambda done, total: tell(what, done, total)


@dataclass(frozen=True)
class _Rows:
    """Which rows to evaluate on: those that `data` gives as its validation set; `where` is for messages."""

    where: str
    data: DataConfig
    max_rows: int | None = None
    split_from_training: bool = False


def _own_rows(target: Target, config: Config, split: str | None) -> _Rows:
    """Return the validation or test rows of a target's run.

    Raises:
        UserError: it is of no run, the run has none, or the settings would choose other rows.
    """
    mend = "name the data to evaluate on"
    if target.config is None:
        raise UserError("no data to evaluate on", where=target.name, got="a target of no run", mend=mend)
    if split not in (None, "validation", "test"):
        raise UserError("unknown value", where="split", got=excerpt(split), expected="validation or test")
    chosen = ("data.train", "data.validation", "data.test", "training.seed")
    if _values(config, chosen) != _values(target.config, chosen):
        raise UserError(
            "the run's held-out rows cannot be chosen anew",
            where="overrides",
            expected=f"none of {', '.join(chosen)}",
            mend=mend,
        )
    there = {"validation": bool(config.data.validation), "test": bool(config.data.test)}
    if split is None:
        split = next((name for name, has in there.items() if has), None)
    if split is None or not there[split]:
        raise UserError(f"the run has no {split or 'validation or test'} rows", where=target.name, mend=mend)
    if split == "test":
        return _Rows("data.test", _only(config.data, config.data.test))
    max_rows = config.evaluation.max_rows
    if isinstance(config.data.validation, tuple):
        return _Rows("data.validation", _only(config.data, config.data.validation), max_rows)
    return _Rows("data.validation", config.data.model_copy(update={"test": ()}), max_rows, split_from_training=True)


def _values(config: Config, keys: Sequence[str]) -> list[object]:
    return [getattr(getattr(config, section), name) for section, _, name in (key.partition(".") for key in keys)]


def _given_rows(config: Config, data: object, split: str | None) -> _Rows:
    """Return the rows of a caller's sources.

    Raises:
        UserError: no sources, or sized as for a mixture.
    """
    if split is not None:
        raise UserError("data and split contradict each other", where="split", got=excerpt(split), mend="keep one")
    values = config.data.model_dump(mode="json") | {"train": _plain_sources(data), "validation": 0}
    checked = parse_config({"data": values}, lambda path: dotted(path).replace("data.train", "data", 1)).data
    if any(source.count or source.share or source.weight for source in checked.train):
        raise UserError(
            "count, share and weight size a mixture to train on",
            where="data",
            expected="sources without them",
            mend="leave them out; max_rows takes the first rows",
        )
    return _Rows("data", _only(checked, checked.train))


def _plain_sources(data: object) -> object:
    """Return sources as a config file has them."""
    if isinstance(data, SourceConfig):
        return data.model_dump(mode="json")
    if isinstance(data, PathLike):
        return fspath(data)
    if isinstance(data, Mapping):
        return {key: _plain_sources(value) if isinstance(value, PathLike) else value for key, value in data.items()}
    return [_plain_sources(source) for source in data] if isinstance(data, (list, tuple)) else data


def _only(data: DataConfig, sources: tuple[SourceConfig, ...]) -> DataConfig:
    """Return a data section whose validation set is these sources; it needs something to train on beside."""
    return data.model_copy(update={"train": sources, "validation": sources, "test": (), "max_samples": None})


def _checked_limit(max_rows: int | None) -> int | None:
    if max_rows is not None and max_rows < 1:
        raise UserError("unknown value", where="max_rows", got=excerpt(max_rows), expected="1 or more, or None for all")
    return max_rows


def _prepared(
    wanted: _Rows, config: Config, target: Target, base: PreTrainedModel, renderer: Renderer, precision: Precision
) -> PreparedData:
    """Read and render the rows; the base, which has no adapter yet, answers those of replay sources.

    Raises:
        UserError: data that cannot be read, or files that are not what the run split.
    """
    from tuneloom.data.prepare import no_progress, prepare_data
    from tuneloom.generate.generator import Generator
    from tuneloom.models.fingerprint import fingerprint
    from tuneloom.train.replay import replay_samples

    generator = Generator(base, renderer)
    prepared = prepare_data(
        wanted.data,
        renderer,
        seed=config.training.seed,
        replay=lambda rows: replay_samples(generator, rows, fingerprint(target.base.folder), precision.name, no_progress),
    )
    if wanted.split_from_training:
        _refuse_changed_files(target, prepared.files)
    return prepared


def _refuse_changed_files(target: Target, files: Mapping[str, str]) -> None:
    """Require the data files to be those that the run split.

    Raises:
        UserError: naming those that are not.
    """
    before = ((target.run.read_json(ENVIRONMENT) if target.run else None) or {}).get("data_files", {})
    changed = [shown for shown, digest in files.items() if before.get(shown) != digest]
    if changed:
        raise UserError(
            "the run's data has changed, so its held-out rows can no longer be told",
            where=", ".join(changed[:3]),
            got="another sha256 than in the run's environment.json",
            mend="put the files back as they were, or name the data to evaluate on",
        )


def _answers(
    model: PreTrainedModel,
    renderer: Renderer,
    conversations: Sequence[Conversation],
    config: Config,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, float], tuple[Prediction, ...]]:
    """Answer every assistant turn; return the mean scores and the answers."""
    from tuneloom.evaluation.predict import predict, turn_rows
    from tuneloom.generate.generator import Generator

    batch_size = config.training.per_device_eval_batch_size
    found = predict(Generator(model, renderer), turn_rows(conversations), config.generation, batch_size, on_progress)
    return found.scores, tuple(found.rows)


# Export.


@overload
def export(
    target: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: Literal["merged", "chatglm"] = "merged",
    precision: str = "auto",
    max_shard_size: str = "5GB",
    base_model: str | PathLike[str] | None = None,
) -> Exported: ...
@overload
def export(
    target: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: Literal["adapter"],
    layout: Literal["native", "original"] | None = None,
    base_model: str | PathLike[str] | None = None,
) -> ExportedAdapter: ...
def export(
    target: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: Literal["merged", "chatglm", "adapter"] = "merged",
    precision: str = "auto",
    max_shard_size: str = "5GB",
    layout: Literal["native", "original"] | None = None,
    base_model: str | PathLike[str] | None = None,
) -> Exported | ExportedAdapter:
    """Write a run, a checkpoint or an adapter in a format for other tools, verified by reading it again.

    Args:
        target: something with an adapter.
        out: the new folder; it must not exist.
        to: `merged`: one Hugging Face folder with the adapter folded in, reloaded in a fresh process; `chatglm`: the same
            in ChatGLM's original layout, from a base in that layout; `adapter`: the adapter alone, in PEFT's layout.
        precision: of the weights written: auto (the base's own), fp32, bf16 or fp16.
        max_shard_size: of a safetensors file, e.g. `5GB`.
        layout: names of the adapter's modules: native, or original, as ChatGLM's own code has them; None: native.
        base_model: the base that the adapter goes on, as `load_model` takes a source; None: the one that it names.

    Raises:
        UserError: nothing to export, an unknown format or precision, `out` exists or cannot be written.
        GuardError: the reloaded model does not answer as the tuned one, or the adapter does not read back the same;
            nothing is published.
    """
    from tuneloom.adapters.target import resolve_target
    from tuneloom.exporting.adapter import export_adapter
    from tuneloom.exporting.merged import Layout, export_merged

    if to not in ("merged", "chatglm", "adapter"):
        raise UserError("unknown format", where="to", got=excerpt(to), expected="merged, chatglm or adapter")
    stored = "auto" if precision == "auto" else _precision_name(precision, "precision")
    _check_layout(to, layout)
    if to == "adapter" and precision != "auto":
        raise UserError("the precision is of a merged model", where="to adapter", got=precision, mend="leave precision out")
    resolved = resolve_target(fspath(target), base_model=_optional_path(base_model), say=_say)
    if to == "adapter":
        return export_adapter(resolved, Path(out), layout=layout or "native", say=_say)
    merged: Layout = "original" if to == "chatglm" else "native"
    return export_merged(resolved, Path(out), layout=merged, precision=stored, max_shard_size=max_shard_size, say=_say)


def _check_layout(to: str, layout: str | None) -> None:
    if layout not in (None, "native", "original"):
        raise UserError("unknown layout", where="layout", got=excerpt(layout), expected="native or original")
    if layout is not None and to != "adapter":
        raise UserError("the layout is of an adapter", where=f"to {to}", mend="leave layout out, or give to='adapter'")


def _optional_path(path: str | PathLike[str] | None) -> str | None:
    return None if path is None else fspath(path)


def _precision(dtype: str | torch.dtype, device: torch.device) -> Precision:
    """Return the precision that was asked for, `auto` chosen for the device."""
    from tuneloom.models.precision import Precision, choose_precision

    if dtype == "auto":
        return choose_precision("auto", device)
    return Precision(_precision_name(dtype, "dtype"), "as asked", {})


def _precision_name(dtype: str | torch.dtype, where: str) -> Name:
    name = _PRECISIONS.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise UserError("unknown number format", where=where, got=str(dtype), expected="auto, fp32, bf16 or fp16")
    return name
