"""The training loop.

One step: the samples that (seed, epoch, position) name, packed into micro-batches; the summed
loss over supervised tokens divided by their count in the step; clip, guard, update. Evaluation,
checkpoints and events hang on steps. A non-finite loss or gradient never reaches the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tuneloom.data.plan import plan_step
from tuneloom.errors import GuardError, Interrupted, TuneloomError
from tuneloom.evaluation.heldout import heldout_loss
from tuneloom.evaluation.predict import predict, turn_rows
from tuneloom.generate.generator import Generator
from tuneloom.models.forward import layout_of, supervised_loss_sum
from tuneloom.rundir import RunDirectory
from tuneloom.train.checkpoint import TrainingState, Window, prune, restore, restore_rng, rng_tensors, save_checkpoint
from tuneloom.train.interrupt import InterruptFlag
from tuneloom.train.limits import is_full
from tuneloom.train.measure import peak_memory_gib, work_per_token
from tuneloom.train.optim import build_optimizer, build_scheduler, scheduler_state, trainable_parameters
from tuneloom.train.prepare import Job
from tuneloom.train.recorder import Recorder
from tuneloom.types import Conversation, Message, StepPlan

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator


class Loop:
    """Trains a job in a run directory.

    Args:
        job: what to train.
        run: where to.
        recorder: whom to tell.
        flag: says whether to stop.
    """

    def __init__(self, job: Job, run: RunDirectory, recorder: Recorder, flag: InterruptFlag) -> None:
        self.job = job
        self.run = run
        self.recorder = recorder
        self.flag = flag
        self.settings = job.config.training
        self.state = TrainingState()
        self.accelerator = _accelerator(job, run)
        optimizer = build_optimizer(job.model, self.settings)
        self.scheduler = build_scheduler(optimizer, self.settings, job.schedule.num_steps)
        self.model, self.optimizer = self.accelerator.prepare(job.model, optimizer)
        self.parameters = list(trainable_parameters(job.model).values())
        self.layout = layout_of(job.model, training=True)
        self.work = work_per_token(job.model)
        self.generator = Generator(job.model, job.renderer)

    def resume(self, checkpoint: Path) -> None:
        """Continue where a checkpoint of this run stands.

        Raises:
            UserError: it is broken or does not fit.
        """
        self.state = restore(checkpoint, self.job.model, self._plain_optimizer, self.scheduler)
        if self.accelerator.scaler is not None and self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            Interrupted: a signal came; a checkpoint of the last whole step is saved.
            GuardError: a loss or gradient was not finite; the weights before it are saved.
        """
        num_steps = self.job.schedule.num_steps
        self.recorder.phase("training")
        try:
            if not self.state.settled:
                self._after_step()
            while self.state.step < num_steps and not self.stops_early:
                self._step()
                self._after_step()
        except TuneloomError as error:
            self.optimizer.zero_grad(set_to_none=True)
            kept = self._kept()
            if isinstance(error, Interrupted):
                raise Interrupted(error.number, f"kept: {kept}") from None
            if isinstance(error, GuardError):
                raise GuardError(f"{error}\n  kept:     {kept}") from None
            raise
        if self.settings.report_to != "none":
            self.accelerator.end_training()
        if self.stops_early and self.state.step < num_steps:
            self._tell_early_stop()

    @property
    def stops_early(self) -> bool:
        """Whether as many evaluations as the settings allow were no better than the best one."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.stale_evaluations >= patience

    # One step.

    def _step(self) -> None:
        random = rng_tensors()
        try:
            self._update()
        except (Interrupted, GuardError):
            restore_rng(random)  # micro-batches drew from it, and the step is done again from its start
            raise

    def _update(self) -> None:
        start = time.perf_counter()
        job, step = self.job, self.state.step
        samples = [job.data.train[i] for i in job.schedule.indices(step)]
        plan = plan_step(samples, job.tokens_per_microbatch, self.layout)
        self.model.train()
        losses = []
        for batch in plan.micro_batches:
            self.flag.check()
            loss = supervised_loss_sum(self.model, batch) / plan.num_supervised_tokens
            self.accelerator.backward(loss)
            losses.append(loss.detach())
        self.accelerator.unscale_gradients(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        step_loss = float(torch.stack(losses).sum())
        self._guard(step + 1, plan, losses, step_loss, float(grad_norm))
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        self._count(plan, step_loss, seconds)
        self._log(rate, float(grad_norm))

    def _count(self, plan: StepPlan, step_loss: float, seconds: float) -> None:
        state, window = self.state, self.state.window
        state.step += 1
        state.settled = False
        state.tokens += plan.num_tokens
        state.supervised_tokens += plan.num_supervised_tokens
        work = self.work.gflop(plan)
        state.useful_gflop += work
        state.seconds += seconds
        window.loss_sum += step_loss * plan.num_supervised_tokens
        window.supervised_tokens += plan.num_supervised_tokens
        window.tokens += plan.num_tokens
        window.useful_gflop += work
        window.seconds += seconds

    def _guard(self, step: int, plan: StepPlan, losses: Sequence[torch.Tensor], step_loss: float, grad_norm: float) -> None:
        """Stop before the update if loss or gradient is not finite; fp16 overflow is the scaler's business.

        Raises:
            GuardError: naming the step, the samples and the likely cause.
        """
        if math.isfinite(step_loss) and (math.isfinite(grad_norm) or self.accelerator.scaler is not None):
            return
        bad = [batch for batch, loss in zip(plan.micro_batches, losses, strict=True) if not bool(torch.isfinite(loss))]
        what = "loss" if bad else "gradient"
        places = ", ".join(str(place) for batch in bad or plan.micro_batches for place in batch.locations[:8])
        self.recorder.event("warning", step=step, message=f"non-finite {what}", samples=places)
        raise GuardError(
            f"step {step}: the {what} is not finite; training stopped before the update\n"
            f"  samples:  {places}\n"
            f"  cause:    most likely a learning rate too high ({self.settings.learning_rate:g}) or a damaged base model\n"
            f"  mend:     lower training.learning_rate, or resume with --override after that"
        )

    def _log(self, rate: float, grad_norm: float) -> None:
        state, schedule, window = self.state, self.job.schedule, self.state.window
        tokens_per_second = window.tokens / window.seconds
        left = schedule.num_steps - state.step
        eta = left * state.seconds / state.step if state.step else 0.0
        loss = window.loss_sum / window.supervised_tokens
        self.recorder.progress(state.step, loss=loss, tokens_per_second=tokens_per_second, eta_seconds=round(eta, 1))
        may_end = self.settings.early_stopping_patience is not None and schedule.due(self.settings.eval_steps, state.step)
        if state.step % self.settings.logging_steps and state.step != schedule.num_steps and not may_end:
            return
        state.final_loss = loss
        fields = {
            "step": state.step,
            "epoch": round(schedule.epochs_done(state.step), 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "tokens_per_second": round(tokens_per_second, 2),
            "supervised_tokens_per_second": round(window.supervised_tokens / window.seconds, 2),
            "mfu": self._share_of_peak(window.useful_gflop / window.seconds),
            "step_seconds": round(window.seconds, 4),
            "peak_memory_gib": round(peak_memory_gib(self.job.device), 3),
        }
        self.recorder.event("step", **fields)
        self._track({key: value for key, value in fields.items() if key != "step" and value is not None})
        state.window = Window()

    def _share_of_peak(self, gflops: float) -> float | None:
        """Return useful work over the measured rate of plain matrix products (MFU), where there is one."""
        measured = self.job.precision.gflops.get(self.job.precision.name)
        return round(gflops / measured, 4) if measured else None

    def _track(self, values: dict[str, Any]) -> None:
        if self.settings.report_to != "none":
            self.accelerator.log(values, step=self.state.step)

    # Between steps.

    def _after_step(self) -> None:
        schedule, step = self.job.schedule, self.state.step
        last = step == schedule.num_steps
        if last or schedule.due(self.settings.eval_steps, step):
            with torch.random.fork_rng(devices=[self.job.device] if self.job.device.type == "cuda" else []):
                self._compare(self._evaluate())
        self.state.settled = True
        last = last or self.stops_early
        best = self.settings.load_best_model_at_end and self.state.best_step == step
        if last or best or schedule.due(self.settings.save_steps, step):
            self._checkpoint()
        self.recorder.phase("training")

    def _evaluate(self) -> float | None:
        """Evaluate; return the validation loss, where there is one."""
        self.recorder.phase("evaluating")
        evaluation, job = self.job.config.evaluation, self.job
        fields: dict[str, Any] = {}
        if job.data.validation:
            held = heldout_loss(self.model, job.data.validation, job.tokens_per_microbatch, self._within("validation"))
            fields |= {"eval_loss": held.loss, "perplexity": held.perplexity, "eval_tokens": held.num_tokens}
        if evaluation.predict_with_generate and job.data.validation_conversations:
            rows = turn_rows(job.data.validation_conversations, evaluation.max_generate_rows)
            settings = job.config.generation
            fields |= predict(
                self.generator, rows, settings, self.settings.per_device_eval_batch_size, self._within("answers")
            ).scores
        if fields:
            self.recorder.event("eval", step=self.state.step, **fields)
            self._track(fields)
        self._sample_answers()
        return fields.get("eval_loss")

    def _compare(self, loss: float | None) -> None:
        """Keep the best validation loss, and count those that are no better; after a whole evaluation: a cut one is redone."""
        state = self.state
        if loss is None:
            return
        better = state.best_loss is None or loss < state.best_loss - self.settings.early_stopping_threshold
        state.stale_evaluations = 0 if better else state.stale_evaluations + 1
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step

    def _tell_early_stop(self) -> None:
        state, planned = self.state, self.job.schedule.num_steps
        self.recorder.num_steps = state.step
        self.recorder.event(
            "early_stop",
            step=state.step,
            planned_steps=planned,
            message=f"no better validation loss in {state.stale_evaluations} evaluations, "
            f"the best {state.best_loss:.4f} at step {state.best_step}; {planned:,} steps were planned",
        )

    def _sample_answers(self) -> None:
        """Answer the fixed prompts; the answers are events, so one sees the model change."""
        evaluation = self.job.config.evaluation
        if not evaluation.prompts:
            return
        settings = self.job.config.generation.model_copy(update={"max_new_tokens": evaluation.sample_max_new_tokens})
        asked = [Conversation((Message("user", prompt),)) for prompt in evaluation.prompts]
        answers = self.generator.answers(asked, settings, on_progress=self._within("sample answers"))
        for prompt, answer in zip(evaluation.prompts, answers, strict=True):
            self.recorder.event("sample", step=self.state.step, prompt=prompt, answer=str(answer), finished=answer.finished)

    def _within(self, what: str) -> Any:
        def report(done: int, total: int) -> None:
            self.flag.check()
            self.recorder.within(what, done, total)

        return report

    def _checkpoint(self) -> Path:
        """Publish a checkpoint of this step and remove the ones beyond the limit."""
        self.recorder.phase("saving")
        self.state.scheduler = scheduler_state(self.scheduler)
        scaler = self.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else {}
        path = self.recorder.written(self._save)
        self._prune(self.settings.save_total_limit)
        self.recorder.event("checkpoint", step=self.state.step, path=path.name, action="saved")
        return path

    def _save(self) -> Path:
        """Write the checkpoint; where the disk is full, the one that is to go next goes now."""

        def save() -> Path:
            return save_checkpoint(self.run, self.job.model, self._plain_optimizer, self.state, self.job.base)

        limit = self.settings.save_total_limit
        try:
            return save()
        except Exception as error:  # safetensors has an error of its own for a full disk
            if not is_full(error) or limit is None or limit < 2 or len(self.run.checkpoints()) < limit:
                raise
        self._prune(limit - 1)
        return save()

    def _prune(self, limit: int | None) -> None:
        keep = {self.state.step}
        if self.state.best_step is not None and self.settings.load_best_model_at_end:
            keep.add(self.state.best_step)
        for removed in prune(self.run, limit, keep):
            self.recorder.event("checkpoint", step=self.state.step, path=removed.name, action="removed")

    def _kept(self) -> str:
        """Save where the run stands; return what is kept of it."""
        if not self.state.step:
            return "nothing; no step was done"
        try:
            return f"{self._checkpoint().name}, of the last whole step"
        except Interrupted:  # the disk is full, and nobody waits for room
            newest = list(self.run.checkpoints().values())[-1:]
            return f"{newest[0].name if newest else 'nothing'}; the disk is full"

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        plain: torch.optim.Optimizer = self.optimizer.optimizer
        return plain


def _accelerator(job: Job, run: RunDirectory) -> Accelerator:
    from accelerate import Accelerator

    from tuneloom.train.tracker import tracker_or_error

    tracker = tracker_or_error(job.config.training.report_to)
    scaled = job.precision.name == "fp16" and job.device.type == "cuda"
    accelerator = Accelerator(
        cpu=job.device.type == "cpu",
        mixed_precision="fp16" if scaled else "no",
        log_with=tracker,
        project_dir=str(run.path),
    )
    if tracker is not None:
        accelerator.init_trackers("tuneloom", config={}, init_kwargs={})
    return accelerator
