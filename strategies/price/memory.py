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
from strategies.price.rank_memory import RankMemory, rank_memory
from strategies.rank import MicroBatchBytes, ModelStates, PeakCandidate, Share
from strategies.rooms import having
from strategies.shares import Shares, shares
from strategies.strategy import Strategy
from strategies.workload import Workload

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
    """Return the bytes of a strategy whose `stages` are set."""
    memory = rank_memory(work, precision, sequence_length, constants)
    kind, held, micro = cluster.accelerator.kind, shares(strategy), memory.micro(strategy)
    fills = _fills(memory, strategy, held, micro)
    fullest = max(fills, key=lambda rank: fills[rank].tensors)
    tensors = fills[fullest].tensors
    peak = tensors + reserve_bytes(tensors, kind, constants)

    def stage(rank: int) -> StageMemory:
        known = fills.get(rank)
        return _stage(rank, known or _fill(memory, strategy, held.by_rank[rank], rank, micro), constants, kind)

    ranks_per_node = min(cluster.gpus_per_node, strategy.num_gpus)
    return MemoryPrice(
        stages=Stages(stage, len(held.by_rank), fullest),
        peak_bytes=peak,
        usable_bytes=_usable_bytes(cluster),
        host_bytes_per_node=_host_bytes(strategy, kind, list(fills.values()), peak) * ranks_per_node,
        nvme_bytes_per_node=int(max(fill.states.nvme_bytes for fill in fills.values()) * ranks_per_node),
        host_usable_bytes=cluster.host.memory_bytes,
        nvme_usable_bytes=cluster.host.nvme_bytes,
    )


def _host_bytes(strategy: Strategy, kind: str, fills: list[_Fill], peak: int) -> int:
    """Return the host memory of one rank. A `cpu` has no memory but the host's, which holds what it offloads beside the rest;
    beside a GPU it holds a checkpoint's copy too."""
    offloaded = max(fill.states.host_bytes for fill in fills) + max(fill.host_activations for fill in fills)
    if kind == "cuda":
        return int(offloaded + max(sum(fill.staying) for fill in fills))
    return int(offloaded) + peak if strategy.offload.any else 0


class LeastBytes(NamedTuple):
    """Bytes that a pipeline rank holds at least while it goes back through a block, beside activations and `working`."""

    once: float
    """Bytes where a step has fewer micro batches than twice the pipeline ranks."""
    late: float
    """Bytes where a step has more micro batches."""
    host: float
    """Bytes in host memory, a checkpoint's copy among them."""


def least_bytes(
    work: Workload,
    strategy: Strategy,
    share: Share,
    cluster: Cluster,
    *,
    piped: bool,
    sequence_length: int,
    precision: str,
) -> LeastBytes:
    """Return a lower bound of what price_memory counts, which no micro batch's size and no recomputing changes."""
    memory = rank_memory(work, precision, sequence_length, MEMORY)
    states = memory.states(strategy, share)
    staying = sum(_staying(states))
    once, late = (
        staying + sum(room.least_bytes(memory.question, strategy, states, late=late, piped=piped) for room in _LEAST)
        for late in (False, True)
    )
    return LeastBytes(once, late, states.host_bytes + staying * (cluster.accelerator.kind == "cuda"))


def tensor_budget(cluster: Cluster) -> float:
    """Return the part of an accelerator's usable bytes that is left for tensors: the reserve grows with them."""
    added, kept = _reserve(MEMORY, cluster.accelerator.kind)
    return (_usable_bytes(cluster) + ROUNDING - kept) / (1 + added)


def _usable_bytes(cluster: Cluster) -> int:
    calibration = cluster.calibration
    margin = (calibration.memory_error if calibration else None) or MEMORY_ERROR
    return int(cluster.accelerator.memory_bytes * (1 - min(margin, LARGEST_MARGIN)))


class _Fill(NamedTuple):
    """A rank at its peak."""

    states: ModelStates
    staying: tuple[int, int, int]
    """Parameters, master weights and optimizer states on the accelerator, in whole bytes."""
    peak: PeakCandidate
    tensors: int
    """Bytes of all tensors."""
    splits: bool
    """Backward passes run in two halves."""
    host_activations: float


_PEAK, _LEAST = having("peak_candidates"), having("least_bytes")


def _staying(states: ModelStates) -> tuple[int, int, int]:
    gpu = states.gpu
    return int(gpu.parameters), int(gpu.master_weights), int(gpu.optimizer_states)


def _fill(memory: RankMemory, strategy: Strategy, share: Share, rank: int, micro: MicroBatchBytes) -> _Fill:
    """Return a pipeline rank at the largest of its moments."""
    states = memory.states(strategy, share)
    saved = memory.saved(strategy, share, rank, micro)
    found: list[PeakCandidate] = []
    for room in _PEAK:
        found += room.peak_candidates(memory.question, strategy, share, states, micro, saved)
    peak = max(found, key=_size)
    staying = _staying(states)
    tensors = sum(staying) + sum(map(int, peak[1:]))
    return _Fill(states, staying, peak, tensors, saved.splits, saved.host_bytes)


def _size(candidate: PeakCandidate) -> float:
    _, gathered, gradients, activations, logits, buffers, temporary = candidate
    return gathered + gradients + activations + logits + buffers + temporary


def _fills(memory: RankMemory, strategy: Strategy, held: Shares, micro: MicroBatchBytes) -> dict[int, _Fill]:
    """Return, at their peaks, the pipeline ranks of which one is the fullest: where backward passes are split, the last rank of
    a share waits longest for the weights' pass."""
    fills = {rank: _fill(memory, strategy, held.by_rank[rank], rank, micro) for rank in held.fullest}
    if any(fill.splits for fill in fills.values()):
        for rank in held.latest:
            if rank not in fills:
                fills[rank] = _fill(memory, strategy, held.by_rank[rank], rank, micro)
    return fills


def _reserve(constants: MemoryConstants, kind: str) -> tuple[float, float]:
    """(part of the tensors, bytes) that are no tensors."""
    if kind == "cuda":
        return constants.fragmentation, constants.context_bytes
    return constants.cpu_fragmentation, constants.cpu_process_bytes


def reserve_bytes(tensors: int, kind: str, constants: MemoryConstants = MEMORY) -> int:
    """Bytes that are no tensors, beside so many that are, on a "cuda" or "cpu" accelerator."""
    added, kept = _reserve(constants, kind)
    return int(tensors * added + kept)


def _stage(rank: int, fill: _Fill, constants: MemoryConstants, kind: str) -> StageMemory:
    phase, gathered, gradients, activations, logits, buffers, temporary = fill.peak
    reserve = reserve_bytes(fill.tensors, kind, constants)
    return StageMemory(
        pipeline_rank=rank,
        peak_phase=phase,
        parameters=fill.staying[0],
        gathered_parameters=int(gathered),
        master_weights=fill.staying[1],
        gradients=int(gradients),
        optimizer_states=fill.staying[2],
        activations=int(activations),
        logits=int(logits),
        communication_buffers=int(buffers),
        temporary=int(temporary),
        reserve=reserve,
        tensor_peak_bytes=fill.tensors,
        peak_bytes=fill.tensors + reserve,
    )
