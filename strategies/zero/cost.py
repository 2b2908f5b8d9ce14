"""Data parallelism and ZeRO, priced: bytes of the states, and the messages between replicas.

Source: ZeRO, arXiv:1910.02054, section 3 and figure 1. We depart where a stack does: the table below.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.strategy import Strategy

READS = ("data_parallel_degree", "zero_stage", "zero_group_size", "states", "gather", "reduce")
"""Fields of the Strategy that these functions read."""

BYTES: dict[str, tuple[int, int, int, int]] = {
    "mixed": (2, 2, 4, 8),
    "mixed_fp32_gradients": (2, 4, 4, 8),
    "mixed_fp32_accumulators": (2, 6, 4, 8),
    "sharded_fp32": (4, 4, 0, 8),
    "pure": (2, 2, 0, 4),
    "full": (4, 4, 0, 8),
}
"""Bytes a parameter: parameters, gradients, master weights, moments."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Of one rank, in bytes."""

    parameters: float
    gradients: float
    master_weights: float
    optimizer_states: float


def state_bytes(num_parameters: float, strategy: Strategy, precision: str) -> StateBytes:
    """Long-lived bytes of one rank's states."""
    parameter, gradient, master, moments = BYTES[strategy.states]
    wide = 2 if precision == "fp64" else 1
    group = strategy.zero_group_size
    stage = strategy.zero_stage
    shards_parameters = stage == 3 or (stage == 2 and strategy.states in ("sharded_fp32", "full"))
    return StateBytes(
        parameters=num_parameters * parameter * wide / (group if shards_parameters else 1),
        gradients=num_parameters * gradient * wide / (group if stage >= 2 else 1),
        master_weights=num_parameters * master / (group if stage >= 1 else 1),
        optimizer_states=num_parameters * moments * wide / (group if stage >= 1 else 1),
    )


def gathered_bytes(
    stage_parameters: float, block_parameters: float, outside_parameters: float, strategy: Strategy, element: int
) -> float:
    """Unsharded copies of sharded parameters, at their most: all of them at stage 2 (FSDP2 keeps them from forward to
    backward) and with gather: per_step; at stage 3 two blocks (the one at work and the one fetched ahead) and what stands
    outside the blocks."""
    if (
        strategy.zero_stage < 2
        or strategy.zero_group_size == 1
        or strategy.states not in ("sharded_fp32", "full", "pure")
    ):
        return 0.0
    if strategy.zero_stage == 2 or strategy.gather == "per_step":
        return stage_parameters * element
    return (2 * block_parameters + outside_parameters) * element


def unsharded_gradient_bytes(
    stage_parameters: float, block_parameters: float, outside_parameters: float, strategy: Strategy, element: int
) -> float:
    """Gradients on their way to their shard: a unit's in its own and in the reduction dtype, or the whole stage's where
    they are reduced once a step after several micro batches."""
    if strategy.zero_stage < 2:
        return 0.0
    if strategy.reduce == "per_step" and strategy.gradient_accumulation_steps > 1:
        return stage_parameters * max(4, element)
    return max(block_parameters, outside_parameters) * (element + max(4, element))


def message_bytes(stage_parameters: float, strategy: Strategy, element: int) -> tuple[float, float]:
    """(bytes gathered, bytes reduced) a step by one rank: the size of the whole buffers, before the ring's (n-1)/n.

    Stage 0 all-reduces, which is a reduction and a gather; stage 1 reduces, steps and gathers; FSDP2 reduces in fp32."""
    if strategy.data_parallel_degree == 1:
        return 0.0, 0.0
    times = strategy.gradient_accumulation_steps
    gradient = BYTES[strategy.states][1] if strategy.states != "mixed_fp32_accumulators" else 4
    if strategy.zero_stage < 2:
        return stage_parameters * element, stage_parameters * min(gradient, 4)
    gathers = 1 if strategy.gather == "per_step" else times
    if strategy.zero_stage == 3 and strategy.gather == "per_micro_batch":
        gathers *= 2  # backward gathers what forward let go
    reduces = 1 if strategy.reduce == "per_step" else times
    return stage_parameters * element * gathers, stage_parameters * gradient * reduces
