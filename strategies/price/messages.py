"""The messages of one step as one rank takes part in them: by kind, group and dtype, to the byte. Pure.

The same cost doors that step_time.py turns into seconds, folded over a step instead. Everything that a session's `step` sends
is in it; what the training loop sends beside (votes on stopping, checkpoints, evaluation) goes over groups of its own and is
not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from strategies.constants import MEMORY
from strategies.engines.engine import BUCKET_BYTES
from strategies.links import BETWEEN_TWO, Group, Kind, Message
from strategies.price.rank_memory import RankMemory, rank_memory
from strategies.rooms import having
from strategies.shares import shares
from strategies.sizes import FIRST, GroupRanks
from strategies.strategy import Strategy
from strategies.workload import Workload


class Line(NamedTuple):
    """All messages of one kind, group and dtype in a step."""

    count: int  # type: ignore[assignment]
    num_bytes: int


Ledger = dict[tuple[Kind, Group, str], Line]
"""(kind, group, dtype) -> all such messages. A group that spans the world is called `world`, whatever it is for, unless
its messages go between two ranks."""


def ledger(
    work: Workload,
    strategy: Strategy,
    *,
    sequence_length: int,
    precision: str,
    pipeline_rank: int = 0,
    ranks: GroupRanks = FIRST,
    bucket_bytes: int = BUCKET_BYTES,
) -> Ledger:
    """Return the messages of one rank of a job on the native engine. `bucket_bytes`: as its session was built with."""
    memory = rank_memory(work, precision, sequence_length, MEMORY)
    total: dict[tuple[Kind, Group, str], list[float]] = {}
    for message in _messages(memory, strategy, pipeline_rank, ranks, bucket_bytes):
        key = message.kind, _group(strategy, message), _dtype(message.element, precision)
        line = total.setdefault(key, [0, 0])
        line[0] += message.count
        line[1] += message.num_bytes
    return {key: Line(round(count), round(num_bytes)) for key, (count, num_bytes) in sorted(total.items())}


def _messages(
    memory: RankMemory, strategy: Strategy, pipeline_rank: int, ranks: GroupRanks, bucket_bytes: int
) -> Iterable[Message]:
    held = shares(strategy)
    share, borders, shape = held.by_rank[pipeline_rank], held.borders[pipeline_rank], memory.shape(strategy)
    for room in having("messages"):
        yield from room.messages(
            memory.question, strategy, shape, share, borders=borders, ranks=ranks, bucket_bytes=bucket_bytes
        )


def _group(strategy: Strategy, message: Message) -> Group:
    spans = message.group not in BETWEEN_TWO and strategy.group_size(message.group) == strategy.num_gpus
    return "world" if spans else message.group


def _dtype(element: int, precision: str) -> str:
    return {4: "fp32", 8: "fp64"}.get(element, precision)
