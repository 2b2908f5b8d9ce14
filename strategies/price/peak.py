"""The moments of a step at which a rank may hold its most, in bytes beyond its parameters, master weights and moments.

A moment is (phase, gathered parameters, gradients, activations, logits, communication buffers, temporary). For families built
here they follow the code tensor by tensor (strategies/zero/apply.py, zero/buckets.py, torch's FSDP2, engines/loss.py), and
benchmarks.trace holds them against the traced step; the others hold what the stacks that published them held."""

from __future__ import annotations

from typing import NamedTuple

from strategies.catalog import ENGINES
from strategies.engines.engine import BUCKET_BYTES
from strategies.pipeline import cost as pipeline
from strategies.pipeline.cost import Share, State
from strategies.price.rank_memory import Held, MicroBytes, Saved
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero

STEP_BYTES = 24
"""A step's own numbers: its loss, the gradient of that, its count."""
Moment = tuple[str, float, float, float, float, float, float]


def size_of(moment: Moment) -> float:
    return moment[1] + moment[2] + moment[3] + moment[4] + moment[5] + moment[6]


def published_moments(
    work: Workload, strategy: Strategy, share: Share, held: Held, micro: MicroBytes, saved: Saved, element: int
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
    at_block = saved.ever + micro.final * share.head
    return (
        ("forward", gathered, early, saved.at_head, logits, buffers, 0.0),
        ("backward", gathered, gpu.gradients, saved.at_head, at_head, buffers, scattered + micro.hidden),
        ("backward", gathered, gpu.gradients, at_block, 0.0, buffers, scattered + micro.working + again),
        ("optimizer", 0.0, gpu.gradients, 0.0, 0.0, 0.0, 0.0),
    )


def _streamed(strategy: Strategy, held: Held, element: int) -> float:
    """Parameters that live on the host, where they are at work: two blocks and what stands outside them."""
    if strategy.offload.parameters == "none":
        return 0.0
    return (min(2 * held.block, held.parameters - held.outside) + held.outside) * element


def standing_bytes(work: Workload, strategy: Strategy, share: Share, held: Held, element: int, *, late: bool) -> float:
    """What a rank holds at least while it goes back through a block, beside its states, the activations of its micro batches and
    `working`: gradients and gathered parameters. `late`: micro batches are twice the pipeline ranks or more: gradients are
    there while activations are at their most. A bound, for a search."""
    gradients, parameters, outside = held.left.gpu.gradients, held.parameters, held.outside
    if not zero.gathers(strategy):
        return gradients + _streamed(strategy, held, element)
    piped = strategy.pipeline_parallel_degree > 1
    one_block = (outside + min(held.block, parameters - outside)) * element
    keeps = strategy.zero_stage == 2 or strategy.gather == "per_step"
    in_block = parameters * element if keeps else one_block
    if not (work.native and strategy.reduce == "per_step" and late):
        return in_block + gradients * late
    whole = max(4, element) * parameters
    if piped and strategy.gather != "per_step":
        return max(in_block, one_block + whole)
    return in_block + whole


def native_moments(
    work: Workload, strategy: Strategy, share: Share, held: Held, micro: MicroBytes, saved: Saved, element: int
) -> tuple[Moment, ...]:
    """The project's own step."""
    logits, copy = micro.logits if share.head else (0.0, 0.0)
    piled = (pipeline.heads_in_flight(strategy) - 1) * copy
    chunk = micro.widened if share.head else 0.0
    # What computes again is the last checkpointed block; those behind it, which kept everything, are through by then.
    again = micro.again if share.checkpointed == share.layers else 0.0
    table = tensor.table_parameters(work, strategy) * element
    # Whole ones, and the part that is scattered from them; of several samples they are put in the ranks' order in a copy.
    scatters = strategy.sequence_parallel
    hiddens = (2 + (scatters and strategy.micro_batch_size > 1)) * micro.hidden + micro.final / 2 * scatters
    # A tied table's gradient waits from the head's backward pass for the embedding's, whose own and their sum come on top. Two
    # stages of a pipeline have a pass each.
    shared = share.embedding and share.head and work.tied_embeddings and strategy.pipeline_parallel_degree == 1
    tables = 3 * table if shared else table if share.embedding else 0.0
    # The first product of a block to go backward last: gradients of its input, with what lies beside them in the block.
    ends = 3 * micro.hidden + 2 * micro.final if scatters else 4 * micro.hidden
    head_table = table if share.head else 0.0
    wide = micro.hidden * work.ffn_size / work.hidden_size / strategy.tensor_parallel_degree
    if (
        strategy.activation_checkpointing != "none" and share.checkpointed == share.layers
    ):  # and what a block does not keep
        wide += wide * (strategy.activation_checkpointing == "full") + micro.hidden * (1 if scatters else 2)
    wide += hiddens - micro.hidden if scatters else micro.hidden * (1 + (strategy.tensor_parallel_degree > 1))
    parts = _Parts(logits + piled, copy + piled, piled, chunk, again, head_table, hiddens, shared, tables, ends, wide)
    make = _sharded_moments if zero.gathers(strategy) else _whole_moments
    return make(work, strategy, share, held, micro, saved, element, parts)


class _Parts(NamedTuple):
    logits: float
    copy: float
    piled: float
    """Logits of the micro batches that wait, of gpipe."""
    chunk: float
    again: float
    head_table: float
    """Gradient of the output table, where this rank has one."""
    hiddens: float
    """Gradients of the residual stream alive in the head's backward pass."""
    shared: bool
    tables: float
    """Gradients alive in the embedding's backward pass."""
    ends: float
    """And where a block's attention ends, beside what waits for its weights."""
    wide: float
    """What a block's forward pass is about to let go: the feed-forward's product, and what comes out."""


def _whole_moments(
    work: Workload,
    strategy: Strategy,
    share: Share,
    held: Held,
    micro: MicroBytes,
    saved: Saved,
    element: int,
    parts: _Parts,
) -> tuple[Moment, ...]:
    """ZeRO 0 and 1: whole gradients in buckets."""
    gpu = held.left.gpu
    gathered = in_block = _streamed(strategy, held, element)
    at_head = at_loss = held.outside * element if gathered else 0.0
    if strategy.pipeline_parallel_degree > 1:
        # What stands outside the blocks goes after each pass: it is not there for the loss, and the head's is gone while the
        # blocks go backward.
        at_loss, in_block = 0.0, gathered - at_head * (share.head and not share.embedding)
    buckets = widened = 0.0
    split = strategy.tensor_parallel_degree
    table = tensor.table_parameters(work, strategy)
    largest = table if held.outside else work.ffn_size * work.hidden_size / split
    gradient = min(4, zero.BYTES[strategy.states][1]) * (element // 4 if element > 4 else 1)
    if strategy.data_parallel_degree > 1 or gpu.master_weights:
        group = zero.group_size(strategy)
        one = min(zero.bucket_bytes(largest, strategy, element), gpu.gradients) / group
        buckets = (
            min(zero.IN_FLIGHT * one, gpu.gradients / group) if group > 1 and ENGINES[strategy.engine].buckets else 0.0
        )
        # gradients of 16 bit are widened for the optimizer
        widened = 2 * one if gpu.master_weights and zero.BYTES[strategy.states][1] == 2 else 0.0
    grads = gpu.gradients
    waiting = parts.head_table if parts.shared else 0.0
    at_work = waiting + micro.working + parts.again
    # Under a pipeline buckets go with the last pass of all, behind which nothing waits; after it, where passes are split.
    piped = strategy.pipeline_parallel_degree > 1
    splits = pipeline.splits(strategy)
    behind = saved.others if piped else 0.0
    going = 0.0 if splits else buckets
    # Where passes are split, the first block's attention ends with all its own products waiting.
    ends = max(parts.tables + 2 * micro.hidden, (waiting + parts.ends) * splits)
    # The first bucket is full, and goes, when its blocks are through.
    through = int(max(0.0, BUCKET_BYTES / gradient - largest) / held.block)
    reduced = max(0.0, saved.ever - behind - through * min(micro.layer, micro.checkpointed))
    # What comes for the next pass. Where passes are split, the gradient that came in waits for the weights of the last block,
    # beside sequence parallelism in a copy; what goes out is among `ends`.
    small = saved.numbers + STEP_BYTES + 4 * work.hidden_size * element * (1 + splits)
    before, sent = saved.sent
    small += sent
    ahead = micro.boundary * (1 + (splits and strategy.sequence_parallel)) + small
    forward = max([f * saved.one + i * saved.waits for f, i, _ in saved.states.forward])
    return (
        ("forward", gathered, grads, forward, parts.piled, ahead + before - sent, parts.wide),
        ("forward", at_loss, grads, saved.at_head, parts.logits, ahead + before - sent, parts.chunk),
        ("backward", at_head, grads, saved.at_head, parts.copy, ahead, parts.head_table + parts.hiddens),
        ("backward", in_block, grads, saved.ever, parts.piled, ahead, at_work),
        ("backward", in_block, grads, reduced, 0.0, ahead + going, at_work),
        ("backward", gathered, grads, saved.others, 0.0, (ahead if splits else small) + max(0.0, going - behind), ends),
        ("optimizer", 0.0, grads, 0.0, 0.0, buckets, widened + STEP_BYTES),
    )


def _sharded_moments(
    work: Workload,
    strategy: Strategy,
    share: Share,
    held: Held,
    micro: MicroBytes,
    saved: Saved,
    element: int,
    parts: _Parts,
) -> tuple[Moment, ...]:
    """ZeRO 2 and 3 on FSDP2. It holds the input of one reduce-scatter until the next unit's, the root's into the next micro
    batch, and gathers a block ahead."""
    left, parameters, block, outside, (root_padding, block_padding) = held
    wide = max(4, element)
    group, layers = strategy.zero_group_size, share.layers
    late, piped = strategy.gradient_accumulation_steps > 1, strategy.pipeline_parallel_degree > 1
    splits = pipeline.splits(strategy)
    per_step = strategy.gather == "per_step"
    keeps = strategy.zero_stage == 2 or per_step
    # Gradients that are reduced once a step wait whole for the last micro batch, or under a pipeline for the step's end.
    waits = strategy.reduce == "per_step" and (late or piped)
    # Gathered and scattered, every rank's part is as long as the longest.
    parameters += group * (root_padding + layers * block_padding)
    outside, block = outside + group * root_padding, block + group * block_padding
    root, unit = outside * element, min(block, parameters - outside) * element
    wide_root, wide_block = wide * outside, wide * block
    at_head = parameters * element if keeps else root
    in_block = parameters * element if keeps else root + unit
    # One rank alone copies its shards where others gather them.
    ahead = unit if layers > 1 and group > 1 and not keeps and ENGINES[strategy.engine].gathers_ahead else 0.0
    all_checkpointed = share.checkpointed == layers
    last = micro.checkpointed if all_checkpointed else min(micro.layer, micro.checkpointed)
    # The feed-forward, of whose weights one has its gradient; or the end of attention, where all have: four gradients of the
    # residual stream's size, the norm's output and what came in are there, the rest of what was saved is gone.
    working = added = micro.working + parts.again
    weight = min(block, work.ffn_size * work.hidden_size / strategy.tensor_parallel_degree) * element
    if not splits:
        attention = 6 * micro.hidden - (micro.hidden if all_checkpointed else last)
        # Of fp32, gradients that are added to those of a micro batch before are no others.
        added = max(weight + working, attention + (unit if element < 4 else 0.0))
        working = max(weight + working, attention + unit)
    # Ids and positions, the step's own numbers, gradients of the norms that lie between two units; what a pipeline brought for
    # this pass and brings for the next.
    before, sent = saved.sent
    small = saved.numbers + STEP_BYTES + 4 * work.hidden_size * element * (1 + splits) + 2 * micro.boundary + sent
    forward = small + before - sent
    gradients, whole = left.gpu.gradients, wide * parameters if waits else 0.0
    head_table, at_end = parts.head_table, ("optimizer", 0.0, gradients, 0.0, 0.0, 0.0, STEP_BYTES)
    # One rank alone divides into a copy what it scatters.
    copies = 2 if group == 1 else 1
    if piped and waits:
        units = _Units(
            root,
            unit,
            wide_root,
            wide_block,
            at_head,
            in_block,
            ahead,
            last,
            working,
            added,
            weight,
            small,
            forward,
            whole,
        )
        return *_waiting_moments(strategy, share, micro, saved, parts, units), at_end
    early = gradients if late and not waits else 0.0
    behind_root, behind = (0.0, 0.0) if waits else (wide_root * late, wide_block * (layers > 1))
    # Blocks that are through have let go their activations and left their gradients, if they had none of a micro batch before.
    # Those that live on the host come back two at a time to the end.
    shard, gone = 0.0 if early else wide_block / group, last * (strategy.offload.activations == "none")
    # A unit lets go its parameters, then its gradients when the reduce-scatter has its input.
    stays = per_step and late
    goes = unit if keeps and not stays else 0.0
    through = max(1, layers - 1 - (ahead > 0)) if shard > gone + goes and not waits else 1
    # Those that are not computed again are the first to be through.
    behind_last = gone * through + max(0.0, micro.layer - last) * min(through, layers - share.checkpointed) * (gone > 0)
    kept, reduced = max(0.0, saved.ever - behind_last), early + through * shard
    computed = micro.again - parts.again if share.checkpointed and through >= layers - share.checkpointed else 0.0
    in_reduced = in_block - (through - 1) * goes
    in_scatter = in_reduced if stays else in_reduced - unit
    scattered, scattered_root = copies * wide_block / group, copies * wide_root / group
    if waits:
        scatter, last_scatter = max(wide_block, scattered), wide_root + max(wide_root, scattered_root)
        tables = parts.tables + max(whole, wide_root + wide_block + gradients)
    else:
        scatter, last_scatter = wide_block + max(unit, scattered), wide_root + max(root, scattered_root)
        tables = parts.tables + wide_block + gradients
    at_work = head_table * (parts.shared or not piped) + whole
    # Where passes are split, the first block's attention ends with all its own products waiting.
    ends = at_head if per_step else root + unit
    ended = (("backward", ends, early, saved.others, 0.0, small, behind_root + at_work + parts.ends),) * splits
    return (
        ("forward", at_head, early, saved.at_head, parts.logits, forward, behind_root + whole + parts.chunk),
        (
            "backward",
            at_head,
            early,
            saved.at_head,
            parts.copy,
            ahead + small,
            behind_root + whole + head_table + parts.hiddens,
        ),
        ("backward", in_block, early, saved.ever, parts.piled, ahead + small, behind_root + at_work + working),
        ("backward", in_reduced, reduced, kept, parts.piled, ahead + small, behind + at_work + working + computed),
        ("backward", in_scatter, reduced, kept, parts.piled, ahead + small, at_work + micro.hidden + scatter),
        ("backward", root, 0.0, saved.others, 0.0, small, tables + 2 * micro.hidden),
        ("backward", root * stays, gradients, saved.others, 0.0, small, last_scatter),
        *ended,
        at_end,
    )


class _Units(NamedTuple):
    """Of ZeRO 2 and 3, bytes: what stands outside the blocks, and one block."""

    root: float
    unit: float
    wide_root: float
    wide_block: float
    """Gradients, as they are reduced."""
    at_head: float
    in_block: float
    """Gathered parameters."""
    ahead: float
    last: float
    """Activations of a pass's last block."""
    working: float
    added: float
    """The same where gradients of a micro batch before are there."""
    weight: float
    """A gradient, as it comes."""
    small: float
    forward: float
    """As a forward pass ends, and behind it."""
    whole: float
    """Gradients that wait for the step's end, when all are there."""


def _waiting_moments(
    strategy: Strategy, share: Share, micro: MicroBytes, saved: Saved, parts: _Parts, units: _Units
) -> tuple[Moment, ...]:
    """A pipeline's, whose whole gradients wait for the step's end: a stage's come with its first pass, when activations may have
    begun to go."""
    root, unit, wide_root, wide_block, at_head, in_block, ahead, last, working, added, weight, small, forward, whole = (
        units
    )
    blocks, group = whole - wide_root, strategy.zero_group_size
    per_step, splits = strategy.gather == "per_step", pipeline.splits(strategy)

    one, waits, states = saved.one, saved.waits, saved.states

    heads = pipeline.heads_in_flight(strategy)

    def fullest(states: tuple[State, ...], at_work: int, more: float = 0.0) -> tuple[float, float, float]:
        """(activations, gradients, logits), of them `at_work` in a pass. Gradients outside the blocks come with the head, or
        with the embedding, the last stage."""
        found = -1.0, 0.0, 0.0
        for flights, inputs, part in states:
            # Of those that gpipe's head keeps.
            left = min(1.0, max(0.0, flights - at_work) / (heads - 1)) if heads > 1 else 1.0
            kept = flights * one + inputs * waits + saved.piled * left + more
            had = part * blocks + wide_root * (part > 0.0 or inputs > 0.0 if share.head or splits else part == 1.0)
            if kept + had + parts.piled * left > sum(found):
                found = kept, had, parts.piled * left
        return found

    now, before, piled = fullest(states.begin, 1)
    then, after, piled_after = fullest(states.end, 0)
    at_heads, by_heads, piled_by = fullest(states.head, 1, saved.final)
    come, there, piled_there = fullest(states.forward, 1)
    # What a block is gathered into is let go when the next one is gathered.
    flat = unit if group > 1 and not per_step else 0.0
    # A unit is let go when it has gone backward, and gathered again by the next pass through it.
    one_block, stays = (at_head, at_head) if per_step else (root + unit, root)
    turned, rise, table = now + saved.turned, now + saved.ever - saved.most, parts.head_table
    if before >= whole and not splits:
        working = added
    # Of fp32, the output table's gradient has been added to what a micro batch before left.
    at_work = 0.0 if before and unit == wide_block else table
    embedding = parts.tables + 2 * micro.hidden
    ends: tuple[Moment, ...]
    if splits:
        ends = (
            ("backward", one_block, 0.0, rise, 0.0, small, at_work + working + before),
            ("backward", one_block, 0.0, turned, 0.0, small, at_work + parts.ends + before),
            ("backward", stays, 0.0, turned, 0.0, small, embedding + before),
            ("backward", stays, 0.0, then, 0.0, small, unit + after),
        )
    else:
        # The first pass ends without its last block's gradients, and with those of what stands outside only if they came before.
        late = wide_root * (states.begin[0].gradients < 1.0 and (not share.head or strategy.num_virtual_stages == 1))
        # Of a rank that computes some blocks again it is one of those.
        computed = micro.again - parts.again if share.checkpointed else 0.0
        in_last = units.working + computed + after - late - wide_block
        ends = (
            ("backward", one_block, 0.0, then + last, piled_after, small, table + in_last),
            ("backward", stays, 0.0, then, 0.0, small, max(embedding, weight + 4 * micro.hidden) + after),
        )
    # One rank alone divides into a copy what it scatters.
    scatter = max(wide_root, wide_block) * (2 if group == 1 else 1)
    return (
        ("forward", in_block, 0.0, come, piled_there, forward + flat, parts.wide + there),
        ("forward", at_head, 0.0, at_heads, parts.logits - parts.piled + piled_by, forward, parts.chunk + by_heads),
        (
            "backward",
            at_head,
            0.0,
            at_heads,
            parts.copy - parts.piled + piled_by,
            ahead + small,
            table + parts.hiddens + by_heads,
        ),
        ("backward", in_block, 0.0, now, piled, ahead + small, at_work + working + before),
        *ends,
        ("backward", at_head if per_step else 0.0, 0.0, 0.0, 0.0, small, whole + scatter),
    )
