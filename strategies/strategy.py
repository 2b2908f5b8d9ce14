"""The choice a plan makes, as a frozen value, and the arithmetic between ranks and coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """The offload: what leaves the GPU between its uses."""

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
    """Replicas that share one sharded copy, contiguous in mesh order."""
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
    """Stages in model order; one stage that holds the whole model where there is no pipeline."""

    @property
    def num_gpus(self) -> int:
        return (
            self.data_parallel_degree
            * self.tensor_parallel_degree
            * self.pipeline_parallel_degree
            * self.context_parallel_degree
        )

    @property
    def num_replicas(self) -> int:
        """Return how many ranks hold the same parameters, or a shard of them: their gradients are added up. Ranks of a context
        group see other tokens of the same sequences, so they are replicas like those of data parallelism."""
        return self.data_parallel_degree * self.context_parallel_degree

    @property
    def shards_gradients(self) -> bool:
        """Return whether a rank keeps a shard of the gradients alone: ZeRO 2 and 3."""
        return self.zero_stage >= 2

    @property
    def num_shards(self) -> int:
        """Return how many ranks one copy of the optimizer states is dealt to."""
        return self.zero_group_size if self.zero_stage else 1

    def group_size(self, group: str) -> int | None:
        """Return how many ranks talk in a group of messages; None for groups that are no axis of the mesh."""
        return {
            "tensor": self.tensor_parallel_degree,
            "shard": self.num_shards,
            "replicate": self.num_replicas // self.num_shards,
            "context": self.context_parallel_degree,
            "pipeline": self.pipeline_parallel_degree,
        }.get(group)

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

    @property
    def replica_stride(self) -> int:
        """Distance in ranks between two neighbouring replicas, on data and context together."""
        axes: tuple[Axis, ...] = ("data", "context") if self.context > 1 else ("data",)
        return min(self.stride(axis) for axis in axes if self.size(axis) > 1 or axis == axes[-1])

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


INTERLEAVED: tuple[Schedule, ...] = ("interleaved_1f1b", "interleaved_zero_bubble")
"""Schedules in which a pipeline rank holds any number of stages; the others hold one, zbv two."""
SPLIT_BACKWARD: tuple[Schedule, ...] = ("interleaved_zero_bubble", "zbv")
"""Schedules that run the gradients of the weights apart from those of the inputs."""
