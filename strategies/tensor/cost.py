"""Tensor and sequence parallelism, priced. Source: arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2."""

from __future__ import annotations

from strategies.constants import MemoryConstants
from strategies.strategy import Strategy
from strategies.workload import Workload

READS = ("tensor_parallel_degree", "sequence_parallel", "states", "zero_stage")

VOCABULARY_PARALLEL = ("mixed_fp32_accumulators", "mixed_fp32_gradients")
"""States of the stacks whose loss never gathers logits: Megatron and nanotron. A tied table is theirs too."""


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


def logit_bytes(
    work: Workload, strategy: Strategy, constants: MemoryConstants, *, tokens: int, element: int
) -> tuple[float, float]:
    """Bytes of one micro batch's logits and what the loss makes of them, (at the loss, one copy of the logits).

    The project's own loss keeps the logits and their gradient in the logits' dtype. Published stacks hold fp32 copies; an
    untied head beside tensor parallelism is a plain column-parallel linear whose outputs are gathered (LLaMA's own code)."""
    tensor = strategy.tensor_parallel_degree
    local = tokens * work.vocab_size / tensor
    if work.native:
        return 2.0 * element * local, element * local
    wide = element / 2
    if strategy.zero_stage >= 2:
        return constants.sharded_logit_bytes * wide * local, element * local
    total = constants.kept_logit_bytes * wide * local
    if tensor > 1 and not work.tied_embeddings and strategy.states not in VOCABULARY_PARALLEL:
        total += constants.gathered_logit_bytes * wide * local * tensor
    return total, element * local
