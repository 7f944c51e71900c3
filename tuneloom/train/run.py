"""One fine-tuning, from config to published adapter: prepare, run, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.adapters.attach import count_parameters
from tuneloom.adapters.store import restore_adapter, save_adapter
from tuneloom.config import Config, dump_config
from tuneloom.errors import Interrupted, TuneloomError
from tuneloom.evaluation.predict import turn_rows
from tuneloom.models.source import silent
from tuneloom.rundir import ADAPTER, CONFIG, DATA_REPORT, ENVIRONMENT, PLAN, RunDirectory, run_name
from tuneloom.train.checkpoint import read_training_state
from tuneloom.train.interrupt import InterruptFlag, catch_signals
from tuneloom.train.limits import require_room
from tuneloom.train.loop import Loop
from tuneloom.train.origin import noted_origin
from tuneloom.train.prepare import Job, Say, prepare_job
from tuneloom.train.recorder import Listener, Recorder, SilentRecorder, no_listener
from tuneloom.train.report import write_predictions, write_report
from tuneloom.train.resume import ResumePoint, as_begun, changed_inputs, changed_settings, refuse_changes
from tuneloom.train.team import team

_NOTHING_YET = "training had not begun"


@dataclass(frozen=True)
class Run:
    """A run that is done."""

    directory: RunDirectory

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, in PEFT's layout."""
        return self.directory.adapter

    def metrics(self) -> list[dict[str, Any]]:
        """Return the events of metrics.jsonl."""
        return list(self.directory.events())


def finetune(
    config: Config,
    *,
    resume: ResumePoint | None = None,
    override: bool = False,
    strict: bool = False,
    say: Say = silent,
    show: Listener = no_listener,
    on_job: Listener | None = None,
) -> Run:
    """Fine-tune: everything from reading the data to the published adapter.

    Args:
        config: the settings.
        resume: continue that run instead of making a new one.
        override: resume though settings that affect the result have changed.
        strict: stop at the first row that cannot be used.
        say: gets a line before anything that takes long.
        show: gets every event as it happens (see `Recorder`).
        on_job: gets ("job", {"job": Job}) once everything is known, before anything is written.

    Raises:
        UserError, GuardError, Interrupted: see `tuneloom.errors`.
    """
    ranks = team()
    with catch_signals() as flag, ranks.ending(), ExitStack() as stack:
        changes = ranks.agreed(lambda: _begun(config, resume, override, stack))
        if resume is not None:
            _say_planned(config, resume, say)
        job = prepare(config, resume=resume, strict=strict, say=say, show=show, flag=flag)
        flag.check(_NOTHING_YET)
        if on_job:
            on_job("job", {"job": job})
        directory = ranks.agreed(lambda: _opened(job, resume, changes, override, stack, say))
        return run_job(job, directory, resume, flag, [show])


def _begun(config: Config, resume: ResumePoint | None, override: bool, stack: ExitStack) -> dict[str, str]:
    """Hold the run that is resumed, or see that a new one can be made; return the settings that have changed.

    Raises:
        UserError: another process holds it, settings that may not change, a folder that cannot be written.
    """
    if resume is None:
        RunDirectory.check_parent(config.output_dir)
        return {}
    stack.enter_context(resume.run.held())
    resume.run.sweep()
    changes = changed_settings(resume.run, config)
    refuse_changes(resume.run, changes, override)
    return changes


def _opened(
    job: Job, resume: ResumePoint | None, changes: dict[str, str], override: bool, stack: ExitStack, say: Say
) -> RunDirectory:
    """Return the run's directory: a new one, or the one that is resumed, as it is to go on.

    Raises:
        UserError: the disk has no room; base, data or origin are not what the run began with.
    """
    num_there = len(resume.run.checkpoints()) if resume else 0
    require_room(job.config, count_parameters(job.model)[0], job.schedule, num_there)
    if resume is None:
        directory = open_run(job)
        stack.enter_context(directory.held())
        return directory
    changes = changes | changed_inputs(resume.run, job.environment())
    refuse_changes(resume.run, changes, override)
    if changes:
        _set_aside(job, resume, changes, say)
    return resume.run


def _say_planned(config: Config, resume: ResumePoint, say: Say) -> None:
    """Say which settings the run's plan overrules."""
    asked = {
        "precision": config.training.precision,
        "tokens_per_microbatch": config.training.tokens_per_microbatch,
        "attention": config.base_model.attn_implementation,
    }
    for key, wanted in asked.items():
        planned = (resume.plan or {}).get(key, wanted)
        if wanted not in ("auto", planned):
            say(f"{key}: {planned}, as the run began, not {wanted}")


def prepare(
    config: Config,
    *,
    resume: ResumePoint | None = None,
    strict: bool = False,
    say: Say = silent,
    show: Listener = no_listener,
    flag: InterruptFlag | None = None,
) -> Job:
    """Prepare a job; a signal that comes meanwhile ends it at the next sign of progress."""

    def within(what: str, done: int, total: int) -> None:
        if flag is not None:
            flag.check(_NOTHING_YET)
        show("within", {"what": what, "done": done, "total": total})

    def told(line: str) -> None:
        if flag is not None:
            flag.check(_NOTHING_YET)
        say(line)

    ranks = team()
    return prepare_job(
        ranks.agreed(lambda: as_begun(resume.run, config)) if resume else config,
        strict=strict,
        checkpoint=resume.checkpoint if resume else None,
        plan=resume.plan if resume else None,
        origin=ranks.agreed(lambda: noted_origin(resume.run)) if resume else None,
        say=told,
        within=within,
    )


def open_run(job: Job) -> RunDirectory:
    """Make the run's directory and write what is known before the first step."""
    config = job.config
    name = config.name or run_name(config.method, job.base.name)
    directory = RunDirectory.create(config.output_dir, name)
    directory.write_text(CONFIG, dump_config(config))
    directory.write_json(ENVIRONMENT, job.environment())
    directory.write_json(DATA_REPORT, job.data.report.as_dict())
    directory.write_json(PLAN, job.plan())
    directory.append_event("start", total_steps=job.schedule.num_steps, method=config.method, base_model=job.base.name)
    return directory


def _set_aside(job: Job, resume: ResumePoint, changes: dict[str, str], say: Say) -> None:
    """Make the run's directory say what is trained from here on; what was before is kept beside it."""
    directory = resume.run
    step = read_training_state(resume.checkpoint).step if resume.checkpoint else 0
    folder = directory.set_aside(step)
    directory.write_text(CONFIG, dump_config(job.config))
    directory.write_json(ENVIRONMENT, job.environment())
    directory.write_json(DATA_REPORT, job.data.report.as_dict())
    directory.append_event("override", step=step, changes=changes, kept=folder.name)
    for key, text in changes.items():
        say(f"override: {key}: {text}")
    say(f"the settings and later checkpoints from before are kept in {folder}")


def run_job(
    job: Job, directory: RunDirectory, resume: ResumePoint | None, flag: InterruptFlag, listeners: Sequence[Listener]
) -> Run:
    """Train, publish, report; the run's state says how it ended, however it ends."""
    kind = Recorder if job.team.is_first else SilentRecorder
    recorder = kind(directory, listeners, job.schedule.num_steps, flag.check)
    with _told(recorder):
        loop = Loop(job, directory, recorder, flag)
        if resume is not None:
            if resume.checkpoint is not None:
                loop.resume(resume.checkpoint)
            path = resume.checkpoint.name if resume.checkpoint else None
            recorder.event("resume", step=loop.state.step, path=path, skipped=resume.skipped)
        loop.train()
        recorder.phase("saving")
        if job.config.training.load_best_model_at_end and loop.state.best_step is not None:
            restore_adapter(job.model, directory.checkpoint(loop.state.best_step))
        job.team.agreed(lambda: recorder.written(lambda: publish_adapter(job, directory)))
        _predict_test(job, loop, directory, recorder, flag)
        recorder.event(
            "end",
            step=loop.state.step,
            loss=loop.state.final_loss,
            eval_loss=loop.state.best_loss,
            seconds=round(loop.state.seconds, 2),
            tokens=loop.state.tokens,
            tokens_per_second=round(loop.state.tokens / max(loop.state.seconds, 1e-9), 2),
            useful_gflops=round(loop.state.useful_gflop / max(loop.state.seconds, 1e-9), 1),
        )
        job.team.agreed(lambda: recorder.written(lambda: write_report(job, directory)))
    recorder.phase("done", result=ADAPTER)
    return Run(directory)


def publish_adapter(job: Job, directory: RunDirectory) -> None:
    """Write adapter/ whole: PEFT's files, tokenizer, chat template (the card follows with the report)."""
    partial = directory.path / f".{ADAPTER}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_adapter(job.model, partial, job.base)
        job.renderer.tokenizer.save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = directory.path / f".{ADAPTER}.{os.getpid()}.old"
    if directory.adapter.exists():  # of the same run, resumed from before its end
        directory.adapter.rename(old)
    partial.rename(directory.adapter)
    shutil.rmtree(old, ignore_errors=True)


def _predict_test(job: Job, loop: Loop, directory: RunDirectory, recorder: Recorder, flag: InterruptFlag) -> None:
    """Answer the test set's questions, where there is one."""
    if not job.data.test_conversations:
        return

    def within(done: int, total: int) -> None:
        flag.check("kept: the adapter; resuming the run answers the test set")
        recorder.within("test", done, total)

    recorder.phase("evaluating")
    rows = turn_rows(job.data.test_conversations)
    found = loop.predicted(rows, within)
    job.team.agreed(lambda: recorder.written(lambda: write_predictions(directory, found)))
    recorder.event("test", step=loop.state.step, rows=len(found.rows), **found.scores)


@contextmanager
def _told(recorder: Recorder) -> Iterator[None]:
    """Write into the run how it ended when it does not end well."""
    try:
        yield
    except BaseException as error:
        phase = "interrupted" if isinstance(error, Interrupted) else "failed"
        reason = str(error) if isinstance(error, TuneloomError) else f"{type(error).__name__}: {error}"
        with suppress(TuneloomError):  # a disk that takes nothing more must not hide what happened
            recorder.event("end", reason=phase, message=reason)
            recorder.phase(phase, reason=reason)
        raise
