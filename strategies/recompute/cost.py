"""Activation checkpointing, priced: bytes a layer leaves for backward.

Source: arXiv:2205.05198, sections 4 and 5. We depart in the elements, which are the model's own (see Workload), and in
`selective`: it keeps the outputs of products and attention, as apply.py does, not everything but attention's scores."""

from __future__ import annotations

from strategies.constants import MemoryConstants
from strategies.strategy import Strategy
from strategies.workload import Workload

READS = ("activation_checkpointing", "sequence_parallel", "tensor_parallel_degree", "attention", "fused_norm")

NORM_BYTES = 16
"""A token's mean and reciprocal deviation of two norms."""


def saved_bytes(
    work: Workload,
    strategy: Strategy,
    constants: MemoryConstants,
    *,
    selective: bool,
    tokens: int,
    sequence_length: int,
    element: int,
) -> float:
    """Bytes that one layer leaves for backward, of one micro batch of `tokens`; with everything kept, or `selective`."""
    tensor = strategy.tensor_parallel_degree
    if selective:
        whole, split = work.selective_whole_elements, work.selective_split_elements
    else:
        whole, split = work.saved_whole_elements, work.saved_split_elements
        if work.unfused_norm_elements and not strategy.fused_norm and element == 2:
            whole += int(constants.unfused_norm_elements * work.hidden_size)
    if strategy.sequence_parallel and selective and work.native:
        # Row-parallel products are kept as they are made: a part of the whole sum, before it is scattered.
        products = 2 * work.hidden_size
        elements = products + (whole - products + split) / tensor
    elif strategy.sequence_parallel:
        elements = (whole + split) / tensor
    else:
        elements = whole + split / tensor
    heads = work.num_heads / tensor
    saved = tokens * elements * element
    if strategy.attention == "flash" and not work.attention_bias:
        # log-sum-exp of each head
        return saved + tokens * (4.0 * heads + (0 if selective else NORM_BYTES))
    if selective:
        copies = 1.0 if work.native else 0.0
    else:
        copies = 2.0 if work.native else constants.score_copies
    return saved + copies * score_bytes(work, strategy, tokens=tokens, sequence_length=sequence_length, element=element)


def score_bytes(work: Workload, strategy: Strategy, *, tokens: int, sequence_length: int, element: int) -> float:
    """One copy of a layer's attention scores; 0 where the kernel never writes them."""
    if strategy.attention == "flash" and not work.attention_bias:
        return 0.0
    return tokens * work.num_heads / strategy.tensor_parallel_degree * sequence_length * element


def boundary_bytes(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> float:
    """What a fully checkpointed layer leaves: its input, split by sequence where the norms are."""
    split = strategy.tensor_parallel_degree if strategy.sequence_parallel else 1
    return tokens * work.hidden_size * element / split


def selective_again_bytes(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> float:
    """What selective checkpointing holds more of a layer when it has made the rest again: the outputs of two norms, the sum
    between them and the activation are there, the two row-parallel outputs and what the activation was made of are gone."""
    tensor = strategy.tensor_parallel_degree
    if strategy.sequence_parallel:
        return tokens * (element * work.hidden_size * max(0.0, 3 / tensor - 2) + NORM_BYTES)
    return float(tokens * (element * work.hidden_size + NORM_BYTES))
