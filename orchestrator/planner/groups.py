"""Groups of candidates that the search keeps together. Values only. Pure."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.planner.bounds import Fixed, Least
from orchestrator.planner.space import Batch, Shape, Sharding
from strategies.strategy import Offload


class Lot(NamedTuple):
    """A micro batch of some degrees and a ZeRO stage, as every offload has it: what needs no price of bytes."""

    floor_s: float
    """Busy time and bubble, nothing recomputed."""
    batch: Batch
    sequence_parallel: bool
    size: int
    left: int
    """Candidates of this lot and of all behind it."""
    idle: float
    """The smallest bubble of the schedules."""
    flights: float
    """The fewest micro batches in flight."""


class Row(NamedTuple):
    """A micro batch of a family: the group that is opened into ZeRO groups, schedules and recomputing."""

    shape: Shape
    sequence_parallel: bool
    batch: Batch
    zero: int
    offload: Offload
    size: int
    idle: float
    """The smallest bubble of the schedules."""
    fixed: Fixed
    least: Least
    """What must be recomputed at least."""

    @property
    def micro(self) -> int:
        return self.batch.micro

    @property
    def shardings(self) -> tuple[Sharding, ...]:
        return self.batch.shardings[self.zero]


class Rest(NamedTuple):
    """What the members of a row with one sharding take, without what differs between them."""

    step_s: float
    """The step without the bubble, and without what is recomputed where that is open."""
    hideable_s: float
    """Of the waiting for replicas in there, what recomputing can hide."""
    slowest_s: float
    """Busy time of the slowest pipeline rank in there."""
