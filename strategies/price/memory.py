"""Bytes of every pipeline rank, by component, at the peak of its step: the fold of the rooms' cost doors.

The peak is the largest of the step's moments (peak.py), not a sum of maxima. docs/explanation/memory-model.md.

For a search, all else equal: bytes never fall as micro_batch_size grows at fixed accumulation, never rise with a wider
zero_group_size, and more checkpointed layers (one or more) never hold more: but with `selective` beside sequence parallelism
in the project's own modules, which keeps more than `none` and never wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from clusters.cluster import Cluster
from strategies.constants import MEMORY, MemoryConstants
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.price.peak import Moment, native_moments, published_moments, size_of, standing_bytes
from strategies.price.rank_memory import Holdings, MicroBytes, holdings, kept_bytes, saved_of
from strategies.strategy import Strategy
from strategies.workload import Workload

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
    holds = holdings(work, precision, sequence_length, constants)
    kind = cluster.accelerator.kind
    shares = pipeline.shares(strategy)
    micro = holds.micro(strategy)
    fills = {rank: _fill(holds, strategy, shares.by_rank[rank], rank, micro) for rank in _fullest(strategy, shares)}
    fullest = max(fills, key=lambda rank: fills[rank].tensors)
    tensors = fills[fullest].tensors
    away = [(each.left, sum(each.states)) for each in fills.values()]
    host, nvme, staging = _away(away, strategy, shares, micro)
    ranks_per_node = min(cluster.gpus_per_node, strategy.num_gpus)
    peak = tensors + reserve_bytes(tensors, kind, constants)

    def stage(rank: int) -> StageMemory:
        known = fills.get(rank)
        return _stage(rank, known or _fill(holds, strategy, shares.by_rank[rank], rank, micro), constants, kind)

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
    holds = holdings(work, precision, sequence_length, MEMORY)
    shares = pipeline.shares(strategy)
    held = [holds.held(strategy, shares.by_rank[rank]) for rank in _fullest(strategy, shares)]
    away = [(each.left, states) for each, _, states in held]
    host, _, staging = _away(away, strategy, shares, holds.micro(strategy))
    return _host_bytes(strategy, "cuda", host, staging, 0) * min(cluster.gpus_per_node, strategy.num_gpus)


def _away(
    ranks: list[tuple[offload.Offloaded, int]], strategy: Strategy, shares: pipeline.Shares, micro: MicroBytes
) -> tuple[float, float, int]:
    """Of a rank, at most: bytes (in host memory, on NVMe, of a checkpoint's one copy). `ranks`: (offloaded, states that stay)."""
    host = max(left.host_bytes for left, _ in ranks)
    if strategy.offload.activations == "host":
        host += max(kept_bytes(share, micro) for share in shares.by_rank) * pipeline.in_flight(strategy, 0)
    return host, max(left.nvme_bytes for left, _ in ranks), max(states for _, states in ranks)


def _host_bytes(strategy: Strategy, kind: str, offloaded: float, staging: float, peak: int) -> int:
    """Of one rank. A `cpu` has no memory but the host's, which holds what it offloads beside the rest."""
    if kind == "cuda":
        return int(offloaded + staging)
    return int(offloaded) + peak if strategy.offload.any else 0


def fits(work: Workload, strategy: Strategy, cluster: Cluster, *, sequence_length: int, precision: str) -> bool:
    """What price_memory says of it, at the first pipeline rank that is too full."""
    holds = holdings(work, precision, sequence_length, MEMORY)
    shares, micro = pipeline.shares(strategy), holds.micro(strategy)
    kind, usable, peak, away = cluster.accelerator.kind, _usable_bytes(cluster), 0, []
    for rank in _fullest(strategy, shares):
        fill = _fill(holds, strategy, shares.by_rank[rank], rank, micro)
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
    holds = holdings(work, precision, sequence_length, MEMORY)
    held, _, states = holds.held(strategy, share)
    once, late = (
        states + standing_bytes(work, strategy, share, held, holds.element, late=late) for late in (False, True)
    )
    return Standing(once, late, held.left.host_bytes + states * (cluster.accelerator.kind == "cuda"))


def micro_bytes(work: Workload, strategy: Strategy, *, sequence_length: int, precision: str) -> MicroBytes:
    """One micro batch on any pipeline rank."""
    return holdings(work, precision, sequence_length, MEMORY).micro(strategy)


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


class _Fill(NamedTuple):
    """A rank at its peak."""

    left: offload.Offloaded
    states: tuple[int, int, int]
    """Parameters, master weights, moments."""
    moment: Moment
    tensors: int


def _fill(holds: Holdings, strategy: Strategy, share: pipeline.Share, rank: int, micro: MicroBytes) -> _Fill:
    """A pipeline rank at the largest of its moments."""
    held, states, num_bytes = holds.held(strategy, share)
    saved = saved_of(strategy, share, rank, micro)
    moments = native_moments if holds.work.native else published_moments
    fullest = max(moments(holds.work, strategy, share, held, micro, saved, holds.element), key=size_of)
    _, gathered, gradients, activations, logits, buffers, temporary = fullest
    rest = int(gathered) + int(gradients) + int(activations) + int(logits) + int(buffers) + int(temporary)
    return _Fill(held.left, states, fullest, num_bytes + rest)


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
