"""Activation checkpointing, priced: bytes a layer leaves for backward, and the work that is done again.

Source: arXiv:2205.05198, section 5; the constants are the model's own (see Workload.saved_elements)."""

from __future__ import annotations

from strategies.strategy import Strategy
from strategies.workload import Workload

READS = ("activation_checkpointing", "sequence_parallel", "tensor_parallel_degree", "attention")


def layer_bytes(work: Workload, strategy: Strategy, *, tokens: int, sequence_length: int, element: int) -> float:
    """Bytes that one uncheckpointed layer leaves for backward, of one micro batch of `tokens`."""
    tensor = strategy.tensor_parallel_degree
    selective = strategy.activation_checkpointing == "selective"
    elements = work.saved_elements_selective if selective else work.saved_elements
    # Inputs and outputs of the norms are whole on every rank of the tensor group unless they are split by sequence.
    whole = 4 * work.hidden_size if not selective else 2 * work.hidden_size
    if strategy.sequence_parallel:
        split = elements / tensor
    else:
        split = (elements - whole) / tensor + whole
    saved = tokens * split * element
    statistics = tokens * (4 * 2 + work.num_heads / tensor) * 4  # mean and rstd of two norms; log-sum-exp of each head
    if strategy.attention != "flash" and not selective:
        # scores and probabilities, [heads, s] a token (the 5as/h of the paper without dropout's mask)
        copies = 2 if strategy.attention == "math" else 1
        saved += copies * tokens * work.num_heads / tensor * sequence_length * element
    return saved + statistics


def boundary_bytes(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> float:
    """What a fully checkpointed layer leaves: its input, split by sequence where the norms are."""
    split = strategy.tensor_parallel_degree if strategy.sequence_parallel else 1
    return tokens * work.hidden_size * element / split
