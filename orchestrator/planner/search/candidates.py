"""Candidates, the groups of them that the search keeps together, and what bounds those. Values only. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.planner.problem import Choice
from strategies.price.memory import MemoryPrice
from strategies.strategy import Offload, Schedule

GIB = 2**30


class Shape(NamedTuple):
    """The degrees."""

    tensor: int
    pipeline: int
    data: int
    context: int = 1

    @property
    def replicas(self) -> int:
        """Return how many ranks hold the same parameters, or a shard of them."""
        return self.data * self.context

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.replicas


class Sharding(NamedTuple):
    """A sharding says what the data-parallel ranks share, and how often they talk."""

    zero: int
    group: int
    gather: str
    reduce: str


class PipelineConfiguration(NamedTuple):
    """The choices that decide the time of a micro batch and of the pipeline."""

    shape: Shape
    sequence_parallel: bool
    micro: int
    schedule: Schedule
    virtual: int


class BatchOption(NamedTuple):
    """A micro batch on some degrees, and what is open with it."""

    micro: int
    accumulation: int
    schedules: tuple[tuple[Schedule, int], ...]
    shardings: dict[int, tuple[Sharding, ...]]
    """Shardings by ZeRO stage."""
    num_recomputes: int
    """Choices of recomputing over all schedules."""


PER_MICRO_BATCH, PER_STEP = "per_micro_batch", "per_step"


class MinimumRecompute(NamedTuple):
    """The least that must be recomputed."""

    kinds: tuple[str, ...]
    """Kinds other than full that may fit; `none` among them: nothing must be recomputed."""
    layers: int | None
    """Layers of a rank that must be recomputed fully; None: full recompute does not fit or is not open."""


class MicroBatchGroup(NamedTuple):
    """All candidates with the same degrees, micro batch and sequence parallelism, and what bounds them all."""

    shape: Shape
    batch: BatchOption
    sequence_parallel: bool
    idle: float
    """The smallest bubble of the schedules, as a part of busy time."""
    in_flight: float
    """The fewest micro batches in flight of the schedules."""
    floor_s: float
    """Seconds of busy time and bubble, nothing recomputed."""


class ShardingGroup(NamedTuple):
    """The candidates of a micro batch group with one sharding and one offload."""

    micro_batch: MicroBatchGroup
    sharding: Sharding
    offload: Offload


def point(
    core: PipelineConfiguration, sharding: Sharding, offload: Offload, recompute: str, layers: int | None
) -> Choice:
    """One candidate from the parts of the space."""
    shape = core.shape
    return Choice(
        tensor=shape.tensor,
        pipeline=shape.pipeline,
        data=shape.data,
        context=shape.context,
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
        choice.context,
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


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A family of which not even the smallest member fits."""

    choice: Choice
    memory: MemoryPrice


def excess(memory: MemoryPrice) -> float:
    """Peak over budget."""
    return memory.peak_bytes / max(1, memory.usable_bytes)


def formatted_excess(memory: MemoryPrice) -> str:
    """92.4 GiB on stage 0, 14.1 over."""
    over = memory.peak_bytes - memory.usable_bytes
    if over <= 0:
        return "does not fit in host memory or NVMe"
    where = f" on stage {memory.stages.fullest().pipeline_rank}" if len(memory.stages) > 1 else ""
    return f"{memory.peak_bytes / GIB:.1f} GiB{where}, {over / GIB:.1f} over"
