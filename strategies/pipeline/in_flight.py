"""Micro batches in flight: what a pipeline rank keeps of them at each moment of a step, in whole shares of its layers. Pure.

Source: GPipe arXiv:1811.06965; 1F1B and interleaving arXiv:2104.04473, section 2.2; zero bubble arXiv:2401.10241. Closed forms,
held against the schedules of schedules.py by a test."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from strategies.pipeline.schedules import Action, orders
from strategies.rank import InFlight, InFlightMaxima
from strategies.strategy import INTERLEAVED, SPLIT_BACKWARD, Schedule, Strategy


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


PLAYED = 4
"""Ranks up to which zbv, which has no closed form, is read off its schedule; of more, one stage weighs little."""


def states(strategy: Strategy, pipeline_rank: int) -> InFlightMaxima:
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
def _states(schedule: Schedule, ranks: int, virtual: int, micro_batches: int, rank: int) -> InFlightMaxima:
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
    full = InFlight(flights, waiting, had * stage)
    # Each further stage brings its gradients with its first pass; no forward pass comes in between. On a straight line: its ends.
    later = [
        InFlight(flights - (max(0, number * ranks - through) + 1) * stage, waiting, (number + 1) * stage)
        for number in sorted({min(had, through // ranks, virtual - 1), min(had, virtual - 1), virtual - 1})
    ]
    first = [state for state in later if state.gradients == stage and state.forward > 0.0]
    return InFlightMaxima(
        (full, *(state for state in later if state.forward > 0.0)),
        tuple(state._replace(forward=max(0.0, state.forward)) for state in later),
        (full, *first),
        (full,),
    )


def _played(actions: tuple[Action, ...], virtual: int, num_stages: int) -> InFlightMaxima:
    begin, end, head, ahead = (dict[InFlight, None]() for _ in range(4))
    forward = inputs = 0
    had = set[int]()

    def now() -> InFlight:
        return InFlight(forward / virtual, inputs / virtual, len(had) / virtual)

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
    return InFlightMaxima(fullest, _fullest(end), _fullest(head) or fullest, _fullest(ahead))


def _fullest(states: Iterable[InFlight]) -> tuple[InFlight, ...]:
    """Return the moments that no other covers."""
    known = tuple(states)
    return tuple(
        one
        for one in known
        if not any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in known)
    )


def _folded(ranks: int, micro_batches: int, rank: int, flights: float) -> InFlightMaxima:
    """zbv on many ranks: both halves together are never more than the ranks; the most that wait for weights is a bound."""
    if micro_batches < ranks:
        waits = max(micro_batches - 1 - rank, 2 * micro_batches - ranks + rank)
    else:
        waits = max(ranks - 1 + (2 * rank + 1) // 3, 2 * ranks - micro_batches + rank)
    most = min(flights, (micro_batches + rank + 1) / 2)
    halves = (most, flights - most), (flights - waits / 2, waits / 2)
    # Of no more micro batches than ranks nothing has gone back to the weights while all are held.
    begin = tuple(InFlight(forward, inputs, float(micro_batches > ranks)) for forward, inputs in halves)
    end = tuple(InFlight(max(0.0, forward - 0.5), inputs, 1.0) for forward, inputs in halves)
    end = (*end, InFlight(0.0, max(0.0, flights - 1.0), 1.0))
    if micro_batches <= ranks:
        begin = (*begin, *(state for state in end if state.forward))
    return InFlightMaxima(begin, end, begin, begin)


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
    most = 0 if schedule == "gpipe" else 1 + inside  # gpipe's have been received by then
    if strategy.num_virtual_stages == 1:
        ahead = micro_batches * (behind > 0) if schedule == "gpipe" else behind
    else:
        ahead = max(degree - 1, 2 * behind)
        often = 4 if micro_batches > degree else min(4, 2 * pipeline_rank - degree + 3)
        most = max(most, min(often, degree + 1), 0 if behind or schedule in SPLIT_BACKWARD else degree - 1)
    most = min(most, micro_batches - 1)
    return max(most, min(ahead, micro_batches - 1)), most


def heads_in_flight(strategy: Strategy) -> int:
    """Micro batches whose logits wait at once: each goes backward as soon as it is forward, but in gpipe."""
    piled = strategy.pipeline_parallel_degree > 1 and strategy.pipeline_schedule == "gpipe"
    return strategy.gradient_accumulation_steps if piled else 1


def holds_like(schedule: Schedule, num_virtual_stages: int) -> Schedule:
    """The plainest schedule under which every pipeline rank holds the same."""
    return "1f1b" if schedule == "interleaved_1f1b" and num_virtual_stages == 1 else schedule
