"""Context parallelism, priced: what a rank holds and sends while keys and values travel around the ring.

Source: ring attention, arXiv:2310.01889, section 3, as ring.py does it: two chunks of 2c a rank, so that each step of the ring is
half a square. Parameters, gradients and states are those of replicas: strategies/zero has them.

T tokens of a rank, c context_parallel_degree, e bytes of an element; gradients of keys and values travel in at least fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from strategies.context.halves import positions
from strategies.links import Message
from strategies.price.roofline import Roofline
from strategies.rank import MicroBatchBytes, PassSeconds, Question, Shape, Share
from strategies.recompute.cost import score_bytes
from strategies.room import Room
from strategies.sizes import FIRST, GroupRanks
from strategies.strategy import Strategy
from strategies.workload import Workload

SEARCHED_FROM = 8192
"""Tokens of a sequence from which a search tries degrees above 1: shorter ones are split as well by data parallelism."""


def degrees(sequence_length: int, most: int) -> list[int]:
    """Return the degrees that a search tries: powers of two whose chunks are even."""
    if sequence_length < SEARCHED_FROM:
        return [1]
    tried = [2**i for i in range(max(1, most).bit_length())]
    return [1, *(n for n in tried[1:] if n <= most and sequence_length % (2 * n) == 0)]


def wide(element: int) -> int:
    """Return the bytes of an element of what is merged and added up."""
    return max(4, element)


def ring_backward_bytes(size: int, queries: float, keys: float, element: int) -> float:
    """Return the most bytes alive in a layer's backward pass around the ring: keys and values that are here and that arrive,
    their gradients and the queries', and what one step's kernel returned.

    Args:
        size: ranks of the ring.
        queries, keys: elements of this rank's queries, and of its keys.
    """
    pair, gradients, of_queries = 2 * keys * element, 2 * keys * wide(element), queries * wide(element)
    first = 2 * pair + gradients + (queries + 2 * keys) * element
    # Halves of the queries over all keys, or all queries over halves of the keys; the gradients are on their way meanwhile.
    step = max(queries + keys, queries / 2 + 2 * keys) * element
    later = (2 * pair if size > 2 else pair) + 2 * gradients + step
    return max(first, later) + of_queries


def messages(
    work: Workload, strategy: Strategy, share: Share, *, split: int, tokens: int, element: int
) -> tuple[Message, ...]:
    """Return what a rank sends and receives around the ring for one micro batch: keys and values as one tensor, forward, again
    where a layer is recomputed, and backward; their gradients, which go home."""
    c = strategy.context_parallel_degree
    if c == 1:
        return ()
    both = 2 * tokens * (work.kv_size // split)
    again = share.checkpointed if strategy.activation_checkpointing != "none" else 0
    passed = (c - 1) * (2 * share.layers + again)
    home = c * share.layers
    return tuple(
        Message(kind, "context", size, number * both * size, number)
        for kind in ("send", "receive")
        for size, number in ((element, passed), (wide(element), home))
        if number
    )


def attention_s(roof: Roofline, strategy: Strategy, shape: Shape, tokens: int, sequence_length: int) -> float:
    """Return the seconds that a layer's attention computes at least in a forward pass of one micro batch: what hides messages."""
    work = roof.work
    if roof.cluster.accelerator.kind == "cpu":
        return 0.0  # the cores that would send are those that compute
    flops = 2.0 * tokens * sequence_length * work.num_heads / shape.split * work.head_dim
    rate = roof.flash if strategy.attention == "flash" and not work.attention_bias else roof.peak
    return flops / rate


class Context(Room):
    """Sequences split over a context group, whose keys and values travel around it."""

    name = "context"
    reads: Mapping[str, tuple[str, ...]] = {
        "shape": ("context_parallel_degree",),
        "micro_batch": (
            "context_parallel_degree",
            "activation_checkpointing",
            "attention",
            "micro_batch_size",
            "shards_gradients",
        ),
        "messages": (
            *("context_parallel_degree", "activation_checkpointing", "micro_batch_size"),
            "gradient_accumulation_steps",
        ),
        "pass_s": (
            *("context_parallel_degree", "activation_checkpointing", "attention", "micro_batch_size"),
            *("degrees", "num_gpus"),
        ),
    }
    degrees: Mapping[str, Callable[[int, int], list[int]]] = {"context_parallel_degree": degrees}
    apply = ("strategies.context.apply:apply",)

    def misfit(self, strategy: Strategy, sequence_length: int) -> str | None:
        if strategy.context_parallel_degree == 1:
            return None
        try:
            positions(0, strategy.context_parallel_degree, sequence_length)
        except ValueError as error:
            return str(error)
        return None

    def shape(self, strategy: Strategy, shape: Shape) -> Shape:
        return shape._replace(sequence_split=strategy.context_parallel_degree)

    def micro_batch(
        self, question: Question, strategy: Strategy, shape: Shape, micro: MicroBatchBytes
    ) -> MicroBatchBytes:
        c = strategy.context_parallel_degree
        if c == 1:
            return micro
        work, element, kind = question.work, question.element, strategy.activation_checkpointing
        tokens, length = shape.tokens(question, strategy), question.sequence_length
        sizes = {"split": shape.split, "tokens": tokens, "sequence_length": length, "element": element}
        scores = score_bytes(work, strategy, **sizes)
        queries, keys = tokens * (work.num_heads * work.head_dim // shape.split), tokens * (work.kv_size // shape.split)
        partition = 4.0 * tokens * work.num_heads / shape.split
        written = scores > 0
        # The ring keeps the output and its log-sum-exp, no table of scores.
        kept = written * (queries * element + partition - 2.0 * scores)
        # Selective recompute keeps what each step's kernel returned.
        steps = (c - 1) * (queries * element + partition) + written * (partition - scores / 2)
        held = 2 * keys * element
        forward = 2 * held + queries * (2 * wide(element) + element) + 2 * partition
        # Query heads that share keys and values get copies of them.
        copies = 2 * queries * element if keys < queries else 0.0
        forward += copies
        backward = ring_backward_bytes(c, queries, keys, element) + copies + micro.hidden + 3 * partition
        table = scores / c * (4 if written else 0) * wide(element) / element
        ffn = tokens * (work.ffn_size // shape.split) * element
        if strategy.shards_gradients:
            # Gradients of the unit that are there when attention goes backward, beside one matrix.
            products = [
                matmul.inputs * matmul.outputs * matmul.count for matmul in work.matmuls if matmul.name != "qkv"
            ]
            backward += (sum(products) - max(products)) / shape.split * element
            # A block that is made again holds more where its gradients wait (measured: benchmarks.trace --rooms).
            backward += 1.5 * micro.hidden if kind == "full" else 0.0
        return micro._replace(
            layer=micro.layer + kept,
            checkpointed=micro.checkpointed + (kept if kind == "none" else steps if kind == "selective" else 0.0),
            recomputed=micro.recomputed + (kept if kind == "full" else 0.0),
            working=max(micro.working, backward + table - ffn),
            attention_end=micro.attention_end + backward,
            wide=max(micro.wide, forward + table / 2),
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
        sizes = {"split": shape.split, "tokens": shape.tokens(question, strategy), "element": question.element}
        sent = messages(question.work, strategy, share, **sizes)
        return tuple(message.times(strategy.gradient_accumulation_steps) for message in sent)

    def pass_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape) -> tuple[PassSeconds, ...]:
        c = strategy.context_parallel_degree
        if c == 1:
            return ()
        element, tokens = question.element, shape.tokens(question, strategy)
        ring = roof.links.ring(c, strategy.degrees.stride("context"), strategy.num_gpus)
        elements = 2 * tokens * question.work.kv_size / shape.split
        step_s = attention_s(roof, strategy, shape, tokens, question.sequence_length) / c

        def hop_s(num_bytes: float) -> float:
            return num_bytes / ring.bytes_per_s + ring.hop_s + roof.wait_s / 2

        given, back = hop_s(elements * element), hop_s(elements * wide(element))
        forward = (c - 1) * max(0.0, given - step_s)
        # Backward, gradients leave with the next pair; the last ones come home with nothing to hide behind.
        backward = (c - 1) * max(0.0, given + back - roof.constants.flash_backward * step_s) + back
        again = forward if strategy.activation_checkpointing != "none" else 0.0
        return (PassSeconds("context_parallel_s", forward + backward, again),)

    def choice_words(self, strategy: Strategy) -> str:
        return f"ring attention over {strategy.context_parallel_degree}" if strategy.context_parallel_degree > 1 else ""


ROOM = Context()
