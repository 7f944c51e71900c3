"""A base too large for one device, its weights in parts on all of them: torch's fully_shard, one unit a decoder layer.

What is trained stays whole on every rank: an adapter is a few MB, and so optimizer, checkpoints and the sum of gradients are
the same as without. A layer's weights come together for its forward pass, again for its backward one, and are let go after
each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tuneloom.errors import UserError
from tuneloom.train.memory import free_memory, layers_of
from tuneloom.train.optim import trainable_parameters
from tuneloom.train.team import Team

if TYPE_CHECKING:
    from peft import PeftModel

_ROOM = 0.6
"""Of a device's free memory, which the weights may take before they are shared out; the rest is for activations."""


def is_sharded(wanted: str, weight_bytes: float, device: torch.device, team: Team, quantization: str) -> bool:
    """Return whether the base's weights are shared out among the ranks.

    Args:
        wanted: `full_shard`, `none`, or `auto`: where they would leave a device too little memory.
        weight_bytes: of the whole base.
        device: of this rank.
        team: the ranks.
        quantization: of the base.

    Raises:
        UserError: full_shard of a quantised base.
    """
    if team.alone or wanted == "none":
        return False
    if wanted == "full_shard":
        if quantization != "none":
            raise UserError(
                "the weights of a quantised base are not shared out",
                where="training.fsdp",
                got=f"full_shard with base_model.quantization {quantization}",
                mend="set training.fsdp to none, or base_model.quantization to none",
            )
        return True
    copies = team.local_ranks if device.type == "cpu" else 1
    lacks = quantization == "none" and copies * weight_bytes > _ROOM * free_memory(device)
    return team.largest(lacks) > 0


def shard(model: PeftModel, device: torch.device) -> None:
    """Share out the frozen weights of an adapted model among the ranks, in place; all of them call it, at any time.

    Args:
        model: its weights whole, on any device.
        device: of this rank, where its parts are to be.

    Raises:
        UserError: the model has no decoder layers that transformers marks as such.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = layers_of(model)
    if not layers:
        raise UserError(
            "this model's weights cannot be shared out", where="training.fsdp", got="no decoder layers found", expected="none"
        )
    trained = set(trainable_parameters(model).values())
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    base = model.get_base_model()
    for module in (*layers, base):
        fully_shard(module, mesh=mesh, ignored_params=trained)
    for buffer in base.buffers():
        buffer.data = buffer.data.to(device)


def bring_together_once(model: PeftModel) -> None:
    """Have every unit's weights come together and be let go, all ranks at once.

    What they come together in is made then: the first pass may be one in inference mode, whose tensors no other can write to.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    let_go(model)


def let_go(model: PeftModel) -> None:
    """Have every unit in parts again on all ranks: a pass leaves the outermost together, reading the state of one does not."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
