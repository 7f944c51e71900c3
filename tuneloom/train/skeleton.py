"""What a training takes by arithmetic, before a weight is read: the base's modules are built without weights and counted.

The weights, the adapter and the optimizer's state follow from the modules' shapes. What a layer keeps of a row for its backward
pass follows from what its parts read again there (`tuneloom.adapters.fused`, `tuneloom.models.fused_layers`):

    the inputs of its two norms, of D numbers each
    what comes out of all linear modules of the attention and of the feed-forward but the last of each: queries, keys, values,
        the gate and what it lets through
    what goes into the linear modules that have an adapter: a tensor for those that stand first, another for the last one
    the adapter's R numbers in each of them, and with DoRA the module's output too

SmolLM2 gives 8,504 numbers a row and layer so; 8,522 are counted on the loaded model (`tuneloom.train.memory.Kept`), whose
rest goes into the head. Families that keep more are told too little: this is a bound from below, and it is the count on the
loaded model that decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from tuneloom.adapters.attach import module_paths, resolve_targets
from tuneloom.config import AdapterConfig
from tuneloom.models.load import load_skeleton
from tuneloom.models.source import ModelSource
from tuneloom.train.memory import Kept, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTISED_BYTES = {"4bit": 0.5, "8bit": 1.0}
"""Of a number in a linear module; embedding, head and norms stay as they are."""
_TRAINED_BYTES = 4
"""Adapters are fp32."""


@dataclass(frozen=True)
class Reckoned:
    """What follows from the shapes.

    Attributes:
        weight_bytes: of the base.
        num_trained: parameters of the adapter.
        kept: for the backward pass.
    """

    weight_bytes: float
    num_trained: int
    kept: Kept

    @property
    def adapter_bytes(self) -> float:
        return float(_TRAINED_BYTES * self.num_trained)


def reckon(
    base: ModelSource, adapter: AdapterConfig, dtype: torch.dtype, quantization: str = "none", *, pairs: bool = False
) -> Reckoned:
    """Return what a training of the base takes.

    Args:
        base: whose config.json is read.
        adapter: the adapter section.
        dtype: of weights and products.
        quantization: none, 4bit or 8bit.
        pairs: whether attention keeps a number for each pair of rows, as it does on packed samples outside of a kernel.

    Raises:
        UserError: a config.json that no model can be built from, or a target that matches nothing.
    """
    model = load_skeleton(base.folder)
    adapted = module_paths(model, resolve_targets(model, adapter.target_modules))
    saved = module_paths(model, adapter.modules_to_save) if adapter.modules_to_save else frozenset()
    num_trained = 0
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path in adapted and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            outputs = weight.shape[isinstance(module, nn.Embedding)]  # of which DoRA has a magnitude each
            num_trained += adapter.r * sum(weight.shape) + (outputs if adapter.use_dora else 0)
        elif path in saved:
            num_trained += sum(parameter.numel() for parameter in module.parameters())
    return Reckoned(_weight_bytes(model, dtype, quantization), num_trained, _kept(model, adapter, adapted, dtype, pairs))


def _weight_bytes(model: PreTrainedModel, dtype: torch.dtype, quantization: str) -> float:
    """Return the bytes of all parameters; those that are tied count once."""
    head = model.get_output_embeddings()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    small = QUANTISED_BYTES.get(quantization, dtype.itemsize)
    return float(sum(p.numel() * (small if id(p) in linear else dtype.itemsize) for p in model.parameters()))


def _kept(model: PreTrainedModel, adapter: AdapterConfig, adapted: frozenset[str], dtype: torch.dtype, pairs: bool) -> Kept:
    config = model.config.get_text_config()
    layers = set(map(id, layers_of(model)))
    numbers = 0
    for path, layer in model.named_modules():
        if id(layer) in layers:
            numbers += 2 * config.hidden_size
            numbers += sum(_of_part(part, f"{path}.{name}", adapter, adapted) for name, part in layer.named_modules())
    heads = getattr(config, "num_attention_heads", 0) * len(layers) if pairs else 0
    return Kept(
        of_row=float(numbers * dtype.itemsize),
        of_pair=float(heads * dtype.itemsize),
        always=0.0,
        of_input=config.hidden_size * dtype.itemsize,
        num_layers=len(layers),
    )


def _of_part(part: nn.Module, path: str, adapter: AdapterConfig, adapted: frozenset[str]) -> int:
    """Return the numbers that an attention or a feed-forward keeps of a row: those of its own linear modules."""
    linear = [(f"{path}.{name}", module) for name, module in part.named_children() if isinstance(module, nn.Linear)]
    if not linear:
        return 0
    *first, (last_path, last) = linear
    numbers = sum(module.out_features for _, module in first)
    numbers += max((module.in_features for name, module in first if name in adapted), default=0)
    numbers += last.in_features if last_path in adapted else 0
    for name, module in linear:
        if name in adapted:
            numbers += adapter.r + (module.out_features if adapter.use_dora else 0)
    return numbers
