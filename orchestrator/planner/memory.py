"""Bytes of every pipeline rank, by component, at the peak of its step: the fold of the rooms' cost doors.

The peak is the largest of the step's moments (moments.py), not a sum of maxima. docs/explanation/memory-model.md.

For a search, all else equal: bytes never fall as micro_batch_size grows at fixed accumulation, never rise with a wider
zero_group_size, and more checkpointed layers (one or more) never hold more: but with `selective` beside sequence parallelism
in the project's own modules, which keeps more than `none` and never wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from clusters.cluster import Cluster
from orchestrator.planner.moments import (
    Held,
    MicroBytes,
    Moment,
    Saved,
    native_moments,
    native_working,
    published_moments,
    size_of,
    standing_bytes,
)
from orchestrator.planner.roofline import ELEMENT
from strategies.constants import MEMORY, MemoryConstants
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.recompute import cost as recompute
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero

CPU_FRAGMENTATION = 0.15
"""Resident set over live tensors, less one, where malloc is left to its defaults."""
CPU_PROCESS_BYTES = 218 * 2**20
"""Resident after the imports."""
COMMUNICATOR_BYTES = 64 * 2**20
"""NCCL's buffers of one communicator beyond the first."""
MEMORY_ERROR = 0.05
"""Margin kept of what the driver reports as total."""
ROUNDING = 16
"""More than what is lost where components are cut to whole bytes."""
LARGEST_MARGIN = 0.25
"""However wrong runs have shown the bytes to be: small models, whose runs tell least, would leave no memory to plan with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """One pipeline rank at its peak, bytes. Names are those of the plan's JSON."""

    pipeline_rank: int
    peak_phase: str
    parameters: int
    gathered_parameters: int
    master_weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    communication_buffers: int
    temporary: int
    reserve: int
    tensor_peak_bytes: int
    peak_bytes: int


class Stages(Sequence[StageMemory]):
    """One entry a pipeline rank, worked out when it is read: a search only wants the fullest."""

    def __init__(self, make: Callable[[int], StageMemory], size: int, fullest: int) -> None:
        self._make, self._size, self._fullest = make, size, fullest
        self._known: dict[int, StageMemory] = {}

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> StageMemory: ...
    @overload
    def __getitem__(self, index: slice) -> list[StageMemory]: ...
    def __getitem__(self, index: int | slice) -> StageMemory | list[StageMemory]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        rank = range(self._size)[index]
        if rank not in self._known:
            self._known[rank] = self._make(rank)
        return self._known[rank]

    def __iter__(self) -> Iterator[StageMemory]:
        return (self[rank] for rank in range(self._size))

    def fullest(self) -> StageMemory:
        """The entry with the largest peak, without working out the others."""
        return self[self._fullest]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stages) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPrice:
    """All pipeline ranks against the budget, bytes."""

    stages: Stages
    peak_bytes: int
    usable_bytes: int
    host_bytes_per_node: int
    nvme_bytes_per_node: int
    host_usable_bytes: int
    nvme_usable_bytes: int

    @property
    def fits(self) -> bool:
        return (
            self.peak_bytes <= self.usable_bytes
            and self.host_bytes_per_node <= self.host_usable_bytes
            and self.nvme_bytes_per_node <= self.nvme_usable_bytes
        )


def price_memory(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
    constants: MemoryConstants = MEMORY,
) -> MemoryPrice:
    """Prices a strategy whose `stages` are set."""
    ledger = _ledger(work, precision, sequence_length, constants)
    kind = cluster.accelerator.kind
    shares = pipeline.shares(strategy)
    micro = ledger.micro(strategy)
    fills = {rank: ledger.fill(strategy, shares.by_rank[rank], rank, micro) for rank in _fullest(strategy, shares)}
    fullest = max(fills, key=lambda rank: fills[rank].tensors)
    tensors = fills[fullest].tensors
    away = [(each.left, sum(each.states)) for each in fills.values()]
    host, nvme, staging = _away(away, strategy, shares, micro)
    ranks_per_node = min(cluster.gpus_per_node, strategy.num_gpus)
    peak = tensors + reserve_bytes(tensors, kind, constants)

    def stage(rank: int) -> StageMemory:
        known = fills.get(rank)
        return _stage(rank, known or ledger.fill(strategy, shares.by_rank[rank], rank, micro), constants, kind)

    return MemoryPrice(
        stages=Stages(stage, strategy.pipeline_parallel_degree, fullest),
        peak_bytes=peak,
        usable_bytes=_usable_bytes(cluster),
        host_bytes_per_node=_host_bytes(strategy, kind, host, staging, peak) * ranks_per_node,
        nvme_bytes_per_node=int(nvme * ranks_per_node),
        host_usable_bytes=cluster.host.memory_bytes,
        nvme_usable_bytes=cluster.host.nvme_bytes,
    )


def host_bytes_per_node(
    work: Workload, strategy: Strategy, cluster: Cluster, *, sequence_length: int, precision: str
) -> int:
    """What price_memory says of it beside GPUs, without the rest."""
    ledger = _ledger(work, precision, sequence_length, MEMORY)
    shares = pipeline.shares(strategy)
    held = [ledger.held(strategy, shares.by_rank[rank]) for rank in _fullest(strategy, shares)]
    away = [(each.left, states) for each, _, states in held]
    host, _, staging = _away(away, strategy, shares, ledger.micro(strategy))
    return _host_bytes(strategy, "cuda", host, staging, 0) * min(cluster.gpus_per_node, strategy.num_gpus)


def _away(
    ranks: list[tuple[offload.Offloaded, int]], strategy: Strategy, shares: pipeline.Shares, micro: MicroBytes
) -> tuple[float, float, int]:
    """Of a rank, at most: bytes (in host memory, on NVMe, of a checkpoint's one copy). `ranks`: (offloaded, states that stay)."""
    host = max(left.host_bytes for left, _ in ranks)
    if strategy.offload.activations == "host":
        host += max(_kept(share, micro) for share in shares.by_rank) * pipeline.in_flight(strategy, 0)
    return host, max(left.nvme_bytes for left, _ in ranks), max(states for _, states in ranks)


def _host_bytes(strategy: Strategy, kind: str, offloaded: float, staging: float, peak: int) -> int:
    """Of one rank. A `cpu` has no memory but the host's, which holds what it offloads beside the rest."""
    if kind == "cuda":
        return int(offloaded + staging)
    return int(offloaded) + peak if strategy.offload.any else 0


def fits(work: Workload, strategy: Strategy, cluster: Cluster, *, sequence_length: int, precision: str) -> bool:
    """What price_memory says of it, at the first pipeline rank that is too full."""
    ledger = _ledger(work, precision, sequence_length, MEMORY)
    shares, micro = pipeline.shares(strategy), ledger.micro(strategy)
    kind, usable, peak, away = cluster.accelerator.kind, _usable_bytes(cluster), 0, []
    for rank in _fullest(strategy, shares):
        fill = ledger.fill(strategy, shares.by_rank[rank], rank, micro)
        peak = max(peak, fill.tensors + reserve_bytes(fill.tensors, kind))
        if peak > usable:
            return False
        away.append((fill.left, sum(fill.states)))
    host, nvme, staging = _away(away, strategy, shares, micro)
    ranks_per_node = min(cluster.gpus_per_node, strategy.num_gpus)
    return (
        _host_bytes(strategy, kind, host, staging, peak) * ranks_per_node <= cluster.host.memory_bytes
        and int(nvme * ranks_per_node) <= cluster.host.nvme_bytes
    )


class Standing(NamedTuple):
    """What a pipeline rank holds at least while it goes back through a block, beside activations and `working`: bytes."""

    once: float
    """Where a step has fewer micro batches than twice the pipeline ranks."""
    late: float
    """Where it has more."""
    host: float
    """In host memory, a checkpoint's copy among them."""


def standing(
    work: Workload, strategy: Strategy, share: pipeline.Share, cluster: Cluster, *, sequence_length: int, precision: str
) -> Standing:
    """Of what price_memory counts, a lower bound that no micro batch's size and no recomputing changes."""
    ledger = _ledger(work, precision, sequence_length, MEMORY)
    held, _, states = ledger.held(strategy, share)
    once, late = (
        states + standing_bytes(work, strategy, share, held, ledger.element, late=late) for late in (False, True)
    )
    return Standing(once, late, held.left.host_bytes + states * (cluster.accelerator.kind == "cuda"))


def micro_bytes(work: Workload, strategy: Strategy, *, sequence_length: int, precision: str) -> MicroBytes:
    """One micro batch on any pipeline rank."""
    return _ledger(work, precision, sequence_length, MEMORY).micro(strategy)


def tensor_budget(cluster: Cluster) -> float:
    """Of an accelerator's usable bytes, what is left for tensors: the reserve grows with them."""
    added, kept = _reserve(MEMORY, cluster.accelerator.kind)
    return (_usable_bytes(cluster) + ROUNDING - kept) / (1 + added)


def _fullest(strategy: Strategy, shares: pipeline.Shares) -> tuple[int, ...]:
    if not pipeline.splits(strategy):
        return shares.fullest
    return tuple(dict.fromkeys((*shares.fullest, *shares.latest)))


def _usable_bytes(cluster: Cluster) -> int:
    calibration = cluster.calibration
    margin = (calibration.memory_error if calibration else None) or MEMORY_ERROR
    return int(cluster.accelerator.memory_bytes * (1 - min(margin, LARGEST_MARGIN)))


class _Ledger:
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

    def fill(self, strategy: Strategy, share: pipeline.Share, rank: int, micro: MicroBytes) -> _Fill:
        """A pipeline rank at the largest of its moments."""
        held, states, num_bytes = self.held(strategy, share)
        saved = _saved(strategy, share, rank, micro)
        moments = native_moments if self.work.native else published_moments
        fullest = max(moments(self.work, strategy, share, held, micro, saved, self.element), key=size_of)
        _, gathered, gradients, activations, logits, buffers, temporary = fullest
        rest = int(gathered) + int(gradients) + int(activations) + int(logits) + int(buffers) + int(temporary)
        return _Fill(held.left, states, fullest, num_bytes + rest)


_KNOWN: dict[tuple[int, int, int, str], _Ledger] = {}
_MOST_KNOWN = 512


def _ledger(work: Workload, precision: str, sequence_length: int, constants: MemoryConstants) -> _Ledger:
    """Cached by identity, as roofline.py's."""
    key = id(work), id(constants), sequence_length, precision
    known = _KNOWN.get(key)
    if known is None or known.work is not work or known.constants is not constants:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = _Ledger(work, precision, sequence_length, constants)
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
        pending=tokens * element * pipeline.pending_elements(work, strategy),
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


def _kept(share: pipeline.Share, micro: MicroBytes) -> float:
    """Activations of one micro batch on one rank."""
    return share.checkpointed * micro.checkpointed + (share.layers - share.checkpointed) * micro.layer


_CARRIED = pipeline.States(*((pipeline.State(at_once, 0.0, 1.0),) for at_once in (1.0, 0.0, 0.0, 1.0)))


def _saved(strategy: Strategy, share: pipeline.Share, rank: int, micro: MicroBytes) -> Saved:
    one = _kept(share, micro)
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


class _Fill(NamedTuple):
    """A rank at its peak."""

    left: offload.Offloaded
    states: tuple[int, int, int]
    """Parameters, master weights, moments."""
    moment: Moment
    tensors: int


def _reserve(constants: MemoryConstants, kind: str) -> tuple[float, float]:
    """(part of the tensors, bytes) that are no tensors."""
    if kind == "cuda":
        return constants.fragmentation, constants.context_bytes
    return CPU_FRAGMENTATION, CPU_PROCESS_BYTES


def reserve_bytes(tensors: int, kind: str, constants: MemoryConstants = MEMORY) -> int:
    """Bytes that are no tensors, beside so many that are, on a "cuda" or "cpu" accelerator."""
    added, kept = _reserve(constants, kind)
    return int(tensors * added + kept)


def _stage(rank: int, fill: _Fill, constants: MemoryConstants, kind: str) -> StageMemory:
    phase, gathered, gradients, activations, logits, buffers, temporary = fill.moment
    reserve = reserve_bytes(fill.tensors, kind, constants)
    return StageMemory(
        pipeline_rank=rank,
        peak_phase=phase,
        parameters=fill.states[0],
        gathered_parameters=int(gathered),
        master_weights=fill.states[1],
        gradients=int(gradients),
        optimizer_states=fill.states[2],
        activations=int(activations),
        logits=int(logits),
        communication_buffers=int(buffers),
        temporary=int(temporary),
        reserve=reserve,
        tensor_peak_bytes=fill.tensors,
        peak_bytes=fill.tensors + reserve,
    )
