"""Tensor and sequence parallelism, priced. Source: arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2."""

from __future__ import annotations

from typing import NamedTuple

from strategies.constants import MemoryConstants
from strategies.links import Kind, Message
from strategies.pipeline.cost import Share
from strategies.sizes import FIRST, Place, partial
from strategies.strategy import Strategy
from strategies.workload import Workload

READS = (
    *("tensor_parallel_degree", "sequence_parallel", "activation_checkpointing", "states", "zero_stage"),
    "zero_group_size",
)

LOSS_BYTES = 64
"""What both ends of the project's own model keep of a token beside activations: its id, position, target and where that stands,
that it counts and is here, its largest logit and partition function and what the loss's backward pass makes of them, the mean
and deviation of the last norm."""
CHUNK_ELEMENTS = 2**22
"""Logits that the project's own loss widens at once (strategies/engines/loss.py, which imports torch)."""
VOCABULARY_PARALLEL = ("mixed_fp32_accumulators", "mixed_fp32_gradients")
"""States of the stacks whose loss never gathers logits: Megatron and nanotron. A tied table is theirs too."""


def block_parameters(work: Workload, strategy: Strategy) -> float:
    """Of one block on one rank."""
    split = work.block_parameters - work.block_replicated_parameters
    return split / strategy.tensor_parallel_degree + work.block_replicated_parameters


def num_tables(work: Workload, *, embedding: bool, head: bool) -> int:
    """Tables of tokens on a rank: a tied one serves both ends."""
    return max(embedding, head) if work.tied_embeddings else embedding + head


def table_parameters(work: Workload, strategy: Strategy) -> int:
    """Of the table of tokens on one rank: rows are dealt whole."""
    return -(-work.vocab_size // strategy.tensor_parallel_degree) * work.embedding_size


def outside_parameters(work: Workload, strategy: Strategy, *, embedding: bool, head: bool) -> float:
    """Outside the blocks, of one rank: tables split by rows; in the project's own modules norms and projections are whole."""
    outside = 0.0
    if embedding:
        outside += work.embedding_parameters
    if head:
        outside += work.head_parameters
        if work.tied_embeddings and not embedding:
            outside += work.vocab_size * work.embedding_size
    split = strategy.tensor_parallel_degree
    if split == 1 or not work.native:
        return outside / split
    tables = num_tables(work, embedding=embedding, head=head)
    positions = work.position_rows * embedding
    outside -= tables * work.vocab_size * work.embedding_size + positions * work.hidden_size
    return outside + tables * table_parameters(work, strategy) + -(-positions // split) * work.hidden_size


class Messages(NamedTuple):
    """Of one micro batch over a tensor group, forward and backward; empty where there is no group."""

    layer: tuple[Message, ...] = ()
    again: tuple[Message, ...] = ()
    """More of a layer that is recomputed."""
    embedding: tuple[Message, ...] = ()
    head: tuple[Message, ...] = ()
    """With the loss."""


def messages(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> Messages:
    """What strategies/tensor/region.py and loss.py send, border by border.

    A layer enters columns twice (q, k and v of one input; up) and leaves rows twice (out, down). Recomputing a layer sends its
    forward again, as far as it goes: the project's own stops when the last saved tensor is there, which is before the sum that
    ends the layer unless a norm follows it, and its `selective` computes all but products again. The stacks that published
    repeat a whole forward at `full`, and nothing that talks at `selective`."""
    if strategy.tensor_parallel_degree == 1:
        return Messages()
    activation, wide = tokens * work.hidden_size * element, max(4, element)
    narrow = tokens * work.embedding_size * element
    kind = strategy.activation_checkpointing
    sums = (2 if work.post_norm else 1) if work.native else 2
    again = sums if kind == "full" or (kind == "selective" and work.native) else 0
    if not strategy.sequence_parallel:
        layer = [_message("all_reduce", activation, element, 4)]
        repeated = [_message("all_reduce", activation, element, again)]
        embedding = [_message("all_reduce", activation, element)]
        head = [_message("all_reduce", narrow, element)]
    else:
        layer = [_message("all_gather", activation, element, 6), _message("reduce_scatter", activation, element, 4)]
        repeated = [
            _message("all_gather", activation, element, 2 if again else 0),
            _message("reduce_scatter", activation, element, again),
        ]
        embedding = [_message("reduce_scatter", activation, element), _message("all_gather", activation, element)]
        head = [_message("all_gather", narrow, element, 2), _message("reduce_scatter", narrow, element)]
    if gathers_logits(work, strategy):
        head.append(_message("all_gather", tokens * work.vocab_size * element, element))
    else:  # the largest logit of each token; then its target's and the sum of exponentials
        head.append(Message("all_reduce", "tensor", wide, 3 * tokens * wide, 2))
    return Messages(tuple(layer), tuple(m for m in repeated if m.count), tuple(embedding), tuple(head))


def _message(kind: Kind, num_bytes: float, element: int, count: int = 1) -> Message:
    return Message(kind, "tensor", element, num_bytes * count, count)


def gradient_message(
    work: Workload, strategy: Strategy, share: Share, *, element: int, place: Place = FIRST
) -> tuple[Message, ...]:
    """Once a step, after the reduction over replicas: gradients of which each rank of a tensor group has a part, in one
    message of the rank's shards. `element`: bytes of a gradient."""
    if strategy.tensor_parallel_degree == 1:
        return ()
    sizes = partial(
        work,
        strategy.tensor_parallel_degree,
        strategy.zero_group_size if strategy.zero_stage else 1,
        place.shard,
        strategy.sequence_parallel,
    )
    held = sizes.held(work, layers=share.layers, embedding=share.embedding, head=share.head)
    return (_message("all_reduce", held * element, element),) if held else ()


def gathers_logits(work: Workload, strategy: Strategy) -> bool:
    """An untied head beside tensor parallelism is a plain column-parallel linear whose outputs are gathered (LLaMA's own
    code), except in the project's own stack and those of VOCABULARY_PARALLEL."""
    split = strategy.tensor_parallel_degree > 1 and not work.tied_embeddings
    return split and not work.native and strategy.states not in VOCABULARY_PARALLEL


def logit_bytes(
    work: Workload, strategy: Strategy, constants: MemoryConstants, *, tokens: int, element: int
) -> tuple[float, float]:
    """Bytes of one micro batch's logits and what the loss makes of them, (at the loss, one copy of the logits).

    The project's own loss keeps the logits and their gradient in the logits' dtype, and a few numbers a token. Published
    stacks hold fp32 copies, some of gathered logits."""
    tensor = strategy.tensor_parallel_degree
    local = tokens * work.vocab_size / tensor
    if work.native:
        local = float(tokens * -(-work.vocab_size // tensor))
        kept = element * local + LOSS_BYTES * tokens
        return element * local + kept, kept
    wide = element / 2
    if strategy.zero_stage >= 2:
        return constants.sharded_logit_bytes * wide * local, element * local
    total = constants.kept_logit_bytes * wide * local
    if gathers_logits(work, strategy):
        total += constants.gathered_logit_bytes * wide * local * tensor
    return total, element * local


def widened_bytes(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> float:
    """Of one micro batch's logits, what the project's own loss works on at once: 16 bit is widened first, a loss split over the
    vocabulary takes the largest off; and behind the first chunk, the one before is still there."""
    columns = -(-work.vocab_size // strategy.tensor_parallel_degree)
    rows = min(tokens, max(1, CHUNK_ELEMENTS // columns))
    copies = 1 if rows == tokens else 2
    if element == 2:
        copies += 1
    elif strategy.tensor_parallel_degree == 1:
        return 0.0
    return float(copies * max(4, element) * rows * columns)
