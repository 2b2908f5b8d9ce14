"""The moments of a pipeline at ZeRO 2 and 3 whose whole gradients wait for the step's end. Bytes.

A stage's gradients come with its first pass, when activations may have begun to go."""

from __future__ import annotations

from typing import NamedTuple

from strategies.rank import InFlight, PeakCandidate
from strategies.zero.alive import Parts, Rank, Units


class _Fullest(NamedTuple):
    """The fullest moment of some, in bytes."""

    activations: float
    gradients: float
    logits: float


def _fullest(
    rank: Rank, parts: Parts, units: Units, moments: tuple[InFlight, ...], in_pass: int, more: float = 0.0
) -> _Fullest:
    """Return the fullest of some moments at which `in_pass` micro batches are in a pass. Gradients outside the blocks come with
    the head, or with the embedding, the last stage."""
    saved, share = rank.saved, rank.share
    blocks, heads, found = units.whole - units.wide_root, saved.heads, _Fullest(-1.0, 0.0, 0.0)
    for flights, inputs, part in moments:
        # Of those that gpipe's head keeps.
        left = min(1.0, max(0.0, flights - in_pass) / (heads - 1)) if heads > 1 else 1.0
        kept = flights * saved.one + inputs * saved.waits + saved.waiting_micro_batches * left + more
        came = part > 0.0 or inputs > 0.0 if share.head or saved.splits else part == 1.0
        had = part * blocks + units.wide_root * came
        if kept + had + parts.waiting * left > sum(found):
            found = _Fullest(kept, had, parts.waiting * left)
    return found


def waiting_candidates(rank: Rank, parts: Parts, units: Units) -> tuple[PeakCandidate, ...]:
    """Return the moments of the forward pass, of the blocks' backward passes, and of the reduction at the step's end."""
    _, strategy, _, _, micro, saved = rank
    moments, per_step, small = saved.moments, strategy.gather == "per_step", parts.small + 2 * saved.boundary
    forward = small + saved.unreceived_forward - saved.unreceived_backward
    head = _fullest(rank, parts, units, moments.head, 1, saved.final)
    come = _fullest(rank, parts, units, moments.forward, 1)
    now = _fullest(rank, parts, units, moments.begin, 1)
    # What a block is gathered into is let go when the next one is gathered.
    flat = units.unit if strategy.zero_group_size > 1 and not per_step else 0.0
    working = units.added if now.gradients >= units.whole and not saved.splits else units.working
    # Of fp32, the output table's gradient has been added to what a micro batch before left.
    table = parts.head_table
    at_work = 0.0 if now.gradients and units.unit == units.wide_block else table
    gathered, begun = units.ahead + small, now.gradients
    at_loss = parts.logits - parts.waiting + head.logits
    copy, in_head = parts.copy - parts.waiting + head.logits, table + micro.head_gradients + head.gradients
    make = PeakCandidate
    first = (
        make(
            "forward", units.in_block, 0.0, come.activations, come.logits, forward + flat, parts.wide + come.gradients
        ),
        make("forward", units.at_head, 0.0, head.activations, at_loss, forward, parts.chunk + head.gradients),
        make("backward", units.at_head, 0.0, head.activations, copy, gathered, in_head),
        make("backward", units.in_block, 0.0, now.activations, now.logits, gathered, at_work + working + begun),
    )
    ends = _split_ends if saved.splits else _plain_ends
    # One rank alone divides into a copy what it scatters.
    scatter = max(units.wide_root, units.wide_block) * units.copies
    last = make("backward", units.at_head if per_step else 0.0, 0.0, 0.0, 0.0, small, units.whole + scatter)
    return (*first, *ends(rank, parts, units, now, at_work, small), last)


def _split_ends(
    rank: Rank, parts: Parts, units: Units, now: _Fullest, at_work: float, small: float
) -> tuple[PeakCandidate, ...]:
    """Return the ends of backward passes that run in two halves."""
    _, strategy, _, _, micro, saved = rank
    # A unit is let go when it has gone backward, and gathered again by the next pass through it.
    per_step, root, unit = strategy.gather == "per_step", units.root, units.unit
    one_block, stays = (units.at_head, units.at_head) if per_step else (root + unit, root)
    turned = now.activations + saved.freed_by_backward
    rise = now.activations + saved.peak_in_backward - saved.before_backward
    then, before = _fullest(rank, parts, units, saved.moments.end, 0), now.gradients
    embedding = parts.tables + 2 * micro.hidden
    make = PeakCandidate
    return (
        make("backward", one_block, 0.0, rise, 0.0, small, at_work + units.working + before),
        make("backward", one_block, 0.0, turned, 0.0, small, at_work + micro.attention_end + before),
        make("backward", stays, 0.0, turned, 0.0, small, embedding + before),
        make("backward", stays, 0.0, then.activations, 0.0, small, unit + then.gradients),
    )


def _plain_ends(
    rank: Rank, parts: Parts, units: Units, now: _Fullest, at_work: float, small: float
) -> tuple[PeakCandidate, ...]:
    """Return the ends of whole backward passes."""
    _, strategy, share, _, micro, saved = rank
    per_step, root, unit = strategy.gather == "per_step", units.root, units.unit
    one_block, stays = (units.at_head, units.at_head) if per_step else (root + unit, root)
    then = _fullest(rank, parts, units, saved.moments.end, 0)
    # The first pass ends without its last block's gradients, and with those of what stands outside only if they came before.
    one_stage = not share.head or share.stages == 1
    late = units.wide_root * (saved.moments.begin[0].gradients < 1.0 and one_stage)
    # Of a rank that computes some blocks again it is one of those.
    computed = micro.recomputed - parts.recomputed if share.checkpointed else 0.0
    in_last = units.working + computed + then.gradients - late - units.wide_block
    last = max(parts.tables + 2 * micro.hidden, units.weight + 4 * micro.hidden)
    make = PeakCandidate
    return (
        make("backward", one_block, 0.0, then.activations + units.last, then.logits, small, parts.head_table + in_last),
        make("backward", stays, 0.0, then.activations, 0.0, small, last + then.gradients),
    )
