"""Groups of candidates that the search keeps together, and what bounds them. Values only. Pure."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.planner.space import Batch, Core, Shape, Sharding
from strategies.strategy import Offload


class Pass(NamedTuple):
    """One micro batch through the whole model on one tensor group, nothing recomputed: seconds."""

    compute_s: float
    messages_s: float


class Kept(NamedTuple):
    """Bytes that a layer of one sequence leaves for backward, by what is recomputed."""

    none_bytes: float
    selective_bytes: float
    full_bytes: float


class Fixed(NamedTuple):
    """What a family adds to any of its members with one sharding."""

    first_rank_bytes: float
    """States and gathered parameters of the first pipeline rank."""
    gradient_bytes: float
    """Gradients of the first rank, held in forward where there is more than one micro batch or they are not sharded."""
    usable_bytes: float
    """What is left for tensors: the reserve grows with them."""
    step_s: float
    """Optimizer and offload at the fewest micro batches."""


class Leanest(NamedTuple):
    """The schedule and ZeRO group that hold the fewest bytes at a micro batch."""

    core: Core
    sharding: Sharding


class Least(NamedTuple):
    """What must be recomputed under the leanest: the kinds that fit, and how many layers of a rank fully (None: does not fit
    or is not open). `none` among the kinds: nothing must."""

    kinds: tuple[str, ...]
    layers: int | None

    def with_floor(self, other: Least) -> Least | None:
        """What both allow."""
        kinds = tuple(kind for kind in self.kinds if kind in other.kinds)
        layers = None if self.layers is None or other.layers is None else max(self.layers, other.layers)
        return Least(kinds, layers) if kinds or layers is not None else None


class Lot(NamedTuple):
    """A micro batch of some degrees and a sharding, as every offload has it: what needs no price of bytes."""

    floor_s: float
    """Busy time, bubble and what replicas wait for, nothing recomputed."""
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
    """A micro batch of a family with one sharding: the group that is opened into schedules and recomputing."""

    shape: Shape
    sequence_parallel: bool
    batch: Batch
    sharding: Sharding
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
    def zero(self) -> int:
        return self.sharding.zero


class Rest(NamedTuple):
    """What the members of a row take, without what differs between them."""

    step_s: float
    """The step without the bubble, and without what is recomputed where that is open."""
    hideable_s: float
    """Of the waiting for replicas in there, what recomputing can hide."""
    slowest_s: float
    """Busy time of the slowest pipeline rank in there."""
