"""Tensors that are alive on a rank in the middle of its step: at the model's two ends, and of each sharded unit. Bytes."""

from __future__ import annotations

from typing import NamedTuple

from strategies.catalog import ENGINES
from strategies.rank import MicroBatchBytes, ModelStates, Question, SavedActivations, Share
from strategies.strategy import Strategy

STEP_BYTES = 24
"""A step's own numbers: its loss, the gradient of that, its count."""


class Rank(NamedTuple):
    """One rank in the middle of its step."""

    question: Question
    strategy: Strategy
    share: Share
    states: ModelStates
    micro: MicroBatchBytes
    saved: SavedActivations

    @property
    def element(self) -> int:
        return self.question.element


class Parts(NamedTuple):
    """Bytes of what is alive at the model's two ends, whoever shards the states."""

    logits: float
    copy: float
    waiting: float
    """Logits of the micro batches that wait, of gpipe."""
    chunk: float
    """Logits that the loss widens at once."""
    recomputed: float
    head_table: float
    """Gradient of the output table, where this rank has one."""
    shared: bool
    """The output table is the embedding's, on this very rank."""
    tables: float
    """Gradients alive in the embedding's backward pass."""
    wide: float
    """Activations that a block's forward pass is about to let go."""
    small: float
    """Ids and positions, the step's own numbers, gradients of the norms between two units, what other ranks have not received."""


def parts_of(rank: Rank) -> Parts:
    """Return what is alive at the two ends of the project's own model."""
    question, _, share, states, micro, saved = rank
    logits, copy = (micro.logits_at_loss, micro.logits_copy) if share.head else (0.0, 0.0)
    waiting = (saved.heads - 1) * copy
    table = states.table * rank.element
    # A tied table's gradient waits from the head's backward pass for the embedding's, whose own and their sum come on top. Two
    # stages of a pipeline have a pass each.
    shared = share.embedding and share.head and question.work.tied_embeddings and not saved.piped
    vectors = 4 * question.work.hidden_size * rank.element * (1 + saved.splits)
    return Parts(
        logits=logits + waiting,
        copy=copy + waiting,
        waiting=waiting,
        chunk=micro.widened if share.head else 0.0,
        # What computes again is the last checkpointed block; those behind it, which kept everything, are through by then.
        recomputed=micro.recomputed if share.all_checkpointed else 0.0,
        head_table=table if share.head else 0.0,
        shared=shared,
        tables=3 * table if shared else table if share.embedding else 0.0,
        wide=micro.wide + (micro.wide_checkpointed if share.all_checkpointed else 0.0),
        small=saved.numbers + STEP_BYTES + vectors + saved.unreceived_backward,
    )


class Units(NamedTuple):
    """The parameters outside the blocks (the root) and one block (a unit) of ZeRO 2 and 3, in bytes."""

    root: float
    unit: float
    wide_root: float
    wide_block: float
    """Gradients, as they are reduced."""
    at_head: float
    in_block: float
    """Gathered parameters."""
    ahead: float
    """The unit that is gathered while the one before is at work."""
    last: float
    """Activations of a pass's last block."""
    working: float
    """A block's backward pass, with the gradients that it makes."""
    added: float
    """The same where gradients of a micro batch before are there."""
    weight: float
    """A gradient, as it comes."""
    whole: float
    """Gradients that wait for the step's end, when all are there."""
    copies: int
    """Copies of what is scattered: one rank alone divides into a copy."""


def gathered_parameters(states: ModelStates, strategy: Strategy, layers: int) -> tuple[float, float, float]:
    """Return the parameters that ZeRO 2 and 3 shard, padding included, counts: (all of a rank, those outside the blocks, those of
    one block). Stage 2 leaves what is not trained whole on every rank."""
    group, rows = strategy.zero_group_size, states.padding
    total, outside, block = states.trained, states.trained_outside, states.trained_block
    if strategy.zero_stage == 3:
        total, outside, block = states.parameters, states.outside, states.block
        more = states.frozen_padding
        rows = rows._replace(outside=rows.outside + more.outside, block=rows.block + more.block)
    return (
        total + group * (rows.outside + layers * rows.block),
        outside + group * rows.outside,
        block + group * rows.block,
    )


def units_of(rank: Rank, parts: Parts, *, waits: bool) -> Units:
    """Return the units of a rank. Gathered and scattered, every rank's part is as long as the longest."""
    question, strategy, share, states, micro, saved = rank
    element, group, layers, padding = rank.element, strategy.zero_group_size, share.layers, states.padding
    wide = max(4, element)
    keeps = strategy.zero_stage == 2 or strategy.gather == "per_step"
    trained = states.trained + group * (padding.outside + layers * padding.block)
    outside, block = states.trained_outside + group * padding.outside, states.trained_block + group * padding.block
    gathered, at_ends, of_block = gathered_parameters(states, strategy, layers)
    root, unit = at_ends * element, min(of_block, gathered - at_ends) * element
    gradient = min(block, trained - outside) * element
    # One rank alone copies its shards where others gather them.
    ahead = unit if layers > 1 and group > 1 and not keeps and ENGINES[strategy.engine].gathers_ahead else 0.0
    last = micro.checkpointed if share.all_checkpointed else min(micro.layer, micro.checkpointed)
    # The feed-forward, of whose weights one has its gradient; or the end of attention, where all have: four gradients of the
    # residual stream's size, the norm's output and what came in are there, the rest of what was saved is gone.
    working = added = micro.working + parts.recomputed
    weight = min(block, states.matrix) * element
    if states.trained < states.parameters:
        # Beside the gradients of the adapters nothing else than activations comes and goes.
        working = added = working + gradient
    elif not saved.splits:
        attention = 6 * micro.hidden - (micro.hidden if share.all_checkpointed else last)
        # Of fp32, gradients that are added to those of a micro batch before are no others.
        added = max(weight + working, attention + (unit if element < 4 else 0.0))
        working = max(weight + working, attention + unit)
        if question.work.num_up > 1:
            working = max(working, (1 + question.work.num_up) * weight + micro.gated_end + parts.recomputed)
    return Units(
        root=root,
        unit=unit,
        wide_root=wide * outside,
        wide_block=wide * block,
        at_head=gathered * element if keeps else root,
        in_block=gathered * element if keeps else root + unit,
        ahead=ahead,
        last=last,
        working=working,
        added=added,
        weight=weight,
        whole=wide * trained if waits else 0.0,
        copies=2 if group == 1 else 1,
    )
