"""The messages of one step as one rank takes part in them: by kind, group and dtype, to the byte. Pure.

The same cost doors that step_time.py turns into seconds, folded over a step instead. Everything that a session's `step` sends
is in it; what the training loop sends beside (votes on stopping, checkpoints, evaluation) goes over groups of its own and is
not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from strategies.engines.engine import BUCKET_BYTES
from strategies.links import Group, Kind, Message
from strategies.pipeline import cost as pipeline
from strategies.price.roofline import ELEMENT
from strategies.sizes import FIRST, Place
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero


class Line(NamedTuple):
    count: int  # type: ignore[assignment]
    num_bytes: int


Ledger = dict[tuple[Kind, Group, str], Line]
"""(kind, group, dtype) -> all such messages. A group that spans the world is called `world`, whatever it is for."""


def ledger(
    work: Workload,
    strategy: Strategy,
    *,
    sequence_length: int,
    precision: str,
    pipeline_rank: int = 0,
    place: Place = FIRST,
    bucket_bytes: int = BUCKET_BYTES,
) -> Ledger:
    """Of one rank of a job on the native engine. `bucket_bytes`: as its session was built with."""
    total: dict[tuple[Kind, Group, str], list[float]] = {}
    for message in _messages(work, strategy, sequence_length, ELEMENT[precision], pipeline_rank, place, bucket_bytes):
        key = message.kind, _group(strategy, message), _dtype(message.element, precision)
        line = total.setdefault(key, [0, 0])
        line[0] += message.count
        line[1] += message.num_bytes
    return {key: Line(round(count), round(num_bytes)) for key, (count, num_bytes) in sorted(total.items())}


def _messages(
    work: Workload,
    strategy: Strategy,
    sequence_length: int,
    element: int,
    pipeline_rank: int,
    place: Place,
    bucket_bytes: int,
) -> Iterable[Message]:
    shares = pipeline.shares(strategy)
    share, times = shares.by_rank[pipeline_rank], strategy.gradient_accumulation_steps
    shape = {"tokens": strategy.micro_batch_size * sequence_length, "element": element}
    talk = tensor.messages(work, strategy, **shape)
    counts = share.layers, share.checkpointed, int(share.embedding), int(share.head)
    for part, number in zip(talk, counts, strict=True):
        yield from (message.times(number * times) for message in part if number)
    borders = shares.borders[pipeline_rank]
    yield from (message.times(times) for message in pipeline.messages(work, strategy, borders, **shape))
    yield from zero.messages(work, strategy, share, element=element, bucket_bytes=bucket_bytes, place=place)
    reduced = zero.gradient_element(strategy, element)
    yield from tensor.gradient_message(work, strategy, share, element=reduced, place=place)
    yield from pipeline.shared_message(work, strategy, share, element=reduced, place=place)
    yield from zero.norm_message(strategy)


def _group(strategy: Strategy, message: Message) -> Group:
    shards = zero.group_size(strategy)
    size = {
        "tensor": strategy.tensor_parallel_degree,
        "shard": shards,
        "replicate": strategy.data_parallel_degree // shards,
        "pipeline": strategy.pipeline_parallel_degree,
    }.get(message.group)
    return "world" if size == strategy.num_gpus else message.group


def _dtype(element: int, precision: str) -> str:
    return {4: "fp32", 8: "fp64"}.get(element, precision)
