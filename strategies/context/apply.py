"""Context parallelism, done to a module: each rank of a context group takes two chunks of every sequence, and attention asks
the ring for the keys of the others.

Parameters are whole on every rank of the group, whose ranks count as replicas: the mesh and ZeRO deal over data and context
together, and gradients and losses, which are sums over tokens, add up as those of replicas do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.context.ring import Bias, Ring
from strategies.engines.engine import Build, MicroBatch
from strategies.engines.sequence import WholeSequence


class SplitSequence(WholeSequence):
    """Each sequence is split over the ranks of a context group."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.size = ring, ring.size

    def places(self, length: int, device: torch.device) -> Tensor:
        return self.ring.places(length * self.size, device)

    def attention(self, q_BASD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, flash: bool, bias: Bias | None) -> Tensor:
        return self.ring.attention(q_BASD, k_BKSD, v_BKSD, flash=flash, bias=bias)


def part(ring: Ring, batch: MicroBatch) -> MicroBatch:
    """Return the micro batch with this rank's tokens alone. Raises ValueError where a row holds several samples, or where the
    loss asks for single tokens of it."""
    if batch.inputs or batch.labels:
        told = ", ".join((*batch.inputs, *batch.labels))
        raise ValueError(
            f"context_parallel_degree {ring.size} splits rows of one sample each, and these come with {told}; set "
            "context_parallel_degree to 1"
        )
    inputs, targets = ring.split(batch.input_ids_BS), ring.split(batch.target_ids_BS)
    return replace(batch, input_ids_BS=inputs, target_ids_BS=targets)


def apply(build: Build) -> Build:
    """Gives the module's parts a sequence that is split. Raises ValueError for a module whose attention cannot be."""
    degrees = build.strategy.degrees
    if degrees.context == 1:
        return build
    if not any(hasattr(part, "sequence") for part in build.module.modules()):
        raise ValueError(
            f"context_parallel_degree {degrees.context} wants a module that asks its `sequence` for attention; "
            f"{type(build.module).__name__} does not: set context_parallel_degree to 1"
        )
    rank, mine = dist.get_rank(), None
    for ranks in degrees.groups("context"):  # every rank must make every group
        group: Any = dist.new_group(list(ranks))
        if rank in ranks:
            mine = group
    ring = Ring(mine, rank=degrees.coordinates(rank)["context"], size=degrees.context)
    requests = replace(build.requests, groups=(*build.requests.groups, mine), part=partial(part, ring))
    return replace(build, sequence=SplitSequence(ring), requests=requests)
