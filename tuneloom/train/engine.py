"""One optimizer step: its samples shared out, packed, run forward and backward, summed over all ranks; then the update.

The loss of a step is the sum over its supervised tokens, of all ranks, divided by their number; whatever way samples go through
the model, its gradient is the same. A non-finite loss or gradient never reaches the weights; with fp16 a gradient that
overflows lowers the scale of the loss instead. Where a GPU's memory does not suffice the step is done again in smaller
micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tuneloom.data.split import in_step, split_step
from tuneloom.errors import GuardError, Interrupted, UserError
from tuneloom.models.forward import layout_of, supervised_loss_sum
from tuneloom.train.checkpoint import restore_rng, rng_tensors
from tuneloom.train.interrupt import InterruptFlag
from tuneloom.train.measure import work_per_token
from tuneloom.train.memory import layers_of, recompute
from tuneloom.train.optim import build_optimizer, build_scheduler, trainable_parameters
from tuneloom.types import MicroBatch, StepPlan

if TYPE_CHECKING:
    from tuneloom.train.prepare import Job

LEAST_SCALE = 2.0**-10
"""Of the loss in fp16: where gradients overflow even so, they do at any."""
_GO_ON, _OUT_OF_MEMORY, _SIGNALS = 0, 1, 100


@dataclass(frozen=True)
class Update:
    """What a step did.

    Attributes:
        loss: mean cross-entropy, nats a supervised token.
        grad_norm: before clipping.
        learning_rate: of the update.
        tokens, supervised_tokens: trained on, by all ranks.
        useful_gflop: see `WorkPerToken`.
        seconds: it took.
        loss_scale: the scale after it, with fp16.
        skipped: whether its gradient overflowed and was left out.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    useful_gflop: float
    seconds: float
    loss_scale: float | None
    skipped: bool


class NotFinite(GuardError):
    """A loss or gradient that is not finite.

    Attributes:
        fault: `loss` or `gradient`.
        samples: files and lines.
    """

    def __init__(self, message: str, fault: str, samples: str) -> None:
        super().__init__(message)
        self.fault, self.samples = fault, samples


class _DoesNotFit(Exception):
    """A rank's memory did not suffice."""


class Engine:
    """Trains a job's model, a step at a time.

    Args:
        job: what to train.
        flag: says whether to stop; asked between micro-batches.
        on_less_memory: called with the new token budget and number of recomputed layers after memory has not sufficed.
    """

    def __init__(self, job: Job, flag: InterruptFlag, on_less_memory: Callable[[int, int], None]) -> None:
        settings = job.config.training
        self.job = job
        self.model = job.model
        self.optimizer = build_optimizer(job.model, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, job.schedule.num_steps)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision.name == "fp16")
        self.tokens_per_microbatch = job.tokens_per_microbatch
        self._recomputed_layers = job.choice.fit.recomputed_layers
        self._on_less_memory = on_less_memory
        self._flag = flag
        self._parameters = list(trainable_parameters(job.model).values())
        self._layout = layout_of(job.model, training=True)
        self._work = work_per_token(job.model)
        job.team.take_over(self._parameters)

    def step(self, number: int) -> Update:
        """Do step `number`, counted from 0; where it fails, random state and gradients are as before it.

        Raises:
            Interrupted: a signal came to any rank.
            NotFinite: the loss or the gradient; the weights are as they were.
            UserError: memory does not suffice for a single sample.
        """
        random = rng_tensors()
        while True:
            try:
                return self._update(number)
            except _DoesNotFit:
                pass  # here the frames that hold tensors are still alive; they are not below
            except BaseException:
                restore_rng(random)  # micro-batches drew from it, and the step is done again from its start
                self.optimizer.zero_grad(set_to_none=True)
                raise
            restore_rng(random)
            self.optimizer.zero_grad(set_to_none=True)
            self._take_less_memory(number)

    def agree(self, code: int = _GO_ON) -> None:
        """Stop on all ranks where a signal has come to any of them; all ranks ask equally often.

        Raises:
            Interrupted: a signal came.
        """
        number = self._flag.number
        code = int(self.job.team.largest(code if number is None else _SIGNALS + number))
        if code >= _SIGNALS:
            raise Interrupted(code - _SIGNALS, "")
        if code == _OUT_OF_MEMORY:
            raise _DoesNotFit

    def _update(self, number: int) -> Update:
        start = time.perf_counter()
        team = self.job.team
        plans = self._plans(number)
        num_tokens, num_supervised = sum(p.num_tokens for p in plans), sum(p.num_supervised_tokens for p in plans)
        if not team.alone:
            torch.manual_seed(
                int(np.random.SeedSequence([self.job.config.training.seed, number, team.rank]).generate_state(1)[0])
            )
        self.model.train()
        own, losses = self._passes(plans, num_supervised)
        loss = float(self._summed(losses))
        self.scaler.unscale_(self.optimizer)
        settings = self.job.config.training
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm or math.inf))
        self._guard(number + 1, own, losses, loss, grad_norm)
        rate, scale = float(self.scheduler.get_last_lr()[0]), self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        if not skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(
            loss,
            grad_norm,
            rate,
            num_tokens,
            num_supervised,
            sum(self._work.gflop(plan) for plan in plans),
            time.perf_counter() - start,
            self.scaler.get_scale() if self.scaler.is_enabled() else None,
            skipped,
        )

    def _plans(self, number: int) -> tuple[StepPlan, ...]:
        samples = [self.job.data.train[i] for i in self.job.schedule.indices(number)]
        return split_step(samples, self.job.team.num_ranks, self.tokens_per_microbatch, self._layout)

    def _passes(self, plans: Sequence[StepPlan], num_supervised: int) -> tuple[Sequence[MicroBatch], list[torch.Tensor]]:
        """Run this rank's micro-batches forward and backward; return them and their parts of the loss."""
        weighted = in_step(plans, self.job.team.rank)
        own = plans[self.job.team.rank].micro_batches
        losses: list[torch.Tensor] = []
        code = _GO_ON
        for batch, weight in weighted:
            self.agree(code)
            if not weight and not self.job.is_sharded:
                continue
            try:
                loss = supervised_loss_sum(self.model, batch) * (weight / num_supervised)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            except torch.OutOfMemoryError:
                if self.job.is_sharded:  # the others are in the middle of a pass of all
                    raise
                code = _OUT_OF_MEMORY
            else:
                losses.append(loss.detach())
        self.agree(code)
        return own, losses[: len(own)]

    def _summed(self, losses: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum loss and gradients over the ranks; return the loss."""
        loss = torch.stack(list(losses)).sum() if losses else torch.zeros((), device=self.job.device)
        if self.job.team.alone:
            return loss
        there = torch.tensor(
            [parameter.grad is not None for parameter in self._parameters], dtype=loss.dtype, device=loss.device
        )
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.job.team.add_up([loss, there, *(parameter.grad for parameter in self._parameters if parameter.grad is not None)])
        for parameter, count in zip(self._parameters, there.tolist(), strict=True):
            if not count:
                parameter.grad = None  # no rank had one, and an optimizer leaves it as it is
        return loss

    def _guard(
        self, step: int, own: Sequence[MicroBatch], losses: Sequence[torch.Tensor], loss: float, grad_norm: float
    ) -> None:
        """Stop before the update if loss or gradient is not finite; fp16 overflow is the scaler's business while it has room.

        Raises:
            NotFinite: naming the step, the samples and the likely cause.
        """
        has_room = self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE
        if math.isfinite(loss) and (math.isfinite(grad_norm) or has_room):
            return
        bad = [batch for batch, part in zip(own, losses, strict=True) if not bool(torch.isfinite(part))]
        at_fault = [str(place) for batch in bad for place in batch.locations[:8]]
        all_of_it = [str(place) for batch in own for place in batch.locations[:8]]
        found = self.job.team.gathered((at_fault, all_of_it))
        fault = "gradient" if math.isfinite(loss) else "loss"
        places = [place for faulty, _ in found for place in faulty] or [place for _, whole in found for place in whole]
        samples = ", ".join(places)
        raise NotFinite(
            f"step {step}: the {fault} is not finite; training stopped before the update\n"
            f"  samples:  {samples}\n"
            f"  cause:    most likely a learning rate too high ({self.job.config.training.learning_rate:g}) or a damaged base "
            f"model\n"
            f"  mend:     lower training.learning_rate, or resume with --override after that",
            fault,
            samples,
        )

    def _take_less_memory(self, number: int) -> None:
        """Halve the token budget; where every micro-batch is one sample already, recompute all layers.

        Raises:
            UserError: that is so already too.
        """
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()
        batches = [batch for plan in self._plans(number) for batch in plan.micro_batches]
        largest = max(batch.num_rows for batch in batches)
        if any(len(batch.locations) > 1 for batch in batches):
            self.tokens_per_microbatch = max(1, min(self.tokens_per_microbatch, largest) // 2)
        elif self._recomputed_layers < (layers := len(layers_of(self.model))):
            recompute(self.model, layers)
            self._recomputed_layers = layers
        else:
            raise UserError(
                "training does not fit into memory",
                where=f"step {number + 1}",
                got=f"a sample of {largest:,} tokens, activations recomputed",
                mend="lower data.cutoff_len, end other programs on this GPU, or take a smaller model",
            )
        self._on_less_memory(self.tokens_per_microbatch, self._recomputed_layers)

    def scaler_state(self) -> dict[str, Any]:
        """Return the state of fp16's scale, empty without."""
        state: dict[str, Any] = self.scaler.state_dict()
        return state

    def restore_scaler(self, state: dict[str, Any]) -> None:
        """Put back what `scaler_state` returned."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)
