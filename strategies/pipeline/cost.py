"""Pipeline parallelism, priced: what a pipeline rank holds, micro batches in flight, the bubble, transfers.

Source: GPipe arXiv:1811.06965; 1F1B and interleaving arXiv:2104.04473, section 2.2; zero bubble arXiv:2401.10241."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from strategies.links import Message
from strategies.pipeline.schedules import Action, orders
from strategies.sizes import FIRST, Place, table
from strategies.strategy import INTERLEAVED, SPLIT_BACKWARD, Schedule, Stage, Strategy
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
    by_rank = _by_rank(stages, strategy.pipeline_parallel_degree)
    distinct = Counter(by_rank)
    fullest: list[int] = []
    for share in distinct:
        if not any(_covers(by_rank[earlier], share) for earlier in fullest):
            fullest.append(by_rank.index(share))
    borders = _borders(stages, len(by_rank))
    latest = {share: rank for rank, share in enumerate(by_rank)}
    found = Shares(by_rank, tuple(distinct.items()), tuple(fullest), borders, max(borders), tuple(latest.values()))
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


def _by_rank(stages: tuple[Stage, ...], degree: int) -> tuple[Share, ...]:
    layers, checkpointed, embedding, head = [0] * degree, [0] * degree, -1, -1
    for stage in stages:
        rank = stage.pipeline_rank
        layers[rank] += stage.num_layers
        checkpointed[rank] += stage.num_checkpointed_layers
        embedding, head = rank if stage.embedding else embedding, rank if stage.head else head
    return tuple(Share(layers[rank], checkpointed[rank], rank == embedding, rank == head) for rank in range(degree))


def splits(strategy: Strategy) -> bool:
    """Backward passes in two halves."""
    return strategy.pipeline_parallel_degree > 1 and strategy.pipeline_schedule in SPLIT_BACKWARD


def in_flight(strategy: Strategy, pipeline_rank: int) -> float:
    """Micro batches whose activations a pipeline rank holds at once, counted in whole shares of its layers."""
    return in_flight_of(
        strategy.pipeline_schedule,
        strategy.pipeline_parallel_degree,
        strategy.num_virtual_stages,
        strategy.gradient_accumulation_steps,
        pipeline_rank,
    )


def in_flight_of(schedule: Schedule, ranks: int, virtual: int, micro_batches: int, rank: int) -> float:
    """The same of a schedule by itself."""
    if ranks == 1:
        return 1.0
    if schedule == "gpipe":
        return float(micro_batches)
    if schedule == "zbv":
        return float(min(micro_batches, ranks))
    if virtual == 1:
        return float(min(micro_batches, ranks - rank))
    warm_up = 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1
    return min(micro_batches, warm_up / virtual)


def first_in_flight(strategy: Strategy) -> float:
    """Micro batches in flight in the first of the first rank's stages, which is ahead of its others where they take turns, and
    the one that comes next."""
    ranks, virtual = strategy.pipeline_parallel_degree, strategy.num_virtual_stages
    flights = in_flight(strategy, 0)
    if ranks == 1 or strategy.pipeline_schedule not in INTERLEAVED:
        return flights
    rounds, rest = divmod(round(flights * virtual), ranks * virtual)
    return min(strategy.gradient_accumulation_steps, rounds * ranks + min(rest, ranks) + 1)


class State(NamedTuple):
    """What a pipeline rank keeps, in whole shares of its layers."""

    forward: float
    """Micro batches between forward and backward."""
    inputs: float
    """And between the halves of a split backward pass."""
    gradients: float
    """Part of its stages that have had gradients of weights in this step."""


class States(NamedTuple):
    """Those that can be the fullest, whatever each part weighs."""

    begin: tuple[State, ...]
    """As a backward pass begins; of a split one, the half over the inputs."""
    end: tuple[State, ...]
    """As one ends; of a split one, the half over the weights."""
    head: tuple[State, ...]
    """As the head's begins."""
    forward: tuple[State, ...]
    """As a forward pass ends."""


PLAYED = 4
"""Ranks up to which zbv, which has no closed form, is read off its schedule; of more, one stage weighs little."""


def states(strategy: Strategy, pipeline_rank: int) -> States:
    """Held against the schedules by a test. With equal states 1F1B, interleaved or not, and gpipe are exact, as is zero-bubble;
    zbv is on few ranks, a bound on more."""
    return _states(
        strategy.pipeline_schedule,
        strategy.pipeline_parallel_degree,
        strategy.num_virtual_stages,
        strategy.gradient_accumulation_steps,
        pipeline_rank,
    )


@lru_cache(maxsize=65536)
def _states(schedule: Schedule, ranks: int, virtual: int, micro_batches: int, rank: int) -> States:
    flights = in_flight_of(schedule, ranks, virtual, micro_batches, rank)
    if schedule == "zbv" and ranks > 1:
        if ranks <= PLAYED:
            return _played(orders(schedule, ranks, virtual, min(micro_batches, 3 * ranks))[rank], virtual, 2 * ranks)
        return _folded(ranks, micro_batches, rank, flights)
    # Passes in the order of backward: the last that a forward pass comes before, and those whose weights are through by then.
    stage, last, lag = 1 / virtual, 0, 0
    if ranks > 1 and schedule != "gpipe":
        last = max(0, round((micro_batches - flights) * virtual))
        lag = rank if schedule in SPLIT_BACKWARD else 0
    waiting, through = min(lag, last) * stage, max(0, last - lag)
    had = min(virtual, -(-through // ranks))
    full = State(flights, waiting, had * stage)
    # Each further stage brings its gradients with its first pass; no forward pass comes in between. On a straight line: its ends.
    later = [
        State(flights - (max(0, number * ranks - through) + 1) * stage, waiting, (number + 1) * stage)
        for number in sorted({min(had, through // ranks, virtual - 1), min(had, virtual - 1), virtual - 1})
    ]
    first = [state for state in later if state.gradients == stage and state.forward > 0.0]
    return States(
        (full, *(state for state in later if state.forward > 0.0)),
        tuple(state._replace(forward=max(0.0, state.forward)) for state in later),
        (full, *first),
        (full,),
    )


def _played(actions: tuple[Action, ...], virtual: int, num_stages: int) -> States:
    begin, end, head, ahead = (dict[State, None]() for _ in range(4))
    forward = inputs = 0
    had = set[int]()

    def now() -> State:
        return State(forward / virtual, inputs / virtual, len(had) / virtual)

    for kind, stage, _ in actions:
        if kind == "forward":
            forward += 1
            ahead[now()] = None
        elif kind == "inputs":
            begin[now()] = None
            if stage == num_stages - 1:
                head[now()] = None
            forward, inputs = forward - 1, inputs + 1
        else:
            inputs -= 1
            had.add(stage)
            end[now()] = None
    fullest = _fullest(begin)
    return States(fullest, _fullest(end), _fullest(head) or fullest, _fullest(ahead))


def _fullest(states: Iterable[State]) -> tuple[State, ...]:
    """Those that no other covers."""
    known = tuple(states)
    return tuple(
        one
        for one in known
        if not any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in known)
    )


def _folded(ranks: int, micro_batches: int, rank: int, flights: float) -> States:
    """zbv on many ranks: both halves together are never more than the ranks; the most that wait for weights is a bound."""
    if micro_batches < ranks:
        waits = max(micro_batches - 1 - rank, 2 * micro_batches - ranks + rank)
    else:
        waits = max(ranks - 1 + (2 * rank + 1) // 3, 2 * ranks - micro_batches + rank)
    most = min(flights, (micro_batches + rank + 1) / 2)
    halves = (most, flights - most), (flights - waits / 2, waits / 2)
    # Of no more micro batches than ranks nothing has gone back to the weights while all are held.
    begin = tuple(State(forward, inputs, float(micro_batches > ranks)) for forward, inputs in halves)
    end = tuple(State(max(0.0, forward - 0.5), inputs, 1.0) for forward, inputs in halves)
    end = (*end, State(0.0, max(0.0, flights - 1.0), 1.0))
    if micro_batches <= ranks:
        begin = (*begin, *(state for state in end if state.forward))
    return States(begin, end, begin, begin)


def kept_sends(strategy: Strategy, pipeline_rank: int) -> tuple[int, int]:
    """Activations and gradients that a rank has sent and does not yet know as received (schedules.received): (as a forward pass
    ends, as a backward pass begins) while it holds the most micro batches. Bounds, held against the schedules by a test."""
    degree, micro_batches = strategy.pipeline_parallel_degree, strategy.gradient_accumulation_steps
    if degree == 1:
        return 0, 0
    behind, schedule = degree - 1 - pipeline_rank, strategy.pipeline_schedule
    inside = behind > 0 and pipeline_rank > 0
    if schedule == "zbv":
        most = min(micro_batches - 1, min(degree, 6) if inside else 2)
        return most, most
    # gpipe's have been received by then, but that no schedule holds less than 1F1B is what a search knows.
    most = 1 + inside
    if strategy.num_virtual_stages == 1:
        ahead = micro_batches * (behind > 0) if schedule == "gpipe" else behind
    else:
        ahead = max(degree - 1, 2 * behind)
        often = 4 if micro_batches > degree else min(4, 2 * pipeline_rank - degree + 3)
        most = max(most, min(often, degree + 1), 0 if behind or schedule in SPLIT_BACKWARD else degree - 1)
    most = min(most, micro_batches - 1)
    return max(most, min(ahead, micro_batches - 1)), most


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


def bubble_fraction(schedule: Schedule, ranks: int, virtual: int, micro_batches: int) -> float:
    """Idle time over busy time where the ranks are equal: (p - 1) / (m v); about a third of it where weight gradients fill the
    gaps, which takes longer itself."""
    if ranks == 1:
        return 0.0
    fraction = (ranks - 1) / (micro_batches * virtual)
    return fraction / 3 + SPLIT_S if schedule in SPLIT_BACKWARD else fraction


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
    ranks = [stage.pipeline_rank for stage in stages]
    touched = Counter(rank for border in pairwise(ranks) if border[0] != border[1] for rank in border)
    return tuple(touched[rank] for rank in range(degree))
