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
    """Bytes that a layer of one micro batch leaves for backward, by what is recomputed, and what a block needs beside them."""

    none: float
    selective: float
    full: float
    working: float


class Fixed(NamedTuple):
    """What the members of a family with one sharding have in common, whatever their activations: bytes that are free on the first
    pipeline rank, and seconds."""

    free_once: float
    """Of a GPU, where a step has one micro batch."""
    free_late: float
    """Where it has more."""
    free_on_host: float
    """Of a rank's part of host memory."""
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
    """A micro batch of some degrees and a sharding, as every offload has it."""

    floor_s: float
    """Busy time, bubble and what replicas wait for, nothing recomputed."""
    batch: Batch
    sequence_parallel: bool
    idle: float
    """The smallest bubble of the schedules."""
    flights: float
    """The fewest micro batches in flight."""
    kept: Kept

    @property
    def size(self) -> int:
        """Candidates of one family."""
        return self.batch.num_recomputes


class Fewest(NamedTuple):
    """The fewest bytes that activations take on the first rank, of some micro batches."""

    once: bool
    """One of them is a step's only one."""
    stay: float
    """On the GPU, with `working`."""
    here: float
    """On the GPU where they are carried to the host, with `working`."""
    waiting: float
    """On the host where they are carried."""

    def over(self, fixed: Fixed, *, carried: bool) -> tuple[float, float]:
        """Bytes that each of them has too many at least: (on a GPU, of its part of the host)."""
        here, waiting = (self.here, self.waiting) if carried else (self.stay, 0.0)
        return here - (fixed.free_once if self.once else fixed.free_late), waiting - fixed.free_on_host


class Row(NamedTuple):
    """A lot of a family with one sharding: the group that is opened into schedules and recomputing."""

    shape: Shape
    lot: Lot
    sharding: Sharding
    offload: Offload
    fixed: Fixed
    least: Least
    """What must be recomputed at least."""

    @property
    def batch(self) -> Batch:
        return self.lot.batch

    @property
    def micro(self) -> int:
        return self.lot.batch.micro

    @property
    def sequence_parallel(self) -> bool:
        return self.lot.sequence_parallel

    @property
    def zero(self) -> int:
        return self.sharding.zero

    @property
    def floor_s(self) -> float:
        """Nothing recomputed, no activations carried."""
        return self.lot.floor_s + self.fixed.step_s


class Rest(NamedTuple):
    """What the members of a row take, without what differs between them."""

    step_s: float
    """The step without the bubble, and without what is recomputed where that is open."""
    hideable_s: float
    """Of the waiting for replicas in there, what recomputing can hide."""
    slowest_s: float
    """Busy time of the slowest pipeline rank in there."""
