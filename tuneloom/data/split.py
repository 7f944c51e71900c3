"""The samples of a step shared out among the processes that train together, so that each has about as much to do.

What a rank has to do is counted in rows: tokens, those of a shared prefix once on each rank that has one of its samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tuneloom.data.plan import order_of_prefixes, plan_step
from tuneloom.types import Layout, MicroBatch, Sample, StepPlan


def split_step(samples: Sequence[Sample], num_ranks: int, max_tokens: int, layout: Layout) -> tuple[StepPlan, ...]:
    """Return one plan a rank, which together have every sample once; a rank may have none.

    Args:
        samples: of one optimizer step.
        num_ranks: processes.
        max_tokens: token budget of a micro-batch.
        layout: of micro-batches.
    """
    if num_ranks == 1:
        return (plan_step(samples, max_tokens, layout),)
    ways = [_dealt(samples, num_ranks)]
    if layout == Layout.SHARED:
        ways.append(_neighbours(samples, num_ranks))
    plans = [tuple(plan_step(part, max_tokens, layout) if part else StepPlan((), 0) for part in way) for way in ways]
    return min(plans, key=lambda ranks: max(plan.num_rows for plan in ranks))


def in_step(plans: Sequence[StepPlan], rank: int) -> list[tuple[MicroBatch, float]]:
    """Return a rank's micro-batches with the weight of each, as many on every rank: fillers weigh nothing.

    What parts of a model lie on other ranks makes every pass one of all ranks.
    """
    filler = next(batch for plan in plans for batch in plan.micro_batches)
    own = plans[rank].micro_batches
    passes = max(len(plan.micro_batches) for plan in plans)
    return [(batch, 1.0) for batch in own] + [(filler, 0.0)] * (passes - len(own))


def _dealt(samples: Sequence[Sample], num_ranks: int) -> list[list[Sample]]:
    """Give the longest sample that is left to the rank with the fewest tokens."""
    parts: list[list[Sample]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for sample in sorted(samples, key=lambda sample: sample.num_tokens, reverse=True):
        tokens, rank = heapq.heappop(loads)
        parts[rank].append(sample)
        heapq.heappush(loads, (tokens + sample.num_tokens - 1, rank))
    return parts


def _neighbours(samples: Sequence[Sample], num_ranks: int) -> list[list[Sample]]:
    """Cut the samples, those that begin alike beside each other, into runs of about as many tokens."""
    order = sorted(samples, key=order_of_prefixes)
    inputs = [sample.num_tokens - 1 for sample in order]
    parts: list[list[Sample]] = [[] for _ in range(num_ranks)]
    before = 0
    for sample, tokens in zip(order, inputs, strict=True):
        middle = before + tokens / 2
        parts[min(num_ranks - 1, int(middle * num_ranks / sum(inputs)))].append(sample)
        before += tokens
    return parts
