"""Schedules: which pass of which micro batch a pipeline rank runs next. Pure: lists of actions, no torch.

Sources: GPipe arXiv:1811.06965; 1F1B and interleaving arXiv:2104.04473, section 2.2; zero bubble arXiv:2401.10241 (ZB-H1);
ZBV arXiv:2405.15362. p pipeline ranks, v stages a rank, m micro batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from strategies.strategy import Schedule

Pass = Literal["forward", "backward", "inputs", "weights"]
"""backward is the whole of it; inputs and weights are its two halves."""


class Action(NamedTuple):
    kind: Pass
    stage: int
    """Number of the stage, in model order."""
    micro_batch: int


def stage_rank(schedule: Schedule, num_ranks: int, num_stages: int, stage: int) -> int:
    """zbv folds the stages back over the ranks, the others deal them round and round."""
    return min(stage, num_stages - 1 - stage) if schedule == "zbv" else stage % num_ranks


@lru_cache(maxsize=64)
def orders(
    schedule: Schedule, num_ranks: int, num_virtual: int, num_micro_batches: int
) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank, in order. ValueError where the micro batches do not fill whole rounds of an interleaved one."""
    p, v, m = num_ranks, num_virtual, num_micro_batches
    if schedule == "gpipe":
        return tuple(_gpipe(rank, m) for rank in range(p))
    if schedule == "zbv":
        return _folded(p, m)
    split = schedule == "interleaved_zero_bubble"
    if v > 1 and m % p:
        raise ValueError(
            f"{schedule} over {v} virtual stages runs micro batches in whole rounds of the pipeline: {m} is no multiple of {p}"
        )
    return tuple(_one_forward_one_backward(rank, p, v, m, split=split) for rank in range(p))


@lru_cache(maxsize=64)
def received(
    schedule: Schedule, num_ranks: int, num_virtual: int, num_micro_batches: int, rank: int
) -> dict[Action, tuple[Action, ...]]:
    """Pass of a rank -> what the rank sent, named by the pass it is for, and knows as received when that pass has its input.

    The input has come through other passes of its micro batch. The rank that ran one of them has run those in front of it too,
    and received what they were for."""
    everyone = orders(schedule, num_ranks, num_virtual, num_micro_batches)
    num_stages = num_ranks * num_virtual
    place = {action: index for actions in everyone for index, action in enumerate(actions)}
    ranks = [stage_rank(schedule, num_ranks, num_stages, stage) for stage in range(num_stages)]
    sent: list[Action] = []
    result = {}
    for action in everyone[rank]:
        reached = [-1] * num_ranks
        for before in _passed(action, num_stages):
            reached[ranks[before.stage]] = max(reached[ranks[before.stage]], place[before])
        known = [message for message in sent if place[message] <= reached[ranks[message.stage]]]
        if known:
            result[action] = tuple(known)
            sent = [message for message in sent if message not in known]
        kind, stage, micro_batch = action
        following = stage + (1 if kind == "forward" else -1)
        if kind != "weights" and 0 <= following < num_stages and ranks[following] != rank:
            sent.append(Action(kind, following, micro_batch))
    return result


def _passed(action: Action, num_stages: int) -> Iterator[Action]:
    """Yield what a micro batch has been through before a pass that takes something in."""
    kind, stage, i = action
    forwards = {"forward": stage, "weights": 0}.get(kind, num_stages)
    yield from (Action("forward", before, i) for before in range(forwards))
    if kind in ("backward", "inputs"):
        yield from (Action(kind, before, i) for before in range(stage + 1, num_stages))


def _gpipe(rank: int, m: int) -> tuple[Action, ...]:
    return (
        *(Action("forward", rank, i) for i in range(m)),
        *(Action("backward", rank, i) for i in range(m)),
    )


def _one_forward_one_backward(rank: int, p: int, v: int, m: int, *, split: bool) -> tuple[Action, ...]:
    """Megatron's order: warm up, then one forward and one backward in turn. Split: a rank lags with the weights by as many
    passes as it would otherwise wait at the end, so that no more is kept than unsplit."""
    forwards = [Action("forward", _chunk(i, p, v) * p + rank, _batch(i, p, v)) for i in range(m * v)]
    kind: Pass = "inputs" if split else "backward"
    backwards = [Action(kind, (v - 1 - _chunk(i, p, v)) * p + rank, _batch(i, p, v)) for i in range(m * v)]
    warm_up = min(m * v, p - 1 - rank if v == 1 else 2 * (p - 1 - rank) + (v - 1) * p)
    result, waiting = forwards[:warm_up], list[Action]()
    for index, backward in enumerate(backwards):
        if warm_up + index < m * v:
            result.append(forwards[warm_up + index])
        result.append(backward)
        if split:
            waiting.append(Action("weights", backward.stage, backward.micro_batch))
            draining = warm_up + index + 1 >= m * v
            if len(waiting) > (0 if draining else rank):
                result.append(waiting.pop(0))
    return (*result, *waiting)


def _chunk(i: int, p: int, v: int) -> int:
    return i // p % v if v > 1 else 0


def _batch(i: int, p: int, v: int) -> int:
    return i // (p * v) * p + i % p if v > 1 else i


def _folded(p: int, m: int) -> tuple[tuple[Action, ...], ...]:
    """ZBV by list scheduling: passes of one time unit, each rank takes the most urgent that is ready: inputs' gradients, then
    the second stage's forward, then the first's, and weights' gradients where nothing else can run. A rank keeps at most
    2 p halves (as 1F1B's first rank does), one of them for the second stage, without which nothing would be freed."""
    num_stages = 2 * p
    done: dict[Action, int] = {}
    ready: dict[tuple[Pass, int], int] = defaultdict(int)  # the next micro batch of a pass of a stage
    result: list[list[Action]] = [[] for _ in range(p)]
    kept = [0] * p
    total = 3 * num_stages * m
    now = 0
    while sum(map(len, result)) < total:
        chosen: list[Action] = []
        for rank in range(p):
            action = _most_urgent(rank, p, m, done, ready, kept[rank], now)
            if action is not None:
                chosen.append(action)
                result[rank].append(action)
                ready[action.kind, action.stage] += 1
                kept[rank] += {"forward": 1, "weights": -1}.get(action.kind, 0)
        now += 1
        done.update(dict.fromkeys(chosen, now))
        assert chosen or now <= 3 * total, "a schedule that cannot go on"
    return tuple(map(tuple, result))


def _most_urgent(
    rank: int, p: int, m: int, done: dict[Action, int], ready: dict[tuple[Pass, int], int], kept: int, now: int
) -> Action | None:
    first, second = rank, 2 * p - 1 - rank
    candidates: Sequence[tuple[Pass, int, int]] = (
        ("inputs", second, 2 * p + 1),
        ("inputs", first, 2 * p + 1),
        ("forward", second, 2 * p),
        ("forward", first, 2 * p - 1),
        ("weights", first, 2 * p + 1),
        ("weights", second, 2 * p + 1),
    )
    for kind, stage, room in candidates:
        action = Action(kind, stage, ready[kind, stage])
        if kept >= room or action.micro_batch == m:
            continue
        if all(done.get(need, now + 1) <= now for need in needs(action, 2 * p)):
            return action
    return None


def needs(action: Action, num_stages: int) -> tuple[Action, ...]:
    """Return what must have run, on whichever rank, before a pass whose schedule splits the backward pass."""
    kind, stage, i = action
    if kind == "forward":
        return (Action("forward", stage - 1, i),) if stage else ()
    if kind == "weights":
        return (Action("inputs", stage, i),)
    after = (Action(kind, stage + 1, i),) if stage + 1 < num_stages else ()
    return (Action("forward", stage, i), *after)
