"""The moments of a step at which a rank may hold its most, in bytes beyond its parameters, master weights and moments.

A moment is (phase, gathered parameters, gradients, activations, logits, communication buffers, temporary). For families built
here they follow the code tensor by tensor (strategies/zero/apply.py, zero/buckets.py, torch's FSDP2, engines/loss.py), and
benchmarks.trace holds them against the traced step; the others hold what the stacks that published them held."""

from __future__ import annotations

from typing import NamedTuple

from strategies.catalog import ENGINES
from strategies.offload.cost import Offloaded
from strategies.pipeline.cost import Share
from strategies.strategy import Strategy
from strategies.workload import Workload
from strategies.zero import cost as zero

Moment = tuple[str, float, float, float, float, float, float]
CHUNK_ELEMENTS = 2**22
"""Logits that the project's own loss widens at once (strategies/engines/loss.py, which imports torch)."""
CHUNK_COPIES = 3
"""fp32 tensors of one chunk of 16-bit logits alive at once: widened, soft-max, its gradient."""


class Held(NamedTuple):
    """What a rank holds of the model."""

    left: Offloaded
    """States after offload."""
    parameters: float
    block: float
    """Parameters of one block."""
    outside: float
    """Parameters outside the blocks."""
    padding: tuple[float, float]
    """Elements of a rank's uneven part, (outside the blocks, of one block)."""


class MicroBytes(NamedTuple):
    """Bytes of one micro batch on any rank."""

    hidden: float
    """One activation of the residual stream."""
    layer: float
    """An uncheckpointed layer's."""
    checkpointed: float
    """A checkpointed layer's."""
    logits: tuple[float, float]
    """(at the loss, one copy)."""
    working: float
    """A block's backward pass beyond what was saved."""
    again: float
    """What is computed again of a checkpointed layer, alive while it goes backward."""
    final: float
    """What the head keeps: the last block's output and its norm's."""


def size_of(moment: Moment) -> float:
    return moment[1] + moment[2] + moment[3] + moment[4] + moment[5] + moment[6]


def native_working(work: Workload, strategy: Strategy, tokens: int, element: int) -> float:
    """The feed-forward's backward pass: gradients of ReLU's output and input, of the residual stream and of the norm's
    output; or, where weights are larger than activations, one of its weight gradients in place of the second."""
    split = strategy.tensor_parallel_degree
    wide = tokens * work.ffn_size / split
    weight = work.ffn_size * work.hidden_size / split
    return element * (wide + max(wide, weight) + 2 * tokens * work.hidden_size)


def published_moments(
    work: Workload, strategy: Strategy, share: Share, held: Held, micro: MicroBytes, activations: float, element: int
) -> tuple[Moment, ...]:
    """Of stacks seen from outside: the loss, and a block's backward pass with what it computes again."""
    left, parameters, block, outside, _ = held
    gpu = left.gpu
    logits, at_head = micro.logits if share.head else (0.0, 0.0)
    gathered = zero.gathered_bytes(parameters, block, outside, strategy, element) or _streamed(strategy, held, element)
    unit = max(block, outside)
    scattered = zero.unsharded_gradient_bytes(parameters, unit, strategy, element)
    buffers = zero.all_gather_bytes(unit, strategy, element)
    sharded = strategy.zero_stage >= 2
    early = 0.0 if sharded and strategy.gradient_accumulation_steps == 1 else gpu.gradients
    again = micro.again if share.checkpointed else 0.0
    return (
        ("forward", gathered, early, activations, logits, buffers, 0.0),
        ("backward", gathered, gpu.gradients, activations, at_head, buffers, scattered + micro.hidden),
        ("backward", gathered, gpu.gradients, activations, 0.0, buffers, scattered + micro.working + again),
        ("optimizer", 0.0, gpu.gradients, 0.0, 0.0, 0.0, 0.0),
    )


def _streamed(strategy: Strategy, held: Held, element: int) -> float:
    """Parameters that live on the host, where they are at work: two blocks and what stands outside them."""
    if strategy.offload.parameters == "none":
        return 0.0
    return (min(2 * held.block, held.parameters - held.outside) + held.outside) * element


def native_moments(
    work: Workload, strategy: Strategy, share: Share, held: Held, micro: MicroBytes, activations: float, element: int
) -> tuple[Moment, ...]:
    """The project's own step."""
    logits, copy = micro.logits if share.head else (0.0, 0.0)
    chunk = min(4.0 * CHUNK_ELEMENTS, 4 / element * copy) * CHUNK_COPIES if element == 2 else 0.0
    # What computes again is the last checkpointed block; those behind it, which kept everything, are through by then.
    again = micro.again if share.checkpointed == share.layers else 0.0
    table = work.vocab_size * work.embedding_size / strategy.tensor_parallel_degree * element
    shared = share.embedding and share.head and work.tied_embeddings
    # A tied table's gradient waits from the head's backward pass for the embedding's, whose own and their sum come on top.
    tables = 3 * table if shared else table if share.embedding else 0.0
    parts = _Parts(logits, copy, chunk, again, table if share.head else 0.0, shared, tables)
    make = _sharded_moments if zero.gathers(strategy) else _whole_moments
    return make(work, strategy, share, held, micro, activations, element, parts)


class _Parts(NamedTuple):
    logits: float
    copy: float
    chunk: float
    again: float
    head_table: float
    """Gradient of the output table, where this rank has one."""
    shared: bool
    tables: float
    """Gradients alive in the embedding's backward pass."""


def _whole_moments(
    work: Workload,
    strategy: Strategy,
    share: Share,
    held: Held,
    micro: MicroBytes,
    activations: float,
    element: int,
    parts: _Parts,
) -> tuple[Moment, ...]:
    """ZeRO 0 and 1: whole gradients in buckets."""
    gpu = held.left.gpu
    gathered = _streamed(strategy, held, element)
    buckets = widened = 0.0
    if strategy.data_parallel_degree > 1 or gpu.master_weights:
        split = strategy.tensor_parallel_degree
        table = work.vocab_size * work.embedding_size / split
        largest = table if held.outside else work.ffn_size * work.hidden_size / split
        group = zero.group_size(strategy)
        one = min(zero.bucket_bytes(largest, strategy, element), gpu.gradients) / group
        buckets = zero.IN_FLIGHT * one if group > 1 and ENGINES[strategy.engine].buckets else 0.0
        # gradients of 16 bit are widened for the optimizer
        widened = 2 * one if gpu.master_weights and zero.BYTES[strategy.states][1] == 2 else 0.0
    grads = gpu.gradients
    waiting = parts.head_table if parts.shared else 0.0
    return (
        ("forward", gathered, grads, activations, parts.logits, 0.0, parts.chunk),
        ("backward", gathered, grads, activations, parts.copy, 0.0, parts.head_table + 2 * micro.hidden),
        ("backward", gathered, grads, activations, 0.0, buckets, waiting + micro.working + parts.again),
        ("backward", gathered, grads, 0.0, 0.0, buckets, parts.tables + 2 * micro.hidden),
        ("optimizer", 0.0, grads, 0.0, 0.0, buckets, widened),
    )


def _sharded_moments(
    work: Workload,
    strategy: Strategy,
    share: Share,
    held: Held,
    micro: MicroBytes,
    activations: float,
    element: int,
    parts: _Parts,
) -> tuple[Moment, ...]:
    """ZeRO 2 and 3 on FSDP2. It holds the input of one reduce-scatter until the next unit's, the root's into the next micro
    batch, and gathers a block ahead."""
    left, parameters, block, outside, (root_padding, block_padding) = held
    wide = max(4, element)
    group, times = strategy.zero_group_size, strategy.gradient_accumulation_steps
    keeps = strategy.zero_stage == 2 or strategy.gather == "per_step"
    root = outside * element
    late = times > 1
    early = left.gpu.gradients if late else 0.0
    whole_gradients = wide * parameters if late and strategy.reduce == "per_step" else 0.0
    wide_root, wide_block = wide * (outside + group * root_padding), wide * (block + group * block_padding)
    behind_root = wide_root if late and not whole_gradients else 0.0
    at_head = parameters * element if keeps else root
    in_block = parameters * element if keeps else root + min(block, parameters - outside) * element
    ahead = 0.0 if keeps or not ENGINES[strategy.engine].gathers_ahead else block * element * (1 + 1 / group)
    last = micro.checkpointed if share.checkpointed == share.layers else min(micro.layer, micro.checkpointed)
    one_less = max(0.0, activations - last)
    block_gradients = block * element + wide_block * (1 + 1 / group)
    root_gradients = outside * element + wide_root * (1 + 1 / group)
    # The block's own weight gradients stay until it is scattered.
    working = parts.head_table + whole_gradients + micro.working + parts.again
    working += min(block, work.ffn_size * work.hidden_size / strategy.tensor_parallel_degree) * element
    several = share.layers > 1
    return (
        ("forward", at_head, early, activations, parts.logits, 0.0, behind_root + whole_gradients + parts.chunk),
        (
            "backward",
            at_head,
            early,
            activations,
            parts.copy,
            ahead,
            parts.head_table + behind_root + whole_gradients + 2 * micro.hidden,
        ),
        ("backward", in_block, early, activations, 0.0, ahead if several else 0.0, working + behind_root),
        ("backward", in_block, early, one_less, 0.0, ahead, working + wide_block * several),
        (
            "backward",
            in_block,
            early,
            one_less,
            0.0,
            ahead if several else 0.0,
            parts.head_table + whole_gradients + micro.hidden + block_gradients,
        ),
        (
            "backward",
            root,
            left.gpu.gradients,
            0.0,
            0.0,
            0.0,
            parts.tables + whole_gradients + 2 * micro.hidden + wide_block,
        ),
        ("backward", root, left.gpu.gradients, 0.0, 0.0, 0.0, root_gradients + whole_gradients),
        ("optimizer", 0.0, left.gpu.gradients, 0.0, 0.0, 0.0, 0.0),
    )
