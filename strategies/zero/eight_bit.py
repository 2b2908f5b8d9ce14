"""Which parameters have 8-bit moments, and in which shapes their scales lie. Pure."""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod

from strategies.strategy import Strategy
from strategies.workload import Tensor, Workload

BLOCK = 256
"""Elements that share a scale."""
LEAST_ELEMENTS = 4096
"""Smaller parameters keep 32-bit moments, as in bitsandbytes."""
MOMENT_BYTES = 2 * (1 + 4 / BLOCK)
"""Bytes a parameter of both moments, with their scales."""


def group_of_rows(width: int) -> int:
    """Return how many rows of so many elements make the fewest whole blocks."""
    return BLOCK // gcd(BLOCK, width)


def qualifies(shape: tuple[int, ...]) -> bool:
    """Whether a whole parameter has 8-bit moments: a matrix, large, whose rows make whole blocks. Vectors (biases, norms) are
    little, and keep 32 bits."""
    return len(shape) == 2 and prod(shape) >= LEAST_ELEMENTS and shape[0] % group_of_rows(shape[1]) == 0


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a qualifying parameter's scales: a row for each group of rows, dealt to ranks as rows are."""
    rows = group_of_rows(shape[1])
    return shape[0] // rows, shape[1] * rows // BLOCK


def is_aligned(shape: tuple[int, ...], *, dim: int | None, split: int, shards: int) -> bool:
    """Whether tensor parallelism over a dimension, then ZeRO over rows, cut a qualifying parameter into whole blocks."""
    rows, width = shape
    if split > 1 and dim == 1:
        return width % BLOCK == 0 and -(-width // split) % BLOCK == 0
    first = -(-rows // split) if dim == 0 else rows
    last = rows - (split - 1) * first if dim == 0 else rows
    held = (first, last) if last > 0 else (first,)
    return all(each * width % BLOCK == 0 and -(-each // shards) * width % BLOCK == 0 for each in held)


DIMS = {"row": 1, "column": 0, "vocabulary": 0, "sequence": 0}
"""Kind of split (workload.Tensor) -> the dimension that it cuts."""


def misaligned(work: Workload, strategy: Strategy) -> Tensor | None:
    """Return the first trained parameter that a strategy would cut within a block; None where every shard is whole blocks."""
    trained = work.trains
    for tensor in (*trained.embedding_tensors, *trained.block_tensors, *trained.head_tensors):
        shape = tensor.rows, tensor.width
        splits = {
            "dim": DIMS.get(tensor.split),
            "split": strategy.tensor_parallel_degree,
            "shards": strategy.num_shards,
        }
        if _counts(tensor) and not is_aligned(shape, **splits):  # type: ignore[arg-type]
            return tensor
    return None


@lru_cache(maxsize=1024)
def fraction(work: Workload, layers: int, embedding: bool, head: bool) -> float:
    """Return the part of a rank's trained parameters with 8-bit moments; of a rank that holds nothing, the whole model's."""
    trained = work.trains
    if not (layers or embedding or head):
        layers, embedding, head = work.num_layers, True, True
    tied = trained.embedding_tensors[:1] if head and not embedding and trained.tied_embeddings else ()
    parts = (
        (layers, trained.block_tensors),
        (embedding, trained.embedding_tensors),
        (head, trained.head_tensors),
        (1, tied),
    )
    total = sum(times * tensor.num_elements for times, tensors in parts for tensor in tensors)
    narrow = sum(times * tensor.num_elements for times, tensors in parts for tensor in tensors if _counts(tensor))
    return narrow / total if total else 0.0


def _counts(tensor: Tensor) -> bool:
    return tensor.width > 1 and qualifies((tensor.rows, tensor.width))
