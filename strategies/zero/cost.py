"""Data parallelism and ZeRO, priced: bytes of the states, and the messages between replicas.

Source: ZeRO, arXiv:1910.02054, section 3 and figure 1. We depart where a stack does: the table below. What the native engine
holds at each moment is written in apply.py; these functions are the same table in numbers."""

from __future__ import annotations

from typing import NamedTuple

from clusters.cluster import Cluster
from strategies.catalog import ENGINES
from strategies.constants import TimeConstants
from strategies.engines.engine import BUCKET_BYTES
from strategies.links import all_reduce_s, half_s, ring
from strategies.strategy import Strategy
from strategies.workload import Workload

READS = ("engine", "data_parallel_degree", "zero_stage", "zero_group_size", "states", "gather", "reduce")
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

IN_FLIGHT = 2
"""Buckets of the native engine on their way at once (strategies/zero/buckets.py)."""


class StateBytes(NamedTuple):
    """Of one rank, in bytes."""

    parameters: float
    gradients: float
    master_weights: float
    optimizer_states: float


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


def group_size(strategy: Strategy) -> int:
    """Ranks that share one copy of the optimizer states."""
    return strategy.zero_group_size if strategy.zero_stage else 1


def padding(work: Workload, strategy: Strategy) -> tuple[float, float]:
    """Elements that the fullest rank of a group owns beyond its even part, (outside the blocks, of one block): rows of a
    parameter are dealt whole."""
    group = strategy.zero_group_size
    split = strategy.tensor_parallel_degree
    if group == 1:
        return 0.0, 0.0

    def uneven(rows: int) -> float:
        """Part of a row beyond an even part."""
        return -(-rows // group) - rows / group

    hidden, ffn = work.hidden_size, work.ffn_size
    outside = uneven(work.vocab_size) * work.embedding_size / split + hidden  # a row of positions at most
    return outside, (uneven(hidden) * (4 * hidden + ffn) + uneven(ffn) * hidden) / split


def state_bytes(num_parameters: float, strategy: Strategy, precision: str, padding: float = 0.0) -> StateBytes:
    """Long-lived bytes of one rank's states; `padding` elements more than an even part where they are sharded."""
    parameter, gradient, master, moments = BYTES[strategy.states]
    wide = 2 if precision == "fp64" else 1
    stage = strategy.zero_stage
    owned = num_parameters / strategy.zero_group_size + padding if stage else num_parameters
    return StateBytes(
        parameter * wide * (owned if gathers(strategy) else num_parameters),
        gradient * wide * (owned if stage >= 2 else num_parameters),
        master * owned,
        moments * wide * owned,
    )


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


def data_parallel_s(
    strategy: Strategy,
    cluster: Cluster,
    constants: TimeConstants,
    *,
    parameters: float,
    num_units: int,
    element: int,
    compute_s: float,
) -> tuple[float, float]:
    """Seconds of a step's gathers and reductions of one rank's parameters: (all of them, those that compute does not hide).

    Per step at ZeRO 0 and 1. FSDP: per micro batch, two gathers at stage 3 (backward gathers what forward let go)."""
    size = strategy.data_parallel_degree
    if size == 1:
        return 0.0, 0.0
    stride = strategy.tensor_parallel_degree * strategy.context_parallel_degree
    if strategy.mesh_order[-1] != "tensor" or strategy.mesh_order[1] != "data":
        stride = strategy.degrees.stride("data")
    num_gpus = strategy.num_gpus
    reduced = min(4, BYTES[strategy.states][1]) if element <= 4 else element
    stage = strategy.zero_stage
    cpu = cluster.accelerator.kind == "cpu"
    if stage == 0:
        group = ring(cluster, constants, size=size, stride=stride, num_gpus=num_gpus)
        messages = parameters * reduced / constants.bucket_bytes + 1
        seconds = all_reduce_s(group, parameters * reduced, messages=messages)
        return seconds, seconds * (1.0 if cpu else 1 - constants.hidden)

    shard = strategy.zero_group_size
    group = ring(cluster, constants, size=shard, stride=stride, num_gpus=num_gpus)
    across_s = 0.0
    if shard < size:
        outer = ring(cluster, constants, size=size // shard, stride=stride * shard, num_gpus=num_gpus)
        across_s = all_reduce_s(outer, parameters * reduced / shard, messages=num_units)
    messages = num_units if stage >= 2 else parameters * element / constants.bucket_bytes + 1
    reduce_s = half_s(group, parameters * reduced, messages=messages, kind="reduce_scatter")
    gather_s = half_s(group, parameters * element, messages=messages)
    if stage == 1:
        bytes_s = half_s(group, parameters * (reduced + element), messages=0) + across_s
        return reduce_s + gather_s + across_s, reduce_s + gather_s + across_s - bytes_s * (
            0 if cpu else constants.hidden
        )

    times = strategy.gradient_accumulation_steps
    gather_times = 1 if strategy.gather == "per_step" or not gathers(strategy) else times * (2 if stage == 3 else 1)
    reduce_times = 1 if strategy.reduce == "per_step" else times
    seconds = gather_times * gather_s + reduce_times * reduce_s + across_s
    if cpu:
        # Nothing hides, and each unit is copied in before it is scattered and out after it was gathered: read and written.
        copied = 2 * parameters * (element * gather_times + reduced * reduce_times)
        seconds += copied / _copy_rate(cluster)
        return seconds, seconds
    return seconds, max(seconds * (1 - constants.hidden_sharded), seconds - compute_s)


def _copy_rate(cluster: Cluster) -> float:
    """Bytes read and written per second by copies into new memory."""
    measured = cluster.calibration.elementwise_bytes_per_s if cluster.calibration else None
    return measured or cluster.accelerator.memory_bytes_per_s
