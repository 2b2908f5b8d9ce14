"""Elements of the parameters that a rank holds, to the last one: cut by tensor parallelism, then dealt row by row to the ranks
of a ZeRO group. Pure.

Both cut as torch.chunk does: the first ranks have ceil(rows / ranks), the last what is left, which may be nothing. A message
of shards is padded to the first ranks' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from strategies.workload import Tensor, Workload


class GroupRanks(NamedTuple):
    """The places of a rank in its groups; the first of each holds the most."""

    tensor: int = 0
    shard: int = 0


FIRST = GroupRanks()


class Sizes(NamedTuple):
    """Elements by part of the model."""

    embedding: int
    block: int
    """One of them."""
    head: int
    table: int
    """The rows of tokens alone, which a tied head holds again where it stands on another pipeline rank."""

    def held(self, work: Workload, *, layers: int, embedding: bool, head: bool) -> int:
        return layers * self.block + self.outside(work, embedding=embedding, head=head)

    def outside(self, work: Workload, *, embedding: bool, head: bool) -> int:
        """Return the elements beside the blocks."""
        copied = self.table if head and not embedding and work.tied_embeddings else 0
        return self.embedding * embedding + self.head * head + copied


def part(tensor: Tensor, size: int, rank: int) -> Tensor:
    """Return what a rank of a tensor group has of a parameter."""
    if tensor.split == "row":
        return tensor._replace(width=_chunk(tensor.width, size, rank))
    if tensor.split in ("column", "vocabulary", "sequence"):
        return tensor._replace(rows=_chunk(tensor.rows, size, rank))
    return tensor


@lru_cache(maxsize=65536)
def padded(work: Workload, tensor: int, rank: int, shards: int) -> Sizes:
    """Return the elements of all shards of a tensor rank's part together, each as large as the first."""
    return _sizes(work, tensor, rank, lambda t: -(-t.rows // shards) * shards * t.width)


@lru_cache(maxsize=65536)
def partial(work: Workload, tensor: int, shards: int, shard: int, sequence_parallel: bool) -> Sizes:
    """Return the elements of one shard, unpadded, of parameters that stand whole on each tensor rank, each of which has a part
    of their gradient."""
    kinds = ("replicated", "replicated_partial") if sequence_parallel else ("replicated_partial",)
    return _sizes(work, tensor, 0, lambda t: _chunk(t.rows, shards, shard) * t.width if t.split in kinds else 0)


def table(work: Workload, tensor: int, shards: int, ranks: GroupRanks) -> int:
    """Return the elements of one shard of the table of tokens, unpadded."""
    mine = part(work.embedding_tensors[0], tensor, ranks.tensor)
    return _chunk(mine.rows, shards, ranks.shard) * mine.width


@lru_cache(maxsize=65536)
def num_buckets(
    work: Workload, layers: int, embedding: bool, head: bool, tensor: int, rank: int, bucket_elements: float
) -> int:
    """Flat buckets of the native engine's ZeRO 0 and 1: parameters from last to first, in as few as hold so many elements
    each, or one larger parameter (strategies/zero/buckets.py lays them out)."""
    outside = (
        work.embedding_tensors if embedding else work.embedding_tensors[:1] if head and work.tied_embeddings else ()
    )

    def backwards(tensors: tuple[Tensor, ...]) -> list[int]:
        return [part(each, tensor, rank).num_elements for each in reversed(tensors)]

    number, room = 0, 0.0
    for elements in backwards(work.head_tensors) * head + backwards(work.block_tensors) * layers + backwards(outside):
        if elements > room:
            number, room = number + 1, bucket_elements
        room -= elements
    return number


def _sizes(work: Workload, tensor: int, rank: int, count: Callable[[Tensor], int]) -> Sizes:
    def total(tensors: Iterable[Tensor]) -> int:
        return sum(count(part(each, tensor, rank)) for each in tensors)

    return Sizes(
        total(work.embedding_tensors),
        total(work.block_tensors),
        total(work.head_tensors),
        total(work.embedding_tensors[:1]),
    )


def _chunk(whole: int, parts: int, index: int) -> int:
    step = -(-whole // parts)
    return min((index + 1) * step, whole) - min(index * step, whole)
