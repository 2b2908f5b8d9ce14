"""Tensor and sequence parallelism, priced. Source: arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2."""

from __future__ import annotations

from strategies.strategy import Strategy
from strategies.workload import Workload

READS = ("tensor_parallel_degree", "sequence_parallel")


def block_parameters(work: Workload, strategy: Strategy) -> float:
    """Of one block on one rank."""
    split = work.block_parameters - work.block_replicated_parameters
    return split / strategy.tensor_parallel_degree + work.block_replicated_parameters


def message_bytes_per_layer(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> float:
    """All-reduced bytes of one layer's forward pass of one micro batch: the outputs of attention and MLP. Backward sends
    as many. With sequence parallel each is a reduce-scatter and an all-gather, the same bytes on a ring."""
    if strategy.tensor_parallel_degree == 1:
        return 0.0
    return 2.0 * tokens * work.hidden_size * element
