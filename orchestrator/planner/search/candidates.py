"""Candidates, the groups of them that the search keeps together, and what bounds those. Values only. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from orchestrator.planner.problem import Choice
from strategies.strategy import Offload, Schedule


class Shape(NamedTuple):
    """The degrees."""

    tensor: int
    pipeline: int
    data: int

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.data


class Sharding(NamedTuple):
    """What the data-parallel ranks share, and how often they talk."""

    zero: int
    group: int
    gather: str
    reduce: str


class Core(NamedTuple):
    """What decides the time of a micro batch and of the pipeline."""

    shape: Shape
    sequence_parallel: bool
    micro: int
    schedule: Schedule
    virtual: int


class Batch(NamedTuple):
    """A micro batch on some degrees, and what is open with it."""

    micro: int
    accumulation: int
    schedules: tuple[tuple[Schedule, int], ...]
    shardings: dict[int, tuple[Sharding, ...]]
    """By ZeRO stage."""
    num_recomputes: int
    """Over all schedules."""


PER_MICRO_BATCH, PER_STEP = "per_micro_batch", "per_step"


class Pass(NamedTuple):
    """One micro batch on one tensor group, forward and backward, nothing recomputed: seconds."""

    layer_s: float
    embedding_s: float
    head_s: float

    def whole_s(self, num_layers: int) -> float:
        return num_layers * self.layer_s + self.embedding_s + self.head_s

    def slowest_s(self, layouts: list[list[tuple[int, bool, bool]]]) -> float:
        """On the slowest pipeline rank of the kindest layout; of a rank (layers, embedding, head)."""
        layer_s, embedding_s, head_s = self
        least = float("inf")
        for ranks in layouts:
            most = 0.0
            for layers, embedding, head in ranks:
                most = max(most, layers * layer_s + embedding * embedding_s + head * head_s)
            least = min(least, most)
        return least


class Busy(NamedTuple):
    """All micro batches of a step, nothing recomputed: seconds."""

    total_s: float
    """On all pipeline ranks."""
    slowest_s: float
    """On the slowest, at least."""

    def floor_s(self, pipeline: int, idle: float) -> float:
        """The step with such a bubble: it is the other ranks'."""
        if pipeline == 1:
            return self.total_s
        return self.slowest_s + (self.total_s - self.slowest_s) / (pipeline - 1) * idle


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
    """Of a GPU, where a step has fewer micro batches than twice the pipeline ranks."""
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
    """What must be recomputed at least: the kinds that may fit, and how many layers of a rank fully (None: does not fit or is
    not open). `none` among the kinds: nothing must."""

    kinds: tuple[str, ...]
    layers: int | None


class Lot(NamedTuple):
    """A micro batch of some degrees, as every sharding and offload has it."""

    shape: Shape
    floor_s: float
    """Busy time and bubble, nothing recomputed."""
    batch: Batch
    sequence_parallel: bool
    idle: float
    """The smallest bubble of the schedules."""
    flights: float
    """The fewest micro batches in flight."""
    late: bool
    """A step has twice as many micro batches as pipeline ranks, or more."""
    kept: Kept
    first: int
    """Layers of the first pipeline rank."""
    fewest: int
    """Layers of the rank that has the fewest."""
    anything: Least
    """All recomputing that is open."""

    @property
    def size(self) -> int:
        """Candidates of one family."""
        return self.batch.num_recomputes


class Fewest(NamedTuple):
    """The fewest bytes that activations take on the first rank, of some micro batches."""

    once: bool
    """A step takes fewer of one of them than twice the pipeline ranks."""
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

    lot: Lot
    sharding: Sharding
    offload: Offload
    fixed: Fixed
    least: Least
    """What must be recomputed at least."""

    @property
    def shape(self) -> Shape:
        return self.lot.shape

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


class Rest(NamedTuple):
    """What the members of a row take, without what differs between them."""

    step_s: float
    """The step without the bubble, and without what is recomputed where that is open."""
    hideable_s: float
    """Of the waiting for replicas in there, what recomputing can hide."""
    slowest_s: float
    """Busy time of the slowest pipeline rank in there."""


def point(core: Core, sharding: Sharding, offload: Offload, recompute: str, layers: int | None) -> Choice:
    """One candidate from the parts of the space."""
    shape = core.shape
    return Choice(
        tensor=shape.tensor,
        pipeline=shape.pipeline,
        data=shape.data,
        sequence_parallel=core.sequence_parallel,
        schedule=core.schedule,
        virtual=core.virtual,
        micro=core.micro,
        zero=sharding.zero,
        group=sharding.group,
        gather=sharding.gather,
        reduce=sharding.reduce,
        offload=offload,
        recompute=recompute,
        layers=layers,
    )


def simplicity(choice: Choice) -> tuple[Any, ...]:
    """Smaller is simpler; decides between strategies of the same speed."""
    offload = choice.offload
    return (
        (offload.optimizer, offload.parameters, offload.activations).count("none") * -1,
        (offload.optimizer, offload.parameters, offload.activations).count("nvme"),
        choice.num_gpus,
        choice.pipeline,
        choice.tensor,
        choice.zero,
        choice.schedule != "1f1b",
        choice.virtual,
        choice.recompute != "none",
        choice.recompute == "full",
        choice.sequence_parallel,
        -choice.group,
        choice.gather != PER_MICRO_BATCH,
        choice.reduce != PER_STEP,
        choice.schedule,
        -1 if choice.layers is None else choice.layers,
        choice.micro,
    )
