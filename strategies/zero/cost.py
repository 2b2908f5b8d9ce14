"""Data parallelism and ZeRO, priced: bytes of the states, and the messages between replicas.

Source: ZeRO, arXiv:1910.02054, section 3 and figure 1. We depart where a stack does: the table below. What the native engine
holds at each moment is written in apply.py; these functions are the same table in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from clusters.cluster import Cluster
from strategies.constants import TimeConstants
from strategies.engines.engine import BUCKET_BYTES
from strategies.links import Links, Message, all_reduce_s, half_s
from strategies.price.roofline import Roofline
from strategies.rank import (
    Hideable,
    MicroBatchBytes,
    ModelStates,
    OnceSeconds,
    Padding,
    PeakCandidate,
    Question,
    SavedActivations,
    Shape,
    Share,
)
from strategies.room import Room
from strategies.rules import Rule
from strategies.sizes import FIRST, GroupRanks, Sizes, num_buckets, padded, part
from strategies.strategy import Strategy
from strategies.workload import Tensor, Workload
from strategies.zero.alive import Rank
from strategies.zero.eight_bit import MOMENT_BYTES, fraction
from strategies.zero.peak import least_bytes, native_candidates, published_candidates
from strategies.zero.state_bytes import BYTES, SHARDING, frozen_bytes, gathers, gradient_element, state_bytes


def padding(work: Workload, split: int, group: int, *, embedding: bool, head: bool) -> Padding:
    """Return the elements that the fullest rank of a group owns beyond its even part, since rows of a parameter are dealt
    whole. Buckets and gathered copies hold as many for every rank of the group."""
    if group == 1:
        return Padding()

    def uneven(tensors: Iterable[Tensor]) -> float:
        """Elements of the first rank's rows beyond an even part of the rows, over tensor parallelism."""
        mine = [part(tensor, split, 0) for tensor in tensors]
        return sum((-(-tensor.rows // group) - tensor.rows / group) * tensor.width for tensor in mine)

    outside = 0.0
    if embedding:
        outside += uneven(work.embedding_tensors)
    elif head and work.tied_embeddings:
        outside += uneven(work.embedding_tensors[:1])
    if head:
        outside += uneven(work.head_tensors)
    return Padding(outside, uneven(work.block_tensors))


def messages(
    work: Workload,
    strategy: Strategy,
    share: Share,
    *,
    split: int,
    element: int,
    bucket_bytes: float,
    ranks: GroupRanks = FIRST,
) -> tuple[Message, ...]:
    """A step's gathers and reductions of one rank's parameters, padding included: what apply.py says that buckets and FSDP2
    send, and over how many replicas of a shard.

    Args:
        split: ranks of the tensor group.
        element: bytes of a parameter in use.
        bucket_bytes: of gradients in one message at ZeRO 0 and 1.
    """
    if strategy.num_replicas == 1:
        return ()
    stage, shards = strategy.zero_stage, strategy.num_shards
    everything, work = work, work.trains
    sizes = padded(work, split, ranks.tensor, shards)
    outside = sizes.outside(work, embedding=share.embedding, head=share.head)
    reduced = element if strategy.states == "sharded_fp32" and not work.native else gradient_element(strategy, element)
    blocks = share.layers * sizes.block
    if stage >= 2:  # a unit is a block, or what stands outside the blocks
        count: float = share.layers + bool(outside)
    elif work.native:
        held = share.layers, share.embedding, share.head
        count = num_buckets(work, *held, split, ranks.tensor, bucket_bytes / reduced)
    else:
        count = (blocks + outside) * reduced / bucket_bytes + 1
    scatter, sent = Message("reduce_scatter", "shard", reduced, (blocks + outside) * reduced, count), []
    if shards > 1:
        if gathers(strategy):
            per_block, per_rest = _gathers(strategy)
            # Stage 2 shards what is trained alone.
            whole = everything if stage == 3 else work
            parts = padded(whole, split, ranks.tensor, shards)
            rest = parts.outside(whole, embedding=share.embedding, head=share.head)
            num_bytes = (share.layers * parts.block * per_block + rest * per_rest) * element
            sent.append(
                Message("all_gather", "shard", element, num_bytes, share.layers * per_block + bool(rest) * per_rest)
            )
        else:
            sent.append(scatter._replace(kind="all_gather", element=element, num_bytes=(blocks + outside) * element))
        if _reduces_once(strategy):
            sent.append(scatter)
        else:
            times, (number, left) = strategy.gradient_accumulation_steps, _rest(strategy, share, sizes, outside, work)
            num_bytes = (times * blocks + left) * reduced
            sent.append(scatter._replace(num_bytes=num_bytes, count=times * share.layers + number))
    if shards < strategy.num_replicas:
        sent.append(scatter._replace(kind="all_reduce", group="replicate", num_bytes=scatter.num_bytes / shards))
    return tuple(message for message in sent if message.count)


def _gathers(strategy: Strategy) -> tuple[int, int]:
    """How often a step gathers (a block, what stands outside the blocks): at stage 3 a block is let go between forward and
    backward, all else when the backward pass ends."""
    if strategy.gather == "per_step":
        return 1, 1
    times = strategy.gradient_accumulation_steps
    return times * (2 if strategy.zero_stage == 3 else 1), times


def _reduces_once(strategy: Strategy) -> bool:
    """Once a step, not with every micro batch."""
    return strategy.zero_stage < 2 or strategy.reduce == "per_step"


def _rest(strategy: Strategy, share: Share, sizes: Sizes, outside: int, work: Workload) -> tuple[int, int]:
    """(messages, elements of all of them) that reduce with every micro batch what stands outside the blocks.

    A rank of a pipeline does so after the backward pass of each stage that has some of it, apart for embedding and head. Where
    replicas of a shard wait for the last micro batch, several stages of a rank would leave them different parts: once."""
    times = strategy.gradient_accumulation_steps
    if share.stages > 1:
        if strategy.num_shards < strategy.num_replicas:
            return int(outside > 0), outside
        if share.embedding and share.head:
            return 2 * times, times * (sizes.embedding + sizes.head + sizes.table * work.tied_embeddings)
    return times * (outside > 0), times * outside


def norm_message(strategy: Strategy) -> tuple[Message, ...]:
    """Once a step: loss and squared gradient norm, two fp64 numbers, over everybody."""
    return (Message("all_reduce", "world", 8, 16),) if strategy.num_gpus > 1 else ()


LAST_BACKWARD = 2 / 3
"""A backward pass's part of a pass of one micro batch, forward and backward."""


def data_parallel_s(work: Workload, strategy: Strategy, links: Links, sent: Sequence[Message]) -> OnceSeconds:
    """Return the seconds of `messages` and what of them compute can hide, by window.

    What is reduced once a step hides behind the last micro batch's backward pass, bucket by bucket: the last bucket or unit
    has nothing behind it. What comes with every micro batch hides behind all of them. Compute that shares its multiprocessors
    and memory with messages hides no more than a part of them."""
    size, shard, num_gpus = strategy.num_replicas, strategy.num_shards, strategy.num_gpus
    stride = strategy.degrees.replica_stride
    cpu, seconds, windows = links.cluster.accelerator.kind == "cpu", 0.0, dict[float, float]()
    for message in sent:
        if message.group == "replicate":
            group = links.ring(size // shard, stride * shard, num_gpus)
            took, bare = (all_reduce_s(group, message.num_bytes, messages=n) for n in (message.count, 0))
        else:
            group = links.ring(shard, stride, num_gpus)
            took, bare = (half_s(group, message.num_bytes, messages=n, kind=message.kind) for n in (message.count, 0))
        if cpu:  # nothing hides; each unit is copied in before it is scattered and out after it was gathered
            copied = 2 * message.num_bytes if strategy.zero_stage >= 2 and message.group != "replicate" else 0.0
            took += copied / _copy_rate(links.cluster)
            hidden = Hideable(0.0, 0.0)
        else:
            hidden = _hideable(work, strategy, links.constants, message, took, bare)
        seconds += took
        if hidden.seconds:
            windows[hidden.passes] = windows.get(hidden.passes, 0.0) + hidden.seconds
    hideable = tuple(Hideable(behind, passes) for passes, behind in windows.items())
    return OnceSeconds(seconds, seconds - sum(windows.values()), hideable)


def _hideable(
    work: Workload, strategy: Strategy, constants: TimeConstants, message: Message, took: float, bare: float
) -> Hideable:
    """Return what compute can hide of messages that take so long, `bare` of it their bytes alone."""
    times = strategy.gradient_accumulation_steps
    if strategy.zero_stage >= 2:
        seconds = constants.hidden_sharded * took
        if message.group == "replicate" or (message.kind == "reduce_scatter" and _reduces_once(strategy)):
            return Hideable(seconds, LAST_BACKWARD)
        return Hideable(seconds, times)
    if not work.native:  # some of these stacks overlap, some do not
        return Hideable(constants.hidden * bare, 1.0)
    if message.kind == "all_gather":  # when the optimizer has stepped; the next pass waits for its parameters
        return Hideable(0.0, 0.0)
    behind = max(0.0, 1 - BUCKET_BYTES / message.num_bytes)
    return Hideable(constants.hidden_sharded * behind * bare, LAST_BACKWARD)


def _copy_rate(cluster: Cluster) -> float:
    """Bytes read and written per second by copies into new memory."""
    measured = cluster.calibration.elementwise_bytes_per_s if cluster.calibration else None
    return measured or cluster.accelerator.memory_bytes_per_s


def step_parameters_s(roof: Roofline, strategy: Strategy, states: ModelStates) -> float:
    """Return the seconds of the optimizer's step on the accelerator, with its fixed overhead. By bytes: master weights and
    moments are read and written, gradients read for the norm, read for the step and cleared, parameters written."""
    element, calibration = roof.element, roof.cluster.calibration
    measured = calibration.optimizer_bytes_per_s if calibration else None
    gradients = 3 * states.owned * min(4, BYTES[strategy.states][1])
    if measured:
        step = states.owned * 16 * element / 4 / measured + (gradients + states.owned * element) / roof.bandwidth
    else:
        held = states.gpu.master_weights + states.gpu.optimizer_states
        step = (2 * held + gradients + states.owned * element) / roof.bandwidth
    return step + roof.constants.step_s if roof.cluster.accelerator.kind == "cuda" else step


PEAK = (*SHARDING, "num_shards", "num_replicas", "gather", "reduce", "gradient_accumulation_steps")


class Zero(Room):
    """Replicas of the model, and what they share out among each other."""

    name = "zero"
    reads: Mapping[str, tuple[str, ...]] = {
        "model_states": (*SHARDING, "num_shards"),
        "micro_batch": ("zero_stage",),
        "peak_candidates": PEAK,
        "least_bytes": (*SHARDING, "gather", "reduce"),
        "messages": (
            *(*SHARDING, "num_shards", "num_replicas", "degrees", "num_gpus", "gather", "reduce"),
            "gradient_accumulation_steps",
        ),
        "once_s": (
            *(*SHARDING, "num_shards", "num_replicas", "degrees", "num_gpus", "gather", "reduce"),
            "gradient_accumulation_steps",
        ),
        "update_s": ("states",),
    }
    impossible = (
        Rule(
            fields=("zero_group_size", "data_parallel_degree"),
            applies=lambda s: s.context_parallel_degree == 1 and s.data_parallel_degree % s.zero_group_size != 0,
            reason="zero_group_size {zero_group_size} does not divide data_parallel_degree {data_parallel_degree}",
            fix="a group size that divides the data-parallel degree",
        ),
        Rule(
            fields=("zero_group_size", "data_parallel_degree", "context_parallel_degree"),
            applies=lambda s: s.context_parallel_degree > 1 and s.num_replicas % s.zero_group_size != 0,
            reason="zero_group_size {zero_group_size} does not divide data_parallel_degree {data_parallel_degree} x "
            "context_parallel_degree {context_parallel_degree}",
            fix="a group size that divides their product",
        ),
    )
    without_effect = (
        Rule(
            fields=("zero_stage", "data_parallel_degree"),
            applies=lambda s: s.zero_stage > 0 and s.num_replicas == 1,
            reason="zero_stage {zero_stage} has nothing to shard over at data_parallel_degree 1",
            fix="leave it out",
        ),
        Rule(
            fields=("zero_group_size", "zero_stage"),
            applies=lambda s: s.zero_group_size > 1 and s.zero_stage == 0,
            reason="zero_group_size {zero_group_size} has no effect at zero_stage 0",
            fix="leave it out",
        ),
        Rule(
            fields=("gather", "zero_stage"),
            # At stage 2, FSDP2 shards fp32 parameters too, and gathers them for every micro batch unless told otherwise.
            applies=lambda s: (
                s.gather == "per_step"
                and (s.zero_stage < 2 or (s.zero_stage == 2 and s.states not in ("sharded_fp32", "full")))
                and s.offload.parameters == "none"
            ),
            reason="gather: per_step has no effect at zero_stage {zero_stage} with states {states}: parameters are not "
            "sharded",
            fix="leave it out",
        ),
    )
    apply = ("strategies.zero.apply:apply",)

    def model_states(
        self, question: Question, strategy: Strategy, shape: Shape, share: Share, states: ModelStates
    ) -> ModelStates:
        work, rows = question.work, Padding()
        if work.trained is not None and strategy.zero_stage:
            group = strategy.zero_group_size
            whole = padded(work.trained, shape.split, 0, group)
            ends = whole.outside(work.trained, embedding=share.embedding, head=share.head)
            of_block = (whole.block - states.trained_block) / group if share.layers else 0.0
            rows = Padding((ends - states.trained_outside) / group, of_block)
        elif work.native and strategy.zero_stage:
            at = {"embedding": share.embedding, "head": share.head}
            rows = padding(work, shape.split, strategy.zero_group_size, **at)
        found = dealt(states, strategy, question.precision, rows, share.layers)
        if work.eight_bit:
            found = _with_eight_bits(found, fraction(work, share.layers, share.embedding, share.head))
        if work.trained is None or states.parameters == states.trained:
            return found
        return _with_frozen(work, found, strategy, share, shape.split, question.element)

    def peak_candidates(
        self,
        question: Question,
        strategy: Strategy,
        share: Share,
        states: ModelStates,
        micro: MicroBatchBytes,
        saved: SavedActivations,
    ) -> tuple[PeakCandidate, ...]:
        make = native_candidates if question.work.native else published_candidates
        return make(Rank(question, strategy, share, states, micro, saved))

    def least_bytes(
        self, question: Question, strategy: Strategy, states: ModelStates, *, late: bool, piped: bool
    ) -> float:
        return least_bytes(question, strategy, states, late=late, piped=piped)

    def micro_batch(
        self, question: Question, strategy: Strategy, shape: Shape, micro: MicroBatchBytes
    ) -> MicroBatchBytes:
        if question.work.native or strategy.zero_stage < 2:
            return micro
        # FSDP stacks, whose fused loss writes its gradient in place.
        return micro._replace(logits_at_loss=question.constants.sharded_logit_bytes / 2 * micro.logits_copy)

    def messages(
        self,
        question: Question,
        strategy: Strategy,
        shape: Shape,
        share: Share,
        *,
        borders: int,
        ranks: GroupRanks = FIRST,
        bucket_bytes: float,
    ) -> tuple[Message, ...]:
        sizes = {"split": shape.split, "element": question.element, "bucket_bytes": bucket_bytes, "ranks": ranks}
        return (*messages(question.work, strategy, share, **sizes), *norm_message(strategy))  # type: ignore[arg-type]

    def once_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape, share: Share) -> OnceSeconds:
        bucket_bytes = BUCKET_BYTES if question.work.native else roof.links.constants.bucket_bytes
        sizes = {"split": shape.split, "element": question.element, "bucket_bytes": bucket_bytes}
        sent = messages(question.work, strategy, share, **sizes)  # type: ignore[arg-type]
        found = data_parallel_s(question.work, strategy, roof.links, sent)
        world = roof.links.ring(strategy.num_gpus, 1, strategy.num_gpus)
        norm = sum(all_reduce_s(world, message.num_bytes) for message in norm_message(strategy))
        return found._replace(seconds=found.seconds + norm, exposed_s=found.exposed_s + norm)

    def update_s(self, roof: Roofline, strategy: Strategy, states: ModelStates) -> Mapping[str, float]:
        return {"optimizer_s": step_parameters_s(roof, strategy, states)}

    def choice_words(self, strategy: Strategy) -> str:
        return f"ZeRO {strategy.zero_stage}" if strategy.num_replicas > 1 else ""


def sharding_words(strategy: Strategy) -> str:
    """Return "ZeRO 1 in groups of 8"; the groups where they are smaller than all replicas."""
    shards = strategy.num_shards
    group = f" in groups of {shards}" if strategy.zero_stage and shards < strategy.num_replicas else ""
    return f"ZeRO {strategy.zero_stage}{group}"


def dealt(states: ModelStates, strategy: Strategy, precision: str, rows: Padding, layers: int) -> ModelStates:
    """Return the states as a ZeRO group deals them out, with the padding of the rank that has the most."""
    shards = strategy.num_shards
    return states._replace(
        gpu=state_bytes(states.trained, strategy, precision, rows.outside + layers * rows.block),
        owned=states.trained / shards,
        largest=states.largest / shards,
        padding=rows,
    )


def _with_eight_bits(states: ModelStates, part: float) -> ModelStates:
    """Return the states with moments of 8 bits for a part of the parameters."""
    gpu = states.gpu
    moments = gpu.optimizer_states / BYTES["mixed"][3] * (part * MOMENT_BYTES + (1 - part) * BYTES["mixed"][3])
    return states._replace(gpu=gpu._replace(optimizer_states=moments))


def _with_frozen(
    work: Workload, states: ModelStates, strategy: Strategy, share: Share, split: int, element: int
) -> ModelStates:
    """Return the states with the bytes of what is not trained."""
    assert work.trained is not None
    rows = Padding()
    if strategy.zero_stage == 3:
        every, mine = (padded(each, split, 0, strategy.zero_group_size) for each in (work, work.trained))
        block = states.block - states.trained_block
        at = {"embedding": share.embedding, "head": share.head}
        ends = every.outside(work, **at) - mine.outside(work.trained, **at)
        outside, group = states.outside - states.trained_outside, strategy.zero_group_size
        rows = Padding((ends - outside) / group, (every.block - mine.block - block) / group)
    padding = rows.outside + share.layers * rows.block
    frozen = frozen_bytes(states.parameters - states.trained, strategy, element, padding)
    gpu = states.gpu._replace(parameters=states.gpu.parameters + frozen)
    return states._replace(gpu=gpu, frozen_padding=rows)


ROOM = Zero()
