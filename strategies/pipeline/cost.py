"""Pipeline parallelism, priced: what a pipeline rank holds, micro batches in flight, the bubble, transfers.

Source: GPipe arXiv:1811.06965; 1F1B and interleaving arXiv:2104.04473, section 2.2; zero bubble arXiv:2401.10241."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from strategies.links import Message
from strategies.sizes import FIRST, Place, table
from strategies.strategy import SPLIT_BACKWARD, Schedule, Stage, Strategy
from strategies.workload import Workload

SPLIT_S = 0.01
"""Of a rank's busy time, what it takes longer where backward is split in two passes over the graph. A third of the bubble
alone would make zbv 17 % faster than 1F1B where 16 % was measured (6.2B on 8 x H800, pipeline 8: 55 and 64 samples/s,
sail-sg/zero-bubble-pipeline-parallelism issue 21)."""

READS = (
    *("pipeline_parallel_degree", "pipeline_schedule", "num_virtual_stages", "gradient_accumulation_steps", "stages"),
    *("tensor_parallel_degree", "sequence_parallel", "zero_stage", "zero_group_size"),
)


class Share(NamedTuple):
    """What one pipeline rank holds."""

    layers: int
    checkpointed: int
    embedding: bool
    head: bool


class Shares(NamedTuple):
    """All pipeline ranks' shares."""

    by_rank: tuple[Share, ...]
    distinct: tuple[tuple[Share, int], ...]
    """Each share that differs, and how many ranks hold it."""
    fullest: tuple[int, ...]
    """The ranks that can hold the most: an earlier rank with no smaller share keeps no fewer micro batches in flight."""
    borders: tuple[int, ...]
    """Of each rank: borders of its stages that a micro batch crosses to or from another rank, forward and backward."""
    most_borders: int
    latest: tuple[int, ...]
    """The last rank of each share that differs: where backward passes are split, it waits longest for the weights'."""


_SHARES: dict[int, tuple[tuple[Stage, ...], Shares]] = {}
_MOST_SHARES = 65536


def shares(strategy: Strategy) -> Shares:
    """Cached by the identity of `stages`, which a search hands over again and again (stages.cut keeps them)."""
    stages = strategy.stages
    known = _SHARES.get(id(stages))
    if known is not None and known[0] is stages:
        return known[1]
    if len(_SHARES) >= _MOST_SHARES:
        _SHARES.clear()
    by_rank = tuple(_share(stages, rank) for rank in range(strategy.pipeline_parallel_degree))
    distinct = tuple((share, by_rank.count(share)) for share in dict.fromkeys(by_rank))
    fullest: list[int] = []
    for rank, share in enumerate(by_rank):
        if not any(_covers(by_rank[earlier], share) for earlier in fullest):
            fullest.append(rank)
    borders = _borders(stages, len(by_rank))
    latest = {share: rank for rank, share in enumerate(by_rank)}
    found = Shares(by_rank, distinct, tuple(fullest), borders, max(borders), tuple(latest.values()))
    _SHARES[id(stages)] = stages, found
    return found


def _covers(earlier: Share, later: Share) -> bool:
    """Everything in the later share is in the earlier one too."""
    return (
        earlier.layers - earlier.checkpointed >= later.layers - later.checkpointed
        and earlier.checkpointed >= later.checkpointed
        and earlier.embedding >= later.embedding
        and earlier.head >= later.head
    )


def _share(stages: tuple[Stage, ...], rank: int) -> Share:
    held = [stage for stage in stages if stage.pipeline_rank == rank]
    return Share(
        sum(stage.num_layers for stage in held),
        sum(stage.num_checkpointed_layers for stage in held),
        any(stage.embedding for stage in held),
        any(stage.head for stage in held),
    )


def in_flight(strategy: Strategy, pipeline_rank: int) -> float:
    """Micro batches whose activations a pipeline rank holds at once, counted in whole shares of its layers."""
    degree, micro_batches = strategy.pipeline_parallel_degree, strategy.gradient_accumulation_steps
    if degree == 1:
        return 1.0
    if strategy.pipeline_schedule == "gpipe":
        return float(micro_batches)
    if strategy.pipeline_schedule == "zbv":
        return float(min(micro_batches, degree))
    virtual = strategy.num_virtual_stages
    if virtual == 1:
        return float(min(micro_batches, degree - pipeline_rank))
    warm_up = 2 * (degree - pipeline_rank - 1) + (virtual - 1) * degree + 1
    return min(micro_batches, warm_up / virtual)


def split_flights(strategy: Strategy, pipeline_rank: int) -> tuple[tuple[float, float], ...]:
    """Micro batches that a rank of a split schedule holds at once, in whole shares of its layers: (between forward and
    backward, between the halves of backward), the moments that can be fullest. Under zero-bubble a rank's weights wait for as
    many micro batches as it stands behind the first; under zbv both together are never more than the ranks (held against the
    schedules themselves by a test)."""
    forward, virtual = in_flight(strategy, pipeline_rank), strategy.num_virtual_stages
    if strategy.pipeline_schedule == "zbv":
        return (forward, 0.0), (0.0, forward)
    return (forward, pipeline_rank / virtual), (forward - 1 / virtual, (pipeline_rank + 1) / virtual)


def pending_elements(work: Workload, strategy: Strategy) -> float:
    """Elements a token of one layer between the halves of a split backward pass: inputs of the products and gradients of their
    outputs. Whole ones are whole beside sequence parallelism too, gathered for the pass over the inputs."""
    split = strategy.tensor_parallel_degree
    elements = 0.0
    for matmul in work.matmuls:
        columns = matmul.split == "column"
        elements += matmul.inputs / (1 if columns else split)
        elements += matmul.count * matmul.outputs / (split if columns else 1)
    return elements


def heads_in_flight(strategy: Strategy) -> int:
    """Micro batches whose logits wait at once: each goes backward as soon as it is forward, but in gpipe."""
    piled = strategy.pipeline_parallel_degree > 1 and strategy.pipeline_schedule == "gpipe"
    return strategy.gradient_accumulation_steps if piled else 1


def holds_like(schedule: Schedule, num_virtual_stages: int) -> Schedule:
    """The plainest schedule under which every pipeline rank holds the same."""
    return "1f1b" if schedule == "interleaved_1f1b" and num_virtual_stages == 1 else schedule


def bubble_fraction(strategy: Strategy) -> float:
    """Idle time over busy time: (p - 1) / (m v); about a third of it where weight gradients fill the gaps, which takes longer
    itself."""
    degree = strategy.pipeline_parallel_degree
    fraction = (degree - 1) / (strategy.gradient_accumulation_steps * strategy.num_virtual_stages)
    return fraction / 3 + SPLIT_S if strategy.pipeline_schedule in SPLIT_BACKWARD else fraction


def bubble_s(strategy: Strategy, *, once_s: float, slowest_s: float) -> float:
    """Seconds in which the slowest rank waits for the pipeline to fill and drain: one pass over the other ranks.

    once_s: one micro batch over all ranks, forward and backward; slowest_s: over the slowest. Equal ranks: (p - 1) / (m v)."""
    if strategy.pipeline_parallel_degree == 1:
        return 0.0
    waits = (once_s - slowest_s) / strategy.num_virtual_stages
    if strategy.pipeline_schedule not in SPLIT_BACKWARD:
        return waits
    return waits / 3 + SPLIT_S * slowest_s * strategy.gradient_accumulation_steps


def messages(work: Workload, strategy: Strategy, borders: int, *, tokens: int, element: int) -> tuple[Message, ...]:
    """Activations and their gradients of one micro batch at so many borders of a rank: at each it sends one and receives the
    other. Every tensor rank sends its own copy, split by sequence where the activations are."""
    if not borders:
        return ()
    split = strategy.tensor_parallel_degree if strategy.sequence_parallel else 1
    num_bytes = borders * tokens * work.hidden_size * element / split
    return (
        Message("send", "pipeline", element, num_bytes, borders),
        Message("receive", "pipeline", element, num_bytes, borders),
    )


def shared_message(
    work: Workload, strategy: Strategy, share: Share, *, element: int, place: Place = FIRST
) -> tuple[Message, ...]:
    """Once a step: the gradient of a tied table, added up between the ranks of the first and the last stage, in one message
    of a rank's shard. `element`: bytes of a gradient."""
    tied = work.tied_embeddings and strategy.pipeline_parallel_degree > 1
    if not tied or share.embedding == share.head:
        return ()
    shards = strategy.zero_group_size if strategy.zero_stage else 1
    rows = table(work, strategy.tensor_parallel_degree, shards, place)
    return (Message("all_reduce", "shared", element, rows * element),)


def _borders(stages: tuple[Stage, ...], degree: int) -> tuple[int, ...]:
    """By rank."""
    ranks = [stage.pipeline_rank for stage in sorted(stages, key=lambda stage: stage.stage)]
    touched = Counter(rank for border in pairwise(ranks) if border[0] != border[1] for rank in border)
    return tuple(touched[rank] for rank in range(degree))
