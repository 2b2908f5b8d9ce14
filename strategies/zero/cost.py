"""Data parallelism and ZeRO, priced: bytes of the states, and the messages between replicas.

Source: ZeRO, arXiv:1910.02054, section 3 and figure 1. We depart where a stack does: the table below. What the native engine
holds at each moment is written in apply.py; these functions are the same table in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clusters.cluster import Cluster
from strategies.catalog import ENGINES
from strategies.engines.engine import BUCKET_BYTES
from strategies.links import Links, Message, all_reduce_s, half_s
from strategies.pipeline.cost import Share
from strategies.sizes import FIRST, Place, Sizes, num_buckets, padded
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload

READS = (
    *("engine", "data_parallel_degree", "zero_stage", "zero_group_size", "states", "gather", "reduce"),
    *("tensor_parallel_degree", "gradient_accumulation_steps"),
)
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


def padding(work: Workload, strategy: Strategy, *, embedding: bool, head: bool) -> tuple[float, float]:
    """Elements that the fullest rank of a group owns beyond its even part, (outside the blocks, of one block): rows of a
    parameter are dealt whole. Buckets and gathered copies hold as many for every rank of the group."""
    group = strategy.zero_group_size
    split = strategy.tensor_parallel_degree
    if group == 1:
        return 0.0, 0.0

    def uneven(rows: int) -> float:
        """Part of a row beyond an even part, of so many rows dealt over tensor parallelism."""
        return -(-rows // group) - rows / group

    hidden, ffn, kv = work.hidden_size, work.ffn_size, work.kv_size
    tables = tensor.num_tables(work, embedding=embedding, head=head)
    positions = uneven(-(-work.position_rows // split)) * hidden if embedding else 0.0
    table = uneven(-(-work.vocab_size // split)) * work.embedding_size
    outside = tables * table + positions + (2 * uneven(hidden) if head else 0.0)
    columns = uneven(hidden // split) + 2 * uneven(kv // split)
    matrices = columns * hidden + uneven(hidden) * (hidden + ffn) / split + uneven(-(-ffn // split)) * hidden
    vectors = columns + 6 * uneven(hidden) + uneven(-(-ffn // split))
    return outside, matrices + vectors


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


def messages(
    work: Workload, strategy: Strategy, share: Share, *, element: int, bucket_bytes: float, place: Place = FIRST
) -> tuple[Message, ...]:
    """A step's gathers and reductions of one rank's parameters, padding included: what apply.py says that buckets and FSDP2
    send, and over how many replicas of a shard.

    Args:
        element: bytes of a parameter in use.
        bucket_bytes: of gradients in one message at ZeRO 0 and 1.
    """
    if strategy.data_parallel_degree == 1:
        return ()
    stage, shards, tensor = strategy.zero_stage, group_size(strategy), strategy.tensor_parallel_degree
    sizes = padded(work, tensor, place.tensor, shards)
    outside = sizes.outside(work, embedding=share.embedding, head=share.head)
    blocks, reduced = share.layers * sizes.block, gradient_element(strategy, element)
    if stage >= 2:  # a unit is a block, or what stands outside the blocks
        count: float = share.layers + bool(outside)
    elif work.native:
        held = share.layers, share.embedding, share.head
        count = num_buckets(work, *held, tensor, place.tensor, bucket_bytes / reduced)
    else:
        count = (blocks + outside) * reduced / bucket_bytes + 1
    scatter, sent = Message("reduce_scatter", "shard", reduced, (blocks + outside) * reduced, count), []
    if shards > 1:
        if gathers(strategy):
            per_block, per_rest = _gathers(strategy)
            num_bytes = (blocks * per_block + outside * per_rest) * element
            sent.append(
                Message("all_gather", "shard", element, num_bytes, share.layers * per_block + bool(outside) * per_rest)
            )
        else:
            sent.append(scatter._replace(kind="all_gather", element=element, num_bytes=(blocks + outside) * element))
        if _reduces_once(strategy):
            sent.append(scatter)
        else:
            times, (number, rest) = strategy.gradient_accumulation_steps, _rest(strategy, share, sizes, outside, work)
            num_bytes = (times * blocks + rest) * reduced
            sent.append(scatter._replace(num_bytes=num_bytes, count=times * share.layers + number))
    if shards < strategy.data_parallel_degree:
        sent.append(scatter._replace(kind="all_reduce", group="replicate", num_bytes=scatter.num_bytes / shards))
    return tuple(message for message in sent if message.count)


def _gathers(strategy: Strategy) -> tuple[int, int]:
    """How often a step gathers (a block, what stands outside the blocks): at stage 3 a block is let go between forward and
    backward, all else when the backward pass ends."""
    if strategy.gather == "per_step":
        return 1, 1
    times = strategy.gradient_accumulation_steps
    return times * (2 if strategy.zero_stage == 3 else 1), times


def _reduces_once(strategy: Strategy) -> bool:
    """Once a step, not with every micro batch."""
    return strategy.zero_stage < 2 or strategy.reduce == "per_step"


def _rest(strategy: Strategy, share: Share, sizes: Sizes, outside: int, work: Workload) -> tuple[int, int]:
    """(messages, elements of all of them) that reduce with every micro batch what stands outside the blocks.

    A rank of a pipeline does so after the backward pass of each stage that has some of it, apart for embedding and head. Where
    replicas of a shard wait for the last micro batch, several stages of a rank would leave them different parts: once."""
    times = strategy.gradient_accumulation_steps
    if strategy.pipeline_parallel_degree > 1 and strategy.num_virtual_stages > 1:
        if group_size(strategy) < strategy.data_parallel_degree:
            return int(outside > 0), outside
        if share.embedding and share.head:
            return 2 * times, times * (sizes.embedding + sizes.head + sizes.table * work.tied_embeddings)
    return times * (outside > 0), times * outside


def gradient_element(strategy: Strategy, element: int) -> int:
    """Bytes of a gradient where it is reduced."""
    return min(4, BYTES[strategy.states][1]) if element <= 4 else element


def norm_message(strategy: Strategy) -> tuple[Message, ...]:
    """Once a step: loss and squared gradient norm, two fp64 numbers, over everybody."""
    return (Message("all_reduce", "world", 8, 16),) if strategy.num_gpus > 1 else ()


def data_parallel_s(strategy: Strategy, links: Links, sent: Sequence[Message]) -> tuple[float, float]:
    """Seconds of `messages`: (all of them, those that no compute hides, however long)."""
    if not sent:
        return 0.0, 0.0
    size, shard, num_gpus = strategy.data_parallel_degree, group_size(strategy), strategy.num_gpus
    stride = strategy.tensor_parallel_degree * strategy.context_parallel_degree
    if strategy.mesh_order[-1] != "tensor" or strategy.mesh_order[1] != "data":
        stride = strategy.degrees.stride("data")
    constants, cpu = links.constants, links.cluster.accelerator.kind == "cpu"
    seconds = bytes_s = copied = 0.0
    for message in sent:
        if message.group == "replicate":
            outer = links.ring(size // shard, stride * shard, num_gpus)
            took = all_reduce_s(outer, message.num_bytes, messages=message.count)
            bytes_s += took
        else:
            inner = links.ring(shard, stride, num_gpus)
            took = half_s(inner, message.num_bytes, messages=message.count, kind=message.kind)
            bytes_s += half_s(inner, message.num_bytes, messages=0, kind=message.kind)
            copied += 2 * message.num_bytes
        seconds += took
    if strategy.zero_stage < 2:
        return seconds, seconds - bytes_s * (0 if cpu else constants.hidden)
    if cpu:
        # Nothing hides, and each unit is copied in before it is scattered and out after it was gathered: read and written.
        seconds += copied / _copy_rate(links.cluster)
        return seconds, seconds
    return seconds, seconds * (1 - constants.hidden_sharded)


def _copy_rate(cluster: Cluster) -> float:
    """Bytes read and written per second by copies into new memory."""
    measured = cluster.calibration.elementwise_bytes_per_s if cluster.calibration else None
    return measured or cluster.accelerator.memory_bytes_per_s
