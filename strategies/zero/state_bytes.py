"""Bytes of the states that ZeRO shards: what a rank holds of them, and what is gathered and scattered on the way.

Source: ZeRO, arXiv:1910.02054, section 3 and figure 1. We depart where a stack does: the table below."""

from __future__ import annotations

from strategies.catalog import ENGINES
from strategies.engines.engine import BUCKET_BYTES
from strategies.rank import StateBytes
from strategies.strategy import Strategy

BYTES: dict[str, tuple[int, int, int, int]] = {
    "mixed": (2, 2, 4, 8),
    "mixed_fp32_gradients": (2, 4, 4, 8),
    "mixed_fp32_accumulators": (2, 6, 4, 8),
    "sharded_fp32": (4, 4, 0, 8),
    "pure": (2, 2, 0, 4),
    "full": (4, 4, 0, 8),
}
"""Bytes a parameter: parameters, gradients, master weights, moments."""

SHARDING = ("engine", "zero_stage", "zero_group_size", "states")
"""Fields that say what a rank holds of the states."""
IN_FLIGHT = 2
"""Buckets of the native engine on their way at once (strategies/zero/buckets.py)."""


def model_state_bytes(
    num_parameters: int, *, zero_stage: int, data_parallel_degree: int, states: str = "mixed"
) -> float:
    """Bytes of parameters, gradients and Adam states on one GPU: ZeRO, figure 1, with `states: mixed`."""
    strategy = Strategy(
        data_parallel_degree=data_parallel_degree,
        zero_stage=zero_stage,
        zero_group_size=data_parallel_degree if zero_stage else 1,
        states=states,  # type: ignore[arg-type]
    )
    return sum(state_bytes(num_parameters, strategy, "bf16"))


def state_bytes(num_parameters: float, strategy: Strategy, precision: str, padding: float = 0.0) -> StateBytes:
    """Long-lived bytes of one rank's states; `padding` elements more than an even part where they are sharded."""
    parameter, gradient, master, moments = BYTES[strategy.states]
    wide = 2 if precision == "fp64" else 1
    stage = strategy.zero_stage
    group = strategy.zero_group_size
    owned = num_parameters / group + padding if stage else num_parameters
    whole = num_parameters + group * padding if stage else num_parameters
    return StateBytes(
        parameter * wide * (owned if gathers(strategy) else num_parameters),
        gradient * wide * (owned if stage >= 2 else whole),
        master * owned,
        moments * wide * owned,
    )


def frozen_bytes(num_parameters: float, strategy: Strategy, element: int, padding: float = 0.0) -> float:
    """Bytes of one rank's parameters that are not trained: whole in the precision in which they are used, but at stage 3, where
    they are dealt out like the others."""
    dealt = strategy.zero_stage == 3
    return element * (num_parameters / strategy.zero_group_size + padding if dealt else num_parameters)


def reduces_early(strategy: Strategy) -> bool:
    """Whether gradients are sharded, and so reduced while the backward pass runs: FSDP2 holds the states."""
    return strategy.zero_stage >= 2


def gathers(strategy: Strategy) -> bool:
    """Parameters are sharded, and unsharded copies come and go."""
    stage = strategy.zero_stage
    return stage == 3 or (stage > ENGINES[strategy.engine].whole_until and BYTES[strategy.states][0] == 4)


def gathered_bytes(stage: float, block: float, outside: float, strategy: Strategy, element: int) -> float:
    """Unsharded copies of sharded parameters, at their most: all of them at stage 2 (FSDP2 keeps them from forward to
    backward) and with gather: per_step; at stage 3 two blocks (the one at work and the one fetched ahead) and what stands
    outside the blocks."""
    if not gathers(strategy):
        return 0.0
    if strategy.zero_stage == 2 or strategy.gather == "per_step":
        return stage * element
    return (min(2 * block, stage - outside) + outside) * element


def all_gather_bytes(unit: float, strategy: Strategy, element: int) -> float:
    """The gather's own buffers: a shard in, the unit out, until it is copied out."""
    return unit * element * (1 + 1 / strategy.zero_group_size) if gathers(strategy) else 0.0


def unsharded_gradient_bytes(stage: float, unit: float, strategy: Strategy, element: int) -> float:
    """Gradients on their way to their shard: a unit's in its own and in the reduction dtype, and the scattered result; or
    the whole stage's where they are reduced once a step after several micro batches."""
    wide = max(4, element)
    if strategy.zero_stage < 2:
        return 0.0
    working = unit * (element + wide + wide / strategy.zero_group_size)
    if strategy.reduce == "per_step" and strategy.gradient_accumulation_steps > 1:
        return stage * wide + working
    return working


def bucket_bytes(largest: float, strategy: Strategy, element: int) -> float:
    """One bucket of the native engine's ZeRO 0 and 1, in the gradients' dtype: BUCKET_BYTES or one larger parameter."""
    gradient = BYTES[strategy.states][1]
    return max(BUCKET_BYTES, largest * min(4, gradient) * (element // 4 if element > 4 else 1))


def gradient_element(strategy: Strategy, element: int) -> int:
    """Bytes of a gradient where it is reduced."""
    return min(4, BYTES[strategy.states][1]) if element <= 4 else element
