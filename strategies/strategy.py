"""The choice a plan makes, as a frozen value, and the arithmetic between ranks and coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Axis = Literal["pipeline", "data", "context", "tensor"]
Engine = Literal["native", "colossalai", "fairscale"]
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"]
States = Literal["mixed", "mixed_fp32_gradients", "mixed_fp32_accumulators", "sharded_fp32", "pure", "full"]
Frequency = Literal["per_micro_batch", "per_step"]
Checkpointing = Literal["none", "selective", "full"]
Place = Literal["none", "host", "nvme"]
Attention = Literal["flash", "fused_softmax", "math"]

MESH_ORDER: tuple[Axis, ...] = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """What leaves the GPU between its uses."""

    optimizer: Place = "none"
    parameters: Place = "none"
    activations: Literal["none", "host"] = "none"
    optimizer_fraction: float = 1.0
    """Part of the optimizer states that leaves; the rest stays on the GPU."""

    @property
    def any(self) -> bool:
        return not self.optimizer == self.parameters == self.activations == "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A slice of the layers, in model order."""

    stage: int
    pipeline_rank: int
    first_layer: int
    num_layers: int
    num_checkpointed_layers: int
    embedding: bool
    head: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How one step is split over the GPUs. Every field is the word of the job file and of the plan's JSON."""

    engine: Engine = "native"
    data_parallel_degree: int = 1
    tensor_parallel_degree: int = 1
    pipeline_parallel_degree: int = 1
    context_parallel_degree: int = 1
    expert_parallel_degree: int = 1
    mesh_order: tuple[Axis, ...] = MESH_ORDER
    num_virtual_stages: int = 1
    """Stages per pipeline rank."""
    pipeline_schedule: Schedule = "1f1b"
    sequence_parallel: bool = False
    zero_stage: int = 0
    zero_group_size: int = 1
    """Data-parallel ranks that share one sharded copy, contiguous in mesh order."""
    states: States = "mixed"
    gather: Frequency = "per_micro_batch"
    reduce: Frequency = "per_micro_batch"
    activation_checkpointing: Checkpointing = "none"
    offload: Offload = Offload()
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    """Micro batches per replica per step; the m of pipeline papers."""
    attention: Attention = "flash"
    fused_norm: bool = False
    compile: bool = False
    stages: tuple[Stage, ...] = ()
    """In model order; one stage that holds the whole model where there is no pipeline."""

    @property
    def num_gpus(self) -> int:
        return (
            self.data_parallel_degree
            * self.tensor_parallel_degree
            * self.pipeline_parallel_degree
            * self.context_parallel_degree
        )

    @property
    def degrees(self) -> Degrees:
        return Degrees(
            pipeline=self.pipeline_parallel_degree,
            data=self.data_parallel_degree,
            context=self.context_parallel_degree,
            tensor=self.tensor_parallel_degree,
            order=self.mesh_order,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Ranks <-> coordinates on the mesh; `order` runs from the slowest axis to the fastest."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    order: tuple[Axis, ...] = MESH_ORDER

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(MESH_ORDER):
            raise ValueError(f"mesh_order must hold each of {', '.join(MESH_ORDER)} once, got {list(self.order)}")

    def size(self, axis: Axis) -> int:
        return int(getattr(self, axis))

    @property
    def world_size(self) -> int:
        return math.prod(self.size(axis) for axis in self.order)

    def stride(self, axis: Axis) -> int:
        """Distance in ranks between two neighbours along the axis."""
        place = self.order.index(axis)
        return math.prod(self.size(later) for later in self.order[place + 1 :])

    def coordinates(self, rank: int) -> dict[Axis, int]:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        return {axis: rank // self.stride(axis) % self.size(axis) for axis in self.order}

    def rank(self, coordinates: Mapping[Axis, int]) -> int:
        return sum(coordinates.get(axis, 0) * self.stride(axis) for axis in self.order)

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ along the axis alone, group by group."""
        stride, size = self.stride(axis), self.size(axis)
        firsts = [rank for rank in range(self.world_size) if self.coordinates(rank)[axis] == 0]
        return tuple(tuple(first + i * stride for i in range(size)) for first in firsts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What two or more choices make of each other."""

    fields: tuple[str, ...]
    """The choices that meet, the one to change first."""
    applies: Callable[[Strategy], bool]
    reason: str
    """May name any field of the strategy in braces."""
    fix: str

    def told(self, strategy: Strategy) -> str:
        return self.reason.format_map(_Fields(strategy))


class _Fields(dict[str, object]):
    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def __missing__(self, name: str) -> object:
        return getattr(self.strategy, name)


INTERLEAVED: tuple[Schedule, ...] = ("interleaved_1f1b", "interleaved_zero_bubble")
"""Schedules in which a pipeline rank holds any number of stages; the others hold one, zbv two."""
SPLIT_BACKWARD: tuple[Schedule, ...] = ("interleaved_zero_bubble", "zbv")
"""Schedules that run the gradients of the weights apart from those of the inputs."""

# Of each pair of choices: impossible, built, or only priced. Said here and nowhere else: the spec, the planner and the engine
# ask `impossible` and `without_effect`; what is built is the engine's table in catalog.py.
IMPOSSIBLE: tuple[Rule, ...] = (
    Rule(
        fields=("zero_group_size", "data_parallel_degree"),
        applies=lambda s: s.data_parallel_degree % s.zero_group_size != 0,
        reason="zero_group_size {zero_group_size} does not divide data_parallel_degree {data_parallel_degree}",
        fix="a group size that divides the data-parallel degree",
    ),
    Rule(
        fields=("num_virtual_stages", "pipeline_schedule"),
        applies=lambda s: s.num_virtual_stages != 2 and s.pipeline_schedule == "zbv" and s.pipeline_parallel_degree > 1,
        reason="zbv holds exactly 2 stages on each pipeline rank, num_virtual_stages is {num_virtual_stages}",
        fix="num_virtual_stages: 2",
    ),
    Rule(
        fields=("num_virtual_stages", "pipeline_schedule"),
        applies=lambda s: (
            s.num_virtual_stages > 1 and s.pipeline_schedule in ("gpipe", "1f1b") and s.pipeline_parallel_degree > 1
        ),
        reason="{pipeline_schedule} holds one stage on each pipeline rank, num_virtual_stages is {num_virtual_stages}",
        fix="pipeline_schedule: interleaved_1f1b, or num_virtual_stages: 1",
    ),
    Rule(
        fields=("pipeline_schedule", "pipeline_parallel_degree", "gradient_accumulation_steps"),
        applies=lambda s: (
            s.num_virtual_stages > 1
            and s.pipeline_schedule in INTERLEAVED
            and s.gradient_accumulation_steps % s.pipeline_parallel_degree != 0
        ),
        reason="{pipeline_schedule} over {num_virtual_stages} virtual stages runs micro batches in whole rounds of the pipeline: "
        "gradient_accumulation_steps {gradient_accumulation_steps} is no multiple of {pipeline_parallel_degree}",
        fix="a micro batch or data-parallel degree that makes it one, or pipeline_schedule: 1f1b",
    ),
)

WITHOUT_EFFECT: tuple[Rule, ...] = (
    Rule(
        fields=("offload",),
        applies=lambda s: s.offload.optimizer_fraction < 1 and s.offload.optimizer == "none",
        reason="offload.optimizer_fraction has no effect where the optimizer states stay on the GPU",
        fix="leave it out",
    ),
    Rule(
        fields=("sequence_parallel", "tensor_parallel_degree"),
        applies=lambda s: s.sequence_parallel and s.tensor_parallel_degree == 1,
        reason="sequence_parallel has no effect at tensor_parallel_degree 1",
        fix="leave it out",
    ),
    Rule(
        fields=("zero_stage", "data_parallel_degree"),
        applies=lambda s: s.zero_stage > 0 and s.data_parallel_degree == 1,
        reason="zero_stage {zero_stage} has nothing to shard over at data_parallel_degree 1",
        fix="leave it out",
    ),
    Rule(
        fields=("zero_group_size", "zero_stage"),
        applies=lambda s: s.zero_group_size > 1 and s.zero_stage == 0,
        reason="zero_group_size {zero_group_size} has no effect at zero_stage 0",
        fix="leave it out",
    ),
    Rule(
        fields=("pipeline_schedule", "pipeline_parallel_degree"),
        applies=lambda s: s.pipeline_parallel_degree == 1 and s.num_virtual_stages > 1,
        reason="num_virtual_stages {num_virtual_stages} has no effect at pipeline_parallel_degree 1",
        fix="leave it out",
    ),
    Rule(
        fields=("gather", "zero_stage"),
        # At stage 2, FSDP2 shards fp32 parameters too, and gathers them for every micro batch unless told otherwise.
        applies=lambda s: (
            s.gather == "per_step"
            and (s.zero_stage < 2 or (s.zero_stage == 2 and s.states not in ("sharded_fp32", "full")))
            and s.offload.parameters == "none"
        ),
        reason="gather: per_step has no effect at zero_stage {zero_stage} with states {states}: parameters are not sharded",
        fix="leave it out",
    ),
)


def impossible(strategy: Strategy) -> Rule | None:
    """The first rule that the choices break among themselves; None where they can be together."""
    return next((rule for rule in IMPOSSIBLE if rule.applies(strategy)), None)


def without_effect(strategy: Strategy) -> list[Rule]:
    """The choices that change nothing. They are priced, and noted."""
    return [rule for rule in WITHOUT_EFFECT if rule.applies(strategy)]
