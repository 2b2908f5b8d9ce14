"""Tensor and sequence parallelism, priced. Source: arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from strategies.links import Kind, Message, Ring, blocking_s
from strategies.model.cost import gathers_logits
from strategies.price.roofline import Roofline
from strategies.rank import OnceSeconds, PassSeconds, Question, Shape, Share
from strategies.recompute.cost import repeats_sums
from strategies.room import Room
from strategies.rules import Rule
from strategies.sizes import FIRST, GroupRanks, partial
from strategies.strategy import Strategy
from strategies.workload import Workload
from strategies.zero.state_bytes import gradient_element

LINK = ("degrees", "num_gpus", "mesh_order")
"""Fields that say which link a tensor group talks over."""


class Messages(NamedTuple):
    """Messages of one micro batch over a tensor group, forward and backward; empty where there is no group."""

    layer: tuple[Message, ...] = ()
    checkpointed: tuple[Message, ...] = ()
    """More of a layer that is recomputed."""
    embedding: tuple[Message, ...] = ()
    head: tuple[Message, ...] = ()
    """Messages of the head, with the loss."""


def messages(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> Messages:
    """Return what strategies/tensor/region.py and loss.py send, border by border.

    A layer enters columns twice (q, k and v of one input; up) and leaves rows twice (out, down). Recomputing a layer sends its
    forward again, as far as it goes: the project's own stops when the last saved tensor is there, which is before the sum that
    ends the layer unless a norm follows it, and its `selective` computes all but products again. The stacks that published
    repeat a whole forward at `full`, and nothing that talks at `selective`."""
    if strategy.tensor_parallel_degree == 1:
        return Messages()
    activation, wide = tokens * work.hidden_size * element, max(4, element)
    narrow = tokens * work.embedding_size * element
    sums = (2 if work.post_norm else 1) if work.native else 2
    again = sums if repeats_sums(work, strategy) else 0
    if not strategy.sequence_parallel:
        layer = [_message("all_reduce", activation, element, 4)]
        repeated = [_message("all_reduce", activation, element, again)]
        embedding = [_message("all_reduce", activation, element)]
        head = [_message("all_reduce", narrow, element)]
    else:
        # Two enter and two leave rows; an input of columns is gathered again where a gradient of weights needs it.
        gathers = 4 + work.trained_columns
        layer = [
            _message("all_gather", activation, element, gathers),
            _message("reduce_scatter", activation, element, 4),
        ]
        repeated = [
            _message("all_gather", activation, element, 2 if again else 0),
            _message("reduce_scatter", activation, element, again),
        ]
        trains = work.trained is None  # nothing goes back into a frozen embedding
        embedding = [
            _message("reduce_scatter", activation, element),
            _message("all_gather", activation, element, int(trains)),
        ]
        head = [_message("all_gather", narrow, element, 1 + trains), _message("reduce_scatter", narrow, element)]
    if gathers_logits(work, strategy, strategy.tensor_parallel_degree):
        head.append(_message("all_gather", tokens * work.vocab_size * element, element))
    else:  # the largest logit of each token; then its target's and the sum of exponentials
        head.append(Message("all_reduce", "tensor", wide, 3 * tokens * wide, 2))
    parts = (tuple(m for m in part if m.count) for part in (layer, repeated, embedding, head))
    return Messages(*parts)


def _message(kind: Kind, num_bytes: float, element: int, count: int = 1) -> Message:
    return Message(kind, "tensor", element, num_bytes * count, count)


def gradient_message(
    work: Workload, strategy: Strategy, share: Share, *, element: int, ranks: GroupRanks = FIRST
) -> tuple[Message, ...]:
    """Return the message that adds up, once a step after the reduction over replicas, the gradients of which each rank of a
    tensor group has a part: one of the rank's shards. `element`: bytes of a gradient."""
    if strategy.tensor_parallel_degree == 1:
        return ()
    work = work.trains
    sizes = partial(work, strategy.tensor_parallel_degree, strategy.num_shards, ranks.shard, strategy.sequence_parallel)
    held = sizes.held(work, layers=share.layers, embedding=share.embedding, head=share.head)
    return (_message("all_reduce", held * element, element),) if held else ()


def _group(roof: Roofline, strategy: Strategy) -> Ring:
    stride = 1 if strategy.mesh_order[-1] == "tensor" else strategy.degrees.stride("tensor")
    return roof.links.ring(strategy.tensor_parallel_degree, stride, strategy.num_gpus)


class Tensor(Room):
    """Products split over a tensor group, whose messages block."""

    name = "tensor"
    reads: Mapping[str, tuple[str, ...]] = {
        "shape": ("tensor_parallel_degree", "sequence_parallel"),
        "messages": (
            *("tensor_parallel_degree", "sequence_parallel", "activation_checkpointing", "states", "micro_batch_size"),
            *("num_shards", "gradient_accumulation_steps"),
        ),
        "pass_s": (
            *("tensor_parallel_degree", "sequence_parallel", "activation_checkpointing", "states", "micro_batch_size"),
            *LINK,
        ),
        "once_s": ("tensor_parallel_degree", "sequence_parallel", "states", "num_shards", *LINK),
    }
    without_effect = (
        Rule(
            fields=("sequence_parallel", "tensor_parallel_degree"),
            applies=lambda s: s.sequence_parallel and s.tensor_parallel_degree == 1,
            reason="sequence_parallel has no effect at tensor_parallel_degree 1",
            fix="leave it out",
        ),
    )
    apply = ("strategies.tensor.apply:apply",)

    def shape(self, strategy: Strategy, shape: Shape) -> Shape:
        degree = strategy.tensor_parallel_degree
        return shape._replace(split=degree, whole_split=degree if strategy.sequence_parallel else 1)

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
        work, element, times = question.work, question.element, strategy.gradient_accumulation_steps
        parts = messages(work, strategy, tokens=shape.tokens(question, strategy), element=element)
        counts = share.layers, share.checkpointed, int(share.embedding), int(share.head)
        sent = [m.times(number * times) for part, number in zip(parts, counts, strict=True) for m in part if number]
        reduced = gradient_element(strategy, element)
        return (*sent, *gradient_message(work, strategy, share, element=reduced, ranks=ranks))

    def pass_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape) -> tuple[PassSeconds, ...]:
        if strategy.tensor_parallel_degree == 1:
            return ()
        sent = messages(question.work, strategy, tokens=shape.tokens(question, strategy), element=question.element)
        group, wait_s = _group(roof, strategy), roof.wait_s
        seconds = [sum(blocking_s(group, message, wait_s) for message in part) for part in sent]
        return (PassSeconds("tensor_parallel_s", *seconds),)

    def once_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape, share: Share) -> OnceSeconds:
        reduced = gradient_element(strategy, question.element)
        sent = gradient_message(question.work, strategy, share, element=reduced)
        seconds = sum(blocking_s(_group(roof, strategy), message, roof.wait_s) for message in sent)
        return OnceSeconds(seconds, seconds)

    def choice_words(self, strategy: Strategy) -> str:
        return "sequence parallel" if strategy.sequence_parallel and strategy.tensor_parallel_degree > 1 else ""


ROOM = Tensor()
