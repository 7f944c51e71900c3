"""What a micro-batch keeps for its backward pass, and how it is made to fit: a smaller token budget, then layers recomputed.

A layer whose activations are recomputed keeps its input alone and costs one more forward pass; none is where memory suffices.
What is kept is counted on three short samples, and grows with the rows of a micro-batch and with the pairs of rows that
attention is computed for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tuneloom.data.plan import pack
from tuneloom.doctor.machine import examine_memory
from tuneloom.errors import UserError
from tuneloom.models.attention import FLEX
from tuneloom.models.forward import supervised_loss_sum
from tuneloom.models.packed_attention import num_pairs
from tuneloom.models.quiet import quiet_peft
from tuneloom.train.measure import rows_of_pass
from tuneloom.train.optim import trainable_parameters
from tuneloom.train.team import Team
from tuneloom.types import Layout, MicroBatch, Sample

if TYPE_CHECKING:
    from peft import PeftModel

LEAST_BUDGET = 512
"""Token budget below which layers are recomputed instead: a pass over fewer rows takes longer for each."""

_PROBED_ROWS = {False: (32, 64, 128), True: (128, 256, 384)}
"""By whether rows are rounded up to whole blocks of the compiled kernel."""
_USED = 0.9
"""Of the free memory: the rest is for what is not counted, such as one operation's own."""
UPDATE_BYTES = 12
"""Of a trained parameter: its gradient and AdamW's two moments, fp32."""


@dataclass(frozen=True)
class Fit:
    """How micro-batches fit into memory.

    Attributes:
        tokens_per_microbatch: the token budget.
        recomputed_layers: of the model's first ones.
    """

    tokens_per_microbatch: int
    recomputed_layers: int = 0


@dataclass(frozen=True)
class Kept:
    """What a model keeps for a backward pass.

    Attributes:
        of_row, of_pair, always: bytes of a row, of a pair of rows that attention is computed for, and besides.
        of_input: bytes of a row that a recomputed layer keeps.
        num_layers: that can be recomputed.
    """

    of_row: float
    of_pair: float
    always: float
    of_input: int
    num_layers: int

    def num_bytes(self, batch: MicroBatch, layout: Layout, recomputed_layers: int = 0) -> float:
        """Return the bytes at the height of a micro-batch: all that is kept, and one layer's again while it goes back."""
        rows = rows_of_pass(batch, layout)
        whole = self.of_row * rows + self.of_pair * _num_pairs(batch, layout) + self.always
        layer = whole / max(1, self.num_layers)
        return whole - recomputed_layers * (layer - self.of_input * rows) + layer


Heaviest = Callable[[int, Callable[[MicroBatch], float]], MicroBatch]
"""Returns the heaviest micro-batch of a token budget, by a weight."""


def fit_to_memory(
    model: PeftModel,
    layout: Layout,
    budgets: Sequence[int],
    heaviest: Heaviest,
    *,
    least_layers: int = 0,
    free_bytes: float | None = None,
) -> tuple[Fit, MicroBatch]:
    """Return the largest budget whose heaviest micro-batch fits, and that; where none does, with the fewest layers recomputed.

    Args:
        model: with its adapter, on the attention path that it will take.
        layout: of its micro-batches.
        budgets: token budgets to choose from, at least one, falling.
        heaviest: finds what must fit.
        least_layers: to be recomputed in any case.
        free_bytes: memory that there is; what the model's device has, unless given.

    Raises:
        UserError: it does not fit even so.
    """
    if free_bytes is None:
        free_bytes = free_memory(model.device)
    num_trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    kept = kept_for_backward(model, layout)
    of_update = UPDATE_BYTES * num_trained
    fit, batch, needed = fit_kept(kept, layout, budgets, heaviest, of_update, free_bytes, least_layers=least_layers)
    if fit is not None:
        return fit, batch
    raise UserError(
        "training does not fit into memory",
        where=f"the heaviest micro-batch, {rows_of_pass(batch, layout):,} tokens",
        got=f"{free_bytes / 1e9:.1f} GB free",
        expected=f"about {needed / 1e9:.1f} GB beside the model, the activations of {kept.num_layers} layers recomputed",
        mend="lower data.cutoff_len or training.tokens_per_microbatch, end other programs, or take a smaller model",
    )


def fit_kept(
    kept: Kept,
    layout: Layout,
    budgets: Sequence[int],
    heaviest: Heaviest,
    of_update: float,
    free_bytes: float,
    *,
    least_layers: int = 0,
) -> tuple[Fit | None, MicroBatch, float]:
    """Return the fit of `fit_to_memory`, None where there is none, its heaviest micro-batch, and the free bytes it asks for.

    Args:
        kept: for the backward pass, counted or reckoned.
        layout, budgets, heaviest, least_layers: see there.
        of_update: bytes of what else a step needs.
        free_bytes: memory that there is for both.
    """

    def needed(batch: MicroBatch, layers: int) -> float:
        return (kept.num_bytes(batch, layout, layers) + of_update) / _USED

    for budget in budgets:
        batch = heaviest(budget, partial(kept.num_bytes, layout=layout))
        if needed(batch, least_layers) <= free_bytes:
            return Fit(budget, least_layers), batch, needed(batch, least_layers)
    for layers in range(least_layers + 1, kept.num_layers + 1):
        if needed(batch, layers) <= free_bytes:
            return Fit(budget, layers), batch, needed(batch, layers)
    return None, batch, needed(batch, kept.num_layers)


def falling_budgets(largest: int) -> list[int]:
    """Return a budget and its halves down to LEAST_BUDGET."""
    budgets = [largest]
    while budgets[-1] // 2 >= LEAST_BUDGET:
        budgets.append(budgets[-1] // 2)
    return budgets


def free_memory(device: torch.device) -> float:
    """Return the bytes that a device has for us, what this process holds unused counted."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return float(examine_memory().available_bytes)


def free_for_each(device: torch.device, team: Team) -> float:
    """Return the bytes that each rank of a team has: the ranks of a machine share its memory, each has a GPU of its own."""
    sharing = 1 if device.type == "cuda" else team.local_ranks
    return -team.largest(-free_memory(device) / sharing)


def kept_for_backward(model: PeftModel, layout: Layout) -> Kept:
    """Count what the model keeps for the backward pass of short samples, no layer recomputed; random state is put back."""
    training = model.training
    recompute(model, 0)
    model.train()
    base = model.get_base_model()
    batches = [_probe(model, rows, layout) for rows in _PROBED_ROWS[base.config._attn_implementation == FLEX]]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        with torch.no_grad():
            supervised_loss_sum(model, batches[0])  # a model's first pass may be two
        counted = [_saved_bytes(model, batch) for batch in batches]
    model.train(training)
    shares = np.array([[rows_of_pass(batch, layout), _num_pairs(batch, layout), 1] for batch in batches], dtype=float)
    of_row, of_pair, always = (max(0.0, float(each)) for each in np.linalg.solve(shares, np.array(counted, dtype=float)))
    of_input = base.config.get_text_config().hidden_size * base.get_input_embeddings().weight.element_size()
    return Kept(of_row, of_pair, always, of_input, len(layers_of(model)))


def recompute(model: PeftModel, num_layers: int) -> None:
    """Have the activations of the model's first layers recomputed in its backward pass, and of no others."""
    base = model.get_base_model()
    with quiet_peft():
        if num_layers:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.disable_input_require_grads()  # which only a reentrant one needs
        elif any(layer.gradient_checkpointing for layer in layers_of(model)):
            base.gradient_checkpointing_disable()
    for number, layer in enumerate(layers_of(model)):
        layer.gradient_checkpointing = number < num_layers  # type: ignore[assignment]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose activations can be recomputed, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _probe(model: PeftModel, num_rows: int, layout: Layout) -> MicroBatch:
    """Return a sample of so many rows; where samples are padded one half as long beside it, since padding asks for a mask."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = (num_rows, num_rows // 2) if layout == Layout.PADDED else (num_rows,)
    ids = ((np.arange(num_rows + 1) * 7919 + 13) % vocabulary).astype(np.int32)
    return pack([Sample(ids[: length + 1], np.arange(length + 1) > length // 2) for length in lengths])


def _saved_bytes(model: PeftModel, batch: MicroBatch) -> int:
    """Return the bytes of all storages that a forward pass keeps, those of the model left out."""
    whole = {tensor.untyped_storage().data_ptr() for tensor in _whole_tensors(model)}
    shared_out = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    saved: dict[int, int] = {}

    def own() -> set[int]:
        """What lies in parts comes together while a layer runs."""
        return {tensor.untyped_storage().data_ptr() for tensor in _whole_tensors(model)} if shared_out else whole

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own():
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would keep what made it for good

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = supervised_loss_sum(model, batch)
        return sum(saved.values()) if loss.requires_grad else 0  # what the loss holds lives until here


def _whole_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if not isinstance(tensor, DTensor)]


def _num_pairs(batch: MicroBatch, layout: Layout) -> int:
    """Return the pairs of rows that attention is computed for."""
    if layout != Layout.PADDED:
        return num_pairs(batch.segments)
    longest = max(segment.end - segment.start for segment in batch.segments)
    return len(batch.segments) * longest**2
