"""The moments of a step at which a rank may hold its most, in bytes beyond its parameters, master weights and optimizer states.

Gradients, buckets and gathered parameters decide them, so they stand in ZeRO's room. For families built here they follow the
code tensor by tensor (apply.py, buckets.py, torch's FSDP2, engines/token_losses.py), and benchmarks.trace holds them against
the traced step; waiting.py has those of gradients that wait for the end of a pipeline's step. The others hold what the stacks
that published them held."""

from __future__ import annotations

from typing import NamedTuple

from strategies.catalog import ENGINES
from strategies.engines.engine import BUCKET_BYTES
from strategies.rank import ModelStates, PeakCandidate, Question
from strategies.strategy import Strategy
from strategies.zero.alive import STEP_BYTES, Parts, Rank, Units, parts_of, units_of
from strategies.zero.state_bytes import (
    BYTES,
    IN_FLIGHT,
    all_gather_bytes,
    bucket_bytes,
    gathered_bytes,
    gathers,
    unsharded_gradient_bytes,
)
from strategies.zero.waiting import waiting_candidates


def published_candidates(rank: Rank) -> tuple[PeakCandidate, ...]:
    """Return the moments of stacks seen from outside: the loss, and a block's backward pass with what it computes again."""
    _, strategy, share, states, micro, saved = rank
    gpu, element = states.gpu, rank.element
    logits, at_head = (micro.logits_at_loss, micro.logits_copy) if share.head else (0.0, 0.0)
    sizes = states.parameters, states.block, states.outside
    trained = states.trained, states.trained_block, states.trained_outside
    sharded = sizes if strategy.zero_stage == 3 else trained  # what is not trained is whole until then
    gathered = gathered_bytes(*sharded, strategy, element) or _streamed(states, element)
    unit = max(sharded[1:])
    scattered = unsharded_gradient_bytes(states.trained, max(trained[1:]), strategy, element)
    buffers = all_gather_bytes(unit, strategy, element)
    early = 0.0 if strategy.zero_stage >= 2 and strategy.gradient_accumulation_steps == 1 else gpu.gradients
    recomputed = micro.recomputed if share.checkpointed else 0.0
    at_block, working = saved.peak_in_backward + micro.final * share.head, scattered + micro.working + recomputed
    make = PeakCandidate
    return (
        make("forward", gathered, early, saved.at_head, logits, buffers, 0.0),
        make("backward", gathered, gpu.gradients, saved.at_head, at_head, buffers, scattered + micro.hidden),
        make("backward", gathered, gpu.gradients, at_block, 0.0, buffers, working),
        make("optimizer", 0.0, gpu.gradients, 0.0, 0.0, 0.0, 0.0),
    )


def _streamed(states: ModelStates, element: int) -> float:
    """Return the bytes of parameters that live on the host, where they are at work: two blocks and what stands outside them."""
    if not states.streamed:
        return 0.0
    return (min(2 * states.block, states.parameters - states.outside) + states.outside) * element


def least_bytes(question: Question, strategy: Strategy, states: ModelStates, *, late: bool, piped: bool) -> float:
    """Return what a rank holds at least while it goes back through a block, beside its states, the activations of its micro
    batches and `working`: gradients and gathered parameters. `late`: gradients are there while activations are at their most,
    as where micro batches are twice the pipeline ranks or more."""
    gradients, element = states.gpu.gradients, question.element
    if not gathers(strategy):
        return gradients + _streamed(states, element)
    parameters, outside, block = states.parameters, states.outside, states.block
    if strategy.zero_stage == 2:
        parameters, outside, block = states.trained, states.trained_outside, states.trained_block
    one_block = (outside + min(block, parameters - outside)) * element
    keeps = strategy.zero_stage == 2 or strategy.gather == "per_step"
    in_block = parameters * element if keeps else one_block
    if not (question.work.native and strategy.reduce == "per_step" and late):
        return in_block + gradients * late
    whole = max(4, element) * states.trained
    if piped and strategy.gather != "per_step":
        return max(in_block, one_block + whole)
    return in_block + whole


def _buckets(rank: Rank) -> tuple[float, float, int]:
    """Return (buckets on their way, gradients widened for the optimizer, blocks that are through when the first bucket goes)."""
    _, strategy, _, states, _, _ = rank
    gpu, element, group = states.gpu, rank.element, strategy.num_shards
    largest = states.table if states.trained_outside and states.table else states.matrix
    gradient = BYTES[strategy.states][1]
    through = BUCKET_BYTES / (min(4, gradient) * (element // 4 if element > 4 else 1)) - largest
    buckets = widened = 0.0
    if strategy.num_replicas > 1 or gpu.master_weights:
        one = min(bucket_bytes(largest, strategy, element), gpu.gradients) / group
        if group > 1 and ENGINES[strategy.engine].buckets:
            buckets = min(IN_FLIGHT * one, gpu.gradients / group)
        # gradients of 16 bit are widened for the optimizer
        widened = 2 * one if gpu.master_weights and gradient == 2 else 0.0
    return buckets, widened, int(max(0.0, through) / states.trained_block)


def whole_candidates(rank: Rank) -> tuple[PeakCandidate, ...]:
    """Return the moments of ZeRO 0 and 1: whole gradients in buckets."""
    _, _, share, states, micro, saved = rank
    parts, element, gradients = parts_of(rank), rank.element, states.gpu.gradients
    gathered = in_block = _streamed(states, element)
    at_head = at_loss = states.outside * element if gathered else 0.0
    if saved.piped:
        # What stands outside the blocks goes after each pass: it is not there for the loss, and the head's is gone while the
        # blocks go backward.
        at_loss, in_block = 0.0, gathered - at_head * (share.head and not share.embedding)
    buckets, widened, through = _buckets(rank)
    waiting = parts.head_table if parts.shared else 0.0
    at_work = waiting + micro.working + parts.recomputed
    if saved.splits and states.trained < states.parameters:  # what an adapter adds to the gradient of its input
        at_work += micro.hidden
    # Under a pipeline buckets go with the last pass of all, behind which nothing waits; after it, where passes are split.
    behind = saved.after_first_block if saved.piped else 0.0
    going = 0.0 if saved.splits else buckets
    # Where passes are split, the first block's attention ends with all its own products waiting.
    ends = max(parts.tables + 2 * micro.hidden, (waiting + micro.attention_end) * saved.splits)
    # The first bucket is full, and goes, when its blocks are through.
    reduced = max(0.0, saved.peak_in_backward - behind - through * min(micro.layer, micro.checkpointed))
    # What comes for the next pass. Where passes are split, the gradient that came in waits for the weights of the last block,
    # beside sequence parallelism in a copy; what goes out is among `ends`.
    copied = saved.splits and micro.residual < micro.hidden
    ahead = saved.boundary * (1 + copied) + parts.small
    before = ahead + saved.unreceived_forward - saved.unreceived_backward
    last = (ahead if saved.splits else parts.small) + max(0.0, going - behind)
    forward = max([f * saved.one + i * saved.waits for f, i, _ in saved.moments.forward])
    head_back, make = parts.head_table + micro.head_gradients, PeakCandidate
    return (
        make("forward", gathered, gradients, forward, parts.waiting, before, parts.wide),
        make("forward", at_loss, gradients, saved.at_head, parts.logits, before, parts.chunk),
        make("backward", at_head, gradients, saved.at_head, parts.copy, ahead, head_back),
        make("backward", in_block, gradients, saved.peak_in_backward, parts.waiting, ahead, at_work),
        make("backward", in_block, gradients, reduced, 0.0, ahead + going, at_work),
        make("backward", gathered, gradients, saved.after_first_block, 0.0, last, ends),
        make("optimizer", 0.0, gradients, 0.0, 0.0, buckets, widened + STEP_BYTES),
    )


class _Reduced(NamedTuple):
    """A backward pass whose blocks that are through left their gradients and let go their activations, in bytes."""

    kept: float
    gradients: float
    recomputed: float
    in_block: float
    in_scatter: float


def _reduced(rank: Rank, parts: Parts, units: Units, *, early: float, waits: bool) -> _Reduced:
    """Return what a rank holds when as many blocks are through as make the most of it."""
    _, strategy, share, _, micro, saved = rank
    layers, last = share.layers, units.last
    keeps = strategy.zero_stage == 2 or strategy.gather == "per_step"
    # A unit lets go its parameters, then its gradients when the reduce-scatter has its input.
    stays = strategy.gather == "per_step" and strategy.gradient_accumulation_steps > 1
    goes = units.unit if keeps and not stays else 0.0
    # Blocks that are through have let go their activations and left their gradients, if they had none of a micro batch before.
    # Those that live on the host come back two at a time to the end.
    shard, gone = 0.0 if early else units.wide_block / strategy.zero_group_size, last * (not saved.come_back)
    through = max(1, layers - 1 - (units.ahead > 0)) if shard > gone + goes and not waits else 1
    # Those that are not computed again are the first to be through.
    plain = layers - share.checkpointed
    behind = gone * through + max(0.0, micro.layer - last) * min(through, plain) * (gone > 0)
    in_block = units.in_block - (through - 1) * goes
    return _Reduced(
        kept=max(0.0, saved.peak_in_backward - behind),
        gradients=early + through * shard,
        recomputed=micro.recomputed - parts.recomputed if share.checkpointed and through >= plain else 0.0,
        in_block=in_block,
        in_scatter=in_block if stays else in_block - units.unit,
    )


def sharded_candidates(rank: Rank, parts: Parts, units: Units, *, waits: bool) -> tuple[PeakCandidate, ...]:
    """Return the moments of ZeRO 2 and 3 on FSDP2. It holds the input of one reduce-scatter until the next unit's, the root's
    into the next micro batch, and gathers a block ahead. `waits`: gradients are whole until the last micro batch."""
    _, strategy, share, states, micro, saved = rank
    late, whole, make = strategy.gradient_accumulation_steps > 1, units.whole, PeakCandidate
    small = parts.small + 2 * saved.boundary  # and what a pipeline brought for this pass and brings for the next
    forward, ahead = small + saved.unreceived_forward - saved.unreceived_backward, units.ahead + small
    early = states.gpu.gradients if late and not waits else 0.0
    behind_root, behind = (0.0, 0.0) if waits else (units.wide_root * late, units.wide_block * (share.layers > 1))
    through = _reduced(rank, parts, units, early=early, waits=waits)
    scattered = units.copies * units.wide_block / strategy.zero_group_size
    scatter = max(units.wide_block, scattered) if waits else units.wide_block + max(units.unit, scattered)
    at_work = parts.head_table * (parts.shared or not saved.piped) + whole
    at_loss, at_head = behind_root + whole + parts.chunk, behind_root + whole + parts.head_table + micro.head_gradients
    in_block, block = behind_root + at_work + units.working, behind + at_work + units.working + through.recomputed
    kept, gradients, in_scatter = through.kept, through.gradients, at_work + micro.hidden + scatter
    # At stage 2 a forward pass gathers every block: the last one into two flat copies, the one before not yet let go.
    again = strategy.zero_stage == 2 and strategy.gather != "per_step" and strategy.zero_group_size > 1
    flat = min(2, share.layers) * units.unit * again
    return (
        make("forward", units.at_head, early, saved.at_head, parts.logits, forward, at_loss),
        make(
            "forward",
            units.at_head,
            early,
            flat and saved.at_head - saved.final,
            0.0,
            forward + flat,
            behind_root + whole,
        ),
        make("backward", units.at_head, early, saved.at_head, parts.copy, ahead, at_head),
        make("backward", units.in_block, early, saved.peak_in_backward, parts.waiting, ahead, in_block),
        make("backward", through.in_block, gradients, kept, parts.waiting, ahead, block),
        make("backward", through.in_scatter, gradients, kept, parts.waiting, ahead, in_scatter),
        *_pass_ends(rank, parts, units, small, behind_root + at_work, early=early, waits=waits),
        make("optimizer", 0.0, states.gpu.gradients, 0.0, 0.0, 0.0, STEP_BYTES),
    )


def _pass_ends(
    rank: Rank, parts: Parts, units: Units, small: float, at_work: float, *, early: float, waits: bool
) -> list[PeakCandidate]:
    """Return the ends of a backward pass: the embedding's, the root's scatter, and of a split pass the first block's."""
    _, strategy, _, states, micro, saved = rank
    root, wide_root, wide_block = units.root, units.wide_root, units.wide_block
    per_step, gradients, after = strategy.gather == "per_step", states.gpu.gradients, saved.after_first_block
    scattered = units.copies * wide_root / strategy.zero_group_size
    last_scatter = wide_root + max(wide_root if waits else root, scattered)
    if waits:
        tables = parts.tables + max(units.whole, wide_root + wide_block + gradients)
    else:
        tables = parts.tables + wide_block + gradients
    stays, make = root * (per_step and strategy.gradient_accumulation_steps > 1), PeakCandidate
    ends = [
        make("backward", root, 0.0, after, 0.0, small, tables + 2 * micro.hidden),
        make("backward", stays, gradients, after, 0.0, small, last_scatter),
    ]
    if saved.splits:
        # Where passes are split, the first block's attention ends with all its own products waiting.
        block = units.at_head if per_step else root + units.unit
        ends.append(make("backward", block, early, after, 0.0, small, at_work + micro.attention_end))
    return ends


def native_candidates(rank: Rank) -> tuple[PeakCandidate, ...]:
    """Return the moments of the project's own step."""
    strategy, saved = rank.strategy, rank.saved
    if not gathers(strategy):
        return whole_candidates(rank)
    # Gradients that are reduced once a step wait whole for the last micro batch, or under a pipeline for the step's end.
    waits = strategy.reduce == "per_step" and (strategy.gradient_accumulation_steps > 1 or saved.piped)
    parts = parts_of(rank)
    units = units_of(rank, parts, waits=waits)
    if saved.piped and waits:
        from_waiting = waiting_candidates(rank, parts, units)
        return *from_waiting, PeakCandidate("optimizer", 0.0, rank.states.gpu.gradients, 0.0, 0.0, 0.0, STEP_BYTES)
    return sharded_candidates(rank, parts, units, waits=waits)
