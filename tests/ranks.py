"""What each rank of a torchrun finds, printed as JSON by the first: `torchrun tests/ranks.py CONFIG`."""

from __future__ import annotations

import json
import sys

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tuneloom.config import load_config
from tuneloom.train.engine import Engine
from tuneloom.train.interrupt import InterruptFlag
from tuneloom.train.memory import layers_of
from tuneloom.train.prepare import prepare_job
from tuneloom.train.team import team


def main() -> None:
    """Prepare a sharded job, look at its parameters, do two steps."""
    job = prepare_job(load_config(sys.argv[1]))
    base = job.model.get_base_model()
    frozen = [parameter for parameter in job.model.parameters() if not parameter.requires_grad]
    trained = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    shards = sum(parameter.to_local().numel() for parameter in frozen)
    held = team().gathered(shards)
    engine = Engine(job, InterruptFlag(), lambda tokens, layers: None)
    losses = [engine.step(number).loss for number in range(2)]
    adapters = team().gathered(float(sum(parameter.detach().double().sum() for parameter in trained)))
    found = {
        "frozen_in_parts": all(isinstance(parameter, DTensor) for parameter in frozen),
        "trained_whole": all(type(parameter) is torch.nn.Parameter for parameter in trained),
        "units": sum(isinstance(module, FSDPModule) for module in base.modules()),
        "layers_are_units": all(isinstance(layer, FSDPModule) for layer in layers_of(job.model)),
        "num_layers": len(layers_of(job.model)),
        "held": held,
        "whole": sum(parameter.numel() for parameter in frozen),
        "losses": losses,
        "adapters": adapters,
    }
    if team().is_first:
        print(json.dumps(found))


main()
