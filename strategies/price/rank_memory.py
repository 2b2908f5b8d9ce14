"""What a pipeline rank holds, before any moment of the step is looked at: of the model, of one micro batch, of all that are in
flight. Bytes. Pure."""

from __future__ import annotations

from typing import NamedTuple

from strategies.constants import MemoryConstants
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.price.roofline import ELEMENT
from strategies.recompute import cost as recompute
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero


class Held(NamedTuple):
    """What a rank holds of the model."""

    left: offload.Offloaded
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
    widened: float
    """What the loss widens of them at once."""
    working: float
    """A block's backward pass beyond what was saved."""
    again: float
    """What is computed again of a checkpointed layer, alive while it goes backward."""
    pending: float
    """A layer's between the halves of a split backward pass."""
    final: float
    """What the head keeps: the last block's output and its norm's."""
    numbers: float
    """Ids and positions."""
    boundary: float
    """An activation from another pipeline rank."""


class Saved(NamedTuple):
    """Activations of all micro batches in flight."""

    most: float
    """As a backward pass begins."""
    ever: float
    """In it."""
    turned: float
    """What it adds to them, gone where it is not split."""
    at_head: float
    """At their most, while logits are there, with what the head keeps."""
    final: float
    """Of it, what the head keeps of one micro batch."""
    numbers: float
    """What the embedding keeps of them: ids and positions."""
    one: float
    """Of one micro batch, between forward and backward."""
    waits: float
    """And between the halves of a split backward pass."""
    piled: float
    """What else is kept of the micro batches that wait: by the head of gpipe; what came in, where all else is on the host."""
    states: pipeline.States
    sent: tuple[float, float]
    """What other pipeline ranks may not have received yet, (as a forward pass ends, as a backward pass begins)."""

    @property
    def others(self) -> float:
        """When a pass through the first block ends."""
        return self.most + self.turned


class Holdings:
    """One model's bytes in one precision and sequence length. Keeps what it has worked out, under every field of the strategy
    that it read (but for the bytes of the offload's link, which are no bytes held): a search asks again and again."""

    __slots__ = ("_held", "_micros", "constants", "element", "precision", "sequence_length", "work")

    def __init__(self, work: Workload, precision: str, sequence_length: int, constants: MemoryConstants) -> None:
        self.work, self.precision, self.sequence_length, self.constants = work, precision, sequence_length, constants
        self.element = ELEMENT[precision]
        self._micros: dict[tuple[object, ...], MicroBytes] = {}
        self._held: dict[tuple[object, ...], tuple[Held, tuple[int, int, int], int]] = {}

    def micro(self, strategy: Strategy) -> MicroBytes:
        key = (
            strategy.micro_batch_size,
            strategy.tensor_parallel_degree,
            strategy.pipeline_parallel_degree > 1,
            strategy.sequence_parallel,
            strategy.activation_checkpointing,
            strategy.attention,
            strategy.fused_norm,
            strategy.states,
            strategy.zero_stage,
        )
        known = self._micros.get(key)
        if known is None:
            known = _micro_batch(self.work, strategy, self.constants, self.sequence_length, self.element)
            self._micros[key] = known
        return known

    def held(self, strategy: Strategy, share: pipeline.Share) -> tuple[Held, tuple[int, int, int], int]:
        """What a rank holds of the model, and of it parameters, master weights and moments, and their sum."""
        key = (
            share.layers,
            share.embedding,
            share.head,
            strategy.engine,
            strategy.tensor_parallel_degree,
            strategy.zero_stage,
            strategy.zero_group_size,
            strategy.states,
            strategy.offload,
        )
        known = self._held.get(key)
        if known is None:
            held = _held(self.work, strategy, share, self.precision)
            gpu = held.left.gpu
            states = (int(gpu.parameters), int(gpu.master_weights), int(gpu.optimizer_states))
            known = self._held[key] = held, states, sum(states)
        return known


_KNOWN: dict[tuple[int, int, int, str], Holdings] = {}
_MOST_KNOWN = 512


def holdings(work: Workload, precision: str, sequence_length: int, constants: MemoryConstants) -> Holdings:
    """Cached by identity, as roofline.py's."""
    key = id(work), id(constants), sequence_length, precision
    known = _KNOWN.get(key)
    if known is None or known.work is not work or known.constants is not constants:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = Holdings(work, precision, sequence_length, constants)
    return known


def _micro_batch(
    work: Workload, strategy: Strategy, constants: MemoryConstants, sequence_length: int, element: int
) -> MicroBytes:
    tokens = strategy.micro_batch_size * sequence_length
    hidden = float(tokens * work.hidden_size * element)
    shape = {"tokens": tokens, "sequence_length": sequence_length, "element": element}
    layer = kept = recompute.saved_bytes(work, strategy, constants, selective=False, **shape)
    kind = strategy.activation_checkpointing
    again = 0.0
    if kind == "full":
        kept = recompute.boundary_bytes(work, strategy, tokens=tokens, element=element)
        again = layer - kept
    elif kind == "selective":
        kept = recompute.saved_bytes(work, strategy, constants, selective=True, **shape)
        if not (work.native and strategy.sequence_parallel):
            kept = min(layer, kept)
        again = recompute.selective_again_bytes(work, strategy, tokens=tokens, element=element)
    if work.native:
        working = native_working(work, strategy, tokens, element)
    else:
        working = constants.working_elements * hidden
        if kind == "full":
            scores = recompute.score_bytes(work, strategy, **shape)
            again = constants.recompute_layers * (layer - constants.score_copies * scores)
            again += constants.recompute_scores * scores
    split = strategy.tensor_parallel_degree if strategy.sequence_parallel else 1
    return MicroBytes(
        hidden=hidden,
        layer=layer,
        checkpointed=kept,
        logits=tensor.logit_bytes(work, strategy, constants, tokens=tokens, element=element),
        widened=tensor.widened_bytes(work, strategy, tokens=tokens, element=element),
        working=working,
        again=again,
        # With mean and deviation of two norms, in 32 bit.
        pending=tokens * (element * pipeline.pending_elements(work, strategy) + 4 * 4),
        final=hidden * 2 / split,
        numbers=16.0 * tokens,
        boundary=hidden / split if strategy.pipeline_parallel_degree > 1 else 0.0,
    )


def _held(work: Workload, strategy: Strategy, share: pipeline.Share, precision: str) -> Held:
    """What a rank holds of the model, before any batch."""
    block = tensor.block_parameters(work, strategy)
    ends = {"embedding": share.embedding, "head": share.head}
    outside = tensor.outside_parameters(work, strategy, **ends)
    parameters = share.layers * block + outside
    rows = zero.padding(work, strategy, **ends) if work.native and strategy.zero_stage else (0.0, 0.0)
    states = zero.state_bytes(parameters, strategy, precision, rows[0] + share.layers * rows[1])
    owned = parameters / zero.group_size(strategy)
    table = work.vocab_size * work.embedding_size if outside else 0
    largest = max(table, work.ffn_size * work.hidden_size) / strategy.tensor_parallel_degree / zero.group_size(strategy)
    left = offload.offloaded(states, strategy, num_owned_parameters=owned, element=ELEMENT[precision], largest=largest)
    return Held(left, parameters, block, outside, rows)


def kept_bytes(share: pipeline.Share, micro: MicroBytes) -> float:
    """Activations of one micro batch on one rank."""
    return share.checkpointed * micro.checkpointed + (share.layers - share.checkpointed) * micro.layer


_CARRIED = pipeline.States(*((pipeline.State(at_once, 0.0, 1.0),) for at_once in (1.0, 0.0, 0.0, 1.0)))


def saved_of(strategy: Strategy, share: pipeline.Share, rank: int, micro: MicroBytes) -> Saved:
    one = kept_bytes(share, micro)
    final, flights = micro.final * share.head, pipeline.in_flight(strategy, rank)
    numbers = micro.numbers * pipeline.first_in_flight(strategy) if share.embedding else 0.0
    sends = pipeline.kept_sends(strategy, rank)
    sent = sends[0] * micro.boundary, sends[1] * micro.boundary
    if strategy.offload.activations == "host":
        # A block at work and the one that comes back from the host meanwhile; at the head none has come yet.
        one = min(one, 2 * max(micro.layer * (share.checkpointed < share.layers), micro.checkpointed))
        # What came in from another rank stays, beside its copy.
        given = micro.boundary * flights * (strategy.num_virtual_stages - share.embedding)
        most = one + given
        return Saved(most, most, -one, given + final, final, numbers, one, 0.0, given, _CARRIED, sent)
    states = pipeline.states(strategy, rank)
    turned = -one / strategy.num_virtual_stages
    if not pipeline.splits(strategy):
        piled = final * (pipeline.heads_in_flight(strategy) - 1)
        most = states.begin[0].forward * one + piled
        return Saved(most, most, turned, most + final, final, numbers, one, 0.0, piled, states, sent)
    waits = share.layers * micro.pending
    if strategy.pipeline_schedule == "zbv":
        waits = max(waits, one)  # a search counts on no less (bounds.py)
    # A pass over the inputs turns what a stage's forward left into what its weights wait for, block by block.
    turned += waits / strategy.num_virtual_stages
    last = micro.checkpointed if share.checkpointed == share.layers else min(micro.layer, micro.checkpointed)
    most = max([forward * one + inputs * waits for forward, inputs, _ in states.begin])
    ever = most + max(0.0, turned + last - micro.pending)
    return Saved(most, ever, turned, most + final, final, numbers, one, waits, 0.0, states, sent)


def native_working(work: Workload, strategy: Strategy, tokens: int, element: int) -> float:
    """The feed-forward's backward pass: gradients of ReLU's output and input, of the residual stream and of the norm's
    output; or, where weights are larger than activations, one of its weight gradients in place of the second."""
    tensor_degree = strategy.tensor_parallel_degree
    wide = tokens * work.ffn_size / tensor_degree
    weight = work.ffn_size * work.hidden_size / tensor_degree
    vectors = 4 * work.hidden_size  # gradients of norms and biases
    return element * (wide + max(wide, weight) + 2 * tokens * work.hidden_size + vectors)
