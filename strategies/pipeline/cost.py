"""Pipeline parallelism, priced: what a pipeline rank holds, micro batches in flight, the bubble, transfers.

Source: GPipe arXiv:1811.06965; 1F1B and interleaving arXiv:2104.04473, section 2.2; zero bubble arXiv:2401.10241."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.constants import TIME, TimeConstants
from strategies.links import Message, all_reduce_s
from strategies.pipeline.in_flight import first_in_flight, heads_in_flight, in_flight, kept_sends, splits, states
from strategies.price.roofline import Roofline
from strategies.rank import (
    InFlight,
    InFlightMaxima,
    MicroBatchBytes,
    Question,
    SavedActivations,
    Shape,
    Share,
    SlowestRank,
)
from strategies.room import Room
from strategies.rules import Rule
from strategies.sizes import FIRST, GroupRanks, table
from strategies.strategy import INTERLEAVED, SPLIT_BACKWARD, Schedule, Strategy
from strategies.workload import Workload
from strategies.zero.state_bytes import gradient_element


def bubble_fraction(
    schedule: Schedule, ranks: int, virtual: int, micro_batches: int, constants: TimeConstants = TIME
) -> float:
    """Return idle over busy time where the ranks are equal and nothing is recomputed: (p - 1) / (m v); a third of it where weight
    gradients fill the gaps, which takes longer itself."""
    if ranks == 1:
        return 0.0
    fraction = (ranks - 1) / (micro_batches * virtual)
    return fraction / 3 + constants.split_s if schedule in SPLIT_BACKWARD else fraction


def bubble_s(
    strategy: Strategy, *, once_s: float, slowest_s: float, again_s: float = 0.0, constants: TimeConstants = TIME
) -> float:
    """Return the seconds in which the slowest rank waits for the pipeline to fill and drain: one pass over the other ranks.

    Equal ranks: (p - 1) / (m v). With split backward passes a rank fills the gaps of its draining with weights' passes, and waits
    for forward + inputs - weights: a third where these are equal, half where a forward pass is repeated before each
    (arXiv:2401.10241, section 2.2). The order of zbv is made for equal passes: repeated ones stall it with every micro batch
    (timeline.py plays it through).

    Args:
        once_s: One micro batch over all ranks, forward and backward.
        slowest_s: The same over the slowest rank.
        again_s: Part of slowest_s that is computed again."""
    if strategy.pipeline_parallel_degree == 1:
        return 0.0
    times, waits = strategy.gradient_accumulation_steps, (once_s - slowest_s) / strategy.num_virtual_stages
    if strategy.pipeline_schedule not in SPLIT_BACKWARD:
        return waits
    weights_s = (slowest_s - again_s) / 3
    waits *= (slowest_s - 2 * weights_s) / slowest_s
    if strategy.pipeline_schedule == "zbv":
        waits += (times - 1) * again_s * (1 if strategy.pipeline_parallel_degree == 2 else 2)
    return waits + constants.split_s * slowest_s * times


def messages(work: Workload, borders: int, *, whole_split: int, tokens: int, element: int) -> tuple[Message, ...]:
    """Return the activations and their gradients of one micro batch at so many borders of a rank: at each it sends one and
    receives the other. Every tensor rank sends its own copy, split over `whole_split` ranks where the activations are."""
    if not borders:
        return ()
    num_bytes = borders * tokens * work.hidden_size * element / whole_split
    return (
        Message("send", "pipeline", element, num_bytes, borders),
        Message("receive", "pipeline", element, num_bytes, borders),
    )


def shared_message(
    work: Workload, strategy: Strategy, share: Share, *, split: int, element: int, ranks: GroupRanks = FIRST
) -> tuple[Message, ...]:
    """Return the message that adds up, once a step, the gradient of a tied table between the ranks of the first and the last
    stage: one of a rank's shard. `split`: ranks of the tensor group; `element`: bytes of a gradient."""
    tied = work.trains.tied_embeddings and strategy.pipeline_parallel_degree > 1
    if not tied or share.embedding == share.head:
        return ()
    rows = table(work, split, strategy.num_shards, ranks)
    return (Message("all_reduce", "shared", element, rows * element),)


_CARRIED = InFlightMaxima(*((InFlight(at_once, 0.0, 1.0),) for at_once in (1.0, 0.0, 0.0, 1.0)))

SCHEDULE = ("pipeline_parallel_degree", "pipeline_schedule", "num_virtual_stages", "gradient_accumulation_steps")


class Cut(Room):
    """The first act of a pipeline: which layers a rank holds. Shares of the model are cut before any price is asked for."""

    name = "cut"
    apply = ("strategies.pipeline.apply:cut",)


class Pipeline(Room):
    """The second act of a pipeline: which micro batches are in flight, and how long ranks wait for each other."""

    name = "schedule"
    reads: Mapping[str, tuple[str, ...]] = {
        "saved": SCHEDULE,
        "messages": (
            *SCHEDULE,
            *("micro_batch_size", "states", "num_shards"),
        ),
        "step_s": (*SCHEDULE, "num_gpus", "micro_batch_size", "states", "num_shards"),
    }
    impossible = (
        Rule(
            fields=("num_virtual_stages", "pipeline_schedule"),
            applies=lambda s: (
                s.num_virtual_stages != 2 and s.pipeline_schedule == "zbv" and s.pipeline_parallel_degree > 1
            ),
            reason="zbv holds exactly 2 stages on each pipeline rank, num_virtual_stages is {num_virtual_stages}",
            fix="num_virtual_stages: 2",
        ),
        Rule(
            fields=("num_virtual_stages", "pipeline_schedule"),
            applies=lambda s: (
                s.num_virtual_stages > 1 and s.pipeline_schedule in ("gpipe", "1f1b") and s.pipeline_parallel_degree > 1
            ),
            reason="{pipeline_schedule} holds one stage on each pipeline rank, num_virtual_stages is {num_virtual_stages}",
            fix="pipeline_schedule: interleaved_1f1b, or num_virtual_stages: 1",
        ),
        Rule(
            fields=("pipeline_schedule", "pipeline_parallel_degree", "gradient_accumulation_steps"),
            applies=lambda s: (
                s.num_virtual_stages > 1
                and s.pipeline_schedule in INTERLEAVED
                and s.gradient_accumulation_steps % s.pipeline_parallel_degree != 0
            ),
            reason="{pipeline_schedule} over {num_virtual_stages} virtual stages runs micro batches in whole rounds of the "
            "pipeline: gradient_accumulation_steps {gradient_accumulation_steps} is no multiple of "
            "{pipeline_parallel_degree}",
            fix="a micro batch or data-parallel degree that makes it one, or pipeline_schedule: 1f1b",
        ),
    )
    without_effect = (
        Rule(
            fields=("pipeline_schedule", "pipeline_parallel_degree"),
            applies=lambda s: s.pipeline_parallel_degree == 1 and s.num_virtual_stages > 1,
            reason="num_virtual_stages {num_virtual_stages} has no effect at pipeline_parallel_degree 1",
            fix="leave it out",
        ),
    )
    apply = ("strategies.pipeline.apply:schedule",)

    def saved(
        self, strategy: Strategy, shape: Shape, share: Share, rank: int, micro: MicroBatchBytes, saved: SavedActivations
    ) -> SavedActivations:
        one, final, piped = saved.one, micro.final * share.head, strategy.pipeline_parallel_degree > 1
        sends, splitting, heads = kept_sends(strategy, rank), splits(strategy), heads_in_flight(strategy)
        boundary = micro.residual if piped else 0.0
        saved = saved._replace(
            final=final,
            numbers=micro.numbers * first_in_flight(strategy) if share.embedding else 0.0,
            unreceived_forward=sends[0] * boundary,
            unreceived_backward=sends[1] * boundary,
            boundary=boundary,
            piped=piped,
            splits=splitting,
            heads=heads,
        )
        if saved.come_back:
            # What came in from another rank stays, beside its copy.
            given = boundary * in_flight(strategy, rank) * (strategy.num_virtual_stages - share.embedding)
            return saved._replace(
                before_backward=one + given,
                peak_in_backward=one + given,
                freed_by_backward=-one,
                at_head=given + final,
                waiting_micro_batches=given,
                moments=_CARRIED,
                host_bytes=saved.host_bytes * in_flight(strategy, 0),
            )
        moments = states(strategy, rank)
        freed = -one / strategy.num_virtual_stages
        if not splitting:
            waiting = final * (heads - 1)
            most = moments.begin[0].forward * one + waiting
            return saved._replace(
                before_backward=most,
                peak_in_backward=most,
                freed_by_backward=freed,
                at_head=most + final,
                waiting_micro_batches=waiting,
                moments=moments,
            )
        waits = share.layers * micro.pending
        # A pass over the inputs turns what a stage's forward left into what its weights wait for, block by block.
        freed += waits / strategy.num_virtual_stages
        last = micro.checkpointed if share.all_checkpointed else min(micro.layer, micro.checkpointed)
        most = max([forward * one + inputs * waits for forward, inputs, _ in moments.begin])
        return saved._replace(
            before_backward=most,
            peak_in_backward=most + max(0.0, freed + last - micro.pending),
            freed_by_backward=freed,
            at_head=most + final,
            waits=waits,
            moments=moments,
        )

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
        work, element, tokens = question.work, question.element, shape.tokens(question, strategy)
        crossing = messages(work, borders, whole_split=shape.whole_split, tokens=tokens, element=element)
        reduced = gradient_element(strategy, element)
        return (
            *(message.times(strategy.gradient_accumulation_steps) for message in crossing),
            *shared_message(work, strategy, share, split=shape.split, element=reduced, ranks=ranks),
        )

    def step_s(
        self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape, rank: SlowestRank
    ) -> Mapping[str, float]:
        if strategy.pipeline_parallel_degree == 1:
            return {}
        bubble = bubble_s(
            strategy, once_s=rank.all_ranks_s, slowest_s=rank.pass_s, again_s=rank.again_s, constants=roof.constants
        )
        tokens = shape.tokens(question, strategy)
        crossing = _crossing_s(roof, strategy, rank.most_borders, whole_split=shape.whole_split, tokens=tokens)
        shared = tied_s(roof, strategy, rank.first_share, shape.split)
        return {"pipeline_bubble_s": bubble, "pipeline_transfer_s": crossing + shared}

    def choice_words(self, strategy: Strategy) -> str:
        if strategy.pipeline_parallel_degree == 1:
            return ""
        virtual = f", {strategy.num_virtual_stages} stages a rank" if strategy.num_virtual_stages > 1 else ""
        return f"schedule {strategy.pipeline_schedule}{virtual}"


def _crossing_s(roof: Roofline, strategy: Strategy, borders: int, *, whole_split: int, tokens: int) -> float:
    """Return the seconds of stage-to-stage messages that no compute hides, of the rank with the most borders: it sends and
    receives at the same time."""
    degree, num_gpus, per_node = strategy.pipeline_parallel_degree, strategy.num_gpus, roof.cluster.gpus_per_node
    # Where some neighbours are on two nodes, the others wait for them.
    stride = num_gpus // degree if num_gpus <= per_node else max(num_gpus // degree, per_node)
    pairs = roof.links.ring(2, stride, num_gpus)
    sent, _ = messages(roof.work, borders, whole_split=whole_split, tokens=tokens, element=roof.element)
    one = sent.num_bytes / pairs.bytes_per_s + sent.count * roof.constants.transfer_s
    fill = (degree - 1) / strategy.num_virtual_stages
    return roof.links.constants.transfer * (strategy.gradient_accumulation_steps + fill) * one


def tied_s(roof: Roofline, strategy: Strategy, first: Share, split: int) -> float:
    """Return the seconds of a tied table's gradient between the ranks of the first and the last stage, once a step."""
    degree, num_gpus = strategy.pipeline_parallel_degree, strategy.num_gpus
    reduced, seconds = gradient_element(strategy, roof.element), 0.0
    for message in shared_message(roof.work, strategy, first, split=split, element=reduced):
        ends = roof.links.ring(2, (degree - 1) * (num_gpus // degree), num_gpus)
        seconds += all_reduce_s(ends, message.num_bytes) + roof.wait_s
    return seconds


CUT, SCHEDULED = Cut(), Pipeline()
