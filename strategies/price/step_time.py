"""Seconds of one step by component: the fold of the rooms' cost doors over the slowest pipeline rank.

step_s = compute + recompute + tensor_parallel + context_parallel + data_parallel_exposed + pipeline_bubble
+ pipeline_transfer + offload + optimizer. The terms and their sources: docs/explanation/time-model.md.

For a search, all else equal: a step takes at least (micro batches) x (compute of one on the slowest rank) and the bubble of
the others; compute_s and tensor_parallel_s of one pipeline rank are proportional to gradient_accumulation_steps; sharding (ZeRO,
data parallelism), offload and recomputing only add; more checkpointed layers never take less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, TypedDict

from clusters.cluster import Cluster
from strategies.constants import MEMORY, TIME, TimeConstants
from strategies.model.cost import stepped_parameters
from strategies.price.memory import MemoryPrice, price_memory
from strategies.price.rank_memory import RankMemory, rank_memory
from strategies.price.roofline import Roofline, roofline
from strategies.rank import Hideable, OnceSeconds, PassSeconds, Shape, Share, SlowestRank
from strategies.rooms import having, read_by
from strategies.shares import shares
from strategies.strategy import Strategy
from strategies.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class TimePrice:
    """Seconds of one optimizer step, by component; names are those of the plan's JSON."""

    step_s: float
    compute_s: float
    recompute_s: float
    tensor_parallel_s: float
    context_parallel_s: float
    data_parallel_s: float
    data_parallel_exposed_s: float
    pipeline_bubble_s: float
    pipeline_transfer_s: float
    offload_s: float
    optimizer_s: float


class Job(TypedDict):
    """The job's part of a price: batch, length, precision."""

    global_batch_size: int
    sequence_length: int
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """The price of a strategy: bytes and seconds."""

    memory: MemoryPrice
    time: TimePrice


def price(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
) -> Price:
    """Memory and time of one strategy whose `stages` are set, fit or not. `global_batch_size` is the whole step's."""
    job = Job(global_batch_size=global_batch_size, sequence_length=sequence_length, precision=precision)
    return Price(memory=price_memory(work, strategy, cluster, **job), time=price_time(work, strategy, cluster, **job))


def price_time(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
    constants: TimeConstants = TIME,
) -> TimePrice:
    """Time of one step. Every replica runs gradient_accumulation_steps micro batches, full or not."""
    return step_time(roofline(work, cluster, precision, constants), strategy, sequence_length)


_PASS, _ONCE, _UPDATE, _STEP = (having(door) for door in ("pass_s", "once_s", "update_s", "step_s"))
_pass_key, _once_key = read_by("shape", "pass_s"), read_by("shape", "once_s")
HIDDEN_TERM = "data_parallel_s"
"""The term of a step that is no part of its sum: what is exposed of it is."""


class Passes(NamedTuple):
    """Seconds of one micro batch, forward and backward, by room; and of all of them together."""

    parts: tuple[PassSeconds, ...]
    whole: PassSeconds


def step_time(roof: Roofline, strategy: Strategy, sequence_length: int) -> TimePrice:
    """Return the seconds of a step on a roofline in hand; benchmarks.oracle fits the constants through it."""
    memory = rank_memory(roof.work, roof.precision, sequence_length, MEMORY)
    shape, times, held = memory.shape(strategy), strategy.gradient_accumulation_steps, shares(strategy)
    found = passes(roof, memory, strategy)
    whole, all_ranks_s, slowest_s, slowest = found.whole, 0.0, -1.0, held.by_rank[0]
    for share, count in held.distinct:
        seconds = whole.of(share)
        all_ranks_s += seconds * count
        if seconds > slowest_s:
            slowest_s, slowest = seconds, share
    saved = memory.micro(strategy).of(slowest) if strategy.offload.activations != "none" else 0.0
    again_s = sum(part.of(slowest) for part in found.parts if part.term == "recompute_s")
    rank = SlowestRank(slowest, slowest_s, all_ranks_s, held.most_borders, held.by_rank[0], saved, again_s)
    terms = dict.fromkeys(_TERMS, 0.0)
    for part in found.parts:
        terms[part.term] += times * part.of(slowest)
    once = once_s(roof, memory, strategy, slowest, is_pipelined=len(held.by_rank) > 1)
    terms[HIDDEN_TERM] = once.seconds
    terms["data_parallel_exposed_s"] = once.exposed_beside(slowest_s)
    _add(terms, update_s(roof, memory, strategy, slowest, is_pipelined=len(held.by_rank) > 1))
    for room in _STEP:
        _add(terms, room.step_s(roof, memory.question, strategy, shape, rank))
    return TimePrice(step_s=sum(terms.values()) - terms[HIDDEN_TERM], **terms)


_TERMS = tuple(field.name for field in fields(TimePrice) if field.name != "step_s")


def _add(terms: dict[str, float], more: Mapping[str, float]) -> None:
    for name, seconds in more.items():
        terms[name] += seconds


def passes(roof: Roofline, memory: RankMemory, strategy: Strategy) -> Passes:
    """Return the seconds of one micro batch by room."""
    key = "pass_s", memory.question.sequence_length, _pass_key(strategy)
    known: Passes | None = roof.memo.get(key)
    if known is None:
        shape = memory.shape(strategy)
        parts = tuple(part for room in _PASS for part in room.pass_s(roof, memory.question, strategy, shape))
        sums = (sum(numbers) for numbers in zip(*(part[1:] for part in parts), strict=True))
        known = roof.memo[key] = Passes(parts, PassSeconds("", *sums))
    return known


def once_s(
    roof: Roofline, memory: RankMemory, strategy: Strategy, slowest: Share, *, is_pipelined: bool
) -> OnceSeconds:
    """Return the seconds of what is sent once a step, or for the sake of ZeRO, by the rank that sends the most of it."""
    # The first stage's reduction is as late as anybody's.
    embedding = slowest.embedding or (is_pipelined and not slowest.head)
    key = "once_s", slowest.layers, embedding, slowest.head, slowest.stages > 1, _once_key(strategy)
    known: OnceSeconds | None = roof.memo.get(key)
    if known is None:
        known = roof.memo[key] = sent_s(roof, memory, strategy, slowest._replace(embedding=embedding))
    return known


def sent_s(roof: Roofline, memory: RankMemory, strategy: Strategy, share: Share) -> OnceSeconds:
    """Return the seconds of what one rank sends once a step, or for the sake of ZeRO."""
    shape, seconds, exposed_s, hideable = memory.shape(strategy), 0.0, 0.0, tuple[Hideable, ...]()
    for room in _ONCE:
        more = room.once_s(roof, memory.question, strategy, shape, share)
        seconds, exposed_s = seconds + more.seconds, exposed_s + more.exposed_s
        hideable += more.hideable
    return OnceSeconds(seconds, exposed_s, hideable)


def update_s(
    roof: Roofline, memory: RankMemory, strategy: Strategy, share: Share, *, is_pipelined: bool
) -> dict[str, float]:
    """Return the seconds of the optimizer's step on the slowest rank, and of what offload adds to it."""
    shape = memory.shape(strategy)
    parameters = stepped_parameters(roof.work, shape.split, share, is_pipelined=is_pipelined)
    return stepping_s(roof, memory, strategy, shape, parameters)


def stepping_s(
    roof: Roofline, memory: RankMemory, strategy: Strategy, shape: Shape, parameters: float
) -> dict[str, float]:
    """Return the seconds in which so many parameters are stepped, dealt out evenly, by component."""
    states = memory.evenly(strategy, shape, parameters)
    terms: dict[str, float] = {}
    for room in _UPDATE:
        for name, seconds in room.update_s(roof, strategy, states).items():
            terms[name] = terms.get(name, 0.0) + seconds
    return terms
