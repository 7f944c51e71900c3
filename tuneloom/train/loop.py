"""The training loop: step after step of the engine, and what hangs on steps: events, evaluation, checkpoints, an early end.

With several ranks all go through it alike; the first one tells and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tuneloom.data.split import in_step, split_step
from tuneloom.errors import GuardError, Interrupted, TuneloomError
from tuneloom.evaluation.heldout import HeldOutLoss, heldout_loss, losses_of
from tuneloom.evaluation.predict import Predictions, predict, turn_rows
from tuneloom.generate.generator import Generator
from tuneloom.models.forward import layout_of
from tuneloom.rundir import PLAN, RunDirectory
from tuneloom.train.checkpoint import TrainingState, Window, prune, restore, save_checkpoint
from tuneloom.train.engine import Engine, NotFinite, Update
from tuneloom.train.interrupt import InterruptFlag
from tuneloom.train.limits import is_full
from tuneloom.train.measure import peak_memory_gib
from tuneloom.train.optim import scheduler_state
from tuneloom.train.prepare import Job
from tuneloom.train.recorder import Recorder
from tuneloom.train.sharding import let_go
from tuneloom.train.team import lost, peer_lost
from tuneloom.train.tracker import open_tracker
from tuneloom.types import Conversation, Message

if TYPE_CHECKING:
    from pathlib import Path

_T = TypeVar("_T")


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
        self.team = job.team
        self.settings = job.config.training
        self.state = TrainingState()
        self.tracker = open_tracker(self.settings.report_to, run.path) if job.team.is_first else None
        self.engine = Engine(job, flag, self._note_less_memory)
        self.generator = Generator(job.model, job.renderer)

    def resume(self, checkpoint: Path) -> None:
        """Continue where a checkpoint of this run stands.

        Raises:
            UserError: it is broken or does not fit.
        """
        self.state = restore(checkpoint, self.job.model, self.engine.optimizer, self.engine.scheduler)
        self.engine.restore_scaler(self.state.scaler)

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            Interrupted: a signal came; a checkpoint of the last whole step is saved.
            GuardError: a loss or gradient was not finite, or another rank has ended; the weights before it are saved.
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
            raise self._with_what_is_kept(error) from None
        except RuntimeError as error:
            if self.team.alone or not lost(error):
                raise
            raise self._with_what_is_kept(peer_lost()) from error
        if self.tracker is not None:
            self.tracker.end_training()
        if self.stops_early and self.state.step < num_steps:
            self._tell_early_stop()

    @property
    def stops_early(self) -> bool:
        """Whether as many evaluations as the settings allow were no better than the best one."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.stale_evaluations >= patience

    def _with_what_is_kept(self, error: TuneloomError) -> TuneloomError:
        """Save where the run stands; return the error with what is kept added."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        if isinstance(error, NotFinite):
            self.recorder.event("warning", step=self.state.step + 1, message=f"non-finite {error.fault}", samples=error.samples)
        kept = self._kept() if self.team.is_first else ""
        if isinstance(error, Interrupted):
            told: TuneloomError = Interrupted(error.number, f"kept: {kept}")
        elif isinstance(error, GuardError):
            told = type(error).__new__(type(error))
            told.args = (f"{error}\n  kept:     {kept}",)
        else:
            told = error
        told.told_elsewhere = not self.team.is_first
        return told

    # One step.

    def _step(self) -> None:
        update = self.engine.step(self.state.step)
        self._count(update)
        if update.skipped:
            self.recorder.event(
                "warning",
                step=self.state.step,
                message=f"the gradient overflowed in fp16: no update, and a scale of {update.loss_scale:g} from here on",
            )
        self._log(update)

    def _count(self, update: Update) -> None:
        state, window = self.state, self.state.window
        state.step += 1
        state.settled = False
        state.tokens += update.tokens
        state.supervised_tokens += update.supervised_tokens
        state.useful_gflop += update.useful_gflop
        state.seconds += update.seconds
        window.loss_sum += update.loss * update.supervised_tokens
        window.supervised_tokens += update.supervised_tokens
        window.tokens += update.tokens
        window.useful_gflop += update.useful_gflop
        window.seconds += update.seconds

    def _note_less_memory(self, tokens_per_microbatch: int, recomputed_layers: int) -> None:
        """Tell of smaller micro-batches, and have a resume begin with them."""
        if not self.team.is_first:
            return
        changed = {"tokens_per_microbatch": tokens_per_microbatch, "recomputed_layers": recomputed_layers}
        self.run.write_json(PLAN, (self.run.read_json(PLAN) or {}) | changed)
        self.recorder.event(
            "warning",
            step=self.state.step + 1,
            message=f"memory did not suffice; the step is done again in micro-batches of {tokens_per_microbatch:,} tokens, "
            f"the activations of {recomputed_layers} layers recomputed",
            **changed,
        )

    def _log(self, update: Update) -> None:
        state, schedule, window = self.state, self.job.schedule, self.state.window
        tokens_per_second = window.tokens / window.seconds
        eta = (self.job.num_tokens - state.tokens) * state.seconds / state.tokens
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
            "learning_rate": update.learning_rate,
            "grad_norm": update.grad_norm,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "tokens_per_second": round(tokens_per_second, 2),
            "supervised_tokens_per_second": round(window.supervised_tokens / window.seconds, 2),
            "mfu": self._share_of_peak(window.useful_gflop / window.seconds),
            "step_seconds": round(window.seconds, 4),
            "peak_memory_gib": round(peak_memory_gib(self.job.device), 3),
            **({"loss_scale": update.loss_scale} if update.loss_scale is not None else {}),
        }
        self.recorder.event("step", **fields)
        self._track({key: value for key, value in fields.items() if key != "step" and value is not None})
        state.window = Window()

    def _share_of_peak(self, gflops: float) -> float | None:
        """Return useful work over the measured rate of plain matrix products (MFU), where there is one."""
        measured = self.job.precision.gflops.get(self.job.precision.name)
        return round(gflops / measured / self.team.num_ranks, 4) if measured else None

    def _track(self, values: dict[str, Any]) -> None:
        if self.tracker is not None:
            self.tracker.log(values, step=self.state.step)

    # Between steps.

    def _after_step(self) -> None:
        schedule, step = self.job.schedule, self.state.step
        last = step == schedule.num_steps
        if last or schedule.due(self.settings.eval_steps, step):
            with torch.random.fork_rng(devices=[self.job.device] if self.job.device.type == "cuda" else []):
                if not self.team.alone:
                    torch.manual_seed(self.settings.seed)  # what ranks write together they draw alike
                self._compare(self._evaluate())
        self.state.settled = True
        last = last or self.stops_early
        best = self.settings.load_best_model_at_end and self.state.best_step == step
        if last or best or schedule.due(self.settings.save_steps, step):
            if self.job.is_sharded:
                let_go(self.job.model)
            self.team.agreed(self._checkpoint)
        self.recorder.phase("training")

    def _evaluate(self) -> float | None:
        """Evaluate; return the validation loss, where there is one."""
        self.recorder.phase("evaluating")
        evaluation, job = self.job.config.evaluation, self.job
        fields: dict[str, Any] = {}
        if job.data.validation:
            held = self._heldout()
            fields |= {"eval_loss": held.loss, "perplexity": held.perplexity, "eval_tokens": held.num_tokens}
        if evaluation.predict_with_generate and job.data.validation_conversations:
            rows = turn_rows(job.data.validation_conversations, evaluation.max_generate_rows)
            fields |= self.predicted(rows, self._within("answers")).scores
        if fields:
            self.recorder.event("eval", step=self.state.step, **fields)
            self._track(fields)
        self._sample_answers()
        return fields.get("eval_loss")

    def _heldout(self) -> HeldOutLoss:
        """Return the loss of the validation samples, which the ranks share."""
        job, team = self.job, self.team
        if team.alone:
            return heldout_loss(job.model, job.data.validation, self.engine.tokens_per_microbatch, self._within("validation"))
        layout = layout_of(job.model, training=False)
        plans = split_step(job.data.validation, team.num_ranks, self.engine.tokens_per_microbatch, layout)
        batches = [batch for batch, _ in in_step(plans, team.rank)]

        def within(done: int, total: int) -> None:
            self.engine.agree()
            self.recorder.within("validation", done, total)

        losses = losses_of(job.model, batches, within)[: len(plans[team.rank].micro_batches)]
        total = math.fsum(team.gathered(math.fsum(losses)))
        num_tokens = sum(plan.num_supervised_tokens for plan in plans)
        return HeldOutLoss(total / num_tokens, num_tokens)

    def predicted(self, rows: Sequence[tuple[Conversation, str]], within: Callable[[int, int], None]) -> Predictions:
        """Return answers to rows of `turn_rows`, with their scores."""
        settings, batch_size = self.job.config.generation, self.settings.per_device_eval_batch_size
        return self._written(lambda: predict(self.generator, rows, settings, batch_size, within))

    def _written(self, write: Callable[[], _T]) -> _T:
        """Return what the model writes: the first rank does; all of them together where they share its weights."""
        return write() if self.job.is_sharded else self.team.agreed(write)

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
        within = self._within("sample answers")
        answers = self._written(lambda: self.generator.answers(asked, settings, on_progress=within))
        for prompt, answer in zip(evaluation.prompts, answers, strict=True):
            self.recorder.event("sample", step=self.state.step, prompt=prompt, answer=str(answer), finished=answer.finished)

    def _within(self, what: str) -> Any:
        def report(done: int, total: int) -> None:
            if self.job.is_sharded:
                self.engine.agree()
            else:
                self.flag.check()
            self.recorder.within(what, done, total)

        return report

    def _checkpoint(self) -> Path:
        """Publish a checkpoint of this step and remove the ones beyond the limit."""
        self.recorder.phase("saving")
        self.state.scheduler = scheduler_state(self.engine.scheduler)
        self.state.scaler = self.engine.scaler_state()
        path = self.recorder.written(self._save)
        self._prune(self.settings.save_total_limit)
        self.recorder.event("checkpoint", step=self.state.step, path=path.name, action="saved")
        return path

    def _save(self) -> Path:
        """Write the checkpoint; where the disk is full, the one that is to go next goes now."""

        def save() -> Path:
            return save_checkpoint(self.run, self.job.model, self.engine.optimizer, self.state, self.job.base)

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
